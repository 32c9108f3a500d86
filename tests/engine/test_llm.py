"""The engine: speculation changes nothing but speed, requests do not disturb each other, and errors are named."""

import math
import random

import pytest
import torch
from opinionated import opinionated

from abyssal import LLM, ModelConfig, Sampling
from abyssal.engine.compiled import can_compile
from abyssal.engine.engine import Engine
from abyssal.engine.options import Options
from abyssal.engine.request import Request
from abyssal.model.transformer import Transformer

GREEDY = Sampling(max_tokens=12, temperature=0)


def prompts(seed: int = 1, vocab: int = 512) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, vocab, (n,), generator=generator).tolist() for n in (5, 1, 23, 8, 2)]


def recomputed(model: Transformer, prompt: list[int], count: int) -> list[int]:
    """Greedy decoding without a cache: the whole sequence again for every token."""
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(int(model(torch.tensor(tokens), [len(tokens)])[-1].argmax()))
    return tokens[len(prompt) :]


@pytest.mark.parametrize("modules", [1, 3])
def test_greedy_output_is_that_of_recomputation(modules: int) -> None:
    model = opinionated(num_nextn_predict_layers=modules)
    expected = [recomputed(model, p, 12) for p in prompts()]
    for settings in ({"drafts": 0}, {}, {"drafts": 4, "max_batch": 2}, {"drafts": 2, "max_batch": 1}):
        outputs = LLM(model, **settings).generate(prompts(), GREEDY)
        assert [o.tokens for o in outputs] == expected, settings
        assert {o.finish for o in outputs} == {"length"}


@pytest.mark.parametrize("rung", [{"attention": "mha"}, {"attention": "gqa", "num_key_value_heads": 2}, {}])
def test_rungs_of_the_ladder_generate_too(rung: dict[str, object]) -> None:
    """Coupled RoPE on a latent too, whose keys are made anew at every step."""
    model = opinionated(**rung, position="rope", qk_rope_head_dim=0)
    assert LLM(model).generate(prompts()[0], GREEDY)[0].tokens == recomputed(model, prompts()[0], 12)


@pytest.mark.parametrize("modules,count", [(1, 1), (1, 3), (2, 2), (3, 3), (3, 2), (2, 4)])
@pytest.mark.parametrize("chunk", [3, 2048])
def test_drafts_are_those_of_the_modules_over_the_whole_sequence(modules: int, count: int, chunk: int) -> None:
    """Whatever was accepted before, however a prompt was cut and whatever of it the prefix cache had, the modules'
    caches hold what a pass over all known tokens would give them. A vocabulary of 3, so that some drafts hold."""
    model = opinionated(num_nextn_predict_layers=modules, vocab_size=3)
    options = Options(pages=9, running=3, context=300, drafts=count, step_tokens=chunk, adapt=False)
    engine = Engine(model, None, options)
    generator = torch.Generator().manual_seed(3)
    long = torch.randint(0, 3, (70,), generator=generator).tolist()
    sampling, checked, accepted = Sampling(max_tokens=12, temperature=0), 0, 0
    for id, prompt in enumerate([long[:9], [*long, 1, 2, 0], [*long[:67], 2, 2, 2]]):
        engine.add(Request(id, tuple(prompt), sampling))
        s = engine.scheduler.waiting[0]
        while engine.busy:
            engine.step()
            if s.finish is not None or not s.drafts:
                continue
            for d, draft in enumerate(s.drafts[:modules], start=1):
                sequence = torch.tensor(s.tokens + s.drafts[: d - 1])
                assert draft == int(model.predict(sequence, [len(sequence)])[d - 1][len(s.tokens) - 2].argmax())
                checked += 1
        accepted += s.accepted
        assert s.cached_tokens == (64 if id == 2 else 0)
    assert checked > 10 and accepted > 0


