"""Loggers of a Trainer (`report_to`): they get what each task measured, before they hear of its end."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.integrations import integration_utils

from holdfast import Learner
from holdfast.config import validate
from holdfast.runner import RunConfig, run
from holdfast.tasks import toy_tokenizer
from tiny_models import tiny_model
from tiny_runs import tiny_run

ROWS, TEST = ([{"prompt": f"{i}=", "completion": "ab"} for i in part] for part in (range(8), range(8, 12)))
TRAINING = {"max_steps": 2, "batch_size": 4, "learning_rate": 1e-2}


class Logger(TrainerCallback):
    """Notes what it is told, in the order in which it is told; as MLflow's takes nothing after the end."""

    told: list[tuple[str, dict[str, Any]]]

    def __init__(self) -> None:
        self.open = False

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.open = True

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        assert self.open
        kind = "measured" if any(name.startswith("eval_") for name in logs) else "log"
        self.told.append((kind, dict(logs)))

    def on_train_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        assert model is not None
        self.open = False
        self.told.append(("end", {}))


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, dict[str, Any]]]:
    monkeypatch.setattr(integration_utils, "is_tensorboard_available", lambda: True)
    monkeypatch.setitem(integration_utils.INTEGRATION_TO_CALLBACK, "tensorboard", Logger)
    monkeypatch.setattr(Logger, "told", [], raising=False)
    return Logger.told


def measured(told: list[tuple[str, dict[str, Any]]]) -> list[dict[str, Any]]:
    return [figures for kind, figures in told if kind == "measured"]


def test_each_task_s_scores_ap_bwt_and_kl_are_logged_before_the_end_of_its_training(told: Any) -> None:
    with Learner(tiny_model("llama"), toy_tokenizer(), "sequential", base_model=lambda: tiny_model("llama"),
                 training={**TRAINING, "report_to": "tensorboard"},
                 evaluation={"general": True, "general_rows": 2}) as learner:  # fmt: skip
        for name in ("a", "b"):
            with learner.task(name, ROWS, TEST) as stage:
                stage.train()
        known = learner.skills()
    kinds = [kind for kind, _ in told if kind != "log"]
    assert kinds == ["measured", "end", "measured", "end"]
    first, second = measured(told)
    assert [first["eval_tasks_learned"], second["eval_tasks_learned"]] == [1, 2]
    assert first["eval_score/a"] == first["eval_ap"] == known.skills[0].then
    assert "eval_bwt" not in first  # of one task there is none
    figures = known.metrics()
    assert (second["eval_ap"], second["eval_bwt"]) == (figures["ap"], figures["bwt"])
    assert second["eval_kl_base"] == known.skills[1].kl_base
    assert second["eval_kl_new"] == known.skills[1].kl_new


def test_a_run_logs_what_its_metrics_say_and_counts_a_task_that_comes_again_once(
    told: Any, tmp_path: Path
) -> None:
    values = tiny_run(tmp_path / "run", training={**TRAINING, "report_to": "tensorboard"})
    values["tasks"] = {**values["tasks"], "order": ["copy", "flip", "copy"]}
    metrics = run(validate(RunConfig, values, "test"))
    last = measured(told)[-1]
    assert {key: last[f"eval_{key}"] for key in ("ap", "bwt", "learning_accuracy")} == {
        key: metrics[key] for key in ("ap", "bwt", "learning_accuracy")
    }


def test_a_logger_of_the_user_s_trainer_gets_them_too_and_is_closed_after_an_error(
    told: Any, tmp_path: Path
) -> None:
    args = TrainingArguments(
        str(tmp_path / "out"),
        max_steps=2,
        per_device_train_batch_size=4,
        use_cpu=True,
        report_to="tensorboard",
        save_strategy="no",
    )
    with Learner(tiny_model("llama"), toy_tokenizer(), "sequential") as learner:
        with learner.task("a", ROWS, TEST) as stage:
            stage.trainer(Trainer, args=args).train()
        assert [kind for kind, _ in told if kind != "log"] == ["measured", "end"]
        with pytest.raises(ZeroDivisionError):
            fail(learner, args)
    assert told[-1][0] == "end"
    assert len(measured(told)) == 1


def fail(learner: Learner, args: Any) -> None:
    """A script's error between the training and the end of the task."""
    with learner.task("b", ROWS) as stage:
        stage.trainer(Trainer, args=args).train()
        raise ZeroDivisionError
