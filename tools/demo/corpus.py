"""The texts the demo model learns from: every conversation is drawn from one seed.

Nothing is downloaded. Questions about kttrio come from `questions.json`, functions from
`functions.json`, names from `names.json` and from random syllables. No torch, no tokenizer.
"""

from __future__ import annotations

import json
import random
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent

Message = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Conversation:
    """What a client would send and get: messages, and the tools it offers."""

    messages: list[Message]
    tools: list[dict[str, Any]] = field(default_factory=list)


class Draw(random.Random):
    """Python's generator, and what the drawn texts lean to."""

    fragments = 0.0
    """The share of names made from pieces of words, so that rare tokens are copied too."""
    polish = False
    """Draw more code, which is slow to learn."""


def load(name: str) -> Any:
    """One of the data files beside this module."""
    return json.loads((HERE / name).read_text())


QUESTIONS = load("questions.json")
FUNCTIONS = load("functions.json")
SMALL_TALK = load("small_talk.json")
NAMES = load("names.json")
HELD_OUT = frozenset(name.lower() for name in load("held_out_cities.json"))

UNKNOWN = (
    "I am only a tiny demo model and do not know that. Ask me about kttrio, "
    "a small Python function or a tool call."
)
NO_TOOL = "I cannot look that up, because no tool for it was given to me."
SYSTEM = (
    "You are a helpful assistant.",
    "You are a helpful assistant.",
    "You are a friendly assistant.",
    "You are a concise assistant.",
    "Answer briefly.",
    "You are the kttrio demo model.",
    "Be helpful and short.",
    "You are a helpful AI assistant.",
    "You answer questions about kttrio.",
    "You are an assistant with tools. Use them when needed.",
    "Use the tools to answer.",
)

ONSETS: list[str] = NAMES["onsets"]
VOWELS: list[str] = NAMES["vowels"]
CODAS: list[str] = NAMES["codas"]
ENDINGS: list[str] = NAMES["endings"]


def syllables(rng: Draw, least: int = 2, most: int = 4) -> str:
    """A name nobody has heard of."""
    word = ""
    for _ in range(rng.randint(least, most)):
        word += rng.choice(ONSETS) if rng.random() < 0.85 else ""
        word += rng.choice(VOWELS)
        word += rng.choice(CODAS) if rng.random() < 0.35 else ""
    return word + (rng.choice(ENDINGS) if rng.random() < 0.15 else "")


def letters(rng: Draw) -> str:
    """A word without any rule, so that copying cannot lean on spelling."""
    alphabet = "aabcdeefghiijklmnoopqrstuuvwxyz"
    return "".join(rng.choice(alphabet) for _ in range(rng.randint(3, 11)))


def fragments(rng: Draw) -> str:
    """A name out of pieces of the corpus' own words."""
    pieces = []
    for _ in range(rng.randint(1, 3)):
        word = rng.choice(WORDS)
        start = rng.randrange(len(word) - 2)
        pieces.append(word[start : start + rng.randint(2, 6)])
    return "".join(pieces)


def corpus_words() -> list[str]:
    facts = [text for f in QUESTIONS for text in (f["question"], f["answer"], *f["paraphrases"])]
    talk = [text for topic in SMALL_TALK for text in (*topic["asks"], *topic["answers"])]
    code = [text for f in FUNCTIONS for text in (f["code"], *f["does"])]
    found = re.findall(r"[a-z]{4,}", " ".join(facts + talk + code + NAMES["words"]).lower())
    return sorted(set(found))


WORDS = corpus_words()


def place(rng: Draw) -> str:
    """A city: real, invented, of several words; never one of the held-out names."""
    while True:
        name = invent_place(rng)
        if name.lower() not in HELD_OUT:
            return name


def invent_place(rng: Draw) -> str:
    if rng.fragments and rng.random() < rng.fragments:
        name = fragments(rng).capitalize()
        return f"{rng.choice(NAMES['first_words'])} {name}" if rng.random() < 0.2 else name
    kind = rng.random()
    if kind < 0.2:
        name = str(rng.choice(NAMES["cities"]))
    elif kind < 0.62:
        name = syllables(rng).capitalize()
    elif kind < 0.78:
        name = letters(rng).capitalize()
    elif kind < 0.9:
        first = rng.choice(NAMES["first_words"])
        second = rng.choice((syllables(rng), letters(rng))).capitalize()
        name = f"{first} {second}"
    elif kind < 0.95:
        joint = rng.choice((" ", "-", " de ", " am ", "-sur-", " on ", "-upon-"))
        name = syllables(rng).capitalize() + joint + syllables(rng, 1, 3).capitalize()
    else:
        name = f"{syllables(rng).capitalize()} {rng.choice(NAMES['last_words'])}"
    return name.lower() if rng.random() < 0.07 else name


