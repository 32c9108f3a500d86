"""Texts that must match: a JSON schema, a regular expression or a Lark grammar, as masks over the next token.

llguidance keeps the automata (the extra `abyssal[grammar]`, imported on first use); this is what the engine asks of
them, and the limits on what a stranger's grammar may cost. `masks` gives the tokens allowed now and after each draft,
so that a step verifies its drafts against the constrained distribution; `accept` moves on.

Ids that end a text are kept from llguidance, which is given an end of its own beyond the vocabulary: they are allowed
exactly where the text may end. Control tokens, as `<|user|>`, never stand for their letters; a Lark grammar may name
one. Where the grammar leaves only one way on, llguidance allows only the tokens that its bytes are usually made of.

What bounds a compilation: the grammar's bytes; `multiple_of_limit`; `FUEL`, `STATES` and llguidance's own limits on
items, symbols and depth; a stack that grows with the bytes allowed; and the clock. One that the clock has given up
runs on in its thread until one of the others ends it: `COMPILING` at once, further ones are refused.
"""

import json
import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from decimal import Decimal
from math import lcm
from typing import Any

import numpy as np
from numpy.typing import NDArray

from abyssal.data.tokenizer import Tokenizer
from abyssal.engine.sampling import Grammar

FUEL = 200_000  # nodes of the lexer's expressions: about 10 ms of compiling, and bounds the first step after it
STATES = 50_000  # states of the lexer: 1 to 2 kB each
MULTIPLES = 20_000  # remainders to be told apart for `multipleOf`: about 0.1 s of compiling
SPACES = r"[\x20\x0A\x0D\x09]{1,64}"  # between JSON's tokens; without a bound a weak model may write spaces for ever
COMPILING = 2  # compilations at once
CACHED = 64  # compiled grammars
STACK_A_BYTE = 4096  # of the compiling thread: a byte of grammar can be a level of recursion, of up to 1 kB

Words = NDArray[np.int32]


class GrammarError(ValueError):
    """A grammar that cannot be compiled or followed, or a token that it forbids."""


class GrammarsBusy(GrammarError):
    """As many others are being compiled as may: nothing is wrong with this one, which may be tried again."""


