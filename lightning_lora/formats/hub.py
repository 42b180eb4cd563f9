"""An exported directory as a repository of the Hugging Face Hub: all of it in one commit, or nothing."""

import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path

from safetensors import SafetensorError, safe_open

from lightning_lora.formats.merged import ADAPTER_DIR, MERGED_DIR, WEIGHT_FILES
from lightning_lora.formats.peft_files import CONFIG_FILE, WEIGHTS_FILE, read_files
from lightning_lora.formats.publish import is_unfinished
from lightning_lora.model.state_dict import CheckpointError

_MODELS = ("*.safetensors", "*.gguf", "model.pt")


def push_to_hub(
    directory: str | Path,
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | None = None,
    commit_message: str = "Upload by lightning-lora",
) -> str:
    """Upload what an export has written, an adapter or a merged model, to the Hugging Face Hub.

    The files go up in one commit, so that the repository has all of them or is as it was; it is made if it is not
    there. Weights of an earlier merged model in it are removed, other files stay. What is hidden, by a name that begins
    with a dot, is left out. The server is that of the environment's ``HF_ENDPOINT``.

    Args:
        directory: ``adapter/`` or ``merged/`` of an export, or another directory that holds a complete model.
        repo_id: ``"owner/name"``; ``"name"`` alone is the user's own.
        private: Whether the repository is to be private. ``None`` leaves it, and gives a new one its owner's default.
        token: With the right to write; by default that of ``HF_TOKEN``, or of ``hf auth login``.
        commit_message: Of the commit.

    Returns:
        The address of the commit.

    Raises:
        CheckpointError: If the directory is no complete model.
        ValueError: If the name is none of a repository, or what is there does not go with what is to be uploaded: it is
            public and is to be private, or holds an adapter and is to hold a merged model, or the other way round.
        ConnectionError: If there is no token or no network, or the server refuses. Nothing is in the repository then.
    """
    import huggingface_hub

    directory = Path(directory)
    files = _files(directory)
    if huggingface_hub.constants.HF_HUB_OFFLINE:
        raise ConnectionError("This is offline mode: unset HF_HUB_OFFLINE to upload. Nothing was uploaded.")
    if token is None and huggingface_hub.get_token() is None:
        raise ConnectionError(
            "There is no token of the Hugging Face Hub: run `hf auth login`, or set HF_TOKEN to one with the right to "
            "write. Nothing was uploaded."
        )
    api = huggingface_hub.HfApi(token=token)
    with _in_one_sentence(api.endpoint):
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        found = api.model_info(repo_id)
    if private and not found.private:
        raise ValueError(
            f"{repo_id} is there and is public, and private was asked for: make it private in its settings, or choose "
            "another name. Nothing was uploaded."
        )
    there = [file.rfilename for file in found.siblings or []]
    stale = _left_over(files, there, repo_id)
    added = [huggingface_hub.CommitOperationAdd(name, path) for name, path in files.items()]
    deleted = [huggingface_hub.CommitOperationDelete(name) for name in stale]
    with _in_one_sentence(api.endpoint):
        return str(api.create_commit(repo_id, [*added, *deleted], commit_message=commit_message).commit_url)


@contextmanager
def _in_one_sentence(endpoint: str) -> Iterator[None]:
    from huggingface_hub.errors import HFValidationError

    try:
        yield
    except HFValidationError:
        raise
    except Exception as error:  # of the HTTP client of huggingface_hub, which is another one in each of its versions
        said = " ".join(str(getattr(error, "server_message", None) or error).split())
        raise ConnectionError(f"{endpoint}: {said} Nothing was uploaded.") from error


def _left_over(files: Iterable[str], there: Iterable[str], repo_id: str) -> list[str]:
    """The weights of an earlier merged model, which would be opened in place of the new one's if they stayed.

    Raises:
        ValueError: If an adapter and a merged model would be in one repository, where one is opened on the other.
    """
    new, old = ({name for name in names if _is_merged(name)} for names in (files, there))
    if (new and CONFIG_FILE in there) or (old and CONFIG_FILE in files):
        raise ValueError(
            f"{repo_id} holds {'an adapter' if new else 'a merged model'} already, and from_pretrained would open both "
            "as one: give each a repository of its own. Nothing was uploaded."
        )
    return sorted(old - new) if new else []


def _is_merged(name: str) -> bool:
    return any(fnmatch(name, glob) for glob in WEIGHT_FILES)


def _files(directory: Path) -> dict[str, Path]:
    """The files of a model that is there as a whole, by their names in the repository.

    Raises:
        CheckpointError: If it is not.
    """
    problem = _incomplete(directory)
    if problem is not None:
        raise CheckpointError(f"{problem}. Nothing was uploaded.")
    outside = [path for path in directory.rglob("*") if path.is_symlink() and _is_elsewhere(path, directory)]
    if outside:
        raise CheckpointError(
            f"{outside[0]} is a link to {outside[0].resolve()}, which is elsewhere: put the file itself there, "
            "or remove the link. Nothing was uploaded."
        )
    paths = {path.relative_to(directory): path for path in sorted(directory.rglob("*")) if path.is_file()}
    return {
        name.as_posix(): path for name, path in paths.items() if not any(part.startswith(".") for part in name.parts)
    }


def _is_elsewhere(link: Path, directory: Path) -> bool:
    """Whether a link leads out of a directory, or to what is hidden in it."""
    target, root = link.resolve(), directory.resolve()
    return not target.is_relative_to(root) or any(part.startswith(".") for part in target.relative_to(root).parts)


def _incomplete(directory: Path) -> str | None:
    """What is missing of a model, in words, ``None`` if nothing is."""
    if not directory.is_dir():
        return f"{directory} is no directory: export the adapter or the merged model, and name what was written"
    if is_unfinished(directory):
        return f"{directory} is not as a whole what a write was to leave there: write it again"
    if (directory / CONFIG_FILE).exists() or (directory / WEIGHTS_FILE).exists():
        read_files(directory)
    if not any(path for glob in _MODELS for path in directory.glob(glob)):
        inside = [str(directory / name) for name in (ADAPTER_DIR, MERGED_DIR) if (directory / name).is_dir()]
        advice = f": name {' or '.join(inside)}" if inside else ""
        return f"{directory} holds no model, which would be {' or '.join(_MODELS)}{advice}"
    for path in directory.glob("*.safetensors.index.json"):
        try:
            named = set(json.loads(path.read_text(encoding="utf-8"))["weight_map"].values())
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            return f"{path} is damaged ({error!r})"
        missing = sorted(name for name in named if not (directory / name).is_file())
        if missing:
            return f"{path} names {missing[0]!r}, which is not there"
    for path in directory.glob("*.safetensors"):
        try:
            with safe_open(path, framework="pt"):
                pass
        except SafetensorError as error:
            return f"{path} is damaged or cut short ({error})"
    return None
