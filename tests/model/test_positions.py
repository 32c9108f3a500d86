"""Positions by independent formulas: complex rotations, DeepSeek's published YaRN, sums on embeddings."""

import math

import numpy as np
import pytest
import torch
from tiny import paged_packing, random_tokens, tiny_config, tiny_model

from abyssal.config import Yarn
from abyssal.model.packing import Packing
from abyssal.model.positions import added_positions, inverse_frequencies, rotary
from abyssal.ops.rotary import rotate


def deepseek_yarn(dim: int, base: float, y: Yarn) -> np.ndarray:
    """The inverse frequencies as DeepSeek's modeling_deepseek.py has them, in NumPy's float64."""

    def correction_dim(rotations: float) -> float:
        return dim * math.log(y.original_max_position_embeddings / (rotations * 2 * math.pi)) / (2 * math.log(base))

    extra = 1.0 / base ** (np.arange(0, dim, 2) / dim)
    inter = 1.0 / (y.factor * base ** (np.arange(0, dim, 2) / dim))
    low = max(math.floor(correction_dim(y.beta_fast)), 0)
    high = min(math.ceil(correction_dim(y.beta_slow)), dim - 1)
    ramp = np.clip((np.arange(dim // 2) - low) / ((high if high != low else high + 0.001) - low), 0, 1)
    mask = 1.0 - ramp
    return inter * (1 - mask) + extra * mask


@pytest.mark.parametrize(
    "width, theta, yarn",
    [
        (64, 10000.0, Yarn(40.0, 4096, mscale=1.0, mscale_all_dim=1.0)),  # DeepSeek-V3
        (64, 50000.0, Yarn(32.0, 4096, beta_fast=1.0, beta_slow=1.0)),  # Kimi-K2: the ramp is a step
        (8, 10000.0, Yarn(8.0, 16)),
        (16, 100.0, Yarn(4.0, 2)),  # a window shorter than any turn
    ],
)
def test_yarn_frequencies_are_deepseeks(width: int, theta: float, yarn: Yarn) -> None:
    config = tiny_config(qk_rope_head_dim=width, rope_theta=theta, rope_scaling=yarn)
    found = inverse_frequencies(config).double().numpy()
    np.testing.assert_allclose(found, deepseek_yarn(width, theta, yarn), rtol=1e-5)
    plain = inverse_frequencies(config.replace(rope_scaling=None)).double().numpy()
    np.testing.assert_allclose(plain, theta ** (-np.arange(0, width, 2) / width), rtol=1e-5)


def test_yarn_keeps_the_fast_and_stretches_the_slow_of_v3() -> None:
    """By hand for V3: pairs 0-10 turn often enough to stay, pairs 23-31 are divided by 40."""
    config = tiny_config(qk_rope_head_dim=64, rope_scaling=Yarn(40.0, 4096, mscale=1.0, mscale_all_dim=1.0))
    ratio = inverse_frequencies(config) / inverse_frequencies(config.replace(rope_scaling=None))
    torch.testing.assert_close(ratio[:11], torch.ones(11))
    torch.testing.assert_close(ratio[23:], torch.full((9,), 1 / 40))
    assert (ratio[11:23].diff() < 0).all()


def test_mscale_squared_multiplies_the_softmax_scale() -> None:
    """V3: (0.1 · ln 40 + 1)² / sqrt(192) = 1.3689² ..., published as 1.8738 / sqrt(192)."""
    config = tiny_config(qk_nope_head_dim=128, qk_rope_head_dim=64, rope_scaling=Yarn(40.0, 4096, 32, 1, 1.0, 1.0))
    assert config.softmax_scale == pytest.approx(1.8738542 / math.sqrt(192), rel=1e-6)
    lite = tiny_config(qk_nope_head_dim=128, qk_rope_head_dim=64, rope_scaling=Yarn(40.0, 4096, 32, 1, 0.707, 0.707))
    assert lite.softmax_scale == pytest.approx((0.0707 * math.log(40) + 1) ** 2 / math.sqrt(192), rel=1e-12)
    assert tiny_config().softmax_scale == pytest.approx(1 / math.sqrt(6 + 4))
    no_all_dim = tiny_config(rope_scaling=Yarn(40.0, 4096, mscale=1.0, mscale_all_dim=0.0))
    assert no_all_dim.softmax_scale == pytest.approx(1 / math.sqrt(6 + 4))


@pytest.mark.parametrize("mscale, all_dim", [(1.0, 1.0), (0.707, 0.707), (1.0, 0.707), (0.5, 2.0), (1.0, 0.0)])
def test_the_ratio_of_the_two_mscales_multiplies_cos_and_sin(mscale: float, all_dim: float) -> None:
    config = tiny_config(rope_scaling=Yarn(8.0, 16, mscale=mscale, mscale_all_dim=all_dim))
    cos, sin = rotary(config, torch.arange(40))
    ratio = (0.1 * mscale * math.log(8) + 1) / (0.1 * all_dim * math.log(8) + 1)
    torch.testing.assert_close((cos.square() + sin.square()).sqrt(), torch.full_like(cos, ratio))


def test_rotation_multiplies_neighbours_as_complex_numbers() -> None:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(6, 3, 8, dtype=torch.float64, generator=g)
    angles = torch.randn(6, 4, dtype=torch.float64, generator=g)
    expected = torch.view_as_real(
        torch.view_as_complex(x.view(6, 3, 4, 2)) * torch.polar(torch.ones_like(angles), angles)[:, None]
    )
    torch.testing.assert_close(rotate(x, angles.cos(), angles.sin()), expected.flatten(2), atol=1e-14, rtol=0)
    torch.testing.assert_close(rotate(x[:, 0], angles.cos(), angles.sin()), expected.flatten(2)[:, 0])


def test_rotation_is_rounded_once() -> None:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(50, 8, generator=g).bfloat16()
    cos, sin = rotary(tiny_config(qk_rope_head_dim=8), torch.arange(50))
    out = rotate(x, cos, sin)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, rotate(x.float(), cos, sin).bfloat16())


def test_angles_are_not_rounded_with_the_model() -> None:
    """Position 4001 in bfloat16 would be 4000."""
    cos, _ = rotary(tiny_model(dtype=torch.bfloat16).config, torch.tensor([4001]))
    assert cos.dtype == torch.float32
    assert cos[0, 0].item() == pytest.approx(math.cos(4001), abs=1e-4)


@pytest.mark.parametrize("rung", [("mla", "decoupled"), *((a, "rope") for a in ("mla", "mha", "gqa", "mqa"))])
def test_attention_sees_distances_alone(rung: tuple[str, str]) -> None:
    """The same tokens further on in a cache give the same states: queries and keys are rotated alike."""
    attention, position = rung
    model = tiny_model(
        attention=attention, position=position, qk_rope_head_dim=4 if position == "decoupled" else 0,
        num_key_value_heads=3, rope_scaling=Yarn(4.0, 8, mscale=1.0, mscale_all_dim=0.5),
    )  # fmt: skip
    tokens = random_tokens(6)
    here = Packing.of([6], tokens)
    stretched = Packing(here.cu_seqlens, here.positions * 2, 6)
    with torch.no_grad():
        states = model.hidden(tokens, here).states
        there = Packing(here.cu_seqlens, here.positions + 37, 6)
        torch.testing.assert_close(model.hidden(tokens, there).states, states, atol=1e-4, rtol=0)
        assert (model.hidden(tokens, stretched).states - states).abs().max() > 1e-2


def test_added_positions_by_hand() -> None:
    places = torch.tensor([0, 1, 6])
    base = {"qk_rope_head_dim": 0, "hidden_size": 4, "max_position_embeddings": 8, "rope_theta": 10000.0}
    integer = added_positions(tiny_config(position="integer", **base), places, torch.float64)
    assert integer.tolist() == [[0] * 4, [1] * 4, [6] * 4]
    binary = added_positions(tiny_config(position="binary", **base), places, torch.float64)
    assert binary.tolist() == [[0, 0, 0, 0], [1, 0, 0, 1], [0, 1, 1, 0]]  # three bits, lowest first, repeated
    sinusoidal = added_positions(tiny_config(position="sinusoidal", **base), places, torch.float64)
    expected = [[math.sin(p), math.cos(p), math.sin(p / 100), math.cos(p / 100)] for p in (0, 1, 6)]
    torch.testing.assert_close(sinusoidal, torch.tensor(expected, dtype=torch.float64), atol=1e-6, rtol=0)
    for position, rotated in (("none", 0), ("rope", 0), ("decoupled", 4)):
        config = tiny_config(position=position, qk_rope_head_dim=rotated)
        assert added_positions(config, places, torch.float64) is None
        assert (rotary(config, places) is None) == (position == "none")


def test_positions_are_counted_from_what_the_cache_holds() -> None:
    packing = paged_packing([2, 1], [3, 0], [[0], [1]], 8)
    assert packing.positions.tolist() == [3, 4, 0]
    alone = Packing.of(torch.tensor([2, 0, 3]), torch.zeros(5, dtype=torch.int64))
    assert alone.positions.tolist() == [0, 1, 0, 1, 2]
    assert alone.cu_seqlens.tolist() == [0, 2, 2, 5]
    assert alone.sequence_of_token().tolist() == [0, 0, 2, 2, 2]
    assert (alone.sequences, alone.max_len) == (3, 3)


@pytest.mark.parametrize(
    "tokens, lengths",
    [((5,), [2, 2]), ((5,), [6, -1]), ((1, 5), [5]), ((0,), [1])],
)
def test_lengths_that_do_not_sum_to_the_tokens_are_refused(tokens, lengths) -> None:
    with pytest.raises(ValueError, match="expected flat tokens"):
        tiny_model()(torch.zeros(tokens, dtype=torch.int64), lengths)
