"""Rings over small random layers, for the tests of what passes through them."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Executor
from contextlib import contextmanager

import torch

from kttrio.device.base import Device
from kttrio.experts.feeders import Feeders
from kttrio.experts.routing import Routing
from kttrio.experts.slots import ExpertSlots, SlotShape
from kttrio.experts.streamed import Ring
from kttrio.native import ExpertLayer
from kttrio.weights.quantize import Target
from tests.native.expert_reference import Kind, random_input, random_routing

HIDDEN, INNER = 64, 96
NUM_EXPERTS = 11


def shape_of(kind: Kind) -> SlotShape:
    return SlotShape(HIDDEN, INNER, Target(kind.weight_format, kind.group_size))
