"""One pass over the rows: forward, target, bent backward, and the check of the first batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from holdfast.attribution.diagnose import LocalMode
from holdfast.attribution.ledger import Ledger, relevance
from holdfast.attribution.maps import Fold, WeightMaps
from holdfast.attribution.mode import RuleMode, attributable, whole_activations
from holdfast.attribution.options import AttributionReport
from holdfast.attribution.targets import Batch, correct, initial_lambda, make_batch, module_names
from holdfast.attribution.trace import RuleSet, Trace
from holdfast.errors import ConservationError, ModelError, NoCorrectSampleError
from holdfast.resume import Partial, State
from holdfast.tasks.encode import Encoded


@dataclass(frozen=True)
class Job:
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


class Pass:
    """One pass over the rows, for one set of parameters."""

    def __init__(
        self,
        model: nn.Module,
        job: Job,
        fold: Fold,
        wanted: Mapping[str, nn.Parameter],
        report: AttributionReport,
        check: bool,
    ) -> None:
        self.model, self.job, self.report, self.check = model, job, report, check
        self.maps = WeightMaps(model, wanted, fold, factor=1.0 if job.halves == "none" else 0.5)
        self.weights = {name: parameter.detach() for name, parameter in wanted.items()}
        self.modules = module_names(model)

    def run(
        self, rows: Sequence[Encoded], tell: Callable[[int], None], partial: Partial | None = None
    ) -> list[int]:
        """Attribute the rows, or those that `partial` leaves; returns the indices of those that were used."""
        job = self.job
        first_pass = not self.report.samples_seen
        begin, used = (0, []) if partial is None else self._resume(partial)
        leaves: list[Tensor] = []
        with torch.inference_mode(False), torch.enable_grad(), attributable(self.model, leaves):
            for start in range(begin, len(rows), job.batch_size):
                room = None if job.max_samples is None else job.max_samples - len(used)
                if room == 0:
                    break
                part = rows[start : start + job.batch_size]
                leaves.clear()
                used += [start + i for i in self._batch(part, leaves, room, first_pass)]
                if first_pass:
                    self.report.samples_seen = start + len(part)
                if partial is not None and partial.due:
                    partial.save(*self._state(start + len(part), used))
                tell(start + len(part))
        if not used:
            raise NoCorrectSampleError(
                f"attribution: the model answered none of {len(rows)} samples right, so nothing can "
                "be attributed. Train it longer on this task, or set correct_only: false to use all samples."
            )
        tell(len(rows))
        return used

    def _state(self, done: int, used: list[int]) -> State:
        tensors, folded = self.maps.fold.state()  # type: ignore[attr-defined]
        reached = sorted(self.maps.reached)
        return tensors, {
            "done": done,
            "used": used,
            "folded": folded,
            "reached": reached,
            "report": vars(self.report),
        }

    def _resume(self, partial: Partial) -> tuple[int, list[int]]:
        """Take back what `_state` gave; returns where to begin, and the rows that are used already."""
        state = partial.load()
        if state is None:
            return 0, []
        tensors, values = state
        self.maps.fold.load_state(tensors, values["folded"], self.weights)  # type: ignore[attr-defined]
        self.maps.reached = set(values["reached"])
        vars(self.report).update(values["report"])
        self.check = self.check and self.report.conservation_max_relative_error is None
        partial.say(f"{partial.file}: continuing after {values['done']} samples.")
        return values["done"], values["used"]

    def _batch(
        self, rows: Sequence[Encoded], leaves: list[Tensor], room: int | None, choose: bool
    ) -> list[int]:
        job, device = self.job, next(self.model.parameters()).device
        apart = self.maps.by_token
        batch = make_batch(self.model, rows, job.pad_id, device, job.side, apart=apart)
        trace = Trace(
            job.rules,
            0.5 if job.halves == "path" else 1.0,
            self.maps,
            Ledger() if self.check else None,
            self.modules,
        )
        self.maps.begin_batch(len(rows), batch.lengths, batch.real)
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
