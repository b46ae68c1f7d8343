"""What defines each baseline: freeze, migu, fisher-mask, lwf and the variants of ewc."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

import contexts
from contexts import context_of
from holdfast.config import validate
from holdfast.errors import ConfigError
from holdfast.importance import ImportancePrior, compute_prior
from holdfast.importance.prior import parameters_by_name
from holdfast.models import ModelOptions, block_parameters, load_model
from holdfast.runner import RunConfig, run
from holdfast.strategies import STRATEGIES, Stage, Strategy, build_strategy
from holdfast.strategies.masks.units import OutputMask, linear_maps, lowest
from holdfast.tasks import Encoder, Template, toy_suite, toy_tokenizer
from holdfast.tasks.encode import collate
from holdfast.training.teacher import Teacher, distillation
from tiny_models import tiny_model
from tiny_runs import tiny_run

TOKENIZER = toy_tokenizer()
STREAM = toy_suite(["copy", "flip", "head"], 8, 2)
KINDS = ["llama", "llama-lora", "gpt2", "t5"]


def batch_of(kind: str, rows: int = 3) -> dict[str, Tensor]:
    encoder = Encoder(TOKENIZER, Template(), encoder_decoder=kind == "t5")
    batch = collate(
        encoder.many(STREAM.tasks[0].train[:rows]),
        TOKENIZER.pad_token_id,
        encoder_decoder=kind == "t5",
        side="right" if kind == "t5" else "left",
    )
    if kind == "gpt2":
        batch.pop("position_ids", None)
    return dict(batch)


def strategy_of(name: str, **values: Any) -> Strategy:
    return build_strategy(validate(STRATEGIES[name].Options, {"name": name, **values}, "test"))


def stage_of(number: int) -> Stage:
    return contexts.stage_of(STREAM, number)


def one_run(output: Path, strategy: Any, model: Any = None, order: tuple[str, ...] = ("copy",)) -> Path:
    values = tiny_run(output, strategy=strategy)
    values["model"] |= model or {}
    values["tasks"] = {**values["tasks"], "order": list(order), "test_rows": 2}
    values["training"] = {"max_steps": 4, "batch_size": 8, "learning_rate": 3e-3, "weight_decay": 0.1}
    run(validate(RunConfig, values, source="test"))
    return output / "tasks"


def start_of(model: dict[str, Any]) -> Any:
    return load_model(ModelOptions(toy=True, hidden=32, layers=2, **model), 0, toy_tokenizer)[0]


def weights_in(stage: Path) -> dict[str, Tensor]:
    return load_file(next((stage / "model").glob("*.safetensors")))


# freeze


@pytest.mark.parametrize("embeddings", [True, False])
def test_frozen_weights_are_bit_identical_and_all_others_move(embeddings: bool, tmp_path: Path) -> None:
    strategy = {"name": "freeze", "blocks": 1, "embeddings": embeddings}
    after = weights_in(one_run(tmp_path / "run", strategy, {"trainable": "all"}) / "01-copy")
    start = {n: p.detach() for n, p in start_of({"trainable": "all"}).named_parameters()}
    frozen = {n for n in start if n.startswith("model.layers.0.") or (embeddings and "embed_tokens" in n)}
    assert {n for n in start if torch.equal(start[n], after[n])} == frozen


def test_freezing_may_begin_with_a_later_task() -> None:
    model = tiny_model("llama")
    strategy = strategy_of("freeze", from_task=2)
    strategy.begin(context_of(model), stage_of(0))
    assert all(p.requires_grad for p in model.parameters())
    strategy.begin(context_of(model), stage_of(1))
    kept = {n for n, p in model.named_parameters() if p.requires_grad}
    assert kept == {n for n, _ in model.named_parameters() if "layers.1" in n or n == "model.norm.weight"}


def test_both_stacks_of_an_encoder_decoder_model_are_frozen() -> None:
    names = set(strategy_of("freeze", blocks=1).frozen(tiny_model("t5")))  # type: ignore[attr-defined]
    parts = {n.rsplit(".layer.", 1)[0] for n in names}
    assert parts == {"shared.weight", "encoder.block.0", "decoder.block.0"}


@pytest.mark.parametrize(
    ("blocks", "kind", "message"),
    [
        (3, "llama", "3 blocks to freeze, but the model has 2"),
        (2, "llama-lora", "nothing is left to train"),
    ],
)
def test_freezing_more_than_there_is_is_an_error(blocks: int, kind: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        strategy_of("freeze", blocks=blocks).check(tiny_model(kind))


# migu


def outputs_of(model: Any, batch: dict[str, Tensor]) -> dict[nn.Module, Tensor]:
    """What every module puts out, by hooks of the test's own."""
    seen: dict[nn.Module, Tensor] = {}
    handles = [
        m.register_forward_hook(lambda m, _, out: seen.update({m: out}))
        for m in model.modules()
        if isinstance(m, nn.Linear) or type(m).__name__ == "Conv1D" or hasattr(m, "lora_B")
    ]
    model(**batch).loss.backward()
    for handle in handles:
        handle.remove()
    return seen


