"""Families of models, by rules on operations alone: relevance conserved, gradients those of each sample."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from attribution_models import ROWS, Keep
from holdfast import Learner
from holdfast.attribution import AttributionOptions, attribute_batches, per_sample_gradients
from holdfast.attribution.options import AttributionReport
from holdfast.attribution.targets import make_batch
from holdfast.errors import UnruledOperationError
from holdfast.evaluation.answers import batch_for, greedy
from holdfast.hold import Anchor, tell_total_rate
from holdfast.importance import compute_prior
from holdfast.importance.aggregate import AbsoluteMean
from holdfast.importance.fisher import FisherOptions
from holdfast.importance.inputs import InputsOptions
from holdfast.models import block_parameters, context_length, input_dims, input_sizes, unwrapped
from holdfast.strategies.prompts.soft import Prompted
from holdfast.tasks import Example, toy_tokenizer
from holdfast.tasks.encode import IGNORED, Encoded
from holdfast.training.loop import Collator
from model_families import EXTRA, SEEING, family, held_by_inputs, measure

TABLE = Path(__file__).parents[2] / "docs" / "model-families.md"
MIXTURES = ["mixtral", "qwen3_moe", "gpt_oss", "deepseek_v3", "llama4_text", "granitemoe"]
OTHERS = ["apertus", "bloom", "falcon", "gemma3n_text", "lfm2", "longt5", "m2m_100", "mamba", "qwen3_next"]
# A mask that is an activation, sinks by logsumexp, a sqrt that normalises, experts that are chosen by what is
# detached, and rows of scores that are all -inf.
UNUSUAL = ["doge", "granite_swa", "bailing_hybrid", "zaya", "cpmant"]


def relevance(model, fold=None, **options) -> AttributionReport:
    chosen = AttributionOptions(**options)
    return attribute_batches(
        model, ROWS, options=chosen, fold=fold or AbsoluteMean(), pad_id=0, correct_only=False
    )


@pytest.mark.parametrize("name", MIXTURES + OTHERS + UNUSUAL)
def test_relevance_is_conserved_in_float64(name: str) -> None:
    model = family(name)
    for rules in ("paper", "attnlrp"):
        report = relevance(model, rules=rules)
        assert report.conservation_max_relative_error < 1e-9, rules
        assert report.unreached == ()


@pytest.mark.parametrize("name", MIXTURES)
def test_experts_and_routers_are_rated_sample_by_sample(name: str) -> None:
    """Against autograd, one sample at a time, in float32, where the models run without this library."""
    model = family(name, torch.float32)
    fold = Keep(per_weight=True)
    report = per_sample_gradients(model, ROWS, fold=fold, pad_id=0)
    assert report.one_at_a_time == ""
    wanted = block_parameters(model)
    assert set(fold.maps) == set(wanted)
    stacks = [key for key, p in wanted.items() if p.dim() == 3]
    assert any("gate_up_proj" in key or "input_linear" in key for key in stacks)
    for number, row in enumerate(ROWS):
        ids = torch.tensor([row.prompt_ids + row.completion_ids])
        logits = model(input_ids=ids, use_cache=False).logits[0, len(row.prompt_ids) - 1 : -1]
        answer = ids[0, len(row.prompt_ids) :]
        likelihood = logits.log_softmax(-1)[range(len(answer)), answer].sum()
        grads = torch.autograd.grad(likelihood, list(wanted.values()))
        largest = max(float(g.abs().max()) for g in grads)
        for key, grad in zip(wanted, grads, strict=True):
            torch.testing.assert_close(fold.maps[key][number], grad, rtol=1e-3, atol=1e-5 * largest, msg=key)


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss", "llama4_text"])
def test_experts_relevance_depends_on_no_batch(name: str) -> None:
    model = family(name)
    together, alone = Keep(), Keep()
    relevance(model, together)
    for row in ROWS:
        attribute_batches(model, [row], fold=alone, pad_id=0, correct_only=False)
    for key, maps in together.maps.items():
        torch.testing.assert_close(maps, alone.maps[key], rtol=1e-7, atol=1e-12, msg=key)


def test_one_expert_is_a_dense_layer() -> None:
    """Routed by a constant 1, it has the relevance of Mistral's feed-forward layer with its weights."""
    from transformers import MistralConfig, MistralForCausalLM, MixtralConfig, MixtralForCausalLM

    sizes = {
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 24,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
    }
    sparse = MixtralForCausalLM(MixtralConfig(**sizes, num_local_experts=1, num_experts_per_tok=1))
    dense = MistralForCausalLM(MistralConfig(**sizes, sliding_window=None))
    own = {key: value for key, value in sparse.state_dict().items() if "mlp" not in key}
    up_EOI = sparse.model.layers[0].mlp.experts.gate_up_proj.detach()
    own["model.layers.0.mlp.gate_proj.weight"], own["model.layers.0.mlp.up_proj.weight"] = up_EOI[0].chunk(2)
    own["model.layers.0.mlp.down_proj.weight"] = sparse.model.layers[0].mlp.experts.down_proj[0].detach()
    dense.load_state_dict(own)
    found, expected = Keep(), Keep()
    relevance(sparse.double().eval(), found, halves="none")
    relevance(dense.double().eval(), expected, halves="none")
    expert = "model.layers.0.mlp.experts."
    both = torch.cat([expected.maps[f"model.layers.0.mlp.{n}_proj.weight"] for n in ("gate", "up")], dim=1)
    torch.testing.assert_close(found.maps[f"{expert}gate_up_proj"][:, 0], both, rtol=1e-9, atol=1e-15)
    down = expected.maps["model.layers.0.mlp.down_proj.weight"]
    torch.testing.assert_close(found.maps[f"{expert}down_proj"][:, 0], down, rtol=1e-9, atol=1e-15)


