"""Context parallel: how batches are cut, attention over the pieces, and the steps of several ranks against one's."""

import random
from itertools import accumulate
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from cases import CASES, check_cases
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from abyssal.config import ModelConfig
from abyssal.data import Batch
from abyssal.model.attention import GroupedAttention
from abyssal.model.latent import LatentAttention
from abyssal.model.objective import Microbatch
from abyssal.model.packing import Packing
from abyssal.model.positions import rotary
from abyssal.parallel import context
from abyssal.parallel.cut import EXPANSION, chunk_work, deal, piece


@st.composite
def batches(draw: st.DrawFn, most: int = 12) -> tuple[list[int], int, int]:
    """Lengths of documents, and sizes of cp and tp that divide their sum."""
    cp, tp = draw(st.integers(1, 5)), draw(st.integers(1, 3))
    lengths = draw(st.lists(st.integers(0, most), min_size=1, max_size=12))
    missing = -sum(lengths) % (cp * tp) or (0 if sum(lengths) else cp * tp)
    place = draw(st.integers(0, len(lengths)))
    return [*lengths[:place], missing, *lengths[place:]], cp, tp


def micro_of(lengths: list[int], modules: int = 2) -> Microbatch:
    total = sum(lengths)
    # A token is its own place, so that a piece tells which it has.
    return Microbatch.of(Batch(torch.arange(total), lengths, 1.0 + torch.arange(total).float()), modules)


def pieces_of(micro: Microbatch, cp: int, tp: int) -> list[list[Microbatch]]:
    return [[piece(micro, cp, c, tp, t) for t in range(tp)] for c in range(cp)]


