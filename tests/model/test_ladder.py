"""The rungs below latent attention, and the one the papers argue from, against plain loops."""

import math

import pytest
import torch
from plain import rms, rotate
from tiny import tiny_model

from abyssal.model.packing import Packing
from abyssal.model.positions import rotary


def softmax_sum(q, keys, values):
    """One query over the keys it sees."""
    scores = [(q @ k).item() / math.sqrt(len(q)) for k in keys]
    weights = [math.exp(s - max(scores)) for s in scores]
    return sum(w / sum(weights) * v for w, v in zip(weights, values))


def by_loops(attn, xs, c, groups: int):
    """Keys and values of `groups` heads; query head h looks at head h // (H / groups) of them."""
    H, N, V = c.num_attention_heads, c.qk_nope_head_dim, c.v_head_dim

    def turned(x, t):
        return rotate(x, t, c.rope_theta) if c.position == "rope" else x

    if c.attention == "mla":
        up = attn.wkv_b.weight.view(H, N + V, c.kv_lora_rank)
        latents = [rms(attn.wkv_a.weight @ x, attn.kv_norm.weight, 1e-6) for x in xs]
        ks = [[turned(up[h, :N] @ l, t) for h in range(H)] for t, l in enumerate(latents)]
        vs = [[up[h, N:] @ l for h in range(H)] for l in latents]
        qs = [attn.wq.weight @ x for x in xs]
    else:
        ks = [[turned(k, t) for k in (attn.wk.weight @ x).view(groups, N)] for t, x in enumerate(xs)]
        vs = [list((attn.wv.weight @ x).view(groups, V)) for x in xs]
        qs = [attn.wq.weight @ x for x in xs]
    outs = []
    for t, q in enumerate(qs):
        heads = []
        for h, q_h in enumerate(q.view(H, N)):
            g = h // (H // groups)
            heads.append(
                softmax_sum(turned(q_h, t), [ks[s][g] for s in range(t + 1)], [vs[s][g] for s in range(t + 1)])
            )
        outs.append(attn.wo.weight @ torch.cat(heads))
    return torch.stack(outs)


@pytest.mark.parametrize("position", ["none", "rope"])
@pytest.mark.parametrize("attention, groups", [("mha", 6), ("gqa", 2), ("gqa", 3), ("mqa", 1), ("mla", 6)])
@torch.no_grad()
def test_a_rung_is_its_loops(attention: str, groups: int, position: str) -> None:
    model = tiny_model(
        attention=attention, position=position, num_attention_heads=6, num_key_value_heads=groups, q_lora_rank=None,
        qk_rope_head_dim=0,
    )  # fmt: skip
    attn, c = model.layers[0].attn, model.config
    x = torch.randn(7, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    packing = Packing.of([7], x[:, 0])
    out = attn(x, rotary(c, packing.positions), packing)
    # float32 angles against cmath's: no tighter.
    torch.testing.assert_close(out, by_loops(attn, x, c, groups), atol=1e-5, rtol=0)


@pytest.mark.parametrize("attention, groups", [("mha", 6), ("gqa", 2), ("mqa", 1)])
def test_fewer_key_heads_are_fewer_weights(attention: str, groups: int) -> None:
    attn = tiny_model(
        attention=attention, position="rope", num_attention_heads=6, num_key_value_heads=2, qk_rope_head_dim=0
    ).layers[0].attn  # fmt: skip
    assert attn.wk.weight.shape == (groups * 6, 24) and attn.wv.weight.shape == (groups * 10, 24)
