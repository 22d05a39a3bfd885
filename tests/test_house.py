from pathlib import Path

import pytest

from scripts import house

NESTED = """
def a(x):
    for i in x:
        if i == 1:
            pass
        elif i == 2:
            pass
        else:
            with x:
                pass

    def b():
        while x:
            pass


def c(): ...
"""
LONG = "def {name}(x):\n" + "    x += 1\n" * 10 + "    return x\n"


def write(root: Path, **files: str) -> list[house.File]:
    for name, text in files.items():
        (root / "pkg").mkdir(exist_ok=True)
        (root / "pkg" / f"{name}.py").write_text(text)
    return house.read_tree(root, ["pkg"])


def test_functions_are_measured_from_def_to_end(tmp_path: Path):
    """`a` stands in lines 2 to 14, `b` inside it in 12 to 14, `c` in line 17."""
    (file,) = write(tmp_path, nested=NESTED)
    assert file.num_lines == 17
    assert {f.place: f.num_lines for f in file.functions} == {
        "pkg/nested.py:2 a": 13,
        "pkg/nested.py:12 b": 3,
        "pkg/nested.py:17 c": 1,
    }


def test_nesting_counts_an_elif_with_its_if_and_an_inner_function_alone(tmp_path: Path):
    """`a`: for, if (the elif is no deeper), with: 3. `b`: while: 1."""
    (file,) = write(tmp_path, nested=NESTED)
    assert [f.depth for f in sorted(file.functions, key=lambda f: f.num_lines)] == [0, 1, 3]


def test_duplicates_are_equal_bodies_of_twelve_lines_or_more(tmp_path: Path):
    files = write(
        tmp_path,
        one=LONG.format(name="first"),
        two=LONG.format(name="second").replace("x += 1", "x  +=  1  # other spelling, same tree"),
        three=LONG.format(name="third").replace("return x", "return -x"),
        short="def s(x):\n    return x\n\n\ndef t(x):\n    return x\n",
    )
    assert sorted(f.place for f in house.duplicates(files)) == ["pkg/one.py:1 first", "pkg/two.py:1 second"]


def test_sizes_of_a_small_tree(tmp_path: Path):
    """Files of 12, 12 and 6 lines; functions of 12, 12, 2 and 2.

    Median file 12, p90 12; median function (2 + 12) / 2 = 7, p95 12; 24 of 28 function lines are duplicates,
    85.7 %; 6 lines of tests over 30 of source, 0.2.
    """
    text = LONG.format(name="f")
    source = write(tmp_path, one=text, two=text, three="def s(x):\n    return x\n\n\ndef t(x):\n    return x\n")
    sizes = house.measure("ours", source, [file for file in source if file.num_lines == 6])
    assert (sizes.num_files, sizes.num_lines) == (3, 30)
    assert sizes.file_lines == (12, 12, 12)
    assert sizes.function_lines == (7, 12, 12)
    assert sizes.duplicate_percent == pytest.approx(100 * 24 / 28)
    assert sizes.test_ratio == pytest.approx(0.2)


def test_the_report_names_us_the_field_and_our_largest(capsys: pytest.CaptureFixture[str]):
    house.main(["num_largest=1"])
    printed = capsys.readouterr().out
    assert printed.index("Safelight") < printed.index("smalldiffusion") < printed.index("trl ")
    blocks = printed.split("\n\n")
    assert [block.splitlines()[0] for block in blocks[1:]] == [
        "largest files",
        "longest functions",
        "deepest nesting",
        "duplicates",
    ]
    assert all(len(block.splitlines()) == 2 for block in blocks[1:])
