"""The sum of a task's learning rates, by which a whole pull becomes a pull a step."""

from __future__ import annotations

import copy
import inspect
import warnings
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from holdfast import world
from holdfast.hold.attach import makes_own_rate, unwrap

TOTAL = "holdfast_total_rate"  # in each parameter group: Σ_t η_t over the task's steps; None: nobody knows


def tell_total_rate(optimizer: Any, scheduler: Any, steps: int) -> None:
    """Write Σ_t η_t over a task's optimizer steps into each parameter group, for ``Anchor(pull=...)``.

    It stands beside ``lr`` and ``initial_lr``, and goes into the optimizer's state like these. Call it before
    the first step; `holdfast run` and `ProtectCallback` do.

    Parameters
    ----------
    optimizer : Optimizer
        Or a wrapper of one, such as accelerate's.
    scheduler : LRScheduler or None
        The optimizer's; None where the rates stay as they are. A `LambdaLR` (all of transformers' schedules)
        is read from its start whatever its state; of others what lies before them is known only at the
        start, so on a scheduler that has moved already, a sum that is there (from a checkpoint) stays. Of
        one that follows a metric (`ReduceLROnPlateau`, transformers' GreedyLR) it can't be told, which a hold
        that needs it says when it is attached.
    steps : int
        Of the optimizer, in the whole task.
    """
    inner, stride = unwrap(optimizer), world.steps_at_once(scheduler)
    scheduler = getattr(scheduler, "scheduler", scheduler)  # accelerate's wrapper
    if scheduler is not None and _follows_a_metric(scheduler):
        for group in inner.param_groups:
            group[TOTAL] = None
        return
    if makes_own_rate(inner):
        return  # nor whether it is looked at
    if scheduler is None:
        totals = [float(group["lr"]) * steps for group in inner.param_groups]
    elif isinstance(scheduler, LambdaLR):
        totals = [
            float(base) * sum(float(factor(step * stride)) for step in range(steps))
            for base, factor in zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)
        ]
    elif _moved(scheduler) and all(group.get(TOTAL) is not None for group in inner.param_groups):
        return
    else:
        totals = _simulated(inner, scheduler, steps, stride)
    for group, total in zip(inner.param_groups, totals, strict=True):
        group[TOTAL] = total


def total_rate_of(group: Mapping[str, Any], optimizer: Optimizer) -> float | None:
    """Σ_t η_t of one of an optimizer's parameter groups; None where it isn't known.

    Of a group that has joined since it was told (``add_param_group``), that of a group that was there, in
    proportion to their rates: so its weights are pulled as strongly at each step as the others.
    """
    if TOTAL in group:
        return cast("float | None", group[TOTAL])
    told = [(other[TOTAL], _start(other)) for other in optimizer.param_groups if TOTAL in other]
    if not told or None in [total for total, _ in told]:
        return None
    total, start = next((both for both in told if both[0] > 0), (0.0, 1.0))  # of a rate of 0 nothing follows
    return total * _start(group) / start


def _start(group: Mapping[str, Any]) -> float:
    return float(group.get("initial_lr", group["lr"]))


def _follows_a_metric(scheduler: Any) -> bool:
    """Whether it can't step without being given one."""
    return any(p.default is p.empty for p in inspect.signature(scheduler.step).parameters.values())


def _moved(scheduler: Any) -> bool:
    """Whether it has stepped; one that is made of others (ChainedScheduler) counts nothing itself."""
    parts = getattr(scheduler, "_schedulers", ())
    return bool(getattr(scheduler, "last_epoch", 0) > 0) or any(map(_moved, parts))


def _simulated(optimizer: Optimizer, scheduler: Any, steps: int, stride: int) -> list[float]:
    """Run a copy of the scheduler on an optimizer without weights, `stride` steps for each of its own."""
    groups = [
        {"params": [torch.zeros(1)], **{k: copy.deepcopy(v) for k, v in group.items() if k != "params"}}
        for group in optimizer.param_groups
    ]
    dummy = torch.optim.SGD(groups, lr=0.0)
    moving: Any = copy.deepcopy(scheduler, {id(optimizer): dummy})
    totals = [0.0] * len(groups)
    for _ in range(steps):
        totals = [t + float(g["lr"]) for t, g in zip(totals, dummy.param_groups, strict=True)]
        dummy.step()
        with warnings.catch_warnings():  # it misses the mark that schedulers leave on their optimizer's step
            warnings.simplefilter("ignore")
            for _ in range(stride):
                total = getattr(moving, "total_steps", None)
                if total is None or moving._step_count <= total:  # as accelerate does
                    moving.step()
    return totals
