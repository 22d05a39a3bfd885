"""Sampling: from noise and a prompt to a video, in the steps of the model folder's own scheduler.

A video is a function of its prompt, its seed and the `Sampler`. Its noise is drawn alone, on the CPU and in
float32, as `WanPipeline` draws it from `torch.Generator().manual_seed(seed)`. In float32 on a CPU, a video
rendered alone is the stock pipeline's bit for bit, if that pads texts to as many tokens (`max_sequence_length`);
rendered in a batch, it may differ by one level of 255.
"""

import copy
import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Self

import torch
from jaxtyping import Float
from pydantic import Field, PositiveFloat, PositiveInt, model_validator
from torch import Tensor

from align.folder import NUM_TIMESTEPS
from align.objectives.pairs import View
from align.policy import Policy
from reward.config import Config
from reward.video import Video


class Sampler(Config):
    """How a video is made."""

    steps: PositiveInt = 16
    """Denoising steps; with fewer, the sandbox's base model shows less of what it is asked for."""
    guidance_scale: float = Field(default=3.0, ge=1)
    """Weight of the prompt against the negative prompt; 1 is no guidance, and takes half the time."""
    negative_prompt: str = ""
    """What guidance leads away from."""
    num_frames: PositiveInt = 16
    height: PositiveInt = 64
    """Pixels."""
    width: PositiveInt = 64
    """Pixels."""
    fps: PositiveFloat = 16.0
    """Frames a second at which the video is played; the model does not know it."""

    @model_validator(mode="after")
    def _uses_its_negative_prompt(self) -> Self:
        if self.negative_prompt and self.guidance_scale == 1:
            raise ValueError("guidance_scale=1 would ignore negative_prompt; raise the one or drop the other")
        return self

    def view(self, caption: str) -> View:
        """Tell how the network is shown a video of its own: whole."""
        seconds = tuple(frame / self.fps for frame in range(self.num_frames))
        return View(caption=caption, frame_seconds=seconds)


@dataclass(frozen=True, kw_only=True, eq=False)
class Transition:
    """One denoising step of a batch."""

    noisy: Float[Tensor, "b c lf lh lw"]
    velocity: Float[Tensor, "b c lf lh lw"]
    """After guidance."""
    next_noisy: Float[Tensor, "b c lf lh lw"]
    sigma: float
    next_sigma: float


def denoise(
    policy: Policy,
    noise: Float[Tensor, "b c lf lh lw"],
    prompt_embeds: Float[Tensor, "b tokens d"],
    negative_embeds: Float[Tensor, "b tokens d"] | None,
    sampler: Sampler,
) -> Iterator[Transition]:
    """Yield the steps from noise to clean latents; the last one's `next_noisy` is clean.

    Without `negative_embeds` there is no guidance. Gradients flow unless the caller switches them off.
    """
    scheduler = copy.deepcopy(policy.pipeline.scheduler)
    scheduler.set_timesteps(sampler.steps, device=policy.device)
    scheduler.set_begin_index(0)
    noisy = noise.to(policy.device)
    for index, timestep in enumerate(scheduler.timesteps):
        # UniPC rounds its timesteps to whole numbers: the network is asked about those, as in diffusers.
        asked = (timestep.double() / NUM_TIMESTEPS).expand(len(noisy))
        velocity = policy.velocity(noisy, asked, prompt_embeds)
        if negative_embeds is not None:
            unguided = policy.velocity(noisy, asked, negative_embeds)
            velocity = unguided + sampler.guidance_scale * (velocity - unguided)
        next_noisy = scheduler.step(velocity, timestep, noisy, return_dict=False)[0]
        yield Transition(
            noisy=noisy,
            velocity=velocity,
            next_noisy=next_noisy,
            sigma=float(scheduler.sigmas[index]),
            next_sigma=float(scheduler.sigmas[index + 1]),
        )
        noisy = next_noisy


@torch.no_grad()
def generate(
    policy: Policy, prompts: Sequence[str], seeds: Sequence[int], sampler: Sampler
) -> Float[Tensor, "b c lf lh lw"]:
    """Make the clean latents of one video for each prompt and its seed, as one batch.

    Raises: PolicyError: the model cannot make videos of this size.
    """
    shape = policy.geometry.latent_shape(sampler.num_frames, sampler.height, sampler.width)
    prompt_embeds = policy.encode_prompts(prompts)
    negative_embeds = None
    if sampler.guidance_scale > 1:
        negative_embeds = policy.encode_prompts([sampler.negative_prompt]).expand_as(prompt_embeds)
    latents = initial_noise(seeds, shape)
    for transition in denoise(policy, latents, prompt_embeds, negative_embeds, sampler):
        latents = transition.next_noisy
    return latents


def render(policy: Policy, prompts: Sequence[str], seeds: Sequence[int], sampler: Sampler) -> list[Video]:
    """Make one video for each prompt and its seed, as one batch; see `generate`."""
    return to_videos(policy, generate(policy, prompts, seeds, sampler), sampler)


def to_videos(policy: Policy, latents: Float[Tensor, "b c lf lh lw"], sampler: Sampler) -> list[Video]:
    """Decode latents."""
    return [Video(frames=frames, fps=sampler.fps) for frames in policy.decode(latents)]


def initial_noise(seeds: Sequence[int], shape: tuple[int, int, int, int]) -> Float[Tensor, "b c lf lh lw"]:
    """Draw the noise of each seed, on the CPU."""
    return torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds])


def video_seed(seed: int, prompt: str, index: int) -> int:
    """Give the seed of a prompt's index-th video, in [0, 2**32); torch's CPU generator reads no more bits."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{index}/{prompt}".encode()).digest()[:4], "big")
