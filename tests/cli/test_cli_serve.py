"""What `kttrio serve` checks before anything is loaded."""

from __future__ import annotations

import io
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from kttrio.cli.flags import parse_flags
from kttrio.cli.serve import (
    ADMIN_API_KEY,
    API_KEY,
    PREPARED_KERNELS,
    RECORDING_DIRECTORY,
    RECORDS,
    TerminalFace,
    check_paths,
    raise_file_limit,
    tune_libraries,
    with_environment,
)
from kttrio.config import ConfigError, ModelConfig, PlacementConfig, RunnerConfig, ServerConfig
from kttrio.serve import Settings


def test_a_name_of_the_hub_is_no_directory_and_nothing_is_downloaded() -> None:
    with pytest.raises(ConfigError, match=r"Coder-Next is no directory; .* hf download NAME"):
        check_paths(Settings(RunnerConfig(ModelConfig(model=Path("Qwen/Qwen3-Coder-Next")))))


@pytest.mark.parametrize(
    ("num_requests", "shown"),
    [
        (0, "stopping\n"),
        (2, "stopping; 2 running requests have 30 s to finish, a second signal ends them now\n"),
    ],
)
def test_the_end_is_announced_with_the_requests_there_are(num_requests: int, shown: str) -> None:
    screen = io.StringIO()
    TerminalFace(Console(file=screen, width=120), Settings()).draining(num_requests)
    assert screen.getvalue() == shown


@pytest.mark.parametrize(
    ("server", "flags"),
    [
        (ServerConfig(), "json' -d"),
        (ServerConfig(api_key=("k",)), "'Authorization: Bearer YOUR_API_KEY' -d"),
        (ServerConfig(ssl_certfile=Path("c.pem")), "json' -k -d"),
        (
            ServerConfig(ssl_certfile=Path("c.pem"), ssl_ca_certs=Path("a.pem")),
            "json' -k --cert YOUR_CERT.pem --key YOUR_KEY.pem -d",
        ),
    ],
)
def test_the_command_to_try_passes_whatever_guards_the_server(
    server: ServerConfig, flags: str
) -> None:
    screen = io.StringIO()
    TerminalFace(Console(file=screen), Settings(server=server)).ready("https://h:1", "m", {})
    assert flags in screen.getvalue()


def recorded(location: str) -> Settings:
    return Settings(RunnerConfig(placement=PlacementConfig(init_expert_location=location)))


def test_recorded_activations_must_exist_or_be_trivial(tmp_path: Path) -> None:
    file = tmp_path / "activations.pt"
    with pytest.raises(ConfigError, match=r"--init-expert-location: .*activations.pt is no file"):
        check_paths(recorded(str(file)))
    file.touch()
    check_paths(recorded(str(file)))
    check_paths(recorded("trivial"))


@pytest.mark.parametrize(
    ("argv", "environment", "directory"),
    [
        ([], {}, None),
        ([], {RECORDING_DIRECTORY: ""}, None),
        ([], {RECORDING_DIRECTORY: "/env"}, Path("/env")),
        (["--expert-distribution-recorder-dir", "/flag"], {}, Path("/flag")),
        (
            ["--expert-distribution-recorder-dir", "/flag"],
            {RECORDING_DIRECTORY: "/env"},
            Path("/flag"),
        ),
    ],
)
def test_recordings_go_where_the_flag_says_or_else_the_environment(
    argv: list[str], environment: dict[str, str], directory: Path | None
) -> None:
    argv = ["--expert-distribution-recorder-mode", "stat", *argv]
    *ours, server = parse_flags("kttrio serve", "", argv, RECORDS)
    given = Settings(RunnerConfig(*ours), server)
    found = with_environment(given, environment)
    assert found.runner.recording.expert_distribution_recorder_dir == directory


def test_a_directory_in_the_environment_asks_for_no_recording() -> None:
    assert with_environment(Settings(), {RECORDING_DIRECTORY: "/env"}) == Settings()


