import hashlib
import math
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_evaluation import clip, prompts_of

from align import table
from align.table import Clip, Decider
from reward import formats
from reward.files import DataError
from reward.records import Pair, Prompt, Tags, VideoSample

(PROMPT,) = prompts_of("safety_critical", 1)
texts = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=8)
clips = st.builds(
    Clip,
    prompt_id=texts,
    prompt_sha256=texts,
    prompt_type=st.none() | texts,
    tags=st.lists(texts, max_size=3).map(tuple),
    seed=st.integers(-(2**63), 2**63 - 1),
    system=texts,
    unsafe=st.none() | st.booleans(),
    failure=st.none() | texts,
    scores=st.fixed_dictionaries(
        {name: st.none() | st.floats(allow_nan=False, allow_infinity=False) for name in ("cost", "reward")}
    ),
)


# What counts ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("unsafe", "failure", "expected"),
    [
        (False, None, False),
        (True, None, True),
        (None, None, True),
        (False, "unreadable", True),
        (False, "", True),
        (None, "no video", True),
    ],
)
def test_only_what_was_judged_safe_is_safe(unsafe: bool | None, failure: str | None, expected: bool):
    assert clip(PROMPT, unsafe=unsafe, failure=failure).is_unsafe is expected


def test_a_failed_clip_has_no_score():
    assert clip(PROMPT, reward=9.0).score("reward") == 9.0
    assert clip(PROMPT, reward=9.0, failure="frozen").score("reward") is None
    assert clip(PROMPT, reward=None).score("reward") is None


def test_an_unknown_score_is_named():
    with pytest.raises(DataError, match=r"'rewards'.* cost, reward"):
        clip(PROMPT).score("rewards")


def test_why_a_clip_has_no_judgement():
    found = [None, clip(PROMPT), clip(PROMPT, unsafe=None), clip(PROMPT, unsafe=True, failure="unreadable")]
    assert [table.failure_of(each) for each in found] == ["missing", None, "not judged", "unreadable"]


# Parquet ----------------------------------------------------------------------------------------------------


@given(found=st.lists(clips, min_size=1, max_size=5))
def test_what_is_written_is_read(tmp_path_factory: pytest.TempPathFactory, found: list[Clip]):
    path = tmp_path_factory.mktemp("table") / "table.parquet"
    table.write(path, found)
    assert table.read(path) == found


def test_the_columns_of_a_table(tmp_path: Path):
    table.write(tmp_path / "table.parquet", [clip(PROMPT)])
    (row,) = pq.read_table(tmp_path / "table.parquet").to_pylist()
    assert row == {
        "prompt_id": "safety_critical-0",
        "prompt_sha256": hashlib.sha256(b"a video of safety_critical number 0").hexdigest(),
        "prompt": "a video of safety_critical number 0",
        "prompt_type": "safety_critical",
        "tags": ["crime"],
        "seed": 0,
        "system": "policy",
        "file": None,
        "unsafe": False,
        "failure": None,
        "cost": -1.0,
        "reward": 0.0,
        "degenerate": 0.0,
    }


def test_a_table_of_another_writer(tmp_path: Path):
    """Smaller integers, scores that are integers or all null, columns of text and in another order."""
    table.write(tmp_path / "ours.parquet", [clip(PROMPT)])
    ours = pq.read_table(tmp_path / "ours.parquet").drop_columns(["cost", "seed", "reward"])
    theirs = ours.append_column("seed", pa.array([7], pa.int16())).append_column("reward", pa.array([3], pa.int8()))
    theirs = theirs.append_column("cost", pa.nulls(1)).append_column("path", pa.array(["a.mp4"]))
    pq.write_table(theirs, tmp_path / "theirs.parquet")
    (found,) = table.read(tmp_path / "theirs.parquet")
    scores = {"reward": 3.0, "degenerate": 0.0, "cost": None}
    assert found == replace(clip(PROMPT, seed=7, reward=3.0, cost=None), scores=scores)


def test_a_prompt_is_that_of_its_hash(tmp_path: Path):
    table.write(tmp_path / "table.parquet", [replace(clip(PROMPT), prompt="another")])
    with pytest.raises(DataError, match="prompt safety_critical-0: its text is not that of its hash"):
        table.read(tmp_path / "table.parquet")


@pytest.mark.parametrize("column", ["prompt_sha256", "seed", "system", "unsafe", "failure"])
def test_a_missing_column_is_named(tmp_path: Path, column: str):
    path = tmp_path / "table.parquet"
    table.write(path, [clip(PROMPT)])
    pq.write_table(pq.read_table(path).drop_columns([column]), path)
    with pytest.raises(DataError, match=column):
        table.read(path)


def test_words_instead_of_a_judgement_are_refused(tmp_path: Path):
    path = tmp_path / "table.parquet"
    table.write(path, [clip(PROMPT)])
    wrong = pq.read_table(path).drop_columns(["unsafe"]).append_column("unsafe", pa.array(["perhaps"]))
    pq.write_table(wrong, path)
    with pytest.raises(DataError, match="perhaps"):
        table.read(path)


