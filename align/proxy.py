"""The judge beside gold, round by round of a run: is the policy better, or only better at pleasing its judge?

    RUN/validation/manifest.jsonl   the validation clips of all rounds that have them, for gold to measure
    RUN/validation/gold.jsonl       what gold says of them, in the form of `align/scoring.py`

Nothing is learnt from these clips, nor from what gold says. Over-optimisation of a measure begins at the round where
gold's mean is highest, the first if there are several, if at some later round the judge's mean is clearly higher than
there, and gold's clearly lower: the 95 % intervals of both changes, from drawing whole prompts, leave out 0. They are
those of one later round; where many are looked at, chance finds one more often.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import matplotlib.style
import numpy as np
from jaxtyping import Bool, Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from align.charts import Chart
from align.findings import number
from align.folder import fingerprint
from align.history import History
from align.rollouts import Rollout
from align.scoring import Gold, Look, Said
from align.table import DEGENERATE
from reward import metrics
from reward.files import replacing
from reward.metrics import Estimate

Clips = Float[np.ndarray, "r p"]
"""A row for each round, a column for each prompt; more is better."""

_COLOURS = {"judge": "#D55E00", "gold": "#0072B2"}


@dataclass(frozen=True, kw_only=True, eq=False)
class Track:
    """One measure of the validation clips."""

    name: str
    judge: Clips
    gold: Clips
    """What failed or is degenerate has the lowest of all."""


@dataclass(frozen=True, kw_only=True)
class Turn:
    """Where over-optimisation begins, and where it is seen: rows, from 0."""

    begins: int
    seen: int
    judge: Estimate
    """Change of the judge's mean in between, > 0."""
    gold: Estimate
    """Change of gold's, < 0."""


@dataclass(frozen=True, kw_only=True)
class Watched:
    """What judge and gold say of a run's rounds."""

    rounds: tuple[int, ...]
    unmeasured: tuple[int, ...]
    """Rounds with clips that gold has not measured yet, which are left out."""
    tracks: tuple[Track, ...]
    """Safety, and helpfulness where gold measures it."""


# Files ------------------------------------------------------------------------------------------------------


def list_clips(told: History) -> int:
    """Write the manifest, and give the number of clips.

    Raises: DataError: a file of the run is damaged.
    """
    folder = told.folder / "validation"
    lines = [
        {"file": file, "sha256": fingerprint(folder / file), "prompt": rollout.prompt, "round": number}
        for number, made in told.validation().items()
        for rollout in made
        for file in [_file(number, rollout)]
    ]
    with replacing(folder / "manifest.jsonl") as new:
        new.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")
    return len(lines)


def read(told: History) -> Watched | None:
    """Read what gold says of a run; None where nothing is measured.

    Raises: DataError: gold cannot be read, or is of other clips.
    """
    path = told.folder / "validation" / "gold.jsonl"
    if not path.is_file():
        return None
    gold, made = Gold.read(path), told.validation()
    known = [number for number in made if all(_file(number, clip) in gold.measures for clip in made[number])]
    if not known:
        return None
    clips = [made[number] for number in known]
    said = [[_said(told, gold, number, clip) for clip in made[number]] for number in known]
    return Watched(
        rounds=tuple(known),
        unmeasured=tuple(number for number in made if number not in known),
        tracks=tuple(_tracks(clips, said)),
    )


def _file(number: int, clip: Rollout) -> str:
    return f"{number:04d}/{clip.file}"


def _said(told: History, gold: Gold, number: int, clip: Rollout) -> Said:
    file = _file(number, clip)
    return gold.of(file, fingerprint(told.folder / "validation" / file))


def _tracks(clips: Sequence[Sequence[Rollout]], said: Sequence[Sequence[Said]]) -> Iterator[Track]:
    broken = np.array([[one.error is not None for one in row] for row in said]) | _degenerate(clips, said)
    yield Track(
        name="share of safe clips",
        judge=np.array([[not clip.unsafe for clip in row] for row in clips], dtype=float),
        gold=np.array([[one.unsafe is False for one in row] for row in said]) * ~broken * 1.0,
    )
    helpful = np.array([[one.scores.get("gold.helpfulness") for one in row] for row in said], dtype=float)
    if not np.isnan(helpful).all():
        rewards = np.array([[clip.reward for clip in row] for row in clips])
        gold = np.where(broken | np.isnan(helpful), np.nanmin(helpful), helpful)
        yield Track(name="helpfulness", judge=_standard(rewards), gold=_standard(gold))


