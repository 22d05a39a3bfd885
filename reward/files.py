"""Files that data names, files that are written whole, and records in JSON.

A name found in data may lead anywhere. Here it is held inside its folder twice: as it is spelled, and as
the file system resolves it, links followed.
"""

import os
import re
import secrets
from collections.abc import Generator, Iterable
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from pydantic import TypeAdapter

T = TypeVar("T")
_SINGLE = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9_.-]*")


class DataError(ValueError):
    """Data that cannot be used: the file, row and field, what was found, and what was expected."""


def relative(name: str) -> str:
    """Give a relative name in its plain form: `./a//b.mp4` is `a/b.mp4`.

    Raises: DataError: it is empty, absolute, climbs with `..`, or holds a backslash or an unprintable sign.
    """
    parts = [part for part in name.split("/") if part not in ("", ".")]
    if not parts or name[0] == "/" or ".." in parts or "\\" in name or not name.isprintable():
        raise DataError(f"expected a relative path that stays inside its folder, got {name!r}")
    return "/".join(parts)


def single(name: str) -> str:
    """Give a name that can safely be one file or folder.

    Raises: DataError: it has other signs than letters, digits, `_`, `-` and, not in front, `.`.
    """
    if not _SINGLE.fullmatch(name):
        raise DataError(f"expected a name of letters, digits, '_', '-' and '.', got {name!r}")
    return name


def absent(paths: Iterable[Path], root: Path) -> set[Path]:
    """Give those paths under `root` that are no file; each folder is listed once, however many it holds.

    Raises: DataError: a link leads outside `root`.
    """
    wanted: dict[Path, list[Path]] = {}
    for path in paths:
        wanted.setdefault(path.parent, []).append(path)
    home = root.resolve()
    return {path for folder, inside in wanted.items() for path in _absent_in(folder, inside, home)}


def _absent_in(folder: Path, paths: list[Path], home: Path) -> Iterable[Path]:
    _require_inside(folder, home)
    try:
        with os.scandir(folder) as entries:
            found = {entry.name: entry for entry in entries}
    except (FileNotFoundError, NotADirectoryError):
        return paths
    for path in paths:
        if path.name in found and found[path.name].is_symlink():
            _require_inside(path, home)
    return [path for path in paths if path.name not in found or not found[path.name].is_file()]


def _require_inside(path: Path, home: Path) -> None:
    real = path.resolve()
    if not real.is_relative_to(home):
        raise DataError(f"{path}: a link leads to {real}, outside {home}; put the file itself there")


def read_json(type_: type[T], path: Path) -> T:
    """Read a record that was written as JSON.

    Raises: DataError: it cannot be read, or is another.
    """
    try:
        return TypeAdapter(type_).validate_json(path.read_bytes())
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read as {type_.__name__}: {error}; make it again") from error


def require_folder(path: Path) -> None:
    """Check that a file or folder can be put in its place.

    Raises: DataError: its folder does not exist.
    """
    if not path.parent.is_dir():
        raise DataError(f"{path}: its folder does not exist; make it first")


@contextmanager
def replacing(path: Path) -> Generator[Path]:
    """A new file beside `path` that takes its place whole when the block ends, or not at all.

    Raises: DataError: the folder does not exist.
    """
    require_folder(path)
    new = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        yield new
        with new.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(new, path)
    finally:
        new.unlink(missing_ok=True)
