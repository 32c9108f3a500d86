"""What the engine says: pieces of text, looks inside for those who asked, and numbers."""

import time
from collections import deque

from abyssal.engine.metrics import Metrics
from abyssal.engine.pages import Pages
from abyssal.engine.pending import Lap, Result
from abyssal.engine.request import Inside, Piece
from abyssal.engine.runner import Runner
from abyssal.engine.scheduler import Scheduler
from abyssal.engine.sequence import Sequence

SHOWN = 0.25  # seconds between two looks inside


class Report:
    """Keeps `metrics`, and the pieces that have not been fetched yet."""

    def __init__(self, metrics: Metrics, pages: Pages, runner: Runner) -> None:
        self.metrics, self.pages, self.runner = metrics, pages, runner
        self.pieces: list[Piece] = []
        self._shown: dict[tuple[int, int], float] = {}
        self._settled = time.perf_counter()
        self._recent: deque[tuple[float, int]] = deque()
        self._last: Lap | None = None

    def fetch(self) -> list[Piece]:
        pieces, self.pieces = self.pieces, []
        return pieces

    def tell(self, s: Sequence) -> None:
        """What has become certain of a sequence."""
        piece = s.piece()
        if piece is None:
            return
        key, now = (s.request.id, s.sample), time.monotonic()
        if s.request.inspect and (s.finish or now - self._shown.get(key, -SHOWN) >= SHOWN):
            self._shown[key] = now
            piece = Piece(**{**vars(piece), "inside": self._inside(s)})
        if s.finish:
            self._shown.pop(key, None)
            self.metrics.finished[s.finish] += 1
        self.pieces.append(piece)

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

    # ---- numbers ------------------------------------------------------------------------------------------

    def entered(self, s: Sequence) -> None:
        """A sequence decodes from now on."""
        if s.counted or s.admitted is None:
            return
        s.counted = True
        self.metrics.queue_time.add(s.admitted - s.request.arrived)
        if s.sample == 0:
            self.metrics.prompt_tokens += len(s.request.prompt)
            self.metrics.cached_tokens += s.cached_tokens

    def took(self, s: Sequence, result: Result | None, before: float | None) -> None:
        """A sequence has got what a step made for it, `result` where drafts of the modules were in it; `before` is when
        it had got the last."""
        m = self.metrics
        if result is not None:
            for counts, upto in ((m.drafted, len(result.verified)), (m.accepted, result.accepted)):
                counts.extend([0] * (len(result.verified) - len(counts)))
                for i in range(upto):
                    counts[i] += 1
        assert s.last_token is not None
        if before is None:
            m.first_token.add(s.last_token - s.request.arrived)
        else:
            m.between_tokens.add(s.last_token - before)

    def settled(self, began: float, lap: Lap, decoded: int | None, made: int, more: bool) -> float:
        """A step that began at `began` is over and made so many tokens; `decoded`: of how many sequences, where there
        were no prompts in it; `more`: there is work left. Returns its seconds, not counting those in which the one
        before still ran."""
        m, ended = self.metrics, time.perf_counter()
        seconds = ended - max(self._settled, began)
        self._settled = ended
        m.step_seconds += seconds
        m.generated_tokens += made
        if decoded is not None:
            m.decode_seconds += seconds
            m.decoded_tokens += made
            row = m.by_batch.setdefault(decoded, [0, 0.0, 0])
            row[0], row[1], row[2] = row[0] + 1, row[1] + seconds, row[2] + made
        m.device_seconds += lap.seconds()
        if self._last is not None:
            m.idle_seconds += max(lap.since(self._last), 0.0)
        self._last = lap if more else None
        self._recent.append((ended, made))
        return seconds

    def gauges(self, scheduler: Scheduler) -> None:
        m, now = self.metrics, time.perf_counter()
        m.running, m.waiting, m.preemptions = len(scheduler.running), len(scheduler.waiting), scheduler.preemptions
        m.pages_free, m.pages_cached, m.evicted_pages = self.pages.free, self.pages.idle, self.pages.evicted
        m.cached_rows = sum(s.rows for s in scheduler.running)
        while self._recent and now - self._recent[0][0] > 1:
            self._recent.popleft()
        m.tokens_per_second = float(sum(made for _, made in self._recent))  # of the last second
