"""The grid of ``holdfast compare``: its YAML as typed models, and the cells that it stands for."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import shlex
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, field_validator, model_validator

from holdfast.config import Options, override, read_yaml, validate
from holdfast.errors import ConfigError
from holdfast.evaluation.predictions import file_safe
from holdfast.places import Output
from holdfast.quantities import short
from holdfast.runner.config import RunConfig
from holdfast.tasks.options import Name

SET_BY_THE_SWEEP = ("output", "label", "seed")


def _refuse_own(keys: Iterable[str]) -> None:
    for key in keys:
        if key in SET_BY_THE_SWEEP:
            raise ValueError(f"'{key}' is set by the sweep itself, for each cell")


def _one_line(name: str) -> str:
    if not name.strip() or len(name.splitlines()) > 1:
        raise ValueError("a row's name is one line of text, by which tables and folders call it")
    return name


def _different(values: Any) -> Any:
    names = [getattr(value, "name", value) for value in values or ()]
    if twice := [name for i, name in enumerate(names) if name in names[:i]]:
        raise ValueError(f"{twice[0]!r} stands in it twice")
    return values


class GridRow(Options):
    """One method: what it changes in the base, and the values to try for some keys."""

    name: Annotated[Name, AfterValidator(_one_line)]
    set: dict[str, Any] = Field(default_factory=dict, description="key to value, such as strategy: ewc")
    grid: dict[str, list[Any]] = Field(
        default_factory=dict, description="key to its values; every combination is tried"
    )

    @model_validator(mode="after")
    def _keys(self) -> GridRow:
        _refuse_own((*self.set, *self.grid))
        if empty := [key for key, values in self.grid.items() if not values]:
            raise ValueError(f"'{empty[0]}' has no values to try")
        if both := sorted(set(self.set) & set(self.grid)):
            raise ValueError(f"'{both[0]}' stands in `set` and in `grid`; leave it in one")
        return self

    def lines(self) -> list[Line]:
        """One for each combination of the grid's values; one at an empty point without a grid."""
        combinations = itertools.product(*self.grid.values())
        return [Line(self.name, dict(zip(self.grid, values, strict=True))) for values in combinations]


class Choose(Options):
    """How each row's best grid point is picked before the test rows are looked at."""

    on: Literal["validation"] = "validation"
    by: Literal["ap", "bwt", "learning_accuracy"] = Field("ap", description="the highest wins")
    seeds: Annotated[tuple[int, ...] | None, AfterValidator(_different)] = Field(
        None, min_length=1, description="seeds to choose with; the sweep's first one when omitted"
    )
    set: dict[str, Any] = Field(
        default_factory=dict,
        description="changes while choosing, such as tasks.train_rows: 200 where too few rows are left out",
    )

    @field_validator("set")
    @classmethod
    def _keys(cls, values: dict[str, Any]) -> dict[str, Any]:
        _refuse_own(values)
        if "tasks.test_split" in values:
            raise ValueError("'tasks.test_split' is set by `on`, while choosing")
        return values


class Grid(Options):
    """A sweep: rows × grid points × orders × seeds."""

    output: Output = Field(description="folder of the sweep; started again, it continues there")
    base: dict[str, Any] = Field(
        description="what all cells share: a run's configuration, or the path of one, from the grid's folder"
    )
    seeds: Annotated[tuple[int, ...], AfterValidator(_different)] = Field((0,), min_length=1)
    orders: Annotated[tuple[tuple[Name, ...] | Name, ...] | None, AfterValidator(_different)] = Field(
        None, min_length=1, description="task orders: lists of names, or named ones; the base's when omitted"
    )
    rows: Annotated[tuple[GridRow, ...], AfterValidator(_different)] = Field(min_length=1)
    reference: Name | None = Field(
        None, description="the row that differences are taken against; the first when omitted"
    )
    choose: Choose | None = None
    jobs: int = Field(1, ge=1, description="cells at a time, each in a process of its own when above 1")

    @model_validator(mode="after")
    def _points_differ(self) -> Grid:
        for row in self.rows:
            if self.choose is not None and (both := sorted(self.choose.set.keys() & row.grid.keys())):
                raise ValueError(
                    f"'{both[0]}' stands in `choose.set`, and row '{row.name}' tries values of it, which "
                    "would all be the same while choosing; leave it out there"
                )
        return self

    @property
    def lines(self) -> list[Line]:
        """Every line, in the grid's order."""
        return [line for row in self.rows for line in row.lines()]


