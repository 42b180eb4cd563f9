"""Exports of several files: the old ones or the new ones, whole, whenever the process is killed."""

import ctypes
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import toys
from helpers.models import IDS, tiny_llama
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor, nn

from lightning_lora import LoraConfig, eject, inject, load_adapter, save_adapter
from lightning_lora.formats.merged import save_merged
from lightning_lora.formats.publish import partial_path, whole_directory, write_text

needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="kills a copy of the process")


def contents(directory: Path) -> dict[str, str]:
    return {str(path.relative_to(directory)): path.read_text() for path in directory.rglob("*") if path.is_file()}


def write(directory: Path, *names: str, text: str = "new", stale: tuple[str, ...] = ()) -> None:
    with whole_directory(directory, stale) as new:
        for name in names:
            (new / name).write_text(text)


def test_all_or_nothing(tmp_path: Path) -> None:
    target = tmp_path / "a" / "b"
    write(target, "one", "two", text="old")
    assert contents(target) == {"one": "old", "two": "old"}

    def fails() -> None:
        with whole_directory(target) as new:
            (new / "one").write_text("new")
            raise OSError("no space left")

    with pytest.raises(OSError, match="no space left"):
        fails()
    assert contents(target) == {"one": "old", "two": "old"}
    assert os.listdir(tmp_path / "a") == ["b"]


@given(st.text(st.characters(exclude_characters="/\0", exclude_categories=["Cs"]), min_size=1, max_size=255))
def test_any_name_that_the_file_system_takes(tmp_path_factory: pytest.TempPathFactory, name: str) -> None:
    folder = tmp_path_factory.mktemp("names")
    while len(os.fsencode(name)) > 255:
        name = name[:-1]
    assume(name not in (".", ".."))
    for text in ("one", "two"):
        write_text(text, folder / name)
        assert (folder / name).read_text() == text
    (folder / name).unlink()
    for text in ("one", "two"):
        write(folder / name, "inner", text=text)
        assert contents(folder / name) == {"inner": text}
    assert os.listdir(folder) == [name]


@pytest.mark.parametrize("letter", ["a", "é", "語"])
def test_names_of_the_greatest_length(tmp_path: Path, letter: str) -> None:
    name = letter * (255 // len(letter.encode()))
    write_text("whole", tmp_path / name)
    assert os.listdir(tmp_path) == [name]


def test_files_of_others_stay_and_those_of_an_earlier_write_go(tmp_path: Path) -> None:
    target = tmp_path / "model"
    write(target, "model-1.safetensors", "model-2.safetensors", text="old")
    (target / "notes.txt").write_text("mine")
    (target / "inner").mkdir()
    (target / "inner" / "file").write_text("mine")
    write(target, "model-1.safetensors", stale=("model*.safetensors",))
    assert contents(target) == {"model-1.safetensors": "new", "notes.txt": "mine", "inner/file": "mine"}


def test_a_text_is_written_with_its_directory(tmp_path: Path) -> None:
    for text in ("old", "new: \u00fc"):
        write_text(text, tmp_path / "a" / "b.txt")
        assert (tmp_path / "a" / "b.txt").read_bytes() == text.encode()
    assert os.listdir(tmp_path / "a") == ["b.txt"]


@pytest.mark.parametrize("can_link", [True, False])
def test_links_of_others_stay_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, can_link: bool) -> None:
    target = tmp_path / "model"
    (target / "inner").mkdir(parents=True)
    (target / "inner" / "file").write_text("mine")
    for link, leads_to in {"link": "inner/file", "inner/to": "file", "broken": "nowhere", "folder": "inner"}.items():
        (target / link).symlink_to(leads_to)
    if not can_link:  # as on file systems without hard links

        def refuse(*args: Any, **kwargs: Any) -> None:
            raise OSError("no such thing here")

        monkeypatch.setattr(os, "link", refuse)
    write(target, "one")
    found = {name: os.readlink(target / name) for name in ("link", "inner/to", "broken", "folder")}
    assert found == {"link": "inner/file", "inner/to": "file", "broken": "nowhere", "folder": "inner"}
    assert contents(target) == {"one": "new", "inner/file": "mine", "link": "mine", "inner/to": "mine"}


def test_a_link_to_a_directory_stays_one(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real", target_is_directory=True)
    write(tmp_path / "link", "one")
    assert (tmp_path / "link").is_symlink() and contents(tmp_path / "real") == {"one": "new"}


def test_the_current_directory_stays_the_current_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    (tmp_path / "here" / "old.bin").write_text("old")
    write(Path("."), "one", stale=("*.bin",))
    assert os.listdir(".") == ["one"]


@pytest.mark.parametrize("problem", [None, AttributeError, OSError, TypeError])
def test_a_directory_is_exchanged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, problem: type[Exception] | None
) -> None:
    if problem is not None:  # as on systems other than Linux

        def refuse(name: str | None) -> None:
            raise problem("not here")

        monkeypatch.setattr(ctypes, "CDLL", refuse)
    write(tmp_path / "x", "one", text="old")
    write(tmp_path / "x", "one")
    assert contents(tmp_path / "x") == {"one": "new"} and os.listdir(tmp_path) == ["x"]


