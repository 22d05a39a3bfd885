import gzip
import json
from pathlib import Path

import pytest
import tiny_safesora
from hypothesis import given
from hypothesis import strategies as st

from reward import rows
from reward.files import DataError
from reward.rows import Row

ROWS = [{"a": 1, "b": {"c": None}}, {"a": "line\u2028feed\n", "b": [True]}]
LEAVES = st.none() | st.booleans() | st.integers() | st.text()
OBJECTS = st.dictionaries(st.text(), LEAVES | st.lists(LEAVES) | st.dictionaries(st.text(), LEAVES))


def row(**values: object) -> Row:
    return Row(file=Path("x.json"), number=7, values=values, prefix="video_0.")


@pytest.mark.parametrize("name", ["x.json", "x.json.gz", "x.jsonl", "x.jsonl.gz"])
def test_every_spelling_of_json_is_read(tmp_path: Path, name: str):
    path = tiny_safesora.write(tmp_path / name, ROWS)
    assert [(row.number, row.values) for row in rows.read(path)] == [(1, ROWS[0]), (2, ROWS[1])]


@given(found=st.lists(OBJECTS, max_size=4), name=st.sampled_from(rows.JSON_SUFFIXES))
def test_what_is_written_is_read_back(tmp_path_factory: pytest.TempPathFactory, found: list, name: str):
    path = tmp_path_factory.mktemp("rows") / f"x{name}"
    rows.write(path, found)
    assert [row.values for row in rows.read(path)] == found


def test_equal_rows_make_equal_bytes(tmp_path: Path):
    """Byte 3 of gzip holds the flags (a file name would be 8), bytes 4 to 7 the time: all zero."""
    for name in ("a.json.gz", "b.json.gz"):
        rows.write(tmp_path / name, iter(ROWS))
    content = (tmp_path / "a.json.gz").read_bytes()
    assert content == (tmp_path / "b.json.gz").read_bytes()
    assert content[3:8] == bytes(5)
    assert json.loads(gzip.decompress(content)) == ROWS


def test_a_failing_write_leaves_the_old_file(tmp_path: Path):
    path = tmp_path / "x.json"
    rows.write(path, ROWS)
    old = path.read_bytes()
    with pytest.raises(TypeError):
        rows.write(path, [{"a": object()}])
    assert path.read_bytes() == old
    assert list(tmp_path.iterdir()) == [path]


def test_a_table_cannot_be_written(tmp_path: Path):
    with pytest.raises(DataError, match=r"expected \.json or \.jsonl"):
        rows.write(tmp_path / "x.csv", ROWS)


def test_a_table_is_read_with_empty_cells_as_null(tmp_path: Path):
    path = tmp_path / "x.csv"
    path.write_bytes(b'\xef\xbb\xbfa,b\r\n1,"two\r\nlines, ""quoted"""\r\n,\r\n\r\n')  # a blank line is no row
    assert [row.values for row in rows.read(path)] == [
        {"a": "1", "b": 'two\r\nlines, "quoted"'},
        {"a": None, "b": None},
    ]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.json", b"[{}", "not readable as JSON"),
        ("x.json", b"{}", "expected one JSON array"),
        ("x.json", b"[{}, null]", "row 2: expected an object, got NoneType"),
        ("x.json", b"[" * 100_000, "not readable as JSON"),
        ("x.json", b"[" + b"9" * 5_000 + b"]", "not readable as JSON"),
        ("x.json", b"\xff[]", "cannot be read"),
        ("x.jsonl", b"{}\n\n{", "line 3: not readable as JSON"),
        ("x.json.gz", b"[{}]", "cannot be read"),
        ("x.json.gz", gzip.compress(b"[{}]")[:-9], "cannot be read"),
        ("x.json.gz", gzip.compress(b"[{}]")[:12] + b"\xff" * 12, "cannot be read"),
        ("x.csv", b"a,b\n1\n", "row 1: expected 2 cells, got 1"),
        ("x.csv", b"a,a\n1,2\n", "a column appears twice"),
        ("x.csv", b'a,b\n1,"2\n', "not readable as CSV"),
        ("x.txt", b"", "ends in .json, .json.gz, .jsonl, .jsonl.gz, .csv"),
    ],
)
def test_a_broken_file_is_named(tmp_path: Path, name: str, content: bytes, message: str):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(DataError, match=message) as error:
        list(rows.read(path))
    assert str(path) in str(error.value)


def test_a_missing_file_is_named(tmp_path: Path):
    with pytest.raises(DataError, match=r"gone\.json: cannot be read"):
        list(rows.read(tmp_path / "gone.json"))


def test_null_absent_and_empty_are_not_known():
    assert [row(a=value).text("a") for value in (None, "", "x")] == [None, None, "x"]
    assert [row(a=value).flag("a") for value in (None, False, True)] == [None, False, True]
    assert [row(a=value).word("a", {"x": 1}) for value in (None, "", "X")] == [None, None, 1]
    assert row(a=None).inner("a").values == row().inner("a").values == {}
    assert row().text("a") is row().flag("a") is row().word("a", {}) is row().name("a") is row().path("a") is None


@pytest.mark.parametrize(
    ("method", "value", "expected"),
    [
        ("text", 3, "a text or null"),
        ("flag", 1, "true, false or null"),
        ("flag", "true", "true, false or null"),
        ("name", "../x", "letters, digits"),
        ("path", "/etc/passwd", "stays inside"),
        ("inner", [], "an object or null"),
        ("word", "tie", "'video_0', 'video_1' or null"),
    ],
)
def test_a_wrong_value_is_named_with_its_file_row_and_field(method: str, value: object, expected: str):
    arguments = ({"video_0": 1, "video_1": 2},) if method == "word" else ()
    with pytest.raises(DataError, match=expected) as error:
        getattr(row(is_safe=value), method)("is_safe", *arguments)
    assert str(error.value).startswith("x.json, row 7, video_0.is_safe: ")
    assert repr(value) in str(error.value)


def test_an_inner_field_is_named_by_its_whole_way():
    with pytest.raises(DataError, match=r"row 7, video_0\.video_labels\.porn: expected true, false or null, got 2"):
        row(video_labels={"porn": 2}).inner("video_labels").flag("porn")


def test_an_absent_field_is_named_beside_those_that_are_there():
    row(a=None).require("a")
    with pytest.raises(DataError, match=r"row 7: no field video_0\.b among a, c"):
        row(a=1, c=2).require("a", "b")
