"""Attribution: the relevance of every weight for an answer, one forward and one backward pass a batch."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from holdfast.attribution.diagnose import LocalMode
from holdfast.attribution.ledger import Ledger, relevance
from holdfast.attribution.maps import Fold, WeightMaps
from holdfast.attribution.mode import RuleMode, attributable, whole_activations
from holdfast.attribution.options import AttributionOptions, AttributionReport
from holdfast.attribution.targets import Batch, correct, initial_lambda, make_batch, module_names
from holdfast.attribution.trace import RuleSet, Trace
from holdfast.errors import ConservationError, DataError, ModelError, NoCorrectSampleError
from holdfast.models import block_parameters
from holdfast.tasks.encode import Encoded

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class _Job:
    """What one call asks for."""

    rules: RuleSet
    halves: Literal["path", "weights", "none"]
    target: Literal["all", "first"]
    of: Literal["logit", "log_probability"]
    pad_id: int
    side: Literal["left", "right"]
    batch_size: int
    correct_only: bool
    max_samples: int | None


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
) -> AttributionReport:
    """Attribute the model's answers to its weights, and fold the per-sample maps (A, section 4.1).

    The model is left bit-identical: weights, gradients, flags, hooks and the random state don't change.

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
    """
    chosen = options or AttributionOptions()
    job = _Job(
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
    return _run(model, rows, job, fold, parameters, memory_budget, progress)


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
) -> AttributionReport:
    """Fold the gradient of each answer's log-likelihood (summed over its tokens), sample by sample.

    The fold gets plain gradients of weights and biases of linear maps; see `attribute_batches` for the
    parameters. All samples count, right or wrong.
    """
    job = _Job(
        "gradient", "none", "all", "log_probability", pad_id, padding_side, batch_size, False, max_samples
    )
    return _run(model, rows, job, fold, parameters, memory_budget, progress)


def _run(
    model: nn.Module,
    rows: Sequence[Encoded],
    job: _Job,
    fold: Fold,
    parameters: Mapping[str, nn.Parameter] | None,
    memory_budget: int | None,
    progress: Progress | None,
) -> AttributionReport:
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
    todo: Sequence[Encoded] = rows
    unreached: list[str] = []
    for number, group in enumerate(groups):
        once = _Pass(model, job, fold, group, report, check=number == 0 and job.rules != "gradient")

        def tell(done: int, number: int = number) -> None:
            if progress is not None:
                progress(number * len(rows) + done, len(groups) * len(rows))

        used = once.run(todo, tell)
        unreached += once.maps.fill_unreached(group)
        getattr(fold, "finish", lambda: None)()
        if number == 0:
            todo = [todo[i] for i in used]  # later passes see the samples that count, and no others
            report.samples_used = len(used)
    report.unreached = tuple(unreached)
    report.seconds = time.perf_counter() - started
    return report


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


class _Pass:
    """One pass over the rows, for one set of parameters."""

    def __init__(
        self,
        model: nn.Module,
        job: _Job,
        fold: Fold,
        wanted: Mapping[str, nn.Parameter],
        report: AttributionReport,
        check: bool,
    ) -> None:
        self.model, self.job, self.report, self.check = model, job, report, check
        self.maps = WeightMaps(model, wanted, fold, factor=1.0 if job.halves == "none" else 0.5)
        self.modules = module_names(model)

    def run(self, rows: Sequence[Encoded], tell: Callable[[int], None]) -> list[int]:
        """Attribute the rows; returns the indices of those that were used."""
        job = self.job
        used: list[int] = []
        first_pass = not self.report.samples_seen
        leaves: list[Tensor] = []
        with torch.inference_mode(False), torch.enable_grad(), attributable(self.model, leaves):
            for start in range(0, len(rows), job.batch_size):
                room = None if job.max_samples is None else job.max_samples - len(used)
                if room == 0:
                    break
                part = rows[start : start + job.batch_size]
                leaves.clear()
                used += [start + i for i in self._batch(part, leaves, room, first_pass)]
                if first_pass:
                    self.report.samples_seen = start + len(part)
                tell(start + len(part))
        if not used:
            raise NoCorrectSampleError(
                f"attribution: the model answered none of {len(rows)} samples right, so nothing can "
                "be attributed. Train it longer on this task, or set correct_only: false to use all samples."
            )
        tell(len(rows))
        return used

    def _batch(
        self, rows: Sequence[Encoded], leaves: list[Tensor], room: int | None, choose: bool
    ) -> list[int]:
        job, device = self.job, next(self.model.parameters()).device
        batch = make_batch(self.model, rows, job.pad_id, device, job.side)
        trace = Trace(
            job.rules,
            0.5 if job.halves == "path" else 1.0,
            self.maps,
            Ledger() if self.check else None,
            self.modules,
        )
        self.maps.begin_batch(len(rows), batch.lengths)
        logits_STV = self._forward(batch, trace)
        right_S = torch.ones(len(rows), dtype=torch.bool, device=device)
        if job.correct_only and choose:
            right_S = correct(logits_STV.detach(), batch.answer_ST)
        selected = right_S.nonzero().flatten()[:room]
        if not len(selected):
            return []
        lam_STV = initial_lambda(logits_STV.detach(), batch.answer_ST, target=job.target, of=job.of)
        if len(selected) < len(rows):
            self.maps.selected = selected
            keep_S = torch.zeros_like(right_S).index_fill_(0, selected, True)
            lam_STV = lam_STV * keep_S[:, None, None]
        lams = torch.autograd.grad(logits_STV, leaves, lam_STV, allow_unused=True)
        self.maps.end_batch()
        if trace.ledger is not None:
            self._conserved(batch, trace.ledger, logits_STV.detach(), lam_STV, leaves, lams)
        return [int(i) for i in selected]

    def _forward(self, batch: Batch, trace: Trace) -> Tensor:
        model: Any = self.model
        if self.job.rules == "gradient":
            with RuleMode(trace):
                output = model(**batch.inputs)
        else:
            with whole_activations(model, trace), RuleMode(trace):
                output = model(**batch.inputs)
        logits = output.logits
        if not logits.requires_grad:
            raise ModelError(
                f"{type(model).__name__}: its logits don't depend on its input embeddings as far as autograd "
                "can tell; the model detaches something, or its forward runs without gradients."
            )
        if logits.shape[:2] != batch.answer_ST.shape:
            raise ModelError(
                f"{type(model).__name__}: logits have shape {tuple(logits.shape)}, expected "
                f"{tuple(batch.answer_ST.shape)} positions."
            )
        return logits

    def _conserved(
        self,
        batch: Batch,
        ledger: Ledger,
        logits: Tensor,
        lam: Tensor,
        leaves: list[Tensor],
        lams: Sequence[Tensor | None],
    ) -> None:
        """Check the first batch that has a used sample, and record what the check found."""
        self.check = False
        ledger.target = relevance(logits, lam)
        ledger.inputs = sum(relevance(x, g) for x, g in zip(leaves, lams, strict=True) if g is not None)
        share, scale = self.job.halves == "path", abs(ledger.target) or 1.0
        self.report.conservation_max_relative_error = ledger.leak(weights_share=share) / scale
        self.report.absorbed = {key: value / scale for key, value in ledger.absorbed.items()}
        self.report.created = ledger.created / scale
        if not ledger.conserved(logits.dtype, weights_share=share):
            raise ConservationError(
                "attribution: relevance is not conserved on the first batch: it sums to "
                f"{ledger.total(weights_share=share):.6g}, but the target is {ledger.target:.6g}"
                f" ({logits.dtype}). {self._suspects(batch, lam)}"
            )

    def _suspects(self, batch: Batch, lam: Tensor) -> str:
        """Go through the batch once more, with a ledger for each operation."""
        unmapped = WeightMaps(self.model, {}, self.maps.fold, self.maps.factor)
        unmapped.begin_batch(len(lam), batch.lengths)
        trace = Trace(self.job.rules, 0.5 if self.job.halves == "path" else 1.0, unmapped, None, self.modules)
        try:
            with whole_activations(self.model, trace), LocalMode(trace) as mode:
                logits = self.model(**batch.inputs).logits
            logits.backward(lam)
        except RuntimeError as error:
            return f"Which operation loses it could not be told ({error})."
        return mode.verdict(weights_share=self.job.halves == "path")
