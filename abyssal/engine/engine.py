"""The engine: requests in, pieces of text out, a step at a time.

A step is planned (`scheduler.py`), enqueued (`runner.py`), and settled: its tokens are read, turned into text, and what
has ended is let go. On a GPU a step is settled only after the next has been enqueued, so the device never waits for the
host; what a step computes for a sequence that had ended is thrown away.
"""

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from abyssal.costs import mha_cache_bytes
from abyssal.data.tokenizer import Tokenizer
from abyssal.engine.constraint import Constraint, Grammars
from abyssal.engine.decode import Kind
from abyssal.engine.metrics import Metrics
from abyssal.engine.pages import Pages
from abyssal.engine.request import Inside, Piece, Request, TokenLogprob
from abyssal.engine.runner import PAGE, Lap, Pending, Result, Runner
from abyssal.engine.scheduler import NoPages, Plan, Scheduler
from abyssal.engine.sequence import Sequence, State
from abyssal.engine.speculation import Speculation
from abyssal.model.transformer import Transformer

SHOWN = 0.25  # seconds between two looks inside, of a request that asked for them


@dataclass(frozen=True)
class Options:
    """How an engine is built. `pages` counts the scratch page too."""

    pages: int
    running: int
    context: int
    drafts: int = 0
    step_tokens: int = 2048
    cache_dtype: torch.dtype | None = None  # None: the weights'; uint8: FP8
    workspace: int = 1 << 16  # tokens whose keys and values may be expanded at once
    prefix_cache: bool = True
    deterministic: bool = False
    compiled: bool = False
    adapt: bool = True  # draft only where it pays
    grammar_bytes: int = 65536
    grammar_seconds: float = 2.0


def check(request: Request, model: Transformer, options: Options, tokenizer: Tokenizer | None) -> None:
    """Raises ValueError naming what of a request can't be, whatever the pool."""
    vocab, room, own, prompt = model.config.vocab_size, options.context, request.sampling, request.prompt
    if not prompt:
        raise ValueError("prompt: is empty; expected text or token ids")
    if min(prompt) < 0 or max(prompt) >= vocab:
        raise ValueError(f"prompt: expected token ids from 0 to {vocab - 1}")
    if len(prompt) + own.max_tokens > room:
        raise ValueError(f"prompt: {len(prompt)} tokens and max_tokens {own.max_tokens} exceed the context of {room}")
    if own.speculate and not options.drafts:
        raise ValueError("speculate: is True, but nothing drafts: the model has no MTP module, or drafts are off")
    if any(id >= vocab for id, _ in own.logit_bias):
        raise ValueError(f"logit_bias: expected token ids from 0 to {vocab - 1}")
    if own.grammar is not None and tokenizer is None:
        raise ValueError("grammar: needs a tokenizer")


