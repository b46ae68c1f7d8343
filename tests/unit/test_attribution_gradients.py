"""Plain per-sample gradients, targets, and the choice of samples."""

from __future__ import annotations

import warnings

import pytest
import torch

from attribution_models import ROWS, Keep, build, lora
from holdfast.attribution import AttributionOptions, attribute_batches, per_sample_gradients
from holdfast.attribution.targets import correct, initial_lambda
from holdfast.errors import DataError, ModelError, NoCorrectSampleError
from holdfast.importance.aggregate import AbsoluteMean
from holdfast.models import block_parameters
from holdfast.tasks.encode import IGNORED, Encoded, collate


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "t5", "lora"])
def test_per_sample_gradients_are_autograds_one_sample_at_a_time(name: str) -> None:
    model = lora(build("llama"), ["q_proj", "down_proj"]) if name == "lora" else build(name)
    model.eval()
    fold = Keep(per_weight=True)
    report = per_sample_gradients(model, ROWS, fold=fold, pad_id=0, batch_size=3)
    assert report.conservation_max_relative_error is None
    assert (report.samples_seen, report.samples_used) == (4, 4)
    wanted = block_parameters(model)
    assert set(fold.maps) == set(wanted)
    for number, row in enumerate(ROWS):
        batch = collate([row], 0, encoder_decoder=model.config.is_encoder_decoder)
        labels = batch.pop("labels")
        if model.config.is_encoder_decoder:
            batch["decoder_input_ids"] = model.prepare_decoder_input_ids_from_labels(labels=labels)
        logits = model(**batch).logits
        if not model.config.is_encoder_decoder:
            logits, labels = logits[:, :-1], labels[:, 1:]
        likelihood = -torch.nn.functional.cross_entropy(
            logits[0], labels[0], reduction="sum", ignore_index=IGNORED
        )
        grads = torch.autograd.grad(likelihood, list(wanted.values()))
        largest = max(float(g.abs().max()) for g in grads)
        for key, grad in zip(wanted, grads, strict=True):
            # float32 inside some models' norms and softmax
            torch.testing.assert_close(fold.maps[key][number], grad, rtol=1e-6, atol=1e-6 * largest, msg=key)


def test_initial_lambda_is_the_derivative_of_the_target() -> None:
    torch.manual_seed(0)
    logits = torch.randn(2, 4, 5, dtype=torch.float64, requires_grad=True)
    answer = torch.tensor([[IGNORED, 3, 1, IGNORED], [IGNORED, IGNORED, IGNORED, 2]])
    chosen = {"all": [(0, 1, 3), (0, 2, 1), (1, 3, 2)], "first": [(0, 1, 3), (1, 3, 2)]}
    for target, places in chosen.items():
        for of in ("logit", "log_probability"):
            values = logits.log_softmax(-1) if of == "log_probability" else logits
            (expected,) = torch.autograd.grad(sum(values[place] for place in places), logits)
            torch.testing.assert_close(
                initial_lambda(logits.detach(), answer, target=target, of=of), expected
            )


def test_a_sample_is_correct_when_every_answer_token_is_the_argmax() -> None:
    answer = torch.tensor([[IGNORED, 3, 1], [3, 3, 1], [IGNORED, 3, 2]])
    logits = torch.nn.functional.one_hot(torch.tensor([[0, 3, 1]] * 3), 5).float()
    assert correct(logits, answer).tolist() == [True, False, False]


def self_answered(model) -> list[Encoded]:
    """Rows of which the model answers the first and third right."""
    rows = []
    for number, prompt in enumerate([[1, 5, 6], [1, 7, 8, 9], [1, 4], [1, 30, 31]]):
        token = int(model(torch.tensor([prompt])).logits[0, -1].argmax())
        rows.append(Encoded(prompt, [token if number % 2 == 0 else (token + 1) % 64]))
    return rows


@pytest.mark.parametrize("batch_size", [1, 4])
def test_only_correct_samples_are_attributed(batch_size: int) -> None:
    model = build("llama")
    rows = self_answered(model)
    fold, alone = Keep(), Keep()
    report = attribute_batches(model, rows, fold=fold, pad_id=0, batch_size=batch_size)
    assert (report.samples_seen, report.samples_used) == (4, 2)
    attribute_batches(model, [rows[0], rows[2]], fold=alone, pad_id=0, correct_only=False)
    for name, value in alone.maps.items():
        torch.testing.assert_close(fold.maps[name], value, rtol=1e-9, atol=1e-15)
    assert report.conservation_max_relative_error < 1e-9


def test_no_correct_sample_says_how_many_and_what_to_do() -> None:
    model = build("llama")
    rows = [self_answered(model)[1]] * 3
    with pytest.raises(NoCorrectSampleError, match=r"none of 3 samples right.*correct_only: false"):
        attribute_batches(model, rows, fold=AbsoluteMean(), pad_id=0)


def test_no_rows_and_no_parameters_are_errors() -> None:
    model = build("llama")
    with pytest.raises(DataError, match="no rows"):
        attribute_batches(model, [], fold=AbsoluteMean(), pad_id=0)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    with pytest.raises(ModelError, match="no parameters to attribute"):
        attribute_batches(model, ROWS, fold=AbsoluteMean(), pad_id=0)


def test_a_parameter_that_is_no_linear_map_is_reported_as_unreached() -> None:
    model = build("llama")
    fold = AbsoluteMean()
    report = attribute_batches(
        model,
        ROWS,
        fold=fold,
        pad_id=0,
        correct_only=False,
        parameters={"norm": model.model.norm.weight, "head": model.lm_head.weight},
    )
    assert report.unreached == ("norm",)
    assert fold.result()["norm"].abs().max() == 0
    assert fold.result()["head"].abs().max() > 0


def test_progress_ends_at_the_total() -> None:
    calls: list[tuple[int, int]] = []
    attribute_batches(
        build("llama"),
        ROWS,
        options=AttributionOptions(target="first"),
        fold=AbsoluteMean(),
        pad_id=0,
        batch_size=3,
        correct_only=False,
        progress=lambda done, total: calls.append((done, total)),
    )
    assert calls[-1] == (4, 4)
    assert [done for done, _ in calls] == sorted(done for done, _ in calls)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_relevance_in_16_bits_is_not_given_without_a_word(dtype: torch.dtype) -> None:
    model = build("llama").to(dtype)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        attribute_batches(model, ROWS[:1], fold=AbsoluteMean(), pad_id=0, correct_only=False)
    said = [str(w.message) for w in told if "attribution: the model is in" in str(w.message)]
    assert len(said) == (dtype != torch.float32)


def test_wrong_answers_are_left_out_of_gradients_one_sample_at_a_time_too() -> None:
    model = build("llama")
    every, fold = dict(model.named_parameters()), Keep()
    with torch.no_grad():
        logits = model(torch.tensor([ROWS[1].prompt_ids])).logits
    right = Encoded(ROWS[1].prompt_ids, [int(logits[0, -1].argmax())])
    report = per_sample_gradients(
        model, [ROWS[0], right, ROWS[2]], fold=fold, parameters=every, pad_id=0, correct_only=True
    )
    assert report.one_at_a_time
    assert (report.samples_seen, report.samples_used) == (3, 1)
    assert {len(maps) for maps in fold.maps.values()} == {1}
