"""The engine: requests in, pieces of text out, a step at a time.

A step is planned (`scheduler.py`), enqueued (`runner.py`), and settled: its tokens are read, turned into text, and what
has ended is let go. On a GPU a step is settled only after the next has been enqueued, so the device never waits for the
host; what a step computes for a sequence that had ended is thrown away.
"""

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from abyssal.costs import mha_cache_bytes
from abyssal.data.tokenizer import Tokenizer
from abyssal.engine.batch import groups, kind_of, masks_of
from abyssal.engine.constraint import Constraint, Grammars
from abyssal.engine.decode import Kind
from abyssal.engine.metrics import Metrics
from abyssal.engine.options import Options, check, most_rows
from abyssal.engine.pages import Pages
from abyssal.engine.pending import Lap, Pending, Result
from abyssal.engine.prefill import PromptLogprobs
from abyssal.engine.report import Report
from abyssal.engine.request import Finish, Piece, Request
from abyssal.engine.runner import PAGE, Runner
from abyssal.engine.scheduler import NoPages, Plan, Scheduler
from abyssal.engine.sequence import Sequence, State
from abyssal.engine.speculation import Speculation
from abyssal.model.transformer import Transformer


@dataclass
class Enqueued:
    """A step on its way."""

    began: float
    lap: Lap
    steps: list[tuple[Pending, list[Sequence], list[bool]]]  # and whether each one's drafts were the modules'
    pure: bool  # no prompt in it


