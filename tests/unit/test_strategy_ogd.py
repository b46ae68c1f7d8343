"""OGD: the basis, what is projected, and what that does to the answers of earlier tasks."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import contexts
from contexts import context_of
from holdfast.config import validate
from holdfast.errors import ConfigError, PriorMismatchError
from holdfast.hold import Directions, Project
from holdfast.importance.logit_gradient import logit_gradient
from holdfast.importance.prior import trained_parameters
from holdfast.importance.seeding import sample
from holdfast.models import block_parameters, tiny_llama
from holdfast.runner import RunConfig, run
from holdfast.strategies import STRATEGIES, Stage, Strategy, build_strategy
from holdfast.tasks import Encoder, Template, toy_suite, toy_tokenizer
from kills import Killed, kill_when
from tiny_models import tiny_model
from tiny_runs import tiny_run

TOKENIZER = toy_tokenizer()
STREAM = toy_suite(["copy", "flip"], 8, 2)
SHAPES = {"a.weight": (4, 6), "b.weight": (5, 3), "b.bias": (5,)}


def vectors(count: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [
        {n: torch.randn(s, generator=generator, dtype=torch.float64).to(dtype) for n, s in SHAPES.items()}
        for _ in range(count)
    ]


def matrix(directions: dict[str, Tensor]) -> Tensor:
    """All directions as rows, float64."""
    return torch.cat([directions[name].flatten(1).double() for name in sorted(directions)], 1)


def flat(vector: dict[str, Tensor]) -> Tensor:
    return torch.cat([vector[name].flatten().double() for name in sorted(vector)])


class Weights(nn.Module):
    """Parameters of the shapes above, with canonical names."""

    def __init__(self, seed: int = 9, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 4, bias=False), nn.Linear(3, 5)
        values = vectors(1, seed, dtype)[0]
        for name, p in self.named_parameters():
            p.data = values[name].clone()


# the basis


def test_basis_stays_orthonormal_over_several_tasks() -> None:
    directions = Directions()
    assert [directions.extend(vectors(9, seed), 9) for seed in range(3)] == [9, 9, 9]
    q_KN = matrix(directions.directions)
    torch.testing.assert_close(q_KN @ q_KN.T, torch.eye(27, dtype=torch.float64), rtol=0, atol=1e-6)
    for vector in vectors(9, 1):  # and the vectors are in its span
        left = flat(vector) - q_KN.T @ (q_KN @ flat(vector))
        assert left.norm() < 1e-5 * flat(vector).norm()


def test_vector_in_the_span_of_others_adds_no_direction_and_a_nearly_parallel_one_a_clean_one() -> None:
    first, second = vectors(2)
    combined = {n: 2 * first[n] - 3 * second[n] for n in SHAPES}
    nothing = {n: torch.zeros(s) for n, s in SHAPES.items()}
    near = {n: first[n] + 1e-3 * vectors(1, 5)[0][n] for n in SHAPES}
    directions = Directions()
    assert directions.extend([first, second], 2) == 2
    assert directions.extend([combined, nothing, near, first], 4) == 1
    assert {n: tuple(t.shape) for n, t in directions.directions.items()} == {
        n: (3, *s) for n, s in SHAPES.items()
    }
    q_KN = matrix(directions.directions)
    torch.testing.assert_close(q_KN @ q_KN.T, torch.eye(3, dtype=torch.float64), rtol=0, atol=1e-5)


def test_directions_found_before_an_interruption_stay_sound() -> None:
    def two_and_out() -> Iterator[dict[str, Tensor]]:
        yield from vectors(2, 1)
        raise KeyboardInterrupt

    directions = Directions()
    directions.extend(vectors(3), 3)
    with pytest.raises(KeyboardInterrupt):
        directions.extend(two_and_out(), 8)
    q_KN = matrix(directions.directions)
    torch.testing.assert_close(q_KN @ q_KN.T, torch.eye(5, dtype=torch.float64), rtol=0, atol=1e-6)


def test_other_names_or_shapes_are_refused() -> None:
    directions, model = Directions(), Weights()
    directions.extend(vectors(2), 2)
    wide = {**vectors(1)[0], "b.bias": torch.ones(6)}
    with pytest.raises(PriorMismatchError, match=r"b\.bias \(\(6,\) instead of \(5,\)\)"):
        directions.extend([wide], 1)
    with pytest.raises(PriorMismatchError, match=r"other \(unknown to the directions\)"):
        directions.extend([{**vectors(1)[0], "other": torch.ones(1)}], 1)
    assert len(directions) == 2
    with pytest.raises(PriorMismatchError, match=r"b\.bias \(missing instead of \(5,\)\)"):
        Project(directions).attach(model, torch.optim.SGD([model.a.weight, model.b.weight], lr=1.0))


# the projection


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_projected_gradient_is_the_formula_in_float64(dtype: torch.dtype) -> None:
    """g - sum_k (q_k . g) q_k, over all weights at once."""
    directions, model = Directions(), Weights(dtype=dtype)
    directions.extend(vectors(7), 7)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    Project(directions, on="gradient").attach(model, optimizer)
    gradient = vectors(1, 3, dtype)[0]
    for name, p in model.named_parameters():
        p.grad = gradient[name].clone()
    optimizer.step()
    expected = flat(gradient)
    for q_N in matrix(directions.directions):
        expected = expected - (q_N @ flat(gradient)) * q_N
    got = flat({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    tolerance = 2e-2 if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(got, expected, rtol=0, atol=tolerance)
    assert (matrix(directions.directions) @ got).norm() < tolerance * got.norm()


def optimizers(parameters: Any) -> dict[str, torch.optim.Optimizer]:
    return {
        "adamw": torch.optim.AdamW(parameters, lr=0.05, weight_decay=0.3),
        "sgd": torch.optim.SGD(parameters, lr=0.05, momentum=0.9),
        "decayed-sgd": torch.optim.SGD(parameters, lr=0.05, weight_decay=0.3),
    }


@pytest.mark.parametrize(
    ("on", "name", "orthogonal"),
    [
        ("update", "adamw", True),
        ("update", "sgd", True),
        ("update", "decayed-sgd", True),
        ("gradient", "sgd", True),
        ("gradient", "adamw", False),
        ("gradient", "decayed-sgd", False),
    ],
)
def test_which_steps_are_orthogonal(on: Any, name: str, orthogonal: bool) -> None:
    """Projected updates always; projected gradients only with SGD without weight decay."""
    directions, model = Directions(), Weights()
    directions.extend(vectors(7), 7)
    start = flat(dict(model.named_parameters())).detach()
    optimizer = optimizers(list(model.parameters()))[name]
    handle = Project(directions, on=on).attach(model, optimizer)
    for step in range(30):
        for key, p in model.named_parameters():
            p.grad = vectors(1, 100 + step)[0][key]
        optimizer.step()
    moved = flat(dict(model.named_parameters())).detach() - start
    inside = (matrix(directions.directions) @ moved).norm() / moved.norm()
    assert inside < 2e-6 if orthogonal else inside > 1e-2
    handle.remove()
    assert not optimizer._optimizer_step_pre_hooks
    assert not optimizer._optimizer_step_post_hooks


def test_weight_without_gradient_gets_its_part_of_the_projection() -> None:
    directions, model = Directions(), Weights()
    directions.extend(vectors(7), 7)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    Project(directions, on="gradient").attach(model, optimizer)
    model.a.weight.grad = torch.ones(4, 6)  # b took no part in this batch
    optimizer.step()
    got = flat({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert (matrix(directions.directions) @ got).norm() < 1e-6 * got.norm()


def test_projected_gradients_and_a_closure_are_refused() -> None:
    directions, model = Directions(), Weights()
    directions.extend(vectors(2), 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    Project(directions, on="gradient").attach(model, optimizer)
    with pytest.raises(ConfigError, match="a projection with on='gradient': step"):
        optimizer.step(lambda: torch.zeros(()))


# the gradients that are kept


def rows_of(kind: str = "llama", task: int = 0, count: int = 8) -> list[Any]:
    encoder = Encoder(TOKENIZER, Template(), encoder_decoder=kind == "t5")
    return encoder.many(STREAM.tasks[task].train[:count])


def true_logits(model: Any, kind: str, row: Any) -> Tensor:
    """The logits of the answer's tokens, one token after another, with nothing of the project's."""
    start = model.config.decoder_start_token_id if kind == "t5" else None
    picked = []
    for position, token in enumerate(row.completion_ids):
        before = row.completion_ids[:position]
        if kind == "t5":
            logits = model(
                input_ids=torch.tensor([row.prompt_ids]), decoder_input_ids=torch.tensor([[start, *before]])
            ).logits
        else:
            logits = model(input_ids=torch.tensor([row.prompt_ids + before])).logits
        picked.append(logits[0, -1, token])
    return torch.stack(picked)


@pytest.mark.parametrize("target", ["all", "first"])
@pytest.mark.parametrize("kind", ["llama", "llama-lora", "gpt2", "t5"])
def test_kept_gradient_is_that_of_the_true_answers_logits(kind: str, target: Any) -> None:
    model, row = tiny_model(kind), rows_of(kind)[0]
    got = logit_gradient(model, row, TOKENIZER.pad_token_id, target)
    weights = trained_parameters(model)
    assert got.keys() == weights.keys()
    logits = true_logits(model, kind, row)
    output = logits.sum() if target == "all" else logits[0]
    expected = torch.autograd.grad(output, list(weights.values()), allow_unused=True)
    for (name, p), gradient in zip(weights.items(), expected, strict=True):
        wanted = torch.zeros_like(p) if gradient is None else gradient
        torch.testing.assert_close(got[name], wanted, rtol=1e-4, atol=1e-5, msg=name)
    assert all(p.grad is None for p in model.parameters())


def strategy_of(**values: Any) -> Strategy:
    return build_strategy(validate(STRATEGIES["ogd"].Options, {"name": "ogd", **values}, "test"))


def stage_of(number: int) -> Stage:
    return contexts.stage_of(STREAM, number)


@pytest.mark.parametrize("on", ["update", "gradient"])
def test_small_sgd_step_leaves_earlier_true_logits_unchanged_to_first_order(on: str) -> None:
    model = tiny_model("llama").double()  # so that the second order can be told from rounding
    strategy = strategy_of(samples=4, on=on)
    strategy.begin(context_of(model), stage_of(0))
    strategy.end(context_of(model), stage_of(0))

    def changes(step: float, held: bool) -> Tensor:
        """By how much one step on the second task changes each kept sample's output."""
        moved = copy.deepcopy(model)
        strategy.begin(context_of(moved), stage_of(1))
        optimizer = torch.optim.SGD(moved.parameters(), lr=step)
        if held:
            strategy.attach(moved, optimizer)
        loss = -sum(true_logits(moved, "llama", row).sum() for row in rows_of(task=1, count=4))
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            pairs = [
                (true_logits(moved, "llama", r).sum(), true_logits(model, "llama", r).sum())
                for r in sample(rows_of(), 4, 0)
            ]
        return torch.stack([after - before for after, before in pairs])

    free, held, half = changes(1e-5, False), changes(1e-5, True), changes(5e-6, True)
    assert free.abs().max() > 1e-3
    assert held.norm() < 2e-2 * free.norm()
    assert half.norm() < 0.3 * held.norm(), "what remains shrinks with the square of the step"


