"""Every rule alone: what goes out of an operation came in, or is booked. A new rule needs an example here."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from attribution_models import Keep
from holdfast.attribution.diagnose import LocalMode
from holdfast.attribution.ledger import Ledger
from holdfast.attribution.maps import WeightMaps
from holdfast.attribution.mode import RuleMode
from holdfast.attribution.rules import RULES, in_place
from holdfast.attribution.trace import Trace
from holdfast.errors import UnruledOperationError

C = torch.linspace(-2, 3, 12, dtype=torch.float64).view(3, 4)
INDEX = torch.tensor([2, 0])
W = nn.Parameter(torch.linspace(-1, 1, 8, dtype=torch.float64).view(2, 4), requires_grad=False)
B = nn.Parameter(torch.tensor([0.3, -0.2], dtype=torch.float64), requires_grad=False)
V = nn.Parameter(torch.linspace(-1, 2, 6, dtype=torch.float64).view(2, 1, 3), requires_grad=False)
PLACES = torch.tensor([[2, 1, 0, 2], [0, 2, 1, 1], [1, 0, 2, 0]])


def placed(base: Tensor, x: Tensor) -> Tensor:
    base[1:, 2:] = x[:2, :2]
    return base


# x and y are (3, 4) activations; each example must use the rule it is listed under
EXAMPLES: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "view": lambda x, y: x.view(4, 3),
    "as_strided": lambda x, y: x.as_strided((3, 2, 2), (4, 1, 2)),
    "masked_select": lambda x, y: x.masked_select(C > 0),
    "view_as_complex": lambda x, y: torch.view_as_real(torch.view_as_complex(x.view(3, 2, 2)) * 1j),
    "view_as_real": lambda x, y: torch.view_as_real(torch.view_as_complex(x.view(3, 2, 2)) * (1 + 2j)),
    "real": lambda x, y: torch.view_as_complex(x.view(3, 2, 2)).real,
    "imag": lambda x, y: torch.view_as_complex(x.view(3, 2, 2)).imag,
    "topk": lambda x, y: x.topk(2).values,
    "sort": lambda x, y: x.sort().values,
    "max": lambda x, y: (x.max(dim=-1, keepdim=True).values, x.max(), torch.max(x, C)),
    "min": lambda x, y: (x.min(dim=-1, keepdim=True).values, x.min(), torch.min(x, y)),
    "amax": lambda x, y: x.amax(-1),
    "amin": lambda x, y: x.amin(-1),
    "maximum": lambda x, y: torch.maximum(x, y) + torch.maximum(x, C),
    "minimum": lambda x, y: torch.minimum(x, y) + torch.minimum(x, C),
    "reshape": lambda x, y: x.reshape(2, 6),
    "transpose": lambda x, y: x.transpose(0, 1),
    "permute": lambda x, y: x.permute(1, 0),
    "contiguous": lambda x, y: x.contiguous(),
    "expand": lambda x, y: x.expand(5, 3, 4),
    "expand_as": lambda x, y: x.expand_as(torch.zeros(2, 3, 4)),
    "broadcast_to": lambda x, y: torch.broadcast_to(x, (2, 3, 4)),
    "unsqueeze": lambda x, y: x.unsqueeze(0),
    "squeeze": lambda x, y: x.squeeze(),
    "flatten": lambda x, y: x.flatten(),
    "unflatten": lambda x, y: x.unflatten(1, (2, 2)),
    "clone": lambda x, y: x.clone(),
    "chunk": lambda x, y: x.chunk(2, dim=1),
    "split": lambda x, y: x.split(1),
    "split_with_sizes": lambda x, y: x.split_with_sizes([1, 2]),
    "tensor_split": lambda x, y: x.tensor_split(2),
    "unbind": lambda x, y: x.unbind(0),
    "narrow": lambda x, y: x.narrow(0, 1, 2),
    "select": lambda x, y: x.select(0, 1),
    "__getitem__": lambda x, y: x[..., 1:3],
    "index_select": lambda x, y: x.index_select(0, INDEX),
    "gather": lambda x, y: x.gather(0, torch.zeros(1, 4, dtype=torch.long)),
    "take_along_dim": lambda x, y: torch.take_along_dim(x, torch.zeros(1, 4, dtype=torch.long), 0),
    "repeat": lambda x, y: x.repeat(2, 1),
    "repeat_interleave": lambda x, y: x.repeat_interleave(2, dim=0),
    "tile": lambda x, y: x.tile(2),
    "roll": lambda x, y: x.roll(1, 0),
    "flip": lambda x, y: x.flip(0),
    "movedim": lambda x, y: x.movedim(0, 1),
    "moveaxis": lambda x, y: x.moveaxis(0, 1),
    "swapaxes": lambda x, y: x.swapaxes(0, 1),
    "swapdims": lambda x, y: x.swapdims(0, 1),
    "view_as": lambda x, y: x.view_as(torch.zeros(4, 3)),
    "reshape_as": lambda x, y: x.reshape_as(torch.zeros(4, 3)),
    "neg": lambda x, y: -x,
    "sum": lambda x, y: x.sum(0),
    "mean": lambda x, y: x.mean(1),
    "cumsum": lambda x, y: x.cumsum(0),
    "tril": lambda x, y: x.tril(),
    "triu": lambda x, y: x.triu(),
    "diagonal": lambda x, y: x.diagonal(),
    "unfold": lambda x, y: x.unfold(1, 2, 1),
    "T": lambda x, y: x.T,
    "mT": lambda x, y: x.mT,
    "t": lambda x, y: x.t(),
    "to": lambda x, y: x.to(torch.float32),
    "float": lambda x, y: x.float(),
    "double": lambda x, y: x.double(),
    "half": lambda x, y: x.half(),
    "bfloat16": lambda x, y: x.bfloat16(),
    "type": lambda x, y: x.type(torch.float32),
    "type_as": lambda x, y: x.type_as(torch.zeros(1)),
    "add": lambda x, y: x + C + y + 2,
    "add_": lambda x, y: (x * 1).add_(C),
    "sub": lambda x, y: x - C,
    "sub_": lambda x, y: (x * 1).sub_(3),
    "__rsub__": lambda x, y: 1 - x,
    "rsub": lambda x, y: torch.rsub(x, C),
    "where": lambda x, y: torch.where(C > 0, x, C),
    "masked_fill": lambda x, y: x.masked_fill(C > 0, 1.5),
    "masked_fill_": lambda x, y: (x * 1).masked_fill_(C > 0, 1.5),
    "requires_grad_": lambda x, y: x.requires_grad_(),
    "cat": lambda x, y: torch.cat([x, C, y]),
    "concatenate": lambda x, y: torch.concatenate([x, y]),
    "vstack": lambda x, y: torch.vstack([x, C]),
    "copy_": lambda x, y: C.clone().copy_(x),
    "__setitem__": lambda x, y: placed(C.clone(), x),
    "index_copy": lambda x, y: C.index_copy(0, INDEX, x[:2]),
    "index_copy_": lambda x, y: C.clone().index_copy_(0, INDEX, x[:2]),
    "index_add": lambda x, y: C.index_add(0, INDEX, x[:2]),
    "index_add_": lambda x, y: C.clone().index_add_(0, INDEX, x[:2]),
    "scatter": lambda x, y: C.scatter(0, PLACES, x),
    "scatter_": lambda x, y: C.clone().scatter_(0, PLACES, x),
    "scatter_add": lambda x, y: y.scatter_add(0, PLACES, x),
    "scatter_add_": lambda x, y: C.clone().scatter_add_(0, PLACES, x),
    "masked_scatter": lambda x, y: C.masked_scatter(C > 0, x),
    "masked_scatter_": lambda x, y: C.clone().masked_scatter_(C > 0, x),
    "index_put": lambda x, y: y.index_put((INDEX,), x[:2]),
    "index_put_": lambda x, y: C.clone().index_put_((INDEX,), x[:2], accumulate=True),
    "concat": lambda x, y: torch.concat([x, y]),
    "stack": lambda x, y: torch.stack([x, C]),
    "hstack": lambda x, y: torch.hstack([x, C]),
    "pad": lambda x, y: F.pad(x, (1, 1), value=2.0),
    "dropout": lambda x, y: F.dropout(x, 0.5, training=False),
    "mul": lambda x, y: x * y * C * 3,
    "mul_": lambda x, y: (x * 1).mul_(C),
    "multiply": lambda x, y: torch.multiply(x, y),
    "div": lambda x, y: x / C + x / (y.abs() + 1),
    "div_": lambda x, y: (x * 1).div_(C),
    "true_divide": lambda x, y: torch.true_divide(x, C),
    "einsum": lambda x, y: torch.einsum("ij,kj->ik", x, y) + torch.einsum("ij,kj->ik", x, C),
    "addcmul": lambda x, y: torch.addcmul(x, y, C, value=2) + torch.addcmul(C, x, y),
    "linalg_solve_triangular": lambda x, y: torch.linalg.solve_triangular(
        y[:, :3].tril(-1) + torch.eye(3).double(), x, upper=False
    ),
    "conv1d": lambda x, y: F.conv1d(x[:, None], V, B, stride=2, padding=1),
    "linear": lambda x, y: F.linear(x, W, B),
    "addmm": lambda x, y: torch.addmm(B[0], x[:, :2], W),
    "matmul": lambda x, y: x @ y.mT + x @ C.mT + (x[:, :2] @ W) @ C.mT,
    "mm": lambda x, y: torch.mm(x, y.mT) + torch.mm(x, W.T) @ C[:2, :3],
    "bmm": lambda x, y: torch.bmm(x[None], y.mT[None]),
    "baddbmm": lambda x, y: torch.baddbmm(C[:, :3][None], x[None], y.mT[None], beta=0.5, alpha=2),
    "sqrt": lambda x, y: x.relu().sqrt(),
    "silu": lambda x, y: F.silu(x),
    "gelu": lambda x, y: F.gelu(x) + F.gelu(x, approximate="tanh"),
    "relu": lambda x, y: F.relu(x),
    "tanh": lambda x, y: torch.tanh(x),
    "leaky_relu": lambda x, y: F.leaky_relu(x),
    "elu": lambda x, y: F.elu(x),
    "selu": lambda x, y: F.selu(x),
    "celu": lambda x, y: F.celu(x),
    "hardswish": lambda x, y: F.hardswish(x),
    "mish": lambda x, y: F.mish(x),
    "softsign": lambda x, y: F.softsign(x),
    "hardtanh": lambda x, y: F.hardtanh(x),
    "relu6": lambda x, y: F.relu6(x),
    "erf": lambda x, y: torch.erf(x),
    "clamp": lambda x, y: x.clamp(-1, 1),
    "clip": lambda x, y: x.clip(-1, 1),
    "tanhshrink": lambda x, y: F.tanhshrink(x),
    "softshrink": lambda x, y: F.softshrink(x),
    "hardshrink": lambda x, y: F.hardshrink(x),
    "clamp_min": lambda x, y: x.clamp_min(0.5),
    "sigmoid": lambda x, y: torch.sigmoid(x) * y,
    "softplus": lambda x, y: F.softplus(x),
    "exp": lambda x, y: torch.where(C > 0, x, -torch.inf).exp(),
    "expm1": lambda x, y: x.expm1(),
    "log1p": lambda x, y: x.relu().log1p(),
    "log_sigmoid": lambda x, y: F.logsigmoid(x),
    "hardsigmoid": lambda x, y: F.hardsigmoid(x),
    "sin": lambda x, y: x.sin(),
    "cos": lambda x, y: x.cos(),
    "abs": lambda x, y: x.abs(),
    "softmax": lambda x, y: F.softmax(x, dim=0) + torch.softmax(y, -1),
    "logsumexp": lambda x, y: (x.logsumexp(-1), torch.logsumexp(y, dim=0, keepdim=True)),
    "layer_norm": lambda x, y: F.layer_norm(x, (4,), C[0], C[1]),
    "rms_norm": lambda x, y: F.rms_norm(x, (4,), C[0]),
    "scaled_dot_product_attention": lambda x, y: tuple(
        F.scaled_dot_product_attention(
            x.view(1, 2, 3, 2), y.view(1, 2, 3, 2)[:, :1], y.view(1, 2, 3, 2)[:, 1:], mask, enable_gqa=True
        )
        for mask in (C[:, :3], y[:, :3], x[None, None, :1, :3])
    ),
}


class Halved(torch.autograd.Function):
    """A square root with a way back of its own."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view(-1).abs().sqrt()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0].view(3, 4) / 2


