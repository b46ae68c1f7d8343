"""The prior on disk, merged, and against models it does not belong to."""

from __future__ import annotations

import copy
import errno
import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from attribution_models import ROWS, build, lora
from holdfast import storage
from holdfast.errors import ConfigError, DataError, PriorMismatchError, StorageError
from holdfast.importance import compute_prior
from holdfast.importance.agreement import agreement
from holdfast.importance.prior import ImportancePrior, trained_parameters
from holdfast.models import block_parameters, fingerprints
from holdfast.models.base import identity_of

META = {
    "importance": "fisher",
    "options": {"samples": 4},
    "tasks": ["a"],
    "samples_seen": 4,
    "samples_used": 3,
    "seconds": 1.5,
    "model_digest": "d",
    "conservation_max_relative_error": 1e-6,
}


def prior(seed: int = 0, **meta: Any) -> ImportancePrior:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"layers.0.w": (3, 4), "layers.1.w": (5,)}
    return ImportancePrior(
        {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}, META | meta
    )


def tiny_model(hidden: int = 8) -> LlamaForCausalLM:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=12,
            hidden_size=hidden,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=2,
        )
    )


def ones(model: nn.Module) -> ImportancePrior:
    return ImportancePrior({n: torch.ones_like(p) for n, p in block_parameters(model).items()})


def test_saved_prior_is_loaded_bit_identical(tmp_path: Path) -> None:
    saved = prior()
    saved.save(tmp_path / "p")
    loaded = ImportancePrior.load(tmp_path / "p")
    assert loaded.meta == META
    assert list(loaded.tensors) == list(saved.tensors)
    assert all(torch.equal(loaded.tensors[n], t) for n, t in saved.tensors.items())
    assert sorted(p.name for p in (tmp_path / "p").iterdir()) == ["prior.json", "prior.safetensors"]
    assert json.loads((tmp_path / "p/prior.json").read_text())["conservation_max_relative_error"] == 1e-6


def test_bfloat16_on_disk_keeps_eight_bits_and_loads_as_float32(tmp_path: Path) -> None:
    saved = prior()
    saved.save(tmp_path, dtype="bfloat16")
    for name, tensor in ImportancePrior.load(tmp_path).tensors.items():
        assert tensor.dtype == torch.float32
        torch.testing.assert_close(tensor, saved.tensors[name], rtol=2**-8, atol=0)


def test_missing_prior_names_the_folder_and_the_file(tmp_path: Path) -> None:
    (tmp_path / "may").mkdir()
    with pytest.raises(DataError, match=r"there is no '.*/mai'\. Did you mean '.*/may'\? Give a folder that"):
        ImportancePrior.load(tmp_path / "mai")
    with pytest.raises(DataError, match=r"no importance prior in '.*may': prior\.json is missing"):
        ImportancePrior.load(tmp_path / "may")
    prior().save(tmp_path)
    (tmp_path / "prior.safetensors").unlink()
    with pytest.raises(DataError, match=r"prior\.safetensors is missing"):
        ImportancePrior.load(tmp_path)


@pytest.mark.parametrize("keep", [0, 100, -1], ids=["empty", "header", "last byte"])
def test_torn_tensors_are_noticed(keep: int, tmp_path: Path) -> None:
    prior().save(tmp_path)
    file = tmp_path / "prior.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(DataError, match=r"prior\.safetensors is torn"):
        ImportancePrior.load(tmp_path)


WHOLE = {"dtype": "float32", "elements": 12, "sha256": "0" * 64}
OTHER_SHAPES = ["[]", "{}", "null", '"x"', "1e5", json.dumps(WHOLE | {"tasks": "copy"})]


@pytest.mark.parametrize("text", ["", "{", '{"sha256": 1', "[" * 100_000, *OTHER_SHAPES])
def test_torn_record_is_noticed(text: str, tmp_path: Path) -> None:
    prior().save(tmp_path)
    (tmp_path / "prior.json").write_text(text)
    with pytest.raises(DataError, match=r"prior\.json: .*torn or edited.*`holdfast attribute`"):
        ImportancePrior.load(tmp_path)


def test_record_of_another_prior_is_noticed(tmp_path: Path) -> None:
    prior(0).save(tmp_path / "a")
    prior(1).save(tmp_path / "b")
    (tmp_path / "a/prior.json").replace(tmp_path / "b/prior.json")
    with pytest.raises(DataError, match="was written for another"):
        ImportancePrior.load(tmp_path / "b")