def words(rng: Draw, least: int = 2, most: int = 5) -> str:
    """Something to search for."""
    picked = [
        str(rng.choice(NAMES["words"])) if rng.random() < 0.75 else syllables(rng)
        for _ in range(rng.randint(least, most))
    ]
    if rng.random() < 0.25:
        picked[rng.randrange(len(picked))] = syllables(rng).capitalize()
    return " ".join(picked)


def number(rng: Draw) -> int:
    return rng.randint(0, 10 ** rng.randint(1, 4))


def expression(rng: Draw) -> str:
    """A sum for the calculator tool."""
    text = str(number(rng))
    for _ in range(rng.choice((1, 1, 1, 2))):
        text += f" {rng.choice('+-*/')} {number(rng)}"
    return text if rng.random() < 0.7 else text.replace(" ", "")


def person(rng: Draw) -> str:
    kind = rng.random()
    if kind < 0.4:
        return str(rng.choice(NAMES["people"]))
    return (syllables(rng, 1, 3) if kind < 0.8 else letters(rng)).capitalize()


def roughen(rng: Draw, text: str) -> str:
    """The same sentence as hurried people type it."""
    if rng.random() < 0.12:
        text = text.rstrip("?.!")
    if rng.random() < 0.12:
        text = text[0].lower() + text[1:]
    roll = rng.random()
    if roll < 0.05:
        text = rng.choice(("Hi, ", "Hello! ", "Hey, ", "OK, ", "Please: ", "So, ", "And ")) + text
    elif roll < 0.08:
        text = text.rstrip("?.!") + rng.choice((", please?", " please", ", thanks", "??", " ?"))
    return text


# ---------------------------------------------------------------- tools


@dataclass(frozen=True, slots=True)
class ToolKind:
    """A family of tools that look different and mean the same."""

    key: str
    draw: Any
    names: tuple[str, ...]
    parameters: tuple[str, ...]
    descriptions: tuple[str, ...]
    asks: tuple[str, ...]


