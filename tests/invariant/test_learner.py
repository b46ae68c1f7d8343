"""One learner, whoever trains: any Trainer, a bare loop, the runner, another process later."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader
from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments, Trainer, TrainingArguments, get_scheduler

from holdfast.config import validate
from holdfast.errors import ConfigError, DataError, ModelError, RunDirectoryError
from holdfast.learner import Learner, LearnerConfig
from holdfast.learner.skills import read_skills
from holdfast.models import ModelOptions, load_model
from holdfast.runner import RunConfig, run
from holdfast.strategies import STRATEGIES, build_strategy
from holdfast.tasks import Encoder, build_stream, toy_tokenizer
from holdfast.tasks.task import Example
from holdfast.training.verbs import model_inputs
from learning_data import mostly_slow, near, rows_of, same, weights_in
from strategy_runs import needs_lora, options_of
from tiny_models import tiny_model
from tiny_runs import tiny_run

TRAINING = {"epochs": 2, "batch_size": 8, "learning_rate": 0.1, "optimizer": "sgd", "checkpoint_steps": 2}
STRONG = {"ewc": {"name": "ewc", "strength": 1.0, "fisher": {"samples": 8}}, "lwf": "lwf"}
Loop = Callable[[Any, Path], Any]


def learner_of(
    strategy: Any = "sequential", folder: Path | None = None, kind: str = "llama", **sections: Any
) -> Learner:
    """A learner of a tiny model that was made in a script."""
    values = {"training": TRAINING, **sections}
    strategy = STRONG.get(strategy, strategy) if isinstance(strategy, str) else strategy
    if kind == "t5":
        values["template"] = {"prompt": "{prompt}{eos}"}
    base = lambda: tiny_model(kind)  # noqa: E731 - what a user would write
    return Learner(tiny_model(kind), toy_tokenizer(), strategy, folder=folder, base_model=base, **values)


def quick(name: str) -> Any:
    return STRONG.get(name, options_of(name))


def learn(learner: Learner, name: str, count: int = 24, **options: Any) -> None:
    with learner.task(name, rows_of(name, count), rows_of(f"{name} test", 4), **options) as stage:
        stage.train()


def learners_part(config: RunConfig) -> LearnerConfig:
    """What a run tells its learner; how it is asked has its defaults in both."""
    ours = set(LearnerConfig.model_fields) - {"evaluation"}
    return validate(LearnerConfig, config.model_dump(include=ours), "test")


def weights(model: Any) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


# whose loop it is


def arguments(cls: Any, stage: Any, folder: Path, **values: Any) -> Any:
    """What a user would give for the same training as the learner's own."""
    return cls(
        output_dir=str(folder),
        num_train_epochs=2,
        per_device_train_batch_size=8,
        learning_rate=0.1,
        optim="sgd",
        seed=stage.seed,
        data_seed=stage.seed,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        dataloader_pin_memory=False,
        **values,
    )


def own(stage: Any, folder: Path) -> None:
    stage.train()


def trainer(stage: Any, folder: Path) -> None:
    stage.trainer(Trainer, args=arguments(TrainingArguments, stage, folder)).train()


def seq2seq(stage: Any, folder: Path) -> None:
    stage.trainer(Seq2SeqTrainer, args=arguments(Seq2SeqTrainingArguments, stage, folder)).train()


def sft(stage: Any, folder: Path, **dataset: Any) -> None:
    from trl import SFTConfig, SFTTrainer

    more = {"max_length": None, "bf16": False, "gradient_checkpointing": False}
    stage.trainer(SFTTrainer, args=arguments(SFTConfig, stage, folder, **more), **dataset).train()


def sft_with_dataset(stage: Any, folder: Path) -> None:
    sft(stage, folder, train_dataset=stage.dataset)


def bare(orders: Sequence[list[int]]) -> Loop:
    """A loop of PyTorch alone, over the rows in this order."""

    def loop(stage: Any, folder: Path) -> None:
        batches = orders[stage.stage.index * 6 : stage.stage.index * 6 + 6]
        assert len(batches) == 6
        model = stage.context.model
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        scheduler = get_scheduler("linear", optimizer, num_warmup_steps=0, num_training_steps=len(batches))
        stage.attach(optimizer, scheduler, len(batches))
        model.train()
        for batch in DataLoader(stage.numbered, batch_sampler=batches, collate_fn=stage.collate):
            stage.watch(batch)
            outputs = model(**model_inputs(batch))
            stage.loss(batch, outputs, outputs.loss).backward()
            stage.before_step()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()

    return loop


