"""A task under a Learner, trained by trainers of the user: several, evaluation, losses of their own."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import IA3Config, LoraConfig, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import (
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from holdfast.errors import ConfigError, ModelError
from holdfast.learner import Learner
from holdfast.tasks import toy_tokenizer
from holdfast.training.bridge import bridged
from holdfast.training.verbs import Verbs, model_inputs
from learning_data import rows_of
from strategy_runs import options_of
from tiny_models import tiny_model

TRAINING = {"max_steps": 2, "batch_size": 4, "learning_rate": 1e-2}


def adapted(r: int = 2, **values: Any) -> Any:
    return get_peft_model(tiny_model("llama"), LoraConfig(r=r, target_modules=["q_proj", "v_proj"], **values))


def arguments(folder: Path, cls: Any = TrainingArguments, **values: Any) -> Any:
    common: dict[str, Any] = {
        "max_steps": 2,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "use_cpu": True,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
    }
    return cls(output_dir=str(folder), **(common | values))


class Touched(TrainerCallback):
    """How many hooks and forwards are on the model's modules while it is trained."""

    def __init__(self) -> None:
        self.counts: list[int] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.counts.append(touched(kwargs["model"]))


def touched(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + ("forward" in m.__dict__) for m in model.modules())


@pytest.mark.parametrize("anew", [True, False], ids=["another", "the same"])
@pytest.mark.parametrize(
    "strategy",
    [
        "o-lora",
        "attribution, a LoRA a task",
        "sapt-lora",
        "migu",
        {"name": "kif", "sensitivity": {"order": "second"}},
    ],
    ids=str,
)
def test_a_second_training_of_a_task_has_the_strategy_on_the_model_once(
    strategy: Any, anew: bool, tmp_path: Path
) -> None:
    options = options_of(strategy) if isinstance(strategy, str) else strategy
    learner, seen = Learner(adapted(), toy_tokenizer(), options, training=TRAINING), Touched()
    with learner.task("first", rows_of("first", 8)) as stage:
        stage.train()
    with learner.task("second", rows_of("second", 8)) as stage:
        for number in range(2):
            if anew or number == 0:
                trainer = stage.trainer(Trainer, args=arguments(tmp_path), callbacks=[seen])
            trainer.train()
    assert seen.counts[0] > 0
    assert seen.counts == [seen.counts[0]] * 4
    assert touched(learner.model) == 0
    learner.close()


def test_what_an_adapter_s_folder_would_lose_is_refused_before_anything_is_learned(tmp_path: Path) -> None:
    beside = adapted()
    beside.get_parameter("base_model.model.model.norm.weight").requires_grad_(True)
    said = (
        r"1 of the 9 trained tensors are not in it: model\.norm\.weight\. They would be lost.*modules_to_save"
    )
    with pytest.raises(ModelError, match=said):
        Learner(beside, toy_tokenizer(), "sequential", folder=tmp_path)
    named = get_peft_model(tiny_model("llama"), LoraConfig(target_modules=["q_proj"]), adapter_name="june")
    with pytest.raises(ModelError, match=r"lora_A\.june\.weight.*Give the adapter no name of its own"):
        Learner(named, toy_tokenizer(), "sequential", folder=tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "config",
    [
        LoraConfig(target_modules=["q_proj"], modules_to_save=["norm"]),
        LoraConfig(target_modules=["q_proj"], bias="all"),
        LoraConfig(target_modules=["q_proj"], use_dora=True, trainable_token_indices=[1, 2]),
        IA3Config(target_modules=["v_proj"], feedforward_modules=[]),
        PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"),
    ],
    ids=["modules to save", "biases", "DoRA and tokens", "IA3", "prompts"],
)
def test_what_peft_saves_with_its_adapter_is_taken(config: Any) -> None:
    model = get_peft_model(tiny_model("qwen2"), config)
    Learner(model, toy_tokenizer(), "sequential").close()


