"""``lightning-lora recipes``: list the shipped recipes, or copy one out."""

from pathlib import Path

from lightning_lora import shipped_recipes
from lightning_lora.cli.arguments import Parser


def run(arguments: list[str]) -> None:
    """Run ``recipes [copy NAME [TARGET]]``."""
    parser = Parser("lightning-lora recipes", description="List the shipped recipes, or copy one out.")
    actions = parser.add_subparsers(dest="action")
    copy = actions.add_parser("copy", help="copy a recipe out, to change it")
    copy.add_argument("name", choices=shipped_recipes.recipes(), metavar="NAME", help="its name in the list")
    copy.add_argument("target", nargs="?", type=Path, help="where to; default: NAME.yaml in this folder")
    given = parser.parse_args(arguments)
    if given.action is None:
        _list()
        return
    target = given.target or Path(f"{given.name}.yaml")
    if target.exists():
        parser.error(f"{target} is there already: name another file, or remove it.")
    target.write_text(shipped_recipes.recipes()[given.name].read_text(encoding="utf-8"), encoding="utf-8")
    print(f"Wrote {target}. Run it: lightning-lora fit --config {target}")


def _list() -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table("recipe", "what")
    for name, path in shipped_recipes.recipes().items():
        first = path.read_text(encoding="utf-8").splitlines()[0]
        table.add_row(name, Text(first.removeprefix("#").strip()))
    console = Console()
    console.print(table)
    console.print(Text("lightning-lora fit --config NAME runs one, lightning-lora recipes copy NAME copies it here."))
