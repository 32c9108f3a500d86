"""The engine under random schedules: whatever is decoded beside a request, however its prompt is cut, whatever of it
the prefix cache has, whoever is aborted or sent back into the queue, and whether drafts are verified, its text is its
own."""

import time

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from opinionated import opinionated

from abyssal import Sampling
from abyssal.data import Tokenizer
from abyssal.engine.engine import Engine
from abyssal.engine.options import Options
from abyssal.engine.request import Output, Piece, Request
from abyssal.engine.sequence import Sequence, State
from abyssal.model.transformer import Transformer

COUNT = 10  # tokens that most requests ask for


def make(modules: int = 1, **changes: object) -> Transformer:
    """In float32, over 64 tokens, for inference."""
    shape = {"num_nextn_predict_layers": modules, "vocab_size": 64}
    return opinionated(0, torch.float32, **shape, **changes).eval().requires_grad_(False)


# The main models are the same: their greedy texts are.
MODELS = {1: make(), 2: make(2)}
MODEL = MODELS[1]
MODELS[2].load_state_dict(MODEL.state_dict(), strict=False)
# Prompts that begin alike, at and about the borders of pages.
BASE = torch.randint(0, 64, (200,), generator=torch.Generator().manual_seed(1)).tolist()
_alone: dict[tuple[int, ...], list[int]] = {}


def alone(prompt: tuple[int, ...], count: int) -> list[int]:
    """Greedy decoding without an engine or a cache."""
    if len(_alone.get(prompt, ())) < count:
        tokens = list(prompt)
        for _ in range(count):
            tokens.append(int(MODEL(torch.tensor(tokens), [len(tokens)])[-1].argmax()))
        _alone[prompt] = tokens[len(prompt) :]
    return _alone[prompt][:count]


def run(engine: Engine, most: int = 2000) -> dict[tuple[int, int], Output]:
    done: dict[tuple[int, int], Output] = {}
    for _ in range(most):
        if not engine.busy:
            return done
        done |= outputs(engine.step())
    raise AssertionError("the engine did not come to an end")


def outputs(pieces: list[Piece]) -> dict[tuple[int, int], Output]:
    return {(p.index, p.sample): p.output for p in pieces if p.output is not None}


def idle(engine: Engine) -> None:
    """Nothing is held by anybody."""
    assert engine.pages.free == engine.options.pages - 1
    assert not engine.scheduler.running and not engine.scheduler.waiting and not engine.busy
    assert sorted(engine.scheduler._slots) == list(range(engine.options.running))


prompts = st.builds(
    lambda cut, tail: (*BASE[:cut], *tail),
    st.sampled_from([0, 1, 5, 62, 63, 64, 65, 127, 128, 130]),
    st.lists(st.integers(0, 3), min_size=1, max_size=3),
)
arrivals = st.lists(
    st.tuples(
        st.integers(0, 12),  # the step at which it comes
        prompts,
        st.integers(1, COUNT),
        st.one_of(st.none(), st.integers(0, 8)),  # steps after which it is aborted
        st.sampled_from([None, False]),  # speculation
        st.integers(0, 2),  # priority
        st.sampled_from([1, 1, 3]),  # samples
        st.sampled_from([None, None, 1]),  # log-probabilities of the prompt
    ),
    min_size=1,
    max_size=7,
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    arrivals, st.integers(5, 14), st.sampled_from([1, 2, 4]), st.sampled_from([0, 1, 3]), st.sampled_from([8, 70, 300]),
    st.booleans(), st.booleans(), st.booleans(), st.sampled_from([1, 2]),
)  # fmt: skip
def test_a_text_is_its_own_whatever_the_schedule(
    coming: list[tuple[int, tuple[int, ...], int, int | None, bool | None, int, int, int | None]],
    pages: int, running: int, drafts: int, step_tokens: int, prefix_cache: bool, deterministic: bool, ahead: bool,
    modules: int,
) -> None:  # fmt: skip
    """`ahead`: steps are read after the next has been enqueued, as on a GPU."""
    options = Options(
        pages=pages, running=running, context=200, drafts=drafts, step_tokens=step_tokens, prefix_cache=prefix_cache,
        deterministic=deterministic, adapt=False,
    )  # fmt: skip
    engine = Engine(MODELS[modules], None, options)
    engine.asynchronous = ahead
    done: dict[tuple[int, int], Output] = {}
    for now in range(3000):
        for id, (at, prompt, count, abort, speculate, priority, n, said) in enumerate(coming):
            if at == now:
                sampling = Sampling(max_tokens=count, temperature=0, speculate=speculate, n=n, prompt_logprobs=said)
                engine.add(Request(id, prompt, sampling, priority))
            if abort is not None and at + abort == now:
                engine.abort(id)
        if not engine.busy and now > 25:
            break
        done |= outputs(engine.step())
    assert len(done) == sum(one[6] for one in coming)
    for id, (_, prompt, count, abort, _, _, n, said) in enumerate(coming):
        expected = alone(prompt, count)
        for output in (done[id, sample] for sample in range(n)):
            assert output.finish == "length" or (output.finish == "abort" and abort is not None), output
            assert output.tokens == expected[: len(output.tokens)]
            if output.finish != "abort":
                assert output.tokens == expected
                assert len(output.prompt_logprobs or ()) == (0 if said is None else len(prompt))
    idle(engine)