@given(batches())
@settings(deadline=None)
def test_pieces_are_of_one_size_and_have_every_token_once_with_all_that_belongs_to_it(drawn: tuple) -> None:
    lengths, cp, tp = drawn
    micro = micro_of(lengths)
    pieces = [p for row in pieces_of(micro, cp, tp) for p in row]
    assert {len(p.tokens) for p in pieces} == {sum(lengths) // (cp * tp)}
    assert torch.cat([p.tokens for p in pieces]).sort().values.equal(micro.tokens)
    document = micro.packing.sequence_of_token()
    for p in pieces:
        own = p.tokens
        assert (own.diff() > 0).all()
        for name in ("targets", "weights", "live"):
            for cut, whole in zip(getattr(p, name), getattr(micro, name), strict=True):
                assert cut.equal(whole[own])
        assert (p.totals, p.sequences) == (micro.totals, micro.sequences)
        if cp * tp > 1:
            assert p.spans is not None and p.spans.sequences == len(lengths)
            assert p.spans.of_token.equal(document[own])
            assert p.cut_from == sum(lengths)


@given(batches())
@settings(deadline=None)
def test_each_run_of_tokens_finds_its_document_up_to_itself(drawn: tuple) -> None:
    lengths, cp, tp = drawn
    micro = micro_of(lengths)
    rows = pieces_of(micro, cp, tp)
    tokens = [torch.cat([p.tokens for p in row]) for row in rows]
    gathered = torch.cat(tokens)
    starts = micro.packing.cu_seqlens[micro.packing.sequence_of_token()]
    for row, own in zip(rows, tokens):
        packing = row[0].packing
        assert packing.positions.equal(micro.packing.positions[own])
        if cp == 1:
            assert packing is micro.packing
            continue
        assert packing.context_rows is not None and packing.cu_context is not None
        runs = own.split(packing.cu_seqlens.diff().tolist())
        contexts = gathered[packing.context_rows].split(packing.cu_context.diff().tolist())
        assert packing.max_len == max(map(len, runs)) and packing.max_context == max(map(len, contexts))
        for run, seen in zip(runs, contexts, strict=True):
            assert seen.equal(torch.arange(int(starts[run[0]]), int(run[-1]) + 1))
            assert run.equal(seen[-len(run) :])


def pairs(lengths: list[int], cp: int) -> list[int]:
    """How many keys each rank's queries see."""
    positions = Packing.of(lengths, torch.arange(sum(lengths))).positions
    return [int((positions[own] + 1).sum()) for own in deal(positions, cp)]


@given(st.integers(2, 8), st.integers(200, 4000))
@settings(deadline=None)
def test_one_long_document_is_shared_out_evenly(cp: int, chunk: int) -> None:
    assert len(set(pairs([2 * cp * chunk], cp))) == 1


def test_long_documents_are_shared_out_nearly_evenly() -> None:
    """Of batches drawn at random; there are others, of two documents on two ranks, that are a fifth apart."""
    draw, apart = random.Random(0), []
    for _ in range(60):
        cp = draw.randint(2, 8)
        ends = [min(end, 8192 * cp) for end in accumulate(draw.randint(2048, 65536) for _ in range(32))]
        found = pairs([end - start for start, end in zip([0, *ends], ends)], cp)
        apart.append(max(found) * cp / sum(found))
    assert max(apart) <= 1.15 and sorted(apart)[30] <= 1.05


@given(batches(most=600))
@settings(deadline=None)
def test_no_rank_has_more_to_do_than_if_the_batch_were_cut_into_as_many_pieces_as_ranks(drawn: tuple) -> None:
    lengths, cp, _ = drawn
    micro = micro_of(lengths, 0)
    done = []
    for row in pieces_of(micro, cp, 1):
        seen = micro.packing.positions[row[0].tokens] + 1
        context = row[0].packing.cu_context
        done.append(int(seen.sum()) + EXPANSION * int(micro.packing.cu_seqlens[-1] if context is None else context[-1]))
    assert max(done) <= max(chunk_work(micro.packing.positions, cp))


def test_whole_documents_stay_whole_where_that_is_even() -> None:
    micro = micro_of([8] * 4)
    for row in pieces_of(micro, 2, 1):
        packing = row[0].packing
        assert packing.cu_context is not None and packing.cu_context.equal(packing.cu_seqlens)


def test_tokens_that_cannot_be_cut_evenly_are_refused_with_what_is_needed() -> None:
    with pytest.raises(ValueError, match=r"batch_tokens: expected a multiple of cp·tp = 6, got 10"):
        piece(micro_of([7, 3]), 3, 0, 2, 0)


KINDS = {
    "mla": {"q_lora_rank": 6},
    "mla, queries not compressed": {},
    "mla, coupled RoPE": {"position": "rope", "qk_rope_head_dim": 0},
    "mla, no positions": {"position": "none", "qk_rope_head_dim": 0},
    "gqa": {"attention": "gqa", "num_key_value_heads": 2, "position": "rope", "qk_rope_head_dim": 0},
    "mqa": {"attention": "mqa", "position": "none", "qk_rope_head_dim": 0},
}


@pytest.mark.parametrize("kind", KINDS)
@given(batches(), st.integers(0, 2**32))
@settings(max_examples=15, deadline=None)
def test_attention_over_the_pieces_is_attention_over_the_whole(kind: str, drawn: tuple, seed: int) -> None:
    lengths, cp, _ = drawn
    base = {"vocab_size": 8, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1,
            "num_attention_heads": 4, "qk_nope_head_dim": 4, "v_head_dim": 6, "kv_lora_rank": 5,
            "qk_rope_head_dim": 2}  # fmt: skip
    config = ModelConfig(**(base | KINDS[kind]))
    torch.manual_seed(seed)
    attn = (LatentAttention(config) if config.attention == "mla" else GroupedAttention(config)).double()
    for p in attn.parameters():
        p.data.normal_(0, 0.5)
    x = torch.randn(sum(lengths), 8, dtype=torch.float64, requires_grad=True)
    weight = torch.randn_like(x)
    inputs = [x, *attn.parameters()]

    micro = micro_of(lengths)
    whole = attn(x, rotary(config, micro.packing.positions), micro.packing)
    expected = torch.autograd.grad((whole * weight).sum(), inputs)

    packings = [row[0].packing for row in pieces_of(micro, cp, 1)]
    owns = [row[0].tokens for row in pieces_of(micro, cp, 1)]
    if cp == 1:
        return
    forward = context._latent if isinstance(attn, LatentAttention) else context._grouped
    given_up: list[Tensor] = []

    def record(rows: Tensor, group: object) -> Tensor:
        given_up.append(rows)
        return rows.new_zeros(cp * rows.shape[0], *rows.shape[1:])

    def turn(group: object) -> list[Tensor]:
        return [forward(attn, group, x[own], rotary(config, p.positions), p) for own, p in zip(owns, packings)]

    with patch.object(context, "gathered", record):
        turn(None)
    with patch.object(context, "gathered", lambda rows, group: torch.cat(given_up)):
        found = torch.cat(turn(None))
    order = torch.cat(owns)
    torch.testing.assert_close(found, whole[order], rtol=1e-10, atol=1e-12)
    gradients = torch.autograd.grad((found * weight[order]).sum(), inputs)
    for ours, theirs in zip(gradients, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-11)


QUICK = ["queries not compressed, two MTP modules, recomputed", "classic balance loss, documents of one token"]


def test_two_ranks_train_odd_models_as_one_does(tokens: Path, tmp_path: Path) -> None:
    check_cases(tokens, tmp_path, "cp=2", QUICK)


@pytest.mark.slow
def test_two_ranks_train_odder_models_as_one_does(tokens: Path, tmp_path: Path) -> None:
    check_cases(tokens, tmp_path, "cp=2", [name for name in CASES if name not in QUICK])


@pytest.mark.slow
def test_a_product_trains_odd_models_as_one_does(tokens: Path, tmp_path: Path) -> None:
    check_cases(tokens, tmp_path, "cp=2,tp=2", list(CASES), ranks=4)
