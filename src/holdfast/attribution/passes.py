"""One pass over the rows: forward, target, bent backward, and the check of the first batch."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import cached

from holdfast import world
from holdfast.attribution.alone import TOLERANCE, Sketches, SketchFold, TokenSketchFold, difference, sketch
from holdfast.attribution.closed import closed_maps
from holdfast.attribution.diagnose import LocalMode
from holdfast.attribution.ledger import Ledger, relevance
from holdfast.attribution.maps import Fold, WeightMaps
from holdfast.attribution.mode import RuleMode, attributable, whole_activations
from holdfast.attribution.options import AttributionReport, starts_below_head
from holdfast.attribution.targets import Batch, correct, initial_lambda, make_batch, module_names
from holdfast.attribution.trace import RuleSet, SamplesMixedError, Trace
from holdfast.errors import ConservationError, ModelError, NoCorrectSampleError, UnruledOperationError
from holdfast.models import require_rateable
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


class Begun(NamedTuple):
    """How far a pass is: rows that are done, which of them were used, parameters that were reached."""

    done: int = 0
    used: Sequence[int] = ()
    reached: Sequence[str] = ()


Save = Callable[[Begun], None]


class Pass:
    """One pass over the rows, for one set of parameters.

    Attributes
    ----------
    first : bool
        Whether it is the first pass, which checks, and finds the samples that count.
    plain : bool
        Take autograd's gradients of one sample at a time, without a map of any layer.
    """

    def __init__(
        self,
        model: nn.Module,
        job: Job,
        fold: Fold,
        wanted: Mapping[str, nn.Parameter],
        report: AttributionReport,
        first: bool,
    ) -> None:
        require_rateable(model)
        self.model, self.job, self.report, self.first = model, job, report, first
        self.check = first and job.rules != "gradient"
        self.wanted, self.plain = dict(wanted), False
        self.maps = WeightMaps(model, wanted, fold, factor=1.0 if job.halves == "none" else 0.5)
        self.weights = {name: parameter.detach() for name, parameter in wanted.items()}
        self.modules = module_names(model)
        # where relevance ends in the latest forward pass: embeddings, and tokens that every text gets
        self.leaves: list[Tensor] = []
        self.constants: list[Tensor] = []
        self._checked: int | None = None  # where the batch began that was checked

    def run(
        self,
        rows: Sequence[Encoded],
        tell: Callable[[int], None],
        begun: Begun,
        save: Save | None = None,
    ) -> list[int]:
        """Attribute the rows, or those that are left; returns the indices of those that were used.

        Parameters
        ----------
        begun : Begun
            What a killed pass had done.
        save : callable, optional
            Gets the same after each batch.
        """
        job, used = self.job, list(begun.used)
        self.maps.reached = set(begun.reached)
        self.check = self.check and self.report.conservation_max_relative_error is None
        with torch.inference_mode(False), torch.enable_grad(), attributable(self.model, self.leaves):
            if self.report.one_at_a_time:  # found by an earlier pass, or by the one that this one continues
                self._one_at_a_time()
            elif self.first:
                self._compare(rows[: job.batch_size])
            job, shared = self.job, self._shared(save)
            starts = range(begun.done, len(rows), job.batch_size)
            for start in world.part(starts) if shared else starts:
                room = None if job.max_samples is None else job.max_samples - len(used)
                if room == 0:
                    break
                part = rows[start : start + job.batch_size]
                unchecked = self.check
                used += [start + i for i in self._part(part, room)]
                if unchecked and not self.check:
                    self._checked = start
                if self.first:
                    self.report.samples_seen = start + len(part)
                if save is not None:
                    save(Begun(start + len(part), used, sorted(self.maps.reached)))
                tell(start + len(part))
            if shared:
                used = self._unite(used)
                if self.first:
                    self.report.samples_seen = len(rows)
        if not used:
            raise NoCorrectSampleError(
                f"attribution: the model answered none of {len(rows)} samples right, so nothing can "
                "be attributed. Train it longer on this task, or set correct_only: false to use all samples."
            )
        tell(len(rows))
        return used

    def single(self, row: Encoded) -> tuple[Ledger, list[Tensor]]:
        """Attribute one row, right or wrong, with the check.

        Returns
        -------
        Ledger
            Where its relevance went.
        list of Tensor
            Relevance of each input token, float64, (T,): of the model's tokens; of an encoder-decoder model
            of the encoder's and of the decoder's.
        """
        ledger = Ledger()
        with torch.inference_mode(False), torch.enable_grad(), attributable(self.model, self.leaves):
            batch, logits_STV, lam_STV = self._answer([row], self.maps, ledger)
            lams = self._backward(logits_STV, lam_STV)
            self.maps.end_batch()
            self._conserved(batch, ledger, logits_STV.detach(), lam_STV, lams)
            shares = [
                (leaf.detach().double() * lam.double()).sum(-1).flatten().cpu()
                for leaf, lam in zip(self.leaves, lams, strict=False)
                if lam is not None and leaf.dim() == 3
            ]
        return ledger, shares

    def _shared(self, save: Save | None) -> bool:
        """Whether each process takes some of the batches."""
        fold: Any = self.maps.fold
        alone = save is not None or self.job.max_samples is not None or not hasattr(fold, "unite")
        return world.size() > 1 and not alone and getattr(fold, "any_order", True)

    def _unite(self, used: list[int]) -> list[int]:
        """Put together what the processes have found, as if one had gone through all batches."""
        report = self.report
        check = (report.conservation_max_relative_error, report.absorbed, report.created)
        of_all = world.gather((used, self.maps.reached, self._checked, check, report.one_at_a_time))
        self.maps.fold.unite(self.weights)  # type: ignore[attr-defined]
        self.maps.reached = set().union(*(reached for _, reached, *_ in of_all))
        report.one_at_a_time = next((why for *_, why in of_all if why), "")
        checked = {at: found for _, _, at, found, _ in of_all if at is not None}
        if checked:  # one process would have checked the first of these batches alone
            found = checked[min(checked)]
            report.conservation_max_relative_error, report.absorbed, report.created = found
        return sorted(index for part in of_all for index in part[0])

    def _one_at_a_time(self, why: str = "") -> None:
        self.report.one_at_a_time = self.report.one_at_a_time or why
        self.job = replace(self.job, batch_size=1)
        self.plain = self.job.rules == "gradient" and not self.maps.by_token

    def _compare(self, rows: Sequence[Encoded]) -> None:
        """See that a sample's maps don't depend on its batch; else take one sample at a time."""
        by_length = sorted(rows, key=lambda row: len(row.prompt_ids) + len(row.completion_ids))
        others = [row for row in by_length if row != by_length[0]]  # two of the same would show no mixing
        probe = [by_length[0], *others[-1:]]
        by_autograd = self.job.rules == "gradient" and not self.maps.by_token
        if len(probe) == 1 and not by_autograd:
            return  # relevance of a single sample is checked by conservation
        try:
            found = self._sketches(probe)
        except SamplesMixedError as error:
            return self._one_at_a_time(str(error))
        except UnruledOperationError as error:
            if self.job.rules != "gradient":
                raise
            return self._one_at_a_time(str(error).split(". ")[0])
        alone = self._plain_sketches(probe[0]) if by_autograd else self._sketches(probe[:1])
        past = [n for n, s in alone.items() if s.any() and not found[n].any()]
        if past and by_autograd:
            return self._one_at_a_time(
                f"{len(past)} weights belong to no linear map, {past[0]} among them: autograd's gradients, "
                "sample by sample"
            )
        apart, where = difference(found, alone)
        self.report.alone_max_relative_error = apart
        if not apart <= TOLERANCE.get(next(iter(self.weights.values())).dtype, 0.5):
            self._one_at_a_time(
                f"in a batch, the maps of {where} differ by {apart:.2g} from a sample's alone"
            )
        return None

    def _sketches(self, rows: Sequence[Encoded]) -> Sketches:
        """Of the maps of the first of some rows, or of its tokens where the fold takes those."""
        fold = TokenSketchFold() if self.maps.by_token else SketchFold()
        maps = WeightMaps(self.model, self.wanted, fold, self.maps.factor)
        _, logits, lam = self._answer(rows, maps, None)
        self._backward(logits, lam)
        maps.end_batch()
        return fold.of_sample(0, self.weights)

    def _plain_sketches(self, row: Encoded) -> Sketches:
        return {name: sketch(grad) for name, grad in (self._plain_gradients(row) or {}).items()}

    def _plain_gradients(self, row: Encoded, correct_only: bool = False) -> dict[str, Tensor] | None:
        """Autograd's gradients of a single row; None if it has to be answered right and is not."""
        none = WeightMaps(self.model, {}, self.maps.fold, 1.0)
        for parameter in self.wanted.values():
            parameter.requires_grad_(True)
        try:
            batch, logits, lam = self._answer([row], none, None)
            if correct_only and not correct(logits.detach(), batch.answer_ST).all():
                return None
            found = torch.autograd.grad(logits, list(self.wanted.values()), lam, allow_unused=True)
        finally:
            for parameter in self.wanted.values():
                parameter.requires_grad_(False)
        return {
            name: torch.zeros_like(p) if grad is None else grad
            for (name, p), grad in zip(self.wanted.items(), found, strict=True)
        }

    def _answer(
        self, rows: Sequence[Encoded], maps: WeightMaps, ledger: Ledger | None
    ) -> tuple[Batch, Tensor, Tensor]:
        """A traced forward pass: the batch, its logits, and their Lambda."""
        job, device = self.job, next(self.model.parameters()).device
        apart = self.maps.by_token
        batch = make_batch(self.model, rows, job.pad_id, device, job.side, apart=apart)
        trace = Trace(
            job.rules, 0.5 if job.halves == "path" else 1.0, maps, ledger, self.modules, self.constants
        )
        self.leaves.clear()
        self.constants.clear()
        maps.begin_batch(len(rows), batch.lengths, batch.real)
        logits = self._forward(batch, trace)
        lam = initial_lambda(logits.detach(), batch.answer_ST, target=job.target, of=job.of)
        if starts_below_head(job.rules, job.halves):
            lam = lam * 2  # R(H^L) = Z: the half that the head takes is given on top
        return batch, logits, lam

    def _part(self, rows: Sequence[Encoded], room: int | None) -> list[int]:
        """Attribute a batch, or where it mixes its samples one after another; returns which were used."""
        if not self.report.one_at_a_time:
            try:
                return self._batch(rows, room)
            except SamplesMixedError as error:  # from the forward pass: nothing of the batch is folded yet
                self._one_at_a_time(str(error))
        used: list[int] = []
        for i, row in enumerate(rows):
            if len(used) == room:
                break
            used += [i for _ in self._batch([row], None)]
        return used

    def _batch(self, rows: Sequence[Encoded], room: int | None) -> list[int]:
        if self.plain:
            gradients = self._plain_gradients(rows[0], self.job.correct_only and self.first)
            if gradients is None:
                return []
            for name, grad in gradients.items():
                self.maps.reached.add(name)
                self.maps.fold.update(name, self.weights[name], grad[None])
            return [0]
        job, ledger = self.job, Ledger() if self.check else None
        batch, logits_STV, lam_STV = self._answer(rows, self.maps, ledger)
        right_S = torch.ones(len(rows), dtype=torch.bool, device=logits_STV.device)
        if job.correct_only and self.first:
            right_S = correct(logits_STV.detach(), batch.answer_ST)
        selected = right_S.nonzero().flatten()[:room]
        if not len(selected):
            return []
        if len(selected) < len(rows):
            self.maps.selected = selected
            keep_S = torch.zeros_like(right_S).index_fill_(0, selected, True)
            lam_STV = lam_STV * keep_S[:, None, None]
        lams = self._backward(logits_STV, lam_STV)
        self.maps.end_batch()
        if ledger is not None:
            self._conserved(batch, ledger, logits_STV.detach(), lam_STV, lams)
        return [int(i) for i in selected]

    def _backward(self, logits: Tensor, lam: Tensor) -> Sequence[Tensor | None]:
        """Lambda of the leaves, then of the constants."""
        try:
            return torch.autograd.grad(logits, [*self.leaves, *self.constants], lam, allow_unused=True)
        except RuntimeError as error:
            if "modified by an inplace operation" not in str(error):
                raise
            raise UnruledOperationError(
                f"{type(self.model).__name__}: an operation in place changes what a rule needs on the way "
                "back, so relevance can't be followed. Use an importance that needs none, such as 'fisher'."
            ) from error

    def _forward(self, batch: Batch, trace: Trace) -> Tensor:
        model: Any = self.model
        plain = self.job.rules == "gradient"
        activations = nullcontext() if plain else whole_activations(model, trace)
        with cached(), activations, closed_maps(model, trace), RuleMode(trace):
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
        lams: Sequence[Tensor | None],
    ) -> None:
        """Check the first batch that has a used sample, and record what the check found."""
        self.check = False
        ledger.target = relevance(logits, lam)
        if not math.isfinite(ledger.target):
            raise ModelError(
                f"{type(self.model).__name__}: the logits of its first answers are NaN or infinite "
                f"({logits.dtype}), so nothing can be attributed. Load it in float32, or look into the model."
            )
        ends = zip([*self.leaves, *self.constants], lams, strict=True)
        found = [0.0 if lam is None else relevance(x, lam) for x, lam in ends]
        ledger.inputs = sum(found[: len(self.leaves)])
        if self.constants:
            ledger.absorb("constant inputs", sum(found[len(self.leaves) :]))
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
        path = 0.5 if self.job.halves == "path" else 1.0
        trace = Trace(self.job.rules, path, unmapped, None, self.modules)
        try:
            activations = whole_activations(self.model, trace)
            with activations, closed_maps(self.model, trace), LocalMode(trace) as mode:
                logits = self.model(**batch.inputs).logits
            logits.backward(lam)
        except RuntimeError as error:
            return f"Which operation loses it could not be told ({error})."
        return mode.verdict(weights_share=self.job.halves == "path")
