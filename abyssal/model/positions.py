"""How a token learns its place: nothing, integers, binary digits, sinusoids, or a rotation of its keys.

The first four are added to the embeddings. RoPE rotates pairs of a query's and a key's dimensions by an angle
that grows with the position, so that their product depends on the distance alone (Su et al. 2021). Decoupled
RoPE (DeepSeek-V2, section 2.1.3) rotates a key of its own beside the latent, which leaves W_UK free to be
absorbed. YaRN stretches the slow rotations to reach past the trained length (Peng et al. 2023).
"""

import math
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from abyssal.config import ModelConfig, Yarn, yarn_mscale


class Rotary(NamedTuple):
    """cos and sin of every token's angles, `[T, rotary/2]`, float32 or wider."""

    cos: Tensor
    sin: Tensor


def inverse_frequencies(config: ModelConfig, device: torch.device | None = None) -> Tensor:
    """[rotary/2] float32: radians a position of each pair, θ^(-2i/rotary), by YaRN's ramp where it is on.

    YaRN keeps pairs that turn more than `beta_fast` times within the original window, divides by `factor` those
    that turn less than `beta_slow` times, and blends between (YaRN, equation 23).
    """
    return _inverse_frequencies(config.rotary_width, config.rope_theta, config.rope_scaling, device)


def _inverse_frequencies(width: int, theta: float, yarn: Yarn | None, device: torch.device | None) -> Tensor:
    freq = theta ** -(torch.arange(0, width, 2, dtype=torch.float32, device=device) / width)
    if yarn is None:
        return freq

    def pair_that_turns(times: float) -> float:
        window = yarn.original_max_position_embeddings
        return width * math.log(window / (times * 2 * math.pi)) / (2 * math.log(theta))

    low = max(math.floor(pair_that_turns(yarn.beta_fast)), 0)
    high = min(math.ceil(pair_that_turns(yarn.beta_slow)), width - 1)
    span = high - low if high != low else 0.001  # no division by zero, as DeepSeek's code has it
    ramp = ((torch.arange(width // 2, dtype=torch.float32, device=device) - low) / span).clamp(0, 1)
    return freq / yarn.factor * ramp + freq * (1 - ramp)


@lru_cache
def _kept(width: int, theta: float, yarn: Yarn | None, device: torch.device) -> Tensor:
    """Inverse frequencies on a GPU, made once: a decoding step would launch a dozen small kernels for them."""
    with torch.inference_mode(False):  # training may use them too
        return _inverse_frequencies(width, theta, yarn, device)


def rotary(config: ModelConfig, positions_T: Tensor) -> Rotary | None:
    """The angles of a batch, once for all layers; None where nothing is rotated.

    Computed from the configuration, since a buffer would be rounded by `.to(bfloat16)`. YaRN's ratio
    mscale/mscale_all_dim multiplies cos and sin (1 in every public checkpoint).
    """
    if not config.rotary_width:
        return None
    yarn, device = config.rope_scaling, positions_T.device
    once = device.type == "cuda" and not torch.compiler.is_compiling()
    frequencies = (_kept if once else _inverse_frequencies)(config.rotary_width, config.rope_theta, yarn, device)
    angles = positions_T.float()[:, None] * frequencies
    ratio = 1.0
    if yarn is not None:
        ratio = yarn_mscale(yarn.factor, yarn.mscale) / yarn_mscale(yarn.factor, yarn.mscale_all_dim)
    cos, sin = angles.cos(), angles.sin()
    return Rotary(cos, sin) if ratio == 1 else Rotary(cos * ratio, sin * ratio)


def added_positions(config: ModelConfig, positions_T: Tensor, dtype: torch.dtype) -> Tensor | None:
    """[T, D]: what is added to the embeddings, or None.

    integer: the position itself in every dimension. binary: bit (i mod bits) of the position in dimension i.
    sinusoidal: sin and cos of geometric frequencies (Vaswani et al. 2017, section 3.5).
    """
    width, kind = config.hidden_size, config.position
    if kind in ("none", "rope", "decoupled"):
        return None
    place = positions_T[:, None]
    dim = torch.arange(width, device=positions_T.device)
    if kind == "integer":
        return place.to(dtype).expand(-1, width)
    if kind == "binary":
        bits = max((config.max_position_embeddings - 1).bit_length(), 1)
        return ((place >> (dim % bits)) & 1).to(dtype)
    if kind == "sinusoidal":
        freq = config.rope_theta ** -(dim // 2 * 2 / width)
        angle = place.double() * freq.double()
        return torch.where(dim % 2 == 0, angle.sin(), angle.cos()).to(dtype)
    return None
