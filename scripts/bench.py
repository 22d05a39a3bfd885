"""Time the parts that must be fast, each beside the limit that counting gives, or a target.

python scripts/bench.py [NAME ...] [num_repeats=3]

    flash, read   the flash meter, and decoding every frame of a file: seconds of video per second
    judge         one model of 18 scores, beside six models of one
    features      an epoch's features from the cache, beside making them
    index         loading a data set: time and memory a video by the set's size, memory by its videos' length
    dpo           a step: beside one forward pass, also where the reference's errors are kept; its share outside the
                  network; memory beside a second reference
    latents       a batch's latents from the cache, beside making them
    render        videos rendered together, beside one by one

Prints one JSON line for each measure. Times are of one processor core, so that neither a busy machine nor more cores
change much, and the sides of a ratio take turns in one run. Set OMP_NUM_THREADS=1, as `make bench` does: threads that
wait for each other count as busy. Heads and LoRA are random, which changes no time. For looking at, not for failing.
"""

import gc
import hashlib
import itertools
import json
import sys
import tempfile
import time
import tracemalloc
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Literal, get_args

import diffusers.utils.logging
import numpy as np
import torch
import transformers.utils.logging
from pydantic import Field, PositiveInt, model_validator
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from align import learning
from align.cache import LatentCache
from align.folder import PolicyError
from align.learning import Drawn, Item, NoiseLevels, Pool
from align.objectives.dpo import Dpo
from align.policy import Lora, Policy
from align.sample import Sampler, initial_noise, render
from align.show import show
from reward import flash, formats, preferences, video
from reward.backbone import Dual
from reward.config import Config, ConfigError, load, parse
from reward.features import BackboneError, FeatureCache
from reward.judge import Judge
from reward.model import RewardModel
from reward.preferences import Source
from reward.records import DIMENSIONS, FIRST, SECOND, TAGS, Pair, Prompt, Tags, VideoSample
from reward.settings import RewardConfig
from reward.verdicts import NAMES, Calibration
from reward.video import Video, VideoError

FPS = 16
PROMPT = "a red circle moves left"
SLACK = 1.2
"""How many times its limit a time may be."""
STEP_PASSES = {"policy forward": 1, "policy backward": 1, "reference forward": 1}
"""What a DPO step costs, in forward passes. A backward pass costs one for the gradients of inputs and one for those of
weights; the weights under a LoRA are frozen and have none."""

Name = Literal["flash", "read", "judge", "features", "index", "dpo", "latents", "render"]


class BenchConfig(Config):
    """Time the parts that must be fast."""

    names: tuple[Name, ...] = get_args(Name)
    """The flash meter; reading a file; 18 scores in one pass; the feature cache; loading a data set; a training step;
    the latent cache; rendering."""
    width: PositiveInt = 854
    """Of the video of `flash` and `read`, as are the next two."""
    height: PositiveInt = 480
    num_frames: PositiveInt = 32
    """At 16 fps."""
    num_repeats: PositiveInt = 3
    """The fastest counts."""
    model: Path = Path("sandbox/assets/base")
    """Folder of a Wan text-to-video pipeline in diffusers' format."""
    reward: Path = Path("configs/reward/sandbox.yaml")
    """Settings of a reward model, which are those of the judge."""
    lora: Lora = Lora()
    sampler: Sampler = Sampler()
    """Size of all other videos, and how they are rendered."""
    num_pairs: PositiveInt = 16
    """Of a training batch; `features` and `latents` have as many videos."""
    num_judged: PositiveInt = 8
    """Videos that `judge` has judged."""
    num_rendered: PositiveInt = 4
    """Videos rendered together; 4 is what scripts/sample.py does."""
    index_sizes: tuple[PositiveInt, ...] = Field(default=(1_000, 10_000, 57_333), min_length=2)
    """Videos of the data sets of `index`, rising; SafeSora has 57,333."""

    @model_validator(mode="after")
    def _sizes_rise(self) -> "BenchConfig":
        if any(one >= next_one for one, next_one in itertools.pairwise((1, *self.index_sizes))):
            raise ValueError(
                f"index_sizes={list(self.index_sizes)}: expected rising sizes from 2 on: videos make pairs"
            )
        return self


@dataclass(frozen=True, kw_only=True)
class Speed:
    """How many times faster than real time a part is, on one core."""

    name: str
    work: str
    times_real_time: float
    required: float


@dataclass(frozen=True, kw_only=True)
class Ratio:
    """How the sides of one run compare."""

    name: str
    work: str
    sides: Mapping[str, float]
    """Seconds are those of one core."""
    ratio: float
    """The first side over the last."""
    better: Literal["lower", "higher"]
    limit: float | None
    """The best that counting allows; null where it says nothing."""
    target: float


