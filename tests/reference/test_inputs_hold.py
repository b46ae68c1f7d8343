"""The `Inputs` hold against literal float64 transcriptions of its formulas."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from holdfast.errors import ConfigError, PriorMismatchError
from holdfast.hold import Anchor, Gate, Penalty, Project, apply_control, tell_total_rate
from holdfast.hold.basis import Whole
from holdfast.hold.drift import drift
from holdfast.hold.inputs import Inputs
from holdfast.importance.prior import ImportancePrior

ETA, LAMBDA = 0.05, 8.0


class Net(nn.Module):
    """Two linear maps in "blocks", one of them transposed, and a head that no prior covers."""

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.h = nn.ModuleList([nn.ModuleDict({"a": nn.Linear(6, 5), "b": Conv1D(4, 5)})])
        self.head = nn.Linear(4, 2)
        self.to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        block: Any = self.h[0]
        return self.head(block["b"](torch.tanh(block["a"](x))))


NAMES = {"h.0.a.weight": 1, "h.0.b.weight": 0}


def moments(seed: int = 1) -> ImportancePrior:
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, size in (("h.0.a.weight", 6), ("h.0.b.weight", 5)):
        x = torch.randn(size, 2 * size, generator=generator, dtype=torch.float64)
        x *= torch.logspace(0, -2, size, dtype=torch.float64)[:, None]
        tensors[name] = x @ x.T
    return ImportancePrior(tensors, {"kind": "inputs", "importance": "inputs"})


def frames(prior: ImportancePrior) -> dict[str, tuple[Tensor, Tensor]]:
    """c of mean 1 and U, of each map."""
    found = {}
    for name, c_II in prior.tensors.items():
        scaled = c_II.double() * len(c_II) / c_II.double().trace()
        found[name] = torch.linalg.eigh(scaled.float().double())
    return found


def gradient(model: nn.Module, seed: int = 2, scale: float = 1.0) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(7, 6, generator=generator, dtype=torch.float64).to(next(model.parameters()).dtype)
    (scale * model(x).square().mean()).backward()


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters()}


def grad(p: Tensor) -> Tensor:
    assert p.grad is not None
    return p.grad


def oriented(tensor: Tensor, name: str) -> Tensor:
    return tensor if NAMES[name] == 1 else tensor.T


def stepped(optimizer: torch.optim.Optimizer, model: nn.Module, steps: int = 4) -> None:
    for step in range(steps):
        optimizer.zero_grad()
        gradient(model, seed=step)
        optimizer.step()


def test_anchor_in_weights_is_d_u_diag_of_one_minus_the_pull_u_transposed() -> None:
    model, plain = Net(), Net()
    start, prior = weights(model), moments()
    optimizer = torch.optim.SGD(model.parameters(), lr=ETA)
    Anchor(prior, strength=LAMBDA, coordinates="weights").attach(model, optimizer)
    expected = weights(plain)
    for step in range(3):
        optimizer.zero_grad()
        gradient(model, seed=step)
        optimizer.step()
        plain.load_state_dict(expected)
        plain.zero_grad()
        gradient(plain, seed=step)
        for name, p in plain.named_parameters():
            new = expected[name] - ETA * grad(p)
            if name in NAMES:
                c, u = frames(prior)[name]
                d = oriented(new - start[name], name)
                held = d @ u @ torch.diag(1 - torch.clamp(ETA * LAMBDA * c, max=1)) @ u.T
                new = start[name] + oriented(held, name)
            expected[name] = new
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.detach(), expected[name], rtol=1e-6, atol=1e-8)


def adam(z: Tensor, g: Tensor, m: Tensor, v: Tensor, t: int) -> Tensor:
    m.mul_(0.9).add_(0.1 * g)
    v.mul_(0.999).add_(0.001 * g * g)
    return z - ETA * (m / (1 - 0.9**t)) / ((v / (1 - 0.999**t)).sqrt() + 1e-8)


def test_anchor_in_inputs_is_adam_on_z_with_each_column_pulled() -> None:
    model, plain = Net(), Net()
    start, prior = weights(model), moments()
    optimizer = torch.optim.Adam(model.parameters(), lr=ETA)
    Anchor(prior, strength=LAMBDA).attach(model, optimizer)
    stepped(optimizer, model)
    current = weights(plain)
    z = {n: torch.zeros_like(oriented(start[n], n)) if n in NAMES else start[n].clone() for n in start}
    m = {n: torch.zeros_like(t) for n, t in z.items()}
    v = {n: torch.zeros_like(t) for n, t in z.items()}
    for t in range(1, 5):
        plain.load_state_dict(current)
        plain.zero_grad()
        gradient(plain, seed=t - 1)
        for name, p in plain.named_parameters():
            if name in NAMES:
                c, u = frames(prior)[name]
                moved = adam(z[name], oriented(grad(p), name) @ u, m[name], v[name], t)
                z[name] = moved * (1 - torch.clamp(ETA * LAMBDA * c, max=1))
                current[name] = start[name] + oriented(z[name] @ u.T, name)
            else:
                current[name] = z[name] = adam(z[name], grad(p), m[name], v[name], t)
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.detach(), current[name], rtol=1e-6, atol=1e-8)


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1),
    "adamw-fused": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1, fused=True),
    "sgd": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9, weight_decay=0.1),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=1e-2),
    "adafactor": lambda p: torch.optim.Adafactor(p, lr=1e-2),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=1e-2),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("coordinates", ["inputs", "weights"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_fully_held_map_is_bit_identical_and_the_rest_moves(
    optimizer: str, coordinates: Any, dtype: torch.dtype
) -> None:
    model = Net(dtype)
    before = weights(model)
    eye = ImportancePrior({"h.0.a.weight": torch.eye(6), "h.0.b.weight": torch.eye(5)}, {"kind": "inputs"})
    prior = apply_control(eye, "permuted", seed=3)  # all directions alike, in no special basis
    optim = OPTIMIZERS[optimizer](model.parameters())
    Anchor(prior, strength=101.0, coordinates=coordinates).attach(model, optim)
    stepped(optim, model)
    after = weights(model)
    assert all(torch.equal(before[n], after[n]) for n in NAMES)
    assert not torch.equal(before["head.weight"], after["head.weight"])


@pytest.mark.parametrize("coordinates", ["inputs", "weights"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_fully_held_axis_keeps_its_column_bit_identical(optimizer: str, coordinates: Any) -> None:
    model = Net(torch.float32)
    before = weights(model)
    c = {"h.0.a.weight": torch.diag(torch.tensor([3.0, 0, 0, 3, 0, 0])), "h.0.b.weight": torch.zeros(5, 5)}
    optim = OPTIMIZERS[optimizer](model.parameters())
    prior = ImportancePrior(c, {"kind": "inputs"})
    Anchor(prior, strength=101.0, coordinates=coordinates).attach(model, optim)
    stepped(optim, model)
    after = weights(model)
    same = (before["h.0.a.weight"] == after["h.0.a.weight"]).all(0)
    assert same.tolist() == [True, False, False, True, False, False]
    assert not torch.equal(before["h.0.b.weight"], after["h.0.b.weight"])


@pytest.mark.parametrize("coordinates", ["inputs", "weights"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_output_along_a_fully_held_direction_moves_by_rounding_only(
    dtype: torch.dtype, coordinates: Any
) -> None:
    model = Net(dtype)
    before = weights(model)["h.0.a.weight"].double()
    u = nn.functional.normalize(torch.randn(6, generator=torch.Generator().manual_seed(5)), dim=0)
    c = {"h.0.a.weight": torch.outer(u, u), "h.0.b.weight": torch.zeros(5, 5)}
    optim = torch.optim.AdamW(model.parameters(), lr=1e-2)
    Anchor(ImportancePrior(c, {"kind": "inputs"}), strength=1e3, coordinates=coordinates).attach(model, optim)
    stepped(optim, model, steps=20)
    change = model.h[0]["a"].weight.detach().double() - before  # type: ignore[index]
    assert change.norm() > 0.1
    rounding = torch.finfo(dtype).eps * before.norm() + 1e-6 * change.norm()
    assert (change @ u.double()).norm() <= rounding


def test_nothing_held_in_the_weights_coordinates_is_the_plain_run_up_to_rounding() -> None:
    model, plain = Net(), Net()
    optims = [torch.optim.AdamW(m.parameters(), lr=1e-2) for m in (model, plain)]
    Anchor(moments(), strength=0.0, coordinates="weights").attach(model, optims[0])
    stepped(optims[0], model)
    stepped(optims[1], plain)
    for a, b in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


def test_sgd_does_not_care_about_the_coordinates() -> None:
    runs = []
    for coordinates in ("inputs", "weights"):
        model = Net()
        optim = torch.optim.SGD(model.parameters(), lr=1e-2, momentum=0.9, weight_decay=0.1)
        Anchor(moments(), strength=0.0, coordinates=coordinates).attach(model, optim)
        stepped(optim, model)
        runs.append(weights(model))
    for name, value in runs[0].items():
        torch.testing.assert_close(value, runs[1][name], rtol=1e-10, atol=1e-12)


def test_clipping_before_the_step_meets_the_norm_that_the_optimizer_gets() -> None:
    model, seen = Net(), []
    start = weights(model)
    torch.optim.SGD(model.parameters(), lr=1.0)  # from now on torch runs the hooks of a subclass twice a step

    class Looks(torch.optim.SGD):
        def step(self, closure: Any = None) -> None:  # type: ignore[override]
            seen.append(torch.cat([grad(p).flatten() for g in self.param_groups for p in g["params"]]).norm())
            super().step(closure)

    optim = Looks(model.parameters(), lr=1e-2)
    Anchor(moments(), strength=1.0).attach(model, optim)
    gradient(model, scale=100.0)
    nn.utils.clip_grad_norm_(model.parameters(), 0.5)
    optim.step()
    torch.testing.assert_close(seen[0], torch.tensor(0.5, dtype=torch.float64), rtol=1e-5, atol=0)
    moved = torch.cat([(p - start[n]).flatten() for n, p in model.named_parameters()]).norm()
    assert 0.9 * 0.5e-2 < moved <= 0.5e-2 * (1 + 1e-6)  # one step, pulled by 1 % in the mean


@pytest.mark.parametrize(("every", "rank"), [(1, None), (1, 2), (3, None)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("coordinates", ["inputs", "weights"])
@pytest.mark.parametrize("strength", [{"pull": 2.0}, {"strength": "auto"}], ids=["pull", "auto"])
def test_killed_training_goes_on_bit_for_bit(
    strength: Any, coordinates: Any, dtype: torch.dtype, every: int, rank: Any
) -> None:
    def begin(model: nn.Module, reference: dict[str, Tensor]) -> torch.optim.Optimizer:
        optim = torch.optim.AdamW(model.parameters(), lr=1e-2)
        tell_total_rate(optim, None, 10)
        prior = moments() if rank is None else moments().leading(rank)
        how = {**strength, "every": every, "coordinates": coordinates}
        hold = Anchor(prior, **how, reference=reference)
        hold.attach(model, optim)
        return optim

    model = Net(dtype)
    start = weights(model)
    optim = begin(model, start)
    stepped(optim, model, steps=5)
    saved = copy.deepcopy((model.state_dict(), optim.state_dict()))
    for step in (5, 6, 7):
        optim.zero_grad()
        gradient(model, seed=step)
        optim.step()
    again = Net(dtype)
    optim = begin(again, start)
    again.load_state_dict(saved[0])
    optim.load_state_dict(saved[1])
    for step in (5, 6, 7):
        optim.zero_grad()
        gradient(again, seed=step)
        optim.step()
    for a, b in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b)


def test_hold_attached_to_a_loaded_optimizer_goes_on_bit_for_bit() -> None:
    model = Net(torch.float32)
    start = weights(model)
    optim = torch.optim.AdamW(model.parameters(), lr=1e-2)
    Anchor(moments(), strength=10.0, reference=start).attach(model, optim)
    stepped(optim, model, steps=5)
    saved = copy.deepcopy((model.state_dict(), optim.state_dict()))
    kept = [value for key, value in saved[1]["param_groups"][0].items() if key.endswith(".changes")]
    assert [changes.keys() for changes in kept] == [NAMES.keys()]
    stepped(optim, model, steps=2)
    again = Net(torch.float32)
    again.load_state_dict(saved[0])
    optim = torch.optim.AdamW(again.parameters(), lr=1e-2)
    optim.load_state_dict(saved[1])
    Anchor(moments(), strength=10.0, reference=start).attach(again, optim)
    stepped(optim, again, steps=2)
    assert not [key for key in optim.param_groups[0] if key.endswith(".changes")]
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


@pytest.mark.parametrize("order", ["load, then attach", "attach, then load"])
@pytest.mark.parametrize("kind", ["inputs", "weights"])
@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("anchor", partial(Anchor, strength=10.0)),
        ("penalty", partial(Penalty, strength=10.0)),
        ("project", partial(Project, share=0.5)),
    ],
)
def test_a_script_that_goes_on_without_the_weights_it_began_with_is_told(
    name: str, make: Any, kind: str, order: str, recwarn: pytest.WarningsRecorder
) -> None:
    model = Net(torch.float32)
    start = weights(model)
    by_weight = ImportancePrior({name: torch.ones_like(weight) for name, weight in start.items()})
    prior = moments() if kind == "inputs" else by_weight

    def begin(model: nn.Module, state: Any = None, reference: Any = None) -> torch.optim.Optimizer:
        optim = torch.optim.AdamW(model.parameters(), lr=1e-2)
        if state and order == "load, then attach":
            optim.load_state_dict(state)
        handle = make(prior, reference=reference).attach(model, optim)
        if state and order == "attach, then load":
            optim.load_state_dict(state)
        stepped(optim, model, steps=2)
        handle.remove()
        assert not [key for key in optim.param_groups[0] if key.startswith(f"holdfast_{name}")]
        return optim

    optim = torch.optim.AdamW(model.parameters(), lr=1e-2)
    make(prior).attach(model, optim)
    stepped(optim, model, steps=3)
    state = copy.deepcopy(optim.state_dict())
    begin(copy.deepcopy(model), copy.deepcopy(state), reference=start)
    begin(copy.deepcopy(model))
    assert not [w for w in recwarn if "held to other weights" in str(w.message)]
    with pytest.warns(UserWarning, match=rf"{name}: .* held to other weights .* give `reference=`"):
        begin(copy.deepcopy(model), copy.deepcopy(state))


def test_two_anchors_on_the_same_weights_may_hold_them_to_different_ones(
    recwarn: pytest.WarningsRecorder,
) -> None:
    model = Net(torch.float32)
    start = weights(model)
    other = {name: weight + 1 for name, weight in start.items()}
    prior = ImportancePrior({name: torch.ones_like(weight) for name, weight in start.items()})

    def begin(state: Any = None) -> torch.optim.Optimizer:
        optim = torch.optim.AdamW(model.parameters(), lr=1e-2)
        for reference in (start, other):
            Anchor(prior, strength=10.0, reference=reference).attach(model, optim)
        if state:
            optim.load_state_dict(state)
        stepped(optim, model, steps=2)
        return optim

    begin(copy.deepcopy(begin().state_dict()))
    assert not [w for w in recwarn if "held to other weights" in str(w.message)]


@pytest.mark.parametrize("then", ["no hold", "another prior"])
@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.AdamW(p, lr=ETA),
        lambda p: torch.optim.SGD(p, lr=ETA, momentum=0.9),
        lambda p: torch.optim.Adafactor(p, lr=ETA),
    ],
    ids=["adamw", "momentum", "adafactor"],
)
def test_an_optimizer_used_on_after_the_hold_begins_anew_with_what_was_held(make: Any, then: str) -> None:
    model = Net()
    optimizer = make(model.parameters())
    handle = Anchor(moments(), strength=LAMBDA).attach(model, optimizer)
    stepped(optimizer, model)
    handle.remove()
    fresh = copy.deepcopy(model)
    anew = make(fresh.parameters())
    unheld = zip(model.named_parameters(), fresh.parameters(), strict=True)
    kept = {q: copy.deepcopy(optimizer.state[p]) for (n, p), q in unheld if n not in NAMES}
    anew.state.update(kept)
    for m, o in ((model, optimizer), (fresh, anew)):
        if then == "another prior":
            Anchor(moments(7), strength=LAMBDA).attach(m, o)
        stepped(o, m)
    assert all(map(torch.equal, model.parameters(), fresh.parameters()))


@pytest.mark.parametrize("make", [torch.optim.AdamW, torch.optim.Adafactor])
def test_an_optimizer_that_stepped_without_the_hold_begins_anew_with_what_is_held(make: Any) -> None:
    model = Net()
    optimizer = make(model.parameters(), lr=ETA)
    stepped(optimizer, model)
    fresh = copy.deepcopy(model)
    anew = make(fresh.parameters(), lr=ETA)
    pairs = zip(model.named_parameters(), fresh.parameters(), strict=True)
    anew.state.update({q: copy.deepcopy(optimizer.state[p]) for (n, p), q in pairs if n not in NAMES})
    for m, o in ((model, optimizer), (fresh, anew)):
        Anchor(moments(), strength=LAMBDA).attach(m, o)
        stepped(o, m)
    assert all(map(torch.equal, model.parameters(), fresh.parameters()))


def test_moments_that_were_loaded_before_a_hold_is_removed_stay() -> None:
    model = Net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=ETA)
    handle = Anchor(moments(), strength=LAMBDA).attach(model, optimizer)
    stepped(optimizer, model)
    saved = copy.deepcopy(optimizer.state_dict())
    stepped(optimizer, model)
    optimizer.load_state_dict(saved)
    handle.remove()  # of a training that failed, as a trainer does that resumes
    found = optimizer.state_dict()["state"]
    assert all(torch.equal(found[i]["exp_avg_sq"], s["exp_avg_sq"]) for i, s in saved["state"].items())


@pytest.mark.parametrize("how", ["in place", "by .data", "replaced", "another reference"])
def test_weights_that_somebody_sets_between_steps_are_gone_on_from(how: str) -> None:
    model = Net()
    optim = torch.optim.SGD(model.parameters(), lr=1e-2)
    handle = Anchor(moments(), strength=0.0).attach(model, optim)
    stepped(optim, model, steps=3)
    weight: Any = model.h[0]["a"].weight  # type: ignore[index]
    with torch.no_grad():
        if how == "in place":
            weight.mul_(1.5)
        elif how == "by .data":
            weight.data.clamp_(-0.1, 0.1)
        elif how == "replaced":
            weight.data = weight.data.flip(0) + 1
        else:  # what was kept beside other weights says nothing
            optim.load_state_dict(copy.deepcopy(optim.state_dict()))
            handle.remove()
            Anchor(moments(), strength=0.0).attach(model, optim)
    plain = copy.deepcopy(model)
    stepped(optim, model, steps=3)
    stepped(torch.optim.SGD(plain.parameters(), lr=1e-2), plain, steps=3)
    for a, b in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_every_third_step_pulls_by_the_three_rates_together() -> None:
    model = Net()
    prior, start = moments(), weights(model)
    groups = [{"params": list(model.parameters())}]
    optim = torch.optim.SGD(groups, lr=0.01)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optim, lambda step: 1 / (1 + step))
    Anchor(prior, strength=9.0, every=3, coordinates="weights").attach(model, optim)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1)
    moved = weights(model)
    for _ in range(3):
        optim.zero_grad()
        optim.step()  # no gradients: only the pull moves
        scheduler.step()
    rate = 0.01 * (1 + 1 / 2 + 1 / 3)
    for name in NAMES:
        c, u = frames(prior)[name]
        d = oriented(moved[name] - start[name], name) @ u @ torch.diag(1 - (rate * 9 * c).clamp(max=1)) @ u.T
        expected = start[name] + oriented(d, name)
        got = dict(model.named_parameters())[name].detach()
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-7)


def test_gate_scales_the_step_along_each_direction() -> None:
    model, plain = Net(), Net()
    prior, before = moments(), weights(Net())
    optims = [torch.optim.AdamW(m.parameters(), lr=1e-2, weight_decay=0.5) for m in (model, plain)]
    Gate(prior).attach(model, optims[0])
    for m, o in zip((model, plain), optims, strict=True):
        stepped(o, m, steps=1)
    free = weights(plain)
    for name, p in model.named_parameters():
        expected = free[name]
        if name in NAMES:
            c, u = frames(prior)[name]
            d = oriented(free[name] - before[name], name) @ u @ torch.diag(1 - c.clamp(max=1)) @ u.T
            expected = before[name] + oriented(d, name)
        torch.testing.assert_close(p.detach(), expected, rtol=1e-6, atol=1e-9)


def test_penalty_adds_lambda_d_c_and_equals_autograd_of_its_loss() -> None:
    model, prior = Net(), moments()
    reference = {n: t - 0.3 for n, t in weights(model).items()}
    penalty = Penalty(prior, strength=7.0, reference=reference)
    loss = penalty.loss(model)
    loss.backward()
    by_hand, gradients = torch.zeros(()), {}
    for name in NAMES:
        c, u = frames(prior)[name]
        d = oriented(weights(model)[name] - reference[name], name)
        by_hand += 3.5 * torch.trace(d @ u @ torch.diag(c) @ u.T @ d.T)
        gradients[name] = oriented(7.0 * d @ u @ torch.diag(c) @ u.T, name)
    torch.testing.assert_close(loss.detach(), by_hand, rtol=1e-6, atol=0, check_dtype=False)
    for name, p in model.named_parameters():
        if name in NAMES:
            torch.testing.assert_close(grad(p), gradients[name], rtol=1e-5, atol=1e-7)
    model.zero_grad()
    before = weights(model)
    optim = torch.optim.SGD(model.parameters(), lr=0.5)
    penalty.attach(model, optim)
    gradient(model)
    plain = {n: grad(p).clone() for n, p in model.named_parameters()}
    optim.step()
    for name in NAMES:
        expected = before[name] - 0.5 * (plain[name] + gradients[name])
        got = dict(model.named_parameters())[name].detach()
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("on", ["update", "gradient"])
def test_projection_leaves_no_movement_along_the_leading_directions(on: Any) -> None:
    model, prior = Net(), moments()
    before = weights(model)
    optim = torch.optim.SGD(model.parameters(), lr=0.1)
    Project(prior, share=0.9, on=on).attach(model, optim)
    stepped(optim, model)
    for name in NAMES:
        c, u = frames(prior)[name]
        order = c.argsort(descending=True)
        count = int((c[order].cumsum(0) < 0.9 * c.sum() * (1 - 1e-12)).sum()) + 1
        assert 0 < count < len(c)
        d = oriented(weights(model)[name] - before[name], name) @ u
        assert d[:, order[:count]].abs().max() < 1e-12
        assert (d[:, order[count:]].abs().amax(0) > 1e-5).all()


def test_permuted_control_is_the_same_spectrum_on_other_directions() -> None:
    prior = moments().mean_normalised()
    control = apply_control(prior, "permuted", seed=1)
    assert control.kind == "inputs"
    for name, c_II in prior.tensors.items():
        a, b = (torch.linalg.eigh(t.double()) for t in (c_II, control.tensors[name]))
        torch.testing.assert_close(a.eigenvalues, b.eigenvalues, rtol=1e-4, atol=1e-6)
        assert (a.eigenvectors[:, -1] @ b.eigenvectors[:, -1]).abs() < 0.99
    again = apply_control(prior, "permuted", seed=1)
    other = apply_control(prior, "permuted", seed=2)
    assert all(torch.equal(again.tensors[n], t) for n, t in control.tensors.items())
    assert not any(torch.equal(other.tensors[n], t) for n, t in control.tensors.items())
    mean = apply_control(prior, "tensor-mean")
    assert all(torch.equal(t, torch.eye(len(t))) for t in mean.tensors.values())


def test_tasks_add_up_each_with_the_same_weight() -> None:
    tasks = [moments(seed) for seed in (1, 2, 3)]
    scaled = [
        ImportancePrior({n: t * 10.0**k for n, t in p.tensors.items()}, p.meta) for k, p in enumerate(tasks)
    ]
    total = scaled[0].mean_normalised()
    for other in scaled[1:]:
        total = total.merge(other.mean_normalised(), how="sum")
    total = total.mean_normalised()
    assert total.kind == "inputs"
    for name, c_II in total.tensors.items():
        parts = [p.tensors[name].double() / p.tensors[name].double().trace() for p in tasks]
        torch.testing.assert_close(c_II.double(), sum(parts) * len(c_II) / 3, rtol=1e-5, atol=1e-7)


def test_priors_of_different_kinds_are_not_joined_and_a_maximum_is_refused() -> None:
    by_weight = ImportancePrior({"h.0.a.weight": torch.ones(5, 6), "h.0.b.weight": torch.ones(5, 4)})
    with pytest.raises(PriorMismatchError, match=r"different kinds \(inputs, weights\).*same importance"):
        moments().merge(by_weight, how="sum")
    with pytest.raises(PriorMismatchError, match=r"Allowed for the kind 'inputs': sum, mean"):
        moments().merge(moments(2), how="max")
    with pytest.raises(ConfigError, match=r"coordinates 'inputs' need a prior of the kind 'inputs'"):
        Anchor(by_weight, coordinates="inputs")


def test_prior_of_inputs_must_fit_the_inputs_and_survives_the_disk(tmp_path: Any) -> None:
    prior = moments()
    prior.check_fits(Net())
    loaded = ImportancePrior.load(prior.save(tmp_path))
    assert loaded.kind == "inputs"
    assert all(torch.equal(loaded.tensors[n], t) for n, t in prior.tensors.items())
    wrong = ImportancePrior({**prior.tensors, "h.0.b.weight": torch.eye(4)}, prior.meta)
    with pytest.raises(PriorMismatchError, match=r"h.0.b.weight \(4, 4\) instead of \(5, 5\)"):
        wrong.check_fits(Net())
    short = ImportancePrior({"h.0.a.weight": torch.eye(6)}, prior.meta)
    with pytest.raises(PriorMismatchError, match=r"missing \(1\): h.0.b.weight"):
        short.check_fits(Net())


def test_summary_is_of_directions_and_names_what_is_not_held() -> None:
    model = Net()
    anchor = Anchor(moments(), strength=20.0)
    assert anchor.summary()["elements"] == 11
    anchor.attach(model, torch.optim.SGD(model.parameters(), lr=ETA))
    summary = anchor.summary()
    assert summary["not_held"] == ["h.0.a.bias", "h.0.b.bias", "head.weight", "head.bias"]
    c = torch.cat([frames(moments())[n][0] for n in NAMES])
    assert summary["mean"] == pytest.approx(float((ETA * 20 * c).clamp(max=1).mean()), rel=1e-5)


# the whole pull


@pytest.mark.parametrize(
    "name", ["linear", "cosine", "constant", "constant_with_warmup", "one-cycle", "none"]
)
def test_pull_is_the_strength_times_the_sum_of_the_rates(name: str) -> None:
    steps = 6

    def optimizer_of(model: nn.Module) -> tuple[torch.optim.Optimizer, Any]:
        optim = torch.optim.AdamW(model.parameters(), lr=1e-2)
        if name == "none":
            return optim, None
        if name == "one-cycle":
            return optim, torch.optim.lr_scheduler.OneCycleLR(optim, 1e-2, total_steps=steps + 1)
        from transformers import get_scheduler

        return optim, get_scheduler(name, optim, num_warmup_steps=2, num_training_steps=steps)

    def train(model: nn.Module, optim: Any, scheduler: Any) -> float:
        total = 0.0
        for step in range(steps):
            optim.zero_grad()
            gradient(model, seed=step)
            total += optim.param_groups[0]["lr"]
            optim.step()
            if scheduler is not None:
                scheduler.step()
        return total

    by_pull, by_strength = Net(), Net()
    optim, scheduler = optimizer_of(by_pull)
    tell_total_rate(optim, scheduler, steps)
    Anchor(moments(), pull=3.0).attach(by_pull, optim)
    total = train(by_pull, optim, scheduler)
    assert optim.param_groups[0]["holdfast_total_rate"] == pytest.approx(total, rel=1e-9)
    optim, scheduler = optimizer_of(by_strength)
    Anchor(moments(), strength=3.0 / total).attach(by_strength, optim)
    train(by_strength, optim, scheduler)
    for a, b in zip(by_pull.parameters(), by_strength.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-9)


def test_sum_of_rates_is_the_whole_tasks_when_it_is_told_in_the_middle() -> None:
    optim = torch.optim.SGD(Net().parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optim, lambda step: 1 - step / 10)
    for _ in range(4):
        optim.step()
        scheduler.step()
    tell_total_rate(optim, scheduler, 10)
    assert optim.param_groups[0]["holdfast_total_rate"] == pytest.approx(0.55)


def test_pull_without_the_sum_of_rates_says_what_to_call() -> None:
    model = Net()
    optim = torch.optim.SGD(model.parameters(), lr=0.1)
    Anchor(moments()).attach(model, optim)
    gradient(model)
    with pytest.raises(ConfigError, match=r"pull=5 is the whole pull.*tell_total_rate\(optimizer, scheduler"):
        optim.step()
    with pytest.raises(ConfigError, match=r"give `strength`.*or `pull`.*not both"):
        Anchor(moments(), strength=1.0, pull=1.0)


# strength: auto


def multiplier(c: Tensor, energy: Tensor, most: float) -> float:
    """µ with Σ c |z|² / (1 + µc)² = most, by bisection; 0 where there is no need of it."""
    if float(energy.sum()) <= most:
        return 0.0
    low, high = 0.0, 1e12
    for _ in range(200):
        middle = (low * high) ** 0.5 if low > 0 else high * 1e-3
        left = float((energy / (1 + middle * c) ** 2).sum())
        low, high = (middle, high) if left > most else (low, middle)
        if high < 1e-12:
            break
    return high


@pytest.mark.parametrize("coordinates", ["inputs", "weights"])
def test_auto_divides_each_direction_by_one_plus_mu_c_with_mu_where_the_bound_is(coordinates: Any) -> None:
    model, bound = Net(), 2.0
    start, prior = weights(model), moments()
    optim = torch.optim.SGD(model.parameters(), lr=0.5)
    anchor = Anchor(prior, strength="auto", bound=bound, coordinates=coordinates)
    handle = anchor.attach(model, optim)
    gradient(model, scale=5.0)
    raw = {n: start[n] - 0.5 * grad(p) for n, p in model.named_parameters()}
    optim.step()
    whole, z, energies = 0.0, {}, {}
    for name in NAMES:
        c, u = frames(prior)[name]
        z[name] = oriented(raw[name] - start[name], name) @ u
        energies[name] = c * z[name].square().sum(0)
        whole += float((c * (oriented(start[name], name) @ u).square().sum(0)).sum())
    every_c = torch.cat([frames(prior)[n][0] for n in NAMES])
    every = torch.cat([energies[n] for n in NAMES])
    mu = multiplier(every_c, every, whole * (bound / 100) ** 2)
    assert mu > 1.0
    for name in NAMES:
        c, u = frames(prior)[name]
        expected = start[name] + oriented((z[name] / (1 + mu * c)) @ u.T, name)
        torch.testing.assert_close(weights(model)[name], expected, rtol=1e-5, atol=1e-7)
    assert handle.drift().percent == pytest.approx(bound, rel=1e-5)
    assert anchor.summary()["pull"] == pytest.approx(mu, rel=1e-5)


@pytest.mark.parametrize("coordinates", ["inputs", "weights"])
def test_auto_never_passes_its_bound_and_holds_nothing_below_it(coordinates: Any) -> None:
    model, plain = Net(), Net()
    optims = [torch.optim.AdamW(m.parameters(), lr=1e-2) for m in (model, plain)]
    handle = Anchor(moments(), strength="auto", bound=1.0, coordinates=coordinates).attach(model, optims[0])
    for step in range(12):
        optims[0].zero_grad()
        gradient(model, seed=step)
        optims[0].step()
        assert handle.drift().percent <= 1.0 + 1e-5
    assert handle.drift().percent > 0.9
    handle.remove()
    free = Net()
    optim = torch.optim.AdamW(free.parameters(), lr=1e-2)
    anchor = Anchor(moments(), strength="auto", bound=1e6, coordinates="weights")
    anchor.attach(free, optim)
    stepped(optim, free)
    stepped(optims[1], plain)
    for a, b in zip(free.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-9)
    assert anchor.summary()["pull"] == 0.0


def test_auto_needs_a_prior_by_inputs_and_bound_needs_auto() -> None:
    by_weight = ImportancePrior({n: torch.ones(p.shape) for n, p in Net().named_parameters()})
    with pytest.raises(ConfigError, match=r"strength 'auto' goes by how far old outputs moved"):
        Anchor(by_weight, strength="auto")
    with pytest.raises(ConfigError, match=r"`bound` applies to `strength: auto` only"):
        Anchor(moments(), pull=5.0, bound=1.0)


# drift


def test_drift_is_the_trace_formula_by_map_and_in_all() -> None:
    model, prior = Net(), moments()
    optim = torch.optim.AdamW(model.parameters(), lr=1e-2)
    start = weights(model)
    handle = Anchor(prior, strength=1.0).attach(model, optim)
    assert handle.drift().total == 0.0
    stepped(optim, model)
    top, bottom, maps = 0.0, 0.0, {}
    for name in NAMES:
        c = prior.tensors[name].double()
        c = c * len(c) / c.trace()
        d, w = (oriented(t, name) for t in (weights(model)[name] - start[name], start[name]))
        moved, whole = (float(torch.trace(t @ c @ t.T)) for t in (d, w))
        maps[name] = moved / whole
        top, bottom = top + moved, bottom + whole
    got = handle.drift()
    assert got.maps == pytest.approx(maps, rel=1e-6)
    assert got.total == pytest.approx(top / bottom, rel=1e-6)
    assert drift(prior, model, start).maps == pytest.approx(got.maps, rel=1e-6)
    assert got.percent == pytest.approx(100 * (top / bottom) ** 0.5)


def test_drift_is_the_mean_squared_change_of_old_outputs() -> None:
    x = torch.randn(40, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    c = {"h.0.a.weight": x.T @ x / 40, "h.0.b.weight": torch.eye(5)}
    model = Net()
    start = weights(model)
    with torch.no_grad():
        model.h[0]["a"].weight.mul_(1.1)  # type: ignore[index]
    got = drift(ImportancePrior(c, {"kind": "inputs"}), model, start)
    old, new = (x @ w.T for w in (start["h.0.a.weight"], weights(model)["h.0.a.weight"]))
    expected = float((new - old).square().sum() / old.square().sum())
    assert got.maps == pytest.approx({"h.0.a.weight": expected, "h.0.b.weight": 0.0})


def test_drift_of_a_prior_by_weight_says_what_to_compute() -> None:
    model = Net()
    prior = ImportancePrior({n: torch.ones(p.shape) for n, p in model.named_parameters()})
    handle = Anchor(prior).attach(model, torch.optim.SGD(model.parameters(), lr=0.1))
    with pytest.raises(ConfigError, match="of the kind 'inputs'"):
        handle.drift()
    with pytest.raises(ConfigError, match="importance 'inputs'"):
        drift(prior, model, weights(model))


# properties of the operator


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), size=st.integers(1, 7), outputs=st.integers(1, 5), rate=st.floats(0, 3))
def test_blend_is_between_its_ends_and_reduce_is_blend_towards_zero(
    seed: int, size: int, outputs: int, rate: float
) -> None:
    generator = torch.Generator().manual_seed(seed)
    u, _ = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))
    share = torch.rand(size, generator=generator, dtype=torch.float64)
    operator = Inputs([share], [Whole(u)], [1])
    value = torch.randn(outputs, size, generator=generator, dtype=torch.float64)
    zero, blended, reduced, times = torch.zeros_like(value), value.clone(), value.clone(), value.clone()
    operator.blend_([blended], [zero])
    operator.reduce_([reduced])
    operator.times_([times])
    assert torch.equal(blended, reduced)
    torch.testing.assert_close(reduced + times, value)
    torch.testing.assert_close(operator.energy([value]), (value * times).sum())
    assert reduced.norm() <= value.norm() * (1 + 1e-12)
    at_rate = value.clone()
    operator.blend_([at_rate], [zero], rate)
    torch.testing.assert_close(at_rate, value @ u @ torch.diag(1 - (rate * share).clamp(max=1)) @ u.T)


def test_a_closure_is_refused_in_the_coordinates_of_inputs_with_an_advice_that_works() -> None:
    model = Net()
    optim = torch.optim.SGD(model.parameters(), lr=ETA)
    handle = Anchor(moments(), strength=LAMBDA).attach(model, optim)
    with pytest.raises(ConfigError, match="or give coordinates='weights'"):
        optim.step(lambda: 0.0)
    handle.remove()
    Anchor(moments(), strength=LAMBDA, coordinates="weights").attach(model, optim)
    optim.step(lambda: 0.0)
