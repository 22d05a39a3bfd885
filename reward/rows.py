"""Rows of a data file: `.json` (one array), `.jsonl`, both also gzipped, and `.csv`.

Each value is checked as it is taken out of its row, so that an error can name file, row, field and value.
`null`, an absent optional field and an empty cell all mean "not known": `None`. Rows count from 1.
"""

import csv
import gzip
import io
import json
import textwrap
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from reward import files
from reward.files import DataError

JSON_SUFFIXES = (".json", ".json.gz", ".jsonl", ".jsonl.gz")
SUFFIXES = (*JSON_SUFFIXES, ".csv")

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One object of a data file, or, with a `prefix`, an object inside one."""

    file: Path
    number: int
    values: Mapping[str, Any]
    prefix: str = ""

    def error(self, field: str, expected: str) -> DataError:
        """Describe a value that is not what was expected."""
        got = textwrap.shorten(repr(self.values.get(field)), 80, placeholder=" ...")
        place = f"{self.file}, row {self.number}, {self.prefix}{field}"
        return DataError(f"{place}: expected {expected}, got {got}; correct the row or take it out")

    def require(self, *fields: str) -> None:
        """Raise a DataError for the first field that the row does not have; null is had."""
        for field in fields:
            if field not in self.values:
                known = ", ".join(map(str, self.values)) or "none"
                raise DataError(f"{self.file}, row {self.number}: no field {self.prefix}{field} among {known}")

    def text(self, field: str) -> str | None:
        """Give a text as it stands; an empty one is not known."""
        value = self.values.get(field)
        if value is not None and not isinstance(value, str):
            raise self.error(field, "a text or null")
        return value or None

    def flag(self, field: str) -> bool | None:
        """Give a truth value; numbers and words are none."""
        value = self.values.get(field)
        if value is not None and not isinstance(value, bool):
            raise self.error(field, "true, false or null")
        return value

    def word(self, field: str, meanings: Mapping[str, T]) -> T | None:
        """Give what one of the known words means; capitals make no difference."""
        text = self.text(field)
        if text is None:
            return None
        if text.casefold() not in meanings:
            raise self.error(field, f"{', '.join(map(repr, meanings))} or null")
        return meanings[text.casefold()]

    def name(self, field: str) -> str | None:
        """Give an id that can safely name one file or folder."""
        return self._checked(field, files.single)

    def path(self, field: str) -> str | None:
        """Give a relative path that stays inside its folder, in plain form."""
        return self._checked(field, files.relative)

    def _checked(self, field: str, check: Callable[[str], str]) -> str | None:
        text = self.text(field)
        try:
            return text and check(text)
        except DataError as error:
            raise DataError(f"{self.file}, row {self.number}, {self.prefix}{field}: {error}") from error

    def inner(self, field: str) -> "Row":
        """Give the object inside a field; an empty one for null."""
        value = self.values.get(field)
        if value is None:
            value = {}
        if not isinstance(value, dict):
            raise self.error(field, "an object or null")
        return Row(file=self.file, number=self.number, values=value, prefix=f"{self.prefix}{field}.")


def suffix(path: Path) -> str:
    """Give the ending that says how to read a data file.

    Raises: DataError: it is none of the known ones.
    """
    for known in SUFFIXES:
        if path.name.endswith(known):
            return known
    raise DataError(f"{path}: unknown kind of file; expected a name that ends in {', '.join(SUFFIXES)}")


def read(path: Path) -> Iterator[Row]:
    """Yield the rows of a data file.

    Raises: DataError: the file cannot be read, is broken, or holds something other than objects.
    """
    kind = suffix(path).removesuffix(".gz")
    text = _read_text(path)
    parse = {".json": _parse_json, ".jsonl": _parse_json_lines, ".csv": _parse_csv}[kind]
    for number, values in enumerate(parse(text, path), start=1):
        if not isinstance(values, dict):
            raise DataError(f"{path}, row {number}: expected an object, got {type(values).__name__}")
        yield Row(file=path, number=number, values=values)


def _read_text(path: Path) -> str:
    try:
        content = path.read_bytes()
        return (gzip.decompress(content) if path.suffix == ".gz" else content).decode("utf-8-sig")
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read, {error}; is it complete, and of the kind it says?") from error


def _parse_json(text: str, path: Path) -> list[Any]:
    tree = _loads(text, str(path))
    if not isinstance(tree, list):
        raise DataError(f"{path}: expected one JSON array of objects, got {type(tree).__name__}")
    return tree


def _parse_json_lines(text: str, path: Path) -> Iterator[Any]:
    # not splitlines(): a text may hold U+2028 and its like, which end no line of JSON
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            yield _loads(line, f"{path}, line {number}")


def _loads(text: str, place: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:  # a number of thousands of digits is a ValueError
        raise DataError(f"{place}: not readable as JSON, {error}") from error


def _parse_csv(text: str, path: Path) -> Iterator[dict[str, str | None]]:
    table = csv.reader(io.StringIO(text, newline=""), strict=True)
    try:
        header = next(table, [])
        if len(set(header)) != len(header):
            raise DataError(f"{path}: a column appears twice in {', '.join(header)}")
        for number, cells in enumerate(filter(None, table), start=1):  # blank lines are no rows
            if len(cells) != len(header):
                raise DataError(f"{path}, row {number}: expected {len(header)} cells, got {len(cells)}")
            yield {column: cell or None for column, cell in zip(header, cells, strict=True)}
    except csv.Error as error:
        raise DataError(f"{path}, line {table.line_num}: not readable as CSV, {error}") from error


def write(path: Path, rows: Iterable[Mapping[str, object]]) -> None:
    """Write rows as `.json` or `.jsonl`, gzipped or not: whole or not at all, equal bytes for equal rows.

    Raises: DataError: another ending, or no such folder.
    """
    lines = [json.dumps(row) for row in rows]
    kind = suffix(path)
    if kind == ".csv":
        raise DataError(f"{path}: rows with inner objects are no table; expected .json or .jsonl")
    is_lines = kind.startswith(".jsonl")
    text = "".join(line + "\n" for line in lines) if is_lines else f"[{', '.join(lines)}]"
    content = text.encode()
    with files.replacing(path) as new:
        new.write_bytes(gzip.compress(content, mtime=0) if kind.endswith(".gz") else content)
