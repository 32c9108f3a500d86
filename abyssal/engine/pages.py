"""Who holds which page of the latent cache: reference counts, the prefix cache, and where a new page comes from.

Only numbers: the rows themselves lie in `model.cache.Cache`. Page 0 is nobody's: idle rows of a batch write there.

A full page is known by its tokens and by the page before it, back to the beginning of the text; these are compared
themselves, not their hashes, so two prompts can never be mixed up. MTP module d's row p is made of token p + d, so with
M modules a page is known by the M tokens after it, too. A page that nobody holds keeps its rows until it is needed:
the least recently used goes first, and of a text the end before the beginning.
"""

from array import array
from collections import OrderedDict
from collections.abc import Sequence

import numpy as np

Node = int  # a page's content, with all before it; 0: nothing yet


class Pages:
    """`count` pages of `size` tokens. `lookahead` is the number of MTP modules whose rows lie in them. With
    `contiguous`, a sequence's pages follow each other where that can be had: what a CPU reads at once."""

    def __init__(
        self, count: int, size: int, lookahead: int = 0, contiguous: bool = False, cached: bool = True
    ) -> None:
        """Raises ValueError if there is no page to give."""
        if count < 2:
            raise ValueError(f"pages: expected 2 or more, one of them for idle rows, got {count}")
        self.count, self.size, self.lookahead, self.contiguous, self.cached = count, size, lookahead, contiguous, cached
        self.evicted = 0
        self._references = [0] * count
        self._clean: OrderedDict[int, None] = OrderedDict.fromkeys(range(1, count))  # free, nothing worth keeping
        self._known: OrderedDict[int, None] = OrderedDict()  # free, but of known content; least recently used first
        self._content: dict[tuple[Node, bytes], tuple[Node, int]] = {}  # what is known: its node and its page
        self._key: dict[int, tuple[Node, bytes]] = {}  # of a page of known content
        self._roots: dict[str, Node] = {}
        self._nodes = 0
        self._room: dict[int, range] = {}  # pages that running sequences may yet grow into, by a sequence's first

    # ---- counts -------------------------------------------------------------------------------------------

    @property
    def free(self) -> int:
        """Pages that nobody holds, of known content or not."""
        return len(self._clean) + len(self._known)

    @property
    def idle(self) -> int:
        """Of these, those whose content is known."""
        return len(self._known)

    def shared(self, page: int) -> bool:
        return self._references[page] > 1

    # ---- the prefix cache ---------------------------------------------------------------------------------

    def root(self, salt: str) -> Node:
        """Where the texts of one tenant begin: those of another never meet them."""
        if salt not in self._roots:
            self._nodes += 1
            self._roots[salt] = self._nodes
        return self._roots[salt]

    def match(self, tokens: Sequence[int], salt: str) -> tuple[list[int], Node]:
        """The longest run of known pages that `tokens` begins with, and its node. Takes none of them: see `hold`.

        At least one token, and the modules' lookahead, are left over: somebody must compute a next token.
        """
        node, pages = self.root(salt), list[int]()
        while self.cached and (len(pages) + 1) * self.size + max(self.lookahead, 1) <= len(tokens):
            found = self._content.get((node, self._bytes(tokens, len(pages))))
            if found is None:
                break
            node, page = found
            pages.append(page)
        return pages, node

    def register(self, page: int, index: int, tokens: Sequence[int], before: Node) -> Node:
        """Makes known that `page` holds the rows of the `index`-th page of `tokens`, after `before`. Returns its node:
        where another page of the same content is known already, that one's."""
        if page in self._key:
            raise ValueError(f"page {page}: is known already, and may hold one content alone")
        key = (before, self._bytes(tokens, index))
        found = self._content.get(key)
        if found is not None:
            return found[0]
        self._nodes += 1
        if self.cached:
            self._content[key] = (self._nodes, page)
            self._key[page] = key
        return self._nodes

    def complete(self, rows: int) -> int:
        """How many whole pages a sequence with so many known tokens, all but the last computed, can register."""
        return max(rows - max(self.lookahead, 1), 0) // self.size

    def _bytes(self, tokens: Sequence[int], index: int) -> bytes:
        return array("i", tokens[index * self.size : (index + 1) * self.size + self.lookahead]).tobytes()

    # ---- holding and giving back --------------------------------------------------------------------------

    def hold(self, pages: Sequence[int]) -> None:
        """One reference more to each."""
        for page in pages:
            if self._references[page] == 0:
                self._known.pop(page, None)
                self._clean.pop(page, None)
            self._references[page] += 1

    def release(self, pages: Sequence[int]) -> None:
        """One reference less to each, the last first: so the end of a text is forgotten before its beginning."""
        for page in reversed(pages):
            self._room.pop(page, None)
            if self._references[page] < 1:
                raise ValueError(f"page {page}: released more often than held")
            self._references[page] -= 1
            if self._references[page] == 0:
                (self._known if page in self._key else self._clean)[page] = None

    def allocate(self, count: int, after: int | None = None, room: int = 0) -> list[int] | None:
        """`count` pages, held; None, and nothing held, where there are not as many. `after` is the sequence's last
        page so far; `room` is how many more it may come to want."""
        if count > self.free:
            return None
        taken: list[int] = []
        for _ in range(count):
            page = self._next(after, count - len(taken), room)
            self._forget(page)
            self._clean.pop(page, None)
            self._known.pop(page, None)
            self._references[page] = 1
            taken.append(page)
            after = page
        if self.contiguous and room and taken:
            self._room[taken[0]] = range(taken[-1] + 1, taken[-1] + 1 + room)
        return taken

    def drop(self, page: int) -> None:
        """Forgets what is known of a page, whose rows turned out to be no numbers."""
        held = self._references[page] > 0
        if page in self._known and not held:
            self._known.pop(page)
            self._clean[page] = None
        self._forget(page)

    def _forget(self, page: int) -> None:
        key = self._key.pop(page, None)
        if key is not None:
            del self._content[key]
            self.evicted += 1

    def _next(self, after: int | None, wanted: int, room: int) -> int:
        if self.contiguous:
            # Even where something is known of the next page: attention over one run of pages is worth more.
            if after is not None and (after + 1 in self._clean or after + 1 in self._known):
                return after + 1
            if self._clean:
                return self._beginning(wanted + room)
        if self._clean:
            return next(iter(self._clean))
        return next(iter(self._known))

    def _beginning(self, wanted: int) -> int:
        """Where a run of clean pages begins that has room, outside of what others may grow into; else the longest."""
        clean = np.zeros(self.count + 1, dtype=bool)
        clean[list(self._clean)] = True
        outside = clean.copy()
        for pages in self._room.values():
            outside[pages.start : pages.stop] = False
        for mask in (outside, clean):
            edges = np.flatnonzero(np.diff(np.concatenate(([False], mask)).astype(np.int8)))
            starts, lengths = edges[::2], np.diff(edges)[::2]
            if mask is outside and starts.size and (lengths >= wanted).any():
                return int(starts[np.argmax(lengths >= wanted)])
        return int(starts[np.argmax(lengths)])
