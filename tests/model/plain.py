"""The model once more, from the reports' equations and nothing else: plain loops over tokens, heads and experts.

Slow, float64 and independent of `abyssal.model`: it reads a model's weights by name and calls none of its code.
DeepSeek-V3 only (latent attention, decoupled RoPE without YaRN, sigmoid gates with groups).
"""

import cmath
import math

import torch


def rms(x, weight, eps):
    return x / math.sqrt(float((x * x).sum()) / len(x) + eps) * weight


def silu(x):
    return x / (1 + torch.exp(-x))


def rotate(x, position, theta):
    """Pairs of neighbours are complex numbers, turned by position · θ^(-2i/R)."""
    out = x.clone()
    for i in range(len(x) // 2):
        turn = cmath.exp(1j * position * theta ** (-2 * i / len(x)))
        z = complex(float(x[2 * i]), float(x[2 * i + 1])) * turn
        out[2 * i], out[2 * i + 1] = z.real, z.imag
    return out


def attend(attn, xs, c):
    """V3's equations 1-11, every key and value made, for one sequence."""
    H, N, R, C = c.num_attention_heads, c.qk_nope_head_dim, c.qk_rope_head_dim, c.kv_lora_rank
    up = attn.wkv_b.weight.view(H, N + c.v_head_dim, C)
    keys, rotary_keys, outs = [], [], []
    for t, x in enumerate(xs):
        joint = attn.wkv_a.weight @ x
        keys.append(rms(joint[:C], attn.kv_norm.weight, 1e-6))
        rotary_keys.append(rotate(joint[C:], t, c.rope_theta))
        if c.q_lora_rank is None:
            q = attn.wq.weight @ x
        else:
            q = attn.wq_b.weight @ rms(attn.wq_a.weight @ x, attn.q_norm.weight, 1e-6)
        heads = []
        for h, q_h in enumerate(q.view(H, N + R)):
            q_rope = rotate(q_h[N:], t, c.rope_theta)
            scores = [
                float((q_h[:N] @ (up[h, :N] @ keys[s]) + q_rope @ rotary_keys[s]) / math.sqrt(N + R))
                for s in range(t + 1)
            ]
            weights = [math.exp(s - max(scores)) for s in scores]
            heads.append(sum(w / sum(weights) * (up[h, N:] @ keys[s]) for s, w in enumerate(weights)))
        outs.append(attn.wo.weight @ torch.cat(heads))
    return outs


def mlp(ffn, x):
    return ffn.w2.weight @ (silu(ffn.w1.weight @ x) * (ffn.w3.weight @ x))


def route(gate, x, c):
    """V3's equations 13-16: the experts picked, and their gate values."""
    scores = [1 / (1 + math.exp(-logit)) for logit in (gate.weight @ x).tolist()]
    biased = [s + float(b) for s, b in zip(scores, gate.bias)]
    size = len(scores) // c.n_group
    groups = [range(g * size, (g + 1) * size) for g in range(c.n_group)]
    groups.sort(key=lambda g: sum(sorted((biased[e] for e in g), reverse=True)[:2]), reverse=True)
    candidates = [e for g in groups[: c.topk_group] for e in g]
    picked = sorted(candidates, key=lambda e: biased[e], reverse=True)[: c.num_experts_per_tok]
    total = sum(scores[e] for e in picked)
    return {e: c.routed_scaling_factor * scores[e] / total for e in picked}


def moe(ffn, x, c):
    """V3's equation 12."""
    y = mlp(ffn.shared_experts, x)
    for e, g in route(ffn.gate, x, c).items():
        w1, w2, w3 = (w[e] for w in (ffn.experts.w1, ffn.experts.w2, ffn.experts.w3))
        y = y + g * (w2 @ (silu(w1 @ x) * (w3 @ x)))
    return y


def block(layer, xs, c):
    normed = [rms(x, layer.attn_norm.weight, c.rms_norm_eps) for x in xs]
    xs = [x + a for x, a in zip(xs, attend(layer.attn, normed, c))]
    normed = [rms(x, layer.ffn_norm.weight, c.rms_norm_eps) for x in xs]
    feed = (lambda x: moe(layer.ffn, x, c)) if hasattr(layer.ffn, "gate") else (lambda x: mlp(layer.ffn, x))
    return [x + feed(n) for x, n in zip(xs, normed)]


@torch.no_grad()
def main_model(model, tokens):
    """Every position's state after the final norm, of one document."""
    c = model.config
    xs = [model.embed.weight[t] for t in tokens]
    for layer in model.layers:
        xs = block(layer, xs, c)
    return [rms(x, model.norm.weight, c.rms_norm_eps) for x in xs]


@torch.no_grad()
def further(model, tokens):
    """V3's equations 21-23 for one document: for each depth k the log-probabilities at positions 1 .. T-k, of which
    the last has no target. `eh_proj` takes the embedding first, as the checkpoints have it."""
    c = model.config
    states, depths = main_model(model, tokens), []
    for k, module in enumerate(model.mtp, start=1):
        joined = [
            module.eh_proj.weight
            @ torch.cat(
                (
                    rms(model.embed.weight[tokens[i + k]], module.enorm.weight, c.rms_norm_eps),
                    rms(states[i], module.hnorm.weight, c.rms_norm_eps),
                )
            )
            for i in range(len(tokens) - k)
        ]
        states = [rms(h, module.norm.weight, c.rms_norm_eps) for h in block(module.block, joined, c)]
        depths.append([(model.head.weight @ h).log_softmax(-1) for h in states])
    return depths
