"""A LoRA for each task on top of earlier ones, that begins and is held in what they leave free."""

from __future__ import annotations

import warnings
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from holdfast import world
from holdfast.errors import ConfigError, PriorMismatchError
from holdfast.hold import Handle, Protection
from holdfast.hold.attach import together
from holdfast.hold.drift import Drift
from holdfast.importance import ImportancePrior
from holdfast.importance.moments import energy, mean_eigenvalue_one
from holdfast.importance.prior import FREE
from holdfast.models import input_sizes
from holdfast.models.adapters import (
    check_growable,
    is_adapted,
    is_quantised,
    lora_factors,
    lora_layers,
    merge_in,
    plain_weight,
    restart,
    scale_of,
    under_lora,
)
from holdfast.names import is_lora
from holdfast.records import AdapterRanks
from holdfast.storage import give_usual_mode
from holdfast.strategies.lora.grown import Grown
from holdfast.strategies.lora.inputs import freed

Form = Literal["adapters", "weights"]


def form_for(model: nn.Module, wanted: Form | Literal["none"] | None, strategy: str) -> Form | None:
    """How this model's adapters are merged: as it was asked for, or by default as `adapters` where they can.

    Warns where by default they can't.

    Raises
    ------
    ConfigError
        One of the forms was asked for, and the model has no plain LoRA, or weights under it that the form
        does not go with.
    """
    if wanted == "none" or (wanted is None and not is_adapted(model)):
        return None
    try:
        check_growable(model, strategy)
        _check_under(model, wanted)
    except ConfigError as error:
        if wanted is not None:
            raise
        warnings.warn(
            "strategy.merge_lora: none, one LoRA for all tasks with both factors held, which on text kept "
            f"less than a LoRA a task. That can't be had here: {error}",
            stacklevel=1,  # of one place, whoever asks: said once
        )
        return None
    return wanted or "adapters"


def _check_under(model: nn.Module, wanted: Form | None) -> None:
    layers, known = lora_layers(model), input_sizes(model)
    unknown = next((name for name in layers if name not in known), None)
    if unknown is not None:
        kind = type(under_lora(layers[unknown])).__name__
        raise ConfigError(
            f"strategy.merge_lora: '{wanted}' holds what goes into each adapted map, and '{unknown}' is a "
            f"{kind}, which is not known as one. Set strategy.merge_lora=none, which holds one LoRA for all "
            "tasks."
        )
    if wanted == "weights" and any(is_quantised(under_lora(layer)) for layer in layers.values()):
        raise ConfigError(
            "strategy.merge_lora: 'weights' adds each task's LoRA to the weights under it, and these are "
            "quantised: what a task learned would be rounded away. Set strategy.merge_lora=adapters, which "
            "keeps them as they are."
        )


def of_whole_maps(prior: ImportancePrior, model: nn.Module) -> ImportancePrior:
    """What a prior of the bare model says of the maps that the adapter adapts.

    Raises
    ------
    PriorMismatchError
        It says nothing of one of them.
    """
    known = input_sizes(model)
    adapted = [name for name in lora_layers(model) if name in known]
    missing = [name for name in adapted if name not in prior.tensors]
    if missing:
        raise PriorMismatchError(
            f"it has no matrix for '{missing[0]}', which LoRA adapts (nor for {len(missing) - 1} others). "
            "With a LoRA a task the prior must be of the model without adapter; or set "
            "strategy.merge_lora=none to hold the factors of one LoRA."
        )
    return ImportancePrior({n: prior.tensors[n] for n in adapted}, {**prior.meta, "whole_maps": True})


def held_rows(prior: ImportancePrior, model: nn.Module) -> ImportancePrior:
    """A prior of whole maps as one of their A, whose inputs are the map's; B is free on purpose.

    What A passes on is what earlier inputs leave free, whatever B makes of it.
    """
    maps = [name.removesuffix(".weight") for name in lora_layers(model) if name in prior.tensors]
    found = {f"{path}.lora_A.weight": prior.tensors[f"{path}.weight"] for path in maps}
    meta = {key: value for key, value in prior.meta.items() if key != "weights"}
    return ImportancePrior(found, {**meta, FREE: [f"{path}.lora_B.weight" for path in maps]})