def test_a_pool_that_is_too_small_makes_the_youngest_wait_and_nothing_else() -> None:
    engine = Engine(MODEL, None, Options(pages=8, running=4, context=400, drafts=1, adapt=False))
    for id in range(4):
        engine.add(Request(id, tuple(BASE[id : id + 40]), Sampling(max_tokens=120, temperature=0)))
    oldest = engine.scheduler.waiting[0]
    sent_back = []
    preempt = engine.scheduler.preempt

    def watched() -> Sequence:
        sent_back.append(preempt())
        return sent_back[-1]

    engine.scheduler.preempt = watched  # type: ignore[method-assign]
    done = run(engine)
    assert engine.metrics.preemptions == len(sent_back) > 0 and oldest not in sent_back
    for id in range(4):
        assert done[id, 0].tokens == alone(tuple(BASE[id : id + 40]), 120)
    idle(engine)


def test_prefixes_are_read_from_the_cache_but_not_across_tenants() -> None:
    engine = Engine(MODEL, None, Options(pages=40, running=4, context=300, drafts=1))
    sampling = Sampling(max_tokens=4, temperature=0)
    found = {}
    for id, (length, salt) in enumerate([(140, "a"), (140, "a"), (140, "b"), (129, "a"), (128, "a"), (65, "a")]):
        engine.add(Request(id, tuple(BASE[:length]), sampling, salt=salt))
        done = run(engine)
        assert done[id, 0].tokens == alone(tuple(BASE[:length]), 4)
        found[id] = done[id, 0].cached_tokens
    # A token must be left over, and the module's row at a page's end knows the token after it.
    assert found == {0: 0, 1: 128, 2: 0, 3: 128, 4: 64, 5: 64}
    assert engine.metrics.cached_tokens == sum(found.values())
    idle(engine)


def test_samples_of_a_prompt_share_its_pages_and_differ_by_their_seeds() -> None:
    engine = Engine(MODEL, None, Options(pages=40, running=5, context=300, drafts=1))
    sampling = Sampling(max_tokens=6, temperature=1.5, seed=3, n=5)
    engine.add(Request(0, tuple(BASE[:150]), sampling))
    engine.step()
    sequences = engine.scheduler.running
    assert len(sequences) == 5 and all(s.state is State.DECODING for s in sequences)
    assert len({tuple(s.pages[:2]) for s in sequences}) == 1 and len({s.pages[2] for s in sequences}) == 5
    assert engine.metrics.copied_pages == 4
    texts = [tuple(o.tokens) for o in run(engine).values()]
    assert len(set(texts)) == 5
    # Each is what a request with that seed alone gets.
    engine.add(Request(1, tuple(BASE[:150]), Sampling(max_tokens=6, temperature=1.5, seed=5)))
    assert tuple(run(engine)[1, 0].tokens) == texts[2]
    # More samples than there are slots come in one after the other.
    engine.add(Request(2, tuple(BASE[:150]), Sampling(max_tokens=6, temperature=1.5, seed=3, n=12)))
    more = run(engine)
    assert [tuple(more[2, i].tokens) for i in range(5)] == texts and len(more) == 12
    idle(engine)


def test_samples_whose_first_is_aborted_go_on_and_all_end_with_their_request() -> None:
    engine = Engine(MODEL, None, Options(pages=40, running=2, context=300, step_tokens=16))
    engine.add(Request(0, tuple(BASE[:150]), Sampling(max_tokens=6, temperature=0, n=3)))
    engine.step()
    engine.abort(0)
    assert {o.finish for o in run(engine).values()} == {"abort"}
    idle(engine)