def expected_units(output_BTO: Tensor, batch: dict[str, Tensor], masked: float) -> set[int]:
    """The units of largest normalised output: token by token, as the equation reads."""
    rows = []
    masks = [batch["attention_mask"] != 0, batch["labels"] != -100]
    fitting = [m for m in masks if m.shape == output_BTO.shape[:2]]
    for b, t in [(b, t) for b in range(output_BTO.shape[0]) for t in range(output_BTO.shape[1])]:
        if not fitting or any(bool(m[b, t]) for m in fitting):
            size_O = output_BTO[b, t].abs()
            rows.append(size_O / size_O.sum())
    order = torch.stack(rows).mean(0).argsort().tolist()
    return set(order[round(masked * len(order)) :])


@pytest.mark.parametrize("kind", KINDS)
def test_migu_lets_exactly_the_units_with_the_largest_outputs_move(kind: str) -> None:
    model, batch = tiny_model(kind), batch_of(kind)
    if kind == "llama-lora":  # as after some training: the factors' gradients are not zero
        for name, p in model.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(p, std=0.1)
    before = {n: p.detach().clone() for n, p in parameters_by_name(model).items()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    mask = OutputMask(0.7)
    handle = mask.attach(model, optimizer)
    mask.watch(batch)
    seen = outputs_of(model, batch)
    gradients = {n: p.grad.clone() for n, p in parameters_by_name(model).items() if p.grad is not None}
    optimizer.step()
    handle.remove()
    maps = linear_maps(model)
    assert len(maps) > 4
    for linear in maps:
        free = expected_units(seen[linear.source], batch, 0.7)
        for name, parameter in linear.parameters.items():
            moved = (parameter.detach() - before[name]).transpose(0, -1 if linear.out_dim else 0)
            gradient = gradients[name].transpose(0, -1 if linear.out_dim else 0)
            held = sorted(set(range(len(moved))) - free)
            assert not moved[held].any(), f"{name}: a masked unit moved"
            torch.testing.assert_close(moved[sorted(free)], -gradient[sorted(free)])
    assert not any(module._forward_hooks for module in model.modules()), "a hook was left"


def test_migu_of_lora_b_is_not_stuck_with_arbitrary_units_while_b_is_zero() -> None:
    model, batch = tiny_model("llama-lora"), batch_of("llama-lora")
    mask = OutputMask(0.7)
    mask.attach(model, torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0))
    mask.watch(batch)
    model(**batch).loss.backward()
    factors = [m for m in linear_maps(model) if any(".lora_B" in n for n in m.parameters)]
    for linear in factors:
        held = mask.held(linear)
        assert held is not None
        assert 0.6 < held.float().mean() < 0.8, "ties would hold all of them"