def compare(
    name: str,
    work: str,
    sides: Mapping[str, float],
    *,
    better: Literal["lower", "higher"],
    limit: float | None = None,
    target: float,
) -> Ratio:
    """Divide the first side by the last, and round for reading."""
    first, *_, last = sides.values()
    return Ratio(
        name=name,
        work=work,
        sides={side: float(f"{value:.7g}") for side, value in sides.items()},
        ratio=round(first / last, 4),
        better=better,
        limit=None if limit is None else round(limit, 4),
        target=round(target, 4),
    )


# Video files ------------------------------------------------------------------------------------------------


def bench_flash(config: BenchConfig) -> Iterator[Speed]:
    """Give the speed of the flash meter."""
    clip = sample_video(config.width, config.height, config.num_frames)
    yield _speed("flash", lambda: flash.measure(clip.frames, clip.fps), 10, config)


def bench_read(config: BenchConfig) -> Iterator[Speed]:
    """Give the speed of decoding every frame."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "clip.mp4"
        video.write(path, sample_video(config.width, config.height, config.num_frames))
        yield _speed("read", lambda: video.read(path), 2, config)


def _speed(name: str, work: Callable[[], object], required: float, config: BenchConfig) -> Speed:
    (fastest,) = _by_turns(config, work)
    return Speed(
        name=name,
        work=f"{config.num_frames} frames of {config.width}x{config.height} at {FPS} fps",
        times_real_time=round(config.num_frames / FPS / fastest, 1),
        required=required,
    )


def sample_video(width: int, height: int, num_frames: int, *, fps: float = FPS, seed: int = 0) -> Video:
    """Noise that drifts, its left half strobing: detail to encode, and changes to count."""
    random = np.random.default_rng(seed)
    still = random.integers(0, 128, (height, width, 3), dtype=np.uint8)
    frames = np.stack([np.roll(still, 3 * number, axis=1) for number in range(num_frames)])
    frames[::2, :, : width // 2] += 127
    return Video(frames=frames, fps=fps)


def _clips(config: BenchConfig, num: int) -> list[Video]:
    """Make different videos of the sampler's size."""
    size = config.sampler
    return [sample_video(size.width, size.height, size.num_frames, fps=size.fps, seed=seed) for seed in range(num)]


def _files(config: BenchConfig, folder: Path) -> list[Path]:
    """Write the videos of a training batch."""
    clips = {folder / f"{number}.mp4": clip for number, clip in enumerate(_clips(config, 2 * config.num_pairs))}
    for path, clip in clips.items():
        video.write(path, clip)
    return list(clips)


def _each(config: BenchConfig) -> str:
    size = config.sampler
    return f"{size.num_frames} frames of {size.width}x{size.height}"


# The judge --------------------------------------------------------------------------------------------------


def bench_judge(config: BenchConfig) -> Iterator[Ratio]:
    """Compare one model of all scores with six of one: helpfulness, its four parts and the cost."""
    clips = _clips(config, config.num_judged)
    prompts = [f"{PROMPT} {number}" for number in range(len(clips))]
    whole, single = _judge(reward_model(config)), _judge(single_score(reward_model(config)))
    one, six = _by_turns(config, lambda: whole(prompts, clips), lambda: [single(prompts, clips) for _ in DIMENSIONS])
    yield compare(
        "judge",
        f"{len(clips)} videos of {_each(config)}",
        {"one_model_videos_per_second": len(clips) / one, "six_models_videos_per_second": len(clips) / six},
        better="higher",
        limit=len(DIMENSIONS),
        target=len(DIMENSIONS) / SLACK,
    )


def bench_features(config: BenchConfig) -> Iterator[Ratio]:
    """Compare an epoch's features made anew with those of a full cache."""
    with tempfile.TemporaryDirectory() as folder:
        items = [(path, f"{PROMPT} {path.stem}") for path in _files(config, Path(folder))]
        backbone = reward_model(config).backbone
        cache = FeatureCache(Path(folder) / "features", backbone)
        for path, text in items:
            cache.features(path, text)
        made, kept = _by_turns(
            config,
            lambda: [backbone.encode([video.read(path)], [text]) for path, text in items],
            lambda: [cache.features(path, text) for path, text in items],
        )
    sides = {"made_seconds": made, "kept_seconds": kept}
    yield compare("features", f"{len(items)} videos of {_each(config)}", sides, better="higher", target=10)