def learned_by(loop: Loop, strategy: Any, kind: str, folder: Path) -> tuple[Any, list[list[int]]]:
    """Weights after two tasks, and which rows each batch had."""
    learner, orders = learner_of(strategy, kind=kind), []
    watch = learner.state.strategy.watch

    def recording(model: Any, batch: Any) -> None:
        if "row_ids" in batch:
            orders.append(batch["row_ids"].tolist())
        watch(model, batch)

    learner.state.strategy.watch = recording  # type: ignore[method-assign]
    for name in ("may", "june"):
        with learner.task(name, rows_of(name, 24)) as stage:
            loop(stage, folder / name)
        assert stage.record.steps == 6
    return weights(learner.model), orders


@pytest.mark.parametrize("strategy", sorted(STRONG))
def test_the_loop_makes_no_difference_to_a_causal_model(strategy: str, tmp_path: Path) -> None:
    """transformers' own: bit for bit. TRL and a bare loop sum the loss in another order: to 1e-5."""
    ours, orders = learned_by(own, strategy, "llama", tmp_path)
    seen = [row for batch in orders[:3] for row in batch]
    assert sorted(seen) == list(range(24)), "an epoch sees each row once"
    assert same(ours, learned_by(trainer, strategy, "llama", tmp_path)[0])
    for loop in (sft, sft_with_dataset, bare(orders)):
        assert near(ours, learned_by(loop, strategy, "llama", tmp_path)[0]) < 1e-5
    plain, _ = learned_by(own, "sequential", "llama", tmp_path)
    assert near(ours, plain) > 1e-4, "or the strategy did nothing"


@pytest.mark.parametrize("strategy", mostly_slow(sorted(STRONG), "ewc"))
def test_the_loop_makes_no_difference_to_an_encoder_decoder(strategy: str, tmp_path: Path) -> None:
    ours, orders = learned_by(own, strategy, "t5", tmp_path)
    assert same(ours, learned_by(seq2seq, strategy, "t5", tmp_path)[0])
    assert near(ours, learned_by(bare(orders), strategy, "t5", tmp_path)[0]) < 1e-5


def test_trainer_refuses_what_would_leave_the_strategy_out(tmp_path: Path) -> None:
    learner = learner_of({"name": "replay", "memory": {"count": 4}})
    learn(learner, "may")
    args = TrainingArguments(output_dir=str(tmp_path), report_to="none", use_cpu=True)
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"model": tiny_model("llama")}, "leave out `model`"),
        ({"peft_config": object()}, "`peft_config` would wrap the model"),
        ({"data_collator": list}, "a data_collator belongs to a train_dataset"),
        ({"train_dataset": [1]}, "replays rows of earlier tasks"),
    ]
    with learner.task("june", rows_of("june")) as stage:
        for values, told in wrong:
            with pytest.raises(ConfigError, match=told):
                stage.trainer(args=args, **values)
        assert len(stage.examples) == 50, "40 rows, and a fifth of 50 from the memory"
        stage.trainer(args=args, train_dataset=None).train()


# every strategy


def run_config(name: str, output: Path) -> RunConfig:
    training = {"max_steps": 4, "batch_size": 8, "learning_rate": 3e-3, "checkpoint_steps": 3}
    values = tiny_run(output, strategy=options_of(name), training=training)
    values |= {"model": {"toy": True, "hidden": 32, "layers": 2}, "evaluation": {"zero_shot": False}}
    values["tasks"] = {"source": "toy", "order": ["copy", "flip"], "train_rows": 24, "test_rows": 4}
    if needs_lora(name):
        values["model"]["lora"] = {"r": 4}
    return validate(RunConfig, values, source="test")


