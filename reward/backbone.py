"""The `dual` backbone: a frozen encoder of images or videos, and of text; then a small transformer, which is trained.

The encoder sees single frames (X-CLIP: some at once, and their order), so order, rate and flicker are left to the
transformer. It reads for each chosen frame the encoder's embedding and a coarse grid of its patches, since an
embedding alone does not say where things are; for each frame of the video, chosen or not, the mean colours of a grid
and their change since the frame before, since flicker happens between chosen frames; and the text. All that is seen
is stamped with seconds. The tokens that become scores begin with what the encoder says of the video as a whole.

Deliberately absent: training the encoder.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Float16, Int, UInt8
from pydantic import Field, NonNegativeInt, PositiveInt, model_validator
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoImageProcessor, AutoModel, AutoTokenizer

from reward.config import Config
from reward.features import (
    Backbone,
    BackboneError,
    Features,
    check_folder,
    choose_frames,
    fingerprint,
    load_pretrained,
    require_finite,
)
from reward.scores import NUM_SCORES
from reward.video import Video

_KINDS = ("clip", "siglip", "siglip2", "xclip")
_CLIPS = ("clip", "xclip")
"""Crop frames, and project both sides into a space of its own size; SigLIP does neither."""
_FREQUENCIES = 2.0 ** torch.arange(-3, 6)
"""Of the clocks that stamp a token with its time, in Hz: 1/8 to 32, the fastest that 64 fps can show."""

_MATCH_SCALE = 10
"""Similarities of images and texts differ by about a tenth."""


class Dual(Config):
    """A frozen CLIP, SigLIP, SigLIP 2 or X-CLIP, then a trained transformer over time."""

    kind: Literal["dual"] = "dual"
    encoder: Path
    """A folder that transformers' `save_pretrained` wrote."""
    num_frames: PositiveInt = 16
    """The most frames that the encoder looks at, evenly spaced in time."""
    whole_frame: bool = True
    """Squeeze the whole frame into the encoder's square. False: crop as CLIP does, so that borders go unseen."""
    grid: NonNegativeInt = 2
    """Rows and columns of patch embeddings a frame; 0: the frame's one embedding alone."""
    light_frames: PositiveInt = 128
    """The most frames whose mean colours are read."""
    light_grid: PositiveInt = 8
    """Rows and columns of mean colours a frame."""
    width: PositiveInt = 256
    num_layers: PositiveInt = 2
    num_heads: PositiveInt = 4
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """Share of what each layer adds that a training step leaves out; attention and hidden units stay whole."""
    frame_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of the encoder's frames whose tokens a training step leaves out, others each time; at least one stays.

    As PatchDropout (arXiv 2208.07220) does with patches: it is faster, and less is learnt by heart. What is said of all
    frames stays as it is: the overview, and the light.
    """

    @model_validator(mode="after")
    def _require_whole_heads(self) -> "Dual":
        if self.width % self.num_heads:
            raise ValueError(f"width={self.width}: expected a multiple of num_heads={self.num_heads}")
        return self

    def build(self) -> "DualBackbone":
        """Load the encoder and make a new transformer.

        Raises: BackboneError: the folder or the number of frames does not suit.
        """
        return DualBackbone(self)


@dataclass(frozen=True, kw_only=True, eq=False)
class DualVideo:
    """What is known of a video: chosen frames, and the light of all."""

    seconds: Float[Tensor, " f"]
    frames: Float16[Tensor, "f joint"]
    """In the space that images and texts share."""
    patches: Float16[Tensor, "f cells image"]
    light_seconds: Float[Tensor, " l"]
    light: Float16[Tensor, "l 3*cells"]
    """Mean sRGB levels in [0, 1]."""


@dataclass(frozen=True, kw_only=True, eq=False)
class DualText:
    """What is known of a text; all but the first tokens of one too long for the encoder is lost."""

    tokens: Float16[Tensor, "n text"]
    whole: Float16[Tensor, " joint"]


class DualBackbone(Backbone[DualVideo, DualText]):
    """See `Dual`."""

    video_type = DualVideo
    text_type = DualText

    def __init__(self, config: Dual):
        super().__init__()
        self.config = config
        self.kind = check_folder(config.encoder, _KINDS)
        self.encoder = load_pretrained(AutoModel, config.encoder, use_safetensors=True, output_loading_info=True)
        # Of transformers' backends, only this one gives the same bits with and without torchvision.
        self.processor = load_pretrained(AutoImageProcessor, config.encoder, backend="pil")
        self.tokenizer = load_pretrained(AutoTokenizer, config.encoder)
        self.frames_at_once = self.encoder.config.vision_config.num_frames if self.kind == "xclip" else 1
        if config.num_frames % self.frames_at_once:
            raise BackboneError(
                f"num_frames={config.num_frames}: {config.encoder} looks at {self.frames_at_once} frames at once; "
                "give a multiple"
            )
        self.encoder_sha256 = fingerprint(config.encoder)
        shaping = {"num_frames", "whole_frame", "grid", "light_frames", "light_grid"}
        self.recipe = f"dual 2 {config.model_dump_json(include=shaping)}"
        self.width = config.width
        joint, image, text = self._sizes()
        self.mixer = Mixer(config, joint=joint, image=image, text=text)

    def train(self, mode: bool = True) -> "DualBackbone":
        """Switch the transformer's mode; the encoder's is always evaluation."""
        super().train(mode)
        self.encoder.eval()
        return self

    def encode_video(self, video: Video) -> DualVideo:
        """Give the features of a video; one pass of the encoder over its chosen frames."""
        count, settings = len(video.frames), self.config
        chosen = choose_frames(count, settings.num_frames, exactly=self.frames_at_once > 1)
        lit = choose_frames(count, settings.light_frames)
        with self.frozen():
            frames, patches = self._look(video.frames[chosen])
        features = DualVideo(
            seconds=torch.from_numpy(chosen / video.fps).float(),
            frames=frames.half().cpu(),
            patches=patches.half().cpu(),
            light_seconds=torch.from_numpy(lit / video.fps).float(),
            light=mean_colours(video.frames[lit], settings.light_grid).half(),
        )
        return require_finite(features, "a video")

    def encode_text(self, text: str) -> DualText:
        """Give the features of a text; see `Backbone.encode_text`."""
        tokens = self.tokenizer(
            text,
            padding="max_length",
            truncation=True,
            max_length=self.encoder.config.text_config.max_position_embeddings,
            split_special_tokens=True,  # else a user could end the text early for us, and go on for the generator
            return_attention_mask=True,
            return_tensors="pt",
        )
        with self.frozen():
            # Without a mask: SigLIP was trained to read the padding, and CLIP, being causal, never gets to it.
            read = self.encoder.get_text_features(tokens.input_ids.to(self.device))
        words = read.last_hidden_state.cpu()[tokens.attention_mask.bool()]
        features = DualText(tokens=words.half(), whole=read.pooler_output[0].half().cpu())
        return require_finite(features, f"the text {text!r}")

    def forward(self, batch: Sequence[Features[DualVideo, DualText]]) -> Float[Tensor, "b 18 width"]:
        """Give the states; see `Backbone.forward`."""
        return self.mixer(batch)

    def _sizes(self) -> tuple[int, int, int]:
        """Channels of the shared space, of patches, and of text tokens."""
        settings = self.encoder.config
        image, text = settings.vision_config.hidden_size, settings.text_config.hidden_size
        return (settings.projection_dim if self.kind in _CLIPS else image), image, text

    def _look(self, frames: UInt8[np.ndarray, "f h w 3"]) -> tuple[Tensor, Tensor]:
        """Embeddings `(f, joint)` of frames, and `(f, cells, image)` of the cells of a grid over their patches."""
        vision = self.encoder.config.vision_config
        whole = {"do_center_crop": False, "size": {"height": vision.image_size, "width": vision.image_size}}
        options = whole if self.config.whole_frame and self.kind in _CLIPS else {}
        pixels = self.processor(list(frames), input_data_format="channels_last", return_tensors="pt", **options)
        if pixels.pixel_values.ndim == 5:  # X-CLIP's, from the hub, takes a list of images for one video
            pixels["pixel_values"] = pixels.pixel_values[0]
        seen = self.encoder.vision_model(**pixels.to(self.device))
        embeddings, tokens = seen.pooler_output, seen.last_hidden_state
        if self.kind in _CLIPS:
            embeddings, tokens = self.encoder.visual_projection(embeddings), tokens[:, 1:]
        if self.kind == "xclip":  # what it says of a video is the mean of these
            embeddings = self.encoder.mit(embeddings.unflatten(0, (-1, self.frames_at_once))).last_hidden_state
            embeddings = embeddings.flatten(0, 1)
        if self.kind == "siglip2":
            rows, columns = pixels.spatial_shapes[0].tolist()
            return embeddings, pooled_patches(tokens[:, : rows * columns], rows, self.config.grid)
        return embeddings, pooled_patches(tokens, pixels.pixel_values.shape[-2] // vision.patch_size, self.config.grid)


def pooled_patches(patches: Float[Tensor, "f n image"], rows: int, grid: int) -> Float[Tensor, "f grid*grid image"]:
    """Give the mean patch embeddings over the cells of a grid; none for a grid of 0."""
    if grid == 0:
        return patches[:, :0]
    image = patches.unflatten(1, (rows, -1)).permute(0, 3, 1, 2)
    return F.adaptive_avg_pool2d(image, grid).flatten(2).transpose(1, 2)


def mean_colours(frames: UInt8[np.ndarray, "f h w 3"], grid: int) -> Float[Tensor, "f 3*grid*grid"]:
    """Give the mean sRGB levels, in [0, 1], over the cells of a grid; one frame at a time, to save memory."""
    cells = [F.adaptive_avg_pool2d(torch.from_numpy(frame).permute(2, 0, 1).float(), grid) for frame in frames]
    return torch.stack(cells).flatten(1) / 255


def overview(video: DualVideo, text: DualText) -> Float[Tensor, " 3*joint+1"]:
    """Give what an encoder says of a whole video: how well the text fits, and in what; what is shown; how it changes.

    Frames count by their mean, as in CLIP4Clip (arXiv 2104.08860). The transformer would need more prompts than there
    are to learn anew how what is shown compares with what is asked for.
    """
    frames = _evened(video.frames)
    shown = _evened(frames.mean(0))
    shared = shown * _evened(text.whole)
    return torch.cat([_MATCH_SCALE * shared.mean()[None], shared, shown, frames.std(0, correction=0)])


# The transformer over time ----------------------------------------------------------------------------------


Tokens = tuple[Float[Tensor, "b n width"], Bool[Tensor, "b n"]]
"""Tokens, and which of them are there."""


class Mixer(nn.Module):
    """One state for each score, from tokens of the text, the frames and the light."""

    frequencies: Tensor

    def __init__(self, config: Dual, *, joint: int, image: int, text: int):
        super().__init__()
        width = config.width
        self.frame_dropout = config.frame_dropout
        self.frame, self.whole = _projected(joint, width), _projected(joint, width)
        self.patch, self.word = _projected(image, width), _projected(text, width)
        self.match, self.summary = nn.Linear(1, width), nn.Linear(3 * joint + 1, width)
        self.light = nn.Sequential(nn.Linear(6 * config.light_grid**2, width), nn.GELU(), nn.Linear(width, width))
        self.clock = nn.Linear(2 * len(_FREQUENCIES), width)
        self.register_buffer("frequencies", _FREQUENCIES, persistent=False)
        # As large as what is added.
        self.scores = nn.Parameter(torch.randn(NUM_SCORES, width) / 2)
        self.cells = nn.Parameter(torch.randn(config.grid**2, width) / 2)
        self.sorts = nn.Parameter(torch.randn(4, width) / 2)
        layer = nn.TransformerEncoderLayer(
            width, config.num_heads, 4 * width, config.dropout, F.gelu, batch_first=True, norm_first=True
        )
        # Drawing lots for these, too, took a CPU a fifth of each step.
        layer.self_attn.dropout, layer.dropout.p = 0.0, 0.0
        self.layers = nn.TransformerEncoder(layer, config.num_layers, nn.LayerNorm(width), enable_nested_tensor=False)

    def forward(self, batch: Sequence[Features[DualVideo, DualText]]) -> Float[Tensor, "b 18 width"]:
        """Give the states of videos of any lengths."""
        videos, texts = [item.video for item in batch], [item.text for item in batch]
        matches = [_match(video, text) for video, text in zip(videos, texts, strict=True)]
        parts = [self._scores(videos, texts), self._text(texts), self._frames(videos, matches), self._light(videos)]
        tokens, present = (torch.cat(part, dim=1) for part in zip(*parts, strict=True))
        return self.layers(tokens, src_key_padding_mask=~present)[:, :NUM_SCORES]

    def _scores(self, videos: Sequence[DualVideo], texts: Sequence[DualText]) -> Tokens:
        """Give the scores' tokens, which begin with what the encoder says of the whole video."""
        said = torch.stack([overview(video, text) for video, text in zip(videos, texts, strict=True)])
        tokens = self.scores + self.summary(said.to(self.scores.device))[:, None]
        return tokens, torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device)

    def _text(self, texts: Sequence[DualText]) -> Tokens:
        whole = torch.stack([text.whole.float() for text in texts]).to(self.scores.device)
        words, present = self._padded([text.tokens for text in texts])
        tokens = torch.cat([self.whole(whole)[:, None], self.word(words)], dim=1)
        return tokens + self.sorts[0], F.pad(present, (1, 0), value=True)

    def _frames(self, videos: Sequence[DualVideo], matches: Sequence[Float[Tensor, " f"]]) -> Tokens:
        kept = [self._kept(len(match)) for match in matches]
        frames, present = self._padded([video.frames[k] for video, k in zip(videos, kept, strict=True)])
        patches, _ = self._padded([video.patches[k] for video, k in zip(videos, kept, strict=True)])
        seconds, _ = self._padded([video.seconds[k] for video, k in zip(videos, kept, strict=True)])
        match, _ = self._padded([match[k] for match, k in zip(matches, kept, strict=True)])
        time = self._stamp(seconds)
        one = self.frame(frames) + self.match(match[..., None]) + time + self.sorts[1]
        many = self.patch(patches) + self.cells + (time + self.sorts[2])[:, :, None]
        tokens = torch.cat([one[:, :, None], many], dim=2)
        return tokens.flatten(1, 2), present.repeat_interleave(tokens.shape[2], dim=1)

    def _kept(self, count: int) -> Int[Tensor, " f"]:
        """Which frames to look at: in training a random share of them, at least one; else all."""
        if not (self.training and self.frame_dropout):
            return torch.arange(count)
        return torch.randperm(count)[: max(1, round((1 - self.frame_dropout) * count))].sort().values

    def _light(self, videos: Sequence[DualVideo]) -> Tokens:
        light, present = self._padded([video.light for video in videos])
        seconds, _ = self._padded([video.light_seconds for video in videos])
        change = light.diff(dim=1, prepend=light[:, :1])
        tokens = self.light(torch.cat([light - 0.5, change], dim=-1))
        return tokens + self._stamp(seconds) + self.sorts[3], present

    def _stamp(self, seconds: Float[Tensor, "b n"]) -> Float[Tensor, "b n width"]:
        turns = 2 * torch.pi * seconds[..., None] * self.frequencies
        return self.clock(torch.cat([turns.sin(), turns.cos()], dim=-1))

    def _padded(self, rows: Sequence[Tensor]) -> Tokens:
        """Rows of any lengths as one batch in float32, and which of its places are theirs."""
        lengths = torch.tensor([len(row) for row in rows])
        present = torch.arange(int(lengths.max())) < lengths[:, None]
        batch = pad_sequence([row.float() for row in rows], batch_first=True)
        return batch.to(self.scores.device), present.to(self.scores.device)


def _match(video: DualVideo, text: DualText) -> Float[Tensor, " f"]:
    """How well each frame shows what the text says: the cosine, in tenths (CLIPScore, arXiv 2104.08718)."""
    return _MATCH_SCALE * F.cosine_similarity(video.frames.float(), text.whole.float(), dim=-1)


def _evened(embeddings: Tensor) -> Tensor:
    """Embeddings of unit length, times what makes their elements as large as one."""
    return F.normalize(embeddings.float(), dim=-1) * embeddings.shape[-1] ** 0.5


def _projected(channels: int, width: int) -> nn.Module:
    return nn.Sequential(nn.LayerNorm(channels), nn.Linear(channels, width))
