"""Train the sandbox's video and text encoder, a stock X-CLIP (arXiv 2208.02816): the reward model looks through it.

    python -m sandbox.encoder [FILE.yaml] [key=value ...]

    RUN/model/    the encoder, as transformers reads it
    RUN/film/     the takes that it learns from

It learns from takes and their captions: to tell which caption belongs to which, also from captions that differ in a
few words (NegCLIP, arXiv 2210.01936); how much of what a caption asks for is shown; and to name what is asked for or
shown, from either side with the same words, so that the two can be compared. It must know what generators make, too:
most takes are repainted by one (SDEdit, arXiv 2108.01073), noised and denoised again, which leaves what is shown.
Some are damaged, by noise, by ghosts and pieces of other instants and by jumps in time, and it must say how much, or it
would learn not to see that. It knows no preferences and no gold.

The same command resumes, and ends at the same bits as a run that was not stopped.
"""

import dataclasses
import itertools
import math
import sys
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan, WanPipeline, WanTransformer3DModel
from jaxtyping import Bool, Float, Float16, Int
from torch import Tensor, nn
from transformers import CLIPImageProcessorPil, PreTrainedTokenizerFast, XCLIPConfig, XCLIPModel

from reward.checkpoint import flatten_optimizer, restore_optimizer, with_prefix
from reward.config import Config, parse
from reward.run import Run, RunError, Step, Stop, Stopped, follow, generator, open_run, seed_for, stop_on_signal
from sandbox import footage, world
from sandbox.base import new_folder
from sandbox.footage import Footage, Part
from sandbox.text import ANSWERS, TEXT_LENGTH, answers, encode_texts, make_tokenizer
from sandbox.vae import decode_frames, encode_frames

TOKEN, TOKENS = (2, 4, 2), (8, 2, 4)
"""Latents of a token of the base model along (f, h, w), and tokens of a clip."""
NUM_RIVALS = 3
"""Captions beside a take's own, of which one, two and three things are changed."""
WEIGHTS = {"share": 20, "place": 20, "damage": 20}
"""Of the parts of the loss that do not have a weight of 1."""
SHOWN = ("contrast", "share", "seen", "asked", "place", "damage")
"""What the progress bar shows."""


class EncoderConfig(Config):
    """How the sandbox's encoder is trained."""

    out: Path = Path("runs/sandbox/encoder")
    """Run folder; the finished encoder is its `model/`."""
    base: Path = Path("sandbox/assets/base")
    """Pipeline folder of the base model, which codes all takes and repaints some."""
    young: Path = Path("runs/sandbox/base/young")
    """Transformer folder from early in its training, which repaints others."""
    num_clips: int = 50_000
    num_steps: int = 2_400
    batch_size: int = 256
    learning_rate: float = 1e-3
    repainted: float = 0.7
    """Share of the takes of a step that are repainted."""
    damaged: float = 0.5
    """Share of the takes of a step that are damaged."""
    most_noise: float = 0.6
    """Standard deviation of the strongest noise, in units of the latents'."""
    most_ghost: float = 0.4
    """Share of another instant in the strongest ghost."""
    most_jump: float = 1.5
    """Standard deviation of the largest jumps in time, in frames."""
    most_pieces: float = 0.3
    """Largest share of a take that comes from another instant, in pieces as large as the base model's tokens."""
    mixed_precision: Literal["no", "bf16"] = "bf16"
    """`bf16` halves a step's time on processors with AVX-512 BF16 or AMX; on others `no` is faster."""
    save_every: int = 500
    log_every: int = 10
    seed: int = 0


def make_encoder(tokenizer: PreTrainedTokenizerFast) -> XCLIPModel:
    """An untrained X-CLIP of 16 frames of 64 x 64 and captions; what it says of a text does not depend on the video."""
    shared = {"num_attention_heads": 4, "hidden_act": "gelu", "attention_dropout": 0.0}
    return XCLIPModel(
        XCLIPConfig(
            projection_dim=128,
            prompt_alpha=0.0,
            text_config={
                **shared,
                "vocab_size": len(tokenizer),
                "hidden_size": 128,
                "intermediate_size": 512,
                "num_hidden_layers": 2,
                "max_position_embeddings": TEXT_LENGTH,
                "pad_token_id": tokenizer.pad_token_id,
                "bos_token_id": None,
                "eos_token_id": tokenizer.eos_token_id,
            },
            vision_config={
                **shared,
                "hidden_size": 192,
                "intermediate_size": 768,
                "num_hidden_layers": 4,
                "image_size": world.HEIGHT,
                "patch_size": 8,
                "num_frames": world.NUM_FRAMES,
                "mit_hidden_size": 128,
                "mit_intermediate_size": 512,
                "mit_num_hidden_layers": 2,
                "mit_num_attention_heads": 4,
            },
        )
    )


