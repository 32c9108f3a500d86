"""What a decoding step leaves in the cache: the latent normalised, the rotary key rotated, one row written."""

import torch
from torch import Tensor

from abyssal.ops.device import capability
from abyssal.ops.latent_rows import pack_rows
from abyssal.ops.linear import per_head
from abyssal.ops.norm import rms_norm
from abyssal.ops.rotary import rotate


def latent_write(
    kv: Tensor,
    norm_weight: Tensor,
    eps: float,
    cos: Tensor | None,
    sin: Tensor | None,
    rows: Tensor,
    slots: Tensor | None,
    q: Tensor | None = None,
    path: str | None = None,
) -> None:
    """rows[slots] = norm(c), rotate(k_rope) (equations 1 and 3 of DeepSeek-V2, section 2.1), for inference only.

    `kv [T, C + R]`: a token's latent and rotary key as projected; `norm_weight [C]`; `cos`, `sin` `[T, R/2]`, None
    where R is 0. `rows [n, C + R]` of kv's dtype, or uint8 rows of `latent_rows.pack_rows`; `slots [T]` int64, all
    different, or None: token t's row is row t. With `q [T, H, N + R]` the last R of every head are rotated where they
    lie.

    Rounds where `rms_norm` and `rotate` round. Paths: "reference", "triton"; None chooses.
    """
    # Where nothing is hidden in a kernel, torch.compile may look inside and fuse it with its neighbours.
    write = _latent_write if kv.device.type == "cpu" else torch.ops.abyssal.latent_write
    write(kv, norm_weight, eps, cos, sin, rows, slots, q, path)


def absorb(
    q: Tensor, w_uk: Tensor, kv: Tensor, norm_weight: Tensor, eps: float, cos: Tensor | None, sin: Tensor | None,
    rows: Tensor, slots: Tensor | None, path: str | None = None,
) -> Tensor:  # fmt: skip
    """`[T, H, C]`: the queries taken into the latent space, q_nope W_UK, and beside it all that `latent_write` does.

    `q [T, H, N + R]`, of which the last R are rotated where they lie; `w_uk [H, N, C]`, not written by what was
    launched last. Paths: "reference"
    (`latent_write` and a product), "triton" (one launch); None chooses.
    """
    if path is None:
        plain = torch.compiler.is_compiling() or torch.is_grad_enabled() or w_uk.dtype != q.dtype
        path = "reference" if plain else _choose(kv, rows)
    if path == "triton":
        from abyssal.kernels.absorb import absorb as kernel

        return kernel(q, w_uk, kv, norm_weight, eps, cos, sin, rows, slots)
    latent_write(kv, norm_weight, eps, cos, sin, rows, slots, q)
    return per_head(q[..., : w_uk.shape[1]], w_uk.transpose(1, 2))


def _latent_write(
    kv: Tensor,
    norm_weight: Tensor,
    eps: float,
    cos: Tensor | None,
    sin: Tensor | None,
    rows: Tensor,
    slots: Tensor | None,
    q: Tensor | None = None,
    path: str | None = None,
) -> None:
    path = path or _choose(kv, rows)
    if path == "triton":
        from abyssal.kernels.latent_write import latent_write

        latent_write(kv, norm_weight, eps, cos, sin, rows, slots, q)
    elif path == "reference":
        R = 0 if cos is None else 2 * cos.shape[1]
        latent, k_rope = kv.split((kv.shape[1] - R, R), -1)
        latent = rms_norm(latent, norm_weight, eps)
        if cos is not None and sin is not None:
            k_rope = rotate(k_rope, cos, sin)
            if q is not None:
                q[..., -R:] = rotate(q[..., -R:], cos, sin)
        packed = rows.dtype == torch.uint8
        left = pack_rows(latent, k_rope) if packed else torch.cat((latent, k_rope), -1)
        if slots is None:
            rows[: left.shape[0]] = left
        else:
            rows.index_copy_(0, slots, left)
    else:
        raise ValueError(f"path: expected 'reference' or 'triton', got {path!r}")


def _choose(kv: Tensor, rows: Tensor) -> str:
    generation = capability(kv)
    if generation == (0, 0) or kv.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return "reference"
    if rows.dtype == torch.uint8:
        return "triton" if generation >= (8, 9) else "reference"
    return "triton" if rows.dtype == kv.dtype else "reference"


# Opaque to torch.compile, which is told what it changes.
torch.library.define(
    "abyssal::latent_write",
    "(Tensor kv, Tensor norm_weight, float eps, Tensor? cos, Tensor? sin, Tensor(a!) rows, Tensor? slots, "
    "Tensor(b!)? q=None, str? path=None) -> ()",
)
torch.library.impl("abyssal::latent_write", "CompositeExplicitAutograd", _latent_write)
torch.library.register_fake("abyssal::latent_write", lambda *args, **kwargs: None)
