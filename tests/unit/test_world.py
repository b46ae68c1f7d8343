"""One process is a world of one; what is refused under a launcher is refused by name."""

from __future__ import annotations

import ast
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import holdfast
from attribution_models import ROWS, build
from holdfast import world
from holdfast.attribution.engine import attribute_batches
from holdfast.cli import app
from holdfast.errors import ConfigError, ModelError, ProcessLostError, StorageError
from holdfast.importance import compute_prior
from holdfast.importance.aggregate import TopKMean
from holdfast.storage import write_text
from holdfast.tasks import toy_tokenizer
from learning_data import rows_of
from tiny_models import tiny_model

ROOT = Path(holdfast.__file__).parent


def test_one_process_gets_back_what_it_gives() -> None:
    tensor = torch.arange(3.0)
    world.add_up([tensor])
    assert tensor.tolist() == [0, 1, 2]
    assert world.gather("a") == ["a"]
    assert world.part([1, 2, 3]) == world.part_of_batch([1, 2, 3]) == [1, 2, 3]
    assert world.first(lambda: 5) == 5
    assert world.union({"b": 1, "a": 2}) == {"b": 1, "a": 2}
    assert (world.rank(), world.size(), world.leads(), world.any_of(False)) == (0, 1, True, False)
    assert world.local(tensor) is world.whole(tensor) is world.like(tensor, tensor) is tensor


def test_a_batch_smaller_than_the_world_is_seen_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(world, "_size", 3)
    monkeypatch.setattr(world, "_rank", 2)
    assert world.part_of_batch("ab") == "ab"
    assert world.part_of_batch("abcdefg") == "cf"
    assert world.part(range(2)) == range(2, 2, 3)


def test_only_rank_0_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(world, "_rank", 1)
    write_text(tmp_path / "x", "text")
    assert not (tmp_path / "x").exists()


def test_a_lost_process_is_named_and_other_errors_stay_what_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    monkeypatch.setattr(world, "_size", 2)
    host = world.socket.gethostname()
    monkeypatch.setattr(world, "_peers", [(host, os.getpid()), (host, child.pid)])
    with pytest.raises(StorageError, match="disk"), world.named_losses():
        raise StorageError("disk")
    child.send_signal(signal.SIGKILL)  # a zombie until it is waited for
    told = rf"^rank 0: lost rank 1 \(process {child.pid} on"
    with pytest.raises(ProcessLostError, match=told), world.named_losses():
        raise RuntimeError("Connection closed by peer")
    child.wait()


def test_errors_are_told_with_their_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    assert world.named_error("error: x") == "error: x"
    monkeypatch.setattr(world, "_size", 2)
    assert world.named_error("error: x") == "rank 0: error: x"
    assert world.named_error("rank 0: lost rank 1") == "rank 0: lost rank 1"


def test_a_command_of_one_process_refuses_a_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    result = CliRunner().invoke(app, ["list", "orders"])
    assert result.exit_code == 2
    assert "runs in one process" in result.stderr


@pytest.mark.parametrize(
    ("launched", "named"),
    [
        ({"ACCELERATE_USE_FSDP": "true"}, "FSDP1"),
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, "ZeRO stage unknown"),
        ({"ACCELERATE_USE_DEEPSPEED": "1", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "0"}, "ZeRO stage 0"),
    ],
)
def test_an_engine_that_no_hold_reaches_is_refused_by_name(
    launched: dict[str, str], named: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for variable, value in launched.items():
        monkeypatch.setenv(variable, value)
    with pytest.raises(ConfigError, match=f"{named}.*Allowed: DDP, FSDP2 and ZeRO stages 1 to 3"):
        world.engine()


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_the_stage_of_zero_is_read_from_a_file_of_deepspeeds(
    stage: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "ds.json").write_text(json.dumps({"zero_optimization": {"stage": stage}}))
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_CONFIG_FILE", str(tmp_path / "ds.json"))
    assert world.engine() == f"ZeRO-{stage}"


@pytest.mark.parametrize(
    ("kind", "strategy"), [("llama", "lwf"), ("llama-lora", "kif"), ("llama-lora", "o-lora")]
)
def test_a_strategy_that_needs_whole_weights_is_refused_under_an_engine(
    kind: str, strategy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "2")
    told = f"chose FSDP2, .* and '{strategy}' needs whole ones. Allowed there: .*attribution.*sequential"
    with pytest.raises(ConfigError, match=told):
        holdfast.Learner(tiny_model(kind), toy_tokenizer(), strategy, folder=tmp_path / "s")
    assert not (tmp_path / "s").exists()


def test_soft_targets_are_refused_under_an_engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "2")
    replay = {"memory": "generated", "targets": "logits"}
    with pytest.raises(ConfigError, match=r"chose FSDP2, and `targets: logits` puts .* Use `targets: text`"):
        holdfast.Learner(tiny_model("llama"), toy_tokenizer(), "ewc", folder=tmp_path / "s", replay=replay)


@pytest.mark.parametrize(
    ("told", "use"),
    [
        ("stage.trainer: the launcher chose FSDP2", lambda stage: stage.trainer()),
        ("stage.attach: the launcher chose FSDP2", lambda stage: stage.attach(None)),
        ("chose FSDP2 on 1 processes, and accelerate made NO on 1", lambda stage: stage.train()),
    ],
)
def test_what_an_engine_can_t_serve_is_refused_before_a_step(
    told: str, use: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "2")
    learner = holdfast.Learner(tiny_model("llama"), toy_tokenizer(), "ewc", folder=tmp_path)
    with pytest.raises(ConfigError, match=told), learner, learner.task("may", rows_of("may", 4)) as stage:
        use(stage)


def test_a_model_in_parts_is_not_rated() -> None:
    model = build("llama")
    model.model.layers[0].mlp.up_proj.weight.ds_id = 0  # as DeepSpeed marks what it has cut up
    with pytest.raises(ModelError, match=r"cut up over the processes \('model.layers.0.mlp.up_proj.weight'"):
        compute_prior(model, ROWS, "fisher", pad_id=0)
    with pytest.raises(ModelError, match="Rate a whole model"):
        attribute_batches(model, ROWS, fold=TopKMean(1), pad_id=0)


def test_only_this_file_names_accelerate_and_process_groups() -> None:
    """Imports, wherever in a file they stand."""
    for file in ROOT.rglob("*.py"):
        tree = ast.parse(file.read_text())
        named = [a.name for node in ast.walk(tree) if isinstance(node, ast.Import) for a in node.names]
        named += [node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
        found = [n for n in named if n.startswith(("accelerate", "torch.distributed"))]
        assert bool(found) == (file.name == "world.py"), (file, found)
