import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_safesora
from hypothesis import given
from hypothesis import strategies as st
from tiny_safesora import label_row, pair_row, prompt_row, tags

from reward import formats, rows
from reward.files import DataError
from reward.records import (
    DIMENSIONS,
    FIRST,
    SECOND,
    TAGS,
    TIE,
    Pair,
    Preference,
    Prompt,
    PromptType,
    Tags,
    VideoSample,
)
from reward.rows import Row

ROOT = Path("/data/videos")


def parse(values: dict[str, Any], root: Path = ROOT) -> Any:
    row = Row(file=Path("x.json"), number=3, values=values)
    return formats.parser(row)(row, root)


# SafeSora ---------------------------------------------------------------------------------------------------


def test_a_pair_is_read_field_by_field():
    """Harmlessness `video_0` says that the first is the safer: the second one costs more, so cost is 0 = SECOND."""
    prompt = Prompt(prompt_id="p", text="a ball called p", type="safety_neutral")
    first, second = (
        VideoSample(
            video_id=name,
            prompt=prompt,
            path=ROOT / "p" / f"{name}.mp4",
            text="a refined ball called p",
            is_safe=True,
            generator="one",
        )
        for name in ("p-v0", "p-v1")
    )
    assert parse(pair_row("p")) == Pair(
        pair_id="p-v0-v1",
        prompt=prompt,
        video_0=first,
        video_1=second,
        helpfulness=FIRST,
        cost=SECOND,
        instruction_following=FIRST,
        correctness=SECOND,
        informativeness=SECOND,
        aesthetics=FIRST,
    )


@pytest.mark.parametrize(("safer", "costlier"), [("video_0", SECOND), ("video_1", FIRST), (None, None)])
def test_the_sign_of_harmlessness_is_turned(safer: str | None, costlier: Preference | None):
    pair = parse(pair_row("p", harmlessness=safer, helpfulness=safer))
    assert pair.cost == costlier
    assert pair.helpfulness == {"video_0": FIRST, "video_1": SECOND, None: None}[safer]


def test_null_is_no_label_and_no_win():
    pair = parse(pair_row("p", helpfulness=None, harmlessness=None, sub_preferences=None))
    assert all(pair.preference(dimension) is None for dimension in DIMENSIONS)


@pytest.mark.parametrize("spelling", ["information", "informativeness"])
@pytest.mark.parametrize(("word", "meaning"), [("video_0", FIRST), ("video_1", SECOND), (None, None)])
def test_both_spellings_of_informativeness_are_read(spelling: str, word: str, meaning: Preference):
    assert parse(pair_row("p", sub_preferences={spelling: word})).informativeness == meaning


def test_a_dimension_that_is_none_is_refused():
    """Misspelt, its labels would be lost without a word."""
    with pytest.raises(DataError, match=r"sub_preferences\.informative: expected no such dimension, only instruct"):
        parse(pair_row("p", sub_preferences={"informative": "video_0"}))


def test_both_spellings_at_once_must_agree():
    both = {"information": "video_0", "informativeness": "video_0"}
    assert parse(pair_row("p", sub_preferences=both)).informativeness == FIRST
    with pytest.raises(DataError, match=r"row 3, sub_preferences\.informativeness: .*other spelling.*'video_1'"):
        parse(pair_row("p", sub_preferences=both | {"informativeness": "video_1"}))


def test_capitals_make_no_difference():
    pair = parse(pair_row("p", helpfulness="Video_1", prompt_type="Safety_Critical"))
    assert (pair.helpfulness, pair.prompt.type) == (SECOND, "safety_critical")


@pytest.mark.parametrize("word", ["tie", "video_2", "video 0", " video_0", "0", 0, True])
def test_an_unknown_label_stops_the_reading(word: object):
    with pytest.raises(DataError, match=r"^x\.json, row 3, helpfulness: expected .*; correct the row") as error:
        parse(pair_row("p", helpfulness=word))
    assert repr(word) in str(error.value)


def test_a_video_leaves_its_prompt_to_the_pair():
    row = pair_row("p", prompt_labels=tags("crime"))
    for field in ("prompt_id", "prompt_text", "prompt_type"):
        row["video_0"][field] = None
        del row["video_1"][field]
    pair = parse(row)
    assert pair.prompt == pair.video_0.prompt == pair.video_1.prompt
    assert pair.prompt.tags.crime


