"""Opens a directory of expert weights, and says what to do with one that cannot be served."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

from kttrio.config import ConfigError
from kttrio.weights.checkpoint import Checkpoint
from kttrio.weights.conversion import is_unfinished
from kttrio.weights.loader import ExpertWeights

# What kt-kernel's converter writes: a tensor for each expert and NUMA part, or raw files.
_MERGED = re.compile(r"(blk\.\d+\.ffn_\w+_exps\.\d+\.numa\.)\d+\.weight")
_RAW = "_layer_*/_numa_*/*.kt"


def open_experts(directory: Path, model: Path, weights: ExpertWeights) -> Checkpoint:
    """The checkpoint at --kt-weight-path. `model` is the one at --model, `weights` one layer's.

    Raises ConfigError, with the command that mends it, for a directory that kt-kernel's converter
    wrote and for a conversion of ours that has not ended.
    """
    raw = next(directory.glob(_RAW), None)
    if raw is not None:
        raise _foreign(directory, model, "int8" if raw.name.startswith("INT8") else "int4")
    if is_unfinished(directory):
        raise ConfigError(
            f"--kt-weight-path {directory}: the conversion has not ended; run its kttrio quant "
            "command again with --resume"
        )
    checkpoint = Checkpoint(directory)
    found = next(filter(None, map(_MERGED.fullmatch, checkpoint.entries)), None)
    if found is not None:
        raise _foreign(directory, model, _merged_method(checkpoint, found[1], weights))
    return checkpoint


def _merged_method(checkpoint: Checkpoint, matrix: str, weights: ExpertWeights) -> str:
    """How many bits a weight has, by the bytes of all parts of one matrix."""
    nbytes = sum(
        entry.nbytes
        for name, entry in checkpoint.entries.items()
        if name.startswith(matrix) and name.endswith(".weight")
    )
    return "int8" if nbytes >= weights.hidden_size * weights.intermediate_size else "int4"


def _foreign(directory: Path, model: Path, method: str) -> ConfigError:
    output = directory.with_name(directory.name + "-kttrio")
    command = ["kttrio", "quant", "--input", str(model), "--output", str(output)]
    return ConfigError(
        f"--kt-weight-path {directory} was converted for kt-kernel, for one number of NUMA nodes "
        f"and its own kernels; this replaces it: {shlex.join([*command, '--method', method])}"
    )