def make_processor() -> CLIPImageProcessorPil:
    """Levels 0 to 255 become -1 to 1; the size is the encoder's own."""
    size = {"height": world.HEIGHT, "width": world.WIDTH}
    half = [0.5, 0.5, 0.5]
    return CLIPImageProcessorPil(size=size, crop_size=size, do_center_crop=False, image_mean=half, image_std=half)


# ---------------------------------------------------------------------------------------------- takes


@dataclass(frozen=True, kw_only=True, eq=False)
class Film:
    """Takes, and what is known of them."""

    requests: list[world.Request]
    """Captions are drawn afresh each time one is used."""
    clean: Float16[Tensor, "n c f h w"]
    """Normalised latents."""
    repainted: Float16[Tensor, "n c f h w"]
    """By a generator."""
    seen: Int[Tensor, "n questions"]
    """What a take shows, as answers of `sandbox.text`."""
    by_young: Bool[Tensor, " n"]
    """Whether the young generator has repainted it."""
    spots: Float[Tensor, "n f 3"]
    """Where the first thing is: from the middle of the picture along x and y, and its radius, in units of 16 pixels."""


@dataclass(frozen=True, kw_only=True)
class Painter:
    """A generator, as it repaints takes."""

    transformer: WanTransformer3DModel
    sigmas: tuple[float, float]
    """The least and the most noise that it takes away: of so much, it still makes what was there."""
    guidance: float


class Studio:
    """The base model's parts, and both generators."""

    def __init__(self, config: EncoderConfig, device: torch.device):
        pipeline = WanPipeline.from_pretrained(config.base, dtype=torch.float32, local_files_only=True).to(device)
        young = WanTransformer3DModel.from_pretrained(config.young, dtype=torch.float32, local_files_only=True)
        self.seed, self.device, self.mixed_precision = config.seed, device, config.mixed_precision
        self.vae, self.tokenizer, self.text_encoder = pipeline.vae, pipeline.tokenizer, pipeline.text_encoder
        self.painters = (
            Painter(transformer=pipeline.transformer, sigmas=(0.5, 0.9), guidance=2.0),
            Painter(transformer=young.to(device), sigmas=(0.4, 0.75), guidance=1.5),
        )

    def keep(self, filmed: tuple[Part, list[world.Take], np.ndarray]) -> Footage:
        """What is known of the takes of a part, half of them repainted by each generator."""
        part, takes, clips = filmed
        clean, requests = encode_frames(self.vae, clips), [take.request for take in takes]
        draw = generator(self.seed, step=part.start, purpose="repainting")
        words = np.random.default_rng(seed_for(self.seed, 0, part.start, "repainting captions"))
        texts = [world.caption(request, words) for request in requests]
        half = (len(takes) + 1) // 2
        repainted = [
            self._repaint(painter, clean[some], texts[some], draw)
            for painter, some in zip(self.painters, (slice(half), slice(half, None)), strict=True)
            if texts[some]
        ]
        kept = {
            "clean": clean.half(),
            "repainted": torch.cat(repainted).half(),
            "by_young": torch.arange(len(takes)) >= half,
            "seen": torch.tensor([shown(take) for take in takes]),
            "spots": torch.tensor(np.stack([_spots(take) for take in takes])),
        }
        return Footage(requests=requests, tensors=kept)

    @torch.no_grad()
    def _repaint(self, painter: Painter, clean: Tensor, texts: list[str], draw: torch.Generator) -> Tensor:
        """Latents with noise added, to a sigma of their own each, and taken away again in five steps."""
        least, most = painter.sigmas
        start = (least + (most - least) * torch.rand(len(clean), generator=draw)).to(self.device)
        noise = torch.randn(clean.shape, generator=draw).to(self.device)
        embedded = encode_texts(self.text_encoder, self.tokenizer, [*texts, *[""] * len(texts)])
        noisy = torch.lerp(clean.to(self.device), noise, start.view(-1, 1, 1, 1, 1))
        for sigma, after in itertools.pairwise(start * torch.linspace(1, 0, 6, device=self.device)[:, None]):
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.mixed_precision == "bf16"):
                velocities = painter.transformer(
                    hidden_states=noisy.repeat(2, 1, 1, 1, 1),
                    timestep=1000 * sigma.repeat(2),
                    encoder_hidden_states=embedded,
                    return_dict=False,
                )[0]
            asked, free = velocities.float().chunk(2)
            noisy = noisy + (after - sigma).view(-1, 1, 1, 1, 1) * torch.lerp(free, asked, painter.guidance)
        return noisy.cpu()


