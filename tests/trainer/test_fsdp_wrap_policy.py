"""Which modules FSDP makes units of, and what is said of how it cuts them up. FSDP itself is in ``distributed/``."""

import warnings
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers.toys import Toy
from torch import nn

from lightning_lora import LoraConfig, inject, lora_auto_wrap_policy, sharding
from lightning_lora.trainer.fsdp_wrap_policy import AdapterWrapPolicy


def units(model: nn.Module, policy: Any) -> set[str]:
    return {name for name, module in model.named_modules() if policy(module, recurse=False, nonwrapped_numel=0)}


def test_blocks_and_adapters_are_units() -> None:
    model = inject(Toy(), LoraConfig(r=2, target_modules=["net.0", "net.4"], modules_to_save=["net.6"]))
    adapters = {"net.0.lora.default", "net.4.lora.default"}
    assert units(model, lora_auto_wrap_policy(nn.Sequential)) == {"net", "net.6", *adapters}
    assert units(model, AdapterWrapPolicy()) == {"net.6", *adapters}
    assert all(AdapterWrapPolicy()(module, recurse=True, nonwrapped_numel=0) for module in model.modules())


def test_adapters_that_are_read_stay_with_what_reads_them() -> None:
    """A unit is made whole when it is called."""
    attention = inject(nn.Sequential(nn.MultiheadAttention(8, 2)), LoraConfig(r=2, target_modules=["0"]))
    assert not units(attention, lora_auto_wrap_policy())


def a_unit(**changed: Any) -> Any:
    flat = SimpleNamespace(_param_infos=[], _shapes=[], _shard_param_infos=[], _shared_param_infos=[])
    for name in changed.pop("without", []):
        delattr(flat, name)
    handle = SimpleNamespace(flat_param=flat, uses_sharded_strategy=True)
    return SimpleNamespace(**{"_handle": handle, "_use_orig_params": True, **changed})


def test_another_torch_fails_loudly() -> None:
    with pytest.raises(RuntimeError, match=f"no _shapes, which say.*this is {torch.__version__[:4]}"):
        sharding._register_flat_shards(a_unit(without=["_shapes"]))


def test_flat_parameters_alone_are_refused() -> None:
    with pytest.raises(ValueError, match="use_orig_params=True"):
        sharding._register_flat_shards(a_unit(_use_orig_params=False))


@pytest.mark.parametrize(("frozen", "warns"), [(2_000_000, True), (1000, False)])
def test_mixing_many_frozen_numbers_with_trained_ones_is_told(frozen: int, warns: bool) -> None:
    def part(numel: int, requires_grad: bool) -> Any:
        stretch = sharding.FlatShard(torch.Size([numel]), [numel], 0, None, torch.device("cpu"))
        return SimpleNamespace(requires_grad=requires_grad), stretch

    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        sharding._warn_if_mixed([part(frozen, False)])  # nothing trained with them
        assert not told
        sharding._warn_if_mixed([part(frozen, False), part(10, True)])
    assert ["2,000,000 frozen" in str(each.message) for each in told] == [True] * warns