class Grammars:
    """Compiles grammars for one tokenizer. May be called from several threads."""

    def __init__(
        self, tokenizer: Tokenizer, vocab: int, ends: frozenset[int], max_bytes: int = 65536, seconds: float = 2.0
    ) -> None:
        """`vocab`: the width of the model's logits, of which ids from the tokenizer's `vocab_size` on are never
        allowed; `ends`: the ids that end a text; `max_bytes` and `seconds`: of one grammar."""
        if vocab < tokenizer.vocab_size:
            raise ValueError(f"vocab: expected at least the tokenizer's {tokenizer.vocab_size}, got {vocab}")
        self._tokenizer = tokenizer
        self._vocab = vocab
        self._ends = frozenset(end for end in ends if 0 <= end < tokenizer.vocab_size)
        self._max_bytes, self._seconds = max_bytes, seconds
        self._compiled: OrderedDict[Grammar, Constraint] = OrderedDict()
        self._lock = threading.Lock()
        self._slots = threading.BoundedSemaphore(COMPILING)
        self._vocabulary: _Vocabulary | None = None

    def compile(self, grammar: Grammar) -> "Constraint":
        """A constraint at the beginning of its text. Raises GrammarError naming what is wrong, and
        GrammarsBusy where it has to wait for too long."""
        with self._lock:
            found = self._compiled.get(grammar)
            if found is not None:
                self._compiled.move_to_end(grammar)
                return found.fork()
        source = self._source(grammar)
        found = self._within_seconds(source, f"grammar ({grammar.kind})")
        with self._lock:
            self._compiled[grammar] = found
            while len(self._compiled) > CACHED:
                self._compiled.popitem(last=False)
            return found.fork()

    def _source(self, grammar: Grammar) -> str:
        """llguidance's form of a grammar, after the checks that need no compiling."""
        name, text = f"grammar ({grammar.kind})", grammar.text
        try:
            size = len(text.encode())
        except UnicodeEncodeError:
            raise GrammarError(f"{name}: expected text that UTF-8 can hold, got half a surrogate pair") from None
        if size > self._max_bytes:
            raise GrammarError(f"{name}: expected at most {self._max_bytes} bytes, got {size}")
        if grammar.kind == "json":
            if text:
                raise GrammarError(f"{name}: expected no text, got {size} bytes; a schema has kind 'json_schema'")
            return _json_source('{"type": "object"}')
        if grammar.kind == "json_schema":
            check_schema(_parse(text, 0, name, whole=True), name)
            return _json_source(text)
        if grammar.kind == "regex":
            return _library().LLMatcher.grammar_from_regex(text)
        if grammar.kind == "lark":
            at = text.find("%json")
            while at >= 0:
                check_schema(_parse(text, at + len("%json"), f"{name}: %json"), f"{name}: %json")
                at = text.find("%json", at + 1)
            # In full, because a bare text that begins with a brace would be taken for llguidance's own JSON.
            return json.dumps({"grammars": [{"lark_grammar": text}]})
        raise GrammarError(f"grammar: expected kind json, json_schema, regex or lark, got {grammar.kind!r}")

    def _within_seconds(self, source: str, name: str) -> "Constraint":
        vocabulary = self._llguidance()
        if not self._slots.acquire(timeout=self._seconds):
            raise GrammarsBusy(f"{name}: {COMPILING} other grammars are being compiled; try again later")
        results: list[Constraint | Exception] = []
        done = threading.Event()

        def work() -> None:
            try:
                results.append(_compiled(vocabulary, source))
            except Exception as error:
                results.append(error)
            finally:
                self._slots.release()
                done.set()

        _start(work, max(STACK_A_BYTE * self._max_bytes, 64 << 20))
        if not done.wait(self._seconds):
            raise GrammarError(f"{name}: expected to compile within {self._seconds:g} s")
        if isinstance(results[0], Exception):
            raise GrammarError(f"{name}: {results[0]}") from results[0]
        return results[0]

    def _llguidance(self) -> "_Vocabulary":
        with self._lock:
            if self._vocabulary is None:
                self._vocabulary = _Vocabulary(self._tokenizer, self._vocab, self._ends)
            return self._vocabulary


class Constraint:
    """Where one running text stands in its grammar. For one thread at a time."""

    def __init__(self, matcher: Any, vocabulary: "_Vocabulary", ended: bool = False) -> None:
        self._matcher = matcher  # an LLMatcher, which never sees an end
        self._vocabulary = vocabulary
        self._ended = ended
        self._now: Words | None = None  # what may follow, once it was asked for

    def masks(self, drafts: Sequence[int], out: Words) -> int:
        """Fills `out [1 + len(drafts), ceil(vocab / 32)]` int32: bit i % 32 of word i // 32 is set where token i is
        allowed, in row j after `drafts[:j]`. Returns how many drafts the grammar allows (not one that would take it
        past a limit); the rows after the first that it forbids repeat that draft's row.

        The state stays as it was. No row is empty: a text that can only end allows the ends. Raises GrammarError
        where nothing may follow: the text is at a dead end or past a limit, or there are no ends.
        """
        words = self._vocabulary.words
        if out.dtype != np.int32 or out.shape != (1 + len(drafts), words):
            raise ValueError(f"out: expected int32 [{1 + len(drafts)}, {words}], got {out.dtype} {list(out.shape)}")
        row = self._allowed()
        if not row.any():
            raise GrammarError("grammar: the text is complete, and there is no end-of-text token to say so")
        out[0] = row
        ahead, allowed = self.fork(), 0  # a copy costs microseconds, and leaves this one alone whatever a draft does
        for draft in drafts:
            try:
                ahead.accept(draft)
                following = ahead._allowed()
            except GrammarError:
                break
            allowed += 1
            row = following if following.any() else row  # complete, and without ends: what follows is never used
            out[allowed] = row
        out[allowed + 1 :] = row
        return allowed

    def accept(self, token: int) -> None:
        """Moves on by one token. Raises GrammarError and stays if the grammar forbids it here; raises, and from then
        on always, if it takes the grammar past a limit."""
        if not _has(self._allowed(), token):
            raise GrammarError(f"grammar: token {token} is not allowed here")
        if token in self._vocabulary.ends:
            self._ended = True
        else:
            self._consume(token)
        self._now = None

    @property
    def finished(self) -> bool:
        """Whether the text is over: an end was accepted, or nothing but an end may follow."""
        return self._ended or not (self._allowed() & ~self._vocabulary.ends_row).any()

    def fork(self) -> "Constraint":
        """Another text at the same place, that goes its own way."""
        copied = Constraint(self._matcher.deep_copy(), self._vocabulary, self._ended)
        copied._now = self._now
        return copied

    def _allowed(self) -> Words:
        if self._now is None:
            self._now = self._vocabulary.ends_row if self._ended else self._compute()
        return self._now

    def _compute(self) -> Words:
        """What may follow the matcher's text; empty only where that can only end and there are no ends."""
        vocabulary, matcher = self._vocabulary, self._matcher
        row = np.zeros(vocabulary.matcher_words, dtype=np.int32)
        accepting = matcher.is_accepting()
        matcher.unsafe_compute_mask_ptr(row.ctypes.data, row.nbytes)
        row = row[: vocabulary.words] & vocabulary.usable
        if matcher.is_error() or not (accepting or row.any()):
            raise GrammarError(f"grammar: no token may follow: {_reason(matcher)}")
        return row | vocabulary.ends_row if accepting else row

    def _consume(self, token: int) -> None:
        if not self._matcher.consume_token(token):
            raise GrammarError(f"grammar: token {token}: {_reason(self._matcher)}")


