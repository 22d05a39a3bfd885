from pathlib import Path

import numpy as np
import pytest
import torch

from reward.features import BackboneError, Features
from reward.scores import NUM_SCORES
from reward.video import Video
from reward.vlm import Vlm, VlmBackbone, VlmVideo, patchify
from tests import tiny_encoders
from tests.tiny_encoders import video

VIDEOS = [video(0), video(1, num_frames=3), video(2, num_frames=9), video(3, num_frames=1, height=64)]
TEXTS = ["a red circle moves left", "", "a blue square", "under strobe lights"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("vlm")
    return {name: make(root / name) for name, make in tiny_encoders.VLM.items()}


@pytest.fixture(scope="module", params=tiny_encoders.VLM)
def backbone(request, folders: dict[str, Path]) -> VlmBackbone:
    return build(folders[request.param])


def build(folder: Path, **settings) -> VlmBackbone:
    torch.manual_seed(0)
    plain = Vlm(encoder=folder, num_frames=4, dtype="float32", rank=2, alpha=4)
    return plain.model_copy(update=settings).build().eval()


@torch.no_grad()
def states(backbone: VlmBackbone, shown: Video, text: str = "a red circle") -> torch.Tensor:
    return backbone(backbone.encode([shown], [text]))


# What every kind of model must do ---------------------------------------------------------------------------


@torch.no_grad()
def test_a_batch_of_four_is_four_single_ones(backbone: VlmBackbone):
    batch = backbone.encode(VIDEOS, TEXTS)
    assert backbone(batch).shape == (4, 18, 32)
    torch.testing.assert_close(backbone(batch), torch.cat([backbone([item]) for item in batch]), rtol=0, atol=5e-6)


def test_the_same_clip_twice_gives_the_same_bits(backbone: VlmBackbone):
    assert torch.equal(states(backbone, VIDEOS[0]), states(backbone, VIDEOS[0]))


def test_order_and_text_are_seen(backbone: VlmBackbone):
    before = states(backbone, VIDEOS[0])
    backwards = Video(frames=VIDEOS[0].frames[::-1], fps=16)
    others = [states(backbone, backwards), states(backbone, VIDEOS[0], "a blue circle")]
    assert all((other - before).abs().amax() > 1e-4 for other in others)


@pytest.mark.parametrize(("name", "is_seen"), [("qwen2_vl", False), ("qwen2_5_vl", True), ("qwen3_vl", True)])
def test_the_rate_is_seen_where_the_model_has_clocks(folders: dict[str, Path], name: str, is_seen: bool):
    backbone = build(folders[name])
    slow, fast = (states(backbone, Video(frames=VIDEOS[0].frames, fps=fps)) for fps in (1, 8))
    assert torch.equal(slow, fast) is not is_seen


def test_only_lora_and_score_tokens_are_trained(backbone: VlmBackbone):
    trained = {name: p for name, p in backbone.named_parameters() if p.requires_grad}
    assert all(name == "scores" or ("language_model" in name and ".lora_" in name) for name in trained)
    assert len(trained) == 1 + 2 * 2 * 4  # score tokens; two layers, two halves, four matrices
    backbone.train()
    backbone(backbone.encode(VIDEOS, TEXTS)).square().sum().backward()
    gradients = {name: p.grad for name, p in backbone.named_parameters() if p.grad is not None}
    assert gradients.keys() == trained.keys()
    assert gradients["scores"].any()
    backbone.zero_grad()
    backbone.eval()


@pytest.mark.parametrize("mark", ["<|video_pad|>", "<|vision_start|>", "<|image_pad|>", "<eos>"])
def test_a_mark_in_a_text_is_mere_letters(backbone: VlmBackbone, mark: str):
    ids = backbone.encode_text(f"red {mark} circle").ids
    assert tiny_encoders.SPECIAL.index(mark) not in ids
    assert states(backbone, VIDEOS[1], f"red {mark} circle").isfinite().all()


# Against transformers' own ----------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("name", ["qwen2_vl", "qwen3_vl"])
def test_states_are_those_of_the_model_reading_the_same_tokens(folders: dict[str, Path], name: str):
    """With a word's embedding as every score token, the model itself can read what we give it.

    (Qwen2.5-VL's own forward takes no times, so its positions would differ.)
    """
    backbone = build(folders[name])
    word = backbone.tokenizer.convert_tokens_to_ids("square")
    model = backbone.encoder.model
    backbone.scores.data = model.get_input_embeddings()(torch.tensor(word)).repeat(NUM_SCORES, 1)
    [item] = backbone.encode(VIDEOS[:1], TEXTS[:1])
    patches, grid = backbone._patches(item.video)
    ids = backbone._row(item, grid)[None]
    ids[:, -NUM_SCORES:] = word
    theirs = model(
        input_ids=ids,
        pixel_values_videos=patches,
        video_grid_thw=grid[None],
        mm_token_type_ids=2 * (ids == tiny_encoders.VIDEO).int(),
    ).last_hidden_state
    torch.testing.assert_close(backbone([item])[0], theirs[0, -NUM_SCORES:], rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", tiny_encoders.VLM)
def test_patches_of_a_still_are_those_of_transformers(folders: dict[str, Path], name: str):
    frame = np.random.default_rng(0).integers(0, 256, (1, 32, 48, 3), dtype=np.uint8)
    backbone = build(folders[name])
    theirs = backbone.processor(list(frame), return_tensors="pt", size={"shortest_edge": 1, "longest_edge": 10_000})
    patches, grid = backbone._patches(VlmVideo(frames=torch.from_numpy(frame), seconds=torch.zeros(1)))
    torch.testing.assert_close(patches, theirs.pixel_values)
    assert grid.tolist() == theirs.image_grid_thw[0].tolist() == [1, 4, 6]


def test_patches_hold_frames_in_their_order():
    """Frames of one value each, 4 of them, 2 deep: the first patch holds 0 and 1, the second 2 and 3."""
    frames = torch.arange(4.0)[:, None, None, None].expand(4, 8, 8, 3)
    patches, grid = patchify(frames, 4, 2, 2)
    assert grid.tolist() == [2, 2, 2]
    assert patches.unflatten(1, (3, 2, 16))[:, 0, :, 0].tolist() == [[0, 1]] * 4 + [[2, 3]] * 4


# Details ----------------------------------------------------------------------------------------------------


def test_frames_are_resized_to_whole_merged_patches(folders: dict[str, Path]):
    """Patches of 8, merged by 2: multiples of 16; 40 x 64 is nearest to 32 x 64 (half rounds to even).

    At most 1,000 pixels: by sqrt(2560 / 1000) = 1.6 smaller, 25 x 40, rounded down to 16 x 32.
    """
    backbone = build(folders["qwen2_vl"])
    features = backbone.encode_video(VIDEOS[2])
    assert features.frames.shape == (4, 32, 64, 3)
    assert features.seconds.tolist() == [1 / 16, 3 / 16, 5 / 16, 7 / 16]
    smaller = build(folders["qwen2_vl"], max_pixels=1000).encode_video(VIDEOS[2])
    assert smaller.frames.shape == (4, 16, 32, 3)
    grey = Video(frames=np.full((2, 40, 64, 3), 77, dtype=np.uint8), fps=8)
    assert (backbone.encode_video(grey).frames == 77).all()


def test_frames_of_the_right_size_are_left_alone(folders: dict[str, Path]):
    right = video(4, num_frames=4, height=32, width=64)
    assert np.array_equal(build(folders["qwen2_vl"]).encode_video(right).frames.numpy(), right.frames)


def test_times_by_hand(folders: dict[str, Path]):
    """Two frames a patch, the last one repeated: (0 + .5) / 2 = .25, and (1 + 1) / 2 = 1; half a second a frame."""
    backbone = build(folders["qwen3_vl"])
    frames = torch.zeros(3, 16, 16, 3, dtype=torch.uint8)
    clip = VlmVideo(frames=frames, seconds=torch.tensor([0.0, 0.5, 1.0]))
    assert backbone._times(clip) == ["<0.2 seconds>", "<1.0 seconds>"]
    assert backbone._seconds_per_patch(clip) == 1.0
    _, grid = backbone._patches(clip)
    row = backbone._row(Features(video=clip, text=backbone.encode_text("red")), grid).tolist()
    marks = [token for token in row if token in (4, 5, 6)]
    assert marks == [4, 6, 5] * 2  # start, video, end, for each patch in time


def test_a_new_lora_changes_nothing_and_bfloat16_is_the_default(folders: dict[str, Path]):
    backbone = build(folders["qwen2_vl"])
    before = states(backbone, VIDEOS[0])
    backbone.encoder.disable_adapters()
    assert torch.equal(states(backbone, VIDEOS[0]), before)
    half = Vlm(encoder=folders["qwen2_5_vl"], feed_forward=True).build().eval()
    assert half.encoder.dtype == torch.bfloat16
    assert {p.dtype for p in half.parameters() if p.requires_grad} == {torch.float32}
    loras = [name for name, _ in half.named_parameters() if ".lora_" in name]
    assert any("down_proj" in name for name in loras)
    assert all("language_model" in name for name in loras)  # the vision tower has such layers too
    assert states(half, VIDEOS[0]).isfinite().all()


def test_gradients_are_the_same_with_less_memory(folders: dict[str, Path]):
    gradients = []
    for thrifty in (True, False):
        backbone = build(folders["qwen2_5_vl"], gradient_checkpointing=thrifty).train()
        backbone(backbone.encode(VIDEOS[:2], TEXTS[:2])).square().sum().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in backbone.parameters() if p.grad is not None]))
    torch.testing.assert_close(gradients[0], gradients[1])


def test_other_models_are_refused(tmp_path: Path):
    with pytest.raises(BackboneError, match="type clip; expected one of qwen2_vl"):
        Vlm(encoder=tiny_encoders.clip(tmp_path)).build()