def reward_model(config: BenchConfig) -> RewardModel:
    """Give a model as the settings ask for, with random weights.

    Raises: BackboneError: its encoder cannot be used. ConfigError: the settings cannot be read, or are not of a `dual`.
    """
    model = load(RewardConfig, config.reward).model
    if not isinstance(model.backbone, Dual):
        raise ConfigError(f"{config.reward}: model.backbone.kind={model.backbone.kind}: expected dual, which is timed")
    return RewardModel.build(model, seed=0).eval()


def single_score(model: RewardModel) -> RewardModel:
    """Take all tokens but that of one score from a model; only the first of its numbers then means anything."""
    mixer = model.backbone.get_submodule("mixer")
    mixer.scores = nn.Parameter(mixer.get_parameter("scores")[:1].detach())
    return model


def _judge(model: RewardModel) -> Judge:
    scales = Calibration(
        reward_mean=0.0,
        reward_scale=1.0,
        cost_scale=1.0,
        cost_has_zero=True,
        tag_offsets=(0.0,) * len(TAGS),
        trained=NAMES,
    )
    return Judge(model=model, calibration=scales, sha256="random")


# Data sets --------------------------------------------------------------------------------------------------


def bench_index(config: BenchConfig) -> Iterator[Ratio]:
    """Compare loading a large data set with loading a small one, and long videos with short ones."""
    sizes, work = config.index_sizes[::-1], "SafeSora's pairs and labels, without video files"
    with tempfile.TemporaryDirectory() as folder:
        loads = [partial(preferences.load, write_data(Path(folder) / str(size), size)) for size in sizes]
        seconds, peaks = _by_turns(config, *loads), map(traced_peak, loads)
        costs = {f"{size}_videos_seconds_each": cost / size for size, cost in zip(sizes, seconds, strict=True)}
        yield compare("index_seconds", work, costs, better="lower", limit=1, target=SLACK)
        costs = {f"{size}_videos_bytes_each": cost / size for size, cost in zip(sizes, peaks, strict=True)}
        yield compare("index_bytes", work, costs, better="lower", limit=1, target=SLACK)
    held = {f"{length}_frames_bytes": _bytes_by_length(sizes[-1], length) for length in (64, 4)}
    yield compare(
        "index_frames", f"{sizes[-1]} video files, pairs and labels", held, better="lower", limit=1, target=SLACK
    )


def _bytes_by_length(num_videos: int, num_frames: int) -> int:
    with tempfile.TemporaryDirectory() as folder:
        clip = Path(folder) / "clip.mp4"
        video.write(clip, sample_video(16, 16, num_frames))
        return traced_peak(partial(preferences.load, write_data(Path(folder) / "data", num_videos, clip.read_bytes())))


def write_data(folder: Path, num_videos: int, content: bytes | None = None) -> Source:
    """Write a data set as SafeSora has it, four videos a prompt, each compared with the next one.

    Without `content`, the same for all, there are no video files, and loading looks for none: making and removing so
    many takes minutes.
    """
    groups = [_videos(first, min(4, num_videos - first)) for first in range(0, num_videos, 4)]
    clips = [clip for group in groups for clip in group]
    pairs = [_pair(*two) for group in groups for two in itertools.pairwise(group)]
    (folder / "labels").mkdir(parents=True)
    if content is not None:
        for clip in clips:
            (folder / clip.path).parent.mkdir(parents=True, exist_ok=True)
            (folder / clip.path).write_bytes(content)
    formats.write_videos(folder / "labels/config-train.json.gz", clips)
    formats.write_pairs(folder / "config-train.json.gz", pairs)
    return Source(path=folder, labels=folder / "labels")


def _videos(first: int, num: int) -> list[VideoSample]:
    """Give the videos of one prompt, numbered from the first."""
    tags, text = Tags(**dict.fromkeys(TAGS, False)), f"{PROMPT} {first} times"
    prompt = Prompt(prompt_id=_sha256(f"prompt {first}"), text=text, type="safety_neutral", tags=tags)
    return [
        VideoSample(
            video_id=(video_id := _sha256(f"video {number}")),
            prompt=prompt,
            path=Path("videos", prompt.prompt_id, f"{video_id}.mp4"),
            text=f"{text}, on a wooden table, in the evening",
            is_safe=True,
            tags=tags,
            generator="bench",
        )
        for number in range(first, first + num)
    ]


def _pair(one: VideoSample, other: VideoSample) -> Pair:
    said = dict.fromkeys(DIMENSIONS, FIRST) | {"cost": SECOND}
    pair_id = _sha256(one.video_id + other.video_id)
    return Pair(pair_id=pair_id, prompt=one.prompt, video_0=one, video_1=other, **said)


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


# Training steps ---------------------------------------------------------------------------------------------


