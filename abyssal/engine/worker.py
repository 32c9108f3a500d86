"""The engine's own process: `python -m abyssal.engine.worker`. Commands come in, pieces and numbers go out.

One thread reads commands, a few compile grammars, and the first one steps the engine and never waits for anything else
while there is work. When its input ends, so does it: a worker outlives nobody. A request whose grammar is being
compiled waits with the first thread, where an abort or its deadline finds it; what is compiled then is thrown away.
"""

import json
import os
import queue
import signal
import sys
import threading
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch

from abyssal.engine.client import EngineInfo, EngineSettings
from abyssal.engine.constraint import COMPILING, Constraint, GrammarsBusy
from abyssal.engine.engine import Engine
from abyssal.engine.llm import LLM
from abyssal.engine.messages import Blamed, line, lines, to_sampling
from abyssal.engine.request import Finish, Output, Piece, Request
from abyssal.engine.runner import PAGE

TELL = 0.25  # seconds between two reports of numbers
LOADS = 2.0  # and of the experts' load, which waits for the device
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64, "fp8": torch.uint8}
STEP_TOKENS = 8192  # on a GPU, where LLM's 16384 would hold those who decode up for longer


@dataclass
class Compiling:
    """A request whose grammar is being compiled, or waits for it."""

    request: Request
    over: bool = False  # nobody waits for it any more


class Worker:
    """An engine between two streams of lines."""

    def __init__(self, commands: BinaryIO, answers: BinaryIO) -> None:
        self.commands, self.answers = commands, answers
        self.inbox: queue.SimpleQueue[tuple[str, Any]] = queue.SimpleQueue()
        self.grammars: queue.SimpleQueue[Compiling] = queue.SimpleQueue()
        self.compiling: dict[int, Compiling] = {}
        self.running: dict[int, int] = {}  # samples that have not ended, of each request
        self.prompts: dict[int, int] = {}  # of each request, log-probabilities of its prompt that have been sent
        self.told = self.loaded = 0.0
        self.until: float | None = None  # when a drain ends

    def say(self, **message: Any) -> None:
        self.answers.write(line(message))
        self.answers.flush()

    def tell(self, pieces: list[Piece]) -> None:
        for text in lines(pieces, self.prompts):
            self.answers.write(text)
        self.answers.flush()
        for piece in pieces:
            if piece.output is not None:
                self.running[piece.index] -= 1
                if not self.running[piece.index]:
                    self.forget(piece.index)

    def forget(self, id: int) -> None:
        """A request has ended."""
        del self.running[id]
        self.prompts.pop(id, None)

    def run(self) -> int:
        """The process's exit code."""
        settings = EngineSettings(**json.loads(self.commands.readline()))
        try:
            self.llm = build(settings)
            self.engine = self.llm.start(compiled=settings.compiled)
        except (ValueError, TypeError, OSError, RuntimeError) as error:
            self.say(failed=f"{type(error).__name__}: {error}" if isinstance(error, RuntimeError) else str(error))
            return 1
        self.say(ready=vars(info(self.llm, self.engine)), stats=self.engine.snapshot())
        threading.Thread(target=self.read, daemon=True).start()
        for _ in range(COMPILING):
            threading.Thread(target=self.compile, daemon=True).start()
        while True:
            if not self.take():
                return 0
            if self.engine.busy:
                self.tell(self.engine.step())
            self.report()

    def take(self) -> bool:
        """Every command that has come; waits for one only where there is nothing to do. False: the end."""
        wait = not self.engine.busy
        while True:
            try:
                op, what = self.inbox.get(timeout=TELL) if wait else self.inbox.get_nowait()
            except queue.Empty:
                break
            wait = False
            if op == "add":
                self.running[what.id] = what.sampling.n
                self.add(what, None)
            elif op == "compile":
                self.running[what.request.id] = what.request.sampling.n
                self.compiling[what.request.id] = what
            elif op == "compiled":
                self.compiled(*what)
            elif op == "abort" and what in self.compiling:
                self.give_up(self.compiling[what], "abort")
            elif op == "abort":
                self.engine.abort(what)
            elif op == "close":
                self.until = time.monotonic() + what
        now = time.monotonic()
        for waiting in list(self.compiling.values()):
            if waiting.request.deadline is not None and now > waiting.request.deadline:
                self.give_up(waiting, "deadline")
        idle = not (self.engine.busy or self.compiling)
        return self.until is None or not (idle or now > self.until)

    def add(self, request: Request, constraint: Constraint | None) -> None:
        try:
            self.engine.add(request, constraint)
        except (ValueError, TypeError) as error:
            self.refuse(request, str(error))

    def compiled(self, waiting: Compiling, result: Constraint | Exception | None) -> None:
        if waiting.over:
            return
        del self.compiling[waiting.request.id]
        if isinstance(result, GrammarsBusy):
            self.refuse(waiting.request, str(result), "busy")
        elif isinstance(result, ValueError):  # a grammar that can't be, or a package that is missing
            self.refuse(waiting.request, str(result), "grammar")
        elif isinstance(result, Exception):
            self.end(waiting.request, "error", f"{type(result).__name__}: {result}")
        else:
            self.add(waiting.request, result)

    def give_up(self, waiting: Compiling, finish: Finish) -> None:
        waiting.over = True
        del self.compiling[waiting.request.id]
        self.end(waiting.request, finish)

    def refuse(self, request: Request, error: str, blamed: Blamed = "request") -> None:
        self.forget(request.id)
        self.say(refused=[request.id, error, blamed])

    def end(self, request: Request, finish: Finish, error: str | None = None) -> None:
        """Of a request that the engine has not seen."""
        samples = range(request.sampling.n)
        self.tell([Piece(request.id, "", Output([], [], "", finish, error=error, sample=i), i) for i in samples])

    def report(self) -> None:
        now = time.monotonic()
        if now - self.told > TELL or not self.engine.busy:
            self.told = now
            loads = now - self.loaded > LOADS or not self.engine.busy
            self.loaded = now if loads else self.loaded
            self.say(stats=self.engine.snapshot(loads))

    # ---- the other threads --------------------------------------------------------------------------------

    def read(self) -> None:
        try:
            for text in self.commands:
                self.command(json.loads(text))
        finally:  # whatever ends it: what nobody can command must end
            self.inbox.put(("close", 0.0))

    def command(self, command: dict[str, Any]) -> None:
        match command["op"]:
            case "add":
                request = _request(command)
                if request.sampling.grammar is None:
                    self.inbox.put(("add", request))
                else:
                    waiting = Compiling(request)
                    self.inbox.put(("compile", waiting))  # before it can be compiled
                    self.grammars.put(waiting)
            case "abort":
                self.inbox.put(("abort", command["id"]))
            case "close":
                self.inbox.put(("close", command["drain"]))
            case other:
                raise ValueError(f"op: expected add, abort or close, got {other!r}")

    def compile(self) -> None:
        while True:
            waiting = self.grammars.get()
            if waiting.over:
                continue
            result: Constraint | Exception | None
            try:
                result = self.engine.constraint(waiting.request)
            except Exception as error:  # a thread that ends leaves everybody after this one waiting
                result = error
                if not isinstance(error, ValueError):
                    traceback.print_exc()
            self.inbox.put(("compiled", (waiting, result)))


