"""The YAML as typed models: reading, overriding on the command line, and all errors at once."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from holdfast.errors import ConfigError


class Options(BaseModel):
    """Base of every section of a configuration: unknown keys are errors, and values don't change."""

    model_config = ConfigDict(extra="forbid", frozen=True)


Section = TypeVar("Section", bound=Options)


def named(value: Any) -> Any:
    """Let ``fisher`` stand for ``{name: fisher}`` wherever an option set is chosen by name."""
    return {"name": value} if isinstance(value, str) else value


def named_or(default: str) -> Callable[[Any], Any]:
    """Like `named`; options without a name (``{strength: 100}``) are those of the default choice."""

    def complete(value: Any) -> Any:
        return (
            {"name": default, **value} if isinstance(value, Mapping) and "name" not in value else named(value)
        )

    return complete


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a YAML mapping.

    Raises
    ------
    ConfigError
        The file is missing, isn't YAML (with line and column), or isn't a mapping.
    """
    try:
        data = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    except OSError as error:
        raise ConfigError(f"{path}: can't be read ({error.strerror}).") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not valid YAML: {error}") from error
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: expected a mapping of sections, got {type(data).__name__}.")
    return data


class _Loader(yaml.SafeLoader):
    """YAML 1.1 reads ``1e-3`` as text, and ``on`` as true; a config means a number, and the word."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:\d+\.?\d*|\.\d+)[eE][-+]?\d+$"),
    list("-+0123456789."),
)
_Loader.yaml_implicit_resolvers = {
    first: [
        (tag, regexp)
        for tag, regexp in resolvers
        if not (tag == "tag:yaml.org,2002:bool" and first in "oOyYnN")
    ]
    for first, resolvers in _Loader.yaml_implicit_resolvers.items()
}


def override(data: Mapping[str, Any], assignments: Iterable[str]) -> dict[str, Any]:
    """Apply ``section.key=value`` assignments; values are YAML.

    A section given by name alone (``strategy.importance=fisher``) replaces the section, so options of
    the old choice don't linger.

    Raises
    ------
    ConfigError
        An assignment has no ``=``, an empty key, or goes below something that isn't a section.
    """
    result = _copy(data)
    problems = []
    for assignment in assignments:
        key, equals, text = assignment.partition("=")
        parts = key.strip().split(".")
        if not equals or not all(parts):
            problems.append(f"'{assignment}': expected key=value, such as training.epochs=3.")
            continue
        try:
            value = yaml.load(text, Loader=_Loader)
        except yaml.YAMLError as error:
            problems.append(f"'{assignment}': the value is not valid YAML: {error}")
            continue
        node = result
        for depth, part in enumerate(parts[:-1]):
            child = node.get(part)
            if child is None:
                child = node[part] = {}
            elif isinstance(child, str) and depth < len(parts) - 1:
                child = node[part] = {"name": child}
            if not isinstance(child, dict):
                where = ".".join(parts[: depth + 1])
                problems.append(f"'{assignment}': {where} is {child!r}, not a section.")
                break
            node = child
        else:
            node[parts[-1]] = value
    if problems:
        raise ConfigError("The command line's overrides are wrong:\n" + "\n".join(f"  {p}" for p in problems))
    return result


def _copy(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {k: _copy(v) for k, v in value.items()}
    return [_copy(v) for v in value] if isinstance(value, list) else value


def validate(section: type[Section], data: Mapping[str, Any], source: str) -> Section:
    """Turn a mapping into a typed section.

    Raises
    ------
    ConfigError
        One message that lists every problem: where, what was got, what is allowed.
    """
    try:
        return section.model_validate(data)
    except ValidationError as error:
        lines = [_explain(item, section) for item in error.errors(include_url=False)]
        count = f"{len(lines)} problem{'s' if len(lines) > 1 else ''}"
        raise ConfigError(f"{source}: {count} in the configuration:\n" + "\n".join(lines)) from error


def _explain(item: Any, section: type[Options]) -> str:
    where = ".".join(str(part) for part in item["loc"]) or "(top level)"
    if item["type"] == "extra_forbidden":
        fields = _fields_at(section, item["loc"][:-1])
        near = difflib.get_close_matches(str(item["loc"][-1]), fields, n=1)
        hint = f" Did you mean '{near[0]}'?" if near else ""
        allowed = f" Allowed here: {', '.join(fields)}." if fields else ""
        return f"  {where}: unknown key.{hint}{allowed}"
    if item["type"] == "missing":
        return f"  {where}: required, but not given."
    if item["type"] == "union_tag_not_found":
        return f"  {where}: which one? Give its name ({item['ctx']['discriminator']}: ...)."
    if item["type"] == "union_tag_invalid":
        context = item["ctx"]
        hint = _near(context["tag"], context["expected_tags"])
        return f"  {where}: no such choice: '{context['tag']}'.{hint} Allowed: {context['expected_tags']}."
    got = repr(item.get("input"))
    got = got if len(got) <= 80 else got[:77] + "..."
    hint = _near(item.get("input"), item["ctx"]["expected"]) if item["type"] == "literal_error" else ""
    return f"  {where}: {item['msg'].removeprefix('Value error, ')} (got {got}).{hint}"


def _near(given: Any, quoted: str) -> str:
    """A hint at the closest of some names that pydantic lists in quotes."""
    near = difflib.get_close_matches(str(given), re.findall(r"'([^']+)'", quoted), n=1)
    return f" Did you mean '{near[0]}'?" if near else ""


def _fields_at(section: type[BaseModel], location: tuple[Any, ...]) -> list[str]:
    """The allowed keys at a place of the schema, following unions by their discriminator."""
    if not location:
        return sorted(section.model_fields)
    field = section.model_fields.get(str(location[0]))
    if field is None:
        return []
    inner = [c for c in _models_in(field.annotation) if c is not None]
    rest = location[1:]
    if len(inner) > 1 and rest:
        tagged = [c for c in inner if _tag(c) == rest[0]]
        inner, rest = (tagged, rest[1:]) if tagged else (inner, rest)
    return _fields_at(inner[0], rest) if inner else []


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    found: list[type[BaseModel]] = []
    for argument in getattr(annotation, "__args__", ()):
        found += _models_in(argument)
    return found


def _tag(model: type[BaseModel]) -> Any:
    for key in ("name", "source"):
        if key in model.model_fields:
            annotation = model.model_fields[key].annotation
            return getattr(annotation, "__args__", (None,))[0]
    return None