@pytest.mark.parametrize(
    "strategy",
    [{"name": "kif", "sensitivity": {"order": "second"}}, {"name": "l2p", "diversify": True}],
    ids=str,
)
def test_rows_that_a_trainer_evaluates_are_not_counted_as_learned(strategy: Any, tmp_path: Path) -> None:
    states = []
    for values in ({}, {"eval_strategy": "steps", "eval_steps": 1}):
        torch.manual_seed(0)
        model = tiny_model("llama") if strategy["name"] == "l2p" else adapted()
        learner = Learner(model, toy_tokenizer(), strategy, training=TRAINING)
        with learner.task("one", rows_of("one", 8)) as stage:
            evaluated = {"eval_dataset": stage.numbered} if values else {}
            stage.trainer(Trainer, args=arguments(tmp_path, **values), **evaluated).train()
        states.append(learner.state.strategy.state_dict()[0])
        learner.close()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_an_evaluation_s_loss_is_the_task_s_and_its_logits_are_of_all_positions(tmp_path: Path) -> None:
    """A penalty of thousands is in the loss that is trained, not in what a checkpoint is chosen by."""
    shapes = []

    def metrics(answers: Any) -> dict[str, float]:
        shapes.append((answers.predictions.shape[:2], answers.label_ids.shape))
        return {}

    options = {"name": "o-lora", "norm": 1e3}
    learner = Learner(adapted(), toy_tokenizer(), options, training=TRAINING)
    with learner.task("one", rows_of("one", 8)) as stage:
        args = arguments(tmp_path, learning_rate=0.0, logging_steps=1, eval_strategy="steps", eval_steps=1)
        trainer = stage.trainer(Trainer, args=args, eval_dataset=stage.numbered, compute_metrics=metrics)
        trainer.train()
    learner.close()
    trained = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    evaluated = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert min(trained) > 1000
    assert max(evaluated) < 10
    assert all(predicted == labels for predicted, labels in shapes)


def test_an_evaluation_may_write_answers_to_the_stage_s_own_rows(tmp_path: Path) -> None:
    frame = {"prompt": "{prompt}{eos}"}
    learner = Learner(tiny_model("t5"), toy_tokenizer(), "sequential", template=frame, training=TRAINING)
    with learner.task("one", rows_of("one", 8)) as stage:
        args = arguments(tmp_path, Seq2SeqTrainingArguments, predict_with_generate=True)
        trainer = stage.trainer(Seq2SeqTrainer, args=args, eval_dataset=stage.numbered)
        trainer.train()
        found = trainer.predict(stage.numbered)
    learner.close()
    assert len(found.predictions) == 8


@pytest.mark.parametrize("strategy", [{"name": "lora-moe", "experts": 2}, options_of("sapt-lora")], ids=str)
def test_what_a_strategy_trains_beside_the_adapter_goes_back_to_the_best_step_with_it(
    strategy: dict[str, Any], tmp_path: Path
) -> None:
    """The first step is the best by a metric that falls; PEFT's own loading brings back the adapter alone."""
    falling = iter(range(0, -10, -1))
    learner = Learner(adapted(), toy_tokenizer(), strategy, training=TRAINING)
    with learner.task("one", rows_of("one", 8)) as stage:
        stage.train()
    with learner.task("two", rows_of("two", 8)) as stage:
        args = arguments(
            tmp_path,
            learning_rate=0.1,
            eval_strategy="steps",
            eval_steps=1,
            save_strategy="steps",
            save_steps=1,
            load_best_model_at_end=True,
            metric_for_best_model="falling",
        )
        metrics = lambda _: {"falling": float(next(falling))}  # noqa: E731 - what a user would write
        trainer = stage.trainer(Trainer, args=args, eval_dataset=stage.numbered, compute_metrics=metrics)
        trainer.train()
        assert trainer.state.best_global_step == 1
        kept = {name: value.clone() for name, value in learner.state.strategy.stage_state_dict().items()}
    learner.close()
    steps = [load_file(tmp_path / f"checkpoint-{n}" / "holdfast" / "strategy.safetensors") for n in (1, 2)]
    assert kept.keys() == steps[0].keys()
    assert all(torch.equal(kept[name], steps[0][name]) for name in kept)
    assert any(not torch.equal(steps[0][name], steps[1][name]) for name in kept)


def no_loss(outputs: Any, labels: Any, num_items_in_batch: Any = None) -> Any:
    return outputs.logits.sum() * 0


