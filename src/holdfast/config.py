"""The YAML as typed models: reading, overriding on the command line, and all errors at once."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from holdfast.errors import ConfigError, RunDirectoryError
from holdfast.places import near
from holdfast.storage import write_text


class Options(BaseModel):
    """Base of every section of a configuration.

    Unknown keys are errors, numbers are finite, and values don't change.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    def refuse_ignored(self, fields: Iterable[str], why: str) -> None:
        """Raise a ValueError if one of the fields, which do nothing here, has not its default.

        A default is let pass: a recorded configuration has them all.
        """
        known = type(self).model_fields
        for name in fields:
            if getattr(self, name) != known[name].get_default(call_default_factory=True):
                raise ValueError(f"`{name}` does nothing {why}; leave it out")


Section = TypeVar("Section", bound=Options)
MAX_SEED = 4_294_966  # a stage's seed is 1000 times the run's and its number, and numpy takes 32 bits


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
        The file can't be read, isn't YAML (with line and column), or isn't a mapping.
    """
    try:
        data = _parse(path.read_text(encoding="utf-8"))
    except OSError as error:
        hint = near(path) if isinstance(error, FileNotFoundError) else ""
        raise ConfigError(f"{path}: can't be read ({error.strerror}).{hint}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{path}: not UTF-8 (byte {error.start + 1}). Save the file in the encoding UTF-8."
        ) from error
    except _NotYamlError as error:
        raise ConfigError(f"{path}: not valid YAML: {error}") from error
    if not isinstance(data, dict):
        got = "nothing" if data is None else "a list" if isinstance(data, list) else repr(data)[:60]
        raise ConfigError(f"{path}: expected a mapping of sections (key: value), got {got}.")
    return data


def write_recorded(path: Path, values: Mapping[str, Any]) -> None:
    """Write what a folder was told, whole or not at all."""
    text = yaml.safe_dump(
        dict(values),
        sort_keys=False,
        allow_unicode=True,
        explicit_start=True,  # so that a torn file is known
        explicit_end=True,
    )
    write_text(path, text)


def read_recorded(path: Path) -> Any:
    """What `write_recorded` wrote; files of earlier versions have no end mark.

    Raises
    ------
    RunDirectoryError
        The file is damaged: torn, or no YAML.
    """
    try:
        return recorded_in(path.read_text(encoding="utf-8"), path)
    except (OSError, ValueError) as error:
        raise _damaged(path, error) from error


def recorded_in(text: str, path: Path) -> Any:
    """The same, of the file's text."""
    try:
        recorded = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise _damaged(path, error) from error
    if text.startswith("---") and text.split()[-1] != "...":
        raise _damaged(path, "its end is missing")
    return recorded


def _damaged(path: Path, why: object) -> RunDirectoryError:
    return RunDirectoryError(
        f"{path}: damaged ({' '.join(str(why).split())}). It is what this folder was told: put it back "
        "from a copy, or choose a new folder."
    )


class _Loader(yaml.SafeLoader):
    """What a configuration means: YAML 1.1 reads ``1e-3`` as text, ``on`` as true, 2024-01-01 as a date,
    ``=`` as a value of no type, 0100 as 64 and 1:30 as 90."""


_TAG = "tag:yaml.org,2002:"
_OURS = {f"{_TAG}{kind}" for kind in ("int", "float", "timestamp", "value")}
_Loader.yaml_implicit_resolvers = {
    first: [
        (tag, regexp)
        for tag, regexp in resolvers
        if not (tag == f"{_TAG}bool" and first in "oOyYnN") and tag not in _OURS
    ]
    for first, resolvers in _Loader.yaml_implicit_resolvers.items()
}
for _kind, _pattern in (
    ("int", r"[-+]?(?:0b[01_]+|0x[0-9a-fA-F_]+|0|[1-9][0-9_]*)"),
    ("float", r"[-+]?(?:\d[\d_]*\.[\d_]*|\.\d[\d_]*)(?:[eE][-+]?\d+)?|[-+]?\d+[eE][-+]?\d+"),
    ("float", r"[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)"),
):
    _Loader.add_implicit_resolver(f"{_TAG}{_kind}", re.compile(f"^(?:{_pattern})$"), list("-+0123456789."))
