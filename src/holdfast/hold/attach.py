"""What every mechanism shares: finding its weights in an optimizer, and hooks that can be undone."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import wraps
from types import MethodType
from typing import Any, Protocol, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from holdfast import world
from holdfast.errors import ConfigError, PriorMismatchError
from holdfast.hold.drift import Drift
from holdfast.hold.zero import Steps, steps_of
from holdfast.importance.prior import ImportancePrior, parameters_by_name
from holdfast.models import input_dims
from holdfast.models.adapters import stay_differentiable

_CHUNK = 2**26  # elements handled by one fused call: bounds the temporary memory of a step


class Protection(Protocol):
    """A mechanism that holds important weights while an optimizer moves the others."""

    def attach(self, model: nn.Module, optimizer: Optimizer) -> Handle:
        """Hold the model's weights at every step of this optimizer, until the handle is removed."""
        ...

    def summary(self) -> dict[str, Any]:
        """How strongly the weights are held: a JSON-able histogram with 20 bins, and the share fully held."""
        ...


@dataclass
class Handle:
    """Undoes an attachment; the weights stay as they are.

    Attributes
    ----------
    not_held : list of str
        Canonical names of what is trained and not held, what joined later included.
    """

    removers: list[Callable[[], None]] = field(default_factory=list)
    meter: Callable[[], Drift] | None = None
    not_held: list[str] = field(default_factory=list)

    def remove(self) -> None:
        """Take the hooks off the optimizer and free their tensors. A second call does nothing."""
        while self.removers:
            self.removers.pop()()

    def drift(self) -> Drift:
        """How far old outputs have moved since the weights that are returned to, see `holdfast.hold.drift`.

        Raises
        ------
        ConfigError
            What is attached has no such weights, or its prior is not of the kind ``inputs``.
        """
        if self.meter is None:
            raise ConfigError(
                "drift: what is attached doesn't know it. An anchor, a penalty or a projection of a prior of "
                "the kind 'inputs' does; for others call holdfast.hold.drift.drift(prior, model, reference)."
            )
        return self.meter()


@contextmanager
def together() -> Iterator[list[Handle]]:
    """Handles that are put into the list stay attached; where something fails before the end, none does."""
    handles: list[Handle] = []
    try:
        yield handles
    except BaseException:
        for handle in handles:
            handle.remove()
        raise


@dataclass(frozen=True)
class Bound:
    """A protected weight as one optimizer holds it."""

    name: str
    parameter: nn.Parameter
    group: int  # an index, because load_state_dict replaces the group dictionaries


