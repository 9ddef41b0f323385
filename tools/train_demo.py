"""Trains the embedded demo model on a CPU and writes it to `kttrio/demo`.

    python -m tools.train_demo --run DIR            # train, or go on where DIR stopped
    python -m tools.train_demo --run DIR --publish  # quantise the last state into kttrio/demo

Two threads, one seed, no download: the same machine makes the same weights. `tools/demo` holds
the texts, the model and the file formats; `tools/eval_demo.py` asks the result its questions.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tools.demo import corpus, save, tokens
from tools.demo.model import Model

SEED, THREADS = 20, 2
TOKENS_PER_STEP = 2048
SHARD = 4096  # conversations that are sorted by length together
PEAK, WARMUP = 2e-3, 100
BALANCE = 0.002
CONFIG: dict[str, Any] = {
    "architectures": ["Qwen3NextForCausalLM"],
    "model_type": "qwen3_next",
    "dtype": "float32",
    "vocab_size": 2048,
    "hidden_size": 256,
    "intermediate_size": 256,
    "num_hidden_layers": 8,
    "full_attention_interval": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "attention_bias": False,
    "attention_dropout": 0.0,
    "hidden_act": "silu",
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 32,
    "linear_value_head_dim": 32,
    "linear_num_key_heads": 4,
    "linear_num_value_heads": 8,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "num_experts": 16,
    "num_experts_per_tok": 4,
    "norm_topk_prob": True,
    "moe_intermediate_size": 64,
    "shared_expert_intermediate_size": 64,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "rope_scaling": None,
    "partial_rotary_factor": 0.5,
    "max_position_embeddings": 4096,
    "initializer_range": 0.02,
    "tie_word_embeddings": False,
    "use_cache": True,
    "bos_token_id": None,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "quantization_config": {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": [128, 128],
    },
}

Row = tuple[list[int], list[bool]]


def batches(tokenizer: tokens.Tokenizer) -> Iterator[list[Row]]:
    """Endless batches of rows of similar length; a shard's texts depend on its number alone."""
    shard = 0
    while True:
        talks = corpus.conversations(SEED * 1000 + shard, SHARD)
        rows = sorted((tokens.with_mask(tokenizer, tokens.render(t)) for t in talks), key=by_length)
        groups, group = [], list[Row]()
        for row in rows:
            if group and len(row[0]) * (len(group) + 1) > TOKENS_PER_STEP:
                groups.append(group)
                group = []
            group.append(row)
        random.Random(shard).shuffle(groups)
        yield from groups
        shard += 1


def by_length(row: Row) -> int:
    return len(row[0])


def padded(rows: list[Row]) -> tuple[Tensor, Tensor, Tensor]:
    """Ids and mask [batch, tokens] and the lengths."""
    longest = max(map(by_length, rows))
    ids = torch.tensor([row[0] + [0] * (longest - len(row[0])) for row in rows])
    mask = torch.tensor([row[1] + [False] * (longest - len(row[0])) for row in rows])
    return ids, mask, torch.tensor([len(row[0]) for row in rows])


def loss_of(model: Model, rows: list[Row]) -> Tensor:
    """Cross entropy of what the assistant says."""
    ids, mask, lengths = padded(rows)
    hidden = model(ids[:, :-1], lengths - 1)
    said = mask[:, 1:]
    return F.cross_entropy(model.lm_head(hidden[said]), ids[:, 1:][said])


