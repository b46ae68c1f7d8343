"""A page of every config key for mkdocs, made from the models that read the configuration.

Unlike the other reference pages this one imports the package, because defaults and allowed values are known
only to the models.
"""

from __future__ import annotations

import types
import typing
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

PAGE = "reference/keys.md"


class Key(NamedTuple):
    """One row: where it stands, what it may be, what it is where nobody says, and what it does."""

    path: str
    allowed: str
    default: str
    meaning: str


def models_in(annotation: Any) -> list[Any]:
    """The option models that a value may be."""
    from pydantic import BaseModel

    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for part in typing.get_args(annotation) for model in models_in(part)]


def tag_of(model: Any) -> str | None:
    """The name by which a model is chosen among several."""
    for key in ("name", "source"):
        field = model.model_fields.get(key)
        if field is not None and typing.get_origin(field.annotation) is Literal:
            return str(typing.get_args(field.annotation)[0])
    return None


def allowed(field: Any) -> str:
    """A field's values, in words."""
    limits = [
        f"{sign} {getattr(rule, name)}"
        for rule in field.metadata
        for name, sign in (("gt", ">"), ("ge", "≥"), ("lt", "<"), ("le", "≤"))
        if getattr(rule, name, None) is not None
    ]
    return ", ".join([kind_of(field.annotation), *limits])


def kind_of(annotation: Any) -> str:
    """A type, in words."""
    names = {int: "whole number", float: "number", str: "text", bool: "true or false", type(None): "none"}
    if annotation in names:
        return names[annotation]
    origin, parts = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Literal:
        return ", ".join(f"`{part}`" for part in parts)
    if origin is typing.Annotated:
        return kind_of(parts[0])
    if origin in (typing.Union, types.UnionType):
        return " or ".join(dict.fromkeys(kind_of(part) for part in parts))
    if origin in (tuple, list):
        return f"list of {kind_of(parts[0])}"
    if origin is dict:
        return f"{kind_of(parts[0])} to {kind_of(parts[1])}"
    if models_in(annotation):
        return "options"
    return getattr(annotation, "__name__", str(annotation)).lower()


def default_of(field: Any) -> str:
    """What a field is where nobody says; "needed" where somebody must."""
    if field.is_required():
        return "needed"
    value = field.get_default(call_default_factory=True)
    if value is None:
        return "–"
    if models_in(type(value)):
        return f"`{value.name}`" if getattr(value, "name", None) else "the defaults below"
    if isinstance(value, tuple | list | dict) and not value:
        return "none"
    return f"`{str(value).lower() if isinstance(value, bool) else value}`"


def sections() -> dict[str, list[Key]]:
    """Heading to keys: the run's own first, then each choice (``strategy: ewc``) that a key gives."""
    from holdfast.runner.config import RunConfig
    from holdfast.sweep.grid import Grid

    found: dict[str, list[Key]] = {}
    for heading, model in (("A run", RunConfig), ("A comparison (`holdfast compare`)", Grid)):
        found[heading] = []
        found[heading] += keys(model, "", found)
    return found


def keys(model: Any, prefix: str, found: dict[str, list[Key]]) -> Iterator[Key]:
    """A model's keys; those of its parts follow them, and those of choices become sections of their own."""
    for name, field in model.model_fields.items():
        if name == "name" and tag_of(model) is not None:
            continue
        path, inner = f"{prefix}{name}", models_in(field.annotation)
        choices = {tag: part for part in inner if (tag := tag_of(part)) is not None}
        what = allowed(field) if not choices else ", ".join(f"`{tag}`" for tag in choices)
        meaning = " ".join((field.description or "").split())
        yield Key(path, what, default_of(field), meaning)
        for tag, part in choices.items():
            heading = f"`{name}: {tag}`"
            if heading not in found:
                found[heading] = []  # before its keys, or a choice that holds itself would never end
                found[heading] += keys(part, "", found)
        for part in inner:
            if part not in choices.values():
                yield from keys(part, f"{path}.", found)


def page() -> str:
    """The page's Markdown."""
    lines = [
        "# Config keys",
        "",
        "Every key of a config, made from the models that read it. On the command line a key is `a.b=value`. "
        "A section that is chosen by name may be the name alone: `strategy: ewc`.",
    ]
    for heading, rows in sections().items():
        lines += ["", f"## {heading}", ""]
        if not rows:
            lines.append("No options.")
            continue
        lines += ["| key | allowed | default | |", "|---|---|---|---|"]
        for key in rows:
            cells = (f"`{key.path}`", key.allowed, key.default, key.meaning)
            lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def on_config(config: Any) -> None:
    """Put the page into the navigation, before the reference of the code."""
    config.nav.insert(len(config.nav) - 1, {"Config keys": PAGE})


def on_files(files: Any, config: Any) -> None:
    """Add the page to those in the folder."""
    from mkdocs.structure.files import File

    files.append(File.generated(config, PAGE, content=page()))
