"""Anchor: a decoupled elastic pull back to the weights at the end of the last task."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cached_property, partial
from typing import Annotated, Any, Literal, cast

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.optim import Optimizer

from holdfast import world
from holdfast.config import Options, validate
from holdfast.errors import ConfigError
from holdfast.hold.attach import (
    Chunk,
    Handle,
    held_summary,
    hook,
    logarithmic_summary,
    makes_own_rate,
    reference_weights,
    together,
    turned_by,
    unwrap,
)
from holdfast.hold.drift import Meter
from holdfast.hold.inputs import Coordinates, Inputs
from holdfast.hold.kept import Kept
from holdfast.hold.operator import Operator, Rate
from holdfast.hold.reference import watch_reference
from holdfast.hold.region import Region
from holdfast.hold.schedule import TOTAL, total_rate_of
from holdfast.hold.spectrum import Spectrum
from holdfast.hold.strength import mean_of, warn_if_pull_is_faint
from holdfast.hold.unheld import Unheld
from holdfast.importance.prior import ImportancePrior, Kind
from holdfast.names import is_lora

_STRENGTH = 600.0  # of priors by weight
_PULL = 5.0  # of priors by input
LORA_PULL = 24.0  # ... that hold a LoRA: of 5, 12 and 24 it keeps most (docs/results.md)
_BOUND = 1.0  # percent, of `strength: auto`


class AnchorOptions(Options):
    """Pull each weight back after every step, the harder the more important it is."""

    name: Literal["anchor"] = "anchor"
    strength: Annotated[float, Field(ge=0)] | Literal["auto"] | None = Field(
        None,
        description="λ: a weight of mean importance is pulled by η·λ a step (default 600 by weight); auto: "
        "as much as keeps old outputs within `bound`, importance `inputs` only",
    )
    bound: float | None = Field(
        None,
        gt=0,
        description="strength `auto` only: by how many percent of their own size old outputs may move in a "
        "task (default 1)",
    )
    pull: float | None = Field(
        None,
        ge=0,
        description="Λ = λ Σ η, the whole pull over a task, in place of `strength` (default by inputs: 5, "
        "and of a LoRA 24)",
    )
    every: int = Field(1, ge=1, description="pull at every n-th step, by the rates of the n steps together")
    coordinates: Literal["inputs", "weights"] | None = Field(
        None, description="in which the optimizer steps; importance `inputs` only (default: inputs)"
    )

    @model_validator(mode="before")
    @classmethod
    def _of_earlier_versions(cls, values: Any) -> Any:
        if not (isinstance(values, Mapping) and "rank" in values):
            return values
        rest = dict(values)
        if (rank := rest.pop("rank")) is not None:
            raise ValueError(
                f"`rank` is an option of the importance now, which keeps no more directions than are held: "
                f"strategy.importance.rank={rank}"
            )
        return rest  # what every folder of an earlier version has

    @model_validator(mode="after")
    def _one_unit(self) -> AnchorOptions:
        if self.strength is not None and self.pull is not None:
            raise ValueError(
                "give `strength` (λ, a step) or `pull` (Λ, a whole task), not both; mechanism=anchor before "
                "mechanism.pull=... drops what a configuration has"
            )
        if self.bound is not None and self.strength != "auto":
            raise ValueError("`bound` applies to `strength: auto` only")
        if 0 in (self.strength, self.pull):
            self.refuse_ignored(("every",), "where nothing is pulled (a `strength` or `pull` of 0)")
        return self

    def resolved(self, kind: Kind, lora: bool | None = None) -> AnchorOptions:
        """With the defaults for a kind of prior in place.

        Parameters
        ----------
        kind : {"weights", "inputs"}
        lora : bool, optional
            Whether a LoRA is held; where that isn't known yet, the pull by inputs is left open.

        Raises
        ------
        ConfigError
            `coordinates: inputs` or `strength: auto` for a prior by weight.
        """
        if kind == "weights" and self.strength == "auto":
            raise ConfigError(
                "anchor: strength 'auto' goes by how far old outputs moved, which a prior by weight can't "
                "tell. Use importance: inputs, or give a number."
            )
        if kind == "weights" and self.coordinates == "inputs":
            raise ConfigError(
                "anchor: coordinates 'inputs' need a prior of the kind 'inputs' (importance: inputs); a "
                "prior by weight is diagonal in the weights themselves. Leave it out."
            )
        changed: dict[str, Any] = {}
        if self.strength is None and self.pull is None:
            if kind == "weights":
                changed["strength"] = _STRENGTH
            elif lora is not None:
                changed["pull"] = LORA_PULL if lora else _PULL
        if self.strength == "auto" and self.bound is None:
            changed["bound"] = _BOUND
        if self.coordinates is None:
            changed["coordinates"] = kind
        return self.model_copy(update=changed)


class Anchor:
    """After each optimizer step: θ ← θ* + (1 − min(1, η·λ·H)) (θ − θ*).

    It is to EWC's penalty what AdamW is to L2 regularisation: the pull doesn't pass through Adam's
    normalisation, so its strength means the same for every weight.

    Parameters
    ----------
    prior : ImportancePrior
        H. By weight: negative values count as 0, then the mean over all weights is scaled to 1. Of the kind
        ``inputs``: each map's matrix C, scaled to mean eigenvalue 1, acting on the input side of its change.
    strength : float or "auto", optional
        λ. η is the learning rate of the weight's parameter group, read at each step. ``auto`` (of the kind
        ``inputs``): no rate; after each step the changes go to the nearest that move old outputs by no more
        than `bound`, see `holdfast.hold.region.Region`. It knows no number of steps.
    pull : float, optional
        Λ = λ Σ_t η_t, the whole pull over the task: a direction of mean importance ends at about 1/Λ of the
        way that it would go. Σ η must have been told (`holdfast.hold.tell_total_rate`) by the first step.
        Give one of both; by default λ = 600 by weight, Λ = 5 by inputs, and 24 where these are a LoRA's.
    bound : float, optional
        Of ``auto``: percent of their own size, in root mean square over all maps, default 1.
    every : int
        Pull at each n-th step, by the sum of the n steps' η.
    coordinates : {"inputs", "weights"}, optional
        Of the kind ``inputs`` only. ``inputs`` (default): the optimizer itself steps in the basis of C, see
        `holdfast.hold.inputs.Coordinates`. ``weights``: it steps as without a hold.
    reference : mapping of str to Tensor, optional
        θ*, by canonical name; copies of the weights at `attach` when omitted.

    Notes
    -----
    By weight: where η·λ·I ≥ 1 the weight equals θ* bit for bit after every step. Memory, in the parameters'
    dtype: I and θ* (2 values per protected weight), and temporarily η·λ·I for at most 64 M weights at a time.
    A weight that a batch did not use is pulled all the same, though without a gradient (None) its optimizer
    passes it over: whether that or zeros come of it is a matter of implementation, and Λ counts every step.
    In 16-bit dtypes a pull below the weight's own rounding is lost, like any small update there. By inputs:
    see `Inputs`; memory θ*, U (I² float32 a map; 2 I K where the prior has K directions of it), and with
    coordinates ``inputs`` θ* U and Z. The state of `every` is in the optimizer's parameter groups, so that it
    goes into checkpoints.

    With coordinates ``inputs`` the optimizer's moments of these weights are in the basis of C, and squares
    have no way there or back. So an optimizer that has stepped them without this hold begins with them anew;
    and when the handle is removed they go, and one that is used on, without a hold or under another prior,
    begins with these weights anew again. Moments that were loaded with a checkpoint of such a hold stay.
    """

    def __init__(
        self,
        prior: ImportancePrior,
        *,
        strength: float | Literal["auto"] | None = None,
        pull: float | None = None,
        bound: float | None = None,
        every: int = 1,
        coordinates: Literal["inputs", "weights"] | None = None,
        reference: Mapping[str, Tensor] | None = None,
    ) -> None:
        self.prior = prior
        values: dict[str, Any] = {"strength": strength, "pull": pull, "bound": bound, "every": every}
        values |= {"coordinates": coordinates}
        self.options = validate(AnchorOptions, values, "Anchor").resolved(
            prior.kind, lora=any(is_lora(name) for name in prior.tensors)
        )
        self.reference = reference
        self.learning_rate: float | None = None  # the largest seen, for the summary
        self._rate: float | None = None  # what λ or Λ is multiplied by, at its largest
        self.pulled: float | None = None  # Σ of the pulls that `auto` chose
        self._handle: Handle | None = None

    @cached_property
    def spectrum(self) -> Spectrum:
        """The prior, scaled to mean 1; matrices are scaled on the way, without a copy of all of them."""
        prior = self.prior if self.prior.kind == "inputs" else self.prior.mean_normalised()
        return Spectrum.of(prior)

    @property
    def _scale(self) -> float:
        options = self.options
        if options.strength == "auto":
            return 1.0
        return cast(float, options.strength if options.pull is None else options.pull)

    def attach(self, model: nn.Module, optimizer: Optimizer) -> Handle:
        """Pull after every step of this optimizer until the handle is removed.

        Raises
        ------
        PriorMismatchError
            The prior or the reference doesn't fit the model, or the optimizer holds none of the weights.
        ConfigError
            The optimizer makes its own learning rate, or swaps weights behind the hold's back; or `pull` is
            given, and its scheduler follows a metric; or it steps a weight in other coordinates already.
        """
        told = [group.get(TOTAL, 0.0) for group in unwrap(optimizer).param_groups]
        if self.options.pull is not None and None in told:
            raise self._unknown_total()
        if makes_own_rate(made := unwrap(optimizer)):
            raise ConfigError(
                f"anchor: {type(made).__name__} makes a learning rate of its own at each step (lr=None or "
                "relative_step), and the pull is as strong as the rate. Give it lr=... and "
                "relative_step=False, or use the mechanism 'gate'."
            )
        inner, chunks = self.spectrum.bind(model, optimizer, begun=self.reference is not None)
        operators: list[Operator] = []
        references: list[list[Tensor]] = []
        rotated: list[Coordinates] = []
        turned: set[int] = set()
        rotate = self.options.coordinates == "inputs" and self.prior.kind == "inputs"

        def take(more: list[Chunk]) -> None:
            if rotate:
                _require_one_basis(more, inner)
                turned.update(id(weight) for chunk in more for weight in chunk.owners)
            for chunk in more:
                scaled = {name: self.spectrum.values[name] * self._scale for name in chunk.names}
                operator = self.spectrum.operator(chunk, model, scaled)
                reference = reference_weights(chunk, self.reference, "anchor")
                if rotate:
                    # a part of a weight has no place of its own in a checkpoint, which is of whole ones
                    rotated.append(
                        Coordinates(
                            chunk.parameters, reference, cast(Inputs, operator), carried=chunk.is_whole
                        )
                    )
                operators.append(operator)
                references.append(reference)

        take(chunks)
        if isinstance(self.options.strength, float):
            mean = mean_of(self.spectrum.values[name] for chunk in chunks for name in chunk.names)
            warn_if_pull_is_faint("anchor", self.options.strength, mean, inner, chunks)
        watch = Unheld("anchor", self.prior, model, inner, chunks, take)
        for group in inner.param_groups:  # a scheduler with warm-up has set lr to 0 by now
            self._saw(group, group.get("initial_lr", group["lr"]))
        meter = self.spectrum.meter(chunks, operators, references)
        kept = Kept("anchor", inner, self.prior.tensors)

        def pull() -> None:
            rates = self._rates(kept)
            for chunk, operator, reference in zip(chunks, operators, references, strict=True):
                rate = rates[chunk.group]
                if rate is not None:
                    operator.blend_(chunk.moving(), reference, rate)

        with together() as parts:
            parts.append(Handle([kept.end]))
            if rotate:
                handle = self._in_coordinates(kept, chunks, rotated, turned, operators, meter, watch)
            elif self.options.strength == "auto":
                handle = self._in_region(kept, chunks, operators, references, meter, watch)
            else:
                before = partial(self._require_totals, inner)
                handle = hook(inner, before, pull, first=watch.attach, chunks=chunks)
        handle.meter = meter
        handle.removers += [kept.end, watch_reference(kept, chunks, references)]
        self._handle = handle
        return self._handle

    def _in_region(
        self,
        kept: Kept,
        chunks: list[Chunk],
        operators: list[Operator],
        references: list[list[Tensor]],
        meter: Meter | None,
        watch: Unheld,
    ) -> Handle:
        """``auto``, with the optimizer on the weights."""
        choose = self._chooser(kept, operators, meter)

        def back() -> None:
            if self._due(kept):
                rows = [
                    (c.parameters, ref, cast(Inputs, o))
                    for c, ref, o in zip(chunks, references, operators, strict=True)
                ]
                passed = choose([operator.squares(new, ref) for new, ref, operator in rows])
                for chunk, (_, ref, operator), factors in zip(chunks, rows, passed, strict=True):
                    operator.scale_(chunk.moving(), ref, factors)

        return hook(kept.optimizer, after=back, first=watch.attach, chunks=chunks)

    def _chooser(
        self, kept: Kept, operators: list[Operator], meter: Meter | None
    ) -> Callable[[list[list[Tensor]]], list[list[Tensor]]]:
        """Of ``auto``: from |(ΔU)_j|² of each chunk's maps to what is left of each direction."""
        assert meter is not None
        assert self.options.bound is not None
        bound, regions = self.options.bound / 100, dict[int, Region]()

        def of_all(sums: list[Tensor]) -> list[Tensor]:
            """Of sharded weights each process has some rows of a map, and these are sums over rows."""
            if not meter.sharded:
                return sums
            joined = torch.cat([s.reshape(-1).to(sums[0].device) for s in sums])
            world.add_up([joined])
            parts = joined.split([s.numel() for s in sums])
            return [part.reshape(s.shape) for part, s in zip(parts, sums, strict=True)]

        def choose(squares: list[list[Tensor]]) -> list[list[Tensor]]:
            if len(operators) not in regions:  # weights have joined
                shares = [h for operator in operators for h in cast(Inputs, operator).shares]
                regions[len(operators)] = Region(shares, of_all([m.whole() for m in meter.maps()]), bound)
            passed, pull = regions[len(operators)].passed(of_all([s for chunk in squares for s in chunk]))
            self.pulled = kept.get("pulled", 0.0) + float(pull)
            kept.set("pulled", self.pulled)
            rest = iter(passed)
            return [[next(rest) for _ in chunk] for chunk in squares]

        return choose

    def _in_coordinates(
        self,
        kept: Kept,
        chunks: list[Chunk],
        rotated: list[Coordinates],
        turned: set[int],
        operators: list[Operator],
        meter: Meter | None,
        watch: Unheld,
    ) -> Handle:
        inner = kept.optimizer
        choose = self._chooser(kept, operators, meter) if self.options.strength == "auto" else None

        def factors() -> list[list[Tensor] | None]:
            if choose is not None:
                if not self._due(kept):
                    return [None] * len(rotated)
                return list(choose([coordinates.squares() for coordinates in rotated]))
            by_group = self._rates(kept)
            rates = [by_group[chunk.group] for chunk in chunks]
            pairs = zip(rotated, rates, strict=True)
            return [None if rate is None else c.operator.passed(rate) for c, rate in pairs]

        def save(_: Optimizer, state: dict[str, Any]) -> None:
            pairs = zip(chunks, rotated, strict=True)
            # None where it would be made of the weights: moments are in these coordinates all the same
            rows = [row for chunk, c in pairs for row in zip(chunk.names, c.state(), strict=True)]
            kept.put_into(state, "changes", dict(rows))

        begun = 0  # of how many chunks the moments are in these coordinates

        def load() -> None:
            nonlocal begun
            saved: dict[str, Tensor | None] | None = kept.take("changes")
            if saved is not None:
                for chunk, coordinates in zip(chunks, rotated, strict=True):
                    coordinates.load_state([saved.get(name) for name in chunk.names])
            for chunk in chunks[begun:]:
                for name, weight in zip(chunk.names, chunk.owners, strict=True):
                    if saved is None or name not in saved:  # what is known of it is in its own coordinates
                        inner.state.pop(weight, None)
            begun = len(chunks)

        stepped: list[tuple[Tensor, Any]] = []  # each weight, and its state in the optimizer

        def forget() -> None:
            for weight, state in stepped:
                if inner.state.get(weight) is state:  # nobody has loaded another
                    inner.state.pop(weight, None)

        def enter() -> None:
            self._require_totals(inner)  # while the weights are themselves
            load()
            for chunk, coordinates in zip(chunks, rotated, strict=True):
                coordinates.enter([part is not None for part in chunk.moving()])

        def leave() -> None:
            for coordinates in rotated:
                coordinates.stepped()
            for coordinates, passed in zip(rotated, factors(), strict=True):
                coordinates.leave(passed)
            stepped[:] = [(p, inner.state[p]) for c in chunks for p in c.owners if p in inner.state]

        def undo() -> None:
            for coordinates in rotated:
                coordinates.undo()

        handle = hook(
            inner,
            enter,
            leave,
            needs_gradients="anchor with coordinates 'inputs'",
            instead="give coordinates='weights'",
            first=watch.attach,
            turned=turned,
            undo=undo,
            chunks=chunks,
        )
        handle.removers += [inner.register_state_dict_post_hook(save).remove, forget]
        return handle

    def _due(self, kept: Kept) -> bool:
        """Count this step; whether it is an n-th one."""
        if self.options.every == 1:
            return True
        steps = kept.get("waited", 0) + 1
        due = bool(steps >= self.options.every)  # a state may have waited longer
        kept.set("waited", 0 if due else steps)
        return due

    def _rates(self, kept: Kept) -> list[Rate | None]:
        """What H, scaled, is multiplied by in this step, for each parameter group; None: no pull."""
        inner, due = kept.optimizer, self._due(kept)
        found: list[Rate | None] = []
        for index, group in enumerate(inner.param_groups):
            rate = group["lr"]
            self._saw(group, rate)
            if self.options.pull is not None:
                total = total_rate_of(group, inner)
                rate = rate / total if total else 0.0
            if self.options.every > 1:
                rate = kept.get("rates", 0.0, index) + float(rate)
                kept.set("rates", 0.0 if due else rate, index)
            found.append(rate if due else None)
        return found

    def _require_totals(self, inner: Optimizer) -> None:
        if self.options.pull is not None and None in [total_rate_of(g, inner) for g in inner.param_groups]:
            raise self._unknown_total()

    def _unknown_total(self) -> ConfigError:
        return ConfigError(
            f"anchor: pull={self.options.pull:g} is the whole pull over a task, but the sum of its learning "
            "rates is not known. Call holdfast.hold.tell_total_rate(optimizer, scheduler, steps) before the "
            "first step. Where the scheduler follows a metric (reduce_lr_on_plateau, greedy) nobody knows "
            "it: give `strength` (the pull of a step at rate 1)."
        )

    def _saw(self, group: Mapping[str, Any], rate: float | Tensor) -> None:
        if isinstance(rate, Tensor):  # a tensor lr may live on a GPU: reading it would stall each step
            if self.learning_rate is not None:
                return
            rate = float(rate)
        self.learning_rate = max(self.learning_rate or 0.0, rate)
        if self.options.pull is None:
            self._rate = self.learning_rate
        elif group.get(TOTAL):
            self._rate = max(self._rate or 0.0, rate / group[TOTAL])

    def summary(self) -> dict[str, Any]:
        """Distribution of the pull min(1, η·λ·H) at the largest learning rate so far.

        Of strength ``auto`` of Σ µ · H, the pull that it chose over the task (``pull``: Σ µ). Before `attach`
        η is unknown: then of λ·H, the pull for each unit of learning rate (with `pull`, of
        Λ·H, that of the whole task). Of the kind ``inputs`` the distribution is over directions, and what is
        trained but has no directions is listed as ``not_held``.
        """
        tensors = self.spectrum.values
        extra: dict[str, Any] = {}
        if self.prior.kind == "inputs" and self._handle is not None:
            extra["not_held"] = self._handle.not_held
        if self.options.strength == "auto":
            chosen = self.pulled or 0.0
            result = logarithmic_summary(
                lambda: (tensor * chosen for tensor in tensors.values()), "pull over the task"
            )
            return {**result, "held": None, "pull": self.pulled, **extra}
        if self._rate is None:
            scale = self._scale
            whole = "pull over the task" if self.options.pull is not None else "pull per step / learning rate"
            result = logarithmic_summary(lambda: (tensor * scale for tensor in tensors.values()), whole)
            return {**result, "held": None, **extra}
        factor = self._scale * self._rate
        result = held_summary(
            lambda: ((tensor * factor).clamp_(max=1.0) for tensor in tensors.values()), "pull per step"
        )
        return {**result, "learning_rate": self.learning_rate, **extra}


def _require_one_basis(chunks: list[Chunk], optimizer: Optimizer) -> None:
    """See that no other hold turns these weights in the same step."""
    taken = turned_by(optimizer)
    both = [n for c in chunks for n, weight in zip(c.names, c.owners, strict=True) if id(weight) in taken]
    if both:
        raise ConfigError(
            f"anchor: this optimizer steps '{both[0]}' in the coordinates of another prior of the kind "
            "'inputs' already, and a weight has one basis at a time. Join the priors: "
            "first.mean_normalised().merge(second.mean_normalised()); or give coordinates='weights'; or, if "
            "the other hold is over, remove its handle first."
        )
