"""Sequential and joint training, attribution and EWC, through the runner: what they train on and change."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from contexts import context_of
from holdfast.config import validate
from holdfast.importance import ImportancePrior
from holdfast.models import block_parameters, load_model, tiny_llama
from holdfast.runner import RunConfig, run
from holdfast.strategies import STRATEGIES, build_strategy
from holdfast.tasks import toy_suite, toy_tokenizer
from strategy_runs import FISHER, options_of
from tiny_runs import tiny_run


def run_of(output: Path, strategy: Any, **sections: Any) -> dict[str, Any]:
    """Two toy tasks, eight steps each."""
    values = tiny_run(output, strategy=strategy, **sections)
    values["tasks"] = {**values["tasks"], "order": ["copy", "flip"]}
    values["training"] = {"max_steps": 8, "batch_size": 8, "learning_rate": 3e-3}
    return run(validate(RunConfig, values, source="test"))


def weights_after(output: Path, stage: str) -> dict[str, torch.Tensor]:
    return load_file(next((output / "tasks" / stage / "model").glob("*.safetensors")))


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def distance(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    return sum(float((a[name] - b[name]).double().pow(2).sum()) for name in a) ** 0.5


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """A run on the toy Llama, made once for each strategy and its options."""
    made: dict[str, Path] = {}

    def make(strategy: Any) -> Path:
        key = json.dumps(strategy, sort_keys=True, default=str)
        if key not in made:
            made[key] = tmp_path_factory.mktemp("run") / "run"
            run_of(made[key], strategy)
        return made[key]

    return make


def test_sequential_changes_weights_at_every_task(finished: Any) -> None:
    folder = finished(options_of("sequential"))
    first, second = weights_after(folder, "01-copy"), weights_after(folder, "02-flip")
    changed = {name for name in first if not torch.equal(first[name], second[name])}
    model = tiny_llama(toy_tokenizer(), hidden=32, layers=2)
    assert changed == set(block_parameters(model)), "the linear maps in the blocks, and nothing else"
    assert not (folder / "tasks" / "02-flip" / "protection.json").exists()


@pytest.mark.parametrize(
    ("strategy", "mechanism"),
    [
        ({**options_of("attribution"), "mechanism": {"name": "anchor", "strength": 100.0}}, "anchor"),
        ({**options_of("attribution"), "mechanism": {"name": "gate", "shape": "top"}}, "gate"),
        ({**options_of("attribution"), "mechanism": {"name": "penalty", "strength": 100.0}}, "penalty"),
        ({**options_of("ewc"), "strength": 1e6}, "penalty"),
        ({**options_of("kfac"), "strength": 1e6}, "penalty"),
    ],
    ids=["anchor", "gate", "penalty", "ewc", "kfac"],
)
def test_protection_acts_from_the_second_task_on_and_keeps_weights_near(
    strategy: dict[str, Any], mechanism: str, finished: Any
) -> None:
    plain, held = finished(options_of("sequential")), finished(strategy)
    assert same(weights_after(plain, "01-copy"), weights_after(held, "01-copy")), (
        "there was nothing to protect"
    )
    start = weights_after(plain, "01-copy")
    moved, moved_held = (distance(weights_after(f, "02-flip"), start) for f in (plain, held))
    assert 0 < moved_held < 0.95 * moved
    assert not (held / "tasks" / "01-copy" / "protection.json").exists()
    protection = json.loads((held / "tasks" / "02-flip" / "protection.json").read_text())
    assert protection["mechanism"]["name"] == mechanism
    assert protection["control"] == "none"
    assert sum(protection["histogram"]["counts"]) > 0


def test_control_changes_which_weights_are_held(finished: Any) -> None:
    strategy = {**options_of("attribution"), "mechanism": {"name": "gate", "shape": "top"}}
    real, control = finished(strategy), finished({**strategy, "control": "permuted"})
    assert not same(weights_after(real, "02-flip"), weights_after(control, "02-flip"))
    said = json.loads((control / "tasks" / "02-flip" / "protection.json").read_text())
    assert said["control"] == "permuted"
    assert (
        json.loads((control / "metrics.json").read_text())["label"]
        == "attribution · fisher · gate · permuted"
    )


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({}, ""),
        ({"control": "permuted"}, " · permuted"),
        ({"importance": {"name": "inputs", "weighting": "uniform"}}, " · uniform"),
        ({"importance": {"name": "inputs", "control": "shuffled-relevance"}}, " · shuffled-relevance"),
        ({"mechanism": {"name": "anchor", "coordinates": "weights"}}, " · coordinates weights"),
        ({"merge_lora": "none"}, " · one LoRA"),
    ],
)
def test_a_control_has_a_name_of_its_own_so_that_no_table_takes_it_for_the_method(
    given: dict[str, Any], said: str
) -> None:
    model = {"toy": True, "lora": {"r": 2}}
    strategy = {"name": "attribution", **given}
    values = {"output": "runs/x", "model": model, "tasks": {"source": "toy"}, "strategy": strategy}
    assert validate(RunConfig, values, "test").title == f"attribution · inputs · anchor{said}"


def test_ewc_sums_fisher_over_tasks(finished: Any) -> None:
    folder = finished(options_of("ewc"))
    parts = [ImportancePrior.load(folder / "tasks" / s / "prior").tensors for s in ("01-copy", "02-flip")]
    total = load_file(folder / "tasks" / "02-flip" / "strategy.safetensors")
    assert all(torch.equal(total[name], parts[0][name] + parts[1][name]) for name in total)


@pytest.mark.parametrize("balance", [True, False])
@pytest.mark.parametrize("merge", ["max", "mean"])
def test_attribution_joins_priors_as_it_was_told(merge: Any, balance: bool, finished: Any) -> None:
    folder = finished({**options_of("attribution"), "merge": merge, "balance": balance})
    parts = [ImportancePrior.load(folder / "tasks" / s / "prior") for s in ("01-copy", "02-flip")]
    if balance:
        parts = [part.mean_normalised() for part in parts]
    expected = parts[0].merge(parts[1], how=merge)
    joined = load_file(folder / "tasks" / "02-flip" / "strategy.safetensors")
    assert same(joined, expected.tensors)


def test_mean_of_tasks_joined_one_by_one_is_the_mean_of_all() -> None:
    one, two, three = (ImportancePrior({"w": torch.tensor([x, 2 * x])}) for x in (3.0, 6.0, 12.0))
    joined = one.merge(two, how="mean").merge(three, how="mean")
    assert joined.tensors["w"].tolist() == [7.0, 14.0]


def test_initial_prior_weighs_as_much_as_the_tasks_after_it(tmp_path: Path) -> None:
    base = tiny_llama(toy_tokenizer(), seed=0, hidden=32, layers=2)
    tensors = {name: torch.full(p.shape, 1e-6) for name, p in block_parameters(base).items()}
    folder = ImportancePrior(tensors, {"importance": "uniform"}).save(tmp_path / "prior")
    run_of(tmp_path / "run", {**options_of("attribution"), "initial_prior": str(folder)})
    joined = load_file(tmp_path / "run" / "tasks" / "01-copy" / "strategy.safetensors")
    # the maximum of 1 everywhere and of the task's own prior of mean 1; unscaled, 1e-6 would hold nothing
    assert min(float(t.min()) for t in joined.values()) >= 1.0


def test_a_whole_initial_prior_is_cut_to_the_rank_that_tasks_are_kept_with(tmp_path: Path) -> None:
    base = tiny_llama(toy_tokenizer(), seed=0, hidden=32, layers=2)
    tensors = {name: torch.diag(torch.rand(p.shape[1])) for name, p in block_parameters(base).items()}
    folder = ImportancePrior(tensors, {"kind": "inputs"}).save(tmp_path / "prior")
    ranked = {"name": "attribution", "importance": {"name": "inputs", "rank": 3, "samples": 4}}
    run_of(tmp_path / "run", {**ranked, "initial_prior": str(folder)})
    joined = load_file(tmp_path / "run" / "tasks" / "02-flip" / "strategy.safetensors")
    assert {len(joined[name]) for name in tensors} == {4}


def test_multitask_trains_on_all_tasks_at_once_and_has_no_backward_transfer(finished: Any) -> None:
    stream = toy_suite(["copy", "flip", "head"], 4, 4)
    strategy = build_strategy(STRATEGIES["multitask"].Options())
    (stage,) = strategy.stages(stream)
    assert stage.name == "joint"
    assert list(strategy.examples(context_of(None), stage)) == [
        example for task in stream for example in task.train
    ]
    metrics = json.loads((finished(options_of("multitask")) / "metrics.json").read_text())
    assert metrics["matrix"][1] == [None, None]
    assert metrics["bwt"] is metrics["fwt"] is metrics["learning_accuracy"] is metrics["forgetting"] is None
    assert metrics["ap"] == sum(metrics["matrix"][2]) / 2


def test_prior_from_single_task_is_that_of_a_model_fine_tuned_from_the_base_on_it_alone(
    finished: Any, tmp_path: Path
) -> None:
    """A, section 4.1: the second task's prior comes from a model that never saw the first."""
    single = finished({**options_of("attribution"), "prior_from": "single_task"})
    alone = tiny_run(tmp_path / "alone", strategy=options_of("attribution"))
    alone["tasks"] = {**alone["tasks"], "order": ["flip"]}
    alone["training"] = {"max_steps": 8, "batch_size": 8, "learning_rate": 3e-3}
    # the separate model is trained with the run's own seed, the first stage of a run with the next one
    seen: list[ImportancePrior] = []
    fit_alone(alone, seen)
    there = ImportancePrior.load(single / "tasks" / "02-flip" / "prior")
    assert same(there.tensors, seen[0].tensors)
    assert there.meta["model_digest"] == seen[0].meta["model_digest"]
    sequential = finished(options_of("attribution"))
    here = ImportancePrior.load(sequential / "tasks" / "02-flip" / "prior")
    assert not same(there.tensors, here.tensors)


