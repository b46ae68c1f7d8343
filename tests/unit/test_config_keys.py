"""The page of config keys: every key that a config may have is on it, with its default and meaning."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

from holdfast.hold import MECHANISMS
from holdfast.importance.registry import REGISTRY
from holdfast.runner import RunConfig
from holdfast.strategies import STRATEGIES

FILE = Path(__file__).parents[2] / "docs" / "config_keys.py"


@pytest.fixture(scope="module")
def made() -> ModuleType:
    spec = importlib.util.spec_from_file_location("config_keys", FILE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_section_choice_and_key_is_on_the_page(made: ModuleType) -> None:
    found = made.sections()
    top = {key.path for key in found["A run"]}
    assert set(RunConfig.model_fields) <= top
    assert {"training.epochs", "protect_base.rows", "replay.memory.count", "model.lora.r"} <= top
    for kind, names in (("strategy", STRATEGIES), ("mechanism", MECHANISMS), ("importance", REGISTRY)):
        assert {f"`{kind}: {name}`" for name in names} <= set(found)
    for name, method in STRATEGIES.items():
        keys = {key.path.split(".")[0] for key in found[f"`strategy: {name}`"]}
        assert keys == set(method.Options.model_fields) - {"name"}


def test_a_key_tells_what_is_allowed_and_its_default(made: ModuleType) -> None:
    found = {key.path: key for key in made.sections()["A run"]}
    assert (found["training.epochs"].allowed, found["training.epochs"].default) == (
        "number, > 0, ≤ 1000000.0",
        "`3.0`",
    )
    assert found["training.optimizer"].allowed == "`adamw`, `sgd`, `adafactor`"
    assert found["output"].default == "needed"
    assert found["evaluation.general"].default == "`false`"
    page = made.page()
    assert "| `training.batch_size` | whole number, ≥ 1 | `16` |  |" in page
    assert all(line.count("|") - line.count("\\|") == 5 for line in page.splitlines() if line[:3] == "| `")
