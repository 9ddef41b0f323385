"""Which pages of the KV cache are free. Bookkeeping only: what a page holds is the runner's."""

from __future__ import annotations


class PagePool:
    """A stack of free pages; taking and returning one page is O(1).

    The page returned last is taken first, so that a busy pool keeps touching the same memory and
    a page used after its return shows up early in tests.
    """

    def __init__(self, num_pages: int) -> None:
        self.num_pages = num_pages
        self._free = list(range(num_pages - 1, -1, -1))
        self._taken = bytearray(num_pages)

    @property
    def num_free(self) -> int:
        return len(self._free)

    def take(self, count: int) -> tuple[int, ...]:
        """Take `count` pages; ValueError when fewer are free (nothing is taken then)."""
        if count > len(self._free):
            raise ValueError(f"{count} pages wanted, {len(self._free)} of {self.num_pages} free")
        pages = tuple(self._free.pop() for _ in range(count))
        for page in pages:
            self._taken[page] = 1
        return pages

    def give_back(self, pages: tuple[int, ...]) -> None:
        """Return pages taken before; ValueError at the first that is not taken."""
        for page in pages:
            if not (0 <= page < self.num_pages and self._taken[page]):
                raise ValueError(f"page {page} is given back but was not taken")
            self._taken[page] = 0
            self._free.append(page)
