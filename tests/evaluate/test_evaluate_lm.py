"""The harness over our engine gives what it gives over transformers, whatever the texts and however it is cut short."""

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("lm_eval")

from evaluate_model import TEXTS
from lm_eval.api.instance import Instance
from tokenizers.processors import TemplateProcessing

from abyssal import LLM
from abyssal.evaluate.journal import Journal
from abyssal.evaluate.lm import EngineLM
from abyssal.evaluate.prefixes import common, states_of, tree
from abyssal.evaluate.score import Pair, fitted, score

GREEDY = {"until": ["\n"], "max_gen_toks": 12, "do_sample": False}


def instances(kind: str, arguments: list[tuple[Any, ...]]) -> list[Instance]:
    return [Instance(kind, {}, args, i) for i, args in enumerate(arguments)]


def ours(folder: Path, **settings: Any) -> EngineLM:
    return EngineLM(LLM(folder, drafts=0), quiet=True, **settings)


@pytest.fixture(scope="module", params=[False, True], ids=["plain", "with BOS"])
def both(request: pytest.FixtureRequest, folder: Path, folder_with_bos: Path) -> tuple[EngineLM, Any]:
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    from lm_eval.models.huggingface import HFLM

    chosen = folder_with_bos if request.param else folder
    tokenizer = transformers.AutoTokenizer.from_pretrained(chosen)
    if request.param:  # as the public checkpoints' own tokenizer classes do where add_bos_token is true
        bos = tokenizer.bos_token
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, 0)])
    peer = HFLM(pretrained=str(chosen), tokenizer=tokenizer, device="cpu", dtype="float32", batch_size=3)
    return ours(chosen), peer


def test_likelihoods_are_those_of_transformers(both: tuple[EngineLM, Any]) -> None:
    """Uneven lengths, continuations of many tokens and of one, shared contexts, no context, spaces at the seam, special
    tokens in the text, and more than the context holds."""
    mine, peer = both
    long = " ".join(TEXTS)
    asked = [
        ("The cat", " sat on the mat"), ("The cat", " looked"), ("The cat ", "sat"), ("", "The dog looked back."),
        ("", "<|begin_of_text|>The"), ("<|begin_of_text|>The dog", " sat"), ("Question: what", " is 3 + 4?\nAnswer: 7"),
        (long, " The answer is 7."), (long + "x", "!"), ("A", " B"), ("A", " C"), ("A", " B C D E F"),
        ("é ß", " 中文 🙂"), ("The<|end_of_text|>", " cat"),
    ]  # fmt: skip
    found = mine.loglikelihood(instances("loglikelihood", asked))
    expected = peer.loglikelihood(instances("loglikelihood", asked), disable_tqdm=True)
    for args, (logprob, greedy), (theirs, their_greedy) in zip(asked, found, expected):
        assert logprob == pytest.approx(theirs, abs=1e-4), args
        assert greedy == their_greedy, args


def test_rolling_likelihoods_are_those_of_transformers_past_the_context_too(both: tuple[EngineLM, Any]) -> None:
    mine, peer = both
    asked = [(TEXTS[0],), ("a",), (" ".join(TEXTS * 3),), (TEXTS[3] * 2,), ("",)]
    assert len(mine.tok_encode(asked[2][0])) > 3 * mine.max_length
    found = mine.loglikelihood_rolling(instances("loglikelihood_rolling", asked))
    expected = peer.loglikelihood_rolling(instances("loglikelihood_rolling", asked[:-1]), disable_tqdm=True)
    # A long text is a sum of hundreds of tokens: 1e-4 is of each window's.
    windows = [1, 1, 8, 3]
    for text, mine_, theirs, count in zip(asked, found, expected, windows):
        assert mine_ == pytest.approx(theirs, abs=1e-4 * count), text
    assert found[-1] == 0 or mine.tokenizer.adds_bos


