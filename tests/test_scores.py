import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from reward.records import DIMENSIONS, TAGS
from reward.scores import NUM_SCORES, SUB_DIMENSIONS, Outputs, Scores


def test_columns_by_name():
    """Columns 0 to 17: the reward, four parts, the cost, twelve tags."""
    scores = Scores.split(torch.arange(36.0).reshape(2, 18))
    assert scores.reward.tolist() == [0, 18]
    assert scores.sub.tolist() == [[1, 2, 3, 4], [19, 20, 21, 22]]
    assert scores.cost.tolist() == [5, 23]
    assert scores.tags[0].tolist() == list(range(6, 18))
    found = {dimension: scores.of(dimension).tolist() for dimension in DIMENSIONS}
    assert (found["helpfulness"], found["cost"], found["informativeness"]) == ([0, 18], [5, 23], [3, 21])
    assert [found[part][0] for part in SUB_DIMENSIONS] == [1, 2, 3, 4]
    assert NUM_SCORES == 18
    assert len(TAGS) == 12
    assert SUB_DIMENSIONS == ("instruction_following", "correctness", "informativeness", "aesthetics")


def test_mean_and_spread_by_hand():
    """Members say 1 and 4: the mean is 2.5, each 1.5 off."""
    outputs = Outputs(values=torch.tensor([1.0, 4.0])[:, None, None].expand(2, 3, 18))
    assert outputs.mean.cost.tolist() == [2.5] * 3
    assert outputs.spread.tags.unique().tolist() == [1.5]
    assert [member.reward.tolist() for member in outputs.members] == [[1.0] * 3, [4.0] * 3]


@given(seed=st.integers(0, 2**32 - 1), num_members=st.integers(1, 5))
def test_the_spread_is_never_negative_and_blind_to_a_shift(seed: int, num_members: int):
    values = torch.randn(num_members, 3, 18, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    spread, shifted = Outputs(values=values).spread, Outputs(values=values + 7).spread
    assert (spread.cost >= 0).all()
    torch.testing.assert_close(spread.cost, shifted.cost)
    if num_members == 1:
        assert not spread.tags.any()


def test_the_gradient_of_the_mean_is_shared():
    """Three members: each gets a third."""
    values = torch.zeros(3, 1, 18, requires_grad=True)
    Outputs(values=values).mean.reward.sum().backward()
    assert values.grad is not None
    assert values.grad[:, 0, 0].tolist() == pytest.approx([1 / 3] * 3)
    assert not values.grad[:, 0, 1:].any()