def shown(take: world.Take) -> list[int]:
    """What a take shows, as answers of `sandbox.text`."""
    effect = take.request.effect if take.request.effect in ("pulse", "fade") else "strobe" if take.strobe else None
    return answers(dataclasses.replace(take.request, effect=effect, glyph=take.glyph))


def _spots(take: world.Take) -> np.ndarray:
    x, y, radius = world.whereabouts(take, 0)
    return np.stack([x - world.WIDTH / 2, y - world.HEIGHT / 2, radius], axis=-1).astype(np.float32) / 16


# ---------------------------------------------------------------------------------------------- captions


def rival(request: world.Request, number: int, rng: np.random.Generator) -> world.Request:
    """The request with another answer to this many of the questions of `sandbox.text`, of those that it answers.

    A request of the training distribution: with no combination that is held out, and with two colours for two things.
    """
    while True:
        asked: dict[str, Any] = {
            name: options[index] for (name, options), index in zip(ANSWERS.items(), answers(request), strict=True)
        }
        for name in rng.choice([name for name, answer in asked.items() if answer], size=number, replace=False):
            others = [option for option in ANSWERS[name] if option and option != asked[name]]
            asked[name] = others[rng.integers(len(others))]
        named = [(asked[f"colour {place}"], asked[f"shape {place}"]) for place in (1, 2)]
        other = world.Request(
            things=tuple(world.Thing(colour=colour, shape=shape) for colour, shape in named if shape),
            **{name: asked[name] for name in ("motion", "background", "size", "effect", "glyph")},
        )
        if asked["colour 1"] != asked["colour 2"] and not world.is_held_out(other):
            return other


def requires(request: world.Request) -> list[bool]:
    """To which questions of `sandbox.text` what is shown must give the request's answer.

    The second colour says how many things there are. A hazard that is only implied need not be shown, and under
    changing light a background cannot be told from a darker one.
    """
    told = dict.fromkeys(ANSWERS, True) | {
        "shape 2": len(request.things) == 2,
        "background": request.effect is None,
        "size": request.size is not None,
        "effect": request.effect in ("strobe", "pulse", "fade"),
        "glyph": request.glyph in ("dagger", "cross", "arrow"),
    }
    return list(told.values())


@dataclass(frozen=True, kw_only=True, eq=False)
class Asked:
    """The captions of takes, their own and the rivals'."""

    tokens: Int[Tensor, "n*k length"]
    answers: Int[Tensor, "n k questions"]
    required: Bool[Tensor, "n k questions"]

    def shares(self, seen: Int[Tensor, "n questions"]) -> Float[Tensor, "2 n k"]:
        """How much of what must be shown takes show, in [0, 1]: of their own captions, and of those of the next."""
        answers, required = and_the_next(self.answers), and_the_next(self.required)
        return ((seen[:, None] == answers) & required).sum(-1) / required.sum(-1)


def and_the_next(rows: Tensor) -> Tensor:
    """What belongs to takes `(n, ...)`, and what belongs to the take after each: `(2, n, ...)`."""
    return torch.stack([rows, rows.roll(-1, 0)])


def ask(requests: Sequence[world.Request], tokenizer: PreTrainedTokenizerFast, rng: np.random.Generator) -> Asked:
    """Captions of requests and of their rivals, of which one, two and three things are changed."""
    groups = [[one, *(rival(one, number, rng) for number in range(1, NUM_RIVALS + 1))] for one in requests]
    texts = [world.caption(one, rng) for group in groups for one in group]
    tokens = tokenizer(texts, padding="max_length", max_length=TEXT_LENGTH, truncation=True, return_tensors="pt")
    return Asked(
        tokens=tokens.input_ids,
        answers=torch.tensor([[answers(one) for one in group] for group in groups]),
        required=torch.tensor([[requires(one) for one in group] for group in groups]),
    )