# in a run

UPDATE = {"name": "ogd", "samples": 6}
TRAINING = {
    "max_steps": 8,
    "batch_size": 8,
    "learning_rate": 3e-3,
    "weight_decay": 0.3,
    "checkpoint_steps": 3,
}


def one_run(output: Path, strategy: Any, order: tuple[str, ...] = ("copy", "flip"), **sections: Any) -> Path:
    values = {**tiny_run(output, strategy=strategy, training=TRAINING), **sections}
    values["tasks"] = {**values["tasks"], "order": list(order), "test_rows": 2}
    values["evaluation"] = {"zero_shot": False, "scope": "needed"}
    run(validate(RunConfig, values, source="test"))
    return output / "tasks"


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The stages of a run on three tasks, AdamW with weight decay, projected updates."""
    return one_run(tmp_path_factory.mktemp("ogd") / "run", UPDATE, ("copy", "flip", "head"))


def weights_in(stage: Path) -> dict[str, Tensor]:
    return load_file(next((stage / "model").glob("*.safetensors")))


def inside(directions: dict[str, Tensor], before: Path, after: Path) -> float:
    """The part of a task's change that lies along the directions, as a share of the change."""
    old, new = weights_in(before), weights_in(after)
    moved = {n: new[n].double() - old[n].double() for n in directions}
    return float((matrix(directions) @ flat(moved)).norm() / flat(moved).norm())


