"""The recipes that come with the package, and their data."""

from pathlib import Path

SHIPPED = "shipped:"


def folder() -> Path:
    """Where the recipes lie: inside the installed package, or beside it in a clone."""
    package = Path(__file__).parent
    installed = package / "recipes"
    return installed if installed.is_dir() else package.parent / "recipes"


def recipes() -> dict[str, Path]:
    """The shipped recipes by name, such as ``quickstart``."""
    return {path.stem: path for path in sorted(folder().glob("*.yaml"))}


def locate(path: str) -> Path:
    """Turn a path of a recipe into one of the file system.

    Args:
        path: An ordinary path, or ``shipped:<name>`` for a file that comes with the recipes.

    Raises:
        FileNotFoundError: If there is no such file.
    """
    found = folder() / "data" / path.removeprefix(SHIPPED) if path.startswith(SHIPPED) else Path(path)
    if found.is_file():
        return found
    if path.startswith(SHIPPED):
        others = ", ".join(sorted(file.name for file in (folder() / "data").iterdir() if file.suffix == ".jsonl"))
        raise FileNotFoundError(f"Found path={path!r}, expected one of the files that come with the recipes: {others}.")
    raise FileNotFoundError(
        f"Found no file {path!r} (looked for {found.absolute()}). Correct the path; a relative one counts from the "
        "folder in which the command is run."
    )
