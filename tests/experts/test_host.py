from __future__ import annotations

import pytest
import torch

from kttrio import native
from kttrio.experts.host import HostExperts
from kttrio.experts.routing import SoftmaxRouter
from tests.isas import EVERY_ISA
from tests.reference import TorchExperts

EXPERTS, HIDDEN, INNER, TOP_K = 6, 64, 96, 3
ROUTER = SoftmaxRouter(EXPERTS, TOP_K, renormalise=True)


def make(isa, dtype):
    """The same experts twice: native and in torch."""
    generator = torch.Generator().manual_seed(1)
    shapes = {"gate": (INNER, HIDDEN), "up": (INNER, HIDDEN), "down": (HIDDEN, INNER)}
    weights = {
        name: torch.randn(EXPERTS, *shape, generator=generator).mul(shape[1] ** -0.5).bfloat16()
        for name, shape in shapes.items()
    }
    pool = native.Pool(threads=1, isa=isa)
    layer = native.ExpertLayer(
        pool,
        num_experts=EXPERTS,
        hidden_size=HIDDEN,
        intermediate_size=INNER,
        weight_format="bf16",
        activation=str(dtype).removeprefix("torch."),
        max_tokens=16,
        max_top_k=TOP_K,
    )
    for expert in range(EXPERTS):
        layer.set_expert(expert, **{name: stack[expert] for name, stack in weights.items()})
    reference = TorchExperts(*(stack.float() for stack in weights.values()))
    return HostExperts(layer, dtype=dtype), reference


@pytest.mark.parametrize("isa", EVERY_ISA)
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)], ids=str
)
def test_host_experts_agree_with_torch(isa, dtype, tolerance):
    experts, reference = make(isa, dtype)
    x = torch.randn(21, HIDDEN).to(dtype)
    routing = ROUTER.route(torch.randn(21, EXPERTS), None)
    routing.ids[3, 1] = -1
    out = experts.forward(x, routing)
    assert out.dtype is dtype
    torch.testing.assert_close(
        out.float(), reference.forward(x.float(), routing), rtol=tolerance, atol=tolerance
    )


def test_a_strided_input_is_taken_as_it_means():
    experts, reference = make("auto", torch.float32)
    x = torch.randn(HIDDEN, 5).T
    routing = ROUTER.route(torch.randn(5, EXPERTS), None)
    torch.testing.assert_close(experts.forward(x, routing), reference.forward(x, routing))
