"""A decoding step's bookkeeping, derived by hand."""

import torch

from abyssal.ops.step import count_experts, finish, follow, place_rows, step_rows


def test_rows_lie_where_the_block_table_says() -> None:
    tables = torch.tensor([[3, 5, 0], [9, 2, 7], [0, 0, 0]], dtype=torch.int32)
    known, last = torch.tensor([4, 6, 1]), torch.tensor([[40, 41, 42], [60, 61, 62], [0, 0, 0]])
    rows = step_rows(torch.tensor([1, 0, 2]), known, last, tables, 2, page_size=4)
    assert rows.known.tolist() == [6, 4, 1]
    assert rows.tokens.tolist() == [[60, 61], [40, 41], [0, 0]]
    assert rows.positions.tolist() == [[5, 6], [3, 4], [0, 1]]
    assert rows.slots.tolist() == [[2 * 4 + 1, 2 * 4 + 2], [3 * 4 + 3, 5 * 4], [0, 1]]
    assert rows.context_lens.tolist() == [7, 5, 2] and rows.table.tolist() == [[9, 2, 7], [3, 5, 0], [0, 0, 0]]


def test_rows_before_the_first_are_those_from_the_first() -> None:
    positions, slots, lens = place_rows(torch.tensor([[3, 5]], dtype=torch.int32), torch.tensor([-2]), 3, 4)
    assert (positions.tolist(), slots.tolist(), lens.tolist()) == ([[0, 1, 2]], [[12, 13, 14]], [3])


def test_what_follows_is_accepted_drafts_and_then_the_token() -> None:
    drafts = torch.tensor([[1, 2], [3, 4], [5, 6], [7, 8]])
    out = follow(drafts, torch.tensor([0, 1, 2, 0]), torch.tensor([9, 9, 9, -1]), 1)
    assert out.tolist() == [[9, 9, 9, 9], [3, 9, 9, 9], [5, 6, 9, 9], [0, 0, 0, 0]]


def test_slots_move_on_but_the_idle_one() -> None:
    known, last = torch.tensor([4, 6, 1]), torch.zeros(3, 4, dtype=torch.int64)
    following = torch.tensor([[10, 11, 12, 13], [20, 21, 22, 23], [30, 31, 32, 33]])
    accepted, token, drafts = torch.tensor([1, 0, 0]), torch.tensor([11, 20, 30]), torch.tensor([[10], [99], [98]])
    told = finish(torch.tensor([1, 0, 2]), 2, known, last, accepted, token, drafts, following, 2)
    assert known.tolist() == [5, 8, 1]
    assert last.tolist() == [[20, 21, 22, 20], [11, 12, 13, 11], [30, 31, 32, 30]]
    assert told.tolist() == [[1, 11, 10, 12, 13], [0, 20, 99, 21, 22], [0, 30, 98, 31, 32]]


def test_only_tokens_that_became_text_count_for_experts() -> None:
    load = torch.zeros(3, 2, 4, dtype=torch.int32)
    picks = torch.tensor([[[0, 1], [0, 2], [3, 1], [3, 2], [0, 1], [0, 1]], [[1, 2]] * 6])  # 2 layers, 3 x 2 tokens
    count_experts(load, torch.tensor([1, 0, 2]), picks, torch.tensor([0, 1, 1]))
    assert load[1].tolist() == [[1, 1, 0, 0], [0, 1, 1, 0]]
    assert load[0].tolist() == [[0, 1, 1, 2], [0, 2, 2, 0]]
    assert not load[2].any()
    count_experts(load, torch.tensor([2]), picks)
    assert load[2].sum() == 24
