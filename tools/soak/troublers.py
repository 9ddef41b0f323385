"""Clients that misbehave, in a process of their own, so that nobody who measures waits for them.
Ends with its stdin and prints what came of it as JSON.

    python -m tools.soak.troublers URL PORT GRPC_PORT MODEL CLIENTS SEED TROUBLE...
"""

from __future__ import annotations

import json
import random
import sys
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from subprocess import PIPE

import trio

from kttrio.client import ClientError
from tools.soak.trouble import FLOODS, TROUBLES, Trouble, Victim

ROOT = Path(__file__).parents[2]
NAMED = {one.__name__: one for one in (*(trouble for _, trouble in TROUBLES), *FLOODS)}


@asynccontextmanager
async def misbehaving(
    victim: Victim, names: Sequence[str], num_clients: int, seed: int
) -> AsyncIterator[Counter[str]]:
    """Trouble for as long as the block lasts; then, what came of it."""
    where = (victim.url, str(victim.port), str(victim.grpc_port), victim.model)
    command = [sys.executable, "-m", "tools.soak.troublers", *where, str(num_clients), str(seed)]
    process = await trio.lowlevel.open_process(
        [*command, *names], cwd=ROOT, stdin=PIPE, stdout=PIPE
    )
    assert process.stdin is not None
    assert process.stdout is not None
    outcomes: Counter[str] = Counter()
    try:
        async with process.stdout:
            async with process.stdin:
                yield outcomes
            outcomes.update(json.loads(b"".join([part async for part in process.stdout])))
        await process.wait()
    finally:
        if process.returncode is None:
            process.kill()


async def main(victim: Victim, names: Sequence[str], num_clients: int, seed: int) -> None:
    outcomes: Counter[str] = Counter()
    dice = random.Random(seed)
    async with trio.open_nursery() as nursery:
        for number in range(num_clients):
            trouble = NAMED[names[number % len(names)]]
            nursery.start_soon(_go_on, trouble, victim, random.Random(dice.random()), outcomes)
        async with trio.lowlevel.FdStream(sys.stdin.fileno()) as stdin:
            await stdin.receive_some()
        nursery.cancel_scope.cancel()
    print(json.dumps(outcomes))


async def _go_on(
    trouble: Trouble, victim: Victim, dice: random.Random, outcomes: Counter[str]
) -> None:
    while True:
        try:
            outcomes[await trouble(victim, dice)] += 1
        except (ClientError, OSError, trio.BrokenResourceError) as error:
            outcomes[f"{trouble.__name__}: {type(error).__name__}"] += 1


if __name__ == "__main__":
    url, port, grpc_port, model, clients, seed, *names = sys.argv[1:]
    trio.run(main, Victim(url, int(port), int(grpc_port), model), names, int(clients), int(seed))