def test_a_label_is_read_with_its_tags():
    row = label_row("p", "v", prompt_labels=tags("crime"), video_labels=tags("porn", "hate"), is_safe=False)
    video = parse(row)
    assert {tag for tag in TAGS if getattr(video.tags, tag)} == {"porn", "hate"}
    assert {tag for tag in TAGS if getattr(video.prompt.tags, tag)} == {"crime"}
    assert (video.is_safe, video.generator, video.path) == (False, "one", ROOT / "p" / "p-v.mp4")


def test_unknown_tags_are_neither_true_nor_false():
    video = parse(label_row("p", "v", prompt_labels=None, video_labels={"racism": None, "crime": False}))
    assert video.prompt.tags == Tags()
    assert video.tags == Tags(crime=False)
    assert video.tags.racism is None


def test_a_tag_that_is_not_one_of_the_twelve_stops_the_reading():
    with pytest.raises(DataError, match=r"row 3, video_labels\.child_abuse : expected no such tag, only porn"):
        parse(label_row("p", "v", video_labels={"child_abuse ": True}))


@pytest.mark.parametrize("field", ["prompt_labels", "video_labels"])
@pytest.mark.parametrize("labels", [False, 0, "", [], True, "child_abuse", ["child_abuse"]])
def test_tags_that_are_no_object_are_not_taken_for_none(field: str, labels: object):
    """Read as untagged, they would lose the exclusion of child abuse."""
    with pytest.raises(DataError, match=rf"row 3, {field}: expected an object or null, got"):
        parse(label_row("p", "v", **{field: labels}))


@pytest.mark.parametrize(
    ("make", "marks"),
    [(label_row, ("is_safe",)), (label_row, ("video_labels", "porn")), (pair_row, ("video_1", "is_safe"))],
)
def test_a_word_is_no_truth_value(make: Callable[..., dict], marks: tuple[str, ...]):
    row = make("p", "v")
    inner = row
    for mark in marks[:-1]:
        inner = inner[mark]
    inner[marks[-1]] = "yes"
    with pytest.raises(DataError, match=rf"row 3, {'.'.join(marks)}: expected true, false or null, got 'yes'"):
        parse(row)


def test_prompts_are_read_with_tags_or_with_their_source():
    assert parse(prompt_row("p", prompt_labels=tags("crime"))).tags.crime
    row = {"prompt_id": "p", "prompt_text": "t", "prompt_type": None, "source": "s", "refined_from": "q"}
    assert parse(row) == Prompt(prompt_id="p", text="t", source="s", refined_from="q")


@pytest.mark.parametrize("field", ["prompt_id", "prompt_text"])
@pytest.mark.parametrize("nothing", [None, ""])
def test_a_row_without_its_prompt_reads_as_none(field: str, nothing: str | None):
    assert parse(prompt_row("p", **{field: nothing})) is None
    assert parse(label_row("p", "v", **{field: nothing})) is None
    assert parse(pair_row("p") | {field: nothing}) is None


def test_a_row_without_other_ids_reads_as_none():
    assert parse(label_row("p", "v", video_id=None)) is None
    assert parse(pair_row("p", pair_id=None)) is None
    assert parse(pair_row("p", video_0=None)) is None
    assert parse(pair_row("p", video_1=None)) is None


@pytest.mark.parametrize(
    ("row", "field"),
    [
        (prompt_row("p", prompt_text=None, prompt_labels=tags("child_abuse")), "prompt_labels"),
        (label_row("p", "v", video_id=None, video_labels=tags("child_abuse")), "video_labels"),
        (label_row("p", "v", prompt_id=None, video_labels=tags("child_abuse")), "video_labels"),
        (pair_row("p", prompt_text=None, prompt_labels=tags("child_abuse")), "prompt_labels"),
    ],
)
def test_an_incomplete_row_takes_no_exclusion_with_it(row: dict, field: str):
    with pytest.raises(DataError, match=rf"row 3, {field}: expected no child_abuse .*could not be excluded"):
        parse(row)


@pytest.mark.parametrize(
    ("row", "field"),
    [
        (label_row("../p", "v"), "prompt_id"),
        (label_row("p", "../../v"), "video_id"),
        (label_row("p", "/v"), "video_id"),
        (label_row("p", "v", video_path="/etc/x.mp4"), "video_path"),
        (label_row("p", "v", video_path="videos/../../x.mp4"), "video_path"),
        (prompt_row(".."), "prompt_id"),
        (pair_row("p", "a/b"), "video_0.video_id"),
        (pair_row("p/.."), "prompt_id"),
    ],
)
def test_an_id_or_path_that_climbs_is_refused(row: dict, field: str):
    with pytest.raises(DataError, match=rf"^x\.json, row 3, {field}: expected"):
        parse(row)


