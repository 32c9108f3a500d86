"""The gate: every expert's score, and which K each token gets with what weight (DeepSeek-V3, equations 13-16)."""

from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import linear

from abyssal.ops.device import capability


def gate(
    x: Tensor, weight: Tensor, bias: Tensor | None, scoring: Literal["sigmoid", "softmax"], n_group: int,
    topk_group: int, top_k: int, norm_topk_prob: bool, scaling: float, group_worth: Literal["best two", "best"],
    path: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Weights `[T, K]`, indices `[T, K]` int64 and unbiased scores `[T, E]`, float32 or wider.

    `x [T, D]`, `weight [E, D]`, `bias [E]`: steers which experts are picked, and nothing else. Where experts are in
    `n_group` groups, only those of the `topk_group` worthiest are picked: a group is worth its "best two" biased scores
    (V3) or its "best" (V2). Which of equal scores wins is the path's own matter: the kernels pick the lowest expert.

    Paths: "reference" (any device and dtype), "kernel" (Triton, float64 excluded: the choice in one kernel, after one
    for the logits of bf16 or of up to 64 tokens; the logits' gradients in another). None chooses. Raises ValueError for
    another path.
    """
    if path is None:
        path = "kernel" if x.dtype != torch.float64 and capability(x)[0] > 0 else "reference"
    if path not in ("reference", "kernel"):
        raise ValueError(f"path: expected 'reference' or 'kernel', got {path!r}")
    if path == "kernel":
        return _kernel(
            x, weight, bias, scoring, n_group, topk_group, top_k, norm_topk_prob, scaling, group_worth
        )  # fmt: skip
    wide = torch.promote_types(x.dtype, torch.float32)
    logits = linear(x.to(wide), weight.to(wide))
    scores = logits.sigmoid() if scoring == "sigmoid" else logits.softmax(-1)
    indices = pick(scores if bias is None else scores + bias, n_group, topk_group, top_k, group_worth)
    weights = scores.gather(1, indices)
    if norm_topk_prob:
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
    return weights * scaling, indices, scores


def pick(biased: Tensor, n_group: int, topk_group: int, top_k: int, group_worth: str) -> Tensor:
    """`[T, E]` -> `[T, K]`: the best K of the best groups. Experts of other groups are at -inf, since a biased score
    may be below 0."""
    biased = biased.detach()
    if n_group > 1:
        groups = biased.unflatten(-1, (n_group, -1))
        worth = groups.topk(2).values.sum(-1) if group_worth == "best two" else groups.amax(-1)
        kept = worth.topk(topk_group, sorted=False).indices
        out = torch.ones_like(worth, dtype=torch.bool).scatter_(1, kept, False)
        biased = groups.masked_fill(out[..., None], float("-inf")).flatten(1)
    return biased.topk(top_k, sorted=False).indices


def _kernel(
    x: Tensor, weight: Tensor, bias: Tensor | None, scoring: str, n_group: int, topk_group: int, top_k: int,
    norm_topk_prob: bool, scaling: float, group_worth: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    from abyssal.kernels import gate as kernels
    from abyssal.kernels import gate_train

    rest = (scoring, n_group, topk_group, top_k, norm_topk_prob, scaling, group_worth)
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
        return gate_train.gate(x, weight, bias, *rest)
    return kernels.choose(gate_train.pieces_of_logits(x, weight), bias, *rest)
