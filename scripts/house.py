"""Look at the house: our sizes beside those of the field's best code. For looking at, not for failing.

python scripts/house.py [num_largest=10]

The others were measured in the same way, at the commits named here; vendored folders left out.
"""

import ast
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from reward.config import Config, parse

ROOT = Path(__file__).parents[1]
SOURCE_FOLDERS = ("align", "reward", "sandbox", "scripts")
MIN_DUPLICATE_LINES = 12
"""Shorter functions may look alike by chance."""

_ROW = "{:24}{:>6}{:>9}{:>19}{:>23}{:>7}{:>6}"
_FUNCTION = ast.FunctionDef | ast.AsyncFunctionDef
_NESTING = ast.If | ast.For | ast.AsyncFor | ast.While | ast.With | ast.AsyncWith | ast.Try | ast.Match


class HouseConfig(Config):
    """Print the sizes of our files and functions beside the field's best."""

    num_largest: int = 10
    """Length of each list of largest things."""


@dataclass(frozen=True, kw_only=True)
class Function:
    """A function or method: where it stands, lines from `def` to end, nesting, body as a syntax tree."""

    place: str
    num_lines: int
    depth: int
    body: str


@dataclass(frozen=True, kw_only=True)
class File:
    """A Python file."""

    path: Path
    num_lines: int
    functions: tuple[Function, ...]


@dataclass(frozen=True)
class Sizes:
    """What is compared; by position, so that `FIELD` below reads as a table."""

    name: str
    num_files: int
    num_lines: int
    file_lines: tuple[int, int, int]
    """Median, 90th percentile, longest."""
    function_lines: tuple[int, int, int]
    """Median, 95th percentile, longest."""
    duplicate_percent: float
    """Share of function lines in functions whose body is that of another."""
    test_ratio: float
    """Lines of tests over lines of source."""


FIELD = (
    Sizes("smalldiffusion 7f607a8", 13, 1224, (56, 161, 241), (5, 24, 78), 0, 0.27),
    Sizes("k-diffusion 4601bf0", 23, 4688, (114, 459, 763), (5, 28, 489), 0.3, 0),
    Sizes("edm2 4bf8162", 20, 5028, (258, 463, 495), (6, 48, 185), 0, 0),
    Sizes("nanochat 92d63d4", 29, 6744, (223, 460, 605), (10, 65, 147), 0, 0.16),
    Sizes("DPO reference f8b8c0f", 4, 1225, (281, 386, 545), (13, 64, 122), 0, 0),
    Sizes("torchtitan b5bcd76", 343, 103208, (207, 633, 2452), (16, 85, 593), 0.6, 0.46),
    Sizes("trl f2cd577", 300, 80413, (111, 705, 3375), (15, 125, 894), 3.4, 0.46),
)


def read_tree(root: Path, folders: Iterable[str]) -> list[File]:
    """Measure every Python file below the folders; paths are told from the root."""
    return [_read_file(path, root) for folder in folders for path in sorted((root / folder).rglob("*.py"))]


def _read_file(path: Path, root: Path) -> File:
    text = path.read_text(encoding="utf-8")
    nodes = [node for node in ast.walk(ast.parse(text)) if isinstance(node, _FUNCTION)]
    path = path.relative_to(root)
    return File(
        path=path,
        num_lines=len(text.splitlines()),
        functions=tuple(_read_function(node, path) for node in nodes),
    )


def _read_function(node: _FUNCTION, path: Path) -> Function:
    assert node.end_lineno is not None  # ast.parse always tells it
    return Function(
        place=f"{path}:{node.lineno} {node.name}",
        num_lines=node.end_lineno - node.lineno + 1,
        depth=_depth(node.body),
        body="\n".join(map(ast.dump, node.body)),
    )


def _depth(statements: Iterable[ast.AST]) -> int:
    return max((_depth_of(statement) for statement in statements), default=0)


def _depth_of(node: ast.AST) -> int:
    """Count blocks inside blocks: an `elif` is no deeper than its `if`, an inner function counts alone."""
    if isinstance(node, _FUNCTION | ast.ClassDef):
        return 0
    if isinstance(node, ast.If) and len(node.orelse) == 1 and isinstance(node.orelse[0], ast.If):
        return max(1 + _depth(node.body), _depth_of(node.orelse[0]))
    return isinstance(node, _NESTING) + _depth(ast.iter_child_nodes(node))


def duplicates(files: Sequence[File]) -> list[Function]:
    """Functions of at least `MIN_DUPLICATE_LINES` whose body is, as a syntax tree, that of another."""
    functions = [f for file in files for f in file.functions if f.num_lines >= MIN_DUPLICATE_LINES]
    seen = Counter(function.body for function in functions)
    return [function for function in functions if seen[function.body] > 1]


def measure(name: str, source: Sequence[File], tests: Sequence[File]) -> Sizes:
    """Sum up what is compared."""
    num_lines = sum(file.num_lines for file in source)
    function_lines = [function.num_lines for file in source for function in file.functions]
    return Sizes(
        name,
        len(source),
        num_lines,
        _percentiles([file.num_lines for file in source], 90),
        _percentiles(function_lines, 95),
        100 * sum(function.num_lines for function in duplicates(source)) / sum(function_lines),
        sum(file.num_lines for file in tests) / num_lines,
    )


def _percentiles(values: Sequence[int], high: int) -> tuple[int, int, int]:
    median, upper, top = np.percentile(values, [50, high, 100])
    return round(median), round(upper), round(top)


def report(num_largest: int) -> Iterator[str]:
    """Give the lines to print."""
    source, tests = read_tree(ROOT, SOURCE_FOLDERS), read_tree(ROOT, ["tests"])
    yield _ROW.format("", "files", "lines", "file med/p90/max", "function med/p95/max", "dup %", "test")
    for sizes in (measure("Safelight", source, tests), *FIELD):
        yield _row(sizes)
    functions = [function for file in source for function in file.functions]
    rankings = {
        "largest files": [(file.num_lines, str(file.path)) for file in source],
        "longest functions": [(function.num_lines, function.place) for function in functions],
        "deepest nesting": [(function.depth, function.place) for function in functions],
        "duplicates": [(function.num_lines, function.place) for function in duplicates(source)],
    }
    for title, sized in rankings.items():
        yield f"\n{title}"
        largest = sorted(sized, reverse=True)[:num_largest]
        yield from (f"  {size:5}  {name}" for size, name in largest) if largest else ("   none",)


def _row(sizes: Sizes) -> str:
    return _ROW.format(
        sizes.name,
        sizes.num_files,
        sizes.num_lines,
        "/".join(map(str, sizes.file_lines)),
        "/".join(map(str, sizes.function_lines)),
        f"{sizes.duplicate_percent:.1f}",
        f"{sizes.test_ratio:.2f}",
    )


def main(argv: Sequence[str]) -> None:
    """Print the comparison."""
    print("\n".join(report(parse(HouseConfig, argv, prog="python scripts/house.py").num_largest)))


if __name__ == "__main__":
    main(sys.argv[1:])
