"""No object of a file is opened unless the run was told to trust it, wherever the file comes from."""

import contextlib
import functools
import http.server
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import toys
from helpers.toys import Toy, loader

from lightning_lora import LoRA, load_adapter, load_from_checkpoint
from lightning_lora.model.state_dict import CheckpointError


class Touch:
    """Unpickled, it makes a directory."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args: Any) -> None:
        """Print nothing."""


@pytest.fixture
def hostile(tmp_path: Path) -> Path:
    trainer = toys.trainer(tmp_path, [LoRA(r=2, summary=False, merge=None)], max_epochs=1, enable_checkpointing=False)
    trainer.fit(Toy(), loader())
    trainer.save_checkpoint(tmp_path / "good.ckpt")
    content = torch.load(tmp_path / "good.ckpt", weights_only=True)
    torch.save({**content, "hyper_parameters": {"x": Touch(tmp_path / "executed")}}, tmp_path / "evil.ckpt")
    return tmp_path / "evil.ckpt"


@pytest.fixture
def url(hostile: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setenv("TORCH_HOME", str(hostile.parent / "hub"))
    handler = functools.partial(Quiet, directory=str(hostile.parent))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def fit(path: Any, **kw: Any) -> None:
    trainer = toys.trainer("unused", [LoRA(r=2, merge=None, summary=False)], max_epochs=2, enable_checkpointing=False)
    trainer.fit(Toy(), loader(), ckpt_path=path, **kw)


def evaluate(path: Any) -> None:
    toys.trainer("unused", [LoRA(r=2, summary=False)]).test(Toy(), loader(), ckpt_path=path, verbose=False)


@pytest.mark.parametrize(
    "read", [fit, evaluate, lambda path: load_from_checkpoint(Toy, path), lambda path: load_adapter(Toy(), path)]
)
@pytest.mark.parametrize("remote", [False, True])
def test_objects_are_refused(read: Callable[[Any], None], remote: bool, hostile: Path, url: str) -> None:
    with pytest.raises(CheckpointError, match=r"it holds more than tensors and plain types, namely posix\.mkdir"):
        read(f"{url}/evil.ckpt" if remote else hostile)
    assert not (hostile.parent / "executed").exists()


READERS: dict[str, Callable[..., Any]] = {
    "fit": fit,
    "load_from_checkpoint": lambda path, **kw: load_from_checkpoint(Toy, path, **kw),
    "load_adapter": lambda path, **kw: load_adapter(Toy(), path, **kw),
}


WAYS_OUT = {
    "fit": "give weights_only=False to this run of the Trainer",
    "load_from_checkpoint": r"load_from_checkpoint\(\.\.\., weights_only=False\), or build the module yourself",
    "load_adapter": r"load_adapter\(\.\.\., weights_only=False\)",
}


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("weights_only", [None, True, False])
def test_who_trusts_a_file_may_open_it(reader: str, weights_only: bool | None, hostile: Path) -> None:
    if weights_only is False:
        with contextlib.suppress(TypeError):  # Toy has no such argument
            READERS[reader](hostile, weights_only=False)
    else:
        with pytest.raises(CheckpointError, match=rf"{hostile} .*{WAYS_OUT[reader]}"):
            READERS[reader](hostile, weights_only=weights_only)
    assert (hostile.parent / "executed").is_dir() == (weights_only is False)


def test_a_good_one_resumes_from_a_url(hostile: Path, url: str) -> None:
    fit(f"{url}/good.ckpt")
