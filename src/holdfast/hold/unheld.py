"""What is trained and not held: said when a mechanism is attached, and again when more joins later."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.weak import WeakIdKeyDictionary

from holdfast import world
from holdfast.errors import PriorMismatchError
from holdfast.hold.attach import Bound, Chunk, Handle, chunks_of, groups_of
from holdfast.importance.prior import FREE, ImportancePrior, parameters_by_name, some

_HELD: WeakIdKeyDictionary = WeakIdKeyDictionary()  # parameter to how many attached mechanisms hold it


class Unheld:
    """Looks, before each step of an optimizer, at what it and others train.

    A weight that the prior rates and that the optimizer begins to train (by ``add_param_group``, or because
    it is unfrozen) is handed to the mechanism. Of all else that is trained and not held one warning tells how
    many tensors, their share of the trained weights, and their names; of what joins later, another one.
    Weights that the prior leaves free on purpose (``meta["free"]``) are nothing to tell of.

    Parameters
    ----------
    whose : str
        Name of the mechanism.
    chunks : list of Chunk
        What the mechanism holds; those that join are appended.
    take : callable
        Makes the mechanism hold further chunks, before a step of theirs.
    """

    def __init__(
        self,
        whose: str,
        prior: ImportancePrior,
        model: nn.Module,
        optimizer: Optimizer,
        chunks: list[Chunk],
        take: Callable[[list[Chunk]], None],
    ) -> None:
        self.whose, self.prior, self.model, self.optimizer = whose, prior, model, optimizer
        self.chunks, self.take = chunks, take
        self.names: list[str] = []  # of what is trained and not held, as far as it was told
        self._parameters = parameters_by_name(model)
        self._free = set(prior.meta.get(FREE, ()))
        self._held = {id(p) for chunk in chunks for p in chunk.owners}
        self._counted: list[Tensor] = []
        self._strangers: set[int] = set()  # in the optimizer, and nothing of the model as it was
        self._versions = {n: p._version for n, p in self._parameters.items() if not p.is_inference()}
        self._stepped = False

    def attach(self) -> Handle:
        """Warn of what is not held now, and look again before each step until the handle is removed."""
        self._tell(self._missed(), "")
        bound = [name for chunk in self.chunks for name in chunk.names]
        self._tell_zeros(bound)
        self._tell_divided(bound)
        self._count(self.chunks)  # last, as it is others whom this tells
        # before the hooks of the mechanism, which copy the weights that they hold
        remove = self.optimizer.register_step_pre_hook(lambda *_: self._look()).remove
        return Handle([remove, self._release], not_held=self.names)

    def _look(self) -> None:
        self._stepped = True
        group_of = groups_of(self.optimizer)
        strangers = group_of.keys() - {id(p) for p in self._parameters.values()}
        if strangers != self._strangers:
            self._strangers, self._parameters = strangers, parameters_by_name(self.model)
        late = [
            (name, p)
            for name, p in self._parameters.items()
            if id(p) not in self._held and p.requires_grad and id(p) in group_of
        ]
        rated = [(n, p) for n, p in late if self._rates(n, p)]
        if rated:
            chunks = chunks_of([Bound(n, p, group_of[id(p)]) for n, p in rated], self.optimizer)
            with torch.no_grad():
                self.take(chunks)
            self.chunks.extend(chunks)
            self._count(chunks)
        told = {*self.names, *self._free, *(n for n, _ in rated)}
        self._tell([n for n, _ in late if n not in told], "from this step on, ")
        self._tell(self._elsewhere(group_of), "by another optimizer, ")

    def _rates(self, name: str, parameter: nn.Parameter) -> bool:
        if name not in self.prior.tensors:
            return False
        got = self.prior.tensors[name].shape
        if self.prior.kind == "weights" and got != world.shape(parameter):
            raise PriorMismatchError(
                f"{self.whose}: '{name}' has joined the optimizer with shape "
                f"{tuple(world.shape(parameter))}, and the prior has {tuple(got)} for it. Use a prior of the "
                "model as it is trained."
            )
        return True

    def _missed(self) -> list[str]:
        group = groups_of(self.optimizer)
        return [
            n
            for n, p in self._parameters.items()
            if id(p) in group and p.requires_grad and id(p) not in self._held and n not in self._free
        ]

    def _elsewhere(self, mine: Mapping[int, int]) -> list[str]:
        """What has changed since it was attached though this optimizer doesn't train it."""
        found = []
        for name, p in self._parameters.items():
            if not p.requires_grad or id(p) in mine or name in self._free or name in self.names:
                continue
            if p._version != self._versions.get(name, p._version) and not _HELD.get(p, 0):
                found.append(name)
        return found

    def _tell(self, names: Sequence[str], when: str) -> None:
        if not names:
            return
        self.names.extend(names)
        sizes = {n: world.shape(p).numel() for n, p in self._parameters.items() if p.requires_grad}
        share = sum(sizes[n] for n in names) / max(sum(sizes.values()), 1)
        fix = (
            "Attach to that optimizer too."
            if when.startswith("by another")
            else "They change freely. Rate them (an importance by gradients, such as 'fisher', takes every "
            "trained weight), or don't train them."
        )
        warnings.warn(
            f"{self.whose}: {when}{len(names)} trained {'tensor is' if len(names) == 1 else 'tensors are'} "
            f"not held, {100 * share:.3g} % of the trained weights: {some(names)}. {fix}",
            stacklevel=2,
        )

    def _tell_zeros(self, bound: Sequence[str]) -> None:
        names = [name for name in bound if not self.prior.tensors[name].any()]
        self.names.extend(names)
        if 0 < len(names) < len(bound):  # of a prior that rates nothing the mechanism tells
            warnings.warn(
                f"{self.whose}: {len(names)} trained {'tensor was' if len(names) == 1 else 'tensors were'} "
                f"rated zero, and {'is' if len(names) == 1 else 'are'} not held: {some(names)}. No rated row "
                "uses them as far as this importance sees (experts that none is routed to, a router whose "
                "choice has no gradient). Freeze what must not change.",
                stacklevel=2,
            )

    def _tell_divided(self, names: Sequence[str]) -> None:
        """Of DoRA: a row of W + B A is divided by its norm, along inputs that no old row has, too."""
        ends = ".lora_magnitude_vector"
        divided = {n.partition(ends)[0] for n in self._parameters if ends in n}
        if self.prior.kind == "inputs" and (
            found := [n for n in names if n.partition(".lora_")[0] in divided]
        ):
            warnings.warn(
                f"{self.whose}: {len(found)} tensors are factors of DoRA, which divides a map by the norm of "
                "its weights: what a change of theirs does to old outputs through this norm is neither held "
                f"nor in the drift that is shown: {some(found)}. Use a LoRA without use_dora, or a prior by "
                "weight (importance='fisher').",
                stacklevel=2,
            )

    def _count(self, chunks: Sequence[Chunk]) -> None:
        for chunk in chunks:
            for p in chunk.owners:
                self._held.add(id(p))
                self._counted.append(p)
                _HELD[p] = _HELD.get(p, 0) + 1

    def _tell_bypassed(self) -> None:
        """Of what is held and was trained all the same, where the optimizer has made no step."""
        changed = [
            name
            for name, p in self._parameters.items()
            if id(p) in self._held and p._version != self._versions.get(name, p._version)
        ]
        if changed and not self._stepped:
            warnings.warn(
                f"{self.whose}: {len(changed)} held tensors have changed, and step() of the "
                f"{type(self.optimizer).__name__} that they are held in was never called, so nothing was "
                f"held: {some(changed)}. Attach to the optimizer whose step() trains them, after it is made.",
                stacklevel=2,
            )

    def _release(self) -> None:
        self._tell_bypassed()
        while self._counted:
            p = self._counted.pop()
            _HELD[p] = _HELD.get(p, 1) - 1
        for chunk in self.chunks:
            while chunk.removers:
                chunk.removers.pop()()


def apart(
    prior: ImportancePrior, beside: ImportancePrior, model: nn.Module
) -> tuple[ImportancePrior, ImportancePrior]:
    """Two priors that hold one training together: neither warns of what the other holds.

    Parameters
    ----------
    beside : ImportancePrior
        Rates what `prior` doesn't; the names of both are those of `model`.
    """
    held = [name for name in parameters_by_name(model) if prior.covers(name)]
    free = [*prior.meta.get(FREE, ()), *beside.tensors]
    return (
        ImportancePrior(prior.tensors, {**prior.meta, FREE: free}),
        ImportancePrior(beside.tensors, {**beside.meta, FREE: held}),
    )