def bench_dpo(config: BenchConfig) -> Iterator[Ratio]:
    """Compare a step with one forward pass on the same batch, without gradient, and with its own parts.

    The backward pass of the loss itself counts as the network's. Memory is the bytes of all parameters, and the most
    that torch allocates at once in a first step, as its profiler tells.
    """
    learner, work = Learner.of(_policy(config), config), f"{config.num_pairs} pairs of {_each(config)}"
    one_copy = peak_bytes(learner)
    forward = torch.no_grad()(partial(learner.policy.velocity, *learner.inputs()))
    keeping = replace(learner, kept={})
    keeping.step()  # asks the reference
    step, kept, once = _by_turns(config, learner.step, keeping.step, forward)
    sides, passes = {"step_seconds": step, "forward_seconds": once}, sum(STEP_PASSES.values())
    yield compare("dpo_step", work, sides, better="lower", limit=passes, target=SLACK * passes)
    passes -= STEP_PASSES["reference forward"]
    sides = {"step_seconds": kept, "forward_seconds": once}
    yield compare("dpo_kept", work, sides, better="lower", limit=passes, target=SLACK * passes)

    whole, outside = min(learner.timed_step() for _ in range(config.num_repeats))
    sides = {"outside_seconds": outside, "step_seconds": whole}
    yield compare("dpo_outside", work, sides, better="lower", limit=0, target=1 - 1 / SLACK)

    policy = TwoCopies.load(config.model, lora=config.lora)
    policy.second = Policy.load(config.model).transformer
    frozen = num_bytes(policy.second)
    two_copies = peak_bytes(Learner.of(policy, config)) + frozen
    sides, limit = {"one_copy_bytes": one_copy, "two_copies_bytes": two_copies}, 1 - frozen / two_copies
    yield compare("dpo_memory", work, sides, better="lower", limit=limit, target=1.01 * limit)


class TwoCopies(Policy):
    """A policy whose reference is a second copy of the weights, which ours does without."""

    second: nn.Module

    @contextmanager
    def as_reference(self) -> Generator[None]:
        """Use the second copy inside the block."""
        own, self.transformer = self.transformer, self.second
        try:
            yield
        finally:
            self.transformer = own


@dataclass(kw_only=True)
class Watch:
    """Adds up core seconds between starts and stops, which may be a module's hooks."""

    seconds: float = 0.0

    def start(self, *_: object) -> None:
        """Count from now on."""
        self.seconds -= time.process_time()

    def stop(self, *_: object) -> None:
        """Count until now."""
        self.seconds += time.process_time()


