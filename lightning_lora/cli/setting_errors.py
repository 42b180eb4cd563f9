"""What is wrong with a setting, in one paragraph: jsonargparse says it in many lines, and names each type it tried."""

import difflib
import inspect
import re
import textwrap
from collections.abc import Callable, Iterable
from importlib import import_module
from pydoc import ErrorDuringImport, locate

_KEY = re.compile(r'^( *)(?:- )?Parser key "([^"]+)":', re.MULTILINE)
_CLASS = re.compile(r"Problem with given class_path '([^']+)':\s*(.+)")
_NOT_TAKEN = re.compile(r"Option '([^']+)' is not accepted")
_NOT_KNOWN = re.compile(r".*does not accept option '([^']+)'")
_NO_CLASS = re.compile(r"Expected a dot import path string|Not a valid subclass of|is not iterable")
_OTHER_CLASS = re.compile(r"Import path (?:(\S+) )?does not correspond to a subclass of (\w+)")
_TYPE = re.compile(
    r"Expected an? (?!dot |path )(<class '[^']+'>|typing\.Literal\[.+?\](?=\.? |\.?$)|[^\s.]+)", re.MULTILINE
)
_GOT = re.compile(r"Got value: (.*)|^ *Given value: (.*)", re.MULTILINE)
_NESTED = re.compile(r"NestedArg\(key='([^']+)', val=(.*)\)")
_REQUIRED = re.compile(r"the following arguments are required: (.+)|.*Key \"(\S+)\" is required")
_UNLOADED = re.compile(r"Parser key \"([^\"]+)\":\s*Unable to load config '([^']*)'")
_NO_VALUE = re.compile(r"argument (?:-\w/)?(--\w+): expected (?:one|at least one) argument")
_MADE = re.compile(r"Does not validate against any of the Union subtypes\n.*\nErrors:\n  - (.+(?:\n {4,}.+)*)")
_STRAY = "unrecognized arguments: "
_SHOWN = 80

Place = Callable[..., str]


def explained(message: str, known: Iterable[str], place: Place) -> str:
    """One paragraph of what jsonargparse says.

    Args:
        message: What it says. Of what is not known here, the words are kept, in one line.
        known: The settings that there are, by path, for those that are close to an unknown one.
        place: Where a setting stands, as ``config_files.place`` says it.
    """
    if message.startswith(_STRAY):
        return _stray(message.removeprefix(_STRAY), known)
    if required := _REQUIRED.match(message):
        names = [name.rpartition(".")[2] for name in (required[1] or required[2]).split(", ")]
        return f"Found no {' and no '.join(names)}, expected it among the settings. Name a file of them by --config."
    if unknown := _NOT_KNOWN.match(message):
        found = _joined("Found the setting", unknown[1], place(unknown[1]))
        return f"{found}, expected one that there is{_close([unknown[1]], known)}"
    if bare := _NO_VALUE.match(message):
        return f"Found no value after {bare[1]} or a setting of it, expected one. Add it."
    if unloaded := _UNLOADED.match(message):
        return f"Found no file {unloaded[2]!r} for {unloaded[1]}, expected one of settings. Correct the path."
    if made := _MADE.match(message):  # the classes of a Union are tried again when one is made: what the first says
        return explained(textwrap.dedent(made[1]), known, place)
    return _of_value(message, place) or " ".join(message.split())


