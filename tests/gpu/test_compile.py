"""Compiled and captured models compute what the eager one does, also once adapters are merged or trained further."""

from collections.abc import Iterator

import pytest
import torch
from gpu.conftest import needs_cuda
from helpers import toys
from torch import Tensor, nn

from lightning_lora import LoraConfig, disabled, inject, merge, unmerge

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def adapted(device: str) -> nn.Module:
    model = inject(toys.toy_net(dropout=0.0), LoraConfig(r=2, target_modules=["0", "4"])).to(device).eval()
    toys.randomize(model)
    return model


def backend(device: str) -> str:
    """Inductor makes Triton kernels; on a CPU it would compile C++, and a trace of both passes will do."""
    return "inductor" if device == "cuda" else "aot_eager"


def output_and_gradients(model: nn.Module, device: str) -> list[Tensor]:
    model.zero_grad()
    out = model(toys.inputs().to(device))
    out.square().sum().backward()
    return [out.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


def test_outputs_and_gradients(device: str) -> None:
    model = adapted(device)
    expected = output_and_gradients(model, device)
    assert len(expected) == 5  # A and B of two layers
    model.compile(backend=backend(device))
    for found, value in zip(output_and_gradients(model, device), expected, strict=True):
        torch.testing.assert_close(found, value, rtol=1e-3, atol=1e-4 * float(value.abs().max()))


def test_the_states_of_an_adapter(device: str) -> None:
    model, x = adapted(device), toys.inputs().to(device)
    compiled = torch.compile(model, backend=backend(device))

    def require_equal() -> Tensor:
        with torch.no_grad():
            eager = model(x)
            torch.testing.assert_close(compiled(x), eager, rtol=1e-3, atol=1e-4)
        return eager

    beside = require_equal()
    with disabled(model):
        base = require_equal()
    assert not torch.allclose(base, beside, atol=1e-3)
    merge(model)
    torch.testing.assert_close(require_equal(), beside, rtol=1e-3, atol=1e-4)
    unmerge(model)
    assert torch.equal(require_equal(), beside)


@needs_cuda
@pytest.mark.parametrize("device", ["cuda"])
def test_a_captured_graph_sees_what_an_adapter_learns(device: str) -> None:
    model, x = adapted(device), toys.inputs().to(device)
    with torch.no_grad():
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            model(x)  # so that nothing is made for the first time in the capture
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = model(x)
        for _ in range(2):
            toys.randomize(model)
            graph.replay()
            torch.testing.assert_close(captured, model(x), rtol=1e-4, atol=1e-5)
