"""What is fuzzed: each target takes bytes, and raises where the server would fail over them.

What a request deserves to hear is no failure: those errors end here.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from types import MappingProxyType
from typing import Any

from h2.config import H2Configuration
from h2.connection import H2Connection

from kttrio.serve import Settings, load_text
from kttrio.server.anthropic.request import MessagesBody, to_answer
from kttrio.server.bodies import parse_object
from kttrio.server.encodings import decoded
from kttrio.server.errors import ApiError
from kttrio.server.grpc.messages import MESSAGES
from kttrio.server.grpc.tensors import read_asked, read_request
from kttrio.server.image_urls import UrlError, read_data_url
from kttrio.server.openai.request import ChatBody, parse_chat, parse_text
from kttrio.server.openai.tokens import DetokenizeBody, TokenizeBody
from kttrio.server.requests import ChatRequest
from kttrio.server.responses.request import parse_response
from kttrio.server.schema.records import read
from kttrio.server.served_model import ServedModel
from kttrio.server.triton.request import IndexBody, read_generate, read_infer
from kttrio.text.grammar import Form, FormKind, Spec
from kttrio.text.grammar_error import GrammarError
from kttrio.text.messages import TemplateError
from kttrio.text.reasoning import FORMATS, ReasoningSplitter, ReasoningStart
from kttrio.text.tool_parsers.base import Content, ToolCallArguments, ToolCallStart, open_parser
from tools.fuzz.wires import feed_http1, feed_http2
from tools.soak.questions import questions
from tools.soak.ways import ways

Target = Callable[[bytes], None]

WALK_TOKENS = 12
PARSERS = (
    *("deepseekv3", "deepseekv31", "deepseekv32", "glm45", "hermes"),
    *("kimi_k2", "minimax_m2", "qwen3_coder"),
)
TOOLS: tuple[dict[str, Any], ...] = (
    {
        "type": "function",
        "function": {
            "name": "f",
            "parameters": {
                "type": "object",
                "properties": {
                    "s": {"type": "string"},
                    "n": {"type": "integer"},
                    "o": {"type": "object"},
                    "l": {"type": "array", "items": {"type": "number"}},
                },
            },
        },
    },
)
FRAGMENTS = (
    *("<tool_call>", "</tool_call>", "<function=f>", "<function=", "</function>", "<parameter=s>"),
    *("<parameter=n>", "</parameter>", "<think>", "</think>", "◁think▷", "◁/think▷"),
    *(
        "<｜tool▁calls▁begin｜>",
        "<｜tool▁call▁begin｜>",
        "function<｜tool▁sep｜>f",
        "<｜tool▁sep｜>",
    ),
    *("<｜tool▁call▁end｜>", "<｜tool▁calls▁end｜>", "```json\n", "\n```", "</｜DSML｜invoke>"),
    *("<｜DSML｜function_calls>", "</｜DSML｜function_calls>", '<｜DSML｜invoke name="f">'),
    *('<｜DSML｜parameter name="s" string="true">', '<｜DSML｜parameter name="n" string="false">'),
    *("</｜DSML｜parameter>", "<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>"),
    *("<|tool_calls_section_begin|>", "<|tool_call_begin|>", "functions.f:0", "f"),
    *("<|tool_call_argument_begin|>", "<|tool_call_end|>", "<|tool_calls_section_end|>"),
    *("<minimax:tool_call>", "</minimax:tool_call>", '<invoke name="f">', "</invoke>"),
    *('<parameter name="s">', '{"name": "f", "arguments": {', '"s": ', '"n": ', "}}", "{", "}"),
    *("[", "]", '"', "\\", ",", ":", "null", "true", "1", "-2.5e3", "\n", " ", "<", ">", "/"),
    *("é", "東", "😀", "\x00", "a", "None", "'"),
)
"""What the formats of reasoning and calls are made of: whole tags are hard to find by chance."""


@cache
def model() -> ServedModel:
    """The demo model's text side."""
    return load_text(Settings())


# Bodies of requests


def _body(data: bytes) -> None:
    """JSON, as one of the protocols' requests: the first byte tells which."""
    if not data:
        return
    readers = _readers()
    try:
        readers[data[0] % len(readers)](parse_object(data[1:]))
    except (ApiError, TemplateError, RecursionError):
        return


@cache
def _readers() -> tuple[Callable[[dict[str, Any]], object], ...]:
    served = model()
    known: dict[str, Any] = {"model": served.name, "vocab_size": served.tokenizer.vocab_size}
    return (
        lambda value: _render(parse_chat(value, **known)),
        lambda value: parse_text(value, **known),
        lambda value: _render(parse_response(value, **known).chat),
        lambda value: _render(to_answer(read(MessagesBody, value), served)),
        lambda value: read(TokenizeBody, value),
        lambda value: read(DetokenizeBody, value),
        lambda value: read(IndexBody, value),
    )


