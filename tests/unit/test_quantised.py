"""LoRA on weights of 4 and 8 bits (QLoRA): rated, held, kept and opened again like any other."""

from __future__ import annotations

import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, Trainer, TrainingArguments
from typer.testing import CliRunner

pytest.importorskip("bitsandbytes")

import holdfast
from contexts import context_of, stage_of
from holdfast import Learner, ProtectCallback
from holdfast.attribution import AttributionOptions, attribute_batches
from holdfast.cli import app
from holdfast.config import validate
from holdfast.errors import ConfigError, ModelError
from holdfast.importance import ImportancePrior, compute_prior
from holdfast.models import ModelOptions, load_model, weights_of
from holdfast.models.adapters import (
    lora_factors,
    lora_layers,
    plain_weight,
    scale_of,
    under_adapter,
    under_lora,
)
from holdfast.runner import RunConfig, run
from holdfast.runner.findings import check
from holdfast.strategies.lora.merged import form_for
from holdfast.tasks import toy_tokenizer
from learning_data import rows_of, write_rows
from lora_cases import STREAM, TOKENIZER, learn, strategy_of, train_by_chance
from quantised import first_layer, loaded, stored, unpacked
from strategy_runs import METHODS, options_of
from tiny_runs import tiny_run

PAD = TOKENIZER.pad_token_id
INPUTS = {"name": "inputs", "samples": 4, "correct_only": False}
LORA = {"r": 4, "target_modules": "all-linear"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return stored(tmp_path_factory.mktemp("model") / "base")


def encoded(model: Any, count: int = 4) -> list[Any]:
    return context_of(model).encoder.many(STREAM.tasks[0].train[:count])


@pytest.mark.parametrize("whole", [False, True], ids=["factors", "whole maps"])
@pytest.mark.parametrize("importance", [INPUTS, {**INPUTS, "correct_only": None, "weighting": "uniform"}])
@pytest.mark.parametrize(("bits", "apart"), [("4bit", 1e-5), ("8bit", 0.1)])
def test_prior_is_that_of_the_values_which_the_bits_stand_for(
    folder: Path, bits: str, apart: float, importance: Any, whole: bool
) -> None:
    """8 bits round the inputs of each map too: by up to 1 in 127 of a row's largest."""
    model = loaded(folder, bits)
    found = []
    for one in (model, unpacked(folder, model)):
        parameters = under_adapter(one) if whole else None
        found.append(compute_prior(one, encoded(one), importance, pad_id=PAD, parameters=parameters))
    got, expected = found
    assert list(got.tensors) == list(expected.tensors)
    for name, c in expected.tensors.items():
        assert float((got.tensors[name] - c).norm()) <= apart * float(c.norm()), name
    got.meta["whole_maps"] = whole
    got.check_fits(model)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("bits", ["4bit", "8bit"])
def test_what_is_computed_in_16_bits_is_rated_too(folder: Path, bits: str, dtype: str) -> None:
    model = loaded(folder, bits, dtype=dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of 16 bits
        prior = compute_prior(model, encoded(model), INPUTS, pad_id=PAD, parameters=under_adapter(model))
        expected = compute_prior(loaded(folder, bits), encoded(model), INPUTS, pad_id=PAD)
    assert prior.meta["conservation_max_relative_error"] < 5e-2
    assert all(c.isfinite().all() and c.any() for c in prior.tensors.values())
    for name, c in prior.tensors.items():  # what goes into A is what goes into the map
        of_a = expected.tensors[name.replace(".weight", ".lora_A.weight")]
        assert float((c * of_a).sum() / (c.norm() * of_a.norm())) > 0.7, name


@pytest.mark.parametrize("bits", ["4bit", "8bit"])
@pytest.mark.parametrize("halves", ["path", "weights", "none"])
@pytest.mark.parametrize("rules", ["attnlrp", "paper"])
def test_relevance_is_conserved_through_quantised_layers(
    folder: Path, bits: str, rules: Any, halves: Any
) -> None:
    class Nothing:
        def update(self, name: str, weight: torch.Tensor, grad_S: torch.Tensor) -> None:
            pass

    model = loaded(folder, bits)
    report = attribute_batches(
        model,
        encoded(model),
        options=AttributionOptions(rules=rules, halves=halves),
        fold=Nothing(),
        pad_id=PAD,
        correct_only=False,
    )
    assert report.conservation_max_relative_error is not None
    assert report.conservation_max_relative_error < 1e-4
    lost = report.absorbed.get("rounding of quantised inputs", 0.0)
    assert abs(lost) < 0.1 or rules == "paper", "which divides by small scores"
    assert lost or bits == "4bit", "what 8 bits round is booked"


@pytest.mark.parametrize("bits", ["4bit", "8bit"])
def test_a_lora_a_task_on_quantised_weights_leaves_them_and_measures_drift(
    folder: Path, bits: str, tmp_path: Path
) -> None:
    model = loaded(folder, bits)
    before = {n: p.detach().clone() for n, p in model.named_parameters() if "lora_" not in n}
    strategy = strategy_of("attribution", importance=INPUTS)
    strategy.check(model)
    learn(strategy, model, 0, tmp_path)
    strategy.begin(context_of(model, tmp_path), stage_of(STREAM, 1))
    wholes = []
    optimizer = torch.optim.SGD([f for pair in lora_factors(model) for f in pair], lr=0.1)
    strategy.attach(model, optimizer)
    for change in (False, True):
        if change:
            train_by_chance(model, 9)
        pairs = zip(lora_layers(model).items(), lora_factors(model), strict=True)
        wholes.append(
            {n: (plain_weight(under_lora(la)) + scale_of(la) * b @ a).double() for (n, la), (a, b) in pairs}
        )
    moved = whole = 0.0
    for name, w in wholes[0].items():
        c = strategy.prior.tensors[name].double()  # type: ignore[attr-defined]
        c, change_OI = c * len(c) / c.trace(), wholes[1][name] - w
        moved += float((change_OI @ c @ change_OI.T).trace())
        whole += float((w @ c @ w.T).trace())
    assert strategy.drift().total == pytest.approx(moved / whole, rel=1e-4)  # type: ignore[attr-defined]
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters() if n in before)


def test_only_whole_weights_take_a_task_s_lora_in(folder: Path) -> None:
    model = loaded(folder, "4bit")
    assert form_for(model, None, "attribution") == "adapters"
    with pytest.raises(ConfigError, match=r"merge_lora: 'weights'.*quantised.*merge_lora=adapters"):
        form_for(model, "weights", "attribution")


def test_a_kind_of_layer_that_is_not_known_as_a_map_keeps_one_lora(folder: Path) -> None:
    class Packed(torch.nn.Module):  # as GPTQ's and HQQ's, which are no nn.Linear
        def __init__(self) -> None:
            super().__init__()
            self.in_features = self.out_features = 64
            self.register_buffer("qweight", torch.zeros(8, 64, dtype=torch.int32))

    model = loaded(folder, None)
    next(iter(lora_layers(model).values())).base_layer = Packed()
    with pytest.warns(UserWarning, match=r"one LoRA for all tasks.*is a Packed"):
        assert form_for(model, None, "attribution") is None
    with pytest.raises(ConfigError, match=r"is a Packed, which is not known as one.*merge_lora=none"):
        form_for(model, "adapters", "attribution")


@pytest.mark.parametrize("bits", ["4bit", "8bit"])
def test_holdfast_learn_goes_on_month_after_month(folder: Path, tmp_path: Path, bits: str) -> None:
    for month in ("may", "june"):
        data = write_rows(tmp_path / f"{month}.jsonl", rows_of(month, 12))
        first = ["--model", str(folder), "--lora", f"model.quantise={bits}"] if month == "may" else []
        short = ["training.max_steps=2", "threads=1"]
        said = CliRunner().invoke(app, ["learn", str(data), "--skills", str(tmp_path / "s"), *first, *short])
        assert said.exit_code == 0, said.output
    with Learner.load(tmp_path / "s") as learner:
        assert learner.learned == ["may", "june"]
        assert form_for(learner.model, None, "attribution") == "adapters"
        assert type(first_layer(learner.model)).__name__ == (
            "Linear4bit" if bits == "4bit" else "Linear8bitLt"
        )


def test_a_script_s_model_is_made_again_as_it_was(folder: Path, tmp_path: Path) -> None:
    how = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32)  # FP4
    base = AutoModelForCausalLM.from_pretrained(folder, quantization_config=how)
    model = get_peft_model(base, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    ids = torch.tensor([[3, 4, 5, 6]])
    training = {"max_steps": 2, "learning_rate": 1e-2}
    with Learner(model, toy_tokenizer(), folder=tmp_path / "s", training=training) as learner:
        with learner.task("may", rows_of("may", 8), rows_of("may", 2)) as stage:
            stage.train()
        with torch.no_grad():
            before = learner.model(ids).logits
    with Learner.load(tmp_path / "s") as learner:
        layer = first_layer(learner.model)
        assert layer.weight.quant_state.quant_type == "fp4"
        with torch.no_grad():
            assert torch.equal(learner.model(ids).logits, before)


def test_a_model_that_is_stored_in_4_bits_is_opened_as_it_is(folder: Path, tmp_path: Path) -> None:
    how = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype="float32")
    AutoModelForCausalLM.from_pretrained(folder, quantization_config=how).save_pretrained(tmp_path)
    toy_tokenizer().save_pretrained(tmp_path)
    model = loaded(tmp_path, None)
    assert type(first_layer(model)).__name__ == "Linear4bit"
    assert form_for(model, None, "attribution") == "adapters"
    with pytest.raises(ModelError, match=r"is quantised.*--lora"):
        load_model(ModelOptions(path=str(tmp_path)))