def test_texts_are_those_of_transformers(both: tuple[EngineLM, Any]) -> None:
    mine, peer = both
    asked = [
        ("The cat", GREEDY), ("Question: what is", {**GREEDY, "until": ["e", "zz"]}),
        (" ".join(TEXTS), {"until": ["qq"], "max_gen_toks": 20}), ("def add(a, b):", {"until": [], "max_gen_toks": 9}),
    ]  # fmt: skip
    assert mine.generate_until(instances("generate_until", asked)) == peer.generate_until(
        instances("generate_until", asked), disable_tqdm=True
    )


def test_scores_of_a_batch_are_those_of_each_pair_alone(folder: Path) -> None:
    """However pairs are packed, and whichever inputs are beginnings of one another."""
    model = LLM(folder, dtype=torch.float64, drafts=0).model
    draw = random.Random(3)
    whole = [tuple(draw.randrange(300) for _ in range(40)) for _ in range(3)]
    pairs = []
    for _ in range(60):
        text = draw.choice(whole)
        end = draw.randrange(2, 40)
        begin = draw.randrange(1, end)
        pairs.append(Pair(text[:begin], (*text[begin : end - 1], draw.randrange(300))))
    found = dict(x for batch in score(model, pairs, 64, 100) for x in batch)
    assert sorted(found) == list(range(len(pairs)))
    for i, pair in enumerate(pairs):
        tokens = torch.tensor(pair.context + pair.targets)
        logits = model(tokens[:-1], [len(tokens) - 1]).log_softmax(-1)[-len(pair.targets) :]
        own = logits.gather(1, torch.tensor(pair.targets)[:, None]).sum()
        assert found[i].logprob == pytest.approx(float(own), abs=1e-9)
        assert found[i].greedy == bool((logits.argmax(-1) == torch.tensor(pair.targets)).all())


def test_what_questions_begin_with_is_computed_once(folder: Path) -> None:
    """Examples before all questions, and each question before its choices, in passes of 48 tokens of context."""
    model = LLM(folder, dtype=torch.float64, drafts=0).model
    draw = random.Random(5)
    examples = tuple(draw.randrange(300) for _ in range(18))
    questions = [tuple(draw.randrange(300) for _ in range(17 + i)) for i in range(3)]
    choices = [tuple(draw.randrange(300) for _ in range(2 + i)) for i in range(4)]
    pairs = [Pair(examples + question, choice) for question in questions for choice in choices]
    seen = []
    hook = model.embed.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape[0]))
    found = dict(x for batch in score(model, pairs, 64, 128) for x in batch)
    hook.remove()
    # A choice's last token predicts nothing; no choice begins another.
    assert sum(seen) == 18 + 17 + 18 + 19 + 3 * (1 + 2 + 3 + 4)
    for i, pair in enumerate(pairs):
        tokens = torch.tensor(pair.context + pair.targets)
        logits = model(tokens[:-1], [len(tokens) - 1]).log_softmax(-1)[-len(pair.targets) :]
        own = logits.gather(1, torch.tensor(pair.targets)[:, None]).sum()
        assert found[i].logprob == pytest.approx(float(own), abs=1e-9)


@given(
    st.sets(st.lists(st.integers(0, 2), min_size=1, max_size=9).map(tuple), min_size=1, max_size=12), st.integers(1, 4)
)
def test_a_tree_holds_every_sequence_and_nothing_twice(some: set[tuple[int, ...]], least: int) -> None:
    whole = sorted(some)
    sequences = [a for a, b in zip(whole, [*whole[1:], ()]) if common(a, b) < len(a)]
    segments, last = tree(sequences, least)
    for sequence, at in zip(sequences, last):
        read, end = [], len(sequence)
        while at >= 0:
            s = segments[at]
            assert s.end == end and s.start < s.end and s.before < at
            read[:0], at, end = sequences[s.sequence][s.start : s.end], s.before, s.start
        assert tuple(read) == sequence and end == 0
    begins = [sequences[s.sequence][: s.end] for s in segments if s.before >= 0 or least == 1]
    assert len(set(begins)) == len(begins) or least > 1
    assert all(s.end - s.start >= least for i, s in enumerate(segments) if i in {t.before for t in segments})


