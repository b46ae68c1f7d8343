"""An option that does nothing beside another is refused, whoever sets it, and its default never is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from holdfast import Learner, ProtectCallback
from holdfast.config import Options, validate
from holdfast.errors import ConfigError, DataError
from holdfast.hold import AnchorOptions, Directions, Project
from holdfast.importance.prior import ImportancePrior
from holdfast.importance.sensitivity import SensitivityOptions
from holdfast.learner.config import LearnerConfig, LearnerEvaluationOptions, ProtectBaseOptions
from holdfast.models import ModelOptions, load_model
from holdfast.progress import Progress
from holdfast.runner import RunConfig, run
from holdfast.runner.attribute import attribute_to_folder
from holdfast.strategies import STRATEGIES, build_strategy
from holdfast.sweep.grid import Grid
from holdfast.tasks import toy_tokenizer
from holdfast.tasks.cl_benchmark import ClBenchmarkSource
from holdfast.tasks.hub import HubTask
from holdfast.tasks.sources import build_stream
from holdfast.tasks.toy import ToySource
from holdfast.training.options import TrainingOptions
from learning_data import rows_of, write_rows
from tiny_models import tiny_model
from tiny_runs import tiny_run

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
    (ATTRIBUTION, {"importance": "uniform"}, {"balance": False}),
    (ATTRIBUTION, {"importance": "uniform"}, {"prior_from": "single_task"}),
    (ATTRIBUTION, {"importance": "random"}, {"prior_from": "single_task"}),
    (AnchorOptions, {"strength": 0}, {"every": 2}),
    (AnchorOptions, {"pull": 0}, {"every": 2}),
    (TrainingOptions, {"scheduler": "constant"}, {"warmup_steps": 3}),
    (LearnerEvaluationOptions, {}, {"general_rows": 8}),
    (ModelOptions, {"toy": True}, {"random_init": True}),
    (ProtectBaseOptions, {"general": "chats.jsonl"}, {"tokens": 8}),
    (SensitivityOptions, {"smoothing": False}, {"alpha1": 0.5}),
    (SensitivityOptions, {"smoothing": False}, {"alpha2": 0.5}),
    (STRATEGIES["c-lora"].Options, {"strength": 0}, {"share": 0.3}),
    (STRATEGIES["fisher-mask"].Options, {"masked": 0}, {"unit": "weight"}),
    (STRATEGIES["fisher-mask"].Options, {"masked": 0}, {"fisher": {"samples": 8}}),
    (STRATEGIES["sapt-lora"].Options, {"reflection": 0}, {"memory": {"count": 8}}),
    (STRATEGIES["sapt-prompt"].Options, {"reflection": 0}, {"memory": {"count": 8}}),
    (STRATEGIES["ssr"].Options, {"candidates": 8, "count": 8}, {"clusters": 4}),
    (ToySource, {}, {"bad_rows": "skip"}),
    (HubTask, {"path": "rows.csv"}, {"revision": "main"}),
    (HubTask, {"path": {"train": "rows.csv"}}, {"config": "small"}),
    (ClBenchmarkSource, {"path": "data", "prompt": "{input}"}, {"instructions": {"TC": "Topic?"}}),
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


def test_a_share_of_zero_under_which_every_sensitivity_would_be_zero_is_refused() -> None:
    with pytest.raises(ConfigError, match="alpha1: Input should be greater than 0"):
        validate(SensitivityOptions, {"alpha1": 0}, "test")


@pytest.mark.parametrize(
    ("options", "trainable", "message"),
    [
        ({"embeddings": False}, "blocks", r"strategy\.embeddings: false does nothing here"),
        ({"blocks": 0}, "blocks", r"strategy\.blocks: with 0 nothing that is trained is frozen"),
        ({"blocks": 0, "embeddings": False}, "all", r"strategy\.blocks: with 0 nothing that is trained"),
    ],
)
def test_a_freeze_that_freezes_nothing_of_what_is_trained_is_refused(
    options: dict[str, Any], trainable: Any, message: str
) -> None:
    model, _ = load_model(ModelOptions(toy=True, hidden=32, layers=2, trainable=trainable), 0, toy_tokenizer)
    Freeze = STRATEGIES["freeze"].Options
    with pytest.raises(ConfigError, match=message):
        build_strategy(validate(Freeze, options, "test")).check(model)
    build_strategy(validate(Freeze, {}, "test")).check(model)


@pytest.mark.parametrize(
    ("options", "where", "message"),
    [
        (
            {"others": "lrp"},
            {"lora": None},
            r"strategy\.others: lrp does nothing here: of what is trained",
        ),
        ({"merge_lora": "none"}, {"lora": None}, r"strategy\.merge_lora: none does nothing here"),
        ({"merge_lora": "none", "importance": "fisher"}, {}, r"strategy\.merge_lora: none does nothing here"),
    ],
)
def test_a_choice_for_weights_that_the_model_does_not_train_is_refused(
    options: dict[str, Any], where: dict[str, Any], message: str
) -> None:
    def check(options: dict[str, Any], **model: Any) -> None:
        made, _ = load_model(ModelOptions(toy=True, hidden=32, layers=1, **model), 0, toy_tokenizer)
        build_strategy(validate(ATTRIBUTION, options, "test")).check(made)

    with pytest.raises(ConfigError, match=message):
        check(options, **where)
    if "others" in options:
        check({"others": "taylor"}, trainable="all")
        check({"others": "none"}, **where)  # which says what is so
    else:
        check(options, lora={})
    recorded = validate(ATTRIBUTION, {}, "test").model_dump(mode="json")
    check(recorded, **where)


@pytest.mark.skipif(torch.cuda.is_available(), reason="fp16 counts on a GPU")
def test_half_precision_that_a_cpu_would_leave_out_is_refused_before_training(tmp_path: Path) -> None:
    values = tiny_run(tmp_path / "run", training={"precision": "fp16", "max_steps": 1})
    with pytest.raises(ConfigError, match=r"training\.precision: fp16 does nothing without a CUDA GPU"):
        run(validate(RunConfig, values, "test"))
    learner = learner_of("sequential", training={"precision": "fp16", "max_steps": 1})
    with (
        pytest.raises(ConfigError, match=r"training\.precision: fp16 does nothing without a CUDA GPU"),
        learner.task("may", rows_of("may", 8)) as stage,
    ):
        stage.train()


# tasks


def test_answers_to_choose_from_are_refused_for_a_task_whose_metric_asks_for_none() -> None:
    values = {"order": ["copy", "kind"], "options": {"kind": ["low", "high"]}}
    refused = r"tasks\.options\.kind: does nothing with the metric 'exact_match'; leave it out, or set"
    with pytest.raises(DataError, match=refused):
        build_stream(ToySource(**values))
    _, kind = build_stream(ToySource(**values, metric={"kind": "options"}))
    assert kind.options == ("low", "high")


def test_an_instruction_by_name_is_refused_for_data_that_have_their_own(tmp_path: Path) -> None:
    data = tmp_path / "QA" / "boolq"
    data.mkdir(parents=True)
    rows = [{"input": "one", "output": ["yes"]}, {"input": "two", "output": ["no"]}]
    for part in ("train", "test"):
        (data / f"{part}.json").write_text(json.dumps({"Definition": ["Yes or no?"], "Instances": rows}))
    with pytest.raises(DataError, match=r"'boolq' does nothing to .*, which has a Definition of its own"):
        build_stream(ClBenchmarkSource(path=tmp_path, instructions={"boolq": "Say it."}))
    (task,) = build_stream(ClBenchmarkSource(path=tmp_path, instructions={"QA": "Of those that have none."}))
    assert task.train[0].prompt.startswith("Yes or no?")


# a sweep


def test_what_a_sweep_sets_over_while_choosing_is_refused(tmp_path: Path) -> None:
    def grid_of(changes: dict[str, Any]) -> dict[str, Any]:
        rate = {"name": "a", "grid": {"training.learning_rate": [1e-3, 1e-2]}}
        return {"output": "x", "base": tiny_run(tmp_path), "rows": [rate], "choose": {"set": changes}}

    with pytest.raises(ConfigError, match=r"'tasks\.test_split' is set by `on`, while choosing"):
        validate(Grid, grid_of({"tasks.test_split": "test"}), "test")
    with pytest.raises(ConfigError, match=r"row 'a' tries values of it, which would all be the same"):
        validate(Grid, grid_of({"training.learning_rate": 1e-4}), "test")
    validate(Grid, grid_of({"tasks.train_rows": 8}), "test")


# in a script


def learner_of(*given: Any, **sections: Any) -> Learner:
    return Learner(tiny_model("llama"), toy_tokenizer(), *given, **sections)


def test_sections_beside_a_whole_configuration_are_refused() -> None:
    whole = validate(LearnerConfig, {"strategy": "sequential"}, "test")
    with pytest.raises(ConfigError, match="got training, seed beside a LearnerConfig"):
        learner_of(whole, training={"max_steps": 2}, seed=3)
    learner_of(whole)


def test_a_learner_takes_the_threads_that_it_is_told() -> None:
    before = torch.get_num_threads()
    try:
        learner_of("sequential", threads=before + 1)
        assert torch.get_num_threads() == before + 1
    finally:
        torch.set_num_threads(before)


def test_answers_to_choose_from_are_refused_of_a_learner_s_task_without_that_metric() -> None:
    task = learner_of("sequential").task("may", rows_of("may", 8), options=["a", "b"])
    with (
        pytest.raises(ConfigError, match="task 'may': `options` do nothing with the metric 'exact_match'"),
        task,
    ):
        pass


def test_a_metric_that_does_not_fit_running_text_is_refused_and_not_changed() -> None:
    texts = [{"text": "abc def"}] * 4
    task = learner_of("sequential").task("may", texts, texts, metric="rouge_l")
    with pytest.raises(DataError, match="perplexity"), task:
        pass


@pytest.mark.parametrize(
    "mechanism",
    [{"mechanism": "gate"}, {"mechanism": "project", "on": "gradient"}],
    ids=["gate", "projected gradients"],
)
def test_weights_to_return_to_are_refused_for_what_returns_to_none(mechanism: dict[str, Any]) -> None:
    prior, weights = ImportancePrior({"w": torch.ones(2)}), {"w": torch.zeros(2)}
    with pytest.raises(ConfigError, match="`reference` does nothing with"):
        ProtectCallback(prior, **mechanism, reference=weights)
    ProtectCallback(prior, **mechanism, beside=prior, reference=weights)


def test_a_memory_by_surprise_keeps_the_share_of_the_base_s_rows_that_it_is_told(tmp_path: Path) -> None:
    general = write_rows(tmp_path / "general.jsonl", rows_of("general", 8))
    learner = learner_of(
        "sequential",
        training={"max_steps": 1, "batch_size": 8},
        protect_base={"general": str(general)},
        replay={"memory": {"sampling": "surprise", "fraction": 0.5}},
    )
    with learner.task("may", rows_of("may", 8)) as stage:
        stage.train()
    assert learner.state.replay is not None
    kept = [task for task, _ in learner.state.replay.memory.rows]
    assert (kept.count("base"), kept.count("may")) == (4, 4)


# the commands


def test_answers_are_not_to_be_set_where_attribute_asks_nothing(tmp_path: Path) -> None:
    data = write_rows(tmp_path / "may.jsonl", rows_of("may", 8))
    with pytest.raises(
        ConfigError, match=r"--set evaluation\.batch_size=3 does nothing without --test-faith"
    ):
        attribute_to_folder(
            model="nowhere",
            data=data,
            out=tmp_path / "prior",
            importance="fisher",
            assignments=["evaluation.batch_size=3"],
            faithfulness=False,
            dtype="float32",
            seed=0,
            progress=Progress(quiet=True),
        )


@pytest.mark.parametrize(
    ("prior", "values", "said"),
    [
        (Directions(), {"share": 0.5}, "`share` does nothing with directions"),
        (
            ImportancePrior({}),
            {"on": "gradient", "reference": {}},
            "`reference` does nothing on the gradient",
        ),
    ],
)
def test_what_a_projection_would_ignore_is_refused(prior: Any, values: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        Project(prior, **values)
