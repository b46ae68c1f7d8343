"""What all tests share: one thread (tiny models are fastest so), no network, and tiny runs."""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

from tiny_runs import tiny_run

torch.set_num_threads(1)

# without an accelerator torch.manual_seed would keep the stack of each call for one that may come
seeded = torch.manual_seed if torch.accelerator.is_available() else torch.default_generator.manual_seed
SHARED = Path(__file__).parents[1] / ".." / "shared"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A slow test may take minutes on a machine that does other work too."""
    for item in items:
        if item.get_closest_marker("slow") and not item.get_closest_marker("timeout"):
            item.add_marker(pytest.mark.timeout(1800))


@pytest.fixture(scope="session", autouse=True)
def _nothing_waits_for_the_disk() -> Iterator[None]:
    """Processes are killed here, not the power: what a dead process has written is there without fsync."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", os.fstat)
        yield


@pytest.fixture(scope="session", autouse=True)
def _no_card_beside_an_adapter() -> Iterator[None]:
    """peft compiles a template for the card that it saves beside each adapter, which no test reads."""
    with pytest.MonkeyPatch.context() as patch:
        if peft := sys.modules.get("peft"):  # else no test file trains
            patch.setattr(peft.PeftModel, "create_or_update_model_card", lambda self, output_dir: None)
        yield


@pytest.fixture(scope="session", autouse=True)
def _git_is_asked_once() -> Iterator[None]:
    """Each run notes the revision of the folder that it is started in, which is the same all the while."""
    from holdfast import environment

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(environment, "revision_of", cache(environment.revision_of))
        yield


@pytest.fixture(scope="module", autouse=True)
def _modules_are_not_garbage() -> None:
    """Each training collects garbage; without this it would look at every object of torch each time."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """What a test draws depends on no other test."""
    seeded(0)


@pytest.fixture
def shared() -> Path:
    """The folder with the benchmark and the base model, where this machine has it."""
    if not (SHARED / "models" / "base-4m").is_dir():
        pytest.skip(f"needs the benchmark and the base model in {SHARED.resolve()}")
    return SHARED.resolve()


@pytest.fixture
def tiny() -> Any:
    """The maker of tiny runs' configurations."""
    return tiny_run


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run that has learned something: ``head``, then ``copy``. To be read, not written."""
    from holdfast.config import validate
    from holdfast.runner import RunConfig, run

    folder = tmp_path_factory.mktemp("trained") / "run"
    values = tiny_run(folder)
    values["tasks"] = {"source": "toy", "order": ["head", "copy"], "train_rows": 200, "test_rows": 16}
    values["training"] = {"epochs": 10, "batch_size": 16, "learning_rate": 1e-2}
    run(validate(RunConfig, values, source="test"))
    return folder
