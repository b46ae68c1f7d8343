"""Memory that torch allocates for training, prior, hold and attribution is what `holdfast check` predicts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from holdfast import Anchor
from holdfast.attribution.engine import attribute_batches
from holdfast.hold.cost import prior_costs, trained_bytes
from holdfast.importance import compute_prior
from holdfast.importance.aggregate import SquareMean, TopKMean
from holdfast.importance.fisher import FisherOptions
from holdfast.importance.inputs import InputMoments, InputsOptions
from holdfast.importance.lrp import LrpOptions
from holdfast.models import block_parameters, tiny_llama
from holdfast.tasks import toy_tokenizer
from holdfast.tasks.encode import Encoded

ROWS = [Encoded([5, 6, 7], [8, 9], 0), Encoded([9, 8], [5], 0), Encoded([6, 5, 9], [7], 0)]


def model() -> Any:
    """Wide enough that weights, and not what comes with each tensor, are what is counted."""
    made = tiny_llama(toy_tokenizer(), hidden=128, layers=1, heads=2)
    made.requires_grad_(False)
    for parameter in block_parameters(made, trainable_only=False).values():
        parameter.requires_grad_(True)
    return made


def left_by(work: Callable[[], Any]) -> tuple[int, Any]:
    """Bytes that are still allocated after some work, and its result, which holds them."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        result = work()
    events = seen.profiler.kineto_results.events()  # type: ignore[union-attr]
    return sum(event.nbytes() for event in events if event.name() == "[memory]"), result


def costs(made: Any, options: Any) -> list[int]:
    return [cost.size for cost in prior_costs(made, options)]


def near(measured: int, predicted: int) -> None:
    assert 0.9 * predicted <= measured <= 1.1 * predicted, (measured, predicted)


def test_gradients_and_adamw_take_three_values_a_trained_weight() -> None:
    made = model()
    optimizer = torch.optim.AdamW(block_parameters(made).values(), lr=1e-3)

    def step() -> None:
        made(input_ids=torch.tensor([[5, 6, 7]]), labels=torch.tensor([[5, 6, 7]])).loss.backward()
        optimizer.step()

    near(left_by(step)[0], 3 * trained_bytes(made))


@pytest.mark.parametrize("kind", ["weights", "inputs"])
def test_prior_and_hold_take_what_is_predicted(kind: str) -> None:
    made = model()
    options: Any = FisherOptions(samples=3) if kind == "weights" else InputsOptions(samples=3)
    predicted = costs(made, options)
    taken, prior = left_by(lambda: compute_prior(made, ROWS, options, pad_id=0))
    near(taken, predicted[0])
    prior = prior.mean_normalised()  # as a run keeps it
    optimizer = torch.optim.AdamW(block_parameters(made).values(), lr=1e-3)

    def held() -> Any:
        handle = Anchor(prior, strength=10.0).attach(made, optimizer)
        made(input_ids=torch.tensor([[5, 6, 7]]), labels=torch.tensor([[5, 6, 7]])).loss.backward()
        optimizer.step()
        return handle

    taken, handle = left_by(held)
    training = 3 * trained_bytes(made)
    handle.remove()
    near(taken - training, predicted[1] if kind == "weights" else predicted[1] + predicted[2])


@pytest.mark.parametrize(
    "fold",
    [TopKMean(3), SquareMean(per_weight=True), InputMoments("relevance")],
    ids=lambda fold: type(fold).__name__,
)
def test_what_a_fold_keeps_is_what_is_predicted(fold: Any) -> None:
    made = model()
    fold.finish = lambda: None  # what it keeps while samples come
    options: Any = {
        TopKMean: LrpOptions(aggregate="topk", top_k=3),
        SquareMean: FisherOptions(),
        InputMoments: InputsOptions(),
    }[type(fold)]
    elements = sum(p.numel() for p in block_parameters(made).values())
    if isinstance(fold, InputMoments):
        predicted = costs(made, options)[0]
    else:
        predicted = getattr(options, "folded", 1) * 4 * elements
        assert predicted < costs(made, options)[-1]  # which has the maps of a layer too

    def work() -> None:
        attribute_batches(made, ROWS, fold=fold, batch_size=2, pad_id=0, correct_only=False)

    near(left_by(work)[0], predicted)
