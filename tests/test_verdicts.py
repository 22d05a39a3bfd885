import json
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from reward.config import ConfigError, load
from reward.records import TAGS
from reward.scores import SUB_DIMENSIONS, Outputs
from reward.verdicts import NAMES, Calibration, FileVerdict, Spread, Verdicts, calibrated

ALL = Calibration(
    reward_mean=1.0, reward_scale=2.0, cost_scale=4.0, cost_has_zero=True, tag_offsets=(0.0,) * 12, trained=NAMES
)
numbers = st.floats(-50, 50, width=32, allow_subnormal=False)


def outputs(*members: list[float]) -> Outputs:
    """Members that each say one value of one video in all 18 columns, or 18 values."""
    rows = [torch.tensor(member).expand(18) for member in members]
    return Outputs(values=torch.stack(rows)[:, None])


def verdicts(cost: float, *, cost_has_zero: bool = True) -> Verdicts:
    one = torch.tensor([1.0])
    return Verdicts(
        reward=one,
        sub=torch.ones(1, 4),
        cost=torch.tensor([cost]),
        cost_has_zero=cost_has_zero,
        tags=torch.ones(1, 12),
        spread=Spread(reward=one, cost=one),
    )


# From scores to verdicts ------------------------------------------------------------------------------------


def test_two_members_by_hand():
    """Members 2 and 6: mean 4, spread 2. Reward (4 - 1) / 2 = 1.5, its spread 2 / 2 = 1; cost 4 / 4 = 1, its
    spread 2 / 4 = 0.5; parts stay 4. A tag with offset 4 is at logit 0, so 1 / 2; with 3, 1 / (1 + 1 / e) = 0.731.
    """
    scales = ALL.model_copy(update={"tag_offsets": (4.0, 3.0) + (4.0,) * 10})
    found = calibrated(outputs([2.0], [6.0]), scales)
    assert (found.reward.tolist(), found.cost.tolist(), found.sub.tolist()) == ([1.5], [1.0], [[4.0] * 4])
    assert (found.spread.reward.tolist(), found.spread.cost.tolist()) == ([1.0], [0.5])
    assert found.tags[0, 0].item() == 0.5
    assert found.tags[0, 1].item() == pytest.approx(1 / (1 + math.exp(-1)))


def test_columns_have_their_names():
    """Column i holds i: 0 is helpfulness, 1 to 4 its parts, 5 the cost; the offsets bring tags 6 to 17 to 0 to 1.1."""
    offsets = tuple(6 + 0.9 * i for i in range(12))
    plain = {"reward_mean": 0.0, "reward_scale": 1.0, "cost_scale": 1.0, "tag_offsets": offsets}
    found = calibrated(outputs([float(i) for i in range(18)]), ALL.model_copy(update=plain))
    assert found.reward.item() == NAMES.index("helpfulness") == 0
    assert found.cost.item() == NAMES.index("cost") == 5
    assert found.sub[0].tolist() == [NAMES.index(name) for name in SUB_DIMENSIONS] == [1, 2, 3, 4]
    torch.testing.assert_close(found.tags[0].logit(), torch.arange(12) / 10, rtol=0, atol=1e-5)
    assert NAMES[6:] == TAGS


@given(st.lists(numbers, min_size=1, max_size=4), st.floats(0.01, 100), st.floats(-10, 10))
def test_the_zero_of_the_cost_survives(costs: list[float], scale: float, mean: float):
    scales = ALL.model_copy(update={"cost_scale": scale, "reward_mean": mean})
    found = calibrated(outputs(*([cost] for cost in costs)), scales)
    raw = torch.tensor(costs)[:, None, None].mean(0)[0]
    assert torch.equal(found.cost.sign(), raw.sign())
    assert torch.equal(found.unsafe, raw > 0)


@given(st.lists(numbers, min_size=2, max_size=2, unique=True))
def test_more_is_more(pair: list[float]):
    low, high = (calibrated(outputs([value]), ALL) for value in sorted(pair))
    for name in ("reward", "sub", "cost", "tags"):
        assert (getattr(low, name) <= getattr(high, name)).all(), name


@pytest.mark.parametrize("name", NAMES)
def test_what_was_not_trained_is_nan_and_nothing_else(name: str):
    scales = ALL.model_copy(update={"trained": tuple(other for other in NAMES if other != name)})
    found = calibrated(outputs([1.0], [2.0]), scales)
    every = torch.cat([found.reward[:, None], found.sub, found.cost[:, None], found.tags], dim=1)[0]
    assert [other for other, value in zip(NAMES, every.tolist(), strict=True) if math.isnan(value)] == [name]
    assert found.spread.reward.isnan().item() == (name == "helpfulness")
    assert found.spread.cost.isnan().item() == (name == "cost")


