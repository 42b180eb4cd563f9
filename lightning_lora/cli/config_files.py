"""Files of settings: found by the name of a recipe, looked through before they are read, and where a setting stands."""

from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import yaml

from lightning_lora import shipped_recipes

OPTIONS = ("--config", "-c")


def with_recipes_found(arguments: list[str]) -> list[str]:
    """The arguments, with the names of shipped recipes after ``--config`` turned into paths.

    Raises:
        FileNotFoundError: If there is neither such a file nor such a recipe.
        ValueError: If a file is not a YAML mapping, or says a setting twice.
    """
    found = []
    for index, argument in enumerate(arguments):
        option, equals, value = argument.partition("=")
        if equals and option in OPTIONS:
            found.append(f"{option}={_path(value)}")
        elif index and arguments[index - 1] in OPTIONS:
            found.append(_path(argument))
        else:
            found.append(argument)
    return found


def place(arguments: list[str], setting: str, value: str | None = None) -> str:
    """Where a setting stands in the files that the arguments name: ``in my.yaml, line 12``, or nothing.

    Args:
        arguments: Of a command line, with paths of files.
        setting: By its path, such as ``trainer.callbacks.init_args.r``.
        value: What it must be there; default: anything. An option of the command line may have changed it.
    """
    paths = [second for first, second in pairwise(arguments) if first in OPTIONS]
    paths += [path for option, _, path in (given.partition("=") for given in arguments) if option in OPTIONS and path]
    found = [
        f"in {path}, line {line}"
        for path in map(Path, paths)
        if path.is_file()
        for name, line, there in _settings(yaml.compose(path.read_text(encoding="utf-8"), yaml.SafeLoader))
        if name == setting and value in (None, there)
    ]
    return found[0] if len(found) == 1 else ""


def _path(value: str) -> str:
    # A file of one's own goes first.
    if Path(value).is_file():
        _check(Path(value))
        return value
    recipes = shipped_recipes.recipes()
    found = recipes.get(value.removesuffix(".yaml"))
    if found is None and ":" not in value:  # no URL, no settings themselves
        raise FileNotFoundError(
            f"Found no file {value!r}, expected one of settings, or a recipe: {', '.join(recipes)}. Correct --config."
        )
    return value if found is None else str(found)


def _check(path: Path) -> None:
    """Refuse what a parser would say less about, or, as a setting that stands twice, nothing."""
    try:
        root = yaml.compose(path.read_text(encoding="utf-8"), yaml.SafeLoader)
    except UnicodeDecodeError as error:
        raise ValueError(f"Found no text in {path} ({error}), expected settings as YAML in UTF-8.") from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise ValueError(f"Found no YAML in {path}{where}: {error.problem}. Correct it there.") from None
    except yaml.YAMLError as error:
        raise ValueError(f"Found no YAML in {path}: {' '.join(str(error).split())}. Correct it.") from None
    if not isinstance(root, yaml.MappingNode):
        what = {yaml.SequenceNode: "a list", yaml.ScalarNode: "a text"}.get(type(root), "nothing")
        raise ValueError(f"Found {what} in {path}, expected settings by name, such as trainer, model and data.")
    for name, key in _doubled(root):
        raise ValueError(
            f"Found {name!r} twice in {path}, the second time in line {key.start_mark.line + 1}, expected each setting "
            "once. Take one out."
        )


def _settings(node: yaml.Node | None, path: str = "") -> Iterator[tuple[str, int, str | None]]:
    """The settings below a node: path, line, and value where that is one word; items of a list have the list's path."""
    if isinstance(node, yaml.SequenceNode):
        for item in node.value:
            yield from _settings(item, path)
    elif isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            name = f"{path}.{key.value}" if path else str(key.value)
            yield name, key.start_mark.line + 1, value.value if isinstance(value, yaml.ScalarNode) else None
            yield from _settings(value, name)


def _doubled(node: yaml.Node) -> Iterator[tuple[str, yaml.Node]]:
    if isinstance(node, yaml.MappingNode):
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value != "<<":
                if key.value in seen:
                    yield key.value, key
                seen.add(key.value)
    children = [part for pair in node.value for part in pair] if isinstance(node, yaml.MappingNode) else node.value
    for child in children if isinstance(node, yaml.CollectionNode) else ():
        yield from _doubled(child)
