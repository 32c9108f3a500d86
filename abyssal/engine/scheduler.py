"""Who runs next: which prompts are taken in, in what pieces, who decodes, and who gives way when pages run out.

A step has a budget of tokens. Decoding comes first, a token (and its drafts) each; what is left of the budget goes to
prompts in pieces. Requests are served in the order of priority and arrival, and none overtakes the one at the head
of the queue, whose priority rises while it waits: nobody starves. Pages are promised for a whole prompt when it is
taken in, and for decoding one by one. Where there is none left, the last in that order gives its pages back and is
computed again later; what it had is often still known to the prefix cache.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, field

from abyssal.engine.pages import Pages
from abyssal.engine.prefill import Chunk
from abyssal.engine.sequence import Sequence, State

AGEING = 10.0  # seconds of waiting that are worth one step of priority
TOGETHER = 16  # where all slots are taken, prompts are let in when one in so many has become free
PATIENCE = 0.1  # seconds that a free slot may wait for that
AHEAD = 4  # pages that a sequence is given at once where there are plenty: each gift is a word to the device


@dataclass
class Plan:
    """A step: what is computed of which prompts, and which sequences decode a token."""

    admitted: list[Sequence] = field(default_factory=list)
    chunks: list[tuple[Sequence, Chunk]] = field(default_factory=list)
    ready: list[Sequence] = field(default_factory=list)  # with that, all but their last token stand in the cache
    decoding: list[Sequence] = field(default_factory=list)
    tables: list[tuple[int, int, int]] = field(default_factory=list)  # (slot, column, page) that are new

    @property
    def empty(self) -> bool:
        return not (self.chunks or self.decoding or self.ready)


class NoPages(Exception):
    """A sequence that decodes needs a page, and none is free."""


class Scheduler:
    """`slots` sequences at once over `pages`; `step_tokens` a step; each decoding step writes up to `width` rows."""

    def __init__(
        self, pages: Pages, slots: int, step_tokens: int, width: int, modules: int, most_prompt: int | None = None
    ) -> None:
        """`most_prompt`: tokens of prompts a step, where that is less than what is left of the budget."""
        if step_tokens < slots * width:
            raise ValueError(
                f"step_tokens: expected at least {slots * width}, a step of {slots} sequences, got {step_tokens}"
            )
        self.pages, self.step_tokens, self.width, self.modules = pages, step_tokens, width, modules
        self.most_prompt = most_prompt or step_tokens
        self.waiting: list[Sequence] = []
        self.running: list[Sequence] = []  # in the order of their claims
        self.preemptions = 0
        self._few = slots // TOGETHER
        self._since: float | None = None  # when a slot became free that isn't given away yet
        self._slots = list(reversed(range(slots)))

    # ---- the queue ----------------------------------------------------------------------------------------

    def claim(self, s: Sequence) -> tuple[float, float, int]:
        """Who comes first. All age alike, so the order of two never changes."""
        return s.request.priority * AGEING + s.request.arrived, s.request.arrived, s.sample

    def add(self, s: Sequence) -> None:
        self.waiting.append(s)

    def need(self, rows: int) -> int:
        """Pages for so many rows."""
        return -(-rows // self.pages.size)

    def rows_ahead(self, s: Sequence) -> int:
        """Rows that are written once the next step is enqueued, whatever comes of those on their way."""
        return len(s.tokens) + (s.ahead + 1) * self.width + self.width

    # ---- a step -------------------------------------------------------------------------------------------

    def plan(self, decodes: Callable[[Sequence], bool]) -> Plan:
        """The next step. Raises NoPages, and has changed nothing that matters, where a decoding sequence can't go on:
        see `preempt`. `decodes`: whether a sequence that could decode should."""
        plan = Plan()
        budget = self.step_tokens
        for s in self.running:
            if s.state is State.DECODING and decodes(s):
                self._grow(s, plan)
                plan.decoding.append(s)
                budget -= self.width
        budget = min(budget, self.most_prompt)
        for s in self.running:
            if s.state is State.PREFILL and budget > 0:
                budget -= self._chunk(s, budget, plan)
        self.waiting.sort(key=self.claim)
        while self.waiting and budget > 0 and self._slots and (plan.admitted or not self._gathers()):
            s = self.waiting[0]
            if not self._admit(s, plan):
                break
            self.waiting.pop(0)
            budget -= self._chunk(s, budget, plan)
        return plan

    def _gathers(self) -> bool:
        """Whether more slots should become free before one is given away: where more wait than there are slots, several
        prompts in one step hold up those who decode less often than one in each."""
        now = time.monotonic()
        if len(self._slots) >= min(self._few, len(self.waiting)):
            self._since = None
            return False
        self._since = now if self._since is None else self._since
        if now - self._since < PATIENCE:
            return True
        self._since = None
        return False

    def _grow(self, s: Sequence, plan: Plan) -> None:
        missing = self.need(self.rows_ahead(s)) - len(s.pages)
        if missing > 0:
            if self.pages.free > AHEAD * len(self.running):
                last = self.need(len(s.tokens) + s.most + 2 * self.width) - len(s.pages)
                missing = max(min(last, AHEAD), missing)
            got = self.pages.allocate(missing, after=s.pages[-1] if s.pages else None)
            if got is None:
                raise NoPages
            self._give(s, got, plan)

    def _give(self, s: Sequence, pages: list[int], plan: Plan) -> None:
        plan.tables += [(s.slot, len(s.pages) + i, page) for i, page in enumerate(pages)]
        s.pages += pages

    def _chunk(self, s: Sequence, budget: int, plan: Plan) -> int:
        """Up to `budget` more of its tokens, all but the last in the end."""
        end = min(s.rows + budget, len(s.tokens) - 1)
        if end > s.rows:
            asked = s.sampling.prompt_logprobs if s.prompt_missing else None
            chunk = Chunk(s.slot, s.tokens, s.pages, s.rows, end, s.origin, asked)
            plan.chunks.append((s, chunk))
        used, s.rows = end - s.rows, end
        if end == len(s.tokens) - 1:
            plan.ready.append(s)
        return max(used, 1)

    def _admit(self, s: Sequence, plan: Plan) -> bool:
        whole = s.prompt_missing
        found, node = self.pages.match(s.tokens, s.request.salt) if not whole else ([], self.pages.root(s.request.salt))
        self.pages.hold(found)
        missing = self.need(self.rows_ahead(s)) - len(found)
        spare = self.pages.count // 64 if self.running else 0  # so that those that decode can grow for a while
        room = self.need(len(s.tokens) + s.most + 2 * self.width) - len(found) - missing
        got = None
        if self.pages.free >= missing + spare:
            got = self.pages.allocate(missing, after=found[-1] if found else None, room=max(room, 0))
        if got is None:
            self.pages.release(found)
            return False
        s.slot, s.state, s.pages = self._slots.pop(), State.PREFILL, []
        s.origin = s.rows = len(found) * self.pages.size
        s.node, s.registered = node, len(found)
        s.cold = len(s.tokens) < s.origin + self.modules
        if s.admitted is None:
            s.admitted = time.monotonic()
            s.cached_tokens = s.origin
        self._give(s, found + got, plan)
        plan.admitted.append(s)
        self.running.append(s)
        self.running.sort(key=self.claim)
        return True

    def fork(self, parent: Sequence, child: Sequence, plan: Plan) -> list[tuple[int, int]] | None:
        """Lets `child` share the pages of `parent`, both at the end of the same prompt. Returns the page of the parent
        and that of the child that must be copied into, (0, 0) if none; None, where there is no slot or page."""
        # Rows of the modules at the end know the next tokens, which will be each one's own.
        shared = self.pages.complete(len(parent.tokens))
        missing = self.need(self.rows_ahead(child)) - shared
        if not self._slots or self.pages.free < missing:
            return None
        room = self.need(len(child.tokens) + child.most + 2 * self.width) - shared - missing
        self.pages.hold(parent.pages[:shared])
        got = self.pages.allocate(missing, room=max(room, 0))
        assert got is not None
        child.slot, child.state, child.pages = self._slots.pop(), State.PREFILL, []
        child.origin, child.rows, child.cold = parent.origin, parent.rows, parent.cold
        child.node, child.registered = parent.node, parent.registered
        child.admitted, child.cached_tokens = time.monotonic(), parent.cached_tokens
        self._give(child, parent.pages[:shared] + got, plan)
        self.running.append(child)
        self.running.sort(key=self.claim)
        partial = self.need(len(parent.tokens) - 1) - shared
        return list(zip(parent.pages[shared:], got[:partial]))

    # ---- giving back --------------------------------------------------------------------------------------

    def register(self, s: Sequence) -> None:
        """Tells the prefix cache of the pages that are complete by now."""
        if s.cold:
            return
        known = s.rows + 1 if s.state is State.PREFILL else len(s.tokens)
        while s.registered < min(self.pages.complete(known), len(s.pages)):
            s.node = self.pages.register(s.pages[s.registered], s.registered, s.tokens, s.node)
            s.registered += 1

    def release(self, s: Sequence) -> None:
        """Takes a sequence from wherever it is; slot and pages are free at once. What is on its way still writes to
        them, but before anything that is enqueued from now on."""
        if s in self.running:
            self.running.remove(s)
            self._slots.append(s.slot)
            self.pages.release(s.pages)
            s.pages, s.slot, s.rows, s.registered = [], -1, 0, 0
        elif s in self.waiting:
            self.waiting.remove(s)

    def preempt(self) -> Sequence:
        """Sends the last of those that run back into the queue. Nothing may be on its way."""
        victim = self.running[-1]
        self.release(victim)
        victim.state, victim.drafts = State.WAITING, []
        self.waiting.append(victim)
        self.preemptions += 1
        return victim
