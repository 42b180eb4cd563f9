"""Under selective activation checkpointing, which keeps what some operations give, gradients are the same."""

from functools import partial
from typing import Any

import torch
from helpers.layers import KINDS, move, run
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from lightning_lora import LoraConfig, inject

OPERATIONS = ["mm", "addmm", "bmm", "baddbmm", "convolution", "embedding", "add", "mul", "view", "_unsafe_view"]
VARIANTS: list[dict[str, Any]] = [{}, {"lora_dropout": 0.3}, {"use_dora": True}, {"freeze_A": True}]


def kept(operations: frozenset[str], context: Any, operation: Any, *_: Any, **__: Any) -> CheckpointPolicy:
    name = operation.overloadpacket._qualified_op_name.removeprefix("aten::")
    return CheckpointPolicy.MUST_SAVE if name in operations else CheckpointPolicy.PREFER_RECOMPUTE


def gradients(model: nn.Module, x: Tensor, contexts: Any) -> list[Tensor]:
    torch.manual_seed(1)
    run_all = partial(run, model)
    out = run_all(x) if contexts is None else checkpoint(run_all, x, use_reentrant=False, context_fn=contexts)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    inputs = [x] if x.requires_grad else []
    return [out, *torch.autograd.grad(out.exp().sum(), [*trained, *inputs])]


@settings(max_examples=40, deadline=None)
@example(kind="linear", variant={}, operations=frozenset({"mm", "addmm"}), deep=True)
@given(
    kind=st.sampled_from(sorted(KINDS)),
    variant=st.sampled_from(VARIANTS),
    operations=st.frozensets(st.sampled_from(OPERATIONS)),
    deep=st.booleans(),
)
def test_gradients_are_those_without(
    kind: str, variant: dict[str, Any], operations: frozenset[str], deep: bool
) -> None:
    make, x = KINDS[kind]
    torch.manual_seed(0)
    try:
        model = inject(nn.Sequential(make()), LoraConfig(r=2, target_modules=["0"], **variant)).double()
    except ValueError:
        return  # not for this kind of layer
    move(model)
    if x.is_floating_point():
        x = (x.expand(2, *x.shape) if deep and kind in ("linear", "conv1d") else x).double().requires_grad_()
    expected = gradients(model, x, None)
    found = gradients(model, x, partial(create_selective_checkpoint_contexts, partial(kept, operations)))
    for one, other in zip(found, expected):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)