def test_full_disk_leaves_the_older_prior_and_no_litter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prior(0).save(tmp_path)

    def full(path: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(storage, "_flush", full)
    with pytest.raises(StorageError, match=r"could not write .*prior\.safetensors.*No space left.*untouched"):
        prior(1).save(tmp_path)
    monkeypatch.undo()
    loaded = ImportancePrior.load(tmp_path)
    assert all(torch.equal(loaded.tensors[n], t) for n, t in prior(0).tensors.items())
    assert len(list(tmp_path.iterdir())) == 2


def test_not_finite_importance_is_refused() -> None:
    with pytest.raises(DataError, match="NaN or infinite values in layers"):
        ImportancePrior({"layers.0.w": torch.tensor([1.0, float("nan")])})


def test_max_merge_is_equation_12() -> None:
    priors = [prior(seed, tasks=[str(seed)]) for seed in range(3)]
    merged = priors[0].merge(priors[1:])
    for name in merged.tensors:
        stacked = torch.stack([p.tensors[name] for p in priors])
        assert torch.equal(merged.tensors[name], stacked.max(0).values.clamp(min=0))
        assert (stacked < 0).all(0).any()  # otherwise the clip was not tried
    assert merged.meta["tasks"] == ["0", "1", "2"]
    assert merged.meta["samples_used"] == 9
    assert merged.meta["options"] == META["options"]
    assert merged.meta["conservation_max_relative_error"] == 1e-6


def test_priors_by_input_add_up_unless_another_way_is_named() -> None:
    moments = [torch.diag(torch.tensor([1.0, 0.0, 2.0])), torch.diag(torch.tensor([0.0, 3.0, 1.0]))]
    first, second = (ImportancePrior({"w": c_II}, {**META, "kind": "inputs"}) for c_II in moments)
    assert torch.equal(first.merge(second).tensors["w"], moments[0] + moments[1])
    assert torch.equal(first.merge(second, how="mean").tensors["w"], (moments[0] + moments[1]) / 2)
    with pytest.raises(PriorMismatchError, match="Allowed for the kind 'inputs': sum, mean"):
        first.merge(second, how="max")


def test_sum_and_mean_merge_do_not_clip() -> None:
    a, b = prior(0), prior(1)
    for name in a.tensors:
        total = a.tensors[name] + b.tensors[name]
        assert torch.equal(a.merge(b, how="sum").tensors[name], total)
        assert torch.equal(a.merge([b], how="mean").tensors[name], total / 2)
    assert torch.equal(a.tensors["layers.0.w"], prior(0).tensors["layers.0.w"])  # inputs are left alone


def test_a_merge_that_there_is_not_is_refused_with_those_that_there_are() -> None:
    with pytest.raises(ConfigError, match=r"merge: no how='average'. Allowed: max, sum, mean"):
        prior(0).merge(prior(1), how="average")  # type: ignore[arg-type]


@pytest.mark.parametrize("how", ["max", "sum", "mean"])
def test_priors_of_different_importances_are_not_merged_without_a_word(how: Any) -> None:
    a, b = prior(0), prior(1)
    a.meta["importance"], b.meta["importance"] = "lrp", "fisher"
    with pytest.warns(UserWarning, match=r"merge: the priors are of different importances \(lrp, fisher\)"):
        a.merge(b, how=how)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        a.mean_normalised().merge(b.mean_normalised(), how=how)  # in one unit
        a.merge(prior(2, importance="lrp"), how=how)


def test_merging_different_weights_is_an_error() -> None:
    other = ImportancePrior({"layers.0.w": torch.ones(4, 3), "extra": torch.ones(1)})
    with pytest.raises(
        PriorMismatchError,
        match=r"prior 2 of the merge does not fit the first prior: missing \(1\): layers.1.w; "
        r"unexpected \(1\): extra; of another shape \(1\): layers.0.w \(4, 3\) instead of \(3, 4\)",
    ):
        prior().merge(other)


def test_priors_of_two_importances_are_joined_and_compared_in_what_both_rate() -> None:
    fisher, lrp = prior(importance="fisher"), prior(importance="lrp").only(["layers.0.w", "elsewhere.w"])
    whole, part = fisher.mean_normalised(), lrp.mean_normalised()
    advice = r"lrp and inputs rate linear maps of the blocks alone.* first\.only\(second\)"
    for do in (lambda: whole.merge(part), lambda: agreement(fisher, lrp)):
        with pytest.raises(PriorMismatchError, match=r"missing \(1\): layers\.1\.w\. .*" + advice):
            do()
    common = fisher.only(lrp)
    assert list(common.mean_normalised().merge(part)) == ["layers.0.w"]
    assert agreement(common, lrp).keys() == {("", 0)}


@given(st.lists(st.floats(-1, 1, width=32), min_size=1, max_size=20), st.floats(-30, 5))
def test_normalised_mean_is_one(values: list[float], exponent: float) -> None:
    raw = ImportancePrior({"w": torch.tensor(values) * 10**exponent})
    normal = raw.mean_normalised().tensors["w"]
    assert (normal >= 0).all()
    if (raw.tensors["w"] > 0).any():
        assert float(normal.double().mean()) == pytest.approx(1.0, rel=1e-5)
    else:
        assert not normal.any()


def test_prior_fits_its_own_model_with_and_without_lora() -> None:
    from peft import LoraConfig, get_peft_model

    model = tiny_model()
    ones(model).check_fits(model)
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    own = ones(adapted)
    assert all("lora_" in name for name in own.tensors)
    own.check_fits(adapted)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda t: t.pop("model.layers.0.mlp.up_proj.weight"),
            r"missing \(1\): model.layers.0.mlp.up_proj.weight",
        ),
        (
            lambda t: t.update({"model.layers.9.x.weight": torch.ones(2)}),
            r"unexpected \(1\): model.layers.9.x",
        ),
        (
            lambda t: t.update({"model.layers.0.mlp.up_proj.weight": torch.ones(2, 2)}),
            r"of another shape \(1\): model.layers.0.mlp.up_proj.weight \(2, 2\) instead of \(16, 8\)",
        ),
    ],
    ids=["missing", "unexpected", "shape"],
)
def test_prior_of_another_model_is_named(change: Any, message: str) -> None:
    model = tiny_model()
    tensors = ones(model).tensors
    change(tensors)
    with pytest.raises(PriorMismatchError, match="does not fit the model .LlamaForCausalLM.: " + message):
        ImportancePrior(tensors).check_fits(model)


