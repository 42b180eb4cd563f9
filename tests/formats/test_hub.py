"""What an export has written goes to the Hugging Face Hub as a whole, or not at all."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import huggingface_hub
import pytest
import torch
from helpers import hub as stand_in
from helpers import toys
from helpers.models import IDS, tiny_llama

from lightning_lora import CheckpointError, LoraConfig, eject, inject, push_to_hub, save_adapter, save_merged
from lightning_lora.cli.main import main


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[stand_in.Hub]:
    with stand_in.running() as found:
        # What the library has read of the environment when it was imported.
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", found.url)
        monkeypatch.setenv("HF_TOKEN", stand_in.TOKEN)
        yield found


@pytest.fixture
def export(tmp_path: Path) -> Path:
    model = inject(tiny_llama(), LoraConfig(r=2, target_modules=["q_proj"]))
    toys.randomize(model)
    save_adapter(model, tmp_path / "export" / "adapter")
    save_merged(eject(model, merge=True), tmp_path / "export" / "merged", max_shard_size="20KB")
    return tmp_path / "export"


def content(directory: Path) -> dict[str, bytes]:
    return {
        path.relative_to(directory).as_posix(): path.read_bytes() for path in directory.rglob("*") if path.is_file()
    }


@pytest.mark.parametrize("name", ["adapter", "merged"])
def test_all_files_are_there_in_one_commit(name: str, export: Path, hub: stand_in.Hub) -> None:
    (export / name / ".cache").mkdir()
    (export / name / ".cache" / "mine").write_text("secret")
    (export / name / "templates").mkdir()
    (export / name / "templates" / "tool.jinja").write_text("{{ tool }}")
    url = push_to_hub(export / name, "me/tuned", commit_message="The first")
    repository = hub.repositories["me/tuned"]
    assert repository.commits == ["The first"] and not repository.private
    assert url == f"{hub.url}/me/tuned/commit/{1:040x}"
    wanted = content(export / name)
    assert wanted.pop(".cache/mine") and {"README.md", "templates/tool.jinja"} <= wanted.keys()
    assert repository.files == wanted


@pytest.mark.parametrize("target", ["../secret", "../secrets", ".hidden/secret", "/proc/self/environ"])
@pytest.mark.parametrize("place", ["notes.txt", "more/notes.txt"])
def test_no_link_takes_what_is_elsewhere_along(target: str, place: str, export: Path, hub: stand_in.Hub) -> None:
    directory = export / "adapter"
    for name in ("../secret", "../secrets/key", ".hidden/secret"):
        (directory / name).parent.mkdir(exist_ok=True)
        (directory / name).write_text("secret")
    (directory / place).parent.mkdir(exist_ok=True)
    (directory / place).symlink_to((directory / target).absolute())
    with pytest.raises(CheckpointError, match=r"notes\.txt is a link to .*Nothing was uploaded"):
        push_to_hub(directory, "me/tuned")
    assert not hub.repositories
    (directory / place).unlink()
    (directory / place).symlink_to(directory / "adapter_config.json")  # which is uploaded anyhow
    push_to_hub(directory, "me/tuned")
    assert hub.repositories["me/tuned"].files[place] == (directory / "adapter_config.json").read_bytes()


def test_what_was_uploaded_is_the_model(export: Path, hub: stand_in.Hub, tmp_path: Path) -> None:
    push_to_hub(export / "merged", "tuned")  # whose owner is the token's
    for name, found in hub.repositories["me/tuned"].files.items():
        (tmp_path / name).write_bytes(found)
    with torch.no_grad():
        there, here = (tiny_llama().from_pretrained(path)(IDS).logits for path in (tmp_path, export / "merged"))
    assert torch.equal(there, here)


def test_weights_of_an_earlier_model_go_and_what_is_of_others_stays(export: Path, hub: stand_in.Hub) -> None:
    push_to_hub(export / "merged", "me/tuned")
    repository = hub.repositories["me/tuned"]
    repository.files["LICENSE"] = b"mine"
    assert sum(name.endswith(".safetensors") for name in repository.files) > 1
    save_merged(tiny_llama(), export / "merged")
    push_to_hub(export / "merged", "me/tuned")
    weights = [name for name in repository.files if "safetensors" in name]
    assert weights == ["model.safetensors"] and repository.files["LICENSE"] == b"mine"


def test_private_is_private(export: Path, hub: stand_in.Hub) -> None:
    push_to_hub(export / "adapter", "me/hidden", private=True)
    assert hub.repositories["me/hidden"].private
    push_to_hub(export / "adapter", "me/open")
    before = dict(hub.repositories["me/open"].files)
    (export / "adapter" / "more.txt").write_text("more")
    with pytest.raises(ValueError, match="me/open is there and is public"):
        push_to_hub(export / "adapter", "me/open", private=True)
    assert hub.repositories["me/open"].files == before


@pytest.mark.parametrize(("first", "second"), [("adapter", "merged"), ("merged", "adapter")])
def test_an_adapter_and_a_merged_model_are_not_mixed(first: str, second: str, export: Path, hub: stand_in.Hub) -> None:
    push_to_hub(export / first, "me/tuned")
    with pytest.raises(
        ValueError, match=r"holds an? (adapter|merged model) already, and from_pretrained would open both"
    ):
        push_to_hub(export / second, "me/tuned")
    assert len(hub.repositories["me/tuned"].commits) == 1


def cut_short(directory: Path) -> None:
    for path in directory.glob("*.safetensors"):
        path.write_bytes(path.read_bytes()[:-4])


def with_a_changed_bit(directory: Path) -> None:
    path = directory / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\x01")


def without_a_shard(directory: Path) -> None:
    min(directory.glob("model-*.safetensors")).unlink()


def with_an_odd_index(directory: Path) -> None:
    (directory / "model.safetensors.index.json").write_text("[]")


def with_a_write_that_has_not_ended(directory: Path) -> None:
    (directory / ".files.host-1.partial").mkdir()


def without_weights(directory: Path) -> None:
    for path in directory.glob("*.safetensors"):
        path.unlink()


@pytest.mark.parametrize(
    ("name", "harm", "said"),
    [
        ("adapter", cut_short, "damaged or cut short"),
        ("adapter", with_a_changed_bit, "is damaged"),
        ("adapter", without_weights, "has no adapter_model.safetensors"),
        ("adapter", with_a_write_that_has_not_ended, "is not as a whole what a write was to leave there"),
        ("merged", cut_short, "damaged or cut short"),
        ("merged", without_a_shard, "names 'model-00001-of"),
        ("merged", with_an_odd_index, "index.json is damaged"),
        ("merged", without_weights, "holds no model, which would be"),
        (".", lambda directory: None, "holds no model, which would be .* name .*/adapter or .*/merged"),
        ("nowhere", lambda directory: None, "nowhere is no directory"),
    ],
)
def test_what_is_not_whole_is_not_uploaded(
    name: str, harm: Callable[[Path], None], said: str, export: Path, hub: stand_in.Hub
) -> None:
    harm(export / name)
    with pytest.raises(CheckpointError, match=said):
        push_to_hub(export / name, "me/tuned")
    assert not hub.asked


def test_what_a_killed_write_left_is_not_uploaded(export: Path, hub: stand_in.Hub) -> None:
    left = (export / "adapter").rename(export / ".adapter.host-1.partial")
    with pytest.raises(CheckpointError, match="is not as a whole"):
        push_to_hub(left, "me/tuned")
    assert not hub.asked


@pytest.mark.parametrize(
    ("repo_id", "step"),
    [
        ("me/new", "/api/repos/create"),
        ("me/tuned", "/api/models/me/tuned/preupload"),
        ("me/tuned", "/lfs"),
        ("me/tuned", "/api/models/me/tuned/commit"),
    ],
)
def test_a_server_that_refuses_has_nothing(repo_id: str, step: str, export: Path, hub: stand_in.Hub) -> None:
    push_to_hub(export / "adapter", "me/tuned")
    before = dict(hub.repositories["me/tuned"].files)
    save_adapter(inject(tiny_llama(), LoraConfig(r=3, target_modules=["q_proj"])), export / "adapter")
    hub.refused = step
    with pytest.raises(ConnectionError, match="Nothing was uploaded"):
        push_to_hub(export / "adapter", repo_id)
    assert list(hub.repositories) == ["me/tuned"] and hub.repositories["me/tuned"].files == before


def test_errors_are_one_sentence(export: Path, hub: stand_in.Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    def said(repo_id: str = "me/tuned", **values: str) -> str:
        with pytest.raises((ConnectionError, ValueError)) as error:
            push_to_hub(export / "adapter", repo_id, **values)
        assert "\n" not in str(error.value)
        return str(error.value)

    assert "Invalid username or password." in said(token="hf_wrong")
    assert "Repo id must be" in said("a/b/c")
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(export / "no_token"))
    assert "There is no token of the Hugging Face Hub: run `hf auth login`" in said()
    monkeypatch.setenv("HF_TOKEN", stand_in.TOKEN)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:1")
    assert "http://127.0.0.1:1: " in said() and "refused" in said()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert "This is offline mode: unset HF_HUB_OFFLINE" in said()


def test_a_base_that_is_a_directory_is_not_named_to_the_hub(hub: stand_in.Hub, tmp_path: Path) -> None:
    tiny_llama().save_pretrained(tmp_path / "base")
    model = inject(tiny_llama().from_pretrained(tmp_path / "base"), LoraConfig(r=2, target_modules=["q_proj"]))
    save_adapter(model, tmp_path / "adapter")
    push_to_hub(tmp_path / "adapter", "me/adapter")  # which the Hub would refuse: it knows its own models alone
    save_merged(eject(model, merge=True), tmp_path / "merged")
    push_to_hub(tmp_path / "merged", "me/merged")
    assert len(hub.repositories) == 2


def test_the_command_line_uploads(export: Path, hub: stand_in.Hub, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["push", str(export / "adapter"), "me/tuned", "--private"])
    assert "/me/tuned/commit/" in capsys.readouterr().out
    assert hub.repositories["me/tuned"].private
    with pytest.raises(SystemExit, match="1"):
        main(["push", str(export), "me/tuned"])
    assert "holds no model, which would be" in capsys.readouterr().err


@pytest.mark.slow
def test_the_environment_says_where_and_who(export: Path, hub: stand_in.Hub) -> None:
    told = {"HF_ENDPOINT": hub.url, "HF_TOKEN": stand_in.TOKEN, "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0"}
    command = [sys.executable, "-m", "lightning_lora", "push", str(export / "adapter"), "me/tuned"]
    done = subprocess.run(command, env={**os.environ, **told}, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout == f"Uploaded: {hub.url}/me/tuned/commit/{1:040x}\n", done.stderr
    assert hub.repositories["me/tuned"].files == content(export / "adapter")
