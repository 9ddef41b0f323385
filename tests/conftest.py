"""What holds for every test."""

from __future__ import annotations

import os

# Before anything imports torch: OpenMP reads it once. Threads that spin while they wait make a
# step many times slower on a machine that has other work, as a test machine does.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
