"""What the routes share: the engine, the served model's text side, the settings, who is live."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from random import Random
from typing import Protocol

from kttrio.config import ServerConfig
from kttrio.engine.engine import Engine
from kttrio.server.completion import Completion
from kttrio.server.constraints import Constraints
from kttrio.server.errors import ApiError
from kttrio.server.inference_counts import InferenceCounts
from kttrio.server.meter import Meter
from kttrio.server.served_model import ServedModel
from kttrio.server.visits import VISIT


class Recording(Protocol):
    """Writes down, on command, which experts the steps use. Commands may come from any thread."""

    @property
    def is_on(self) -> bool: ...

    @property
    def num_kept(self) -> int:
        """Steps that a dump would write."""
        ...

    def start(self) -> None:
        """Begin with the next step; what was not dumped is forgotten."""
        ...

    def stop(self) -> None: ...

    def dump(self) -> Path | None:
        """Write what there is to a new file, and forget it; None where there is nothing.
        Blocking. OSError where it cannot be written."""
        ...


class Placement(Protocol):
    """Has the experts on the device follow those in use. Asked from any thread."""

    @property
    def num_swaps(self) -> int:
        """Experts that came to the device since the start."""
        ...

    def save(self) -> Path:
        """Keep what is known of the experts in use, over what was kept before. Blocking. OSError
        where it cannot be written."""
        ...


Count = Callable[[], Mapping[str, object]]
"""Plain values for people. Asked from any thread; may block for as long as a step."""


@dataclass(slots=True, kw_only=True)
class AppState:
    """One server. The roof makes it, starts the drain, and ends what outlasts it."""

    engine: Engine
    model: ServedModel
    config: ServerConfig
    constraints: Constraints = field(default_factory=Constraints)
    """Open for as long as the engine runs: the roof sees to that."""
    settings: Mapping[str, object] = field(default_factory=dict)
    """What /get_server_info tells beside the engine's counts: plain values, no secrets."""
    seeds: Random = field(default_factory=Random)
    """Where requests without a seed get theirs."""
    recording: Recording | None = None
    """None: the settings ask for none."""
    placement: Placement | None = None
    """None: experts stay where they are."""
    count: Count | None = None
    """What /get_server_info tells that only the runner knows."""
    inferences: InferenceCounts = field(default_factory=InferenceCounts)
    meter: Meter = field(default_factory=Meter)
    draining: bool = False
    live: set[Completion] = field(default_factory=set)

    @contextmanager
    def track(self, completion: Completion) -> Iterator[None]:
        """Know `completion` for as long as the block lasts, and count what came of it."""
        self.live.add(completion)
        try:
            yield
        finally:
            self.live.discard(completion)
            if completion.was_taken:
                self._note_end(completion)

    def _note_end(self, completion: Completion) -> None:
        usage, ends = completion.usage, completion.ends
        self.meter.note_request(
            seconds=completion.seconds,
            prompt_tokens=usage.prompt_tokens,
            output_tokens=usage.completion_tokens,
            ends=ends,
        )
        if (visit := VISIT.get()) is not None:
            visit.outcome = (
                f"prompt_tokens={usage.prompt_tokens} completion_tokens={usage.completion_tokens} "
                f"finish={','.join(sorted(set(ends)))}"
            )

    def abort(self, name: str | None) -> int:
        """End the requests of this name, or all, with what they have; how many they were."""
        named = [one for one in self.live if name is None or name in one.names]
        for completion in named:
            completion.abort()
        return len(named)

    @property
    def trouble(self) -> str | None:
        """Why requests would not be served just now; None: they are."""
        if self.draining:
            return "the server is shutting down"
        stats = self.engine.stats
        return None if stats.healthy else stats.error or "the engine is not running"

    def begin_drain(self) -> None:
        """Take no new requests; those that run go on."""
        self.draining = True
        self.engine.begin_drain()

    def finish_streams(self, message: str) -> None:
        """End every request that still runs with an error: an event in streams, else a 503."""
        for completion in list(self.live):
            completion.fail(ApiError(503, message, code="shutting_down"))


def installed_version() -> str:
    try:
        return version("kttrio")
    except PackageNotFoundError:  # run from its sources
        return "unknown"
