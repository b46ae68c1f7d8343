"""How a task is trained: the part of the configuration that becomes TrainingArguments."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from holdfast.config import Options


class TrainingOptions(Options):
    """Options of the training loop; `transformers` does the loop itself."""

    epochs: float = Field(3.0, gt=0)
    max_steps: int | None = Field(None, ge=1, description="stop after this many optimizer steps instead")
    batch_size: int = Field(16, ge=1)
    gradient_accumulation: int = Field(1, ge=1)
    lm_weight: float | None = Field(
        None,
        ge=0,
        description="weight of the loss on prompts, beside that on answers (LAMOL's lambda): by it a model "
        "learns to write prompts itself. None: 0.25 where a generated memory is to be written of prompts "
        "that are text, otherwise 0",
    )
    learning_rate: float = Field(1e-3, gt=0)
    scheduler: Literal["linear", "constant", "cosine", "constant_with_warmup"] = "linear"
    warmup_steps: int = Field(0, ge=0)
    weight_decay: float = Field(0.0, ge=0)
    max_grad_norm: float = Field(1.0, ge=0, description="0 turns clipping off")
    optimizer: Literal["adamw", "sgd", "adafactor"] = "adamw"
    precision: Literal["full", "bf16", "fp16"] = Field("full", description="mixed precision of the loop")
    trainer: Literal["auto", "sft"] = Field(
        "auto", description="auto: Trainer or Seq2SeqTrainer by architecture; sft: TRL's SFTTrainer"
    )
    checkpoint_steps: int = Field(500, ge=1, description="save what a resume needs every n steps of a task")
    log_steps: int = Field(10, ge=1)
    report_to: tuple[str, ...] = Field((), description="logging integrations of transformers, such as wandb")
