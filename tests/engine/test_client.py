"""The engine in a process of its own and who asks it: a real worker over a tiny model, and each side without the other.
Whatever fails, nobody waits for ever."""

import asyncio
import io
import json
import os
import random
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeVar

import pytest
import torch

from abyssal import LLM, ModelConfig, Sampling
from abyssal.data import Tokenizer
from abyssal.engine.client import AsyncEngine, EngineDead, EngineInfo, EngineSettings, QueueFull, Refused, RequestStream
from abyssal.engine.constraint import GrammarsBusy
from abyssal.engine.messages import ENTRIES, GROUP, Assembly, from_sampling, lines
from abyssal.engine.request import Output, Piece, Request, TokenLogprob
from abyssal.engine.sampling import Grammar
from abyssal.engine.worker import Worker
from abyssal.model.transformer import Transformer

Value = TypeVar("Value")
PAGES = 12  # fewer than the model's context takes
PROMPT = [random.Random(0).randrange(3, 300) for _ in range(400)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("client") / "tiny"
    config = ModelConfig.load("tiny").replace(max_position_embeddings=1024)
    model = Transformer(config).init_weights(torch.Generator().manual_seed(0))
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.data.mul_(5)  # at their usual size every prompt goes on alike
    model.save(folder)
    Tokenizer.train(["the sea keeps one small vector for a token and reads it again " * 20], 320).save(folder)
    return folder


class Real:
    """A worker, and the loop that its client lives in."""

    def __init__(self, settings: EngineSettings) -> None:
        self.runner = asyncio.Runner()
        self.engine = self.run(AsyncEngine.start(settings))
        self.sizes: list[int] = []
        assert self.engine._process.stdout is not None
        own = self.engine._process.stdout.readline

        async def readline() -> bytes:
            text = await own()
            self.sizes.append(len(text))
            return text

        self.engine._process.stdout.readline = readline  # type: ignore[method-assign]

    def run(self, work: Coroutine[Any, Any, Value]) -> Value:
        async def bounded() -> Value:
            return await asyncio.wait_for(work, 60)

        return self.runner.run(bounded())

    def outputs(self, prompt: list[int], sampling: Sampling) -> list[Output]:
        async def ask() -> list[Output]:
            return await outputs(self.engine.submit(prompt, sampling))

        return self.run(ask())


async def outputs(stream: RequestStream) -> list[Output]:
    found = [piece.output async for piece in stream if piece.output is not None]
    return sorted(found, key=lambda output: output.sample)


@pytest.fixture(scope="module")
def real(folder: Path) -> Iterator[Real]:
    row = 3 * (24 + 8) * 4  # bytes: layers, of latents and rotary keys, in float32
    settings = EngineSettings(str(folder), cache_bytes=PAGES * 64 * row, drafts=0, max_waiting=4)
    real = Real(settings)
    yield real
    real.run(real.engine.close())
    real.runner.close()


# ---- both ---------------------------------------------------------------------------------------------------------


def test_an_output_is_the_engines_own_put_together_again(real: Real, folder: Path) -> None:
    llm = LLM(folder, drafts=0, compiled=False)
    for sampling in (
        Sampling(30, n=3, seed=5, logprobs=3, prompt_logprobs=2, stop=("e", "an")),
        Sampling(30, temperature=0, logprobs=0, ignore_eos=True),
        Sampling(30, temperature=0, n=2),
    ):
        prompt = PROMPT[:100]
        found, expected = real.outputs(prompt, sampling), llm.generate([prompt], sampling)
        assert len(found) == sampling.n
        for own, other in zip(found, expected):
            assert (own.prompt_tokens, own.tokens, own.text) == (prompt, other.tokens, other.text)
            assert (own.finish, own.stop, own.sample, own.error) == (other.finish, other.stop, other.sample, None)
            close(own.logprobs, other.logprobs)
            close(own.prompt_logprobs, other.prompt_logprobs)


def close(own: Any, other: Any) -> None:
    if other is None:
        assert own is None
        return
    assert len(own) == len(other)
    for one, expected in zip(own, other):
        assert (one is None) == (expected is None)
        if expected is not None:
            assert one.token == expected.token and one.logprob == pytest.approx(expected.logprob, abs=1e-3)
            assert [v for _, v in one.top] == pytest.approx([v for _, v in expected.top], abs=1e-3)


def test_no_line_is_long_and_a_prompts_logprobs_come_once(real: Real) -> None:
    real.sizes.clear()
    found = real.outputs(PROMPT, Sampling(2, n=4, temperature=0, prompt_logprobs=20))
    assert all(len(output.prompt_logprobs or ()) == len(PROMPT) for output in found)
    assert all(output.prompt_logprobs is found[0].prompt_logprobs for output in found)
    each = 40  # bytes
    assert max(real.sizes) < ENTRIES * each
    assert sum(real.sizes) < 1.5 * len(PROMPT) * 21 * each


def test_what_the_worker_refuses_is_no_failure(real: Real) -> None:
    with pytest.raises(Refused, match="grammar") as refused:
        real.outputs([5], Sampling(grammar=Grammar("regex", "(")))
    assert refused.value.blamed == "grammar"
    with pytest.raises(Refused, match=r"^speculate: is True") as refused:
        real.outputs([5], Sampling(speculate=True, n=3))
    assert refused.value.blamed == "request"
    assert real.engine._samples == 0 and not real.engine._streams
    assert [output.finish for output in real.outputs([5], Sampling(3, ignore_eos=True))] == ["length"]


def test_the_context_is_what_the_pool_holds(real: Real) -> None:
    most = real.engine.info.max_context
    assert PAGES * 64 / 2 < most < PAGES * 64 < 1024
    found = real.outputs(PROMPT, Sampling(most - len(PROMPT), ignore_eos=True, temperature=0))
    assert found[0].finish == "length" and len(found[0].tokens) == most - len(PROMPT)
    with pytest.raises(ValueError, match="exceed the context"):
        real.engine.submit(PROMPT, Sampling(most - len(PROMPT) + 1))


def test_what_could_never_run_is_refused_and_not_told_to_come_again(real: Real) -> None:
    with pytest.raises(ValueError, match="n: expected at most 68"):
        real.engine.submit([5], Sampling(n=69))
    for priority in (1_000_001, -(10**400), 1.0, True, "1"):
        with pytest.raises(ValueError, match="priority: expected an integer"):
            real.engine.submit([5], Sampling(), priority=priority)  # type: ignore[arg-type]

    async def full() -> None:
        stream = real.engine.submit([5], Sampling(200, n=68, ignore_eos=True), priority=1_000_000)
        with pytest.raises(QueueFull):
            real.engine.submit([5], Sampling())
        stream.abort()
        assert {output.finish for output in await outputs(stream)} == {"abort"}

    real.run(full())


def test_a_worker_that_speaks_is_not_silent(real: Real) -> None:
    real.run(asyncio.sleep(0.6))
    assert real.engine.silent < 0.5


def test_a_worker_that_cannot_read_its_commands_ends(real: Real) -> None:
    """The last one of those that share the worker."""

    async def spoil() -> None:
        stream = real.engine.submit([5], Sampling(500, ignore_eos=True, temperature=0))
        assert real.engine._process.stdin is not None
        real.engine._process.stdin.write(b'{"op":"add","id":99}\n')
        with pytest.raises(EngineDead):
            async for _ in stream:
                pass
        assert real.engine.dead.is_set()
        with pytest.raises(EngineDead):
            real.engine.submit([5], Sampling())

    real.run(spoil())


# ---- lines --------------------------------------------------------------------------------------------------------


def test_pieces_survive_the_way_in_lines_of_bounded_length() -> None:
    rng = random.Random(1)

    def logprobs(count: int, top: int) -> list[TokenLogprob]:
        return [
            TokenLogprob(rng.randrange(10**5), -rng.random(), [(rng.randrange(10**5), -rng.random())] * top)
            for _ in range(count)
        ]

    prompt, prompts = [7] * 3000, [None, *logprobs(2999, 20)]
    wholes = [Sampling(logprobs=20, prompt_logprobs=20, n=2), Sampling()]
    said: list[Piece] = []
    for sample in (1, 0):  # the second ends first
        own = [logprobs(1, 20)[0] for _ in range(300)]
        for found in own:
            said.append(Piece(1, "é", None, sample, (found.token,), (("é", True),), (found,)))
        tokens = [found.token for found in own]
        output = Output(prompt, tokens, "é" * 300 + "\n", "length", own, None, sample, 5, None, prompts)
        said.append(Piece(1, "\n", output, sample, spans=(("\n", False),)))
        said.append(Piece(2, "", Output([3], [], "", "error", None, "why", sample), sample))
    told: dict[int, int] = {}
    # A sample that ended early knows only the beginning of its prompt's.
    early = Piece(3, "", Output(prompt, [], "", "deadline", prompt_logprobs=prompts[:10]))
    late = Piece(3, "", Output(prompt, [], "", "stop", sample=1, prompt_logprobs=prompts), 1)
    text = [*lines(said, told), *lines([early, late], told)]
    assert max(map(len, text)) < 3 * GROUP and len(text) > 10
    assert sum(b'"prompt"' in one for one in text) < 2 * (1 + 3000 * 21 // ENTRIES) + 3  # once each, not per sample
    assemblies = {1: Assembly(prompt, wholes[0]), 2: Assembly([3], wholes[1]), 3: Assembly(prompt, wholes[1])}
    came: list[Piece] = []
    for one in text:
        message = json.loads(one)
        came += [assemblies[plain["i"]].piece(plain) for plain in message.get("pieces", ())]
        if "prompt" in message:
            assemblies[message["prompt"][0]].prompt(message["prompt"][1])
    assert came == [*said, early, late]
    assert told == {1: 3000, 3: 3000}


# ---- the client alone ---------------------------------------------------------------------------------------------


class Said:
    """A process that says what a test feeds it."""

    pid, returncode = 0, None

    def __init__(self) -> None:
        self.stdout = asyncio.StreamReader()
        self.stdin = SimpleNamespace(write=lambda data: None)

    def kill(self) -> None:
        self.stdout.feed_eof()


@pytest.mark.parametrize("nonsense", [b"{", b'{"pieces":[{}]}\n', b'{"refused":[9,"",1]}\n', b"3\n", b"\xff\n", b""])
def test_whatever_the_worker_says_the_client_ends_its_streams(nonsense: bytes) -> None:
    async def ask() -> None:
        process, info = Said(), EngineInfo(300, 100, 0, 0, 10, 64, 1, 1, 1, 1, 1, ())
        engine = AsyncEngine(EngineSettings("none"), process, info)  # type: ignore[arg-type]
        stream = engine.submit([1], Sampling(9))
        engine._heard -= 100
        assert engine.silent > 99
        process.stdout.feed_data(b'{"pieces":[{"i":1,"p":[["a",false]],"k":[4]}]}\n')
        assert (await anext(stream)).text == "a" and engine.silent < 50
        process.stdout.feed_data(nonsense)
        if not nonsense.endswith(b"\n"):
            process.stdout.feed_eof()
        with pytest.raises(EngineDead):
            await asyncio.wait_for(anext(stream), 5)
        assert engine.dead.is_set()

    asyncio.run(ask())


@pytest.mark.parametrize("blamed", ["request", "grammar", "busy"])
def test_who_is_blamed_for_a_refusal_comes_through(blamed: str) -> None:
    async def ask() -> None:
        process, info = Said(), EngineInfo(300, 100, 0, 0, 10, 64, 1, 1, 1, 1, 1, ())
        engine = AsyncEngine(EngineSettings("none"), process, info)  # type: ignore[arg-type]
        stream = engine.submit([1], Sampling(9, n=2))
        process.stdout.feed_data(json.dumps({"refused": [1, "x: no", blamed]}).encode() + b"\n")
        with pytest.raises(Refused, match=r"^x: no$") as refused:
            await asyncio.wait_for(anext(stream), 5)
        assert refused.value.blamed == blamed and engine._samples == 0
        process.stdout.feed_eof()
        await engine._reader

    asyncio.run(ask())


# ---- the worker alone ---------------------------------------------------------------------------------------------


class Engine:
    """Remembers what it is given."""

    busy = False

    def __init__(self) -> None:
        self.constraint: Callable[[Request], Any] = lambda request: None
        self.added: list[int] = []

    def add(self, request: Request, constraint: Any) -> None:
        self.added.append(request.id)


class Bare:
    """A worker between two pipes, its threads running; the test steps it."""

    def __init__(self) -> None:
        read, self.write = os.pipe()
        self.out, self.engine = io.BytesIO(), Engine()
        self.worker = Worker(os.fdopen(read, "rb"), self.out)
        self.worker.engine = self.engine  # type: ignore[assignment]
        for work in (self.worker.read, *[self.worker.compile] * 2):
            threading.Thread(target=work, daemon=True).start()

    def send(self, **message: Any) -> None:
        os.write(self.write, json.dumps(message).encode() + b"\n")

    def add(self, id: int, n: int = 1, deadline: float | None = None) -> None:
        sampling = from_sampling(Sampling(n=n, grammar=Grammar("regex", "a*")))
        self.send(op="add", id=id, prompt=[5], sampling=sampling, priority=0, deadline=deadline, salt="", inspect=False)

    def until(self, true: Callable[[], bool]) -> None:
        end = time.monotonic() + 60
        while not true():
            assert time.monotonic() < end
            self.worker.take()

    def said(self) -> list[tuple[int, str]]:
        """Request and finish of each sample that has ended."""
        messages = [json.loads(text) for text in self.out.getvalue().splitlines()]
        ends = [(p["i"], p["o"]["finish"]) for m in messages for p in m.get("pieces", ())]
        return ends + [(m["refused"][0], "refused") for m in messages if "refused" in m]


def test_a_request_whose_grammar_is_being_compiled_can_be_aborted_and_has_its_deadline() -> None:
    bare, gate = Bare(), threading.Event()
    compiled: list[int] = []

    def slow(request: Request) -> None:
        compiled.append(request.id)
        gate.wait(10)

    bare.engine.constraint = slow
    bare.add(1, n=2)
    bare.add(2, deadline=0.1)
    bare.until(lambda: len(compiled) == 2)  # both at once
    for id in (3, 4, 5):  # these wait for a thread
        bare.add(id, deadline=0.1 if id == 4 else None)
    for id in (1, 3):
        bare.send(op="abort", id=id)
    bare.until(lambda: len(bare.said()) == 5)
    assert sorted(bare.said()) == [(1, "abort"), (1, "abort"), (2, "deadline"), (3, "abort"), (4, "deadline")]
    assert bare.engine.added == []
    gate.set()
    bare.until(lambda: bare.engine.added != [])
    assert bare.engine.added == [5] and sorted(compiled) == [1, 2, 5]
    assert list(bare.worker.running) == [5] and not bare.worker.compiling


def test_a_grammar_that_fails_in_no_way_foreseen_fails_alone() -> None:
    bare = Bare()

    def fails(request: Request) -> None:
        if request.id < 4:
            raise TypeError("as a library might")
        if request.id == 4:
            raise ValueError("grammar: no")

    bare.engine.constraint = fails
    for id in range(6):
        bare.add(id)
    bare.until(lambda: len(bare.said()) == 5 and bare.engine.added == [5])
    assert sorted(bare.said()) == [(0, "error"), (1, "error"), (2, "error"), (3, "error"), (4, "refused")]
    assert list(bare.worker.running) == [5]


def test_a_grammar_that_waits_for_others_is_not_called_wrong() -> None:
    bare = Bare()

    def fails(request: Request) -> None:
        raise [GrammarsBusy("grammar: 2 others"), ValueError("grammar: no")][request.id]

    bare.engine.constraint = fails
    for id in range(2):
        bare.add(id)
    bare.until(lambda: len(bare.said()) == 2)
    refused = sorted(json.loads(text)["refused"] for text in bare.out.getvalue().splitlines())
    assert refused == [[0, "grammar: 2 others", "busy"], [1, "grammar: no", "grammar"]]
    assert not bare.worker.running


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("command", [b'{"op":"add"}\n', b'{"op":"dance"}\n', b"{\n", b""])
def test_a_worker_that_nobody_can_command_ends(command: bytes) -> None:
    bare = Bare()
    os.write(bare.write, command)
    if not command:
        os.close(bare.write)
    end = time.monotonic() + 60
    while bare.worker.take():
        assert time.monotonic() < end


def test_a_drain_waits_for_grammars() -> None:
    bare, gate = Bare(), threading.Event()
    bare.engine.constraint = lambda request: gate.wait(10) and None
    bare.add(1)
    bare.send(op="close", drain=10.0)
    bare.until(lambda: bare.worker.until is not None)
    assert bare.worker.take()
    gate.set()
    bare.until(lambda: bare.engine.added == [1])
    assert not bare.worker.take()
