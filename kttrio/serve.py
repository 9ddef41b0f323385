"""The roof: brings both wings together, and keeps the server alive and lets it end well.

The only module that knows the runner and the HTTP side at once. The root nursery holds three
things: the engine, the listening side, and whoever waits for signals. Whatever ends the server
goes the same way: refuse new requests, let the running ones finish or end them with an error
event, close the connections, free the model.
"""

from __future__ import annotations

import gc
import logging
import signal
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from random import Random
from typing import Protocol

import trio

from kttrio.config import ConfigError, RunnerConfig, ServerConfig
from kttrio.engine.engine import Engine
from kttrio.native import NativeError
from kttrio.plan import StepRunner
from kttrio.server.app import build_app
from kttrio.server.cors import check_origins
from kttrio.server.grpc.server import GrpcServer
from kttrio.server.keys import exposure
from kttrio.server.meter import watch_lag
from kttrio.server.served_model import ServedModel
from kttrio.server.state import AppState, Count, Placement, Recording
from kttrio.server.wire.serving import Addresses, check_listening, serve_http
from kttrio.text.images import ImageFormat

DEMO_MODEL = Path(__file__).parent / "demo"
DEMO_NAME = "kttrio-demo"
SIGNALS = (signal.SIGTERM, signal.SIGINT)

_log = logging.getLogger(__name__)


class ServerFailed(Exception):
    """The server could not go on, or was not allowed to end in good order."""


@dataclass(frozen=True, slots=True)
class Settings:
    """Everything the command line can say; each part is handed its own record."""

    runner: RunnerConfig = field(default_factory=RunnerConfig)
    server: ServerConfig = field(default_factory=ServerConfig)

    @property
    def directory(self) -> Path:
        """The checkpoint that is served."""
        return self.runner.model.model or DEMO_MODEL

    @property
    def located(self) -> RunnerConfig:
        """The runner's, with the checkpoint named."""
        return replace(self.runner, model=replace(self.runner.model, model=self.directory))


MemoryLine = tuple[str, str, str]
"""What takes memory, where, and how much: as it is shown."""


class Face(Protocol):
    """Who shows the operator what happens. The first two are called from the loading thread."""

    def planned(self, memory: Sequence[MemoryLine]) -> None:
        """The memory is divided; loading begins."""
        ...

    def loading(self, done: int, total: int) -> None:
        """So many bytes of the weights are in place."""
        ...

    def ready(self, url: str, model: str, facts: Mapping[str, object]) -> None:
        """The server listens at `url` and answers as `model`."""
        ...

    def draining(self, num_requests: int) -> None:
        """The first signal has come; so many requests are still under way."""
        ...


@dataclass(frozen=True, slots=True)
class Parts:
    """What is loaded before the first client is let in."""

    runner: StepRunner
    model: ServedModel
    facts: Mapping[str, object]
    """What was decided, for the operator and /get_server_info: plain values, no secrets."""
    recording: Recording | None = None
    """Of the experts that are used; None: the flags ask for none."""
    placement: Placement | None = None
    """Of experts on the device, following those in use; None: the flags ask for none."""
    count: Count | None = None
    """What of the runner changes while it runs."""


Build = Callable[[Settings, Face], Parts]


def build_parts(settings: Settings, face: Face) -> Parts:
    """Load the checkpoint: the text side first, because its errors come at once. Blocking."""
    # Here and not above: they import torch, seconds that a mistyped flag should not take.
    from kttrio.experts.selfcheck import ExpertsDiffer
    from kttrio.models.base import read_blueprint
    from kttrio.runner.build import build_runner
    from kttrio.runner.memory import MemoryPlan
    from kttrio.runner.needs import format_bytes
    from kttrio.weights.checkpoint import CheckpointError

    def on_plan(plan: MemoryPlan) -> None:
        lines = [(row.name, row.where, format_bytes(row.num_bytes)) for row in plan.rows]
        for memory in plan.memories:
            lines.append(("all", memory.where, format_bytes(plan.used(memory))))
        face.planned(lines)

    model = load_text(settings)
    try:
        _check_vocabulary(model, read_blueprint(settings.directory).shape.vocab_size)
        model.grammars.prepare()
        runner = build_runner(settings.located, progress=face.loading, on_plan=on_plan)
    except CheckpointError as error:
        raise ConfigError(f"--model {settings.directory}: {error}") from error
    except NativeError as error:
        raise ConfigError(str(error)) from error
    except ExpertsDiffer as error:
        raise ServerFailed(str(error)) from error
    facts = {"path": str(settings.directory), **model.facts, **runner.facts}
    return Parts(
        runner,
        model,
        facts,
        recording=runner.recorder,
        placement=runner.updater,
        count=runner.count,
    )


