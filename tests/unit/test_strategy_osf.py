"""OSF: what is trained, what is preserved, and that a plain model comes out of each task."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import contexts
from contexts import context_of
from holdfast.config import validate
from holdfast.errors import ConfigError
from holdfast.models import LoraOptions, add_lora, block_parameters, load_weights, save_model, tiny_llama
from holdfast.runner import RunConfig, run
from holdfast.strategies import STRATEGIES, Stage, build_strategy
from holdfast.tasks import Encoder, Template, toy_suite, toy_tokenizer
from holdfast.tasks.encode import collate
from kills import Killed, kill_when
from tiny_runs import tiny_run

TOKENIZER = toy_tokenizer()
STREAM = toy_suite(["copy", "flip", "head", "tail"], 8, 2)


def model_of(kind: str = "llama", dtype: torch.dtype = torch.float32, whole: bool = False) -> Any:
    """A random model as a run loads it: the linear maps in blocks are trained, or everything."""
    torch.manual_seed(0)
    size = {"vocab_size": len(TOKENIZER), "pad_token_id": TOKENIZER.pad_token_id}
    if kind == "gpt2":
        from transformers import GPT2Config, GPT2LMHeadModel

        model: Any = GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=2, n_head=2, n_positions=128, **size))
    elif kind == "t5":
        from transformers import T5Config, T5ForConditionalGeneration

        start = {"decoder_start_token_id": TOKENIZER.pad_token_id, "dropout_rate": 0.0}
        layers = {"num_layers": 2, "num_heads": 2, "d_model": 16, "d_kv": 8, "d_ff": 32}
        model = T5ForConditionalGeneration(T5Config(**layers, **start, **size))
    elif kind == "qwen2":  # its linear maps have biases, and those of keys and values are not square
        from transformers import Qwen2Config, Qwen2ForCausalLM

        heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2}
        model = Qwen2ForCausalLM(Qwen2Config(hidden_size=16, intermediate_size=40, **heads, **size))
    else:
        model = tiny_llama(TOKENIZER, hidden=16, layers=2, heads=2)
    wanted = {id(p) for p in block_parameters(model, trainable_only=False).values()}
    for p in model.parameters():
        p.requires_grad_(whole or id(p) in wanted)
    return model.to(dtype).eval()


def batch_of(kind: str, task: int = 1) -> dict[str, Tensor]:
    encoder = Encoder(TOKENIZER, Template(), encoder_decoder=kind == "t5")
    rows = encoder.many(STREAM.tasks[task].train)
    return dict(collate(rows, TOKENIZER.pad_token_id, encoder_decoder=kind == "t5", side="right"))


def strategy_of(**values: Any) -> Any:
    return build_strategy(validate(STRATEGIES["osf"].Options, {"name": "osf", **values}, "test"))


def stage_of(number: int) -> Stage:
    return contexts.stage_of(STREAM, number)


def trained(strategy: Any, model: Any, kind: str = "llama", optimizer: str = "adamw", steps: int = 12) -> Any:
    """Begin a stage and train it, up to before `end`."""
    strategy.begin(context_of(model), stage_of(1))
    parameters = [p for p in model.parameters() if p.requires_grad]
    chosen: Any = (
        torch.optim.AdamW(parameters, lr=5e-3, weight_decay=0.1)
        if optimizer == "adamw"
        else torch.optim.SGD(parameters, lr=0.05, momentum=0.9)
    )
    handles = strategy.attach(model, chosen)
    for _ in range(steps):
        model(**batch_of(kind)).loss.backward()
        chosen.step()
        chosen.zero_grad()
    for handle in handles:
        handle.remove()
    return model


def weights_of(model: Any) -> dict[str, Tensor]:
    return {n: p.detach().double().clone() for n, p in model.named_parameters()}


def changes(strategy: Any, start: dict[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    """By name of the weight: before, and the change that the trained factors stand for (float64)."""
    found = {}
    for name, layer in strategy.decomposed.layers.items():
        now = {k: v.detach().double() for k, v in layer.osf_svd_params["default"].items()}
        first = {k: getattr(layer, f"_osf_{k}_init")["default"].double() for k in now}
        low = [(f["U_low"] * f["S_low"]) @ f["V_low"] for f in (now, first)]
        found[f"{name}.weight"] = (start[f"{name}.weight"], low[0] - low[1])
    return found


KINDS = ["llama", "qwen2", "t5"]


# the merge


@pytest.mark.parametrize("kind", KINDS)
def test_merged_weights_are_what_the_trained_factors_say_and_all_else_is_as_before(kind: str) -> None:
    model = model_of(kind)
    start, flags = weights_of(model), {n: p.requires_grad for n, p in model.named_parameters()}
    classes = {n: type(m) for n, m in model.named_modules()}
    strategy = strategy_of()
    trained(strategy, model, kind)
    expected = changes(strategy, start)
    with torch.no_grad():
        logits = model(**batch_of(kind)).logits
    strategy.end(context_of(model), stage_of(1))
    after = weights_of(model)
    assert {n: type(m) for n, m in model.named_modules()} == classes, "a plain model again"
    assert {n: p.requires_grad for n, p in model.named_parameters()} == flags
    assert not hasattr(model, "peft_config")
    for name, (before, change) in expected.items():
        assert change.norm() > 1e-2 * before.norm(), "it has learned"
        torch.testing.assert_close(after[name], before + change, rtol=0, atol=1e-6, msg=name)
    others = after.keys() - expected.keys()
    for name in others:  # biases of the maps learn freely, all that the run doesn't train stays
        assert torch.equal(after[name], start[name]) == (not flags[name]), name
    with torch.no_grad():
        torch.testing.assert_close(model(**batch_of(kind)).logits, logits, rtol=1e-4, atol=1e-4)


def test_saved_model_is_plain_and_answers_as_the_trained_one(tmp_path: Path) -> None:
    model = model_of("llama")
    strategy = strategy_of()
    trained(strategy, model)
    with torch.no_grad():
        logits = model(**batch_of("llama")).logits
    strategy.end(context_of(model), stage_of(1))
    save_model(model, TOKENIZER, tmp_path)
    assert load_file(tmp_path / "model.safetensors").keys() <= model_of("llama").state_dict().keys()
    again = model_of("llama")
    load_weights(again, tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(again(**batch_of("llama")).logits, logits, rtol=1e-4, atol=1e-4)


def test_16_bit_weights_are_rounded_once() -> None:
    model = model_of("llama", torch.bfloat16)
    start, strategy = weights_of(model), strategy_of()
    trained(strategy, model)
    expected = changes(strategy, start)
    layers = strategy.decomposed.layers
    in_16_bit = {
        f"{n}.weight": (layer.weight + layer.get_delta_weight("default")).detach()
        for n, layer in layers.items()
    }
    strategy.end(context_of(model), stage_of(1))
    after, coarse, fine = weights_of(model), 0.0, 0.0
    for name, (before, change) in expected.items():
        exact = before + change
        rounded = exact.to(torch.bfloat16).double()
        # one rounding, and what float32 products differ from float64 ones at a tie
        assert (after[name] != rounded).double().mean() < 1e-2
        fine += float((after[name] - exact).norm() ** 2)
        coarse += float((in_16_bit[name].double() - exact).norm() ** 2)
    assert fine < 0.7 * coarse, "better than PEFT's merge in the weights' own precision"
    assert all(p.dtype == torch.bfloat16 for p in model.parameters())


# what is preserved


def disturbed(strategy: Any, start: dict[str, Tensor], rank: float) -> float:
    """The largest part of a map's change that lies in its preserved directions, on either side."""
    worst = 0.0
    for before, change in changes(strategy, start).values():
        u, _, v = torch.linalg.svd(before, full_matrices=False)
        k = max(int(min(before.shape) * rank), 1)
        sides = (u[:, :k].T @ change).norm(), (change @ v[:k].T).norm()
        worst = max(worst, *(float(side / change.norm()) for side in sides))
    return worst


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("on", "optimizer"), [("update", "adamw"), ("update", "sgd"), ("gradient", "sgd")])
def test_change_lies_outside_the_preserved_directions(on: str, optimizer: str, kind: str) -> None:
    """U_h' dW = 0 and dW V_h' = 0, to what an SVD in float32 leaves of a small change."""
    model = model_of(kind)
    start, strategy = weights_of(model), strategy_of(on=on, rank=0.3)
    trained(strategy, model, kind, optimizer)
    assert disturbed(strategy, start, 0.3) < 1e-3