class _Vocabulary:
    """The tokenizer as llguidance takes it, and which ids are what, as bits."""

    def __init__(self, tokenizer: Tokenizer, vocab: int, ends: frozenset[int]) -> None:
        # As in `Tokenizer.encode`: added tokens of one character are letters unless they are marked special.
        control = {token["id"] for token in tokenizer._added if token["special"] or len(token["content"]) > 1}
        spelled = [b"" if id in ends else _bytes_of(tokenizer, id) for id in range(tokenizer.vocab_size)]
        self.ends = ends
        self.words = -(-vocab // 32)
        self.matcher_words = -(-(vocab + 1) // 32)
        self.ends_row = _bits(sorted(ends), self.words)
        self.usable = _bits([id for id, spelling in enumerate(spelled) if spelling], self.words)
        source = _Source(tokenizer, [*spelled, *[b""] * (vocab - len(spelled)), b"<|end|>"], control - ends)
        self.llguidance = _library().LLTokenizer(source, n_vocab=vocab + 1, eos_token=vocab)


class _Source:
    """What llguidance reads of a tokenizer; the attributes' names are its own."""

    is_tokenizer_wrapper = True
    bos_token_id = None

    def __init__(self, tokenizer: Tokenizer, tokens: list[bytes], control: set[int]) -> None:
        self.tokens = tokens
        self.eos_token_id = len(tokens) - 1
        self.special_token_ids = [*sorted(control), self.eos_token_id]
        self._tokenizer = tokenizer

    def __call__(self, text: str | bytes) -> list[int]:
        return self._tokenizer.encode(text.decode() if isinstance(text, bytes) else text)


def check_schema(schema: Any, name: str) -> None:
    """Raises GrammarError for a `$ref` out of the schema, and for more remainders than `MULTIPLES`."""
    multiples = []
    for key, value in _fields(schema):
        if key in ("$ref", "$dynamicRef", "$recursiveRef") and isinstance(value, str) and not value.startswith("#"):
            raise GrammarError(f"{name}: $ref {value[:100]!r}: expected one within the schema (#...); none is fetched")
        if key == "multipleOf" and isinstance(value, int | Decimal) and not isinstance(value, bool):
            multiples.append(Decimal(value))
    # Schemas that hold together need a remainder of their common multiple, in units of the finest decimal.
    finest = min((int(number.normalize().as_tuple().exponent) for number in multiples), default=0)
    finest = min(finest, 0)
    fits = finest > -20 and all(number > 0 and number.adjusted() - finest < 10 for number in multiples)
    if not fits or lcm(*(abs(int(number.scaleb(-finest))) for number in multiples)) > MULTIPLES:
        raise GrammarError(
            f"{name}: multipleOf: expected a common multiple of at most {MULTIPLES}, counted in the last decimal"
        )


def _fields(schema: Any) -> Iterator[tuple[str, Any]]:
    """Every key and value of a JSON value, at any depth."""
    left = [schema]
    while left:
        value = left.pop()
        if isinstance(value, dict):
            yield from value.items()
            left.extend(value.values())
        elif isinstance(value, list):
            left.extend(value)


def _parse(text: str, at: int, name: str, whole: bool = False) -> Any:
    """The JSON value in `text` from `at` on, its numbers with a point or exponent as Decimal."""

    def fields(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len({key for key, _ in pairs}) < len(pairs):
            raise GrammarError(f"{name}: expected each key once in an object")
        return dict(pairs)

    decoder = json.JSONDecoder(parse_float=Decimal, object_pairs_hook=fields)
    at += len(text[at:]) - len(text[at:].lstrip())
    try:
        value, end = decoder.raw_decode(text, at)
    except GrammarError:
        raise
    except RecursionError:
        raise GrammarError(f"{name}: too deeply nested") from None
    except ValueError as error:  # of JSON, and of integers too long
        raise GrammarError(f"{name}: malformed JSON: {error}") from None
    if whole and text[end:].strip():
        raise GrammarError(f"{name}: expected the schema to end at character {end}, got {text[end:].strip()[:20]!r}")
    if not isinstance(value, dict):
        raise GrammarError(f"{name}: expected an object, got {type(value).__name__}")
    return value


def _json_source(schema: str) -> str:
    try:
        source: str = _library().LLMatcher.grammar_from_json_schema(schema, defaults={"whitespace_pattern": SPACES})
    except ValueError as error:  # serde's limit of depth, lower than Python's
        raise GrammarError(f"grammar (json_schema): {error}") from None
    return source


def _compiled(vocabulary: _Vocabulary, source: str) -> Constraint:
    """Compiles, and tries the first step: much of the work, and many a limit, come only there."""
    library = _library()
    limits = library.LLParserLimits(initial_lexer_fuel=FUEL, max_lexer_states=STATES, verbose_errors=False)
    matcher = library.LLMatcher(vocabulary.llguidance, source, log_level=0, limits=limits)
    if matcher.is_error():
        raise GrammarError(_reason(matcher))
    fresh = Constraint(matcher.deep_copy(), vocabulary)
    Constraint(matcher, vocabulary)._allowed()
    return fresh


def _start(work: Any, stack: int) -> None:
    """Runs `work` in a thread with a stack of `stack` bytes, which no exit of the process waits for."""
    before = threading.stack_size(stack)
    try:
        threading.Thread(target=work, name="grammar", daemon=True).start()
    finally:
        threading.stack_size(before)


def _library() -> Any:
    try:
        import llguidance
    except ImportError as error:
        raise GrammarError("grammar: llguidance is not installed: pip install 'abyssal[grammar]'") from error
    return llguidance


def _reason(matcher: Any) -> str:
    """llguidance's words, in one line."""
    words = matcher.get_error().replace("<non-verbose/>", "").strip() or matcher.stop_reason()
    return "no text matches" if words in ("NoExtension", "NoExtensionBias") else " / ".join(words.split("\n"))[:500]


def _bytes_of(tokenizer: Tokenizer, id: int) -> bytes:
    try:
        return tokenizer.token_bytes(id)
    except ValueError:  # a gap among the ids
        return b""


def _bits(ids: Sequence[int], words: int) -> Words:
    bits = np.zeros(words * 32, dtype=np.uint8)
    bits[list(ids)] = 1
    return np.packbits(bits, bitorder="little").view("<i4").astype(np.int32)


def _has(row: Words, token: int) -> bool:
    return 0 <= token < 32 * len(row) and bool(row[token // 32] >> (token % 32) & 1)
