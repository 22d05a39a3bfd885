import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from align.pairing import Comparison, Pairing, compare, weigh

ROWS = {
    "prompts": np.array(["a", "a", "a", "b", "b", "c", "c"]),
    "utility": np.array([3.0, 1.0, 2.0, -1.0, -2.0, 5.0, 4.0]),
    "cost": np.array([1.0, -1.0, -2.0, 2.0, 1.0, -1.0, -3.0]),
}
UNSAFE = ROWS["cost"] > 0
"""Of a, the best one is unsafe; of b, all; of c, none."""


def pairs(**settings: object) -> list[tuple[int, int]]:
    found = compare(Pairing(**settings), ROWS["prompts"], ROWS["utility"], ROWS["cost"], UNSAFE)  # ty: ignore
    return [(pair.chosen, pair.rejected) for pair in found]


def test_the_best_is_chosen_and_the_worst_rejected():
    assert pairs() == [(0, 1), (3, 4), (5, 6)]


def test_a_safe_video_beats_a_more_useful_unsafe_one_only_if_asked():
    """Of a's safe videos, 2 has the higher utility; the only unsafe one is 0."""
    assert pairs(safe_first=True) == [(2, 0), (3, 4), (5, 6)]


@pytest.mark.parametrize(("policy", "of_b"), [("drop", []), ("by_utility", [(3, 4)]), ("by_cost", [(4, 3)])])
def test_where_all_are_unsafe_the_declared_policy_holds(policy: str, of_b: list[tuple[int, int]]):
    assert [pair for pair in pairs(all_unsafe=policy) if pair[0] in (3, 4)] == of_b


def test_pairs_closer_than_the_least_gap_are_left_out():
    """Gaps: a 2, b 1, c 1."""
    assert pairs(least_gap=1.5) == [(0, 1)]


def test_safety_needs_no_gap_if_it_comes_first():
    assert (2, 0) in pairs(safe_first=True, least_gap=9.0)


def test_equal_videos_are_no_pair():
    found = compare(Pairing(), np.array(["a", "a"]), np.ones(2), -np.ones(2), np.zeros(2, dtype=bool))
    assert found == []


def test_labels_soften_with_the_gap():
    """sigmoid(2 / 2) = .7311."""
    (first, *_) = compare(Pairing(temperature=2.0), ROWS["prompts"], ROWS["utility"], ROWS["cost"], UNSAFE)
    assert first.preference == pytest.approx(0.7310586)
    assert first == Comparison(chosen=0, rejected=1, preference=first.preference)


def test_several_pairs_of_a_prompt_share_no_video():
    prompts, utility = np.array(["a"] * 5), np.array([1.0, 5.0, 3.0, 2.0, 4.0])
    found = compare(Pairing(pairs_per_prompt=3), prompts, utility, -np.ones(5), np.zeros(5, dtype=bool))
    assert [(pair.chosen, pair.rejected) for pair in found] == [(1, 0), (4, 3)]


@given(st.lists(st.tuples(st.sampled_from("ab"), st.floats(-3, 3), st.floats(-1, 1)), min_size=1, max_size=12))
def test_chosen_is_never_worse_and_always_of_the_same_prompt(rows: list[tuple[str, float, float]]):
    prompts, utility, cost = (np.array(column) for column in zip(*rows, strict=True))
    for pair in compare(Pairing(pairs_per_prompt=4), prompts, utility, cost, cost > 0):
        assert prompts[pair.chosen] == prompts[pair.rejected]
        assert utility[pair.chosen] > utility[pair.rejected]


def made(*places: tuple[int, int]) -> list[Comparison]:
    return [Comparison(chosen=chosen, rejected=rejected, preference=1.0) for chosen, rejected in places]


def test_harmful_pairs_get_their_share_of_the_loss():
    """Of four pairs one has an unsafe video: .6 of 4 for it, .4 of 4 for the three others together."""
    unsafe = np.array([False, True, False, False, False, False, True, True])
    pairs = made((0, 1), (2, 3), (4, 5), (6, 7))
    found = weigh(Pairing(harm_share=0.6), pairs, unsafe, has_price=True)
    assert found == pytest.approx([2.4, 1.6 / 3, 1.6 / 3, 1.6 / 3])


def test_a_pair_that_harm_won_is_harmful_too():
    found = weigh(Pairing(harm_share=0.75), made((1, 0), (2, 3)), np.arange(4) == 1, has_price=True)
    assert found == pytest.approx([1.5, 0.5])


def test_harm_without_a_price_has_no_share():
    found = weigh(Pairing(harm_share=0.75), made((1, 0), (2, 3)), np.arange(4) == 1, has_price=False)
    assert found == [1.0, 1.0]


@pytest.mark.parametrize(("share", "unsafe"), [(None, [True, False, False, False]), (0.6, [False] * 4)])
def test_pairs_weigh_the_same_without_a_share_or_of_one_kind(share: float | None, unsafe: list[bool]):
    assert weigh(Pairing(harm_share=share), made((0, 1), (2, 3)), np.array(unsafe), has_price=True) == [1.0, 1.0]


def test_no_pairs_have_no_weights():
    assert weigh(Pairing(harm_share=0.6), [], np.zeros(2, dtype=bool), has_price=True) == []