def _degenerate(clips: Sequence[Sequence[Rollout]], said: Sequence[Sequence[Said]]) -> Bool[np.ndarray, "r p"]:
    """Tell which clips show nothing, beside those of the first round, which are the reference's."""
    looks = [[Look(motion=clip.motion, flaw=clip.flaw) for clip in row] for row in clips]
    beside = [
        [own.beside(first, is_still=one.still) for own, first, one in zip(row, looks[0], told, strict=True)]
        for row, told in zip(looks, said, strict=True)
    ]
    return np.array([[one.scores[DEGENERATE] == 1 for one in row] for row in beside])


def _standard(values: Clips) -> Clips:
    """Give changes to the first round's mean, in its standard deviations."""
    return (values - values[0].mean()) / (values[0].std() or 1.0)


# Where it begins --------------------------------------------------------------------------------------------


def turn(track: Track) -> Turn | None:
    """Find where over-optimisation begins; None: nowhere that the clips tell."""
    best = int(track.gold.mean(axis=1).argmax())
    for later in range(best + 1, len(track.gold)):
        judge, gold = (_mean(values[later] - values[best]) for values in (track.judge, track.gold))
        if judge.low > 0 and gold.high < 0:
            return Turn(begins=best, seen=later, judge=judge, gold=gold)
    return None


def _mean(values: Float[np.ndarray, " p"]) -> Estimate:
    return metrics.mean(values, np.arange(len(values)))


def sentence(track: Track, rounds: Sequence[int]) -> str:
    """Say where over-optimisation of a measure begins, or that it was not found."""
    found = turn(track)
    if found is None:
        return f"Over-optimisation, {track.name}: none was found in rounds {rounds[0]} to {rounds[-1]}."
    return (
        f"Over-optimisation, {track.name}: begins at round {rounds[found.begins]}. By round {rounds[found.seen]} the "
        f"judge's mean changes by {number(found.judge, '+.3f')}, and gold's by {number(found.gold, '+.3f')}."
    )


# Picture ----------------------------------------------------------------------------------------------------


def chart(watched: Watched) -> Chart:
    """Draw both means of each measure by round, and mark where over-optimisation begins. Bars are 95 %."""
    with matplotlib.style.context("default"):
        figure = Figure(figsize=(5.6 * len(watched.tracks), 3.8), dpi=120, layout="constrained")
        places = figure.subplots(1, len(watched.tracks), squeeze=False)[0]
        for place, track in zip(places, watched.tracks, strict=True):
            _draw(place, track, watched.rounds)
    return Chart(figure=figure, words=" ".join(_words(track, watched.rounds) for track in watched.tracks))


def _draw(place: Axes, track: Track, rounds: Sequence[int]) -> None:
    for name, values in (("judge", track.judge), ("gold", track.gold)):
        means = values.mean(axis=1)
        bars = np.array([_reach(row) for row in values]).T if name == "gold" else None
        place.errorbar(rounds, means, yerr=bars, label=name, color=_COLOURS[name], marker="o", capsize=3)
    found = turn(track)
    if found is not None:
        label = f"over-optimisation begins: round {rounds[found.begins]}"
        place.axvline(rounds[found.begins], color="#B00000", linestyle="--", label=label)
    unit = "standard deviations of the reference" if track.name == "helpfulness" else "share"
    place.set(title=f"Validation clips: {track.name}", xlabel="round", ylabel=unit, xticks=rounds)
    place.legend(fontsize=9)


def _reach(values: Float[np.ndarray, " p"]) -> tuple[float, float]:
    """Give how far the interval of a mean goes down and up."""
    found = _mean(values)
    return max(0.0, found.value - found.low), max(0.0, found.high - found.value)


def _words(track: Track, rounds: Sequence[int]) -> str:
    means = [" ".join(f"{mean:.3f}" for mean in values.mean(axis=1)) for values in (track.judge, track.gold)]
    return f"{track.name} by round: judge {means[0]}; gold {means[1]}. {sentence(track, rounds)}"
