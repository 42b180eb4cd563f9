"""What the commands print to: a console that obeys nothing that files hold, and a progress bar."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import Progress


def console() -> Console:
    """A console that prints what files hold as it is, and takes nothing in it for markup."""
    return Console(markup=False, highlight=False, emoji=False)


def printable(text: str) -> str:
    """A text with what a terminal would obey, and not show, written out."""
    return "".join(
        each if each.isprintable() or each == "\n" else each.encode("unicode_escape").decode() for each in text
    )


def on_one_line(text: str) -> str:
    """The same of what is to be on one line, so that a name cannot look like more than one."""
    return printable(text).replace("\n", "\\n")


@contextmanager
def steps(count: int) -> Iterator[Callable[[str], None]]:
    """A progress bar on a terminal; what is given is called with what comes next."""
    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("", total=count)

        def begin(description: str) -> None:
            progress.update(task, description=description, advance=1)

        yield begin
