"""Tasks share their parameters among processes where the strategy leaves that to them."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from helpers.texts import word_checkpoint
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from lightning_lora.tasks import CausalLM, PrefixCausalLM
from lightning_lora.tasks.sharding import repeated_blocks


@pytest.fixture
def mesh(tmp_path: Path) -> Iterator[object]:
    """What ``ModelParallelStrategy`` gives a module, for one process."""
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield init_device_mesh("cpu", (1, 1), mesh_dim_names=("data_parallel", "tensor_parallel"))
    distributed.destroy_process_group()


def test_every_parameter_and_every_block_is_sharded(tmp_path: Path, mesh: object) -> None:
    whole, module = CausalLM(word_checkpoint(tmp_path)), CausalLM(str(tmp_path))
    module._device_mesh = mesh  # type: ignore[assignment]  # as the strategy sets it
    whole.configure_model()
    module.configure_model()
    assert all(isinstance(parameter, DTensor) for parameter in module.parameters())
    assert not any(isinstance(parameter, DTensor) for parameter in whole.parameters())
    sharded = [name for name, inner in module.named_modules() if isinstance(inner, FSDPModule)]
    assert sharded == ["model", "model.model.layers.0", "model.model.layers.1"]
    ids = torch.tensor([[11, 12, 13]])
    with torch.no_grad():
        torch.testing.assert_close(module(input_ids=ids).logits, whole(input_ids=ids).logits)


def test_a_prefix_is_not_sharded(tmp_path: Path, mesh: object) -> None:
    module = PrefixCausalLM(word_checkpoint(tmp_path), prefix_text="w1 w2")
    module._device_mesh = mesh  # type: ignore[assignment]
    with pytest.raises(ValueError, match="Found ModelParallelStrategy, .* Set --trainer.strategy ddp"):
        module.configure_model()


def test_lists_inside_of_blocks_are_not_blocks() -> None:
    block = nn.Sequential(nn.ModuleList([nn.Linear(2, 2)]))
    model = nn.ModuleDict({"encoder": nn.ModuleDict({"layers": nn.ModuleList([block])}), "head": nn.Linear(2, 2)})
    assert list(repeated_blocks(model)) == [block]
