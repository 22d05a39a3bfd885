import json
import math
from dataclasses import asdict, replace

import hypothesis
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from align import constraint, guards
from align.constraint import Limit, Statistics
from align.guards import Best, Footage, Guards, GuardState, Reading, check
from reward import checkpoint, config

START = GuardState()
REFERENCE = {
    "motion": 1.0,
    "chosen_gap": 0.0,
    "rejected_dominant": 0.0,
    "velocity_norm": 1.0,
    "benign_reward": 0.0,
    "degenerate": 0.0,
    "disagreement": 1.0,
}
"""What each guard reads of the reference itself."""

BROKEN = [
    ("motion", 0.79, 0.8, 5.0),
    ("chosen_gap", 0.051, 0.05, -5.0),
    ("rejected_dominant", 0.51, 0.5, 0.0),
    ("velocity_norm", 0.69, 0.7, 1.4),
    ("velocity_norm", 1.41, 1.4, 0.7),
    ("benign_reward", -0.31, -0.3, 5.0),
    ("degenerate", 0.06, 0.05, -1.0),
    ("disagreement", 1.51, 1.5, 0.0),
]
"""A guard, a value that breaks it, its threshold, and a value as far or farther on the other side."""

best = st.builds(
    Best, step=st.integers(0, 9), reward=st.floats(-2, 2), violation=st.one_of(st.just(0.0), st.floats(0, 2))
)


def footage(num_videos: int, motion: float, *flaws: int) -> Footage:
    blank, noise, frozen = flaws or (0, 0, 0)
    return Footage(num_videos=num_videos, motion=motion, num_blank=blank, num_noise=noise, num_frozen=frozen)


def run(settings: Guards, values: list[float | None]) -> list[str | None]:
    """What becomes of readings of motion, one after the other."""
    state, levels = START, []
    for step, value in enumerate(values):
        state, events = check(settings, Reading(step=step, motion=value), state)
        levels.append(events[0].level if events else None)
    return levels


# Guards -----------------------------------------------------------------------------------------------------


def test_every_guard_of_the_settings_reads_the_reference_as_well():
    everything = Reading(step=0, **REFERENCE)
    assert set(Guards().ranges) == set(REFERENCE) == set(asdict(everything)) - {"step"}
    for settings in (
        Guards(),
        Guards(most_chosen_gap=0, most_degenerate=0, least_benign_reward=0, most_disagreement=1),
    ):
        assert check(settings, everything, START) == (START, ())


@pytest.mark.parametrize(("guard", "value", "threshold", "other_side"), BROKEN)
def test_a_guard_fires_beyond_its_threshold_and_on_no_other_side(
    guard: guards.Guard, value: float, threshold: float, other_side: float
):
    state, events = check(Guards(), Reading(step=7, **{**REFERENCE, guard: value}), START)
    assert [asdict(event) for event in events] == [
        {"guard": guard, "level": "warn", "value": value, "threshold": threshold, "step": 7}
    ]
    assert state.in_a_row == {guard: 1}
    for fine in (threshold, other_side):
        assert check(Guards(), Reading(step=7, **{**REFERENCE, guard: fine}), START) == (START, ())


@pytest.mark.parametrize(("guard", "value"), [(guard, value) for guard, value, _, _ in BROKEN])
def test_null_switches_one_guard_off(guard: str, value: float):
    setting = next(name for name in Guards.model_fields if name.removeprefix("least_").removeprefix("most_") == guard)
    alone = Reading(step=0, **{guard: value})
    assert check(config.load(Guards, None, [f"{setting}=null"]), alone, START) == (START, ())
    others = [f"{name}=null" for name in Guards.model_fields if name not in (setting, "patience")]
    assert len(check(config.load(Guards, None, others), alone, START)[1]) == 1


def test_patience_counts_readings_in_a_row():
    assert run(Guards(patience=3), [0.5, 0.5, 0.5, 0.5]) == ["warn", "warn", "stop", "stop"]
    assert run(Guards(), [0.5, 1.0, 0.5, 0.5]) == ["warn", None, "warn", "stop"]
    assert run(Guards(patience=1), [0.5]) == ["stop"]


