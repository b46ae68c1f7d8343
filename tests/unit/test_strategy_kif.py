"""KIF as a strategy: Algorithm 2 on paper, replay with held units, and the options that belong together."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from holdfast.config import validate
from holdfast.errors import ConfigError
from holdfast.runner import RunConfig, run
from holdfast.strategies import STRATEGIES, Stage, build_strategy
from holdfast.tasks.task import Example, Task
from tiny_runs import tiny_run

LORA = {"toy": True, "hidden": 32, "layers": 2, "lora": {"r": 4}}


@dataclass
class FakeContext:
    """What KIF uses of a run."""

    model: nn.Module
    folder: Path
    seed: int = 0
    write: Any = None
    fits: list[Any] = field(default_factory=list)

    def fit(self, model: Any, examples: Any, name: str, verbs: Any, epochs: Any) -> None:
        """A replay of one step of SGD that moves every weight by -1."""
        self.fits.append((list(examples), name, epochs))
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        handles = verbs.attach(model, optimizer)
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        optimizer.step()
        for handle in handles:
            handle.remove()


class FiveNumbers(nn.Module):
    """Five skill units of one number each."""

    def __init__(self) -> None:
        super().__init__()
        for name in "abcde":
            setattr(self, name, nn.Parameter(torch.zeros(1)))

    def put(self, values: list[float]) -> None:
        for name, value in zip("abcde", values, strict=True):
            getattr(self, name).data.fill_(value)

    def values(self) -> list[float]:
        return [getattr(self, name).item() for name in "abcde"]


def stage(name: str, index: int = 0) -> Stage:
    rows = [Example(f"{name}{i}", "x") for i in range(50)]
    return Stage(name, (Task(name, rows, rows[:1]),), index)


def learn(strategy: Any, context: Any, name: str, learned: list[float], scores: list[float]) -> None:
    """One task, of which training brought these weights and these scores."""
    strategy.begin(context, stage(name))
    context.model.put(learned)
    strategy._scores = lambda: torch.tensor(scores, dtype=torch.float64)
    strategy.end(context, stage(name))


def test_three_tasks_of_algorithm_2_by_hand(tmp_path: Path) -> None:
    """Static fusion (eq. 15), gamma 0.25, beta 0.7, the top fifth (one of five units) important."""
    model = FiveNumbers()
    context = FakeContext(model, tmp_path)
    strategy = build_strategy(STRATEGIES["kif"].Options(fusion={"name": "static", "gamma": 0.25}, beta=0.7))
    learn(strategy, context, "one", [1, 1, 1, 1, 1], [4, 0, 1, 2, 3])
    assert model.values() == [1, 1, 1, 1, 1], "the first task's model is taken as it is"
    assert strategy.accumulated.tolist() == [4, 0, 1, 2, 3], "and its scores"

    # old: a is important. new: b is. so a stays old, b new, the rest are averaged
    learn(strategy, context, "two", [3, 3, 3, 3, 3], [0, 8, 2, 4, 6])
    assert model.values() == [1, 3, 2, 2, 2]
    # 0.7 * [1, 0, .25, .5, .75] + 0.3 * [0, 1, .25, .5, .75]
    assert strategy.accumulated.tolist() == pytest.approx([0.7, 0.3, 0.25, 0.5, 0.75])

    # old: e is important now (0.75). new: e too, so gamma of the old, 1 - gamma of the new; the rest halves
    learn(strategy, context, "three", [5, 5, 5, 5, 6], [0, 1, 2, 3, 4])
    assert model.values() == [3, 4, 3.5, 3.5, 0.25 * 2 + 0.75 * 6]
    # Norm of [.7, .3, .25, .5, .75] is [.9, .1, 0, .5, 1]
    expected = [
        0.7 * a + 0.3 * b for a, b in zip([0.9, 0.1, 0, 0.5, 1], [0, 0.25, 0.5, 0.75, 1], strict=True)
    ]
    assert strategy.accumulated.tolist() == pytest.approx(expected)
    assert strategy.state_dict()[0].keys() == {"accumulated"}, "nothing grows with the number of tasks"
    assert strategy.state_dict()[0]["accumulated"].shape == (5,)
    record = json.loads((tmp_path / "units.json").read_text())
    assert record["names"] == list("abcde")
    assert record["scores"] == [0, 1, 2, 3, 4]
    assert record["accumulated"] == pytest.approx(expected)


def test_adaptive_fusion_by_hand(tmp_path: Path) -> None:
    """Eq. 17 with tau chosen so that a difference of 1 gives shares of 0.9 and 0.1."""
    model = FiveNumbers()
    context = FakeContext(model, tmp_path)
    tau = 1 / torch.log(torch.tensor(9.0)).item()
    strategy = build_strategy(STRATEGIES["kif"].Options(fusion={"name": "adaptive", "tau": tau}))
    learn(strategy, context, "one", [0, 0, 0, 0, 0], [2, 0, 0, 0, 2])
    learn(strategy, context, "two", [10, 10, 10, 10, 10], [0, 2, 0, 0, 2])
    assert model.values() == pytest.approx([1, 9, 5, 5, 5], rel=1e-5)


def test_replay_learns_from_the_memory_and_holds_the_new_tasks_units(tmp_path: Path) -> None:
    model = FiveNumbers()
    context = FakeContext(model, tmp_path)
    strategy = build_strategy(STRATEGIES["kif-m"].Options(memory={"count": 3}, replay_epochs=7.0))
    learn(strategy, context, "one", [1, 1, 1, 1, 1], [4, 0, 1, 2, 3])
    assert context.fits == [], "there was nothing to replay"
    learn(strategy, context, "two", [3, 3, 3, 3, 3], [0, 8, 2, 4, 6])
    ((rows, name, epochs),) = context.fits
    assert len(rows) == 3
    assert all(row.prompt.startswith("one") for row in rows), "only earlier tasks are replayed"
    assert (name, epochs) == ("replay after two", 7.0)
    # fused: [1, 3, 2, 2, 2]; the replay moves all by -1 but b, the one important unit of this task
    assert model.values() == [0, 3, 1, 1, 1]
    assert len(strategy.memory) == 6
    restored = build_strategy(strategy.options)
    restored.load_state_dict(*strategy.state_dict())
    assert restored.memory.examples == strategy.memory.examples


def test_online_fusion_blends_during_training_and_not_at_the_end(tmp_path: Path) -> None:
    model = FiveNumbers()
    context = FakeContext(model, tmp_path)
    strategy = build_strategy(STRATEGIES["kif"].Options(fusion={"name": "online", "every": 2}))
    strategy.begin(context, stage("one"))
    strategy._scores = lambda: pytest.fail("scores during the first task: it has nothing to be fused with")
    strategy.observe(model, 2, 1.0)
    learn(strategy, context, "one", [0, 0, 0, 0, 0], [1, 1, 1, 1, 1])
    strategy.begin(context, stage("two"))
    model.put([8, 8, 8, 8, 8])
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    seen = []
    for step in (1, 2, 3, 4):
        strategy.observe(model, step, 1.0)
        seen.append(model.values()[0])
    assert seen == [8, 4, 4, 2], "equal scores: half of the way back at every second step"
    strategy.end(context, stage("two"))
    assert model.values()[0] == 2


@pytest.mark.parametrize(
    ("strategy", "message"),
    [
        ({"name": "kif", "averaged": "product"}, "`units: lora` only"),
        ({"name": "kif", "unit_score": "mean"}, "`units: lora` only"),
        ({"name": "kif", "replay_epochs": 3}, "with a `memory` only"),
        ({"name": "kif-lora", "important": 0.1}, "`fusion: static` or with a `memory` only"),
        ({"name": "kif", "important": "some"}, "strategy.important"),
        ({"name": "kif", "fusion": "sometimes"}, "Allowed: 'static', 'adaptive', 'online'"),
        ({"name": "kif", "sensitivity": "third"}, "'first', 'second', 'second-batch' or 'gradient'"),
    ],
)
def test_options_that_do_nothing_or_do_not_exist_are_errors(
    strategy: Any, message: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=message.replace(".", r"\.")):
        validate(RunConfig, tiny_run(tmp_path, strategy=strategy), source="test")


@pytest.mark.parametrize(
    ("strategy", "model", "message"),
    [
        ("kif-lora", {"toy": True}, "LoRA-tailored skill units are made of LoRA's factors"),
        ({"name": "kif", "orthogonality": 0.1}, {"toy": True}, "eq. 5 is about LoRA's factors"),
        (
            {"name": "kif", "sensitivity": "second"},
            {"toy": True, "trainable": "all"},
            "linear maps only",
        ),
    ],
)
def test_what_the_method_does_not_define_is_an_error_before_training(
    strategy: Any, model: Any, message: str, tmp_path: Path
) -> None:
    config = validate(RunConfig, tiny_run(tmp_path / "run", strategy=strategy, model=model), source="test")
    with pytest.raises(ConfigError, match=message):
        run(config)
    assert not (tmp_path / "run" / "tasks").exists()


@pytest.mark.parametrize(
    "options",
    [
        {"sensitivity": "gradient"},
        {"sensitivity": {"order": "second", "smoothing": False}},
        {"sensitivity": "second-batch"},
        {"fusion": "static", "important": "distribution"},
        {"fusion": {"name": "online", "every": 2}},
        {"averaged": "product"},
        {"unit_score": "mean"},
        {"orthogonality": 0.1},
        {"units": "matrix"},
    ],
    ids=str,
)
def test_each_option_changes_the_outcome(options: dict[str, Any], tmp_path: Path, plain: Any) -> None:
    assert outcome(tmp_path / "run", {"name": "kif-lora", **options}) != plain, options


@pytest.mark.parametrize("name", ["kif", "kif-m", "kif-lora-m", "weight-ensemble", "ema"])
def test_each_method_changes_what_training_leaves(name: str, tmp_path: Path, sequential: Any) -> None:
    """Against plain fine-tuning; the first task alone is left as it was learned, but by EMA."""
    strategy: dict[str, Any] = {"name": name}
    if name in ("kif-m", "kif-lora-m"):
        strategy["memory"] = {"count": 8}
    assert outcome(tmp_path / "run", strategy, "02-flip") != sequential["02-flip"]
    same = outcome_in(tmp_path / "run", "01-copy") == sequential["01-copy"]
    assert same == (name != "ema")


def test_replay_changes_what_fusion_leaves(tmp_path: Path) -> None:
    with_memory = outcome(tmp_path / "m", {"name": "kif-lora-m", "memory": {"count": 8}})
    assert with_memory != outcome(tmp_path / "k", {"name": "kif-lora"})


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return outcome(tmp_path_factory.mktemp("kif") / "run", {"name": "kif-lora"})


@pytest.fixture(scope="module")
def sequential(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("plain") / "run"
    return {"02-flip": outcome(folder, {"name": "sequential"}), "01-copy": outcome_in(folder, "01-copy")}


def outcome(folder: Path, strategy: dict[str, Any], stage: str = "02-flip") -> Any:
    """All weights after two short tasks with LoRA."""
    values = tiny_run(folder, strategy=strategy, model=LORA)
    values["tasks"] = {**values["tasks"], "order": ["copy", "flip"], "test_rows": 2}
    values["training"] = {"max_steps": 6, "batch_size": 8, "learning_rate": 3e-2}
    values["evaluation"] = {"zero_shot": False, "scope": "needed", "max_new_tokens": 1}
    run(validate(RunConfig, values, source="test"))
    return outcome_in(folder, stage)


def outcome_in(folder: Path, stage: str) -> Any:
    tensors = load_file(folder / "tasks" / stage / "model" / "adapter_model.safetensors")
    return [tensors[name].tolist() for name in sorted(tensors)]


@pytest.mark.parametrize("name", sorted(STRATEGIES))
def test_a_resolved_configuration_can_be_read_back(name: str, tmp_path: Path) -> None:
    config = validate(RunConfig, tiny_run(tmp_path, strategy=name), source="test")
    assert validate(RunConfig, config.model_dump(mode="json"), source="test") == config


# the coarse relatives of Table V


def test_weight_ensemble_is_equation_14(tmp_path: Path) -> None:
    model = FiveNumbers()
    stages = [stage("one"), stage("two", 1)]
    context = FakeContext(model, tmp_path)
    strategy = build_strategy(STRATEGIES["weight-ensemble"].Options(old_share=0.25))
    for this, learned in zip(stages, ([4, 4, 4, 4, 4], [8, 8, 8, 8, 0]), strict=True):
        strategy.begin(context, this)
        model.put(learned)
        strategy.end(context, this)
        if this is stages[0]:
            assert model.values() == [4, 4, 4, 4, 4], "the first task has nothing to be averaged with"
    assert model.values() == [7, 7, 7, 7, 1]


def test_ema_is_the_running_average_of_all_steps(tmp_path: Path) -> None:
    model = FiveNumbers()
    context = FakeContext(model, tmp_path)
    strategy = build_strategy(STRATEGIES["ema"].Options(decay=0.75))
    model.put([2, 2, 2, 2, 2])
    strategy.begin(context, stage("one"))
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    (handle,) = strategy.attach(model, optimizer)
    for _ in range(2):
        for p in model.parameters():
            p.grad = torch.full_like(p, 4.0)
        optimizer.step()
    handle.remove()
    assert model.values() == [-6] * 5, "the average does not disturb the training"
    strategy.end(context, stage("one"))
    # 0.75 * (0.75 * 2 + 0.25 * -2) + 0.25 * -6
    assert model.values() == [-0.75] * 5