@pytest.mark.parametrize(
    ("cost", "unsafe"),
    [(-1.0, False), (0.0, False), (-0.0, False), (1e-30, True), (math.nan, True), (math.inf, True)],
)
def test_only_a_cost_up_to_zero_is_safe(cost: float, unsafe: bool):
    assert verdicts(cost).unsafe.tolist() == [unsafe]
    assert verdicts(cost, cost_has_zero=False).unsafe.tolist() == [True]


# The calibration --------------------------------------------------------------------------------------------


def test_a_calibration_comes_back_from_json(tmp_path):
    (tmp_path / "calibration.json").write_text(json.dumps(ALL.model_dump(mode="json"), indent=2))
    assert load(Calibration, tmp_path / "calibration.json") == ALL


def test_thetas_come_back_from_json_and_older_calibrations_have_none(tmp_path):
    (tmp_path / "with.json").write_text(ALL.model_copy(update={"thetas": {"helpfulness": 0.1 + 3}}).model_dump_json())
    (tmp_path / "older.json").write_text(ALL.model_dump_json(exclude={"thetas"}))
    assert load(Calibration, tmp_path / "with.json").thetas == {"helpfulness": 0.1 + 3}
    assert load(Calibration, tmp_path / "older.json") == ALL


def test_units_of_raw_scores():
    """Rewards are divided by 2 and costs by 4; parts stay."""
    assert [ALL.unit(dimension) for dimension in ("helpfulness", "cost", "aesthetics")] == [2, 4, 1]


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"reward_scale": 0.0}, "reward_scale"),
        ({"cost_scale": -1.0}, "cost_scale"),
        ({"reward_mean": float("nan")}, "reward_mean"),
        ({"tag_offsets": [0.0] * 11}, "tag_offsets"),
        ({"trained": ["costs"]}, "trained.0"),
        ({"thetas": {"helpfulness": 1.0}}, "thetas.helpfulness"),
        ({"thetas": {"crime": 2.0}}, "thetas.crime"),
        ({"scale": 1.0}, "unknown key"),
    ],
)
def test_a_wrong_calibration_is_refused(changes, problem: str, tmp_path):
    (tmp_path / "calibration.json").write_text(json.dumps(ALL.model_dump(mode="json") | changes))
    with pytest.raises(ConfigError, match=problem):
        load(Calibration, tmp_path / "calibration.json")


def test_a_calibration_has_to_say_whether_its_cost_has_a_zero(tmp_path):
    (tmp_path / "calibration.json").write_text(json.dumps(ALL.model_dump(mode="json", exclude={"cost_has_zero"})))
    with pytest.raises(ConfigError, match="cost_has_zero: is missing"):
        load(Calibration, tmp_path / "calibration.json")


# Of one file ------------------------------------------------------------------------------------------------


def test_a_file_is_unsafe_unless_all_say_it_is_safe():
    def unsafe(cost: float, **rules: float) -> bool:
        return FileVerdict.of("clip.mp4", verdicts(cost), rules).unsafe

    assert not unsafe(-1.0)
    assert not unsafe(-1.0, flash=-1.0, nsfw=0.0)
    assert unsafe(1.0, flash=-1.0)
    assert unsafe(-1.0, flash=0.1, nsfw=-1.0)
    assert unsafe(math.nan, flash=-1.0)
    assert unsafe(-1.0, flash=math.nan)
    assert FileVerdict(file="clip.mp4", error="damaged").unsafe


def test_rules_can_judge_without_a_model_but_nobody_finds_nothing_safe():
    found = FileVerdict.of("clip.mp4", None, {"flash": -1.0})
    assert (found.unsafe, found.rules, found.reward, found.tags) == (False, {"flash": "pass"}, None, None)
    assert FileVerdict.of("clip.mp4", None, {"flash": -1.0, "nsfw": 0.1}).unsafe
    assert FileVerdict.of("clip.mp4", None, {}).unsafe


def test_what_is_not_known_is_null():
    scales = ALL.model_copy(update={"trained": ("helpfulness", "porn")})
    found = FileVerdict.of("clip.mp4", calibrated(outputs([1.0], [3.0]), scales), {"flash": -0.5, "nsfw": math.nan})
    assert (found.reward, found.cost, found.unsafe, found.error) == (0.5, None, True, None)
    assert found.parts == dict.fromkeys(SUB_DIMENSIONS)
    assert found.spread == {"reward": 0.5, "cost": None}
    assert found.tags is not None
    assert [tag for tag, probability in found.tags.items() if probability is not None] == ["porn"]
    assert found.rules == {"flash": "pass", "nsfw": "fail"}
    assert found.rule_costs == {"flash": -0.5, "nsfw": None}
