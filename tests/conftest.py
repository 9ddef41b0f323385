"""What holds for every test."""

from __future__ import annotations

import os

from hypothesis import settings

# Before anything imports torch: OpenMP reads it once. Threads that spin while they wait make a
# step many times slower on a machine that has other work, as a test machine does.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

# A busy machine is slow, not wrong: an example has no deadline of its own.
settings.register_profile("kttrio", deadline=None)
settings.load_profile("kttrio")