class Trainer:
    """Model, optimiser and position in the data: what a run's state file holds."""

    def __init__(self, run: Path, steps: int, decay: int) -> None:
        torch.manual_seed(SEED)
        torch.set_num_threads(THREADS)
        self.run, self.steps, self.decay, self.step = run, steps, decay, 0
        self.model = Model(CONFIG)
        matrices = [p for p in self.model.parameters() if p.dim() > 1]
        vectors = [p for p in self.model.parameters() if p.dim() == 1]
        groups = [{"params": matrices, "weight_decay": 0.05}, {"params": vectors, "weight_decay": 0.0}]
        self.optimiser = torch.optim.AdamW(groups, lr=PEAK, betas=(0.9, 0.95), fused=True)

    def rate(self) -> float:
        """Warm-up, a plateau, then straight down: the plateau does not know the end."""
        return PEAK * min(1.0, (self.step + 1) / WARMUP, (self.steps - self.step) / self.decay)

    def train_step(self, rows: list[Row]) -> tuple[float, float]:
        for group in self.optimiser.param_groups:
            group["lr"] = self.rate()
        master = self.quantise() if self.step >= self.steps - self.decay // 2 else {}
        loss = loss_of(self.model, rows)
        balance = torch.stack([block.loss for block in self.model.blocks()]).mean()
        (loss + BALANCE * balance).backward()
        for parameter, value in master.items():
            parameter.data.copy_(value)
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimiser.step()
        self.optimiser.zero_grad()
        self.step += 1
        return loss.item(), balance.item()

    @torch.no_grad()
    def quantise(self) -> dict[torch.nn.Parameter, Tensor]:
        """Put the values in place that will be served; returns the exact ones.

        The last steps learn through the rounding, as if it were not there (straight-through).
        """
        master = {p: p.detach().clone() for p in self.model.parameters()}
        for name, parameter in self.model.named_parameters():
            parameter.copy_(save.served(name, parameter))
        return master

    def store(self) -> None:
        state = {"step": self.step, "model": self.model.state_dict()}
        state["optimiser"] = self.optimiser.state_dict()
        torch.save(state, self.run / "state.new")
        (self.run / "state.new").replace(self.run / "state.pt")

    def restore(self) -> None:
        if (self.run / "state.pt").exists():
            state = torch.load(self.run / "state.pt")
            self.step = state["step"]
            self.model.load_state_dict(state["model"])
            self.optimiser.load_state_dict(state["optimiser"])


def train(trainer: Trainer, tokenizer: tokens.Tokenizer) -> None:
    """Run to the last step; one log line every 20 steps, a state file every 200."""
    log = (trainer.run / "train.log").open("a")
    start, seen, total = time.monotonic(), 0, 0.0
    for position, rows in enumerate(batches(tokenizer)):
        if trainer.step >= trainer.steps:
            break
        if position < trainer.step:
            continue
        loss, balance = trainer.train_step(rows)
        seen += sum(map(by_length, rows))
        total += loss
        if trainer.step % 20 == 0:
            line = {
                "step": trainer.step,
                "loss": round(total / 20, 4),
                "balance": round(balance, 3),
                "rate": round(trainer.rate(), 6),
                "tokens_per_second": round(seen / (time.monotonic() - start)),
                "minutes": round((time.monotonic() - start) / 60, 1),
            }
            total = 0.0
            log.write(json.dumps(line) + "\n")
            log.flush()
        if trainer.step % 200 == 0:
            trainer.store()
    trainer.store()


def publish(trainer: Trainer, tokenizer: tokens.Tokenizer, path: Path) -> None:
    tokens.write_files(tokenizer, path, CONFIG)
    (path / "chat_template.jinja").write_text((tokens.DEMO / "chat_template.jinja").read_text())
    save.save(trainer.model, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--run", type=Path, required=True, help="folder for state and log")
    parser.add_argument("--steps", type=int, default=3600, help="optimiser steps in all")
    parser.add_argument("--decay", type=int, default=900, help="last steps, with a falling rate")
    parser.add_argument("--publish", action="store_true", help="write the checkpoint, do not train")
    parser.add_argument("--out", type=Path, default=tokens.DEMO, help="where --publish writes")
    options = parser.parse_args()
    options.run.mkdir(parents=True, exist_ok=True)
    trainer = Trainer(options.run, options.steps, options.decay)
    trainer.restore()
    tokenizer = tokens.train_tokenizer(CONFIG["vocab_size"])
    if options.publish:
        publish(trainer, tokenizer, options.out)
    else:
        train(trainer, tokenizer)


if __name__ == "__main__":
    main()