def test_an_expert_that_no_token_chose_has_no_relevance_and_the_kernel_is_put_back() -> None:
    model = family("mixtral")
    model.config._experts_implementation = "grouped_mm"
    fold = Keep()
    attribute_batches(model, [Encoded([1, 5], [6])], fold=fold, pad_id=0, correct_only=False)
    assert model.config._experts_implementation == "grouped_mm"
    used_E = fold.maps["model.layers.0.mlp.experts.down_proj"][0].abs().sum((1, 2)) > 0
    assert 0 < used_E.sum() < 4 or used_E.all()


def lora_on_experts(dtype: torch.dtype):
    """Mixtral with factors on its experts and queries; B is not zero."""
    import peft

    config = peft.LoraConfig(
        r=2,
        target_modules=["q_proj"],
        target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
        task_type="CAUSAL_LM",
    )
    model = peft.get_peft_model(family("mixtral", dtype), config).eval()
    torch.manual_seed(1)
    for key, parameter in model.named_parameters():
        if "lora_B" in key:
            torch.nn.init.normal_(parameter, std=0.3)
    return model.to(dtype)


def test_lora_on_experts_is_rated_by_gradients_and_by_relevance() -> None:
    """Both factors of both stacks, under names of their own; R(A) equals R(B), as both are A B x."""
    model = lora_on_experts(torch.float64)
    wanted = block_parameters(model)
    assert len(wanted) == sum(p.requires_grad for p in model.parameters()) == 12
    plain = Keep(per_weight=True)
    report = per_sample_gradients(model, ROWS, fold=plain, pad_id=0)
    assert (report.one_at_a_time, report.unreached) == ("", ())
    assert report.alone_max_relative_error < 1e-9  # from autograd's
    fold = Keep()
    report = relevance(model, fold, halves="none")
    assert report.conservation_max_relative_error < 1e-9
    assert report.unreached == ()
    for stem in ("experts", "experts.base_layer"):
        a, b = (fold.maps[f"model.layers.0.mlp.{stem}.lora_{f}.weight"].sum((1, 2)) for f in "AB")
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-15)
        assert a.abs().min() > 0


def test_what_dora_detaches_is_a_constant() -> None:
    """DoRA's magnitude is no linear map; what is detached of it is a constant."""
    import peft

    config = peft.LoraConfig(r=2, target_modules=["q_proj"], use_dora=True, task_type="CAUSAL_LM")
    model = peft.get_peft_model(family("llama"), config).to(torch.float64).eval()
    report = per_sample_gradients(model, ROWS, fold=AbsoluteMean(), pad_id=0)
    assert report.unreached == ()
    assert report.one_at_a_time == ""
    assert report.alone_max_relative_error < 1e-9
    assert relevance(model).conservation_max_relative_error < 1e-9


