"""Per-sample maps of the weights: made inside the backward of their layer, folded, and dropped."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from holdfast.attribution.ledger import Ledger, relevance

NARROW = 4  # a weight with this many times more rows than columns is narrow
GROUP_BYTES = 2**20  # maps handed over at once: few enough to stay in the cache, enough to amortise calls


class Fold(Protocol):
    """A streaming fold over samples, called layer by layer inside the backward pass.

    Two attributes and a method are optional: ``bytes_per_element`` (memory that the fold keeps for each
    attributed weight; 4 if absent), which tells how many passes fit a memory budget, and ``finish()``, called
    after each pass so that the fold can shrink what it keeps. ``state()`` and ``load_state(tensors, values,
    weights)`` are needed only where an attribution is to be continued after a kill (`Partial`).
    """

    def update(self, name: str, weight: Tensor, grad_S: Tensor) -> None:
        """Take the maps of some samples of one parameter.

        Parameters
        ----------
        name : str
            Canonical name of the parameter.
        weight : Tensor
            Its value, detached.
        grad_S : Tensor, shape (S, *weight.shape)
            Per-sample LRP gradient with its 1/2 factor in it: the relevance is ``weight * grad_S[s]``. S is
            any part of the batch's selected samples (0 for a parameter that nothing reached); each sample
            comes once per parameter. The memory is the engine's: it may be overwritten, but not kept; a
            narrow weight's maps come transposed, so flatten them with ``reshape``.
        """


class TokenFold(Fold, Protocol):
    """A fold that takes what a linear map's relevance is made of, instead of the map of its weight."""

    def take_tokens(
        self, name: str, weight_OI: Tensor, x_STI: Tensor, lam_STO: Tensor, real_ST: Tensor
    ) -> None:
        """Take the inputs of a map and the Lambda at its outputs, for the selected samples of a batch.

        A map that is used several times comes once, its uses one after another along T.

        Parameters
        ----------
        name : str
            Canonical name of the weight.
        weight_OI : Tensor
            Its value, detached, outputs first whatever the layout of the module.
        x_STI, lam_STO : Tensor
            The memory is the engine's: not to be kept or changed.
        real_ST : Tensor of bool
            False at padding.
        """


class _Use(NamedTuple):
    """One use of a map in a batch."""

    parameter: nn.Parameter
    weight_OI: Tensor
    x_STI: Tensor
    lam_STO: Tensor
    real_ST: Tensor