@pytest.mark.parametrize("name", mostly_slow(sorted(STRATEGIES), "ewc", "l2p", "multitask", "o-lora"))
def test_strategy_learns_an_unknown_stream_in_pieces_as_the_runner_learns_a_known_one(
    name: str, tmp_path: Path
) -> None:
    """Made anew before each task; weights, state, scores and answers bit for bit."""
    config = run_config(name, tmp_path / "run")
    run(config)
    ours = learners_part(config)
    stream = build_stream(config.tasks, config.seed)
    stages = build_strategy(config.strategy).stages(stream)
    open_ended = build_strategy(config.strategy).open_ended
    folder = tmp_path / "learner"
    for stage in stages:
        rows = [row for task in stage.tasks for row in task.train]
        tests = [row for task in stage.tasks for row in task.test]
        model, tokenizer = load_model(config.model, config.seed, toy_tokenizer)
        with Learner(model, tokenizer, ours, folder=folder) as learner:
            known = {} if open_ended else {"total": stage.total}
            with learner.task(stage.name, rows, tests, **known) as learning:
                learning.train()
    for stage in stages:
        part = Learner.part(stage)
        a, b = tmp_path / "run" / part, folder / part
        assert same(weights_in(a), weights_in(b))
        values = [json.loads((f / "strategy.json").read_text()) for f in (a, b)]
        for value in values:
            value.pop("seconds", None)
        assert values[0] == values[1]
        states = [f / "strategy.safetensors" for f in (a, b)]
        assert states[0].exists() == states[1].exists()
        assert not states[0].exists() or states[0].read_bytes() == states[1].read_bytes()
        if len(stage.tasks) == 1:
            answers = [f / "predictions" / f"{stage.name}.jsonl" for f in (a, b)]
            assert answers[0].read_bytes() == answers[1].read_bytes()


def test_strategy_that_must_know_the_number_of_tasks_asks_for_it() -> None:
    learner = learner_of({"name": "osf", "schedule": "growing"})
    with (
        pytest.raises(ConfigError, match="must know how many tasks there will be"),
        learner.task("a", rows_of("a")),
    ):
        raise AssertionError("never reached")
    learn(learner, "a", total=2)  # a refusal breaks nothing


# going on


@pytest.mark.parametrize(
    "strategy", mostly_slow(["sequential", "ewc", "osf", "l2p", "replay", "kif", "freeze"], "ewc", "l2p")
)
def test_learner_of_a_model_made_in_a_script_is_loaded_from_the_folder_alone(
    strategy: str, tmp_path: Path
) -> None:
    with learner_of(quick(strategy), tmp_path / "whole") as whole:
        learn(whole, "may")
        learn(whole, "june")
    with learner_of(quick(strategy), tmp_path / "pieces") as first:
        learn(first, "may")
    with Learner.load(tmp_path / "pieces") as again:
        assert again.learned == ["may"]
        learn(again, "june")
    assert same(weights_in(tmp_path / "whole/tasks/02-june"), weights_in(tmp_path / "pieces/tasks/02-june"))
    kept = [read_skills(tmp_path / name).matrix for name in ("whole", "pieces")]
    assert kept[0] == kept[1]


def test_adapter_on_a_base_without_a_folder_needs_the_model_and_says_so(tmp_path: Path) -> None:
    with learner_of("sequential", tmp_path / "a", kind="llama-lora") as learner:
        learn(learner, "may")
        learned = weights(learner.model)
    with pytest.raises(ModelError, match=r"Give Learner.load\(folder, model, tokenizer\)"):
        Learner.load(tmp_path / "a")
    with pytest.raises(ConfigError, match=r"got the model alone\. Give model and tokenizer"):
        Learner.load(tmp_path / "a", tiny_model("llama-lora"))
    with Learner.load(tmp_path / "a", tiny_model("llama-lora"), toy_tokenizer()) as again:
        assert same(weights(again.model), learned)


def test_folder_made_without_a_task_needs_the_model_and_says_so(tmp_path: Path) -> None:
    learner_of("ewc", tmp_path / "a").close()
    with pytest.raises(ModelError, match="nothing was learned here yet"):
        Learner.load(tmp_path / "a")
    with pytest.raises(RunDirectoryError, match=r"there is no learner here.*--skills '.*no where' --model"):
        Learner.load(tmp_path / "no where")
    with learner_of("osf", tmp_path / "a") as other:
        assert other.config.strategy.name == "osf"