def test_samples_with_two_modules_keep_rows_that_know_the_future_to_themselves() -> None:
    """A module's last rows know the next tokens, which differ from sample to sample: such a page is nobody else's, and
    known to the prefix cache by one content alone."""
    model = MODELS[2]
    engine = Engine(model, None, Options(pages=60, running=8, context=300, drafts=2, adapt=False))
    for round in range(3):
        asked = Sampling(max_tokens=80, temperature=2.0, n=4, speculate=True, seed=round)
        engine.add(Request(10 * round, tuple(BASE[:65]), asked))
        run(engine)
        for id, n in enumerate((65, 66, 130)):
            engine.add(Request(id, tuple(BASE[:n]), Sampling(max_tokens=6, temperature=0)))
            assert run(engine)[id, 0].tokens == alone(tuple(BASE[:n]), 6)
    known = engine.pages._content
    assert {page: key for key, (_, page) in known.items()} == engine.pages._key and len(known) == len(engine.pages._key)
    idle(engine)


def test_the_first_is_never_sent_back_for_one_that_has_waited() -> None:
    """What is sent back has its place in the order of arrival, and later ones don't overtake it."""
    engine = Engine(MODEL, None, Options(pages=8, running=4, context=400))
    now = time.monotonic()
    for id in range(4):
        asked = Sampling(max_tokens=120, temperature=0)
        engine.add(Request(id, tuple(BASE[id : id + 40]), asked, arrived=now - 1000 + 100 * id))
    ends: list[int] = []
    while engine.busy:
        ends += [id for id, _ in outputs(engine.step())]
        if engine.scheduler.running:
            assert engine.scheduler.running[0].request.id == min(set(range(4)) - set(ends))
    assert ends == sorted(ends) and engine.metrics.preemptions > 0


def test_a_deadline_ends_a_request_that_waits_or_runs() -> None:
    engine = Engine(MODEL, None, Options(pages=40, running=1, context=300))
    engine.add(Request(0, (1, 2), Sampling(max_tokens=100, temperature=0), deadline=time.monotonic() + 0.05))
    engine.add(Request(1, (1, 2, 3), Sampling(max_tokens=3, temperature=0), deadline=time.monotonic() - 1))
    done = outputs(engine.step())
    assert done[1, 0].finish == "deadline" and done[1, 0].tokens == []
    time.sleep(0.06)
    done = run(engine)
    assert done[0, 0].finish == "deadline" and done[0, 0].tokens == alone((1, 2), len(done[0, 0].tokens))
    idle(engine)


def test_a_lower_priority_number_runs_earlier_and_waiting_raises_it() -> None:
    engine = Engine(MODEL, None, Options(pages=40, running=1, context=300))
    order = []
    now = time.monotonic()
    for id, (priority, waited) in enumerate([(0, 0), (5, 0), (-1, 0), (5, 100), (0, 0)]):
        sampling = Sampling(max_tokens=2, temperature=0)
        engine.add(Request(id, (id + 1,), sampling, priority, arrived=now - waited + id * 1e-6))
    while engine.busy:
        order += [id for id, _ in outputs(engine.step())]
    assert order == [3, 2, 0, 4, 1]  # a hundred seconds are worth ten steps of priority


def test_what_can_never_fit_is_refused_by_name() -> None:
    engine = Engine(MODEL, None, Options(pages=3, running=1, context=400))
    with pytest.raises(ValueError, match="prompt: 100 tokens and max_tokens 100 exceed the context of 125"):
        engine.add(Request(0, tuple(BASE[:100]), Sampling(max_tokens=100)))
    with pytest.raises(ValueError, match="logit_bias: expected token ids from 0 to 63"):
        engine.add(Request(0, (1,), Sampling(max_tokens=3, logit_bias={64: 1.0})))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="priority: expected an integer from -1000000 to 1000000"):
        engine.add(Request(0, (1,), Sampling(max_tokens=3), priority=10**400))
    with pytest.raises(ValueError, match="grammar: needs a tokenizer"):
        from abyssal.engine.sampling import Grammar

        engine.add(Request(0, (1,), Sampling(max_tokens=3, grammar=Grammar("json"))))
    idle(engine)


def test_a_bias_changes_what_is_taken_and_a_mate_s_text_stays() -> None:
    engine = Engine(MODEL, None, Options(pages=9, running=3, context=100, drafts=1))
    biased = Sampling(max_tokens=5, temperature=0, logit_bias={7: 100.0})  # type: ignore[arg-type]
    engine.add(Request(0, (1, 2, 3), biased))
    engine.add(Request(1, (1, 2, 3), Sampling(max_tokens=5, temperature=0)))
    done = run(engine)
    assert done[0, 0].tokens == [7] * 5 and done[1, 0].tokens == alone((1, 2, 3), 5)
    # The slot's next sequence has no bias.
    engine.add(Request(2, (1, 2, 3), Sampling(max_tokens=5, temperature=0)))
    engine.add(Request(3, (1, 2, 3), Sampling(max_tokens=5, temperature=0)))
    assert {tuple(o.tokens) for o in run(engine).values()} == {tuple(alone((1, 2, 3), 5))}


