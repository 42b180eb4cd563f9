"""Which weights of its layers a model's code reads, where it would else call the layers."""

import dis
import inspect
from collections.abc import Iterator, Mapping
from functools import cache
from types import CodeType, FunctionType
from typing import Any, NamedTuple

from torch import nn

from lightning_lora.layers import LoraLayer
from lightning_lora.layers.adapted_class import base_class

# What is asked of a weight so says nothing of its values.
_ABOUT = {"device", "dim", "dtype", "element_size", "grad", "is_cuda", "is_meta", "layout", "ndim", "numel"}
_ABOUT |= {"requires_grad", "shape", "size", "stride"}
_ASKING = {"getattr", "hasattr", "id", "isinstance", "len", "type"}


class Read(NamedTuple):
    """A parameter of a layer that the code of another module reads.

    Attributes:
        reader: Name of the module whose forward reads it.
        parameter: The parameter's name, relative to the reader.
        is_called: Whether code calls the layer too, or hands it on.
    """

    reader: str
    parameter: str
    is_called: bool


def weight_reads(names: Mapping[str, nn.Module]) -> dict[str, list[Read]]:
    """By their full names, the parameters of submodules that forwards read by name.

    Followed are the attributes of ``self`` in forward, and in the methods of ``self`` that it calls: what is read under
    another name (``layer = self.proj; layer.weight``) is not seen.

    Args:
        names: All modules of a model, by name.
    """
    found: dict[str, list[Read]] = {}
    used: set[str] = set()
    for name, module in names.items():
        cls = base_class(module) if isinstance(module, LoraLayer) else type(module)
        # Torch's own read weights where all else is as in their layers, and are switched to the plain way.
        if cls.__module__.startswith(("torch.nn.modules.", "torch.ao.")):
            continue
        loads = _loads_of(cls)  # type: ignore[arg-type]
        used |= {f"{name}.{path}".lstrip(".") for path in loads.whole}
        for path in loads.values:
            if "." in path and path.rpartition(".")[2] in _parameters_at(module, path.rpartition(".")[0]):
                found.setdefault(f"{name}.{path}".lstrip("."), []).append(Read(name, path, False))
    return {
        full_name: [read._replace(is_called=full_name.rpartition(".")[0] in used) for read in reads]
        for full_name, reads in found.items()
    }


def _parameters_at(module: nn.Module, path: str) -> Mapping[str, Any]:
    holder: Any = module
    for part in path.split("."):
        holder = vars(holder).get("_modules", {}).get(part)
        if holder is None:
            return {}
    found: Mapping[str, Any] = holder._parameters
    return found


class _Loads(NamedTuple):
    """Paths of attributes of ``self`` that code loads: to the end of what it follows, and for their values."""

    whole: frozenset[str]
    values: frozenset[str]


@cache
def _loads_of(cls: type) -> _Loads:
    whole: set[str] = set()
    values: set[str] = set()
    seen: set[str] = set()
    waiting = ["forward"]
    while waiting:
        name = waiting.pop()
        if name not in seen:
            seen.add(name)
            for chain, is_asked in _chains_in_method(cls, name):
                if is_asked:
                    continue
                waiting.append(chain[0])
                whole.add(".".join(chain[:-1] if chain[-1] in ("forward", "__call__") else chain))
                values |= {
                    ".".join(chain[:end])
                    for end in range(2, len(chain) + 1)
                    if not (end < len(chain) and chain[end] in _ABOUT)
                }
    return _Loads(frozenset(whole), frozenset(values))


def _chains_in_method(cls: type, name: str) -> Iterator[tuple[list[str], bool]]:
    for base in cls.__mro__:
        method = vars(base).get(name)
        if base is nn.Module or not isinstance(method, FunctionType):
            continue
        codes = [each.__code__ for each in _wrapped(method)]
        for code in codes:
            yield from _chains(code, code.co_varnames[0] if code.co_argcount else "")
        if not any("super" in code.co_names for code in codes):
            return


def _wrapped(function: Any) -> list[FunctionType]:
    """A function, and those that it was decorated around."""
    found = [function, inspect.unwrap(function)]
    found += inspect.getclosurevars(function).nonlocals.values()
    return [each for each in {id(f): f for f in found}.values() if isinstance(each, FunctionType)]


def _chains(code: CodeType, me: str) -> Iterator[tuple[list[str], bool]]:
    """The attributes of attributes of ``self`` that code loads, and whether it only asks about them."""
    chain: list[str] | None = None
    is_asked = False
    before = ""
    for instruction in dis.get_instructions(code):
        name = instruction.argval
        if instruction.opname in ("LOAD_ATTR", "LOAD_METHOD") and chain is not None:
            chain.append(str(name))
            continue
        if chain:
            yield chain, is_asked
        chain = None
        # Python 3.13 loads two names at once.
        loaded = name[-1] if isinstance(name, tuple) and name else name
        if instruction.opname.startswith(("LOAD_FAST", "LOAD_DEREF")) and loaded == me:
            chain, is_asked = [], before in _ASKING
        if instruction.opname != "PUSH_NULL":
            before = str(name) if instruction.opname in ("LOAD_GLOBAL", "LOAD_NAME") else ""
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _chains(constant, me)
