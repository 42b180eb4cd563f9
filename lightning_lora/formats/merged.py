"""The merged model as files: as ``from_pretrained`` of transformers or diffusers opens it, or ``model.safetensors``."""

import copy
import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save, save_file, save_model
from torch import Tensor, nn

from lightning_lora.formats.model_card import Run, has_own_card, write_merged_card
from lightning_lora.formats.publish import whole_directory
from lightning_lora.formats.verified import verify_merged
from lightning_lora.layers import LoraLayer, MergedForm, dequantized
from lightning_lora.layers.quantized.storage import PLAIN
from lightning_lora.model.merge import surrounding_dtype
from lightning_lora.model.quantization import is_quantized, plain_tensors, quantized_layers, stands_for_packed
from lightning_lora.model.record import adapted_layers
from lightning_lora.model.targets import is_of_diffusers, models_with_files
from lightning_lora.sharding import full_shape, full_tensor, is_sharded, is_writer

ADAPTER_DIR = "adapter"
MERGED_DIR = "merged"
_OTHER_FILE = "model.pt"  # where safetensors cannot hold what is to be stored
# Of an earlier model, in other shards.
WEIGHT_FILES = ("model*.safetensors*", "diffusion_pytorch_model*", "model.pt", "pytorch_model*.bin*")
_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9}


class Part(NamedTuple):
    """A tensor to be written, which is computed or gathered when its turn comes.

    Attributes:
        name: Its name in a state dict.
        shape: Of the values.
        dtype: Of the values.
        values: Makes them.
    """

    name: str
    shape: torch.Size
    dtype: torch.dtype
    values: Callable[[], Tensor]


def save_merged(
    model: nn.Module,
    directory: str | Path,
    tokenizer: Any | None = None,
    max_shard_size: str = "5GB",
    dtype: torch.dtype | None = None,
    verify: bool = True,
    run: Run | None = None,
) -> Path:
    """Write a merged model: one of transformers or diffusers for ``from_pretrained``, others as ``model.safetensors``.

    Adapters that are at work are merged on the way, one layer after the other, so that no more than one file is in
    memory, and so are quantized weights made ordinary ones: what is written is a model that nothing quantizes when it
    is opened. The model itself stays as it is, so that this may be done in the middle of a run.

    That format has no sparse, quantized, nested, expanded or complex128 tensors, and nothing else that a state dict may
    hold. With such, the file is ``model.pt``, which ``torch.load`` opens.

    Where processes share the parameters, all must call this together; tensors are gathered one by one, and the first
    process writes each file as soon as it has it.

    Args:
        model: A model with or without adapters.
        directory: Made if it is not there.
        tokenizer: Saved beside a transformers model, if given.
        max_shard_size: Size above which a transformers model, or one that processes share, is split into several files.
        dtype: Of the weights that were quantized. ``None`` is what they were before.
        verify: Whether the files are opened again before they take their place, and every tensor compared with the
            model; not, where tensors were merged or gathered one by one.
        run: What the model's card says of the training run.

    Returns:
        The directory.

    Raises:
        ValueError: If a merged weight holds a NaN or an infinity.
        CheckpointError: If what was written is not the model.
    """
    directory = Path(directory)
    if not is_writer(model):
        return _write(model, directory, tokenizer, max_shard_size, dtype)
    with whole_directory(directory, WEIGHT_FILES) as new:
        _write(model, new, tokenizer, max_shard_size, dtype)
        if verify and not (_is_written_one_by_one(model) or (new / _OTHER_FILE).exists()):
            verify_merged(one_inside(model), new)
        if not has_own_card(directory):
            _write_card(one_inside(model), new, run)
    return directory


def _write_card(model: nn.Module, directory: Path, run: Run | None) -> None:
    library = "diffusers" if is_of_diffusers(model) else "transformers" if "" in models_with_files(model) else None
    base = getattr(getattr(model, "config", None), "_name_or_path", None) or None
    write_merged_card(directory, library, type(model).__name__, base, run)


def _is_written_one_by_one(model: nn.Module) -> bool:
    """Whether tensors are gathered, dequantized or merged on the way."""
    return is_sharded(model) or is_quantized(model) or bool(adapted_layers(model))


def one_inside(model: nn.Module) -> nn.Module:
    """The model of transformers or diffusers in another one, if there is just one."""
    hf_models = list(models_with_files(model).values())
    return hf_models[0] if len(hf_models) == 1 else model


def _write(
    model: nn.Module, directory: Path, tokenizer: Any | None, max_shard_size: str, dtype: torch.dtype | None
) -> Path:
    hf_models = list(models_with_files(model).values())
    one_by_one = _is_written_one_by_one(model)
    if one_by_one:
        _save_one_by_one(one_inside(model), directory, max_shard_size, dtype)
    elif not all(map(_is_storable, model.state_dict().values())):
        torch.save(model.state_dict(), directory / _OTHER_FILE)
    elif len(hf_models) == 1:
        with _true_to_ties(hf_models[0]):
            hf_models[0].save_pretrained(directory, max_shard_size=max_shard_size)  # type: ignore[operator]
    else:
        save_model(model, str(directory / "model.safetensors"))
    if len(hf_models) == 1 and is_writer(model):
        if one_by_one:
            _save_configs(hf_models[0], directory, dtype)
        if tokenizer is not None:
            tokenizer.save_pretrained(directory)
    return directory


