"""Trains the embedded demo model on a CPU and writes it to `kttrio/demo`.

    python -m tools.train_demo --run DIR            # train, or go on where DIR stopped
    python -m tools.train_demo --run DIR --publish  # quantise the last state into kttrio/demo

Two processes of one thread each, one seed, no download: the same machine makes the same weights.
Each process takes every second batch; they meet once per step, to add their gradients, which
suffers less from a busy machine than threads that meet in every operation. `tools/demo` holds the
texts, the model and the file formats; `tools/eval_demo.py` asks the result its questions.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, distributed, multiprocessing

from tools.demo import corpus, save, tokens
from tools.demo.model import Model

SEED, PROCESSES = 20, 2
TOKENS_PER_BATCH = 1024
SHARD = 4096  # conversations that are sorted by length together
PEAK, WARMUP = 2e-3, 100
POLISH_PEAK, POLISH_WARMUP = 8e-4, 20  # a second, shorter stage on texts with rarer names
BALANCE = 0.002
OPENING, OPENING_TOKENS, OPENING_FROM = 3.0, 6, 1200  # from that step on
ECHOES, ECHOES_FROM = 0.18, 4  # the share of pure copying, and the first shard that has it
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


class Plan(NamedTuple):
    """Optimiser steps: of the first stage, of its falling rate, of the polishing stage."""

    steps: int
    decay: int
    polish: int


Row = tuple[list[int], list[bool]]


def batches(tokenizer: tokens.Tokenizer, *, polish: bool) -> Iterator[list[Row]]:
    """Endless batches of rows of similar length; a shard's texts depend on its number alone."""
    shard = 0
    while True:
        echoes = ECHOES if polish or shard >= ECHOES_FROM else 0.0
        seed = SEED * 1000 + shard + 500 * polish
        talks = corpus.conversations(seed, SHARD, echoes=echoes, polish=polish)
        rows = sorted((tokens.with_mask(tokenizer, tokens.render(t)) for t in talks), key=by_length)
        groups, group = [], list[Row]()
        for row in rows:
            if group and len(row[0]) * (len(group) + 1) > TOKENS_PER_BATCH:
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


def loss_of(model: Model, rows: list[Row], opening: float = 1.0) -> Tensor:
    """Cross entropy of what the assistant says.

    The first tokens of an answer weigh `opening`: they decide which answer it is.
    """
    ids, mask, lengths = padded(rows)
    hidden = model(ids[:, :-1], lengths - 1)
    said = mask[:, 1:]
    loss = F.cross_entropy(model.lm_head(hidden[said]), ids[:, 1:][said], reduction="none")
    before = F.pad(mask, (OPENING_TOKENS, 0))[:, 1 : mask.shape[1]]
    weight = torch.where(before[said], 1.0, opening)
    return (loss * weight).sum() / weight.sum()


class Trainer:
    """Model, optimiser and position in the data: what a run's state file holds."""

    def __init__(self, run: Path, plan: Plan) -> None:
        torch.manual_seed(SEED)
        torch.set_num_threads(1)
        self.run, self.plan, self.step = run, plan, 0
        self.model = Model(CONFIG)
        matrices = [p for p in self.model.parameters() if p.dim() > 1]
        vectors = [p for p in self.model.parameters() if p.dim() == 1]
        groups = [
            {"params": matrices, "weight_decay": 0.05},
            {"params": vectors, "weight_decay": 0.0},
        ]
        self.optimiser = torch.optim.AdamW(groups, lr=PEAK, betas=(0.9, 0.95), fused=True)

    def rate(self) -> float:
        """Warm-up, a plateau, straight down; then a lower peak and down again."""
        plan, step = self.plan, self.step
        if step < plan.steps:
            return PEAK * min(1.0, (step + 1) / WARMUP, (plan.steps - step) / plan.decay)
        done = step - plan.steps
        return POLISH_PEAK * min(
            1.0, (done + 1) / POLISH_WARMUP, (plan.polish - done) / plan.polish
        )

    def train_step(self, rows: list[Row]) -> tuple[float, float]:
        for group in self.optimiser.param_groups:
            group["lr"] = self.rate()
        master = self.quantise() if self.step >= self.plan.steps - self.plan.decay // 2 else {}
        loss = loss_of(self.model, rows, OPENING if self.step >= OPENING_FROM else 1.0)
        balance = torch.stack([block.loss for block in self.model.blocks()]).mean()
        (loss + BALANCE * balance).backward()
        self.share_gradients()
        for parameter, value in master.items():
            parameter.data.copy_(value)
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimiser.step()
        self.optimiser.zero_grad()
        self.step += 1
        return loss.item(), balance.item()

    def share_gradients(self) -> None:
        """Every process gets the mean over all of them."""
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        distributed.all_reduce(flat)
        flat /= distributed.get_world_size()
        parts = flat.split([gradient.numel() for gradient in gradients])
        for gradient, part in zip(gradients, parts, strict=True):
            gradient.copy_(part.view_as(gradient))

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


