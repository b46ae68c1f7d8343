"""The bridge to transformers' and TRL's training loops: the loss, and where a strategy may act."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer
from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments, Trainer, TrainerCallback, TrainingArguments

from holdfast.errors import ConfigError, TrainingDivergedError
from holdfast.models import accepts, is_encoder_decoder
from holdfast.progress import Interrupted, Progress, stop_requested
from holdfast.protect import Handle
from holdfast.storage import write_json, write_tensors
from holdfast.tasks.encode import Encoded, collate
from holdfast.training.checkpoints import latest_checkpoint, seal_checkpoint
from holdfast.training.options import TrainingOptions

Batch = Mapping[str, Any]


@dataclass
class Interventions:
    """What a strategy does while a task is trained; each is optional.

    Attributes
    ----------
    attach : callable
        ``(model, optimizer) -> handles``, called once when the optimizer exists.
    penalty : callable
        ``(model, batch, outputs) -> scalar tensor or None``, added to the loss of a micro-batch.
    observe : callable
        ``(model, step)``, called once per optimizer step with the accumulated, clipped gradient in place.
    """

    attach: Callable[[nn.Module, Optimizer], Sequence[Handle]] | None = None
    penalty: Callable[[nn.Module, Batch, Any], Tensor | None] | None = None
    observe: Callable[[nn.Module, int], None] | None = None


@dataclass
class TrainingRecord:
    """What one task's training did, as it is written to ``training.json``."""

    steps: int = 0
    seconds: float = 0.0
    loss: list[list[float]] = field(default_factory=list)
    learning_rate: list[list[float]] = field(default_factory=list)


def completion_loss(logits_BTV: Tensor, labels_BT: Tensor, count: Tensor | int | None = None) -> Tensor:
    """Next-token cross-entropy over completion tokens (A, eq. 3, averaged over tokens, as transformers does).

    Parameters
    ----------
    logits_BTV : Tensor
        Logits of the last T positions.
    labels_BT : Tensor
        Labels of the same positions, -100 where nothing is predicted.
    count : Tensor or int, optional
        Label tokens over all micro-batches of the step; the batch's own count when omitted.
    """
    logits, targets = logits_BTV[:, :-1], labels_BT[:, 1:]
    total = F.cross_entropy(
        logits.reshape(-1, logits.shape[-1]).float(), targets.reshape(-1), ignore_index=-100, reduction="sum"
    )
    return total / (count if count is not None else (targets != -100).sum().clamp(min=1))