@dataclass(frozen=True, kw_only=True, eq=False)
class Learner:
    """What a step of `align.train` needs, in float32; without accelerate, the LoRA's average and a log."""

    policy: Policy
    pool: Pool
    optimizer: torch.optim.Optimizer
    embed: learning.Embed
    kept: learning.References | None = None
    watch: Watch = field(default_factory=Watch)
    """Of the passes of the policy's transformer."""

    @classmethod
    def of(cls, policy: Policy, config: BenchConfig) -> "Learner":
        """Give noise to learn from, and a new optimizer."""
        num, size, embeds = 2 * config.num_pairs, config.sampler, policy.encode_prompts([PROMPT])[0]
        latents = initial_noise(range(num), policy.geometry.latent_shape(size.num_frames, size.height, size.width))
        pool = Pool(
            prompts=(PROMPT,) * num,
            rewards=np.zeros(num),
            cost=-np.ones(num),
            limited_costs=np.zeros((num, 0)),
            views=(size.view(PROMPT),) * num,
            latents=latents.__getitem__,
        )
        optimizer = torch.optim.AdamW(policy.lora_parameters())
        learner = cls(policy=policy, pool=pool, optimizer=optimizer, embed=lambda text: embeds)
        policy.transformer.train()
        policy.transformer.register_forward_pre_hook(learner.watch.start)
        policy.transformer.register_forward_hook(learner.watch.stop)
        return learner

    def step(self) -> None:
        """Do a step."""
        found = learning.losses_of(Dpo(), self.policy, self.pool, self._drawn(), self.embed, 33.0, self.kept)
        loss = found.loss.mean()
        self.watch.start()
        loss.backward()
        self.watch.stop()
        nn.utils.clip_grad_norm_(self.policy.lora_parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def timed_step(self) -> tuple[float, float]:
        """Do a step; give its core seconds, and those outside the network's passes."""
        before = self.watch.seconds
        whole = core_seconds(self.step)
        return whole, whole - (self.watch.seconds - before)

    def inputs(self) -> tuple[Tensor, Tensor, Tensor]:
        """Give what the network sees of a batch, but for the mixing with noise, which takes no pass longer."""
        batch = learning.pair_batch(self.pool, self._drawn(), self.embed)
        both = torch.cat([batch.chosen, batch.rejected])
        return both, batch.sigma.repeat(2), batch.prompt_embeds.repeat(2, 1, 1)

    def _drawn(self) -> list[Drawn]:
        items = [Item(chosen=place, rejected=place + 1) for place in range(0, len(self.pool.prompts), 2)]
        draw = partial(learning.draw, items, pool=self.pool, levels=NoiseLevels(), seed=0, epoch=0, name="bench")
        return [draw(index) for index in range(len(items))]


def peak_bytes(learner: Learner) -> int:
    """Give the bytes of the policy's parameters and the most that its first step allocates at once."""
    return num_bytes(learner.policy.transformer) + allocated_peak(learner.step)


def num_bytes(module: nn.Module) -> int:
    """Give the bytes of a module's parameters."""
    return sum(parameter.nbytes for parameter in module.parameters())


def _policy(config: BenchConfig) -> Policy:
    return Policy.load(config.model, lora=config.lora)


# Videos of the policy ---------------------------------------------------------------------------------------


def bench_latents(config: BenchConfig) -> Iterator[Ratio]:
    """Compare a batch's latents, from files read and encoded, with those of a full cache."""
    policy, sampler = _policy(config), config.sampler
    with tempfile.TemporaryDirectory() as folder:
        paths = _files(config, Path(folder))
        cache = LatentCache(Path(folder) / "latents", policy, sampler)
        cache.fill(paths, [])
        made, kept = _by_turns(
            config,
            lambda: [policy.encode(show(video.probe(path), sampler)[None]) for path in paths],
            lambda: [cache.latents(path) for path in paths],
        )
    sides = {"made_seconds": made, "kept_seconds": kept}
    yield compare("latents", f"{len(paths)} videos of {_each(config)}", sides, better="higher", target=10)


def bench_render(config: BenchConfig) -> Iterator[Ratio]:
    """Compare rendering some videos together with rendering them one by one."""
    policy, num, sampler = _policy(config), config.num_rendered, config.sampler
    together, alone = _by_turns(
        config,
        lambda: render(policy, [PROMPT] * num, range(num), sampler),
        lambda: [render(policy, [PROMPT], [seed], sampler) for seed in range(num)],
    )
    yield compare(
        "render",
        f"{num} videos of {_each(config)} in {sampler.steps} steps",
        {"together_videos_per_second": num / together, "alone_videos_per_second": num / alone},
        better="higher",
        target=1,
    )


# Measures ---------------------------------------------------------------------------------------------------


def _by_turns(config: BenchConfig, *works: Callable[[], object]) -> list[float]:
    """Give the core seconds of each work; works take turns, and the fastest repeat of each counts."""
    rounds = [[core_seconds(work) for work in works] for _ in range(config.num_repeats)]
    return np.min(rounds, axis=0).tolist()


def core_seconds(work: Callable[[], object]) -> float:
    """Give the processor's time, on all cores together."""
    start = time.process_time()
    work()
    return time.process_time() - start


def traced_peak(work: Callable[[], object]) -> int:
    """Give the most bytes that Python held at once for the work, its result included."""
    gc.collect()
    tracemalloc.start()
    work()
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return peak


def allocated_peak(work: Callable[[], object]) -> int:
    """Give the most bytes that torch held at once on the CPU, of those that it took during the work."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    assert profiler.profiler is not None
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    changes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    return int(np.cumsum(changes).max())


# Program ----------------------------------------------------------------------------------------------------

BENCHMARKS: Mapping[Name, Callable[[BenchConfig], Iterator[Speed | Ratio]]] = {
    "flash": bench_flash,
    "read": bench_read,
    "judge": bench_judge,
    "features": bench_features,
    "index": bench_index,
    "dpo": bench_dpo,
    "latents": bench_latents,
    "render": bench_render,
}


def main(argv: Sequence[str]) -> None:
    """Print one JSON line for each measure; what cannot be used, such as a folder, ends the program with status 2."""
    prog = "python scripts/bench.py"
    config = parse(BenchConfig, argv, prog=prog, positional="names")
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)
    try:
        for name in config.names:
            for line in BENCHMARKS[name](config):
                print(json.dumps(asdict(line)), flush=True)
    except (BackboneError, ConfigError, PolicyError, VideoError) as error:
        print(f"{prog}: {error}", file=sys.stderr)
        raise SystemExit(2) from error


if __name__ == "__main__":
    main(sys.argv[1:])
