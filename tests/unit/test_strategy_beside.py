"""Under `importance: inputs`, what is no linear map is held too, weight by weight."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import Trainer, TrainingArguments

import holdfast
from holdfast.config import validate
from holdfast.errors import ConfigError
from holdfast.models import save_model, tiny_llama
from holdfast.runner import RunConfig, run
from holdfast.runner.findings import check
from holdfast.tasks import toy_tokenizer
from kills import Killed, kill_when
from tiny_runs import tiny_run

INPUTS = {"name": "attribution", "importance": {"name": "inputs", "samples": 4}}
EMBEDDINGS = "model.embed_tokens.weight"


def config_of(output: Path, tasks: int = 2, **changes: Any) -> RunConfig:
    strategy = {**INPUTS, **changes.pop("strategy", {})}
    sections = {"model": {"toy": True, "hidden": 16, "layers": 1, "trainable": "all"}, "strategy": strategy}
    values = tiny_run(output, **{**sections, **changes})
    values["tasks"] = {
        "source": "toy",
        "order": ["copy", "flip", "head"][:tasks],
        "train_rows": 16,
        "test_rows": 4,
    }
    return validate(RunConfig, values, source="test")


def weights(folder: Path, number: str) -> dict[str, torch.Tensor]:
    return load_file(next((folder / "tasks").glob(f"{number}-*")) / "model" / "model.safetensors")


def sizes_of_changes(folder: Path) -> dict[str, float]:
    """How far the second task moved each tensor."""
    first, second = weights(folder, "01"), weights(folder, "02")
    return {name: float((first[name] - second[name]).norm()) for name in first}


def unmoved(folder: Path) -> dict[str, int]:
    """Of each tensor, how many weights the second task left bit for bit where it found them."""
    first, second = weights(folder, "01"), weights(folder, "02")
    return {name: int((first[name] == second[name]).sum()) for name in first}


def test_embeddings_and_norms_are_held_and_nothing_is_said_to_be_free(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*not held")
        run(config_of(tmp_path / "held"))
    with pytest.warns(UserWarning, match=r"not held, .*embed_tokens"):
        run(config_of(tmp_path / "free", strategy={"others": "none"}))
    held, free = (sizes_of_changes(tmp_path / name) for name in ("held", "free"))
    used = {name for name in held if name == EMBEDDINGS or "norm" in name}
    assert len(used) > 3
    assert sum(held[n] for n in used) < 0.8 * sum(free[n] for n in used), {
        n: (held[n], free[n]) for n in used
    }
    assert unmoved(tmp_path / "held")[EMBEDDINGS] > unmoved(tmp_path / "free")[EMBEDDINGS]
    state = tmp_path / "held" / "tasks" / "02-flip" / "strategy.safetensors"
    beside = {n.removeprefix("beside.") for n in load_file(state) if n.startswith("beside.")}
    assert used <= beside
    assert not any("proj" in name for name in beside)  # the maps have their matrices
    assert not (tmp_path / "free" / "tasks" / "01-copy" / "prior_beside").exists()


def test_killed_while_it_rates_the_others_a_run_ends_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(config_of(tmp_path / "whole"))
    with monkeypatch.context() as patch:
        kill_when(patch, "holdfast.strategies.context.compute_prior", 4)  # of the second task, the others
        with pytest.raises(Killed):
            run(config_of(tmp_path / "killed"))
    run(config_of(tmp_path / "killed"))
    whole, killed = weights(tmp_path / "whole", "02"), weights(tmp_path / "killed", "02")
    assert all(torch.equal(whole[name], killed[name]) for name in whole)


def mixture(folder: Path) -> dict[str, str]:
    """A tiny random Mixtral in a folder, as ``model:`` has it."""
    from transformers import MixtralConfig, MixtralForCausalLM

    tokenizer = toy_tokenizer()
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=len(tokenizer),
        **sizes,
        num_key_value_heads=2,
        num_local_experts=3,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=tokenizer.bos_token_id,
    )
    save_model(MixtralForCausalLM(config), tokenizer, folder)
    return {"path": str(folder)}


def test_experts_of_a_mixture_are_held(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*not held")
        run(config_of(tmp_path / "run", tasks=3, model=mixture(tmp_path / "base")))
    held = {name: count for name, count in unmoved(tmp_path / "run").items() if ".experts." in name}
    assert held
    assert all(count > 0 for count in held.values())


def test_lora_on_experts_is_rated_beside_the_maps_and_no_matrix_is_empty(tmp_path: Path) -> None:
    """PEFT multiplies its factors into the experts: no input ever goes through them."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*not held")
        lora = {"r": 2, "target_modules": "all-linear"}
        run(config_of(tmp_path / "run", model={**mixture(tmp_path / "base"), "lora": lora}))
    state = load_file(tmp_path / "run" / "tasks" / "02-flip" / "strategy.safetensors")
    beside = {name.removeprefix("beside.") for name in state if name.startswith("beside.")}
    assert sum(".experts." in name for name in beside) == 4
    assert not any(".experts." in name for name in state.keys() - {f"beside.{n}" for n in beside})
    assert all(tensor.any() for tensor in state.values())