def test_other_strategy_seed_template_or_model_in_a_folder_is_refused(tmp_path: Path) -> None:
    with learner_of("ewc", tmp_path / "a") as learner:
        learn(learner, "may")
    with pytest.raises(
        RunDirectoryError, match=r"another strategy: strategy.name \('ewc' there, 'osf' here\)\."
    ):
        learner_of("osf", tmp_path / "a")
    with pytest.raises(
        RunDirectoryError, match=r"another strategy: .*strategy.strength \(.* there, 9.0 here\)"
    ):
        learner_of({"name": "ewc", "strength": 9}, tmp_path / "a")
    with pytest.raises(RunDirectoryError, match=r"another seed: seed \(0 there, 1 here\)"):
        learner_of("ewc", tmp_path / "a", seed=1)
    with pytest.raises(
        RunDirectoryError, match=r"another template: template.strip \('.*' there, 'both' here\)"
    ):
        learner_of("ewc", tmp_path / "a", template={"strip": "both"})
    model, _ = load_model(ModelOptions(toy=True, hidden=24, layers=1), 0, toy_tokenizer)
    with pytest.raises(ModelError, match="these weights don't fit this model"):
        Learner.load(tmp_path / "a", model, toy_tokenizer())
    learner_of("ewc", tmp_path / "a").close()  # no refusal kept the lock


def test_save_copies_what_was_learned(tmp_path: Path) -> None:
    learner = learner_of("ewc")
    learn(learner, "may")
    with pytest.raises(ConfigError, match="no folder of its own"):
        learner.save()
    assert learner.save(tmp_path / "kept") == tmp_path / "kept"
    with pytest.raises(RunDirectoryError, match="not empty"):
        learner.save(tmp_path / "kept")
    learn(learner, "june")
    with Learner.load(tmp_path / "kept") as again:
        learn(again, "june")
        assert same(weights(again.model), weights(learner.model))
        assert again.save() == again.save(tmp_path / "kept") == tmp_path / "kept"


def test_two_learners_in_one_folder_are_refused(tmp_path: Path) -> None:
    with learner_of("ewc", tmp_path / "a"):
        told = rf"another learner is working here \(process {os.getpid()}\).* folder of its own\."
        with pytest.raises(RunDirectoryError, match=told):
            learner_of("ewc", tmp_path / "a")
    learner_of("ewc", tmp_path / "a").close()


def test_learner_as_it_was_after_a_task_is_asked_and_learns_no_more(tmp_path: Path) -> None:
    with learner_of("ewc", tmp_path / "a") as learner:
        before = weights(learner.model)
        learn(learner, "may")
        then = weights(learner.model)
        learn(learner, "june")
    config = learner.config
    for after, expected in ((0, before), (1, then)):
        with Learner(
            tiny_model("llama"), toy_tokenizer(), config, folder=tmp_path / "a", after=after
        ) as past:
            assert past.learned == ["may", "june"][:after]
            assert same(weights(past.model), expected)
            with pytest.raises(ConfigError, match="can be asked, and can't learn"):
                learn(past, "july")
    for after in (-1, 3):
        with pytest.raises(ConfigError, match=f"after={after}.*allowed: 0 to 2"):
            Learner(tiny_model("llama"), toy_tokenizer(), config, folder=tmp_path / "a", after=after)


# what goes wrong in a block


def test_block_that_raises_leaves_the_folder_to_a_learner_made_anew(tmp_path: Path) -> None:
    whole = learner_of("ewc", tmp_path / "whole")
    learn(whole, "may")
    learn(whole, "june")
    learner = learner_of("ewc", tmp_path / "a")
    learn(learner, "may")

    def fail() -> None:
        with learner.task("june", rows_of("june", 24), rows_of("june test", 4)) as stage:
            stage.train()
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert learner.learned == ["may"]
    with pytest.raises(ConfigError, match=r"'june' ended in an error.*Make the learner anew"):
        learn(learner, "june")
    again = Learner.load(tmp_path / "a")
    learn(again, "june")
    assert same(weights(again.model), weights(whole.model))


def test_block_that_trains_nothing_is_refused_and_its_task_can_be_taken_back(tmp_path: Path) -> None:
    learner = learner_of("ewc", tmp_path / "a")
    with (
        pytest.raises(ConfigError, match="nothing was trained in its block"),
        learner.task("may", rows_of("may")),
    ):
        pass
    assert read_skills(tmp_path / "a").unfinished == ["may"]
    with Learner.load(tmp_path / "a", tiny_model("llama"), toy_tokenizer()) as again:
        with pytest.raises(RunDirectoryError, match="'01-may' was begun and is not finished"):
            learn(again, "june")
        learn(again, "may")