def run(function: Callable[[Tensor, Tensor], Any], rules: Any = "paper", path: float = 0.5) -> LocalMode:
    """One example between probes; the output gets a random Lambda."""
    torch.manual_seed(0)
    model = nn.ParameterList([W, B, V])
    maps = WeightMaps(model, {}, Keep(), path)
    maps.begin_batch(3, {1})
    x, y = (torch.randn(3, 4, dtype=torch.float64).requires_grad_() for _ in range(2))
    with LocalMode(Trace(rules, path, maps, None, {})) as mode:
        outputs = function(x, y)
    outputs = outputs if isinstance(outputs, tuple | list) else [outputs]
    torch.autograd.backward(list(outputs), [torch.randn_like(o) for o in outputs])
    return mode


def test_every_rule_has_an_example() -> None:
    assert set(EXAMPLES) == set(RULES)


@pytest.mark.parametrize("path", [0.5, 1.0])
@pytest.mark.parametrize("rules", ["paper", "attnlrp"])
@pytest.mark.parametrize("name", [name for name in EXAMPLES if not in_place(name)])
def test_a_rule_conserves_relevance(name: str, rules: str, path: float) -> None:
    mode = run(EXAMPLES[name], rules, path)
    assert name in {operation for operation, _, _ in mode.entries}
    for operation, _, ledger in mode.entries:
        leak = ledger.leak(weights_share=path == 0.5)
        assert leak <= 1e-11 * max(1.0, ledger.gross, abs(ledger.target)), operation


