"""Tables for the terminal: metrics of runs, and what can be named in a config."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table
from rich.text import Text

from holdfast.learner.skills import Skills


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.1f}"


def _nats(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def metrics_table(runs: Sequence[dict[str, Any]]) -> Table:
    """AP, BWT, FWT, learning accuracy and seconds, a row a run; KL to the base where it was measured."""
    table = Table(caption="AP and learning accuracy: higher is better; BWT: 0 is no forgetting (percent)")
    table.add_column("run")
    measured = any(run.get("kl_base") for run in runs)  # only where somebody asked for it
    for head in ("AP", "BWT", "FWT", "learning accuracy", *(("KL to base",) if measured else ()), "seconds"):
        table.add_column(head, justify="right")
    for run in runs:
        cells = [_number(run[key]) for key in ("ap", "bwt", "fwt", "learning_accuracy")]
        if measured:
            cells.append(_nats((run.get("kl_base") or [None])[-1]))
        table.add_row(run["label"], *cells, f"{run['seconds']['total']:.0f}")
    return table


def skills_table(known: Skills) -> Table:
    """What a learner's folder holds, a row a skill."""
    away = any(skill.kl_base is not None for skill in known.skills)
    about = f"percent, on rows kept aside; moved: answered otherwise now than then. {known.method}, "
    if away:
        about = f"KL to base: nats a token on rows of the base's own, after the skill was learned. {about}"
    table = Table(caption=Text(f"{about}{known.disk / 2**20:.1f} MiB on disk"))
    table.add_column("skill", overflow="fold")
    for head in ("learned", "rows", "then", "now", "moved", *(("KL to base",) if away else ())):
        table.add_column(head, justify="right")
    for skill in known.skills:
        rows = "–" if skill.train_rows is None else f"{skill.train_rows}"
        cells = [_number(value) for value in (skill.then, skill.now, skill.drift)]
        cells += [_nats(skill.kl_base)] if away else []
        table.add_row(Text(skill.name), skill.learned[:10] or "–", rows, *cells)
    for name in known.unfinished:
        table.add_row(Text(name), "unfinished")
    return table


def harness_table(scores: Mapping[str, Sequence[float | None]]) -> Table:
    """lm-eval's scores before anything was learned and now, as it gives them."""
    table = Table(caption="scores of lm-eval, as it gives them")
    table.add_column("task and metric", overflow="fold")
    for head in ("base", "now"):
        table.add_column(head, justify="right")
    for name, values in scores.items():
        table.add_row(Text(name), _nats(values[0]), _nats(values[-1]))
    return table


def listing(what: str) -> Table:
    """Strategies, toy tasks, named orders or importances, from their own declarations."""
    return {"strategies": _strategies, "tasks": _tasks, "orders": _orders, "importances": _importances}[
        what
    ]()


def _strategies() -> Table:
    from holdfast.strategies import STRATEGIES

    about = "state: kept between tasks beside the model; answer: its extra cost; both with default options"
    table = Table("name", "what it does", show_lines=True, padding=(0, 0, 0, 1), caption=about)
    for head in ("rehearsal-\nfree", "task\nidentity", "state", "answer"):
        table.add_column(head, no_wrap=True)
    for name, cls in sorted(STRATEGIES.items()):
        what = Text.assemble(cls.summary, "\n", (cls.paper, "dim"))
        flags = ("yes" if flag else "no" for flag in (cls.rehearsal_free, cls.needs_task_identity))
        table.add_row(name, what, *flags, cls.state, cls.inference)
    return table


def _tasks() -> Table:
    from holdfast.tasks import TOY_TASKS

    table = Table(
        "toy task", "what it asks", caption="tasks: {source: toy}; other sources read your own data"
    )
    for name, description in TOY_TASKS.items():
        table.add_row(name, str(description))
    return table


def _orders() -> Table:
    from holdfast.tasks import list_orders

    table = Table("order", "tasks")
    for name, tasks in list_orders().items():
        table.add_row(name, " ".join(tasks))
    return table


def _importances() -> Table:
    from holdfast.importance.registry import REGISTRY

    table = Table("importance", "what it measures", "options")
    for name, entry in sorted(REGISTRY.items()):
        first = (entry.options.__doc__ or "").strip().splitlines()[0]
        options = [key for key in entry.options.model_fields if key != "name"]
        table.add_row(name, first, ", ".join(options) or "–")
    return table
