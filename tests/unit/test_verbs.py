"""What every training loop offers a method: when it is called, with what, and what it costs if it isn't."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import get_scheduler

from contexts import TOKENIZER, verbs
from holdfast.hold import tell_total_rate
from holdfast.hold.schedule import TOTAL
from holdfast.models import tiny_llama
from holdfast.tasks import Encoder, Template
from holdfast.tasks.task import Example
from holdfast.tasks.toy import toy_suite
from holdfast.training.loop import train
from holdfast.training.options import TrainingOptions
from holdfast.training.verbs import ROWS, Verbs, has, model_inputs

EXAMPLES = list(toy_suite(["copy"], 20, 1).tasks[0].train)
ENCODED = Encoder(TOKENIZER, Template(), encoder_decoder=False).many(EXAMPLES)
NAMES = ("attach", "watch", "loss", "observe", "stage_state_dict", "load_stage_state_dict")


def trained(folder: Path, method: Any = None, **options: Any) -> Any:
    model = tiny_llama(TOKENIZER, hidden=16, layers=1, heads=2)
    values = {"epochs": 2, "batch_size": 8, "optimizer": "sgd", "learning_rate": 0.1, **options}
    train(
        model,
        ENCODED,
        TrainingOptions(**values),
        tokenizer=TOKENIZER,
        folder=folder / "checkpoints",
        seed=3,
        verbs=method,
    )
    return model


def same(a: Any, b: Any) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


@pytest.mark.parametrize("trainer", ["auto", "sft"])
def test_loss_may_be_another_in_its_place(trainer: str, tmp_path: Path) -> None:
    """A loss that is nothing but the sum of one bias-free map trains that one alone, by a literal amount."""
    name = "model.layers.0.mlp.up_proj.weight"

    def other(model: nn.Module, batch: Any, outputs: Any, loss: Tensor) -> Tensor:
        return model.get_parameter(name).sum()

    before = tiny_llama(TOKENIZER, hidden=16, layers=1, heads=2)
    values = {"max_grad_norm": 0, "scheduler": "constant", "max_steps": 4, "trainer": trainer}
    after = trained(tmp_path, verbs(loss=other), **values)
    for key, parameter in before.named_parameters():
        moved = 4 * 0.1 if key == name else 0.0
        assert torch.allclose(after.get_parameter(key), parameter - moved, atol=1e-6), key


def test_loss_given_back_as_it_is_changes_nothing(tmp_path: Path) -> None:
    kept = trained(tmp_path / "a", verbs(loss=lambda model, batch, outputs, loss: loss))
    assert same(kept, trained(tmp_path / "b"))


@pytest.mark.parametrize("accumulation", [1, 2])
def test_each_epoch_sees_each_row_once_under_its_own_number(accumulation: int, tmp_path: Path) -> None:
    batches: list[Any] = []
    watched = verbs(watch=lambda model, batch: batches.append(dict(batch)))
    trained(tmp_path, watched, batch_size=4, gradient_accumulation=accumulation)
    numbers = [batch[ROWS].tolist() for batch in batches]
    assert [len(batch) for batch in numbers] == [4] * 10
    epochs = [sorted(n for batch in numbers[half : half + 5] for n in batch) for half in (0, 5)]
    assert epochs == [list(range(20))] * 2
    assert numbers[:5] != numbers[5:]
    for batch in batches:
        for row, ids, labels in zip(batch[ROWS].tolist(), batch["input_ids"], batch["labels"], strict=True):
            whole = ENCODED[row].prompt_ids + ENCODED[row].completion_ids
            assert ids[-len(whole) :].tolist() == whole
            assert labels[labels != -100].tolist() == ENCODED[row].completion_ids


def test_verbs_come_in_their_order_and_the_model_never_sees_row_numbers(tmp_path: Path) -> None:
    called: list[str] = []

    def loss(model: nn.Module, batch: Any, outputs: Any, loss: Tensor) -> Tensor:
        assert ROWS in batch
        called.append("loss")
        return loss

    def attach(model: nn.Module, optimizer: Any) -> list[Any]:
        called.append("attach")
        forward = model.forward
        model.forward = lambda **inputs: [called.append(f"forward {ROWS in inputs}"), forward(**inputs)][1]
        return []

    method = verbs(
        attach=attach,
        watch=lambda model, batch: called.append("watch"),
        loss=loss,
        observe=lambda model, step, scale: called.append(f"observe {step} {scale}"),
    )
    trained(tmp_path, method, max_steps=2, gradient_accumulation=2, scheduler="constant", batch_size=4)
    micro = ["watch", "forward False", "loss"]
    assert called == ["attach", *micro, *micro, "observe 1 1.0", *micro, *micro, "observe 2 1.0"]


def test_what_is_not_overridden_is_not_there_and_costs_nothing(tmp_path: Path, monkeypatch: Any) -> None:
    class Nothing(Verbs):
        pass

    assert not any(has(Nothing(), name) for name in NAMES)
    for name in NAMES:
        only = verbs(**{name: lambda *args: ()})
        assert [other for other in NAMES if has(only, other)] == [name]

    def never(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("called")

    for name in ("loss", "observe", "stage_state_dict"):
        monkeypatch.setattr(Verbs, name, never)
    trained(tmp_path, Nothing(), checkpoint_steps=2)
    assert not list(tmp_path.rglob("strategy.safetensors"))


def test_model_inputs_are_the_batch_without_the_row_numbers() -> None:
    batch = {"input_ids": 1, "labels": 2, ROWS: 3}
    assert model_inputs(batch) == {"input_ids": 1, "labels": 2}
    assert ROWS in batch


def stepped(name: str, steps: int, warmup: int, rates: tuple[float, ...] = (0.3,)) -> tuple[Any, float]:
    """A scheduler, and the literal sum of the largest group's rates while another of its kind is stepped."""
    groups = [{"params": [nn.Parameter(torch.zeros(1))], "lr": rate} for rate in rates]

    def make() -> tuple[Any, Any]:
        optimizer = torch.optim.SGD([dict(group) for group in groups])
        return optimizer, get_scheduler(name, optimizer, warmup, steps)

    optimizer, scheduler = make()
    total = 0.0
    for _ in range(steps):
        total += max(group["lr"] for group in optimizer.param_groups)
        optimizer.step()
        scheduler.step()
    return make(), total