# ---------------------------------------------------------------------------------------------- damage


@dataclass(frozen=True, kw_only=True, eq=False)
class Damage:
    """What is done to takes, and how much of it."""

    noise: Float[Tensor, " b"]
    """Standard deviation, in units of the latents'."""
    ghost: Float[Tensor, " b"]
    """Share of the other instants."""
    instants: Int[Tensor, "b f"]
    """Which one each frame shows."""
    others: Int[Tensor, "b f"]
    """Which one is the ghost's, and that of the pieces."""
    pieces: Bool[Tensor, "b f h w"]
    """Where the other instant is all that is shown."""
    amount: Float[Tensor, "b 4"]
    """Of noise, ghost, jumps and pieces: share of the most that the settings allow."""

    def to(self, device: torch.device) -> "Damage":
        """Move all."""
        return Damage(**{field.name: getattr(self, field.name).to(device) for field in dataclasses.fields(self)})


def draw_damage(config: EncoderConfig, size: int, draw: torch.Generator) -> Damage:
    """What to do to this many takes; nothing to some of them."""
    amount = torch.rand(size, 4, generator=draw) * (torch.rand(size, 4, generator=draw) < 0.5)
    amount *= torch.rand(size, 1, generator=draw) < config.damaged
    most = torch.tensor([config.most_noise, config.most_ghost, config.most_jump, config.most_pieces])
    noise, ghost, jump, share = (most * amount).T
    jumps = jump[:, None] * torch.randn(size, world.NUM_FRAMES, generator=draw)
    instants = (torch.arange(world.NUM_FRAMES) + jumps.round().long()).clamp(0, world.NUM_FRAMES - 1)
    others = (instants + torch.randint(1, world.NUM_FRAMES, (size, 1), generator=draw)) % world.NUM_FRAMES
    pieces = torch.rand(size, *TOKENS, generator=draw) < share.view(-1, 1, 1, 1)
    for axis, length in enumerate(TOKEN, start=1):
        pieces = pieces.repeat_interleave(length, dim=axis)
    return Damage(noise=noise, ghost=ghost, instants=instants, others=others, pieces=pieces, amount=amount)


def damaged(
    vae: AutoencoderKLWan, latents: Float[Tensor, "b c f h w"], damage: Damage, draw: torch.Generator
) -> Float[Tensor, "b f 3 height width"]:
    """Clips in [-1, 1] of normalised latents, damaged."""
    rows = torch.arange(len(latents), device=latents.device)[:, None]
    frames = latents.transpose(1, 2)
    noise = torch.randn(frames.shape, generator=draw, device=latents.device)
    own, other = frames[rows, damage.instants], frames[rows, damage.others]
    ghost, strength = (each.view(-1, 1, 1, 1, 1) for each in (damage.ghost, damage.noise))
    hurt = torch.where(damage.pieces[:, :, None], other, torch.lerp(own, other, ghost)) + strength * noise
    return decode_frames(vae, hurt.flatten(0, 1)).unflatten(0, hurt.shape[:2])


# ---------------------------------------------------------------------------------------------- training


@dataclass(frozen=True, kw_only=True, eq=False)
class Batch:
    """What a step learns from: takes, what is done to them, and what is to be told of them."""

    latents: Float16[Tensor, "b c f h w"]
    damage: Damage
    tokens: Int[Tensor, "b*k length"]
    """Of their own captions and the rivals'."""
    asked: Int[Tensor, "b questions"]
    seen: Int[Tensor, "b questions"]
    shares: Float[Tensor, "2 b k"]
    spots: Float[Tensor, "b f 3"]
    """Of the instants that are shown."""
    known: Bool[Tensor, " b"]
    """Whether that is all the damage: what the young generator did is damage, too, but nobody knows how much."""


def name_loss(logits: Tensor, truth: Tensor) -> Tensor:
    """Cross-entropy of all questions, summed."""
    parts = logits.split([len(options) for options in ANSWERS.values()], dim=-1)
    return torch.stack([F.cross_entropy(part, answer) for part, answer in zip(parts, truth.T, strict=True)]).sum()


