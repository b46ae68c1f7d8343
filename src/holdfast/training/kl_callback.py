"""KLCallback: how far a model moves from what it was, in anyone's own transformers or TRL training script."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from holdfast import world
from holdfast.errors import ConfigError
from holdfast.evaluation.general import (
    Answers,
    ask_base,
    ask_own,
    divergence,
    encode_own,
    load_own,
    save_own,
)
from holdfast.models import evaluating, is_encoder_decoder, unwrapped
from holdfast.storage import write_tensors
from holdfast.tasks.encode import IGNORED, Encoded
from holdfast.tasks.task import Example
from holdfast.training.checkpoints import ours, own_checkpoint, saved_checkpoint

KEPT = "kl"  # a folder in a checkpoint: the rows, and what the model said of them before it was trained
NEW = "new.safetensors"


class KLCallback(TrainerCallback):
    """Measure what training does to everything else: KL(before || now), in nats a token.

    Before its first step the model writes rows, and is asked these and some that it is to learn; no second
    model stays in memory. It is asked again after each epoch and each evaluation. Beside a `ProtectCallback`,
    or alone.

    Parameters
    ----------
    rows : int
        How many it writes, and how many of the trainer's are looked at.
    seed : int
        Of the writing. Nothing else is drawn, so a training goes the same way with this callback.

    Attributes
    ----------
    history : list of dict
        Of each measurement ``step``, ``kl_base`` (its own rows) and ``kl_new`` (the first rows of the
        training data; absent where these are no ``input_ids`` that can be looked at again). Both stand in the
        next line of the trainer's ``log_history`` too, the last beside the figures of the whole training.

    Notes
    -----
    The forward KL on the new task's rows is what predicts forgetting in RL's Razor (Shenfeld et al. 2025).
    Where what is trained has gaps, such as several turns of a chat, all from its first token on counts as
    answer. A training that resumes takes from its checkpoint what the model said before the first step.
    TensorBoard's and W&B's callbacks run before those in ``callbacks=[...]``: see `ProtectCallback`.

    Raises
    ------
    ConfigError
        `rows` is not positive; the trainer has no tokenizer (``processing_class``); a process has only a part
        of the model (FSDP2, ZeRO-3).

    Examples
    --------
    >>> Trainer(model, args, train_dataset=rows, processing_class=tokenizer, callbacks=[KLCallback()])
    """

    def __init__(self, rows: int = 64, seed: int = 0) -> None:
        if rows < 1:
            raise ConfigError(f"KLCallback: rows={rows}; at least one must be asked.")
        self.rows, self.seed = rows, seed
        self.history: list[dict[str, float]] = []
        self._written: list[Example] = []
        self._own: tuple[list[Encoded], Answers] | None = None
        self._new: tuple[list[Encoded], Answers] | None = None
        self._pending: dict[str, float] = {}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Let the model write rows, and ask it these and those that it is to learn; or recall what it said.

        Raises
        ------
        ConfigError
            The trainer has no tokenizer, or the model is cut up.
        """
        model, tokenizer = kwargs["model"], _tokenizer(kwargs)
        if world.holds_parts(model.parameters()):
            raise ConfigError(
                "KLCallback: each process has only a part of the model (FSDP2, ZeRO-3), which can't be asked "
                "here. Train under DDP or in one process, or measure with holdfast.Learner "
                "(evaluation.general)."
            )
        data = getattr(kwargs.get("train_dataloader"), "dataset", None)
        new = first_rows(data, self.rows, is_encoder_decoder(unwrapped(model)))
        self.history, self._pending = [], {}
        kept = ours(own_checkpoint(args, state), KEPT) if state.global_step > 0 else None
        if kept is not None and self._recall(kept, unwrapped(model), tokenizer, new):
            return
        if kept is not None:
            warnings.warn(
                f"KLCallback: {kept} is missing, so KL is measured from the checkpoint's model.", stacklevel=2
            )
        with evaluating(model):
            self._ask(unwrapped(model), tokenizer, new)

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Measure."""
        self._measure(state, kwargs["model"], _tokenizer(kwargs))

    on_evaluate = on_epoch_end

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Put the latest figures into the line that is written."""
        if logs is None or not self._pending:
            return
        logs.update(self._pending)
        if state.log_history:
            state.log_history[-1].update(self._pending)
        self._pending = {}

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Keep with the checkpoint what the model said before."""
        folder = saved_checkpoint(args, state)
        if not args.should_save or not folder.is_dir():
            return
        kept = ours(folder, KEPT)
        if self._own is not None:
            save_own(kept, self._written, self._own[1])
        if self._new is not None:
            write_tensors(kept / NEW, vars(self._new[1]))

    def _ask(self, model: nn.Module, tokenizer: Any, new: list[Encoded]) -> None:
        found = ask_own(model, tokenizer, self.rows, self.seed)
        if found is None:
            warnings.warn("KLCallback: the model writes nothing, so it has no kl_base.", stacklevel=3)
        self._written, self._own = ([], None) if found is None else (found[0], found[1:])
        self._new = (new, ask_base(model, tokenizer, new)) if new else None

    def _recall(self, kept: Path, model: nn.Module, tokenizer: Any, new: list[Encoded]) -> bool:
        """Take what the model said before its first step; False where the checkpoint has nothing of it."""
        found, file = load_own(kept), kept / NEW
        if found is not None:
            self._written = found[0]
            self._own = encode_own(found[0], tokenizer, is_encoder_decoder(model)), found[1]
        if file.is_file():
            self._new = (new, Answers(**load_file(file))) if new else None
        return found is not None or file.is_file()

    def _measure(self, state: TrainerState, model: nn.Module, tokenizer: Any) -> None:
        if self.history and self.history[-1]["step"] == state.global_step:
            return
        figures = {}
        with evaluating(model):
            for key, asked in (("kl_base", self._own), ("kl_new", self._new)):
                if asked is not None:
                    figures[key] = divergence(unwrapped(model), tokenizer, *asked).kl
        self.history.append({"step": state.global_step, **figures})
        self._pending = figures


def first_rows(dataset: Any, count: int, encoder_decoder: bool) -> list[Encoded]:
    """The first rows of a trainer's data: prompt, and answer from the first token on that is trained.

    What is trained is told by ``labels``, or by TRL's ``completion_mask``; without either it is all. Rows of
    a stream, or without ``input_ids``, are none.
    """
    if not hasattr(dataset, "__len__"):
        return []
    try:
        rows = [_row(dataset[i], encoder_decoder) for i in range(min(count, len(dataset)))]
    except (TypeError, KeyError, ValueError, RuntimeError, AttributeError):
        return []
    return [row for row in rows if row.prompt_ids and row.completion_ids]


def _row(features: Any, encoder_decoder: bool) -> Encoded:
    ids = _numbers(features["input_ids"])
    if "attention_mask" in features:
        real = [bool(m) for m in _numbers(features["attention_mask"])]
    else:
        real = [True] * len(ids)
    kept = [token for token, there in zip(ids, real, strict=True) if there]
    if encoder_decoder:
        return Encoded(kept, [label for label in _numbers(features["labels"]) if label != IGNORED])
    if "labels" in features:
        trained = [label != IGNORED for label in _numbers(features["labels"])]
    elif "completion_mask" in features:
        trained = [bool(m) for m in _numbers(features["completion_mask"])]
    else:
        trained = [True] * len(ids)
    of_kept = [t for t, there in zip(trained, real, strict=True) if there]
    first = max(of_kept.index(True), 1) if True in of_kept else len(kept)  # the first of all has no prompt
    return Encoded(kept[:first], kept[first:])


def _numbers(values: Sequence[int] | torch.Tensor) -> list[int]:
    return [int(v) for v in torch.as_tensor(values).flatten().tolist()]


def _tokenizer(kwargs: Any) -> Any:
    tokenizer = kwargs.get("processing_class")
    tokenizer = getattr(tokenizer, "tokenizer", tokenizer)  # a processor's, which reads images too
    if tokenizer is None:
        raise ConfigError(
            "KLCallback: the trainer has no tokenizer; make it with processing_class=tokenizer."
        )
    return tokenizer