@dataclass
class Chunk:
    """Weights of one parameter group, device and dtype that one fused call can handle together.

    Attributes
    ----------
    parameters : list of Tensor
        What a mechanism works on: the parameters, or of sharded ones this process's parts as plain tensors,
        in the same memory (FSDP2's DTensors) or beside it (`holdfast.hold.zero`).
    owners : list of Tensor
        The parameters as the model has them; by default the same.
    removers : list of callable
        Undo what keeps parts and owners together.
    """

    group: int
    names: list[str]
    parameters: list[Tensor]
    owners: list[Tensor] = field(default_factory=list)
    removers: list[Callable[[], None]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.owners = self.owners or list(self.parameters)
        self.dtypes = [part.dtype for part in self.parameters]

    @property
    def is_whole(self) -> bool:
        """Whether all parameters are as the model has them, none a part of a sharded one."""
        return all(p is o for p, o in zip(self.parameters, self.owners, strict=True))

    def moving(self) -> list[Tensor | None]:
        """Of each weight what a mechanism works on in this step; None where it `rests`.

        Raises
        ------
        ConfigError
            The model was cast to another type since.
        """
        for name, part, dtype in zip(self.names, self.parameters, self.dtypes, strict=True):
            if part.dtype != dtype:
                raise ConfigError(
                    f"attach: '{name}' was {dtype} when the hold was attached, and is {part.dtype} now. "
                    "Cast the model first, then make the optimizer and attach."
                )
        rows = zip(self.parameters, self.owners, strict=True)
        return [None if rests(owner, part) else part for part, owner in rows]


def rests(weight: Tensor, part: Tensor | None = None) -> bool:
    """Whether a weight is frozen and has no gradient: its optimizer leaves it as it is, and so must a hold.

    One that a batch has not used has none either, but is trained: a hold acts on it. ZeRO steps what is
    frozen, too, with a gradient of 0.

    Parameters
    ----------
    part : Tensor, optional
        What is worked on in its place, see `Chunk`.
    """
    return not weight.requires_grad and (weight if part is None else part).grad is None


@dataclass(frozen=True, eq=False)
class _Innermost:
    """The hooks closest to an optimizer's step, and what is not itself between them (see `hook`)."""

    before: RemovableHandle
    after: RemovableHandle
    turned: set[int]


_INNERMOST: WeakKeyDictionary[Optimizer, list[_Innermost]] = WeakKeyDictionary()
_GUARD = "_holdfast_guard"  # of a wrapped step: its `_Guard`


@dataclass(eq=False)
class _Guard:
    """What an optimizer's own ``step`` was, if it had one, and what is called where a step raises."""

    before: Callable[..., Any] | None
    ended: list[Callable[[], None]] = field(default_factory=list)


def turned_by(optimizer: Optimizer) -> set[int]:
    """ids of the parameters that are not themselves while this optimizer steps (`hook`'s `turned`)."""
    return set().union(*(each.turned for each in _INNERMOST.get(optimizer, ())))


def unwrap(optimizer: Any) -> Optimizer:
    """The torch optimizer inside a wrapper without step hooks of its own, such as accelerate's.

    Of ZeRO's optimizer `holdfast.hold.zero.Steps`.
    """
    while not hasattr(optimizer, "_optimizer_step_pre_hooks") and hasattr(optimizer, "optimizer"):
        optimizer = steps_of(optimizer) or optimizer.optimizer
    if not isinstance(optimizer, Optimizer):
        raise TypeError(
            f"attach: got {type(optimizer).__name__} as optimizer; a torch.optim.Optimizer is needed. "
            "With a Trainer use ProtectCallback, which attaches once the Trainer has made its optimizer."
        )
    return optimizer


def groups_of(optimizer: Optimizer) -> dict[int, int]:
    """id of each parameter that an optimizer has to the index of its group."""
    return {id(p): index for index, group in enumerate(optimizer.param_groups) for p in group["params"]}


def bind(
    prior: ImportancePrior, model: nn.Module, optimizer: Any, *, begun: bool = False
) -> tuple[Optimizer, list[Chunk]]:
    """Find the prior's weights in the model and in the optimizer; frozen ones are left out.

    Parameters
    ----------
    begun : bool
        The training may have begun (a checkpoint was loaded), so weights say nothing of the prior's origin.

    Raises
    ------
    PriorMismatchError
        The prior doesn't fit the model, or the optimizer holds none of its weights.
    ConfigError
        FSDP1 has the weights, or one that is held by its inputs is cut along these.
    """
    if any(type(module).__name__ == "FullyShardedDataParallel" for module in model.modules()):
        raise ConfigError(
            "attach: the model is wrapped in FSDP1 (FullyShardedDataParallel), whose flat weights no hold "
            "knows. Use FSDP2 (fsdp_version: 2, configs/accelerate/fsdp2.yaml), ZeRO or DDP."
        )
    stay_differentiable(model)
    prior.check_fits(model, shapes_alone=begun)
    inner = unwrap(optimizer)
    group_of = groups_of(inner)
    parameters = parameters_by_name(model)
    bound = [
        Bound(name, parameters[name], group_of[id(parameters[name])])
        for name in prior.tensors
        if id(parameters[name]) in group_of and parameters[name].requires_grad
    ]
    if not bound:
        raise PriorMismatchError(
            f"attach: the optimizer holds none of the prior's {len(prior)} weights. "
            "Make the optimizer from this model's parameters, and unfreeze what should be trained."
        )
    if prior.kind == "inputs":
        _require_whole_inputs(bound, inner, input_dims(model))
    return inner, chunks_of(bound, inner)


def _require_whole_inputs(bound: Sequence[Bound], optimizer: Optimizer, dims: Mapping[str, int]) -> None:
    """A change is multiplied by a basis of inputs, so each process must have whole rows of it."""
    by_rows = isinstance(optimizer, Steps)
    cut = [
        b.name
        for b in bound
        if (by_rows and dims[b.name] == 0) or world.is_sharded_along(b.parameter, dims[b.name])
    ]
    if cut:
        raise ConfigError(
            f"attach: '{cut[0]}' is sharded along its inputs (a Conv1D under FSDP2 or ZeRO), and a hold on "
            "inputs needs whole rows in each process. Use a prior by weight there (importance: fisher), or "
            "DDP."
        )


def _lend(chunks: Sequence[Chunk], optimizer: Optimizer) -> None:
    """Let the parts of sharded parameters have their part of the gradient."""
    if isinstance(optimizer, Steps):  # it does so itself
        return
    for chunk in chunks:
        for part, owner in zip(chunk.parameters, chunk.owners, strict=True):
            if part is not owner:
                part.grad = None if owner.grad is None else world.local(owner.grad)


def chunks_of(bound: Sequence[Bound], optimizer: Optimizer) -> list[Chunk]:
    """Put weights together that one fused call can handle."""
    runs: list[list[tuple[Bound, Tensor]]] = []
    last: dict[Any, tuple[list[tuple[Bound, Tensor]], int]] = {}
    for b in bound:
        part = _part(b.parameter, optimizer)
        key = (b.group, part.device, part.dtype)
        together, size = last.get(key, (None, _CHUNK))
        if together is None or size + part.numel() > _CHUNK:
            together, size = [], 0
            runs.append(together)
        together.append((b, part))
        last[key] = (together, size + part.numel())
    return [_chunk(together, optimizer) for together in runs]


def _chunk(together: Sequence[tuple[Bound, Tensor]], optimizer: Optimizer) -> Chunk:
    of, parts = zip(*together, strict=True)
    chunk = Chunk(of[0].group, [b.name for b in of], list(parts), [b.parameter for b in of])
    if isinstance(optimizer, Steps):
        chunk.removers.append(lambda: optimizer.release(chunk.owners))
    return chunk


def _part(parameter: nn.Parameter, optimizer: Optimizer) -> Tensor:
    if isinstance(optimizer, Steps):
        return optimizer.part(parameter)
    return world.local(parameter) if world.is_sharded(parameter) else parameter


def place(value: Tensor, parameter: Tensor, part: Tensor | None = None) -> Tensor:
    """Copy an importance-shaped tensor to the parameter's device and dtype; of a sharded one to its part's.

    It stays float32 where a value is beyond the dtype (float16 ends at 65,504).
    """
    value, part = world.like(value, parameter), parameter if part is None else part
    placed = value.to(device=part.device, dtype=part.dtype, copy=True)
    if part.dtype == torch.float16 and not torch.isfinite(placed).all():
        return value.to(device=part.device, copy=True)
    return placed


def reference_weights(chunk: Chunk, reference: Mapping[str, Tensor] | None, whose: str) -> list[Tensor]:
    """The weights a mechanism pulls towards: those given, or copies of the present ones.

    Given tensors of the right device and dtype are used as they are: don't change them while attached.

    Raises
    ------
    PriorMismatchError
        A weight is missing from `reference`, or has another shape there.
    """
    if reference is None:
        return [parameter.detach().clone() for parameter in chunk.parameters]
    found = []
    for name, parameter, owner in zip(chunk.names, chunk.parameters, chunk.owners, strict=True):
        got = reference.get(name)
        shape = world.shape(owner)
        if got is None or world.shape(got) != shape:
            raise PriorMismatchError(
                f"{whose}: reference weights don't fit the model: '{name}' is "
                f"{'missing' if got is None else f'{tuple(got.shape)} instead of {tuple(shape)}'}. "
                "Give canonical names (holdfast.names.canonical_name) to tensors of the same shapes."
            )
        value = world.like(world.whole(got).detach(), owner).to(
            device=parameter.device, dtype=parameter.dtype
        )
        # the live parameter itself, such as from dict(model.named_parameters()), would move along
        found.append(value.clone() if value.data_ptr() == parameter.data_ptr() else value)
    return found


def add_to_gradients(optimizer: Optimizer, weights: Sequence[Tensor], terms: list[Tensor]) -> None:
    """Add a term to the gradient of each weight before its step, also where it is None; terms are used up.

    Fused optimizers take a GradScaler's scale off inside the step, so terms get it here.
    """
    if not weights:
        return
    scale = getattr(optimizer, "grad_scale", None)
    if scale is not None:
        torch._foreach_mul_(terms, scale)
    gradients = []
    for weight in weights:
        if weight.grad is None:
            weight.grad = torch.zeros_like(weight)
        gradients.append(weight.grad)
    torch._foreach_add_(gradients, terms)


def hook(
    optimizer: Optimizer,
    before: Callable[[], None] | None = None,
    after: Callable[[], None] | None = None,
    needs_gradients: str = "",
    instead: str = "",
    first: Callable[[], Handle] | None = None,
    turned: set[int] | None = None,
    undo: Callable[[], None] | None = None,
    chunks: Sequence[Chunk] = (),
) -> Handle:
    """Run `before` and `after` around every step of the optimizer, without autograd.

    Where the step raises (out of memory, ctrl-C), or one of the two, torch runs no hook after it: then `undo`
    is run in place of `after`.

    A step at rate 0 without a gradient is none: torch makes one to save the state of an optimizer that has
    none (SGD under FSDP2), and to go back to W* + Z Uᵀ would move weights by their rounding.

    torch runs the hooks twice where an optimizer's step calls its parent's; both run once.

    Parameters
    ----------
    needs_gradients : str
        Name of a mechanism that changes gradients in `before`: such a one can't serve a step with a
        closure, which computes the gradients only inside the step.
    instead : str, optional
        What serves such a step in its place.
    first : callable, optional
        Attaches something whose hooks run before these.
    turned : set of int, optional
        ids of the parameters that are not themselves between `before` and `after`: whatever else is attached,
        earlier or later, then runs outside of the two. More may join it.
    undo : callable, optional
        Puts right what `before` has done.
    chunks : list of Chunk
        What the two work on, the live list: parts of sharded weights have their gradients then.

    Raises
    ------
    ConfigError
        `after` is given, and the optimizer swaps weights behind it (schedule-free ones).
    """
    if after is not None and _swaps_weights(optimizer):
        raise ConfigError(
            f"attach: {type(optimizer).__name__} trains one set of weights and swaps another in when its "
            "eval() is called, which no hold after a step reaches. Use an optimizer with a schedule, such as "
            "AdamW, or a mechanism that changes gradients: a penalty, or a gate with on='gradient'."
        )
    handle = first() if first is not None else Handle()
    idle = inside = False

    def pre(_: Optimizer, args: Any, kwargs: Any) -> None:
        nonlocal idle, inside
        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)  # args[0]: the optimizer
        if needs_gradients and closure is not None:
            raise ConfigError(
                f"{needs_gradients}: step(closure) computes gradients inside the step, too late to "
                f"change them. Call step() without a closure{instead and f', or {instead}'}."
            )
        if inside:
            return
        idle, inside = closure is None and _idle(optimizer), True
        if idle:
            return
        with torch.no_grad():
            _lend(chunks, optimizer)
            if before is not None:
                before()

    def post(_: Optimizer, args: Any, kwargs: Any) -> None:
        nonlocal inside
        if after is not None and inside and not idle:
            with torch.no_grad():
                after()
        inside = False

    def ended() -> None:
        nonlocal inside
        broken, inside = inside and not idle, False
        if broken and undo is not None:
            with torch.no_grad():
                undo()

    around = optimizer.register_step_pre_hook(pre), optimizer.register_step_post_hook(post)
    handle.removers += [each.remove for each in around]
    handle.removers += [_guard(optimizer, ended), ended]
    inner = _INNERMOST.setdefault(optimizer, [])
    if turned is not None:
        inner.append(own := _Innermost(*around, turned))
        handle.removers.append(lambda: inner.remove(own))
    for each in inner:
        cast(OrderedDict[int, Any], optimizer._optimizer_step_pre_hooks).move_to_end(each.before.id)
        cast(OrderedDict[int, Any], optimizer._optimizer_step_post_hooks).move_to_end(
            each.after.id, last=False
        )
    return handle