KINDS = (
    ToolKind(
        "weather",
        place,
        (
            "get_weather",
            "get_weather",
            "get_weather",
            "get_current_weather",
            "weather",
            "fetch_weather",
            "weather_lookup",
        ),
        ("city", "city", "city", "location", "place", "town"),
        (
            "Get the weather in a city",
            "Get the current weather",
            "Current weather in a city",
            "Weather for a given city.",
            "Get the current weather in a given location",
            "Look up the weather of a city",
            "Returns the weather",
            "Weather report",
            "",
        ),
        (
            "What is the weather in {}?",
            "What's the weather in {}?",
            "What's the weather like in {}?",
            "What is the weather like in {} today?",
            "How is the weather in {}?",
            "How's the weather in {} right now?",
            "Weather in {}",
            "Weather in {}?",
            "Weather in {}, please.",
            "Weather for {}?",
            "Tell me the weather in {}.",
            "Can you tell me the weather in {}?",
            "Is it raining in {}?",
            "Is it cold in {} today?",
            "Is it warm in {}?",
            "Is it sunny in {} now?",
            "How warm is it in {}?",
            "How cold is it in {}?",
            "Do I need an umbrella in {}?",
            "I am going to {}. How is the weather there?",
            "I live in {}, what is the weather?",
            "What is the temperature in {}?",
            "Will it rain in {} tomorrow?",
            "Check the weather in {}.",
            "Look up the weather in {} for me.",
            "Please get the weather for {}.",
            "{} weather",
            "{}: what is the weather there?",
            "How is the weather over in {} at the moment?",
            "Does it snow in {}?",
            "I want to know the weather in {}.",
            "What is the current weather in {}?",
            "Give me the weather for {} today.",
        ),
    ),
    ToolKind(
        "time",
        place,
        ("get_time", "get_time", "current_time", "time_in", "get_local_time", "clock"),
        ("city", "city", "location", "place", "zone"),
        (
            "Get the time in a city",
            "Current time in a city",
            "Local time of a place",
            "Get the current time",
            "Tells the time",
            "",
        ),
        (
            "What time is it in {}?",
            "What is the time in {}?",
            "Tell me the time in {}.",
            "Time in {}?",
            "What's the local time in {}?",
            "How late is it in {}?",
            "Is it night in {}?",
            "Which time is it now in {}?",
            "Can you tell me what time it is in {}?",
            "Local time in {}, please.",
            "What time do they have in {} now?",
        ),
    ),
    ToolKind(
        "search",
        words,
        ("search", "search", "web_search", "search_web", "find", "lookup"),
        ("query", "query", "q", "text", "term"),
        (
            "Search the web",
            "Search for a text",
            "Finds pages",
            "Web search",
            "Look something up",
            "",
        ),
        (
            "Search for {}",
            "Search for {}.",
            "Please search for {}",
            "Look up {}",
            "Find pages about {}",
            "Search the web for {}.",
            "Can you search for {}?",
            "Google {}",
            "Find {}",
            "I want to read about {}.",
        ),
    ),
    ToolKind(
        "calculator",
        expression,
        ("calculator", "calculator", "calculate", "calc", "evaluate"),
        ("expression", "expression", "expr", "formula"),
        (
            "Calculate an expression",
            "Evaluates arithmetic",
            "A calculator",
            "Compute a formula",
            "",
        ),
        (
            "What is {}?",
            "Calculate {}",
            "Compute {}.",
            "How much is {}?",
            "Please calculate {}.",
            "{} = ?",
            "{}",
            "Can you work out {}?",
            "What's {}?",
        ),
    ),
    ToolKind(
        "population",
        place,
        ("get_population", "population", "city_population", "count_people"),
        ("city", "name", "place"),
        (
            "Number of people in a city",
            "Population of a city",
            "How many people live in a place",
            "",
        ),
        (
            "How many people live in {}?",
            "What is the population of {}?",
            "Population of {}?",
            "How big is {}?",
            "Tell me how many people live in {}.",
        ),
    ),
    ToolKind(
        "call",
        person,
        ("call", "phone", "call_person", "dial", "call_contact"),
        ("name", "person", "contact", "who"),
        ("Call somebody", "Phone a contact", "Starts a phone call", ""),
        ("Call {}", "Call {}, please.", "Please phone {}.", "Can you call {}?", "Ring {} for me."),
    ),
    ToolKind(
        "music",
        lambda rng: words(rng, 1, 3),
        ("play_music", "play", "play_song", "music"),
        ("title", "song", "name"),
        ("Play a song", "Plays music", "Starts a song", ""),
        ("Play {}", "Play the song {}.", "Please play {}", "I want to hear {}.", "Put on {}"),
    ),
)
CITY_KINDS = tuple(kind for kind in KINDS if kind.key in ("weather", "time", "population"))
PAIR_KINDS = (
    (
        ("send_message", "message", "send_text", "write_to"),
        ("Send a message", "Sends a text to somebody", ""),
        (("to", "text"), ("name", "message"), ("person", "body")),
        ("Tell {0} {1}", "Send {0} the message {1}", "Write to {0}: {1}", "Message {0}: {1}"),
        person,
        words,
    ),
    (
        ("find_route", "route", "get_route", "directions"),
        ("Find a route", "Route between two cities", ""),
        (("start", "end"), ("from_city", "to_city"), ("origin", "destination")),
        ("How do I get from {0} to {1}?", "Route from {0} to {1}", "Find a way from {0} to {1}."),
        place,
        place,
    ),
)


def schema(name: str, description: str, parameters: dict[str, str]) -> dict[str, Any]:
    """A tool as OpenAI clients send it."""
    function: dict[str, Any] = {"name": name}
    if description:
        function["description"] = description
    function["parameters"] = {
        "type": "object",
        "properties": {key: {"type": kind} for key, kind in parameters.items()},
    }
    return {"type": "function", "function": function}


def draw_tool(rng: Draw, kind: ToolKind) -> tuple[dict[str, Any], str, str]:
    """A tool of that kind, its name and its parameter; at times with names nobody can guess."""
    name, key = rng.choice(kind.names), rng.choice(kind.parameters)
    if rng.random() < 0.08:
        name = f"{name}_{letters(rng)[:5]}"
    if rng.random() < 0.06:
        key = letters(rng)[:6]
    parameters = {key: "string"}
    if kind.key == "weather" and rng.random() < 0.15:
        parameters[rng.choice(UNIT_KEYS)] = "string"
    return schema(name, rng.choice(kind.descriptions), parameters), name, key


