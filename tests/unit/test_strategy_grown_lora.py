"""inc-lora and o-lora: a block of ranks a task, the earlier ones untouched, and O-LoRA's penalty."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from contexts import context_of, stage_of
from holdfast.config import validate
from holdfast.errors import ConfigError
from holdfast.models import LoraOptions, ModelOptions, add_lora, load_model, tiny_llama
from holdfast.models.adapters import lora_factors
from holdfast.runner import RunConfig, run
from holdfast.runner.findings import check
from holdfast.strategies import STRATEGIES, Strategy, build_strategy
from holdfast.tasks import toy_suite, toy_tokenizer
from tiny_runs import tiny_run

TOKENIZER = toy_tokenizer()
STREAM = toy_suite(["copy", "flip", "head"], 4, 2)
STAGES = ["01-copy", "02-flip", "03-head"]
R = 4
INC, O = {"name": "inc-lora"}, {"name": "o-lora", "orthogonality": 5.0}


def values_of(output: Path, strategy: Any, **sections: Any) -> dict[str, Any]:
    values = tiny_run(output, strategy=strategy)
    lora = {"r": R, "alpha": 8.0, "target_modules": ["q_proj", "v_proj"]}
    values["model"] = {"toy": True, "hidden": 32, "layers": 1, "lora": lora}
    values["tasks"] = {**values["tasks"], "train_rows": 8, "test_rows": 1}
    values["training"] = {"max_steps": 60, "batch_size": 8, "learning_rate": 1e-2, "weight_decay": 0.1}
    return {**values, **sections}


def config_of(values: dict[str, Any]) -> RunConfig:
    return validate(RunConfig, values, source="test")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Any], Path]:
    """A run of three toy tasks, made once for each strategy."""
    made: dict[str, Path] = {}

    def make(strategy: Any) -> Path:
        key = json.dumps(strategy)
        if key not in made:
            made[key] = tmp_path_factory.mktemp("run") / "run"
            values = values_of(made[key], strategy)
            if strategy["name"] == "sequential":
                values["tasks"]["order"] = ["copy"]
            run(config_of(values))
        return made[key] / "tasks"

    return make


def weights_in(stage: Path) -> dict[str, Tensor]:
    return load_file(stage / "model" / "adapter_model.safetensors")


def split(name: str, tensor: Tensor, at: int) -> tuple[Tensor, Tensor]:
    """The ranks before and from `at` on."""
    return tensor.tensor_split([at], dim=0 if ".lora_A." in name else 1)  # type: ignore[return-value]


def smallest_angle(one: Tensor, other: Tensor) -> float:
    """The smallest principal angle between two row spaces, in degrees."""
    bases = [torch.linalg.qr(rows.double().T)[0] for rows in (one, other)]
    return float(torch.rad2deg(torch.acos(torch.linalg.svdvals(bases[0].T @ bases[1]).max().clamp(max=1))))


# runs


@pytest.mark.parametrize("strategy", [INC, O], ids=["inc-lora", "o-lora"])
def test_earlier_factors_are_bit_identical_after_later_tasks_and_new_ones_are_trained(
    strategy: Any, finished: Any
) -> None:
    folders = [finished(strategy) / stage for stage in STAGES]
    for number in (1, 2):
        before, after = weights_in(folders[number - 1]), weights_in(folders[number])
        assert before.keys() == after.keys()
        for name, tensor in after.items():
            old, new = split(name, tensor, number * R)
            assert torch.equal(old, before[name]), name
            assert bool(new.any())
            assert min(new.shape) == R


@pytest.mark.parametrize("strategy", [INC, O], ids=["inc-lora", "o-lora"])
def test_first_task_is_that_of_sequential_lora(strategy: Any, finished: Any) -> None:
    one, other = (weights_in(finished(s) / STAGES[0]) for s in (strategy, {"name": "sequential"}))
    assert all(torch.equal(one[name], other[name]) for name in other)


def test_penalty_changes_training_from_the_second_task_on(finished: Any) -> None:
    (inc1, inc2), (o1, o2) = ([weights_in(finished(s) / stage) for stage in STAGES[:2]] for s in (INC, O))
    assert all(torch.equal(inc1[name], o1[name]) for name in inc1)
    assert not any(torch.equal(inc2[name], o2[name]) for name in inc2)


def test_orthogonality_turns_the_new_directions_away_from_all_earlier_ones(finished: Any) -> None:
    for stage, earlier in ((STAGES[1], R), (STAGES[2], 2 * R)):
        inc, o = (weights_in(finished(s) / stage) for s in (INC, O))
        for name in (n for n in inc if ".lora_A." in n):
            free, held = (smallest_angle(*split(name, w[name], earlier)) for w in (inc, o))
            assert held > 88, f"{name}: {held:.1f} degrees"
            assert free < 60, f"{name}: {free:.1f} degrees without the penalty"


@pytest.mark.parametrize("strategy", [INC, O], ids=["inc-lora", "o-lora"])
def test_growth_is_recorded_and_its_scale_stays(strategy: Any, finished: Any) -> None:
    for number, stage in enumerate(STAGES):
        folder = finished(strategy) / stage
        said = json.loads((folder / "adapters.json").read_text())
        assert said["rank"] == (number + 1) * R
        assert said["frozen"] == number * R
        assert (said["overlap"] is None) == (strategy is INC)
        config = json.loads((folder / "model" / "adapter_config.json").read_text())
        assert config["r"] == (number + 1) * R
        assert config["lora_alpha"] / config["r"] == 2.0
    if strategy is O:
        assert said["overlap"] > 0
        assert json.loads((finished(O) / STAGES[0] / "adapters.json").read_text())["overlap"] == 0.0


def test_runs_adapter_is_the_sum_of_the_tasks_loras_on_the_plain_model(finished: Any) -> None:
    from peft import PeftModel

    def base() -> Any:
        options = ModelOptions(toy=True, hidden=32, layers=1, dtype="float64")
        return load_model(options, 0, toy_tokenizer)[0]

    folder = finished(INC) / STAGES[2]
    adapted = PeftModel.from_pretrained(base(), str(folder / "model")).double().eval()
    merged, weights = base(), {n: t.double() for n, t in weights_in(folder).items()}
    with torch.no_grad():
        for name, a in weights.items():
            if ".lora_A." in name:
                b = weights[name.replace(".lora_A.", ".lora_B.")]
                target = name.removeprefix("base_model.model.").replace(".lora_A", "")
                for task in range(3):
                    part = slice(task * R, (task + 1) * R)
                    merged.get_parameter(target).add_(8.0 / R * b[:, part] @ a[part])
        ids = torch.arange(10, 22).view(2, 6)
        got, expected, plain = (m(input_ids=ids).logits for m in (adapted, merged, base()))
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)
    assert (got - plain).abs().max() > 1e-3


@pytest.mark.parametrize("strategy", [INC, {**O, "norm": 0.1}], ids=["inc-lora", "o-lora"])
def test_encoder_decoder_model_grows_too(strategy: Any, tmp_path: Path) -> None:
    from transformers import T5Config, T5ForConditionalGeneration

    torch.manual_seed(0)
    size = {"vocab_size": len(TOKENIZER), "pad_token_id": TOKENIZER.pad_token_id}
    layers = {"num_layers": 1, "num_heads": 2, "d_model": 16, "d_kv": 8, "d_ff": 32}
    T5ForConditionalGeneration(T5Config(**layers, decoder_start_token_id=0, **size)).save_pretrained(
        tmp_path / "t5"
    )
    TOKENIZER.save_pretrained(tmp_path / "t5")
    values = values_of(tmp_path / "run", strategy, template={"prompt": "{prompt}{eos}"})
    values["model"] = {"path": str(tmp_path / "t5"), "lora": {"r": R}}
    values["training"] |= {"max_steps": 4}
    values["tasks"] |= {"order": ["copy", "flip"]}
    metrics = run(config_of(values))
    first, second = (weights_in(tmp_path / "run" / "tasks" / stage) for stage in STAGES[:2])
    assert any("decoder" in name for name in first)
    assert all(torch.equal(split(name, second[name], R)[0], first[name]) for name in first)
    again, _ = load_model(ModelOptions(path=str(tmp_path / "run" / "tasks" / STAGES[1] / "model")))
    assert sum(p.numel() for p in again.parameters()) == metrics["parameters"]


def test_adapter_given_as_the_model_is_what_the_first_task_trains(finished: Any, tmp_path: Path) -> None:
    tiny_llama(TOKENIZER, hidden=16, layers=2).save_pretrained(tmp_path / "base")
    TOKENIZER.save_pretrained(tmp_path / "base")
    options = ModelOptions(path=str(tmp_path / "base"), lora=LoraOptions(r=3))
    load_model(options)[0].save_pretrained(tmp_path / "adapter")
    values = values_of(tmp_path / "run", INC, model={"path": str(tmp_path / "adapter")})
    values["training"] |= {"max_steps": 2}
    assert check(config_of(values)).problems == []
    run(config_of(values))
    ranks = [json.loads((tmp_path / "run/tasks" / s / "adapters.json").read_text())["rank"] for s in STAGES]
    assert ranks == [3, 6, 9]


# the penalty


ZERO = torch.zeros((), dtype=torch.float64)  # the loss that terms are added to


def strategy_of(name: str, **values: Any) -> Strategy:
    return build_strategy(validate(STRATEGIES[name].Options, {"name": name, **values}, "test"))


def begun(strategy: Strategy, tasks: int, dtype: torch.dtype = torch.float64) -> Any:
    """A model at the beginning of the n-th task, with factors as after training."""
    torch.manual_seed(0)
    model = add_lora(tiny_llama(TOKENIZER, hidden=16, layers=2, heads=2).to(dtype), LoraOptions(r=R))
    for number in range(tasks):
        strategy.begin(context_of(model), stage_of(STREAM, number))
        with torch.no_grad():
            for _, b in lora_factors(model):
                b.normal_()
    return model


@pytest.mark.parametrize("kind", ["absolute", "squared"])
def test_penalty_and_its_gradient_are_the_formula(kind: str) -> None:
    """Written out over layers, earlier tasks, and pairs of rows, in double precision."""
    strategy = strategy_of("o-lora", orthogonality=0.7, norm=0.3, overlap=kind)
    model = begun(strategy, tasks=3)
    penalty = strategy.loss(model, {}, None, ZERO)
    factors = lora_factors(model)
    expected = torch.zeros((), dtype=torch.float64)
    for a, b in factors:
        for task in range(2):
            for row in range(R):
                for new in range(R):
                    inner = (a.detach()[task * R + row] * a[2 * R + new]).sum()
                    expected = expected + 0.7 * (inner.abs() if kind == "absolute" else inner**2)
        expected = expected + 0.3 * (a[2 * R :].square().sum().sqrt() + b[:, 2 * R :].square().sum().sqrt())
    torch.testing.assert_close(penalty, expected, rtol=1e-12, atol=0)
    parameters = [p for pair in factors for p in pair]
    for got, want in zip(
        torch.autograd.grad(penalty, parameters), torch.autograd.grad(expected, parameters), strict=True
    ):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-14)
    assert all(
        not g[: 2 * R].any()
        for g in torch.autograd.grad(strategy.loss(model, {}, None, ZERO), parameters[::2])
    )


def test_norm_of_a_factor_that_is_zero_has_a_finite_gradient() -> None:
    strategy = strategy_of("o-lora", norm=1.0)
    model = begun(strategy, tasks=1)
    with torch.no_grad():
        for _, b in lora_factors(model):
            b.zero_()
    gradients = torch.autograd.grad(strategy.loss(model, {}, None, ZERO), [b for _, b in lora_factors(model)])
    assert all(not g.any() for g in gradients)


def test_there_is_no_penalty_where_nothing_is_to_be_penalised() -> None:
    first, none = strategy_of("o-lora"), strategy_of("o-lora", orthogonality=0.0)
    assert first.loss(begun(first, tasks=1), {}, None, ZERO) is ZERO
    assert none.loss(begun(none, tasks=2), {}, None, ZERO) is ZERO
    small = strategy_of("o-lora", norm=0.1)
    assert small.loss(begun(small, tasks=1), {}, None, ZERO) is not ZERO, (
        "the norms count from the first task on"
    )


# what is checked


@pytest.mark.parametrize("name", ["inc-lora", "o-lora"])
def test_check_wants_lora_before_anything_is_trained(name: str, tmp_path: Path) -> None:
    values = values_of(tmp_path / "run", {"name": name})
    assert check(config_of(values)).problems == []
    values["model"] = {"toy": True, "hidden": 16, "layers": 2}
    (problem,) = check(config_of(values)).problems
    assert problem.startswith(f"strategy.name: '{name}' trains a new LoRA for each task")
    assert "Set model.lora" in problem
    with pytest.raises(ConfigError, match=r"Set model\.lora"):
        run(config_of(values))


@pytest.mark.parametrize("name", ["inc-lora", "o-lora"])
def test_strategies_declare_that_they_grow(name: str) -> None:
    cls = STRATEGIES[name]
    assert (cls.state, cls.inference) == ("per task", "per task")
    assert cls.rehearsal_free
    assert not cls.needs_task_identity
