"""Training through the bridge equals a plain loop written here, and a strategy acts where it should."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from by_hand import answer_logits
from contexts import verbs
from holdfast.errors import ConfigError
from holdfast.hold import Handle
from holdfast.models import LoraOptions, add_lora, tiny_llama
from holdfast.tasks import Encoded, Encoder, Example, Template, collate, toy_suite, toy_tokenizer
from holdfast.training.bridge import completion_loss
from holdfast.training.loop import save_record, train
from holdfast.training.options import TrainingOptions
from tiny_t5 import tiny_t5

TOKENIZER = toy_tokenizer()
PAD = TOKENIZER.pad_token_id
PLAIN = {"scheduler": "constant", "max_grad_norm": 0.0, "log_steps": 1}


def tiny_model(kind: str = "llama") -> Any:
    if kind == "t5":
        return tiny_t5(TOKENIZER, dropout_rate=0.0)
    return tiny_llama(TOKENIZER, hidden=32, layers=2)


def rows_of(kind: str = "llama", count: int = 16) -> list[Encoded]:
    """Prompts and answers of different lengths, so that padding and token counts matter."""
    encoder = Encoder(TOKENIZER, Template(), encoder_decoder=kind == "t5")
    words = ["a", "bcd", "efgha", "bcdefgh"]
    return encoder.many([Example(f"{'x' * (i % 5)}{i}=", words[i % 4]) for i in range(count)])


def fit(model: Any, rows: Sequence[Encoded], folder: Path, *, hooks: Any = None, **options: Any) -> Any:
    """Train through the bridge; returns the record."""
    return train(
        model,
        rows,
        TrainingOptions(**{**PLAIN, **options}),
        tokenizer=TOKENIZER,
        folder=folder / "checkpoints",
        seed=0,
        verbs=hooks,
    )


def loss_by_hand(model: Any, rows: Sequence[Encoded]) -> torch.Tensor:
    """Row by row, no padding: the mean over all answer tokens of minus the log-probability."""
    terms = []
    for row in rows:
        log_probability = answer_logits(model, row).log_softmax(-1)
        terms += [-log_probability[t, token] for t, token in enumerate(row.completion_ids)]
    return torch.stack(terms).mean()


def assert_weights_close(a: Any, b: Any, tolerance: float) -> None:
    for (name, p), (_, q) in zip(a.named_parameters(), b.named_parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=tolerance, msg=lambda text, n=name: f"{n}: {text}")


# the loss


@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_training_gives_the_weights_of_a_plain_loop_in_float64(kind: str, tmp_path: Path) -> None:
    rows = rows_of(kind, 8)
    ours, plain = tiny_model(kind).double(), tiny_model(kind).double()
    fit(ours, rows, tmp_path, optimizer="sgd", learning_rate=0.5, batch_size=8, max_steps=4)
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.5)
    plain.train()
    for _ in range(4):  # the batch is all rows: their order doesn't matter
        optimizer.zero_grad()
        loss_by_hand(plain, rows).backward()
        optimizer.step()
    start = tiny_model(kind).double()
    moved = max(
        float((p - q).detach().abs().max())
        for p, q in zip(plain.parameters(), start.parameters(), strict=True)
    )
    assert moved > 1e-3, "the loop changed nothing: equality would mean nothing"
    # the loss itself is summed in float32, as transformers does it
    assert_weights_close(ours, plain, tolerance=1e-6)


@pytest.mark.parametrize("side", ["left", "right"])
def test_completion_loss_of_the_last_positions_equals_the_loss_of_all(side: Any) -> None:
    model = tiny_model()
    batch = collate(rows_of(), PAD, encoder_decoder=False, side=side)
    labels = batch.pop("labels")
    logits = model(**batch).logits
    whole = completion_loss(logits, labels)
    shifted = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
    torch.testing.assert_close(whole, shifted)
    if side == "left":
        first = int((labels != -100).any(0).float().argmax())
        keep = labels.shape[1] - first + 1  # the logits that predict the first answer token are one before
        torch.testing.assert_close(completion_loss(logits[:, -keep:], labels[:, -keep:]), whole)


def test_prompt_tokens_are_not_trained_on() -> None:
    model = tiny_model()
    batch = collate(rows_of(), PAD, encoder_decoder=False, side="left")
    labels = batch.pop("labels")
    logits = model(**batch).logits.detach().requires_grad_()
    completion_loss(logits, labels).backward()
    assert logits.grad is not None
    predicts = torch.cat([labels[:, 1:] != -100, torch.zeros(len(labels), 1, dtype=torch.bool)], dim=1)
    assert torch.equal(logits.grad.abs().sum(-1) > 0, predicts)


@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_two_micro_batches_of_8_equal_one_batch_of_16(kind: str, tmp_path: Path) -> None:
    rows = rows_of(kind)
    whole, split = tiny_model(kind), tiny_model(kind)
    fit(whole, rows, tmp_path / "a", optimizer="sgd", learning_rate=0.5, batch_size=16, max_steps=3)
    options = {"batch_size": 8, "gradient_accumulation": 2, "max_steps": 3}
    fit(split, rows, tmp_path / "b", optimizer="sgd", learning_rate=0.5, **options)
    assert_weights_close(whole, split, tolerance=1e-5)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_sft_trainer_gives_the_losses_and_weights_of_trainer(accumulation: int, tmp_path: Path) -> None:
    pytest.importorskip("trl")
    rows = rows_of()
    options = {"batch_size": 4, "gradient_accumulation": accumulation, "max_steps": 4}
    auto, sft = tiny_model(), tiny_model()
    record = fit(auto, rows, tmp_path / "a", optimizer="sgd", learning_rate=0.1, **options)
    same = fit(sft, rows, tmp_path / "b", optimizer="sgd", learning_rate=0.1, trainer="sft", **options)
    assert [step for step, _ in same.loss] == [1, 2, 3, 4]
    for (_, a), (_, b) in zip(record.loss, same.loss, strict=True):
        assert a == pytest.approx(b, abs=2e-3)  # transformers logs four or five digits
    assert_weights_close(auto, sft, tolerance=1e-5)


@pytest.mark.parametrize("trainer", ["auto", "sft"])
def test_no_trainer_switches_gradient_checkpointing_on(trainer: str, tmp_path: Path) -> None:
    if trainer == "sft":
        pytest.importorskip("trl")
    model, seen = tiny_model(), []
    hooks = verbs(observe=lambda inside, step, scale: seen.append(inside.is_gradient_checkpointing))
    fit(model, rows_of(), tmp_path, hooks=hooks, batch_size=8, max_steps=2, trainer=trainer)
    assert seen == [False, False]
    assert not model.get_input_embeddings()._forward_hooks, "a hook that it needs was left on the embeddings"


@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_activations_made_anew_train_the_same_and_leave_a_plain_model(kind: str, tmp_path: Path) -> None:
    kept, anew = tiny_model(kind), tiny_model(kind)
    seen: list[bool] = []

    def flags(model: Any) -> list[bool]:
        return [m.gradient_checkpointing for m in model.modules() if hasattr(m, "gradient_checkpointing")]

    hooks = verbs(observe=lambda inside, step, scale: seen.append(any(flags(inside))))
    options = {"batch_size": 8, "max_steps": 3, "optimizer": "sgd", "learning_rate": 0.1}
    fit(kept, rows_of(kind), tmp_path / "a", **options)
    fit(anew, rows_of(kind), tmp_path / "b", hooks=hooks, gradient_checkpointing=True, **options)
    assert seen == [True] * 3
    assert not any(flags(anew)), "what attributes it next sees every operation"
    assert_weights_close(kept, anew, tolerance=1e-6)


def test_sft_trainer_refuses_an_encoder_decoder(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"SFTTrainer trains causal models only; use 'auto'"):
        fit(tiny_model("t5"), rows_of("t5"), tmp_path, trainer="sft")


def test_seq2seq_trainer_teaches_a_t5(tmp_path: Path) -> None:
    from holdfast.evaluation.evaluate import EvaluationOptions, evaluate_task

    (task,) = toy_suite(["head"], train_rows=64, test_rows=16)
    encoder = Encoder(TOKENIZER, Template(prompt="{prompt}{eos}"), encoder_decoder=True)
    model = tiny_model("t5")
    record = fit(
        model,
        encoder.many(task.train),
        tmp_path,
        batch_size=16,
        max_steps=60,
        learning_rate=1e-2,
        log_steps=10,
    )
    first, last = record.loss[0][1], record.loss[-1][1]
    assert last < first / 2
    score = evaluate_task(model, TOKENIZER, task, encoder, options=EvaluationOptions()).score
    assert score > 100 / 8, "no better than guessing one of eight letters"


# where a strategy acts


@pytest.mark.parametrize("trainer", ["auto", "sft"])
@pytest.mark.parametrize("accumulation", [1, 2, 4])
def test_penalty_counts_once_a_step_however_many_micro_batches(
    accumulation: int, trainer: str, tmp_path: Path
) -> None:
    if trainer == "sft":
        pytest.importorskip("trl")
    rows = rows_of()
    model, plain = tiny_model(), tiny_model()
    start = {n: p.detach().clone() for n, p in model.named_parameters()}
    calls: list[int] = []

    def penalised(inside: Any, batch: Any, outputs: Any, loss: torch.Tensor) -> torch.Tensor:
        calls.append(len(batch["labels"]))
        return loss + 3.0 * sum(p.sum() for p in inside.parameters())

    options = {
        "optimizer": "sgd",
        "learning_rate": 0.1,
        "batch_size": 16 // accumulation,
        "gradient_accumulation": accumulation,
        "max_steps": 1,
        "trainer": trainer,
    }
    fit(model, rows, tmp_path / "a", hooks=verbs(loss=penalised), **options)
    fit(plain, rows, tmp_path / "b", **options)
    assert calls == [16 // accumulation] * accumulation
    for (name, p), (_, q) in zip(model.named_parameters(), plain.named_parameters(), strict=True):
        # the penalty's gradient is 3 for every weight: one step moves it by 0.1 * 3 more
        expected = torch.full_like(p, -0.3)
        torch.testing.assert_close((p - q).detach(), expected, rtol=0, atol=1e-5, msg=name)
        assert not torch.equal(q, start[name])


@pytest.mark.parametrize("trainer", ["auto", "sft"])
def test_observe_sees_each_steps_whole_gradient_once_before_clipping(tmp_path: Path, trainer: str) -> None:
    rows = rows_of()

    def norms(folder: str, batch_size: int, accumulation: int, clip: float) -> list[float]:
        seen: list[tuple[int, float]] = []

        def observe(model: Any, step: int, scale: float) -> None:
            norm = torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None]).norm()
            seen.append((step, float(norm) * scale))

        options = {
            "batch_size": batch_size,
            "gradient_accumulation": accumulation,
            "max_steps": 5,
            "max_grad_norm": clip,
            "optimizer": "sgd",
            "learning_rate": 1e-9,
            "trainer": trainer,
        }
        fit(tiny_model(), rows, tmp_path / folder, hooks=verbs(observe=observe), **options)
        assert [step for step, _ in seen] == [1, 2, 3, 4, 5]
        return [norm for _, norm in seen]

    whole = norms("whole", 8, 1, 0.0)
    assert norms("clipped", 4, 2, 0.01) == pytest.approx(whole, rel=1e-3)


def test_what_a_strategy_gathers_is_in_each_checkpoint_and_comes_back(tmp_path: Path) -> None:
    rows, count = rows_of(), torch.zeros(1)
    loaded: list[float] = []

    def observe(model: Any, step: int, scale: float) -> None:
        count.add_(1)
        if step == 5 and not loaded:
            raise RuntimeError("killed")

    def load(tensors: Any) -> None:
        loaded.append(float(tensors["count"]))
        count.copy_(tensors["count"])

    hooks = verbs(
        observe=observe,
        stage_state_dict=lambda: {"count": count},
        load_stage_state_dict=lambda tensors: (
            loaded.append(float(tensors["count"])),
            count.copy_(tensors["count"]),
        ),
    )
    options = {"batch_size": 4, "max_steps": 6, "checkpoint_steps": 2}
    with pytest.raises(RuntimeError, match="killed"):
        fit(tiny_model(), rows, tmp_path, hooks=hooks, **options)
    fit(tiny_model(), rows, tmp_path, hooks=hooks, **options)
    assert loaded == [4.0]
    assert count.item() == 6


def test_handles_are_attached_once_and_removed_even_if_training_fails(tmp_path: Path) -> None:
    events: list[str] = []

    class Counted(Handle):
        def remove(self) -> None:
            events.append("removed")

    def attach(model: Any, optimizer: Any) -> Any:
        events.append("attached")
        return [Counted()]

    def failing(model: Any, step: int, scale: float) -> None:
        raise RuntimeError("on purpose")

    fit(tiny_model(), rows_of(), tmp_path / "a", hooks=verbs(attach=attach), max_steps=2)
    assert events == ["attached", "removed"]
    hooks = verbs(attach=attach, observe=failing)
    with pytest.raises(RuntimeError, match="on purpose"):
        fit(tiny_model(), rows_of(), tmp_path / "b", hooks=hooks, max_steps=2)
    assert events == ["attached", "removed"] * 2


# what is trained, and what is left behind


def test_frozen_weights_stay_and_the_model_is_left_clean(tmp_path: Path) -> None:
    model = tiny_model()
    for name, p in model.named_parameters():
        p.requires_grad_("mlp" in name)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    fit(model, rows_of(), tmp_path, max_steps=3, weight_decay=0.5)
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name]) == ("mlp" not in name), name
    assert not model.training
    assert all(p.grad is None for p in model.parameters())


def test_lora_trains_the_factors_alone(tmp_path: Path) -> None:
    model = add_lora(tiny_model(), LoraOptions(r=2))
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    fit(model, rows_of(), tmp_path, max_steps=3, learning_rate=1e-2)
    changed = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert changed == {n for n in before if "lora_" in n}


def test_record_has_a_loss_and_a_learning_rate_for_each_logged_step(tmp_path: Path) -> None:
    record = fit(
        tiny_model(), rows_of(), tmp_path, max_steps=6, log_steps=2, learning_rate=0.01, scheduler="linear"
    )
    save_record(record, tmp_path / "training.json")
    written = json.loads((tmp_path / "training.json").read_text())
    assert [step for step, _ in written["loss"]] == [2, 4, 6]
    assert written["steps"] == 6
    rates = [rate for _, rate in written["learning_rate"]]
    assert rates == sorted(rates, reverse=True)
    assert 0 < rates[-1] < rates[0] < 0.01
    assert written["seconds"] > 0


@pytest.mark.parametrize(("epochs", "accumulation", "steps"), [(2, 1, 10), (1, 2, 3), (0.5, 1, 3)])
def test_number_of_steps_is_what_check_estimates(
    epochs: float, accumulation: int, steps: int, tmp_path: Path
) -> None:
    # 17 rows in batches of 4 make 5 batches, the last of one row
    options = {"batch_size": 4, "gradient_accumulation": accumulation, "epochs": epochs}
    assert fit(tiny_model(), rows_of(count=17), tmp_path, **options).steps == steps


def test_tensorboard_writes_beside_the_stage_and_not_into_the_folder_that_is_deleted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import TrainerCallback
    from transformers.integrations import integration_utils

    written: list[str] = []

    class TensorBoardCallback(TrainerCallback):
        logging_dir = None

        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            written.append(self.logging_dir or args.output_dir)

    monkeypatch.setattr(integration_utils, "is_tensorboard_available", lambda: True)
    monkeypatch.setitem(integration_utils.INTEGRATION_TO_CALLBACK, "tensorboard", TensorBoardCallback)
    fit(tiny_model(), rows_of(), tmp_path, max_steps=1, report_to=("tensorboard",))
    assert written == [str(tmp_path / "tensorboard")]