def test_sampled_output_has_the_model_s_distribution() -> None:
    """Two tokens after a prompt over a vocabulary of 6, drawn with speculation, against exact probabilities."""
    model = opinionated(vocab_size=6, seed=4)
    prompt, sampling = [1, 3, 2], Sampling(max_tokens=2, temperature=1.3, top_k=5)

    def after(tokens: list[int]) -> torch.Tensor:
        best = model(torch.tensor(tokens), [len(tokens)])[-1].topk(5)
        probs = (best.values / 1.3).softmax(-1)
        return torch.zeros(6, dtype=torch.float64).scatter_(0, best.indices, probs)

    first = after(prompt)
    exact = {(a, b): (first[a] * after([*prompt, a])[b]).item() for a in range(6) for b in range(6)}
    draws = 1500
    llm = LLM(model, max_batch=50, drafts=1, adapt=False, compiled=False)
    random.seed(5)  # where requests without a seed take one from
    outputs = llm.generate([prompt] * draws, sampling)
    assert 0 < llm.totals.accepted < llm.totals.drafted
    seen = dict.fromkeys(exact, 0)
    for o in outputs:
        seen[o.tokens[0], o.tokens[1]] += 1
    assert all(seen[pair] == 0 for pair, p in exact.items() if p == 0)
    chi2 = sum((seen[pair] - draws * p) ** 2 / (draws * p) for pair, p in exact.items() if p > 0)
    freedom = sum(p > 0 for p in exact.values()) - 1
    assert chi2 < freedom + 4.5 * math.sqrt(2 * freedom)


def test_a_seed_gives_the_same_text_whatever_the_batch() -> None:
    llm = LLM(opinionated())
    settings = [Sampling(max_tokens=12, seed=s) for s in range(5)]
    together = [o.tokens for o in llm.generate(prompts(), settings)]
    alone = [llm.generate(p, s)[0].tokens for p, s in zip(prompts(), settings)]
    assert together == alone
    assert together != [o.tokens for o in llm.generate(prompts(), [Sampling(max_tokens=12, seed=9)] * 5)]


def test_speculation_can_be_refused_by_one_request_of_a_batch() -> None:
    model = opinionated()
    settings = [Sampling(max_tokens=9, temperature=0, speculate=None if i % 2 else False) for i in range(5)]
    outputs = LLM(model, drafts=2).generate(prompts(), settings)
    assert [o.tokens for o in outputs] == [recomputed(model, p, 9) for p in prompts()]


def test_penalties_count_drafts() -> None:
    """With a penalty that forbids repeating, no token comes twice, drafted or not."""
    sampling = Sampling(
        max_tokens=15, temperature=0, frequency_penalty=2.0, presence_penalty=2.0, repetition_penalty=90.0
    )
    plain = LLM(opinionated(), drafts=0).generate(prompts(), sampling)
    assert [o.tokens for o in LLM(opinionated(), drafts=3).generate(prompts(), sampling)] == [o.tokens for o in plain]
    assert all(len(set(o.tokens)) == len(o.tokens) for o in plain)


def test_logprobs_are_the_model_s_own() -> None:
    model = opinionated()
    output = LLM(model).generate(prompts()[0], Sampling(max_tokens=6, temperature=0.5, seed=1, logprobs=3))[0]
    assert output.logprobs is not None and len(output.logprobs) == 6
    whole = torch.tensor([*output.prompt_tokens, *output.tokens])
    exact = model(whole, [len(whole)]).log_softmax(-1)[len(output.prompt_tokens) - 1 :]
    for row, said in zip(exact, output.logprobs):
        assert said.logprob == pytest.approx(float(row[said.token]), abs=1e-6)
        assert [id for id, _ in said.top] == row.topk(3).indices.tolist()


def test_end_of_text_ends_a_request_and_is_not_in_its_tokens() -> None:
    model = opinionated()
    free = recomputed(model, prompts()[2], 12)
    end = free[5]
    model.config = ModelConfig.from_dict(model.config.to_dict() | {"eos_token_id": [end, 511]})
    output = LLM(model).generate(prompts()[2], GREEDY)[0]
    assert (output.tokens, output.finish) == (free[: free.index(end)], "stop")
    ignoring = Sampling(max_tokens=12, temperature=0, ignore_eos=True)
    assert LLM(model).generate(prompts()[2], ignoring)[0].tokens == free


def test_a_failure_is_one_request_s_alone() -> None:
    """A sequence whose logits are not finite ends with the reason; its batch mates do not notice."""
    model = opinionated()
    expected = [recomputed(model, p, 12) for p in prompts()]
    met = {token for text in (*prompts(), *expected) for token in text}
    poisoned = next(token for token in range(100, model.config.vocab_size) if token not in met)
    model.embed.weight.data[poisoned] = float("nan")
    outputs = LLM(model, drafts=0).generate([*prompts(), [1, poisoned]], GREEDY)
    assert [o.tokens for o in outputs[:-1]] == expected
    assert (outputs[-1].finish, outputs[-1].tokens) == ("error", [])
    assert "finite" in str(outputs[-1].error)
    # The page it leaves behind serves the next sequence as if nothing had happened.
    llm = LLM(model, drafts=0, max_batch=1)
    failed, *others = llm.generate([[1, poisoned], *prompts()], GREEDY)
    assert failed.finish == "error" and [o.tokens for o in others] == expected


