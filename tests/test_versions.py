"""The versions that are declared, those that are tested, and those that the documentation tells of are the same."""

import configparser
import re
import tomllib
import types
from pathlib import Path

import pytest
import yaml
from helpers import ROOT
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

import lightning_lora

SETS = configparser.ConfigParser()
SETS.read(ROOT / ".ci" / "sets.ini")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def requirements(block: str) -> list[Requirement]:
    """Those in one list of pyproject.toml: the dependencies, or an extra."""
    found = PROJECT["dependencies"] if block == "dependencies" else PROJECT["optional-dependencies"][block]
    return list(map(Requirement, found))


def floor(requirement: Requirement) -> Version | None:
    return next((Version(one.version) for one in requirement.specifier if one.operator == ">="), None)


def test_the_floors_are_the_oldest_set() -> None:
    oldest = {canonicalize_name(name): Version(number) for name, number in SETS["oldest"].items()}
    declared = requirements("dependencies")
    assert len(declared) > 10
    for requirement in declared:
        assert floor(requirement) == oldest[canonicalize_name(requirement.name)], requirement.name
    for requirement in requirements("test"):
        if (least := floor(requirement)) is not None:
            assert least == oldest[canonicalize_name(requirement.name)], requirement.name


@pytest.mark.parametrize("name", SETS.sections())
def test_a_set_is_within_what_is_declared(name: str) -> None:
    for requirement in requirements("dependencies"):
        if requirement.name in SETS[name]:
            assert SETS[name][requirement.name] in requirement.specifier


def test_the_page_has_every_set() -> None:
    page = (ROOT / "docs" / "versions.md").read_text()
    for name in SETS.sections():
        wanted = [SETS[name][package] for package in ("lightning", "transformers", "jsonargparse")]
        cells = re.escape(" | ".join(wanted))
        assert re.search(rf"^\| {name} \|.*\| {cells} \|", page, re.MULTILINE), name


def test_the_version_is_the_same_everywhere() -> None:
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == lightning_lora.__version__
    released = re.findall(r"^## \[(\d[^]]*)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert not released or released[0] == lightning_lora.__version__


def test_all_is_every_extra_that_is_for_users() -> None:
    (whole,) = requirements("all")
    assert whole.name == "lightning-lora"
    assert whole.extras == PROJECT["optional-dependencies"].keys() - {"all", "test", "docs", "lint"}


def test_what_our_code_does_that_is_on_its_way_out_is_an_error() -> None:
    module = types.ModuleType("lightning_lora.made_up")
    for category in ("DeprecationWarning", "FutureWarning", "PendingDeprecationWarning"):
        code = f"import warnings\nwarnings.warn('soon gone', {category})"
        with pytest.raises(Warning, match="soon gone"):
            exec(code, module.__dict__)


def test_the_workflow_for_others_runs_every_set_and_three_systems() -> None:
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "tests.yml").read_text())
    assert workflow["jobs"]["versions"]["strategy"]["matrix"]["set"] == SETS.sections()
    systems = {name.split("-")[0] for name in workflow["jobs"]["tests"]["strategy"]["matrix"]["os"]}
    assert systems == {"ubuntu", "macos", "windows"}
    for job in workflow["jobs"].values():
        for step in job["steps"]:
            program = step.get("run", "").split(" ")[0]
            assert not program.startswith(".ci/") or Path(ROOT, program).exists()
