"""An option that does nothing beside another is refused, whoever sets it, and its default never is."""

from __future__ import annotations

from typing import Any

import pytest

from holdfast.config import Options, validate
from holdfast.errors import ConfigError
from holdfast.learner.config import LearnerEvaluationOptions, ProtectBaseOptions
from holdfast.models import ModelOptions
from holdfast.strategies import STRATEGIES
from holdfast.training.options import TrainingOptions

MOE, ROUTED = STRATEGIES["lora-moe"].Options, STRATEGIES["lora-routed"].Options
ATTRIBUTION = STRATEGIES["attribution"].Options
# of each section: what makes the option idle, and a value of the option that differs from its default
IDLE: list[tuple[type[Options], dict[str, Any], dict[str, Any]]] = [
    (MOE, {"balance": 0}, {"types": 4}),
    (MOE, {"balance": 0}, {"delta": 0.3}),
    (MOE, {"types": 1}, {"delta": 0.3}),
    (ROUTED, {"router": "oracle"}, {"samples": 8}),
    (ROUTED, {"router": "oracle"}, {"probes": 8}),
    (STRATEGIES["lora-oracle"].Options, {}, {"samples": 8}),
    (STRATEGIES["o-lora"].Options, {"orthogonality": 0}, {"overlap": "squared"}),
    (ATTRIBUTION, {"importance": "uniform"}, {"control": "permuted"}),
    (TrainingOptions, {"scheduler": "constant"}, {"warmup_steps": 3}),
    (LearnerEvaluationOptions, {}, {"general_rows": 8}),
    (ModelOptions, {"toy": True}, {"random_init": True}),
    (ProtectBaseOptions, {"general": "chats.jsonl"}, {"tokens": 8}),
]


@pytest.mark.parametrize(("section", "beside", "option"), IDLE)
def test_an_option_that_does_nothing_beside_another_is_refused(
    section: type[Options], beside: dict[str, Any], option: dict[str, Any]
) -> None:
    (name,) = option
    with pytest.raises(ConfigError, match=f"`{name}` does nothing .*; leave it out"):
        validate(section, {**beside, **option}, "test")
    alone = validate(section, beside, "test")
    recorded = alone.model_dump(mode="json")
    assert recorded[name] != option[name]
    assert validate(section, recorded, "test") == alone, "as a folder records it, with all defaults"


def test_the_same_options_are_taken_where_they_count() -> None:
    for section, values in (
        (MOE, {"types": 4, "delta": 0.3}),
        (ROUTED, {"samples": 8, "probes": 8}),
        (TrainingOptions, {"scheduler": "constant_with_warmup", "warmup_steps": 3}),
        (LearnerEvaluationOptions, {"general": True, "general_rows": 8}),
    ):
        assert validate(section, values, "test").model_dump().items() >= values.items()
