"""Squared gradients of single samples, taken from a training step that happens anyway."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from holdfast import world
from holdfast.attribution.maps import WeightMaps
from holdfast.errors import ConfigError
from holdfast.importance.prior import some
from holdfast.models import block_parameters, linear_modules

_TOLERANCE = 2e-2  # of the first step's check in float32; what it is to find is wrong by a fifth and more
_SMALL = 1e-2  # of the largest gradient: below it, rounding is not looked at


def require_linear_maps(model: nn.Module, parameters: Mapping[str, nn.Parameter]) -> None:
    """See that single samples' gradients can be had for all of these parameters.

    Raises
    ------
    ConfigError
        One of them belongs to something else than a linear map.
    """
    covered = {id(p) for _, module in linear_modules(model) for p in module.parameters(recurse=False)}
    others = [name for name, p in parameters.items() if id(p) not in covered]
    if others:
        # experts and convolutions are trained with the blocks: that would be refused too
        in_blocks = block_parameters(model, trainable_only=False).keys() & set(others)
        other = "LoRA on linear layers" if in_blocks else "LoRA or model.trainable: blocks"
        raise ConfigError(
            "strategy.sensitivity: 'second' needs gradients of single samples, which exist for linear "
            f"maps only, not for {some(others)}. Use 'second-batch', or train {other}."
        )


class _SumOfSquares:
    """A fold (`holdfast.attribution.Fold`): the sum over samples of (share_s times gradient) squared.

    Samples come in order, in one or more parts a parameter. Shares are applied here and not to the gradients
    of outputs, which are many times larger than LoRA's factors.
    """

    bytes_per_element = 4

    def __init__(self, parameters: Mapping[str, nn.Parameter]) -> None:
        shapes = {name: p.shape for name, p in parameters.items()}
        like = next(iter(parameters.values()))
        # one piece of memory for all: a model has hundreds of small factors
        self.total_N = torch.zeros(sum(s.numel() for s in shapes.values()), device=like.device)
        self.sums = named_views(self.total_N, shapes)
        self._seen: Counter[str] = Counter()
        self.gradients: dict[str, Tensor] | None = {}  # summed over samples, of the first step alone
        self._squared_S = torch.ones(0)

    def begin(self, share_S: Tensor) -> None:
        """Start a micro-batch."""
        self._seen.clear()
        self._squared_S = share_S.float().square()

    def update(self, name: str, weight: Tensor, grad_S: Tensor) -> None:
        """Take in some samples' gradients; they are overwritten."""
        start = self._seen[name]
        self._seen[name] += len(grad_S)
        if self.gradients is not None:
            before = self.gradients.get(name, 0.0)
            self.gradients[name] = before + grad_S.sum(0, dtype=torch.float32)
        total, square_S = self.sums[name], grad_S.float().square_()
        if not square_S.is_contiguous():  # a narrow weight's, transposed
            total, square_S = total.T, square_S.transpose(1, 2)
        squared_S = self._squared_S[start : start + len(grad_S)].to(square_S.device)
        total.add_((squared_S @ square_S.flatten(1)).view(total.shape).to(total.device))


def _unfollowed(why: str) -> ConfigError:
    return ConfigError(
        f"strategy.sensitivity: 'second' needs gradients of single samples, and {why} Use 'second-batch'."
    )


def named_views(flat_N: Tensor, shapes: Mapping[str, torch.Size]) -> dict[str, Tensor]:
    """Name to its part of a flat tensor, in the order and with the shapes given."""
    parts = flat_N.split([shape.numel() for shape in shapes.values()])
    return {name: part.view(shapes[name]) for name, part in zip(shapes, parts, strict=True)}


