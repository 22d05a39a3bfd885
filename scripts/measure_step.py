"""Measure one training step of a video transformer by the code that `python -m align` trains with.

python scripts/measure_step.py [model=DIR | size=wan2.1-1.3b] [num_frames=81 height=480 width=832 ...]

Without a folder, a transformer of that size is made in memory, with random weights: they change neither time nor
memory. Latents and prompt embeddings are random too, so neither VAE nor text encoder takes part. A step is DPO's on
one batch: the policy's forward and backward, and the forward of the reference, which is the same weights with the LoRA
off. Prints one JSON object; a setting that does not fit in memory says so in it.

FLOP are worked out from shapes (`align.workload`). `utilisation` divides by time and `peak_tflops` what a step needs;
`executed_tflop` also holds what gradient checkpointing does a second time.
"""

import gc
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import accelerate
import diffusers
import numpy as np
import peft
import torch
from accelerate import Accelerator
from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler, WanTransformer3DModel
from diffusers.pipelines.wan.pipeline_wan import WanPipeline
from pydantic import PositiveFloat, PositiveInt, model_validator
from torch import Tensor
from transformers import UMT5Config, UMT5EncoderModel

from align import learning, workload
from align.folder import Geometry, PolicyError
from align.learning import Drawn, Item, NoiseLevels, Pool
from align.objectives.beta import start_beta
from align.objectives.dpo import Dpo
from align.objectives.pairs import View
from align.policy import MAX_TOKENS, Lora, Policy
from align.workload import Workload
from reward.config import Config, parse

GIB = 2**30
_HEADS = {"num_attention_heads": 12, "attention_head_dim": 128, "ffn_dim": 8960, "num_layers": 30}
SIZES: dict[str, dict[str, int]] = {
    "wan2.1-1.3b": {**_HEADS, "text_dim": 4096, "freq_dim": 256},
    "tiny": {
        "num_attention_heads": 2,
        "attention_head_dim": 12,
        "ffn_dim": 64,
        "num_layers": 3,
        "text_dim": 16,
        "freq_dim": 16,
    },
}
"""Settings of transformers; the rest is alike in all Wan 2.1 text-to-video models, and diffusers' default."""


