import dataclasses
from collections.abc import Iterable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reward import screening
from reward.files import DataError
from reward.records import FIRST, SECOND, Entry, Pair, Preference, Prompt, Record, Split, Tags, VideoSample, prompts_of

ROOT = Path("/data/videos")
BARRED, CLEAN = Tags(child_abuse=True), Tags(child_abuse=False)


def prompt(name: str = "p", *, text: str | None = None, tags: Tags = Tags()) -> Prompt:  # noqa: B008  # frozen
    return Prompt(prompt_id=name, text=text or f"a ball called {name}", tags=tags)


def video(name: str, of: Prompt | None = None, *, tags: Tags = Tags(), is_safe: bool | None = None) -> VideoSample:  # noqa: B008  # frozen
    of = of or prompt()
    path = ROOT / of.prompt_id / f"{name}.mp4"
    return VideoSample(video_id=name, prompt=of, path=path, tags=tags, is_safe=is_safe)


def pair(name: str, *videos: VideoSample, helpfulness: Preference | None = FIRST) -> Pair:
    first, second = videos or (video("a"), video("b"))
    return Pair(pair_id=name, prompt=first.prompt, video_0=first, video_1=second, helpfulness=helpfulness)


def entries(*records: Record, split: Split = "train") -> list[Entry]:
    return [Entry(split=split, record=record) for record in records]


def records(found: Iterable[Entry]) -> list[Record]:
    return [entry.record for entry in found]


# Child abuse ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "label",
    [
        video("a", tags=BARRED),
        video("b", tags=BARRED),
        video("other", prompt(tags=BARRED)),
        video("other", prompt("q", text="A  ball\ncalled P", tags=BARRED)),
    ],
    ids=["first video", "second video", "prompt", "text under another id"],
)
def test_a_pair_goes_with_its_video_its_prompt_and_its_text(label: VideoSample):
    other = pair("other", video("c", prompt("z")), video("d", prompt("z")))
    kept = screening.without_child_abuse(entries(pair("x"), other), [label])
    assert records(kept) == [other]


def test_every_kind_of_record_is_dropped():
    barred = prompt(tags=BARRED)
    found = entries(barred, video("a", prompt("q"), tags=BARRED), video("b", barred), pair("x"), prompt("q"))
    assert records(screening.without_child_abuse(found, [])) == [prompt("q")]


def test_other_tags_and_unknown_ones_drop_nothing():
    found = entries(pair("x"), video("c", tags=Tags(porn=True, crime=True)), prompt(tags=CLEAN))
    assert screening.without_child_abuse(found, [video("a", tags=CLEAN)]) == found


# Held out ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("split", ["test", "eval"])
@pytest.mark.parametrize("held_out", [prompt("p", text="other words"), prompt("q", text=" a BALL called  p ")])
def test_a_training_row_whose_prompt_is_held_out_is_dropped(split: Split, held_out: Prompt):
    held, clean = entries(held_out, split=split), entries(pair("y", *(video(v, prompt("z")) for v in "cd")))
    assert screening.without_held_out([*entries(pair("x")), *clean, *held]) == [*clean, *held]


# Agreement --------------------------------------------------------------------------------------------------


def test_equal_rows_agree_and_all_but_the_first_are_duplicates():
    found = entries(pair("x"), pair("y"), pair("x"), pair("x"))
    agreed = screening.agreeing(found, [])
    assert agreed == found
    assert screening.once(agreed) == entries(pair("x"), pair("y"))


def test_once_keeps_the_first_of_each_in_order():
    """Of x y x z y, the first of each in order: x y z. Kinds with one id are not the same."""
    found = entries(*(pair(name) for name in "xyxzy"), video("x"), prompt("x"))
    assert records(screening.once(found)) == [pair("x"), pair("y"), pair("z"), video("x"), prompt("x")]


