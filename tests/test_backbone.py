from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoImageProcessor, AutoModel

from reward.backbone import Dual, DualBackbone, _match, mean_colours, overview, pooled_patches
from reward.features import BackboneError
from reward.video import Video
from tests import tiny_encoders
from tests.tiny_encoders import video

VIDEOS = [video(0), video(1, num_frames=3), video(2, num_frames=9), video(3, num_frames=1)]
TEXTS = ["a red circle moves left", "", "a blue square", "under a red and blue square that moves and moves right"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("encoders")
    return {name: make(root / name) for name, make in tiny_encoders.DUAL.items()}


@pytest.fixture(scope="module", params=tiny_encoders.DUAL)
def backbone(request, folders: dict[str, Path]) -> DualBackbone:
    return build(folders[request.param])


@pytest.fixture(scope="module")
def clip(folders: dict[str, Path]) -> DualBackbone:
    return build(folders["clip"])


def build(folder: Path, **settings) -> DualBackbone:
    torch.manual_seed(0)
    return Dual(encoder=folder, num_frames=8, width=32).model_copy(update=settings).build().eval()


@torch.no_grad()
def states(backbone: DualBackbone, shown: Video, text: str = "a red circle") -> torch.Tensor:
    return backbone(backbone.encode([shown], [text]))


def changed(shown: Video, frames: np.ndarray) -> Video:
    return Video(frames=frames, fps=shown.fps)


# What every kind of encoder must do -------------------------------------------------------------------------


@torch.no_grad()
def test_a_batch_of_four_is_four_single_ones(backbone: DualBackbone):
    batch = backbone.encode(VIDEOS, TEXTS)
    assert backbone(batch).shape == (4, 18, 32)
    torch.testing.assert_close(backbone(batch), torch.cat([backbone([item]) for item in batch]), rtol=0, atol=2e-6)


def test_the_same_clip_twice_gives_the_same_bits(backbone: DualBackbone):
    alone = backbone.encode_video(VIDEOS[0])
    in_company = backbone.encode(VIDEOS, TEXTS)[0].video
    assert all(torch.equal(value, vars(in_company)[name]) for name, value in vars(alone).items())
    assert torch.equal(states(backbone, VIDEOS[0]), states(backbone, VIDEOS[0]))


def test_features_do_not_depend_on_the_precision_around_them(backbone: DualBackbone):
    [exact] = backbone.encode(VIDEOS[:1], TEXTS[:1])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        [inside] = backbone.encode(VIDEOS[:1], TEXTS[:1])
    assert torch.equal(inside.video.frames, exact.video.frames)
    assert torch.equal(inside.text.tokens, exact.text.tokens)


def test_order_rate_and_text_are_seen(backbone: DualBackbone):
    before = states(backbone, VIDEOS[0])
    backwards = changed(VIDEOS[0], VIDEOS[0].frames[::-1])
    faster = Video(frames=VIDEOS[0].frames, fps=24)
    others = [states(backbone, backwards), states(backbone, faster), states(backbone, VIDEOS[0], "a blue circle")]
    assert all((other - before).abs().amax() > 1e-3 for other in others)


def test_one_pass_of_the_encoder_sees_all_frames_of_a_video(backbone: DualBackbone):
    calls = []
    hook = backbone.encoder.vision_model.register_forward_hook(lambda *_: calls.append(1))
    backbone.encode(VIDEOS, TEXTS)
    hook.remove()
    assert len(calls) == len(VIDEOS)


def test_only_the_transformer_is_trained(backbone: DualBackbone):
    backbone.train()
    assert not any(module.training for module in backbone.encoder.modules())
    backbone(backbone.encode(VIDEOS, TEXTS)).square().sum().backward()
    assert {name for name, p in backbone.named_parameters() if p.requires_grad} == {
        f"mixer.{name}" for name, _ in backbone.mixer.named_parameters()
    }
    assert all(p.grad is not None and p.grad.any() for p in backbone.mixer.parameters())
    assert all(p.grad is None for p in backbone.encoder.parameters())
    backbone.zero_grad()
    backbone.eval()


def test_features_are_small_and_on_the_cpu(backbone: DualBackbone):
    [features] = backbone.encode([VIDEOS[2]], ["red"])
    tensors = {**vars(features.video), **vars(features.text)}
    assert {t.device.type for t in tensors.values()} == {"cpu"}
    assert {name for name, t in tensors.items() if t.dtype == torch.float32} == {"seconds", "light_seconds"}
    assert features.video.patches.shape[:2] == (8, 4)
    assert features.video.light.shape == (9, 192)


# Against transformers' own ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["clip", "siglip", "siglip2"])
def test_features_are_those_of_transformers(folders: dict[str, Path], name: str):
    backbone = build(folders[name], whole_frame=False, grid=1)
    ours = backbone.encode_video(VIDEOS[0])
    model = AutoModel.from_pretrained(folders[name]).eval()
    processor = AutoImageProcessor.from_pretrained(folders[name], backend="pil")
    with torch.no_grad():
        theirs = model.get_image_features(**processor(list(VIDEOS[0].frames), return_tensors="pt"))
    torch.testing.assert_close(ours.frames.float(), theirs.pooler_output, rtol=1e-2, atol=2e-3)
    patches = theirs.last_hidden_state[:, 1:] if name == "clip" else theirs.last_hidden_state
    patches = patches[:, : 3 * 5] if name == "siglip2" else patches  # 40 x 64 squeezed into at most 16 patches
    torch.testing.assert_close(ours.patches.float(), patches.mean(1, keepdim=True), rtol=1e-2, atol=2e-3)


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "sees_padding"), [("clip", False), ("xclip", False), ("siglip", True), ("siglip2", True)]
)
def test_texts_are_those_of_transformers(folders: dict[str, Path], name: str, sees_padding: bool):
    """CLIP reads a text as if it stood alone; SigLIP reads the padding too, but only words become tokens."""
    backbone = build(folders[name])
    ours, words = backbone.encode_text("a red circle"), backbone.tokenizer("a red circle").input_ids
    length = backbone.encoder.config.text_config.max_position_embeddings if sees_padding else len(words)
    ids = torch.tensor([words + [backbone.tokenizer.pad_token_id] * (length - len(words))])
    theirs = backbone.encoder.get_text_features(ids)
    torch.testing.assert_close(ours.tokens.float(), theirs.last_hidden_state[0, : len(words)], rtol=1e-2, atol=2e-3)
    torch.testing.assert_close(ours.whole.float(), theirs.pooler_output[0], rtol=1e-2, atol=2e-3)