def _render(asked: ChatRequest) -> None:
    template = model().template
    assert template is not None
    template.render(
        asked.messages, tools=asked.tools or None, chat_template_kwargs=asked.template_kwargs
    )


def _body_seeds() -> Iterator[bytes]:
    numbers = {"chat": 0, "completions": 1, "responses": 2, "messages": 3}
    for way, question in itertools.product(ways(model().name), questions()):
        if way.name in numbers and (body := way.body(question)) is not None:
            yield bytes([numbers[way.name]]) + json.dumps(body).encode()


# Triton


def _infer(data: bytes) -> None:
    """Two bytes of the JSON's length, the JSON, tensors."""
    header = str(int.from_bytes(data[:2], "big"))
    vocab_size = model().tokenizer.vocab_size
    try:
        read_infer(data[2:], None if header == "65535" else header, vocab_size=vocab_size)
    except ApiError:
        return


def _infer_seeds() -> Iterator[bytes]:
    told = b'{"inputs":[{"name":"text_input","shape":[1],"datatype":"BYTES","parameters":{'
    told += b'"binary_data_size":6}}],"parameters":{"max_tokens":3}}'
    yield len(told).to_bytes(2, "big") + told + b"\2\0\0\0Hi"
    yield b"\0\0Hi"
    for way, question in itertools.product(ways(model().name), questions()):
        if way.name == "infer" and (body := way.body(question)) is not None:
            yield b"\xff\xff" + json.dumps(body).encode()


def _generate(data: bytes) -> None:
    try:
        read_generate(data, vocab_size=model().tokenizer.vocab_size)
    except ApiError:
        return


def _generate_seeds() -> Iterator[bytes]:
    for way, question in itertools.product(ways(model().name), questions()):
        if way.name == "generate_stream" and (body := way.body(question)) is not None:
            yield json.dumps(body).encode()


def _packed(data: bytes) -> None:
    """A compressed body: never more than the limit comes out."""
    for encoding in ("gzip", "deflate"):
        try:
            assert len(decoded(data, encoding, 1000)) <= 1000
        except ApiError:
            continue


def _grpc(data: bytes) -> None:
    try:
        read_asked(read_request(data), vocab_size=model().tokenizer.vocab_size)
    except ApiError:
        return


def _data_url(data: bytes) -> None:
    url = "data:" + data.decode("utf-8", "replace")
    try:
        assert len(read_data_url(url, most_bytes=1000)) <= 1000
    except UrlError:
        return


# What models write


def _text(data: bytes) -> list[str]:
    return [FRAGMENTS[byte % len(FRAGMENTS)] for byte in data]


def _calls(data: bytes) -> None:
    """Tool calls: the same, however the text is cut."""
    if len(data) < 2:
        return
    name, cut_off = PARSERS[data[0] % len(PARSERS)], bool(data[1] & 1)
    pieces = _text(data[2:])
    whole = _parsed(name, ["".join(pieces)], cut_off)
    assert _parsed(name, pieces, cut_off) == whole
    assert _parsed(name, list("".join(pieces)), cut_off) == whole


def _parsed(name: str, pieces: list[str], cut_off: bool) -> tuple[str, list[list[str]]]:
    numbers = itertools.count()
    parser = open_parser(name, TOOLS, new_id=lambda: f"call_{next(numbers)}")
    content, calls = "", list[list[str]]()
    found = [parsed for piece in pieces for parsed in parser.push(piece)]
    for piece in (*found, *parser.finish(cut_off=cut_off)):
        match piece:
            case Content(text):
                content += text
            case ToolCallStart(index, id, name):
                assert index == len(calls)
                calls.append([id, name, ""])
            case ToolCallArguments(index, fragment):
                calls[index][2] += fragment
    return content, calls


def _reasoning(data: bytes) -> None:
    """Reasoning and answer: the same, however the text is cut."""
    if len(data) < 2:
        return
    name, start = list(FORMATS)[data[0] % len(FORMATS)], list(ReasoningStart)[data[1] % 3]
    pieces = _text(data[2:])
    whole = _split(name, start, ["".join(pieces)])
    assert _split(name, start, pieces) == whole
    assert _split(name, start, list("".join(pieces))) == whole


def _split(name: str, start: ReasoningStart, pieces: list[str]) -> tuple[str, str]:
    splitter = ReasoningSplitter(FORMATS[name], start)
    parts = [*map(splitter.push, pieces), splitter.finish()]
    return "".join(thought for thought, _ in parts), "".join(said for _, said in parts)


