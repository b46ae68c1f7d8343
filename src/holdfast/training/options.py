"""How a task is trained: the part of the configuration that becomes TrainingArguments."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from holdfast.config import Options
from holdfast.training.losses import CrossEntropyOptions, LossOptions


class TrainingOptions(Options):
    """Options of the training loop; `transformers` does the loop itself."""

    epochs: float = Field(3.0, gt=0)
    max_steps: int | None = Field(None, ge=1, description="stop after this many optimizer steps instead")
    batch_size: int = Field(16, ge=1)
    gradient_accumulation: int = Field(1, ge=1)
    loss: LossOptions = Field(
        default_factory=CrossEntropyOptions,
        description="of each answer token; eaft and kl_to_base take less away from what the base can do",
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

    @model_validator(mode="after")
    def _own_loss(self) -> TrainingOptions:
        if self.trainer == "sft" and self.loss.name != "cross_entropy":
            raise ValueError(
                f"`loss: {self.loss.name}` doesn't combine with `trainer: sft`, which has a loss of its own; "
                "use `trainer: auto`"
            )
        return self
