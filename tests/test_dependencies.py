"""What we import is what we declare, and what we declare is pinned."""

import ast
import functools
import re
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parents[1]
OURS = {"align", "reward", "sandbox", "scripts"}
PYPROJECT = (ROOT / "pyproject.toml").read_text()
PROJECT = tomllib.loads(PYPROJECT)["project"]
CONSTRAINTS = [
    Requirement(line) for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")
]
DECLARED = [
    Requirement(text)
    for group in (PROJECT["dependencies"], *PROJECT["optional-dependencies"].values())
    for text in group
]


@functools.cache
def imported_distributions() -> set[str]:
    names: set[str] = set()
    for path in (path for package in OURS for path in (ROOT / package).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                names |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                names.add(node.module.split(".")[0])
    distributions = packages_distributions()
    third_party = names - OURS - set(sys.stdlib_module_names)
    return {canonicalize_name(name) for module in third_party for name in distributions[module]}


def test_every_import_is_declared():
    assert imported_distributions() - {"pydantic-core"} <= {canonicalize_name(r.name) for r in DECLARED}


@pytest.mark.parametrize("name", [Requirement(text).name for text in PROJECT["dependencies"]])
def test_every_dependency_is_imported_or_says_why_not(name: str):
    reason = re.search(rf'^ *"{name}[^"]*", # \w', PYPROJECT, re.MULTILINE)
    assert canonicalize_name(name) in imported_distributions() or reason


@pytest.mark.parametrize("requirement", DECLARED, ids=lambda requirement: requirement.name)
def test_every_requirement_is_bounded_and_pinned_within_its_bounds(requirement: Requirement):
    operators = {specifier.operator for specifier in requirement.specifier}
    assert operators in ({">=", "<"}, {"=="})
    (pin,) = [c for c in CONSTRAINTS if canonicalize_name(c.name) == canonicalize_name(requirement.name)]
    (exact,) = pin.specifier
    assert requirement.specifier.contains(exact.version)


@pytest.mark.parametrize("pin", CONSTRAINTS, ids=lambda pin: pin.name)
def test_every_pin_is_exact_and_holds_on_any_device(pin: Requirement):
    (exact,) = pin.specifier
    assert exact.operator == "=="
    assert Version(exact.version).local is None
    assert pin.url is None