@dataclass(frozen=True)
class Line:
    """One line of the table: a row at one point of its grid."""

    row: str
    point: Mapping[str, Any]

    @property
    def label(self) -> str:
        """The row's name and what distinguishes the point: ``ewc · strength=1000``."""
        return " · ".join([self.row, *(f"{_short(k, self.point)}={_text(v)}" for k, v in self.point.items())])

    @property
    def folder(self) -> Path:
        """The line's folder, below that of its phase."""
        parts = [f"{_short(k, self.point)}-{_text(v)}" for k, v in self.point.items()]
        return Path(file_safe(self.row), file_safe(" ".join(parts)))


@dataclass(frozen=True)
class Cell:
    """One run of the sweep.

    Attributes
    ----------
    order : str
        Name of the order, "" where the sweep has only the base's.
    command : str
        What runs the same by hand.
    """

    line: Line
    seed: int
    order: str
    config: RunConfig
    command: str

    @property
    def name(self) -> str:
        """How messages call it."""
        split = "validation" if self.config.tasks.test_split == "validation" else ""
        return ", ".join(filter(None, [self.line.label, self.order, f"seed {self.seed}", split]))

    @property
    def folder(self) -> Path:
        """Its run directory."""
        return Path(self.config.output)


@dataclass(frozen=True)
class Plan:
    """A grid with all its cells; `candidates` are those that only choose, on validation rows."""

    source: str
    grid: Grid
    cells: tuple[Cell, ...]
    candidates: tuple[Cell, ...]

    @property
    def reference(self) -> str:
        """Name of the reference row, or label of the reference line."""
        return self.grid.reference or self.grid.rows[0].name


def load_grid(path: Path, overrides: Iterable[str] = ()) -> Plan:
    """Read a grid, apply ``key=value`` overrides, and validate all of it.

    ``base.training.epochs=1`` reaches into the base; a path in ``base=`` is from the working directory.

    Raises
    ------
    ConfigError
        With the problems of the grid, or else with those of all cells, each with the cells that have it.
    """
    given, data = list(overrides), read_yaml(path)
    if {"model", "tasks"} <= data.keys():
        raise ConfigError(
            f"{path}: the config of one run (it has model and tasks), for `holdfast run`; "
            f"a grid has rows, and this under base: {path}."
        )
    first = [a for a in given if a.partition("=")[0].strip() == "base"]
    rest = [a for a in given if a not in first]
    base = data.get("base")
    file = path.parent / base if isinstance(base, str) else None
    if first:
        named = override({}, first)["base"]
        file = Path(named) if isinstance(named, str) else None
    if file is not None:
        data["base"] = read_yaml(file)
    if any(a.partition("=")[0].strip().startswith("base.") for a in rest):
        file = None  # no file holds this base: the sweep writes one
    data = override(data, rest)
    data.setdefault("output", f"runs/{path.stem}")
    grid = validate(Grid, data, source=str(path))
    shown = Path(os.path.relpath(file)) if file is not None else Path(grid.output, "base.yaml")
    return _Planner(grid, shown, str(path)).plan()


