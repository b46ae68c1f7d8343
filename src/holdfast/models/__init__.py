"""Models: which, how they are loaded and saved, what they are made of, and what is trained."""

from holdfast.models.identity import digest, fingerprints
from holdfast.models.loading import float_type, load_model, load_saved, load_weights
from holdfast.models.lora import add_lora
from holdfast.models.modes import (
    evaluating,
    onto_gpu,
    own_forward,
    recomputes_reentrantly,
    require_rateable,
    unprepare,
)
from holdfast.models.options import LoraOptions, ModelOptions
from holdfast.models.parts import (
    accepts,
    block_parameters,
    context_length,
    first_position,
    input_dims,
    input_sizes,
    is_encoder_decoder,
    linear_modules,
    quantisation_of,
    text_part,
    unwrapped,
    weights_of,
)
from holdfast.models.saving import save_merged, save_model
from holdfast.models.toy import tiny_llama

__all__ = [
    "LoraOptions",
    "ModelOptions",
    "accepts",
    "add_lora",
    "block_parameters",
    "context_length",
    "digest",
    "evaluating",
    "fingerprints",
    "first_position",
    "float_type",
    "input_dims",
    "input_sizes",
    "is_encoder_decoder",
    "linear_modules",
    "load_model",
    "load_saved",
    "load_weights",
    "onto_gpu",
    "own_forward",
    "quantisation_of",
    "recomputes_reentrantly",
    "require_rateable",
    "save_merged",
    "save_model",
    "text_part",
    "tiny_llama",
    "unprepare",
    "unwrapped",
    "weights_of",
]