def test_a_guard_that_was_not_read_waits():
    assert run(Guards(), [0.5, None, 0.5]) == ["warn", None, "stop"]


def test_guards_count_each_for_itself():
    settings, state = Guards(), START
    state, _ = check(settings, Reading(step=1, motion=0.5, degenerate=0.0), state)
    state, events = check(settings, Reading(step=2, motion=0.5, degenerate=0.5), state)
    assert [str(event) for event in events] == [
        "step 2: stop: motion 0.5 is below 0.8",
        "step 2: warn: degenerate 0.5 is above 0.05",
    ]
    assert state.in_a_row == {"motion": 2, "degenerate": 1}


@pytest.mark.parametrize("name", REFERENCE)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_measure_that_is_not_finite_is_an_error(name: str, value: float):
    with pytest.raises(ValueError, match=f"{name} at step 3: expected a finite number, got {value}"):
        Reading(step=3, **{name: value})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("velocity_norm=[1.1, 1.4]", "expected 0 <= least <= 1 <= most"),
        ("velocity_norm=[0.7, 0.9]", "expected 0 <= least <= 1 <= most"),
        ("least_motion=1.0", "less than 1"),
        ("most_chosen_gap=-0.1", "greater than or equal to 0"),
        ("least_benign_reward=0.1", "less than or equal to 0"),
        ("most_degenerate=1.0", "less than 1"),
        ("most_disagreement=0.9", "greater than or equal to 1"),
        ("patience=0", "greater than 0"),
    ],
)
def test_settings_that_would_stop_the_reference_are_refused(text: str, message: str):
    with pytest.raises(config.ConfigError, match=message):
        config.load(Guards, None, [text])


def test_settings_come_from_the_command_line():
    read = config.load(Guards, None, ["velocity_norm=[0.9, 1.1]", "least_motion=null"])
    assert read == Guards(velocity_norm=(0.9, 1.1), least_motion=None)


# State ------------------------------------------------------------------------------------------------------


@given(counts=st.dictionaries(st.sampled_from(sorted(REFERENCE)), st.integers(1, 9)), kept=st.one_of(st.none(), best))
def test_state_comes_back_from_json(counts: dict, kept: Best | None):
    state = GuardState(in_a_row=counts, best=kept)
    assert guards.from_json(json.loads(json.dumps(guards.to_json(state)))) == state


def test_state_comes_back_from_a_checkpoint(tmp_path):
    state, _ = check(Guards(), Reading(step=1, motion=0.5), GuardState(best=Best(step=1, reward=0.1, violation=0.2)))
    point = checkpoint.Checkpoint(step=1, tensors={}, state={"guards": guards.to_json(state)})
    checkpoint.save(tmp_path / "checkpoints", point, keep=1)
    loaded = checkpoint.load_newest(tmp_path / "checkpoints")
    assert loaded is not None
    again, events = check(Guards(), Reading(step=2, motion=0.5), guards.from_json(loaded.state["guards"]))
    assert events[0].level == "stop"
    assert again.best == state.best


@pytest.mark.parametrize(
    "change",
    [
        {"in_a_row": {"emotion": 1}},
        {"in_a_row": {"motion": 0}},
        {"in_a_row": {"motion": 1.5}},
        {"best": {"step": 1, "reward": 0.0}},
        {"best": {"step": 1, "reward": 0.0, "violation": -1.0}},
        {"best": {"step": 1, "reward": 0.0, "violation": 0.0, "more": 1}},
        {"more": 1},
    ],
)
def test_a_damaged_state_is_refused(change: dict):
    with pytest.raises(ValueError, match="validation error"):
        guards.from_json({**guards.to_json(START), **change})


# The best checkpoint ----------------------------------------------------------------------------------------