@pytest.mark.parametrize(
    ("name", "warmup"),
    [
        ("linear", 0),
        ("linear", 3),
        ("cosine", 0),
        ("cosine", 4),
        ("constant", 0),
        ("constant_with_warmup", 5),
    ],
)
@pytest.mark.parametrize("rates", [(0.3,), (0.1, 0.3)])
def test_total_rate_is_the_sum_of_the_rates_that_are_stepped_through(
    name: str, warmup: int, rates: tuple[float, ...]
) -> None:
    from accelerate import Accelerator

    (optimizer, scheduler), total = stepped(name, 17, warmup, rates)
    assert total > 0.3
    assert total_rate(optimizer, scheduler, 17) == pytest.approx(total, rel=1e-12)
    wrapped_optimizer, wrapped = Accelerator(cpu=True).prepare(optimizer, scheduler)
    assert type(wrapped) is not type(scheduler)
    assert total_rate(wrapped_optimizer, wrapped, 17) == pytest.approx(total, rel=1e-12)


@pytest.mark.parametrize("name", ["linear", "exponential", "one cycle"])
@pytest.mark.parametrize("split_batches", [False, True])
def test_total_rate_counts_the_steps_that_accelerate_makes_for_each_process(
    name: str, split_batches: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    from accelerate import Accelerator
    from torch.optim.lr_scheduler import ExponentialLR, OneCycleLR

    processes, steps = 3, 7
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1)
    each = {
        "linear": lambda: get_scheduler("linear", optimizer, 4, processes * steps),
        "exponential": lambda: ExponentialLR(optimizer, 0.9),
        "one cycle": lambda: OneCycleLR(optimizer, 0.1, total_steps=processes * steps - 2),
    }
    prepared = Accelerator(cpu=True, split_batches=split_batches).prepare(optimizer, each[name]())
    for module in ("accelerate.state", "accelerate.scheduler"):
        monkeypatch.setattr(f"{module}.AcceleratorState", lambda: SimpleNamespace(num_processes=processes))
    told, rates = total_rate(*prepared, steps), []
    for _ in range(steps):
        rates.append(optimizer.param_groups[0]["lr"])
        prepared[0].step()
        prepared[1].step()
    assert told == pytest.approx(sum(rates), rel=1e-12)


def total_rate(optimizer: Any, scheduler: Any, steps: int) -> float:
    """The largest of the groups' sums, as told."""
    tell_total_rate(optimizer, scheduler, steps)
    return max(group[TOTAL] for group in optimizer.param_groups)


class Greedy:
    """As transformers' GreedyLR, which is no ReduceLROnPlateau."""

    last_epoch = 0

    def step(self, metrics: float, epoch: int | None = None) -> None:
        pass


def test_total_rate_is_unknown_where_the_schedule_does_not_tell() -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1)
    for scheduler in (torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer), Greedy()):
        tell_total_rate(optimizer, scheduler, 5)
        assert optimizer.param_groups[0][TOTAL] is None
    assert total_rate(optimizer, None, 5) == pytest.approx(0.5)


@pytest.mark.parametrize(("scheduler", "expected"), [("constant", 0.6), ("linear", 0.35)])
def test_training_tells_its_total_rate_before_the_first_step(
    scheduler: str, expected: float, tmp_path: Path
) -> None:
    """Six steps at 0.1, or at 0.1 (6 + 5 + 4 + 3 + 2 + 1) / 6."""
    told: list[float] = []
    method = verbs(attach=lambda model, optimizer: told.append(optimizer.param_groups[0][TOTAL]) or ())
    trained(tmp_path, method, scheduler=scheduler)
    assert told == [pytest.approx(expected)]


def test_example_survives_its_record() -> None:
    for row in (Example("a", "b"), Example(({"role": "user", "content": "a\u2028"},), "b", ("b", "c"))):
        assert Example.of_record(row.record()) == row
