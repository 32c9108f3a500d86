"""The engine on a GPU: captured steps, a step ahead of the host, give what operation by operation gives."""

import itertools
import random

import pytest
import torch

from abyssal import LLM, ModelConfig, Sampling
from abyssal.engine.engine import Engine
from abyssal.engine.options import Options
from abyssal.engine.request import Output, Request
from abyssal.model.transformer import Transformer

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

GREEDY = Sampling(max_tokens=24, temperature=0)


def make(dtype: torch.dtype = torch.float32, **changes: object) -> Transformer:
    config = ModelConfig.load("tiny").replace(initializer_range=0.1, **changes)
    return Transformer(config).init_weights(torch.Generator().manual_seed(0)).cuda().to(dtype)


def hopper_shaped() -> Transformer:
    """Latents of 512 + 64 and experts of bf16, so that the fast kernels run."""
    wide = {"kv_lora_rank": 512, "qk_rope_head_dim": 64, "qk_nope_head_dim": 128, "v_head_dim": 128,
            "hidden_size": 512, "num_attention_heads": 16, "num_key_value_heads": 16, "moe_intermediate_size": 256,
            "n_routed_experts": 32, "q_lora_rank": None, "n_group": 1, "topk_group": 1,
            "max_position_embeddings": 2048}  # fmt: skip
    return make(torch.bfloat16, **wide)


def prompts(count: int, most: int = 200, vocab: int = 512) -> list[list[int]]:
    draw = random.Random(1)
    return [[draw.randrange(vocab) for _ in range(draw.randint(1, most))] for _ in range(count)]


def run(engine: Engine, requests: list[Request]) -> list[Output]:
    for request in requests:
        engine.add(request)
    done = {}
    while engine.busy:
        done |= {(p.index, p.sample): p.output for p in engine.step() if p.output is not None}
    return [done[r.id, i] for r in requests for i in range(r.sampling.n)]


@pytest.mark.parametrize("drafts", [0, 1, 3])
def test_greedy_output_is_the_cpu_s(drafts: int) -> None:
    """Twelve requests over five slots in float32, with the prefix cache, preemption and speculation."""
    model = make()
    texts = prompts(9) + prompts(3)
    cpu = Transformer(model.config).to(torch.float32)
    cpu.load_state_dict({k: v.cpu() for k, v in model.state_dict().items()})
    expected = [o.tokens for o in LLM(cpu, drafts=0, compiled=False).generate(texts, GREEDY)]
    options = Options(pages=16, running=5, context=400, drafts=drafts, step_tokens=100, adapt=False)
    engine = Engine(model, None, options)
    outputs = run(engine, [Request(i, tuple(p), GREEDY) for i, p in enumerate(texts)])
    assert [o.tokens for o in outputs] == expected
    assert engine.pages.free == 15 and engine.metrics.device_seconds > 0


def test_captured_steps_are_the_eager_ones() -> None:
    model = make(torch.bfloat16)
    found = []
    for graphs in (True, False):
        engine = Engine(model, None, Options(pages=40, running=4, context=400, drafts=2, adapt=False))
        if not graphs:
            engine.runner.graphs = None
        found.append([o.tokens for o in run(engine, [Request(i, tuple(p), GREEDY) for i, p in enumerate(prompts(4))])])
    assert found[0] == found[1]


def test_an_abort_while_a_step_is_on_its_way_disturbs_nobody() -> None:
    model, texts = make(), prompts(6)
    engine = Engine(model, None, Options(pages=40, running=6, context=400, drafts=1, adapt=False))
    expected = [o.tokens for o in run(engine, [Request(i, tuple(p), GREEDY) for i, p in enumerate(texts)])]
    for i, p in enumerate(texts):
        engine.add(Request(i, tuple(p), GREEDY))
    done = {}
    for step in itertools.count():
        if not engine.busy:
            break
        done |= {p.index: p.output for p in engine.step() if p.output is not None}
        if step in (1, 3, 5):
            engine.abort(step)
            engine.add(Request(10 + step, tuple(texts[step]), GREEDY))
    for i in (0, 2, 4):
        assert done[i].tokens == expected[i]
    for i in (1, 3, 5):
        assert done[i].finish == "abort" and done[10 + i].tokens == expected[i]
    assert engine.pages.free == 39


