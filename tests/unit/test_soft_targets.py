"""Soft targets: old rows by the model before the task, new ones by their text, and where they don't apply."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import Trainer, TrainingArguments
from trl import SFTTrainer

from by_hand import answer_logits
from holdfast import Learner
from holdfast.config import validate
from holdfast.errors import ConfigError
from holdfast.evaluation.answers import batch_for
from holdfast.runner import RunConfig
from holdfast.runner.findings import check
from holdfast.strategies import STRATEGIES
from holdfast.tasks import Encoded, Encoder, Example, Task, Template, collate, toy_tokenizer
from holdfast.tasks.memory import Rehearsal, RehearsalOptions
from holdfast.training.bridge import bridged
from holdfast.training.losses import EaftOptions, TokenLoss
from holdfast.training.soft_targets import SoftTargets
from holdfast.training.verbs import ROWS
from strategy_runs import needs_lora, options_of
from tiny_models import tiny_model
from tiny_runs import tiny_run

TOKENIZER = toy_tokenizer()
LOGITS = {"memory": {"count": 4}, "targets": "logits"}


def rows_of(kind: str) -> list[Encoded]:
    encoder = Encoder(TOKENIZER, Template(), encoder_decoder=kind == "t5")
    words = ["a", "bcd", "efgha", "bcdefgh"]
    return encoder.many([Example(f"{'x' * (i % 5)}{i}=", words[i % 4]) for i in range(6)])


def batch_of(model: Any, rows: list[Encoded], numbers: list[int]) -> dict[str, Any]:
    t5 = model.config.is_encoder_decoder
    batch = collate(rows, TOKENIZER.pad_token_id, encoder_decoder=t5, side="right" if t5 else "left")
    return {**batch, ROWS: torch.tensor(numbers)}


def loss_of_bridge(model: Any, batch: Any, soft: SoftTargets | None, options: Any = None) -> Any:
    bridge = object.__new__(bridged(Trainer))
    bridge.soft_targets = soft
    bridge.token_loss = None if options is None else TokenLoss(options)
    return bridge._completion_loss(model, dict(batch), None)[0]


def shaken(model: Any) -> Any:
    """Trained weights a little elsewhere, in place."""
    torch.manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.05 * torch.randn_like(p))
    return model


def log_p(model: Any, row: Encoded) -> torch.Tensor:
    """At the answer's tokens of one row without padding, float64."""
    return answer_logits(model, row).double().log_softmax(-1)


@pytest.mark.parametrize("kind", ["llama", "llama-lora", "gpt2", "t5"])
def test_loss_is_kl_of_old_rows_and_cross_entropy_of_new_ones_over_all_tokens(kind: str) -> None:
    model, rows = tiny_model(kind), rows_of(kind)
    before = copy.deepcopy(model)
    soft = SoftTargets(model, [1, 4])
    shaken(model)
    terms = []
    for number, row in zip([0, 1, 2, 3, 4, -2], rows, strict=True):
        old, now = log_p(before, row), log_p(model, row)
        if number in (1, 4, -2):
            terms += list((old.exp() * (old - now)).sum(-1))
        else:
            terms += [-now[i, token] for i, token in enumerate(row.completion_ids)]
    found = loss_of_bridge(model, batch_of(model, rows, [0, 1, 2, 3, 4, -2]), soft)
    torch.testing.assert_close(found.double(), torch.stack(terms).mean(), rtol=1e-5, atol=1e-6)


def test_new_rows_keep_their_own_loss_and_a_batch_of_them_is_untouched() -> None:
    model, rows = tiny_model("llama"), rows_of("llama")
    soft, batch = SoftTargets(model, [7]), batch_of(model, rows, list(range(6)))
    torch.testing.assert_close(loss_of_bridge(model, batch, soft), loss_of_bridge(model, batch, None))
    assert torch.equal(
        loss_of_bridge(model, batch, soft, EaftOptions()), loss_of_bridge(model, batch, None, EaftOptions())
    )


def test_where_nothing_has_moved_old_rows_pull_nowhere() -> None:
    model, rows = tiny_model("llama"), rows_of("llama")
    soft, batch = SoftTargets(model, range(6)), batch_of(model, rows, list(range(6)))
    loss_of_bridge(model, batch, soft).backward()
    assert max(float(p.grad.abs().max()) for p in model.parameters() if p.grad is not None) < 1e-6
    model.zero_grad()
    loss_of_bridge(model, batch, None).backward()
    assert max(float(p.grad.abs().max()) for p in model.parameters() if p.grad is not None) > 1e-3


def test_replayed_rows_are_told_from_new_ones_of_the_same_text() -> None:
    task = Task("a", train=[Example(f"p{i}", "x") for i in range(8)], test=[])
    rehearsal = Rehearsal(validate(RehearsalOptions, {**LOGITS, "ratio": 0.5}, "test"))
    model = tiny_model("llama")
    assert SoftTargets.of(rehearsal, model, task.train) is None, "nothing is old before the first task"
    rehearsal.learned([task], 0)
    mixed = rehearsal.mixed([Example(f"p{i}", "x") for i in range(8)], 0)
    found = SoftTargets.of(rehearsal, model, mixed)
    assert found is not None
    assert len(found.replayed) == 8 == len(mixed) - 8
    kept = {row.prompt for row in rehearsal.memory.examples}
    assert {mixed[i].prompt for i in found.replayed} == kept