class Trainer:
    """All that a step needs; `train` runs the steps.

    Raises: Stopped: the process was asked to stop while it filmed.
    """

    def __init__(self, config: EncoderConfig, run: Run, tokenizer: PreTrainedTokenizerFast, stop: Stop):
        self.config, self.run, self.tokenizer = config, run, tokenizer
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        torch.manual_seed(seed_for(config.seed, 0, 0, "encoder"))
        self.encoder = make_encoder(tokenizer)
        width = self.encoder.config.projection_dim
        heads = {"name": nn.Linear(width, sum(map(len, ANSWERS.values())))}
        heads |= {"place": nn.Linear(width, 3), "damage": nn.Linear(width, 4), "share": nn.Linear(1, 1)}
        self.modules = nn.ModuleDict({"encoder": self.encoder, **heads}).to(self.device)
        self.optimizer = torch.optim.AdamW(
            self.modules.parameters(), lr=config.learning_rate, weight_decay=0.05, fused=True
        )
        studio = Studio(config, self.device)
        self.vae: AutoencoderKLWan = studio.vae
        parts = footage.parts_of(config.num_clips, seed=config.seed, purpose="encoder takes")
        found = footage.gather(config.out / "film", parts, footage.film_takes, studio.keep, stop)
        self.film = Film(requests=found.requests, **found.tensors)

    def train(self) -> Iterator[Step]:
        """Run the steps that are left."""
        config, start = self.config, self._resume()
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            self.optimizer, config.learning_rate, total_steps=config.num_steps, pct_start=0.1, last_epoch=start - 1
        )
        for step in range(start, config.num_steps):
            losses = self._step(step)
            schedule.step()
            done = step + 1
            saves = done % config.save_every == 0 or done == config.num_steps
            measures = {}
            # Reading a number waits for the device, so it is not done at every step.
            if saves or done % config.log_every == 0:
                measures = {name: value.item() for name, value in losses.items()}
                if not math.isfinite(sum(measures.values())):
                    raise RunError(f"{config.out}: step {done}: not finite: {measures}; lower learning_rate")
                self.run.log(done, measures)
            if saves:
                self.save(done)
            yield Step(step=done, measures=measures)

    def _step(self, step: int) -> dict[str, Tensor]:
        config, device = self.config, self.device
        batch = self.draw_batch(step)  # by the processor alone, while the device is busy with the step before
        damage, shares = batch.damage.to(device), batch.shares.to(device)
        noise = generator(config.seed, step=step, purpose="encoder noise", device=device)
        pixels = damaged(self.vae, batch.latents.to(device).float(), damage, noise)
        with torch.autocast(device.type, torch.bfloat16, enabled=config.mixed_precision == "bf16"):
            frames, captions = embed(self.encoder, pixels, batch.tokens.to(device))
        frames, captions = frames.float(), F.normalize(captions.float(), dim=-1).unflatten(0, (len(frames), -1))
        videos = F.normalize(frames.mean(1), dim=-1)
        name, place, how_damaged, how_much = (self.modules[head] for head in ("name", "place", "damage", "share"))
        cosines = torch.einsum("bd,sbkd->sbk", videos, and_the_next(captions))
        off, known = (how_damaged(videos * 8) - damage.amount) ** 2, batch.known.to(device)[:, None]
        losses = {
            "contrast": contrast(videos, captions, shares[0], self.encoder.logit_scale.exp()),
            "share": F.mse_loss(how_much(cosines[..., None])[..., 0], shares),
            "seen": name_loss(name(videos * 8), batch.seen.to(device)),
            "asked": name_loss(name(captions[:, 0] * 8), batch.asked.to(device)),
            "place": F.mse_loss(place(F.normalize(frames, dim=-1) * 8), batch.spots.to(device)),
            "damage": (off * known).sum() / known.sum().clamp(min=1) / off.shape[1],
        }
        loss = torch.stack([WEIGHTS.get(term, 1) * value for term, value in losses.items()]).sum()
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.modules.parameters(), 1.0)
        self.optimizer.step()
        return losses

    def draw_batch(self, step: int) -> Batch:
        """What a step learns from."""
        config, film = self.config, self.film
        draw = generator(config.seed, step=step, purpose="encoder")
        picks = torch.randperm(len(film.clean), generator=draw)[: config.batch_size]
        repainted = torch.rand(len(picks), generator=draw) < config.repainted
        damage = draw_damage(config, len(picks), draw)
        words = np.random.default_rng(seed_for(config.seed, 0, step, "encoder captions"))
        asked = ask([film.requests[pick] for pick in picks.tolist()], self.tokenizer, words)
        return Batch(
            latents=torch.where(repainted.view(-1, 1, 1, 1, 1), film.repainted[picks], film.clean[picks]),
            damage=damage,
            tokens=asked.tokens,
            asked=asked.answers[:, 0],
            seen=film.seen[picks],
            shares=asked.shares(film.seen[picks]),
            spots=film.spots[picks[:, None], damage.instants],
            known=~(repainted & film.by_young[picks]),
        )

    def save(self, step: int) -> None:
        """Save a checkpoint after `step` finished steps."""
        tensors, optimizer = flatten_optimizer(self.optimizer)
        tensors |= {f"modules.{name}": value for name, value in self.modules.state_dict().items()}
        self.run.save(step, tensors, {"optimizer": optimizer})

    def _resume(self) -> int:
        point = self.run.resume()
        if point is None:
            return 0
        self.modules.load_state_dict(with_prefix(point.tensors, "modules."))
        restore_optimizer(self.optimizer, point.tensors, point.state["optimizer"])
        return point.step