def test_under_adamw_projected_gradients_alone_let_the_change_drift_into_them() -> None:
    """The known weakness of the method as published, and the reason for ``on: update``."""
    model = model_of()
    start, strategy = weights_of(model), strategy_of(rank=0.3)
    trained(strategy, model)
    assert disturbed(strategy, start, 0.3) > 5e-2


@pytest.mark.parametrize("rank", [0.2, 0.8])
def test_largest_singular_values_outlive_the_task(rank: float) -> None:
    model = model_of()
    start, strategy = weights_of(model), strategy_of(on="update", rank=rank)
    trained(strategy, model)
    strategy.end(context_of(model), stage_of(1))
    after = weights_of(model)
    for name in block_parameters(model):
        u, s, v = torch.linalg.svd(start[name], full_matrices=False)
        k = int(min(start[name].shape) * rank)
        kept = u[:, :k].T @ after[name] @ v[:k].T
        torch.testing.assert_close(kept, torch.diag(s[:k]), rtol=1e-4, atol=1e-5)


def test_ranks_are_rounded_down_but_never_to_nothing() -> None:
    model, strategy = model_of("qwen2"), strategy_of(rank=0.05)
    strategy.begin(context_of(model), stage_of(0))
    ranks = {layer.effective_rank["default"] for layer in strategy.decomposed.layers.values()}
    assert ranks == {1}, "of 8 and of 16 singular values"
    frozen = {n for n, p in model.named_parameters() if not p.requires_grad}
    assert all(f"{n}.base_layer.weight" in frozen for n in strategy.decomposed.layers)