def _guard(optimizer: Optimizer, ended: Callable[[], None]) -> Callable[[], None]:
    """Call `ended` where a step of this optimizer raises, until what is returned is called."""
    guard: _Guard = getattr(optimizer.step, _GUARD, None) or _wrap(optimizer)
    guard.ended.append(ended)

    def let_go() -> None:
        guard.ended.remove(ended)
        last = vars(optimizer).get("step")
        if guard.ended or not isinstance(last, MethodType) or getattr(last, _GUARD, None) is not guard:
            return  # somebody holds yet, or a scheduler has wrapped it since
        del optimizer.step  # what is bound to an optimizer keeps its state alive
        if guard.before is not None:
            optimizer.step = guard.before  # type: ignore[method-assign]

    return let_go


def _wrap(optimizer: Optimizer) -> _Guard:
    """Wrap an optimizer's step, as schedulers do: nothing in it holds the optimizer itself."""
    guard = _Guard(vars(optimizer).get("step"))

    @wraps(type(optimizer).step if guard.before is None else guard.before)  # with the marks of schedulers
    def step(self: Optimizer, *args: Any, **kwargs: Any) -> Any:
        try:
            if guard.before is None:
                return type(self).step(self, *args, **kwargs)
            return guard.before(*args, **kwargs)
        except BaseException:
            for each in guard.ended:
                each()
            raise

    setattr(step, _GUARD, guard)
    optimizer.step = MethodType(step, optimizer)  # type: ignore[method-assign]
    return guard


