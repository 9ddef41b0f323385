"""What holds for every test."""

from __future__ import annotations

import os
from pathlib import Path

from hypothesis import settings

# Before anything imports torch: OpenMP reads it once. Threads that spin while they wait make a
# step many times slower on a machine that has other work, as a test machine does.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

# Before anything imports triton, which reads it then: where there is no GPU, its kernels run in its
# interpreter. Torch would know as well, but takes long to ask.
if not (any(Path("/dev").glob("nvidia[0-9]*")) or Path("/dev/dxg").exists()):
    os.environ.setdefault("TRITON_INTERPRET", "1")

# A busy machine is slow, not wrong: an example has no deadline of its own.
settings.register_profile("kttrio", deadline=None)
settings.load_profile("kttrio")