class _Planner:
    """Makes the cells and collects what is wrong with them."""

    def __init__(self, grid: Grid, base: Path, source: str) -> None:
        self.grid, self.base, self.source = grid, base, source
        self.problems: dict[str, list[str]] = {}

    def plan(self) -> Plan:
        grid, choose = self.grid, self.grid.choose
        cells: list[Cell] = []
        candidates: list[Cell] = []
        for row in grid.rows:
            lines = row.lines()
            for line in lines:
                for order, seed in itertools.product(self._orders(), grid.seeds):
                    cells += self._cell(row, line, "runs", order, seed, {})
                if choose is None or len(lines) == 1:
                    continue
                extra = {**choose.set, "tasks.test_split": "validation"}
                for seed in choose.seeds or grid.seeds[:1]:
                    candidates += self._cell(row, line, "validation", self._orders()[0], seed, extra)
        self._check_grid(cells)
        raise_for_cells(self.source, self.problems)
        return Plan(self.source, grid, tuple(cells), tuple(candidates))

    def _orders(self) -> list[tuple[str, Any]]:
        """Name and value of each order; one without either where the base's is kept."""
        if self.grid.orders is None:
            return [("", None)]
        names = enumerate(self.grid.orders, start=1)
        return [(o if isinstance(o, str) else f"order {i}", o) for i, o in names]

    def _cell(
        self, row: GridRow, line: Line, phase: str, order: tuple[str, Any], seed: int, extra: dict[str, Any]
    ) -> Iterator[Cell]:
        name, tasks = order
        changes = {**row.set, **line.point, **extra}
        if tasks is not None:
            changes["tasks.order"] = tasks
        folder = Path(self.grid.output, phase, line.folder, "-".join(filter(None, [name, f"seed-{seed}"])))
        where = ", ".join(filter(None, [line.label, name, "validation" if extra else ""]))
        assignments = [_assignment(key, value) for key, value in (changes | {"seed": seed}).items()]
        own = {"output": str(folder), "label": line.label}
        try:
            config = validate(RunConfig, {**override(self.grid.base, assignments), **own}, source=where)
        except ConfigError as error:
            for problem in str(error).splitlines()[1:]:
                found = self.problems.setdefault(problem.strip(), [])
                if where not in found:
                    found.append(where)
            return
        where_to = [_assignment(key, value) for key, value in own.items()]  # without, not this cell's folder
        command = shlex.join(["holdfast", "run", str(self.base), *assignments, *where_to])
        yield Cell(line, seed, name, config, command)

    def _check_grid(self, cells: list[Cell]) -> None:
        grid = self.grid
        labels = [line.label for line in grid.lines]
        if twice := [label for i, label in enumerate(labels) if label in labels[:i]]:
            self.problems[f"'{twice[0]}' stands in the grid twice"] = ["rows"]
        tried = {row.name: len(row.lines()) for row in grid.rows}
        reference = grid.reference or grid.rows[0].name
        if reference not in tried and (grid.choose is not None or reference not in labels):
            self.problems[f"no row '{reference}'. Allowed: {', '.join(tried)}."] = ["reference"]
        elif tried.get(reference, 1) > 1 and grid.choose is None:
            these = ", ".join(f"'{label}'" for label in labels if label.startswith(f"{reference} · "))
            self.problems[f"'{reference}' has several grid points; name one: {these}."] = ["reference"]
        if grid.choose is not None and all(count == 1 for count in tried.values()):
            self.problems["no row has several grid points to choose from"] = ["choose"]
        splits: dict[str, str] = {}
        for cell in cells:
            splits.setdefault(cell.config.tasks.test_split, cell.line.label)
        if len(splits) > 1:
            problem = (
                f"{' and '.join(splits)} rows (tasks.test_split) are not to be compared; take one of them"
            )
            self.problems[problem] = list(splits.values())
        elif grid.choose is not None and "validation" in splits:
            problem = "tasks.test_split: validation would score the chosen points on validation rows too"
            self.problems[f"{problem}; `choose` sets it where it is meant"] = ["choose"]


def raise_for_cells(source: str, problems: Mapping[str, list[str]]) -> None:
    """Raise one `ConfigError` with every problem and the cells that have it, if there is any."""
    if not problems:
        return
    lines = []
    for problem, where in problems.items():
        few = ", ".join(where[:3]) + (f" and {len(where) - 3} more" if len(where) > 3 else "")
        lines.append(f"  {few}: {problem}")
    count = f"{len(lines)} problem{'s' if len(lines) > 1 else ''}"
    raise ConfigError(f"{source}: {count}; nothing was run:\n" + "\n".join(lines))


def _assignment(key: str, value: Any) -> str:
    """``key=value`` as typed on the command line: it gives the same value back."""
    if isinstance(value, str):
        with contextlib.suppress(ConfigError):  # a text that is no YAML needs its quotes
            if override({}, [f"x={value}"]) == {"x": value}:
                return f"{key}={value}"
    return f"{key}={json.dumps(value, ensure_ascii=False, default=str)}"


def _short(key: str, point: Mapping[str, Any]) -> str:
    """The last word of a key, or as many as tell it from the point's other keys."""
    parts = key.split(".")
    for count in range(1, len(parts)):
        short = ".".join(parts[-count:])
        if [k for k in point if k == short or k.endswith(f".{short}")] == [key]:
            return short
    return key


def _text(value: Any) -> str:
    if isinstance(value, float):
        return short(value)
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