def fit_alone(values: dict[str, Any], seen: list[ImportancePrior]) -> None:
    """Fine-tune the base on the one task of a configuration, and compute its prior, without the runner."""
    from holdfast.importance import compute_prior
    from holdfast.tasks import Encoder, build_stream
    from holdfast.training.loop import train

    config = validate(RunConfig, values, source="test")
    (task,) = build_stream(config.tasks, config.seed)
    model, tokenizer = load_model(config.model, config.seed, toy_tokenizer)
    rows = Encoder(tokenizer, config.template, encoder_decoder=False).many(task.train)
    folder = Path(config.output) / "checkpoints"
    train(model, rows, config.training, tokenizer=tokenizer, folder=folder, seed=config.seed)
    pad = tokenizer.pad_token_id
    seen.append(compute_prior(model, rows, FISHER, pad_id=pad, seed=config.seed, task=task.name))


def test_initial_prior_protects_from_the_first_task_on(finished: Any, tmp_path: Path) -> None:
    base = tiny_llama(toy_tokenizer(), seed=0, hidden=32, layers=2)
    tensors = {name: torch.ones(p.shape) for name, p in block_parameters(base).items()}
    folder = ImportancePrior(tensors, {"importance": "uniform"}).save(tmp_path / "prior")
    frozen = {
        **options_of("attribution"),
        "mechanism": {"name": "gate", "shape": "paper"},
        "initial_prior": str(folder),
    }
    run_of(tmp_path / "run", frozen)
    start = dict(base.state_dict())
    for stage in ("01-copy", "02-flip"):
        after = weights_after(tmp_path / "run", stage)
        assert all(torch.equal(after[name], start[name]) for name in after), "a fully held weight moved"
        assert (tmp_path / "run" / "tasks" / stage / "protection.json").exists()
    plain = weights_after(finished(options_of("sequential")), "01-copy")
    assert any(not torch.equal(plain[name], start[name]) for name in plain)


def test_lora_stream_is_protected_on_the_factors(tmp_path: Path) -> None:
    model = {"toy": True, "hidden": 32, "layers": 2, "lora": {"r": 4}}
    strategy = {**options_of("attribution"), "mechanism": {"name": "gate", "shape": "top", "fraction": 1.0}}
    metrics = run_of(tmp_path / "run", strategy, model=model)
    stages = [tmp_path / "run" / "tasks" / s / "model" for s in ("01-copy", "02-flip")]
    first, second = (load_file(s / "adapter_model.safetensors") for s in stages)
    assert all("lora_" in name for name in first)
    assert same(first, second), "everything was held, so the second task changed nothing"
    assert metrics["trainable"] == sum(t.numel() for t in first.values()) < metrics["parameters"] / 4
