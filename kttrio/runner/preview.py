"""What a model would need and get on a machine, as plain values: nothing is loaded for it."""

from __future__ import annotations

from typing import Any

from kttrio.runner.planning import Start


def report(start: Start) -> dict[str, Any]:
    """Plain values, sizes in bytes."""
    estimate, plan = start.estimate, start.plan
    return {
        "shape": estimate.shape._asdict(),
        "precision": str(start.dtype).removeprefix("torch."),
        "device": start.machine.kind,
        "experts": {
            "format": estimate.expert_format,
            "activation": estimate.expert_activation,
            "bytes_each": estimate.expert_bytes // estimate.num_routed_experts,
            "number": estimate.grid.total,
            "on_device": plan.num_device_experts,
            "ring": plan.num_ring_slots,
        },
        "weights": [
            {"kind": row.kind, "number": row.num_weights, "bytes": row.nbytes}
            for row in estimate.counts
        ],
        "parameters": sum(row.num_weights for row in estimate.counts),
        "memory": [
            {"name": row.name, "where": row.where, "bytes": row.num_bytes} for row in plan.rows
        ],
        "memories": [
            {
                "where": memory.where,
                "bytes": plan.used(memory),
                "available_bytes": memory.available_bytes,
                "budget_bytes": memory.budget_bytes,
            }
            for memory in plan.memories
        ],
        "bytes_per_token": estimate.cache_shape.bytes_per_token,
        "bytes_per_sequence": estimate.cache_shape.bytes_per_slot,
        "num_tokens": plan.num_tokens,
        "num_sequences": plan.num_slots,
        "num_step_tokens": plan.max_step_tokens,
        "context_length": plan.context_length,
        "long_tokens": plan.long_tokens,
        "max_long_tokens": plan.max_long_tokens,
        "refusal": start.refusal,
    }