@torch.no_grad()
def test_x_clip_frames_are_seen_in_groups(folders: dict[str, Path]):
    """As transformers sees them: what it says of a group is the mean of what is said of its frames."""
    backbone = build(folders["xclip"], whole_frame=False)
    clip = video(8, num_frames=8)
    pixels = backbone.processor(list(clip.frames), return_tensors="pt").pixel_values
    theirs = backbone.encoder.get_video_features(pixels.unflatten(1, (2, 4))[0]).pooler_output
    ours = backbone.encode_video(clip).frames.float().unflatten(0, (2, 4))
    torch.testing.assert_close(ours.mean(1), theirs, rtol=1e-2, atol=2e-3)
    assert ours.std(1).amax() > 1e-3


def test_x_clip_looks_at_its_number_of_frames(folders: dict[str, Path]):
    with pytest.raises(BackboneError, match="4 frames at once; give a multiple"):
        build(folders["xclip"], num_frames=6)
    backbone = build(folders["xclip"], num_frames=8)
    assert backbone.encode_video(VIDEOS[1]).seconds.tolist() == pytest.approx(
        [0, 0, 0, 1 / 16, 1 / 16, 1 / 8, 1 / 8, 1 / 8]
    )


# Details ----------------------------------------------------------------------------------------------------


def test_mean_colours_by_hand():
    """A frame of 2 x 4 in cells of 2 x 2: (0 + 255 + 255 + 0) / 4 = 127.5, half of 255; the right half is 51 = .2."""
    red = [[0, 255, 51, 51], [255, 0, 51, 51]]
    frame = np.stack([red, np.zeros((2, 4)), np.full((2, 4), 255)], axis=-1).astype(np.uint8)
    expected = torch.tensor([[0.5, 0.2] * 2 + [0.0] * 4 + [1.0] * 4])
    torch.testing.assert_close(mean_colours(np.repeat(frame, 2, axis=0)[None], 2), expected)


