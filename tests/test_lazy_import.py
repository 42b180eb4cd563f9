"""What ``import lightning_lora`` brings in, and under which names its parts are found, today's and earlier ones."""

import ast
import importlib
import inspect
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest

import lightning_lora

ROOT = Path(lightning_lora.__file__).parents[1]
HEAVY = "{'torch', 'lightning', 'numpy', 'transformers', 'rich', 'jsonargparse'}"


def fresh(code: str) -> str:
    """What code prints in an interpreter of its own."""
    command = [sys.executable, "-c", code]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout.strip()


FUNCTIONS = ["merge", "inject", "eject", "param_groups"]
MODULES = ["config", "callback", "callbacks", "model", "formats", "tasks", "report"]
MOVED = [
    ("report", "BeforeAfter"),
    ("curve", "LearningCurve"),
    ("predictions", "PredictionWriter"),
    ("reference", "BaseAsReference"),
    ("export", "save_merged"),
    ("tasks.modes", "evaluating"),
]
STAR = (
    "from lightning_lora import *; names = __import__('lightning_lora').__all__; "
    "print(sorted(set(globals()) & set(names)) == names)"
)


@pytest.fixture(scope="module")
def printed() -> dict[str, str]:
    """What each code prints as the first that imports the package, in one interpreter that has what it needs."""
    codes = [STAR]
    codes += [
        f"import lightning_lora.model.{name}; from lightning_lora import {name}; print(type({name}).__name__)"
        for name in FUNCTIONS
    ]
    codes += [f"import lightning_lora; print(lightning_lora.{name}.__name__)" for name in MODULES]
    codes += [f"from lightning_lora.{module} import {name}; print({name}.__name__)" for module, name in MOVED]
    anew = "[sys.modules.pop(name) for name in list(sys.modules) if name.split('.')[0] == 'lightning_lora']"
    program = f"import sys\nfor code in {codes!r}:\n    {anew}\n    exec(code, {{}})"
    return dict(zip(codes, fresh(program).splitlines(), strict=True))


def test_import_brings_in_nothing_heavy() -> None:
    assert fresh(f"import sys, lightning_lora; print({HEAVY} & set(sys.modules))") == "set()"


def test_config_brings_in_nothing_heavy() -> None:
    code = "from lightning_lora import LoraConfig; LoraConfig(r=2)"
    assert fresh(f"import sys; {code}; print({HEAVY} & set(sys.modules))") == "set()"


def test_those_who_read_the_source_see_every_name() -> None:
    """The imports for type checkers are those that are done when a name is used, and ``__all__`` has all of them."""
    tree = ast.parse(Path(lightning_lora.__file__).read_text(encoding="utf-8"))
    (block,) = (node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")
    seen = {alias.name: node.module for node in block.body if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert seen == lightning_lora._HOMES  # type: ignore[attr-defined]  # not for type checkers
    assert sorted([*seen, "__version__"]) == lightning_lora.__all__
    for name, home in seen.items():
        assert getattr(importlib.import_module(home), name) is getattr(lightning_lora, name)


def test_names_are_listed_before_they_are_used() -> None:
    assert fresh("import lightning_lora as l; print(set(l.__all__) <= set(dir(l)))") == "True"


def test_star_import_takes_the_public_names(printed: dict[str, str]) -> None:
    assert printed[STAR] == "True"


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_are_not_the_modules_of_their_name(name: str, printed: dict[str, str]) -> None:
    code = f"import lightning_lora.model.{name}; from lightning_lora import {name}; print(type({name}).__name__)"
    assert printed[code] == "function"
    assert inspect.isfunction(getattr(lightning_lora, name))
    assert inspect.ismodule(importlib.import_module(f"lightning_lora.model.{name}"))


@pytest.mark.parametrize("name", MODULES)
def test_modules_are_attributes_as_before(name: str, printed: dict[str, str]) -> None:
    assert printed[f"import lightning_lora; print(lightning_lora.{name}.__name__)"] == f"lightning_lora.{name}"


def test_unknown_names_are_errors() -> None:
    with pytest.raises(AttributeError, match="module 'lightning_lora' has no attribute 'Lora'"):
        lightning_lora.Lora  # type: ignore[attr-defined]  # noqa: B018
    with pytest.raises(ImportError, match="cannot import name 'Lora'"):
        from lightning_lora import Lora  # type: ignore[attr-defined]  # noqa: F401


@pytest.mark.parametrize(("module", "name"), MOVED)
def test_names_of_version_0_1_are_found(module: str, name: str, printed: dict[str, str]) -> None:
    assert printed[f"from lightning_lora.{module} import {name}; print({name}.__name__)"] == name
    old = importlib.import_module(f"lightning_lora.{module}")
    now = getattr(importlib.import_module(f"lightning_lora.{lightning_lora._MOVED[module]}"), name)
    assert getattr(old, name) is now
    assert importlib.util.find_spec(f"lightning_lora.{module}") is not None
    assert pickle.loads(f"clightning_lora.{module}\n{name}\n.".encode()) is now
    with pytest.raises(AttributeError, match=f"module 'lightning_lora.{module}' has no attribute 'other'"):
        old.other  # noqa: B018
    with pytest.raises(ImportError):
        importlib.import_module(f"lightning_lora.{module}.other")


def test_nothing_moved_is_imported_for_it() -> None:
    assert fresh(f"import sys, lightning_lora.report; print({HEAVY} & set(sys.modules))") == "set()"