def test_padding_does_not_change_the_mask() -> None:
    model, masks = tiny_model("llama"), []
    for pad in (0, 5):
        batch = batch_of("llama")
        fill = {"input_ids": TOKENIZER.pad_token_id, "attention_mask": 0, "labels": -100, "position_ids": 0}
        batch = {k: F.pad(v, (pad, 0), value=fill[k]) for k, v in batch.items()}
        mask = OutputMask(0.7)
        handle = mask.attach(model, torch.optim.SGD(model.parameters(), lr=1.0))
        mask.watch(batch)
        model(**batch)
        masks.append([mask.held(linear) for linear in linear_maps(model)])
        handle.remove()
    assert all(torch.equal(a, b) for a, b in zip(*masks, strict=True))


@pytest.mark.parametrize("to_none", [True, False])
def test_sizes_of_a_step_that_was_passed_over_are_not_those_of_the_next(to_none: bool) -> None:
    model, batches = tiny_model("llama"), [batch_of("llama"), batch_of("llama")]
    batches[0]["input_ids"] = batches[0]["input_ids"].flip(0, 1)

    def held(passed_over: bool) -> list[Tensor | None]:
        optimizer, mask = torch.optim.SGD(model.parameters(), lr=1.0), OutputMask(0.7)
        handle = mask.attach(model, optimizer)
        for batch in batches[0 if passed_over else 1 :]:
            for _ in range(2):  # micro-batches
                mask.watch(batch)
                model(**batch).loss.backward()
            if batch is batches[0]:
                optimizer.zero_grad(set_to_none=to_none)  # in place of a step
        found = [mask.held(linear) for linear in linear_maps(model)]
        handle.remove()
        optimizer.zero_grad()
        return found

    for one, other in zip(held(False), held(True), strict=True):
        assert one is not None
        assert other is not None
        assert torch.equal(one, other)


# fisher-mask


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("unit", ["output", "weight"])
def test_fisher_mask_holds_the_units_below_the_quantile(unit: str, kind: str) -> None:
    model = tiny_model(kind)
    shapes = {n: p.shape for n, p in block_parameters(model).items()}
    fisher = ImportancePrior({n: torch.rand(s) for n, s in shapes.items()})
    strategy = strategy_of("fisher-mask", masked=0.7, unit=unit)
    held = strategy.held(model, fisher)  # type: ignore[attr-defined]
    assert held.keys() == fisher.tensors.keys()
    for linear in linear_maps(model):
        for name in linear.parameters.keys() & held.keys():
            value = fisher.tensors[name]
            score = value
            if unit == "output" and value.dim() == 2:
                score = value.mean(1 - linear.out_dim, keepdim=True).expand_as(value)
            limit = torch.quantile(score.flatten(), 0.7)
            assert torch.equal(held[name] == 0, score > limit) or abs(float(held[name].mean()) - 0.7) < 0.2
            assert float(score[held[name] == 1].max()) < float(score[held[name] == 0].min())


def test_fisher_mask_moves_its_units_only_even_with_weight_decay(tmp_path: Path) -> None:
    strategy = {"name": "fisher-mask", "fisher": {"samples": 8}}
    stage = one_run(tmp_path / "run", strategy) / "01-copy"
    model, after = start_of({}), weights_in(stage)
    fisher = ImportancePrior.load(stage / "prior")
    held = strategy_of("fisher-mask").held(model, fisher)  # type: ignore[attr-defined]
    start = dict(model.named_parameters())
    moved = 0
    for name, mask in held.items():
        assert torch.equal(start[name].detach()[mask == 1], after[name][mask == 1]), name
        moved += int((start[name].detach() != after[name]).sum())
    assert moved > 0.25 * fisher.elements


def test_tensor_without_any_fisher_information_is_not_masked() -> None:
    model = tiny_model("llama-lora")
    fisher = ImportancePrior({n: torch.zeros(p.shape) for n, p in block_parameters(model).items()})
    held = strategy_of("fisher-mask").held(model, fisher)  # type: ignore[attr-defined]
    assert not any(mask.any() for mask in held.values())


def test_share_of_nothing_holds_nothing() -> None:
    assert not lowest(torch.zeros(10), 0.0).any()
    assert lowest(torch.arange(10.0), 0.7).tolist() == [True] * 7 + [False] * 3


# lwf