_PLAIN = {f"{_TAG}{kind}" for kind in ("str", "int", "float", "bool", "null", "map", "seq", "merge")}
_DIGITS = 400  # a number longer than that fits no machine type
_VALUES = 100_000  # aliases written out; a page of nested ones can stand for billions


class _NotYamlError(Exception):
    """Why a text is no YAML that a configuration may have, with line and column."""


def _parse(text: str) -> Any:
    """The value of a YAML text; raises `_NotYamlError` whatever is wrong with it."""
    try:
        loader = _Loader(text)
        try:
            node = loader.get_single_node()
            if node is None:
                return None
            _count(node, {}, set())
            return loader.construct_document(node)
        finally:
            loader.dispose()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        said = ", ".join(part for part in (error.context, error.problem) if part)
        where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        hint = ". Indent with spaces, not with tabs" if "'\\t'" in said else ""
        raise _NotYamlError(f"{where}{said}{hint}") from error
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise _NotYamlError(f"line {line}: the character {error.character!r} isn't allowed") from error
    except RecursionError as error:
        raise _NotYamlError("nested too deeply") from error
    except (ValueError, AttributeError, KeyError) as error:  # ``!!bool maybe``, ``!!int x``
        raise _NotYamlError(f"a value doesn't fit its tag ({error})") from error


def _count(node: yaml.Node, known: dict[int, int], above: set[int]) -> int:
    """Values that a node stands for, aliases written out; refuses what can't be meant."""
    if id(node) in known:
        return known[id(node)]
    if id(node) in above:
        raise _refused("an alias inside the very part that it stands for", node)
    if node.tag not in _PLAIN:
        raise _refused(f"the tag {node.tag.replace(_TAG, '!!')} isn't allowed", node)
    count = 1
    if isinstance(node, yaml.ScalarNode):
        if node.tag in (f"{_TAG}int", f"{_TAG}float") and len(node.value) > _DIGITS:
            raise _refused(f"a number of {len(node.value)} digits", node)
    else:
        above.add(id(node))
        parts = node.value
        if isinstance(node, yaml.MappingNode):
            _refuse_twice(node)
            parts = [part for pair in node.value for part in pair]
        count += sum(_count(part, known, above) for part in parts)
        above.discard(id(node))
    if count > _VALUES:
        raise _refused(f"aliases that stand for more than {_VALUES:,} values", node)
    known[id(node)] = count
    return count


def _refuse_twice(node: yaml.MappingNode) -> None:
    seen: dict[str, int] = {}
    for key, _ in node.value:
        if isinstance(key, yaml.ScalarNode) and key.tag != f"{_TAG}merge":
            if key.value in seen:
                raise _refused(f"the key '{key.value}' is given twice (first in line {seen[key.value]})", key)
            seen[key.value] = key.start_mark.line + 1


def _refused(problem: str, node: yaml.Node) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(problem=problem, problem_mark=node.start_mark)


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
            value = _parse(text)
        except _NotYamlError as error:
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


def differences(there: Any, here: Any, where: str = "") -> Iterator[tuple[str, Any, Any]]:
    """What differs between two dumped configurations: the key with its place, and both values.

    Of a choice by another name the name says enough: the options below are others.
    """
    if isinstance(there, Mapping) and isinstance(here, Mapping):
        if where and there.get("name") != here.get("name"):
            yield f"{where}.name", there.get("name"), here.get("name")
            return
        for key in sorted({*there, *here}):
            yield from differences(there.get(key), here.get(key), f"{where}.{key}" if where else key)
    elif there != here:
        yield where, there, here


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
    lines = list(_unusable(data))
    if not lines:
        try:
            return section.model_validate(data)
        except ValidationError as error:
            lines = _explanations(error, section, data)
    count = f"{len(lines)} problem{'s' if len(lines) > 1 else ''}"
    raise ConfigError(f"{source}: {count} in the configuration:\n" + "\n".join(lines))


def section(kind: type[Section], given: Section | Mapping[str, Any] | None, source: str) -> Section:
    """Options that a function was given as such, as a mapping, or not at all.

    Raises
    ------
    ConfigError
        As of `validate`.
    """
    return given if isinstance(given, kind) else validate(kind, dict(given or {}), source)


