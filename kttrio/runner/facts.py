"""What was decided at a start, for people to read: plain values."""

from __future__ import annotations

from torch import Tensor

from kttrio.config import PlacementConfig
from kttrio.experts.division import Division
from kttrio.models.base import CausalLM
from kttrio.runner.planning import Start
from kttrio.runner.recording import describe


def facts(model: CausalLM, start: Start, division: Division | None) -> dict[str, object]:
    """Of a loaded model."""
    plan, estimate, recorded = start.plan, start.estimate, start.needs.recording
    drafts = model.shape.num_drafts
    return {
        "layers": f"{model.num_layers}, each with {model.num_experts} experts, {model.top_k} used",
        "precision": f"{str(start.dtype).removeprefix('torch.')}, experts {estimate.expert_format}",
        "activations": f"{estimate.expert_activation} in the experts",
        "kernels": model.isa,
        "threads": model.num_threads,
        "KV cache": f"{plan.num_tokens} tokens in pages of {plan.page_size}",
        "sequences": f"{plan.num_slots} at a time, each up to {plan.context_length} tokens",
        **({"drafts": f"{drafts} in a step, for each sequence"} if drafts else {}),
        **(_divided(start, division) if division is not None else {}),
        **model.bank.facts,
        **({"recording": describe(recorded)} if recorded is not None else {}),
    }


def _divided(start: Start, division: Division) -> dict[str, object]:
    """Of a device beside the host's experts."""
    plan, placement = start.plan, start.config.placement
    ring, spares = division.num_ring_slots, division.num_spare_slots
    long = f"from {plan.long_tokens} tokens on layer by layer, {plan.max_long_tokens} at a time"
    sizes = ", ".join(map(str, plan.graph_sizes))
    return {
        "device": _device(start),
        "on device": _residents(division.mask),
        **({"ring": f"{ring} experts on their way through the device"} if ring else {}),
        **({"prompts": long} if plan.long_tokens else {}),
        **({"update": _update(placement, spares)} if spares else {}),
        **({"deferred": _deferred(division.max_deferred)} if division.max_deferred else {}),
        **({"graphs": f"decode steps of {sizes} sequences are captured"} if sizes else {}),
    }


def _device(start: Start) -> str:
    if start.machine.kind == "cuda":
        return f"{start.machine.name}, attention by {start.backend}"
    return "the CPU, which stands in for a GPU"


def _residents(mask: Tensor) -> str:
    """mask [layers with experts, experts]"""
    each = mask.sum(1)
    least, most = int(each.min()), int(each.max())
    layer = f"{least}" if least == most else f"{least} to {most}"
    return (
        f"{int(mask.sum())} of {mask.numel()} experts ({mask.float().mean():.0%}), {layer} a layer"
    )


def _update(placement: PlacementConfig, num_at_a_time: int) -> str:
    rule = placement.kt_dynamic_update_rule or "decayed"
    return f"experts on the device change by what is used ({rule}), {num_at_a_time} at a time"


def _deferred(most: int) -> str:
    return f"up to {most} experts of a token reach it a layer later, which changes answers"
