"""Train the sandbox's image and text encoder: a stock `CLIPModel` of the world, for the reward model to look through.

    python -m sandbox.encoder [FILE.yaml] [key=value ...]

    RUN/model/    the encoder, as transformers reads it
    RUN/film/     the frames that it learns from

It learns from rendered frames and their captions alone: to tell which caption belongs to which frame, as CLIP does,
and to name what is asked for or shown, from either side with the same words, so that the two can be compared. Frames
are also damaged as a diffusion model would, in latents of the VAE, by noise and by ghosts of other instants. It must
say how much, or it would learn not to see that. It knows no videos, no preferences and no gold.

The same command resumes, and ends at the same bits as a run that was not stopped.
"""

import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan
from jaxtyping import Float, Int, UInt8
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, PreTrainedTokenizerFast

from reward.checkpoint import flatten_optimizer, restore_optimizer, with_prefix
from reward.config import Config, parse
from reward.run import Run, RunError, Step, Stop, Stopped, follow, generator, open_run, seed_for, stop_on_signal
from sandbox import footage, world
from sandbox.base import new_folder
from sandbox.footage import Footage
from sandbox.text import ANSWERS, TEXT_LENGTH, answers, make_tokenizer
from sandbox.vae import decode_frames, encode_frames

NOT_IN_A_FRAME = ("motion", "effect")
SHOWN = ("contrast", "seen", "asked", "place", "damage")
"""What the progress bar shows."""


class EncoderConfig(Config):
    """How the sandbox's encoder is trained."""

    out: Path = Path("runs/sandbox/encoder")
    """Run folder; the finished encoder is its `model/`."""
    vae: Path = Path("sandbox/assets/base/vae")
    """Whose latents the frames are damaged in."""
    num_clips: int = 40_000
    frames_per_clip: int = 4
    num_steps: int = 2_353
    batch_size: int = 512
    learning_rate: float = 1e-3
    damage: float = 0.6
    """Share of the frames that are damaged."""
    most_noise: float = 0.6
    """Standard deviation of the strongest noise, in units of the latents'."""
    most_ghost: float = 0.4
    """Share of another frame of the take in the strongest ghost."""
    mixed_precision: Literal["no", "bf16"] = "bf16"
    """`bf16` halves a step's time on processors with AVX-512 BF16 or AMX; on others `no` is faster."""
    save_every: int = 500
    log_every: int = 10
    seed: int = 0


def make_encoder(tokenizer: PreTrainedTokenizerFast) -> CLIPModel:
    """An untrained CLIP of 64 x 64 frames and captions."""
    shared = {"num_attention_heads": 4, "hidden_act": "gelu", "attention_dropout": 0.0}
    return CLIPModel(
        CLIPConfig(
            projection_dim=128,
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
            },
        )
    )


def make_processor() -> CLIPImageProcessorPil:
    """Levels 0 to 255 become -1 to 1; the size is the encoder's own."""
    size = {"height": world.HEIGHT, "width": world.WIDTH}
    half = [0.5, 0.5, 0.5]
    return CLIPImageProcessorPil(size=size, crop_size=size, do_center_crop=False, image_mean=half, image_std=half)


# ---------------------------------------------------------------------------------------------- frames


@dataclass(frozen=True, kw_only=True, eq=False)
class Frames:
    """Frames of takes, and what is known of them."""

    requests: list[world.Request]
    """Of the takes; captions are drawn afresh each time one is used."""
    frames: UInt8[Tensor, "n f h w 3"]
    latents: Float[Tensor, "n c f h w"]
    """Normalised."""
    seen: Int[Tensor, "n questions"]
    """What a frame shows, as answers of `sandbox.text`; -100 for those that no frame gives."""
    asked: Int[Tensor, "n questions"]
    """What the caption asks for."""
    spots: Float[Tensor, "n f 3"]
    """Where the first thing is: from its home along x and y, in units of 16 pixels, and the logarithm of its size."""


def make_frames(config: EncoderConfig, vae: AutoencoderKLWan, stop: Stop) -> Frames:
    """Frames of fresh takes; filmed unless the run has them.

    Raises: Stopped: the process was asked to stop; the rest is filmed next time.
    """

    def keep(filmed: tuple[list[world.Take], np.ndarray, np.ndarray]) -> Footage:
        takes, frames, places = filmed
        kept = {
            "frames": torch.from_numpy(frames),
            "latents": encode_frames(vae, frames),
            "seen": torch.tensor([shown(take) for take in takes]),
            "asked": torch.tensor([answers(take.request) for take in takes]),
            "spots": torch.tensor(np.stack([_spots(take, own) for take, own in zip(takes, places, strict=True)])),
        }
        return Footage(requests=[take.request for take in takes], tensors=kept)

    parts = footage.parts_of(config.num_clips, seed=config.seed, purpose="encoder clips")
    film = partial(footage.film_frames, num_frames=config.frames_per_clip)
    found = footage.gather(config.out / "film", parts, film, keep, stop)
    return Frames(requests=found.requests, **found.tensors)


def damaged(vae: AutoencoderKLWan, latents: Tensor, other: Tensor, damage: Tensor, draw: torch.Generator) -> Tensor:
    """Frames `(b, 3, h, w)` in [-1, 1] of normalised latents `(b, c, h, w)`, mixed with others, and with noise.

    `damage` is `(b, 2)`: the standard deviation of the noise, and the share of the others.
    """
    noise = torch.randn(latents.shape, generator=draw, device=latents.device)
    strength, share = damage.view(-1, 2, 1, 1, 1).unbind(1)
    return decode_frames(vae, torch.lerp(latents, other, share) + strength * noise)


