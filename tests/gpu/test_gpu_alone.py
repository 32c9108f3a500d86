"""On a GPU, at a fixed number of rows: whether a row's bits depend on its batch mates or on its place among them."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from abyssal.model.cache import Cache
from abyssal.model.packing import Packing
from abyssal.model.transformer import Transformer
from abyssal.ops.experts import with_shared
from abyssal.ops.gate import gate
from abyssal.ops.latent_decode import latent_decode
from abyssal.ops.latent_rows import pack_rows
from abyssal.ops.linear import linear, per_head
from abyssal.ops.norm import add_norm

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

D, H, E, F, K = 2048, 16, 64, 1408, 6


def bf(*shape: int, scale: float = 1.0) -> Tensor:
    return (torch.randn(shape, device="cuda") * scale).bfloat16()


def steady(T: int, rows: Callable[[int], Tensor], run: Callable[[Tensor], Tensor]) -> None:
    """Rows among others and in other places give the bits that they gave before."""
    x = rows(T)
    out = run(x)
    order = torch.randperm(T, device="cuda")
    assert torch.equal(run(x[order].contiguous()), out[order])
    mixed = rows(T)
    kept = torch.randperm(T, device="cuda")[: max(T // 4, 1)]
    mixed[kept] = x[kept]
    assert torch.equal(run(mixed)[kept], out[kept])


@pytest.mark.parametrize("T", [1, 8, 16, 32, 64, 128])
@pytest.mark.parametrize("out", [3648, 576, 2048, 21888, 102400])
def test_linear(T: int, out: int) -> None:
    w = bf(out, D, scale=0.02)
    steady(T, lambda n: bf(n, D), lambda x: linear(x, w, settled=True))


@pytest.mark.parametrize("T", [1, 8, 32, 64, 128])
def test_products_a_head(T: int) -> None:
    w = bf(H, 128, 512, scale=0.02)
    steady(T, lambda n: bf(n, H, 512), lambda x: per_head(x, w))
    steady(T, lambda n: bf(n, H, 128), lambda x: per_head(x, w.transpose(1, 2)))


@pytest.mark.parametrize("T", [1, 8, 32, 64, 128])
def test_sum_and_norm(T: int) -> None:
    w = bf(D)
    steady(T, lambda n: bf(n, 2, D), lambda x: torch.stack(add_norm(x[:, 0], x[:, 1], w, 1e-6), 1))


@pytest.mark.parametrize("T", [1, 8, 32, 64, 128, 160])
def test_gate_and_experts(T: int) -> None:
    router = bf(E, D, scale=0.02)
    w1, w3, w2 = bf(E, F, D, scale=0.02), bf(E, F, D, scale=0.02), bf(E, D, F, scale=0.02)
    s1, s3, s2 = bf(2 * F, D, scale=0.02), bf(2 * F, D, scale=0.02), bf(D, 2 * F, scale=0.02)

    def run(x: Tensor) -> Tensor:
        weights, indices, _ = gate(x, router, None, "softmax", 1, 1, K, False, 1.0, "best")
        return with_shared(x, w1, w2, w3, indices, weights, s1, s2, s3)

    steady(T, lambda n: bf(n, D), run)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("values", [False, True])
def test_attention_by_itself(packed: bool, values: bool) -> None:
    lens = [1, 64, 65, 700, 5000, 513, 512, 1024, 2048, 3000]
    S, pages = len(lens), 80
    rows = bf(S * pages * 64, 576)
    rows = pack_rows(rows[:, :512], rows[:, 512:]) if packed else rows
    table = torch.randperm(S * pages, device="cuda").view(S, pages).int()
    q, w_uv = bf(S, H, 576), bf(H, 128, 512, scale=0.05) if values else None
    length = torch.tensor(lens, dtype=torch.int32, device="cuda")

    def run(some: Tensor) -> Tensor:
        cu = torch.arange(len(some) + 1, dtype=torch.int32, device="cuda")
        mine = q[some]
        where = (rows, cu, table[some].contiguous(), length[some].contiguous(), 64, 0.07)
        return latent_decode(mine[..., :512], mine[..., 512:], *where, max_q=1, alone=True, w_uv=w_uv)

    out = run(torch.arange(S, device="cuda"))
    usual = latent_decode(q[..., :512], q[..., 512:], rows, torch.arange(S + 1, dtype=torch.int32, device="cuda"),
                          table, length, 64, 0.07, max_q=1, w_uv=w_uv)  # fmt: skip
    assert (out.float() - usual.float()).norm() < 1e-2 * usual.float().norm()
    for _ in range(4):
        order = torch.randperm(S, device="cuda")
        assert torch.equal(run(order), out[order])
        if not values:  # whose launches depend on how many there are
            assert torch.equal(run(order[:3]), out[order[:3]])


@pytest.mark.parametrize("joined", [False, True])
@pytest.mark.parametrize("T", [1, 3, 20, 70])
def test_a_step_over_the_cache_is_the_cpu_s(T: int, joined: bool) -> None:
    """In float32, so that the float64 reference tells a wrong kernel from rounding; idle sequences among them."""
    from abyssal import ModelConfig

    config = ModelConfig.load("tiny").replace(initializer_range=0.1)
    model = Transformer(config).init_weights(torch.Generator().manual_seed(0))
    twin = Transformer(config).init_weights(torch.Generator().manual_seed(0)).cuda()
    twin = twin.join() if joined else twin
    g = torch.Generator().manual_seed(T)
    before = torch.randint(0, 9, (T,), generator=g).tolist()
    results = []
    for each, device in ((model.double(), "cpu"), (twin, "cuda")):
        dtype = each.embed.weight.dtype
        cache = Cache.allocate(each.leaves(), T, 64, dtype, device)
        tokens = torch.arange(sum(before) + T) % 500
        with torch.inference_mode():
            first = cache.contiguous_packing(before, [0] * T, range(T), device)
            each.hidden(tokens[: sum(before)].to(device), first, cache)
            packing: Packing = cache.contiguous_packing([1] * T, before, range(T), device)
            step = tokens[sum(before) :].to(device)
            results.append(each.logits(each.hidden(step, packing, cache, "absorbed").states).cpu().double())
    expected, out = results
    assert (out - expected).norm() < 1e-4 * expected.norm()


def test_joined_maps_keep_numbers_names_and_results() -> None:
    from abyssal import ModelConfig

    config = ModelConfig.load("tiny")
    model = Transformer(config).init_weights(torch.Generator().manual_seed(0)).cuda().bfloat16()
    kept = {name: t.clone() for name, t in model.state_dict().items()}
    tokens = torch.arange(200, device="cuda") % 500
    with torch.inference_mode():
        before = model(tokens, [150, 50])
        after = model.join()(tokens, [150, 50])
    assert (after - before).norm() < 2e-2 * before.norm()
    assert all(torch.equal(t, kept[name]) for name, t in model.state_dict().items())