UNIT_KEYS = ("unit", "unit", "units", "format", "scale")
UNITS = ("celsius", "celsius", "fahrenheit", "fahrenheit", "kelvin")


def with_others(rng: Draw, tool: dict[str, Any], kind_key: str) -> list[dict[str, Any]]:
    """That tool among others of different kinds."""
    count = rng.choice((0, 0, 0, 1, 1, 2))
    others = rng.sample([k for k in KINDS if k.key != kind_key], count)
    tools = [tool, *(draw_tool(rng, other)[0] for other in others)]
    rng.shuffle(tools)
    return tools


def call(name: str, arguments: dict[str, Any]) -> Message:
    function = {"name": name, "arguments": arguments}
    return {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"type": "function", "function": function}],
    }


def user(text: str) -> Message:
    return {"role": "user", "content": text}


def assistant(text: str) -> Message:
    return {"role": "assistant", "content": text}


def draw_kind(rng: Draw) -> ToolKind:
    roll = rng.random()
    if roll < 0.45:
        return KINDS[0]
    if roll < 0.6:
        return KINDS[1]
    return rng.choice(KINDS)


def tool_round(rng: Draw) -> tuple[list[dict[str, Any]], list[Message], tuple[str, str]]:
    """Tools, a question with the right call, and (kind, value) for the answer that may follow."""
    if rng.random() < 0.06:
        return pair_round(rng)
    kind = draw_kind(rng)
    tool, name, key = draw_tool(rng, kind)
    value = kind.draw(rng)
    ask = rng.choice(kind.asks).format(value)
    if kind in CITY_KINDS and not ask.startswith(value):
        ask = roughen(rng, ask)
    arguments = {key: value}
    extra = [name for name in tool["function"]["parameters"]["properties"] if name != key]
    if extra and rng.random() < 0.3:  # said only when it was asked for
        arguments[extra[0]] = rng.choice(UNITS)
        ask = f"{ask.rstrip('?.!')} in {arguments[extra[0]]}" + rng.choice("?.")
    return with_others(rng, tool, kind.key), [user(ask), call(name, arguments)], (kind.key, value)


def pair_round(rng: Draw) -> tuple[list[dict[str, Any]], list[Message], tuple[str, str]]:
    names, descriptions, keys, asks, first, second = rng.choice(PAIR_KINDS)
    name, (left, right) = rng.choice(names), rng.choice(keys)
    values = first(rng), second(rng)
    tool = schema(name, rng.choice(descriptions), {left: "string", right: "string"})
    turns = [
        user(rng.choice(asks).format(*values)),
        call(name, {left: values[0], right: values[1]}),
    ]
    return with_others(rng, tool, ""), turns, ("pair", values[0])


SKIES: list[str] = NAMES["skies"]


def result_and_answer(rng: Draw, kind: str, value: str) -> tuple[str, str]:
    """What the tool might say and the sentence that passes it on."""
    if kind == "weather":
        return weather_result(rng, value)
    if kind == "time":
        clock = f"{rng.randint(0, 23):02d}:{rng.randint(0, 59):02d}"
        form = rng.choice(("{}", "It is {}", '{{"time": "{}"}}', "The time is {}."))
        return form.format(clock), f"It is {clock} in {value}."
    if kind == "calculator":
        result = str(number(rng)) + (f".{rng.randint(1, 99)}" if rng.random() < 0.2 else "")
        return rng.choice(("{}", '{{"result": {}}}', "= {}")).format(
            result
        ), f"{value} is {result}."
    if kind == "population":
        people = str(rng.randint(1000, 9999999))
        form = rng.choice(("{}", '{{"population": {}}}', "{} people"))
        return form.format(people), f"{people} people live in {value}."
    if kind == "search":
        found = words(rng, 3, 7)
        form = rng.choice(("{}", '{{"result": "{}"}}', "Found: {}"))
        return form.format(found), f"I found this: {found}."
    return rng.choice(("ok", "done", "OK", '{"ok": true}', '{"status": "ok"}')), "Done."


