"""Flags made from config fields: names, values, refusals."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest

from kttrio.cli.flags import nearest, parse_flags
from kttrio.config import (
    ConfigError,
    EngineConfig,
    ExpertConfig,
    ModelConfig,
    PlacementConfig,
    ServerConfig,
    flag,
)

RECORDS = (ModelConfig, ExpertConfig, EngineConfig, ServerConfig)


@dataclass(frozen=True, slots=True)
class Lenient:
    """Some."""

    number: int | str | None = flag(None, "how many", words=("auto",), least=1)
    kernel: str | None = flag(None, "which", choices=("ours",), others=("theirs",))


@dataclass(frozen=True, slots=True)
class Reading:
    """One file."""

    file: Path = flag(None, "what is read", positional=True)
    depth: int = flag(1, "how far")


@dataclass(frozen=True, slots=True)
class Switches:
    """Two switches."""

    quick: bool = flag(False, "be quick")
    careful: bool = flag(True, "be 100% careful")


def parse(*argv: str) -> tuple[ModelConfig, ExpertConfig, EngineConfig, ServerConfig]:
    return parse_flags("kttrio serve", "Serve.", argv, RECORDS)


def test_nothing_given_is_the_defaults() -> None:
    assert parse() == (ModelConfig(), ExpertConfig(), EngineConfig(), ServerConfig())


def test_values_arrive_in_their_type_and_record() -> None:
    model, experts, engine, server = parse(
        *("--model", "/m", "--kt-numa-nodes", "0, 1", "--mem-fraction-static=0.5"),
        *("--max-total-tokens", "4096", "--port=0", "--api-key", "secret"),
    )
    assert model.model == Path("/m")
    assert experts.kt_numa_nodes == (0, 1)
    assert engine == EngineConfig(mem_fraction_static=0.5, max_total_tokens=4096)
    assert server == ServerConfig(port=0, api_key=("secret",))


@pytest.mark.parametrize("given", ["0,1", "0, 1", "0 1", "0, 1,", "0,1 2"])
def test_a_list_is_separated_by_commas_or_spaces(given: str) -> None:
    wanted = tuple(int(digit) for digit in given if digit.isdigit())
    assert parse("--kt-numa-nodes", *given.split())[1].kt_numa_nodes == wanted


def test_second_spelling_and_the_last_one_wins() -> None:
    model, *_ = parse("--model", "a", "--model-path", "b")
    assert model.model == Path("b")


def test_choices_are_meant_in_any_case() -> None:
    _, experts, *_ = parse("--kt-method", "FP8", "--kt-group-size", "64", "--kt-isa", "AVX2")
    assert (experts.kt_method, experts.kt_group_size, experts.kt_isa) == ("fp8", 64, "avx2")
    assert parse("--kt-method", "amxint4")[1].kt_method == "AMXINT4"


def test_placement_is_checked_although_it_waits_for_a_gpu() -> None:
    def placement(*argv: str) -> PlacementConfig:
        return parse_flags("x", "X.", argv, [PlacementConfig])[0]

    found = placement(
        *("--kt-gpu-experts-ratio", "0.1", "--kt-expert-placement-strategy", "front-loading"),
        "--kt-enable-dynamic-expert-update",
    )
    assert found == PlacementConfig(
        kt_gpu_experts_ratio=0.1,
        kt_expert_placement_strategy="front-loading",
        kt_enable_dynamic_expert_update=True,
    )
    with pytest.raises(ConfigError, match="--kt-gpu-experts-ratio: 10 is too large; the most is 1"):
        placement("--kt-gpu-experts-ratio", "10")


@pytest.mark.parametrize(
    "argv",
    [
        ("--api-key", "a,b", "c d"),
        ("--api-key", "a,b", "--api-key", "c d"),
        ("--api-key=a,b", "--port", "1", "--api-key=c d"),
    ],
)
def test_keys_are_taken_as_they_are_and_the_flag_may_come_again(argv: tuple[str, ...]) -> None:
    assert parse(*argv)[3].api_key == ("a,b", "c d")


def test_an_empty_key_is_refused() -> None:
    with pytest.raises(ConfigError, match="--api-key: needs a value"):
        parse("--api-key", "a", "")


def test_home_is_expanded() -> None:
    model, *_ = parse("--model", "~/m")
    assert model.model == Path.home() / "m"


@dataclass(frozen=True, slots=True)
class Words:
    """Words."""

    colours: tuple[str, ...] = flag(("red",), "of the house", choices=("red", "green"))


def test_a_list_of_words_has_its_choices_checked_one_by_one() -> None:
    def words(*argv: str) -> Words:
        return parse_flags("x", "X.", argv, [Words])[0]

    assert words() == Words(("red",))
    assert words("--colours", "green, red") == Words(("green", "red"))
    with pytest.raises(ConfigError, match="--colours: 'blue' is none of red, green"):
        words("--colours", "red,blue")


def test_a_bool_is_a_pair_of_switches() -> None:
    def switches(*argv: str) -> Switches:
        return parse_flags("x", "X.", argv, [Switches])[0]

    assert switches() == Switches(quick=False, careful=True)
    assert switches("--quick", "--no-careful") == Switches(quick=True, careful=False)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("--max-total-token 5", "unknown flag --max-total-token; did you mean --max-total-tokens?"),
        ("--max-total-token=5", "unknown flag --max-total-token; did you mean --max-total-tokens?"),
        ("--prot 5", "unknown flag --prot; did you mean --port?"),
        ("--por 5", "unknown flag --por; did you mean --port?"),
        ("--zebra", "unknown flag --zebra; see --help"),
        ("model", "unexpected argument 'model'"),
        ("--port", "--port: expected a value"),
        ("--port --host x", "--port: expected a value"),
        ("--port http", "--port: 'http' is not a whole number"),
        ("--port 3.5", "--port: '3.5' is not a whole number"),
        ("--port 65536", "--port: 65536 is too large; the most is 65535"),
        ("--port=-1", "--port: -1 is too small; the least is 0"),
        ("--chunked-prefill-size -1", "the least is 1; a step is always bounded"),
        ("--max-running-requests 0", "--max-running-requests: 0 is too small; the least is 1"),
        ("--mem-fraction-static nan", "--mem-fraction-static: nan is not a finite number"),
        ("--mem-fraction-static 1.5", "--mem-fraction-static: 1.5 is too large"),
        ("--mem-fraction-static lots", "--mem-fraction-static: 'lots' is not a number"),
        ("--kt-isa sse", "--kt-isa: 'sse' is none of auto, amx, avx512, avx2"),
        ("--kt-numa-nodes 0,x", "--kt-numa-nodes: 'x' is not a whole number"),
        ("--kt-numa-nodes 0 x", "--kt-numa-nodes: 'x' is not a whole number"),
        ("--kt-numa-nodes", "--kt-numa-nodes: expected at least a value"),
        ("--kt-method RAWINT4", "; weights in RAWINT4, "),
        ("--kt-method LLAMAFILE", "take the model's bf16 or fp8 checkpoint"),
        ("--model=", "--model: needs a value"),
        ("--kt-numa-nodes=", "--kt-numa-nodes: needs a value"),
    ],
)
def test_refusals_name_the_flag_and_the_mend(argv: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(*argv.split())
    assert message in str(caught.value)


def test_help_shows_every_flag_with_its_default(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        parse("--help")
    assert caught.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "--chunked-prefill-size INT most tokens of one step" in text
    assert "fewer where memory is short (default: 2048)" in text
    assert "{auto,amx,avx512,avx2}" in text
    assert "--model-path" in text
    assert "--kt-numa-nodes INT [INT ...]" in text


def test_no_line_of_help_ends_within_a_flag(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for columns in range(60, 130):
        monkeypatch.setenv("COLUMNS", str(columns))
        with pytest.raises(SystemExit):
            parse("--help")
        lines = capsys.readouterr().out.splitlines()
        assert not [line for line in lines if line.endswith("-")]


def test_a_percent_sign_in_help_is_harmless(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse_flags("x", "X.", ["--help"], [Switches])
    assert "be 100% careful" in capsys.readouterr().out


def test_nearest_offers_help_when_nothing_is_near() -> None:
    assert nearest("serv", ["serve", "chat"]) == "did you mean serve?"
    assert nearest("xyzzy", ["serve", "chat"]) == "see --help"


@pytest.mark.parametrize("argv", [["a.pt", "--depth", "2"], ["--depth=2", "a.pt"]])
def test_a_positional_field_stands_among_the_flags_without_a_name(argv: list[str]) -> None:
    assert parse_flags("read", "Read.", argv, [Reading]) == (Reading(Path("a.pt"), 2),)


def test_a_positional_field_is_needed_and_given_once() -> None:
    with pytest.raises(ConfigError, match="required: FILE"):
        parse_flags("read", "Read.", ["--depth", "2"], [Reading])
    with pytest.raises(ConfigError, match=r"unexpected argument 'b\.pt'"):
        parse_flags("read", "Read.", ["a.pt", "b.pt"], [Reading])


def test_a_word_may_stand_in_a_numbers_place_and_others_are_taken_unshown(
    capsys: pytest.CaptureFixture[str],
) -> None:
    def parse(*argv: str) -> Lenient:
        (record,) = parse_flags("prog", "", argv, [Lenient])
        assert isinstance(record, Lenient)
        return record

    assert parse("--number", "AUTO").number == "auto"
    assert parse("--number", "7").number == 7
    assert parse("--kernel", "theirs").kernel == "theirs"
    with pytest.raises(ConfigError, match="'all' is not a whole number or auto"):
        parse("--number", "all")
    with pytest.raises(ConfigError, match="0 is too small"):
        parse("--number", "0")
    with pytest.raises(ConfigError, match="'nobody' is not ours"):
        parse("--kernel", "nobody")
    with pytest.raises(SystemExit):
        parse("--help")
    shown = capsys.readouterr().out
    assert "--number INT|auto" in shown
    assert "{ours}" in shown
    assert "theirs" not in shown
