"""The arithmetic by itself: its gradients, and the base and the path in one pass."""

import pytest
import torch
from torch import Tensor, nn

from lightning_lora import LoraConfig, inject
from lightning_lora.layers.functional import add_low_rank, low_rank_linear


def test_arithmetic_passes_gradcheck() -> None:
    torch.manual_seed(0)
    shapes = [(2, 3, 5), (2, 3, 4), (2, 4), (5, 2)]
    tensors = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    assert torch.autograd.gradcheck(lambda *t: add_low_rank(*t, 0.7), tensors)
    assert torch.autograd.gradgradcheck(lambda *t: add_low_rank(*t, 0.7), tensors)


@pytest.mark.parametrize("with_bias", [True, False])
def test_base_and_path_in_one_pass_gradcheck(with_bias: bool) -> None:
    torch.manual_seed(0)
    shapes = [(2, 3, 4), (5, 4), (5,), (2, 4), (5, 2)]
    x, weight, bias, A, B = (torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes)
    weight = weight.detach()

    def one(x: Tensor, bias: Tensor, A: Tensor, B: Tensor) -> Tensor:
        return low_rank_linear(x, weight, bias if with_bias else None, A, B, 0.7)

    torch.testing.assert_close(
        one(x, bias, A, B), add_low_rank(nn.functional.linear(x, weight, bias if with_bias else None), x, A, B, 0.7)
    )
    assert torch.autograd.gradcheck(one, (x, bias, A, B))
    assert torch.autograd.gradgradcheck(one, (x, bias, A, B))


@pytest.mark.parametrize(
    ("weight", "inputs", "autocast"),
    [
        (torch.float32, torch.float32, torch.bfloat16),
        (torch.float32, torch.bfloat16, torch.bfloat16),  # after another layer under autocast
        (torch.float32, torch.float32, torch.float16),
        (torch.bfloat16, torch.bfloat16, None),
        (torch.float16, torch.float16, None),
    ],
)
def test_base_and_path_are_one_in_half_precision_too(
    weight: torch.dtype, inputs: torch.dtype, autocast: torch.dtype | None
) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(24, 40).to(weight)
    x = torch.randn(3, 5, 24, dtype=inputs, requires_grad=True)
    with torch.autocast("cpu", autocast, enabled=autocast is not None):
        base = layer(x)
        inject(layer, LoraConfig(r=4))
        assert torch.equal(layer(x), base)
        adapter = layer.lora["default"]
        nn.init.normal_(adapter.lora_B)
        out = layer(x)
        expected = add_low_rank(base, x, adapter.lora_A, adapter.lora_B, adapter.scaling)
    assert out.dtype == base.dtype
    assert "LowRankLinear" in out.grad_fn.name()
    assert torch.equal(out, expected)
    upstream, wrt = torch.randn_like(out), (x, adapter.lora_A, adapter.lora_B)
    found, wanted = (torch.autograd.grad(y, wrt, upstream) for y in (out, expected))
    for one, other, tensor in zip(found, wanted, wrt, strict=True):
        assert one.dtype == tensor.dtype
        torch.testing.assert_close(one, other, rtol=0.05, atol=0.1)
