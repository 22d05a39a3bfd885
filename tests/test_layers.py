"""The ladder of ARCHITECTURE.md is read from the document itself, so that it cannot rot."""

import ast
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DOCUMENT = ROOT / "ARCHITECTURE.md"
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())

MAY_USE = {
    "reward": {"reward"},
    "align": {"align", "reward"},
    "sandbox": {"sandbox", "reward"},
    "scripts": {"reward", "align"},
}
KINDS = ("math", "part", "program")


@dataclass(frozen=True, kw_only=True)
class Ladder:
    kinds: dict[str, str]
    """Module -> math, part or program."""
    formats: frozenset[str]
    """What the sandbox may use of `reward`."""
    exceptions: frozenset[tuple[str, str]]
    """Imports, (importer, imported), that the ladder would forbid."""


def read_ladder(document: str) -> Ladder:
    """Read the fenced block: lines of a word and what it is said of."""
    (block,) = re.findall(r"```ladder\n(.*?)```", document, re.DOTALL)
    lines = [line.split(maxsplit=1) for line in block.splitlines()]
    assert {word for word, _ in lines} <= {*KINDS, "formats", "except"}
    return Ladder(
        kinds={module: kind for kind, modules in lines if kind in KINDS for module in modules.split()},
        formats=frozenset(module for word, names in lines if word == "formats" for module in names.split()),
        exceptions=frozenset(tuple(names.split(" -> ")) for word, names in lines if word == "except"),
    )


def existing_modules() -> set[str]:
    paths = (path for package in MAY_USE for path in (ROOT / package).rglob("*.py"))
    return {".".join(path.relative_to(ROOT).with_suffix("").parts) for path in paths if path.stem != "__init__"}


def imports(source: str, modules: set[str]) -> Iterator[str]:
    """Ours among the modules that a source imports anywhere, lazily included."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom):
            assert node.module is not None, "imports are absolute"
            names = {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
        elif isinstance(node, ast.Import):
            names = {alias.name for alias in node.names}
        else:
            continue
        yield from sorted(names & modules)


def problem(importer: str, imported: str, ladder: Ladder) -> str | None:
    """Why an import is against the ladder, or None."""
    package, other = importer.split(".")[0], imported.split(".")[0]
    if (importer, imported) in ladder.exceptions:
        return None
    if other not in MAY_USE[package]:
        return f"{package} may not use {other}"
    if package == "sandbox" and other == "reward" and imported not in ladder.formats:
        return "the sandbox may use only the formats"
    kind, other_kind = ladder.kinds[importer], ladder.kinds[imported]
    if other_kind == "program":
        return "nothing uses a program"
    if KINDS.index(kind) < KINDS.index(other_kind):
        return f"{kind} may not use a {other_kind}"
    return None


LADDER = read_ladder(DOCUMENT.read_text())


def test_the_ladder_lists_exactly_the_modules_that_exist():
    assert set(LADDER.kinds) == existing_modules()


@pytest.mark.parametrize("importer", sorted(LADDER.kinds))
def test_no_module_imports_upwards(importer: str):
    source = (ROOT / importer.replace(".", "/")).with_suffix(".py").read_text()
    for imported in imports(source, set(LADDER.kinds)):
        assert problem(importer, imported, LADDER) is None, f"{importer} imports {imported}"


def test_every_exception_is_used():
    for importer, imported in LADDER.exceptions:
        source = (ROOT / importer.replace(".", "/")).with_suffix(".py").read_text()
        assert imported in imports(source, set(LADDER.kinds))


EXAMPLE = read_ladder(
    """
```ladder
program  scripts.run
part     align.policy  sandbox.world
math     align.flow
part     reward.model  reward.video
math     reward.flash
formats  reward.video
except   reward.flash -> reward.video
```
"""
)


@pytest.mark.parametrize(
    ("importer", "imported", "allowed"),
    [
        ("scripts.run", "align.policy", True),
        ("align.policy", "align.flow", True),
        ("align.policy", "reward.model", True),
        ("sandbox.world", "reward.video", True),
        ("reward.flash", "reward.video", True),
        ("reward.model", "align.flow", False),
        ("align.flow", "align.policy", False),
        ("align.policy", "scripts.run", False),
        ("align.policy", "sandbox.world", False),
        ("scripts.run", "sandbox.world", False),
        ("sandbox.world", "align.flow", False),
        ("sandbox.world", "reward.model", False),
        ("reward.flash", "reward.model", False),
    ],
)
def test_the_rules_by_example(importer: str, imported: str, allowed: bool):
    assert (problem(importer, imported, EXAMPLE) is None) == allowed


@pytest.mark.parametrize(
    "source",
    [
        "import reward.video",
        "from reward import video",
        "from reward.video import read",
        "def f():\n    import reward.video",
    ],
)
def test_every_spelling_of_an_import_is_seen(source: str):
    assert list(imports(source, {"reward.video"})) == ["reward.video"]


def contracts() -> list[dict]:
    return PYPROJECT["tool"]["importlinter"]["contracts"]


def test_import_linter_finds_no_broken_contract():
    command = [Path(sys.executable).with_name("lint-imports"), "--no-logo", "--no-cache"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout


def test_the_contracts_say_the_same_as_the_ladder():
    ladders = {c["containers"][0]: c["layers"] for c in contracts() if "containers" in c}
    for package, layers in ladders.items():
        told = [{f"{package}.{name}" for name in layer.split(" : ")} for layer in layers]
        # import-linter's layers hold files and folders of the package, not what is inside a folder.
        by_kind = [
            {".".join(m.split(".")[:2]) for m, k in LADDER.kinds.items() if k == kind and m.startswith(f"{package}.")}
            for kind in KINDS
        ]
        assert told == [modules for modules in reversed(by_kind) if modules]
    ignored = {tuple(pair.split(" -> ")) for c in contracts() for pair in c.get("ignore_imports", ())}
    assert ignored == LADDER.exceptions
    (kept_from_sandbox,) = [c["forbidden_modules"] for c in contracts() if c["type"] == "forbidden"]
    assert set(kept_from_sandbox) == {m for m in LADDER.kinds if m.startswith("reward.")} - LADDER.formats


def test_shapes_are_checked_in_every_math_module():
    options = shlex.split(PYPROJECT["tool"]["pytest"]["ini_options"]["addopts"])
    (checked,) = (o.removeprefix("--jaxtyping-packages=").split(",") for o in options if "jaxtyping" in o)
    assert checked == [*sorted(m for m, kind in LADDER.kinds.items() if kind == "math"), "beartype.beartype"]