@pytest.mark.parametrize(
    ("given", "environment", "users", "admin"),
    [
        ((), {}, (), None),
        ((), {API_KEY: "e", ADMIN_API_KEY: "o"}, ("e",), "o"),
        (("--api-key", "f"), {API_KEY: "e", ADMIN_API_KEY: "o"}, ("f",), "o"),
        (("--admin-api-key", "f"), {API_KEY: "e", ADMIN_API_KEY: "o"}, ("e",), "f"),
        ((), {API_KEY: "", ADMIN_API_KEY: ""}, (), None),
    ],
)
def test_keys_may_stand_in_the_environment_where_fewer_can_read_them(
    given: tuple[str, ...], environment: dict[str, str], users: tuple[str, ...], admin: str | None
) -> None:
    (server,) = parse_flags("kttrio serve", "", given, [ServerConfig])
    found = with_environment(Settings(server=server), environment).server
    assert (found.api_key, found.admin_api_key) == (users, admin)


KERNEL_VARIABLES = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY")
MULTIPLY_MANY_SHAPES = """
import os, sys
from pathlib import Path
from kttrio.cli.serve import tune_libraries

tune_libraries(os.environ)
assert "torch" not in sys.modules  # it reads the variables when it loads
import torch

torch.set_num_threads(1)
weight = torch.ones(64, 64, dtype=torch.bfloat16)

def held():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))

torch.nn.functional.linear(torch.ones(1024, 64, dtype=torch.bfloat16), weight)
before = held()
for rows in range(1, 1025):
    torch.nn.functional.linear(torch.ones(rows, 64, dtype=torch.bfloat16), weight)
print(held() - before)
"""


def test_what_the_user_says_of_the_libraries_stands() -> None:
    environment = {"OMP_WAIT_POLICY": "ACTIVE", "LRU_CACHE_CAPACITY": "7"}
    tune_libraries(environment)
    assert environment == {
        "OMP_WAIT_POLICY": "ACTIVE",
        "LRU_CACHE_CAPACITY": "7",
        "ONEDNN_PRIMITIVE_CACHE_CAPACITY": str(PREPARED_KERNELS),
    }


def test_kernels_of_many_shapes_do_not_pile_up() -> None:
    """The whole way, for only these libraries know which variables they read, and when."""
    untouched = {name: text for name, text in os.environ.items() if name not in KERNEL_VARIABLES}
    command = [sys.executable, "-W", "error", "-c", MULTIPLY_MANY_SHAPES]
    ended = subprocess.run(command, env=untouched, check=True, capture_output=True, text=True)
    assert int(ended.stdout) < PREPARED_KERNELS * 3 * 2**19  # 1.5 MiB each


@pytest.mark.parametrize(
    ("soft", "hard", "connections", "raised"),
    [
        (1024, 65536, 2048, 3072),
        (1024, 2000, 2048, 2000),
        (65536, 65536, 2048, None),
        (1024, resource.RLIM_INFINITY, 2048, 3072),
        (resource.RLIM_INFINITY, resource.RLIM_INFINITY, 2048, None),
    ],
)
def test_connections_get_as_many_files_as_the_system_allows(
    soft: int, hard: int, connections: int, raised: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[int, int]] = []
    monkeypatch.setattr(resource, "getrlimit", lambda _: (soft, hard))
    monkeypatch.setattr(resource, "setrlimit", lambda _, limits: asked.append(limits))
    raise_file_limit(connections)
    assert asked == ([] if raised is None else [(raised, hard)])


def test_no_header_field_is_logged_as_it_is_read() -> None:
    """At any level: they hold keys."""
    told = subprocess.run(
        [sys.executable, "-c", HPACK], capture_output=True, text=True, check=True, timeout=60
    )
    assert "ours" in told.stderr
    assert "sesame" not in told.stderr


HPACK = """
import logging, hpack
from kttrio.cli.serve import _set_up_logging
_set_up_logging("debug")
logging.getLogger("kttrio").debug("ours")
hpack.Decoder().decode(hpack.Encoder().encode([("authorization", "Bearer sesame")]))
"""
