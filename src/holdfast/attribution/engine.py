"""Attribution: the relevance of every weight for an answer, one forward and one backward pass a batch."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from holdfast.attribution.ledger import Ledger
from holdfast.attribution.maps import Fold
from holdfast.attribution.options import AttributionOptions, AttributionReport
from holdfast.attribution.passes import Begun, Job, Pass
from holdfast.errors import DataError, ModelError
from holdfast.models import block_parameters, unwrapped
from holdfast.resume import Partial
from holdfast.tasks.encode import Encoded

Progress = Callable[[int, int], None]


def attribute_batches(
    model: nn.Module,
    rows: Sequence[Encoded],
    *,
    options: AttributionOptions | None = None,
    fold: Fold,
    parameters: Mapping[str, nn.Parameter] | None = None,
    batch_size: int = 8,
    pad_id: int,
    correct_only: bool = True,
    max_samples: int | None = None,
    memory_budget: int | None = None,
    padding_side: Literal["left", "right"] = "left",
    progress: Progress | None = None,
    partial: Partial | None = None,
) -> AttributionReport:
    """Attribute the model's answers to its weights, and fold the per-sample maps (A, section 4.1).

    The model is left bit-identical: weights, gradients, flags, hooks and the random state don't change.
    Warns where it is in 16 bits: relevance is rounded on the way back.

    Parameters
    ----------
    model : nn.Module
        A transformers model (causal or encoder-decoder), with or without PEFT.
    rows : sequence of Encoded
        Prompts with their answers.
    options : AttributionOptions
    fold : Fold
        Takes the maps of the selected samples, layer by layer.
    parameters : mapping of str to Parameter
        Canonical name to parameters that get maps; weights and biases of linear maps only. Default:
        `block_parameters(model)`.
    batch_size : int
    pad_id : int
    correct_only : bool
        Attribute a sample only if the teacher-forced argmax reproduces every token of its answer.
    max_samples : int
        Stop after that many attributed samples.
    memory_budget : int
        Bytes that the fold may use; more passes over the data are made to stay below it.
    padding_side : {"left", "right"}
        Of causal models. Maps don't depend on it; on the left, logits are computed for answers alone.
    progress : callable
        Called with (rows done, rows in all).
    partial : Partial
        Where the fold's state is kept, for a killed attribution to go on from; its result is the same, bit
        for bit. The fold must have ``state()`` and ``load_state(tensors, values, weights)``.

    Raises
    ------
    UnruledOperationError
        The model uses an operation that has no rule; the message names it and its module.
    ConservationError
        On the first batch, relevance does not sum to the target.
    NoCorrectSampleError
        No sample passed the filter.
    DataError
        There are no rows.
    ModelError
        The model is cut up over processes (FSDP2, ZeRO-3).
    """
    chosen = options or AttributionOptions()
    _warn_of_sixteen_bits(unwrapped(model), chosen)
    job = Job(
        chosen.rules,
        chosen.halves,
        chosen.target,
        chosen.of,
        pad_id,
        padding_side,
        batch_size,
        correct_only,
        max_samples,
    )
    return _run(model, rows, job, fold, parameters, memory_budget, progress, partial)


def attribute_one(
    model: nn.Module,
    row: Encoded,
    *,
    options: AttributionOptions | None = None,
    fold: Fold,
    parameters: Mapping[str, nn.Parameter] | None = None,
    pad_id: int,
) -> tuple[Ledger, list[Tensor], AttributionReport]:
    """As `attribute_batches`, of one answer, right or wrong; with the relevance of each input token.

    Returns
    -------
    ledger : Ledger
    tokens : list of Tensor
        (T,) float64: of the model's input tokens; of an encoder-decoder model of the encoder's, then of the
        decoder's.
    report : AttributionReport

    Raises
    ------
    UnruledOperationError, ConservationError
        As there.
    """
    model, chosen = unwrapped(model), options or AttributionOptions()
    _warn_of_sixteen_bits(model, chosen)
    job = Job(chosen.rules, chosen.halves, chosen.target, chosen.of, pad_id, "left", 1, False, 1)
    wanted = dict(block_parameters(model) if parameters is None else parameters)
    report = AttributionReport(samples_seen=1, samples_used=1)
    once = Pass(model, job, fold, wanted, report, first=True)
    ledger, tokens = once.single(row)
    report.unreached = tuple(once.maps.fill_unreached(wanted))
    return ledger, tokens, report


def _warn_of_sixteen_bits(model: nn.Module, options: AttributionOptions) -> None:
    dtype = next(model.parameters()).dtype
    if dtype in (torch.bfloat16, torch.float16):
        name = str(dtype).removeprefix("torch.")
        what = "relevance is rounded on the way back: one token's or weight's may be off by several percent"
        if options.rules == "paper":
            what = (
                "with `rules: paper` rounding on the way back is as large as the relevance of most weights: "
                "in some tensors their order is hardly that of float64 (rank correlation 0.44)"
            )
        warnings.warn(
            f"attribution: the model is in {name}, where {what}. Load it in float32 to rate its weights; it "
            "may be trained in 16 bits.",
            stacklevel=3,
        )


def per_sample_gradients(
    model: nn.Module,
    rows: Sequence[Encoded],
    *,
    fold: Fold,
    parameters: Mapping[str, nn.Parameter] | None = None,
    batch_size: int = 8,
    pad_id: int,
    max_samples: int | None = None,
    memory_budget: int | None = None,
    padding_side: Literal["left", "right"] = "left",
    progress: Progress | None = None,
    partial: Partial | None = None,
    of: Literal["log_probability", "logit"] = "log_probability",
    correct_only: bool = False,
) -> AttributionReport:
    """Fold the gradient of each answer's log-likelihood (summed over its tokens), sample by sample.

    The fold gets plain gradients of weights and biases of linear maps; see `attribute_batches` for the
    parameters. All samples count, right or wrong, unless `correct_only`. With ``of="logit"`` it is the
    gradient of the sum of the answer's logits instead.
    """
    job = Job("gradient", "none", "all", of, pad_id, padding_side, batch_size, correct_only, max_samples)
    return _run(model, rows, job, fold, parameters, memory_budget, progress, partial)


def _run(
    model: nn.Module,
    rows: Sequence[Encoded],
    job: Job,
    fold: Fold,
    parameters: Mapping[str, nn.Parameter] | None,
    memory_budget: int | None,
    progress: Progress | None,
    partial: Partial | None,
) -> AttributionReport:
    model = unwrapped(model)
    wanted = dict(block_parameters(model) if parameters is None else parameters)
    if not rows:
        raise DataError("attribution: there are no rows. Give at least one example with an answer.")
    if not wanted:
        raise ModelError(
            "attribution: no parameters to attribute. The model has no trainable linear maps in its blocks: "
            "unfreeze some, or pass `parameters`."
        )
    if job.batch_size < 1 or (job.max_samples is not None and job.max_samples < 1):
        raise ValueError(
            f"batch_size and max_samples must be at least 1, got {job.batch_size}, {job.max_samples}"
        )
    started = time.perf_counter()
    groups = _groups(wanted, getattr(fold, "bytes_per_element", 4), memory_budget)
    report = AttributionReport(passes=len(groups))
    now = Progressed()
    begun = Begun() if partial is None else _resume(partial, fold, wanted, report, now)
    for number, group in list(enumerate(groups))[now.number :]:
        once = Pass(model, job, fold, group, report, first=number == 0)
        todo = rows if number == 0 else [rows[i] for i in now.kept]

        def tell(done: int, number: int = number) -> None:
            if progress is not None:
                progress(number * len(rows) + done, len(groups) * len(rows))

        def save(far: Begun) -> None:
            if partial is not None and partial.due:
                _save(partial, fold, report, now, far)

        used = once.run(todo, tell, begun, None if partial is None else save)
        now.unreached += once.maps.fill_unreached(group)
        getattr(fold, "finish", lambda: None)()
        if number == 0:
            now.kept = used  # later passes see the samples that count, and no others
            report.samples_used = len(used)
        now.number, begun = number + 1, Begun()
    report.unreached = tuple(now.unreached)
    report.seconds = time.perf_counter() - started
    return report


@dataclass
class Progressed:
    """How far an attribution of several passes is.

    Attributes
    ----------
    number : int
        Of the pass.
    kept : list of int
        Rows that the first pass used.
    unreached : list of str
        Parameters that nothing reached in the passes that are done.
    """

    number: int = 0
    kept: list[int] = field(default_factory=list)
    unreached: list[str] = field(default_factory=list)


def _save(partial: Partial, fold: Any, report: AttributionReport, now: Progressed, far: Begun) -> None:
    tensors, folded = fold.state()
    values = {**far._asdict(), **vars(now), "folded": folded, "report": vars(report)}
    partial.save(tensors, values)


def _resume(
    partial: Partial,
    fold: Any,
    wanted: Mapping[str, nn.Parameter],
    report: AttributionReport,
    now: Progressed,
) -> Begun:
    """Take back what `_save` kept, into `fold`, `report` and `now`; returns how far the pass was."""
    state = partial.load()
    if state is None:
        return Begun()
    tensors, values = state
    fold.load_state(tensors, values["folded"], {name: p.detach() for name, p in wanted.items()})
    vars(report).update(values["report"])
    vars(now).update({key: values[key] for key in vars(now) if key in values})
    passes = f" of pass {now.number + 1} of {report.passes}" if report.passes > 1 else ""
    partial.say(f"{partial.file}: continuing after {values['done']} samples{passes}.")
    return Begun(*(values[key] for key in Begun._fields))


def _groups(
    wanted: dict[str, nn.Parameter], bytes_per_element: int, budget: int | None
) -> list[dict[str, nn.Parameter]]:
    """Disjoint parameter sets whose folds fit the budget (a single large parameter may exceed it)."""
    groups: list[dict[str, nn.Parameter]] = [{}]
    size = 0
    for name, parameter in wanted.items():
        needed = parameter.numel() * bytes_per_element
        if budget is not None and groups[-1] and size + needed > budget:
            groups.append({})
            size = 0
        groups[-1][name] = parameter
        size += needed
    return groups
