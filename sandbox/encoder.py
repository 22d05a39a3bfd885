"""Train the sandbox's image and text encoder: a stock `CLIPModel` of the world, for the reward model to look through.

    python -m sandbox.encoder [FILE.yaml] [key=value ...]

It learns from rendered frames and their captions alone: to tell which caption belongs to which frame, as CLIP does,
and to name what is asked for or shown, from either side with the same words, so that the two can be compared. Frames
are also damaged as a diffusion model would, in latents of the VAE, by noise and by ghosts of other instants. It must
say how much, or it would learn not to see that. It knows no videos, no preferences and no gold.
"""

import multiprocessing
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan
from jaxtyping import Float, Int, UInt8
from torch import Tensor, nn
from tqdm import tqdm
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, PreTrainedTokenizerFast

from reward.config import Config, parse
from reward.run import generator, seed_for
from sandbox import world
from sandbox.base import FILM_AT_ONCE, new_folder
from sandbox.text import ANSWERS, TEXT_LENGTH, answers, make_tokenizer
from sandbox.vae import encode_frames, frame_by_frame

NOT_IN_A_FRAME = ("motion", "effect")


class EncoderConfig(Config):
    """How the sandbox's encoder is trained."""

    out: Path = Path("runs/sandbox/encoder")
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
class Footage:
    """Frames of takes, and what is known of them."""

    requests: list[world.Request]
    """Of the takes; captions are drawn afresh each time one is used."""
    frames: UInt8[np.ndarray, "n f h w 3"]
    seen: Int[Tensor, "n questions"]
    """What a frame shows, as answers of `sandbox.text`; -100 for those that no frame gives."""
    asked: Int[Tensor, "n questions"]
    """What the caption asks for."""
    spots: Float[Tensor, "n f 3"]
    """Where the first thing is: from its home along x and y, in units of 16 pixels, and the logarithm of its size."""


def film(config: EncoderConfig) -> Footage:
    """Film takes, on all processors."""
    starts = range(0, config.num_clips, FILM_AT_ONCE)
    parts = [
        (seed_for(config.seed, 0, start, "encoder clips"), min(FILM_AT_ONCE, config.num_clips - start), config)
        for start in starts
    ]
    # Spawned: torch's threads do not survive a fork.
    with multiprocessing.get_context("spawn").Pool(min(len(parts), len(os.sched_getaffinity(0)))) as pool:
        filmed = list(tqdm(pool.imap(film_part, parts), total=len(parts), desc="filming", unit="part"))
    takes = [take for part in filmed for take in part[0]]
    frames, places = (np.concatenate([part[i] for part in filmed]) for i in (1, 2))
    return Footage(
        requests=[take.request for take in takes],
        frames=frames,
        seen=torch.tensor([shown(take) for take in takes]),
        asked=torch.tensor([answers(take.request) for take in takes]),
        spots=torch.tensor(np.stack([_spots(take, own) for take, own in zip(takes, places, strict=True)])),
    )


def film_part(part: tuple[int, int, EncoderConfig]) -> tuple[list[world.Take], np.ndarray, np.ndarray]:
    """Give takes, some frames of each `uint8 (n, f, h, w, 3)`, and where in the take they are `(n, f)`."""
    seed, number, config = part
    rng = np.random.default_rng(seed)
    takes, frames, places = [], [], []
    for _ in range(number):
        take = world.film(world.sample_training_request(rng), rng)
        place = np.sort(rng.choice(world.NUM_FRAMES, size=config.frames_per_clip, replace=False))
        takes.append(take)
        frames.append(world.render(take)[place])
        places.append(place)
    return takes, np.stack(frames), np.stack(places)


