"""What `holdfast check` says that a run will take is what it takes."""

from __future__ import annotations

import contextlib
import importlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from holdfast.config import validate
from holdfast.errors import ConfigError
from holdfast.hold import Anchor
from holdfast.hold.cost import prior_costs, trained_bytes
from holdfast.importance import ImportancePrior, compute_prior
from holdfast.importance.inputs import InputsOptions
from holdfast.importance.lrp import LrpOptions
from holdfast.models import LoraOptions, add_lora, block_parameters, tiny_llama
from holdfast.runner import RunConfig, run
from holdfast.runner.findings import check
from holdfast.strategies import STRATEGIES, Stage, build_strategy
from holdfast.tasks import toy_suite, toy_tokenizer
from holdfast.training.teacher import Teacher

STREAM = toy_suite(["copy", "flip", "head", "tail"], 8, 2)


def model(lora: bool = False) -> Any:
    made = tiny_llama(toy_tokenizer(), hidden=16, layers=1, heads=2)
    return add_lora(made, LoraOptions(r=4)) if lora else made


@pytest.mark.parametrize("rank", [None, 3])
def test_prior_and_eigenvectors_take_what_is_said(rank: int | None) -> None:
    made = model()
    names = block_parameters(made)
    prior = ImportancePrior(
        {n: torch.diag(torch.arange(1.0, p.shape[1] + 1)) for n, p in names.items()},
        {"kind": "inputs"},
    )
    prior = prior if rank is None else prior.leading(rank)
    anchor = Anchor(prior, strength=1.0)
    anchor.attach(made, torch.optim.SGD(names.values(), lr=0.1))
    kept = held_by(anchor.spectrum.directions.values())
    costs = {cost.what: cost.size for cost in prior_costs(made, InputsOptions(rank=rank))}
    (size,) = (size for what, size in costs.items() if "prior" in what)
    assert size == held_by(prior.tensors.values())
    (size,) = (size for what, size in costs.items() if "eigenvectors" in what)
    wide = 1.5 if rank is None else 2.0  # in float32: the matrix, or two of K columns
    assert size == kept * wide


def test_a_prior_larger_than_its_weights_says_what_makes_it_smaller(monkeypatch: pytest.MonkeyPatch) -> None:
    wide = tiny_llama(toy_tokenizer(), hidden=16, layers=1, heads=2)
    assert not any(cost.note for cost in prior_costs(wide, InputsOptions())), "a small one troubles nobody"
    monkeypatch.setattr("holdfast.hold.cost.LARGE", 0)
    notes = [cost.note for cost in prior_costs(wide, InputsOptions())]
    sizes = {n: p.shape for n, p in block_parameters(wide).items()}
    assert sum(i * i for _, i in sizes.values()) > sum(o * i for o, i in sizes.values())
    assert "strategy.importance.rank=4 keeps a quarter" in notes[0]
    assert not any(cost.note for cost in prior_costs(wide, InputsOptions(rank=4)))
    adapted = add_lora(wide, LoraOptions(r=2, target_modules="all-linear"))
    assert not any(cost.note for cost in prior_costs(adapted, InputsOptions())), "smaller than the model"


