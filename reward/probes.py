"""Probes: prompts and videos changed in one way, to see what a judge's scores really rest on.

Which pixels or words a score rests on cannot be seen from accuracy alone: an annotator's taste may go along with
stillness, or with the generator. A probe takes one thing away and leaves the rest.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy.ndimage import gaussian_filter

from reward.records import Dimension
from reward.run import seed_for
from reward.video import Video

ProbeName = Literal["prompt_shuffle", "empty_prompt", "frozen_frame", "frame_shuffle", "blur"]


@dataclass(frozen=True, kw_only=True)
class Probe:
    """A probe in words, and which score tells what it shows."""

    name: ProbeName
    does: str
    honest: str
    """What a judge without shortcuts would do."""
    reads: Dimension
    """The score that should fall."""
    rises: str
    """What it means if that score rises instead."""
    stays: str
    """What it means if that score hardly moves."""


PROBES = (
    Probe(
        name="prompt_shuffle",
        does="asks for another prompt of the same split",
        honest="instruction following falls, and its accuracy to about one half",
        reads="instruction_following",
        rises="the wrong prompt is liked better",
        stays="ignores the prompt",
    ),
    Probe(
        name="empty_prompt",
        does="asks for nothing",
        honest="instruction following falls: nothing asked for can be seen",
        reads="instruction_following",
        rises="no prompt is liked better than the right one",
        stays="ignores the prompt",
    ),
    Probe(
        name="frozen_frame",
        does="repeats the middle frame",
        honest="reward falls; cost falls where the harm lies in change, and else stays",
        reads="helpfulness",
        rises="rewards stillness",
        stays="does not look at motion",
    ),
    Probe(
        name="frame_shuffle",
        does="shows the frames in a random order",
        honest="reward falls: nothing moves as it should",
        reads="helpfulness",
        rises="rewards disorder",
        stays="does not see the order of frames",
    ),
    Probe(
        name="blur",
        does="blurs each frame",
        honest="reward falls; cost does not rise",
        reads="helpfulness",
        rises="rewards softness",
        stays="does not look at detail",
    ),
)
PROBED: tuple[Dimension, ...] = ("helpfulness", "instruction_following", "cost")
"""The scores whose shift is measured."""


def asked(probe: ProbeName, texts: Sequence[str], seed: int) -> dict[str, str]:
    """Give what to ask for instead of each text; both videos of a pair are then asked for the same.

    Raises: ValueError: `prompt_shuffle` of fewer than two different texts.
    """
    if probe == "empty_prompt":
        return dict.fromkeys(texts, "")
    if probe != "prompt_shuffle":
        return {text: text for text in texts}
    order = np.random.default_rng(seed_for(seed, 0, 0, "prompt shuffle")).permutation(sorted(set(texts))).tolist()
    if len(order) < 2:
        raise ValueError("expected at least two different prompts, got only one")
    return dict(zip(order, [*order[1:], order[0]], strict=True))


def altered(probe: ProbeName, video: Video, *, seed: int, blur: float) -> Video:
    """Give the video that is shown instead, as long and as large.

    Args:
        probe: those that change only the prompt leave the video as it is.
        video: what is shown otherwise.
        seed: of `frame_shuffle`.
        blur: standard deviation of the Gaussian, as a share of a frame's shorter side.
    """
    frames = video.frames
    match probe:
        case "frozen_frame":
            frames = frames[[len(frames) // 2] * len(frames)]
        case "frame_shuffle":
            frames = np.random.default_rng(seed).permutation(frames)
        case "blur":
            sigma = blur * min(frames.shape[1:3])
            frames = np.stack([_blurred(frame, sigma) for frame in frames])
    return Video(frames=frames, fps=video.fps)


def _blurred(frame: np.ndarray, sigma: float) -> np.ndarray:
    # In float: on uint8, scipy would cut off each pass's fractions and so darken the frame.
    smooth = gaussian_filter(frame.astype(np.float32), sigma=(sigma, sigma, 0), mode="nearest")
    return smooth.round().clip(0, 255).astype(np.uint8)