# ---------------------------------------------------------------------------------------------- training


def shown(take: world.Take) -> list[int]:
    """The answers of `sandbox.text` that a frame of the take gives; -100 for those it cannot."""
    told = dict(zip(ANSWERS, answers(take.request), strict=True))
    told |= dict.fromkeys(NOT_IN_A_FRAME, -100)
    glyphs = ANSWERS["glyph"]
    told["glyph"] = glyphs.index(take.glyph)
    return list(told.values())


def name_loss(logits: Tensor, truth: Tensor) -> Tensor:
    """Cross-entropy of all questions, summed, each over its known answers."""
    parts = logits.split([len(options) for options in ANSWERS.values()], dim=-1)
    known = [(part, answer) for part, answer in zip(parts, truth.T, strict=True) if (answer != -100).any()]
    return torch.stack([F.cross_entropy(part, answer, ignore_index=-100) for part, answer in known]).sum()


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
        heads |= {"place": nn.Linear(width, 3), "damage": nn.Linear(width, 2)}
        self.modules = nn.ModuleDict({"encoder": self.encoder, **heads}).to(self.device)
        self.optimizer = torch.optim.AdamW(
            self.modules.parameters(), lr=config.learning_rate, weight_decay=0.05, fused=True
        )
        vae = AutoencoderKLWan.from_pretrained(config.vae, dtype=torch.float32, local_files_only=True)
        self.vae = vae.to(self.device)
        self.film = make_frames(config, self.vae, stop)

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
        config, film, device = self.config, self.film, self.device
        draw = generator(config.seed, step=step, purpose="encoder")
        words = np.random.default_rng(seed_for(config.seed, 0, step, "encoder captions"))
        picks = torch.randperm(len(film.frames), generator=draw)[: config.batch_size]
        which, other = torch.randint(config.frames_per_clip, (2, len(picks)), generator=draw)
        hurt = torch.rand(len(picks), generator=draw) < config.damage
        most = torch.tensor([config.most_noise, config.most_ghost])
        damage = hurt[:, None] * most * torch.rand(len(picks), 2, generator=draw)
        pixels = film.frames[picks, which].to(device).permute(0, 3, 1, 2).float() / 127.5 - 1
        clean, ghost = (film.latents[picks[hurt], :, frame[hurt]].to(device) for frame in (which, other))
        noise = generator(config.seed, step=step, purpose="encoder noise", device=device)
        pixels[hurt.to(device)] = damaged(self.vae, clean, ghost, damage[hurt].to(device), noise)
        texts = [world.caption(film.requests[pick], words) for pick in picks.tolist()]
        with torch.autocast(device.type, torch.bfloat16, enabled=config.mixed_precision == "bf16"):
            images, captions, scale = embed(self.encoder, self.tokenizer, pixels, texts)
        images, captions = images.float(), captions.float()
        name, place, how_damaged = (self.modules[head] for head in ("name", "place", "damage"))
        losses = {
            "contrast": _contrast(images, captions, scale),
            "seen": name_loss(name(images * 8), film.seen[picks].to(device)),
            "asked": name_loss(name(captions * 8), film.asked[picks].to(device)),
            "place": F.mse_loss(place(images * 8), film.spots[picks, which].to(device)),
            "damage": F.mse_loss(how_damaged(images * 8), damage.to(device)),
        }
        loss = losses["contrast"] + losses["seen"] + losses["asked"] + 4 * losses["place"] + 20 * losses["damage"]
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.modules.parameters(), 1.0)
        self.optimizer.step()
        return losses

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
    model: CLIPModel, tokenizer: PreTrainedTokenizerFast, pixels: Tensor, texts: Sequence[str]
) -> tuple[Tensor, Tensor, Tensor]:
    """Unit embeddings `(b, 128)` of frames and texts, and CLIP's scale."""
    tokens = tokenizer(list(texts), padding="max_length", max_length=TEXT_LENGTH, truncation=True, return_tensors="pt")
    tokens = tokens.to(pixels.device)
    out = model(input_ids=tokens.input_ids, attention_mask=tokens.attention_mask, pixel_values=pixels)
    return out.image_embeds, out.text_embeds, model.logit_scale.exp()


def _contrast(images: Tensor, captions: Tensor, scale: Tensor) -> Tensor:
    logits, own = scale * images @ captions.T, torch.arange(len(images), device=images.device)
    return (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2


def _spots(take: world.Take, frames: np.ndarray) -> np.ndarray:
    x, y, scale = world.path(take.request.motion, reach=take.reach)
    return np.stack([x[frames] / 16, y[frames] / 16, np.log(scale[frames])], axis=-1).astype(np.float32)


def main(argv: Sequence[str]) -> int:
    """Train the encoder and save it as a transformers folder; returns the exit status."""
    config = parse(EncoderConfig, argv, prog="python -m sandbox.encoder")
    with open_run(config.out, config, seed=config.seed, inputs=[config.vae]) as run, stop_on_signal() as stop:
        if not (config.out / "model").exists():
            try:
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
    tokenizer = make_tokenizer()
    trainer = Trainer(config, run, tokenizer, stop)
    follow(trainer.train(), stop, trainer.save, num_steps=config.num_steps, shown=SHOWN, is_main=run.is_main)
    with new_folder(config.out / "model") as folder:
        for part in (trainer.encoder, tokenizer, make_processor()):
            part.save_pretrained(folder)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
