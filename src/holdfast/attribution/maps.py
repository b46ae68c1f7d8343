"""Per-sample maps of the weights: made inside the backward of their layer, folded, and dropped."""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, Protocol, cast

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from holdfast.attribution.ledger import Ledger, relevance
from holdfast.errors import ModelError

NARROW = 4  # a weight with this many times more rows than columns is narrow
GROUP_BYTES = 2**20  # maps handed over at once: few enough to stay in the cache, enough to amortise calls


class Fold(Protocol):
    """A streaming fold over samples, called layer by layer inside the backward pass.

    Two attributes and a method are optional: ``bytes_per_element`` (memory that the fold keeps for each
    attributed weight; 4 if absent), which tells how many passes fit a memory budget, and ``finish()``, called
    after each pass so that the fold can shrink what it keeps. ``state()`` and ``load_state(tensors, values,
    weights)`` are needed only where an attribution is to be continued after a kill (`Partial`).

    Several processes (`holdfast.world`) share the samples if the fold has ``unite(weights)``, called after
    each pass, which puts together what all have folded; ``any_order = False`` keeps it from that.
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
        self, name: str, x_STI: Tensor, lam_STO: Tensor, passed_ST: Tensor, real_ST: Tensor
    ) -> None:
        """Take the inputs of a map and the Lambda at its outputs, for the selected samples of a batch.

        A map that is used several times comes once, its uses one after another along T.

        Parameters
        ----------
        name : str
            Canonical name of the weight.
        x_STI, lam_STO : Tensor
            The memory is the engine's: not to be kept or changed.
        passed_ST : Tensor
            The relevance that passes through the map at each token, λ · W x, at least float32. It is taken as
            x · Wᵀλ: the way back has Wᵀλ already.
        real_ST : Tensor of bool
            False at padding, and behind a sample's rows where samples have different numbers of them.
        """


class _TokenUse(NamedTuple):
    """One use of a map in a batch."""

    parameter: nn.Parameter
    x_STI: Tensor
    lam_STO: Tensor
    passed_ST: Tensor
    real_ST: Tensor


class _Place(NamedTuple):
    """Where the elements of a view lie in its parameter: sizes, strides, and the first one."""

    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int

    def block(self, parameter: Tensor, out_first: bool) -> tuple[tuple[slice, int], ...] | None:
        """Which outputs and inputs of a matrix these are, and of how many each; None if they are no block.

        The matrix may be (O, I) or (I, O), its part (O, I) if `out_first` else (I, O).
        """
        if parameter.dim() != 2 or len(self.size) != 2:
            return None
        size, step = parameter.shape, parameter.stride()
        start = divmod(self.offset, step[0])
        for order in ((0, 1), (1, 0)):  # of the part's dimensions, as rows and columns
            found = []
            for dim, by in enumerate(order):
                count, stride = self.size[by], self.stride[by] if self.size[by] > 1 else step[dim]
                last = start[dim] + (count - 1) * stride // step[dim]
                if stride % step[dim] or last >= size[dim]:
                    break
                found.append((slice(start[dim], last + 1, stride // step[dim]), size[dim]))
            else:
                return tuple(found if (order == (0, 1)) == out_first else found[::-1])
        return None


def _spread(x: Tensor, at: slice, size: int) -> Tensor:
    """Values in places of a longer last dimension, zeros in the others."""
    if x.shape[-1] == size:
        return x
    wide = x.new_zeros(*x.shape[:-1], size)
    wide[..., at] = x
    return wide


class _Stored(NamedTuple):
    """Which elements of its storage are a parameter's: from `start` to before `end`."""

    start: int
    end: int
    parameter: nn.Parameter


def _last(size: Sequence[int], stride: Sequence[int]) -> int:
    """How far behind its first element the last one of a tensor lies."""
    return sum((count - 1) * step for count, step in zip(size, stride, strict=True))


