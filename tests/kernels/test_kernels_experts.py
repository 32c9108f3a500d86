"""The kernels around the experts' products: the order of the rows, and the sums that follow."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from abyssal.kernels import experts_sort
from abyssal.kernels.experts import sum_parts, sum_rows
from abyssal.kernels.experts_sort import TILE, order_by_expert


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


@pytest.mark.parametrize("T, K, D", [(5, 3, 24), (1, 1, 8), (3, 6, 2056)])
def test_a_token_adds_up_its_rows(T: int, K: int, D: int) -> None:
    rows, place = torch.randn(T * K, D), torch.randperm(T * K).int()
    torch.testing.assert_close(sum_rows(rows, place, T), rows[place.long()].view(T, K, D).sum(1))


@pytest.mark.parametrize("N, parts", [(7, 1), (1030, 6)])
def test_parts_are_added_in_the_choices_order(N: int, parts: int) -> None:
    values, place = torch.randn(parts, N), torch.randperm(N).int()
    torch.testing.assert_close(sum_parts(values, place, torch.float32), values.sum(0)[place.long()])