class Engine:
    """A model, its pool and everybody's requests. Not for several threads."""

    def __init__(
        self,
        model: Transformer,
        tokenizer: Tokenizer | None,
        options: Options,
        ends: frozenset[int] = frozenset(),
        say: Callable[[str], None] = print,
    ) -> None:
        """`ends`: the ids that end a text. Where the pool holds no sequence of `options.context` tokens, the context is
        what it does hold."""
        room = (options.pages - 1) * PAGE - most_rows(0, options.drafts)
        options = replace(options, context=min(options.context, room))
        self.model, self.tokenizer, self.options, self.ends = model, tokenizer, options, ends
        width = 1 + options.drafts
        allowed = min(tokenizer.vocab_size, model.config.vocab_size) if tokenizer else None
        self.runner = Runner(
            model, pages=options.pages, running=options.running, context=options.context, drafts=options.drafts,
            cache_dtype=options.cache_dtype, allowed=allowed, workspace=options.workspace,
            deterministic=options.deterministic, compiled=options.compiled, say=say,
        )  # fmt: skip
        modules = self.runner.modules
        cpu = self.runner.device.type == "cpu"
        self.pages = Pages(options.pages, PAGE, modules, contiguous=cpu, cached=options.prefix_cache)
        fixed = options.running * width if options.deterministic else None
        self.scheduler = Scheduler(
            self.pages, options.running, max(options.step_tokens, options.running * width), width, modules, fixed
        )
        self.speculation = Speculation(options.drafts, options.adapt and not options.deterministic)
        self.grammars = (
            Grammars(
                tokenizer, model.config.vocab_size, ends, options.grammar_bytes, options.grammar_seconds
            ) if tokenizer else None
        )  # fmt: skip
        self.asynchronous = not cpu  # a step is settled after the next is enqueued
        self.metrics = Metrics(
            pages_total=options.pages - 1,
            page_bytes=self.runner.cache.bytes // options.pages,
            latent_bytes_a_token=self.runner.cache.bytes // (options.pages * PAGE),
            mha_bytes_a_token=mha_cache_bytes(
                model.config, 1, model.embed.weight.element_size(), mtp=self.runner.modules > 0
            ),
        )
        self._on_its_way: deque[Enqueued] = deque()
        self._siblings: dict[int, list[Sequence]] = {}  # samples that wait for their request's first to be taken in
        self._live: dict[int, list[Sequence]] = {}
        self._report = Report(self.metrics, self.pages, self.runner)

    # ---- the face -----------------------------------------------------------------------------------------

    def constraint(self, request: Request) -> Constraint | None:
        """A request's grammar, compiled. Takes its time; may be called from another thread. Raises GrammarError."""
        grammar = request.sampling.grammar
        return self.grammars.compile(grammar) if grammar is not None and self.grammars is not None else None

    def add(self, request: Request, constraint: Constraint | None = None) -> None:
        """Queues a request, with its grammar where that is compiled already. Raises ValueError naming what can't be
        (see `options.check`), and for an id that is in use or a grammar that can't be."""
        check(request, self.model, self.options, self.tokenizer)
        if request.id in self._live:
            raise ValueError(f"request {request.id}: is there already")
        constraint = constraint or self.constraint(request)
        samples = [
            Sequence(request, i, self.tokenizer, self.ends, constraint.fork() if constraint else None)
            for i in range(request.sampling.n)
        ]
        self._live[request.id] = list(samples)
        if len(samples) > 1:
            self._siblings[request.id] = samples[1:]
        self.scheduler.add(samples[0])
        self.metrics.requests += 1

    def abort(self, id: int) -> None:
        """Ends a request, wherever it is; what it held is free at once. Nothing happens where there is none."""
        for s in list(self._live.get(id, ())):
            self._end(s, "abort")

    @property
    def busy(self) -> bool:
        return bool(self._live or self._report.pieces or self._on_its_way)

    def step(self) -> list[Piece]:
        """Enqueues a step and settles the one before (on a CPU, this one). Returns what has become certain."""
        for samples in list(self._live.values()):
            for s in list(samples):
                if s.overdue():
                    self._end(s, "deadline")
        if any(s.constraint is not None for s in self.scheduler.running):
            self._settle_all()  # what may come next hangs on what came
        plan = self._plan()
        enqueued = self._enqueue(plan) if not plan.empty else None
        while len(self._on_its_way) > (1 if self.asynchronous and enqueued is not None else 0):
            self._settle(self._on_its_way.popleft())
        self._report.gauges(self.scheduler)
        return self._report.fetch()

    def snapshot(self, loads: bool = True) -> dict[str, Any]:
        """All that is counted, as plain JSON. With `loads` waits for the device, to read the experts' load anew."""
        self._report.gauges(self.scheduler)
        if loads:
            self.metrics.expert_load = self.runner.slots.total_load()
        return self.metrics.snapshot()

    def warm(self) -> None:
        """Compiles and captures what steps will need."""
        self.runner.warm(self.kinds(), self.scheduler.step_tokens)

    def kinds(self) -> list[Kind]:
        """The steps that any request may need."""
        drafts = self.options.drafts
        made = self.runner.kinds(1, 0)
        return made + self.runner.kinds(1 + drafts, drafts) if drafts else made

    # ---- a step -------------------------------------------------------------------------------------------

    def _plan(self) -> Plan:
        def decodes(s: Sequence) -> bool:
            return s.most > s.ahead  # each step on its way brings one token at least

        while True:
            held = [(s, len(s.pages)) for s in self.scheduler.running]
            try:
                return self.scheduler.plan(decodes)
            except NoPages:
                for s, count in held:  # what the plan had given out already
                    self.pages.release(s.pages[count:])
                    del s.pages[count:]
                if self._on_its_way:
                    self._settle_all()
                else:
                    self.scheduler.preempt()

    def _enqueue(self, plan: Plan) -> Enqueued:
        began, lap = time.perf_counter(), Lap(self.runner.device)
        runner, state = self.runner, self.runner.slots
        with torch.inference_mode():
            state.vacate([s.slot for s in plan.admitted])
            state.write_tables(plan.tables)
        # A prompt's last token is decoded in the pass that computes the rest; but where samples are forked from it, its
        # pages must be complete before.
        forks = [s for s in plan.ready if s.request.id in self._siblings]
        ready = [s for s in plan.ready if s not in forks]
        together = bool(plan.chunks and (plan.decoding or ready)) and runner.mixes
        if not together:
            if plan.chunks:
                self._prompts(plan, runner.chunks([chunk for _, chunk in plan.chunks], lap))
            ready, forks = plan.ready, []
        decoding = [*plan.decoding, *(new for s in ready for new in self._ready(s))]
        steps: list[tuple[Pending, list[Sequence], list[bool]]] = []
        stuck: list[tuple[Sequence, str]] = []
        wanted = self.speculation.wanted(len(decoding)) if decoding else False
        self.metrics.speculating = wanted
        for group, drafts in groups(decoding, self.options.drafts, wanted):
            kind = kind_of(group, drafts, self.model.config.vocab_size)
            masks = None
            if kind.masked:
                masks, failed = masks_of(group, drafts, runner.words)
                stuck += failed
            slots = [s.slot for s in group]
            if together and not steps:
                pending, said = runner.mixed([chunk for _, chunk in plan.chunks], slots, kind, lap, masks)
                self._prompts(plan, said)
            else:
                pending = runner.step(slots, kind, lap, masks)
            steps.append((pending, group, [s.drafting for s in group]))
            for s in group:
                s.ahead, s.drafting = s.ahead + 1, drafts > 0
        for s in forks:  # they decode from the next step on
            self._ready(s)
        lap.begin()
        lap.end()
        enqueued = Enqueued(began, lap, steps, not plan.chunks)
        self._on_its_way.append(enqueued)
        self.metrics.steps += 1
        for s, error in stuck:
            self._fail(s, error)
        return enqueued

    def _prompts(self, plan: Plan, said: dict[int, PromptLogprobs]) -> None:
        """Pieces of prompts are on their way into the cache."""
        for s, chunk in plan.chunks:
            self.scheduler.register(s)
            if s.slot in said:
                own = said[s.slot]
                s.push_prompt(chunk.start + 1, own.logprob.tolist(), own.top_ids.tolist(), own.top_logprobs.tolist())

    def _ready(self, s: Sequence) -> list[Sequence]:
        """All but the last token of `s` stand in the cache: it decodes from now on, and its siblings with it."""
        entered = [s]
        for child in self._siblings.pop(s.request.id, []):
            plan = Plan()
            copied = self.scheduler.fork(s, child, plan)
            if copied is None:
                self.scheduler.add(child)
                continue
            with torch.inference_mode():
                self.runner.slots.vacate([child.slot])
                self.runner.slots.write_tables(plan.tables)
                self.runner.slots.copy(s.slot, child.slot)
            self.runner.copy_pages(copied)
            self.metrics.copied_pages += len(copied)
            child.prompt_logprobs = s.prompt_logprobs
            entered.append(child)
        for new in entered:
            self._enter(new)
        return entered

    def _enter(self, s: Sequence) -> None:
        s.state, s.drafting = State.DECODING, False
        with torch.inference_mode():
            self.runner.slots.enter(s.slot, len(s.tokens), s.tokens[-1], s.sampling, s.seed)
            self.runner.slots.adjust(s.slot, s.sampling, s.request.prompt, s.tokens[len(s.request.prompt) :])
        self._report.entered(s)

    # ---- what came of it ----------------------------------------------------------------------------------

    def _settle_all(self) -> None:
        while self._on_its_way:
            self._settle(self._on_its_way.popleft())

    def _settle(self, enqueued: Enqueued) -> None:
        made = 0
        for pending, group, drafted in enqueued.steps:
            results = pending.read()
            before = sum(s.generated for s in group)
            for s, result, own in zip(group, results, drafted):
                s.ahead -= 1
                if s.state is State.DECODING:
                    self._take(s, result, own)
            made += sum(s.generated for s in group) - before
        enqueued.lap.wait()  # where there were only prompts, nothing has been read
        decoded = sum(len(group) for _, group, _ in enqueued.steps) if enqueued.pure else None
        seconds = self._report.settled(enqueued.began, enqueued.lap, decoded, made, bool(self._live))
        if decoded:
            self.speculation.tell(decoded, any(p.kind.width > 1 for p, _, _ in enqueued.steps), seconds, made)

    def _take(self, s: Sequence, result: Result, drafted: bool) -> None:
        if result.token < 0:
            self._fail(s, "the model's logits are not finite")
            return
        before = s.last_token
        try:
            s.take(result, time.monotonic(), drafted)
        except (ValueError, RuntimeError) as error:  # of the grammar or the tokenizer: this request's alone
            self._fail(s, str(error))
            return
        self._report.took(s, result if drafted else None, before)
        self.scheduler.register(s)
        if s.finish is not None:
            self._let_go(s)
        else:
            self._report.tell(s)

    def _fail(self, s: Sequence, error: str) -> None:
        """Ends one sequence alone. Its pages may hold what is no number, and nobody may come upon that."""
        own = [page for page in s.pages[s.origin // PAGE :] if not self.pages.shared(page)]
        for page in s.pages[s.origin // PAGE :]:
            self.pages.drop(page)
        self._end(s, "error", error)
        if own:
            self.runner.clear(own)

    def _end(self, s: Sequence, finish: Finish, error: str | None = None) -> None:
        s.end(finish, error)
        self._let_go(s)

    def _let_go(self, s: Sequence) -> None:
        """Of a sequence that has ended: its last piece, and everything it held."""
        self._report.tell(s)
        self.scheduler.release(s)
        s.state = State.DONE
        samples = self._live[s.request.id]
        samples.remove(s)
        siblings = self._siblings.get(s.request.id)
        if siblings and s in siblings:
            siblings.remove(s)
        elif siblings:  # the first has ended before it was taken in: the others go their own way
            for child in self._siblings.pop(s.request.id):
                self.scheduler.add(child)
        if not samples:
            del self._live[s.request.id]
            self._siblings.pop(s.request.id, None)
