"""ProtectCallback inside transformers' Trainer and TRL's SFTTrainer."""

from __future__ import annotations

import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from transformers.trainer_utils import HPSearchBackend

from holdfast.errors import ConfigError, DataError, PriorMismatchError
from holdfast.hold.drift import Drift
from holdfast.importance.prior import ImportancePrior
from holdfast.models import block_parameters, fingerprints
from holdfast.training.bridge import Bridge
from holdfast.training.callback import REFERENCE, ProtectCallback
from holdfast.training.checkpoints import ours

CHARACTERS = "abcdefgh "


def tiny_model(seed: int = 0) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=16,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            max_position_embeddings=64,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
        )
    )


def character_tokenizer() -> PreTrainedTokenizerFast:
    from tokenizers import Regex, Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Split

    words = ["<pad>", "<bos>", "<eos>", "<unk>", *CHARACTERS]
    tokenizer = Tokenizer(WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Split(Regex("."), "isolated")
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", unk_token="<unk>"
    )


def rows() -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(3, 16, (24, 8), generator=generator)
    return [{"input_ids": row, "labels": row.clone()} for row in ids]


def arguments(folder: Path, **overrides: Any) -> TrainingArguments:
    values: dict[str, Any] = {
        "output_dir": str(folder),
        "max_steps": 6,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "learning_rate": 1e-2,
        "weight_decay": 0.1,
        "warmup_steps": 2,
        "max_grad_norm": 0.5,
        "report_to": [],
        "save_strategy": "no",
        "disable_tqdm": True,
        "use_cpu": True,
        "dataloader_num_workers": 0,
    }
    return TrainingArguments(**(values | overrides))


def half_prior(model: torch.nn.Module) -> ImportancePrior:
    """Every second weight of each tensor."""
    return ImportancePrior(
        {n: (torch.arange(p.numel()) % 2).float().view_as(p) for n, p in block_parameters(model).items()}
    )


def weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in block_parameters(model).items()}


def assert_held(
    before: dict[str, torch.Tensor], after: dict[str, torch.Tensor], prior: ImportancePrior
) -> None:
    moved = []
    for name, mask in ((n, t > 0) for n, t in prior.tensors.items()):
        assert torch.equal(before[name][mask], after[name][mask]), name
        moved.append((before[name][~mask] != after[name][~mask]).float().mean())
    assert min(moved) > 0.5


@pytest.mark.parametrize(
    "options", [{"mechanism": "gate"}, {"mechanism": "anchor", "strength": 1e9}], ids=["gate", "anchor"]
)
@pytest.mark.parametrize("optimizer", ["adamw_torch", "adamw_torch_fused"])
def test_held_weights_stay_in_a_trainer_with_accumulation_clipping_and_decay(
    options: dict[str, Any], optimizer: str, tmp_path: Path
) -> None:
    model = tiny_model()
    prior, before = half_prior(model), weights(model)
    callback = ProtectCallback(prior, **options)
    # without warm-up: at a learning rate of 0 the anchor would not pull, nor would anything move
    args = arguments(tmp_path, optim=optimizer, warmup_steps=0, lr_scheduler_type="constant")
    Trainer(model, args, train_dataset=rows(), callbacks=[callback]).train()
    assert_held(before, weights(model), prior)
    assert callback.protection is not None
    assert callback.protection.summary()["held"] == pytest.approx(0.5)


def test_held_weights_stay_in_an_sft_trainer(tmp_path: Path) -> None:
    trl = pytest.importorskip("trl")
    from datasets import Dataset

    model = tiny_model()
    prior, before = half_prior(model), weights(model)
    data = Dataset.from_list(
        [{"prompt": "abc ", "completion": "cba"}, {"prompt": "de ", "completion": "ed"}] * 8
    )
    args = trl.SFTConfig(
        output_dir=str(tmp_path),
        max_steps=5,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        learning_rate=1e-2,
        weight_decay=0.1,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
        bf16=False,
    )
    trl.SFTTrainer(
        model,
        args,
        train_dataset=data,
        processing_class=character_tokenizer(),
        callbacks=[ProtectCallback(prior, mechanism="gate")],
    ).train()
    assert_held(before, weights(model), prior)


