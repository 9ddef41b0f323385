"""Which prompt passes through the model layer by layer, over several steps, while others go on.

What that means is the runner's; here stands only who is on the way. There is one place: the first
that came has it until it is through or leaves.
"""

from __future__ import annotations

from kttrio.engine.sequence import Sequence
from kttrio.plan import Capacity, Chunk


class Passage:
    """The place, and who has it; without long prompts in the capacity it stays empty."""

    def __init__(self, capacity: Capacity) -> None:
        self._least, self._most = capacity.long_tokens, capacity.max_long_tokens
        self.sequence: Sequence | None = None
        self.chunk: Chunk | None = None
        """The same one in every plan until its result is there."""

    def takes(self, sequence: Sequence) -> bool:
        """Whether the runner lacks so much of it that it goes this way and no other. A single
        token never does: a chunk of it is what steps have for each sequence that decodes."""
        return 0 < self._least <= sequence.num_lacking and not sequence.is_decoding

    def begin(self, sequence: Sequence) -> None:
        self.sequence, self.chunk = sequence, sequence.next_chunk(self._most)

    def end(self) -> None:
        self.sequence = self.chunk = None
