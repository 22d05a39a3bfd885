"""What a training step asks of a machine, worked out from the shape of a transformer: parameters, FLOP and bytes.

Of FLOP only matrix products are counted, two for each multiplication and its addition. The base is frozen: its layers
hand gradients on but have none of their own, so a backward costs about as much as a forward, not twice as much.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import WanTransformer3DModel
from torch import nn

from align.policy import Lora

_BYTES = {
    2: {"block": (52, 2), "working": (46, 3), "checkpointed": (69, 4), "forward": (18, 4)},
    4: {"block": (61, 4), "working": (46, 8), "checkpointed": (65, 12), "forward": (24, 8)},
}
"""Bytes a token for each channel of the width, and of the feed-forward layer: kept of each block for its backward; in
use beside that at the peak of a step, without and with gradient checkpointing; and at the peak of a forward that is not
trained. By the size of a number; counted from the tensors of steps on a CPU. Kernels of a GPU may differ."""

_UNTRAINED = tuple(f"blocks.0.attn1.{name}" for name in ("to_q", "to_k", "to_v"))
"""Layers whose input no LoRA comes before."""


@dataclass(frozen=True, kw_only=True)
class Layer:
    """A matrix of the base, and what it is used for in a forward of one video."""

    num_in: int
    num_out: int
    num_tokens: int
    rank: int
    """Of its LoRA; 0: none."""
    hands_on: bool
    """Whether a gradient goes through it, to something that is trained."""
    in_block: bool

    @property
    def flop(self) -> int:
        """Of a forward, without LoRA."""
        return 2 * self.num_tokens * self.num_in * self.num_out

    @property
    def lora_flop(self) -> int:
        """What its LoRA adds to a forward."""
        return 2 * self.num_tokens * self.rank * (self.num_in + self.num_out)

    @property
    def backward_flop(self) -> int:
        """Gradients of its input and of its LoRA."""
        of_input = self.flop + 2 * self.num_tokens * self.rank * self.num_in if self.hands_on else 0
        return of_input + self.lora_flop + 2 * self.num_tokens * self.rank * self.num_out


@dataclass(frozen=True, kw_only=True)
class Workload:
    """A transformer with a LoRA, and the FLOP of one video."""

    num_parameters: int
    """Of the base."""
    num_trained: int
    """Of the LoRA."""
    num_tokens: int
    forward_flop: int
    """Of the policy."""
    reference_flop: int
    backward_flop: int
    recomputed_flop: int
    """Done twice with gradient checkpointing: the blocks' part of the policy's forward."""
    num_layers: int
    width: int
    feed_forward_width: int

    @property
    def step_flop(self) -> int:
        """What DPO needs for one video: the policy's forward and backward, and the reference's forward."""
        return self.forward_flop + self.reference_flop + self.backward_flop

    def activation_bytes(self, num_videos: int, *, number_bytes: int, checkpointing: bool) -> int:
        """Give what a step on so many videos at a time takes beside weights, within a fifth.

        `number_bytes` is 2 where products are bfloat16, by `dtype` or mixed precision, else 4.
        """
        rule = _BYTES[number_bytes]
        block, working = (self._of(rule[name]) for name in ("block", "checkpointed" if checkpointing else "working"))
        kept = number_bytes * self.width if checkpointing else block
        return num_videos * self.num_tokens * (self.num_layers * kept + working)

    def forward_bytes(self, num_videos: int, *, number_bytes: int) -> int:
        """Give what predicting so many videos at a time takes beside weights, within a fifth."""
        return num_videos * self.num_tokens * self._of(_BYTES[number_bytes]["forward"])

    def _of(self, share: tuple[int, int]) -> int:
        return share[0] * self.width + share[1] * self.feed_forward_width


def transformer_of(config: Mapping[str, Any]) -> WanTransformer3DModel:
    """Give a transformer of these settings (diffusers' `config.json`) without weights."""
    with torch.device("meta"):
        return WanTransformer3DModel.from_config(dict(config))


def workload(
    transformer: WanTransformer3DModel, latent_shape: tuple[int, int, int, int], num_text_tokens: int, lora: Lora
) -> Workload:
    """Count what one video of latents (c, f, h, w) takes; `transformer` has no LoRA yet."""
    num_tokens = math.prod(latent_shape[1:]) // math.prod(transformer.config.patch_size)
    layers = list(_layers(transformer, num_tokens, num_text_tokens, lora))
    config = transformer.config
    width = config.num_attention_heads * config.attention_head_dim
    # Two products, of queries and keys and of their scores and values; four in a backward.
    attention = 4 * width * num_tokens * (num_tokens + num_text_tokens) * config.num_layers
    reference = attention + sum(layer.flop for layer in layers)
    return Workload(
        num_parameters=sum(p.numel() for p in transformer.parameters()),
        num_trained=sum(layer.rank * (layer.num_in + layer.num_out) for layer in layers),
        num_tokens=num_tokens,
        forward_flop=reference + sum(layer.lora_flop for layer in layers),
        reference_flop=reference,
        backward_flop=2 * attention + sum(layer.backward_flop for layer in layers),
        recomputed_flop=attention + sum(layer.flop + layer.lora_flop for layer in layers if layer.in_block),
        num_layers=config.num_layers,
        width=width,
        feed_forward_width=config.ffn_dim,
    )


def _layers(transformer: nn.Module, num_tokens: int, num_text_tokens: int, lora: Lora) -> Iterator[Layer]:
    for name, module in transformer.named_modules():
        if not isinstance(module, nn.Linear | nn.Conv3d):
            continue
        num_out, *num_in = module.weight.shape
        in_block = name.startswith("blocks.")
        reads_text = "text_embedder" in name or name.endswith(("attn2.to_k", "attn2.to_v"))
        reads_time = ".time_" in name
        yield Layer(
            num_in=math.prod(num_in),
            num_out=num_out,
            num_tokens=num_text_tokens if reads_text else 1 if reads_time else num_tokens,
            rank=lora.rank if name.endswith(tuple(f".{target}" for target in lora.targets)) else 0,
            hands_on=(in_block or name == "proj_out") and not reads_text and name not in _UNTRAINED,
            in_block=in_block,
        )


def weight_bytes(transformer: WanTransformer3DModel, dtype: torch.dtype) -> int:
    """Give the size of a transformer loaded with a dtype; diffusers leaves a few weights in float32."""
    kept = set(transformer._keep_in_fp32_modules)
    sizes = {True: torch.float32.itemsize, False: dtype.itemsize}
    return sum(p.numel() * sizes[not kept.isdisjoint(name.split("."))] for name, p in transformer.named_parameters())
