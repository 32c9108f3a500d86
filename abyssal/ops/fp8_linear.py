"""Products with weights that stay block-scaled e4m3 in memory, for inference: linear maps and routed experts."""

import torch
from torch import Tensor

from abyssal.ops.device import capability
from abyssal.ops.experts import experts
from abyssal.ops.fp8 import dequantize
from abyssal.ops.linear import linear

# Up to these reading the weight is what takes the time, and rounding x would save none of it (docs/kernels.md):
FEW_TOKENS = 16
FEW_OUTPUTS = 1 << 18  # numbers in the product of a weight with few rows
FEW_CHOICES = 8  # of an expert, on average


def fp8_linear(x: Tensor, weight: Tensor, scale: Tensor, path: str | None = None) -> Tensor:
    """`x [..., in]`, `weight [out, in]` e4m3, `scale [out/128, in/128]` float32 -> `[..., out]` in x's dtype.

    Paths: "reference" (the weight dequantised, then multiplied; any device, and where a gradient is wanted), and on a
    GPU "weight only" (read as FP8, dequantised a tile at a time) and "fp8" (x rounded to e4m3 too, a scale a token
    and 128 columns: DeepSeek-V3, section 3.3). None chooses: "weight only" for few tokens or outputs, for float32 and
    where the device has no FP8. Relative errors against the dequantised product: 0.002 (bf16's own) and 0.026.
    """
    tokens = x.numel() // max(x.shape[-1], 1)
    if path is None:
        path = _choose(x, few=tokens <= FEW_TOKENS or tokens * weight.shape[0] <= FEW_OUTPUTS)
    if path == "reference":
        return linear(x, dequantize(weight, scale, x.dtype))
    from abyssal.kernels import fp8

    rows, weight, scale = x.reshape(-1, x.shape[-1]).contiguous(), weight.contiguous(), scale.contiguous()
    if path == "weight only":
        y = fp8.few_rows(rows, weight, scale)
    elif path == "fp8":
        y = _scaled_product(*fp8.quantize_rows(rows), weight, scale, x.dtype)[:tokens]
    else:
        raise ValueError(f"path: expected 'reference', 'weight only' or 'fp8', got {path!r}")
    return y.view(*x.shape[:-1], weight.shape[0])


def _scaled_product(q: Tensor, q_scale: Tensor, weight: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """`q [T, in]` e4m3 with `q_scale [in/128, T]` times the weight, by cuBLAS where it can: it is the fastest."""
    from abyssal.kernels import fp8

    if fp8.library_serves(weight) and dtype == torch.bfloat16:
        recipe = torch.nn.functional.ScalingType
        return torch.nn.functional.scaled_mm(
            q, weight.T, q_scale.T, recipe.BlockWise1x128, scale.T, recipe.BlockWise128x128, output_dtype=dtype
        )
    if fp8.hopper(weight):
        from abyssal.kernels.fp8_hopper import scaled_product

        return scaled_product(q, q_scale, weight, scale, dtype)
    return fp8.many_rows(q, q_scale, weight, scale, dtype)


def fp8_experts(
    x: Tensor, w1: Tensor, s1: Tensor, w2: Tensor, s2: Tensor, w3: Tensor, s3: Tensor, indices: Tensor,
    weights: Tensor, path: str | None = None,
) -> Tensor:  # fmt: skip
    """`[T, D]`: `ops.experts.experts` with w1, w3 `[E, F, D]` and w2 `[E, D, F]` in e4m3, and for each a scale a
    128x128 block: s1, s3 `[E, F/128, D/128]`, s2 `[E, D/128, F/128]` float32.

    Paths as in `fp8_linear`; in "fp8" the hidden row between the products is rounded to e4m3 as well. Relative
    errors against the dequantised experts: 0.003 and 0.044.
    """
    if path is None:
        path = _choose(x, few=indices.numel() <= FEW_CHOICES * w1.shape[0])
    if path == "reference":
        w1, w2, w3 = (dequantize(w, s, x.dtype) for w, s in ((w1, s1), (w2, s2), (w3, s3)))
        return experts(x, w1, w2, w3, indices, weights)
    if path not in ("weight only", "fp8"):
        raise ValueError(f"path: expected 'reference', 'weight only' or 'fp8', got {path!r}")
    from abyssal.kernels import fp8_experts as kernels

    x, w1, s1, w2, s2, w3, s3 = (t.contiguous() for t in (x, w1, s1, w2, s2, w3, s3))
    return kernels.experts(x, w1, s1, w2, s2, w3, s3, indices, weights, fp8=path == "fp8")


def _choose(x: Tensor, few: bool) -> str:
    wants_gradient = torch.is_grad_enabled() and x.requires_grad
    if capability(x) == (0, 0) or x.dtype == torch.float64 or not x.numel() or wants_gradient:
        return "reference"
    narrow = x.dtype != torch.float32 and capability(x) >= (8, 9)
    return "fp8" if narrow and not few else "weight only"
