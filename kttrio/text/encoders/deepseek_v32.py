"""The prompts of DeepSeek-V3.2 and its variant Speciale, which publish no jinja template.

What is written here is what the model was trained on: the text that teaches tools, with blank lines
between its paragraphs as in the checkpoint's own encoder (some copies of it have lost them), the
DSML form of calls and results, and where `<think>` stands. A prompt starts with the BOS token, and
the words that open the answer belong to the last user or tool turn. Not here: reading the answer.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any

from kttrio.text.messages import Message, TemplateError, Tool, normalize

_DSML = "｜DSML｜"
_BOS = "<｜begin▁of▁sentence｜>"
_EOS = "<｜end▁of▁sentence｜>"
_USER, _ASSISTANT = "<｜User｜>", "<｜Assistant｜>"
_THINK, _THINK_END = "<think>", "</think>"

_TOOLS_TEXT = """\
## Tools

You have access to a set of tools you can use to answer the user's question.
You can invoke functions by writing a "<{dsml}function_calls>" block like the following as part of \
your reply to the user:
<{dsml}function_calls>
<{dsml}invoke name="$FUNCTION_NAME">
<{dsml}parameter name="$PARAMETER_NAME" string="true|false">$PARAMETER_VALUE</{dsml}parameter>
...
</{dsml}invoke>
<{dsml}invoke name="$FUNCTION_NAME2">
...
</{dsml}invoke>
</{dsml}function_calls>

String and scalar parameters should be specified as is without any escaping or quotes, while lists \
and objects should use JSON format. The "string" attribute should be set to "true" for string type \
parameters and "false" for other types (numbers, booleans, arrays, objects).

If the thinking_mode is enabled, then after function results you should strongly consider \
outputting a thinking block. Here is an example:

<{dsml}function_calls>
...
</{dsml}function_calls>

<function_results>
...
</function_results>

<think>...thinking about results</think>

Here are the functions available in JSONSchema format:
<functions>
{schemas}
</functions>
"""
_FORMAT_TEXT = """\
## Response Format:

You MUST strictly adhere to the following schema to reply:
{schema}"""
_DEVELOPER_TEXT = "\n\n# The user's message is: "

_SWITCHES = ("thinking", "enable_thinking")
_KNOWN_KWARGS = (*_SWITCHES, "reasoning_effort", "response_format")


class DeepseekV32Encoder:
    """Renders chats as a ChatTemplate does. Immutable; render may run in any thread.

    Without a wish of the request the model answers at once (chat mode), as on other servers.
    `always_thinks` is Speciale: it was trained neither for that mode nor for tools.
    """

    text = _USER + _ASSISTANT + _THINK_END + _TOOLS_TEXT.format(dsml=_DSML, schemas="")
    """What the model was taught, to see which parsers read its answers."""

    def __init__(self, *, always_thinks: bool = False) -> None:
        self._always_thinks = always_thinks

    @classmethod
    def load(cls, directory: Path) -> DeepseekV32Encoder:
        """Speciale's files differ from V3.2's only in the weights: its published name, anywhere in
        the directory's path, is what tells it."""
        return cls(always_thinks="v3.2-speciale" in str(directory.resolve()).lower())

    def render(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Tool] | None = None,
        add_generation_prompt: bool = True,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> str:
        """The prompt as text, special tokens included. OpenAI messages as the client sent them.

        Of `chat_template_kwargs` it knows `thinking` (or `enable_thinking`), `reasoning_effort`
        (`none` or any other) and `response_format`, a JSON schema for the answer. A `developer`
        message is a system message, unless no user speaks: then it is the task of a search agent,
        for which the model was taught a form of its own. The words that begin an answer belong to
        the message before it, so that they cannot be left out. Raises TemplateError.
        """
        kwargs = _checked(chat_template_kwargs or {})
        if tools and self._always_thinks:
            raise TemplateError("DeepSeek-V3.2-Speciale was not trained to call tools: send none")
        thinks = self._thinks(kwargs)
        chat = _roles_as_taught(normalize(messages))
        _check_last(chat, asks=add_generation_prompt)
        extras = _extras(tools or (), kwargs.get("response_format"))
        return _BOS + "".join(_turns(chat, extras, thinks=thinks))

    def _thinks(self, kwargs: Mapping[str, Any]) -> bool:
        wishes = [kwargs[name] for name in _SWITCHES if name in kwargs]
        if not wishes and kwargs.get("reasoning_effort") is not None:
            wishes = [kwargs["reasoning_effort"] != "none"]
        wish = wishes[0] if wishes else self._always_thinks
        if self._always_thinks and not wish:
            raise TemplateError("DeepSeek-V3.2-Speciale always thinks: it cannot be switched off")
        return bool(wish)


def _checked(kwargs: Mapping[str, Any]) -> Mapping[str, Any]:
    unknown = sorted(kwargs.keys() - set(_KNOWN_KWARGS))
    if unknown:
        raise TemplateError(
            f"chat_template_kwargs has {', '.join(unknown)}, and this model's prompts know only "
            f"{', '.join(_KNOWN_KWARGS)}"
        )
    for name in _SWITCHES:
        if not isinstance(kwargs.get(name, False), bool):
            raise TemplateError(f"chat_template_kwargs.{name} must be true or false")
    return kwargs


