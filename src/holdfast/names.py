"""Names of weights: the one canonical name of each, and where in the model it says that the weight is."""

from __future__ import annotations

import re

_WRAPPERS = re.compile(r"^(?:module\.|_orig_mod\.|base_model\.model\.)+")
# what an adapter wraps; of two adapters around one module the inner one keeps it in its factors' names
_BASE_LAYER = re.compile(r"\.base_layer(?!.*\.lora_)")
_LAYER = re.compile(r"(?:^|\.)(?:layers|h|block|blocks|layer)\.(\d+)\.")
Block = tuple[str, int]  # ("encoder" | "decoder" | "", index of the transformer block)


def canonical_name(name: str) -> str:
    """The name a weight has in the bare model, whatever wraps it (PEFT, DDP, torch.compile).

    Factors of PEFT's adapter ``default`` lose its name: ``...q_proj.lora_A.default.weight`` becomes
    ``...q_proj.lora_A.weight``. Those of any other adapter keep theirs, so that two are told apart.
    """
    name = _WRAPPERS.sub("", name).replace("._orig_mod", "")
    name = _BASE_LAYER.sub("", name)
    return re.sub(r"\.(lora_[AB]|lora_embedding_[AB])\.default(?=\.|$)", r".\1", name)


def is_lora(name: str) -> bool:
    """Whether a weight is a factor of a LoRA, by its name."""
    return ".lora_" in name


def layer_of(name: str) -> int | None:
    """Index of the transformer block a parameter belongs to; None outside the blocks."""
    match = _LAYER.search(name)
    return int(match.group(1)) if match else None


def module_of(name: str) -> str:
    """The module's path inside its block, such as ``self_attn.q_proj``."""
    match = _LAYER.search(name)
    return (name[match.end() :] if match else name).rsplit(".", 1)[0]


def block_path(name: str) -> str:
    """Module path of the transformer block that a parameter or map stands in, such as ``model.layers.3``.

    An index alone would mix an encoder's blocks with a decoder's. Outside the blocks it is the name itself.
    """
    match = _LAYER.search(name)
    return name[: match.end() - 1] if match else name


def block_of(name: str) -> Block | None:
    """The transformer block of a parameter, by its canonical name; None outside the blocks."""
    layer = layer_of(name)
    if layer is None:
        return None
    return next((part for part in name.split(".") if part in ("encoder", "decoder")), ""), layer


def order_of(block: Block) -> tuple[bool, Block]:
    """Sorts blocks from the input up: the encoder's before the decoder's."""
    return block[0] != "encoder", block