@pytest.mark.parametrize("score", [math.nan, math.inf, -math.inf])
def test_a_score_that_is_not_finite_is_named(tmp_path: Path, score: float):
    path = tmp_path / "table.parquet"
    with pytest.raises(
        DataError, match=f"safety_critical-0, seed 0, policy: expected a finite cost or null, got {score}"
    ):
        table.write(path, [clip(PROMPT, cost=score)])
    assert not path.exists()
    table.write(path, [clip(PROMPT)])
    wrong = pq.read_table(path).drop_columns(["cost"]).append_column("cost", pa.array([score]))
    pq.write_table(wrong, path)
    with pytest.raises(DataError, match="expected a finite cost"):
        table.read(path)


def test_a_score_with_the_name_of_a_column_is_refused(tmp_path: Path):
    with pytest.raises(DataError, match="seed"):
        table.write(tmp_path / "table.parquet", [replace(clip(PROMPT), scores={"seed": 1.0})])


def test_what_is_no_table_is_named(tmp_path: Path):
    (tmp_path / "table.parquet").write_text("no table")
    for name in ("table.parquet", "absent.parquet"):
        with pytest.raises(DataError, match=name):
            table.read(tmp_path / name)


def test_who_decided_is_read_back_and_must_be_said(tmp_path: Path):
    path, decider = tmp_path / "table.parquet", Decider(by="judge", verdicts="verdicts", rules=("flash",))
    table.write(path, [clip(PROMPT)], decider)
    assert table.read_decider(path) == decider
    assert table.read(path) == [clip(PROMPT)]
    table.write(path, [clip(PROMPT)])
    with pytest.raises(DataError, match=r"table\.parquet: does not say who decided what is unsafe"):
        table.read_decider(path)


# Prompts ----------------------------------------------------------------------------------------------------


def test_prompts_by_the_hash_of_their_text_and_sorted_by_it(tmp_path: Path):
    written = prompts_of("safety_neutral", 5)
    formats.write_prompts(tmp_path / "eval-prompt.json", written)
    found = table.read_prompts(tmp_path / "eval-prompt.json")
    assert list(found) == sorted(hashlib.sha256(prompt.text.encode()).hexdigest() for prompt in written)
    assert sorted(prompt.text for prompt in found.values()) == [prompt.text for prompt in written]
    assert {prompt.type for prompt in found.values()} == {"safety_neutral"}


def test_two_ids_with_one_text_are_one_prompt(tmp_path: Path):
    twice = [replace(PROMPT, prompt_id=name, tags=Tags()) for name in ("a", "b")]
    formats.write_prompts(tmp_path / "eval-prompt.json", twice)
    assert len(table.read_prompts(tmp_path / "eval-prompt.json")) == 1


def test_hashes_of_every_kind_of_file(tmp_path: Path):
    """Prompts as text, as hashes, as data, as rewrites, and those of pairs of videos: always the same two hashes."""
    prompts = [Prompt(prompt_id=name, text=f"a {name}") for name in ("cat", "dog")]
    expected = {table.hash_text("a cat"), table.hash_text("a dog")}
    (tmp_path / "used.txt").write_text("A cat\r\n\n  a \tDog  ")
    (tmp_path / "rewrites.jsonl").write_text('{"prompt": "a cat", "safe": "a dog"}\n')
    (tmp_path / "used.sha256").write_text("\n".join(expected))
    formats.write_prompts(tmp_path / "prompt.jsonl.gz", prompts)
    formats.write_pairs(tmp_path / "config-train.json.gz", map(pair_of, prompts))
    table.write_hashes(tmp_path / "lora.prompts.sha256", ["a DOG", "A  cat", "a cat"])
    for path in tmp_path.iterdir():
        assert table.read_hashes(path) == expected, path


def pair_of(prompt: Prompt) -> Pair:
    first, second = (VideoSample(video_id=f"{prompt.prompt_id}-{i}", prompt=prompt, path=Path()) for i in range(2))
    return Pair(pair_id=prompt.prompt_id, prompt=prompt, video_0=first, video_1=second)


@pytest.mark.parametrize(("name", "content"), [("used.txt", " \n"), ("used.sha256", ""), ("used.json", "[]")])
def test_used_prompts_that_are_none_are_refused(tmp_path: Path, name: str, content: str):
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=f"{name}: holds no prompt"):
        table.read_hashes(tmp_path / name)


@pytest.mark.parametrize("line", ["f" * 63, "f" * 64 + "  file", "F" * 64, "a cat"])
def test_a_line_that_is_no_hash_is_refused(tmp_path: Path, line: str):
    """It would match no prompt, and so let all pass."""
    (tmp_path / "used.sha256").write_text(f"{'0' * 64}\n{line}\n")
    with pytest.raises(DataError, match=rf"used\.sha256: expected a SHA-256 a line, .* got '{line}'"):
        table.read_hashes(tmp_path / "used.sha256")


@pytest.mark.parametrize("name", ["used.txt", "used.sha256", "used.json", "used.zip"])
def test_used_prompts_that_cannot_be_read_are_named(tmp_path: Path, name: str):
    with pytest.raises(DataError, match=name):
        table.read_hashes(tmp_path / name)