def _roles_as_taught(chat: list[dict[str, Any]]) -> list[dict[str, Any]]:
    if any(message["role"] == "user" for message in chat):
        for message in chat:
            if message["role"] == "developer":
                message["role"] = "system"
    return chat


def _check_last(chat: Sequence[Message], *, asks: bool) -> None:
    """The last message asks for an answer, or is one."""
    asked = bool(chat) and chat[-1]["role"] in ("user", "developer", "tool")
    if asks and not asked:
        raise TemplateError("the last message must be a user's or a tool's: nothing asks to answer")
    if asked and not asks:
        raise TemplateError("this model's prompts begin the answer to a user's or tool's message")


def _extras(tools: Sequence[Tool], schema: object) -> str:
    """What follows a first system message, even an absent one, or begins a first developer's."""
    parts = []
    if tools:
        schemas = "\n".join(_json(tool.get("function", tool)) for tool in tools)
        parts.append(_TOOLS_TEXT.format(dsml=_DSML, schemas=schemas))
    if schema:
        parts.append(_FORMAT_TEXT.format(schema=_json(schema)))
    return "".join("\n\n" + part for part in parts)


def _turns(chat: Sequence[Message], extras: str, *, thinks: bool) -> Iterator[str]:
    """The chat's turns as text. Reasoning stays in the turns since the last request."""
    last = max((i for i, m in enumerate(chat) if m["role"] in ("user", "developer")), default=-1)
    if chat[0]["role"] not in ("system", "developer"):
        yield extras
    for index, message in enumerate(chat):
        role, content = message["role"], message["content"]
        opening = _THINK if thinks and index >= last else _THINK_END
        if role == "system":
            yield content + (extras if index == 0 else "")
        elif role == "user":
            yield _USER + content + _ASSISTANT + opening
        elif role == "developer":
            if not content:
                raise TemplateError(f"messages[{index}]: a developer message must not be empty")
            head = extras if index == 0 else ""
            yield _USER + head + _DEVELOPER_TEXT + content + _ASSISTANT + opening
        elif role == "assistant":
            yield _thought(message, index) if thinks and index > last else ""
            yield content + _calls(message) + _EOS
        elif role != "tool":
            raise TemplateError(f"this model's chats have no role '{role:.40}'")
        elif index == 0 or chat[index - 1]["role"] != "tool":
            yield _results(chat, index) + opening


def _thought(message: Message, index: int) -> str:
    reasoning = message.get("reasoning_content")
    if not reasoning and not message.get("tool_calls"):
        raise TemplateError(
            f"messages[{index}]: an assistant message after the last user message needs its "
            "reasoning_content or tool_calls while the model thinks"
        )
    return (reasoning or "") + _THINK_END


def _calls(message: Message) -> str:
    calls = [_call(call["function"]) for call in message.get("tool_calls", ())]
    if not calls:
        return ""
    lines = [f"<{_DSML}function_calls>", *calls, f"</{_DSML}function_calls>"]
    return "\n\n" + "\n".join(lines)


def _call(function: Mapping[str, Any]) -> str:
    parameters = [
        f'<{_DSML}parameter name="{key}" string="{str(isinstance(value, str)).lower()}">'
        f"{value if isinstance(value, str) else _json(value)}</{_DSML}parameter>"
        for key, value in function["arguments"].items()
    ]
    lines = [f'<{_DSML}invoke name="{function["name"]}">', "\n".join(parameters)]
    return "\n".join([*lines, f"</{_DSML}invoke>"])


def _results(chat: Sequence[Message], index: int) -> str:
    """The results from `index` on, in the order of the calls before them."""
    results = list(takewhile(lambda message: message["role"] == "tool", chat[index:]))
    calls = chat[index - 1].get("tool_calls", ()) if index else ()
    if len(results) != len(calls):
        raise TemplateError(
            f"messages[{index}]: {len(results)} tool results follow {len(calls)} tool calls; every "
            "call needs its result, and every result its call"
        )
    lines = [f"<result>{result['content']}</result>" for result in _in_order(results, calls)]
    return "\n".join(["\n\n<function_results>", *lines, "</function_results>\n\n"])


def _in_order(results: list[Message], calls: Sequence[Mapping[str, Any]]) -> list[Message]:
    """By the calls' ids, where these tell: clients may send results as they come in."""
    by_id = {result.get("tool_call_id"): result for result in results}
    ids = [call.get("id") for call in calls]
    tells = len(by_id) == len(ids) and by_id.keys() == set(ids)
    return [by_id[id] for id in ids] if tells else results


def _json(value: object) -> str:
    try:
        return json.dumps(value, ensure_ascii=False)
    except RecursionError as error:
        raise TemplateError("tools, arguments and formats must not be nested so deeply") from error