def test_distillation_is_lwfs_equation() -> None:
    student, teacher = torch.randn(5, 7, requires_grad=True), torch.randn(5, 7)
    soft = [
        (z.exp() ** 0.5) / (z.exp() ** 0.5).sum(-1, keepdim=True) for z in (student, teacher)
    ]  # eq. 3, T = 2
    cross_entropy = -(soft[1] * soft[0].log()).sum(-1).mean()  # eq. 2
    entropy = -(soft[1] * soft[1].log()).sum(-1).mean()
    value = distillation(student, teacher, 2.0)
    torch.testing.assert_close(value, cross_entropy - entropy)
    (ours,), (theirs,) = (torch.autograd.grad(x, student, retain_graph=True) for x in (value, cross_entropy))
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("kind", KINDS)
def test_lwf_penalty_is_that_of_a_copy_of_the_model_and_moves_the_student_only(kind: str) -> None:
    model, batch = tiny_model(kind), batch_of(kind)
    before = copy.deepcopy(model)
    strategy = strategy_of("lwf", weight=3.0)
    strategy.begin(context_of(model), stage_of(0))
    loss = torch.zeros(())
    assert strategy.loss(model, batch, model(**batch), loss) is loss, "nothing was learned before task 1"
    strategy.begin(context_of(model), stage_of(1))
    with torch.no_grad():
        nothing = strategy.loss(model, batch, model(**batch), loss)
    assert float(nothing) == pytest.approx(0.0, abs=1e-5)
    trained = [p for p in model.parameters() if p.requires_grad]
    with torch.no_grad():
        for p in trained:
            p += 0.1 * torch.randn_like(p)
    kept = [p.detach().clone() for p in trained]
    outputs = model(**batch)
    value = strategy.loss(model, batch, outputs, loss)
    a, b = outputs.logits, before(**batch).logits
    labels = batch["labels"]
    if kind != "t5":
        a, b, labels = a[:, :-1], b[:, :-1], labels[:, 1:]
    total, count = torch.zeros(()), 0
    for row, t in (labels != -100).nonzero().tolist():
        p, q = (b[row, t] / 2).softmax(-1), (a[row, t] / 2).softmax(-1)
        total, count = total + (p * (p / q).log()).sum(), count + 1
    torch.testing.assert_close(value, 3.0 * total / count, rtol=1e-4, atol=1e-6)
    value.backward()
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in trained)
    teacher: Teacher = strategy.teacher  # type: ignore[attr-defined]
    assert not any(w.requires_grad for w in teacher.weights.values())
    assert sum(w.numel() for w in teacher.weights.values()) == sum(p.numel() for p in trained)
    assert all(torch.equal(p, k) for p, k in zip(trained, kept, strict=True)), (
        "the teacher stayed in the model"
    )


def test_lwf_sees_the_same_logits_where_the_loop_keeps_only_the_last() -> None:
    model, batch = tiny_model("llama"), batch_of("llama")
    teacher, moved = Teacher(model), tiny_model("llama")
    nn.init.normal_(moved.model.layers[0].mlp.up_proj.weight)
    logits = moved(**batch).logits
    whole = teacher.penalty(moved, batch, logits, 2.0)
    answers = int((batch["labels"] != -100).any(0).float().argmax())
    torch.testing.assert_close(teacher.penalty(moved, batch, logits[:, answers - 1 :], 2.0), whole)


def test_lwf_changes_the_second_task_and_not_the_first(tmp_path: Path) -> None:
    order = ("copy", "flip")
    plain = one_run(tmp_path / "a", "sequential", order=order)
    distilled = one_run(tmp_path / "b", {"name": "lwf", "weight": 5.0}, order=order)
    for stage, same in (("01-copy", True), ("02-flip", False)):
        a, b = weights_in(plain / stage), weights_in(distilled / stage)
        assert all(torch.equal(a[n], b[n]) for n in a) == same


# ewc


def priors_of(model: Any, count: int) -> list[ImportancePrior]:
    shapes = {n: p.shape for n, p in block_parameters(model).items()}
    return [ImportancePrior({n: torch.rand(s) for n, s in shapes.items()}) for _ in range(count)]