def train(rank: int, run: Path, plan: Plan) -> None:
    """One of the processes, from the stored state to the last step."""
    meeting = (run / "meeting").as_uri()
    distributed.init_process_group("gloo", init_method=meeting, rank=rank, world_size=PROCESSES)
    trainer = Trainer(run, plan)
    trainer.restore()
    journal = Journal(run / "train.log")
    for rows in remaining(trainer, rank):
        loss, balance = trainer.train_step(rows)
        if rank == 0:
            journal.note(trainer, rows, (loss, balance))
            if trainer.step % 200 == 0 or trainer.step in (plan.steps, plan.steps + plan.polish):
                trainer.store()
    distributed.destroy_process_group()


def remaining(trainer: Trainer, rank: int) -> Iterator[list[Row]]:
    """This process's batches of both stages, without those that the stored state has seen."""
    tokenizer = tokens.train_tokenizer(CONFIG["vocab_size"])
    plan, done = trainer.plan, trainer.step
    if done < plan.steps:
        yield from islice(mine(batches(tokenizer, polish=False), rank), done, plan.steps)
    polished = max(0, done - plan.steps)
    yield from islice(mine(batches(tokenizer, polish=True), rank), polished, plan.polish)


def mine(all_batches: Iterator[list[Row]], rank: int) -> Iterator[list[Row]]:
    return islice(all_batches, rank, None, PROCESSES)


class Journal:
    """One line for every 20 steps of the first process."""

    def __init__(self, path: Path) -> None:
        self.file, self.start = path.open("a"), time.monotonic()
        self.tokens, self.losses = 0, list[float]()

    def note(self, trainer: Trainer, rows: list[Row], losses: tuple[float, float]) -> None:
        self.tokens += PROCESSES * sum(map(by_length, rows))
        self.losses.append(losses[0])
        if trainer.step % 20:
            return
        seconds = time.monotonic() - self.start
        line = {
            "step": trainer.step,
            "loss": round(sum(self.losses) / len(self.losses), 4),
            "balance": round(losses[1], 3),
            "rate": round(trainer.rate(), 6),
            "tokens_per_second": round(self.tokens / seconds),
            "minutes": round(seconds / 60, 1),
        }
        self.losses.clear()
        self.file.write(json.dumps(line) + "\n")
        self.file.flush()


def publish(run: Path, path: Path) -> None:
    """Quantise the stored state and write a whole checkpoint directory."""
    trainer = Trainer(run, Plan(1, 1, 1))
    trainer.restore()
    tokens.write_files(tokens.train_tokenizer(CONFIG["vocab_size"]), path, CONFIG)
    template = (tokens.DEMO / "chat_template.jinja").read_text()
    (path / "chat_template.jinja").write_text(template)
    save.save(trainer.model, path)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--run", type=Path, required=True, help="folder for state and log")
    parser.add_argument(
        "--steps", type=int, default=1700, help="optimiser steps of the first stage"
    )
    parser.add_argument(
        "--decay", type=int, default=550, help="its last steps, with a falling rate"
    )
    parser.add_argument(
        "--polish", type=int, default=420, help="optimiser steps of the second stage"
    )
    parser.add_argument("--publish", action="store_true", help="write the checkpoint, do not train")
    parser.add_argument("--out", type=Path, default=tokens.DEMO, help="where --publish writes")
    options = parser.parse_args()
    run: Path = options.run.resolve()
    run.mkdir(parents=True, exist_ok=True)
    if options.publish:
        publish(run, options.out)
        return
    (run / "meeting").unlink(missing_ok=True)
    plan = Plan(options.steps, options.decay, options.polish)
    multiprocessing.spawn(train, (run, plan), nprocs=PROCESSES)


if __name__ == "__main__":
    main()