def test_updates_move_weights_orthogonally_to_the_directions_of_all_earlier_tasks(finished: Path) -> None:
    for before, after in (("01-copy", "02-flip"), ("02-flip", "03-head")):
        directions = load_file(finished / before / "strategy.safetensors")
        assert inside(directions, finished / before, finished / after) < 5e-6
    later = load_file(finished / "03-head" / "strategy.safetensors")
    assert inside(later, finished / "02-flip", finished / "03-head") > 1e-2, "the task's own are not held"


def test_sgd_with_projected_gradients_moves_weights_orthogonally(tmp_path: Path) -> None:
    sgd = {**TRAINING, "optimizer": "sgd", "learning_rate": 0.1, "weight_decay": 0.0}
    training = {**sgd, "gradient_accumulation": 2, "max_grad_norm": 0.1}  # accumulated and clipped
    stages = one_run(tmp_path / "run", {**UPDATE, "on": "gradient"}, training=training)
    directions = load_file(stages / "01-copy" / "strategy.safetensors")
    assert inside(directions, stages / "01-copy", stages / "02-flip") < 5e-6


def test_state_grows_by_a_value_for_each_sample_and_weight(finished: Path) -> None:
    assert STRATEGIES["ogd"].state == "per task"
    weights = weights_in(finished / "01-copy")
    for number, stage in enumerate(("01-copy", "02-flip", "03-head"), start=1):
        added = json.loads((finished / stage / "strategy.json").read_text())["directions"]
        assert added == [6] * number, "so few rows are independent"
        tensors = load_file(finished / stage / "strategy.safetensors")
        assert tensors.keys() == block_parameters(tiny_llama(TOKENIZER, hidden=32, layers=2)).keys()
        assert all(t.shape == (6 * number, *weights[n].shape) for n, t in tensors.items())
        assert all(t.dtype == torch.float32 for t in tensors.values())
        q_KN = matrix(tensors)
        eye = torch.eye(6 * number, dtype=torch.float64)
        torch.testing.assert_close(q_KN @ q_KN.T, eye, rtol=0, atol=1e-5)