@dataclass
class Enqueued:
    """A step on its way."""

    began: float
    lap: Lap
    steps: list[tuple[Pending, list[Sequence]]]
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
        """`ends`: the ids that end a text."""
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
        self._pieces: list[Piece] = []
        self._shown: dict[tuple[int, int], float] = {}
        self._settled = time.perf_counter()
        self._last_lap: Lap | None = None
        self._recent: deque[tuple[float, int]] = deque()

    # ---- the face -----------------------------------------------------------------------------------------

    def check(self, request: Request) -> None:
        """Raises ValueError naming what of a request can't be."""
        check(request, self.model, self.options, self.tokenizer)
        prompt, own = request.prompt, request.sampling
        most = -(-(len(prompt) + own.max_tokens + 3 * self.scheduler.width) // PAGE)
        if most > self.options.pages - 1:
            raise ValueError(f"prompt: needs up to {most} pages of the cache, which has {self.options.pages - 1}")

    def constraint(self, request: Request) -> Constraint | None:
        """A request's grammar, compiled. Takes its time; may be called from another thread. Raises GrammarError."""
        grammar = request.sampling.grammar
        return self.grammars.compile(grammar) if grammar is not None and self.grammars is not None else None

    def add(self, request: Request, constraint: Constraint | None = None) -> None:
        """Queues a request, with its grammar where that is compiled already. Raises ValueError as `check`, and for an
        id that is in use or a grammar that can't be."""
        self.check(request)
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
        return bool(self._live or self._pieces or self._on_its_way)

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
        pieces, self._pieces = self._pieces, []
        self._gauges()
        return pieces

    def snapshot(self) -> dict[str, Any]:
        """All that is counted, as plain JSON. Waits for the device, to read the experts' load."""
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
                    self.metrics.preemptions += 1
                    self.scheduler.preempt()

    def _enqueue(self, plan: Plan) -> Enqueued:
        began, lap = time.perf_counter(), Lap(self.runner.device)
        runner, slots = self.runner, self.runner.slots
        with torch.inference_mode():
            slots.forget_loads([s.slot for s in plan.admitted])
            slots.write_tables(plan.tables)
        if plan.chunks:
            for slot, said in runner.chunks([chunk for _, chunk in plan.chunks], lap).items():
                owner = next(s for s, chunk in plan.chunks if chunk.slot == slot)
                self._prompt_logprobs(owner, said.logprob.tolist(), said.top_ids.tolist(), said.top_logprobs.tolist())
        for s, _ in plan.chunks:
            self.scheduler.register(s)
        decoding = [*plan.decoding, *(new for s in plan.ready for new in self._ready(s))]
        steps = []
        for group, speculates in self._groups(decoding):
            kind, masks = self._kind(group, speculates)
            steps.append((runner.step([s.slot for s in group], kind, lap, masks), group))
            for s in group:
                s.ahead += 1
        lap.begin()
        lap.end()
        enqueued = Enqueued(began, lap, steps, not plan.chunks)
        self._on_its_way.append(enqueued)
        self.metrics.steps += 1
        return enqueued

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
                self.runner.slots.forget_loads([child.slot])
                self.runner.slots.write_tables(plan.tables)
                self.runner.slots.copy(s.slot, child.slot)
            if copied != (0, 0):
                self.runner.copy_pages([copied])
                self.metrics.copied_pages += 1
            child.prompt_logprobs = s.prompt_logprobs
            entered.append(child)
        for new in entered:
            self._enter(new)
        return entered

    def _enter(self, s: Sequence) -> None:
        s.state = State.DECODING
        with torch.inference_mode():
            self.runner.slots.enter(s.slot, len(s.tokens), s.tokens[-1], s.sampling, s.seed)
            self.runner.slots.adjust(s.slot, s.sampling, s.request.prompt, s.tokens[len(s.request.prompt) :])
        if s.generated == 0 and s.admitted is not None:
            self.metrics.queue_time.add(s.admitted - s.request.arrived)
            self.metrics.prompt_tokens += len(s.request.prompt)
            self.metrics.cached_tokens += s.cached_tokens

    def _groups(self, decoding: list[Sequence]) -> list[tuple[list[Sequence], bool]]:
        """Those whose drafts are verified, and those that get a token each."""
        if not decoding:
            return []
        wanted = self.speculation.wanted(len(decoding))
        drafting = [s for s in decoding if self._drafts(s, wanted)]
        plain = [s for s in decoding if s not in drafting]
        self.metrics.speculating = bool(drafting)
        return [(group, kind) for group, kind in ((drafting, True), (plain, False)) if group]

    def _drafts(self, s: Sequence, wanted: bool) -> bool:
        if not self.options.drafts or s.cold or s.sampling.speculate is False:
            return False
        if s.sampling.speculate:
            return True
        # With a seed a text should hang on nothing else, and drafts come and go with the load.
        return wanted and (s.sampling.seed is None or s.sampling.greedy)

    def _kind(self, group: list[Sequence], speculates: bool) -> tuple[Kind, np.ndarray | None]:
        drafts = self.options.drafts if speculates else 0
        constrained = any(s.constraint is not None for s in group)
        masks = None
        if constrained:
            masks = np.full((len(group), 1 + drafts, self.runner.words), -1, dtype=np.int32)
            for row, s in zip(masks, group):
                if s.constraint is not None:
                    s.constraint.masks((s.drafts or [s.tokens[-1]] * drafts)[:drafts], row)
        asked = [s.sampling.logprobs for s in group if s.sampling.logprobs is not None]
        kind = Kind(
            sequences=len(group),
            width=1 + drafts,
            drafts=drafts,
            greedy=all(s.sampling.greedy for s in group),
            masked=constrained,
            biased=any(s.sampling.logit_bias for s in group),
            penalised=any(s.sampling.penalised for s in group),
            logprobs=min(max(asked), self.model.config.vocab_size) if asked else None,
        )
        return kind, masks

    # ---- what came of it ----------------------------------------------------------------------------------

    def _settle_all(self) -> None:
        while self._on_its_way:
            self._settle(self._on_its_way.popleft())

    def _settle(self, enqueued: Enqueued) -> None:
        made = 0
        for pending, group in enqueued.steps:
            results = pending.read()
            now = time.monotonic()
            before = sum(s.generated for s in group)
            for s, result in zip(group, results):
                s.ahead -= 1
                if s.state is State.DECODING:
                    self._take(s, result, now)
            made += sum(s.generated for s in group) - before
        self._lap(enqueued)
        ended = time.perf_counter()
        seconds = ended - max(self._settled, enqueued.began)
        self._settled = ended
        self.metrics.step_seconds += seconds
        self.metrics.generated_tokens += made
        if enqueued.pure:
            self.metrics.decode_seconds += seconds
            self.metrics.decoded_tokens += made
        self._recent.append((ended, made))
        if enqueued.pure and len(enqueued.steps) == 1:
            pending, group = enqueued.steps[0]
            self.speculation.tell(len(group), pending.kind.width > 1, seconds, made)

    def _lap(self, enqueued: Enqueued) -> None:
        """The device's own time, and how long it had nothing to do before this step."""
        if not self.asynchronous:
            return
        enqueued.lap.wait()  # where there were only prompts, nothing has been read yet
        self.metrics.device_seconds += enqueued.lap.seconds()
        if self._last_lap is not None:
            self.metrics.idle_seconds += max(enqueued.lap.since(self._last_lap), 0.0)
        self._last_lap = enqueued.lap if self._live else None

    def _take(self, s: Sequence, result: Result, now: float) -> None:
        if result.token < 0:
            self._fail(s, "the model's logits are not finite")
            return
        self._count(result)
        s.drafted += len(result.verified)
        s.accepted += result.accepted
        s.drafts = result.drafts
        try:
            for i, token in enumerate([*result.verified[: result.accepted], result.token]):
                if s.constraint is not None:
                    s.constraint.accept(token)
                said = None
                if s.sampling.logprobs is not None and result.logprobs is not None:
                    own, top = result.logprobs[i]
                    said = TokenLogprob(token, own, top[: s.sampling.logprobs])
                s.push(token, i < result.accepted, said)
                if s.finish is None and s.constraint is not None and s.constraint.finished:
                    s.finish = "stop"
                if s.finish is not None:
                    break
        except (ValueError, RuntimeError) as error:  # of the grammar or the tokenizer: this request's alone
            self._fail(s, str(error))
            return
        if s.first_token is None:
            s.first_token = now
            self.metrics.first_token.add(now - s.request.arrived)
        elif s.last_token is not None:
            self.metrics.between_tokens.add(now - s.last_token)
        s.last_token = now
        s.rows = len(s.tokens) - 1
        self.scheduler.register(s)
        if s.finish is not None:
            self._let_go(s)
        else:
            self._tell(s)

    def _count(self, result: Result) -> None:
        for counts, upto in ((self.metrics.drafted, len(result.verified)), (self.metrics.accepted, result.accepted)):
            counts.extend([0] * (len(result.verified) - len(counts)))
            for i in range(upto):
                counts[i] += 1

    def _prompt_logprobs(
        self, s: Sequence, own: list[float], ids: list[list[int]], values: list[list[float]]
    ) -> None:  # fmt: skip
        if s.prompt_logprobs is None:
            s.prompt_logprobs = [None]
        for logprob, some, of in zip(own, ids, values):
            token = s.tokens[len(s.prompt_logprobs)]
            if len(s.prompt_logprobs) < len(s.request.prompt):
                s.prompt_logprobs.append(TokenLogprob(token, logprob, list(zip(some, of))))

    def _fail(self, s: Sequence, error: str) -> None:
        """Ends one sequence alone. Its pages may hold what is no number, and nobody may come upon that."""
        own = [page for page in s.pages[s.origin // PAGE :] if not self.pages.shared(page)]
        for page in s.pages[s.origin // PAGE :]:
            self.pages.drop(page)
        self._end(s, "error", error)
        if own:
            self.runner.clear(own)

    def _end(self, s: Sequence, finish: str, error: str | None = None) -> None:
        s.end(finish, error)  # type: ignore[arg-type]
        self._let_go(s)

    def _let_go(self, s: Sequence) -> None:
        """Of a sequence that has ended: its last piece, and everything it held."""
        self._tell(s)
        self.scheduler.release(s)
        s.state = State.DONE
        assert s.finish is not None
        self.metrics.finished[s.finish] += 1
        self._shown.pop((s.request.id, s.sample), None)
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

    def _tell(self, s: Sequence) -> None:
        piece = s.piece()
        if piece is None:
            return
        if s.request.inspect and (s.finish or self._due(s)):
            piece = Piece(**{**vars(piece), "inside": self._inside(s)})
        self._pieces.append(piece)

    def _due(self, s: Sequence) -> bool:
        key, now = (s.request.id, s.sample), time.monotonic()
        if now - self._shown.get(key, -SHOWN) < SHOWN:
            return False
        self._shown[key] = now
        return True

    def _inside(self, s: Sequence) -> Inside:
        m = self.metrics
        return Inside(
            latent_bytes=len(s.pages) * m.page_bytes,
            mha_bytes=len(s.tokens) * m.mha_bytes_a_token,
            pages=len(s.pages),
            shared_pages=sum(self.pages.shared(page) for page in s.pages),
            cached_tokens=s.cached_tokens,
            tokens_per_second=s.tokens_per_second,
            drafted=s.drafted,
            accepted=s.accepted,
            expert_load=self.runner.loads(s.slot) if s.slot >= 0 else [],
        )

    def _gauges(self) -> None:
        m = self.metrics
        m.running, m.waiting = len(self.scheduler.running), len(self.scheduler.waiting)
        m.pages_free, m.pages_cached, m.evicted_pages = self.pages.free, self.pages.idle, self.pages.evicted
        m.cached_rows = sum(s.rows for s in self.scheduler.running)
        now = time.perf_counter()
        while self._recent and now - self._recent[0][0] > 1:
            self._recent.popleft()
        m.tokens_per_second = sum(made for _, made in self._recent) / max(min(now - self._settled + 1, 1), 1)