def _idle(optimizer: Optimizer) -> bool:
    if any(isinstance(group["lr"], Tensor) or group["lr"] != 0 for group in optimizer.param_groups):
        return False
    gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    return not any(world.local(gradient).any() for gradient in gradients)


def _swaps_weights(optimizer: Optimizer) -> bool:
    """Whether it is a schedule-free optimizer: it has train() and eval(), as no other has."""
    return all(callable(getattr(optimizer, name, None)) for name in ("train", "eval"))


def makes_own_rate(optimizer: Optimizer) -> bool:
    """Whether the ``lr`` of some parameter group is not the one it steps by: Adafactor's relative steps."""
    return any(group["lr"] is None or group.get("relative_step") for group in optimizer.param_groups)


def histogram(values: Iterable[Tensor], edges: Sequence[float]) -> dict[str, list[float] | list[int]]:
    """Count float values between the edges; what lies outside is counted in the first or last bin."""
    counts = torch.zeros(len(edges) - 1, dtype=torch.int64)
    inner = torch.tensor(edges[1:-1], dtype=torch.float32)
    for value in values:
        bins = torch.bucketize(value.flatten(), inner, right=True)
        counts += torch.bincount(bins, minlength=len(counts))
    return {"edges": [float(e) for e in edges], "counts": counts.tolist()}