def test_names_and_rows_are_checked_before_anything_is_written(tmp_path: Path) -> None:
    learner = learner_of("ewc", tmp_path / "a")
    learn(learner, "may")
    with pytest.raises(ConfigError, match="'may' is learned already"):
        learn(learner, "may")
    with pytest.raises(ConfigError, match=r"can't end with \.partial"):
        learn(learner, "v.partial")
    with pytest.raises(DataError, match="no column 'completion'"), learner.task("x", [{"prompt": "a"}]):
        pass
    with pytest.raises(DataError, match="there are no rows"), learner.task("x", []):
        pass
    assert sorted(p.name for p in (tmp_path / "a/tasks").iterdir()) == ["01-may"]
    learn(learner, "june")  # and none of it broke the learner


def test_strategy_that_does_not_fit_leaves_neither_folder_nor_lock(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"model\.lora"):
        learner_of("o-lora", tmp_path / "a")
    assert not (tmp_path / "a").exists()


# what is kept of a task


def test_old_answers_may_be_as_long_later_as_they_were_then(tmp_path: Path) -> None:
    """With 60 letters an answer is cut at nothing but its own length, then and in another process."""
    long = [{"prompt": f"{i}: ", "completion": "abcdefgh" * 7 + f"{i:04d}"} for i in range(24)]
    with learner_of("sequential", tmp_path / "a") as learner:
        with learner.task("may", long, long[:2]) as stage:
            stage.train()
        asked = learner.testing.longest("may")
        assert asked > 60
    with Learner.load(tmp_path / "a") as again:
        learn(again, "june")
        assert again.testing._encoded["may"][1].max_new_tokens == asked
    with Learner.load(tmp_path / "a", evaluation={"max_new_tokens": 3}) as short:
        learn(short, "july")
        assert short.testing._encoded["may"][1].max_new_tokens == 3


def test_text_with_unusual_line_ends_is_kept(tmp_path: Path) -> None:
    odd = [Example(f"a\u2028b\u0085c\x0bd\r {i}", "e\u2029f") for i in range(8)]
    with learner_of("sequential", tmp_path / "a") as learner, learner.task("odd", odd, odd[:3]) as stage:
        stage.train()
    with Learner.load(tmp_path / "a") as again:
        assert list(again.state.tests[0].test) == odd[:3]
    (skill,) = read_skills(tmp_path / "a").skills
    assert (skill.test_rows, skill.drift) == (3, 0.0)


def test_learner_without_a_folder_leaves_nothing_on_the_disk() -> None:
    with learner_of("ewc") as learner:
        learn(learner, "may")
        folder = learner.folder.path
        assert folder.exists()
    assert not folder.exists()


# exported


@pytest.mark.parametrize("name", mostly_slow(sorted(STRATEGIES), "inc-lora", "prog-prompt"))
def test_export_is_a_plain_folder_that_answers_as_the_learner_or_is_refused(
    name: str, tmp_path: Path
) -> None:
    """As it answers the newest task. What no plain folder can hold is refused by name."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    config = run_config(name, tmp_path / "unused")
    ours = learners_part(config)
    model, tokenizer = load_model(config.model, config.seed, toy_tokenizer)
    learner = Learner(model, tokenizer, ours)
    for task in ("may",) if name == "multitask" else ("may", "june"):
        with learner.task(
            task, rows_of(task, 16), total=None if learner.state.strategy.open_ended else 1
        ) as stage:
            stage.train()
    ids = tokenizer("may abcd: ", return_tensors="pt").input_ids
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    with torch.no_grad():
        expected = learner.route(learner.learned[-1])(**inputs).logits[0, -1]
    try:
        folder = learner.export(tmp_path / "plain")
    except ConfigError as error:
        assert config.strategy.name in str(error)  # noqa: PT017 - either is right
        assert STRATEGIES[name].inference != "none"
        return
    if (folder / "adapter_config.json").exists():
        plain, _ = load_model(ModelOptions(toy=True, hidden=32, layers=2), config.seed, toy_tokenizer)
        plain = PeftModel.from_pretrained(plain, folder)
    else:
        plain = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        assert torch.allclose(plain.eval()(**inputs).logits[0, -1], expected, atol=1e-5)


def test_a_month_encodes_each_row_once_and_keeps_none(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Example] = []
    own = Encoder.__call__
    monkeypatch.setattr(Encoder, "__call__", lambda self, row: seen.append(row) or own(self, row))
    with learner_of(quick("attribution")) as learner:
        learn(learner, "may")
        assert len(seen) == len({id(row) for row in seen}) == 24 + 4
        assert not learner.encoder._known
