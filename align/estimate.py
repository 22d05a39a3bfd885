"""What an alignment will take, told before it starts: parameters, memory, and how often the transformer is asked.

`python -m align FILE --dry-run` prints it below the settings, for one device. Read are the model folder's config files;
no weight is loaded. Memory is without the judge and without the VAE's work, which does one video at a time.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from diffusers import AutoencoderKLWan
from transformers import UMT5Config, UMT5EncoderModel

from align.folder import PolicyError, read_geometry
from align.objectives.dpo import Dpo
from align.policy import MAX_TOKENS
from align.settings import AlignConfig
from align.workload import Workload, transformer_of, weight_bytes, workload

TFLOPS = 400.0
"""What an H200 did in a second of this work, of 989 that it could; see docs/performance.md."""
_GIB = 2**30
_COPIES = 6
"""Of the LoRA's numbers, all float32: weights, gradients, the optimiser's two moments, the moving average, the best."""


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes on one device."""

    transformer: int
    text_encoder: int
    vae: int
    lora: int
    """Weights, gradients, optimiser and averages."""
    step: int
    """Activations at the peak of a step."""
    rollouts: int
    """The same of the videos that are made at a time."""
    offload: bool
    """Whether text encoder and VAE are elsewhere during steps."""

    @property
    def peak(self) -> int:
        """Steps and rollouts take turns."""
        others = self.text_encoder + self.vae
        return self.transformer + self.lora + max(self.step + others * (not self.offload), self.rollouts + others)


@dataclass(frozen=True, kw_only=True)
class Forwards:
    """A round, in times that the policy predicts one video."""

    rollouts: int
    """Without counterfactuals, of which nobody knows how many there will be."""
    validation: int
    training: float

    @property
    def total(self) -> float:
        """Of a round."""
        return self.rollouts + self.validation + self.training


def describe(config: AlignConfig) -> str:
    """Give the estimate as a table; one line where the model's folder does not tell."""
    try:
        return "\n".join(_table(config))
    except PolicyError as error:
        return f"no estimate of memory and time: {error}"


def _table(config: AlignConfig) -> Iterator[str]:
    work, memory = measure(config)
    forwards, sampler = forwards_of(config, work), config.sampler
    yield "estimate, for one device, without the judge"
    base, lora = (f"{count / 1e6:,.1f} M" for count in (work.num_parameters, work.num_trained))
    yield f"  parameters   {base} in the transformer, {lora} in the LoRA"
    yield f"  video        {sampler.num_frames} frames of {sampler.width} x {sampler.height}: {work.num_tokens} tokens"
    yield "  memory, GiB"
    yield f"    transformer        {memory.transformer / _GIB:9.2f}   {config.dtype}"
    yield f"    text encoder, VAE  {(memory.text_encoder + memory.vae) / _GIB:9.2f}"
    yield f"    LoRA, optimiser    {memory.lora / _GIB:9.2f}   float32"
    how = "with" if config.gradient_checkpointing else "without"
    yield f"    a step             {memory.step / _GIB:9.2f}   {videos_of(config)} videos, {how} gradient checkpointing"
    yield f"    or rollouts        {memory.rollouts / _GIB:9.2f}   {_num_made(config)} videos at a time"
    yield f"    peak               {memory.peak / _GIB:9.2f}"
    yield "  forwards of one video, a round"
    yield f"    rollouts           {forwards.rollouts:9,}"
    yield f"    validation         {forwards.validation:9,}"
    yield f"    training           {forwards.training:9,.0f}"
    hours = forwards.total * work.forward_flop / (TFLOPS * 1e12) / 3600
    time = f"{hours:.3g} h a round, {hours * config.num_rounds:.3g} h in all"
    yield f"  time         {time}, on an H200 ({TFLOPS:.0f} TFLOP/s)"


def measure(config: AlignConfig) -> tuple[Workload, Memory]:
    """Give the work of one video, and the memory of a run.

    Raises: PolicyError: no usable model folder, or it cannot make videos of the sampler's size.
    """
    sampler, dtype = config.sampler, getattr(torch, config.dtype)
    shape = read_geometry(config.model).latent_shape(sampler.num_frames, sampler.height, sampler.width)
    transformer = transformer_of(AutoencoderKLWan.load_config(str(config.model / "transformer")))
    work = workload(transformer, shape, MAX_TOKENS, config.lora)
    with torch.device("meta"):
        vae = AutoencoderKLWan.from_config(AutoencoderKLWan.load_config(str(config.model / "vae")))
        text_encoder = UMT5EncoderModel(UMT5Config.from_pretrained(config.model / "text_encoder"))
    number_bytes = 2 if "bf16" in config.mixed_precision or dtype == torch.bfloat16 else 4
    return work, Memory(
        transformer=weight_bytes(transformer, dtype),
        text_encoder=text_encoder.num_parameters() * dtype.itemsize,
        vae=vae.num_parameters() * torch.float32.itemsize,
        lora=_COPIES * torch.float32.itemsize * work.num_trained,
        step=work.activation_bytes(
            videos_of(config), number_bytes=number_bytes, checkpointing=config.gradient_checkpointing
        ),
        rollouts=work.forward_bytes(_num_made(config), number_bytes=number_bytes),
        offload=config.offload,
    )


def forwards_of(config: AlignConfig, work: Workload) -> Forwards:
    """Count a round's forwards; what else a step does counts by its FLOP."""
    asked = config.sampler.steps * (2 if config.sampler.guidance_scale > 1 else 1)
    step = work.forward_flop + work.backward_flop
    step += work.recomputed_flop if config.gradient_checkpointing else 0
    videos = config.steps_per_round * config.accumulate * videos_of(config)
    return Forwards(
        rollouts=config.rollouts.num_prompts * config.rollouts.num_per_prompt * asked,
        validation=config.num_validation_prompts * asked,
        training=(videos * step + _num_asked(config, videos) * work.reference_flop) / work.forward_flop,
    )


def _num_asked(config: AlignConfig, num_videos: int) -> int:
    """Give of how many videos the reference is asked; with `noise.draws`, of at most so many of the policy's own."""
    if not isinstance(config.objective, Dpo):
        return 0
    if config.noise.draws is None:
        return num_videos
    pairs = config.rollouts.num_prompts * config.pairing.pairs_per_prompt * (1 + config.replay)
    return min(num_videos, 2 * pairs * config.noise.draws)


def videos_of(config: AlignConfig) -> int:
    """Give how many videos one device trains on at a time."""
    return config.batch_size // config.accumulate * (2 if isinstance(config.objective, Dpo) else 1)


def _num_made(config: AlignConfig) -> int:
    return config.rollouts.chunk_size * config.rollouts.num_per_prompt
