"""Skill units of a run: their importance for each task, in one table (K, figures 6 and 7)."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from holdfast.names import Block, block_of, module_of, order_of
from holdfast.report.importance_map import ImportanceMap, place_of
from holdfast.report.read import RunRecord

Rows = list[list[float | None]]
_RANK = re.compile(r"\[(\d+)\]$")


@dataclass(frozen=True)
class Unit:
    """A matrix, or one rank of a LoRA module. `block` is None outside the transformer blocks."""

    block: Block | None
    module: str
    rank: int | None = None


@dataclass(frozen=True)
class UnitTable:
    """Importance of units by task.

    Attributes
    ----------
    tasks : list of str
        The rows.
    units : list of Unit
        The columns: from the input up, within a block as data flows, then by rank.
    scores : list of list of float or None
        Raw importance for the task alone.
    accumulated : list of list of float or None, or None
        Importance up to and with the task (K, eq. 13), where a run keeps it.
    measured : bool
        Whether the run scored units itself; else a unit is a matrix, its score the prior's mean over it.
    """

    tasks: list[str]
    units: list[Unit]
    scores: Rows
    accumulated: Rows | None
    measured: bool


def unit_table(run: RunRecord, map_of: Callable[[Path], ImportanceMap]) -> UnitTable | None:
    """The units of a run: from ``units.json``, or else its matrices from the priors of at least two tasks."""
    scored = [(stage.task, stage.units) for stage in run.stages if stage.units]
    if scored:
        names = {name: unit_of(name) for _, units in scored for name in units.names}
        order = sorted(names, key=lambda name: _place(names[name]))
        found = [dict(zip(units.names, units.scores, strict=True)) for _, units in scored]
        kept = [dict(zip(units.names, units.accumulated or units.scores, strict=True)) for _, units in scored]
        return UnitTable(
            tasks=[task for task, _ in scored],
            units=[names[name] for name in order],
            scores=[[row.get(name) for name in order] for row in found],
            # eq. 13 starts from the first task's own scores, so a run keeps no others of it
            accumulated=[[row.get(name) for name in order] for row in kept]
            if any(units.accumulated for _, units in scored)
            else None,
            measured=True,
        )
    maps = [(stage.task, map_of(stage.prior)) for stage in run.stages if stage.prior]
    if len(maps) < 2:
        return None
    means = [
        {
            Unit(block, module): mean
            for block, row in zip(heat.blocks, heat.means, strict=True)
            for module, mean in zip(heat.modules, row, strict=True)
            if mean is not None
        }
        for _, heat in maps
    ]
    units = sorted({unit for row in means for unit in row}, key=_place)
    if not units:
        return None
    rows: Rows = [[row.get(unit) for unit in units] for row in means]
    return UnitTable([task for task, _ in maps], units, rows, None, measured=False)


def unit_of(name: str) -> Unit:
    """A unit from its name: a parameter's canonical one, or ``<module>[i]`` for rank i of its adapter."""
    rank = _RANK.search(name)
    if rank:
        weight = f"{name[: rank.start()]}.weight"
        return Unit(block_of(weight), module_of(weight), int(rank[1]))
    leaf = name.rpartition(".")[2]
    module = module_of(name) if leaf == "weight" or leaf == name else f"{module_of(name)}.{leaf}"
    return Unit(block_of(name), module)


def _place(unit: Unit) -> tuple[bool, tuple[bool, Block], tuple[int, int, str], int]:
    return unit.block is None, order_of(unit.block or ("", 0)), place_of(unit.module), unit.rank or 0
