import hashlib
import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import tiny_wan
import torch
from hypothesis import given
from hypothesis import strategies as st

from align.folder import LORA_FILE, Geometry, PolicyError, find_lora, fingerprint, read_geometry

WAN = Geometry(num_channels=16, frames_per_latent=4, pixels_per_latent=8, patch=(1, 2, 2))
UNCOMPRESSED = Geometry(num_channels=16, frames_per_latent=1, pixels_per_latent=8, patch=(2, 2, 2))


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_wan.build(tmp_path_factory.mktemp("wan"))


@pytest.fixture
def model(built: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(built, tmp_path / "model"))


def edit(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


# Geometry ---------------------------------------------------------------------------------------------------


def test_latents_of_wan_and_of_a_vae_that_keeps_time():
    """Wan: (81 - 1) / 4 + 1 = 21 frames, 480 / 8 = 60 rows, 832 / 8 = 104 columns; the other: 16 frames."""
    assert WAN.latent_shape(81, 480, 832) == (16, 21, 60, 104)
    assert UNCOMPRESSED.latent_shape(16, 64, 64) == (16, 16, 8, 8)


@pytest.mark.parametrize(
    ("geometry", "size", "message"),
    [
        (WAN, (80, 480, 832), "num_frames=80: this model makes 1, 5, 9, 13, ... frames"),
        (WAN, (0, 480, 832), "num_frames=0"),
        (WAN, (81, 484, 832), "height=484: this model needs a multiple of 16 pixels"),
        (WAN, (81, 480, 0), "width=0"),
        (UNCOMPRESSED, (15, 64, 64), "num_frames=15: this model makes 2, 4, 6, 8, ... frames"),
        (UNCOMPRESSED, (-2, 64, 64), "num_frames=-2"),
    ],
)
def test_sizes_that_a_model_cannot_make_are_named(geometry: Geometry, size: tuple[int, int, int], message: str):
    with pytest.raises(PolicyError, match=message):
        geometry.latent_shape(*size)


@given(
    frames_per_latent=st.sampled_from([1, 2, 4]),
    patch=st.integers(1, 3),
    num_frames=st.integers(1, 60),
)
def test_accepted_frame_counts_are_exactly_those_whose_latents_are_whole_tokens(
    frames_per_latent: int, patch: int, num_frames: int
):
    geometry = Geometry(num_channels=4, frames_per_latent=frames_per_latent, pixels_per_latent=8, patch=(patch, 1, 1))
    whole = (num_frames - 1) % frames_per_latent == 0
    latent_frames = (num_frames - 1) // frames_per_latent + 1
    if whole and latent_frames % patch == 0:
        assert geometry.latent_shape(num_frames, 8, 8) == (4, latent_frames, 1, 1)
    else:
        with pytest.raises(PolicyError, match="num_frames"):
            geometry.latent_shape(num_frames, 8, 8)


def test_geometry_is_read_from_the_folder(built: Path, tmp_path: Path):
    assert read_geometry(built) == Geometry(num_channels=4, frames_per_latent=1, pixels_per_latent=8, patch=(2, 2, 2))
    assert read_geometry(tiny_wan.build(tmp_path, compression=4)).frames_per_latent == 4


def test_folders_that_do_not_state_their_compression_are_of_the_time_when_it_was_four(model: Path):
    config = json.loads((model / "vae" / "config.json").read_text())
    del config["scale_factor_temporal"], config["scale_factor_spatial"]
    (model / "vae" / "config.json").write_text(json.dumps(config))
    geometry = read_geometry(model)
    assert (geometry.frames_per_latent, geometry.pixels_per_latent) == (4, 8)


# Folders that are refused -----------------------------------------------------------------------------------


def pickle_weights(model: Path) -> None:
    (model / "vae" / "diffusion_pytorch_model.safetensors").rename(model / "vae" / "diffusion_pytorch_model.bin")


REFUSED: dict[str, tuple[Callable[[Path], object], str]] = {
    "no folder": (shutil.rmtree, "no such folder"),
    "no index": (lambda m: (m / "model_index.json").unlink(), r"model_index\.json: cannot be read"),
    "not JSON": (lambda m: (m / "model_index.json").write_text("{"), r"model_index\.json: cannot be read"),
    "other pipeline": (
        lambda m: edit(m / "model_index.json", _class_name="LTXPipeline"),
        "holds a LTXPipeline; expected a WanPipeline",
    ),
    "two transformers": (lambda m: edit(m / "model_index.json", boundary_ratio=0.875), r"is of Wan 2\.2"),
    "timestep a token": (lambda m: edit(m / "model_index.json", expand_timesteps=True), r"is of Wan 2\.2"),
    "other VAE": (
        lambda m: edit(m / "model_index.json", vae=["diffusers", "AutoencoderKL"]),
        "its vae is .*AutoencoderKL'.*; expected .*AutoencoderKLWan",
    ),
    "code from the folder": (
        lambda m: edit(m / "model_index.json", text_encoder=["my_encoder", "MyEncoder"]),
        "code from the folder, which is never run",
    ),
    "pickled weights": (pickle_weights, r"vae: holds no \.safetensors file; pickled weights"),
    "no timesteps": (
        lambda m: edit(m / "scheduler" / "scheduler_config.json", num_train_timesteps=100),
        "of 1000 timesteps",
    ),
    "noise scheduler": (
        lambda m: edit(m / "scheduler" / "scheduler_config.json", _class_name="DDIMScheduler"),
        "cannot sample with this DDIMScheduler",
    ),
    "UniPC of no flow": (
        lambda m: edit(m / "scheduler" / "scheduler_config.json", _class_name="UniPCMultistepScheduler"),
        "use_flow_sigmas",
    ),
    "random sampler": (
        lambda m: edit(m / "scheduler" / "scheduler_config.json", stochastic_sampling=True),
        "stochastic",
    ),
    "dynamic shift": (
        lambda m: edit(m / "scheduler" / "scheduler_config.json", use_dynamic_shifting=True),
        "dynamic",
    ),
}


@pytest.mark.parametrize(("harm", "message"), REFUSED.values(), ids=REFUSED)
def test_a_folder_that_cannot_be_used_is_refused_by_name(model: Path, harm: Callable[[Path], object], message: str):
    harm(model)
    with pytest.raises(PolicyError, match=message) as refused:
        read_geometry(model)
    assert str(model) in str(refused.value)


# LoRA files -------------------------------------------------------------------------------------------------


def write_lora(path: Path, value: float = 1.0) -> Path:
    safetensors.torch.save_file({"transformer.a.lora_A.weight": torch.full((2, 2), value)}, path)
    return path


def test_a_lora_is_found_by_file_by_folder_and_by_name_among_others(tmp_path: Path):
    other = write_lora(tmp_path / "other.safetensors")
    assert find_lora(other) == other
    assert find_lora(tmp_path) == other
    named = write_lora(tmp_path / LORA_FILE)
    assert find_lora(tmp_path) == named


@pytest.mark.parametrize("names", [[], ["a.safetensors", "b.safetensors"], ["pytorch_lora_weights.bin"]])
def test_a_folder_without_one_lora_is_refused(tmp_path: Path, names: list[str]):
    for name in names:
        write_lora(tmp_path / name)
    with pytest.raises(PolicyError, match="expected a LoRA"):
        find_lora(tmp_path)


def test_a_pickle_a_missing_a_damaged_and_a_nan_file_are_refused(tmp_path: Path):
    torch.save({}, tmp_path / "pickle.bin")
    with pytest.raises(PolicyError, match="expected a LoRA"):
        find_lora(tmp_path / "pickle.bin")
    with pytest.raises(PolicyError, match="expected a LoRA"):
        find_lora(tmp_path / "missing.safetensors")
    (tmp_path / "damaged.safetensors").write_bytes(b"x" * 100)
    with pytest.raises(PolicyError, match=r"damaged\.safetensors: is damaged"):
        find_lora(tmp_path / "damaged.safetensors")
    write_lora(tmp_path / "nan.safetensors", float("nan"))
    with pytest.raises(PolicyError, match="not finite"):
        find_lora(tmp_path / "nan.safetensors")


# Fingerprints -----------------------------------------------------------------------------------------------


def test_the_fingerprint_of_a_file_is_its_sha256(tmp_path: Path):
    (tmp_path / "a.safetensors").write_bytes(b"abc")
    assert fingerprint(tmp_path / "a.safetensors") == hashlib.sha256(b"abc").hexdigest()


def test_the_fingerprint_of_a_folder_is_that_of_sha256sums_listing(built: Path):
    names = sorted(str(f.relative_to(built)) for f in built.rglob("*") if f.suffix in (".json", ".safetensors"))
    listing = subprocess.run(["sha256sum", *names], cwd=built, capture_output=True, check=True).stdout
    assert fingerprint(built) == hashlib.sha256(listing).hexdigest()


def test_the_fingerprint_depends_on_weights_and_settings_and_on_nothing_else(model: Path):
    before = fingerprint(model)
    (model / "README.md").write_text("new")
    (model / ".cache").mkdir()
    (model / ".cache" / "lock.json").write_text("{}")
    assert fingerprint(model) == before
    edit(model / "scheduler" / "scheduler_config.json", shift=4.0)
    settings_changed = fingerprint(model)
    (model / "vae" / "config.json").rename(model / "vae" / "config2.json")
    assert len({before, settings_changed, fingerprint(model)}) == 3


def test_equal_folders_have_equal_fingerprints(built: Path, model: Path):
    assert fingerprint(built) == fingerprint(model)