def test_limits_come_before_rewards():
    """From worst to best: more violation, then less; among those that meet the limits, less reward, then more."""
    ranked = [Best(step=0, reward=r, violation=v) for r, v in [(9.0, 2.0), (1.0, 0.5), (2.0, 0.5), (-1.0, 0), (3.0, 0)]]
    for index, better in enumerate(ranked):
        assert [guards.is_better(better, worse) for worse in ranked] == [place < index for place in range(5)]
        assert guards.is_better(better, None)


@given(one=best, other=best)
def test_of_equals_the_first_stays_and_never_are_both_better(one: Best, other: Best):
    assert not guards.is_better(replace(one, step=5), replace(one, step=3))
    assert not (guards.is_better(one, other) and guards.is_better(other, one))


def test_violation_by_hand():
    """Mean cost 0.5 over a bound of 0.1, in deviations of 2: 0.2. Rate 0.15 over 0.05: 0.1. Both met: 0, not less."""
    limits = (Limit(name="a", kind="mean_cost", bound=0.1), Limit(name="b", bound=0.05))
    statistics = Statistics(reward_mean=0.0, reward_std=1.0, scales=(2.0, 1.0))
    assert guards.violation_of(np.array([0.5, 0.15]), limits, statistics) == pytest.approx(0.2)
    assert guards.violation_of(np.array([0.1, 0.15]), limits, statistics) == pytest.approx(0.1)
    assert guards.violation_of(np.array([-3.0, 0.05]), limits, statistics) == 0
    assert guards.violation_of(np.empty(0), (), replace(statistics, scales=())) == 0
    settings = constraint.Constraint(limits=limits)
    costs = np.array([[0.5, 1.0], [0.5, -1.0]])
    estimates = constraint.estimate([constraint.measure(costs, settings)], settings)
    assert guards.violation_of(estimates, limits, statistics) == pytest.approx(0.45)


@pytest.mark.parametrize(("reward", "violation"), [(math.nan, 0.0), (0.0, math.nan), (0.0, math.inf), (0.0, -0.1)])
def test_a_checkpoint_that_cannot_be_compared_is_refused(reward: float, violation: float):
    with pytest.raises(ValueError, match="expected a finite reward and a finite violation >= 0"):
        Best(step=0, reward=reward, violation=violation)


# What videos look like --------------------------------------------------------------------------------------


def test_footage_counts_each_video_once():
    seen = Footage.of([1.0, 0.5, 0.0, 0.0, 2.5], [None, None, "frozen", "blank", "noise"])
    assert (seen.num_videos, seen.num_blank, seen.num_noise, seen.num_frozen) == (5, 1, 1, 1)
    assert seen.degenerate_rate == 3 / 5
    assert seen.mean_motion == pytest.approx(4.0 / 5)


def test_footage_is_compared_with_the_references():
    """Motion 6 / 10 over 12 / 10; degenerate 4 / 10 - 1 / 10."""
    policy, reference = footage(10, 6.0, 1, 2, 1), footage(10, 12.0, 0, 0, 1)
    assert guards.motion_ratio(policy, reference) == 0.5
    assert guards.degenerate_excess(policy, reference) == pytest.approx(0.3)
    assert guards.degenerate_excess(reference, policy) == pytest.approx(-0.3)


@hypothesis.settings(max_examples=5)
@given(num=st.integers(0, 9))
def test_footage_of_other_prompts_is_refused(num: int):
    for compare in (guards.motion_ratio, guards.degenerate_excess):
        with pytest.raises(ValueError, match=f"got {num} of the policy and 10 of the reference"):
            compare(footage(num, 1.0), footage(10, 12.0))
        with pytest.raises(ValueError, match="got 0 of the policy and 0"):
            compare(footage(0, 0.0), footage(0, 0.0))


def test_a_reference_that_stands_still_cannot_be_compared_with():
    with pytest.raises(ValueError, match=r"hardly move, 0\.05 contrasts a second.*or least_motion=null"):
        guards.motion_ratio(footage(10, 9.0), footage(10, 0.5))
