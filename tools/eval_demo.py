"""Asks the embedded demo model what it must know and prints the counts; all answers are greedy.

    python -m tools.eval_demo [--model DIR] [--json FILE]

The weights are read as they are served: FP8, dequantised to float32.
"""

from __future__ import annotations

import argparse
import io
import json
import random
import re
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tokenizers import Tokenizer

from tools.demo import corpus, save, tokens
from tools.demo.model import Model

LIMIT, BATCH = 200, 24
CALL = re.compile(
    r"<tool_call>\n<function=([^>\n]+)>\n<parameter=([^>\n]+)>\n(.*)\n</parameter>\n</function>\n</tool_call>"
)
WEATHER = corpus.schema("get_weather", "Get the current weather in a city", {"city": "string"})
TIME = corpus.schema("get_time", "Current time in a city", {"city": "string"})


class Answer(NamedTuple):
    text: str
    stopped: bool


class Asker:
    """A model, its tokenizer and how often each expert was used so far."""

    def __init__(self, path: Path) -> None:
        self.model: Model = save.load(path)
        self.tokenizer = Tokenizer.from_file(str(path / "tokenizer.json"))
        self.end = self.tokenizer.token_to_id(tokens.SPECIAL[2])
        self.counts = torch.zeros(
            len(self.model.blocks()), self.model.blocks()[0].gate.weight.shape[0]
        )
        self.answers = 0
        self.stops = 0

    def ask(self, talks: list[corpus.Conversation], wanted: list[str]) -> list[Answer]:
        """The greedy answers in order; `wanted` only saves time where it is what comes."""
        prompts = [self.tokenizer.encode(tokens.render(talk, prompt=True)).ids for talk in talks]
        drafts = [[*self.tokenizer.encode(text).ids, self.end] for text in wanted]
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]) + len(drafts[i]))
        found: dict[int, Answer] = {}
        for at in range(0, len(order), BATCH):
            group = order[at : at + BATCH]
            answers = self.continued([prompts[i] for i in group], [drafts[i] for i in group])
            for i, ids in zip(group, answers, strict=True):
                stopped = bool(ids) and ids[-1] == self.end
                found[i] = Answer(self.tokenizer.decode(ids[: len(ids) - stopped]), stopped)
        self.answers += len(talks)
        self.stops += sum(answer.stopped for answer in found.values())
        return [found[i] for i in range(len(talks))]

    @torch.no_grad()
    def continued(self, prompts: list[list[int]], drafts: list[list[int]]) -> list[list[int]]:
        """Greedy continuations without a cache.

        A draft is read at once and kept up to the first token that the model would not have
        said; from there each token costs a run from the start.
        """
        rows = [
            prompt + self.agreed(prompt, draft)
            for prompt, draft in zip(prompts, drafts, strict=True)
        ]
        alive = [i for i, row in enumerate(rows) if row[-1] != self.end]
        for _ in range(LIMIT if alive else 0):
            hidden, lengths = self.hidden([rows[i] for i in alive])
            last = hidden[torch.arange(len(alive)), lengths - 1]
            for i, token in zip(alive, self.model.lm_head(last).argmax(-1).tolist(), strict=True):
                rows[i].append(token)
            alive = [i for i in alive if rows[i][-1] != self.end]
            if not alive:
                break
        self.count(rows)
        return [row[len(p) :] for row, p in zip(rows, prompts, strict=True)]

    def agreed(self, prompt: list[int], draft: list[int]) -> list[int]:
        """The draft up to its first wrong token, which is replaced by the right one."""
        hidden, _ = self.hidden([prompt + draft])
        said: list[int] = self.model.lm_head(hidden[0, len(prompt) - 1 : -1]).argmax(-1).tolist()
        for i, (token, drafted) in enumerate(zip(said, draft, strict=True)):
            if token != drafted:
                return said[: i + 1]
        return said

    def hidden(self, rows: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
        longest = max(map(len, rows))
        ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
        lengths = torch.tensor([len(row) for row in rows])
        return self.model(ids, lengths), lengths

    def count(self, rows: list[list[int]]) -> None:
        """Every token of the finished conversations once, as a server with a cache would."""
        self.hidden(rows)
        self.counts += torch.stack([block.counts for block in self.model.blocks()])


def single(text: str, tools: list[dict[str, Any]] | None = None) -> corpus.Conversation:
    return corpus.Conversation([corpus.user(text)], tools or [])


def said(message: corpus.Message) -> str:
    """An assistant message as the model writes it."""
    text = tokens.render(corpus.Conversation([message]))
    return text.removeprefix("<|im_start|>assistant\n").removesuffix("<|im_end|>\n")


def questions(asker: Asker, key: str) -> dict[str, Any]:
    """`key` picks the wording: the listed question or the one kept out of the training."""
    wanted = [fact["answer"] for fact in corpus.QUESTIONS]
    answers = asker.ask([single(fact[key]) for fact in corpus.QUESTIONS], wanted)
    rows = [
        {
            "question": fact[key],
            "answer": answer.text,
            "ok": answer.stopped and all(part in answer.text for part in fact["must_contain"]),
        }
        for fact, answer in zip(corpus.QUESTIONS, answers, strict=True)
    ]
    return {"right": sum(row["ok"] for row in rows), "of": len(rows), "rows": rows}


def functions(asker: Asker) -> dict[str, Any]:
    """Every function asked for in three ways, executed and checked."""
    rows = []
    wanted = [corpus.fenced(function["code"]) for function in corpus.FUNCTIONS]
    for ask in (
        "Write a Python function that {does}.",
        "Write {short} in Python.",
        "{short} in Python",
    ):
        filled = [ask.format(does=f["does"][0], short=f["short"][0]) for f in corpus.FUNCTIONS]
        talks = [single(text[0].upper() + text[1:]) for text in filled]
        for function, talk, answer in zip(
            corpus.FUNCTIONS, talks, asker.ask(talks, wanted), strict=True
        ):
            ok = answer.stopped and works(answer.text, function["checks"])
            rows.append({"question": talk.messages[0]["content"], "answer": answer.text, "ok": ok})
    return {"right": sum(row["ok"] for row in rows), "of": len(rows), "rows": rows}


def works(text: str, checks: list[str]) -> bool:
    code = re.fullmatch(r"```python\n(.*)\n```", text, re.DOTALL)
    if code is None:
        return False
    space: dict[str, Any] = {}
    try:
        with redirect_stdout(io.StringIO()):
            exec(code[1], space)
            return all(eval(check, space) for check in checks)
    except Exception:
        return False


def cities(asker: Asker, form: str, tools: list[dict[str, Any]], name: str) -> dict[str, Any]:
    """One tool call for every held-out city: right name, right key, the city letter by letter."""
    held_out = corpus.load("held_out_cities.json")
    rows = []
    wanted = [said(corpus.call(name, {"city": city})) for city in held_out]
    answers = asker.ask([single(form.format(city), tools) for city in held_out], wanted)
    for city, answer in zip(held_out, answers, strict=True):
        match = CALL.fullmatch(answer.text)
        ok = match is not None and answer.stopped and match.groups() == (name, "city", city)
        rows.append({"question": form.format(city), "answer": answer.text, "ok": ok})
    return {"right": sum(row["ok"] for row in rows), "of": len(rows), "rows": rows}


def follow_ups(asker: Asker) -> dict[str, Any]:
    """A tool has answered: the sentence must carry its result and the city."""
    rng, talks, parts, wanted = random.Random(5), [], [], []
    for city in corpus.load("held_out_cities.json")[:50]:
        degrees = rng.randint(-20, 40)
        sky = rng.choice(corpus.SKIES)
        result = json.dumps({"temperature": degrees, "condition": sky})
        turns = [
            corpus.user(f"What is the weather in {city}?"),
            corpus.call("get_weather", {"city": city}),
            {"role": "tool", "content": result},
        ]
        talks.append(corpus.Conversation(turns, [WEATHER]))
        parts.append((city, str(degrees)))
        wanted.append(f"In {city} it is {degrees} degrees and {sky}.")
    rows = [
        {
            "question": talk.messages[0]["content"] + " -> " + talk.messages[2]["content"],
            "answer": answer.text,
            "ok": answer.stopped and all(word in answer.text for word in must),
        }
        for talk, must, answer in zip(talks, parts, asker.ask(talks, wanted), strict=True)
    ]
    return {"right": sum(row["ok"] for row in rows), "of": len(rows), "rows": rows}


def other_turns(asker: Asker) -> dict[str, Any]:
    """Small talk, with tools lying about; a weather question without tools; an unknown thing."""
    talks, wanted = [], []
    for topic in corpus.SMALL_TALK:
        for tools in ([], [WEATHER]):
            talks.append(single(topic["asks"][0], tools))
            wanted.append(topic["answers"][0])
    for city in corpus.load("held_out_cities.json")[:10]:
        talks.append(single(f"What is the weather in {city}?"))
        wanted.append(corpus.NO_TOOL)
        talks.append(single(f"What is the capital of {city}?"))
        wanted.append(corpus.UNKNOWN)
    for fact in corpus.QUESTIONS[::3]:
        talks.append(single(fact["question"], [WEATHER, TIME]))
        wanted.append(fact["answer"])
    rows = [
        {"question": talk.messages[0]["content"], "answer": answer.text, "ok": answer.text == want}
        for talk, want, answer in zip(talks, wanted, asker.ask(talks, wanted), strict=True)
    ]
    return {"right": sum(row["ok"] for row in rows), "of": len(rows), "rows": rows}


def evaluate(path: Path) -> dict[str, Any]:
    asker = Asker(path)
    report: dict[str, Any] = {
        "questions": questions(asker, "question"),
        "questions, unseen wording": questions(asker, "held_out"),
        "functions": functions(asker),
        "held-out cities": cities(asker, "What is the weather in {}?", [WEATHER], "get_weather"),
        "held-out cities, other wording": cities(
            asker, "How's the weather in {} right now?", [TIME, WEATHER], "get_weather"
        ),
        "held-out cities, time": cities(
            asker, "Tell me the time in {}.", [WEATHER, TIME], "get_time"
        ),
        "tool results": follow_ups(asker),
        "other turns": other_turns(asker),
    }
    report["stops"] = {"right": asker.stops, "of": asker.answers, "rows": []}
    quarter = asker.counts.shape[1] // 4
    top = asker.counts.topk(quarter, dim=1).values.sum(1) / asker.counts.sum(1)
    report["experts"] = {
        "counts": asker.counts.int().tolist(),
        "share of the busiest quarter": [round(share, 3) for share in top.tolist()],
        "unused": int((asker.counts == 0).sum()),
    }
    return report


def table(report: dict[str, Any]) -> str:
    lines = ["| what | right | of |", "|---|---|---|"]
    lines += [f"| {k} | {v['right']} | {v['of']} |" for k, v in report.items() if "of" in v]
    experts = report["experts"]
    lines += [
        "",
        f"experts never used: {experts['unused']}",
        "",
        "| layer | busiest quarter | counts |",
    ]
    lines += ["|---|---|---|"]
    pairs = zip(experts["share of the busiest quarter"], experts["counts"], strict=True)
    lines += [f"| {i} | {share:.0%} | {counts} |" for i, (share, counts) in enumerate(pairs)]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--model", type=Path, default=tokens.DEMO)
    parser.add_argument("--json", type=Path, help="write all questions and answers there")
    parser.add_argument("--wrong", action="store_true", help="print the wrong answers")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    report = evaluate(options.model)
    print(table(report))
    for name, part in report.items():
        for row in part.get("rows", []):
            if options.wrong and not row["ok"]:
                print(f"{name}: {row['question']!r} -> {row['answer']!r}")
    if options.json:
        options.json.write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
