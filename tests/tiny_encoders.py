"""Encoders with random weights in the folders that transformers saves, small enough to run in milliseconds."""

from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen2VLImageProcessorPil,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Siglip2Config,
    Siglip2ImageProcessorPil,
    Siglip2Model,
    Siglip2Tokenizer,
    SiglipConfig,
    SiglipImageProcessorPil,
    SiglipModel,
    VideoMAEImageProcessorPil,
    XCLIPConfig,
    XCLIPModel,
)

from reward.video import Video

_LANGUAGE_OF_TESTS: str = "a red blue circle square moves left right under strobe lights user seconds < > ."
WORDS: tuple[str, ...] = (*_LANGUAGE_OF_TESTS.split(), *"0123456789")
SPECIAL = ("<pad>", "<bos>", "<unk>", "<eos>", "<|vision_start|>", "<|vision_end|>", "<|video_pad|>", "<|image_pad|>")
PAD, BOS, EOS, VISION_START, VISION_END, VIDEO, IMAGE = (SPECIAL.index(name) for name in SPECIAL if name != "<unk>")
SIDE, PATCH, NUM_XCLIP_FRAMES = 32, 8, 4
_TEXT = {
    "vocab_size": 64,
    "hidden_size": 24,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 12,
    "pad_token_id": PAD,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
}
_VISION = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": SIDE,
    "patch_size": PATCH,
}
_SQUARE = {"height": SIDE, "width": SIDE}


def video(seed: int, *, num_frames: int = 6, height: int = 40, width: int = 64, fps: float = 16.0) -> Video:
    """Coarse noise that differs from frame to frame."""
    cells = np.random.default_rng(seed).integers(0, 256, (num_frames, height // 8, width // 8, 3), dtype=np.uint8)
    return Video(frames=cells.repeat(8, axis=1).repeat(8, axis=2), fps=fps)


def tokenizer(*, closed: bool = True, length: int = 12) -> PreTrainedTokenizerFast:
    """A word-level tokenizer; `closed` texts begin and end with a mark, as CLIP's do."""
    vocabulary = {str(word): index for index, word in enumerate((*SPECIAL, *WORDS))}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    if closed:
        marks = [("<bos>", BOS), ("<eos>", EOS)]
        inner.post_processor = processors.TemplateProcessing(single="<bos> $A <eos>", special_tokens=marks)
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
        additional_special_tokens=list(SPECIAL[4:]),
        model_max_length=length,
    )


def clip(folder: Path, *, seed: int = 0) -> Path:
    """Save a CLIP; give its folder."""
    model = _seeded(seed, CLIPModel, CLIPConfig(text_config=_TEXT, vision_config=_VISION, projection_dim=16))
    return _save(folder, model, CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size=_SQUARE))


def siglip(folder: Path, *, seed: int = 0) -> Path:
    """Save a SigLIP; give its folder."""
    text = {**_TEXT, "projection_size": 32}
    model = _seeded(seed, SiglipModel, SiglipConfig(text_config=text, vision_config=_VISION))
    return _save(folder, model, SiglipImageProcessorPil(size=_SQUARE))


def siglip2(folder: Path, *, seed: int = 0) -> Path:
    """Save a SigLIP 2 of any aspect ratio; give its folder."""
    text = {**_TEXT, "projection_size": 32, "max_position_embeddings": 40}
    vision = {**_VISION, "num_patches": (SIDE // PATCH) ** 2}
    model = _seeded(seed, Siglip2Model, Siglip2Config(text_config=text, vision_config=vision))
    _save(folder, model, Siglip2ImageProcessorPil(patch_size=PATCH, max_num_patches=16))
    letters = [*SPECIAL[:4], "▁", *"abcdefghijklmnopqrstuvwxyz<>|_?"]
    vocabulary = {letter: index for index, letter in enumerate(letters)}
    Siglip2Tokenizer(vocab=vocabulary, merges=[], padding_side="right", mask_token="<unk>").save_pretrained(folder)
    return folder


def xclip(folder: Path, *, seed: int = 0) -> Path:
    """Save an X-CLIP, which looks at 4 frames at once; give its folder."""
    vision = {**_VISION, "mit_hidden_size": 16, "mit_intermediate_size": 32, "mit_num_attention_heads": 2}
    config = XCLIPConfig(
        text_config=_TEXT,
        vision_config={**vision, "num_frames": NUM_XCLIP_FRAMES},
        projection_dim=16,
        prompt_num_attention_heads=2,
    )
    model = _seeded(seed, XCLIPModel, config)
    return _save(folder, model, VideoMAEImageProcessorPil(size={"shortest_edge": SIDE}, crop_size=_SQUARE))


DUAL = {"clip": clip, "siglip": siglip, "siglip2": siglip2, "xclip": xclip}

_LANGUAGE = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [1, 1, 2]},
    "bos_token_id": BOS,
    "eos_token_id": EOS,
    "pad_token_id": PAD,
}
_IDS = {
    "image_token_id": IMAGE,
    "video_token_id": VIDEO,
    "vision_start_token_id": VISION_START,
    "vision_end_token_id": VISION_END,
}
_EYES = {"depth": 2, "num_heads": 2, "patch_size": PATCH, "temporal_patch_size": 2, "spatial_merge_size": 2}


def qwen2_vl(folder: Path, *, seed: int = 0) -> Path:
    """Save a Qwen2-VL; give its folder."""
    vision = {**_EYES, "embed_dim": 16, "hidden_size": 32}
    config = Qwen2VLConfig(text_config=_LANGUAGE, vision_config=vision, **_IDS)
    return _save_vlm(folder, _seeded(seed, Qwen2VLForConditionalGeneration, config))


def qwen2_5_vl(folder: Path, *, seed: int = 0) -> Path:
    """Save a Qwen2.5-VL; give its folder."""
    vision = {**_EYES, "hidden_size": 16, "intermediate_size": 32, "out_hidden_size": 32, "window_size": 32}
    config = Qwen2_5_VLConfig(text_config=_LANGUAGE, vision_config={**vision, "fullatt_block_indexes": [1]}, **_IDS)
    return _save_vlm(folder, _seeded(seed, Qwen2_5_VLForConditionalGeneration, config))


def qwen3_vl(folder: Path, *, seed: int = 0) -> Path:
    """Save a Qwen3-VL; give its folder."""
    vision = {**_EYES, "hidden_size": 16, "intermediate_size": 32, "out_hidden_size": 32}
    deep = {"num_position_embeddings": 16, "deepstack_visual_indexes": [0]}
    text = {**_LANGUAGE, "head_dim": 8}
    config = Qwen3VLConfig(text_config=text, vision_config={**vision, **deep}, **_IDS)
    return _save_vlm(folder, _seeded(seed, Qwen3VLForConditionalGeneration, config))


VLM = {"qwen2_vl": qwen2_vl, "qwen2_5_vl": qwen2_5_vl, "qwen3_vl": qwen3_vl}


def _seeded(seed: int, kind, config):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return kind(config).eval()


def _save(folder: Path, model, image_processor) -> Path:
    model.save_pretrained(folder)
    image_processor.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def _save_vlm(folder: Path, model) -> Path:
    model.save_pretrained(folder)
    Qwen2VLImageProcessorPil(patch_size=PATCH, temporal_patch_size=2, merge_size=2).save_pretrained(folder)
    tokenizer(closed=False, length=1024).save_pretrained(folder)
    return folder