def _check_vocabulary(model: ServedModel, vocab_size: int) -> None:
    """Before the long load: the model has a row for each token of the tokenizer."""
    known = model.tokenizer.vocab_size
    if known > vocab_size:
        raise ConfigError(
            f"the tokenizer has {known} tokens but the model only {vocab_size}: tokenizer.json "
            "belongs to another checkpoint"
        )


def load_text(settings: Settings) -> ServedModel:
    """The text side of the checkpoint."""
    config = settings.server
    if settings.runner.model.model is None and config.served_model_name is None:
        config = replace(config, served_model_name=DEMO_NAME)
    images = None
    if not settings.runner.model.language_model_only:
        most = settings.runner.engine.max_image_tokens
        images = ImageFormat.load(settings.directory, max_tokens=most)
    return ServedModel.load(settings.directory, config, images=images)


async def serve(settings: Settings, face: Face, *, build: Build = build_parts) -> None:
    """Load, listen, and answer until SIGTERM or SIGINT; returns when all is ended well.

    Raises ConfigError for what cannot work, and ServerFailed when the engine died or a second
    signal cut the running requests short.
    """
    check_origins(settings.server.allowed_origins)
    await check_listening(settings.server)
    parts = await trio.to_thread.run_sync(build, settings, face, abandon_on_cancel=True)
    _keep_what_is_loaded()
    try:
        await _Server(settings, face, parts).run()
    except ExceptionGroup as group:
        raise _first_leaf(group) from group
    finally:
        gc.unfreeze()
        parts.runner.close()


@trio.lowlevel.enable_ki_protection
def _keep_what_is_loaded() -> None:
    """A full collection looks at all that is loaded and stops every stream for 0.15 s: this is the
    last. A Ctrl-C waits until it is over, because finalisers swallow what is raised in them."""
    gc.collect()
    gc.freeze()


def _first_leaf(group: ExceptionGroup[Exception]) -> Exception:
    first = group.exceptions[0]
    return _first_leaf(first) if isinstance(first, ExceptionGroup) else first


class _Server:
    """A loaded model between its first and its last client."""

    def __init__(self, settings: Settings, face: Face, parts: Parts) -> None:
        self._settings = settings
        self._face = face
        self._parts = parts
        self._engine = Engine(parts.runner, settings.runner.engine)
        self._state = AppState(
            engine=self._engine,
            model=parts.model,
            config=settings.server,
            settings=parts.facts,
            seeds=Random(settings.runner.engine.random_seed),
            recording=parts.recording,
            placement=parts.placement,
            count=parts.count,
        )
        self._closing = trio.Event()
        self._closed = trio.Event()
        self._failure: ServerFailed | None = None

    async def run(self) -> None:
        with self._state.constraints:
            async with trio.open_nursery() as root:
                await root.start(self._watch_signals, root.cancel_scope)
                await root.start(self._run_engine)
                root.start_soon(watch_lag, self._state.meter)
                addresses = await root.start(self._listen)
                if (warning := exposure(self._settings.server)) is not None:
                    _log.warning("%s", warning)
                self._face.ready(addresses.url, self._state.model.name, self._facts(addresses))
                await self._closed.wait()
                root.cancel_scope.cancel()
        if self._failure is not None:
            raise self._failure

    async def _listen(self, *, task_status: trio.TaskStatus[Addresses]) -> None:
        await serve_http(
            build_app(self._state),
            self._settings.server,
            calls=GrpcServer(self._state).serve,
            meter=self._state.meter,
            shutdown=self._closing.wait,
            task_status=task_status,
        )
        self._closed.set()

    def _facts(self, addresses: Addresses) -> Mapping[str, object]:
        grpc = {} if addresses.grpc is None else {"grpc": addresses.grpc}
        return {**self._parts.facts, **grpc}

    async def _run_engine(self, *, task_status: trio.TaskStatus[None]) -> None:
        """The engine's death ends every stream with an error (its own doing), then the server."""
        try:
            await self._engine.run(task_status=task_status)
        except Exception as error:
            self._failure = ServerFailed(f"the engine died: {type(error).__name__}: {error}")
            self._closing.set()

    async def _watch_signals(
        self, all_of_it: trio.CancelScope, *, task_status: trio.TaskStatus[None]
    ) -> None:
        draining = False
        with trio.open_signal_receiver(*SIGNALS) as received:
            task_status.started()
            async with trio.open_nursery() as nursery:
                async for number in received:
                    if draining:
                        name = signal.Signals(number).name
                        self._failure = ServerFailed(f"a second signal, {name}, cut it short")
                        all_of_it.cancel()
                    else:
                        draining = True
                        nursery.start_soon(self._drain)

    async def _drain(self) -> None:
        """Accept no more, let running requests finish for a while, then end them."""
        self._closing.set()
        self._state.begin_drain()
        stats = self._engine.stats
        self._face.draining(stats.running + stats.waiting)
        with trio.move_on_after(self._settings.server.drain_seconds):
            await self._engine.drained()
        self._state.finish_streams("The server is shutting down.")
