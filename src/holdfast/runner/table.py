"""Tables for the terminal: metrics of runs, and what can be named in a config."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from holdfast.evaluation.scores import METRICS
from holdfast.importance import ImportancePrior
from holdfast.importance.agreement import Agreement
from holdfast.learner.asked import ends
from holdfast.learner.skills import Skills
from holdfast.names import Block
from holdfast.quantities import count, mebibytes, number, rounded
from holdfast.records import RunMetrics
from holdfast.tables import csv_text, latex_text


@dataclass
class Rows:
    """A table on a terminal wide enough for its longest words; on a narrower one, each row as a list.

    Cells are shown as they stand: a label with ``[/x]`` or ``:one:`` in it is neither markup nor an emoji.

    Attributes
    ----------
    head : sequence of str
        The columns' names; "" for one that speaks for itself.
    rows : sequence of sequences
        Texts.
    numbers : bool
        Whether all columns but the first hold numbers, set to the right.
    """

    head: Sequence[str]
    rows: Sequence[Sequence[str | Text]]
    caption: str | None = None
    numbers: bool = False
    lines: bool = False

    def csv(self) -> str:
        """As comma-separated text."""
        return csv_text(self.head, self.rows)

    def latex(self) -> str:
        """As a LaTeX ``tabular``."""
        return latex_text(self.head, self.rows, self.caption or "")

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        columns = zip(self.head, *self.rows, strict=True)
        words = [max(len(word) for cell in column for word in ["", *str(cell).split()]) for column in columns]
        if sum(words) + 3 * len(words) + 1 <= options.max_width:  # with blanks and lines around each
            yield self._table()
            return
        for first, *cells in self.rows:
            yield Text.assemble(_text(first), style="bold")
            for name, cell in zip(self.head[1:], cells, strict=True):
                yield Padding(
                    Text.assemble(f"{' '.join(name.split())}: " if name else "", _text(cell)), (0, 0, 0, 2)
                )
        if self.caption:
            yield Text(self.caption, style="italic")

    def _table(self) -> Table:
        table = Table(
            caption=None if self.caption is None else Text(self.caption),
            show_header=any(self.head),
            show_lines=self.lines,
            padding=(0, 0, 0, 1) if self.lines else (0, 1),
        )
        for index, name in enumerate(self.head):
            table.add_column(Text(name), justify="right" if self.numbers and index else "left")
        for row in self.rows:
            table.add_row(*map(_text, row))
        return table


def _text(cell: str | Text) -> Text:
    return cell if isinstance(cell, Text) else Text(cell)


def metrics_table(runs: Sequence[RunMetrics]) -> Rows:
    """AP, BWT, FWT, learning accuracy and seconds, a row a run; KL to the base where it was measured."""
    away = any(run.kl_base for run in runs)  # only where somebody asked for it
    rows = []
    for run in runs:
        cells = [number(value) for value in (run.ap, run.bwt, run.fwt, run.learning_accuracy)]
        if away:
            cells.append(number(run.kl_base[-1] if run.kl_base else None, 3))
        rows.append((run.label, *cells, number(run.seconds.get("total"), 0)))
    return Rows(
        ("run", "AP", "BWT", "FWT", "learning accuracy", *(("KL to base",) if away else ()), "seconds"),
        rows,
        caption="AP and learning accuracy: higher is better; BWT: 0 is no forgetting (percent)"
        + ("; KL to base: nats a token" if away else "")
        + ("; a task that comes again counts once" if any(run.same_as for run in runs) else ""),
        numbers=True,
    )


def skills_table(known: Skills) -> Rows:
    """What a learner's folder holds, a row a skill."""
    away = any(skill.kl_base is not None for skill in known.skills)
    rows = [
        (
            skill.name,
            skill.learned[:10] or "–",
            "–" if skill.train_rows is None else f"{skill.train_rows}",
            *(number(value) for value in (skill.then, skill.now, skill.drift)),
            *((number(skill.kl_base, 3),) if away else ()),
        )
        for skill in [*([] if known.base is None else [known.base]), *known.skills]
    ]
    head = ("skill", "learned", "rows", "then", "now", "moved", *(("KL to base",) if away else ()))
    rows += [(name, "unfinished", *[""] * (len(head) - 2)) for name in known.unfinished]
    about = (
        "KL to base: nats a token on rows of the base's own, after the skill was learned. " if away else ""
    )
    return Rows(
        head,
        rows,
        caption=f"{about}percent, on rows kept aside; moved: answered otherwise now than then. "
        f"{known.method}, {mebibytes(known.disk)} on disk",
        numbers=True,
    )


def harness_table(scores: Mapping[str, Sequence[float | None]]) -> Rows:
    """lm-eval's scores before anything was learned and now, as it gives them."""
    return Rows(
        ("task and metric", "base", "now"),
        [(name, *(number(value, 3) for value in ends(values))) for name, values in scores.items()],
        caption="scores of lm-eval, as it gives them",
        numbers=True,
    )


def listing(what: str) -> Rows:
    """Whatever a config can name, from its own declaration."""
    kinds = {
        "strategies": _strategies,
        "tasks": _tasks,
        "orders": _orders,
        "importances": _importances,
        "metrics": _metrics,
        "mechanisms": _mechanisms,
        "controls": _controls,
        "operators": _operators,
    }
    return kinds[what]()


