"""The `vlm` backbone: a video language model of the Qwen-VL class with a LoRA and one learned token for each score.

The model reads the video, then the request, then the score tokens, whose last states are what the heads see.
Its vision tower is frozen. Nothing of it is worth keeping on disk but the resized frames.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64, UInt8
from peft import LoraConfig
from pydantic import PositiveInt
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoImageProcessor, AutoModelForImageTextToText, AutoTokenizer
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

from reward.config import Config
from reward.features import (
    Backbone,
    Features,
    check_folder,
    choose_frames,
    fingerprint,
    load_pretrained,
)
from reward.scores import NUM_SCORES
from reward.video import Video

_KINDS = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")
_ATTENTION, _FEED_FORWARD = ("q_proj", "k_proj", "v_proj", "o_proj"), ("gate_proj", "up_proj", "down_proj")
_BEFORE, _BETWEEN, _AFTER = "<|im_start|>user\n", "\nThe video was made for this request: ", "<|im_end|>\n"


class Vlm(Config):
    """A video language model of the Qwen2-VL, Qwen2.5-VL or Qwen3-VL class, with a LoRA."""

    kind: Literal["vlm"] = "vlm"
    encoder: Path
    """A folder that transformers' `save_pretrained` wrote."""
    num_frames: PositiveInt = 16
    """The most frames that the model looks at, evenly spaced in time."""
    max_pixels: PositiveInt = 200_704
    """The most pixels a frame, 448 x 448; larger ones are made smaller."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Of the model's own weights; LoRA and score tokens are always kept in float32."""
    rank: PositiveInt = 64
    alpha: PositiveInt = 128
    """What the LoRA adds is scaled by alpha / rank."""
    feed_forward: bool = False
    """Whether the feed-forward layers are adapted too, beside those of the attention."""
    gradient_checkpointing: bool = True
    """Compute layers again on the way back: a third more work, a fraction of the memory."""

    def build(self) -> "VlmBackbone":
        """Load the model, with a new LoRA and new score tokens.

        Raises: BackboneError: the folder does not suit.
        """
        return VlmBackbone(self)


@dataclass(frozen=True, kw_only=True, eq=False)
class VlmVideo:
    """Chosen frames of a video, resized to whole patches."""

    frames: UInt8[Tensor, "f h w 3"]
    seconds: Float[Tensor, " f"]


@dataclass(frozen=True, kw_only=True, eq=False)
class VlmText:
    """A text as the model's tokens."""

    ids: Int64[Tensor, " n"]