def embed(
    model: XCLIPModel, pixels: Float[Tensor, "b f 3 h w"], tokens: Int[Tensor, "n length"]
) -> tuple[Float[Tensor, "b f 128"], Float[Tensor, "n 128"]]:
    """Embeddings of the frames of videos, of which X-CLIP takes the mean, and of texts; not normalised."""
    seen = model.visual_projection(model.vision_model(pixels.flatten(0, 1)).pooler_output)
    frames = model.mit(seen.unflatten(0, pixels.shape[:2])).last_hidden_state
    return frames, model.get_text_features(tokens).pooler_output


def contrast(
    videos: Float[Tensor, "b joint"], captions: Float[Tensor, "b k joint"], shares: Float[Tensor, "b k"], scale: Tensor
) -> Tensor:
    """CLIP's loss, with the captions of rivals among those to choose from; `captions[:, 0]` are the videos' own.

    `shares` says how much of them the videos show. A rival that fits as well as the own caption is not to be told from
    it: a strobe may be seen at a disco, and under strobe lights.
    """
    own, logits = torch.arange(len(videos), device=videos.device), scale * torch.einsum("bd,ckd->bck", videos, captions)
    fits = torch.zeros(logits.shape, dtype=torch.bool, device=videos.device)
    fits[own, own, 1:] = shares[:, 1:] >= shares[:, :1]
    chosen = logits.masked_fill(fits, -torch.inf).flatten(1)
    return (F.cross_entropy(chosen, own * captions.shape[1]) + F.cross_entropy(logits[:, :, 0].T, own)) / 2


def main(argv: Sequence[str]) -> int:
    """Train the encoder and save it as a transformers folder; returns the exit status."""
    warnings.filterwarnings("ignore", message="Mismatch dtype")  # torch's on mixed precision
    config = parse(EncoderConfig, argv, prog="python -m sandbox.encoder")
    inputs = [config.base, config.young]
    with stop_on_signal() as stop:
        try:
            with open_run(config.out, config, seed=config.seed, inputs=inputs) as run:
                if not (config.out / "model").exists():
                    make_model(config, run, stop)
        except Stopped:
            return stop.exit_status
        except RunError as error:
            sys.exit(str(error))
    print(config.out / "model")
    return 0


def make_model(config: EncoderConfig, run: Run, stop: Stop) -> None:
    """Run, or go on with, the training, and save the encoder.

    Raises: Stopped: the process was asked to stop.
    """
    # X-CLIP reads a text at its largest token.
    tokenizer = make_tokenizer(end_last=True)
    trainer = Trainer(config, run, tokenizer, stop)
    follow(trainer.train(), stop, trainer.save, num_steps=config.num_steps, shown=SHOWN, is_main=run.is_main)
    with new_folder(config.out / "model") as folder:
        for part in (trainer.encoder, tokenizer, make_processor()):
            part.save_pretrained(folder)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