def prior_table(prior: ImportancePrior, top: int) -> Rows:
    """What a prior is, and its most important weights."""
    meta = prior.meta
    rows: list[tuple[str, str]] = [
        ("importance", str(meta.get("importance", "–"))),
        ("kind", prior.kind),
        ("tensors", count(len(prior))),
        ("values", count(prior.elements)),
        ("tasks", ", ".join(map(str, meta.get("tasks", []))) or "–"),
        ("samples used", str(meta.get("samples_used", "–"))),
        ("conservation error", _rounded(meta.get("conservation_max_relative_error"))),
    ]
    rows += [(f"block {block}", _rounded(mean)) for block, mean in prior.by_layer().items()]
    rows += [
        (f"top: {place.name}[{', '.join(map(str, place.index))}]", _rounded(place.value))
        for place in prior.top(top)
    ]
    return Rows(("", ""), rows, caption=_of_blocks(prior))


def _of_blocks(prior: ImportancePrior) -> str:
    """What the numbers of blocks are, and what scaling has left in them."""
    inputs, scaled = prior.kind == "inputs", prior.meta.get("unit") == "mean"
    said = "mean square of a relevant input of its maps" if inputs else "mean importance of a value"
    if not scaled:
        return f"blocks: {said}"
    if not inputs:
        return f"blocks: {said}, where 1 is the mean of each task's prior"
    summed = "; summed, every block has the number of priors" if prior.meta.get("merge") == "sum" else ""
    return f"blocks: {said}, each map of each prior scaled to 1{summed}"


def _rounded(value: float | None) -> str:
    return "–" if value is None else rounded(value)


def agreement_table(found: Mapping[Block, Agreement]) -> Rows:
    """How alike two priors are, a row a block."""
    return Rows(
        ("block", "overlap of the top tenth", "correlation"),
        [
            (f"{part} {layer}".strip(), number(a.overlap, 3), number(a.correlation, 3))
            for (part, layer), a in found.items()
        ],
        caption="by chance: overlap 0.1, correlation 0",
        numbers=True,
    )


def _metrics() -> Rows:
    return Rows(
        ("metric", "what a score of 100 means"), list(METRICS.items()), caption="tasks.metric, --metric"
    )


def _mechanisms() -> Rows:
    from holdfast.hold import MECHANISMS

    rows = []
    for name, (options, cls) in MECHANISMS.items():
        keys = [key for key in options.model_fields if key != "name"]
        rows.append((name, _first_line(cls), " ".join(keys) or "–"))
    return Rows(("mechanism", "what it does", "options"), rows, caption="strategy.mechanism")


def _controls() -> Rows:
    from holdfast.hold.control import CONTROLS
    from holdfast.importance.inputs import CONTROLS_OF_TOKENS

    keys: dict[str, Mapping[Any, str]] = {
        "strategy.control": CONTROLS,
        "strategy.importance.control": CONTROLS_OF_TOKENS,
    }
    rows = [(name, what, key) for key, controls in keys.items() for name, what in controls.items()]
    return Rows(("control", "what it takes away", "key"), rows)


def _operators() -> Rows:
    from holdfast.hold import OPERATORS

    rows = [(name, _first_line(cls)) for name, cls in OPERATORS.items()]
    return Rows(
        ("operator", "what of a change is held"), rows, caption="the importance says which one is used"
    )


def _first_line(cls: type) -> str:
    return (cls.__doc__ or "").strip().splitlines()[0]


def _strategies() -> Rows:
    from holdfast.strategies import STRATEGIES

    rows: list[tuple[str | Text, ...]] = []
    for name, cls in sorted(STRATEGIES.items()):
        what = Text.assemble(cls.summary, "\n", (cls.paper, "dim"))
        flags = ("yes" if flag else "no" for flag in (cls.rehearsal_free, cls.needs_task_identity))
        rows.append((name, what, *flags, cls.state, cls.inference))
    return Rows(
        ("name", "what it does", "without\nrehearsal", "task\nidentity", "state", "answer"),
        rows,
        caption="state: kept between tasks beside the model; answer: its extra cost; with default options",
        lines=True,
    )


def _tasks() -> Rows:
    from holdfast.tasks import TOY_TASKS

    return Rows(
        ("toy task", "what it asks"),
        [(name, str(description)) for name, description in TOY_TASKS.items()],
        caption="tasks: {source: toy}; other sources read your own data",
    )


def _orders() -> Rows:
    from holdfast.tasks import list_orders

    return Rows(("order", "tasks"), [(name, " ".join(tasks)) for name, tasks in list_orders().items()])


def _importances() -> Rows:
    from holdfast.importance.registry import REGISTRY

    rows = []
    for name, entry in sorted(REGISTRY.items()):
        first = (entry.options.__doc__ or "").strip().splitlines()[0]
        options = [key for key in entry.options.model_fields if key != "name"]
        rows.append((name, first, ", ".join(options) or "–"))
    return Rows(("importance", "what it measures", "options"), rows)
