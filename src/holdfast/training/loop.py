"""Training one task: transformers' and TRL's loops do the work; this starts, resumes and records them."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import Seq2SeqTrainingArguments, TrainerCallback, TrainingArguments

from holdfast.errors import ConfigError
from holdfast.hold import tell_total_rate
from holdfast.hold.cost import trained_numbers
from holdfast.models import accepts, is_encoder_decoder
from holdfast.progress import Progress, no_library_bars
from holdfast.storage import write_json
from holdfast.tasks.encode import Encoded, collate
from holdfast.training.bridge import Bridge, BridgeSeq2SeqTrainer, BridgeTrainer
from holdfast.training.checkpoints import latest_checkpoint
from holdfast.training.options import TrainingOptions
from holdfast.training.steps import OBSERVED, Interventions, Steps, TrainingRecord


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
        "gradient_checkpointing": False,  # TRL would switch it on
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
    record = TrainingRecord(trained=trained_numbers(model))
    started = time.perf_counter()
    arguments = _arguments(options, folder, seed, encoder_decoder)
    trainer_class: Any = BridgeSeq2SeqTrainer if encoder_decoder else BridgeTrainer
    if options.trainer == "sft":
        from trl import SFTTrainer

        trainer_class = type("BridgeSFTTrainer", (Bridge, SFTTrainer), {"own_loss": False})

    def batch_of(items: list[Encoded]) -> dict[str, Tensor]:
        side: Any = "right" if encoder_decoder or options.trainer == "sft" else "left"
        batch = collate(items, tokenizer.pad_token_id, encoder_decoder=encoder_decoder, side=side)
        if not encoder_decoder and not accepts(model, "position_ids"):
            batch.pop("position_ids", None)
        return batch

    with progress.bar(description, total=1) as bar:
        steps = Steps(interventions or Interventions(), record, bar)
        trainer = trainer_class(
            model=model,
            args=arguments,
            train_dataset=_Rows(rows) if options.trainer != "sft" else _as_dataset(rows),
            data_collator=batch_of
            if options.trainer != "sft"
            else lambda items: batch_of(_from_dataset(items)),
            processing_class=tokenizer,
            callbacks=[_Schedule(), steps],
        )
        trainer.interventions = steps.interventions
        trainer.bad_batch = folder.parent / "bad_batch.safetensors"
        if trainer.own_loss:
            trainer.model_accepts_loss_kwargs = True  # our loss divides by the step's token count itself
        for noisy in (PrinterCallback, ProgressCallback):
            trainer.remove_callback(noisy)
        checkpoint = latest_checkpoint(folder)
        if checkpoint is not None:
            state = json.loads((checkpoint / "trainer_state.json").read_text())
            record.loss, record.learning_rate = _history(state["log_history"])
            if steps.interventions.load_state is not None:
                steps.interventions.load_state(load_file(checkpoint / OBSERVED))
        try:
            with no_library_bars():  # saving a checkpoint has one
                if checkpoint is not None and state["global_step"] >= state["max_steps"]:
                    # killed after the training: the Trainer would make one step more inside an epoch
                    trainer._load_from_checkpoint(str(checkpoint))
                    trainer.state.global_step = state["global_step"]
                    optimizer = trainer.create_optimizer()  # what is attached is also what is released
                    steps.on_train_begin(arguments, trainer.state, None, model=model, optimizer=optimizer)
                else:
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


def _history(entries: list[dict[str, Any]]) -> tuple[list[list[float]], list[list[float]]]:
    logs = [entry for entry in entries if "loss" in entry]
    return (
        [[entry["step"], entry["loss"]] for entry in logs],
        [[entry["step"], entry.get("learning_rate", 0.0)] for entry in logs],
    )


class _Schedule(TrainerCallback):
    """Tells the optimizer the sum of its learning rates, by which a whole pull becomes a pull a step."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        tell_total_rate(kwargs["optimizer"], kwargs.get("lr_scheduler"), state.max_steps)


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