@pytest.mark.parametrize("name", list(filter(in_place, EXAMPLES)))
def test_an_operation_in_place_conserves_relevance(name: str) -> None:
    x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    ledger, maps = Ledger(), WeightMaps(nn.ParameterList([W]), {}, Keep(), 0.5)
    with RuleMode(Trace("paper", 0.5, maps, ledger, {})):
        output = EXAMPLES[name](x, x)
    assert torch.equal(output, EXAMPLES[name](x, x))
    ledger.target = output.sum().item()
    ledger.inputs = (x * torch.autograd.grad(output.sum(), x)[0]).sum().item()
    assert ledger.leak(weights_share=True) < 1e-11


@pytest.mark.parametrize(
    ("function", "match"),
    [
        (lambda x, y: x.tan(), "'tan' has no attribution rule"),
        (lambda x, y: x**3, "'pow'"),
        (lambda x, y: C / x, "'div' has no attribution rule of a constant by an activation"),
        (lambda x, y: x.log(), "'log'"),
        (lambda x, y: x.clamp(min=C), "a limit for each element"),
        (lambda x, y: W[None] @ x.mT[None], "a batch of weights on its left"),
        (lambda x, y: 1 / x, "'__rdiv__'"),
        (lambda x, y: x.detach() + y, "'add' has no attribution rule for an activation and a statistic"),
        (lambda x, y: x.detach().topk(2).values * y[:, :2], "'mul'"),
        (lambda x, y: x.detach().exp(), "may only become a normaliser"),
        (lambda x, y: x.data + y, "'data'"),
        (lambda x, y: x.square() + y, "'add'"),
        (lambda x, y: x.square().mean(-1, keepdim=True) * y, "'mul'"),
        (lambda x, y: x.square().mean(-1, keepdim=True).exp(), "may only become a normaliser"),
        (lambda x, y: x + (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt(), "'add'"),
        (lambda x, y: F.dropout(x, 0.5), "at random"),
        (lambda x, y: (x * 1).exp_(), "in place"),
        (lambda x, y: Halved.apply(x), "'abs' has no attribution rule inside 'Halved'"),
    ],
)
def test_an_operation_without_a_rule_is_refused(function, match: str) -> None:
    with pytest.raises(UnruledOperationError, match=match):
        run(function)


@pytest.mark.parametrize(
    "norm",
    [
        lambda x: x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6),
        lambda x: x / torch.sqrt(x.square().mean(-1, keepdim=True) + 1e-6),
        lambda x: x * torch.pow((x**2).float().mean(-1, keepdim=True) + 1e-6, -0.5),
        lambda x: (x - x.mean(-1, keepdim=True)) * (x.var(-1, keepdim=True) + 1e-6).rsqrt(),
        lambda x: x / x.norm(dim=-1, keepdim=True).clamp(min=1e-6),
        lambda x: x * (x * x).mean(-1, keepdim=True).rsqrt(),
    ],
)
def test_a_composed_norm_scales_by_a_constant(norm) -> None:
    x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    maps = WeightMaps(nn.ParameterList([W]), {}, Keep(), 0.5)
    with LocalMode(Trace("paper", 0.5, maps, None, {})):
        y = norm(x)
    lam = torch.randn_like(y)
    (lam_x,) = torch.autograd.grad(y, x, lam)
    assert torch.equal(y, norm(x))
    torch.testing.assert_close((x * lam_x).sum(), (y * lam).sum(), rtol=1e-9, atol=1e-12)


