"""The kernels around the experts' products: the order of the rows, and the sums that follow."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from abyssal.kernels import experts_sort
from abyssal.kernels.experts_rows import clear_behind, sum_parts, sum_rows
from abyssal.kernels.experts_sort import TILE, order_by_expert
from abyssal.ops import experts as ops


def check(T: int, K: int, E: int, among: int, seed: int) -> None:
    """`among`: how many of the experts are ever picked."""
    g = torch.Generator().manual_seed(seed)
    picked = torch.randperm(E, generator=g)[:among]
    indices = picked[torch.rand(T, among, generator=g).topk(K).indices]
    weights = torch.rand(T, K, generator=g)
    order = order_by_expert(indices, weights, E)
    expected = indices.flatten().argsort(stable=True)
    assert torch.equal(order.token.long(), expected // K)
    assert torch.equal(order.weight, weights.flatten()[expected])
    assert torch.equal(order.place[expected].long(), torch.arange(T * K))
    starts = [0, *indices.flatten().bincount(minlength=E).cumsum(0).tolist()]
    assert order.starts.tolist() == starts
    tiles = [
        [e, row, starts[e + 1]] for e in range(E) for row in range(starts[e], starts[e + 1], TILE)
    ]  # every tile lies in one expert's rows
    assert order.table[0, 0] == len(tiles)
    assert order.table[1 : len(tiles) + 1, :3].tolist() == tiles


@settings(max_examples=15, deadline=None)
@given(st.data())
def test_rows_come_in_the_order_of_their_experts(data: st.DataObject) -> None:
    E = data.draw(st.integers(1, 40))
    among = data.draw(st.integers(1, E))
    K = data.draw(st.integers(1, min(among, 6)))
    check(data.draw(st.integers(1, 70)), K, E, among, data.draw(st.integers(0, 99)))


@pytest.mark.parametrize("T, K, E", [(300, 8, 256), (1100, 2, 3), (129, 1, 1)])
def test_several_chunks_and_many_experts(T: int, K: int, E: int) -> None:
    check(T, K, E, E, 0)
    assert T * K < 1024 or -(-T * K // experts_sort.CHUNK) > 1


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 40), st.integers(1, 4), st.integers(1, 9), st.booleans(), st.integers(0, 99))
def test_an_index_that_is_no_experts_gets_no_row(T: int, K: int, E: int, exact: bool, seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    indices = torch.randint(-3, E + 20, (T, K), generator=g)  # 16 is the least width of the kernel's counters
    weights = torch.rand(T, K, generator=g)
    inside = (indices >= 0) & (indices < E)
    live = int(inside.sum())
    order = order_by_expert(indices, weights, E, live if exact else None)
    expected = torch.where(inside, indices, E).flatten().argsort(stable=True)[:live]
    assert order.token.numel() == order.weight.numel() == (live if exact else T * K)
    assert torch.equal(order.token[:live].long(), expected // K)
    assert torch.equal(order.weight[:live], weights.flatten()[expected])
    places = torch.full((T * K,), -1).index_copy(0, expected, torch.arange(live))
    assert torch.equal(order.place.long(), places)
    counts = indices[inside].bincount(minlength=E)
    assert order.starts.tolist() == [0, *counts.cumsum(0).tolist()]
    assert order.table[0, 0] == (counts > 0).sum()  # few choices: a tile each


@pytest.mark.parametrize("T, K, D", [(5, 3, 24), (1, 1, 8), (3, 6, 2056)])
def test_a_token_adds_up_its_rows(T: int, K: int, D: int) -> None:
    rows, place = torch.randn(T * K, D), torch.randperm(T * K).int().view(T, K)
    torch.testing.assert_close(sum_rows(rows, place), rows[place.long()].sum(1))


@pytest.mark.parametrize("first, second", [(4, 3), (0, 7), (7, 0)])
@pytest.mark.parametrize("more", [False, True])
def test_rows_lie_in_two_parts_and_some_choices_have_none(first: int, second: int, more: bool) -> None:
    T, K, D = 6, 2, 24
    rows, place = torch.randn(first + second, D), torch.full((T * K,), -1)
    place[torch.randperm(T * K)[:7]] = torch.arange(7)
    place, plus = place.view(T, K), torch.randn(T, D) if more else None
    parts = rows[:first], rows[first:]
    expected = (rows[place] * (place >= 0)[..., None]).sum(1) + (plus if plus is not None else 0)
    torch.testing.assert_close(sum_rows(parts[0], place.int(), plus, parts[1]), expected)
    torch.testing.assert_close(ops.sum_rows(parts, place, plus, path="reference"), expected)


@pytest.mark.parametrize("count", [0, 3, 9, 10])
def test_rows_behind_the_last_are_cleared(count: int) -> None:
    three = [torch.full((10, 24), torch.nan) for _ in range(3)]
    clear_behind(*three, torch.tensor([count], dtype=torch.int32), 4)
    cleared = torch.zeros(10, dtype=torch.bool)
    cleared[count : count + 4] = True
    for rows in three:
        assert torch.equal((rows == 0).all(1), cleared)
        assert torch.equal(rows.isnan().all(1), ~cleared)


@pytest.mark.parametrize("N, parts", [(7, 1), (1030, 6)])
def test_parts_are_added_in_the_choices_order(N: int, parts: int) -> None:
    values, place = torch.randn(parts, N), torch.randperm(N).int()
    torch.testing.assert_close(sum_parts(values, place, torch.float32), values.sum(0)[place.long()])
    place[::3] = -1
    expected = torch.where(place >= 0, values.sum(0)[place.long()], 0)
    torch.testing.assert_close(sum_parts(values, place, torch.float32), expected)
