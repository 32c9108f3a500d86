"""Pages against a model that remembers what was written to every row, through any course of running sequences."""

from dataclasses import dataclass

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from abyssal.engine.pages import Pages

texts = st.lists(st.integers(0, 1), max_size=40)  # few tokens, so that texts often begin alike
salts = st.sampled_from(["", "a", "b"])


@dataclass
class Running:
    salt: str
    tokens: list[int]
    pages: list[int]
    node: int
    registered: int  # of its pages
    room: int


class Course(RuleBasedStateMachine):
    """Sequences come, grow, are forked, end and fail, in a pool that is too small for all."""

    @initialize(
        count=st.integers(2, 24), size=st.integers(1, 4), lookahead=st.integers(0, 3), contiguous=st.booleans(),
        cached=st.booleans(),
    )  # fmt: skip
    def begin(self, count, size, lookahead, contiguous, cached) -> None:
        self.pages = Pages(count, size, lookahead, contiguous, cached)
        self.running: list[Running] = []
        self.rows: dict[int, list[object]] = {page: [None] * size for page in range(count)}

    def written(self, s: Running, position: int) -> object:
        """What a sequence's row is made of: all tokens up to its own, and those after that the modules look at."""
        return s.salt, tuple(s.tokens[: position + 1 + self.pages.lookahead])

    def compute(self, s: Running) -> None:
        """Writes the rows of all tokens but the last that the prefix cache didn't give, and makes pages known."""
        size = self.pages.size
        for p in range(s.registered * size, len(s.tokens) - 1):
            self.rows[s.pages[p // size]][p % size] = self.written(s, p)
        for index in range(s.registered, self.pages.complete(len(s.tokens))):
            s.node = self.pages.register(s.pages[index], index, s.tokens, s.node)
            s.registered += 1

    def take(self, count: int, after: int | None, room: int) -> list[int] | None:
        """Pages from the pool: all or nothing, nobody's, each once, and never the first."""
        free, held = self.pages.free, {page for s in self.running for page in s.pages}
        taken = self.pages.allocate(count, after, room)
        assert (taken is None) == (count > free)
        if taken is None:
            assert self.pages.free == free
            return None
        assert len(set(taken)) == count and not set(taken) & held and 0 not in taken
        assert self.pages.free == free - count
        for page in taken:
            self.rows[page] = [None] * self.pages.size
        return taken

    @rule(tokens=texts, salt=salts, room=st.integers(0, 5))
    def start(self, tokens, salt, room) -> None:
        tokens = [*tokens, 0]
        found, node = self.pages.match(tokens, salt)
        size, s = self.pages.size, Running(salt, tokens, list(found), node, len(found), room)
        assert self.pages.cached or not found
        assert len(found) * size < len(tokens)  # a token is left to compute
        for i, page in enumerate(found):
            assert self.rows[page] == [self.written(s, i * size + j) for j in range(size)]
        self.pages.hold(found)
        more = self.take(-(-len(tokens) // size) - len(found), found[-1] if found else None, room)
        if more is None:
            self.pages.release(found)
            return
        s.pages += more
        self.running.append(s)
        self.compute(s)

    @precondition(lambda self: self.running)
    @rule(data=st.data(), tokens=st.lists(st.integers(0, 1), min_size=1, max_size=6))
    def grow(self, data, tokens) -> None:
        s = data.draw(st.sampled_from(self.running))
        need = -(-(len(s.tokens) + len(tokens)) // self.pages.size) - len(s.pages)
        more = self.take(need, s.pages[-1], s.room) if need > 0 else []
        if more is not None:
            s.pages += more
            s.tokens = s.tokens + tokens
            self.compute(s)

    @precondition(lambda self: self.running)
    @rule(data=st.data())
    def fork(self, data) -> None:
        """Shares the pages that are known whole; the others are copied."""
        s = data.draw(st.sampled_from(self.running))
        shared, own = s.pages[: s.registered], s.pages[s.registered :]
        copies = self.take(len(own), shared[-1] if shared else None, s.room)
        if copies is not None:
            for page, copy in zip(own, copies):
                self.rows[copy] = list(self.rows[page])
            self.pages.hold(shared)
            self.running.append(Running(s.salt, s.tokens, shared + copies, s.node, s.registered, s.room))
            assert all(self.pages.shared(page) for page in shared)

    @precondition(lambda self: self.running)
    @rule(data=st.data())
    def end(self, data) -> None:
        s = self.running.pop(data.draw(st.integers(0, len(self.running) - 1)))
        self.pages.release(s.pages)

    @precondition(lambda self: self.running)
    @rule(data=st.data())
    def fail(self, data) -> None:
        """Rows that are no numbers: all who hold the page end, and nobody reads it again."""
        page = data.draw(st.sampled_from(data.draw(st.sampled_from(self.running)).pages))
        early = data.draw(st.booleans())
        if early:
            self.pages.drop(page)
        for s in [s for s in self.running if page in s.pages]:
            self.running.remove(s)
            self.pages.release(s.pages)
        if not early:
            self.pages.drop(page)
        self.rows[page] = ["no number"] * self.pages.size

    @invariant()
    def every_page_is_counted_once(self) -> None:
        held = [page for s in self.running for page in s.pages]
        assert self.pages.free == self.pages.count - 1 - len(set(held))
        assert 0 <= self.pages.idle <= self.pages.free
        for page in range(1, self.pages.count):
            assert self.pages.shared(page) == (held.count(page) > 1)

    @invariant()
    def what_is_held_is_as_it_was_written(self) -> None:
        for s in self.running:
            for p in range(len(s.tokens) - 1 - self.pages.lookahead):
                # Rows near the end were made before all that they look at was known; `complete` waits for these.
                if p // self.pages.size < s.registered:
                    assert self.rows[s.pages[p // self.pages.size]][p % self.pages.size] == self.written(s, p)

    def teardown(self) -> None:
        if hasattr(self, "running"):
            for s in self.running:
                self.pages.release(s.pages)
            assert self.pages.free == self.pages.count - 1
            taken = self.pages.allocate(self.pages.count - 1)
            assert taken is not None and sorted(taken) == list(range(1, self.pages.count))
            assert self.pages.idle == 0 and self.pages.allocate(1) is None


TestCourse = Course.TestCase
TestCourse.settings = settings(max_examples=120, stateful_step_count=40, deadline=None)


def known(pages: Pages, tokens: list[int], salt: str = "") -> list[int]:
    """A text that was computed and is gone: its pages, which are known but nobody's."""
    found, node = pages.match(tokens, salt)
    pages.hold(found)
    taken = pages.allocate(-(-len(tokens) // pages.size) - len(found), found[-1] if found else None)
    assert taken is not None
    held = found + taken
    for index in range(len(found), pages.complete(len(tokens))):
        node = pages.register(held[index], index, tokens, node)
    pages.release(held)
    return held


def test_the_least_recently_used_text_goes_first_and_its_end_before_its_beginning() -> None:
    pages = Pages(1 + 12, 2)
    old, new = [1] * 9, [2] * 9  # 4 full pages and a token each
    known(pages, old)
    known(pages, new)
    assert (pages.free, pages.idle) == (12, 8)
    pages.match(old, "")  # looking is no use
    lengths = []
    for _ in range(12):
        assert pages.allocate(1) is not None
        lengths.append((len(pages.match(old, "")[0]), len(pages.match(new, "")[0])))
    clean, first, second = [(4, 4)] * 4, [(3, 4), (2, 4), (1, 4), (0, 4)], [(0, 3), (0, 2), (0, 1), (0, 0)]
    assert lengths == clean + first + second
    assert pages.evicted == 8


def test_a_text_that_was_used_again_outlives_a_newer_one() -> None:
    pages = Pages(1 + 4, 2)
    known(pages, [1, 1, 1])
    known(pages, [2, 2, 2])
    found, _ = pages.match([1, 1, 1], "")
    pages.hold(found)
    pages.release(found)
    assert pages.allocate(3) is not None  # two clean ones, and one that was known
    assert pages.match([1, 1, 1], "")[0] == found and pages.match([2, 2, 2], "")[0] == []


def test_a_text_is_found_as_far_as_it_is_the_same() -> None:
    pages = Pages(20, 4)
    held = known(pages, list(range(13)))
    assert pages.match(list(range(13)), "")[0] == held[:3]
    assert pages.match(list(range(12)), "")[0] == held[:2]  # a token must be left to compute
    assert pages.match([*range(7), 99, *range(8, 13)], "")[0] == held[:1]
    assert pages.match([99, *range(1, 13)], "")[0] == []
    assert pages.match([*range(4, 13)], "")[0] == []  # a page is known by what stands before it


def test_texts_of_different_salts_never_meet() -> None:
    pages = Pages(20, 2)
    held = known(pages, [1] * 7, "one")
    assert pages.match([1] * 7, "one")[0] == held[:3]
    assert pages.match([1] * 7, "two")[0] == [] and pages.match([1] * 7, "")[0] == []


@pytest.mark.parametrize("lookahead", [1, 2, 3])
def test_a_page_is_known_by_the_tokens_that_its_modules_rows_are_made_of(lookahead) -> None:
    pages = Pages(20, 4, lookahead)
    text = list(range(12))
    held = known(pages, text)
    for changed in range(12):
        other = [t if i != changed else 99 for i, t in enumerate(text)]
        same = max(changed - lookahead, 0) // 4
        assert pages.match([*other, 50], "")[0] == held[: min(same, (12 - lookahead) // 4)]


def test_without_the_prefix_cache_nothing_is_known() -> None:
    pages = Pages(10, 2, cached=False)
    known(pages, [1] * 7)
    assert pages.match([1] * 7, "")[0] == [] and pages.idle == 0


def test_pages_follow_each_other_where_that_can_be_had() -> None:
    pages = Pages(40, 2, contiguous=True)
    a, b = pages.allocate(3, None, 8), pages.allocate(3, None, 8)
    assert a is not None and b is not None
    for held in (a, b):
        for _ in range(8):
            held += pages.allocate(1, held[-1]) or []
        assert held == list(range(held[0], held[0] + 11))


def test_a_page_is_not_released_more_often_than_held() -> None:
    pages = Pages(4, 2)
    taken = pages.allocate(1)
    assert taken is not None
    pages.release(taken)
    with pytest.raises(ValueError, match="released more often than held"):
        pages.release(taken)


def test_a_pool_without_a_page_to_give_is_refused() -> None:
    with pytest.raises(ValueError, match="expected 2 or more, one of them for idle rows, got 1"):
        Pages(1, 64)