def test_pooled_patches_by_hand():
    """Patches 0 to 15 in rows of 4: the upper left four are 0, 1, 4 and 5, in the mean 2.5."""
    patches = torch.arange(16.0).reshape(1, 16, 1)
    assert pooled_patches(patches, 4, 2).flatten().tolist() == [2.5, 4.5, 10.5, 12.5]
    assert pooled_patches(patches, 4, 0).shape == (1, 0, 1)


def test_flicker_between_the_chosen_frames_is_seen(folders: dict[str, Path]):
    backbone = build(folders["clip"], num_frames=2)
    still = video(5, num_frames=1).frames.repeat(16, axis=0)
    flash = still.copy()
    flash[[5, 6]] = 255  # the encoder sees frames 4 and 12
    steady, flashing = (backbone.encode_video(Video(frames=frames, fps=16)) for frames in (still, flash))
    assert torch.equal(steady.frames, flashing.frames)
    assert torch.equal(steady.patches, flashing.patches)
    seen = [states(backbone, Video(frames=frames, fps=16)) for frames in (still, flash)]
    assert (seen[0] - seen[1]).abs().amax() > 1e-3


def test_the_overview_by_hand(clip: DualBackbone):
    """Frames along x and y: both are shown in equal parts, and each changes; the text asks against x.

    The elements of a unit vector of two are one in the root mean square if it is as long as the root of two.
    """
    [features] = clip.encode([video(1, num_frames=2)], ["a red circle"])
    shown = replace(features.video, frames=torch.tensor([[3.0, 0.0], [0.0, 2.0]]))
    asked = replace(features.text, whole=torch.tensor([-3.0, 4.0]))
    half = 0.5**0.5
    expected = torch.tensor([10 * 0.2 * half, -1.2 * half, 1.6 * half, 1, 1, half, half])
    torch.testing.assert_close(overview(shown, asked), expected)


@torch.no_grad()
def test_states_begin_with_the_overview(clip: DualBackbone):
    [features] = clip.encode(VIDEOS[:1], TEXTS[:1])
    tokens, present = clip.mixer._scores([features.video], [features.text])
    added = clip.mixer.summary(overview(features.video, features.text))
    assert present.all()
    torch.testing.assert_close(tokens[0] - clip.mixer.scores, added.expand_as(tokens[0]))


def test_a_training_step_leaves_frames_out(folders: dict[str, Path]):
    """Half of eight, in their order, others each time, and of a single one none."""
    mixer = build(folders["clip"], frame_dropout=0.5).mixer.train()
    drawn = [mixer._kept(8).tolist() for _ in range(40)]
    assert all(len(kept) == 4 and kept == sorted(set(kept)) for kept in drawn)
    assert {frame for kept in drawn for frame in kept} == set(range(8))
    assert mixer._kept(1).tolist() == [0]


def test_dropout_is_of_what_layers_add(folders: dict[str, Path]):
    dropped = build(folders["clip"], dropout=0.5)
    features = dropped.encode(VIDEOS, TEXTS)
    for layer in dropped.mixer.layers.layers:
        assert (layer.self_attn.dropout, layer.dropout.p) == (0, 0)
        assert (layer.dropout1.p, layer.dropout2.p) == (0.5, 0.5)
    assert not torch.equal(*(dropped.train()(features) for _ in range(2)))


def test_who_is_judged_is_seen_whole(folders: dict[str, Path]):
    some, every = (build(folders["clip"], frame_dropout=share) for share in (0.5, 0.0))
    features = some.encode(VIDEOS, TEXTS)
    assert torch.equal(some(features), every(features))
    assert not torch.equal(some.train()(features), every(features))


