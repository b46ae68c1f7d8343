"""The engine against Lemma 4.1 and Propositions 4.2 and 4.3 as the paper writes them, in float64.

Letters follow the paper: weights are (d_in, d_out), R(.) is relevance, divisions are element-wise.
"""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from attribution_models import Keep, build
from holdfast.attribution import AttributionOptions, attribute_batches
from holdfast.tasks.encode import Encoded

ROW = Encoded([3, 5, 9, 2], [4, 7])
HEADS, WIDTH, INNER, VOCABULARY = 2, 8, 12, 11


def lemma_4_1(r_c: Tensor, c: Tensor, p: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    ratio = r_c / c
    return 0.5 * p * (ratio @ w.T), 0.5 * w * (p.T @ ratio)


def proposition_4_2(r_delta, delta, g, u, s, w1, b1, w2, b2):
    ratio = r_delta / delta
    ones = torch.ones(len(g), 1, dtype=g.dtype)
    r_w2 = 0.5 * w2 * (s.T @ ratio)
    r_b2 = b2 * (ones.T @ ratio)[0]
    r_s = 0.5 * s * (ratio @ w2.T)
    r_g = 0.5 * g * ((r_s / u) @ w1.T)
    r_w1 = 0.5 * w1 * (g.T @ (r_s / u))
    r_b1 = b1 * (ones.T @ (r_s / u))[0]
    return r_g, r_w1, r_b1, r_w2, r_b2


def proposition_4_3(r_f, x, wq, wk, wv, wo):
    """Causal heads; E is the score before the mask, and a masked pair has A = 0, hence Phi = 0."""
    d_head = wq.shape[1] // HEADS
    alpha = 1 / (8 * math.sqrt(d_head))
    seen = torch.ones(len(x), len(x)).tril().bool()
    blocks = [slice(r * d_head, (r + 1) * d_head) for r in range(HEADS)]
    q, k, v = ([(x @ w)[:, b] for b in blocks] for w in (wq, wk, wv))
    e = [q[r] @ k[r].T / math.sqrt(d_head) for r in range(HEADS)]
    a = [torch.softmax(e[r].masked_fill(~seen, -math.inf), -1) for r in range(HEADS)]
    o = torch.cat([a[r] @ v[r] for r in range(HEADS)], 1)
    lambda_f = r_f / (o @ wo)
    r_wo = 0.5 * wo * (o.T @ lambda_f)
    r_o = 0.5 * o * (lambda_f @ wo.T)
    r_wq, r_wk, r_wv, r_x = (
        torch.zeros_like(wq),
        torch.zeros_like(wk),
        torch.zeros_like(wv),
        torch.zeros_like(x),
    )
    for r, b in enumerate(blocks):
        lambda_o = r_o[:, b] / o[:, b]
        phi = (a[r] * (lambda_o @ v[r].T)) / e[r]
        theta_q, theta_k, theta_v = phi @ k[r], phi.T @ q[r], a[r].T @ lambda_o
        r_wq[:, b] = alpha * wq[:, b] * (x.T @ theta_q)
        r_wk[:, b] = alpha * wk[:, b] * (x.T @ theta_k)
        r_wv[:, b] = 0.25 * wv[:, b] * (x.T @ theta_v)
        r_x += x * (alpha * theta_q @ wq[:, b].T + alpha * theta_k @ wk[:, b].T + 0.25 * theta_v @ wv[:, b].T)
    return r_x, r_wq, r_wk, r_wv, r_wo


class PaperBlock(nn.Module):
    """One block as the paper draws it: norm, MHA, residual, norm, a plain FFN with biases, residual."""

    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace(is_encoder_decoder=False)
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.layers = nn.ModuleList([nn.ModuleDict({n: nn.Linear(WIDTH, WIDTH, bias=False) for n in "qkvo"})])
        self.layers[0]["w1"], self.layers[0]["w2"] = nn.Linear(WIDTH, INNER), nn.Linear(INNER, WIDTH)
        self.norm1, self.norm2 = nn.RMSNorm(WIDTH), nn.RMSNorm(WIDTH)
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)

    def get_input_embeddings(self) -> nn.Module:
        return self.embed

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> SimpleNamespace:
        part = self.layers[0]
        h = self.embed(input_ids)
        x = self.norm1(h)
        q, k, v = (part[n](x).unflatten(-1, (HEADS, -1)).transpose(1, 2) for n in "qkv")
        o = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        h1 = h + part["o"](o)
        h2 = h1 + part["w2"](F.gelu(part["w1"](self.norm2(h1))))
        return SimpleNamespace(logits=self.head(h2))


