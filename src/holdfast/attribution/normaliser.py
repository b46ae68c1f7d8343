"""Normalisers composed of elementary operations: x * rsqrt(mean(x^2) + eps) and its relatives.

The normaliser is a constant for relevance, but a square is not: so a square of an activation may only
become a normaliser, and a normaliser may only scale an activation. Untracked tensors on that way carry a
role, and every other use of them is an error. What a model detaches is such a tensor too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from torch import Tensor

from holdfast.attribution.trace import Trace, tensors_in, tracked

Role = Literal["square", "statistic", "normaliser"]

_SHAPE = {
    "to",
    "float",
    "double",
    "type",
    "type_as",
    "unsqueeze",
    "squeeze",
    "expand",
    "expand_as",
    "view",
    "reshape",
    "contiguous",
    "clone",
    "detach",
    "__getitem__",
    "transpose",
    "permute",
}
_SCALE = {"mul", "div", "clamp", "clip", "clamp_min", "maximum", "max"}
_SHIFT = {"add", "add_"}
_ROOT = {"sqrt", "rsqrt", "reciprocal", "__rdiv__"}
_APPLY = {"mul", "div"}


def role_of(value: object) -> Role | None:
    """The role of an untracked tensor, if it has one."""
    return getattr(value, "_holdfast_role", None)


def given(value: Tensor, role: Role) -> Tensor:
    """A constant with that role."""
    value = value.detach()
    value._holdfast_role = role  # type: ignore[attr-defined]
    return value


def starts(name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Role | None:
    """The role that an operation on a tracked tensor gives its result, if it starts a normaliser."""
    if name in ("square",) or (name == "pow" and _exponent(args, kwargs) == 2):
        return "square"
    if name in ("var", "detach"):  # what a model detaches may normalise, or choose (an expert)
        return "statistic"
    if name in ("rsqrt", "std", "norm", "vector_norm", "linalg_vector_norm"):
        return "normaliser"
    return None


def apply(trace: Trace, name: str, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """An operation among whose tensors is one with a role."""
    tensors = list(tensors_in(*args, *kwargs.values()))
    roles = {role_of(t) for t in tensors} - {None}
    if any(map(tracked, tensors)):
        if roles == {"normaliser"} and name in _APPLY and not (name == "div" and tracked(args[1])):
            return func(*args, **kwargs)
        if name in ("view_as", "expand_as", "type_as", "reshape_as"):
            return func(*args, **kwargs)
        raise trace.unruled(name, f"for an activation and a {'/'.join(sorted(map(str, roles)))} of one")
    role = next(iter(roles)) if len(roles) == 1 else None
    output = func(*args, **kwargs)
    if not any(t.is_floating_point() for t in tensors_in(output)):
        return output
    if not isinstance(output, Tensor):  # topk: its indices choose, its values remain what they are
        for t in tensors_in(output):
            t._holdfast_role = role if t.is_floating_point() else None  # type: ignore[attr-defined]
        return output
    after = None if role is None else _after(role, name, args, kwargs)
    if after is None:
        raise trace.unruled(
            name,
            f"for the {'/'.join(sorted(map(str, roles)))} of an activation: it may only become a normaliser",
        )
    return given(output, after)


def _after(role: Role, name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Role | None:
    if name in _SHAPE or (name in _SCALE and not (name == "div" and role_of(args[1]))):
        return role
    if role == "square":
        return "statistic" if name in ("mean", "sum") else None
    if name in _SHIFT:
        return role
    root = name in _ROOT or (name == "pow" and _exponent(args, kwargs) in (-0.5, 0.5, -1))
    return "normaliser" if root else None


def _exponent(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    value = args[1] if len(args) > 1 else kwargs.get("exponent")
    return value.item() if isinstance(value, Tensor) and value.numel() == 1 else value