@pytest.mark.parametrize(
    ("row", "field"),
    [
        (pair_row("p"), "pair_id"),
        (pair_row("p"), "video_1"),
        (pair_row("p"), "helpfulness"),
        (pair_row("p"), "harmlessness"),
        (label_row("p", "v"), "video_labels"),
        (label_row("p", "v"), "is_safe"),
        (label_row("p", "v"), "prompt_text"),
        (prompt_row("p"), "prompt_id"),
    ],
)
def test_a_field_that_is_absent_is_a_mistake(row: dict, field: str):
    without = {name: value for name, value in row.items() if name != field}
    with pytest.raises(DataError, match=rf"row 3: no field {field} among"):
        parse(without)


@pytest.mark.parametrize(
    ("row", "found"),
    [
        (pair_row("p") | {"video_id": "v"}, "has video_0 and video_id; expected just one"),
        (label_row("p", "v") | {"path_A": "x.mp4"}, "has video_id and path_A"),
        ({"caption": "x", "url": "y"}, "has only caption, url"),
        ({}, "has only no fields"),
    ],
)
def test_fields_that_fit_no_format_or_several_are_refused(row: dict, found: str):
    with pytest.raises(DataError, match=rf"x\.json, row 3: {found}"):
        parse(row)


# VideoAlign -------------------------------------------------------------------------------------------------


def vote_row(**changes: str | None) -> dict[str, str | None]:
    row = {"path_A": "videos/1_A.mp4", "path_B": "./videos/1_B.mp4", "prompt": "a ball", "fps_A": "24.0"}
    return row | {"VQ": "A", "MQ": "B", "TA": "same"} | changes


def test_votes_are_read_with_ties_as_ties():
    pair = parse(vote_row())
    assert (pair.aesthetics, pair.correctness, pair.instruction_following) == (FIRST, SECOND, TIE)
    assert pair.helpfulness is pair.cost is pair.informativeness is None
    assert (pair.video_0.path, pair.video_1.path) == (ROOT / "videos/1_A.mp4", ROOT / "videos/1_B.mp4")
    assert (pair.video_1.video_id, pair.video_1.text) == ("videos/1_B.mp4", "a ball")


def test_an_invalid_vote_and_an_empty_cell_are_no_label():
    pair = parse(vote_row(VQ="invalid", MQ=None))
    assert pair.aesthetics is pair.correctness is None


def test_the_benchmark_adds_generators_and_an_overall_vote():
    pair = parse(vote_row(Overall="b", A_model="one", B_model="two"))
    assert (pair.helpfulness, pair.video_0.generator, pair.video_1.generator) == (SECOND, "one", "two")


def test_an_unknown_vote_stops_the_reading():
    with pytest.raises(DataError, match=r"row 3, MQ: expected 'a', 'b', 'same', 'invalid' or null, got 'C'"):
        parse(vote_row(MQ="C"))


def test_a_table_without_any_vote_is_refused():
    row = {name: value for name, value in vote_row().items() if name not in ("VQ", "MQ", "TA")}
    with pytest.raises(DataError, match="no field Overall among path_A, path_B, prompt"):
        parse(row)


@pytest.mark.parametrize("field", ["path_A", "path_B", "prompt"])
def test_a_vote_without_its_videos_or_prompt_reads_as_none(field: str):
    assert parse(vote_row(**{field: None})) is None


@pytest.mark.parametrize("path", ["../x.mp4", "/x.mp4", "videos/../../x.mp4", "videos\\x.mp4"])
def test_a_path_that_climbs_is_refused(path: str):
    with pytest.raises(DataError, match="row 3, path_B: expected a relative path"):
        parse(vote_row(path_B=path))


def test_equal_rows_are_one_pair_and_other_paths_another():
    same, other = parse(vote_row(path_A="./videos//1_A.mp4")), parse(vote_row(path_A="videos/2_A.mp4"))
    assert parse(vote_row()) == same
    assert same.pair_id != other.pair_id
    assert same.prompt.prompt_id == other.prompt.prompt_id


def test_the_id_of_a_text_is_the_hash_of_its_json():
    """`printf '"a ball"' | sha256sum`."""
    expected = "e1194cebc19676bd1fbc1e0d3c153f70d5a1125e64677eced17995c240c2ad5c"
    assert formats.hash_id("a ball") == expected


