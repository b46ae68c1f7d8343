"""Tables for the terminal: metrics of runs, and what can be named in a config."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table
from rich.text import Text

from holdfast.learner.skills import Skills
from holdfast.quantities import number
from holdfast.records import RunMetrics


def metrics_table(runs: Sequence[RunMetrics]) -> Table:
    """AP, BWT, FWT, learning accuracy and seconds, a row a run."""
    table = Table(caption="AP and learning accuracy: higher is better; BWT: 0 is no forgetting (percent)")
    table.add_column("run")
    for head in ("AP", "BWT", "FWT", "learning accuracy", "seconds"):
        table.add_column(head, justify="right")
    for run in runs:
        cells = [number(value) for value in (run.ap, run.bwt, run.fwt, run.learning_accuracy)]
        table.add_row(Text(run.label), *cells, number(run.seconds.get("total"), 0))
    return table


def skills_table(known: Skills) -> Table:
    """What a learner's folder holds, a row a skill."""
    about = f"percent, on rows kept aside; moved: answered otherwise now than then. {known.method}, "
    table = Table(caption=Text(f"{about}{known.disk / 2**20:.1f} MiB on disk"))
    table.add_column("skill", overflow="fold")
    for head in ("learned", "rows", "then", "now", "moved"):
        table.add_column(head, justify="right")
    for skill in known.skills:
        rows = "–" if skill.train_rows is None else f"{skill.train_rows}"
        cells = [number(value) for value in (skill.then, skill.now, skill.drift)]
        table.add_row(Text(skill.name), skill.learned[:10] or "–", rows, *cells)
    for name in known.unfinished:
        table.add_row(Text(name), "unfinished", "", "", "", "")
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
