"""Records which experts the steps choose, on command; the files are recording.py's.

A long prompt that passes through the model beside the steps counts as one more, at its end.

A step counts when it began and ended between start and stop, and did not fail. All of its tokens
do, drafts that are refused later among them, because all were computed. Batches have no padding:
every choice is a real token's. The layer that makes drafts is left out.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from threading import Lock
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kttrio.experts.block import MoEBlock
from kttrio.experts.recording import write_records, write_residents, write_stat
from kttrio.layers.batch import Batch

_EXTEND, _DECODE, _MIXED = 1, 2, 3  # SGLang's numbers for what a step consists of
_TOKEN_BYTES = 2 * 36  # a token's id and position: two integers and their places in lists
_RANK, _KEY = 0, "primary"  # there is one process, and one who counts


class RecordedShape(NamedTuple):
    """The model's own numbers."""

    num_layers: int
    """Those without experts have zeros for counts."""
    num_experts: int
    top_k: int


class RecorderSettings(NamedTuple):
    """What is recorded, how much of it, and where it goes."""

    mode: str
    """stat, per_pass, per_token; stat_approx is stat, since exact counts cost nothing more here."""
    num_steps: int | None
    """The last ones are kept; None: all."""
    directory: Path
    with_residents: bool = False
    """Which experts were on the device in each step is recorded, too."""

    def most_bytes(self, shape: RecordedShape, step_tokens: int) -> int:
        """What it takes where every step has so many tokens; ValueError where all are kept."""
        if self.num_steps is None:
            raise ValueError("a recording of all steps has no bound")
        counts = shape.num_layers * shape.num_experts * torch.int32.itemsize
        masks = 2 * shape.num_layers * shape.num_experts if self.with_residents else 0
        if self.mode == "per_token":
            choices = shape.num_layers * shape.top_k * torch.int32.itemsize
            return self.num_steps * (counts + masks + step_tokens * (choices + _TOKEN_BYTES))
        copies = 1 if self.mode == "per_pass" else 2  # a dump of stat puts them into one tensor
        return self.num_steps * (counts * copies + masks)


class _Kept(NamedTuple):
    """What is known of a step that counts."""

    record: dict[str, Any]
    residents: Tensor | None  # [layers, experts] bool; steps share it while it does not change


class Pass:
    """What one step chooses, or a long prompt in as many turns as it takes."""

    def __init__(self, session: object) -> None:
        self.session = session
        """It is kept if this one goes on to its end."""
        self.ids: dict[int, list[Tensor]] = {}
        """By layer, in the order of the tokens: [tokens, top_k] int32."""

    def hear(self, layer: int, ids: Tensor) -> None:
        self.ids.setdefault(layer, []).append(ids)

    @property
    def choices(self) -> dict[int, Tensor]:
        return {layer: torch.cat(ids) for layer, ids in self.ids.items()}