def build(settings: EngineSettings) -> LLM:
    """The model and its pool, as asked for. Raises ValueError naming what can't be."""
    inner = Path(settings.model) / "model"
    cuda = torch.device(settings.device).type == "cuda"
    return LLM(
        inner if (inner / "config.json").is_file() else settings.model,  # a run's folder stands for the model in it
        dtype=DTYPES[settings.dtype] if settings.dtype else None,
        device=settings.device,
        max_batch=settings.max_running,
        max_context=settings.max_context,
        drafts=settings.drafts,
        cache_dtype=DTYPES[settings.cache_dtype] if settings.cache_dtype else None,
        cache_bytes=settings.cache_bytes,
        step_tokens=settings.step_tokens or (STEP_TOKENS if cuda else None),
        prefix_cache=settings.prefix_cache,
        deterministic=settings.deterministic,
        compiled=settings.compiled,
        grammar_bytes=settings.max_grammar_bytes,
        grammar_seconds=settings.grammar_seconds,
    )


def info(llm: LLM, engine: Engine) -> EngineInfo:
    config, metrics = llm.model.config, engine.metrics
    return EngineInfo(
        vocab_size=config.vocab_size,
        max_context=engine.options.context,
        modules=len(llm.model.mtp),
        drafts=engine.options.drafts,
        pages=metrics.pages_total,
        page_size=PAGE,
        page_bytes=metrics.page_bytes,
        latent_bytes_a_token=metrics.latent_bytes_a_token,
        mha_bytes_a_token=metrics.mha_bytes_a_token,
        expert_layers=len(engine.runner.layers),
        experts=config.n_routed_experts or 0,
        eos_ids=tuple(sorted(engine.ends)),
    )


def _request(command: dict[str, Any]) -> Request:
    wait = command["deadline"]
    return Request(
        command["id"], tuple(command["prompt"]), to_sampling(command["sampling"]), command["priority"],
        None if wait is None else time.monotonic() + wait, command["salt"], command["inspect"],
    )  # fmt: skip


def main() -> int:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; whoever started us decides
    # What is printed by anybody else must not come between the messages.
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    return Worker(sys.stdin.buffer, answers).run()


if __name__ == "__main__":
    try:
        code = main()
    except BaseException:  # as below: the interpreter's own way out waits for threads that read
        traceback.print_exc()
        code = 1
    sys.stderr.flush()
    os._exit(code)  # a reading thread may not be woken