class SampleSquares:
    """Sum over a step's samples of (gradient of the sample's own loss) squared, for each weight.

    The forward and backward pass of the training are used: a hook on each linear map takes its input and the
    gradient of its output, and the attribution engine's maps make the samples' gradients one layer at a
    time. A sample's own loss is the mean over its answer tokens; the training's loss is the mean over the
    step's tokens, so sample j's part of it is scaled back by (tokens of the step) / (tokens of j).

    Parameters
    ----------
    model : nn.Module
    parameters : mapping of str to Parameter
        Canonical name to weights and biases of linear maps (LoRA's factors are such).

    Raises
    ------
    ConfigError
        One of the parameters belongs to something else than a linear map.
    """

    def __init__(self, model: nn.Module, parameters: Mapping[str, nn.Parameter]) -> None:
        require_linear_maps(model, parameters)
        self._model, self._parameters = model, dict(parameters)
        self._fold = _SumOfSquares(parameters)
        self._maps = WeightMaps(model, parameters, self._fold, factor=1.0)
        self._tokens = self._cells = 0  # of the step with an answer; of the micro-batch in all
        self._removers: list[Callable[[], None]] = []
        self.attach()

    def attach(self) -> None:
        """Put the hooks on the model, after `remove`; where they are it does nothing."""
        self._removers = self._removers or [
            module.register_forward_hook(self._hook(isinstance(module, nn.Linear))).remove
            for _, module in linear_modules(self._model)
            if any(map(self._maps.wants, module.parameters(recurse=False)))
        ]

    def begin(self, labels_ST: Tensor) -> None:
        """Start a micro-batch, before its forward pass; `labels_ST` is -100 where nothing is predicted."""
        self._maps.end_batch()  # of the micro-batch before
        if world.size() > 1:
            self._maps.locate(self._model)
        counts_S = (labels_ST != -100).sum(1).clamp(min=1)
        self._tokens += int(counts_S.sum())
        self._cells = labels_ST.numel()
        self._fold.begin(1.0 / counts_S)
        self._maps.begin_batch(len(labels_ST), set())

    def _hook(self, out_first: bool) -> Any:
        def hook(module: Any, args: tuple[Tensor, ...], output: Tensor) -> None:
            if not output.requires_grad:
                return
            x = args[0].detach()
            samples = self._maps.samples
            # (S, ..., I), or all tokens of the batch one behind the other, as OPT's MLP has them
            in_order = len(x) == (samples if x.dim() > 2 else self._cells)
            if samples > 1 and not in_order:
                name = self._maps.names.get(id(module.weight)) or self._maps.names[id(module.bias)]
                raise _unfollowed(
                    f"{name} is given inputs of shape {tuple(x.shape)}, of which it can't be told which of "
                    f"the {samples} samples a row is of."
                )
            self._maps.expect(module.weight)
            self._maps.expect(module.bias)

            def take(lam: Tensor) -> None:
                if self._maps.wants(module.weight):
                    self._maps.weight(module.weight, x, lam, out_first, None)
                if self._maps.wants(module.bias):
                    self._maps.bias(module.bias, lam, None)

            output.register_hook(take)

        return hook

    def finish(self, scale: float = 1.0) -> dict[str, Tensor]:
        """The step's sums by canonical name, float32; what is held is cleared for the next step.

        Parameters
        ----------
        scale : float
            What a gradient has to be multiplied by (the inverse of fp16's loss scale).

        Raises
        ------
        ConfigError
            In the first step, the samples' gradients don't sum to the batch's, as the parameters have it: the
            model uses its weights past its linear layers, or computes them otherwise than torch does.
        """
        self._maps.end_batch()
        tokens = self._tokens
        if world.size() > 1:  # each has seen its rows, and a gradient that is then averaged
            tokens, scale = sum(world.gather(tokens)), scale / world.size()
            world.add_up([self._fold.total_N])
        if self._fold.gradients is not None:
            self._compare(self._averaged(self._fold.gradients))
            self._fold.gradients = None
        result = self._fold.total_N * (tokens * scale) ** 2
        self._clear()
        return named_views(result, {name: total.shape for name, total in self._fold.sums.items()})

    def discard(self) -> None:
        """Pass over a step: what was seen of it goes, and the first step's check is left to the next."""
        self._maps.end_batch()
        if self._fold.gradients is not None:
            self._fold.gradients = {}
        self._clear()

    def _clear(self) -> None:
        self._fold.total_N.zero_()
        self._tokens = 0

    def _averaged(self, sums: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Over processes; what one has not seen is zero there."""
        if world.size() == 1:
            return sums
        whole = {
            n: sums.get(n, torch.zeros_like(p, dtype=torch.float32)) for n, p in self._parameters.items()
        }
        world.add_up(whole.values())
        return {name: total / world.size() for name, total in whole.items()}

    def _compare(self, sums: Mapping[str, Tensor]) -> None:
        norms = {n: p.grad.float().norm() for n, p in self._parameters.items() if p.grad is not None}
        largest = max((float(norm) for norm in norms.values()), default=0.0)
        for name, norm in norms.items():
            whole = self._parameters[name].grad.float()  # type: ignore[union-attr]
            apart = sums.get(name, torch.zeros_like(whole)).to(whole.device)
            scale = max(float(norm), _SMALL * largest)
            error = float((apart - whole).norm()) / scale if scale else 0.0
            limit = _TOLERANCE if self._parameters[name].dtype in (torch.float32, torch.float64) else 0.1
            if not error <= limit:
                raise _unfollowed(
                    f"those of {name} sum to something else than the batch's gradient (relative difference "
                    f"{error:.2g}). The model uses this weight in a way that can't be followed sample by "
                    "sample (a quantised layer, tokens that every sample gets)."
                )

    def remove(self) -> None:
        """Take the hooks off the model."""
        while self._removers:
            self._removers.pop()()