class Recorder:
    """Listens to a model's MoE blocks while steps run in one thread; commands may come from any."""

    def __init__(
        self,
        settings: RecorderSettings,
        shape: RecordedShape,
        blocks: Mapping[int, MoEBlock],
        residents: Callable[[], Tensor] | None = None,
    ) -> None:
        """`blocks` by the number of their layer. `residents`: which experts are on the device,
        [layers, experts] bool; None where the settings do not ask for them."""
        self._settings, self._residents = settings, residents
        self._shape = shape
        self._lock = Lock()  # over what is kept; the next one is over dumps
        self._dumping = Lock()
        self._session: object | None = None  # a new one with each start; None: off
        self._heard: Pass | None = None  # the one that runs now
        self._num_steps = 0
        self._kept = self._deque()
        for number, block in blocks.items():
            block.listeners.append(partial(self._listen, number))

    @property
    def is_on(self) -> bool:
        return self._session is not None

    @property
    def is_hearing(self) -> bool:
        """A step or a turn runs now that is recorded. For the thread of the steps."""
        return self._heard is not None

    @property
    def num_kept(self) -> int:
        """Steps that a dump would write."""
        return len(self._kept)

    def start(self) -> None:
        """Record from the next step on; what was not dumped is forgotten."""
        with self._lock:
            self._session = object()
            self._kept.clear()

    def stop(self) -> None:
        """Record no more; what there is waits to be dumped."""
        with self._lock:
            self._session = None

    def dump(self) -> Path | None:
        """Write what there is to a new file and forget it; None where there is nothing.

        Blocking; steps and their recording go on meanwhile. Raises OSError, and then forgets
        nothing.
        """
        with self._dumping:
            with self._lock:
                kept = list(self._kept)
            if not kept:
                return None
            path = self._write(kept)
            with self._lock:
                written = kept[-1].record["forward_pass_id"]
                rest = [each for each in self._kept if each.record["forward_pass_id"] > written]
                self._kept = self._deque(rest)
            return path

    @contextmanager
    def step(self, batch: Batch) -> Iterator[None]:
        """The block is the model's forward pass over `batch`, and what may show that it failed."""
        self._num_steps += 1
        begun = self.begin()
        with self.turn(begun):
            yield
        self._keep(begun, batch)

    def begin(self) -> Pass | None:
        """A pass of several turns begins; None where nothing is recorded."""
        return None if self._session is None else Pass(self._session)

    @contextmanager
    def turn(self, begun: Pass | None) -> Iterator[None]:
        """The block belongs to that pass, and to nothing else."""
        self._heard = begun
        try:
            yield
        finally:
            self._heard = None

    def end(self, begun: Pass | None, batch: Batch) -> None:
        """That pass is through, and has not failed; `batch` has all its tokens."""
        self._num_steps += 1
        self._keep(begun, batch)

    def _listen(self, layer: int, ids: Tensor) -> None:
        if self._heard is not None:
            self._heard.hear(layer, ids)

    def _keep(self, begun: Pass | None, batch: Batch) -> None:
        if begun is None:
            return
        record = self._record(batch, begun.choices)
        residents = None if self._residents is None else self._residents()
        with self._lock:
            if self._session is not begun.session:
                return
            last = self._kept[-1].residents if self._kept else None
            if last is not None and residents is not None and torch.equal(last, residents):
                residents = last
            self._kept.append(_Kept(record, residents))

    def _record(self, batch: Batch, seen: Mapping[int, Tensor]) -> dict[str, Any]:
        ids = stack_choices(seen, self._shape.num_layers)
        record = {
            "forward_pass_id": self._num_steps,
            "rank": _RANK,
            "gatherer_key": _KEY,
            "global_physical_count": count_choices(ids, self._shape.num_experts),
        }
        return record | _details(batch, ids) if self._settings.mode == "per_token" else record

    def _write(self, kept: list[_Kept]) -> Path:
        """The file of the choices; one of the residents lies beside it."""
        path = self._write_choices([each.record for each in kept])
        residents = [each.residents for each in kept if each.residents is not None]
        if residents:
            try:
                write_residents(self._settings.directory, torch.stack(residents))
            except OSError:
                path.unlink()
                raise
        return path

    def _write_choices(self, records: list[dict[str, Any]]) -> Path:
        directory = self._settings.directory
        num_layers, num_experts, _ = self._shape
        if self._settings.mode.startswith("per_"):
            return write_records(directory, records, num_layers=num_layers, num_experts=num_experts)
        num_rows = self._settings.num_steps or len(records)
        counts = torch.zeros(num_rows, num_layers, num_experts, dtype=torch.int32)
        for row, record in zip(counts, records, strict=False):  # the rows left over stay zeros
            row.copy_(record["global_physical_count"])
        return write_stat(directory, counts)

    def _deque(self, kept: list[_Kept] | None = None) -> deque[_Kept]:
        return deque(kept or (), maxlen=self._settings.num_steps)


def stack_choices(seen: Mapping[int, Tensor], num_layers: int) -> Tensor:
    """ids [tokens, top_k] of some layers -> [layers, tokens, top_k] int32, -1 for the others."""
    chosen = torch.stack(list(seen.values())).cpu()
    ids = torch.full((num_layers, *chosen.shape[1:]), -1, dtype=torch.int32)
    ids[list(seen)] = chosen
    return ids


def count_choices(ids: Tensor, num_experts: int) -> Tensor:
    """ids [layers, tokens, top_k], -1 for none -> [layers, experts] int32."""
    first = torch.arange(len(ids)) * num_experts
    places = (ids + first[:, None, None])[ids >= 0]
    counts = torch.bincount(places, minlength=len(ids) * num_experts)
    return counts.view(len(ids), num_experts).int()


def _details(batch: Batch, ids: Tensor) -> dict[str, Any]:
    """Whose choices they are; the tokens' order is that of `ids`."""
    modes = {0: _EXTEND, len(batch.lengths): _DECODE}
    return {
        "input_ids": batch.token_ids.tolist(),
        "positions": batch.positions.tolist(),
        "extend_seq_lens": list(batch.lengths),
        "forward_mode": modes.get(batch.num_decodes, _MIXED),
        "topk_ids_of_layer": ids,
    }