class WeightMaps:
    """Knows which weights are attributed, and hands their per-sample maps to a fold.

    Parameters
    ----------
    model : nn.Module
        All its parameters count as weights.
    wanted : mapping of str to Parameter
        Canonical name to the parameters that get a map.
    fold : Fold
    factor : float
        The factor on R(W): 1/2 (Lemma 4.1) or 1. Biases always take theirs in full.
    """

    def __init__(
        self, model: nn.Module, wanted: Mapping[str, nn.Parameter], fold: Fold, factor: float
    ) -> None:
        self.fold, self.factor = fold, factor
        self.names = {id(parameter): name for name, parameter in wanted.items()}
        self.reached: set[str] = set()
        self._by_storage = {p.untyped_storage().data_ptr(): p for p in model.parameters()}
        self._scratch: dict[tuple[torch.dtype, torch.device], Tensor] = {}
        self._uses: Counter[int] = Counter()
        self._pending: dict[int, tuple[nn.Parameter, Tensor]] = {}
        self._tokens: dict[int, list[_Use]] = {}
        self.by_token = hasattr(fold, "take_tokens")
        self.samples = 0
        self.rows: frozenset[int] = frozenset()
        self.real: Sequence[Tensor] = ()
        self.selected: Tensor | None = None

    def begin_batch(self, samples: int, lengths: set[int], real: Sequence[Tensor] = ()) -> None:
        """Start a batch of `samples` rows whose sequences have one of `lengths` positions.

        `real` are masks (S, T) of its sequences, False at padding.
        """
        self.samples, self.rows = samples, frozenset(samples * length for length in lengths)
        self.selected, self.real = None, real
        self._uses.clear()
        self._pending.clear()

    def end_batch(self) -> None:
        """Fold what is left of weights that the model used several times."""
        for parameter, grad_S in self._pending.values():
            self._emit(parameter, grad_S)
        self._pending.clear()
        for uses in self._tokens.values():  # of maps that relevance reached in a part of their uses
            self._emit_tokens(uses)
        self._tokens.clear()

    def source(self, weight: Tensor) -> nn.Parameter | None:
        """The parameter whose memory `weight` shares, or None for a constant."""
        return self._by_storage.get(weight.untyped_storage().data_ptr())

    def holds_samples(self, x: Tensor) -> bool:
        """Whether the rows of `x` can be told apart by sample: batch first, maybe flattened with time."""
        return x.dim() >= 2 and (x.shape[0] == self.samples or (x.dim() == 2 and x.shape[0] in self.rows))

    def expect(self, parameter: Tensor | None) -> None:
        """Count a use of a parameter in the forward pass; maps of all uses are summed before the fold."""
        if parameter is not None and id(parameter) in self.names:
            self._uses[id(parameter)] += 1

    def wants(self, parameter: Tensor | None) -> bool:
        """Whether the parameter gets a map."""
        return parameter is not None and id(parameter) in self.names

    def weight(
        self, parameter: nn.Parameter, x: Tensor, lam: Tensor, out_first: bool, ledger: Ledger | None
    ) -> None:
        """Make the maps factor * x^T lam of a weight.

        Parameters
        ----------
        parameter : Parameter, shape (O, I) if `out_first` else (I, O)
        x : Tensor, shape (S, ..., I) or (S * T, I)
        lam : Tensor, same leading shape, (..., O)
        """
        x_STI = self._select(x)
        lam_STO = self._select(lam).to(x.dtype)
        if self.by_token:
            self._take_tokens(parameter, x_STI, lam_STO, out_first, ledger)
            return
        left, right = (lam_STO, x_STI) if out_first else (x_STI, lam_STO)
        samples, group = len(left), max(1, GROUP_BYTES // (parameter.numel() * x.element_size()))
        several = self._uses[id(parameter)] > 1
        for start in range(0, samples, samples if several else group):
            part = slice(start, None if several else start + group)
            self._take(parameter, self._product(left[part], right[part]), several, ledger)

    def _product(self, left_STM: Tensor, right_STN: Tensor) -> Tensor:
        """factor * left^T right of each sample, (S, M, N)."""
        samples, _, m = left_STM.shape
        n = right_STN.shape[-1]
        if n * NARROW < m:  # LoRA's B: a product with few columns is several times slower than its transpose
            return self._product(right_STN, left_STM).transpose(1, 2)
        left_SMT, grad_SMN = left_STM.transpose(1, 2), self._buffer((samples, m, n), right_STN)
        if samples == 1:  # a plain matrix product beats a batch of one
            torch.addmm(grad_SMN[0], left_SMT[0], right_STN[0], beta=0, alpha=self.factor, out=grad_SMN[0])
        else:
            torch.baddbmm(grad_SMN, left_SMT, right_STN, beta=0, alpha=self.factor, out=grad_SMN)
        return grad_SMN

    def bias(self, parameter: nn.Parameter, lam: Tensor, ledger: Ledger | None) -> None:
        """Make the maps of a bias, R(B) = B * sum of lam over positions; lam is (S, ..., O) or (S * T, O)."""
        several = self._uses[id(parameter)] > 1
        self._take(parameter, self._select(lam).to(parameter.dtype).sum(dim=1), several, ledger)

    def fill_unreached(self, wanted: Mapping[str, nn.Parameter]) -> tuple[str, ...]:
        """Tell the fold of parameters that no sample reached; return their names."""
        missing = tuple(name for name in wanted if name not in self.reached)
        for name in missing:
            weight = wanted[name].detach()
            self.fold.update(name, weight, weight.new_zeros((0, *weight.shape)))
        return missing

    def _select(self, x: Tensor) -> Tensor:
        x_ST = x.reshape(self.samples, -1, x.shape[-1])
        return x_ST if self.selected is None else x_ST.index_select(0, self.selected)

    def _buffer(self, shape: tuple[int, ...], like: Tensor) -> Tensor:
        # one buffer for all layers: no page faults, and it is still in the cache when the fold reads it
        count, key = torch.Size(shape).numel(), (like.dtype, like.device)
        if key not in self._scratch or self._scratch[key].numel() < count:
            self._scratch[key] = like.new_empty(count)
        return self._scratch[key][:count].view(shape)

    def _take_tokens(
        self, parameter: nn.Parameter, x_STI: Tensor, lam_STO: Tensor, out_first: bool, ledger: Ledger | None
    ) -> None:
        weight_OI = parameter.detach() if out_first else parameter.detach().t()
        if ledger is not None:
            ledger.maps += self.factor * relevance(x_STI @ weight_OI.t(), lam_STO)
        real = (mask for mask in self.real if mask.shape[1] == x_STI.shape[1])
        real_ST = next(real, torch.ones(self.samples, x_STI.shape[1], dtype=torch.bool, device=x_STI.device))
        uses = self._tokens.setdefault(id(parameter), [])
        uses.append(_Use(parameter, weight_OI, x_STI, lam_STO, self._select(real_ST[..., None])[..., 0]))
        if len(uses) == self._uses[id(parameter)]:
            self._emit_tokens(self._tokens.pop(id(parameter)))

    def _emit_tokens(self, uses: list[_Use]) -> None:
        name = self.names[id(uses[0].parameter)]
        self.reached.add(name)
        x_STI, lam_STO, real_ST = (
            values[0] if len(values) == 1 else torch.cat(values, dim=1)
            for values in ([u.x_STI for u in uses], [u.lam_STO for u in uses], [u.real_ST for u in uses])
        )
        self.fold.take_tokens(name, uses[0].weight_OI, x_STI, lam_STO, real_ST)  # type: ignore[attr-defined]

    def _take(self, parameter: nn.Parameter, grad_S: Tensor, several: bool, ledger: Ledger | None) -> None:
        if ledger is not None:
            ledger.maps += sum(relevance(parameter, grad) for grad in grad_S)
        if not several:
            self._emit(parameter, grad_S)
        elif id(parameter) in self._pending:
            self._pending[id(parameter)][1].add_(grad_S)
        else:
            self._pending[id(parameter)] = (parameter, grad_S.clone())

    def _emit(self, parameter: nn.Parameter, grad_S: Tensor) -> None:
        name = self.names[id(parameter)]
        self.reached.add(name)
        self.fold.update(name, parameter.detach(), grad_S)
