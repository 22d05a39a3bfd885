import math
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reward import plain_yaml

texts = st.text(st.characters(exclude_categories=["Cs"]))
awkward = st.sampled_from(
    "no On null ~ 1e-5 010 0x1F 12:30 2024-01-01 << = #1 &a *a !t % @ ` ' \" \ufeff 1_000 .inf".split()  # noqa: SIM905  a list takes 30 lines
) | st.sampled_from(["", " a", "- a", "a: b", "a\n\nb ", "\r\n", "\x85", "\u2028", "\0"])
scalars = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False)
trees = st.recursive(
    scalars | texts | awkward,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(texts | awkward, inner, max_size=4),
    max_leaves=12,
)


@given(trees)
def test_what_is_written_reads_back_equal(tree):
    assert plain_yaml.read(plain_yaml.write(tree)) == tree


@pytest.mark.parametrize("text", ["no", "on", "y", "010", "0x1F", "0o17", "1_000", "12:30", "2024-01-01", ".inf", "<<"])
def test_scalars_of_yaml_1_1_are_text(text):
    assert plain_yaml.read(text) == text


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-5", 1e-5),
        ("-.5", -0.5),
        ("1.", 1.0),
        ("+3", 3),
        ("0", 0),
        ("TRUE", True),
        ("False", False),
        ("~", None),
    ],
)
def test_scalars_of_yaml_1_2_have_their_type(text, value):
    read = plain_yaml.read(text)
    assert read == value
    assert type(read) is type(value)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("a: 1\nb: 2\na: 3", "line 3, column 1: key 'a' is given twice"),
        ("a: {b: 1, b: 1}", "line 1, column 11: key 'b' is given twice"),
        ("a: &x 1\nb: *x", "line 1, column 4: anchors"),
        ("b: *x", "anchors and aliases"),
        ("a: !!python/object/apply:os.system [ls]", "line 1, column 4: tags"),
        ("a: !!timestamp 2024-01-01", "tags"),
        ("1: a", "a key must be text, not '1'"),
        ("null: a", "a key must be text"),
        ("? [a, b]\n: c", "a key must be text"),
        ("a: [1, 2", "line 1, column 9: expected ',' or ']'"),
        ("a: b\n--- \nc: d", "but found another document"),
        ("a: \x00", "character 3: special characters"),
        ("9" * 5000, "integer string conversion"),
    ],
)
def test_anything_else_is_refused_with_its_place(text, problem):
    with pytest.raises(ValueError, match=r".") as error:
        plain_yaml.read(text)
    assert problem in str(error.value)


@pytest.mark.parametrize(
    "text", ["[" * 200_000, "{a: " * 50_000, "- " * 50_000, "\n".join(" " * n + "a:" for n in range(40))]
)
def test_a_deep_document_is_refused_at_once(text):
    start = time.perf_counter()
    with pytest.raises(ValueError, match="nested deeper than 32"):
        plain_yaml.read(text)
    assert time.perf_counter() - start < 5


def test_an_alias_bomb_is_refused():
    bomb = "a: &a [x, x]\n" + "\n".join(f"{b}: &{b} [*{a}, *{a}]" for a, b in zip("abcdefgh", "bcdefghi", strict=True))
    with pytest.raises(ValueError, match="aliases"):
        plain_yaml.read(bomb)


def test_no_document_is_none():
    assert plain_yaml.read("# only a comment\n") is None


def test_negative_zero_keeps_its_sign():
    assert math.copysign(1, plain_yaml.read(plain_yaml.write(-0.0))) == -1
