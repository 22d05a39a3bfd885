"""Rollouts: videos of the policy as it is now, judged, and kept until the round that learns from them is over.

    ROUND/0003.safetensors     some prompts' latents, and in the metadata what was said of each video
    ROUND/videos/0003-07.mp4   what the judge saw: the file, as a user would get it
    ROUND/rollouts.jsonl       what was said of all videos, once the round is over and the latents are gone

A chunk of prompts is written whole, so a stopped round goes on with the next one, and several processes share the
work by taking turns. Where every video of a prompt is unsafe, there is nothing to prefer; a *counterfactual*, made
from the prompt's safe rewrite but judged by what the user asked for, is added then.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import safetensors.torch
import torch
from jaxtyping import Float
from pydantic import NonNegativeInt, PositiveInt
from safetensors import SafetensorError, safe_open
from torch import Tensor

from align.pixels import Flaw, find_flaw, motion
from align.policy import Policy
from align.sample import Sampler, generate, to_videos, video_seed
from reward import rows, video
from reward.config import Config
from reward.files import DataError, replacing
from reward.judge import Judge
from reward.records import TAGS, Prompt
from reward.rules import CostJudge
from reward.video import Video


class RolloutPlan(Config):
    """How many videos a round makes."""

    num_prompts: PositiveInt = 64
    num_per_prompt: PositiveInt = 4
    num_counterfactuals: NonNegativeInt = 1
    """Of each prompt that has a safe rewrite and no safe video."""
    chunk_size: PositiveInt = 10
    """Prompts rendered and judged at a time."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Scores:
    """What the judges say of a video."""

    reward: float
    cost: float
    """The highest of the model's and the rules'; > 0 unsafe."""
    tag_costs: Mapping[str, float]
    """Logits of the tags that the model was trained on; > 0 shown."""
    reward_spread: float
    cost_spread: float

    @property
    def unsafe(self) -> bool:
        """Whether it is not known to be safe, or shows nothing."""
        return not self.cost <= 0 or self.shows_nothing

    @property
    def shows_nothing(self) -> bool:
        """Whether nothing is to be seen, so that to be safe is no merit; scores alone do not tell."""
        return False


@dataclass(frozen=True, kw_only=True, slots=True)
class Rollout(Scores):
    """One video of the policy."""

    prompt: str
    """What the user asked for."""
    prompt_type: str | None
    text: str
    """What it was made from: the prompt, or its safe rewrite."""
    seed: int
    file: str
    """In the round's folder."""
    motion: float
    """Contrasts a second; see `align.pixels`."""
    flaw: Flaw | None
    """How it is degenerate."""

    @property
    def is_counterfactual(self) -> bool:
        """Whether the policy was not asked what the user asked for."""
        return self.text != self.prompt

    @property
    def shows_nothing(self) -> bool:
        """Whether it is blank or noise; whether a frozen one should move, only the reference's video could tell."""
        return self.flaw in ("blank", "noise")


@dataclass(frozen=True, kw_only=True, slots=True)
class Judges:
    """All that score rollouts: the trained judge, and rules whose costs count as well."""

    model: Judge
    rules: Sequence[CostJudge] = ()

    @property
    def sha256(self) -> str:
        """Tells judges apart."""
        return _hash(self.model.sha256, *map(repr, self.rules))


class Round:
    """The rollouts of one round, on disk."""

    def __init__(self, folder: Path, made_by: str):
        """Open a folder; `made_by` tells what its videos are a function of, besides their prompts."""
        self.folder = folder
        self._made_by = made_by

    def make(
        self, number: int, prompts: Sequence[Prompt], plan: RolloutPlan, rewrites: Mapping[str, str], maker: "Maker"
    ) -> list[Rollout]:
        """Give one chunk, made unless it is there."""
        made_by = _hash(self._made_by, plan.model_dump_json(), *(prompt.text for prompt in prompts))
        path = self._path(number)
        if not path.exists() or _made_by(path) != made_by:
            rollouts, latents = maker.make(self.folder, number, prompts, plan, rewrites)
            rows = json.dumps([asdict(rollout) for rollout in rollouts], allow_nan=False)
            self.folder.mkdir(parents=True, exist_ok=True)
            with replacing(path) as new:
                # One key: safetensors shuffles its metadata.
                metadata = {"rollouts": json.dumps({"made_by": made_by, "rows": rows})}
                safetensors.torch.save_file({"latents": latents}, new, metadata)
        return self.rollouts(number)

    def rollouts(self, number: int) -> list[Rollout]:
        """Read what was said of a chunk's videos."""
        return [Rollout(**row) for row in json.loads(_metadata(self._path(number))["rows"])]

    def latents(self, number: int) -> Float[Tensor, "n c lf lh lw"]:
        """Read the latents of a chunk, in the order of its rollouts."""
        return safetensors.torch.load_file(self._path(number))["latents"]

    def forget_latents(self) -> None:
        """Remove what only training needs; videos stay, and what was said of them, in `rollouts.jsonl`."""
        chunks = sorted(self.folder.glob("*.safetensors"))
        if chunks:
            rows = [asdict(rollout) for number in range(len(chunks)) for rollout in self.rollouts(number)]
            with replacing(self.folder / "rollouts.jsonl") as new:
                new.write_text("".join(json.dumps(row, allow_nan=False) + "\n" for row in rows), encoding="utf-8")
        for path in chunks:
            path.unlink()

    def _path(self, number: int) -> Path:
        return self.folder / f"{number:04d}.safetensors"


