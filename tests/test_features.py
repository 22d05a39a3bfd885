import hashlib
import json
import weakref
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from safetensors.torch import load_file, save_file
from transformers import AutoImageProcessor, AutoModel

from reward.backbone import Dual, DualBackbone, DualText, DualVideo
from reward.features import (
    BackboneError,
    FeatureCache,
    Limits,
    check_folder,
    choose_frames,
    fingerprint,
    load_pretrained,
    require_finite,
)
from reward.video import VideoError, VideoInfo, read, write
from tests import tiny_encoders

CLIP_ONLY = ("clip",)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory) -> Path:
    return tiny_encoders.clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="module")
def backbone(encoder: Path) -> DualBackbone:
    return Dual(encoder=encoder, num_frames=4, width=32).build().eval()


@pytest.fixture
def copy(encoder: Path, tmp_path: Path) -> Path:
    """A copy of the encoder's folder to be spoilt."""
    for file in encoder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path


def info(*, fps: float, height: int, width: int) -> VideoInfo:
    return VideoInfo(
        path=Path("v.mp4"),
        width=width,
        height=height,
        fps=fps,
        num_frames=16,
        duration_seconds=1.0,
        metadata={},
    )


def equal(first, second) -> bool:
    return all(torch.equal(value, vars(second)[name]) for name, value in vars(first).items())


# Frames -----------------------------------------------------------------------------------------------------


def test_frames_in_the_middle_of_equal_parts():
    """16 frames in 4 parts of 4: the middles lie at 2, 6, 10 and 14. 3 in 4: .375, 1.125, 1.875, 2.625."""
    assert choose_frames(16, 4).tolist() == [2, 6, 10, 14]
    assert choose_frames(5, 8).tolist() == [0, 1, 2, 3, 4]
    assert choose_frames(3, 4, exactly=True).tolist() == [0, 1, 1, 2]


@given(num_frames=st.integers(1, 4000), most=st.integers(1, 300), exactly=st.booleans())
def test_chosen_frames_are_those_on_screen_at_the_middles(num_frames: int, most: int, exactly: bool):
    chosen = choose_frames(num_frames, most, exactly=exactly)
    if num_frames <= most and not exactly:
        assert chosen.tolist() == list(range(num_frames))
    else:
        middles = [(k + Fraction(1, 2)) * num_frames / most for k in range(most)]
        assert chosen.tolist() == [int(middle) for middle in middles]


# Limits -----------------------------------------------------------------------------------------------------


def test_limits_are_the_smallest_and_the_largest():
    limits = Limits.of([info(fps=8, height=64, width=80), info(fps=16, height=32, width=96)])
    assert limits == Limits(fps=(8, 16), height=(32, 64), width=(80, 96))
    with pytest.raises(BackboneError, match="got none"):
        Limits.of([])


def test_limits_rise():
    with pytest.raises(ValidationError, match=r"height=\[64, 32\]: expected the smallest, then the largest"):
        Limits(fps=(8, 16), height=(64, 32))


@pytest.mark.parametrize(
    ("fps", "height", "width", "wrong"),
    [(7.9, 40, 64, "fps"), (16.2, 40, 64, "fps"), (8, 24, 64, "height"), (8, 40, 72, "width"), (8, 40, 56, "width")],
)
def test_videos_unlike_those_of_the_training_are_refused(fps: float, height: int, width: int, wrong: str):
    limits = Limits(fps=(8, 16), height=(32, 48), width=(64, 64))
    with pytest.raises(BackboneError, match=f"{wrong}: got .*, expected .*, as this model was trained on"):
        limits.require(fps=fps, height=height, width=width)


def test_videos_like_those_of_the_training_pass():
    limits = Limits(fps=(30, 30), height=(32, 48), width=(64, 64))
    limits.require(fps=30000 / 1001, height=40, width=64)
    Limits().require(fps=1.0, height=2, width=2)


# Folders ----------------------------------------------------------------------------------------------------


def test_a_folder_is_checked_before_weights_are_read(copy: Path):
    assert check_folder(copy, CLIP_ONLY) == "clip"
    with pytest.raises(BackboneError, match="type clip; expected one of siglip, xclip"):
        check_folder(copy, ("siglip", "xclip"))
    (copy / "model.safetensors").rename(copy / "pytorch_model.bin")
    with pytest.raises(BackboneError, match="pickled weights"):
        check_folder(copy, CLIP_ONLY)
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "auto_map": {"AutoModel": "code.Evil"}}))
    with pytest.raises(BackboneError, match="never run"):
        check_folder(copy, CLIP_ONLY)
    (copy / "config.json").write_text("[]")
    with pytest.raises(BackboneError, match="type none"):
        check_folder(copy, CLIP_ONLY)
    with pytest.raises(BackboneError, match="save_pretrained"):
        check_folder(copy / "elsewhere", CLIP_ONLY)


def test_weights_that_are_missing_are_not_made_up(copy: Path):
    weights = load_file(copy / "model.safetensors")
    weights.pop("visual_projection.weight")
    save_file(weights, copy / "model.safetensors", {"format": "pt"})
    with pytest.raises(BackboneError, match=r"1 weights are missing, visual_projection\.weight"):
        load_pretrained(AutoModel, copy, output_loading_info=True)


def test_weights_that_are_cut_off_are_named(copy: Path):
    weights = copy / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(BackboneError, match=f"{copy.name}: cannot be loaded by AutoModel: "):
        load_pretrained(AutoModel, copy, use_safetensors=True, output_loading_info=True)


