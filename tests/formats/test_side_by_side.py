"""Files whose small tensors lie side by side hold what those of torch.save hold, and are read by torch.load."""

import copy
import io
import zipfile
from collections import OrderedDict
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from lightning_lora.formats import side_by_side

DTYPES = [torch.float32, torch.bfloat16, torch.float64, torch.int64, torch.uint8, torch.bool, torch.complex64]
DTYPES += [torch.float8_e4m3fn, torch.float8_e5m2]


def written(value: Any) -> io.BytesIO:
    file = io.BytesIO()
    side_by_side.save(value, file)
    file.seek(0)
    return file


def read(value: Any, weights_only: bool = True) -> Any:
    return torch.load(written(value), weights_only=weights_only)


def parts(file: io.BytesIO) -> int:
    """How many storages a file has."""
    return sum("/data/" in name for name in zipfile.ZipFile(file).namelist())


def same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor):
        layout = other.dtype, other.shape, other.stride(), other.requires_grad
        return layout == (one.dtype, one.shape, one.stride(), one.requires_grad) and torch.equal(one, other)
    if isinstance(one, dict):
        return type(one) is type(other) and list(one) == list(other) and all(same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return type(one) is type(other) and len(one) == len(other) and all(map(same, one, other))
    return bool(one == other)


@st.composite
def tensors(draw: st.DrawFn) -> Tensor:
    shape = draw(st.lists(st.integers(0, 5), max_size=3))
    made = torch.randint(0, 100, shape).to(draw(st.sampled_from(DTYPES)))
    how = draw(st.sampled_from(["as it is", "transposed", "a part", "expanded", "conjugate", "trained"]))
    if how == "transposed":
        return made.mT if made.dim() > 1 else made
    if how == "a part":
        return made[:1] if made.dim() else made
    if how == "expanded":
        return made.expand(3, *made.shape)
    if how == "conjugate":
        return made.conj()
    # Torch itself does not read a float8 tensor that is trained.
    is_trainable = made.is_floating_point() and made.itemsize > 1
    return made.requires_grad_() if how == "trained" and is_trainable else made


values = st.recursive(
    tensors() | st.integers() | st.text(max_size=3) | st.none(),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.tuples(inner, inner)
        | st.dictionaries(st.text(max_size=3), inner, max_size=4)
        | st.dictionaries(st.integers(), inner, max_size=4).map(OrderedDict)
    ),
    max_leaves=12,
)


@given(value=values)
def test_what_is_read_is_what_was_written(value: Any) -> None:
    before = copy.deepcopy(value)
    found = read(value)
    assert same(found, value)
    assert same(value, before)
    assert same(read(found), value)  # whose tensors share storages by now


def checkpoint(layers: int = 50) -> dict[str, Any]:
    """As a run of AdamW has it."""
    names = {f"layers.{layer}.lora_A": torch.randn(8, 16) for layer in range(layers)}
    state = {
        index: {"step": torch.tensor(3.0), "exp_avg": torch.randn(8, 16), "exp_avg_sq": torch.randn(8, 16)}
        for index in range(layers)
    }
    return {"state_dict": names, "optimizer_states": [{"state": state}], "epoch": 3}


def test_small_tensors_are_few_storages() -> None:
    ours, theirs = checkpoint(), io.BytesIO()
    torch.save(ours, theirs)
    assert parts(theirs) == 200
    assert parts(written(ours)) == 2  # one for each entry, so that the adapter does not stay while the moments are used
    read_again = torch.load(written(ours), weights_only=True)
    moment = read_again["optimizer_states"][0]["state"][0]["exp_avg"]
    assert moment.untyped_storage().nbytes() < 2 * 50 * 3 * 8 * 16 * 4
    assert moment.data_ptr() % 64 == 0
    assert parts(written(read_again)) == 2
    assert len(written(read_again).getvalue()) == len(written(ours).getvalue()) < len(theirs.getvalue())


def test_a_part_of_a_large_tensor_is_written_without_the_rest() -> None:
    rows = torch.randn(1000, 100)[3:5]
    assert len(written({"rows": rows}).getvalue()) < 5000
    assert torch.equal(read({"rows": rows})["rows"], rows)


def test_large_tensors_are_not_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(side_by_side, "_SMALL", 1000)
    large, small = torch.randn(251), [torch.randn(250) for _ in range(3)]
    assert parts(written([large, *small])) == 2
    assert same(read([large, *small]), [large, *small])


def test_what_shares_memory_still_does() -> None:
    weight = torch.randn(4, 4)
    same_twice, parameter = torch.randn(2), nn.Parameter(torch.randn(3))
    found = read(
        {
            "tied": weight,
            "to": weight.detach(),
            "row": weight[1],
            "one": [same_twice],
            "two": same_twice,
            "own": parameter,
            "its": parameter.detach(),
            "alone": torch.ones(3),
        }
    )
    found["tied"].zero_()
    assert not found["to"].any() and not found["row"].any()
    found["two"].zero_()
    assert found["one"][0] is found["two"]
    with torch.no_grad():
        found["own"].zero_()
    assert not found["its"].any()
    assert found["alone"].all()


def test_reading_and_changing_one_leaves_the_others() -> None:
    """An optimizer goes on with what was read, in place; a hook on one tensor is not one on all."""
    found = read(checkpoint(3))
    state = found["optimizer_states"][0]["state"]
    state[0]["step"] += 1
    assert [float(entries["step"]) for entries in state.values()] == [4.0, 3.0, 3.0]
    one, other = (found["state_dict"][f"layers.{layer}.lora_A"].requires_grad_() for layer in range(2))
    calls = []
    one.register_hook(calls.append)
    other.sum().backward()
    assert not calls


def test_torch_takes_what_is_read_for_its_own() -> None:
    """For the state of a generator, it looks at the beginning of the storage, and may crash the process."""
    state = torch.get_rng_state()
    expected = torch.rand(3)
    found = read({"rng": [torch.ones(1, dtype=torch.uint8), state]})["rng"][1]
    torch.set_rng_state(found)
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("objects", ["a parameter of its own", "in itself"])
def test_other_objects_are_left_to_pickle(objects: str) -> None:
    if objects == "in itself":
        value: Any = {"tensor": torch.ones(2)}
        value["itself"] = value
        found = torch.load(written(value), weights_only=True)
        assert found["itself"] is found and torch.equal(found["tensor"], torch.ones(2))
    else:
        layer = read({"layer": nn.Linear(2, 2), "tensor": torch.ones(2)}, weights_only=False)["layer"]
        assert isinstance(layer.weight, nn.Parameter) and layer.weight.requires_grad