def _is_storable(value: Any) -> bool:
    if not isinstance(value, Tensor) or value.layout is not torch.strided or value.is_quantized or value.is_nested:
        return False
    try:
        save({"": value.new_empty(0)})
    except (KeyError, ValueError):  # a type that safetensors has no name for
        return False
    return value.numel() * value.element_size() <= value.untyped_storage().nbytes()  # else it is expanded


def _save_one_by_one(model: nn.Module, directory: Path, max_shard_size: str, dtype: torch.dtype | None) -> None:
    """Write a model that processes share, or that is not merged, in files of a given size, as transformers does."""
    files = list(_files(parts_of(model, dtype), _bytes(max_shard_size)))
    stem = "diffusion_pytorch_model" if is_of_diffusers(model) else "model"
    weight_map, total = {}, 0
    for number, content in enumerate(files, 1):
        several = f"-{number:05d}-of-{len(files):05d}" if len(files) > 1 else ""
        file_name = f"{stem}{several}.safetensors"
        tensors: dict[str, Tensor] = {}
        for part in content:
            tensor = part.values()
            weight_map[part.name], total = file_name, total + tensor.nbytes
            if is_writer(model):
                tensors[part.name] = tensor.detach().cpu().contiguous()
        if is_writer(model):
            save_file(tensors, directory / file_name, {"format": "pt"})
    if len(files) > 1 and is_writer(model):
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (directory / f"{stem}.safetensors.index.json").write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


def parts_of(model: nn.Module, dtype: torch.dtype | None) -> list[Part]:
    """What is to be written of a model: no adapters, quantized weights as ordinary ones, and what is tied once."""
    form = MergedForm(dtype, otherwise=surrounding_dtype(model))
    quantized = {id(module): (storage, packed) for _, module, storage, packed in quantized_layers(model)}
    adapters = {id(inner) for m in model.modules() if isinstance(m, LoraLayer) for inner in m.lora.modules()}
    parts: dict[tuple[int, int], Part] = {}
    for name, module, inner in plain_tensors(model):
        tensor, shape = getattr(module, inner), full_shape(module, inner)
        key = _identity(module, tensor)
        if id(module) in adapters or key in parts:
            continue
        if id(module) in quantized and stands_for_packed(module, inner):
            storage, packed = quantized[id(module)]
            plain = dtype or storage.dtype(module, packed) or form.otherwise
            parts[key] = Part(name, storage.shape(module, packed), plain, partial(_plain, module, form, plain))
        elif isinstance(module, LoraLayer) and inner in module.adapted_parameters() and not module.merged:
            parts[key] = Part(name, shape, tensor.dtype, partial(_merged, module, inner, form))
        else:
            parts[key] = Part(name, shape, tensor.dtype, partial(full_tensor, module, inner))
    return list(parts.values())


def _plain(module: nn.Module, form: MergedForm, dtype: torch.dtype) -> Tensor:
    """A quantized layer's weight as an ordinary one, with the adapters that are at work merged in."""
    if isinstance(module, LoraLayer):
        merged: Tensor = module.merged_as(form)[PLAIN]
        return merged
    return dequantized(module).to(dtype)


def _merged(layer: LoraLayer, name: str, form: MergedForm) -> Tensor:
    return full_tensor(layer, name, layer.merged_as(form)[name])


def _files(parts: list[Part], limit: int) -> Iterator[list[Part]]:
    """What goes into each file: as much as the limit allows, and one tensor at least."""
    content: list[Part] = []
    size = 0
    for part in parts:
        own = part.shape.numel() * part.dtype.itemsize
        if content and size + own > limit:
            yield content
            content, size = [], 0
        content.append(part)
        size += own
    yield content


def _identity(module: nn.Module, tensor: Tensor | None) -> tuple[int, int]:
    """What two modules share that have the same values once adapters are merged."""
    return id(tensor), id(module.lora) if isinstance(module, LoraLayer) and module.active else 0


def _save_configs(hf_model: Any, directory: Path, dtype: torch.dtype | None) -> None:
    """Write the configs of a model as it lies in the files: in its type, and quantized no more."""
    if is_of_diffusers(hf_model):
        hf_model.save_config(directory)
        path = directory / "config.json"
        settings = json.loads(path.read_text(encoding="utf-8"))
        settings.pop("quantization_config", None)
        path.write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        return
    with _true_to_ties(hf_model):
        config = copy.deepcopy(hf_model.config)
    if is_quantized(hf_model):
        vars(config).pop("quantization_config", None)
        config.dtype = dtype or surrounding_dtype(hf_model)
    config.save_pretrained(directory)
    if getattr(hf_model, "generation_config", None) is not None:
        hf_model.generation_config.save_pretrained(directory)


def _bytes(size: str) -> int:
    found = re.fullmatch(r"(\d+)\s*([KMG]B)", size.strip().upper())
    if found is None:
        raise ValueError(f"max_shard_size is {size!r}, but it must be a number and KB, MB or GB, such as '5GB'.")
    return int(found[1]) * _UNITS[found[2]]


@contextmanager
def _true_to_ties(hf_model: Any) -> Iterator[None]:
    """Say in the saved config that the output head is untied, if merging an adapter into it made it so."""
    if is_of_diffusers(hf_model):  # which has no embeddings to tie
        yield
        return
    head, embedding = hf_model.get_output_embeddings(), hf_model.get_input_embeddings()
    untied = (
        getattr(hf_model.config, "tie_word_embeddings", False)
        and head is not None
        and _identity(head, getattr(head, "weight", None)) != _identity(embedding, getattr(embedding, "weight", None))
    )
    if untied:
        hf_model.config.tie_word_embeddings = False
    try:
        yield
    finally:
        if untied:
            hf_model.config.tie_word_embeddings = True