def test_states_are_placed_by_token(folder: Path) -> None:
    model = LLM(folder, dtype=torch.float64, drafts=0).model
    front = tuple(range(20, 40))
    sequences = [(*front, 5), (*front, 6, 7), (50, 51)]
    states, places = states_of(model, sequences, 1000)
    assert states.shape[0] == 20 + 1 + 2 + 2
    for own, rows in zip(sequences, places):
        alone, _ = states_of(model, [own], 1000)
        torch.testing.assert_close(states[torch.as_tensor(rows)], alone)


def test_a_pass_holds_no_more_tokens_than_asked_and_shared_beginnings_once(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = LLM(folder, drafts=0).model
    sizes: list[int] = []
    hidden = model.hidden
    monkeypatch.setattr(model, "hidden", lambda t, p: sizes.append(len(t)) or hidden(t, p))
    context = tuple(range(20))
    list(score(model, [Pair(context, (letter,)) for letter in range(4)], 64, 50))
    assert sizes == [20]
    sizes.clear()
    list(score(model, [Pair((i, *context), (1,)) for i in range(5)], 64, 50))
    assert sizes == [42, 42, 21]


def test_what_does_not_fit_loses_its_first_tokens_and_that_is_counted(folder: Path) -> None:
    lm = ours(folder, max_length=16)
    long = TEXTS[3]
    total = sum(map(len, vars(lm._pair(long, " home")).values()))
    cut = lm.loglikelihood(instances("loglikelihood", [(long, " home")]))
    assert (lm.counts.truncated, lm.counts.truncated_tokens) == (1, total - 1 - 16)
    pair = lm._pair(long, " home")
    kept = 17 - len(pair.targets)
    alone = ours(folder)._loglikelihood_tokens([(None, pair.context[-kept:], pair.targets)])
    assert cut[0] == pytest.approx(alone[0])
    lm.generate_until(instances("generate_until", [(long, {"until": [], "max_gen_toks": 100})]))
    assert lm.counts.shortened == 1 and lm.counts.truncated == 2


def test_a_continuation_longer_than_the_context_and_one_without_tokens_are_refused_by_name(folder: Path) -> None:
    lm = ours(folder, max_length=8)
    with pytest.raises(ValueError, match=r"continuation of \d+ tokens exceeds the context of 8"):
        lm.loglikelihood(instances("loglikelihood", [("a", TEXTS[3])]))
    with pytest.raises(ValueError, match="no token of its own"):
        lm.loglikelihood(instances("loglikelihood", [("a", "")]))
    with pytest.raises(ValueError, match="at least one token each"):
        fitted(Pair((), (1,)), 8)
    with pytest.raises(ValueError, match="num_beams = 4"):
        lm.generate_until(instances("generate_until", [("a", {"num_beams": 4})]))


def test_sampled_texts_differ_between_repeats_and_are_the_same_again(folder: Path) -> None:
    warm = {"until": [], "max_gen_toks": 8, "do_sample": True, "temperature": 1.0}
    asked = instances("generate_until", [("The cat", warm)] * 3 + [("The dog", warm)])
    first = ours(folder, seed=5).generate_until(asked)
    assert len(set(first[:3])) == 3
    assert ours(folder, seed=5).generate_until(asked) == first
    assert ours(folder, seed=6).generate_until(asked) != first


def test_an_evaluation_cut_short_goes_on_where_it_was(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed after some answers and in the middle of a line, it asks only for the others, and answers are the same,
    sampled ones too."""
    warm = {"until": [], "max_gen_toks": 5, "do_sample": True, "temperature": 1.0}
    likely = instances("loglikelihood", [("The cat", f" {n} dogs") for n in range(9)])
    texts = instances("generate_until", [(f"The {n}", dict(warm)) for n in range(3) for _ in range(2)])
    whole = ours(folder)
    expected = whole.loglikelihood(likely), whole.generate_until(texts)

    path = tmp_path / "answers.jsonl"
    first = ours(folder, answers=path, name="a", batch_tokens=16)
    put, count = Journal.put, iter(range(100))

    def dies(self: Journal, answers: list) -> None:
        if next(count) == 3:
            raise KeyboardInterrupt
        put(self, answers)

    monkeypatch.setattr(Journal, "put", dies)
    with pytest.raises(KeyboardInterrupt):
        first.loglikelihood(likely)
    monkeypatch.setattr(Journal, "put", put)
    with path.open("ab") as stream:
        stream.write(b'{"key": "ab')
    second = ours(folder, answers=path, name="a")
    assert second.loglikelihood(likely) == [(pytest.approx(l, abs=1e-5), g) for l, g in expected[0]]
    assert 0 < second.counts.reused < 9
    assert second.generate_until(texts[:3]) == expected[1][:3]
    third = ours(folder, answers=path, name="a")
    assert third.generate_until(texts) == expected[1] and third.counts.reused == 3
    assert all(json.loads(line) for line in path.read_text().splitlines())


def test_answers_of_another_model_precision_or_code_are_not_taken(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = instances("loglikelihood", [("The cat", " sat")])
    path = tmp_path / "answers.jsonl"
    ours(folder, answers=path, name="a").loglikelihood(asked)
    for other in (ours(folder, answers=path, name="b"), ours(folder, answers=path, name="a", max_length=32)):
        other.loglikelihood(asked)
        assert other.counts.reused == 0
    double = EngineLM(LLM(folder, dtype=torch.float64, drafts=0), answers=path, name="a", quiet=True)
    double.loglikelihood(asked)
    assert double.counts.reused == 0
    same = ours(folder, answers=path, name="a")
    same.loglikelihood(asked)
    assert same.counts.reused == 1
    with pytest.raises(ValueError, match="name: answers are kept by the name"):
        ours(folder, answers=path)
    monkeypatch.setattr("abyssal.evaluate.lm.code_digest", lambda *parts: "other")
    changed = ours(folder, answers=path, name="a")
    changed.loglikelihood(asked)
    assert changed.counts.reused == 0


def test_a_file_that_is_no_journal_is_refused_by_its_line(tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    path.write_text('{"key": "a", "answer": 1}\n{"question": "?"}\n')
    with pytest.raises(ValueError, match=r"answers.jsonl: line 2: expected an answer"):
        Journal(path, "")


def test_a_conversation_is_rendered_by_the_checkpoints_template_and_may_be_begun(folder: Path) -> None:
    lm = ours(folder)
    asked = [{"role": "user", "content": "2 + 2?"}]
    assert lm.apply_chat_template(asked) == "<|begin_of_text|><|user|>2 + 2?<|assistant|>"
    begun = [*asked, {"role": "assistant", "content": "It is"}]
    assert lm.apply_chat_template(begun, False) == "<|begin_of_text|><|user|>2 + 2?<|assistant|>It is"
    assert lm.tok_encode("<|begin_of_text|><|user|>a")[:2] == [0, 2]


def test_a_few_texts_are_not_worth_compiling_and_many_are(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the engine counts, any of these would be; what the user says is kept."""
    from abyssal.evaluate import lm as module

    monkeypatch.setattr(module, "can_compile", lambda device: True)
    mine, compiled = ours(folder), []
    monkeypatch.setattr(LLM, "stream", lambda self, prompts, sampling: compiled.append(self.compiled) or iter(()))
    for count in (20, 5000):
        list(mine._texts([("The", {"until": [], "max_gen_toks": 60})] * count, [0] * count))
    mine.llm.compiled = True
    list(mine._texts([("The", {})], [0]))
    assert compiled == [False, True, True] and mine.llm.compiled is True