@pytest.mark.parametrize("how", ["label smoothing", "a function"])
def test_a_loss_that_a_plain_trainer_is_given_is_the_one_that_is_trained(how: str, tmp_path: Path) -> None:
    smooths = how == "label smoothing"
    values: dict[str, Any] = {} if smooths else {"compute_loss_func": no_loss}
    values["args"] = arguments(tmp_path, label_smoothing_factor=0.5 if smooths else 0.0)
    model = tiny_model("llama")
    alone, learner = copy.deepcopy(model), Learner(model, toy_tokenizer(), "sequential", training=TRAINING)
    with learner.task("one", rows_of("one", 8)) as stage:
        stage.trainer(Trainer, **values).train()
        rows, collate = stage.numbered, stage.collate
    learner.close()
    plain = Trainer(
        alone, train_dataset=rows, data_collator=lambda items: model_inputs(collate(items)), **values
    )
    plain.train()
    for ours, theirs in zip(model.parameters(), alone.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    special = {"training": {**TRAINING, "loss": "eaft"}}
    learner = Learner(tiny_model("llama"), toy_tokenizer(), "sequential", **special)
    said, task = "with label smoothing, or with a compute_loss_func", learner.task("one", rows_of("one", 8))
    with pytest.raises(ConfigError, match=said), task as stage:
        stage.trainer(Trainer, **values)


class Adds(Verbs):
    """A term whose gradient is 1 for each weight of the head, whatever a step is cut into."""

    looks = False

    def loss(self, model: nn.Module, batch: Any, outputs: Any, loss: Tensor) -> Tensor:
        total: Any = model.get_output_embeddings().weight.sum()  # type: ignore[operator]
        return 0 * loss + total

    def observe(self, model: nn.Module, step: int, scale: float) -> None:
        self.seen = float(model.get_output_embeddings().weight.grad[0, 0])  # type: ignore[operator]


class WholeLosses(Trainer):
    loss_is_scaled_for_ga = False


class WithoutKeywords(Trainer):
    """As with a model whose forward takes no further ones."""

    def __init__(self, **values: Any) -> None:
        super().__init__(**values)
        self.model_accepts_loss_kwargs = False


def by_count(outputs: Any, labels: Any, num_items_in_batch: Any = None) -> Any:
    return outputs.logits.sum() / num_items_in_batch


@pytest.mark.parametrize("accumulation", [1, 4])
@pytest.mark.parametrize(
    ("cls", "values"),
    [
        (Trainer, {}),
        (WithoutKeywords, {}),
        (WithoutKeywords, {"compute_loss_func": by_count}),
        pytest.param(
            WholeLosses,
            {},
            marks=pytest.mark.skipif(
                not hasattr(Trainer, "loss_is_scaled_for_ga"), reason="this transformers doesn't ask"
            ),
        ),
        ("GRPOTrainer", {}),
    ],
)
def test_a_methods_term_weighs_the_same_whatever_a_trainer_does_with_accumulated_losses(
    cls: Any, values: dict[str, Any], accumulation: int, tmp_path: Path
) -> None:
    model, given = tiny_model("llama"), {"gradient_accumulation_steps": accumulation, "max_grad_norm": 0.0}
    given |= {"max_steps": 1}
    if isinstance(cls, str):
        trl = pytest.importorskip("trl")
        cls = getattr(trl, cls)
        toy_tokenizer().save_pretrained(tmp_path / "tokenizer")
        model.config._name_or_path = str(tmp_path / "tokenizer")
        few = {"num_generations": 2, "max_completion_length": 4, "bf16": False}
        args = arguments(tmp_path, trl.GRPOConfig, **few, **given)
        values = {
            "reward_funcs": lambda completions, **_: [float(len(c)) for c in completions],
            "processing_class": toy_tokenizer(),
        }
        rows = Dataset.from_list([{"prompt": "copy a="}] * 32)
    else:
        args = arguments(tmp_path, **given)
        rows = Dataset.from_list([{"input_ids": [4, 5, 6, 7], "labels": [4, 5, 6, 7]}] * 32)
    trainer = bridged(cls)(model=model, args=args, train_dataset=rows, **values)
    trainer.verbs = Adds()
    trainer.train()
    assert trainer.verbs.seen == pytest.approx(1.0)


def grpo(stage: Any, folder: Path) -> Any:
    trl = pytest.importorskip("trl")
    few = {"num_generations": 4, "max_completion_length": 4, "bf16": False}
    return stage.trainer(
        trl.GRPOTrainer,
        args=arguments(folder, trl.GRPOConfig, **few),
        reward_funcs=lambda completions, **_: [float(len(text)) for text in completions],
        train_dataset=Dataset.from_list([{"prompt": row["prompt"]} for row in rows_of("one", 8)]),
    )


def dpo(stage: Any, folder: Path) -> Any:
    trl = pytest.importorskip("trl")
    pairs = [{"prompt": r["prompt"], "chosen": r["completion"], "rejected": "a"} for r in rows_of("one", 8)]
    args = arguments(folder, trl.DPOConfig, bf16=False)
    return stage.trainer(trl.DPOTrainer, args=args, train_dataset=Dataset.from_list(pairs))


@pytest.mark.parametrize("make", [grpo, dpo])
def test_a_penalty_on_weights_goes_with_a_trainer_whose_batches_have_no_answers(
    make: Any, tmp_path: Path
) -> None:
    """Its evaluations too."""
    learner = Learner(adapted(), toy_tokenizer(), {"name": "o-lora", "norm": 0.1}, training=TRAINING)
    with learner.task("one", rows_of("one", 8)) as stage:
        trainer = make(stage, tmp_path)
        trainer.train()
        found = trainer.evaluate(trainer.train_dataset)
    learner.close()
    assert trainer.state.global_step == 2
    assert "eval_loss" in found


@pytest.mark.parametrize("make", [grpo, dpo])
def test_a_loss_on_answers_is_refused_by_name_where_batches_have_none(make: Any, tmp_path: Path) -> None:
    learner = Learner(adapted(), toy_tokenizer(), "lwf", training=TRAINING)
    said, task = r"strategy 'lwf' reads .*labels of each batch", learner.task("one", rows_of("one", 8))
    with pytest.raises(ConfigError, match=said), task as stage:
        make(stage, tmp_path).train()


def test_a_penalty_on_weights_costs_no_forward_pass_more(tmp_path: Path) -> None:
    trl = pytest.importorskip("trl")
    calls = []
    for strategy in ("inc-lora", {"name": "o-lora", "norm": 0.1}):
        learner = Learner(adapted(), toy_tokenizer(), strategy, training=TRAINING)
        with learner.task("one", rows_of("one", 8)) as stage:
            args = arguments(tmp_path, trl.SFTConfig, bf16=False, gradient_checkpointing=False)
            trainer = stage.trainer(trl.SFTTrainer, args=args)
            calls.append(0)

            def count(*_: Any) -> None:
                calls[-1] += 1

            hook = learner.model.get_input_embeddings().register_forward_hook(count)
            trainer.train()
            hook.remove()
        learner.close()
    assert calls[0] == calls[1] > 0


def recomputing(folder: Path, reentrant: bool) -> Any:
    return arguments(
        folder, gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": reentrant}
    )


@pytest.mark.parametrize("strategy", ["sapt-lora", "lora-moe"])
@pytest.mark.parametrize("loop", ["trainer", "own"])
def test_checkpointing_that_would_lose_a_strategy_s_gradients_is_refused_before_the_first_step(
    strategy: str, loop: str, tmp_path: Path
) -> None:
    learner = Learner(adapted(r=4), toy_tokenizer(), options_of(strategy), training=TRAINING)
    said = f"'{strategy}'.*use_reentrant.: False"
    with learner.task("first", rows_of("first", 8)) as stage:
        if loop == "trainer":
            with pytest.raises(ConfigError, match=said):
                stage.trainer(Trainer, args=recomputing(tmp_path, True)).train()
        else:
            learner.model.gradient_checkpointing_enable({"use_reentrant": True})
            optimizer = torch.optim.AdamW([p for p in learner.model.parameters() if p.requires_grad])
            with pytest.raises(ConfigError, match=said):
                stage.attach(optimizer)
        stage.trainer(Trainer, args=recomputing(tmp_path, False)).train()
    learner.close()


@pytest.mark.parametrize(
    "strategy",
    [
        {"name": "lora-moe", "balance": 0.0},
        "lora-routed",
        "o-lora",
        {"name": "kif-lora", "sensitivity": {"order": "second"}},
        "migu",
    ],
    ids=str,
)
def test_any_checkpointing_trains_the_same_under_a_strategy_that_it_is_not_refused_for(
    strategy: Any, tmp_path: Path
) -> None:
    found = []
    for args in (arguments(tmp_path), recomputing(tmp_path, False), recomputing(tmp_path, True)):
        options = options_of(strategy) if isinstance(strategy, str) else strategy
        learner = Learner(adapted(r=4), toy_tokenizer(), options, training=TRAINING)
        for name in ("first", "second"):
            with learner.task(name, rows_of(name, 8)) as stage:
                stage.trainer(Trainer, args=args).train()
        found.append([p.detach().clone() for p in learner.model.parameters()])
        learner.close()
    for other in found[1:]:
        assert all(map(torch.equal, found[0], other))