def test_most_weights_of_a_mixture_are_its_experts_and_all_are_trained_with_the_blocks() -> None:
    model = family("mixtral")
    inside = sum(p.numel() for key, p in model.named_parameters() if ".layers." in key)
    rated = block_parameters(model)
    assert sum(p.numel() for p in rated.values()) / inside > 0.99
    assert {key.rsplit(".", 1)[-1] for key in rated} == {"weight", "gate_up_proj", "down_proj"}
    assert not any("norm" in key for key in rated)


def test_decay_rates_are_no_matrix() -> None:
    assert not any("A_log" in key for key in block_parameters(family("mamba")))
    assert any("conv1d.weight" in key for key in block_parameters(family("mamba")))


@pytest.mark.parametrize("name", ["rwkv", "recurrent_gemma", "gemma3n_text"])
def test_where_a_batch_mixes_samples_they_go_one_by_one_and_it_is_said(name: str) -> None:
    measured = measure(name)
    assert measured.gradient < 1e-5
    report = per_sample_gradients(family(name), ROWS, fold=AbsoluteMean(), pad_id=0)
    assert report.one_at_a_time != ""


A, B, C = (Encoded(ids, [10, 2]) for ids in ([1, 5, 6, 7], [1, 9, 3, 20], [1, 21, 22, 23]))


@pytest.mark.parametrize("rows", [[A, B], [A, A, B, C]], ids=["first batch", "later batch"])
@pytest.mark.parametrize("rules", ["attnlrp", "gradient"])
def test_mixing_is_seen_among_rows_of_one_length_and_the_batch_taken_again_row_by_row(rows, rules) -> None:
    model = family("switch_transformers")  # an expert gets the tokens of all samples, in no known order
    together, alone = Keep(per_weight=True), Keep(per_weight=True)

    def rated(rows: list[Encoded], fold: Keep, **counts: int) -> AttributionReport:
        if rules == "gradient":
            return per_sample_gradients(model, rows, fold=fold, pad_id=0, **counts)
        options = AttributionOptions(rules=rules)
        return attribute_batches(
            model, rows, options=options, fold=fold, pad_id=0, correct_only=False, **counts
        )

    report = rated(rows, together, batch_size=2)
    assert "can't be told apart" in report.one_at_a_time
    assert report.samples_used == report.samples_seen == len(rows)
    for row in rows:
        rated([row], alone)
    for key, maps in together.maps.items():  # an expert that a sample doesn't choose may have no map of it
        torch.testing.assert_close(maps.sum(0), alone.maps[key].sum(0), rtol=1e-7, atol=1e-12, msg=key)
    assert rated(rows, Keep(), batch_size=2, max_samples=len(rows) - 1).samples_used == len(rows) - 1


SHARED = [f"model.layers.{number}.mlp.down_proj.weight" for number in (0, 1)]


def with_a_shared_weight(dtype: torch.dtype = torch.float64):
    model = family("llama", dtype)
    model.model.layers[1].mlp.down_proj.weight = model.model.layers[0].mlp.down_proj.weight
    return model


def with_two_of_the_same(dtype: torch.dtype = torch.float64):
    model = family("llama", dtype)
    model.model.layers[1].mlp.down_proj.load_state_dict(model.model.layers[0].mlp.down_proj.state_dict())
    return model


