"""Which model is fine-tuned, and how: the options of `model`."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Literal

from pydantic import Field, model_validator

from holdfast.config import Options
from holdfast.models.adapters import is_adapter
from holdfast.models.pretrained import GGUF, Bits

FloatType = Literal["float32", "bfloat16", "float16", "float64"]


class LoraOptions(Options):
    """Low-rank adapters, made by PEFT."""

    r: int = Field(8, ge=1, le=65536, description="rank")
    alpha: float = Field(16.0, gt=0, description="scale numerator (alpha / r)")
    dropout: float = Field(0.0, ge=0, lt=1)
    target_modules: tuple[str, ...] | Literal["all-linear"] | None = Field(
        "all-linear",
        description="module names, or all linear maps but the head and routers; null: PEFT's default for the "
        "architecture, such as queries and values",
    )


class ModelOptions(Options):
    """Which model is fine-tuned, and which of its weights may change."""

    path: str | None = Field(
        None,
        description="folder, GGUF file or hub id of a causal or encoder-decoder model; of one that sees "
        "images too the language model is trained",
    )
    toy: bool = Field(False, description="a tiny Llama with a character tokenizer, made on the spot")
    dtype: FloatType = "float32"
    trainable: Literal["blocks", "all"] | None = Field(
        None, description="blocks (default): the linear maps in the transformer blocks; all: every weight"
    )
    lora: LoraOptions | None = Field(None, description="train low-rank adapters instead of the weights")
    quantise: Bits | None = Field(
        None,
        description="keep the frozen weights under a LoRA in 4 bits (NF4, as QLoRA does) or in 8; needs "
        "bitsandbytes",
    )
    random_init: bool = Field(False, description="take the architecture from `path`, but random weights")
    hidden: int | None = Field(
        None, ge=8, le=8192, multiple_of=8, description="toy only: hidden size (default 128)"
    )
    layers: int | None = Field(None, ge=1, le=1000, description="toy only: number of blocks (default 4)")

    @property
    def adapted(self) -> bool:
        """Whether a LoRA is trained: a new one, or the adapter that `path` holds."""
        return self.lora is not None or (self.path is not None and is_adapter(self.path))

    @model_validator(mode="after")
    def _one_source(self) -> ModelOptions:
        if (self.path is None) == (not self.toy):
            raise ValueError("give exactly one of `path` (folder or hub id) and `toy: true`")
        if not self.toy and (self.hidden is not None or self.layers is not None):
            raise ValueError("`hidden` and `layers` apply to `toy: true` only")
        if self.toy:
            self.refuse_ignored(("random_init",), "with `toy: true`, whose weights are random")
        if self.adapted and self.trainable is not None:
            where = "with `lora`" if self.lora is not None else f"to '{self.path}', which holds an adapter"
            raise ValueError(f"`trainable` does not apply {where}: only the adapters are trained")
        if self.quantise is not None:
            self._quantisable()
        return self

    def _quantisable(self) -> None:
        if self.toy or self.random_init or str(self.path).lower().endswith(GGUF):
            raise ValueError(
                "`quantise` applies to the weights of a model that is loaded: not to `toy`, `random_init` or "
                "a GGUF file"
            )
        if not self.adapted:
            raise ValueError(
                "`quantise` needs a LoRA on what it quantises, as that can't be trained; set `lora`, such as "
                "`lora: {r: 8}`"
            )
        if self.dtype == "float64":
            raise ValueError("`quantise` goes with `dtype` float32, bfloat16 or float16, not float64")
        if find_spec("bitsandbytes") is None:
            raise ValueError(
                "`quantise` needs the package bitsandbytes, which is not installed: "
                "pip install 'holdfast[quantised]'"
            )
