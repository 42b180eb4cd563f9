"""What a pickle asks for: looked at before a reader makes it, so that a small file cannot take much memory or time.

A reader that makes plain types alone still does what a file says: ``bytearray(10**12)``, a list of lists of lists that
are shared at each level, or a place in its own memory that no machine has.
"""

import io
import pickle
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from collections.abc import Callable
from typing import Any, ClassVar

_DEEPEST = 200  # how deep containers may be in one another
_FREE, _PER_BYTE = 100_000, 2  # containers, each as often as it is found, that any file and each byte of one may have

# What makes plain types out of plain types. Everything else is a tensor's, or is left to the reader as it is.
_CONTAINERS = ("collections.OrderedDict", "collections.Counter", "builtins.set", "torch.Size", "builtins.bytearray")
_ENCODE = "_codecs.encode"  # as pickle writes bytes
_TENSORS = ("torch._utils.", "torch._tensor.")
_KINDS_OF_TORCH = ("torch", "torch.cuda", "torch.sparse", "torch.cuda.sparse", "torch.storage")


class _Made:
    """Stands for an object of any kind: holds what it would be made of, if it is one that holds something."""

    name = ""
    parts: list[Any]

    def __new__(cls, *args: Any) -> "_Made":
        made = object.__new__(cls if isinstance(cls, type) else _Made)
        made.parts = []
        if made.is_kept:
            _require_harmless(made.name, args)
            made.parts += args
        return made

    @property
    def is_kept(self) -> bool:
        return self.name in ("", _ENCODE, *_CONTAINERS) or self.name.startswith(_TENSORS)

    def __call__(self, *args: Any) -> "_Made":
        return _Made()

    def __setstate__(self, state: Any) -> None:
        self.extend([state])

    def __setitem__(self, key: Any, value: Any) -> None:
        self.extend([key, value])

    def append(self, value: Any) -> None:
        self.extend([value])

    def extend(self, values: Any) -> None:
        if self.is_kept:
            self.parts += values

    update = extend


class Unpickler(pickle._Unpickler):
    """Reads a pickle in Python, where what is remembered takes no more memory than it has."""

    append: Callable[[Any], None]  # which those of pickle use, too
    pop_mark: Callable[[], list[Any]]

    # All but that of an object which no torch writes, and for which memory is taken before it is read.
    dispatch: ClassVar[dict[int, Any]] = {
        code: load for code, load in pickle._Unpickler.dispatch.items() if code != pickle.BYTEARRAY8[0]
    }


class _Looker(Unpickler):
    """Makes nothing: not even a dict, whose keys would have to be looked at as a whole."""

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file, encoding="bytes")
        self._classes: dict[str, type[_Made]] = {}

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in NAME_MAPPING:
            module, name = NAME_MAPPING[module, name]
        module = IMPORT_MAPPING.get(module, module)
        full = f"{module}.{name}"
        if module in _KINDS_OF_TORCH and name.endswith(("Tensor", "Storage")):
            return full  # can be named, and not be called
        return self._classes.setdefault(full, type("_Made", (_Made,), {"name": full}))

    def persistent_load(self, pid: Any) -> Any:
        return _Made()

    def _empty(self) -> None:
        self.append(_Made())

    def _full(self) -> None:
        items = self.pop_mark()
        self.append(_Made(*items))

    dispatch: ClassVar[dict[int, Any]] = {
        **Unpickler.dispatch,
        pickle.EMPTY_DICT[0]: _empty,
        pickle.EMPTY_SET[0]: _empty,
        pickle.DICT[0]: _full,
        pickle.FROZENSET[0]: _full,
    }


def require_modest(content: bytes, pickles: int = 1) -> None:
    """Require pickles that ask for no more than they have.

    Args:
        content: What begins with them.
        pickles: How many there are.

    Raises:
        RuntimeError: If it is damaged, or asks for more.
    """
    try:
        file = io.BytesIO(content)
        found = [_Looker(file).load() for _ in range(pickles)]
    except RuntimeError:
        raise
    except Exception as error:  # of whatever kind a damaged pickle raises, of which nothing is made
        raise RuntimeError(f"its contents are damaged ({type(error).__name__}: {error}).") from error
    _require_countable(found, _FREE + _PER_BYTE * len(content))


def _require_harmless(name: str, args: tuple[Any, ...]) -> None:
    if name == _ENCODE or (name == "builtins.bytearray" and len(args) == 2):
        harmless = len(args) == 2 and isinstance(args[0], str) and args[1] == "latin1"
    elif name in _CONTAINERS:
        harmless = all(isinstance(each, (list, tuple)) or _is_made_of_plain(each) for each in args)
    elif name == "torch._tensor._rebuild_from_type_v2":  # which calls what it is given
        harmless = bool(args) and str(getattr(args[0], "name", "")).startswith(_TENSORS)
    else:
        harmless = True
    if not harmless:
        raise RuntimeError(f"it asks for a {name} that torch.save does not write.")


def _is_made_of_plain(value: Any) -> bool:
    return isinstance(value, _Made) and value.name in ("", _ENCODE)


def _require_countable(found: Any, limit: int) -> None:
    """Require that what holds itself, or is shared at many levels, does not seem to be more than a reader can walk."""
    waiting, counted = [(found, 0)], 0
    while waiting:
        each, depth = waiting.pop()
        parts = each.parts if isinstance(each, _Made) else each
        inside = [(part, depth + 1) for part in parts if isinstance(part, (_Made, list, tuple))]
        counted += len(inside)
        if counted > limit or depth > _DEEPEST:
            raise RuntimeError("what it holds is in itself, or in one another more often than any checkpoint's.")
        waiting += inside
