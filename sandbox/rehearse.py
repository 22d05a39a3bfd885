"""Rehearsal for the sandbox's reward model: rendered clips with known flaws, in SafeSora's files.

    python -m sandbox.rehearse [FILE.yaml] [key=value ...]

    config-train.json.gz                pairs, as in SafeSora
    labels/config-train.json.gz         videos with is_safe and tags, as in SafeSora-Label
    videos/<prompt_id>/<video_id>.mp4   four of each prompt

A real reward model starts from a backbone that has seen many videos. The sandbox's data set is too small to learn from
what a video and a text have to do with each other, so its reward model first trains on this one. A scene is a
request and three that differ from it in a few things; a clip of each is drawn, damaged, and compared with the
others for each of the four requests: what is right for one is wrong for another. Labels say what the clips were
told to show. They owe nothing to gold, which looks at pixels, and are never flipped.

The same command resumes: clips that are there are not drawn again. The files can go once a model is trained.
"""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKLWan
from scipy import ndimage
from tqdm import tqdm

from reward import formats, video
from reward.config import Config, parse
from reward.files import replacing
from reward.formats import hash_id
from reward.records import Pair, Prompt, VideoSample
from reward.run import generator, seed_for
from reward.video import Video
from sandbox import annotate, world
from sandbox.annotate import Measured, make_prompt, make_tags
from sandbox.vae import encode_frames, frame_by_frame
from sandbox.world import NUM_FRAMES, Request, Take, Thing

CLIPS_PER_SCENE = 4
SPECK_RADIUS = 4.0


class RehearseConfig(Config):
    """Draw a data set to rehearse on."""

    out: Path = Path("runs/sandbox/rehearsal")
    vae: Path = Path("sandbox/assets/base/vae")
    """Whose latents the clips are damaged in."""
    num_scenes: int = 800
    """Of four clips and up to four prompts each."""
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class Clip:
    """What is drawn, and what is wrong with it; `absent` and `specks` are places of frames."""

    take: Take
    ghost: Take
    """Shines through, with `ghost_share` of the picture, below a half."""
    ghost_share: float
    absent: tuple[int, ...]
    """Frames without any thing."""
    specks: tuple[int, ...]
    """Frames with something that nobody asked for."""
    speck: tuple[float, float, str]
    """Its place, pixels (x, y), and colour."""
    wobble: float
    """Pixels that things jump, at most, from frame to frame."""
    grain: float
    """Noise on the latents, in their deviations."""
    blur: float
    """Pixels."""
    seed: int

    @property
    def num_things(self) -> int:
        """How many things a viewer counts: a speck that stays is one."""
        return len(self.take.request.things) + (2 * len(self.specks) > NUM_FRAMES)


@dataclass(frozen=True, kw_only=True)
class Scene:
    """Clips, and the prompts that they are compared for."""

    prompts: tuple[Prompt, ...]
    clips: tuple[Clip, ...]

    def measured(self, prompt: Prompt) -> list[Measured]:
        """Say how good each clip is as an answer to a prompt."""
        return [measure(clip, prompt) for clip in self.clips]


# ---------------------------------------------------------------------------------------------- choosing


def make_scene(seed: int, index: int) -> Scene:
    """The scene of a number."""
    rng = np.random.default_rng(seed_for(seed, 0, index, "rehearsal"))
    shares = np.array([share for share, *_ in annotate.ROUTES])
    _, effect, glyph = annotate.ROUTES[int(rng.choice(len(shares), p=shares / shares.sum()))]
    first = world.sample_request(rng, effect=effect, glyph=glyph)
    while world.is_held_out(first):
        first = world.sample_request(rng, effect=effect, glyph=glyph)
    requests = [first, *(altered(first, rng) for _ in range(CLIPS_PER_SCENE - 1))]
    clips = [make_clip(request, requests[int(rng.integers(CLIPS_PER_SCENE))], rng) for request in requests]
    prompts = [make_prompt(world.caption(request, rng)) for request in dict.fromkeys(requests)]
    return Scene(prompts=tuple(prompts), clips=tuple(clips))


def altered(request: Request, rng: np.random.Generator) -> Request:
    """A request that differs in none, one or two things, and is not held out for evaluation."""
    number = int(rng.choice(3, p=(0.25, 0.5, 0.25)))
    while True:
        found = request
        for _ in range(number):
            found = _altered_once(found, rng)
        if not world.is_held_out(found):
            return found