def test_sampled_requests_with_every_setting_run_captured() -> None:
    model = make(torch.bfloat16)
    engine = Engine(model, None, Options(pages=60, running=8, context=400, drafts=1))
    common = {"max_tokens": 12, "temperature": 0.9, "top_p": 0.9, "top_k": 40, "min_p": 0.01, "seed": 1}
    asked = [
        Sampling(**common), Sampling(**common, repetition_penalty=1.2, frequency_penalty=0.5),
        Sampling(**common, logit_bias={3: 5.0}), Sampling(**common, logprobs=4), Sampling(**common, n=2),
    ]  # fmt: skip
    requests = [Request(i, (1, 2, 3, 4), s) for i, s in enumerate(asked)]
    first, second = ([o.tokens for o in run(engine, requests)] for _ in range(2))
    assert first == second and first[0] == first[3] == first[4]  # a seed is a seed, whatever else is asked
    assert {len(t) for t in first} == {12}


def test_sampled_output_has_the_model_s_distribution_with_steps_captured_at_the_start() -> None:
    """Over a vocabulary of 6 in float32: two tokens of many requests that come while others decode, drawn with drafts,
    against exact probabilities."""
    model = make(vocab_size=6)
    cpu = Transformer(model.config).double()
    cpu.load_state_dict({k: v.cpu() for k, v in model.state_dict().items()})

    def after(tokens: list[int]) -> torch.Tensor:
        return (cpu(torch.tensor(tokens), [len(tokens)])[-1] / 1.3).softmax(-1)

    prompt, draws = [1, 3, 2], 4000
    first = after(prompt)
    exact = {(a, b): float(first[a] * after([*prompt, a])[b]) for a in range(6) for b in range(6)}
    random.seed(7)
    llm = LLM(model, max_batch=48, drafts=1, adapt=False, max_context=64)
    outputs = llm.generate([prompt] * draws, Sampling(max_tokens=2 + 3, temperature=1.3))
    assert 0 < llm.totals.accepted < llm.totals.drafted
    seen = dict.fromkeys(exact, 0)
    for o in outputs:
        seen[o.tokens[0], o.tokens[1]] += 1
    chi2 = sum((seen[pair] - draws * p) ** 2 / (draws * p) for pair, p in exact.items())
    assert chi2 < 35 + 4.5 * (2 * 35) ** 0.5


def test_deterministic_output_is_the_same_to_the_bit_whatever_the_mates() -> None:
    """In bf16, on the shapes of the fast kernels: logits of every token, alone, in company, in pieces, from the prefix
    cache, after preemption, with and without drafts."""
    model = hopper_shaped()
    texts = prompts(7, most=150)
    asked = Sampling(max_tokens=20, temperature=0, logprobs=2)

    def texts_of(pages: int, step_tokens: int, drafts: int, order: list[int], together: bool) -> dict[int, object]:
        options = Options(pages=pages, running=8, context=400, drafts=drafts, step_tokens=step_tokens, adapt=False,
                          deterministic=True)  # fmt: skip
        engine, found = Engine(model, None, options), {}
        groups = [order] if together else [[i] for i in order]
        for group in groups:
            outputs = run(engine, [Request(i, tuple(texts[i]), asked) for i in group])
            found |= {i: (o.tokens, o.logprobs) for i, o in zip(group, outputs)}
        return found

    alone = texts_of(40, 512, 0, list(range(7)), together=False)
    assert texts_of(40, 512, 0, list(range(7)), together=True) == alone
    assert texts_of(40, 24, 0, [3, 1, 0, 6, 5, 2, 4], together=True) == alone
    assert texts_of(7, 512, 0, list(range(7)), together=True) == alone  # preemption
    again = texts_of(40, 512, 0, [*range(7), *range(7)], together=False)  # the second time from the prefix cache
    assert again == alone


def test_the_pool_is_what_is_free() -> None:
    llm = LLM(make(torch.bfloat16), max_batch=4)
    engine = llm.start()
    assert engine.options.pages > 4
    assert [len(o.tokens) for o in llm.generate(prompts(6), GREEDY)] == [24] * 6
