"""How a task is trained: the part of the configuration that becomes TrainingArguments."""

from __future__ import annotations

from typing import Any, Literal

import torch
from pydantic import Field, field_validator, model_validator

from holdfast.config import Options
from holdfast.errors import ConfigError
from holdfast.training.losses import CrossEntropyOptions, LossOptions


class TrainingOptions(Options):
    """Options of the training loop; `transformers` does the loop itself."""

    epochs: float = Field(3.0, gt=0, le=1e6)
    max_steps: int | None = Field(
        None, ge=1, le=10**9, description="stop after this many optimizer steps instead"
    )
    batch_size: int = Field(16, ge=1)
    gradient_accumulation: int = Field(1, ge=1)
    loss: LossOptions = Field(
        default_factory=CrossEntropyOptions,
        description="of each answer token; eaft and kl_to_base take less away from what the base can do",
    )
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
    gradient_checkpointing: bool = Field(
        False,
        description="compute activations anew in the backward pass instead of keeping them: less memory, and "
        "about a third more time",
    )
    trainer: Literal["auto", "sft"] = Field(
        "auto", description="auto: Trainer or Seq2SeqTrainer by architecture; sft: TRL's SFTTrainer"
    )
    checkpoint_steps: int = Field(500, ge=1, description="save what a resume needs every n steps of a task")
    log_steps: int = Field(10, ge=1)
    report_to: tuple[str, ...] = Field(
        (),
        description="logging integrations of transformers: one name, such as wandb, or several; tensorboard "
        "writes into the stage's folder. After each task they get its scores, AP, BWT and KL to the base",
    )

    @field_validator("report_to", mode="before")
    @classmethod
    def _one_or_several(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value

    @field_validator("report_to")
    @classmethod
    def _known(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if value:
            from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

            if unknown := [name for name in value if name not in INTEGRATION_TO_CALLBACK]:
                allowed = sorted(INTEGRATION_TO_CALLBACK)
                raise ValueError(f"no logging integration '{unknown[0]}'; allowed: {', '.join(allowed)}")
        return value

    @model_validator(mode="after")
    def _only_what_applies(self) -> TrainingOptions:
        if self.scheduler == "constant":
            self.refuse_ignored(
                ("warmup_steps",), "with `scheduler: constant`; `constant_with_warmup` has them"
            )
        return self

    @model_validator(mode="after")
    def _own_loss(self) -> TrainingOptions:
        if self.trainer == "sft" and self.loss.name != "cross_entropy":
            raise ValueError(
                f"`loss: {self.loss.name}` doesn't combine with `trainer: sft`, which has a loss of its own; "
                "use `trainer: auto`"
            )
        return self

    def check_machine(self) -> None:
        """See that this machine has what the options ask for.

        Raises
        ------
        ConfigError
            fp16 without a GPU, or a logging integration that can't be imported.
        """
        if self.precision == "fp16" and not torch.cuda.is_available():
            raise ConfigError(
                "training.precision: fp16 does nothing without a CUDA GPU, and there is none here; use bf16, "
                "or leave it out."
            )
        if not self.report_to:
            return
        from transformers.integrations import get_available_reporting_integrations

        if missing := sorted({*self.report_to} - {*get_available_reporting_integrations()}):
            raise ConfigError(
                f"training.report_to: {', '.join(missing)} can't be imported; install it, or leave it out."
            )