def test_held_lora_factors_stay_and_the_backbone_is_not_touched(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(
        tiny_model(), LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
    )
    prior, before = half_prior(model), weights(model)
    callback = ProtectCallback(prior, mechanism="gate")
    Trainer(model, arguments(tmp_path), train_dataset=rows(), callbacks=[callback]).train()
    assert len(prior) == 2 * 7 * 2  # A and B of seven linear maps in two blocks
    assert_held(before, weights(model), prior)


class StopAt(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop = state.global_step >= self.step


@pytest.mark.parametrize("mechanism", ["anchor", "penalty"])
def test_resumed_training_returns_to_the_first_weights_not_to_the_checkpoint(
    mechanism: str, tmp_path: Path
) -> None:
    options = {"anchor": {"strength": 10.0}, "penalty": {"strength": 10.0}}[mechanism]

    def trainer(folder: Path, *more: TrainerCallback) -> Trainer:
        model = tiny_model()
        callback = ProtectCallback(half_prior(model), mechanism=mechanism, **options)
        args = arguments(folder, save_strategy="steps", save_steps=3)
        return Trainer(model, args, train_dataset=rows(), callbacks=[callback, *more])

    whole = trainer(tmp_path / "whole")
    whole.train()
    trainer(tmp_path / "parts", StopAt(3)).train()
    resumed = trainer(tmp_path / "parts")
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 6
    for name, parameter in block_parameters(whole.model).items():
        assert torch.equal(parameter, block_parameters(resumed.model)[name]), name


def test_a_checkpoint_has_no_weights_beside_the_models_for_servers_to_take_for_its_own(
    tmp_path: Path,
) -> None:
    """vLLM and SGLang load every *.safetensors of a folder without an index; a reference has their names."""
    model = tiny_model()
    args = arguments(tmp_path, save_strategy="steps", save_steps=3)
    callback = ProtectCallback(half_prior(model), strength=10.0)
    Trainer(model, args, train_dataset=rows(), callbacks=[callback]).train()
    for checkpoint in tmp_path.glob("checkpoint-*"):
        assert [file.name for file in checkpoint.glob("*.safetensors")] == ["model.safetensors"]


def test_a_reference_beside_the_model_as_earlier_versions_wrote_it_is_returned_to(tmp_path: Path) -> None:
    def trainer(model: Any, *more: TrainerCallback) -> Trainer:
        args = arguments(tmp_path, save_strategy="steps", save_steps=3)
        callbacks = [ProtectCallback(half_prior(model), strength=10.0), *more]
        return Trainer(model, args, train_dataset=rows(), callbacks=callbacks)

    trainer(tiny_model(), StopAt(3)).train()
    checkpoint = tmp_path / "checkpoint-3"
    (checkpoint / "holdfast" / "reference.safetensors").rename(checkpoint / "reference.safetensors")
    trainer(LlamaForCausalLM.from_pretrained(checkpoint)).train(resume_from_checkpoint=True)


@pytest.mark.parametrize("saved", [True, False])
def test_trainer_made_with_the_checkpoints_weights_returns_to_the_first_ones_or_refuses(
    saved: bool, tmp_path: Path
) -> None:
    def trainer(model: Any, folder: Path, *more: TrainerCallback) -> Trainer:
        callback = ProtectCallback(half_prior(model), strength=10.0)
        args = arguments(folder, save_strategy="steps", save_steps=3)
        return Trainer(model, args, train_dataset=rows(), callbacks=[callback, *more])

    whole = trainer(tiny_model(), tmp_path / "whole")
    whole.train()
    trainer(tiny_model(), tmp_path / "parts", StopAt(3)).train()
    checkpoint = tmp_path / "parts" / "checkpoint-3"
    if not saved:
        (checkpoint / "holdfast" / "reference.safetensors").unlink()
    resumed = trainer(LlamaForCausalLM.from_pretrained(checkpoint), tmp_path / "parts")
    if not saved:
        with pytest.raises(
            ConfigError, match=r"without reference\.safetensors.*the checkpoint's own weights"
        ):
            resumed.train(resume_from_checkpoint=True)
        return
    resumed.train(resume_from_checkpoint=True)
    for name, parameter in block_parameters(whole.model).items():
        assert torch.equal(parameter, block_parameters(resumed.model)[name]), name


def test_each_trial_of_a_search_has_the_reference_in_its_own_checkpoints(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("transformers.integrations.hp_params", lambda trial: trial.params)
    models = [tiny_model(seed) for seed in (0, 1, 2)]
    starts = [weights(model) for model in models]
    given = iter(models)
    args = arguments(tmp_path, max_steps=2, save_strategy="steps", save_steps=2)
    callback = ProtectCallback(half_prior(models[0]))
    trainer = Trainer(
        model_init=lambda: next(given), args=args, train_dataset=rows(), callbacks=[callback]
    )  # its first model is of no trial
    trainer.hp_search_backend, trainer.hp_name = HPSearchBackend.OPTUNA, None
    trainer.hp_space = lambda trial: trial.params
    for number in (0, 1):
        trainer.train(trial=SimpleNamespace(number=number, params={"learning_rate": 1e-3}))
    for number in (0, 1):
        saved = load_file(ours(tmp_path / f"run-{number}" / "checkpoint-2", REFERENCE))
        assert all(torch.equal(saved[n], starts[number + 1][n]) for n in saved)


def test_callback_added_late_refuses_to_resume_without_a_reference(tmp_path: Path) -> None:
    args = arguments(tmp_path, save_strategy="steps", save_steps=3)
    model = tiny_model()
    Trainer(model, args, train_dataset=rows(), callbacks=[StopAt(3)]).train()
    late = Trainer(tiny_model(), args, train_dataset=rows())
    late.add_callback(ProtectCallback(half_prior(model)))
    with pytest.raises(ConfigError, match="weights to return to are unknown"):
        late.train(resume_from_checkpoint=True)


def test_callback_added_late_warns_of_a_prior_of_other_weights(tmp_path: Path) -> None:
    prior = half_prior(tiny_model(seed=1))
    origin = {n: mark for n, mark in fingerprints(tiny_model(seed=1)).items() if n in prior.tensors}
    prior = ImportancePrior(prior.tensors, {"weights": origin})
    trainer = Trainer(tiny_model(seed=2), arguments(tmp_path, max_steps=1), train_dataset=rows())
    trainer.add_callback(ProtectCallback(prior))
    with pytest.warns(UserWarning, match="the prior was made on another model"):
        trainer.train()


def test_each_trainer_that_shares_a_callback_returns_to_the_weights_of_its_own_model(tmp_path: Path) -> None:
    """Both are made before one is trained; a pull beyond 1 keeps what is held at the weights returned to."""
    models = [tiny_model(seed=1), tiny_model(seed=2)]
    before = [weights(model) for model in models]
    prior = half_prior(models[0])
    callback = ProtectCallback(prior, strength=1e9)
    args = arguments(tmp_path, warmup_steps=0, lr_scheduler_type="constant")
    trainers = [Trainer(model, args, train_dataset=rows(), callbacks=[callback]) for model in models]
    for trainer, model, old in zip(trainers, models, before, strict=True):
        trainer.train()
        assert_held(old, weights(model), prior)


def test_a_model_that_the_trainer_makes_anew_returns_to_its_own_weights(tmp_path: Path) -> None:
    made = []

    def make() -> Any:
        made.append(tiny_model(seed=len(made)))
        return made[-1]

    prior = half_prior(tiny_model())
    args = arguments(tmp_path, warmup_steps=0, lr_scheduler_type="constant")
    callback = ProtectCallback(prior, strength=1e9)
    trainer = Trainer(model_init=make, args=args, train_dataset=rows(), callbacks=[callback])
    trainer.train()
    assert_held(weights(tiny_model(seed=len(made) - 1)), weights(trainer.model), prior)


def test_a_resume_from_another_folder_says_where_the_reference_was_looked_for(tmp_path: Path) -> None:
    def trainer(model: Any, folder: Path, *more: TrainerCallback) -> Trainer:
        args = arguments(folder, save_strategy="steps", save_steps=3)
        callbacks = [ProtectCallback(half_prior(model), strength=10.0), *more]
        return Trainer(model, args, train_dataset=rows(), callbacks=callbacks)

    trainer(tiny_model(), tmp_path / "one", StopAt(3)).train()
    checkpoint = tmp_path / "one" / "checkpoint-3"
    other = trainer(LlamaForCausalLM.from_pretrained(checkpoint), tmp_path / "two")
    with pytest.raises(
        ConfigError, match=r"there is no .*two/checkpoint-3/holdfast/reference.*from another folder"
    ):
        other.train(resume_from_checkpoint=str(checkpoint))


def test_weights_loaded_after_the_trainer_was_made_are_told(tmp_path: Path) -> None:
    model, other = tiny_model(), tiny_model(seed=1)
    callback = ProtectCallback(half_prior(model))
    trainer = Trainer(model, arguments(tmp_path, max_steps=1), train_dataset=rows(), callbacks=[callback])
    model.load_state_dict(other.state_dict())
    with pytest.warns(UserWarning, match=r"weights have changed since the trainer was made.*`reference=`"):
        trainer.train()
    with warnings.catch_warnings():  # a second training goes on from what the first has changed
        warnings.filterwarnings("error", message=".*weights have changed since.*")
        trainer.train()


def test_a_model_that_is_cast_as_engines_do_has_not_changed(tmp_path: Path) -> None:
    model = tiny_model()
    callback = ProtectCallback(half_prior(model))
    trainer = Trainer(model, arguments(tmp_path, max_steps=1), train_dataset=rows(), callbacks=[callback])
    model.bfloat16()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*weights have changed since.*")
        trainer.train()


def test_protection_ends_with_the_training(tmp_path: Path) -> None:
    model = tiny_model()
    trainer = Trainer(
        model, arguments(tmp_path), train_dataset=rows(), callbacks=[ProtectCallback(half_prior(model))]
    )
    trainer.train()
    inner = trainer.optimizer.optimizer
    assert not inner._optimizer_step_pre_hooks
    assert not inner._optimizer_step_post_hooks


def test_prior_of_another_model_is_refused_before_training(tmp_path: Path) -> None:
    other = ImportancePrior({"model.layers.0.self_attn.q_proj.weight": torch.ones(3, 3)})
    with pytest.raises(PriorMismatchError, match=r"of another shape \(1\): .*q_proj.weight \(3, 3\) instead"):
        Trainer(tiny_model(), arguments(tmp_path), train_dataset=rows(), callbacks=[ProtectCallback(other)])


def test_callback_takes_a_folder(tmp_path: Path) -> None:
    model = tiny_model()
    half_prior(model).save(tmp_path / "prior")
    callback = ProtectCallback(tmp_path / "prior", control="permuted", seed=4)
    assert callback.prior.meta["control"] == "permuted"
    with pytest.raises(DataError, match=r"no importance prior: there is no '.*nothing'"):
        ProtectCallback(tmp_path / "nothing")


@pytest.mark.parametrize(
    ("arguments_", "message"),
    [
        ({"mechanism": "glue"}, "no mechanism 'glue'. Allowed: gate, anchor, penalty"),
        ({"mechanism": "anchor", "quantile": 0.1}, "quantile: unknown key"),
        ({"mechanism": "gate", "fraction": 0.1}, "`fraction` applies to `shape: top` only"),
        ({"control": "shuffled"}, "control: got 'shuffled'. Allowed: none, permuted"),
    ],
)
def test_wrong_options_are_named(arguments_: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message.replace("(", r"\(")):
        ProtectCallback(ImportancePrior({"w": torch.ones(2)}), **arguments_)


def test_prior_by_inputs_is_held_by_its_whole_pull(tmp_path: Path) -> None:
    model = tiny_model()
    moments = {n: torch.eye(p.shape[1]) for n, p in block_parameters(model).items()}
    callback = ProtectCallback(ImportancePrior(moments, {"kind": "inputs"}), pull=0.6)
    with pytest.raises(ConfigError, match="what is attached doesn't know it"):
        callback.drift()
    moved = []

    class Watch(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            moved.append(callback.drift().total)

    options = arguments(tmp_path, logging_steps=1)
    trainer = Trainer(model, options, train_dataset=rows(), callbacks=[callback, Watch()])
    trainer.train()
    # warm-up of 2 of 6 steps, then linear: rates 0, 1/2, 1, 3/4, 1/2, 1/4 of 1e-2
    assert trainer.optimizer is not None
    assert [g["holdfast_total_rate"] for g in trainer.optimizer.param_groups] == pytest.approx([3e-2, 3e-2])
    assert moved[0] == 0.0  # the first rate is 0
    assert all(value > 0 for value in moved[1:])
    logged = [entry["old_outputs_moved"] for entry in trainer.state.log_history if "loss" in entry]
    assert logged == pytest.approx([100 * value**0.5 for value in moved])
    assert callback.protection is not None
    assert callback.protection.summary()["mean"] == pytest.approx(0.6 * 1e-2 / 3e-2)


@pytest.mark.parametrize("scheduler", ["reduce_lr_on_plateau", "greedy"])
def test_a_pull_under_a_schedule_that_follows_a_metric_is_refused_before_anything_is_computed(
    scheduler: str, tmp_path: Path
) -> None:
    model, calls = tiny_model(), []
    model.register_forward_pre_hook(lambda *_: calls.append(1))
    names = block_parameters(model)
    prior = ImportancePrior({n: torch.eye(p.shape[1]) for n, p in names.items()}, {"kind": "inputs"})
    args = arguments(tmp_path, lr_scheduler_type=scheduler, eval_strategy="steps", eval_steps=2)
    data = {"train_dataset": rows(), "eval_dataset": rows()[:4]}
    with pytest.raises(ConfigError, match=r"reduce_lr_on_plateau, greedy\) nobody knows it: give `strength`"):
        Trainer(model, args, callbacks=[ProtectCallback(prior)], **data).train()
    assert not calls
    Trainer(model, args, callbacks=[ProtectCallback(prior, strength=5.0)], **data).train()
    assert calls


def test_movement_stands_in_the_log_that_the_trainer_itself_writes_and_returns() -> None:
    class Base:
        def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
            logs["epoch"] = 1.0  # as transformers does, whose caller reads it

    class Logging(Bridge, Base):  # type: ignore[misc]
        pass

    trainer = Logging()
    trainer.drift = lambda: Drift({}, 0.0009)
    step, end = {"loss": 2.0}, {"train_loss": 2.0}
    trainer.log(step, None)
    trainer.log(end)
    assert step == pytest.approx({"loss": 2.0, "old_outputs_moved": 3.0, "epoch": 1.0})
    assert end == {"train_loss": 2.0, "epoch": 1.0}


@pytest.mark.parametrize("mechanism", ["gate", "anchor", "penalty", "project"])
def test_log_history_has_the_figures_of_the_hold_beside_the_loss(mechanism: str, tmp_path: Path) -> None:
    model, told = tiny_model(), []

    class Logger(TrainerCallback):
        def on_log(self, *_: Any, logs: Any = None, **__: Any) -> None:
            told.append(dict(logs))

    callbacks = [ProtectCallback(half_prior(model), mechanism), Logger()]
    trainer = Trainer(
        model, arguments(tmp_path, max_steps=2, logging_steps=1), train_dataset=rows(), callbacks=callbacks
    )
    trainer.train()
    losses = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 2
    for entry in losses:
        assert entry["holdfast/held"] > 0
        assert entry["holdfast/not_held"] == 7  # embeddings and norms
    assert [e["holdfast/held"] for e in told if "loss" in e] == [e["holdfast/held"] for e in losses]


def test_the_log_has_the_pull_of_strength_auto_as_it_grows(tmp_path: Path) -> None:
    model = tiny_model()
    moments = {n: torch.eye(p.shape[1]) for n, p in block_parameters(model).items()}
    callback = ProtectCallback(ImportancePrior(moments, {"kind": "inputs"}), strength="auto", bound=1e-4)
    args = arguments(tmp_path, max_steps=3, logging_steps=1, warmup_steps=0)
    trainer = Trainer(model, args, train_dataset=rows(), callbacks=[callback])
    trainer.train()
    losses = [entry for entry in trainer.state.log_history if "loss" in entry]
    pulls = [entry["holdfast/pull"] for entry in losses]
    assert 0 < pulls[0] < pulls[1] < pulls[2]
    assert callback.protection is not None
    assert pulls[2] == pytest.approx(callback.protection.summary()["mean"])
    assert not [entry for entry in losses if "holdfast/held" in entry]


@pytest.mark.parametrize(("frame", "told"), [("{bos}{prompt}", True), ("{prompt}", False)])
def test_rows_that_begin_otherwise_than_the_prior_s_are_told(frame: str, told: bool, tmp_path: Path) -> None:
    """TRL puts no begin token before a text where the tokenizer itself puts none."""
    import holdfast

    pytest.importorskip("trl")
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    texts = [{"prompt": f"{c} a", "completion": c} for c in "abcd"]
    model, tokenizer = tiny_model(), character_tokenizer()
    prior = holdfast.attribute(
        model, tokenizer, texts, importance="fisher", template={"prompt": frame}, progress=False
    )
    args = SFTConfig(str(tmp_path), max_steps=1, report_to="none", use_cpu=True, bf16=False)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        SFTTrainer(
            model,
            args,
            train_dataset=Dataset.from_list(texts),
            processing_class=tokenizer,
            callbacks=[ProtectCallback(prior)],
        ).train()
    found = [str(w.message) for w in said if "begin with '<bos>'" in str(w.message)]
    assert len(found) == told
    assert not told or found[0].startswith("the prior's rows begin with '<bos>' and the trainer's don't")


@pytest.mark.parametrize("kind", ["a stream", "padded on the left", "with a batch dimension"])
def test_rows_whose_beginning_is_not_at_hand_are_trained_without_a_word(kind: str, tmp_path: Path) -> None:
    from datasets import Dataset

    def row(ids: Any) -> dict[str, Any]:
        ids = torch.cat([torch.tensor([1]), ids])  # <bos>
        if kind == "padded on the left":
            padded = torch.cat([torch.zeros(3, dtype=ids.dtype), ids])
            return {"input_ids": padded, "labels": padded, "attention_mask": (padded != 0).long()}
        return {"input_ids": ids, "labels": ids}

    def flat(items: list[dict[str, Any]]) -> dict[str, Any]:
        keys = [key for key in items[0] if key in ("input_ids", "labels", "attention_mask")]
        return {key: torch.stack([torch.as_tensor(item[key]).flatten() for item in items]) for key in keys}

    data: Any = [row(each["input_ids"]) for each in rows()]
    if kind == "with a batch dimension":
        data = [{key: value[None] for key, value in each.items()} for each in data]
    if kind == "a stream":
        data = Dataset.from_list([{k: v.tolist() for k, v in each.items()} for each in data])
        data = data.to_iterable_dataset()
    model = tiny_model()
    prior = ImportancePrior(half_prior(model).tensors, {"first_token": 1})
    trainer = Trainer(
        model,
        arguments(tmp_path, max_steps=1),
        train_dataset=data,
        data_collator=flat,
        processing_class=character_tokenizer(),
        callbacks=[ProtectCallback(prior)],
    )
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        trainer.train()
    assert trainer.state.global_step == 1
    assert not [w for w in said if "begin with" in str(w.message)]