def killed_at(call: int, owner: Any, name: str, action: Callable[[], Any]) -> bool:
    """Run an action in a copy of this process that is killed at one of its calls of a function.

    Returns:
        Whether it came to that call.
    """
    if (child := os.fork()) == 0:
        real, left = getattr(owner, name), [call]

        def counted(*args: Any, **kwargs: Any) -> Any:
            left[0] -= 1
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*args, **kwargs)

        setattr(owner, name, counted)
        try:
            action()
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


def adapted(alpha: float, seed: int) -> nn.Module:
    model = inject(tiny_llama().eval(), LoraConfig(r=4, lora_alpha=alpha, target_modules=["q_proj", "v_proj"]))
    toys.randomize(model, scale=0.1 * seed)
    return model


def outputs(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model.eval()(IDS).logits


@needs_fork
@pytest.mark.parametrize(("owner", "name"), [(os, "fsync"), (os, "replace"), (Path, "write_text"), (shutil, "rmtree")])
def test_an_adapter_is_the_old_one_or_the_new_one(tmp_path: Path, owner: Any, name: str) -> None:
    one, other = adapted(8, 1), adapted(32, 2)
    wanted = [outputs(one), outputs(other)]
    save_adapter(one, tmp_path / "adapter")
    call = 1
    while killed_at(call, owner, name, lambda: save_adapter(other, tmp_path / "adapter")):
        found = outputs(load_adapter(tiny_llama(), tmp_path / "adapter"))
        assert any(torch.allclose(found, each, atol=1e-5) for each in wanted), f"killed at call {call} of {name}"
        call += 1
    assert torch.allclose(outputs(load_adapter(tiny_llama(), tmp_path / "adapter")), wanted[1], atol=1e-5)
    save_adapter(other, tmp_path / "adapter")
    assert os.listdir(tmp_path) == ["adapter"]  # what killed processes have left is gone


@needs_fork
def test_a_merged_model_is_the_old_one_or_the_new_one(tmp_path: Path) -> None:
    import transformers.modeling_utils as writer

    one, other = (eject(adapted(*each), merge=True) for each in ((8, 1), (32, 2)))
    wanted = [outputs(one), outputs(other)]
    save_merged(one, tmp_path / "merged", max_shard_size="20KB")
    for call in (1, 3):
        assert killed_at(
            call, writer, "safe_save_file", lambda: save_merged(other, tmp_path / "merged", max_shard_size="20KB")
        )
        assert torch.equal(outputs(type(one).from_pretrained(tmp_path / "merged")), wanted[0])
    save_merged(other, tmp_path / "merged")
    assert torch.equal(outputs(type(one).from_pretrained(tmp_path / "merged")), wanted[1])
    assert len(list((tmp_path / "merged").glob("*.safetensors*"))) == 1  # no shard of the first is left


def test_a_killed_write_is_no_adapter(tmp_path: Path) -> None:
    """In the words of a user: the first export ever is killed, and nothing is there to be opened."""
    code = (
        "import os; from pathlib import Path; from lightning_lora.formats.publish import whole_directory\n"
        f"with whole_directory(Path({str(tmp_path / 'x')!r})) as new: (new / 'one').write_text(''); os._exit(9)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 9
    assert not (tmp_path / "x").exists()


@needs_fork
def test_what_killed_processes_left_is_removed(tmp_path: Path) -> None:
    target = tmp_path / "last[1].ckpt"
    mine = partial_path(target)
    assert mine.parent == tmp_path and mine.name.startswith(".") and not mine.name.endswith(".ckpt")
    host = mine.name.removeprefix(".last[1].ckpt.").rpartition("-")[0]
    if (dead := os.fork()) == 0:
        os._exit(0)
    os.waitpid(dead, 0)
    of = {
        "dead": f".last[1].ckpt.{host}-{dead}.partial",
        "alive": f".last[1].ckpt.{host}-{os.getppid()}.partial",
        "elsewhere": f".last[1].ckpt.other-host-{dead}.partial",
        "elsewhere, long ago": f".last[1].ckpt.other-host-{dead + 1}.partial",
        "another file's": f".last.ckpt.{host}-{dead}.partial",
        "without a number": f".last[1].ckpt.{host}-x{dead}.partial",
        "without a number, long ago": f".last[1].ckpt.{host}-y{dead}.partial",
    }
    for name in of.values():
        (tmp_path / name).mkdir()
        (tmp_path / name / "half").touch()
    for name in of:
        if name.endswith("long ago"):
            os.utime(tmp_path / of[name], (0, 0))
    mine.write_text("of an earlier process that had this number")
    assert partial_path(target) == mine
    left = {name for name, file in of.items() if (tmp_path / file).exists()}
    assert left == {"alive", "elsewhere", "another file's", "without a number"}
    assert not mine.exists()


@needs_fork
def test_two_processes_write_to_one_place(tmp_path: Path) -> None:
    children = []
    for number in range(2):
        if (child := os.fork()) == 0:
            try:
                for _ in range(30):
                    write(tmp_path / "model", "one", "two", text=str(number))
            except BaseException:
                os._exit(1)
            os._exit(0)
        children.append(child)
    assert [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children] == [0, 0]
    found = contents(tmp_path / "model")
    assert found.keys() == {"one", "two"} and len(set(found.values())) == 1
    assert os.listdir(tmp_path) == ["model"]