def _unusable(value: Any, where: str = "") -> Iterator[str]:
    """Values that no option can have, whatever its type: they would fail far from here."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _unusable(key, where)
            yield from _unusable(inner, f"{where}.{key}" if where else str(key))
    elif isinstance(value, list | tuple):
        for index, inner in enumerate(value):
            yield from _unusable(inner, f"{where}.{index}")
    elif isinstance(value, int) and abs(value) >= 2**63:
        digits = value.bit_length() * 0.30103  # writing it out is quadratic, and refused beyond 4,300 digits
        yield f"  {_shown(where)}: an integer of about {digits:.0f} digits; at most 64 bits are allowed."
    elif isinstance(value, str) and (
        odd := half_character(value) or ("\0" in value and "the character U+0000")
    ):
        yield f"  {_shown(where)}: {odd} is in {value!r:.60}; write real characters."


def _shown(where: str) -> str:
    return where.encode("utf-8", "backslashreplace").decode() or "(top level)"


def half_character(text: str) -> str | None:
    """The first lone surrogate of a text (``"\\ud83d"`` in JSON), in words: no file or tokenizer takes it."""
    half = re.search("[\ud800-\udfff]", text)
    return f"half a character (U+{ord(half[0]):04X})" if half else None


def _explanations(error: ValidationError, section: type[Options], data: Any) -> list[str]:
    """One line for each place: pydantic tells what is wrong for every form that a value might have."""
    found: dict[str, list[str]] = {}
    forms: set[str] = set()  # places where only one of several forms was looked at
    for item in error.errors(include_url=False):
        parts = place_of(item, data)
        where = ".".join(map(str, parts)) or "(top level)"
        found.setdefault(where, []).append(_explain(item, section))
        if item["loc"] and (not parts or item["loc"][-1] != parts[-1]):
            forms.add(where)
    inner = {where for where in forms if any(other.startswith(f"{where}.") for other in found)}
    return [f"  {where}: {_either(said)}" for where, said in found.items() if where not in inner]


def place_of(item: Any, data: Any) -> list[Any]:
    """Where in the data pydantic's error is: its location without the names of unions' members."""
    parts, node, last = [], data, len(item["loc"]) - 1
    for index, part in enumerate(item["loc"]):
        keys: Any = node if isinstance(node, Mapping) else ()
        if isinstance(node, list | tuple):
            keys = range(len(node))
        if part in keys:
            node = node[part]
        elif not (item["type"] == "missing" and index == last):
            continue
        parts.append(part)
    return parts


def _either(said: list[str]) -> str:
    different = list(dict.fromkeys(said))
    if len(different) == 1:
        return different[0]
    got = re.compile(r" \(got .*\)\.")
    *first, last = different
    return " Or: ".join([*(f"{got.sub('', text)}." for text in first), last])


def _explain(item: Any, section: type[Options]) -> str:
    if item["type"] == "extra_forbidden":
        fields = _fields_at(section, item["loc"][:-1])
        near = difflib.get_close_matches(str(item["loc"][-1]), fields, n=1)
        hint = f" Did you mean '{near[0]}'?" if near else ""
        allowed = f" Allowed here: {', '.join(fields)}." if fields else ""
        return f"unknown key.{hint}{allowed}"
    if item["type"] == "missing":
        return "required, but not given."
    if item["type"] == "union_tag_not_found":
        return f"which one? Give its name ({item['ctx']['discriminator']}: ...)."
    if item["type"] == "union_tag_invalid":
        context = item["ctx"]
        hint = _near(context["tag"], context["expected_tags"])
        return f"no such choice: '{context['tag']}'.{hint} Allowed: {context['expected_tags']}."
    got = repr(item.get("input"))
    got = got if len(got) <= 80 else got[:77] + "..."
    hint = _near(item.get("input"), item["ctx"]["expected"]) if item["type"] == "literal_error" else ""
    said = re.sub(r" or instance of \w+$", "", item["msg"].removeprefix("Value error, "))
    for python, yaml_name in _IN_YAML.items():
        said = said.replace(python, yaml_name)
    return f"{said} (got {got}).{hint}"


_IN_YAML = {
    "Tuple should": "List should",
    "valid tuple": "list",
    "valid list": "list",
    "valid dictionary": "mapping of keys to values",
    "valid string": "text",
}


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
