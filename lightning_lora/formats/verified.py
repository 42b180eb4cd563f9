"""What was written is opened again and compared with the model in memory, before it takes the place of anything."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_warn
from safetensors import safe_open
from torch import Tensor, nn

from lightning_lora.config import LoraConfig
from lightning_lora.formats.peft_config import config_from_peft
from lightning_lora.formats.peft_files import read_files
from lightning_lora.fqn import listed
from lightning_lora.layers import Adapter
from lightning_lora.model.state_dict import CheckpointError, place_of
from lightning_lora.model.targets import is_of_diffusers

_KEPT = "Nothing was written to its place."


def verify_adapter(
    directory: Path, settings: Mapping[str, Any], tensors: Mapping[str, Tensor], adapters: Iterable[tuple[str, Adapter]]
) -> None:
    """Require that the files of an adapter say what they are to say, and mean what the adapter in memory computes.

    Args:
        directory: The files.
        settings: What ``adapter_config.json`` is to hold.
        tensors: The tensors, by the names that they are to have.
        adapters: Those in memory, by the names of their layers in PEFT, whose scalings the settings must give.

    Raises:
        CheckpointError: Naming what differs.
    """
    files = read_files(directory)
    other = [name for name in {*tensors, *files.tensors} if not _same(tensors.get(name), files.tensors.get(name))]
    if other or files.settings != json.loads(json.dumps(settings)):
        what = listed(sorted(map(repr, other))) if other else files.config_file
        raise CheckpointError(f"The adapter that was written is not the one in memory: {what} differs. {_KEPT}")
    in_memory = list(adapters)
    config = config_from_peft(files.settings, files.config_file) if in_memory else LoraConfig()
    for name, adapter in in_memory:
        if problem := adapter.mismatch(config, name):
            raise CheckpointError(f"The settings that were written mean another adapter: {problem}. {_KEPT}")


def verify_merged(model: nn.Module, directory: Path) -> None:
    """Require that the files of a merged model hold its tensors, bit for bit, and that its config is there.

    One tensor is in memory at a time. Where transformers writes them under the names of an earlier version, as it does
    for experts, the values are not compared.

    Args:
        model: A model of transformers or diffusers, or any other that was written as ``model.safetensors``.
        directory: The files.

    Raises:
        CheckpointError: Naming what differs.
    """
    expected = model.state_dict()
    if hasattr(getattr(model, "config", None), "to_dict") or is_of_diffusers(model):
        _require_config(model, expected, directory)
    found: set[Any] = set()  # names, and where their tensors are: one that is tied to them is not written twice
    other: list[str] = []
    for path in sorted(directory.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            names = list(file.keys())
            if not expected.keys() >= set(names):
                return
            found.update(names, (place_of(expected[name]) for name in names))
            other += [name for name in names if not _same(expected[name], file.get_tensor(name))]
    found.discard(None)  # those of which no place is known
    other += [name for name, tensor in expected.items() if not found & {name, place_of(tensor)}]
    if other:
        raise CheckpointError(
            f"The merged model that was written is not the one in memory: {listed(list(map(repr, other)))} differs or "
            f"is missing. {_KEPT}"
        )


def _require_config(model: Any, expected: Mapping[str, Tensor], directory: Path) -> None:
    try:
        if is_of_diffusers(model):
            written = _not_built(model, type(model).load_config(directory), expected)
        else:
            written = _not_built(model, type(model.config).from_pretrained(directory), expected)
        if not written:
            return
        known = written == _not_built(model, model.config, expected)
    except Exception as error:  # of whatever kind a constructor raises that takes more, or wants values
        rank_zero_warn(
            f"The config that was written is not verified, since a {type(model).__name__} cannot be built from it "
            f"alone and without values: {type(error).__name__}: {error}"
        )
        return
    name, shape = next(iter(written.items()))
    message = (
        f"The config of this {type(model).__name__} builds another model than the one in memory: {name!r} is "
        f"{shape or 'missing'} there and {expected[name].shape} here. "
    )
    if not known:
        raise CheckpointError(message + _KEPT)
    rank_zero_warn(
        f"{message}So from_pretrained will not open it as it is: set the config to what the model is, such as its "
        "vocab_size after a change of the embedding, or load the tensors into a model that is built alike."
    )


def _not_built(model: Any, config: Any, expected: Mapping[str, Tensor]) -> dict[str, torch.Size | None]:
    """Which tensors a model that is built by a config does not have so: by name, the shape that they have there."""
    with torch.device("meta"):
        built = type(model).from_config(config) if is_of_diffusers(model) else type(model)(config)
    shapes = {name: tensor.shape for name, tensor in built.state_dict().items()}
    return {name: shapes.get(name) for name in sorted(expected) if shapes.get(name) != expected[name].shape}


def _same(one: Tensor | None, other: Tensor | None) -> bool:
    """Whether two tensors have the same bits."""
    if one is None or other is None or one.dtype != other.dtype or one.shape != other.shape:
        return False
    one, other = (each.detach().cpu().contiguous().flatten().view(torch.uint8) for each in (one, other))
    return torch.equal(one, other)