def test_check_counts_what_the_others_take_or_says_that_they_are_free(tmp_path: Path) -> None:
    held = check(config_of(tmp_path))
    free = check(config_of(tmp_path, strategy={"others": "none"}))
    assert any("of what is no linear map" in what for what, _ in held.estimate)
    assert not any("of what is no linear map" in what for what, _ in free.estimate)
    assert any("are no linear maps and not held; strategy.others=fisher" in note for note in free.remarks)


@pytest.mark.parametrize(
    ("strategy", "message"),
    [
        (
            {"importance": "fisher", "others": "fisher"},
            "`others` is for what `importance: inputs` can't rate",
        ),
        ({"others": "inputs"}, "`others` takes an importance by weight, such as fisher or lrp; or none"),
    ],
)
def test_others_that_make_no_sense_are_refused(tmp_path: Path, strategy: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config_of(tmp_path, strategy=strategy)


def test_in_a_trainer_of_ones_own_the_callback_holds_both_and_resumes_the_same(tmp_path: Path) -> None:
    """What the first prior leaves out is rated by a second; a checkpoint has the weights of both."""
    tokenizer = toy_tokenizer()
    rows = [{"prompt": f"copy {x}=", "completion": x} for x in ("abc", "hfa", "dea", "gbc")]
    ids = [{"input_ids": t, "labels": t} for t in (tokenizer("copy abc=abc").input_ids,) * 8]

    def made() -> Any:
        torch.manual_seed(0)
        return tiny_llama(tokenizer, hidden=16, layers=1, heads=2)

    prior = holdfast.attribute(made(), tokenizer, rows, progress=False)
    beside = holdfast.attribute(made(), tokenizer, rows, importance="fisher", beside=prior, progress=False)
    assert EMBEDDINGS in beside.tensors
    assert not beside.tensors.keys() & prior.tensors.keys()

    def train(out: str, strength: float, resume: Any = None) -> Any:
        model = made()
        hold = holdfast.ProtectCallback(prior, beside=beside.save(tmp_path / "beside"), strength=strength)
        args = TrainingArguments(
            str(tmp_path / out),
            max_steps=4,
            save_steps=2,
            per_device_train_batch_size=2,
            learning_rate=1e-2,
            use_cpu=True,
            report_to="none",
            disable_tqdm=True,
        )
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message=".*not held")
            Trainer(model, args, train_dataset=ids, callbacks=[hold]).train(resume_from_checkpoint=resume)
        return dict(model.named_parameters())

    whole = train("whole", 100.0)
    again = train("whole", 100.0, resume=str(tmp_path / "whole" / "checkpoint-2"))
    assert all(torch.equal(whole[name], again[name]) for name in whole)
    start = dict(made().named_parameters())
    moved = {name: float((whole[name] - start[name]).norm()) for name in (EMBEDDINGS, "model.norm.weight")}
    assert all(size > 0 for size in moved.values())
    with pytest.raises(ConfigError, match="rates nothing that `beside` leaves out"):
        holdfast.attribute(made(), tokenizer, rows, importance="lrp", beside=prior, progress=False)