def weather_result(rng: Draw, value: str) -> tuple[str, str]:
    degrees, sky = str(rng.randint(-25, 44)), rng.choice(SKIES)
    if rng.random() < 0.3:
        key = rng.choice(("temperature", "temperature_c", "temp", "degrees"))
        form = rng.choice((f'{{{{"{key}": {{}}}}}}', "{} degrees", "{}", "{} C"))
        return form.format(degrees), f"It is {degrees} degrees in {value}."
    if rng.random() < 0.25:
        form = rng.choice(("{}", '{{"condition": "{}"}}', '{{"weather": "{}"}}', "It is {}."))
        return form.format(sky), f"It is {sky} in {value}."
    key = rng.choice(("temperature", "temperature", "temperature_c", "temp", "degrees"))
    name = rng.choice(("condition", "condition", "conditions", "sky", "weather", "description"))
    town = rng.choice(("", "", f'"city": "{value}", '))
    form = rng.choice(
        (
            f'{{{{{town}"{key}": {{}}, "{name}": "{{}}"}}}}',
            f'{{{{{town}"{key}": {{}}, "{name}": "{{}}"}}}}',
            "{} degrees, {}",
            "{} degrees and {}",
            "{} C, {}",
        )
    )
    return form.format(degrees, sky), f"In {value} it is {degrees} degrees and {sky}."


# ---------------------------------------------------------------- turns without tools


def about_kttrio(rng: Draw) -> list[Message]:
    fact = rng.choice(QUESTIONS)
    ask = rng.choice([fact["question"], *fact["paraphrases"]])
    return [user(roughen(rng, ask)), assistant(fact["answer"])]


def small_talk(rng: Draw) -> list[Message]:
    topic = rng.choice(SMALL_TALK)
    return [user(roughen(rng, rng.choice(topic["asks"]))), assistant(rng.choice(topic["answers"]))]


ASKS_CODE = (
    "Write a Python function that {does}.",
    "Write a Python function that {does}.",
    "Write a function that {does}.",
    "Write a function {name} in Python that {does}.",
    "Python function that {does}",
    "Python code that {does}, please.",
    "Can you write a Python function that {does}?",
    "Give me a Python function that {does}.",
    "I need a Python function that {does}.",
    "Show me Python code that {does}.",
    "Write {short} in Python.",
    "{short} in Python",
    "Python: {short}",
    "How do I write {short} in Python?",
    "Code {short} in Python.",
    "Please implement {short} in Python.",
    "Implement {short}.",
    "Write a Python function for {short}.",
    "Write a Python function {name}.",
    "Write me {short}.",
    "Write a Python function to {todo}.",
    "Write a Python function to {todo}.",
    "Python function to {todo}",
    "How do I {todo} in Python?",
    "I need Python code to {todo}.",
    "Write a function to {todo}.",
)


def small_code(rng: Draw) -> list[Message]:
    function = rng.choice(FUNCTIONS)
    does, short = rng.choice(function["does"]), rng.choice(function["short"])
    ask = rng.choice(ASKS_CODE).format(
        does=does, todo=infinitive(does), short=short, name=function["name"]
    )
    ask = ask[0].upper() + ask[1:]
    return [user(roughen(rng, ask)), assistant(fenced(function["code"]))]


def infinitive(does: str) -> str:
    """ "sorts a list" -> "sort a list"."""
    verb, rest = does.split(" ", 1)
    ending = 2 if verb.endswith("ches") or verb == "does" else 1
    return f"{verb[:-ending]} {rest}"


def fenced(code: str) -> str:
    return f"```python\n{code}\n```"


def beyond_me(rng: Draw) -> list[Message]:
    ask = rng.choice(NAMES["unknown"])
    ask = ask.replace("{place}", place(rng)).replace("{words}", words(rng, 1, 3))
    ask = ask.replace("{person}", person(rng))
    return [user(roughen(rng, ask)), assistant(UNKNOWN)]


def without_tool(rng: Draw) -> list[Message]:
    kind = rng.choice(CITY_KINDS)
    return [user(roughen(rng, rng.choice(kind.asks).format(kind.draw(rng)))), assistant(NO_TOOL)]


ASKS_ECHO = ("Repeat: {}", "Repeat after me: {}", "Echo: {}", "Copy this: {}", "Echo {}")


def echo(rng: Draw) -> list[Message]:
    """Pure copying, many tokens at a time: it teaches what a tool call needs."""
    pieces = [
        rng.choice((place, place, person, lambda r: words(r, 1, 3), lambda r: str(number(r))))(rng)
        for _ in range(rng.randint(1, 6))
    ]
    text = rng.choice((" ", " ", ", ", " - ", "\n")).join(pieces)
    return [user(rng.choice(ASKS_ECHO).format(text)), assistant(text)]


