"""A decoding step's bookkeeping through Triton's interpreter."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from abyssal.ops import step


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_the_reference_s_bookkeeping(data: st.DataObject) -> None:
    slots, width, further, P, page = (data.draw(st.integers(1, most)) for most in (5, 4, 3, 4, 8))
    g = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    wide = max(width, 1 + further)
    count = data.draw(st.integers(1, slots))
    order = torch.cat([torch.randperm(slots, generator=g)[:count], torch.full((data.draw(st.integers(0, 2)),), slots)])
    tables = torch.randint(0, 50, (slots + 1, P), generator=g).int()
    known = torch.randint(1, max(P * page - width, 1) + 1, (slots + 1,), generator=g).clamp(max=P * page - width + 1)
    known = known.clamp(min=1)
    if width > P * page:
        return
    last = torch.randint(0, 99, (slots + 1, wide), generator=g)
    rows = [step.step_rows(order, known, last, tables, width, page, path) for path in ("reference", "triton")]
    for one, other in zip(*rows):
        assert torch.equal(one, other) and one.dtype == other.dtype
    S = order.shape[0]
    start = rows[0].known - 1 - data.draw(st.integers(0, 3))
    placed = [step.place_rows(rows[0].table, start, width, page, path) for path in ("reference", "triton")]
    for one, other in zip(*placed):
        assert torch.equal(one, other) and one.dtype == other.dtype
    accepted = torch.randint(0, width, (S,), generator=g)
    token = torch.randint(-1, 99, (S,), generator=g)
    drafts = last[order, 1:width]
    following = [step.follow(drafts, accepted, token, further, path) for path in ("reference", "triton")]
    assert torch.equal(*following)
    # Idle sequences are alike, or the last of several would win.
    accepted[count:], token[count:], following[0][count:] = 0, 7, 7
    state = []
    for path in ("reference", "triton"):
        own_known, own_last = known.clone(), last.clone()
        told = step.finish(order, slots, own_known, own_last, accepted, token, drafts, following[0], further, path)
        state.append((own_known, own_last, told))
    for one, other in zip(*state):
        assert torch.equal(one, other)
    layers, K, E = (data.draw(st.integers(1, most)) for most in (3, 3, 6))
    picks = torch.randint(0, E, (layers, S * width, K), generator=g)
    for some in (accepted, None):
        loads = [torch.zeros(slots + 1, layers, E, dtype=torch.int32) for _ in range(2)]
        for load, path in zip(loads, ("reference", "triton")):
            step.count_experts(load, order, picks, some, path)
        assert torch.equal(*loads)
