"""From conversations to token ids: tokenizer, chat template, loss mask."""

from __future__ import annotations

import json
import re
from functools import cache
from pathlib import Path
from typing import Any

from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from tools.demo import corpus

DEMO = Path(__file__).parents[2] / "kttrio" / "demo"
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
MARKUP = ("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>")
# Capitalised words stand apart from the space before them, so that a name has the same tokens in
# the middle of a question and at the start of a line: copying it is then copying ids.
SPLIT = (
    r" ?[^\s\p{N}\p{P}\p{S}\p{Lu}]+|\p{Lu}+[^\s\p{N}\p{P}\p{S}\p{Lu}]*|\p{N}"
    r"| ?[\p{P}\p{S}]+\n?|\s+(?!\S)|\s"
)


def train_tokenizer(size: int) -> Tokenizer:
    """Byte-level BPE over everything but the names: those must fall into small pieces."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size - len(MARKUP),
        special_tokens=list(SPECIAL),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(tokenizer_texts(), trainer)
    tokenizer.add_tokens([AddedToken(text, special=False, normalized=False) for text in MARKUP])
    return tokenizer


def tokenizer_texts() -> list[str]:
    """Every sentence of the corpus, without what is copied; syllables in small weight."""
    rng = corpus.Draw(0)
    texts = [corpus.UNKNOWN, corpus.NO_TOOL, *corpus.SYSTEM, *corpus.NAMES["words"]]
    texts += [f" {word}" for word in corpus.NAMES["words"] + corpus.SKIES]
    for fact in corpus.QUESTIONS:
        texts += [fact["question"], fact["answer"], fact["answer"], *fact["paraphrases"]]
    for topic in corpus.SMALL_TALK:
        texts += topic["asks"] + topic["answers"]
    for function in corpus.FUNCTIONS:
        texts += [corpus.fenced(function["code"])] * 3 + function["does"] + function["short"]
    for kind in corpus.KINDS:
        texts += [ask.replace("{}", "") for ask in kind.asks]
        texts += [*kind.names, *kind.parameters, *kind.descriptions] * 2
    texts += ["system\nuser\nassistant\n", "In it is degrees and.", "It is degrees in."] * 20
    texts += ["I found this: people live in. is. Done.", '{"temperature": "condition": "'] * 10
    texts += ['{"result": "city": "time": "population": "weather": "status": "ok"}'] * 10
    texts += ["<function=\n</function>\n<parameter=\n</parameter>\n", "Tools:\n()"] * 20
    texts += [
        re.sub(r"\{\w*\}", "", text) for text in (*corpus.ASKS_CODE, *corpus.NAMES["unknown"])
    ]
    return texts + [corpus.syllables(rng, 2, 3).capitalize() for _ in range(300)]


@cache
def template() -> Any:
    """The checkpoint's own chat template, compiled as the server compiles it."""
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    environment.policies["json.dumps_kwargs"] = {"ensure_ascii": False, "sort_keys": False}
    environment.globals["raise_exception"] = fail
    return environment.from_string((DEMO / "chat_template.jinja").read_text())


def fail(message: str) -> None:
    raise ValueError(message)


def render(talk: corpus.Conversation, *, prompt: bool = False) -> str:
    text: str = template().render(
        messages=talk.messages, tools=talk.tools or None, add_generation_prompt=prompt
    )
    return text


def with_mask(tokenizer: Tokenizer, text: str) -> tuple[list[int], list[bool]]:
    """Ids, and which of them the assistant says: the ones that are learned."""
    start, end = (tokenizer.token_to_id(token) for token in SPECIAL[1:])
    opening = tokenizer.encode("assistant\n").ids
    ids = tokenizer.encode(text).ids
    mask, speaking = [], False
    for i, token in enumerate(ids):
        mask.append(speaking)
        if token == end:
            speaking = False
        here = ids[i - len(opening) : i + 1]
        if here == [start, *opening]:
            speaking = True
    return ids, mask


def write_files(tokenizer: Tokenizer, path: Path, config: dict[str, Any]) -> None:
    """Everything of a checkpoint directory but the weights and the template."""
    path.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(path / "tokenizer.json"))
    ends = [tokenizer.token_to_id(token) for token in (SPECIAL[2], SPECIAL[0])]
    write_json(path / "config.json", config)
    generation = {
        "do_sample": True,
        "temperature": 0.3,
        "top_p": 0.9,
        "eos_token_id": ends,
        "pad_token_id": ends[1],
    }
    write_json(path / "generation_config.json", generation)
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": None,
        "eos_token": SPECIAL[2],
        "pad_token": SPECIAL[0],
        "unk_token": None,
        "add_bos_token": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": config["max_position_embeddings"],
    }
    write_json(path / "tokenizer_config.json", settings)


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n")
