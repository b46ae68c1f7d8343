"""Kronecker-factored Laplace: EWC's penalty with whole blocks of the Fisher matrix (Ritter et al. 2018)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, cast

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.optim import Optimizer

from holdfast.attribution.engine import Progress, per_sample_gradients
from holdfast.config import Options
from holdfast.errors import ConfigError
from holdfast.hold import Handle, Penalty
from holdfast.hold.attach import Chunk
from holdfast.hold.cost import Cost, Estimate
from holdfast.hold.inputs import outputs_first
from holdfast.hold.operator import Operator
from holdfast.hold.reference import weights_of
from holdfast.importance import ImportancePrior
from holdfast.importance.beside import as_beside
from holdfast.importance.fisher import FisherOptions
from holdfast.importance.inputs import InputMoments
from holdfast.importance.seeding import sample
from holdfast.models import block_parameters, input_dims
from holdfast.records import ProtectionSummary
from holdfast.strategies.context import Context, Stage
from holdfast.strategies.protocol import Strategy, register
from holdfast.tasks.encode import Encoded
from holdfast.tasks.task import TaskStream

Factors = dict[str, tuple[Tensor, Tensor]]  # A (I, I) and G (O, O) of each map, by its weight's name


class KfacOptions(Options):
    """Strength of the penalty, size of the estimate, and how tasks add up."""

    name: Literal["kfac"] = "kfac"
    strength: float = Field(3e3, gt=0, description="lambda of the penalty")
    fisher: FisherOptions = Field(default_factory=FisherOptions)
    variant: Literal["sum", "separate"] = Field(
        "sum", description="one pair of factors for all tasks together; a pair for each task"
    )


class _Moments:
    """Both factors, streamed over batches (a `TokenFold`)."""

    def __init__(self) -> None:
        self.inputs, self.outputs = InputMoments("uniform"), dict[str, Tensor]()

    def update(self, name: str, weight: Tensor, grad_S: Tensor) -> None:
        """Of a map that no sample reached: nothing to add."""

    def take_tokens(
        self, name: str, x_STI: Tensor, lam_STO: Tensor, passed_ST: Tensor, real_ST: Tensor
    ) -> None:
        self.inputs.add(name, x_STI, real_ST.to(passed_ST.dtype), real_ST)
        lam_NO = (lam_STO.to(passed_ST.dtype) * real_ST[..., None]).flatten(0, 1)
        total_OO = self.outputs.setdefault(name, lam_NO.new_zeros([lam_NO.shape[1]] * 2))
        total_OO.addmm_(lam_NO.T, lam_NO)


def factors_of(
    model: nn.Module,
    rows: Sequence[Encoded],
    options: FisherOptions,
    *,
    pad_id: int,
    seed: int = 0,
    progress: Progress | None = None,
) -> Factors:
    """A = mean over rows of the mean over a row's tokens of x xᵀ, G = mean over rows of the sum of λ λᵀ.

    x goes into the map, λ is the gradient of the true answer's log-likelihood at its output. Were tokens
    independent, A ⊗ G would be the map's block of the Fisher matrix. A bias is a map of the input 1.
    """
    fold, dims = _Moments(), input_dims(model)
    weights = block_parameters(model)
    maps = {name: weight for name, weight in weights.items() if name in dims}
    chosen = sample(rows, options.samples, seed)
    per_sample_gradients(
        model,
        chosen,
        fold=fold,
        parameters=maps,
        batch_size=options.batch_size,
        pad_id=pad_id,
        progress=progress,
    )
    sizes = {name: maps[name].shape[dims[name]] for name in fold.outputs}
    a, found = fold.inputs.result(sizes, len(chosen)), Factors()
    for name, total_OO in fold.outputs.items():
        g_OO = (total_OO / len(chosen)).float().cpu()
        found[name] = a[name].cpu(), g_OO
        if (bias := f"{name.removesuffix('weight')}bias") in weights:
            found[bias] = torch.ones(1, 1), g_OO.clone()
    return found


def joined(old: Factors, new: Factors) -> Factors:
    """One pair for A ⊗ G + A' ⊗ G': (A + A') ⊗ c (G + G'), with c such that the trace is theirs."""
    found = dict(new)
    for name, (a_II, g_OO) in old.items():
        if name not in new:
            found[name] = a_II, g_OO
            continue
        more_II, more_OO = new[name]
        whole = a_II.trace() * g_OO.trace() + more_II.trace() * more_OO.trace()
        a_II, g_OO = a_II + more_II, g_OO + more_OO
        crossed = a_II.trace() * g_OO.trace()
        found[name] = a_II, g_OO * (whole / crossed if crossed > 0 else 0.0)
    return found


class Kronecker:
    """Δ ← λ Σ_k G_k Δ A_k, of each weight."""

    def __init__(self, pairs: list[list[tuple[Tensor, Tensor]]], dims: list[int]) -> None:
        self.pairs, self.dims = pairs, dims

    def _applied(self, number: int, change: Tensor) -> tuple[Tensor, Tensor]:
        """Δ as (O, I), and what becomes of it."""
        change_OI = change[:, None] if change.dim() == 1 else outputs_first(change, self.dims[number])
        terms = [g_OO @ change_OI.to(g_OO.dtype) @ a_II for a_II, g_OO in self.pairs[number]]
        return change_OI, torch.stack(terms).sum(0)

    def times_(self, changes: Sequence[Tensor]) -> None:
        """See `Operator.times_`."""
        for number, change in enumerate(changes):
            change_OI, applied_OI = self._applied(number, change)
            change_OI.copy_(applied_OI)

    def energy(self, changes: Sequence[Tensor]) -> Tensor:
        """See `Operator.energy`."""
        rows = [self._applied(number, change) for number, change in enumerate(changes)]
        return torch.stack([(change_OI * applied_OI).sum() for change_OI, applied_OI in rows]).sum()


class KroneckerPenalty(Penalty):
    """λ/2 Σ_k tr(G_k Δ A_k Δᵀ), Δ = θ − θ*, in place of EWC's λ/2 Σ F Δ²; see `Penalty`."""

    def __init__(
        self, tasks: Sequence[Factors], model: nn.Module, *, strength: float, reference: Any
    ) -> None:
        self.tasks, dims = tasks, input_dims(model)
        diagonal: dict[str, Tensor] = {}
        for factors in tasks:
            for name, (a_II, g_OO) in factors.items():
                block_OI = torch.outer(g_OO.diagonal(), a_II.diagonal())
                value = block_OI if dims.get(name, 1) == 1 else block_OI.T
                diagonal[name] = diagonal.get(name, 0.0) + (value if name in dims else value[:, 0])
        # the diagonal is what summaries and warnings show; experts, embeddings and norms have no factors
        prior = as_beside(ImportancePrior(diagonal, {"importance": "kfac"}))
        super().__init__(prior, strength=strength, reference=reference)

    def _operator(self, chunk: Chunk, model: nn.Module, strength: float) -> Operator:
        if any(part is not owner for part, owner in zip(chunk.parameters, chunk.owners, strict=True)):
            raise ConfigError(
                "kfac: its factors multiply whole matrices, and of sharded weights (FSDP2) each process has "
                "a part. Use DDP, or strategy=ewc."
            )
        dims, pairs = input_dims(model), []
        for name, p in zip(chunk.names, chunk.parameters, strict=True):
            like: Any = {"device": p.device, "dtype": torch.promote_types(p.dtype, torch.float32)}
            of_map = [factors[name] for factors in self.tasks if name in factors]
            pairs.append([(a.to(**like), (strength * g).to(**like)) for a, g in of_map])
        return cast(Operator, Kronecker(pairs, [dims.get(name, 1) for name in chunk.names]))