def _altered_once(request: Request, rng: np.random.Generator) -> Request:
    place = int(rng.integers(len(request.things)))
    thing, taken = request.things[place], [thing.colour for thing in request.things]
    colour = str(rng.choice([name for name in world.COLOURS if name not in taken]))
    shape = str(rng.choice([name for name in world.SHAPES if name != thing.shape]))
    # Shapes are what the base model gets wrong most often.
    match str(rng.choice(("shape", "colour", "motion", "background", "number"), p=(0.4, 0.2, 0.15, 0.15, 0.1))):
        case "shape":
            return _with_thing(request, place, replace(thing, shape=shape))
        case "colour":
            return _with_thing(request, place, replace(thing, colour=colour))
        case "motion":
            return replace(request, motion=str(rng.choice([m for m in world.MOTIONS if m != request.motion])))
        case "background":
            others = [name for name in world.BACKGROUNDS if name != request.background]
            return replace(request, background=str(rng.choice(others)))
        case _ if len(request.things) == 2:
            return replace(request, things=(thing,))
        case _ if request.glyph is None:
            return replace(request, things=(thing, Thing(colour=colour, shape=shape)), size=None)
        case _:
            sizes = [size for size in (None, "small", "large") if size != request.size]
            return replace(request, size=sizes[int(rng.integers(2))])


def _with_thing(request: Request, place: int, thing: Thing) -> Request:
    things = list(request.things)
    things[place] = thing
    return replace(request, things=tuple(things))


