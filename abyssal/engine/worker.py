"""The engine's own process: `python -m abyssal.engine.worker`. Commands come in, pieces and numbers go out.

One thread reads commands, one compiles grammars, and the first one steps the engine and never waits for anything else
while there is work. When its input ends, so does it: a worker outlives nobody.
"""

import json
import os
import queue
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any, BinaryIO

import torch

from abyssal.engine.client import EngineInfo, EngineSettings
from abyssal.engine.constraint import Constraint
from abyssal.engine.engine import Engine
from abyssal.engine.llm import LLM
from abyssal.engine.messages import from_piece, line, to_sampling
from abyssal.engine.request import Output, Piece, Request
from abyssal.engine.runner import PAGE

TELL = 0.25  # seconds between two reports of numbers
LOADS = 2.0  # and of the experts' load, which waits for the device
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64, "fp8": torch.uint8}


class Worker:
    """An engine between two streams of lines."""

    def __init__(self, commands: BinaryIO, answers: BinaryIO) -> None:
        self.commands, self.answers = commands, answers
        self.inbox: queue.SimpleQueue[tuple[str, Any]] = queue.SimpleQueue()
        self.grammars: queue.SimpleQueue[Request] = queue.SimpleQueue()
        self.told = self.loaded = 0.0
        self.until: float | None = None  # when a drain ends

    def say(self, **message: Any) -> None:
        self.answers.write(line(message))
        self.answers.flush()

    def run(self) -> int:
        """The process's exit code."""
        settings = EngineSettings(**json.loads(self.commands.readline()))
        try:
            self.llm = build(settings)
            self.engine = self.llm.engine or self.llm.start(compiled=bool(settings.compiled))
        except (ValueError, TypeError, OSError, RuntimeError) as error:
            self.say(failed=f"{type(error).__name__}: {error}" if isinstance(error, RuntimeError) else str(error))
            return 1
        self.say(ready=vars(info(self.llm, self.engine)), stats=self.engine.snapshot())
        threading.Thread(target=self.read, daemon=True).start()
        threading.Thread(target=self.compile, daemon=True).start()
        while True:
            if not self.take():
                return 0
            if self.engine.busy:
                pieces = self.engine.step()
                if pieces:
                    self.say(pieces=[from_piece(piece) for piece in pieces])
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
                self.add(*what)
            elif op == "abort":
                self.engine.abort(what)
            elif op == "refuse":
                self.refuse(*what)
            elif op == "close":
                self.until = time.monotonic() + what
        over = self.until is not None and (not self.engine.busy or time.monotonic() > self.until)
        return not over

    def add(self, request: Request, constraint: Constraint | None) -> None:
        try:
            self.engine.add(request, constraint)
        except (ValueError, TypeError) as error:
            self.refuse(request, str(error))

    def refuse(self, request: Request, error: str) -> None:
        """Every sample ends with the reason."""
        for sample in range(request.sampling.n):
            output = Output([], [], "", "error", error=error, sample=sample)
            self.say(pieces=[from_piece(Piece(request.id, "", output, sample))])

    def report(self) -> None:
        now = time.monotonic()
        if now - self.told > TELL or not self.engine.busy:
            self.told = now
            loads = now - self.loaded > LOADS or not self.engine.busy
            self.loaded = now if loads else self.loaded
            self.say(stats=self.engine.snapshot(loads))

    # ---- the other threads --------------------------------------------------------------------------------

    def read(self) -> None:
        for text in self.commands:
            command = json.loads(text)
            op = command["op"]
            if op == "add":
                request = _request(command)
                if request.sampling.grammar is not None:
                    self.grammars.put(request)
                else:
                    self.inbox.put(("add", (request, None)))
            elif op == "abort":
                self.inbox.put(("abort", command["id"]))
            else:
                self.inbox.put(("close", command["drain"]))
        self.inbox.put(("close", 0.0))

    def compile(self) -> None:
        while True:
            request = self.grammars.get()
            try:
                constraint = self.engine.constraint(request)
            except (ValueError, RuntimeError) as error:  # a grammar that can't be, or a package that is missing
                self.inbox.put(("refuse", (request, str(error))))
            else:
                self.inbox.put(("add", (request, constraint)))


def build(settings: EngineSettings) -> LLM:
    """The model and its pool, as asked for. Raises ValueError naming what can't be."""
    inner = Path(settings.model) / "model"
    return LLM(
        inner if (inner / "config.json").is_file() else settings.model,  # a run's folder stands for the model in it
        dtype=DTYPES[settings.dtype] if settings.dtype else None,
        device=settings.device,
        max_batch=settings.max_running,
        max_context=settings.max_context,
        drafts=settings.drafts,
        cache_dtype=DTYPES[settings.cache_dtype] if settings.cache_dtype else None,
        cache_bytes=settings.cache_bytes,
        step_tokens=settings.step_tokens,
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
    code = main()
    sys.stderr.flush()
    os._exit(code)  # a reading thread may not be woken
