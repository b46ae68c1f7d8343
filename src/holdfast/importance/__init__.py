"""Importance: what matters for a task, by attribution or by any of its rivals.

One number for each weight; of the kind ``inputs``, one matrix for each linear map's inputs.
"""

from __future__ import annotations

import hashlib
import importlib
import pkgutil
import time
import warnings
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Union

from pydantic import BeforeValidator, Field
from torch import nn

from holdfast.config import Options, named, validate
from holdfast.errors import ConfigError, DataError, ModelError
from holdfast.importance.prior import ImportancePrior
from holdfast.importance.registry import REGISTRY, Inputs, Progress
from holdfast.models import digest, fingerprints, input_sizes, own_forward, require_rateable, unwrapped
from holdfast.resume import Partial
from holdfast.tasks.encode import Encoded, first_token

for _module in pkgutil.iter_modules(__path__):  # each file registers its own: there is no list to keep
    importlib.import_module(f"{__name__}.{_module.name}")


ImportanceOptions: Any = Annotated[
    Union[tuple(importance.options for importance in REGISTRY.values())],  # noqa: UP007 - from the registry
    Field(discriminator="name"),
    BeforeValidator(named),
]


def compute_prior(
    model: nn.Module,
    rows: Sequence[Encoded],
    options: Options | Mapping[str, Any] | str = "inputs",
    *,
    pad_id: int,
    seed: int = 0,
    task: str = "",
    parameters: Mapping[str, nn.Parameter] | None = None,
    progress: Progress | None = None,
    partial: Partial | None = None,
) -> ImportancePrior:
    """Rate what of a model matters for a task: every weight, or every direction of inputs.

    Parameters
    ----------
    model : nn.Module
        Left as it is: weights, gradients, mode and random state.
    rows : sequence of Encoded
        The task's training examples.
    options : options model, mapping or str
        Which importance: ``"fisher"``, ``{"name": "lrp", "aggregate": "topk"}``, ``FisherOptions()`` …
    pad_id : int
        Token id that fills up batches.
    seed : int
        Chooses the samples where there are more than `options.samples`, and the values of ``random``.
    task : str
        Recorded in the prior.
    parameters : mapping of str to Parameter, optional
        The weights to rate; by default all that are trained, and with `lrp` and `inputs` the linear maps in
        the transformer blocks among them.
    progress : callable, optional
        Called with (samples done, samples in all).
    partial : Partial, optional
        Where `lrp`, `fisher` and `taylor` keep what they have, so that a killed computation can be
        continued with the same arguments, to the same result. Remove it (`Partial.clear`) afterwards.

    Raises
    ------
    ConfigError
        No such importance, or an option that it doesn't have.
    DataError
        There are no rows, or the importance came out as NaN.
    ModelError
        Nothing that the importance rates is trained (of `lrp` and `inputs`: a linear map in the transformer
        blocks), or the model is cut up over processes.
    ConservationError, UnruledOperationError
        From the attribution (`lrp` and `inputs` only).

    Notes
    -----
    Where a model answers none of the samples right, `lrp` and `inputs` rate all of them, say so, and record
    it (``none_right``). Warns where every value came out as zero.
    """
    chosen, model = chosen_importance(options), unwrapped(model)
    require_rateable(model)
    importance = REGISTRY[chosen.name]
    if parameters is None:
        parameters = importance.rated(model)
    if importance.kind == "inputs":  # a rotation (OFT's) has none
        sizes = input_sizes(model)
        parameters = {name: p for name, p in parameters.items() if name in sizes}
    if not parameters:
        what, else_take = "weight", ""
        if not importance.every_weight:
            every = ", ".join(name for name, other in sorted(REGISTRY.items()) if other.every_weight)
            what = "linear map in transformer blocks, which is what it rates"
            else_take = f", or rate whatever is trained (IA3, LoHa, VeRA, prompts, norms) by one of {every}"
        raise ModelError(
            f"importance '{chosen.name}': {type(model).__name__} has no trainable {what}. Unfreeze "
            f"some{else_take}."
        )
    if importance.needs_data and not rows:
        raise DataError(f"importance '{chosen.name}': the data set is empty.")
    start = time.perf_counter()
    values, model_digest = chosen.model_dump(), digest(model)
    if partial is not None:
        seen = repr([(row.prompt_ids, row.completion_ids) for row in rows])
        partial.identity = {
            "options": values.copy(),
            "seed": seed,
            "data": hashlib.sha256(seen.encode()).hexdigest(),
            "model": model_digest,
            "weights": list(parameters),
        }
    with own_forward(model):
        inputs = Inputs(model, rows, parameters, pad_id, seed, progress, partial)
        computed = importance.compute(inputs, chosen)
    if not any(tensor.any() for tensor in computed.tensors.values()):
        warnings.warn(
            f"importance '{chosen.name}': all {len(parameters)} tensors came out as zero, and a hold of that "
            "holds nothing. Of a LoRA that is new (B = 0) no relevance is to be had: train it first, or take "
            "'fisher' or `weighting: uniform`.",
            stacklevel=2,
        )
    before = 0.0 if partial is None else partial.seconds
    return ImportancePrior(
        {name: computed.tensors[name] for name in parameters if name in computed.tensors},
        {
            "importance": values.pop("name"),
            "kind": importance.kind,
            "options": values,
            "tasks": [task] if task else [],
            **({"first_token": first_token(rows)} if importance.needs_data else {}),
            **computed.record,
            "seed": seed,
            "seconds": round(before + time.perf_counter() - start, 3),
            "model_digest": model_digest,
            "weights": fingerprints(model),
        },
    )


def chosen_importance(options: Options | Mapping[str, Any] | str) -> Any:
    """The options model of an importance: itself, or of a name, or of a name with options.

    Raises
    ------
    ConfigError
        No such importance, or an option that it doesn't have.
    """
    if isinstance(options, Options):
        return options
    values = dict(named(options))
    if values.get("name") not in REGISTRY:
        raise ConfigError(
            f"importance: no importance {values.get('name')!r}. Allowed: {', '.join(sorted(REGISTRY))}."
        )
    return validate(REGISTRY[values["name"]].options, values, "importance")