def _of_value(message: str, place: Place) -> str | None:
    """What is wrong with the value of a setting, or with a setting of the class that is its value."""
    path, details = _innermost(message)
    owner = _CLASS.search(message)
    if owner and (unknown := _NOT_TAKEN.match(owner[2])):
        where = place(f"{path}.init_args.{unknown[1]}") or place(f"{path}.{unknown[1]}")
        found = _joined(f"Found the setting {unknown[1]} of {owner[1]} ({path})", where)
        return f"{found}, expected one that it takes{_close([unknown[1]], _parameters(owner[1]))}"
    if owner and not _KEY.match(owner[2]):
        return _no_such_class(path, owner[1], owner[2].rstrip("."), place)
    value = _value(details)
    if other := _OTHER_CLASS.search(details):
        name = other[1] or value
        found = _joined(f"Found {name} for {path}", place(f"{path}.class_path", name))
        return f"{found}, expected a {other[2]} or a class made of it. Name another."
    types = dict.fromkeys(map(_plain, _TYPE.findall(details)))
    if not (types or _NO_CLASS.search(details)):
        return None
    null = [name for name in types if name == "null"]
    others = [name for name in types if name != "null"]
    of_class = ["the import path of a class"] if _NO_CLASS.search(details) else []
    *rest, last = [*others, *of_class, *null]
    head, _, own = path.rpartition(".")
    where = place(path, value) or place(f"{head}.init_args.{own}", value)
    expected = f"{', '.join(rest)} or {last}" if rest else last
    found = f"Found {value} for {path}" if path else f"Found {value}"
    return f"{_joined(found, where)}, expected {expected}. Correct it."


def _stray(given: str, known: Iterable[str]) -> str:
    names = [word.lstrip("-").partition("=")[0] for word in given.split() if word.startswith("-")]
    if not names:
        return f"Found {given}, expected settings, as --name value. Take it out, or put it in quotes if it is a value."
    return f"Found {given}, expected settings that there are{_close(names, known, '--')}"


def _innermost(message: str) -> tuple[str, str]:
    """The path of the setting that a message is of, through the classes around it, and what is said of that alone."""
    path: list[str] = []
    details, depth = message, -1
    for found in _KEY.finditer(message):
        if len(found[1]) <= depth:
            break
        path.append(found[2])
        details, depth = message[found.end() :], len(found[1])
    return ".".join(path), details


def _no_such_class(path: str, name: str, reason: str, place: Place) -> str:
    package, _, own = name.rpartition(".")
    try:
        near = difflib.get_close_matches(own, dir(import_module(package)), 1) if package else []
    except ImportError:
        near = []
    instead = f"Did you mean {package}.{near[0]}?" if near else "Correct the path, or install what has it."
    found = _joined(f"Found no class {name} for {path}", place(f"{path}.class_path", name))
    return f"{found} ({reason}), expected one to import. {instead}"


def _parameters(owner: str) -> list[str]:
    """What a class takes, with what it hands to those it is made of."""
    try:
        found = locate(owner)
    except ErrorDuringImport:
        return []
    of = inspect.getmro(found) if inspect.isclass(found) else ()
    return list(dict.fromkeys(name for cls in of[:-1] for name in inspect.signature(cls).parameters))


def _close(names: Iterable[str], known: Iterable[str], before: str = "") -> str:
    every = list(known)
    near = [close for name in names for close in _nearest(name, every)]
    if near:
        return f". Did you mean {' or '.join(before + name for name in dict.fromkeys(near))}?"
    return ". --print_config prints those that are set, --help says more."


def _nearest(name: str, known: list[str]) -> list[str]:
    """The setting that is closest in its section, or the section whose name is closest."""
    section, dot, own = name.rpartition(".")
    within = {setting.rpartition(".")[2]: setting for setting in known if setting.rpartition(".")[0] == section}
    if dot and not within:
        sections = sorted({setting.partition(".")[0] for setting in known})
        return difflib.get_close_matches(name.partition(".")[0], sections, 1)
    return [within[close] for close in difflib.get_close_matches(own, within, 1)]


def _joined(*parts: str) -> str:
    return " ".join(filter(None, parts))


def _value(details: str) -> str:
    found = _GOT.search(details)
    if found is None:
        return "something else"
    value = (found[1] or found[2] or "").strip()
    if nested := _NESTED.fullmatch(value):
        value = f"{nested[1]}={nested[2]}"
    return textwrap.shorten(value, _SHOWN, placeholder=" ...") or "nothing"


def _plain(name: str) -> str:
    """A type as people write it."""
    if name.startswith("typing.Literal["):
        return name.removeprefix("typing.Literal[").removesuffix("]")
    short = name.removeprefix("<class '").removesuffix("'>").rpartition(".")[2]
    return {"NoneType": "null", "Iterable": "list"}.get(short, short)