# What holds answers to a form

KINDS: tuple[FormKind, ...] = ("json_schema", "regex", "ebnf", "lark", "choice")


def _grammar(data: bytes) -> None:
    """A form is compiled, and an answer begun that it allows."""
    if not data:
        return
    kind, source = KINDS[data[0] % len(KINDS)], data[1:].decode("utf-8", "ignore")
    try:
        form = Form(kind, _checked(kind, source), "form")
        matcher = model().grammars.compile(Spec(form=form)).open()
        for turn in range(WALK_TOKENS):
            (mask,) = matcher.masks()
            assert mask is not None
            matcher.advance([_allowed(mask, data[turn % len(data)])])
            if matcher.ended:
                return
    except (GrammarError, ApiError):
        return


def _checked(kind: FormKind, source: str) -> str:
    """The source as requests are read: that of schemas and choices is JSON that was parsed."""
    if kind == "json_schema":
        return json.dumps(parse_object(source.encode()))
    if kind == "choice":
        choices = parse_object(b'{"choice": ' + source.encode() + b"}").get("choice")
        read(ChatBody, {"messages": [], "guided_choice": choices})
        return json.dumps(choices)
    return source


def _allowed(mask: bytes, choice: int) -> int:
    tokens = [i for i in range(8 * len(mask)) if mask[i // 8] >> i % 8 & 1]
    return tokens[choice % len(tokens)]


def _grammar_seeds() -> Iterator[bytes]:
    for question in questions():
        if question.form is not None:
            yield b"\0" + json.dumps(question.form).encode()
    yield b"\1(red|green)+[a-z]{2,5}"
    yield b'\2root ::= "a" b*\nb ::= [0-9]+ | "x"'
    yield b'\3start: "a" B\nB: /[0-9]+/'
    yield b'\4["yes", "no"]'


def _grpc_seeds() -> Iterator[bytes]:
    request = MESSAGES["ModelInferRequest"](model_name=model().name, id="1")
    prompt = request.inputs.add(name="text_input", datatype="BYTES", shape=[1])
    prompt.contents.bytes_contents.append(b"Hi")
    yield request.SerializeToString()
    request.inputs.add(name="max_tokens", datatype="INT32", shape=[1])
    request.raw_input_contents.extend([b"\2\0\0\0Hi", b"\3\0\0\0"])
    prompt.ClearField("contents")
    yield request.SerializeToString()


def _none() -> Iterator[bytes]:
    return iter(())


def _wire_seeds() -> Iterator[bytes]:
    head = b"POST /v1/completions HTTP/1.1\r\nHost: a\r\n"
    yield head + b"Content-Length: 2\r\n\r\n{}"
    yield head + b"Transfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\nGET / HTTP/1.0\r\n\r\n"
    yield (
        head
        + b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nExpect: 100-continue\r\n\r\n"
    )


def _wire2_seeds() -> Iterator[bytes]:
    """A call with a message, as the library that serves it would send it."""
    client = H2Connection(H2Configuration(header_encoding="utf-8"))
    client.initiate_connection()
    head = {":method": "POST", ":scheme": "http", ":authority": "a", ":path": "/a/B"}
    client.send_headers(1, [*head.items(), ("te", "trailers")])
    client.send_data(1, bytes(5), end_stream=True)
    client.ping(bytes(8))
    yield b"\1" + client.data_to_send()


def _any(data: bytes) -> None:
    """Any of the others: the first byte tells which."""
    if data:
        target, _ = list(TARGETS.values())[data[0] % (len(TARGETS) - 1)]
        target(data[1:])


def _any_seeds() -> Iterator[bytes]:
    for number, name in enumerate(TARGETS):
        if name != "any":
            yield from (bytes([number]) + seed for seed in TARGETS[name][1]())


TARGETS: Mapping[str, tuple[Target, Callable[[], Iterator[bytes]]]] = MappingProxyType(
    {
        "body": (_body, _body_seeds),
        "infer": (_infer, _infer_seeds),
        "generate": (_generate, _generate_seeds),
        "packed": (_packed, _none),
        "grpc": (_grpc, _grpc_seeds),
        "data_url": (_data_url, lambda: iter([b"image/png;base64,AAAA"])),
        "calls": (_calls, _none),
        "reasoning": (_reasoning, _none),
        "grammar": (_grammar, _grammar_seeds),
        "http1": (feed_http1, _wire_seeds),
        "http2": (feed_http2, _wire2_seeds),
        "any": (_any, _any_seeds),
    }
)
"""Each with what it may begin from."""