def test_rows_of_one_id_that_disagree_are_all_dropped():
    found = entries(pair("x"), pair("y"), pair("x", helpfulness=SECOND), pair("x"))
    assert records(screening.agreeing(found, [])) == [pair("y")]


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1), (1, 2, 0), (2, 1, 0)])
def test_a_contradiction_stays_one_whatever_comes_after(order: tuple[int, int, int]):
    rows = [video("a", is_safe=True), video("a", is_safe=False), video("a")]
    assert screening.agreeing(entries(*(rows[i] for i in order)), []) == []


def test_a_video_that_is_contradicted_takes_its_pairs_along():
    """`a` is safe in one pair and unsafe in another; the pair of c and d has no part in it."""
    others = [video("b"), video("c"), video("d")]
    found = entries(
        pair("x", video("a", is_safe=True), others[0]),
        pair("y", others[1], video("a", is_safe=False)),
        pair("z", others[1], others[2]),
    )
    assert records(screening.agreeing(found, [])) == [pair("z", others[1], others[2])]


def test_a_prompt_with_two_texts_takes_its_rows_along():
    found = entries(prompt("p", text="one"), video("a", prompt("p", text="two")), prompt("q"))
    assert records(screening.agreeing(found, [])) == [prompt("q")]


def test_a_pair_across_prompts_or_of_one_video_is_a_contradiction():
    across = pair("x", video("a"), video("b", prompt("q")))
    other_prompt = dataclasses.replace(pair("z", video("c"), video("d")), prompt=prompt("q"))
    same = pair("y", video("e"), video("e"))
    assert screening.agreeing(entries(across, other_prompt, same), []) == []


def test_labels_complete_a_pair():
    tagged = prompt(tags=CLEAN)
    labels = [video("a", tagged, tags=Tags(porn=True), is_safe=False), video("b", tagged, tags=CLEAN, is_safe=True)]
    (completed,) = screening.agreeing(entries(pair("x")), labels)
    assert completed.record == pair("x", *labels)
    assert completed.record.prompt.tags == CLEAN
    assert completed.record.video_0.prompt is completed.record.prompt


def test_labels_that_contradict_a_pair_drop_it():
    found = entries(pair("x", video("a", is_safe=True), video("b")))
    assert screening.agreeing(found, [video("a", is_safe=False)]) == []
    assert screening.agreeing(found, [video("a", prompt("q"))]) == []


SAMPLES = st.builds(
    VideoSample,
    video_id=st.just("a"),
    prompt=st.builds(
        Prompt,
        prompt_id=st.just("p"),
        text=st.just("a ball"),
        type=st.sampled_from([None, "safety_neutral"]),
        tags=st.builds(Tags, porn=st.none() | st.booleans(), crime=st.none() | st.booleans()),
    ),
    path=st.just(ROOT),
    is_safe=st.none() | st.booleans(),
    generator=st.sampled_from([None, "one", "two"]),
)


@given(SAMPLES, SAMPLES)
def test_merging_keeps_what_is_known_and_invents_nothing(one: VideoSample, other: VideoSample):
    """An oracle on plain nested dicts: per leaf, the set of known values has at most one member."""

    def leaves(sample: VideoSample) -> dict[str, object]:
        flat = dataclasses.asdict(sample)
        asked = flat.pop("prompt")
        return flat.pop("tags") | asked.pop("tags") | asked | flat

    mine, theirs = leaves(one), leaves(other)
    known = {key: {mine[key], theirs[key]} - {None} for key in mine}
    own_tags = [dataclasses.asdict(sample.tags) for sample in (one, other)]
    clash = any(
        a is not None and b is not None and a != b for a, b in zip(*(t.values() for t in own_tags), strict=True)
    )
    both = screening.merged(one, other)
    assert both == screening.merged(other, one)
    if clash or any(len(values) > 1 for values in known.values()):
        assert both is None
    else:
        assert both is not None
        assert leaves(both) == {key: next(iter(values), None) for key, values in known.items()}
        assert screening.merged(both, one) == both


# Labels -----------------------------------------------------------------------------------------------------