def test_growing_schedule_preserves_nothing_at_first_and_a_share_more_with_each_task() -> None:
    model, strategy = model_of(), strategy_of(schedule="growing")
    seen = []
    for number in range(4):
        strategy.begin(context_of(model), stage_of(number))
        layers = {} if strategy.decomposed is None else strategy.decomposed.layers
        seen.append({layer.effective_rank["default"] for layer in layers.values()})
        strategy.end(context_of(model), stage_of(number))
    assert seen == [set(), {4}, {8}, {12}], "of 16"


@pytest.mark.parametrize("kind", ["qwen2", "t5"])
def test_a_layer_that_leaves_its_input_as_it_is_preserves_more(kind: str) -> None:
    """mrr + I (trr - mrr), I the mean cosine of a block's input and output, in plain loops over tokens."""
    model, strategy = model_of(kind), strategy_of(schedule="layers", mrr=0.2, trr=0.6)
    task = STREAM.tasks[0]
    encoder = Encoder(TOKENIZER, Template(), encoder_decoder=kind == "t5")
    cosines: dict[str, list[float]] = {}

    def watch(path: str, before: Tensor, after: Tensor) -> None:
        for x, y in zip(before[0].double(), after[0].double(), strict=True):
            cosines.setdefault(path, []).append(float(x @ y / (x.norm() * y.norm())))

    stacks = (
        {"model.layers": model.model.layers}
        if kind == "qwen2"
        else {"encoder.block": model.encoder.block, "decoder.block": model.decoder.block}
    )
    hooks = [
        block.register_forward_hook(
            lambda _, args, kwargs, out, path=f"{stack}.{i}": watch(
                path, args[0] if args else kwargs["hidden_states"], out if isinstance(out, Tensor) else out[0]
            ),
            with_kwargs=True,
        )
        for stack, blocks in stacks.items()
        for i, block in enumerate(blocks)
    ]
    for row in encoder.many(task.train):
        one = dict(collate([row], TOKENIZER.pad_token_id, encoder_decoder=kind == "t5", side="right"))
        with torch.no_grad():
            model(**{k: v for k, v in one.items() if kind == "t5" or k != "labels"})
    for hook in hooks:
        hook.remove()
    means = {path: sum(values) / len(values) for path, values in cosines.items()}
    mean = sum(means.values()) / len(means)
    sizes = {n: min(m.weight.shape) for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    strategy.begin(context_of(model), stage_of(0))
    got = {n: layer.effective_rank["default"] for n, layer in strategy.decomposed.layers.items()}
    expected = {}
    for name in got:
        path = next(path for path in means if name.startswith(f"{path}."))
        expected[name] = max(int(sizes[name] * (0.2 + means[path] / mean * 0.4)), 1)
    assert got == expected
    assert len(set(got.values())) > 1


def test_a_share_of_all_leaves_one_direction_to_train() -> None:
    from holdfast.strategies.osf.decomposed import preserved
    from holdfast.strategies.osf.similarity import share_of

    shares = share_of({"layers.0": 3.0, "layers.1": -3.0}, 0.1, 0.8)
    assert (shares("layers.0.q"), shares("layers.1.q")) == (1.0, 0.0)
    assert [preserved(torch.empty(5, 7), share) for share in (1.0, 0.0)] == [4, 1]


def test_what_else_is_trained_goes_on_being_trained() -> None:
    """``model.trainable: all``: norms and embeddings are not held."""
    model = model_of("llama", whole=True)
    start, strategy = weights_of(model), strategy_of()
    trained(strategy, model)
    strategy.end(context_of(model), stage_of(1))
    after = weights_of(model)
    assert not [n for n in start if torch.equal(start[n], after[n])]
    assert all(p.requires_grad for p in model.parameters())


# what it refuses


def test_adapters_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"osf trains whole weights, not adapters; leave out model\.lora"):
        strategy_of().check(add_lora(model_of(), LoraOptions(r=4)))


