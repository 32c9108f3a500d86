"""Absorbed decoding on Hopper: parity with float64, nothing read past a context, and bits that repeat."""

import pytest
import torch
from torch import Tensor

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9, reason="no Hopper device"
    ),
]

PAGE, SCALE = 64, 0.07


def batch(lens: list[int], queries: list[int], heads: int, seed: int = 0) -> tuple[Tensor, ...]:
    """A permuted, paged cache with NaN wherever no context lies, and -1 past every sequence's pages."""
    g = torch.Generator("cuda").manual_seed(seed)
    need = [-(-n // PAGE) for n in lens]
    order = torch.randperm(sum(need) + 3, generator=g, device="cuda").int()
    rows = torch.full((len(order) * PAGE, 576), float("nan"), device="cuda", dtype=torch.bfloat16)
    table = torch.full((len(lens), max(need) + 2), -1, device="cuda", dtype=torch.int32)
    at = 0
    for s, (n, pages) in enumerate(zip(lens, need)):
        table[s, :pages] = order[at : at + pages]
        where = (order[at : at + pages, None].long() * PAGE + torch.arange(PAGE, device="cuda")).flatten()[:n]
        rows[where] = torch.randn(n, 576, generator=g, device="cuda").bfloat16()
        at += pages
    T = sum(queries)
    q_latent = torch.randn(heads, T, 512, generator=g, device="cuda").bfloat16().transpose(0, 1)
    q_rope = torch.randn(T, heads, 64, generator=g, device="cuda").bfloat16()
    cu_q = torch.tensor([0, *queries]).cumsum(0).int().cuda()
    return q_latent, q_rope, rows, cu_q, table, torch.tensor(lens).int().cuda()


def exact(
    q_latent: Tensor, q_rope: Tensor, rows: Tensor, cu_q: Tensor, table: Tensor, lens: Tensor
) -> tuple[Tensor, Tensor]:
    out, lse = [], []
    starts = cu_q.tolist()
    for s, n in enumerate(lens.tolist()):
        q = torch.cat((q_latent, q_rope), -1)[starts[s] : starts[s + 1]].double()
        t = len(q)
        if t:
            context = rows.view(-1, PAGE, 576)[table[s, : -(-n // PAGE)].long()].flatten(0, 1)[:n].double()
            hidden = ~torch.ones(t, n, dtype=torch.bool, device="cuda").tril(n - t)
            scores = (q @ context.T * SCALE).masked_fill(hidden[:, None], float("-inf"))
            out.append(scores.softmax(-1) @ context[:, :512])
            lse.append(scores.logsumexp(-1))
    return torch.cat(out), torch.cat(lse)


@pytest.mark.parametrize(
    ("heads", "lens", "queries"),
    [
        (16, [1, 64, 65, 1000, 0, 5000], [1, 1, 1, 1, 0, 1]),
        (16, [4641, 45118, 1730, 1696], [4, 4, 4, 4]),
        (16, [64 * i + i % 3 for i in range(1, 150)], [i % 2 for i in range(1, 150)]),
        (16, [40000], [1]),
        (128, [1024], [1]),
        (128, [300, 2000, 5000, 1], [1, 8, 0, 1]),
        (128, [777] * 40, [1] * 40),
        (20, [300, 2000, 5000, 9], [8, 7, 0, 5]),
        (1, [129, 128, 8, 127], [8, 3, 8, 1]),
        (64, [64, 2, 6400], [1, 2, 3]),
    ],
)
def test_the_answer_is_float64_s_and_repeats(heads: int, lens: list[int], queries: list[int]) -> None:
    from abyssal.kernels.latent_decode_hopper import latent_decode_hopper

    args = batch(lens, queries, heads)
    out, lse = latent_decode_hopper(*args, PAGE, max(queries), SCALE)
    expected, expected_lse = exact(*args)
    assert out.isfinite().all()
    assert (out.double() - expected).norm() < 4e-3 * expected.norm()
    assert (lse.double() - expected_lse).abs().max() < 1e-3
    for _ in range(3):
        again, again_lse = latent_decode_hopper(*args, PAGE, max(queries), SCALE)
        assert torch.equal(out, again) and torch.equal(lse, again_lse)


def test_a_graph_is_replayed_at_other_lengths() -> None:
    from abyssal.kernels.latent_decode_hopper import latent_decode_hopper

    lens, queries = [9000, 130, 700], [1, 2, 1]
    args = batch(lens, queries, 16)
    latent_decode_hopper(*args, PAGE, 2, SCALE)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, lse = latent_decode_hopper(*args, PAGE, 2, SCALE)
    for shorter in ([9000, 130, 700], [64, 65, 2], [8999, 2, 641]):
        args[5].copy_(torch.tensor(shorter).int())
        out.fill_(float("nan"))
        lse.fill_(float("nan"))
        graph.replay()
        expected, expected_lse = exact(*args)
        assert (out.double() - expected).norm() < 4e-3 * expected.norm()
        assert (lse.double() - expected_lse).abs().max() < 1e-3


def test_scores_of_any_size() -> None:
    from abyssal.kernels.latent_decode_hopper import latent_decode_hopper

    q_latent, *rest = batch([5000, 70], [1, 2], 16)
    for factor in (0.0, 1e-3, 100.0):
        args = ((q_latent * factor).contiguous(), *rest)
        out, lse = latent_decode_hopper(*args, PAGE, 2, SCALE)
        expected, expected_lse = exact(*args)
        assert (out.double() - expected).norm() < 1e-2 * expected.norm()
        assert ((lse.double() - expected_lse) / (1 + expected_lse.abs())).abs().max() < 1e-3
