"""What the toy suite is for: a tiny model learns each task in seconds, and plain fine-tuning forgets it."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence

import pytest
import torch
from torch import nn

from holdfast.models import block_parameters, tiny_llama
from holdfast.tasks import BASE_TASKS, STREAM_TASKS, TOY_TASKS, Encoder, Example, Task, Template, collate
from holdfast.tasks.toy import (
    BASE_TRAINING,
    STREAM_TRAINING,
    ToyTraining,
    make_task,
    toy_tokenizer,
)

pytestmark = pytest.mark.slow

TOKENIZER = toy_tokenizer()
ENCODER = Encoder(TOKENIZER, Template(), encoder_decoder=False)


def batch_of(examples: Sequence[Example]) -> dict[str, torch.Tensor]:
    return collate(ENCODER.many(examples), int(TOKENIZER.pad_token_id), encoder_decoder=False)


def train(
    model: nn.Module, examples: Sequence[Example], how: ToyTraining, parameters: Iterable[nn.Parameter]
) -> None:
    """AdamW with a linear schedule; nothing of holdfast's own training."""
    optimizer = torch.optim.AdamW(parameters, lr=how.learning_rate, weight_decay=0.0)
    batches = -(-len(examples) // how.batch_size)
    total = how.epochs * batches
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / 10) * (1 - step / total)
    )
    shuffle = torch.Generator().manual_seed(0)
    for _ in range(how.epochs):
        for rows in torch.randperm(len(examples), generator=shuffle).split(how.batch_size):
            loss = model(**batch_of([examples[i] for i in rows.tolist()])).loss
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], 1.0)
            optimizer.step()
            schedule.step()


@torch.no_grad()
def accuracy(model: nn.Module, task: Task) -> float:
    """Exact match of greedy answers in percent; teacher forcing decides it, token by token."""
    batch = batch_of(task.test)
    labels = batch.pop("labels")[:, 1:]
    guesses = model(**batch).logits[:, :-1].argmax(-1)
    return 100 * ((guesses == labels) | (labels == -100)).all(dim=1).float().mean().item()


def toy(name: str, how: ToyTraining) -> Task:
    return make_task(name, how.train_rows, 100)


@pytest.fixture(scope="module")
def base() -> nn.Module:
    model = tiny_llama(TOKENIZER)
    examples = [row for name in BASE_TASKS for row in toy(name, BASE_TRAINING).train]
    train(model, examples, BASE_TRAINING, model.parameters())
    return model


def test_the_base_learns_its_tasks_and_knows_nothing_of_the_stream(base):
    assert sum(p.numel() for p in base.parameters()) < 1.1e6
    assert {name: accuracy(base, toy(name, BASE_TRAINING)) for name in BASE_TASKS} == pytest.approx(
        dict.fromkeys(BASE_TASKS, 100), abs=5
    )
    assert all(accuracy(base, toy(name, STREAM_TRAINING)) < 30 for name in STREAM_TASKS)


@pytest.mark.parametrize("name", [name for name in TOY_TASKS if name not in BASE_TASKS])
def test_every_other_task_is_learned_from_the_base(base, name):
    model, task = copy.deepcopy(base), toy(name, STREAM_TRAINING)
    train(model, task.train, STREAM_TRAINING, block_parameters(model).values())
    assert accuracy(model, task) >= 95


def test_plain_fine_tuning_forgets_the_stream_and_joint_training_learns_it(base):
    stream = [toy(name, STREAM_TRAINING) for name in STREAM_TASKS]
    model, learned = copy.deepcopy(base), []
    for task in stream:
        train(model, task.train, STREAM_TRAINING, block_parameters(model).values())
        learned.append(accuracy(model, task))
    forgotten = [before - accuracy(model, task) for before, task in zip(learned[:-1], stream, strict=False)]
    assert min(learned) >= 95
    assert sum(forgotten) / len(forgotten) >= 40

    joint = copy.deepcopy(base)
    examples = [row for task in stream for row in task.train]
    train(joint, examples, STREAM_TRAINING, block_parameters(joint).values())
    assert min(accuracy(joint, task) for task in stream) >= 95