class VlmBackbone(Backbone[VlmVideo, VlmText]):
    """See `Vlm`."""

    video_type = VlmVideo
    text_type = VlmText

    def __init__(self, config: Vlm):
        super().__init__()
        self.config = config
        self.kind = check_folder(config.encoder, _KINDS)
        options = {"use_safetensors": True, "output_loading_info": True, "dtype": config.dtype}
        self.encoder = load_pretrained(AutoModelForImageTextToText, config.encoder, **options)
        # Of the video processors there are none without torchvision; the numbers are the same as for images.
        self.processor = load_pretrained(AutoImageProcessor, config.encoder, backend="pil")
        self.patch, self.depth = self.processor.patch_size, self.processor.temporal_patch_size
        self.merge = self.processor.merge_size
        self.tokenizer = load_pretrained(AutoTokenizer, config.encoder)
        self.encoder_sha256 = fingerprint(config.encoder)
        self.recipe = f"vlm 1 {config.model_dump_json(include={'num_frames', 'max_pixels'})}"
        self.width = self.encoder.config.text_config.hidden_size
        self._attach_lora()
        embeddings = self.encoder.get_input_embeddings().weight
        self.scores = nn.Parameter(torch.randn(NUM_SCORES, self.width) * embeddings.float().std())
        if config.gradient_checkpointing:
            self.encoder.activation_checkpointing_enable({"use_reentrant": False})

    def _attach_lora(self) -> None:
        layers = (*_ATTENTION, *(_FEED_FORWARD if self.config.feed_forward else ()))
        targets = rf".*language_model\..*\.({'|'.join(layers)})"
        self.encoder.add_adapter(LoraConfig(r=self.config.rank, lora_alpha=self.config.alpha, target_modules=targets))
        for parameter in self.encoder.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()

    # Frozen -------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def encode_video(self, video: Video) -> VlmVideo:
        """Give the resized frames of a video."""
        chosen = choose_frames(len(video.frames), self.config.num_frames)
        factor = self.patch * self.merge
        size = smart_resize(*video.frames.shape[1:3], factor, factor**2, self.config.max_pixels)
        resized = [_resized(frame, size) for frame in video.frames[chosen]]
        return VlmVideo(frames=torch.stack(resized), seconds=torch.from_numpy(chosen / video.fps).float())

    def encode_text(self, text: str) -> VlmText:
        """Give the tokens of a text; see `Backbone.encode_text`."""
        return VlmText(ids=torch.tensor(self._ids(text), dtype=torch.int64))

    def _ids(self, text: str, *, marks: bool = False) -> list[int]:
        """Tokens of a text; unless `marks` is set, a mark of the model in it is read as its letters."""
        return self.tokenizer(text, add_special_tokens=False, split_special_tokens=not marks).input_ids

    # Trained ------------------------------------------------------------------------------------------------

    def forward(self, batch: Sequence[Features[VlmVideo, VlmText]]) -> Float[Tensor, "b 18 width"]:
        """Give the states; see `Backbone.forward`."""
        patches, grids = zip(*(self._patches(item.video) for item in batch), strict=True)
        rows = [self._row(item, grid) for item, grid in zip(batch, grids, strict=True)]
        ids, grid = pad_sequence(rows, batch_first=True).to(self.device), torch.stack(grids).to(self.device)
        ends = torch.tensor([[len(row)] for row in rows], device=self.device)
        places = ends - NUM_SCORES + torch.arange(NUM_SCORES, device=self.device)
        places = places[..., None].expand(-1, -1, self.width)
        positions, _ = self.encoder.model.get_rope_index(
            ids,
            mm_token_type_ids=2 * (ids == self.encoder.config.video_token_id).int(),
            video_grid_thw=grid,
            second_per_grid_ts=[self._seconds_per_patch(item.video) for item in batch],
        )
        embeddings = self.encoder.get_input_embeddings()(ids)
        scores = self.scores.to(embeddings.dtype).expand(len(batch), -1, -1)
        states = self.encoder.model(  # causal, so that the padding behind needs no mask
            inputs_embeds=embeddings.scatter(1, places, scores),
            position_ids=positions,
            pixel_values_videos=torch.cat(patches),
            video_grid_thw=grid,
            use_cache=False,
        ).last_hidden_state
        return states.gather(1, places)

    def _row(self, item: Features[VlmVideo, VlmText], grid: Int64[Tensor, "3"]) -> Int64[Tensor, " n"]:
        """Tokens of one conversation, with empty places for the video's patches and the scores."""
        config, (count, rows, columns) = self.encoder.config, grid.tolist()
        patches = [config.video_token_id] * (rows * columns // self.merge**2)
        start, end = [config.vision_start_token_id], [config.vision_end_token_id]
        if self.kind == "qwen3_vl":  # every patch has its own frame of marks and a time before it
            video = [token for time in self._times(item.video) for token in (*self._ids(time), *start, *patches, *end)]
        else:
            video = [*start, *patches * count, *end]
        before, between, after = (self._ids(text, marks=True) for text in (_BEFORE, _BETWEEN, _AFTER))
        places = [self.tokenizer.pad_token_id] * NUM_SCORES
        return torch.tensor([*before, *video, *between, *item.text.ids.tolist(), *after, *places])

    def _times(self, video: VlmVideo) -> list[str]:
        """What Qwen3-VL reads before each patch: the mean time of its frames."""
        means = _completed(video.seconds, self.depth).unflatten(0, (-1, self.depth)).mean(1)
        return [f"<{time:.1f} seconds>" for time in means.tolist()]

    def _seconds_per_patch(self, video: VlmVideo) -> float:
        first, last = video.seconds[0].item(), video.seconds[-1].item()
        return self.depth * (last - first) / max(1, len(video.seconds) - 1)

    def _patches(self, video: VlmVideo) -> tuple[Float[Tensor, "n channels"], Int64[Tensor, "3"]]:
        """Normalised pixels of patches, in the model's order, and their numbers in time, rows and columns."""
        mean, std = (torch.tensor(v, device=self.device) for v in (self.processor.image_mean, self.processor.image_std))
        frames = _completed(video.frames, self.depth).to(self.device)
        return patchify((frames / 255 - mean) / std, self.patch, self.depth, self.merge)


def patchify(
    frames: Float[Tensor, "f h w 3"], size: int, depth: int, merge: int
) -> tuple[Float[Tensor, "n channels"], Int64[Tensor, "3"]]:
    """Give patches of size x size pixels and `depth` frames, those that are merged side by side, and their grid."""
    count, rows, columns = len(frames) // depth, frames.shape[1] // size, frames.shape[2] // size
    split = frames.reshape(count, depth, rows // merge, merge, size, columns // merge, merge, size, 3)
    patches = split.permute(0, 2, 5, 3, 6, 8, 1, 4, 7).reshape(count * rows * columns, -1)
    return patches, torch.tensor([count, rows, columns])


def _completed(frames: Tensor, depth: int) -> Tensor:
    """Repeat the last frame until whole patches are full."""
    return torch.cat([frames, *[frames[-1:]] * (-len(frames) % depth)])


def _resized(frame: UInt8[np.ndarray, "h w 3"], size: tuple[int, int]) -> UInt8[Tensor, "h2 w2 3"]:
    pixels = torch.from_numpy(frame)
    if frame.shape[:2] == size:
        return pixels
    image = pixels.permute(2, 0, 1)[None].float()
    smooth = F.interpolate(image, size, mode="bicubic", antialias=True, align_corners=False)
    return smooth[0].permute(1, 2, 0).round().clamp(0, 255).byte()