def test_what_is_detached_may_choose() -> None:
    """As ZAYA's router takes its experts: by what it detaches, and passes the chosen on."""

    def chosen(x: Tensor, y: Tensor) -> Tensor:
        _, index = torch.topk(x.detach().to(torch.float32) + C, 2, dim=-1)
        return x.gather(1, index)

    assert all(ledger.leak(weights_share=True) < 1e-12 for _, _, ledger in run(chosen).entries)


def test_a_float64_model_sums_in_float64_where_it_makes_float32_of_its_own() -> None:
    """Inkling 2 sums its experts in zeros of float32: relevance is followed in the model's type."""

    def summed(x: Tensor, y: Tensor) -> Tensor:
        total = torch.zeros_like(x, dtype=torch.float32)
        return total.index_add_(0, INDEX, y[:2].to(total.dtype))

    for rules in ("attnlrp", "gradient"):
        maps = WeightMaps(nn.ParameterList([W]), {}, Keep(), 0.5)
        with RuleMode(Trace(rules, 0.5, maps, None, {})):  # type: ignore[arg-type]
            output = summed(
                C.clone().requires_grad_(), torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
            )
        assert output.dtype == torch.float64


@pytest.mark.parametrize(
    ("function", "slope"),
    [
        (F.silu, 0.5),
        (F.gelu, 0.5),
        (torch.tanh, 1.0),
        (F.mish, 0.6),
        (F.relu, 0.0),
        (torch.erf, 1.1283791671),
    ],
)
def test_at_zero_an_activation_passes_its_slope(function, slope: float) -> None:
    x = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    maps = WeightMaps(nn.ParameterList([W]), {}, Keep(), 0.5)
    with LocalMode(Trace("paper", 0.5, maps, None, {})):
        y = function(x)
    (lam,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(lam, torch.full_like(lam, slope), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("mask", ["causal", "constant", "activation"])
@pytest.mark.parametrize("rules", ["paper", "attnlrp"])
def test_fused_attention_has_the_lambdas_of_its_parts(rules: str, mask: str) -> None:
    """Grouped heads, a float bias for every sample, a scale, and a row that is masked whole."""
    torch.manual_seed(1)
    causal, adds = mask == "causal", mask == "activation"
    q, k, v = (torch.randn(2, h, 5, 3, dtype=torch.float64, requires_grad=True) for h in (4, 2, 2))
    bias = None if causal else torch.randn(1, 4, 5, 5, dtype=torch.float64, requires_grad=adds)
    seen = torch.ones(5, 5, dtype=torch.bool).tril()

    def fused():
        return F.scaled_dot_product_attention(q, k, v, bias, is_causal=causal, scale=0.7, enable_gqa=True)

    def parts():
        score = 0.7 * (q @ k.repeat_interleave(2, 1).mT)
        score = score.masked_fill(~seen, torch.finfo(score.dtype).min) if causal else score + bias
        return torch.softmax(score, -1) @ v.repeat_interleave(2, 1)

    lam, found = torch.randn(2, 4, 5, 3, dtype=torch.float64), []
    for function in (fused, parts):
        maps = WeightMaps(nn.ParameterList([W]), {}, Keep(), 0.5)
        with LocalMode(Trace(rules, 0.5, maps, None, {})):
            output = function()
        found.append(torch.autograd.grad(output, (q, k, v, bias) if adds else (q, k, v), lam))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("rules", ["paper", "attnlrp"])
def test_a_log_of_summed_exponentials_passes_on_by_the_softmax_and_absorbs_the_entropy(rules: str) -> None:
    score = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    ledger, maps = Ledger(), WeightMaps(nn.ParameterList([W]), {}, Keep(), 0.5)
    with RuleMode(Trace(rules, 0.5, maps, ledger, {})):
        value = torch.logsumexp(score, -1)
    lam = torch.randn(3, dtype=torch.float64)
    (found,) = torch.autograd.grad(value, score, lam)
    weight = torch.softmax(score.detach(), -1)
    torch.testing.assert_close(found, lam[:, None] * weight, rtol=1e-12, atol=1e-14)
    entropy = -(weight * weight.log()).sum(-1)
    assert ledger.absorbed["logsumexp"] == pytest.approx(float((entropy * lam).sum()), rel=1e-12)


def test_a_square_root_passes_on_all_and_nothing_at_zero() -> None:
    x = torch.tensor([0.0, 0.25, 4.0], dtype=torch.float64, requires_grad=True)
    with RuleMode(Trace("paper", 0.5, WeightMaps(nn.ParameterList([W]), {}, Keep(), 0.5), None, {})):
        y = x.sqrt()
    (lam,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(lam, torch.tensor([0.0, 2.0, 0.5], dtype=torch.float64), rtol=1e-15, atol=0)


@pytest.mark.parametrize("rules", ["paper", "attnlrp"])
def test_rows_of_scores_that_are_all_minus_infinity_pass_nothing_on(rules: str) -> None:
    """CPM-Ant masks padding before its softmax and again after it."""

    def attend(x: Tensor, y: Tensor) -> Tensor:
        hidden = torch.zeros(3, 4, dtype=torch.bool)
        hidden[0], hidden[1, 2] = True, True
        weight = torch.softmax(x.masked_fill(hidden, -torch.inf), -1)
        return weight.masked_fill(hidden, 0.0) @ y.mT

    mode = run(attend, rules)
    assert all(ledger.leak(weights_share=True) < 1e-12 for _, _, ledger in mode.entries)


class Tokens(Keep):
    """Keeps the maps that tokens make, and the relevance that passed at each."""

    def __init__(self) -> None:
        super().__init__()
        self.made: dict[str, Tensor] = {}
        self.passed: dict[str, float] = {}

    def take_tokens(self, name: str, x_STI: Tensor, lam_STO: Tensor, passed_ST: Tensor, real_ST: Tensor):
        assert x_STI.shape[:2] == lam_STO.shape[:2] == passed_ST.shape == real_ST.shape
        self.made[name] = lam_STO.transpose(1, 2) @ x_STI
        self.passed[name] = float(passed_ST.sum())


@pytest.mark.parametrize(
    "use",
    [
        lambda x, w: torch.bmm(x.view(-1, 2, 4).transpose(0, 1), w.view(2, 3, 4).transpose(1, 2)).sum(0),
        lambda x, w: F.linear(x[..., :4], w[1:4]) + F.linear(x[..., 4:], w[::2]),
        lambda x, w: F.linear(x[..., :2], w[:, 2:])[..., :3] + F.linear(x[..., 4:7], w[2:5, 1:]),
    ],
)
def test_tokens_of_a_part_of_a_weight_make_the_map_of_the_whole(use) -> None:
    """As DeepSeek-V4's projection of each group of heads: by token the maps are those by weight."""
    torch.manual_seed(2)
    weight = nn.Parameter(torch.randn(6, 4, dtype=torch.float64), requires_grad=False)
    model, found = nn.ParameterList([weight]), []
    for fold in (Keep(per_weight=True), Tokens()):
        torch.manual_seed(3)
        x = torch.randn(2, 3, 8, dtype=torch.float64, requires_grad=True)
        maps, ledger = WeightMaps(model, {"w": weight}, fold, 1.0), Ledger()
        maps.begin_batch(2, {3})
        with RuleMode(Trace("attnlrp", 1.0, maps, ledger, {})):
            output = use(x, weight)
        output.backward(torch.randn_like(output))
        maps.end_batch()
        assert ledger.maps == pytest.approx(ledger.maps_expected, rel=1e-12)
        found.append((fold.made if isinstance(fold, Tokens) else fold.maps)["w"])
    torch.testing.assert_close(*found, rtol=1e-12, atol=1e-14)
    assert fold.passed["w"] == pytest.approx(ledger.maps, rel=1e-12)


@pytest.mark.parametrize("rules", ["paper", "attnlrp"])
def test_rows_that_are_masked_whole_give_no_nan(rules: str) -> None:
    q, k, v = (torch.randn(1, 2, 4, 3, requires_grad=True) for _ in range(3))
    mask = torch.ones(4, 4, dtype=torch.bool).tril()
    mask[:2] = False
    maps = WeightMaps(nn.ParameterList([W]), {}, Keep(), 0.5)
    with LocalMode(Trace(rules, 0.5, maps, None, {})) as mode:
        output = F.scaled_dot_product_attention(q, k, v, mask)
    lam = torch.randn_like(output)
    lam[:, :, :2] = 0
    lams = torch.autograd.grad(output, (q, k, v), lam)
    assert all(torch.isfinite(x).all() for x in lams)
    assert mode.entries[0][2].leak(weights_share=True) < 1e-5