def test_every_weight_of_the_papers_block_gets_the_papers_relevance() -> None:
    torch.manual_seed(3)
    model = PaperBlock().double()
    fold = Keep()
    report = attribute_batches(
        model,
        [ROW],
        options=AttributionOptions(rules="paper", halves="path"),
        fold=fold,
        pad_id=0,
        correct_only=False,
    )
    with torch.no_grad():
        part = model.layers[0]
        wq, wk, wv, wo, w1, w2 = (part[n].weight.T for n in ("q", "k", "v", "o", "w1", "w2"))
        b1, b2 = part["w1"].bias, part["w2"].bias
        ids = ROW.prompt_ids + ROW.completion_ids
        h = model.embed(torch.tensor(ids))
        x = model.norm1(h)
        logits = model(torch.tensor([ids]), torch.ones(1, len(ids))).logits[0]
        d = WIDTH // HEADS
        seen = torch.ones(len(ids), len(ids)).tril().bool()
        heads = []
        for r in range(HEADS):
            b = slice(r * d, (r + 1) * d)
            score = ((x @ wq)[:, b] @ (x @ wk)[:, b].T / math.sqrt(d)).masked_fill(~seen, -math.inf)
            heads.append(torch.softmax(score, -1) @ (x @ wv)[:, b])
        f = torch.cat(heads, 1) @ wo
        h1 = h + f
        g = model.norm2(h1)
        u = g @ w1 + b1
        s = F.gelu(u)
        delta = s @ w2 + b2
        h2 = h1 + delta

        r_logits = torch.zeros_like(logits)  # the logits of the answer's tokens, each where it is predicted
        for position, token in zip((3, 4), ROW.completion_ids, strict=True):
            r_logits[position, token] = logits[position, token]
        r_h2 = h2 * ((r_logits / logits) @ model.head.weight)  # R(H^L) = Z: the head takes nothing
        r_delta, r_h1 = delta * (r_h2 / h2), h1 * (r_h2 / h2)  # the residual's additive inputs
        r_g, r_w1, r_b1, r_w2, r_b2 = proposition_4_2(r_delta, delta, g, u, s, w1, b1, w2, b2)
        r_h1 = r_h1 + r_g  # normalisation is the identity
        r_f, r_h = f * (r_h1 / h1), h * (r_h1 / h1)
        r_x, r_wq, r_wk, r_wv, r_wo = proposition_4_3(r_f, x, wq, wk, wv, wo)
        r_h = r_h + r_x

    expected = {"q": r_wq, "k": r_wk, "v": r_wv, "o": r_wo, "w1": r_w1, "w2": r_w2}
    for name, relevance in expected.items():
        got = fold.maps[f"layers.0.{name}.weight"][0].T
        torch.testing.assert_close(got, relevance, rtol=1e-9, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")
    torch.testing.assert_close(fold.maps["layers.0.w1.bias"][0], r_b1, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(fold.maps["layers.0.w2.bias"][0], r_b2, rtol=1e-9, atol=1e-12)
    whole = sum(r.sum() for r in (*expected.values(), r_b1, r_b2, r_h))
    torch.testing.assert_close(whole, r_logits.sum(), rtol=1e-9, atol=1e-12)
    assert report.conservation_max_relative_error < 1e-9


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("rules", ["paper", "attnlrp"])
def test_every_weight_of_a_llama_block_gets_the_relevance_of_the_same_rules(
    rules: str, attention: str
) -> None:
    """SwiGLU (eq. 6 for the product), grouped queries and rotary positions, on transformers' own Llama."""
    model = build("llama", attention=attention)
    del model.model.layers[1]
    model.config.num_hidden_layers = 1
    row = Encoded([1, 5, 6, 7], [10, 11])
    fold = Keep()
    attribute_batches(
        model,
        [row],
        options=AttributionOptions(rules=rules, halves="path"),
        fold=fold,
        pad_id=0,
        correct_only=False,
    )
    with torch.no_grad():
        expected = llama_block(model, row, paper=rules == "paper")
    assert set(fold.maps) == {f"model.layers.0.{name}.weight" for name in expected}
    for name, relevance in expected.items():
        got = fold.maps[f"model.layers.0.{name}.weight"][0].T
        torch.testing.assert_close(got, relevance, rtol=1e-8, atol=1e-13, msg=lambda m, n=name: f"{n}: {m}")


def llama_block(model, row: Encoded, *, paper: bool) -> dict[str, Tensor]:
    layer, eps = model.model.layers[0], model.config.rms_norm_eps
    weights = {n: m.weight.T for n, m in layer.named_modules() if isinstance(m, nn.Linear)}
    ids = torch.tensor(row.prompt_ids + row.completion_ids)
    heads, groups, d, length = 4, 2, 8, len(ids)

    def norm(h: Tensor, gamma: Tensor) -> Tensor:
        return h / torch.sqrt((h * h).mean(-1, keepdim=True) + eps) * gamma

    # one rotation matrix (d, d) a position, as transformers' rotate_half has it: the engine must see through
    # it as a linear map
    cos, sin = (
        t[0].double() for t in model.model.rotary_emb(torch.zeros(1).double(), torch.arange(length)[None])
    )
    half = torch.zeros(d, d, dtype=torch.float64)
    for i in range(d // 2):
        half[i + d // 2, i], half[i, i + d // 2] = -1, 1
    rotation = [torch.diag(cos[t]) + half * sin[t] for t in range(length)]

    h = model.model.embed_tokens(ids)
    x = norm(h, layer.input_layernorm.weight)
    q0, k0, v = (
        x @ weights["self_attn.q_proj"],
        x @ weights["self_attn.k_proj"],
        x @ weights["self_attn.v_proj"],
    )
    q = torch.stack(
        [torch.cat([q0[t, r * d : r * d + d] @ rotation[t] for r in range(heads)]) for t in range(length)]
    )
    k = torch.stack(
        [torch.cat([k0[t, r * d : r * d + d] @ rotation[t] for r in range(groups)]) for t in range(length)]
    )
    seen = torch.ones(length, length).tril().bool()
    e, a, o = {}, {}, torch.zeros_like(q)
    for r in range(heads):
        own, shared = slice(r * d, r * d + d), slice(r // 2 * d, r // 2 * d + d)
        e[r] = q[:, own] @ k[:, shared].T / math.sqrt(d)
        a[r] = torch.softmax(e[r].masked_fill(~seen, -math.inf), -1)
        o[:, own] = a[r] @ v[:, shared]
    f = o @ weights["self_attn.o_proj"]
    h1 = h + f
    g = norm(h1, layer.post_attention_layernorm.weight)
    u, up = g @ weights["mlp.gate_proj"], g @ weights["mlp.up_proj"]
    s = u * torch.sigmoid(u)
    m = s * up
    delta = m @ weights["mlp.down_proj"]
    h2 = h1 + delta
    y = norm(h2, model.model.norm.weight)
    logits = y @ model.lm_head.weight.T

    r_logits = torch.zeros_like(logits)
    for position, token in zip((3, 4), row.completion_ids, strict=True):
        r_logits[position, token] = logits[position, token]
    r_h2, _ = lemma_4_1(r_logits, logits, y, model.lm_head.weight.T)
    r_h2 *= 2 if paper else 1  # A's own starts below the head, with all of Z
    r_delta, r_h1 = delta * (r_h2 / h2), h1 * (r_h2 / h2)
    out = {}
    r_m, out["mlp.down_proj"] = lemma_4_1(r_delta, delta, m, weights["mlp.down_proj"])
    r_s = r_up = 0.5 * r_m  # eq. 6 with one term in the sum
    r_g1, out["mlp.gate_proj"] = lemma_4_1(r_s, u, g, weights["mlp.gate_proj"])  # R(U) = R(S)
    r_g2, out["mlp.up_proj"] = lemma_4_1(r_up, up, g, weights["mlp.up_proj"])
    r_h1 = r_h1 + r_g1 + r_g2
    r_f = f * (r_h1 / h1)
    r_o, out["self_attn.o_proj"] = lemma_4_1(r_f, f, o, weights["self_attn.o_proj"])
    r_q, r_k, r_v = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    for r in range(heads):
        own, shared = slice(r * d, r * d + d), slice(r // 2 * d, r // 2 * d + d)
        ratio = r_o[:, own] / o[:, own]
        lambda_a = 0.5 * ratio @ v[:, shared].T
        r_v[:, shared] += 0.5 * v[:, shared] * (a[r].T @ ratio)
        if paper:
            lambda_e = lambda_a * a[r] / e[r]
        else:
            lambda_e = a[r] * (lambda_a - (a[r] * lambda_a).sum(-1, keepdim=True))
        lambda_e = lambda_e / math.sqrt(d)
        r_q[:, own] += 0.5 * q[:, own] * (lambda_e @ k[:, shared])
        r_k[:, shared] += 0.5 * k[:, shared] * (lambda_e.T @ q[:, own])
    for name, r_after, after, before in (("q", r_q, q, q0), ("k", r_k, k, k0)):
        ratio, r_before = r_after / after, torch.zeros_like(before)
        for t in range(length):
            for r in range(before.shape[1] // d):
                b = slice(r * d, r * d + d)
                r_before[t, b] = before[t, b] * (rotation[t] @ ratio[t, b])
        out[f"self_attn.{name}_proj"] = lemma_4_1(r_before, before, x, weights[f"self_attn.{name}_proj"])[1]
    out["self_attn.v_proj"] = lemma_4_1(r_v, v, x, weights["self_attn.v_proj"])[1]
    return out