def test_a_weight_that_two_layers_share_is_rated_once_for_both_uses() -> None:
    model, apart = with_a_shared_weight(), with_two_of_the_same()
    assert SHARED[1] not in block_parameters(model)
    assert input_dims(model).keys() == input_sizes(model).keys() == block_parameters(model).keys()
    shared, single = Keep(per_weight=True), Keep(per_weight=True)
    per_sample_gradients(model, ROWS, fold=shared, pad_id=0)
    per_sample_gradients(apart, ROWS, fold=single, pad_id=0)
    both = sum(single.maps[name] for name in SHARED)
    torch.testing.assert_close(shared.maps[SHARED[0]], both, rtol=1e-9, atol=1e-15)
    found, expected = (
        compute_prior(m, ROWS, InputsOptions(weighting="uniform"), pad_id=0) for m in (model, apart)
    )
    mean = (expected[SHARED[0]] + expected[SHARED[1]]) / 2  # a token's share is of the tokens of both uses
    torch.testing.assert_close(found[SHARED[0]], mean, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("importance", ["inputs", "fisher"])
def test_under_an_endless_pull_a_shared_weight_keeps_old_answers(importance: str) -> None:
    moved = {}
    for pull in (0.0, 1e13):
        model = with_a_shared_weight(torch.float32)
        options = InputsOptions(correct_only=False) if importance == "inputs" else FisherOptions()
        prior = compute_prior(model, ROWS[:2], options, pad_id=0)
        shared = block_parameters(model)[SHARED[0]]
        for parameter in model.parameters():
            parameter.requires_grad_(parameter is shared)
        before, start = [own_logits(model, row).detach() for row in ROWS[:2]], shared.detach().clone()
        optimizer = torch.optim.AdamW([shared], lr=1e-2, weight_decay=0.0)
        tell_total_rate(optimizer, None, 9)
        if pull:
            Anchor(prior.only([SHARED[0]]), pull=pull).attach(model, optimizer)
        for _ in range(3):
            loss = torch.nn.functional.cross_entropy(own_logits(model, ROWS[3]), torch.tensor([40]))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        after = [own_logits(model, row).detach() for row in ROWS[:2]]
        moved[pull] = float(sum((a - b).norm() for a, b in zip(after, before, strict=True)))
        still = bool(pull) and importance == "fisher"  # which leaves no element free
        assert torch.equal(shared, start) == still
    assert moved[1e13] < 1e-3 * moved[0.0]


def test_global_tokens_are_inputs_too() -> None:
    """Pegasus-X has tokens that every text gets; their linear maps get maps as well."""
    report = relevance(family("pegasus_x"))
    assert report.unreached == ()
    assert report.conservation_max_relative_error < 1e-9
    assert measure("pegasus_x").gradient < 1e-5


@pytest.mark.parametrize(
    ("name", "operation"),
    [("kimi_linear", "log"), ("recurrent_gemma", "sqrt"), ("rwkv", "linear"), ("xlnet", "einsum")],
)
def test_what_has_no_rule_is_refused_by_name_and_what_is_advised_works(name: str, operation: str) -> None:
    with pytest.raises(UnruledOperationError, match=rf"'{operation}' has no attribution rule.*'fisher'"):
        relevance(family(name))
    assert per_sample_gradients(family(name), ROWS, fold=AbsoluteMean(), pad_id=0).samples_used == len(ROWS)


def test_the_default_is_refused_before_any_training_where_an_operation_has_no_rule(tmp_path: Path) -> None:
    learner = Learner(family("rwkv"), toy_tokenizer(), folder=tmp_path / "skills")
    rows = [Example(f"q{i}=", "ab") for i in range(8)]
    with (
        pytest.raises(UnruledOperationError, match=r"'linear' has no attribution rule.*'fisher'"),
        learner.task("one", rows) as stage,
    ):
        stage.train()
    assert not list((tmp_path / "skills").rglob("checkpoint-*")), "nothing was trained"


def test_wrapped_and_compiled_models_are_attributed_as_what_they_wrap() -> None:
    model = family("llama")
    plain, compiled = Keep(), Keep()
    relevance(model, plain)
    wrapped = torch.compile(model)
    assert unwrapped(wrapped) is model
    relevance(wrapped, compiled)
    assert set(compiled.maps) == set(plain.maps)
    assert all(torch.equal(maps, plain.maps[key]) for key, maps in compiled.maps.items())


def test_a_model_that_is_compiled_in_place_is_seen_too() -> None:
    model = family("llama")
    plain, compiled = Keep(), Keep()
    relevance(model, plain)
    model.compile()
    for layer in model.model.layers:
        layer.mlp.compile()
    relevance(model, compiled)
    assert all(torch.equal(maps, plain.maps[key]) for key, maps in compiled.maps.items())


FROM_PADDING = ["roberta", "data2vec-text", "xlm-roberta-xl"]  # they count from behind their padding's index


def own_logits(model, row: Encoded) -> torch.Tensor:
    """Of the row's answer tokens, without this library."""
    logits = model(input_ids=torch.tensor([row.prompt_ids + row.completion_ids])).logits[0]
    return logits[len(row.prompt_ids) - 1 : -1]


@pytest.mark.parametrize("name", ["llama", *FROM_PADDING])
@pytest.mark.parametrize("pad_id", [0, 7])
@torch.no_grad()
def test_padded_rows_have_the_logits_that_the_model_gives_each_alone(name: str, pad_id: int) -> None:
    model, tokenizer = family(name), SimpleNamespace(pad_token_id=pad_id)
    assert len({len(row.prompt_ids) for row in ROWS}) > 1
    expected = torch.cat([own_logits(model, row) for row in ROWS])
    for side in ("left", "right"):
        rated = make_batch(model, ROWS, pad_id, torch.device("cpu"), side)
        batches = {
            "rating": rated.inputs,
            "training": Collator(model, tokenizer, side)(list(enumerate(ROWS))),
            "evaluation": batch_for(model, tokenizer, ROWS, side),
        }
        for where, batch in batches.items():
            labels = rated.answer_ST
            if where != "rating":
                labels = torch.nn.functional.pad(batch.pop("labels")[:, 1:], (0, 1), value=IGNORED)
            batch.pop("row_ids", None)
            found = model(**batch).logits[labels != IGNORED]
            torch.testing.assert_close(found, expected, msg=f"{where}, {side}")


@pytest.mark.parametrize("name", ["llama", *FROM_PADDING])
@torch.no_grad()
def test_what_is_written_is_what_the_model_s_own_logits_say(name: str) -> None:
    model, tokenizer = family(name), toy_tokenizer()
    prompt_ND = torch.randn(3, 32, dtype=torch.float64)
    answers = greedy(model, tokenizer, ROWS, batch_size=8, max_new_tokens=3)
    view = Prompted(model, lambda ids, _: prompt_ND.expand(len(ids), -1, -1))
    prompted = greedy(view, tokenizer, ROWS, batch_size=8, max_new_tokens=3)
    for row, plain, behind in zip(ROWS, answers, prompted, strict=True):
        for found, vectors in ((plain, prompt_ND[:0]), (behind, prompt_ND)):
            ids = [*row.prompt_ids, *found]
            embeds = torch.cat([vectors, model.get_input_embeddings()(torch.tensor(ids))])
            said = model(inputs_embeds=embeds[None]).logits[0, -len(found) - 1 : -1].argmax(-1).tolist()
            end = found.index(tokenizer.eos_token_id) + 1 if tokenizer.eos_token_id in found else len(found)
            assert said[:end] == found[:end]


def test_numbers_below_the_first_position_are_no_room_for_text() -> None:
    assert context_length(family("roberta")) == 63
    assert context_length(family("llama")) == 64


def rows_of_table() -> dict[str, list[str]]:
    lines = TABLE.read_text(encoding="utf-8").splitlines()
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if line.startswith("| ")]
    return {first: rest for first, *rest in cells[1:]}


