import dataclasses
import math
from collections.abc import Generator
from typing import Any

import jaxtyping
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from align.objectives.pairs import Labels, PairBatch, PairErrors, View, preference_from

VIEW = View(caption="a red circle", frame_seconds=(0.0, 0.5, 1.0), crop=(0.0, 0.25, 0.5, 0.5))
SHAPE = (2, 4, 3, 2, 2)


@pytest.fixture
def unchecked() -> Generator[None]:
    """As outside of tests: shapes in annotations are not looked at."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


def labels(preference: Tensor | None = None, weight: Tensor | None = None) -> Labels:
    ones = torch.ones(2)
    return Labels(
        preference=ones if preference is None else preference,
        weight=ones if weight is None else weight,
    )


def batch(**changes: Any) -> PairBatch:
    fields: dict[str, Any] = {
        "chosen": torch.zeros(SHAPE),
        "rejected": torch.ones(SHAPE),
        "noise": torch.ones(SHAPE),
        "sigma": torch.tensor([0.1, 0.9]),
        "prompt_embeds": torch.zeros(2, 5, 8),
        "chosen_views": (VIEW, VIEW),
        "rejected_views": (VIEW, VIEW),
        "labels": labels(),
    }
    return PairBatch(**fields | changes)


def changed(**changes: Any) -> tuple[View, View]:
    return VIEW, dataclasses.replace(VIEW, **changes)


# What a pair shares -----------------------------------------------------------------------------------------


def test_noise_sigma_and_embeddings_exist_once_so_the_videos_cannot_get_different_ones():
    per_video = {"chosen", "rejected", "chosen_views", "rejected_views", "labels"}
    assert {field.name for field in dataclasses.fields(batch())} - per_video == {"noise", "sigma", "prompt_embeds"}


def test_a_caption_dropped_for_one_video_only_is_refused():
    with pytest.raises(ValueError, match="pair 1: caption is '' for chosen, 'a red circle' for rejected; draw it once"):
        batch(chosen_views=changed(caption=""))


def test_different_frames_are_refused():
    with pytest.raises(ValueError, match="pair 1: frame_seconds"):
        batch(rejected_views=changed(frame_seconds=(0.0, 0.5, 1.5)))


def test_different_crops_are_refused_by_name_and_are_no_crash_later():
    with pytest.raises(
        ValueError,
        match=r"pair 1: crop is \(0\.0, 0\.25, 0\.5, 0\.5\) for chosen, \(0\.0, 0\.0, 0\.5, 0\.5\) for rejected",
    ):
        batch(rejected_views=changed(crop=(0.0, 0.0, 0.5, 0.5)))


def test_captions_dropped_for_both_videos_are_fine():
    views = changed(caption="")
    assert batch(chosen_views=views, rejected_views=views).chosen_views[1].caption == ""


@pytest.mark.usefixtures("unchecked")
def test_videos_of_different_sizes_are_refused():
    with pytest.raises(ValueError, match=r"one shape, got .*resize the videos alike"):
        batch(rejected=torch.ones(2, 4, 3, 2, 4))


@pytest.mark.usefixtures("unchecked")
def test_noise_of_another_shape_is_refused():
    with pytest.raises(ValueError, match="one shape"):
        batch(noise=torch.ones(2, 1, 3, 2, 2))


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    "change",
    [
        {"sigma": torch.tensor([0.1])},
        {"prompt_embeds": torch.zeros(1, 5, 8)},
        {"rejected_views": (VIEW,)},
        {"labels": Labels(preference=torch.ones(3), weight=torch.ones(3))},
    ],
)
def test_one_number_of_pairs_in_all_fields(change: dict[str, Any]):
    with pytest.raises(ValueError, match="one number of pairs"):
        batch(**change)


# Labels -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("missing", [math.nan, -0.1, 1.1])
def test_a_missing_label_is_an_error_and_no_win_of_the_first_video(missing: float):
    with pytest.raises(ValueError, match="preference: expected probabilities"):
        labels(preference=torch.tensor([1.0, missing]))
    with pytest.raises(TypeError):
        Labels(weight=torch.ones(2))  # ty: ignore[missing-argument]


@pytest.mark.parametrize("weight", [math.nan, math.inf, -1.0])
def test_weights_are_finite_and_not_negative(weight: float):
    with pytest.raises(ValueError, match="weight: expected finite"):
        labels(weight=torch.tensor([1.0, weight]))


@pytest.mark.parametrize("name", ["policy_chosen", "policy_rejected", "reference_chosen", "reference_rejected"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_an_error_that_is_not_finite_is_named(name: str, bad: float):
    errors = dict.fromkeys(
        ("policy_chosen", "policy_rejected", "reference_chosen", "reference_rejected"), torch.ones(2)
    )
    with pytest.raises(ValueError, match=f"^{name}: expected finite"):
        PairErrors(**errors | {name: torch.tensor([1.0, bad])})


# Utilities --------------------------------------------------------------------------------------------------


def test_utilities_give_a_soft_label():
    """Utilities 2 and 1, temperature 1/2: sigmoid(1 / 0.5) = 1 / (1 + e^-2) = 0.880797; equal ones tie."""
    found = preference_from(torch.tensor([2.0, 3.0]), torch.tensor([1.0, 3.0]), 0.5)
    assert found.tolist() == pytest.approx([0.880797, 0.5], abs=1e-6)


@given(gap=st.floats(-3, 3), more=st.floats(0.01, 3), temperature=st.floats(0.5, 10))
def test_the_better_chosen_is_the_surer_the_label(gap: float, more: float, temperature: float):
    zero = torch.zeros(1, dtype=torch.float64)
    less_sure, surer = (preference_from(zero + g, zero, temperature) for g in (gap, gap + more))
    assert surer > less_sure
    torch.testing.assert_close(preference_from(zero, zero + gap, temperature), 1 - less_sure)


def test_utilities_must_be_known_and_the_temperature_positive():
    with pytest.raises(ValueError, match="utility of rejected: expected finite"):
        preference_from(torch.zeros(1), torch.tensor([math.nan]), 1.0)
    with pytest.raises(ValueError, match="utility of chosen: expected finite"):
        preference_from(torch.tensor([math.inf]), torch.zeros(1), 1.0)
    with pytest.raises(ValueError, match="temperature: expected a positive"):
        preference_from(torch.zeros(1), torch.zeros(1), 0.0)