class _Use(NamedTuple):
    """One use of a parameter: makes the maps of some samples, of the shape of `place` (None: all of it)."""

    place: _Place | None
    make: Callable[[slice], Tensor]


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
        self._by_storage: dict[int, list[_Stored]] = {}
        self.locate(model)
        self._copies: dict[int, tuple[Tensor, nn.Parameter, int]] = {}
        self._scratch: dict[tuple[torch.dtype, torch.device], Tensor] = {}
        self._uses: Counter[int] = Counter()
        self._left: Counter[int] = Counter()
        self._pending: dict[int, tuple[nn.Parameter, list[_Use], Ledger | None]] = {}
        self._tokens: dict[int, list[_TokenUse]] = {}
        self.by_token = hasattr(fold, "take_tokens")
        self.samples = 0
        self.rows: frozenset[int] = frozenset()
        self.real: Sequence[Tensor] = ()
        self.selected: Tensor | None = None

    def locate(self, model: nn.Module) -> None:
        """Note where the weights' memory is now: what wraps a model may have moved it (DDP does)."""
        self._by_storage = {}
        for p in model.parameters():
            if p.numel() and not is_traceable_wrapper_subclass(p):
                start = int(p.storage_offset())
                end = start + _last(p.shape, p.stride()) + 1
                self._by_storage.setdefault(p.untyped_storage().data_ptr(), []).append(_Stored(start, end, p))
        for several in self._by_storage.values():  # flat buffers: of DeepSpeed, of vector_to_parameters
            several.sort(key=lambda stored: stored.start)

    def begin_batch(self, samples: int, lengths: set[int], real: Sequence[Tensor] = ()) -> None:
        """Start a batch of `samples` rows whose sequences have one of `lengths` positions.

        `real` are masks (S, T) of its sequences, False at padding.
        """
        self.samples, self.rows = samples, frozenset(samples * length for length in lengths)
        self.selected, self.real = None, real
        self._uses.clear()
        self._left.clear()
        self._pending.clear()
        self._copies.clear()

    def end_batch(self) -> None:
        """Fold what is left of weights that the model used several times."""
        for key in list(self._pending):
            self._flush(key)
        for uses in self._tokens.values():  # of maps that relevance reached in a part of their uses
            self._emit_tokens(uses)
        self._tokens.clear()

    def source(self, weight: Tensor) -> nn.Parameter | None:
        """The parameter whose memory `weight` shares, or of which it is a cast; None for a constant."""
        if is_traceable_wrapper_subclass(weight):  # torchao's and quanto's bits: no memory of its own
            return cast(nn.Parameter, weight) if id(weight) in self.names else None
        if weight.layout != torch.strided:  # SHiRA's sparse change: no memory to share
            return None
        pointer = weight.untyped_storage().data_ptr()
        copy = self._copies.get(pointer)
        if copy is not None:
            return copy[1]
        stored, offset = self._by_storage.get(pointer, ()), weight.storage_offset()
        for one in reversed(stored[: bisect_right(stored, offset, key=lambda one: one.start)]):
            if offset < one.end:
                return one.parameter
        return None

    def cast(self, weight: Tensor, copy: Tensor) -> bool:
        """Remember that `copy` holds the elements of `weight`, a part of a parameter, in another type."""
        parameter, place = self.source(weight), self.place(weight)
        if parameter is None or not (weight.is_contiguous() and copy.is_contiguous()):
            return False
        # the copy is kept until the batch ends: its memory must not become another tensor's
        offset = 0 if place is None else place.offset
        self._copies[copy.untyped_storage().data_ptr()] = (copy, parameter, offset)
        return True

    def place(self, weight: Tensor) -> _Place | None:
        """Where `weight` lies in its parameter; None if it is the parameter, or a cast of it, as a whole."""
        parameter = self.source(weight)
        if parameter is None or weight is parameter:
            return None
        copy = self._copies.get(weight.untyped_storage().data_ptr())
        start = parameter.storage_offset() if copy is None else -copy[2]
        found = _Place(tuple(weight.shape), weight.stride(), int(weight.storage_offset()) - int(start))
        whole = _Place(tuple(parameter.shape), parameter.stride(), 0)
        return None if found == whole else found

    def placeable(self, weight: Tensor) -> bool:
        """Whether maps of `weight` can be put into its parameter's."""
        parameter, place = self.source(weight), self.place(weight)
        if parameter is None or place is None:
            return parameter is not None
        overlapping = any(n > 1 and step == 0 for n, step in zip(place.size, place.stride, strict=True))
        inside = place.offset + _last(place.size, place.stride) < parameter.numel()
        return parameter.is_contiguous() and inside and not overlapping

    def holds_samples(self, x: Tensor) -> bool:
        """Whether the rows of `x` can be told apart by sample: batch first, maybe flattened with time."""
        if self.samples == 1:
            return x.dim() >= 1
        return x.dim() >= 2 and (x.shape[0] == self.samples or (x.dim() == 2 and x.shape[0] in self.rows))

    def expect(self, parameter: Tensor | None) -> None:
        """Count a use of a parameter in the forward pass; maps of all uses are summed before the fold."""
        if parameter is not None and id(parameter) in self.names:
            self._uses[id(parameter)] += 1
            self._left[id(parameter)] += 1

    def wants(self, parameter: Tensor | None) -> bool:
        """Whether the parameter gets a map."""
        return parameter is not None and id(parameter) in self.names

    def weight(
        self,
        weight: Tensor,
        x: Tensor,
        lam: Tensor,
        out_first: bool,
        ledger: Ledger | None,
        rows: Tensor | None = None,
        back: Tensor | None = None,
    ) -> None:
        """Make the maps factor * x^T lam of a weight, or hand over its tokens.

        Parameters
        ----------
        weight : Tensor, shape (O, I) if `out_first` else (I, O)
            A parameter, or a part of one.
        x : Tensor, shape (S, ..., I) or (S * T, I), or any rows (N, I) with `rows`
        lam : Tensor, same leading shape, (..., O)
        rows : Tensor, shape (N,), optional
            The sample that each row is of.
        back : Tensor, shape of x
            Lambda at the inputs, before anything is halved. Needed by tokens alone.
        """
        if self.by_token:
            assert back is not None
            values, real_ST = (x, lam, back), None
            if rows is None:
                x_STI, lam_STO, back_STI = map(self._select, values)
            else:
                (x_STI, lam_STO, back_STI), real_ST = self._by_sample(rows, values)
            self._take_tokens(weight, x_STI, lam_STO, back_STI, out_first, ledger, real_ST)
            return
        self._take(weight, self._maker(x, lam, out_first, rows), x.dtype, ledger)

    def of_computed(self, x: Tensor, lam: Tensor, out_first: bool, rows: Tensor | None) -> Tensor:
        """The maps of a weight that is no parameter, (S, *weight.shape)."""
        return self._maker(x, lam, out_first, rows)(slice(None)).clone()

    def _maker(
        self, x: Tensor, lam: Tensor, out_first: bool, rows: Tensor | None
    ) -> Callable[[slice], Tensor]:
        left, right = (lam.to(x.dtype), x) if out_first else (x, lam.to(x.dtype))
        if rows is None:
            left_STM, right_STN = self._select(left), self._select(right)

            def make(part: slice) -> Tensor:
                return self._product(left_STM[part], right_STN[part])
        else:
            of_samples = self._rows_of_samples(rows)

            def make(part: slice) -> Tensor:
                maps = [left[rows_N].T @ right[rows_N] for rows_N in of_samples[part]]
                return torch.stack(maps).mul_(self.factor)

        return make

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

    def bias(self, bias: Tensor, lam: Tensor, ledger: Ledger | None, rows: Tensor | None = None) -> None:
        """Make the maps of a bias, or a part of one: R(B) = B * sum of lam over positions.

        lam is (S, ..., O) or (S * T, O), or any rows (N, O) with `rows`; bias has one dimension or more.
        """
        lam = lam.to(bias.dtype)
        if rows is not None:
            grad_S = torch.stack(
                [lam[rows_N].sum_to_size(bias.shape) for rows_N in self._rows_of_samples(rows)]
            )
        elif bias.dim() == 1:
            grad_S = self._select(lam).sum(dim=1)
        else:
            lam_S = lam.reshape(self.samples, -1, *lam.shape[1:]) if len(lam) != self.samples else lam
            chosen = lam_S if self.selected is None else lam_S.index_select(0, self.selected)
            grad_S = torch.stack([lam.sum_to_size(bias.shape) for lam in chosen])
        self._take(bias, lambda part: grad_S[part], bias.dtype, ledger)

    def give(self, weight: Tensor, grad_S: Tensor, ledger: Ledger | None) -> None:
        """Take maps of all samples that were made elsewhere, with their factor in them."""
        chosen_S = grad_S if self.selected is None else grad_S.index_select(0, self.selected)
        self._take(weight, lambda part: chosen_S[part], grad_S.dtype, ledger)

    def take(self, weight: Tensor, grad_S: Tensor) -> None:
        """Take maps of the selected samples that were made elsewhere."""
        self._take(weight, lambda part: grad_S[part], grad_S.dtype, None)

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

    def _rows_of_samples(self, rows: Tensor) -> list[Tensor]:
        chosen = range(self.samples) if self.selected is None else self.selected.tolist()
        return [(rows == sample).nonzero().flatten() for sample in chosen]

    def _by_sample(self, rows: Tensor, values: Sequence[Tensor]) -> tuple[list[Tensor], Tensor]:
        """Rows (N, I) as (S, T, I), and where there are any, (S, T); T is of the sample with most."""
        of_samples = self._rows_of_samples(rows)
        real_ST = pad_sequence([torch.ones_like(rows_N, dtype=torch.bool) for rows_N in of_samples], True)
        return [pad_sequence([value[rows_N] for rows_N in of_samples], True) for value in values], real_ST

    def _buffer(self, shape: tuple[int, ...], like: Tensor) -> Tensor:
        # one buffer for all layers: no page faults, and it is still in the cache when the fold reads it
        count, key = torch.Size(shape).numel(), (like.dtype, like.device)
        if key not in self._scratch or self._scratch[key].numel() < count:
            self._scratch[key] = like.new_empty(count)
        return self._scratch[key][:count].view(shape)

    def _take_tokens(
        self,
        weight: Tensor,
        x_STI: Tensor,
        lam_STO: Tensor,
        back_STI: Tensor,
        out_first: bool,
        ledger: Ledger | None,
        real_ST: Tensor | None,
    ) -> None:
        parameter = self.source(weight)
        assert parameter is not None
        if ledger is not None:  # by the outputs, where what is expected goes by the inputs
            weight_IO = weight.detach().t() if out_first else weight.detach()
            ledger.maps += self.factor * relevance(x_STI @ weight_IO, lam_STO)
        wide = torch.promote_types(x_STI.dtype, torch.float32)
        passed_ST = torch.linalg.vecdot(x_STI.to(wide), back_STI.to(wide))
        place = self.place(weight)
        if place is not None:
            x_STI, lam_STO = self._widened(parameter, place, x_STI, lam_STO, out_first)
        if real_ST is None:
            fitting = (mask for mask in self.real if mask.shape[1] == x_STI.shape[1])
            every_ST = torch.ones(self.samples, x_STI.shape[1], dtype=torch.bool, device=x_STI.device)
            real_ST = self._select(next(fitting, every_ST)[..., None])[..., 0]
        uses = self._tokens.setdefault(id(parameter), [])
        uses.append(_TokenUse(parameter, x_STI, lam_STO, passed_ST, real_ST))
        if len(uses) == self._uses[id(parameter)]:
            self._emit_tokens(self._tokens.pop(id(parameter)))

    def _widened(
        self, parameter: nn.Parameter, place: _Place, x_STI: Tensor, lam_STO: Tensor, out_first: bool
    ) -> tuple[Tensor, Tensor]:
        """x and Lambda of a block of a weight as those of the whole: zero beside the block."""
        block = place.block(parameter, out_first)
        if block is None:
            raise ModelError(
                f"{self.names[id(parameter)]}: the model uses elements of this weight that are no block of "
                "it, so its inputs can't be told. Take an importance by weight, such as 'fisher'."
            )
        (outputs, of_o), (inputs, of_i) = block
        return _spread(x_STI, inputs, of_i), _spread(lam_STO, outputs, of_o)

    def _emit_tokens(self, uses: list[_TokenUse]) -> None:
        name = self.names[id(uses[0].parameter)]
        self.reached.add(name)
        _, *values = zip(*uses, strict=True)
        joined = [value[0] if len(uses) == 1 else torch.cat(value, dim=1) for value in values]
        self.fold.take_tokens(name, *joined)  # type: ignore[attr-defined]

    def _take(
        self, weight: Tensor, make: Callable[[slice], Tensor], dtype: torch.dtype, ledger: Ledger | None
    ) -> None:
        """Fold the maps of one use, or wait for the other uses of its parameter."""
        parameter, place = self.source(weight), self.place(weight)
        assert parameter is not None
        key = id(parameter)
        self._left[key] -= 1
        use = _Use(place, make)
        if self._uses[key] == 1 and place is None:
            for part in self._groups(parameter, dtype):
                self._emit(parameter, make(part), ledger)
            return
        self._pending.setdefault(key, (parameter, [], ledger))[1].append(use)
        if self._left[key] == 0:
            self._flush(key)

    @torch.no_grad()
    def _flush(self, key: int) -> None:
        """Sum the maps of all uses, a few samples at a time, in the parameter's own layout."""
        parameter, uses, ledger = self._pending.pop(key)
        for part in self._groups(parameter, parameter.dtype):
            total_S: Tensor | None = None
            for place, make in uses:
                grad_S = make(part)
                if total_S is None:
                    total_S = grad_S.new_zeros((len(grad_S), *parameter.shape))
                if place is None:
                    total_S.add_(grad_S)
                else:
                    stride = (parameter.numel(), *place.stride)
                    total_S.as_strided((len(grad_S), *place.size), stride, place.offset).add_(grad_S)
            if total_S is not None:
                self._emit(parameter, total_S, ledger)

    def _groups(self, parameter: nn.Parameter, dtype: torch.dtype) -> list[slice]:
        samples = self.samples if self.selected is None else len(self.selected)
        group = max(1, GROUP_BYTES // max(1, parameter.numel() * dtype.itemsize))
        return [slice(start, start + group) for start in range(0, samples, group)]

    def _emit(self, parameter: nn.Parameter, grad_S: Tensor, ledger: Ledger | None) -> None:
        if ledger is not None:
            ledger.maps += sum(relevance(parameter, grad) for grad in grad_S)
        name = self.names[id(parameter)]
        self.reached.add(name)
        self.fold.update(name, parameter.detach(), grad_S)
