"""`kttrio serve`: reads the settings, shows what was decided, and runs the server.

What the server does is in kttrio/serve.py; here are its flags, its face and its exit codes.
"""

from __future__ import annotations

import json
import logging
import os
import resource
import shlex
import sys
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from dataclasses import replace
from pathlib import Path

import trio
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Column, Table

from kttrio.cli.flags import flag_name, parse_flags
from kttrio.cli.foreign import FOREIGN, foreign_notes
from kttrio.config import (
    ConfigError,
    DeviceConfig,
    EngineConfig,
    ExpertConfig,
    ModelConfig,
    PlacementConfig,
    RecordingConfig,
    RunnerConfig,
    ServerConfig,
)
from kttrio.serve import MemoryLine, ServerFailed, Settings, serve

DESCRIPTION = """Load a model and answer clients of OpenAI, Anthropic and Triton.
Flags of SGLang's launch commands that mean nothing here are taken too, and named at the start."""
QUESTION = "What is kttrio?"

RECORDS = (
    ModelConfig,
    ExpertConfig,
    EngineConfig,
    DeviceConfig,
    PlacementConfig,
    RecordingConfig,
    ServerConfig,
)
"""In the order of `RunnerConfig`, and the server's."""
PREPARED_KERNELS = 256
"""Far more than one step's shapes of matrices, which would be prepared anew in each layer if they
pushed each other out. In bfloat16 one takes about 1 MiB."""
OTHER_FILES = 1024
"""More than anything but connections needs."""
RECORDING_DIRECTORY = "SGLANG_EXPERT_DISTRIBUTION_RECORDER_DIR"
API_KEY, ADMIN_API_KEY = "KTTRIO_API_KEY", "KTTRIO_ADMIN_API_KEY"
"""Other users of the machine can read a command line, but no environment."""

log = logging.getLogger(__name__)