def test_the_hold_of_a_task_does_not_weaken_when_more_are_merged():
    first = ImportancePrior({"w": torch.tensor([4.0, 0.0])}).mean_normalised()
    second = ImportancePrior({"w": torch.tensor([0.0, 1e6])}).mean_normalised()
    merged = first.merge(second)
    assert merged.tensors["w"].tolist() == [2.0, 2.0]
    assert torch.equal(merged.mean_normalised().tensors["w"], merged.tensors["w"])
    raw = ImportancePrior({"w": torch.tensor([4.0, 0.0])}).merge(
        ImportancePrior({"w": torch.tensor([0.0, 1e6])})
    )
    assert raw.mean_normalised().tensors["w"][0] < 1e-4  # the second task's scale drowns the first


def lora_prior() -> tuple[Any, ImportancePrior]:
    model = lora(build("llama", torch.float32), ["q_proj", "v_proj"])
    return model, compute_prior(model, ROWS, "magnitude", pad_id=0)


def test_a_prior_of_the_same_model_is_accepted_without_a_word_also_after_more_training() -> None:
    model, prior = lora_prior()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        prior.check_fits(model)
        with torch.no_grad():
            for parameter in trained_parameters(model).values():
                parameter += 1
        prior.check_fits(model)
        ImportancePrior(prior.tensors, {**prior.meta}).check_fits(model.to(torch.bfloat16))


def test_a_fresh_adapter_on_a_merged_base_is_another_model_and_what_differs_is_said() -> None:
    model, prior = lora_prior()
    again = lora(model.merge_and_unload(), ["q_proj", "v_proj"])
    with pytest.warns(
        UserWarning, match=r"made on another model.*4 of its frozen weights differ: .*q_proj\.weight"
    ):
        prior.check_fits(again)


def test_another_model_of_the_same_shape_is_told_where_all_is_trained() -> None:
    model = build("llama", torch.float32)
    prior = compute_prior(model, ROWS, "magnitude", pad_id=0)
    torch.manual_seed(5)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)
    with pytest.warns(UserWarning, match=r"made on another model.*every weight differs"):
        prior.check_fits(model)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_the_same_weights_in_another_float_type_are_no_other_model(dtype: torch.dtype) -> None:
    model = tiny_model()
    other = copy.deepcopy(model).to(dtype)
    made_on = ImportancePrior(ones(model).tensors, {"weights": fingerprints(model)})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        made_on.check_fits(other)
        marks = fingerprints(other)
        ImportancePrior(ones(model).tensors, {"weights": marks}).check_fits(model)
    assert identity_of(other) == (None if dtype == torch.float16 else identity_of(model))


def test_a_second_trained_adapter_is_missing_from_a_prior_by_its_names() -> None:
    model, prior = lora_prior()
    model.add_adapter("second", model.peft_config["default"])
    model.set_adapter("second")
    with pytest.raises(PriorMismatchError, match=r"missing \(8\): .*lora_A\.second\.weight"):
        prior.check_fits(model)