@register
class Kfac(Strategy):
    """The loss + lambda / 2 sum_k tr(G_k D A_k D^T) over all linear maps, D the change since the task began.

    After task k, A_k is the second moment of a map's inputs and G_k that of the loss gradients at its outputs
    (`factors_of`): EWC's penalty with the whole block A_k (x) G_k of the Fisher matrix where EWC has its
    diagonal. Like EWC's its gradient goes through the optimizer (the paper's Laplace term; nothing is
    decoupled), once a step, after clipping. One anchor, the weights that the task starts from: the paper's
    online Laplace, whose precisions add up.

    Deviations: a sum of Kronecker products is none. By default it is kept as one, (sum A) (x) c (sum G) with
    the trace of the sum, so that the state is constant in the number of tasks: exact for tasks that are
    alike, and for others it holds some of what no task needs in exchange for what one needs. ``separate``
    keeps each task's pair and is exact. Fisher of the true answers, tokens as if independent; a bias is a
    block of its own; embeddings, norms and experts are free, which is said. The paper's strength is searched
    on each of its streams (images); the default is EWC's here. Extra state: I^2 + O^2 a map.
    """

    name = "kfac"
    paper = "Ritter et al. 2018, arXiv 1805.07810"
    summary = "EWC's penalty with Kronecker-factored blocks of the Fisher matrix, not its diagonal"
    Options = KfacOptions
    state = "constant"
    ends_untrained = True

    def __init__(self, options: KfacOptions) -> None:
        super().__init__(options)
        self.tasks: list[Factors] = []  # one entry, unless `separate`
        self._penalty: KroneckerPenalty | None = None

    def estimate(self, model: nn.Module, stream: TaskStream) -> Estimate:
        """The factors, beside the weights too, and the penalty."""
        dims, weights = input_dims(model), block_parameters(model)
        shapes = [tuple(p.shape) for name, p in weights.items() if name in dims]
        kept = max(len(stream) - 1, 1) if self.options.variant == "separate" else 1
        squares = sum(o * o + i * i for o, i in shapes)
        elements = sum(o * i for o, i in shapes)
        return Estimate(
            [
                Cost("Kronecker factors (float32, on the CPU and beside the weights)", kept * squares * 8),
                Cost("penalty (its diagonal, the old weights, the change and its gradient)", elements * 16),
            ]
        )

    def begin(self, context: Context, stage: Stage) -> None:
        """A penalty around the weights that this stage starts from."""
        self._penalty = None
        if self.tasks:
            names = dict.fromkeys(name for factors in self.tasks for name in factors)
            reference = weights_of(context.model, names)
            self._penalty = KroneckerPenalty(
                self.tasks, context.model, strength=self.options.strength, reference=reference
            )

    def attach(self, model: nn.Module, optimizer: Optimizer) -> Sequence[Handle]:
        """Add the penalty's gradient once per optimizer step."""
        return [] if self._penalty is None else [self._penalty.attach(model, optimizer)]

    def end(self, context: Context, stage: Stage) -> None:
        """Estimate this task's factors, and add them to the others or put them beside."""
        if self._penalty is not None:
            mechanism = {"name": "penalty", "strength": self.options.strength}
            summary = ProtectionSummary(**self._penalty.summary(), mechanism=mechanism)
            summary.write(context.folder / "protection.json")
        self._penalty = None
        for task in stage.tasks:
            rows, pad = context.encoder.many(task.train), context.tokenizer.pad_token_id
            with context.progress.bar(f"factors of {task.name}", total=len(rows)) as bar:
                new = factors_of(
                    context.model, rows, self.options.fisher, pad_id=pad, seed=context.seed, progress=bar
                )
            if self.tasks and self.options.variant == "sum":
                self.tasks = [joined(self.tasks[0], new)]
            else:
                self.tasks.append(new)

    def state_dict(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """All factors."""
        rows = [(k, n, pair) for k, factors in enumerate(self.tasks) for n, pair in factors.items()]
        tensors = {f"{k}:A:{n}": a for k, n, (a, _) in rows} | {f"{k}:G:{n}": g for k, n, (_, g) in rows}
        return tensors, {"tasks": [list(factors) for factors in self.tasks]} if self.tasks else {}

    def load_state_dict(self, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
        """Take them back."""
        self.tasks = [
            {n: (tensors[f"{k}:A:{n}"], tensors[f"{k}:G:{n}"]) for n in names}
            for k, names in enumerate(values.get("tasks", ()))
        ]