def run(argv: Sequence[str]) -> int:
    """0 after a clean end, 1 when the engine failed or a second signal cut it short."""
    *ours, server, foreign = parse_flags("kttrio serve", DESCRIPTION, argv, [*RECORDS, FOREIGN])
    settings = with_environment(Settings(RunnerConfig(*ours), server), os.environ)
    check_paths(settings)
    _set_up_logging(settings.server.log_level)
    for note in foreign_notes(foreign):
        log.warning("%s", note)
    tune_libraries(os.environ)
    raise_file_limit(settings.server.max_connections)
    face = TerminalFace(Console(highlight=False), settings)
    try:
        trio.run(serve, settings, face)
    except ServerFailed as error:
        print(f"kttrio serve: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    finally:
        face.close()
    return 0


def tune_libraries(environment: MutableMapping[str, str]) -> None:
    """What the libraries that torch brings read once, when they load; the user's word goes first.

    Threads of OpenMP spin by default while they wait, on the very cores that the expert kernels
    and the event loop need. oneDNN keeps a prepared kernel for each shape of matrices that it has
    met, as does torch's layer above it: 1024 each by default, and where one of the two lets go the
    other still holds on.
    """
    environment.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    environment.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", str(PREPARED_KERNELS))
    environment.setdefault("LRU_CACHE_CAPACITY", str(PREPARED_KERNELS))


def raise_file_limit(num_connections: int) -> None:
    """Let the process open as many files as its connections and checkpoint need, as far as it is
    allowed to: shells allow 1024 by default, while the system would mostly allow more."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = num_connections + OTHER_FILES
    if hard != resource.RLIM_INFINITY:
        needed = min(needed, hard)
    if soft != resource.RLIM_INFINITY and soft < needed:
        resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))


def with_environment(settings: Settings, environment: Mapping[str, str]) -> Settings:
    """What the command line leaves open and a variable says."""
    return _with_keys(_with_directory(settings, environment), environment)


def _with_keys(settings: Settings, environment: Mapping[str, str]) -> Settings:
    given, key = settings.server, environment.get(API_KEY)
    server = replace(
        given,
        api_key=given.api_key or ((key,) if key else ()),
        admin_api_key=given.admin_api_key or environment.get(ADMIN_API_KEY) or None,
    )
    return replace(settings, server=server)


def _with_directory(settings: Settings, environment: Mapping[str, str]) -> Settings:
    """The variable alone asks for nothing."""
    directory, given = environment.get(RECORDING_DIRECTORY), settings.runner.recording
    is_open = given.expert_distribution_recorder_dir is None
    if not directory or not is_open or given.expert_distribution_recorder_mode is None:
        return settings
    path = Path(directory).expanduser()
    recording = replace(given, expert_distribution_recorder_dir=path)
    return replace(settings, runner=replace(settings.runner, recording=recording))


def check_paths(settings: Settings) -> None:
    """Every given path exists and is of its kind; ConfigError names the first that does not."""
    _check_model(settings.runner.model.model)
    if not (settings.directory / "config.json").is_file():
        raise ConfigError(f"--model: {settings.directory} has no config.json; is it a checkpoint?")
    _check_path(settings.runner.experts, "kt_weight_path", Path.is_dir, "directory")
    _check_path(settings.server, "chat_template", Path.is_file, "file")
    _check_recording(settings.runner.placement.init_expert_location)


def _check_model(path: Path | None) -> None:
    """The directory is there. Names of the hub are what is given instead most often."""
    if path is not None and not path.is_dir():
        raise ConfigError(
            f"--model: {path} is no directory; check the path. Nothing is downloaded here: hf "
            "download NAME --local-dir DIR does that"
        )


def _check_path(record: object, name: str, is_kind: Callable[[Path], bool], kind: str) -> None:
    path: Path | None = getattr(record, name)
    if path is not None and not is_kind(path):
        raise ConfigError(f"{flag_name(name)}: {path} is no {kind}; check the path")


def _check_recording(location: str | None) -> None:
    if location not in (None, "trivial") and not Path(location).expanduser().is_file():
        raise ConfigError(f"--init-expert-location: {location} is no file; check the path")


def _set_up_logging(level: str) -> None:
    logging.basicConfig(
        level=level.upper(), format="%(asctime)s %(levelname)s %(name)s: %(message)s"
    )
    # It writes header fields down as it reads them, keys and all.
    logging.getLogger("hpack").setLevel(logging.WARNING)


class TerminalFace:
    """What the operator sees: the plan, a bar while loading, the URL, how it ends."""

    def __init__(self, console: Console, settings: Settings) -> None:
        self._console = console
        self._settings = settings
        self._progress = Progress(
            TextColumn("loading"),
            BarColumn(),
            DownloadColumn(binary_units=True),
            TimeElapsedColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._bar = self._progress.add_task("loading", total=None)

    def planned(self, memory: Sequence[MemoryLine]) -> None:
        """Called from the loading thread, as is `loading`."""
        table = Table("memory", "where", Column("size", justify="right"), box=None, pad_edge=False)
        for line in memory:
            table.add_row(*line)
        self._console.print(table)
        self._progress.start()

    def loading(self, done: int, total: int) -> None:
        self._progress.update(self._bar, completed=done, total=total)

    def ready(self, url: str, model: str, facts: Mapping[str, object]) -> None:
        self.close()
        for name, value in {"model": model, **facts}.items():
            self._show(name, str(value))
        self._console.print(f"listening on {url}", style="bold", markup=False)
        self._console.print("try:", style="dim")
        self._console.print(f"  {self._curl(url, model)}", markup=False, soft_wrap=True)

    def draining(self, num_requests: int) -> None:
        seconds = self._settings.server.drain_seconds
        rest = f"; {num_requests} running requests have {seconds:g} s to finish, "
        rest += "a second signal ends them now"
        self._console.print(f"stopping{rest if num_requests else ''}", style="dim")

    def close(self) -> None:
        """Take the bar away; harmless when there is none."""
        self._progress.stop()

    def _show(self, name: str, value: str) -> None:
        self._console.print(f"{name:<12}{value}", markup=False, soft_wrap=True)

    def _curl(self, url: str, model: str) -> str:
        """A streaming question to paste into another terminal."""
        body = {
            "model": model,
            "messages": [{"role": "user", "content": QUESTION}],
            "stream": True,
        }
        words = ["curl", "-N", f"{url}/v1/chat/completions"]
        words += ["-H", "Content-Type: application/json"]
        if self._settings.server.api_key:
            words += ["-H", "Authorization: Bearer YOUR_API_KEY"]
        if self._settings.server.ssl_certfile:
            words += ["-k"]  # the certificate is of another name than the address to listen on
        if self._settings.server.ssl_ca_certs:
            words += ["--cert", "YOUR_CERT.pem", "--key", "YOUR_KEY.pem"]
        return shlex.join([*words, "-d", json.dumps(body)])
