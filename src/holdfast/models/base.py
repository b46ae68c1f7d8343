"""The base: the model as it was before anything was learned, asked while the model goes on learning."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from holdfast.models.adapters import flags_kept, is_adapted, lora_factors
from holdfast.models.identity import fingerprints
from holdfast.models.modes import evaluating
from holdfast.models.parts import quantisation_of, unwrapped
from holdfast.names import canonical_name

_OFF = ("lora_", "modules_to_save")  # in the names of what PEFT switches off together with the adapter


def adapter_is_new(model: Any) -> bool:
    """Whether a model with its adapter off is the model as it is now, and stays so while it is trained.

    So it is with LoRA whose B is 0, no biases, and nothing trained outside the adapter.
    """
    configs = getattr(model, "peft_config", {})
    if not configs or any(getattr(c, "bias", None) != "none" for c in configs.values()):
        return False
    factors = [f for name in configs for f in lora_factors(model, name)]
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    inside = all(any(part in name for part in _OFF) for name in trained)
    return bool(factors) and inside and not any(f.b.detach().any() for f in factors)


def identity_of(model: Any) -> str | None:
    """What tells one base from another: a digest of `fingerprints`, what an adapter adds left out.

    It is the same on every device, and in float64, float32 and bfloat16. None of float16, see `fingerprints`,
    and of quantised weights, which are packed otherwise on each kind of device.
    """
    if quantisation_of(model) is not None or any(p.dtype == torch.float16 for p in model.parameters()):
        return None
    bare = unwrapped(model)
    adapted = {canonical_name(n) for n, p in bare.named_parameters() if p.requires_grad and is_adapted(bare)}
    own = {
        name: value
        for name, value in fingerprints(bare).items()
        if name not in adapted and not any(part in name for part in _OFF)
    }
    return hashlib.sha256(repr(sorted(own.items())).encode()).hexdigest()


class Base:
    """Answers as the model did before the first task.

    With a LoRA that started from zero this is the model itself with the adapter off, and takes no memory.
    Otherwise it is a frozen copy, made when it is first asked, and kept until `free`.

    Parameters
    ----------
    make : callable
        ``() -> model``: a fresh copy, on the model's device; whatever it raises comes from `answering`.
    by_adapter : bool
        Whether switching the adapter off gives the base (`adapter_is_new`, asked before any training).
    """

    def __init__(self, make: Callable[[], Any], by_adapter: bool) -> None:
        self.by_adapter, self._make, self._copy = by_adapter, make, None

    @contextmanager
    def answering(self, model: Any) -> Iterator[Any]:
        """The base inside the block, in evaluation mode; `model` is the one that learns."""
        if not self.by_adapter:
            if self._copy is None:
                self._copy = self._make().eval().requires_grad_(False)
            yield self._copy
            return
        with evaluating(model), flags_kept(model), model.disable_adapter():
            yield model

    def free(self) -> None:
        """Give the copy's memory back; it is made again when asked for."""
        self._copy = None