def test_the_table_in_the_docs_has_every_family_and_no_leak() -> None:
    table = rows_of_table()
    assert sorted(table) == sorted(EXTRA | SEEING)
    assert len(table) >= 210
    refused = {name for name, (error, *_) in table.items() if error == "refused"}
    assert refused == {"kimi_linear", "recurrent_gemma", "rwkv", "xlnet"}
    for name, (error, gradient, rated, _, _, note) in table.items():
        assert float(gradient) < 1e-5, name
        assert float(rated.rstrip("%")) > 90, name
        if name not in refused:
            assert float(error) < (1e-5 if note == "float32" else 1e-9), name


@pytest.mark.parametrize("name", ["deepseek_v4", "gpt2", "gpt_oss", "mamba", "mixtral", "qwen3_next"])
def test_what_the_default_does_not_hold_by_inputs_it_holds_beside(name: str) -> None:
    model = family(name, torch.float32)
    share = held_by_inputs(model) / sum(p.numel() for p in block_parameters(model).values())
    assert f"{share:.1%}" == rows_of_table()[name][4]


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(EXTRA))
def test_the_table_in_the_docs_is_what_is_measured(name: str) -> None:
    error, _, rated, reached, by_inputs, note = rows_of_table()[name]
    measured = measure(name)
    assert (measured.relevance is None) == (error == "refused")
    assert (f"{measured.rated:.1%}", f"{measured.reached:.1%}", measured.note) == (rated, reached, note)
    assert by_inputs == ("–" if measured.by_inputs is None else f"{measured.by_inputs:.1%}")
    assert measured.gradient < 1e-5
    assert measured.relevance is None or measured.relevance < (1e-5 if note == "float32" else 1e-9)
    assert re.fullmatch(r"[\d.]+%", reached)