class Merged:
    """The adapter of the task at hand, W + alpha/r B A, where W has all earlier ones in it.

    ``weights``: after its task an adapter is added to the weights under it, and A and B begin anew.
    ``adapters``: it stays as frozen ranks of one plain adapter, and new ranks stand behind them: the same
    model up to rounding, with the base as it was.

    Parameters
    ----------
    model : nn.Module
        With one plain LoRA.
    form : {"adapters", "weights"}
    """

    def __init__(self, model: nn.Module, form: Form) -> None:
        self.form, self.grown = form, Grown(model, 0)
        self._start: dict[str, tuple[Tensor, Tensor]] = {}  # A and B of each held map, as its task began
        self._whole: dict[str, float] = {}  # and tr(W C Wᵀ) of the whole map

    @torch.no_grad()
    def begin(
        self, model: nn.Module, task: int, seed: int, prior: ImportancePrior | None, pull: float
    ) -> None:
        """Give a task, counted from 0, its adapter; the first one trains what is there.

        Where something is held, new rows of A begin as `freed` leaves PEFT's, and B at zero.

        Parameters
        ----------
        prior : ImportancePrior, optional
            Of the kind ``inputs``, of whole maps.
        pull : float
            Of `freed`.
        """
        if self.form == "adapters":
            self.grown = Grown.for_task(model, task, seed)
        else:
            if task:
                restart(model, seed * 1000 + task)
            self.grown = Grown(model, 0)
        layers = zip(lora_layers(model), self.grown.new_a(), self.grown.new_b(), strict=True)
        for name, a_RI, b_OR in layers:
            new = not b_OR.any()  # else it is an adapter that was given, with what it knows
            if prior is not None and name in prior.tensors and new:
                a_RI.copy_(freed(a_RI, prior.tensors[name], pull))
        self._start, self._whole = {}, {}
        if prior is not None:
            self._measure(model, prior)

    def _measure(self, model: nn.Module, prior: ImportancePrior) -> None:
        """Note what drift goes by: the model is whole here, and may be in parts while it is trained."""
        for (name, layer), factors in zip(lora_layers(model).items(), self.grown.factors, strict=True):
            if name in prior.tensors:
                a_RI, b_OR = self._start[name] = factors.a.detach().clone(), factors.b.detach().clone()
                map_OI = plain_weight(under_lora(layer)).double() + _product(layer, a_RI, b_OR)
                self._whole[name] = energy(map_OI, mean_eigenvalue_one(prior.tensors[name]))

    def attach(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        protection: Protection | None,
        prior: ImportancePrior | None,
    ) -> list[Handle]:
        """Hold the new rows of A; the earlier ranks come back after all else, bit for bit."""
        with together() as handles:
            if protection is not None:
                held = protection.attach(model, optimizer)
                handles.append(held)
                if prior is not None and held.meter is not None:
                    held.meter = lambda: self.drift(model, prior)
            handles.append(self.grown.attach(model, optimizer))
        return handles

    @torch.no_grad()
    def drift(self, model: nn.Module, prior: ImportancePrior) -> Drift:
        """Of whole maps, since the task began, see `holdfast.hold.drift.drift`."""
        moved, whole = {}, self._whole
        for (name, layer), factors in zip(lora_layers(model).items(), lora_factors(model), strict=True):
            if name in prior.tensors:
                a_RI, b_OR = (world.whole(factor).detach() for factor in factors)
                a0_RI, b0_OR = (factor.to(a_RI.device) for factor in self._start[name])
                change_OI = _product(layer, a_RI, b_OR) - _product(layer, a0_RI, b0_OR)
                moved[name] = energy(change_OI, mean_eigenvalue_one(prior.tensors[name]))
        maps = {name: moved[name] / whole[name] if whole[name] > 0 else 0.0 for name in moved}
        return Drift(maps, sum(moved.values()) / (sum(whole.values()) or 1.0))

    def end(self, model: nn.Module) -> None:
        """The task is learned: with `weights`, its adapter goes into the weights under it."""
        if self.form == "weights":
            merge_in(model)
            with torch.no_grad():
                for _, b in lora_factors(model):
                    b.zero_()

    def summary(self) -> AdapterRanks:
        """Rank of the adapter, and how many of its ranks are frozen."""
        return self.grown.summary()


def _product(layer: Any, a_RI: Tensor, b_OR: Tensor) -> Tensor:
    """What LoRA adds to a layer's weight, (O, I), float64."""
    return scale_of(layer) * (b_OR.double() @ a_RI.double())


def export_merged(model: Any, tokenizer: Any, folder: Any) -> None:
    """Write the weights under an adapter that adds nothing as a plain Hugging Face folder."""
    base = model.get_base_model()
    tensors = {
        name.replace(".base_layer", ""): tensor
        for name, tensor in base.state_dict().items()
        if not is_lora(name)
    }
    base.save_pretrained(folder, state_dict=tensors)
    give_usual_mode(folder)
    tokenizer.save_pretrained(folder)
