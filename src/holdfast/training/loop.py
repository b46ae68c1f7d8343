"""Training one task: transformers' and TRL's loops do the work; this starts, resumes and records them."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments, Trainer, TrainingArguments

from holdfast import world
from holdfast.errors import ConfigError
from holdfast.hold.cost import trained_numbers
from holdfast.hold.drift import MOVED
from holdfast.models import first_position, is_encoder_decoder, unprepare, unwrapped
from holdfast.models.base import Base
from holdfast.progress import Progress, no_library_bars
from holdfast.records import TrainingLog
from holdfast.tasks.encode import Encoded, collate
from holdfast.training.beside import Beside
from holdfast.training.bridge import bridged
from holdfast.training.checkpoints import latest_checkpoint, ours
from holdfast.training.losses import TokenLoss
from holdfast.training.options import TrainingOptions
from holdfast.training.parts import copied, give_back, require_engine, take_finished
from holdfast.training.prompt_loss import PromptLoss
from holdfast.training.reports import Reports
from holdfast.training.soft_targets import SoftTargets
from holdfast.training.steps import SPENT, Steps, TrainingRecord
from holdfast.training.verbs import ROWS, Verbs

# transformers 5 has a new name for it, and warns of the old one
_RECOMPUTE = next(
    name
    for name in ("activation_checkpointing", "gradient_checkpointing")
    if name in TrainingArguments.__dataclass_fields__
)


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
        # said in any case: TRL would switch it on
        _RECOMPUTE: options.gradient_checkpointing,
        f"{_RECOMPUTE}_kwargs": {"use_reentrant": False} if options.gradient_checkpointing else None,
        "seed": seed,
        "data_seed": seed,
        "use_cpu": not torch.cuda.is_available() and world.engine() is None,
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
    verbs: Verbs | None = None,
    base: Base | None = None,
    progress: Progress | None = None,
    description: str = "train",
    beside: Beside | None = None,
    soft_targets: SoftTargets | None = None,
    reports: Reports | None = None,
) -> TrainingRecord:
    """Fine-tune a model on encoded rows; continues from the newest sound checkpoint in `folder`.

    Parameters
    ----------
    model : nn.Module
        Trained in place; weights whose ``requires_grad`` is off stay.
    rows : sequence of Encoded
        Prompts and completions; the loss is on completions, and with ``lm_weight`` on prompts too.
    folder : Path
        Where checkpoints go. A killed training that is started again with the same arguments ends with
        the same weights, bit for bit, on the same machine.

        Of several processes (`holdfast.world`) each takes its part of every batch: ``batch_size`` is that of
        all together, and the weights are those that one process ends with, up to rounding. A last batch of
        fewer rows than processes is seen whole by each; with gradient accumulation it then weighs more.
        Under FSDP2 and ZeRO a copy is cut up and trained (`holdfast.training.parts`).
    base : Base, optional
        What ``loss: kl_to_base`` stays close to.
    beside : Beside, optional
        Old rows that each batch gets a share of.
    soft_targets : SoftTargets, optional
        How replayed rows are answered.
    reports : Reports, optional
        Where the logging integrations of ``report_to`` wait for more.

    Raises
    ------
    TrainingDivergedError
        The loss is not finite; the step and the batch are saved in ``folder/../bad_batch.safetensors``.
    Interrupted
        Ctrl-C inside `holdfast.progress.stoppable`; a checkpoint was written first.
    ConfigError
        ``gradient_checkpointing`` for a model that can't; ``trainer: sft`` for an encoder-decoder model;
        ``loss: kl_to_base`` where the base can't be had; ``precision: fp16`` without a GPU; an engine that
        the launcher chose isn't there.
    """
    from transformers import set_seed

    encoder_decoder = is_encoder_decoder(model)
    if options.trainer == "sft" and encoder_decoder:
        raise ConfigError(
            "training.trainer: TRL's SFTTrainer trains causal models only; use 'auto' for this model."
        )
    if options.gradient_checkpointing and not getattr(model, "supports_gradient_checkpointing", False):
        raise ConfigError(
            f"training.gradient_checkpointing: {type(model).__name__} doesn't support it; leave it out."
        )
    options.check_machine()
    set_seed(seed)
    progress = progress or Progress(quiet=True)
    record = TrainingRecord(trained=trained_numbers(model), lm_weight=options.lm_weight or 0.0)
    if verbs is not None and not verbs.trains:
        return record
    started = time.perf_counter()
    arguments = _arguments(options, folder, seed, encoder_decoder)
    batch_of = Collator(
        model, tokenizer, "right" if options.trainer == "sft" else None, beside, whole_batches=True
    )
    with progress.bar(description, total=1) as bar, copied(model) as trained:
        steps = Steps(verbs or Verbs(), record, bar)
        trainer = _trainer(trained, rows, options, arguments, batch_of, tokenizer, steps)
        if steps.verbs.loss_trains:
            world.expect_every_gradient(trainer.accelerator)
        trainer.token_loss = TokenLoss.of(options.loss, base)
        trainer.soft_targets = soft_targets
        trainer.bad_batch = folder.parent / "bad_batch.safetensors"
        _keep_logs(trainer, folder.parent / "tensorboard")
        if reports is not None:
            reports.keep_open(trainer)
        try:
            with no_library_bars():  # saving a checkpoint has one
                _run(trainer, latest_checkpoint(folder, progress.say), steps)
            give_back(trainer.model, model)
        finally:
            steps.release()
            if options.gradient_checkpointing:  # attribution and answers see a plain model
                getattr(trained, f"{_RECOMPUTE}_disable")()
        if world.leads():
            trainer.bad_batch.unlink(missing_ok=True)  # of an attempt that diverged before this one
        record.steps = trainer.state.global_step
        del trainer, trained  # what an engine has cut up goes before the model comes back
    record.seconds = record.earlier + time.perf_counter() - started
    unprepare(unwrapped(model))
    model.eval()
    model.zero_grad(set_to_none=True)
    return record


def _trainer(
    model: nn.Module,
    rows: Sequence[Encoded],
    options: TrainingOptions,
    arguments: Any,
    batch_of: Collator,
    tokenizer: Any,
    steps: Steps,
) -> Any:
    """The Trainer of the options, with the bridge in front of it and `steps` as its only voice."""
    from transformers.trainer_callback import PrinterCallback, ProgressCallback

    sft = options.trainer == "sft"
    trainer_class: Any = bridged(Seq2SeqTrainer if is_encoder_decoder(model) else Trainer, own_loss=True)
    if sft:
        from trl import SFTTrainer

        trainer_class = bridged(SFTTrainer)
    trainer = trainer_class(
        model=model,
        args=arguments,
        train_dataset=_as_dataset(rows) if sft else Rows(rows),
        data_collator=(lambda items: batch_of(_from_dataset(items))) if sft else batch_of,
        processing_class=tokenizer,
        callbacks=[steps],
    )
    require_engine(trainer)
    trainer.verbs, trainer.drift, trainer.whole_batches = steps.verbs, steps.drift, True
    trainer.prompt_loss = PromptLoss.of(options, tokenizer)
    if trainer.own_loss:
        trainer.model_accepts_loss_kwargs = True  # our loss divides by the step's token count itself
    for noisy in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(noisy)
    return trainer


def _run(trainer: Any, checkpoint: Path | None, steps: Steps) -> None:
    """Train, from a checkpoint if there is one; of a finished training take what it ended with."""
    if checkpoint is None:
        trainer.train()
        return
    state, record = json.loads((checkpoint / "trainer_state.json").read_text()), steps.record
    record.loss, record.learning_rate, record.moved = _history(state["log_history"])
    if (spent := ours(checkpoint, SPENT)).exists():  # none in those of earlier versions
        record.earlier = float(json.loads(spent.read_text())["seconds"])
    if state["global_step"] < state["max_steps"]:
        if world.by_deepspeed():  # DeepSpeed loads its own and asks nobody
            trainer.take_gathered(checkpoint)
        trainer.train(resume_from_checkpoint=str(checkpoint))
        return
    # killed after the training: the Trainer would make one step more inside an epoch
    if world.engine() is None:
        trainer._load_from_checkpoint(str(checkpoint))
    else:
        take_finished(checkpoint, trainer.model)
    trainer.state.global_step = state["global_step"]
    trainer.state.max_steps = state["max_steps"]
    trainer.create_optimizer_and_scheduler(state["max_steps"])
    steps.on_train_begin(  # what is attached is also what is released
        trainer.args,
        trainer.state,
        None,
        model=trainer.model,
        optimizer=trainer.optimizer,
        lr_scheduler=trainer.lr_scheduler,
    )


def _keep_logs(trainer: Trainer, folder: Path) -> None:
    """Let TensorBoard write beside the stage's other files: the trainer's own folder is deleted."""
    for callback in trainer.callback_handler.callbacks:
        writer: Any = callback
        if type(callback).__name__ == "TensorBoardCallback" and writer.logging_dir is None:
            writer.logging_dir = str(folder)


def save_record(record: TrainingRecord, path: Path) -> None:
    """Write ``training.json``."""
    TrainingLog(**{name: getattr(record, name) for name in TrainingLog.model_fields}).write(path)


def _history(entries: list[dict[str, Any]]) -> tuple[list[list[float]], ...]:
    logs = [entry for entry in entries if "loss" in entry]
    return (
        [[entry["step"], entry["loss"]] for entry in logs],
        [[entry["step"], entry.get("learning_rate", 0.0)] for entry in logs],
        [[entry["step"], entry[MOVED]] for entry in logs if MOVED in entry],
    )


class Rows(torch.utils.data.Dataset):
    """Encoded rows with their numbers, as a map-style data set: an item is ``(number, row)``."""

    def __init__(self, rows: Sequence[Encoded]) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[int, Encoded]:
        return index, self.rows[index]


class Collator:
    """Makes a training batch of some items of `Rows`, as `holdfast.tasks.collate` does, with their numbers.

    Parameters
    ----------
    model : nn.Module
        The batch holds what its forward pass takes.
    side : {"left", "right"}, optional
        Where inputs are padded; by default left for a causal model, so that its answers end the row.
    beside : Beside, optional
        Old rows that each batch gets a share of; their numbers are negative.
    whole_batches : bool
        The items are a batch of all processes, of which this one takes its part.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        side: Any = None,
        beside: Beside | None = None,
        *,
        whole_batches: bool = False,
    ) -> None:
        self.beside, self.whole_batches = beside, whole_batches
        self.encoder_decoder = is_encoder_decoder(model)
        self.side: Any = side or ("right" if self.encoder_decoder else "left")
        self.pad_id = tokenizer.pad_token_id
        self.first_position = first_position(model)

    def __call__(self, items: Sequence[tuple[int, Encoded]]) -> dict[str, Tensor]:
        if self.beside is not None:
            items = [*items, *self.beside.of_batch([number for number, _ in items])]
        if self.whole_batches:
            items = world.part_of_batch(items)
        rows = [row for _, row in items]
        batch = collate(
            rows,
            self.pad_id,
            encoder_decoder=self.encoder_decoder,
            side=self.side,
            first_position=self.first_position,
        )
        batch[ROWS] = torch.tensor([number for number, _ in items])
        return batch


def _as_dataset(rows: Sequence[Encoded]) -> Any:
    """SFTTrainer takes a `datasets.Dataset` only."""
    from datasets import Dataset

    return Dataset.from_list(
        [
            {"number": number, "prompt_ids": row.prompt_ids, "completion_ids": row.completion_ids}
            for number, row in enumerate(rows)
        ]
    )


def _from_dataset(items: list[dict[str, Any]]) -> list[tuple[int, Encoded]]:
    return [(item["number"], Encoded(item["prompt_ids"], item["completion_ids"], 0)) for item in items]