def test_the_callback_holds_in_somebody_s_trainer(folder: Path, tmp_path: Path) -> None:
    moved = {}
    for pull in (0.0, 1e6):
        model = loaded(folder, "4bit")
        prior = compute_prior(model, encoded(model), INPUTS, pad_id=PAD)
        before = [f.detach().clone() for pair in lora_factors(model) for f in pair]
        ids = torch.randint(3, 30, (8, 6), generator=torch.Generator().manual_seed(0)).tolist()
        arguments = TrainingArguments(
            str(tmp_path), max_steps=3, learning_rate=1e-2, use_cpu=True, report_to="none", save_strategy="no"
        )
        trainer = Trainer(
            model,
            arguments,
            train_dataset=[{"input_ids": row, "labels": row} for row in ids],  # type: ignore[arg-type]
            callbacks=[ProtectCallback(prior, {"name": "anchor", "pull": pull})],
        )
        trainer.train()
        after = [f for pair in lora_factors(model) for f in pair]
        moved[pull] = sum(float((a - b).norm()) for a, b in zip(after, before, strict=True))
    assert moved[1e6] < 0.5 * moved[0.0]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"path": "x"}, r"`quantise` needs a LoRA"),
        ({"toy": True, "lora": LORA}, r"not to `toy`"),
        ({"path": "x", "lora": LORA, "random_init": True}, r"random_init"),
        ({"path": "x.gguf", "lora": LORA}, r"GGUF"),
        ({"path": "x", "lora": LORA, "dtype": "float64"}, r"not float64"),
    ],
)
def test_what_can_t_be_quantised_is_said_before_anything_is_loaded(given: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        validate(ModelOptions, {"quantise": "4bit", **given}, "model")


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("holdfast.models.options.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"bitsandbytes.*holdfast\[quantised\]"):
        validate(ModelOptions, {"path": "x", "lora": LORA, "quantise": "8bit"}, "model")


def test_a_model_that_passes_no_gradient_any_more_is_refused(folder: Path) -> None:
    """What bitsandbytes does at the first answer on a CPU with AVX-512 BF16."""
    model = loaded(folder, "4bit")
    layer = first_layer(model)
    assert not layer.support_avx512bf16_for_cpu, "answers don't pack it"
    layer.weight.quant_state.packing_format_for_cpu = True
    with pytest.raises(ModelError, match=r"repacked its 4 bits.*Load it again"):
        holdfast.attribute(model, TOKENIZER, rows_of("may", 2), progress=False)
    with pytest.raises(ModelError, match="repacked"):
        Learner(model, TOKENIZER)


def test_a_layer_whose_gradient_is_another_s_is_refused(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = loaded(folder, "4bit")
    layers = [under_lora(layer) for layer in lora_layers(model).values()]
    own = type(layers[0]).forward

    def other(self: Any, x: torch.Tensor) -> torch.Tensor:
        right = own(self, x.detach())
        return right.detach() - x.sum() + x.sum().detach()

    monkeypatch.setattr(type(layers[0]), "forward", other)
    with pytest.raises(ModelError, match=r"layers\.\d.*not the gradient of what it computes"):
        compute_prior(model, encoded(model), INPUTS, pad_id=PAD)


def test_a_run_that_was_killed_goes_on_in_the_same_bits(folder: Path, tmp_path: Path) -> None:
    values = tiny_run(
        tmp_path / "run",
        model={"path": str(folder), "lora": LORA, "quantise": "4bit"},
        strategy={"name": "attribution", "importance": INPUTS},
        training={"max_steps": 3, "batch_size": 8, "learning_rate": 3e-3},
    )
    whole = run(validate(RunConfig, values, source="test"))
    shutil.copytree(tmp_path / "run", tmp_path / "other")
    for part in sorted((tmp_path / "other" / "tasks").iterdir())[1:]:
        shutil.rmtree(part)
    (tmp_path / "other" / "metrics.json").unlink()
    again = run(validate(RunConfig, {**values, "output": str(tmp_path / "other")}, source="test"))
    assert again["matrix"] == whole["matrix"]
    priors = [
        ImportancePrior.load(sorted((tmp_path / o / "tasks").iterdir())[2] / "prior")
        for o in ("run", "other")
    ]
    assert all(torch.equal(c, priors[1].tensors[name]) for name, c in priors[0].tensors.items())


@pytest.mark.parametrize("bits", ["4bit", "8bit"])
def test_what_a_model_takes_is_told_within_a_tenth(folder: Path, bits: str, tmp_path: Path) -> None:
    values = tiny_run(tmp_path / "run", model={"path": str(folder), "lora": LORA, "quantise": bits})
    told = dict(check(validate(RunConfig, values, source="test")).estimate)
    model, whole = loaded(folder, bits), loaded(folder, None)
    assert told["parameters"].startswith(f"{sum(p.numel() for p in whole.parameters()):,} (")
    assert weights_of(whole)[1] == 4 * weights_of(whole)[0]
    layers = [under_lora(layer) for layer in lora_layers(model).values()]
    scales = sum(getattr(layer.weight, "SCB", torch.empty(0)).numel() * 4 for layer in layers)
    taken = model.get_memory_footprint() + scales
    assert weights_of(model) == (weights_of(whole)[0], pytest.approx(taken, rel=0.1))


def test_an_exported_adapter_has_a_card_of_what_was_learned(folder: Path, tmp_path: Path) -> None:
    options = ModelOptions(path=str(folder), lora=LORA, quantise="4bit")
    with Learner(*load_model(options), training={"max_steps": 1}, folder=tmp_path / "s") as learner:
        with learner.task("may", rows_of("may", 8), rows_of("may", 2)) as stage:
            stage.train()
        card = (learner.export(tmp_path / "out") / "README.md").read_text()
    assert "# out" in card
    assert "| may | 8 |" in card
    assert "More Information Needed" not in card


@pytest.mark.slow
@pytest.mark.parametrize("bits", ["4bit", "8bit"])
@pytest.mark.parametrize("name", METHODS)
def test_every_strategy_learns_on_quantised_weights_or_is_refused(
    folder: Path, name: str, bits: str, tmp_path: Path
) -> None:
    values = tiny_run(
        tmp_path / "run",
        model={"path": str(folder), "lora": LORA, "quantise": bits},
        strategy=options_of(name),
        training={"max_steps": 4, "batch_size": 8, "learning_rate": 3e-3},
    )
    values["template"] = {**values.get("template", {}), "max_prompt_tokens": 16, "max_completion_tokens": 8}
    config = validate(RunConfig, values, source="test")
    refused = {"ewc-lora": "is quantised", "attribution, LoRA into the weights": "are quantised"}
    without = ("fapm", "osf", "l2p", "lfpt5", "prog-prompt", "sapt-prompt")  # a LoRA, on any weights
    refused |= dict.fromkeys(without, "leave out model.lora")
    if name in refused:
        with pytest.raises(ConfigError, match=refused[name]):
            run(config)
        assert not (tmp_path / "run" / "tasks").exists(), "before any training"
    else:
        assert run(config)["finished"]
