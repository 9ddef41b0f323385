"""Nothing is allocated beyond the plan once a server has started, whatever requests bring.

In float32, for which torch keeps no prepared kernels: those of bfloat16 are beside the plan.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
MOST_GROWTH = 24 * 2**20  # the allocator's own, and what Python keeps of a few hundred requests

SERVE = """
import random
from pathlib import Path

import torch

from kttrio.config import *
from kttrio.engine.scheduler import Scheduler
from kttrio.request import GenerateRequest, SamplingParams
from kttrio.runner.build import build_runner

torch.set_num_threads(1)
chance = random.Random(5)
engine = EngineConfig(
    chunked_prefill_size=128, max_running_requests=8, max_total_tokens=4096, page_size=8
)
placement = PlacementConfig(
    kt_num_gpu_experts=2, kt_enable_dynamic_expert_update=True,
    kt_gpu_prefill_token_threshold=200, kt_ring_experts=4,
)
plans = []
runner = build_runner(
    RunnerConfig(
        ModelConfig(model=Path("tests/fixtures/qwen3_next_chat"), dtype="float32"),
        ExpertConfig(kt_cpuinfer=2, kt_cache_dir=Path(CACHE)),
        engine, DeviceConfig(device="cpu"), placement,
    ),
    on_plan=plans.append,
)

def held():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))

def serve(lengths):
    scheduler = Scheduler(runner.capacity, engine)
    for number, (length, more) in enumerate(lengths):
        ids = tuple(chance.randrange(400) for _ in range(length))
        sampling = SamplingParams(max_tokens=more, temperature=0.0, seed=number)
        scheduler.submit(GenerateRequest(str(number), ids, sampling))
    while (plan := scheduler.plan()) is not None:
        for _, event in scheduler.commit(plan, runner.step(plan)):
            assert event.error is None

started = held()
serve([(1024, 2), *[(120, 3)] * 8])  # the largest of all kinds
warm = held()
for _ in range(6):
    serve([(chance.choice((1, 7, 60, 130, 500, 1000)), chance.randint(1, 12)) for _ in range(12)])
scratch = sum(row.num_bytes for row in plans[0].rows if "scratch" in row.name)
print(warm - started - scratch, held() - warm)
runner.close()
"""


def test_requests_of_all_sizes_stay_within_the_plan(tmp_path: Path) -> None:
    """The first large step takes no more than the plan's scratch, the others nothing."""
    code = SERVE.replace("CACHE", repr(str(tmp_path)))
    ended = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert ended.returncode == 0, ended.stderr
    beyond_scratch, later = map(int, ended.stdout.split())
    assert beyond_scratch < MOST_GROWTH
    assert later < MOST_GROWTH