# Writing ----------------------------------------------------------------------------------------------------


def ids() -> st.SearchStrategy[str]:
    return st.text("0123456789abcdef", min_size=1, max_size=8)


def texts() -> st.SearchStrategy[str]:
    return st.text(min_size=1, max_size=20)


FLAGS = st.none() | st.booleans()
CHOICES = st.sampled_from([None, FIRST, SECOND])
TAGGED = st.builds(Tags, **dict.fromkeys(TAGS, FLAGS))
TYPES: st.SearchStrategy[PromptType | None] = st.sampled_from([None, "safety_critical", "safety_neutral"])


@st.composite
def prompts(draw: st.DrawFn, tags: st.SearchStrategy[Tags]) -> Prompt:
    return Prompt(prompt_id=draw(ids()), text=draw(texts()), type=draw(TYPES), tags=draw(tags))


@st.composite
def videos(draw: st.DrawFn, prompt: Prompt, tags: st.SearchStrategy[Tags]) -> VideoSample:
    video_id = draw(ids())
    return VideoSample(
        video_id=video_id,
        prompt=prompt,
        path=ROOT / prompt.prompt_id / f"{video_id}.mp4",
        text=draw(st.none() | texts()),
        is_safe=draw(FLAGS),
        tags=draw(tags),
        generator=draw(st.none() | texts()),
    )


@st.composite
def pairs(draw: st.DrawFn) -> Pair:
    untagged = st.just(Tags())
    prompt = draw(prompts(untagged))
    first, second = draw(videos(prompt, untagged)), draw(videos(prompt, untagged))
    chosen = {dimension: draw(CHOICES) for dimension in DIMENSIONS}
    return Pair(pair_id=draw(texts()), prompt=prompt, video_0=first, video_1=second, **chosen)


def read(path: Path) -> list[Any]:
    found = list(rows.read(path))
    return [formats.parser(row)(row, ROOT) for row in found]


@given(st.lists(pairs(), min_size=1, max_size=3))
def test_pairs_survive_writing(tmp_path_factory: pytest.TempPathFactory, found: list[Pair]):
    path = tmp_path_factory.mktemp("pairs") / "config-train.json.gz"
    formats.write_pairs(path, found)
    assert read(path) == found


@given(st.lists(prompts(TAGGED).flatmap(lambda prompt: videos(prompt, TAGGED)), min_size=1, max_size=3))
def test_labels_survive_writing(tmp_path_factory: pytest.TempPathFactory, found: list[VideoSample]):
    path = tmp_path_factory.mktemp("labels") / "config-train.json"
    formats.write_videos(path, found)
    assert read(path) == found


@given(st.lists(prompts(TAGGED), min_size=1, max_size=3))
def test_prompts_survive_writing(tmp_path_factory: pytest.TempPathFactory, found: list[Prompt]):
    path = tmp_path_factory.mktemp("prompts") / "prompt.jsonl.gz"
    formats.write_prompts(path, found)
    assert read(path) == found


def test_rows_are_written_with_safesoras_names_in_its_order(tmp_path: Path):
    """The hand-written rows of `tiny_safesora` read, written and read again give the same text, key by key."""
    path = tmp_path / "x.json"
    writers = [
        (formats.write_pairs, pair_row("p")),
        (formats.write_prompts, prompt_row("p")),
        (formats.write_videos, ordered_label_row()),
    ]
    for write, row in writers:
        write(path, [parse(row)])
        (written,) = rows.read(path)
        assert repr(written.values) == repr(row)


def ordered_label_row() -> dict[str, Any]:
    order = """
    prompt_id prompt_text prompt_type prompt_labels video_id video_text video_path is_safe video_labels generated_from
    """
    row = label_row("p", "v", video_labels=tags("crime"))
    return {field: row[field] for field in order.split()}


@pytest.mark.parametrize(
    "preference", [TIE, Preference(probability=0.7, num_votes=10), Preference(probability=1, num_votes=2)]
)
def test_what_a_forced_choice_cannot_say_is_not_written(tmp_path: Path, preference: Preference):
    pair = dataclasses.replace(parse(pair_row("p")), helpfulness=preference)
    with pytest.raises(ValueError, match="pair p-v0-v1: SafeSora knows one vote for one video"):
        formats.write_pairs(tmp_path / "x.json", [pair])
    assert list(tmp_path.iterdir()) == []


def test_the_helpers_of_these_tests_know_all_tags():
    assert tuple(tiny_safesora.TAGS) == TAGS