@torch.no_grad()
def damaged(vae: AutoencoderKLWan, latents: Tensor, other: Tensor, damage: Tensor, draw: torch.Generator) -> Tensor:
    """Frames `(b, 3, h, w)` in [-1, 1] of normalised latents `(b, c, 1, h, w)`, mixed with others, and with noise.

    `damage` is `(b, 2)`: the standard deviation of the noise, and the share of the others.
    """
    noise = torch.randn(latents.shape, generator=draw, device=latents.device)
    std = torch.tensor(vae.config.latents_std, device=latents.device).view(1, -1, 1, 1, 1)
    strength, share = damage.view(-1, 2, 1, 1, 1, 1).unbind(1)
    with frame_by_frame(vae):
        mixed = torch.lerp(latents, other, share) + strength * noise
        return vae.decode(mixed * std, return_dict=False)[0].squeeze(2).clamp(-1, 1)


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
    errors = [F.cross_entropy(part, truth[:, i], ignore_index=-100) for i, part in enumerate(parts)]
    return torch.stack([error for error in errors if error.isfinite()]).sum()


def train_encoder(
    config: EncoderConfig, model: CLIPModel, tokenizer: PreTrainedTokenizerFast
) -> Iterator[dict[str, float]]:
    """Teach the encoder; yields the measures of each step."""
    device = model.device
    footage = film(config)
    vae = AutoencoderKLWan.from_pretrained(config.vae, dtype=torch.float32, local_files_only=True).to(device)
    latents = encode_frames(vae, footage.frames)
    frames = torch.from_numpy(footage.frames)
    head = nn.Linear(model.config.projection_dim, sum(map(len, ANSWERS.values()))).to(device)
    where = nn.Linear(model.config.projection_dim, 3).to(device)
    how_damaged = nn.Linear(model.config.projection_dim, 2).to(device)
    parameters = [p for module in (model, head, where, how_damaged) for p in module.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=config.learning_rate, weight_decay=0.05, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, config.learning_rate, total_steps=config.num_steps, pct_start=0.1
    )
    most = torch.tensor([config.most_noise, config.most_ghost])
    for step in range(config.num_steps):
        draw = generator(config.seed, step=step, purpose="encoder")
        words = np.random.default_rng(seed_for(config.seed, 0, step, "encoder captions"))
        picks = torch.randperm(len(frames), generator=draw)[: config.batch_size]
        which, other = torch.randint(config.frames_per_clip, (2, len(picks)), generator=draw)
        hurt = torch.rand(len(picks), generator=draw) < config.damage
        damage = hurt[:, None] * most * torch.rand(len(picks), 2, generator=draw)
        pixels = frames[picks, which].to(device).permute(0, 3, 1, 2).float() / 127.5 - 1
        clean, ghost = (latents[picks[hurt], :, frame[hurt]].unsqueeze(2).to(device) for frame in (which, other))
        noise = generator(config.seed, step=step, purpose="encoder noise", device=device)
        pixels[hurt.to(device)] = damaged(vae, clean, ghost, damage[hurt].to(device), noise)
        texts = [world.caption(footage.requests[pick], words) for pick in picks.tolist()]
        with torch.autocast(device.type, torch.bfloat16, enabled=config.mixed_precision == "bf16"):
            images, captions, scale = embed(model, tokenizer, pixels, texts)
        images, captions = images.float(), captions.float()
        losses = {
            "contrast": _contrast(images, captions, scale),
            "seen": name_loss(head(images * 8), footage.seen[picks].to(device)),
            "asked": name_loss(head(captions * 8), footage.asked[picks].to(device)),
            "place": F.mse_loss(where(images * 8), footage.spots[picks, which].to(device)),
            "damage": F.mse_loss(how_damaged(images * 8), damage.to(device)),
        }
        loss = losses["contrast"] + losses["seen"] + losses["asked"] + 4 * losses["place"] + 20 * losses["damage"]
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        # Reading a number waits for the device, so it is not done at every step.
        last = step + 1 == config.num_steps
        yield {name: value.item() for name, value in losses.items()} if step % config.log_every == 0 or last else {}


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
    tokenizer = make_tokenizer()
    torch.manual_seed(seed_for(config.seed, 0, 0, "encoder"))
    model = make_encoder(tokenizer).to("cuda" if torch.cuda.is_available() else "cpu")
    bar = tqdm(train_encoder(config, model, tokenizer), total=config.num_steps, desc="encoder", unit="step")
    for measures in bar:
        if measures:
            bar.set_postfix({name: f"{value:.3f}" for name, value in measures.items()})
    with new_folder(config.out) as partial:
        for part in (model, tokenizer, make_processor()):
            part.save_pretrained(partial)
    print(config.out)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