def test_frames_that_are_left_out_take_their_patches_and_matches_along(folders: dict[str, Path]):
    backbone = build(folders["clip"], frame_dropout=0.5)
    [features] = backbone.encode(VIDEOS[:1], TEXTS[:1])
    match = _match(features.video, features.text)
    whole, _ = backbone.mixer._frames([features.video], [match])
    torch.manual_seed(0)
    kept = backbone.mixer.train()._kept(len(match))
    torch.manual_seed(0)
    part, present = backbone.mixer._frames([features.video], [match])
    assert present.all()
    torch.testing.assert_close(part, whole.unflatten(1, (len(match), -1))[:, kept].flatten(1, 2))


def test_every_token_of_a_video_tells_its_time(clip: DualBackbone):
    slow, fast = ([clip.encode_video(Video(frames=VIDEOS[0].frames, fps=fps))] for fps in (8, 24))
    matches = [torch.zeros(len(slow[0].frames))]
    frames = (clip.mixer._frames(slow, matches)[0] - clip.mixer._frames(fast, matches)[0]).abs().amax(-1)[0]
    light = (clip.mixer._light(slow)[0] - clip.mixer._light(fast)[0]).abs().amax(-1)[0]
    for change, num_tokens in ((frames, 5), (light, 1)):  # the first frame's time is 0 at any rate
        assert (change[:num_tokens] == 0).all()
        assert (change[num_tokens:] > 1e-3).all()


def test_light_tells_what_changed_since_the_frame_before(clip: DualBackbone):
    """Dark, bright, bright against bright, bright, bright: the second frame changed, the third did not."""
    dark, bright = np.zeros((1, 32, 32, 3), np.uint8), np.full((1, 32, 32, 3), 200, np.uint8)
    clips = [Video(frames=np.concatenate(parts), fps=8) for parts in ([dark, bright, bright], [bright] * 3)]
    first, second = (clip.mixer._light([clip.encode_video(shown)])[0][0] for shown in clips)
    assert [torch.equal(*tokens) for tokens in zip(first, second, strict=True)] == [False, False, True]


def test_the_borders_of_a_wide_frame_are_seen_unless_cropping_is_asked_for(folders: dict[str, Path]):
    plain = video(6, num_frames=1).frames
    marked = plain.copy()
    marked[:, :, :4] = 255 - marked[:, :, :4]
    for whole_frame in (True, False):
        backbone = build(folders["clip"], whole_frame=whole_frame)
        features = [backbone.encode_video(Video(frames=frames, fps=8)) for frames in (plain, marked)]
        assert torch.equal(features[0].patches, features[1].patches) is not whole_frame


@pytest.mark.parametrize("mark", ["<eos>", "<pad>"])
def test_a_mark_in_a_text_hides_nothing(clip: DualBackbone, mark: str):
    first, second = (clip.encode_text(f"red {mark} {word}") for word in ("circle", "square"))
    assert not torch.equal(first.whole, second.whole)
    assert len(clip.encode_text(f"red {mark}").tokens) > len(clip.encode_text("red").tokens)


def test_the_recipe_is_all_that_shapes_features(folders: dict[str, Path]):
    plain = build(folders["clip"])
    shaping = {"num_frames": 4, "whole_frame": False, "grid": 1, "light_frames": 4, "light_grid": 4}
    assert all(build(folders["clip"], **{name: value}).recipe != plain.recipe for name, value in shaping.items())
    others = {"width": 64, "num_layers": 1, "num_heads": 2, "dropout": 0.0, "frame_dropout": 0.5}
    assert all(build(folders["clip"], **{name: value}).recipe == plain.recipe for name, value in others.items())


def test_long_texts_are_cut(clip: DualBackbone):
    assert len(clip.encode_text("red " * 50).tokens) == 12


def test_without_a_grid_there_are_no_patches(folders: dict[str, Path]):
    backbone = build(folders["clip"], grid=0)
    assert backbone.encode_video(VIDEOS[0]).patches.shape == (6, 0, 32)
    assert states(backbone, VIDEOS[0]).isfinite().all()


def test_long_videos_are_thinned_out(folders: dict[str, Path]):
    features = build(folders["clip"], num_frames=2, light_frames=4).encode_video(video(7, num_frames=8, fps=8))
    assert features.seconds.tolist() == [2 / 8, 6 / 8]
    assert features.light_seconds.tolist() == [1 / 8, 3 / 8, 5 / 8, 7 / 8]
