"""Losses of answer tokens: the formulas, the gradient, accumulation, and where they don't apply."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F
from transformers import Trainer, TrainingArguments

from by_hand import answer_logits
from holdfast import Learner
from holdfast.config import validate
from holdfast.errors import ConfigError
from holdfast.models import LoraOptions, add_lora
from holdfast.models.base import Base, adapter_is_new
from holdfast.runner import RunConfig, run
from holdfast.strategies import STRATEGIES
from holdfast.tasks import Encoded, Encoder, Example, Template, collate, toy_tokenizer
from holdfast.training.bridge import bridged
from holdfast.training.loop import train
from holdfast.training.losses import EaftOptions, KlToBaseOptions, TokenLoss, divergence, normalised_entropy
from holdfast.training.options import TrainingOptions
from strategy_runs import needs_lora, options_of
from tiny_models import tiny_model
from tiny_runs import tiny_run

TOKENIZER = toy_tokenizer()
PAD = TOKENIZER.pad_token_id


def rows_of(kind: str, count: int = 8) -> list[Encoded]:
    encoder = Encoder(TOKENIZER, Template(), encoder_decoder=kind == "t5")
    words = ["a", "bcd", "efgha", "bcdefgh"]
    return encoder.many([Example(f"{'x' * (i % 5)}{i}=", words[i % 4]) for i in range(count)])


def moved(model: Any, seed: int = 1) -> Any:
    """A copy whose trained weights are a little elsewhere."""
    torch.manual_seed(seed)
    other = copy.deepcopy(model)
    with torch.no_grad():
        for p in other.parameters():
            if p.requires_grad:
                p.add_(0.05 * torch.randn_like(p))
    return other


def base_of(model: Any) -> Base:
    return Base(lambda: copy.deepcopy(model), adapter_is_new(model))


def answers(model: Any, row: Encoded) -> torch.Tensor:
    """Log-probabilities at the answer's tokens of one row without padding, float64."""
    return answer_logits(model, row).double().log_softmax(-1)


def loss_of_bridge(
    model: Any, rows: list[Encoded], options: Any, base: Base | None, count: Any = None
) -> Any:
    """What the bridge makes of one batch, as in training."""
    bridge = object.__new__(bridged(Trainer))
    bridge.token_loss = TokenLoss.of(options, base)
    t5 = model.config.is_encoder_decoder
    batch = collate(rows, PAD, encoder_decoder=t5, side="right" if t5 else "left")
    return bridge._completion_loss(model, batch, count)[0]


# the formulas


def test_entropy_by_hand() -> None:
    logits = torch.tensor([[0.0, 0.0, 0.0, 0.0], [0.0, math.log(3.0), -50.0, -60.0], [30.0, 0.0, 0.0, 0.0]])
    # the two likeliest of the second row have 1/4 and 3/4
    quarter = -(0.25 * math.log(0.25) + 0.75 * math.log(0.75)) / math.log(2)
    torch.testing.assert_close(normalised_entropy(logits, 2), torch.tensor([1.0, quarter, 0.0]))
    assert normalised_entropy(logits, 20)[0] == 1.0  # of four tokens: over ln 4


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.lists(st.floats(-30, 30), min_size=5, max_size=5), min_size=1, max_size=4), st.integers(2, 9)
)
def test_entropy_lies_between_0_and_1_and_a_shift_changes_nothing(rows: list[list[float]], top: int) -> None:
    logits = torch.tensor(rows)
    weight = normalised_entropy(logits, top)
    assert ((weight >= 0) & (weight <= 1)).all()
    torch.testing.assert_close(normalised_entropy(logits + 7.0, top), weight, rtol=0, atol=1e-4)


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 10_000))
def test_divergence_is_that_of_the_definition_and_zero_only_at_the_base(seed: int) -> None:
    torch.manual_seed(seed)
    base, now = 3 * torch.randn(4, 7), 3 * torch.randn(4, 7)
    p, q = base.double().softmax(-1), now.double().softmax(-1)
    by_hand = (p * (p / q).log()).sum(-1)
    torch.testing.assert_close(divergence(base, now).double(), by_hand, rtol=1e-4, atol=1e-5)
    assert (divergence(base, now) > 0).all()
    assert divergence(base, base + 2.0).abs().max() < 1e-5