def test_what_is_advised_for_a_lora_is_a_share_of_its_maps_not_of_its_rank(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("holdfast.hold.cost.LARGE", 0)
    adapted = add_lora(
        tiny_llama(toy_tokenizer(), hidden=256, layers=1, heads=2),
        LoraOptions(r=2, target_modules=["q_proj", "o_proj", "down_proj"]),
    )
    for parameter in [p for p in adapted.parameters() if not p.requires_grad]:
        parameter.data = parameter.data[:1]  # as if the rest of the model were small
    notes = [cost.note for cost in prior_costs(adapted, InputsOptions())]
    assert "larger than the model; strategy.importance.rank=64 keeps a quarter" in notes[0]


def held_by(tensors: Any) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def costs_of(name: str, made: nn.Module, **options: Any) -> dict[str, int]:
    strategy = build_strategy(STRATEGIES[name].Options(**options))
    return {cost.what: cost.size for cost in strategy.estimate(made, STREAM).costs}


@pytest.mark.parametrize("lora", [False, True])
def test_lwf_keeps_one_copy_of_what_is_trained(lora: bool) -> None:
    made = model(lora)
    (size,) = costs_of("lwf", made).values()
    assert size == held_by(Teacher(made).weights.values())


@pytest.mark.parametrize(("name", "width"), [("ema", 4), ("weight-ensemble", 2)])
def test_an_average_is_one_copy_of_what_is_trained(name: str, width: int) -> None:
    made = model().to(torch.bfloat16)
    (size,) = costs_of(name, made).values()
    assert size == width * sum(p.numel() for p in made.parameters())


@dataclass
class FakeContext:
    """What EWC uses of a run."""

    model: nn.Module
    folder: Path

    def importance(self, task: Any, options: Any) -> ImportancePrior:
        return compute_prior(self.model, [], "uniform", pad_id=0)


@pytest.mark.parametrize(("variant", "kept"), [("sum", 1), ("online", 1), ("separate", 3)])
def test_ewc_keeps_as_many_fishers_as_estimated(variant: str, kept: int, tmp_path: Path) -> None:
    made = model()
    context: Any = FakeContext(made, tmp_path)
    strategy: Any = build_strategy(STRATEGIES["ewc"].Options(variant=variant))
    for task in STREAM.tasks[:-1]:
        strategy.begin(context, Stage(task.name, (task,)))
        strategy.end(context, Stage(task.name, (task,)))
    fishers, protection, _ = costs_of("ewc", made, variant=variant).values()
    assert len(strategy.fishers) == kept
    assert fishers == held_by(t for fisher in strategy.fishers for t in fisher.tensors.values())
    strategy.begin(context, Stage("last", STREAM.tasks[-1:]))
    references: list[Tensor] = [t for penalty in strategy._penalties for t in penalty.reference.values()]
    assert protection == 2 * held_by(references), "the reference, and the factors of the same size"


def test_eq_11_holds_k_values_of_each_weight_8_by_default() -> None:
    made, sizes = model(), {}
    for k in (None, 8, 3):
        options = LrpOptions(aggregate="topk", top_k=k)
        sizes[k] = prior_costs(made, options)[-1].size
    weights = sum(p.numel() for p in block_parameters(made).values())
    assert sizes[None] == sizes[8] == sizes[3] + 5 * 4 * weights
    assert sizes[3] == prior_costs(made, LrpOptions())[-1].size + 2 * 4 * weights


def test_what_a_prior_does_not_rate_is_noted() -> None:
    made = model()
    options = LrpOptions()
    rated = sum(p.numel() for p in block_parameters(made).values())
    assert not any(cost.note for cost in prior_costs(made, STRATEGIES["ewc"].Options().fisher))
    notes = [cost.note for cost in prior_costs(made, options) if cost.note]
    assert [note.split()[0] for note in notes] == [f"{trained_bytes(made, each=1) - rated:,}"]
    for name, p in made.named_parameters():
        p.requires_grad_(name in block_parameters(made))
    assert not any(cost.note for cost in prior_costs(made, options))


@pytest.mark.parametrize("name", sorted(STRATEGIES))
def test_every_strategy_can_be_estimated(name: str) -> None:
    strategy = build_strategy(STRATEGIES[name].Options())
    fitting = []
    for made in (model(), model(lora=True)):
        with contextlib.suppress(ConfigError):
            strategy.check(made)
            fitting.append(made)
    assert fitting
    for made in fitting:
        estimate = strategy.estimate(made, STREAM)
        assert all(cost.size > 0 for cost in estimate.costs)
        assert estimate.trained is None or (estimate.trained > 0) is strategy.trains


REPLAYED = {"ratio": 0.5, "memory": {"count": 3}}


@pytest.mark.parametrize(
    "sections",
    [{"strategy": {"name": "replay", **REPLAYED}}, {"replay": REPLAYED}],
    ids=["strategy", "section"],
)
def test_steps_are_estimated_with_replayed_rows(sections: dict[str, Any], tmp_path: Path, tiny: Any) -> None:
    values = tiny(tmp_path / "r", **sections)
    values["model"] = {"toy": True, "hidden": 16, "layers": 1}
    values["tasks"] = {"source": "toy", "order": ["copy", "flip"], "train_rows": 8, "test_rows": 1}
    values["training"] = {"epochs": 1, "batch_size": 8}
    values["evaluation"] = {"zero_shot": False, "scope": "needed"}
    config = validate(RunConfig, values, "test")
    (estimated,) = [much for what, much in check(config).estimate if what == "optimizer steps"]
    run(config)
    steps = [
        json.loads((tmp_path / "r" / "tasks" / stage / "training.json").read_text())["steps"]
        for stage in ("01-copy", "02-flip")
    ]
    assert steps == [1, 2]
    assert estimated == f"{sum(steps)} ({', '.join(map(str, steps))} by stage)"


@pytest.mark.parametrize(
    ("strategy", "aside"),
    [
        (
            {"name": "kif", "memory": {"count": 9}, "replay_epochs": 2},
            [4, 6],
        ),  # 9 and 18 rows in batches of 8
        ({"name": "attribution", "importance": "fisher", "prior_from": "single_task"}, [3, 3, 3]),
        ({"name": "attribution", "importance": "fisher"}, []),
    ],
    ids=["kif", "single-task", "sequential"],
)
def test_trainings_aside_are_estimated_as_they_are_made(
    strategy: dict[str, Any], aside: list[int], tmp_path: Path, tiny: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner: Any = importlib.import_module("holdfast.learner.aside")
    values = tiny(tmp_path / "r", strategy=strategy)
    values["model"] = {"toy": True, "hidden": 16, "layers": 1, "lora": {"r": 2}}
    values["tasks"] = {"source": "toy", "order": ["copy", "flip", "head"], "train_rows": 20, "test_rows": 1}
    values["training"] = {"epochs": 1, "batch_size": 8}
    values["evaluation"] = {"zero_shot": False, "scope": "needed"}
    config = validate(RunConfig, values, "test")
    estimated = [much for what, much in check(config).estimate if what == "further optimizer steps"]
    made, train = [], runner.train

    def counting(*args: Any, folder: Path, **kwargs: Any) -> Any:
        record = train(*args, folder=folder, **kwargs)
        made.extend([record.steps] if "aside" in folder.parts else [])
        return record

    monkeypatch.setattr(runner, "train", counting)
    run(config)
    assert made == aside
    assert estimated == ([f"{sum(aside)} ({', '.join(map(str, aside))})"] if aside else [])


TRAINED = [
    ("sequential", {}),
    ("sequential", {"lora": True}),
    ("freeze", {"blocks": 1}),
    ("freeze", {"blocks": 1, "from_task": 2}),
    ("osf", {"rank": 0.3}),
    ("osf", {"schedule": "growing"}),
    ("prog-prompt", {}),
    ("prog-prompt", {"reparametrise": False}),
    ("l2p", {}),
    ("inc-lora", {"lora": True}),
    ("inf-lora", {"lora": True}),
    ("lora-moe", {"lora": True, "experts": 2}),
]


@pytest.mark.parametrize(("name", "options"), TRAINED, ids=lambda v: v if isinstance(v, str) else None)
def test_what_is_estimated_to_be_trained_is_what_the_run_trains(
    name: str, options: dict[str, Any], tmp_path: Path, tiny: Any
) -> None:
    lora = {"lora": {"r": 2}} if options.pop("lora", False) else {}
    values = tiny(tmp_path / "r", strategy={"name": name, **options})
    values["model"] = {"toy": True, "hidden": 16, "layers": 2, **lora}
    values["tasks"] = {"source": "toy", "order": ["copy", "flip"], "train_rows": 8, "test_rows": 1}
    values["training"] = {"epochs": 1, "batch_size": 8}
    values["evaluation"] = {"zero_shot": False, "scope": "needed"}
    config = validate(RunConfig, values, "test")
    (estimated,) = [much for what, much in check(config).estimate if what == "parameters"]
    metrics = run(config)
    assert metrics["trainable"] > 0
    assert f"({metrics['trainable']:,} trained)" in estimated


def test_a_method_that_does_not_fit_the_model_is_a_problem_without_an_estimate(
    tmp_path: Path, tiny: Any
) -> None:
    values = tiny(tmp_path / "r", strategy="l2p")
    values["model"] = {"toy": True, "hidden": 16, "layers": 1, "lora": {"r": 2}}
    findings = check(validate(RunConfig, values, "test"))
    assert [problem.split(":")[0] for problem in findings.problems] == ["model.lora"]
    assert not findings.estimate