def unit_edges() -> list[float]:
    """21 edges of 20 equal bins of [0, 1]."""
    return [i / 20 for i in range(21)]


def held_summary(values: Callable[[], Iterator[Tensor]], quantity: str) -> dict[str, Any]:
    """Summary of per-weight held fractions in [0, 1]: histogram, mean, and the share fully held."""
    total, held, mean = 0, 0, 0.0
    for value in values():
        total += value.numel()
        held += int((value >= 1).sum())
        mean += float(value.sum(dtype=torch.float64))
    return {
        "quantity": quantity,
        "histogram": histogram(values(), unit_edges()),
        "held": held / max(total, 1),
        "mean": mean / max(total, 1),
        "elements": total,
    }


def logarithmic_summary(values: Callable[[], Iterator[Tensor]], quantity: str) -> dict[str, Any]:
    """Summary of strengths without an upper end, in 20 logarithmic bins over 8 decades below the maximum.

    What is below the first edge counts in the first bin; nothing is ever fully held.
    """
    largest, total, mean = 0.0, 0, 0.0
    for value in values():
        largest = max(largest, float(value.max()))
        total += value.numel()
        mean += float(value.sum(dtype=torch.float64))
    top = largest if largest > 0 else 1.0
    edges = [top * 10 ** (-8 * (1 - i / 20)) for i in range(21)]
    return {
        "quantity": quantity,
        "histogram": histogram(values(), edges),
        "held": 0.0,
        "mean": mean / max(total, 1),
        "elements": total,
    }