def test_logprobs_of_a_prompt_are_the_model_s_own_however_it_is_cut() -> None:
    prompt = BASE[:100]
    rows = MODEL(torch.tensor(prompt), [len(prompt)]).log_softmax(-1)
    for step_tokens in (16, 300):
        engine = Engine(MODEL, None, Options(pages=9, running=2, context=200, drafts=1, step_tokens=step_tokens))
        for id in range(2):  # the second does not get its rows from the cache
            engine.add(Request(id, tuple(prompt), Sampling(max_tokens=1, temperature=0, prompt_logprobs=2)))
            said = run(engine)[id, 0].prompt_logprobs
            assert said is not None and len(said) == 100 and said[0] is None
            for t, one in enumerate(said[1:], start=1):
                assert one is not None and one.token == prompt[t]
                assert one.logprob == pytest.approx(float(rows[t - 1, prompt[t]]), abs=1e-4)
                assert [i for i, _ in one.top] == rows[t - 1].topk(2).indices.tolist()


def test_experts_are_counted_for_each_request_and_for_all() -> None:
    engine = Engine(MODEL, None, Options(pages=9, running=2, context=200))
    pieces: list[Piece] = []
    engine.add(Request(0, tuple(BASE[:30]), Sampling(max_tokens=5, temperature=0), inspect=True))
    engine.add(Request(1, tuple(BASE[:10]), Sampling(max_tokens=5, temperature=0)))
    while engine.busy:
        pieces += engine.step()
    inside = [p.inside for p in pieces if p.inside is not None]
    assert inside and all(p.index == 0 for p in pieces if p.inside is not None)
    config = MODEL.config
    assert len(inside[-1].expert_load) == 2  # layers with experts
    # 30 prompt tokens and all but the last of what was generated went through the model.
    assert [sum(layer) for layer in inside[-1].expert_load] == [34 * config.num_experts_per_tok] * 2
    assert [sum(layer) for layer in engine.snapshot()["expert_load"]] == [48 * config.num_experts_per_tok] * 2
    assert inside[-1].pages == 1 and inside[-1].latent_bytes == engine.metrics.page_bytes


@pytest.mark.parametrize("rung", [{"attention": "mha"}, {"attention": "gqa", "num_key_value_heads": 2}, {}])
def test_the_ladder_s_rungs_are_served_too(rung: dict[str, object]) -> None:
    model = make(**rung, position="rope", qk_rope_head_dim=0)
    engine = Engine(model, None, Options(pages=12, running=3, context=200, drafts=1, step_tokens=50, adapt=False))
    for id, n in enumerate((3, 70, 130)):
        engine.add(Request(id, tuple(BASE[:n]), Sampling(max_tokens=6, temperature=0)))
    done = run(engine)
    for id, n in enumerate((3, 70, 130)):
        tokens = list(BASE[:n])
        for _ in range(6):
            tokens.append(int(model(torch.tensor(tokens), [len(tokens)])[-1].argmax()))
        assert done[id, 0].tokens == tokens[n:]


def test_fp8_latents_take_less_room_and_change_little() -> None:
    """A latent of 128, which rows of FP8 come in."""
    model = make(kv_lora_rank=128)
    prompt = torch.tensor(BASE[:100])
    exact = model(prompt, [100])[-1].log_softmax(-1)
    engine = Engine(model, None, Options(pages=9, running=2, context=200, cache_dtype=torch.uint8, step_tokens=30))
    plain = Engine(model, None, Options(pages=9, running=2, context=200))
    engine.add(Request(0, tuple(BASE[:100]), Sampling(max_tokens=1, temperature=0, logprobs=64)))
    said = run(engine)[0, 0].logprobs
    assert said is not None
    near = torch.tensor([value for _, value in sorted(said[0].top)])
    assert float((near - exact).abs().max()) < 0.5 and int(near.argmax()) == int(exact.argmax())
    assert engine.metrics.page_bytes * 3 < plain.metrics.page_bytes


def test_a_text_that_is_cut_short_has_no_half_character_at_its_end() -> None:
    """Token by token in bytes: a deadline between two bytes of one character leaves it out."""
    tokenizer = Tokenizer.train(["plain ascii text and nothing else"] * 4, 300)
    request = Request(0, (1, 2), Sampling(max_tokens=9, stop=("dé",)))
    s = Sequence(request, 0, tokenizer, frozenset())
    first, *rest = tokenizer.encode("d€")
    s.push(first, False, None)
    for token in rest[:-1]:
        s.push(token, False, None)
    s.end("deadline")
    piece = s.piece()
    assert piece is not None and piece.output is not None and piece.output.text == piece.text == "d"