class _Bridge:
    """Mixed in front of a Trainer class: our loss, the strategy's penalty, and a stop at a bad loss."""

    interventions: Interventions
    own_loss: bool = True
    bad_batch: Path

    def compute_loss(
        self, model: nn.Module, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        batch = dict(inputs)
        if self.own_loss:
            loss, outputs = self._completion_loss(model, batch, num_items_in_batch)
        else:
            # TRL makes the outputs in a second forward pass: only where somebody looks at them
            wanted = return_outputs or self.interventions.penalty is not None
            result = super().compute_loss(  # type: ignore[misc]
                model, inputs, return_outputs=wanted, num_items_in_batch=num_items_in_batch
            )
            loss, outputs = result if wanted else (result, None)
        if self.interventions.penalty is not None:
            penalty = self.interventions.penalty(model, batch, outputs)
            if penalty is not None:
                # one whole penalty an optimizer step, however many micro-batches it has
                whole = self.model_accepts_loss_kwargs and num_items_in_batch is not None  # type: ignore[attr-defined]
                share = self.current_gradient_accumulation_steps if whole else 1  # type: ignore[attr-defined]
                loss = loss + penalty / share
        if not torch.isfinite(loss):
            self._stop_diverged(float(loss.detach()), batch)
        return (loss, outputs) if return_outputs else loss

    def _completion_loss(self, model: nn.Module, batch: dict[str, Any], count: Any) -> tuple[Tensor, Any]:
        labels = batch["labels"]
        if is_encoder_decoder(model):
            outputs = model(**batch)
            logits = outputs.logits
            total = F.cross_entropy(
                logits.reshape(-1, logits.shape[-1]).float(), labels.reshape(-1), reduction="sum"
            )
            return total / (count if count is not None else (labels != -100).sum().clamp(min=1)), outputs
        # rows are padded on the left, so completions end the row: logits before them are never needed
        keep = int((labels != -100).any(0).float().argmax())
        keep = labels.shape[1] - max(keep - 1, 0)
        extra = {"logits_to_keep": keep} if accepts(model, "logits_to_keep") else {}
        outputs = model(**{k: v for k, v in batch.items() if k != "labels"}, use_cache=False, **extra)
        return completion_loss(outputs.logits[:, -keep:], labels[:, -keep:], count), outputs

    def _stop_diverged(self, loss: float, batch: dict[str, Any]) -> None:
        step = self.state.global_step + 1  # type: ignore[attr-defined]
        tensors = {k: v.detach().cpu().contiguous() for k, v in batch.items() if isinstance(v, Tensor)}
        write_tensors(self.bad_batch, tensors, {"step": str(step), "loss": str(loss)})
        raise TrainingDivergedError(
            f"The loss became {loss} at step {step}. The batch is saved in {self.bad_batch}. "
            "Lower training.learning_rate, set training.max_grad_norm, or use precision bf16 instead of fp16."
        )


class _BridgeTrainer(_Bridge, Trainer):
    pass


class _BridgeSeq2SeqTrainer(_Bridge, Seq2SeqTrainer):
    pass


class _Steps(TrainerCallback):
    """Progress, the record, the strategy's hooks, sealed checkpoints, and the clean stop."""

    def __init__(self, interventions: Interventions, record: TrainingRecord, bar: Any) -> None:
        self.interventions, self.record, self.bar = interventions, record, bar
        self.handles: list[Handle] = []
        self.stopping = False

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.interventions.attach is not None:
            self.handles = list(self.interventions.attach(kwargs["model"], kwargs["optimizer"]))

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.interventions.observe is not None:
            self.interventions.observe(kwargs["model"], state.global_step + 1)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.bar.show(state.global_step, state.max_steps, note=self._note())
        self.record.steps = state.global_step
        if stop_requested():
            control.should_save = self.stopping = True

    def _note(self) -> str:
        return f"loss {self.record.loss[-1][1]:.3f}" if self.record.loss else ""

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if logs and "loss" in logs:
            self.record.loss.append([state.global_step, float(logs["loss"])])
            self.record.learning_rate.append([state.global_step, float(logs.get("learning_rate", 0.0))])

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        seal_checkpoint(Path(args.output_dir) / f"checkpoint-{state.global_step}")
        if self.stopping:
            raise Interrupted(f"Stopped after step {state.global_step} of {state.max_steps}; saved.")

    def release(self) -> None:
        for handle in self.handles:
            handle.remove()


def _arguments(options: TrainingOptions, folder: Path, seed: int, encoder_decoder: bool) -> Any:
    names = {"adamw": "adamw_torch", "sgd": "sgd", "adafactor": "adafactor"}
    values: dict[str, Any] = {
        "output_dir": str(folder),
        "num_train_epochs": options.epochs,
        "max_steps": options.max_steps or -1,
        "per_device_train_batch_size": options.batch_size,
        "gradient_accumulation_steps": options.gradient_accumulation,
        "learning_rate": options.learning_rate,
        "lr_scheduler_type": options.scheduler,
        "warmup_steps": options.warmup_steps,
        "weight_decay": options.weight_decay,
        "max_grad_norm": options.max_grad_norm,
        "optim": names[options.optimizer],
        "bf16": options.precision == "bf16",
        "fp16": options.precision == "fp16",
        "logging_steps": options.log_steps,
        "report_to": list(options.report_to) or "none",
        "save_strategy": "steps",
        "save_steps": options.checkpoint_steps,
        "save_total_limit": 2,
        "disable_tqdm": True,
        "remove_unused_columns": False,
        "seed": seed,
        "data_seed": seed,
        "use_cpu": not torch.cuda.is_available(),
        "dataloader_pin_memory": torch.cuda.is_available(),
    }
    if options.trainer == "sft":
        from trl import SFTConfig

        return SFTConfig(**values, dataset_kwargs={"skip_prepare_dataset": True}, max_length=None)
    return (Seq2SeqTrainingArguments if encoder_decoder else TrainingArguments)(**values)


def train(
    model: nn.Module,
    rows: Sequence[Encoded],
    options: TrainingOptions,
    *,
    tokenizer: Any,
    folder: Path,
    seed: int,
    interventions: Interventions | None = None,
    progress: Progress | None = None,
    description: str = "train",
) -> TrainingRecord:
    """Fine-tune a model on encoded rows; continues from the newest sound checkpoint in `folder`.

    Parameters
    ----------
    model : nn.Module
        Trained in place; weights whose ``requires_grad`` is off stay.
    rows : sequence of Encoded
        Prompts and completions; the loss is on completions only.
    folder : Path
        Where checkpoints go. A killed training that is started again with the same arguments ends with
        the same weights, bit for bit, on the same machine.

    Raises
    ------
    TrainingDivergedError
        The loss is not finite; the step and the batch are saved in ``folder/../bad_batch.safetensors``.
    Interrupted
        Ctrl-C inside `holdfast.progress.stoppable`; a checkpoint was written first.
    ConfigError
        ``trainer: sft`` for an encoder-decoder model.
    """
    from transformers import set_seed
    from transformers.trainer_callback import PrinterCallback, ProgressCallback

    encoder_decoder = is_encoder_decoder(model)
    if options.trainer == "sft" and encoder_decoder:
        raise ConfigError(
            "training.trainer: TRL's SFTTrainer trains causal models only; use 'auto' for this model."
        )
    set_seed(seed)
    progress = progress or Progress(quiet=True)
    record = TrainingRecord()
    started = time.perf_counter()
    arguments = _arguments(options, folder, seed, encoder_decoder)
    trainer_class: Any = _BridgeSeq2SeqTrainer if encoder_decoder else _BridgeTrainer
    if options.trainer == "sft":
        from trl import SFTTrainer

        trainer_class = type("_BridgeSFTTrainer", (_Bridge, SFTTrainer), {"own_loss": False})

    def batch_of(items: list[Encoded]) -> dict[str, Tensor]:
        side: Any = "right" if encoder_decoder or options.trainer == "sft" else "left"
        batch = collate(items, tokenizer.pad_token_id, encoder_decoder=encoder_decoder, side=side)
        if not encoder_decoder and not accepts(model, "position_ids"):
            batch.pop("position_ids", None)
        return batch

    with progress.bar(description, total=1) as bar:
        steps = _Steps(interventions or Interventions(), record, bar)
        trainer = trainer_class(
            model=model,
            args=arguments,
            train_dataset=_Rows(rows) if options.trainer != "sft" else _as_dataset(rows),
            data_collator=batch_of
            if options.trainer != "sft"
            else lambda items: batch_of(_from_dataset(items)),
            processing_class=tokenizer,
            callbacks=[steps],
        )
        trainer.interventions = steps.interventions
        trainer.bad_batch = folder.parent / "bad_batch.safetensors"
        if trainer.own_loss:
            trainer.model_accepts_loss_kwargs = True  # our loss divides by the step's token count itself
        for noisy in (PrinterCallback, ProgressCallback):
            trainer.remove_callback(noisy)
        checkpoint = latest_checkpoint(folder)
        if checkpoint is not None:
            record.loss, record.learning_rate = _history(checkpoint)
        try:
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        finally:
            steps.release()
    trainer.bad_batch.unlink(missing_ok=True)  # of an attempt that diverged before this one
    record.steps = trainer.state.global_step
    record.seconds = time.perf_counter() - started
    model.eval()
    model.zero_grad(set_to_none=True)
    return record


def save_record(record: TrainingRecord, path: Path) -> None:
    """Write ``training.json``."""
    write_json(path, vars(record))


def _history(checkpoint: Path) -> tuple[list[list[float]], list[list[float]]]:
    logs = json.loads((checkpoint / "trainer_state.json").read_text())["log_history"]
    logs = [entry for entry in logs if "loss" in entry]
    return (
        [[entry["step"], entry["loss"]] for entry in logs],
        [[entry["step"], entry.get("learning_rate", 0.0)] for entry in logs],
    )


class _Rows(torch.utils.data.Dataset):
    def __init__(self, rows: Sequence[Encoded]) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Encoded:
        return self.rows[index]


def _as_dataset(rows: Sequence[Encoded]) -> Any:
    """SFTTrainer takes a `datasets.Dataset` only."""
    from datasets import Dataset

    return Dataset.from_list([{"prompt_ids": r.prompt_ids, "completion_ids": r.completion_ids} for r in rows])


def _from_dataset(items: list[dict[str, list[int]]]) -> list[Encoded]:
    return [Encoded(item["prompt_ids"], item["completion_ids"], 0) for item in items]