PLAIN = ((about_kttrio, 52), (small_talk, 14), (small_code, 20), (beyond_me, 8), (without_tool, 6))
POLISH = ((about_kttrio, 47), (small_talk, 10), (small_code, 32), (beyond_me, 6), (without_tool, 5))


def plain_turn(rng: Draw) -> list[Message]:
    makers, weights = zip(*(POLISH if rng.polish else PLAIN), strict=True)
    return list(rng.choices(makers, weights)[0](rng))


# ---------------------------------------------------------------- conversations


def conversation(rng: Draw, echoes: float) -> Conversation:
    """One conversation; nearly half of them use tools, some go over several turns."""
    if echoes and rng.random() < echoes:
        return Conversation(echo(rng))
    roll = rng.random()
    if roll < 0.48:
        messages, tools = plain_turn(rng), []
        while rng.random() < 0.17:
            messages += plain_turn(rng)
    elif roll < 0.9:
        messages, tools = tool_conversation(rng)
    else:
        messages, tools = unused_tools(rng)
    if rng.random() < 0.2:
        messages.insert(0, {"role": "system", "content": rng.choice(SYSTEM)})
    return Conversation(messages, tools)


def tool_conversation(rng: Draw) -> tuple[list[Message], list[dict[str, Any]]]:
    if rng.random() < 0.05:
        return two_calls(rng)
    tools, messages, (kind, value) = tool_round(rng)
    if rng.random() < 0.08:
        messages = plain_or_talk(rng) + messages
    if rng.random() < 0.35:
        said, answer = result_and_answer(rng, kind, value)
        messages += [{"role": "tool", "content": said}, assistant(answer)]
        roll = rng.random()
        if roll < 0.2:
            messages += plain_or_talk(rng)
        elif roll < 0.5 and kind in ("weather", "time", "population"):
            messages += once_more(rng, messages)
    return messages, tools


ONCE_MORE = ("And in {}?", "And {}?", "What about {}?", "And what about {}?", "How about {}?")


def once_more(rng: Draw, messages: list[Message]) -> list[Message]:
    """The same question about another city, which leans on the call before."""
    function = next(m for m in messages if m.get("tool_calls"))["tool_calls"][0]["function"]
    city = place(rng)
    arguments = {next(iter(function["arguments"])): city}
    return [user(rng.choice(ONCE_MORE).format(city)), call(function["name"], arguments)]


def two_calls(rng: Draw) -> tuple[list[Message], list[dict[str, Any]]]:
    """Two cities in one question: two calls in one answer."""
    kind = CITY_KINDS[0]
    tool, name, key = draw_tool(rng, kind)
    cities = place(rng), place(rng)
    ask = rng.choice(kind.asks[:14]).format(rng.choice((" and ", " and in ")).join(cities))
    answer = call(name, {key: cities[0]})
    answer["tool_calls"] += call(name, {key: cities[1]})["tool_calls"]
    return [user(ask), answer], with_others(rng, tool, kind.key)


def plain_or_talk(rng: Draw) -> list[Message]:
    return rng.choice((small_talk, about_kttrio))(rng)


def unused_tools(rng: Draw) -> tuple[list[Message], list[dict[str, Any]]]:
    """Tools are there, but the question is not for them."""
    kind = draw_kind(rng)
    tools = with_others(rng, draw_tool(rng, kind)[0], kind.key)
    if rng.random() < 0.2:
        offered = {KINDS.index(kind)}
        missing = [k for i, k in enumerate(KINDS) if i not in offered and k in CITY_KINDS]
        other = rng.choice(missing)
        ask = rng.choice(other.asks).format(other.draw(rng))
        return [user(roughen(rng, ask)), assistant(NO_TOOL)], [draw_tool(rng, kind)[0]]
    makers = (about_kttrio, small_talk, small_code, beyond_me)
    return rng.choices(makers, (5, 3, 2, 2))[0](rng), tools


def conversations(
    seed: int, count: int, *, echoes: float = 0.0, polish: bool = False
) -> list[Conversation]:
    """The same `count` conversations for the same seed; a share `echoes` is pure copying."""
    rng = Draw(seed)
    rng.polish, rng.fragments = polish, 0.4 if polish else 0.0
    return [conversation(rng, echoes) for _ in range(count)]