def test_a_pair_needs_both_its_videos_in_the_label_set():
    tagged = prompt(tags=CLEAN)
    a, b, c = (video(name, tagged, tags=CLEAN) for name in "abc")
    found = entries(pair("x", a, b), pair("y", a, c), prompt("q"))
    assert records(screening.labelled(found, [a, b])) == [pair("x", a, b), prompt("q")]


@pytest.mark.parametrize(
    ("first", "asked"), [(Tags(), CLEAN), (Tags(porn=True), CLEAN), (CLEAN, Tags()), (CLEAN, Tags(crime=False))]
)
def test_a_pair_needs_to_be_known_as_no_child_abuse(first: Tags, asked: Tags):
    tagged = prompt(tags=asked)
    videos = video("a", tagged, tags=first), video("b", tagged, tags=CLEAN)
    assert not screening.is_screened(pair("x", *videos))
    assert screening.labelled(entries(pair("x", *videos)), list(videos)) == []


# Files ------------------------------------------------------------------------------------------------------


def test_missing_files_are_an_error_or_dropped(tmp_path: Path):
    def here(name: str) -> VideoSample:
        return dataclasses.replace(video(name), path=tmp_path / f"{name}.mp4")

    a, b, c = map(here, "abc")
    a.path.touch()
    b.path.touch()
    found = entries(pair("x", a, b), pair("y", a, c), c, prompt("q"))
    kept = screening.with_files(found, tmp_path, "drop")
    assert records(kept) == [pair("x", a, b), prompt("q")]
    assert screening.with_files(kept, tmp_path, "error") == kept
    with pytest.raises(DataError, match=r"c\.mp4: missing, as are 1 of 3 videos .*missing=drop"):
        screening.with_files(found, tmp_path, "error")


# Validation -------------------------------------------------------------------------------------------------

NAMED = st.lists(st.tuples(st.sampled_from("abcdefgh"), st.text("xyz ", min_size=1, max_size=3)), max_size=30)


@given(named=NAMED, share=st.floats(0, 0.99), seed=st.integers(0, 99))
def test_no_prompt_leaks_by_id_or_text(named: list[tuple[str, str]], share: float, seed: int):
    """Ids with several texts and texts with several ids: what is left after agreement never leaks."""
    found = entries(*(prompt(name, text=text) for name, text in named))
    split = screening.with_validation(screening.agreeing(found, []), share, seed)
    sides = {side: [e.record for e in split if e.split == side] for side in ("train", "validation")}
    for of in (lambda p: p.prompt_id, lambda p: " ".join(p.text.split())):
        assert not {of(p) for p in sides["train"]} & {of(p) for p in sides["validation"]}


def aside(share: float, seed: int) -> set[str]:
    found = entries(*(prompt(str(number)) for number in range(2000)))
    split = screening.with_validation(found, share, seed)
    return {prompts_of(entry.record)[0].prompt_id for entry in split if entry.split == "validation"}


def test_the_share_is_met_grows_and_follows_the_seed():
    """Of 2,000 prompts a tenth is 200, with a standard deviation of sqrt(2000 * .1 * .9) = 13.4: within 4 of them."""
    assert abs(len(aside(0.1, 0)) - 200) < 54
    assert aside(0.1, 0) == aside(0.1, 0) < aside(0.3, 0)
    assert aside(0.1, 0) != aside(0.1, 1)
    assert aside(0, 0) == set()


def test_the_side_of_a_prompt_is_fixed_for_ever():
    """sha256("0:a ball") and so on, first 6 bytes over 2^48, computed with `sha256sum`."""
    assert screening._hash_share("a ball", 0) == pytest.approx(int("eb9dcf553b73", 16) / 2**48)
    assert screening._hash_share(" A  ball ", 1) == pytest.approx(int("76c6f3e44a6e", 16) / 2**48)


def test_test_rows_stay_test_rows():
    found = entries(*(prompt(str(number)) for number in range(50)), split="test")
    assert screening.with_validation(found, 0.9, 0) == found