@pytest.mark.parametrize("kind", ["llama", "llama-lora", "gpt2", "t5"])
def test_eaft_of_a_batch_is_the_papers_sum_over_tokens(kind: str) -> None:
    model, rows = moved(tiny_model(kind)), rows_of(kind)
    terms = []
    for row in rows:
        for log_p, token in zip(answers(model, row), row.completion_ids, strict=True):
            best = log_p.topk(5).values.softmax(-1)
            terms.append(-log_p[token] * -(best * best.log()).sum() / math.log(5))
    ours = loss_of_bridge(model, rows, EaftOptions(top=5), None)
    torch.testing.assert_close(ours.double(), torch.stack(terms).mean(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", ["llama", "llama-lora", "gpt2", "t5"])
def test_kl_to_base_of_a_batch_is_cross_entropy_and_the_kl_of_the_base(kind: str) -> None:
    start = tiny_model(kind)
    base, model, rows = base_of(start), moved(start), rows_of(kind)
    terms = []
    for row in rows:
        before, now = answers(start, row), answers(model, row)
        for p, q, token in zip(before, now, row.completion_ids, strict=True):
            terms.append(-q[token] + 0.5 * (p.exp() * (p - q)).sum())
    ours = loss_of_bridge(model, rows, KlToBaseOptions(weight=0.5), base)
    torch.testing.assert_close(ours.double(), torch.stack(terms).mean(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", ["llama", "llama-lora", "t5"])
def test_kl_to_base_adds_nothing_at_the_base(kind: str) -> None:
    model, rows = tiny_model(kind), rows_of(kind)
    plain = loss_of_bridge(model, rows, EaftOptions(), None)
    away = loss_of_bridge(model, rows, KlToBaseOptions(weight=100.0), base_of(model))
    labels = torch.cat([answers(model, r)[range(len(r.completion_ids)), r.completion_ids] for r in rows])
    assert away.item() == pytest.approx(-labels.mean().item(), rel=1e-5)
    assert plain < away  # an entropy below that of the uniform distribution weighs less


def test_no_gradient_goes_through_the_entropy() -> None:
    logits = torch.randn(3, 6, requires_grad=True)
    targets = torch.tensor([0, 1, 2])
    loss = TokenLoss(EaftOptions(top=4))(None, {}, logits, targets, None).sum()  # type: ignore[arg-type]
    loss.backward()
    weight = normalised_entropy(logits, 4)
    by_hand = weight[:, None] * (logits.softmax(-1) - F.one_hot(targets, 6))
    torch.testing.assert_close(logits.grad, by_hand.detach())


# the base


@pytest.mark.parametrize("kind", ["llama", "llama-lora"])
def test_the_base_answers_as_before_and_leaves_the_model_as_it_is(kind: str) -> None:
    model = tiny_model(kind)
    ids = torch.arange(6)[None] + 3
    before, base = model(input_ids=ids).logits, base_of(model)
    if kind == "llama":
        kept = copy.deepcopy(model)
        base = Base(lambda: copy.deepcopy(kept), False)
    frozen = next(p for p in model.parameters() if p.requires_grad)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.1)
    frozen.requires_grad_(False)  # as a strategy may: PEFT alone would switch it on again
    model.train()
    now = {n: p.requires_grad for n, p in model.named_parameters()}
    with base.answering(model) as answering, torch.no_grad():
        assert torch.equal(answering(input_ids=ids).logits, before)
    assert model.training
    assert {n: p.requires_grad for n, p in model.named_parameters()} == now
    assert not torch.allclose(model.eval()(input_ids=ids).logits, before)


def test_an_adapter_that_was_trained_is_not_taken_for_a_new_one() -> None:
    assert adapter_is_new(tiny_model("llama-lora"))
    assert not adapter_is_new(moved(tiny_model("llama-lora")))
    assert not adapter_is_new(tiny_model("llama"))
    beside = add_lora(tiny_model("llama"), LoraOptions(r=2))
    next(beside.parameters()).requires_grad_(True)
    assert not adapter_is_new(beside)  # what is trained outside the adapter stays when it is off


# in training


@pytest.mark.parametrize("loss", ["eaft", {"name": "kl_to_base", "weight": 3.0}])
@pytest.mark.parametrize("kind", ["llama", "llama-lora", "t5"])
def test_two_micro_batches_of_4_equal_one_batch_of_8(kind: str, loss: Any, tmp_path: Path) -> None:
    trained = []
    for size, parts in ((8, 1), (4, 2)):
        start = tiny_model(kind)
        model, base = moved(start), base_of(start)
        options = TrainingOptions.model_validate(
            {"loss": loss, "batch_size": size, "gradient_accumulation": parts, "max_steps": 2,
             "optimizer": "sgd", "learning_rate": 0.1, "scheduler": "constant"}
        )  # fmt: skip
        folder = tmp_path / f"{parts}" / "checkpoints"
        train(model, rows_of(kind), options, tokenizer=TOKENIZER, folder=folder, seed=0, base=base)
        trained.append(model)
    one, two = ({n: p for n, p in m.named_parameters() if p.requires_grad} for m in trained)
    assert any(not torch.equal(one[n], p) for n, p in moved(tiny_model(kind)).named_parameters() if n in one)
    for name, weight in one.items():
        torch.testing.assert_close(two[name], weight, rtol=0, atol=2e-6)


def test_a_strong_kl_to_base_keeps_the_model_nearer_to_its_base(tmp_path: Path) -> None:
    away = []
    for weight in (1e-6, 30.0):
        start = tiny_model("llama-lora")
        base, model = base_of(start), tiny_model("llama-lora")
        options = TrainingOptions(
            loss=KlToBaseOptions(weight=weight), batch_size=8, max_steps=15, learning_rate=1e-2
        )
        train(
            model,
            rows_of("llama"),
            options,
            tokenizer=TOKENIZER,
            folder=tmp_path / f"{weight}",
            seed=0,
            base=base,
        )
        pairs = [(answers(start, row), answers(model, row)) for row in rows_of("llama")]
        away.append(sum((p.exp() * (p - q)).sum().item() for p, q in pairs))
    assert away[1] < 0.3 * away[0]


@pytest.mark.parametrize(
    "name", sorted(name for name, method in STRATEGIES.items() if method.strategy.trains)
)
def test_every_strategy_learns_under_it(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[float] = []

    def noted(*arguments: Any) -> Any:
        losses = TokenLoss.__call__(*arguments)
        seen.append(losses.sum().item())
        return losses

    monkeypatch.setattr("holdfast.training.loop.TokenLoss", type("Noted", (TokenLoss,), {"__call__": noted}))
    values = tiny_run(tmp_path, strategy=options_of(name), evaluation={"zero_shot": False})
    values["tasks"] = {**values["tasks"], "order": ["copy", "flip"], "train_rows": 16, "test_rows": 2}
    values["training"] = {"max_steps": 2, "batch_size": 8, "loss": "kl_to_base"}
    values["model"] = {"toy": True, "hidden": 16, "layers": 2}
    if needs_lora(name):
        values["model"] = {**values["model"], "lora": {"r": 4}}
    run(validate(RunConfig, values, "test"))
    assert len(seen) >= (2 if name == "multitask" else 4)


@pytest.mark.parametrize("kind", ["llama", "t5"])
@pytest.mark.parametrize("loss", ["eaft", "kl_to_base"])
def test_the_loss_on_prompts_is_added_to_either_unchanged(kind: str, loss: str, tmp_path: Path) -> None:
    start = tiny_model(kind)
    elsewhere = moved(start)

    def first_loss(loss: str, weight: float) -> float:
        values = {"loss": loss, "lm_weight": weight, "max_steps": 1, "learning_rate": 1e-9, "log_steps": 1}
        record = train(
            copy.deepcopy(start),
            rows_of(kind),
            validate(TrainingOptions, values, "test"),
            tokenizer=TOKENIZER,
            folder=tmp_path / f"{loss}{weight}",
            seed=0,
            base=Base(lambda: copy.deepcopy(elsewhere), False),
        )
        return record.loss[0][1]

    plain, other = first_loss("cross_entropy", 0.0), first_loss(loss, 0.0)
    added = first_loss("cross_entropy", 0.5) - plain
    assert added > 0.1
    assert abs(other - plain) > 1e-3
    assert first_loss(loss, 0.5) - other == pytest.approx(added, rel=1e-3)


# where they don't apply


def test_an_unknown_loss_is_told_with_what_there_is() -> None:
    with pytest.raises(ConfigError, match=r"loss: no such choice: 'eafd'.*Did you mean 'eaft'.*kl_to_base"):
        validate(TrainingOptions, {"loss": "eafd"}, "test")


def test_trls_trainer_in_a_config_refuses_another_loss() -> None:
    with pytest.raises(
        ConfigError, match=r"`loss: eaft` doesn't combine with `trainer: sft`.*`trainer: auto`"
    ):
        validate(TrainingOptions, {"loss": "eaft", "trainer": "sft"}, "test")


ROWS = [{"prompt": f"{i}=", "completion": "ab"} for i in range(8)]


class OwnLoss(Trainer):
    """A trainer with a loss of its own."""

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        return super().compute_loss(*args, **kwargs)


def test_a_trainer_of_the_users_own_class_refuses_another_loss(tmp_path: Path) -> None:
    with Learner(tiny_model("llama"), TOKENIZER, "sequential", training={"loss": "eaft"}) as learner:
        arguments = TrainingArguments(str(tmp_path), report_to="none", use_cpu=True, max_steps=1)
        refused = pytest.raises(ConfigError, match=r"training.loss is 'eaft', and OwnLoss computes a loss of")
        with refused, learner.task("a", ROWS) as stage:
            stage.trainer(OwnLoss, args=arguments)


def test_a_loop_of_ones_own_refuses_another_loss() -> None:
    learner = Learner(tiny_model("llama"), TOKENIZER, "sequential", training={"loss": "eaft"})
    refused = pytest.raises(ConfigError, match=r"stage.attach: training.loss is 'eaft'.*stage.train\(\)")
    with learner, refused, learner.task("a", ROWS) as stage:
        stage.attach(torch.optim.SGD(learner.model.parameters(), lr=0.1))


def test_a_plain_trainer_on_the_stages_rows_takes_it(tmp_path: Path) -> None:
    logged = {}
    for loss in ("cross_entropy", "eaft"):
        with Learner(tiny_model("llama"), TOKENIZER, "sequential", training={"loss": loss}) as learner:
            arguments = TrainingArguments(
                str(tmp_path),
                report_to="none",
                use_cpu=True,
                max_steps=1,
                logging_steps=1,
                remove_unused_columns=False,
            )
            with learner.task("a", ROWS) as stage:
                stage.trainer(args=arguments).train()
            logged[loss] = stage.record.loss[0][1]
    assert logged["eaft"] < logged["cross_entropy"]


def test_kl_to_base_without_a_base_says_what_to_give() -> None:
    learner = Learner(tiny_model("llama"), TOKENIZER, "sequential", training={"loss": "kl_to_base"})
    refused = pytest.raises(ConfigError, match=r"training.loss: kl_to_base, or.*give base_model=, a function")
    with learner, refused, learner.task("a", ROWS) as stage:
        stage.train()


def test_kl_to_base_of_a_learner_without_lora_takes_a_copy_and_frees_it() -> None:
    options = {"loss": {"name": "kl_to_base", "weight": 0.1}, "max_steps": 1}
    made = []

    def base_model() -> Any:
        made.append(tiny_model("llama"))
        return made[-1]

    with Learner(
        tiny_model("llama"), TOKENIZER, "sequential", base_model=base_model, training=options
    ) as learner:
        for name in ("a", "b"):
            with learner.task(name, ROWS) as stage:
                stage.train()
    assert len(made) == 2
    assert learner.state.base._copy is None


def test_a_learner_that_is_rebuilt_from_its_folder_still_has_its_base(tmp_path: Path) -> None:
    tiny_model("llama").save_pretrained(tmp_path / "base")
    TOKENIZER.save_pretrained(tmp_path / "base")
    from transformers import AutoModelForCausalLM

    model = add_lora(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), LoraOptions(r=2))
    options = {"loss": {"name": "kl_to_base"}, "max_steps": 2, "learning_rate": 1e-2}
    with (
        Learner(model, TOKENIZER, "sequential", folder=tmp_path / "skills", training=options) as learner,
        learner.task("a", ROWS) as stage,
    ):
        stage.train()
    with Learner.load(tmp_path / "skills") as again:
        assert not adapter_is_new(again.model)
        with again.state.base.answering(again.model) as base, torch.no_grad():
            ids = torch.arange(6)[None] + 3
            torch.testing.assert_close(base(input_ids=ids).logits, tiny_model("llama")(input_ids=ids).logits)
