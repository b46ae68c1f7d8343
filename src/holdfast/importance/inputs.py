"""Inputs: the second moment of each linear map's inputs, tokens weighted by the relevance they carried."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from itertools import accumulate, groupby
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from holdfast import world
from holdfast.attribution.alone import TOLERANCE
from holdfast.attribution.engine import (
    AttributionOptions,
    AttributionReport,
    attribute_batches,
    per_sample_gradients,
)
from holdfast.attribution.targets import make_batch
from holdfast.config import Options
from holdfast.importance.moments import Rank, Sketch, cut, rows_of
from holdfast.importance.registry import Computed, Inputs, register, sample_counts
from holdfast.importance.right_rows import of_right_rows
from holdfast.importance.seeding import sample, seed_for
from holdfast.models import evaluating, input_sizes, is_encoder_decoder, linear_modules
from holdfast.precision import products_for
from holdfast.resume import State
from holdfast.tasks.encode import IGNORED, Encoded

Weighting = Literal["relevance", "uniform", "answer", "gradient", "loss_gradient"]
CONTROLS_OF_TOKENS = {"shuffled-relevance": "which tokens of a sample the relevance went through"}
_FORWARD_ONLY = ("uniform", "answer")
# Added to the sum that r is scaled by: where nothing passes through a map (the keys' and queries' where there
# is one key), rounding noise would be scaled up to weights like any other's. Relevance is in units of logits.
EPSILON = 1e-8
FULL_PASS = 1024  # tokens; a pass of fewer costs mostly the calls of its operations
ROW_BLOCKS = 4  # a symmetric sum is made right of its diagonal, in blocks of rows: 5/8 of the products


class InputsOptions(Options):
    """Which inputs of a linear map matter, for `hold` to keep what the map does with them."""

    name: Literal["inputs"] = "inputs"
    weighting: Weighting = Field(
        "relevance",
        description="of tokens. relevance: |λ·Wx| by LRP; gradient: the same with the plain gradient; "
        "loss_gradient: its square, of the loss; answer: the answer's positions alike; uniform: all alike",
    )
    control: Literal["none", "shuffled-relevance"] = Field(
        "none", description="shuffled-relevance: each sample's token weights given to other tokens of it"
    )
    samples: int = Field(128, ge=1, description="examples looked at, drawn by the run's seed")
    batch_size: int = Field(
        8,
        ge=1,
        description="examples a pass, or as many more as have 1,024 tokens; no effect on the result but "
        "rounding",
    )
    correct_only: bool | None = Field(
        None,
        description="relevance and gradient only: examples that the model answers right (default; all if "
        "there are none), or all",
    )

    rank: Annotated[int, Field(ge=1)] | Literal["auto"] | None = Field(
        None,
        description="how many directions of a map are kept apart, all others by their mean (default: all; "
        "auto: those with 99 % of the trace). A map for which it is half of the inputs or more keeps all",
    )

    @model_validator(mode="after")
    def _only_what_applies(self) -> InputsOptions:
        if self.correct_only is not None and self.weighting not in ("relevance", "gradient"):
            raise ValueError(
                "`correct_only` applies to `weighting: relevance` and `gradient` only, "
                f"not to `{self.weighting}`"
            )
        if self.control != "none" and self.weighting == "uniform":
            raise ValueError("`control: shuffled-relevance` changes nothing with `weighting: uniform`")
        return self


class InputMoments:
    """C = 1/S Σ_s Σ_t r_st x_st x_stᵀ of each linear map, streamed over batches (a `TokenFold`).

    Parameters
    ----------
    weighting : str
        What r is made of, before it is scaled to sum 1 over the tokens of a sample: |λ_st · W x_st|
        (``relevance``, ``gradient``) or |λ_st|² (``loss_gradient``). Where all of it is rounding noise (below
        1e-8; 1e-16 of squares), the sample adds nothing to this map.
    shuffled : int or None
        Seed by which each sample's r is given to other tokens of it (padding excluded).
    rank : int or "auto", optional
        How many directions of a map `result` keeps apart, see `holdfast.importance.moments.cut`. Of a map
        with more than 4 K + 1 inputs C is never made: a `Sketch` of it is summed.

    Notes
    -----
    Memory: I² values a map, or (4 K + 1) I, float32 (float64 for a float64 model). r and the sum are computed
    in that type. Of a sum of C only what is right of the diagonal counts until `result`.
    """

    def __init__(self, weighting: Weighting, shuffled: int | None = None, rank: Rank | None = None) -> None:
        self.weighting, self.shuffled, self.rank = weighting, shuffled, rank
        self._sketch = Sketch(rank) if isinstance(rank, int) else None
        self._sums: dict[str, Tensor] = {}
        self._counts: Counter[str] = Counter()

    def update(self, name: str, weight: Tensor, grad_S: Tensor) -> None:
        """Of a map that no sample reached: nothing to add."""

    def take_tokens(
        self, name: str, x_STI: Tensor, lam_STO: Tensor, passed_ST: Tensor, real_ST: Tensor
    ) -> None:
        """Take a map's inputs and Lambda of some samples, see `holdfast.attribution.TokenFold`."""
        squares = self.weighting == "loss_gradient"
        weight_ST = lam_STO.to(passed_ST.dtype).square().sum(-1) if squares else passed_ST.abs()
        self.add(name, x_STI, weight_ST, real_ST)

    def add(self, name: str, x_STI: Tensor, weight_ST: Tensor, real_ST: Tensor) -> None:
        """Add Σ_s Σ_t r_st x_st x_stᵀ, r being `weight_ST` scaled to sum 1 over a sample's real tokens."""
        weight_ST = weight_ST * real_ST
        if self.shuffled is not None:
            weight_ST = self._shuffle(name, weight_ST, real_ST)
        total_S1 = weight_ST.sum(-1, keepdim=True)
        share_ST = weight_ST / (total_S1 + (EPSILON**2 if self.weighting == "loss_gradient" else EPSILON))
        x_NI, share_N, size = x_STI.flatten(0, 1), share_ST.flatten(), x_STI.shape[-1]
        at_N = share_N.nonzero().flatten()
        if len(at_N) < len(share_N):  # padding, prompts: they add nothing
            x_NI, share_N = x_NI[at_N], share_N[at_N]
        y_NI = x_NI.to(share_N.dtype) * share_N.sqrt()[:, None]
        sketch = self._sketch_of(size)
        if name not in self._sums:
            self._sums[name] = y_NI.new_zeros(size if sketch is None else sketch.rows, size)
        total, width = self._sums[name], -(-size // ROW_BLOCKS)
        with products_for({x_STI.dtype}):
            if sketch is not None:
                sketch.add(total, y_NI)
            else:
                for i in range(0, size, width):
                    total[i : i + width, i:].addmm_(y_NI[:, i : i + width].t(), y_NI[:, i:])
        self._counts[name] += len(x_STI)

    def _sketch_of(self, inputs: int) -> Sketch | None:
        """What sums a map of this width in place of C, if anything does."""
        return self._sketch if self._sketch is not None and self._sketch.takes(inputs) else None

    def _shuffle(self, name: str, weight_ST: Tensor, real_ST: Tensor) -> Tensor:
        shuffled_ST, first = weight_ST.clone(), self._counts[name]
        for row, real_T in enumerate(real_ST):
            at = real_T.nonzero().flatten()
            seed = seed_for(f"{name}:{first + row}", self.shuffled or 0)
            order = torch.randperm(len(at), generator=torch.Generator().manual_seed(seed))
            shuffled_ST[row, at] = weight_ST[row, at[order.to(at.device)]]
        return shuffled_ST

    def state(self) -> State:
        """What is folded so far; the tensors are the fold's own memory."""
        return dict(self._sums), dict(self._counts)

    def load_state(
        self, tensors: Mapping[str, Tensor], values: Mapping[str, Any], weights: Mapping[str, Tensor]
    ) -> None:
        """Take back what `state` gave; `weights` are the current ones by name."""
        self._sums = {name: tensors[name].to(weights[name].device, copy=True) for name in values}
        self._counts = Counter(values)

    @property
    def any_order(self) -> bool:
        """Whether samples may come in any order, so that processes may share them."""
        return self.shuffled is None

    def unite(self, weights: Mapping[str, Tensor]) -> None:
        """Add up what all processes have folded."""
        like = world.union({name: (tuple(total.shape), total.dtype) for name, total in self._sums.items()})
        for name, (shape, dtype) in like.items():
            if name not in self._sums:
                self._sums[name] = torch.zeros(shape, dtype=dtype, device=weights[name].device)
        world.add_up(self._sums[name] for name in like)

    def result(self, sizes: Mapping[str, int], samples: int) -> dict[str, Tensor]:
        """Canonical name to C, symmetric, or its leading directions; zeros for a map that nothing reached.

        Parameters
        ----------
        sizes : mapping of str to int
            I of each map that is asked for.
        samples : int
            S.
        """
        found = {}
        for name, size in sizes.items():
            total, sketch = self._sums.get(name), self._sketch_of(size)
            if total is None:
                found[name] = torch.zeros(rows_of(size, self.rank), size)
            elif sketch is not None:
                found[name] = sketch.result(total / max(samples, 1))
            else:
                upper_II = total.triu() / max(samples, 1)
                c_II = (upper_II + upper_II.triu(1).t()).float()
                found[name] = c_II if self.rank is None else cut(c_II, self.rank)
        return found


@register(InputsOptions, needs_data=True, kind="inputs", every_weight=False)
def moments_of_inputs(inputs: Inputs, options: InputsOptions) -> Computed:
    """The second moment of each linear map's inputs, tokens weighted by `weighting`.

    E Σ_t r_t |ΔW x_t|² = tr(ΔW C ΔWᵀ): what a change ΔW of the map does to the outputs that mattered.
    With ``relevance`` one forward and one backward pass of the attribution engine give both x and λ (rules
    ``attnlrp``, no halves, target: the answer's logits). ``uniform`` and ``answer`` need the forward pass
    alone, and ``uniform`` no right answer. ``answer``: of an encoder, which predicts nothing, all tokens.

    Biases get no matrix. Maps that share their inputs (q, k, v; gate, up) keep one each: by relevance the
    matrices differ.

    A row's inputs are what its maps are given for this row alone: in that forward pass rows of one length go
    together, without padding, and one at a time in a model that mixes the rows of a batch.
    """
    parameters, all_sizes = inputs.parameters, input_sizes(inputs.model)
    sizes = {name: all_sizes[name] for name in parameters}
    rows = sample(inputs.rows, options.samples, inputs.seed)
    shuffled = inputs.seed if options.control != "none" else None
    fold = InputMoments(options.weighting, shuffled, options.rank)
    if options.weighting in _FORWARD_ONLY:
        _forward_only(inputs, parameters, rows, fold, options)
        seen = {"samples_seen": len(rows), "samples_used": len(rows)}
        return Computed(fold.result(sizes, len(rows)), seen)
    common: dict[str, Any] = {
        "fold": fold,
        "parameters": parameters,
        "batch_size": _batch_size(rows, options),
        "pad_id": inputs.pad_id,
        "progress": inputs.progress,
        "partial": inputs.partial,
    }

    def attribute(correct_only: bool) -> AttributionReport:
        if options.weighting == "relevance":
            rules = AttributionOptions(rules="attnlrp", halves="none", target="all", of="logit")
            return attribute_batches(inputs.model, rows, options=rules, correct_only=correct_only, **common)
        of: Literal["logit", "log_probability"] = (
            "logit" if options.weighting == "gradient" else "log_probability"
        )
        return per_sample_gradients(inputs.model, rows, of=of, correct_only=correct_only, **common)

    only = options.correct_only is not False and options.weighting != "loss_gradient"
    report, right = of_right_rows(inputs, attribute, only)
    record: dict[str, Any] = {**sample_counts(report), **right}
    if options.weighting == "relevance":
        record["conservation_max_relative_error"] = report.conservation_max_relative_error
    return Computed(fold.result(sizes, report.samples_used), record)


def _batch_size(rows: Sequence[Encoded], options: InputsOptions) -> int:
    """Samples of a pass."""
    longest = max(len(row.prompt_ids) + len(row.completion_ids) for row in rows)
    return max(options.batch_size, FULL_PASS // longest)


@torch.no_grad()
def _forward_only(
    inputs: Inputs,
    parameters: Mapping[str, nn.Parameter],
    rows: Sequence[Encoded],
    fold: InputMoments,
    options: InputsOptions,
) -> None:
    """Fold what each map is given. Rows of one length go together, as padding may leak into what is given.

    Where a batch mixes its samples, which a row of it alone shows, they go one at a time.
    """
    model: Any = inputs.model
    batches = _of_one_length(rows, is_encoder_decoder(model), options.batch_size)
    ends = list(accumulate(map(len, batches)))
    apart = checked = False
    with evaluating(model), _watched(model, parameters) as seen:

        def given(part: Sequence[Encoded]) -> _Given | None:
            seen.clear()
            return _given(inputs, part, seen, options.weighting)

        numbers = range(len(batches))
        for number in world.part(numbers) if fold.any_order else numbers:
            part = batches[number]
            together = None if apart and len(part) > 1 else given(part)
            if together is not None and not checked and any(row != part[0] for row in part):
                checked, alone = True, given(part[:1])
                together = together if alone is not None and _same(together, alone) else None
            apart = apart or together is None
            for found in [together] if together is not None else (given([row]) for row in part):
                assert found is not None  # of one row
                for name, x_STI, weight_ST in found:
                    fold.add(name, x_STI, weight_ST, torch.ones_like(weight_ST, dtype=torch.bool))
            if inputs.progress is not None:
                inputs.progress(ends[number], len(rows))
    if fold.any_order:
        fold.unite({name: p.detach() for name, p in parameters.items()})


_Given = list[
    tuple[str, Tensor, Tensor]
]  # of each map: its name, its inputs (S, T, I), what each token counts


def _of_one_length(
    rows: Sequence[Encoded], encoder_decoder: bool, batch_size: int
) -> list[Sequence[Encoded]]:
    """Batches of rows that need no padding, the longest last; the rows' order is that of any batch size."""

    def length(row: Encoded) -> tuple[int, ...]:
        lengths = len(row.prompt_ids), len(row.completion_ids)
        return lengths if encoder_decoder else (sum(lengths),)

    batches: list[Sequence[Encoded]] = []
    for key, group in groupby(sorted(rows, key=length), key=length):
        part, size = list(group), max(batch_size, FULL_PASS // sum(key))
        batches += [part[start : start + size] for start in range(0, len(part), size)]
    return batches


def _given(
    inputs: Inputs, part: Sequence[Encoded], seen: Mapping[str, list[Tensor]], weighting: Weighting
) -> _Given | None:
    """What a batch gives to the maps, with their uses along T; None where its samples can't be told apart."""
    model: Any = inputs.model
    batch = make_batch(model, part, inputs.pad_id, next(model.parameters()).device, "left")
    model(**batch.inputs)
    length, answer_ST = batch.real[0].shape[1], batch.answer_ST != IGNORED
    found = []
    for name, uses in seen.items():
        inputs_of, weights_of = [], []
        for x in uses:
            x_STI = _by_sample(x, len(part), batch.lengths)
            if x_STI is None:
                return None
            weight_ST = torch.ones(x_STI.shape[:2], device=x.device)
            # an encoder's tokens count all, and its decoder's are the answer's
            if weighting == "answer" and len(batch.real) == 1 and x_STI.shape[1] == length:
                # logits are of the last positions alone
                weight_ST = nn.functional.pad(answer_ST, (length - answer_ST.shape[1], 0))
            inputs_of.append(x_STI)
            weights_of.append(weight_ST.to(torch.promote_types(x.dtype, torch.float32)))
        found.append((name, torch.cat(inputs_of, dim=1), torch.cat(weights_of, dim=1)))
    return found


def _by_sample(x: Tensor, samples: int, lengths: set[int]) -> Tensor | None:
    """Rows as (S, T, I), as far as their number tells that they are those of whole samples in order."""
    whole = x.dim() == 2 and len(x) in {samples * length for length in lengths}
    if samples > 1 and not whole and not (x.dim() > 2 and len(x) == samples):
        return None
    return x.reshape(samples, len(x) if samples == 1 and x.dim() == 2 else -1, x.shape[-1])


def _same(together: _Given, alone: _Given) -> bool:
    """Whether the first sample of a batch gives what it gives alone."""
    of_first = {name: x_STI[0].double() for name, x_STI, _ in together}
    for name, x_STI, _ in alone:
        found, expected = of_first.get(name), x_STI[0].double()
        limit = TOLERANCE.get(x_STI.dtype, 0.1) * float(expected.norm())
        if found is None or found.shape != expected.shape or not float((found - expected).norm()) <= limit:
            return False
    return True


@contextmanager
def _watched(model: nn.Module, parameters: Mapping[str, nn.Parameter]) -> Iterator[dict[str, list[Tensor]]]:
    """While open, what each map is given in each of its uses, by name."""
    seen: dict[str, list[Tensor]] = {}

    def watcher(name: str) -> Any:
        def before(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            seen.setdefault(name, []).append(args[0].detach())

        return before

    names = {id(parameter): name for name, parameter in parameters.items()}
    with ExitStack() as stack:
        for _, module in linear_modules(model):
            name = names.get(id(getattr(module, "weight", None)))
            if name is not None:
                stack.callback(module.register_forward_pre_hook(watcher(name)).remove)
        yield seen