def test_weights_of_another_shape_are_named(copy: Path):
    weights = load_file(copy / "model.safetensors")
    weights["visual_projection.weight"] = weights["visual_projection.weight"][:, :-1].contiguous()
    save_file(weights, copy / "model.safetensors", {"format": "pt"})
    with pytest.raises(BackboneError, match=f"{copy.name}: cannot be loaded by AutoModel: "):
        load_pretrained(AutoModel, copy, use_safetensors=True, output_loading_info=True)


def test_other_missing_files_are_named(copy: Path):
    (copy / "preprocessor_config.json").unlink()
    with pytest.raises(BackboneError, match="AutoImageProcessor"):
        load_pretrained(AutoImageProcessor, copy, backend="pil")


def test_a_fingerprint_is_that_of_sha256sum(copy: Path):
    names = sorted(file.name for file in copy.iterdir())
    listing = "".join(f"{hashlib.sha256((copy / name).read_bytes()).hexdigest()}  {name}\n" for name in names)
    before = fingerprint(copy)
    assert before == hashlib.sha256(listing.encode()).hexdigest()
    (copy / "README.md").write_text("not a weight")
    (copy / ".lock.json").write_text("hidden")
    assert fingerprint(copy) == before
    (copy / "config.json").write_text((copy / "config.json").read_text() + " ")
    assert fingerprint(copy) != before


# Encoding and the cache -------------------------------------------------------------------------------------


def test_each_video_needs_its_text(backbone: DualBackbone):
    with pytest.raises(BackboneError, match="2 videos and 1 texts"):
        backbone.encode([tiny_encoders.video(0), tiny_encoders.video(1)], ["red"])


def test_features_that_are_not_finite_are_refused():
    text = DualText(tokens=torch.ones(2, 3), whole=torch.tensor([0.0, float("nan")]))
    with pytest.raises(BackboneError, match="whole of the text is not finite"):
        require_finite(text, "the text")


@pytest.fixture
def file(tmp_path: Path) -> Path:
    write(tmp_path / "v.mp4", tiny_encoders.video(3))
    return tmp_path / "v.mp4"


def test_a_hit_is_a_miss_bit_for_bit(backbone: DualBackbone, file: Path):
    cache = FeatureCache(file.parent / "cache", backbone)
    [expected] = backbone.encode([read(file)], ["a red circle"])
    missed, hit = cache.features(file, "a red circle"), cache.features(file, "a red circle")
    assert (cache.num_made, cache.num_found, cache.num_damaged) == (2, 2, 0)
    for features in (missed, hit):
        assert type(features.video) is DualVideo
        assert equal(features.video, expected.video)
        assert equal(features.text, expected.text)


def test_a_hit_needs_no_encoder_and_no_codec(backbone: DualBackbone, file: Path):
    FeatureCache(file.parent / "cache", backbone).video(file)
    calls = []
    hook = backbone.encoder.vision_model.register_forward_hook(lambda *_: calls.append(1))
    FeatureCache(file.parent / "cache", backbone).video(file)
    hook.remove()
    assert not calls


def test_equal_files_share_an_entry_and_others_do_not(backbone: DualBackbone, file: Path):
    cache = FeatureCache(file.parent / "cache", backbone)
    other = file.with_name("w.mp4")
    other.write_bytes(file.read_bytes())
    cache.video(file)
    cache.video(other)
    assert (cache.num_made, cache.num_found) == (1, 1)
    write(other, tiny_encoders.video(4))
    cache.video(other)
    assert cache.num_made == 2


def test_another_recipe_or_encoder_has_entries_of_its_own(backbone: DualBackbone, file: Path):
    FeatureCache(file.parent / "cache", backbone).text("red")
    for changed in ({"num_frames": 2}, {"encoder": tiny_encoders.clip(file.parent / "other", seed=1)}):
        cache = FeatureCache(file.parent / "cache", backbone.config.model_copy(update=changed).build())
        cache.text("red")
        assert (cache.num_made, cache.num_found) == (1, 0)
    # What shapes the transformer alone does not matter.
    cache = FeatureCache(file.parent / "cache", backbone.config.model_copy(update={"num_layers": 1}).build())
    cache.text("red")
    assert (cache.num_made, cache.num_found) == (0, 1)


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty", "unsigned"])
def test_a_damaged_entry_is_made_again(backbone: DualBackbone, file: Path, damage: str):
    cache = FeatureCache(file.parent / "cache", backbone)
    whole = cache.video(file)
    [entry] = cache.folder.rglob("*.safetensors")
    data = entry.read_bytes()
    tensors = {name: value for name, value in load_file(entry).items() if name != "sha256"}
    match damage:
        case "cut":
            entry.write_bytes(data[:-3])
        case "flipped":
            entry.write_bytes(data[:-3] + bytes([data[-3] ^ 1]) + data[-2:])
        case "empty":
            entry.write_bytes(b"")
        case "unsigned":
            save_file(tensors, entry)
    assert equal(cache.video(file), whole)
    assert (cache.num_made, cache.num_found, cache.num_damaged) == (2, 0, 1)
    assert equal(cache.video(file), whole)
    assert cache.num_found == 1


def test_the_cache_keeps_nothing_in_memory(backbone: DualBackbone, file: Path):
    cache = FeatureCache(file.parent / "cache", backbone)
    kept = [weakref.ref(cache.video(file)) for _ in range(2)]
    assert [reference() for reference in kept] == [None, None]


def test_no_entry_is_left_of_a_file_that_cannot_be_read(backbone: DualBackbone, tmp_path: Path):
    (tmp_path / "v.mp4").write_bytes(b"no video")
    cache = FeatureCache(tmp_path / "cache", backbone)
    with pytest.raises(VideoError):
        cache.video(tmp_path / "v.mp4")
    assert not list(tmp_path.rglob("*.safetensors"))
