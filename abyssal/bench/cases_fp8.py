"""Linear layers and experts whose weights stay in FP8: e4m3, a scale a 128x128 block; decoding and prefill."""

from collections.abc import Callable
from functools import cache, partial

import torch
from torch import Tensor
from torch.nn.functional import linear, pad

from abyssal.bench.case import Calls, Case, NotInstalled, Prepared, relative_error
from abyssal.bench.cases_experts import A, Config, Inputs, plain_experts
from abyssal.bench.measure import rotations
from abyssal.ops.fp8 import dequantize, quantize
from abyssal.ops.fp8_linear import fp8_experts, fp8_linear

SHAPES = ((7168, 18432), (16384, 7168))  # in, out: DeepSeek-V3's dense gate product, and attention's output


def cases(cuda: bool) -> list[Case]:
    """A few tokens, where the weight's bytes rule, and many, where arithmetic does."""
    if not cuda:
        return [_case(3, 128, 256), _experts(Config("tiny", 128, 4, 128, 2, 128), 3)]
    found = [_case(T, *shape) for T in (1, 16, 64, 4096) for shape in SHAPES]
    return found + [_experts(A, T) for T in (1, 16, 64, 8192)]


def _case(T: int, width: int, out: int) -> Case:
    return Case(
        group="fp8", op="linear, FP8 weight", shape=f"T={T} {width} to {out}", flops=2.0 * T * width * out,
        bytes=float(width * out + 2 * T * (width + out)), prepare=partial(_prepare, T, width, out),
        limit=5e-2,  # activations are rounded to e4m3, too, where tokens are many
        small=T <= 64, rate="fp8", quick=width == 7168 and T in (1, 4096),
    )  # fmt: skip


def _prepare(T: int, width: int, out: int, device: torch.device) -> Prepared:
    torch.manual_seed(0)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    sets = rotations(width * out, device) if T <= 64 else 1
    wide = torch.empty(out, width, device=device).normal_(0, width**-0.5)
    stored = [quantize(wide * (1 + 0.01 * i)) for i in range(sets)]
    del wide
    x = torch.randn(sets, T, width, device=device, dtype=dtype)

    def ours() -> Calls:
        return [partial(fp8_linear, x[i], *stored[i]) for i in range(sets)]

    def narrow() -> Calls:
        weights = [dequantize(*pair, dtype) for pair in stored]
        return [partial(linear, x[i], weights[i]) for i in range(sets)]

    exact = linear(x[0].float(), dequantize(*stored[0], torch.float32))
    found: dict[str, Callable[[], Calls]] = {"bf16 weight": narrow}
    if device.type == "cuda":
        found["scaled_mm"] = partial(_scaled_mm, x, stored)
    return Prepared(ours, found, lambda output: relative_error(output, exact))


def _experts(c: Config, T: int) -> Case:
    weights = 3 * c.E * c.F * c.D
    return Case(
        group="fp8", op="experts, FP8 weights", shape=f"{c.name}: T={T}", flops=6.0 * T * c.K * c.D * c.F,
        bytes=float(weights + 4 * T * c.D), prepare=partial(_prepare_experts, c, T), limit=8e-2, small=T <= 64,
        rate="fp8", quick=T == 16,
    )  # fmt: skip


def _prepare_experts(c: Config, T: int, device: torch.device) -> Prepared:
    sets = 24 if device.type == "cuda" and T <= 64 else 1
    inputs = Inputs(c, T, sets, device)
    weights = inputs.w1, inputs.w2, inputs.w3
    (w1, s1), (w2, s2), (w3, s3) = stored = [quantize(w) for w in weights]
    for w, pair in zip(weights, stored):
        w.copy_(dequantize(*pair, w.dtype))  # the peer sees the same numbers
    w13 = torch.cat((inputs.w1, inputs.w3), 1)
    each = list(zip(inputs.x, inputs.indices, inputs.gate))

    def plain(i: int) -> Tensor:
        x, indices, gate = each[i]
        return plain_experts(x, w13, inputs.w2, indices, gate)

    def ours() -> Calls:
        return [partial(fp8_experts, x, w1, s1, w2, s2, w3, s3, indices, gate) for x, indices, gate in each]

    exact = plain(0)
    touched = sum(int(drawn.unique().numel()) for drawn in inputs.indices) / sets
    least = 3.0 * touched * c.F * c.D + 4 * T * c.D
    found: dict[str, Callable[[], Calls]] = {
        "grouped_mm, bf16 weights": lambda: [partial(plain, i) for i in range(sets)]
    }
    return Prepared(ours, found, lambda output: relative_error(output, exact), bytes=least)


def _scaled_mm(x: Tensor, stored: list[tuple[Tensor, Tensor]]) -> Calls:
    """cuBLAS' product with block scales, the rounding of the activations compiled and counted."""
    try:
        from torch.nn.functional import ScalingType, SwizzleType, scaled_mm
    except ImportError as error:
        raise NotInstalled("torch.nn.functional.scaled_mm") from error

    def call(i: int) -> Tensor:
        weight, scale = stored[i]
        a, a_scale = _rounding()(x[i])
        out = scaled_mm(
            a, weight.T, a_scale, ScalingType.BlockWise1x128, scale.T, ScalingType.BlockWise128x128,
            swizzle_a=SwizzleType.NO_SWIZZLE, swizzle_b=SwizzleType.NO_SWIZZLE, output_dtype=x.dtype,
        )  # fmt: skip
        assert isinstance(out, Tensor)
        return out[: x.shape[1]]

    return [partial(call, i) for i in range(len(x))]


@cache
def _rounding() -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    return torch.compile(_rounded, dynamic=True)


def _rounded(x: Tensor) -> tuple[Tensor, Tensor]:
    """e4m3 values and a scale a row and 128 columns. As cuBLAS wants them: the rows' scales side by side, and 16 rows
    or more."""
    blocks = pad(x.float(), (0, 0, 0, -x.shape[0] % 16)).unflatten(1, (-1, 128))
    scale = blocks.abs().amax(-1).clamp(min=1e-12) / 448
    return (blocks / scale[..., None]).flatten(1).to(torch.float8_e4m3fn), scale.T.contiguous().T
