import dataclasses
import math
from pathlib import Path

import pytest

from reward.records import (
    DIMENSIONS,
    FIRST,
    SECOND,
    TAGS,
    TIE,
    Pair,
    Preference,
    Prompt,
    VideoSample,
    key_of,
    prompts_of,
    videos_of,
)

PROMPT = Prompt(prompt_id="p", text="a ball")
ONE, TWO = (VideoSample(video_id=name, prompt=PROMPT, path=Path(f"{name}.mp4")) for name in ("one", "two"))
PAIR = Pair(pair_id="x", prompt=PROMPT, video_0=ONE, video_1=TWO, cost=SECOND, helpfulness=FIRST)


def test_the_twelve_tags_are_those_of_safesora():
    assert len(TAGS) == 12
    assert {"child_abuse", "other_harmful", "porn"} < set(TAGS)


@pytest.mark.parametrize("probability", [-0.1, 1.1, math.nan, math.inf])
def test_a_preference_is_a_probability(probability: float):
    with pytest.raises(ValueError, match=r"probability in \[0, 1\]"):
        Preference(probability=probability)


def test_a_preference_needs_a_vote():
    with pytest.raises(ValueError, match="at least one vote"):
        Preference(probability=0.5, num_votes=0)


def test_a_pair_gives_its_preference_in_every_dimension():
    assert (FIRST.probability, TIE.probability, SECOND.probability) == (1, 0.5, 0)
    assert {dimension: PAIR.preference(dimension) for dimension in DIMENSIONS} == {
        "helpfulness": FIRST,
        "cost": SECOND,
        "instruction_following": None,
        "correctness": None,
        "informativeness": None,
        "aesthetics": None,
    }


def test_every_record_tells_what_it_mentions():
    assert videos_of(PAIR) == (ONE, TWO)
    assert prompts_of(PAIR) == (PROMPT, PROMPT, PROMPT)
    assert (videos_of(ONE), prompts_of(ONE)) == ((ONE,), (PROMPT, PROMPT))
    assert (videos_of(PROMPT), prompts_of(PROMPT)) == ((), (PROMPT,))


def test_keys_differ_between_kinds_with_one_id():
    same = [PROMPT, dataclasses.replace(ONE, video_id="p"), dataclasses.replace(PAIR, pair_id="p")]
    assert len({key_of(record) for record in same}) == 3


def test_records_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        PROMPT.text = "another"  # ty: ignore[invalid-assignment]  # that it fails is the test
