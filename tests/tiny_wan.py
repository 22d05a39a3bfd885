"""A text-to-video pipeline with random weights, small enough to sample in a fraction of a second on a CPU."""

from pathlib import Path

import torch
from diffusers import (
    AutoencoderKLWan,
    FlowMatchEulerDiscreteScheduler,
    SchedulerMixin,
    WanPipeline,
    WanTransformer3DModel,
)
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

HEIGHT, WIDTH, NUM_FRAMES = 32, 32, 6
PROMPTS = ("a red circle moving left", "a blue square on a white background")


def build(folder: Path, *, scheduler: SchedulerMixin | None = None, compression: int = 1, seed: int = 0) -> Path:
    """Save a `WanPipeline` folder with `compression` (1 or 4) frames in a latent frame; give it."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        tokenizer = _tokenizer()
        pipeline = WanPipeline(
            tokenizer=tokenizer,
            text_encoder=_text_encoder(len(tokenizer)),
            vae=_vae(compression),
            transformer=_transformer(),
            scheduler=scheduler or FlowMatchEulerDiscreteScheduler(shift=3.0),
        )
    pipeline.save_pretrained(folder)
    return folder


def _tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.WordLevel(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = trainers.WordLevelTrainer(special_tokens=["<pad>", "</s>", "<unk>"], show_progress=False)
    tokenizer.train_from_iterator(PROMPTS, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")


def _text_encoder(vocab_size: int) -> UMT5EncoderModel:
    config = UMT5Config(vocab_size=vocab_size, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2, pad_token_id=0)
    return UMT5EncoderModel(config).eval()


def _vae(compression: int) -> AutoencoderKLWan:
    return AutoencoderKLWan(
        base_dim=4,
        z_dim=4,
        dim_mult=[1, 2] if compression == 1 else [1, 1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False] if compression == 1 else [False, True, True],
        latents_mean=[0.1, -0.2, 0.3, 0.0],
        latents_std=[1.5, 2.0, 0.5, 1.0],
        in_channels=48 if compression == 1 else 3,
        out_channels=48 if compression == 1 else 3,
        patch_size=4 if compression == 1 else None,
        scale_factor_temporal=compression,
        scale_factor_spatial=8,
    ).eval()


def _transformer() -> WanTransformer3DModel:
    return WanTransformer3DModel(
        patch_size=(2, 2, 2),
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=16,
        freq_dim=16,
        ffn_dim=32,
        num_layers=2,
        rope_max_seq_len=32,
    ).eval()