@pytest.mark.parametrize("variant", ["sum", "online", "separate"])
def test_ewc_penaltys_gradient_is_its_formula(
    variant: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, gamma = tiny_model("llama"), 0.5
    parameters = block_parameters(model)
    fishers = priors_of(model, 3)
    left = iter(fishers)
    context = context_of(model, folder=tmp_path)
    monkeypatch.setattr(context, "importance", lambda *_: next(left))
    options = {"gamma": gamma} if variant == "online" else {}
    strategy = strategy_of("ewc", variant=variant, strength=0.1, **options)
    anchors = []
    for number in range(2):
        strategy.begin(context, stage_of(number))
        with torch.no_grad():
            for p in parameters.values():
                p += 0.1 * torch.randn_like(p)
        strategy.end(context, stage_of(number))
        anchors.append({n: p.detach().clone() for n, p in parameters.items()})
    again = strategy_of("ewc", variant=variant, strength=0.1, **options)  # as after a resume
    again.load_state_dict(*strategy.state_dict())
    again.begin(context, stage_of(2))
    with torch.no_grad():
        for p in parameters.values():
            p += 0.1 * torch.randn_like(p)
    now = {n: p.detach().clone() for n, p in parameters.items()}
    optimizer = torch.optim.SGD(parameters.values(), lr=1.0)
    again.attach(model, optimizer)
    optimizer.step()
    first, second = (f.tensors for f in fishers[:2])
    for n, p in parameters.items():
        theta = now[n].clone().requires_grad_()
        if variant == "separate":
            terms = [(first[n], anchors[0][n]), (second[n], anchors[1][n])]
        else:
            kept = gamma if variant == "online" else 1.0
            terms = [(kept * first[n] + second[n], anchors[1][n])]
        penalty = sum((0.1 / 2 * (f * (theta - anchor) ** 2).sum() for f, anchor in terms), torch.zeros(()))
        (gradient,) = torch.autograd.grad(penalty, theta)
        torch.testing.assert_close(now[n] - p.detach(), gradient, rtol=1e-4, atol=1e-6)


def test_ewcs_fisher_does_not_depend_on_the_batch_size() -> None:
    model = tiny_model("llama")
    rows = Encoder(TOKENIZER, Template(), encoder_decoder=False).many(STREAM.tasks[0].train)
    one, many = (
        compute_prior(model, rows, strategy_of("ewc", fisher={"batch_size": size}).options.fisher, pad_id=0)
        for size in (1, 8)
    )
    for name, value in one.tensors.items():
        torch.testing.assert_close(value, many.tensors[name], rtol=1e-3, atol=1e-9)


def test_gamma_without_the_online_variant_is_an_error() -> None:
    with pytest.raises(ConfigError, match="`gamma` applies to `variant: online` only"):
        strategy_of("ewc", gamma=0.9)


# the table in the docs


def test_the_guide_names_every_strategy_once_with_what_it_asks_for_and_keeps() -> None:
    guide = (Path(__file__).parents[2] / "docs" / "how-to" / "choose-a-strategy.md").read_text()
    rows = [
        [cell.strip(" `") for cell in line.split("|")[1:-1]]
        for line in guide.splitlines()
        if line[:3] == "| `"
    ]
    said = {
        name: (set(asks.split(", ")) - {"–", "Adam"}, *kept) for name, _, asks, *kept, costs in rows if costs
    }
    assert len(said) == len(rows), "a strategy stands there twice, or without its costs"

    def refuses(method: Any, model: Any) -> bool:
        try:
            method(method.Options()).check(model)
        except ConfigError as error:
            return "lora" in str(error).lower()
        return False

    full, lora = tiny_model("llama"), tiny_model("llama-lora")
    declared = {}
    for name, method in STRATEGIES.items():
        asks = {"LoRA": refuses(method, full), "no LoRA": refuses(method, lora)}
        asks["the task of each question"] = method.needs_task_identity
        old = "written" if method.writes else "none" if method.rehearsal_free else "kept"
        old = "all" if name == "multitask" else old
        declared[name] = ({what for what, so in asks.items() if so}, old, method.state, method.inference)
    assert said == declared