def make_clip(request: Request, other: Request, rng: np.random.Generator) -> Clip:
    """A clip of a request, some of which are flawed in one way or several; a hazard is shown or left out."""

    def sometimes(share: float, most: float) -> float:
        return float(rng.uniform(0, most)) if rng.random() < share else 0.0

    def some_frames(share: float) -> tuple[int, ...]:
        number = int(rng.integers(1, NUM_FRAMES + 1)) if rng.random() < share else 0
        start = int(rng.integers(NUM_FRAMES - number + 1))
        return tuple(range(start, start + number))

    take = world.film(request, rng, hazard=bool(rng.random() < 0.6))
    return Clip(
        take=take,
        ghost=replace(take, request=replace(take.request, things=other.things[: len(request.things)])),
        ghost_share=sometimes(0.4, 0.45),
        absent=some_frames(0.15)[: NUM_FRAMES // 2],
        specks=some_frames(0.25),
        speck=(float(rng.uniform(6, 58)), float(rng.choice((7.0, 57.0))), str(rng.choice(list(world.COLOURS)))),
        wobble=sometimes(0.3, 3.0),
        grain=sometimes(0.8, 0.25),
        blur=sometimes(0.3, 1.2),
        seed=int(rng.integers(2**31)),
    )


# ---------------------------------------------------------------------------------------------- drawing


def draw(clip: Clip) -> np.ndarray:
    """The frames of a clip, `uint8 (f, h, w, 3)`, all but its grain."""
    rng = np.random.default_rng(clip.seed)
    frames = _wobbling(clip.take, clip.wobble, rng).astype(np.float32)
    frames += clip.ghost_share * (_wobbling(clip.ghost, clip.wobble, rng) - frames)
    bare = replace(clip.take, request=replace(clip.take.request, things=()))
    frames[list(clip.absent)] = world.render(bare)[list(clip.absent)]
    x, y, colour = clip.speck
    cover = world.shape_cover("circle", x, y, SPECK_RADIUS)[..., None]
    for frame in clip.specks:
        frames[frame] += cover * (np.array(world.COLOURS[colour], np.float32) - frames[frame])
    return np.rint(ndimage.gaussian_filter(frames, (0, clip.blur, clip.blur, 0))).astype(np.uint8)


def _wobbling(take: Take, wobble: float, rng: np.random.Generator) -> np.ndarray:
    """A take whose things jump between four places."""
    if not wobble:
        return world.render(take)
    x, y = take.offset
    jumps = rng.uniform(-wobble, wobble, size=(4, 2))
    takes = [world.render(replace(take, offset=(x + dx, y + dy))) for dx, dy in jumps.tolist()]
    return np.stack(takes)[rng.integers(4, size=NUM_FRAMES), np.arange(NUM_FRAMES)]


@torch.no_grad()
def damaged(vae: AutoencoderKLWan, clips: Sequence[Clip]) -> np.ndarray:
    """Frames `uint8 (n, f, h, w, 3)` of clips with the grain of noisy latents, half of which stays in its place."""
    latents = encode_frames(vae, np.stack([draw(clip) for clip in clips]))
    draws = [generator(clip.seed, step=0, purpose="grain") for clip in clips]
    moving = torch.stack([torch.randn(latents.shape[1:], generator=each) for each in draws])
    resting = torch.stack([torch.randn(latents[0, :, :1].shape, generator=each) for each in draws])
    grain = torch.tensor([clip.grain for clip in clips]).view(-1, 1, 1, 1, 1)
    noisy = latents + grain * (moving + resting) / 2**0.5
    std = torch.tensor(vae.config.latents_std).view(1, -1, 1, 1, 1)
    with frame_by_frame(vae):
        single = noisy.transpose(1, 2).flatten(0, 1).unsqueeze(2) * std
        pixels = vae.decode(single, return_dict=False)[0].squeeze(2)
    levels = ((pixels + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1)
    return levels.unflatten(0, (len(clips), -1)).numpy()


# ---------------------------------------------------------------------------------------------- judging


def measure(clip: Clip, prompt: Prompt) -> Measured:
    """Say how good a clip is as an answer to a prompt, from what was drawn; all but the hazards in [0, 1]."""
    request = world.parse(prompt.text)
    checks = followed(clip, request)
    jumps = max(0.0, 2 * clip.wobble - 2.5)
    clean = 0.0 if clip.num_things > len(request.things) else 1 - len(clip.specks) / NUM_FRAMES
    parts = {
        "instruction_following": float(np.mean(list(checks.values()))),
        "correctness": (1 - len(clip.absent) / NUM_FRAMES + np.exp(-jumps / 2) + clean) / 3,
        "informativeness": 0.5 * min(1.0, clip.num_things / len(request.things)) + 0.5 * checks["motion"],
        "aesthetics": 1 - 0.5 * clip.grain - 0.2 * clip.ghost_share - 0.15 * clip.blur,
    }
    return Measured(
        video_id=hash_id([prompt.prompt_id, clip.seed]),
        prompt_id=prompt.prompt_id,
        prompt_text=prompt.text,
        generator="rendered",
        seed=clip.seed,
        helpfulness=0.2 * (sum(parts.values()) + parts["instruction_following"]),
        flash=clip.take.strobe is not None,
        dagger=clip.take.glyph == "dagger",
        **parts,
    )


def followed(clip: Clip, request: Request) -> Mapping[str, bool]:
    """Which of the requested attributes were drawn, a hazard like any other."""
    take, drawn = clip.take, clip.take.request
    checks = {"number": clip.num_things == len(request.things), "motion": drawn.motion == request.motion}
    for place, thing in enumerate(request.things):
        shown = drawn.things[place] if place < len(drawn.things) else None
        checks[f"colour {place}"] = shown is not None and shown.colour == thing.colour
        checks[f"shape {place}"] = shown is not None and shown.shape == thing.shape
    if request.effect is None:
        checks["background"] = drawn.background == request.background
    if request.size is not None:
        checks["size"] = drawn.size == request.size and len(drawn.things) == 1
    if request.effect == "strobe":
        checks["effect"] = take.strobe is not None
    if request.effect in ("pulse", "fade"):
        checks["effect"] = drawn.effect == request.effect
    if request.glyph in ("dagger", "cross", "arrow"):
        checks["glyph"] = take.glyph == request.glyph
    return checks


def label(measured: Measured, prompt: Prompt, root: Path) -> VideoSample:
    """A video with `is_safe` and tags as it was drawn."""
    return VideoSample(
        video_id=measured.video_id,
        prompt=prompt,
        path=root / prompt.prompt_id / f"{measured.video_id}.mp4",
        text=prompt.text,
        is_safe=not (measured.flash or measured.dagger),
        tags=make_tags(flash=measured.flash, dagger=measured.dagger),
        generator=measured.generator,
    )


def compare(first: Measured, second: Measured, videos: Mapping[str, VideoSample], seed: int) -> Pair:
    """A pair as the annotators see it, but without a cost where both clips show equally many hazards."""
    pair = annotate.compare(first, second, videos, seed)
    return pair if first.value("cost") != second.value("cost") else replace(pair, cost=None)


# ---------------------------------------------------------------------------------------------- program


def main(argv: Sequence[str]) -> int:
    """Draw what is not there yet and write the labels; returns the exit status."""
    config = parse(RehearseConfig, argv, prog="python -m sandbox.rehearse")
    vae = AutoencoderKLWan.from_pretrained(config.vae, dtype=torch.float32, local_files_only=True)
    root = config.out / "videos"
    scenes = [make_scene(config.seed, index) for index in range(config.num_scenes)]
    videos: dict[str, VideoSample] = {}
    pairs: list[Pair] = []
    for scene in tqdm(scenes, desc="scenes", unit="scene"):
        of_prompt = [scene.measured(prompt) for prompt in scene.prompts]
        labelled = [[label(m, p, root) for m in ms] for ms, p in zip(of_prompt, scene.prompts, strict=True)]
        store(vae, scene.clips, [[video.path for video in own] for own in labelled])
        videos |= {video.video_id: video for own in labelled for video in own}
        for measured in of_prompt:
            pairs += [compare(*pair, videos, config.seed) for pair in annotate.pairs_of(measured, config.seed)]
    (config.out / "labels").mkdir(exist_ok=True)
    formats.write_videos(config.out / "labels/config-train.json.gz", videos.values())
    formats.write_pairs(config.out / "config-train.json.gz", pairs)
    print(config.out)
    return 0


def store(vae: AutoencoderKLWan, clips: Sequence[Clip], paths: Sequence[Sequence[Path]]) -> None:
    """Write the clips of a scene, once for each prompt: `paths` are by prompt, then by clip."""
    if all(path.exists() for own in paths for path in own):
        return
    drawn = damaged(vae, clips)
    for frames, *places in zip(drawn, *paths, strict=True):
        for path in places:
            path.parent.mkdir(parents=True, exist_ok=True)
            with replacing(path) as new:
                if path == places[0]:
                    video.write(new, Video(frames=frames, fps=world.FPS), crf=annotate.CRF)
                else:
                    new.hardlink_to(places[0])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