def test_first_task_is_trained_without_a_hook() -> None:
    model, strategy = tiny_model("llama"), strategy_of()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    strategy.begin(context_of(model), stage_of(0))
    strategy.attach(model, optimizer)
    assert not optimizer._optimizer_step_pre_hooks
    assert not optimizer._optimizer_step_post_hooks


@pytest.mark.parametrize(
    ("where", "call", "lora"),
    [
        ("holdfast.training.bridge.completion_loss", 14, None),  # in task 2, after its first checkpoint
        ("holdfast.training.bridge.completion_loss", 14, {"r": 4, "dropout": 0.1}),
        ("holdfast.strategies.ogd.logit_gradient", 9, None),  # task 2 trained, half of its directions made
    ],
    ids=["in-task-2", "in-task-2-lora", "between-gradients"],
)
def test_killed_run_ends_bit_identical(
    where: str, call: int, lora: Any, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sections: Any = {"order": ("copy", "flip", "head")}
    if lora is not None:
        sections = {"model": {"toy": True, "hidden": 32, "layers": 2, "lora": lora}}
    whole = finished if lora is None else one_run(tmp_path / "whole", UPDATE, **sections)
    with monkeypatch.context() as patch:
        kill_when(patch, where, call)
        with pytest.raises(Killed):
            one_run(tmp_path / "broken", UPDATE, **sections)
    assert list((tmp_path / "broken" / "tasks").glob("02-*.partial/checkpoints/checkpoint-*"))
    broken = one_run(tmp_path / "broken", UPDATE, **sections)
    last = sorted(broken.iterdir())[-1].name
    for file in ("model/*.safetensors", "strategy.safetensors"):
        a, b = (load_file(next((root / last).glob(file))) for root in (whole, broken))
        assert a.keys() == b.keys()
        assert all(torch.equal(a[n], b[n]) for n in a), file
