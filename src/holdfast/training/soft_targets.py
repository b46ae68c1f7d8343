"""Soft targets: replayed rows are answered as the model before the task would, not by their text alone."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from holdfast.models import unwrapped
from holdfast.tasks.memory import Rehearsal
from holdfast.tasks.task import Example
from holdfast.training.losses import divergence
from holdfast.training.teacher import Teacher


class SoftTargets:
    """KL(before the task || now) in place of cross-entropy at the answer tokens of replayed rows.

    A text says one token at each place; the model that wrote it knew how likely the others were (Hinton et
    al. 2015; on replayed rows as in DER, Buzzega et al. 2020, which stores the logits: here the model before
    the task gives them again, which takes one copy of the trained weights, and no file).

    Parameters
    ----------
    model : nn.Module
        As it is before the task.
    replayed : collection of int
        Numbers of the replayed rows among those trained on; negative ones are replayed in any case.
    """

    def __init__(self, model: nn.Module, replayed: Collection[int]) -> None:
        self.teacher, self.replayed = Teacher(model), frozenset(replayed)

    @classmethod
    def of(cls, rehearsal: Rehearsal | None, model: nn.Module, rows: Sequence[Example]) -> SoftTargets | None:
        """What a rehearsal asks for; None where it doesn't, or has nothing yet."""
        if rehearsal is None or rehearsal.targets == "text" or not len(rehearsal.memory):
            return None
        return cls(model, rehearsal.replayed(rows))

    def put_into(
        self,
        losses_N: Tensor,
        model: nn.Module,
        inputs: Mapping[str, Any],
        logits_NV: Tensor,
        place_SL: Tensor,
        rows_S: Tensor,
    ) -> Tensor:
        """The tokens' losses, (N,), with those of replayed rows exchanged.

        Parameters
        ----------
        inputs : mapping of str to Tensor
            What the model was called with.
        logits_NV : Tensor
            What it put out at the N answer tokens.
        place_SL : Tensor
            Bool: where they stand among the last L positions of the output.
        rows_S : Tensor
            The rows' numbers.
        """
        old = [number < 0 or number in self.replayed for number in rows_S.tolist()]
        if not any(old):
            return losses_N
        old_S = torch.tensor(old, device=place_SL.device)
        at_N = old_S[:, None].expand_as(place_SL)[place_SL]
        part = {name: value[old_S] for name, value in inputs.items() if isinstance(value, Tensor)}
        teacher_OLV = self.teacher.logits(unwrapped(model), part, place_SL.shape[1])
        kl_M = divergence(teacher_OLV[place_SL[old_S]], logits_NV[at_N])
        return losses_N.masked_scatter(at_N, kl_M.to(losses_N.dtype))