@pytest.mark.parametrize(
    "memory", [{"fraction": 0.5}, {"sampling": "reservoir", "count": 5}, {"sampling": "surprise"}]
)
def test_rows_of_a_task_that_comes_again_are_new_before_and_after_a_resume(memory: Any) -> None:
    task = Task("a", train=[Example(f"p{i}", "x") for i in range(10)], test=[])
    options = validate(RehearsalOptions, {**LOGITS, "memory": memory, "ratio": 0.5}, "test")
    rehearsal, resumed = Rehearsal(options), Rehearsal(options)
    rehearsal.learned([task], 0, lambda task, _: task.train[:5])
    resumed.memory.load_state_dict(json.loads(json.dumps(rehearsal.memory.state_dict())))
    found = [each.replayed(each.mixed(task.train, 0)) for each in (rehearsal, resumed)]
    assert len(found[0]) == 10
    assert found[0] == found[1]


def test_what_has_a_loss_of_its_own_is_refused(tmp_path: Path) -> None:
    rows = [Example(f"q{i}=", "ab") for i in range(8)]
    arguments = TrainingArguments(str(tmp_path / "t"), max_steps=1, use_cpu=True, report_to="none")

    def in_a_loop(learner: Learner, stage: Any) -> None:
        stage.attach(torch.optim.AdamW(learner.model.parameters()))

    def in_a_trainer(_: Learner, stage: Any) -> None:
        stage.trainer(SFTTrainer, args=arguments)

    for train, where in ((in_a_loop, "attach"), (in_a_trainer, "trainer")):
        folder = tmp_path / where
        learner = Learner(tiny_model("llama"), TOKENIZER, "sequential", folder=folder, replay=LOGITS)
        with learner.task("one", rows) as stage:
            stage.trainer(args=arguments).train()
        said = rf"stage.{where}: replayed rows are answered by logits \(targets: logits\), and .* own"
        with pytest.raises(ConfigError, match=said), learner.task("two", rows) as stage:
            train(learner, stage)


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"replay": {"targets": "logits", "memory": "none"}}, "`sampling: none` keeps none"),
        ({"replay": LOGITS, "training": {"trainer": "sft"}}, "doesn't combine with `training.trainer: sft`"),
        *(
            ({"replay": LOGITS, "strategy": name}, f"doesn't combine with `strategy: {name}`, under which")
            for name in ("slao", "lora-routed", "lora-oracle", "l2p", "prog-prompt")
        ),
    ],
    ids=["no memory", "sft", "slao", "lora-routed", "lora-oracle", "l2p", "prog-prompt"],
)
def test_what_would_be_ignored_is_refused(sections: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        validate(RunConfig, tiny_run(tmp_path, **sections), source="test")


def test_check_counts_the_copy(tmp_path: Path) -> None:
    config = validate(RunConfig, tiny_run(tmp_path / "run", replay=LOGITS), source="test")
    assert "copy of what is trained (targets: logits)" in dict(check(config).estimate)


@pytest.mark.parametrize("name", sorted(STRATEGIES))
def test_the_teacher_of_soft_targets_is_the_model_that_answered_before_the_task(name: str) -> None:
    """Of every strategy: what it declares, with the weights as `begin` leaves them and its hooks attached."""
    strategy, model = STRATEGIES[name].strategy, tiny_model("llama")
    if not strategy.trains or name == "ssr":
        pytest.skip("it trains nothing, or asks the base")
    if needs_lora(name):
        model = get_peft_model(model, LoraConfig(r=4, lora_alpha=32, target_modules=["q_proj", "v_proj"]))
    optimizer = {} if strategy.optimizer is None else {"optimizer": strategy.optimizer}
    training = {"max_steps": 3, "batch_size": 8, "learning_rate": 3e-2, **optimizer}
    learner = Learner(model, TOKENIZER, {"name": name, **options_of(name)}, training=training)
    rows = [[Example(f"{task}{i}=", "ab"[i % 2]) for i in range(8)] for task in "xyz"]
    for number in range(2):
        with learner.task(f"t{number}", rows[number], total=3) as stage:
            stage.train()
    batch = batch_for(learner.model, TOKENIZER, learner.encoder.many(rows[0]), "left")
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    length = batch["labels"].shape[1]
    learned = learner.state.strategy
    with torch.no_grad():
        route = learned.route(learner.model.eval(), "t0" if learned.needs_task_identity else None)
        before = route(**inputs).logits[:, -length:]
    with learner.task("t2", rows[2], total=3) as stage:
        teacher = SoftTargets(learner.model, []).teacher
        trained = [p for p in learner.model.parameters() if p.requires_grad]
        handles = learned.attach(learner.model, torch.optim.AdamW(trained, lr=0.0))
        learned.watch(learner.model, batch)
        found = teacher.logits(learner.model, inputs, length)
        for handle in handles:
            handle.remove()
        stage.train()
    place = batch["labels"] != -100
    moved = float((found[place] - before[place]).abs().max())
    assert (moved < 1e-5) == strategy.begins_as_before, moved