def test_the_cache_is_what_it_says() -> None:
    llm = LLM(opinionated(), max_batch=2, max_context=250)
    llm.generate(prompts(), GREEDY)
    # 250 tokens and the drafts of two steps are four pages a sequence; one more is for idle rows.
    rows, layers, width = (2 * 4 + 1) * 64, 4, 24 + 8
    assert llm.totals.cache_bytes == rows * layers * width * 8
    assert llm.totals.mha_cache_bytes == rows * layers * 2 * 4 * 16 * 8


@pytest.mark.parametrize(
    "prompt,sampling,message",
    [
        ([], GREEDY, "prompt 0: is empty"),
        ([[1], []], GREEDY, "prompt 1: is empty"),
        ([[1], [512]], GREEDY, "prompt 1: expected token ids from 0 to 511"),
        ([[1], [-1]], GREEDY, "prompt 1: expected token ids"),
        ([[1] * 501], GREEDY, "prompt 0: 501 tokens and max_tokens 12 exceed the context of 512"),
        ("text", GREEDY, "tokenizer: text prompts need one"),
        ([[1], [2]], [GREEDY], "sampling: expected one or 2, got 1"),
    ],
)
def test_bad_requests_are_named_before_any_work(prompt: object, sampling: object, message: str) -> None:
    if prompt == []:
        prompt = [[]]
    with pytest.raises(ValueError, match=message):
        LLM(opinionated()).generate(prompt, sampling)  # type: ignore[arg-type]


def test_a_stream_that_nobody_reads_to_its_end_and_a_refusal_leave_nothing_behind() -> None:
    llm = LLM(opinionated(), max_batch=2, cache_bytes=4 * 64 * 4 * 32 * 8)
    stream = llm.stream(prompts(), GREEDY)
    next(stream)
    stream.close()
    assert [len(o.tokens) for o in llm.generate([prompts()[0]], GREEDY)] == [12]
    with pytest.raises(ValueError, match="exceed the context of"):
        llm.generate([[1, 2], [3] * 400], GREEDY)  # the pool is smaller than the model's context
    assert [len(o.tokens) for o in llm.generate(prompts(), GREEDY)] == [12] * 5
    assert llm.engine is not None and llm.engine.pages.free == llm.engine.options.pages - 1


def test_a_call_within_a_stream_is_refused_and_leaves_the_stream_alone() -> None:
    """Requests are numbered from 0 in each call: of two at once, one would get the other's."""
    llm = LLM(opinionated())
    llm.generate(prompts()[0], GREEDY)
    stream = llm.stream(prompts(), GREEDY)
    pieces = [next(stream)]
    with pytest.raises(RuntimeError, match="a stream of this model is not over"):
        llm.generate(prompts()[0], GREEDY)
    outputs = [piece.output for piece in [*pieces, *stream] if piece.output is not None]
    assert [len(output.tokens) for output in outputs] == [12] * 5


def test_bad_settings_are_named() -> None:
    with pytest.raises(ValueError, match="drafts: expected 0, as there is no MTP module, got 1"):
        LLM(opinionated(num_nextn_predict_layers=0), drafts=1)
    with pytest.raises(ValueError, match="max_context: expected 1 to the model's 512, got 513"):
        LLM(opinionated(), max_context=513)
    with pytest.raises(ValueError, match="sampling 0: speculate: is True, but nothing drafts"):
        LLM(opinionated(num_nextn_predict_layers=0)).generate([[1]], Sampling(speculate=True, max_tokens=3))


@pytest.mark.slow
@pytest.mark.skipif(not can_compile(torch.device("cpu")), reason="no C++ compiler")
@pytest.mark.parametrize("drafts", [0, 2])
def test_the_compiled_step_is_the_eager_one(drafts: int) -> None:
    """Sequences that end early leave their rows unused; the output is the same."""
    model = opinionated()
    settings = [Sampling(max_tokens=n, temperature=0) for n in (3, 24, 11, 24, 7)]
    eager = LLM(model, drafts=drafts, compiled=False).generate(prompts(), settings)
    compiled = LLM(model, drafts=drafts, compiled=True, max_batch=3).generate(prompts(), settings)
    assert [o.tokens for o in compiled] == [o.tokens for o in eager]
