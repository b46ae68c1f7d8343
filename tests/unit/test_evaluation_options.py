"""Each is told how to evaluate what it evaluates: what only a run asks is no option of a learner's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from command_line import holdfast_cli
from holdfast.config import validate
from holdfast.errors import ConfigError
from holdfast.learner import Learner, LearnerConfig
from holdfast.learner.config import recorded_config
from holdfast.runner import RunConfig, run
from holdfast.tasks import toy_tokenizer
from tiny_models import tiny_model
from tiny_runs import tiny_run


@pytest.mark.parametrize("option", [{"scope": "last"}, {"zero_shot": False}])
def test_a_learner_refuses_what_only_a_known_stream_can_be_asked(option: dict[str, Any]) -> None:
    (name,) = option
    with pytest.raises(ConfigError, match=f"evaluation.{name}: unknown key.*here: batch_size, engine"):
        Learner(tiny_model("llama"), toy_tokenizer(), "sequential", evaluation=option)


def test_holdfast_learn_refuses_it_too(tmp_path: Path) -> None:
    data = tmp_path / "data.jsonl"
    data.write_text('{"prompt": "ab", "answer": "c"}\n' * 4)
    done = holdfast_cli(
        "learn", data, "--skills", tmp_path / "skills", "--model", "none", "evaluation.scope=last"
    )
    assert done.exit_code == 2
    assert "evaluation.scope: unknown key." in done.output
    assert not (tmp_path / "skills").exists()


def test_holdfast_attribute_refuses_what_it_does_not_measure(tmp_path: Path) -> None:
    data = tmp_path / "data.jsonl"
    data.write_text('{"prompt": "ab", "answer": "c"}\n' * 4)
    done = holdfast_cli(
        "attribute",
        "--model",
        "none",
        "--data",
        data,
        "--out",
        tmp_path / "prior",
        "--set",
        "evaluation.general=true",
    )
    assert done.exit_code == 2
    assert "evaluation.general: unknown key. Allowed here: batch_size, max_new_tokens." in done.output


def test_a_learner_is_loaded_from_a_run_that_was_told_more(tmp_path: Path) -> None:
    values = tiny_run(tmp_path / "run", evaluation={"scope": "needed", "zero_shot": False, "batch_size": 3})
    run(validate(RunConfig, values, "test"))
    with Learner.load(tmp_path / "run") as learner:
        assert learner.config.evaluation.batch_size == 3
        assert learner.learned


def test_a_folder_that_recorded_more_is_still_read(tmp_path: Path) -> None:
    """Learners' folders held a run's options until they were refused."""
    now = validate(LearnerConfig, {"strategy": "sequential", "evaluation": {"batch_size": 3}}, "test")
    values = now.model_dump(mode="json")
    values["evaluation"] |= {"scope": "all", "zero_shot": True}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(values))
    assert recorded_config(tmp_path, {}) == now