class MeasureConfig(Config):
    """Measure seconds, memory and FLOP of a step of DPO."""

    model: Path | None = None
    """Folder of a Wan text-to-video pipeline in diffusers' format; null: random weights of a known size."""
    size: Literal["wan2.1-1.3b", "tiny"] = "wan2.1-1.3b"
    lora: Lora = Lora()
    objective: Dpo = Dpo()
    num_frames: PositiveInt = 81
    height: PositiveInt = 480
    """Pixels."""
    width: PositiveInt = 832
    """Pixels."""
    batch_size: PositiveInt = 1
    """Pairs, so half the number of videos."""
    gradient_checkpointing: bool | None = None
    """Null: first with it, then without."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    mixed_precision: Literal["no", "bf16"] = "bf16"
    num_repeats: PositiveInt = 3
    """After one that does not count; the median counts."""
    peak_tflops: PositiveFloat = 989.0
    """What the device can do in a second: of an H100 SXM, bfloat16, dense."""

    @model_validator(mode="after")
    def _has_one_model(self) -> "MeasureConfig":
        if self.model is not None and "size" in self.model_fields_set:
            raise ValueError(f"model={self.model} would ignore size={self.size}; drop one of them")
        return self


@dataclass(frozen=True, kw_only=True)
class Expected:
    """What shapes say of a setting."""

    gradient_checkpointing: bool
    needed_tflop: float
    executed_tflop: float
    estimated_gib: float
    """Of `peak_gib`."""


@dataclass(frozen=True, kw_only=True)
class Timed:
    """What a setting took."""

    seconds_step: float
    seconds_forward: float
    """Of the policy, without gradient, on all videos of the step."""
    peak_gib: float | None
    """Of tensors in a step, weights and optimiser included; null on a CPU."""
    reserved_gib: float | None
    """What the allocator held for them."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Bench:
    """A policy, and what it takes a step on."""

    policy: Policy
    accelerator: Accelerator
    optimizer: torch.optim.AdamW
    objective: Dpo
    pool: Pool
    batch: list[Drawn]
    prompt_embeds: Tensor
    beta: float

    def step(self) -> None:
        """Do what `align.train` does in a step."""
        found = learning.losses_of(self.objective, self.policy, self.pool, self.batch, self.embed, self.beta)
        self.accelerator.backward(found.loss.mean())
        self.accelerator.clip_grad_norm_(self.policy.lora_parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()

    @torch.no_grad()
    def forward(self) -> None:
        """Predict once, on as many videos as a step has."""
        noisy = torch.stack([drawn.noise for drawn in self.batch] * 2).to(self.policy.device)
        sigma = torch.tensor([drawn.sigma for drawn in self.batch] * 2, device=self.policy.device)
        self.policy.velocity(noisy, sigma, self.prompt_embeds.expand(len(noisy), -1, -1))

    def embed(self, _: str) -> Tensor:
        """Give the same embedding for any prompt."""
        return self.prompt_embeds


# Making -----------------------------------------------------------------------------------------------------


def make_bench(config: MeasureConfig) -> Bench:
    """Load or make the policy, and random videos for it.

    Raises: PolicyError: no usable folder, or the model cannot make videos of this size.
    """
    torch.manual_seed(0)
    accelerator = Accelerator(mixed_precision=config.mixed_precision, cpu=not torch.cuda.is_available())
    policy = _load(config, accelerator.device) if config.model else _random_policy(config, accelerator.device)
    shape = policy.geometry.latent_shape(config.num_frames, config.height, config.width)
    width = policy.pipeline.transformer.config.text_dim
    embeds = torch.randn(MAX_TOKENS, width, device=accelerator.device)
    policy.transformer = accelerator.prepare(policy.pipeline.transformer.train())
    pool = random_pool(shape, config.batch_size)
    items = [Item(chosen=2 * pair, rejected=2 * pair + 1) for pair in range(config.batch_size)]
    batch = [
        learning.draw(items, pair, pool, NoiseLevels(), seed=0, epoch=0, name="measure")
        for pair in range(config.batch_size)
    ]
    error = learning.mean_reference_error(policy, learning.pair_batch(pool, batch, lambda _: embeds))
    return Bench(
        policy=policy,
        accelerator=accelerator,
        optimizer=torch.optim.AdamW(policy.lora_parameters(), weight_decay=0.0),
        objective=config.objective,
        pool=pool,
        batch=batch,
        prompt_embeds=embeds,
        beta=start_beta(config.objective.beta, error).value,
    )


def random_pool(shape: tuple[int, int, int, int], num_pairs: int) -> Pool:
    """Give random latents of pairs whose chosen videos are the even ones."""
    num, view = 2 * num_pairs, View(caption="", frame_seconds=())
    return Pool(
        prompts=("",) * num,
        rewards=np.tile([1.0, 0.0], num_pairs),
        cost=np.full(num, -1.0),
        limited_costs=np.zeros((num, 0)),
        views=(view,) * num,
        latents=torch.randn(num, *shape).__getitem__,
    )


def _load(config: MeasureConfig, device: torch.device) -> Policy:
    assert config.model is not None
    policy = Policy.load(config.model, device=device, dtype=getattr(torch, config.dtype), lora=config.lora)
    policy.offload()
    return policy


def _random_policy(config: MeasureConfig, device: torch.device) -> Policy:
    with device:
        transformer = WanTransformer3DModel.from_config(SIZES[config.size])
    cast(transformer, getattr(torch, config.dtype))
    pipeline = WanPipeline(
        tokenizer=None,
        text_encoder=UMT5EncoderModel(UMT5Config(vocab_size=2, d_model=8, d_kv=8, d_ff=8, num_layers=1, num_heads=1)),
        vae=AutoencoderKLWan(base_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1),
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(),
    )
    channels, patch = transformer.config.in_channels, transformer.config.patch_size
    geometry = Geometry(num_channels=channels, frames_per_latent=4, pixels_per_latent=8, patch=patch)
    policy = Policy(pipeline, geometry, Path(config.size))
    policy.attach(config.lora)
    return policy


def cast(transformer: WanTransformer3DModel, dtype: torch.dtype) -> None:
    """Give weights the types that `from_pretrained(dtype=...)` gives them: a few stay in float32."""
    kept = set(transformer._keep_in_fp32_modules)
    for name, parameter in transformer.named_parameters():
        if kept.isdisjoint(name.split(".")):
            parameter.data = parameter.data.to(dtype)


# Measuring --------------------------------------------------------------------------------------------------


def measure(config: MeasureConfig) -> dict[str, Any]:
    """Measure each setting; give what is to be printed.

    Raises: PolicyError: see `make_bench`.
    """
    bench = make_bench(config)
    transformer = bench.policy.pipeline.transformer
    channels, frames, height, width = bench.batch[0].noise.shape
    shape = (channels, frames, height, width)
    work = workload.workload(workload.transformer_of(transformer.config), shape, MAX_TOKENS, config.lora)
    base = sum(p.numel() * p.element_size() for p in transformer.parameters() if not p.requires_grad)
    settings = (True, False) if config.gradient_checkpointing is None else (config.gradient_checkpointing,)
    expected = [_expected(config, work, base, setting) for setting in settings]
    return {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        **{package.__name__: package.__version__ for package in (torch, diffusers, peft, accelerate)},
        "config": config.model_dump(mode="json"),
        "num_videos": 2 * config.batch_size,
        "latent_shape": shape,
        "tokens_per_video": work.num_tokens,
        "num_parameters": work.num_parameters,
        "num_trained": work.num_trained,
        "reference_copy_gib": base / GIB,
        "settings": [
            _described(config, row, timed(bench, row.gradient_checkpointing, config.num_repeats)) for row in expected
        ],
    }


def _expected(config: MeasureConfig, work: Workload, base_bytes: int, checkpointing: bool) -> Expected:
    videos, recomputed = 2 * config.batch_size, work.recomputed_flop if checkpointing else 0
    number_bytes = 2 if "bfloat16" in config.dtype or config.mixed_precision == "bf16" else 4
    activations = work.activation_bytes(videos, number_bytes=number_bytes, checkpointing=checkpointing)
    return Expected(
        gradient_checkpointing=checkpointing,
        needed_tflop=videos * work.step_flop / 1e12,
        executed_tflop=videos * (work.step_flop + recomputed) / 1e12,
        # Of the LoRA: weights, gradients and two moments, all float32.
        estimated_gib=(base_bytes + 16 * work.num_trained + activations) / GIB,
    )


def timed(bench: Bench, checkpointing: bool, num_repeats: int) -> Timed | None:
    """Give what a setting takes; None where it does not fit in memory."""
    transformer = bench.policy.pipeline.transformer
    transformer.enable_gradient_checkpointing() if checkpointing else transformer.disable_gradient_checkpointing()
    try:
        seconds_step, peak, reserved = _median_seconds(bench.step, num_repeats), _peak_gib(), _reserved_gib()
        seconds_forward = _median_seconds(bench.forward, num_repeats)
    except torch.OutOfMemoryError:
        return None
    finally:
        _release(bench)
    return Timed(seconds_step=seconds_step, seconds_forward=seconds_forward, peak_gib=peak, reserved_gib=reserved)


def _described(config: MeasureConfig, expected: Expected, found: Timed | None) -> dict[str, Any]:
    described = asdict(expected) | {"out_of_memory": found is None}
    if found is None:
        return described
    return described | {
        **asdict(found),
        "forwards_per_step": found.seconds_step / found.seconds_forward,
        "utilisation": expected.needed_tflop / found.seconds_step / config.peak_tflops,
    }


def _median_seconds(work: Callable[[], None], num_repeats: int) -> float:
    work()
    return statistics.median(_seconds(work, num_repeats))


def _seconds(work: Callable[[], None], num_repeats: int) -> Iterator[float]:
    for _ in range(num_repeats):
        _wait()
        start = time.perf_counter()
        work()
        _wait()
        yield time.perf_counter() - start


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _peak_gib() -> float | None:
    return torch.cuda.max_memory_allocated() / GIB if torch.cuda.is_available() else None


def _reserved_gib() -> float | None:
    return torch.cuda.max_memory_reserved() / GIB if torch.cuda.is_available() else None


def _release(bench: Bench) -> None:
    """Forget what a step that did not fit has left, and the peak of one that did."""
    bench.optimizer.zero_grad()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def main(argv: Sequence[str]) -> None:
    """Print one JSON object."""
    config = parse(MeasureConfig, argv, prog="python scripts/measure_step.py")
    try:
        print(json.dumps(measure(config), indent=2))
    except PolicyError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main(sys.argv[1:])
