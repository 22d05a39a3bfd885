from dataclasses import asdict

import numpy as np
import pyarrow as pa
import pytest

from reward.held_out import COLUMNS, HeldOut, count_pairs, count_videos, has_tag, is_unsafe, preferred, videos_in
from tests.tiny_held_out import Case, held_out, pair

CASES = [
    Case(preferred={"cost": 1.0}, unsafe=(True, False), crime=(None, True)),
    Case(preferred={"cost": 0.5}, unsafe=(None, False)),
    Case(preferred={"helpfulness": 0.0}),
]
PAIRS = [pair(number, case) for number, case in enumerate(CASES)]


def table(**errors: str) -> pa.Table:
    """Verdicts on the videos of PAIRS, last one first: the reward of video i is i, its cost 10 i; no parts, no tags."""
    rows = []
    for number, video in reversed([*enumerate(videos_in(PAIRS))]):
        error = errors.get(video.video_id.replace("-", "_"))
        known = {"reward": float(number), "cost": 10.0 * number} if error is None else {"reward": None, "cost": None}
        rows.append({"video_id": video.video_id, "error": error, **known})
    missing = pa.nulls(len(rows), pa.float64())
    found = pa.Table.from_pylist(rows, schema=pa.schema(dict.fromkeys(("reward", "cost"), pa.float64()) | TEXTS))
    for column in set(COLUMNS.values()) - {"reward", "cost"}:
        found = found.append_column(column, missing)
    return found


TEXTS = {"video_id": pa.string(), "error": pa.string()}


def test_scores_meet_their_videos_whatever_the_order_of_the_table():
    held = HeldOut.of(PAIRS, table())
    assert [video.video_id for video in held.videos] == ["p0-a", "p0-b", "p1-a", "p1-b", "p2-a", "p2-b"]
    assert held.scores["helpfulness"].tolist() == [0, 1, 2, 3, 4, 5]
    assert held.scores_of("cost", held.videos[::-2]).tolist() == [50, 30, 10]
    assert np.isnan(held.scores["instruction_following"]).all()
    assert np.isnan(held.scores["crime"]).all()


def test_a_video_that_could_not_be_judged_takes_its_pair_with_it_and_both_are_counted():
    held = HeldOut.of(PAIRS, table(p1_a="damaged"))
    assert [each.pair_id for each in held.pairs] == ["0", "2"]
    assert "p1-a" not in {video.video_id for video in held.videos}
    assert held.scores["helpfulness"].tolist() == [0, 1, 3, 4, 5]
    videos, pairs = count_videos(videos_in(PAIRS), held), count_pairs(PAIRS, held, excluded=7)
    assert asdict(videos) == {"attempted": 6, "scored": 5, "failed": 1, "excluded": 0}
    assert asdict(pairs) == {"attempted": 3, "scored": 2, "failed": 1, "excluded": 7}


def test_differences_are_the_first_less_the_second_of_labelled_pairs():
    compared = HeldOut.of(PAIRS, table()).compared("cost", preferred("cost"))
    assert compared.difference.tolist() == [-10, -10]
    assert compared.preference.tolist() == [1.0, 0.5]
    assert compared.prompt_ids.tolist() == ["p0", "p1"]


def test_unsafe_is_what_is_not_safe_and_unknown_is_neither():
    held = HeldOut.of(PAIRS, table())
    searched = held.searched("cost", is_unsafe)
    assert (searched.scores.tolist(), searched.positive.tolist()) == ([0, 10, 30], [True, False, False])
    assert searched.prompt_ids.tolist() == ["p0", "p0", "p1"]
    assert held.searched("crime", has_tag("crime")).positive.tolist() == [True]


def test_nothing_labelled_is_an_error():
    held = held_out(CASES)
    with pytest.raises(ValueError, match="no such pair has a label"):
        held.compared("aesthetics", preferred("aesthetics"))
    with pytest.raises(ValueError, match="no such video has a label"):
        held.only([True, False, False]).searched("porn", has_tag("porn"))
    assert [each.pair_id for each in held.only([False, True, True]).pairs] == ["1", "2"]