@dataclass(frozen=True, kw_only=True, eq=False)
class Maker:
    """Makes and judges videos of the policy as it is."""

    policy: Policy
    sampler: Sampler
    judges: Judges
    seed: int

    def make(
        self, folder: Path, number: int, prompts: Sequence[Prompt], plan: RolloutPlan, rewrites: Mapping[str, str]
    ) -> tuple[list[Rollout], Float[Tensor, "n c lf lh lw"]]:
        """Give the videos of some prompts, and counterfactuals for those that have no safe one.

        Raises: JudgeError, BackboneError: a video cannot be judged; the run should stop.
        """
        wanted = [(prompt, prompt.text, index) for prompt in prompts for index in range(plan.num_per_prompt)]
        rollouts, latents = self._make(folder, number, 0, wanted)
        safe = {rollout.prompt for rollout in rollouts if not rollout.unsafe}
        more = [
            (prompt, rewrites[prompt.text], index)
            for prompt in prompts
            if prompt.text not in safe and prompt.text in rewrites
            for index in range(plan.num_counterfactuals)
        ]
        if more:
            others, their_latents = self._make(folder, number, len(rollouts), more)
            rollouts, latents = rollouts + others, torch.cat([latents, their_latents])
        return rollouts, latents

    def _make(
        self, folder: Path, number: int, start: int, wanted: Sequence[tuple[Prompt, str, int]]
    ) -> tuple[list[Rollout], Float[Tensor, "n c lf lh lw"]]:
        texts = [text for _, text, _ in wanted]
        seeds = [video_seed(self.seed, text, index) for _, text, index in wanted]
        latents = generate(self.policy, texts, seeds, self.sampler)
        files = [f"videos/{number:04d}-{start + place:03d}.mp4" for place in range(len(wanted))]
        made = to_videos(self.policy, latents, self.sampler)
        seen = [_as_file(folder / file, clip) for file, clip in zip(files, made, strict=True)]
        scores = judge(self.judges, [prompt.text for prompt, _, _ in wanted], seen)
        rollouts = [
            Rollout(
                prompt=prompt.text,
                prompt_type=prompt.type,
                text=text,
                seed=seed,
                file=file,
                motion=motion(clip.frames, clip.fps),
                flaw=find_flaw(clip.frames, clip.fps),
                **asdict(score),
            )
            for (prompt, text, _), seed, file, clip, score in zip(wanted, seeds, files, seen, scores, strict=True)
        ]
        return rollouts, latents.cpu()


def _as_file(path: Path, made: Video) -> Video:
    """Give a video as its file shows it, which is what the judge was trained on and what users see."""
    path.parent.mkdir(parents=True, exist_ok=True)
    video.write(path, made)
    return video.read(path)


def judge(judges: Judges, prompts: Sequence[str], videos: Sequence[Video]) -> Iterator[Scores]:
    """Yield the scores of each video.

    Raises: JudgeError, BackboneError: a video cannot be judged.
    """
    verdicts = judges.model(prompts, videos)
    costs = torch.stack([verdicts.cost, *(rule.cost(prompts, videos) for rule in judges.rules)])
    # NaN is unsafe, and max() keeps it; `Run` and JSON refuse it, so the run stops.
    cost = costs.max(dim=0).values
    trained = [place for place, tag in enumerate(TAGS) if tag in judges.model.calibration.trained]
    logits = torch.logit(verdicts.tags.double(), eps=1e-9)
    for row in range(len(videos)):
        yield Scores(
            reward=verdicts.reward[row].item(),
            cost=cost[row].item(),
            tag_costs={TAGS[place]: logits[row, place].item() for place in trained},
            reward_spread=verdicts.spread.reward[row].item(),
            cost_spread=verdicts.spread.cost[row].item(),
        )


def read_rewrites(path: Path) -> dict[str, str]:
    """Read JSON lines with a `prompt` and its `safe` rewrite.

    Raises: DataError: the file cannot be read, a field is missing or no text, or a prompt is there twice.
    """
    found: dict[str, str] = {}
    for row in rows.read(path):
        prompt, safe = row.text("prompt"), row.text("safe")
        if prompt is None or safe is None:
            raise row.error("safe" if prompt else "prompt", "a text")
        if found.setdefault(prompt, safe) != safe:
            raise DataError(f"{path}: two rewrites of {prompt!r}; leave one")
    return found


def _made_by(path: Path) -> str | None:
    return _metadata(path)["made_by"]


def _metadata(path: Path) -> dict[str, str]:
    try:
        with safe_open(path, framework="pt") as file:
            return json.loads(file.metadata()["rollouts"])
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise DataError(f"{path}: is damaged, or no rollouts: {error}; remove it, and it is made again") from error


def _hash(*parts: str) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()
