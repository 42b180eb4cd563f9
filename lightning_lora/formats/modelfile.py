"""The Modelfile by which Ollama makes a model of a GGUF file."""

from pathlib import Path

from lightning_lora.formats.publish import whole_file


def write_modelfile(gguf_file: Path, base: Path | None = None) -> Path:
    """Write ``<name>.Modelfile`` beside ``<name>.gguf``, for ``ollama create ... -f <name>.Modelfile``.

    Args:
        gguf_file: A whole model, or an adapter if there is a base.
        base: The adapter's: a GGUF file, or a directory of transformers.

    Returns:
        The file.
    """
    path = gguf_file.with_suffix(".Modelfile")
    lines = [f"FROM ./{gguf_file.name}"] if base is None else [f"FROM {base}", f"ADAPTER ./{gguf_file.name}"]
    with whole_file(path) as new:
        new.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path
