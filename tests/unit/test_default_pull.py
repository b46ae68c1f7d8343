"""How strongly inputs are held where nobody says: 5, and a LoRA 24; what was recorded stays."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from holdfast import Learner
from holdfast.config import read_yaml, validate
from holdfast.hold import Anchor
from holdfast.importance import ImportancePrior
from holdfast.runner import RunConfig
from holdfast.tasks.toy import toy_tokenizer
from lora_cases import lora_model
from tiny_models import tiny_model
from tiny_runs import tiny_run

LORA = {"toy": True, "hidden": 16, "layers": 1, "lora": {"r": 2}}


def config_of(folder: Path, strategy: Any, **sections: Any) -> RunConfig:
    return validate(RunConfig, {**tiny_run(folder), **sections, "strategy": strategy}, "test")


def pull_of(config: Any) -> Any:
    return config.strategy.mechanism.pull


def test_a_run_with_a_lora_is_held_at_24_and_one_without_at_5(tmp_path: Path) -> None:
    assert pull_of(config_of(tmp_path, "attribution")) == 5
    assert pull_of(config_of(tmp_path, "attribution", model=LORA)) == 24


@pytest.mark.parametrize(
    ("mechanism", "found"),
    [
        ({"name": "anchor", "pull": 5}, (5, None)),
        ({"name": "anchor", "strength": 100}, (None, 100)),
        ({"name": "anchor", "strength": "auto"}, (None, "auto")),
    ],
)
def test_what_is_given_or_recorded_stays(mechanism: Any, found: Any, tmp_path: Path) -> None:
    got = config_of(tmp_path, {"name": "attribution", "mechanism": mechanism}, model=LORA)
    assert (got.strategy.mechanism.pull, got.strategy.mechanism.strength) == found
    again = validate(RunConfig, got.model_dump(mode="json"), "test")
    assert again == got


def test_weights_held_one_by_one_keep_their_strength_with_a_lora(tmp_path: Path) -> None:
    held = config_of(tmp_path, {"name": "attribution", "importance": "fisher"}, model=LORA)
    assert (held.strategy.mechanism.strength, pull_of(held)) == (600, None)


@pytest.mark.parametrize(("make", "pull"), [(lambda: tiny_model("llama"), 5), (lora_model, 24)])
def test_a_model_of_a_script_is_looked_at_and_the_pull_is_recorded(
    make: Any, pull: float, tmp_path: Path
) -> None:
    Learner(make(), toy_tokenizer(), "attribution", folder=tmp_path / "skills").close()
    assert read_yaml(tmp_path / "skills" / "config.yaml")["strategy"]["mechanism"]["pull"] == pull


@pytest.mark.parametrize(("name", "pull"), [("h.0.q.weight", 5), ("h.0.q.lora_A.weight", 24)])
def test_an_anchor_by_itself_goes_by_what_its_prior_holds(name: str, pull: float) -> None:
    prior = ImportancePrior({name: torch.eye(4)}, {"kind": "inputs"})
    assert Anchor(prior).options.pull == pull
    assert Anchor(prior, pull=7).options.pull == 7