def test_models_that_peft_cannot_decompose_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"transformer\.h\.0\.attn\.c_attn is transformers' Conv1D"):
        strategy_of().check(model_of("gpt2"))
    frozen = model_of()
    frozen.requires_grad_(False)
    with pytest.raises(ConfigError, match="no linear map is trained"):
        strategy_of().check(frozen)
    for kind in KINDS:
        strategy_of().check(model_of(kind))


def test_rank_of_a_growing_schedule_is_an_error() -> None:
    with pytest.raises(ConfigError, match="`rank` applies to `schedule: constant` only"):
        strategy_of(schedule="growing", rank=0.5)


def test_options_of_layers_are_refused_elsewhere_and_must_leave_room() -> None:
    with pytest.raises(ConfigError, match="`trr` applies to `schedule: layers` only, not to `constant`"):
        strategy_of(trr=0.5)
    with pytest.raises(
        ConfigError, match=r"`mrr` \(0.1\) is the least share, and must be below `trr` \(0.05\)"
    ):
        strategy_of(schedule="layers", trr=0.05)


# in a run

TRAINING = {"epochs": 2, "batch_size": 8, "learning_rate": 3e-3, "weight_decay": 0.1, "checkpoint_steps": 3}


def one_run(output: Path, strategy: Any) -> Path:
    values = tiny_run(output, strategy=strategy, training=TRAINING)
    values["tasks"] = {**values["tasks"], "order": ["copy", "flip"], "test_rows": 2}
    values["evaluation"] = {"zero_shot": False}
    run(validate(RunConfig, values, source="test"))
    return output / "tasks"


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The stages of a run that was never killed, made once for each choice of options."""
    return cache(lambda **options: one_run(tmp_path_factory.mktemp("whole") / "run", options))


def weights_in(stage: Path) -> dict[str, Tensor]:
    return load_file(next((stage / "model").glob("*.safetensors")))


def test_growing_run_learns_the_first_task_plainly_and_the_second_otherwise(
    whole_run: Any, tmp_path: Path
) -> None:
    plain = one_run(tmp_path / "plain", "sequential")
    grown = whole_run(name="osf", schedule="growing")
    for stage, same in (("01-copy", True), ("02-flip", False)):
        a, b = weights_in(plain / stage), weights_in(grown / stage)
        assert a.keys() == b.keys(), "canonical names of a plain model"
        assert all(torch.equal(a[n], b[n]) for n in a) == same


@pytest.mark.parametrize(
    ("options", "other"),
    [
        ({"on": "gradient"}, False),
        ({"on": "gradient"}, True),
        ({"on": "update"}, True),
        ({"schedule": "growing"}, False),
        ({"schedule": "layers", "samples": 4}, False),
    ],
    ids=["gradient", "gradient-other-bits", "update-other-bits", "growing", "layers"],
)
def test_killed_run_ends_bit_identical_even_if_the_second_svd_differs(
    options: Any, other: bool, whole_run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    strategy = {"name": "osf", **options}
    whole = whole_run(**strategy)
    with monkeypatch.context() as patch:
        # in task 2, after its first checkpoint
        kill_when(patch, "holdfast.training.bridge.completion_loss", 14)
        with pytest.raises(Killed):
            one_run(tmp_path / "broken", strategy)
    assert list((tmp_path / "broken" / "tasks").glob("02-*.partial/checkpoints/checkpoint-*"))
    with monkeypatch.context() as patch:
        if other:
            svd = torch.linalg.svd

            def other_bits(w: Tensor, **kwargs: Any) -> tuple[Tensor, ...]:
                return tuple(factor.to(w.dtype) for factor in svd(w.double(), **kwargs))

            patch.setattr(torch.linalg, "svd", other_bits)
        broken = one_run(tmp_path / "broken", strategy)
    a, b = weights_in(whole / "02-flip"), weights_in(broken / "02-flip")
    assert a.keys() == b.keys()
    assert all(torch.equal(a[n], b[n]) for n in a)


def test_frozen_parts_of_a_second_decomposition_are_the_same() -> None:
    parts = []
    for _ in range(2):
        strategy, model = strategy_of(), model_of("qwen2")
        strategy.begin(context_of(model), stage_of(0))
        parts.append({n: b.clone() for n, b in strategy.stage_state_dict().items()})
    assert parts[0].keys() == parts[1].keys()
    assert len(parts[0]) > 3 * 14
    assert all(torch.equal(parts[0][n], parts[1][n]) for n in parts[0])
