import json
from pathlib import Path

import numpy as np
import pytest
import safetensors
import safetensors.torch
import tiny_wan
import torch
from diffusers import AutoencoderKLWan, WanPipeline
from diffusers.video_processor import VideoProcessor
from torch import Tensor

from align.folder import LORA_FILE, PolicyError, fingerprint
from align.policy import Lora, Policy, require_lora

LORA = Lora(rank=2, alpha=6)
PROMPTS = list(tiny_wan.PROMPTS)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_wan.build(tmp_path_factory.mktemp("wan"))


@pytest.fixture
def policy(model: Path) -> Policy:
    """A policy whose LoRA does something."""
    policy = Policy.load(model, lora=LORA)
    train(policy, seed=1)
    return policy


def train(policy: Policy, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in policy.lora_parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) / 4


def inputs(policy: Policy) -> tuple[Tensor, Tensor, Tensor]:
    noisy = torch.randn(2, 4, 6, 4, 4, generator=torch.Generator().manual_seed(0))
    return noisy, torch.tensor([0.3, 0.9]), policy.encode_prompts(PROMPTS)


@torch.no_grad()
def predict(policy: Policy) -> Tensor:
    return policy.velocity(*inputs(policy))


def frames(num_frames: int = 6, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (2, num_frames, 32, 32, 3), dtype=np.uint8)


# The network ------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_velocity_is_the_transformer_at_a_thousand_times_sigma(model: Path):
    stock, policy = WanPipeline.from_pretrained(model), Policy.load(model)
    noisy, sigma, prompt_embeds = inputs(policy)
    theirs = stock.transformer(noisy, torch.tensor([300.0, 900.0]), prompt_embeds, return_dict=False)[0]
    assert torch.equal(policy.velocity(noisy, sigma, prompt_embeds), theirs)


def test_prompts_are_embedded_as_the_pipeline_does(model: Path):
    stock = WanPipeline.from_pretrained(model)
    with torch.no_grad():
        theirs, _ = stock.encode_prompt(PROMPTS, do_classifier_free_guidance=False, max_sequence_length=512)
    ours = Policy.load(model).encode_prompts(PROMPTS)
    assert torch.equal(ours, theirs)
    assert not ours.requires_grad
    assert (ours[:, 100:] == 0).all()


def test_nothing_but_the_lora_can_be_trained(policy: Policy):
    parts = (policy.transformer, policy.pipeline.vae, policy.pipeline.text_encoder)
    trainable = [p for part in parts for p in part.parameters() if p.requires_grad]
    assert {id(p) for p in trainable} == {id(p) for p in policy.lora_parameters()}
    policy.velocity(*inputs(policy)).square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in policy.lora_parameters())


def test_in_bfloat16_only_the_vae_the_lora_and_the_answers_keep_float32(model: Path):
    policy = Policy.load(model, dtype=torch.bfloat16, lora=LORA)
    assert policy.transformer.get_submodule("blocks.0.attn1.to_q.base_layer").weight.dtype == torch.bfloat16
    assert policy.pipeline.text_encoder.dtype == torch.bfloat16
    assert policy.pipeline.vae.dtype == torch.float32
    assert {p.dtype for p in policy.lora_parameters()} == {torch.float32}
    velocity = predict(policy)
    assert velocity.dtype == torch.float32
    torch.testing.assert_close(velocity, predict(Policy.load(model)), rtol=0.1, atol=0.1)


# The reference ----------------------------------------------------------------------------------------------


def test_a_new_lora_changes_nothing(model: Path):
    assert torch.equal(predict(Policy.load(model, lora=LORA)), predict(Policy.load(model)))


def test_the_reference_is_the_base_bit_for_bit(model: Path, policy: Policy):
    base = predict(Policy.load(model))
    adapted = predict(policy)
    with policy.as_reference():
        assert torch.equal(predict(policy), base)
    assert torch.equal(predict(policy), adapted)
    assert not torch.allclose(adapted, base)


def test_the_reference_ends_with_its_outermost_block_and_by_an_exception(model: Path, policy: Policy):
    base, adapted = predict(Policy.load(model)), predict(policy)
    with policy.as_reference():
        with policy.as_reference():
            pass
        assert torch.equal(predict(policy), base)
    with pytest.raises(KeyError), policy.as_reference():
        raise KeyError
    assert torch.equal(predict(policy), adapted)
    assert all(p.requires_grad for p in policy.lora_parameters())


def test_gradients_of_the_policy_survive_a_reference_pass_in_between(policy: Policy):
    def gradients(*, with_reference: bool) -> Tensor:
        loss = policy.velocity(*inputs(policy)).square().mean()
        if with_reference:
            with torch.no_grad(), policy.as_reference():
                predict(policy)
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss, policy.lora_parameters())])

    assert torch.equal(gradients(with_reference=False), gradients(with_reference=True))


def test_a_policy_without_a_lora_is_its_own_reference(model: Path):
    policy = Policy.load(model)
    with policy.as_reference():
        assert torch.equal(predict(policy), predict(Policy.load(model)))
    assert policy.lora_parameters() == []


# Text and pixels --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_frames", [2, 4, 6, 8])
def test_every_frame_is_encoded_where_time_is_not_compressed(model: Path, num_frames: int):
    """Oracle: diffusers' encoder on a longer video of 9 = 1 + 2 * 4 frames, which it reads whole."""
    policy = Policy.load(model)
    long = frames(9)
    vae = AutoencoderKLWan.from_pretrained(model, subfolder="vae")
    pixels = torch.from_numpy(long).permute(0, 4, 1, 2, 3) / 127.5 - 1
    with torch.no_grad():
        theirs = vae.encode(pixels).latent_dist.mode()[:, :, :num_frames]
    mean, std = (torch.tensor(v).view(1, 4, 1, 1, 1) for v in (vae.config.latents_mean, vae.config.latents_std))
    ours = policy.encode(long[:, :num_frames])
    assert ours.shape == (2, 4, num_frames, 4, 4)
    torch.testing.assert_close(ours, (theirs - mean) / std)


def test_the_last_frame_counts(model: Path):
    policy = Policy.load(model)
    video, changed = frames(), frames()
    changed[:, -1] = 255 - changed[:, -1]
    difference = (policy.encode(video) - policy.encode(changed)).abs().amax(dim=(0, 1, 3, 4))
    assert (difference[:-1] == 0).all()
    assert difference[-1] > 0.01


def test_compressed_time_takes_one_frame_and_groups_of_four(tmp_path: Path):
    policy = Policy.load(tiny_wan.build(tmp_path, compression=4))
    assert policy.encode(frames(5)).shape == (2, 4, 2, 4, 4)
    with pytest.raises(PolicyError, match="num_frames=8: this model makes 5, 13, 21, 29"):
        policy.encode(frames(8))


def test_frames_are_decoded_as_the_pipeline_does(model: Path):
    policy = Policy.load(model)
    latents = torch.randn(2, 4, 6, 4, 4, generator=torch.Generator().manual_seed(0))
    vae = AutoencoderKLWan.from_pretrained(model, subfolder="vae")
    mean, std = (torch.tensor(v).view(1, 4, 1, 1, 1) for v in (vae.config.latents_mean, vae.config.latents_std))
    with torch.no_grad():
        decoded = vae.decode(latents * std + mean).sample
    theirs = np.rint(VideoProcessor(vae_scale_factor=8).postprocess_video(decoded) * 255)
    ours = policy.decode(latents)
    assert (ours.dtype, ours.shape) == (np.uint8, (2, 6, 32, 32, 3))
    assert np.abs(ours - theirs).max() <= 1
    assert ours.std() > 10


def test_encode_and_decode_keep_the_scale_of_latents(model: Path):
    """Latents normalised as `encode` does it decode to what the VAE makes of them as they were."""
    policy = Policy.load(model)
    mean, inverse_std = policy._latent_statistics()
    raw = torch.randn(1, 4, 6, 4, 4, generator=torch.Generator().manual_seed(0))
    normal = (raw - mean) * inverse_std
    with torch.no_grad():
        pixels = policy.pipeline.vae.decode(raw).sample
    levels = ((pixels * 0.5 + 0.5).clamp(0, 1) * 255).round().permute(0, 2, 3, 4, 1).numpy()
    assert np.abs(policy.decode(normal) - levels).max() <= 1


def test_vae_and_text_encoder_work_where_they_are(model: Path):
    """The device `meta` stands in for a GPU that holds the transformer: results go there, frames come back."""
    policy = Policy.load(model)
    latents = policy.encode(frames())
    decoded = policy.decode(latents)
    policy.pipeline.transformer.to("meta")
    policy.offload()
    assert policy.encode(frames()).device.type == policy.encode_prompts(PROMPTS).device.type == "meta"
    assert np.array_equal(policy.decode(latents), decoded)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_offloading_frees_the_gpu_of_vae_and_text_encoder(model: Path):
    policy = Policy.load(model, device="cuda")
    latents = policy.encode(frames())
    policy.offload()
    devices = [part.device.type for part in (policy.pipeline.vae, policy.pipeline.text_encoder, policy.transformer)]
    assert devices == ["cpu", "cpu", "cuda"]
    torch.testing.assert_close(policy.encode(frames()), latents, rtol=1e-2, atol=1e-2)


# LoRA files -------------------------------------------------------------------------------------------------


def test_a_saved_lora_is_the_same_in_the_stock_pipeline(model: Path, policy: Policy, tmp_path: Path):
    """alpha / rank is 3: a loader that lost alpha would be three times too weak."""
    file = policy.save_lora(tmp_path / "lora")
    assert file == tmp_path / "lora" / LORA_FILE
    stock = WanPipeline.from_pretrained(model)
    stock.load_lora_weights(tmp_path / "lora")
    noisy, sigma, prompt_embeds = inputs(policy)
    with torch.no_grad():
        theirs = stock.transformer(noisy, 1000 * sigma, prompt_embeds, return_dict=False)[0]
    torch.testing.assert_close(predict(policy), theirs)


def test_a_saved_lora_comes_back_and_can_be_trained_on(model: Path, policy: Policy, tmp_path: Path):
    policy.save_lora(tmp_path)
    require_lora(model, tmp_path)
    again = Policy.load(model, lora=tmp_path)
    assert torch.equal(predict(again), predict(policy))
    assert all(p.requires_grad for p in again.lora_parameters())
    assert again.save_lora(tmp_path / "again").read_bytes() == (tmp_path / LORA_FILE).read_bytes()


def test_a_lora_of_diffusers_own_making_is_read(model: Path, policy: Policy, tmp_path: Path):
    stock = WanPipeline.from_pretrained(model)
    policy.save_lora(tmp_path / "ours")
    stock.load_lora_weights(tmp_path / "ours", adapter_name="default")
    stock.transformer.save_lora_adapter(tmp_path / "bare")
    state = safetensors.torch.load_file(tmp_path / "bare" / LORA_FILE)
    WanPipeline.save_lora_weights(tmp_path / "theirs", transformer_lora_layers=state)
    theirs = Policy.load(model, lora=tmp_path / "theirs", lora_scale=3.0)  # saved without alpha, 3 times rank
    torch.testing.assert_close(predict(theirs), predict(policy))


def test_scale_moves_between_reference_and_policy(model: Path, policy: Policy, tmp_path: Path):
    policy.save_lora(tmp_path)
    layer = "blocks.0.attn1.to_q"
    half = Policy.load(model, lora=tmp_path, lora_scale=0.5)
    x = torch.randn(3, 24, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        added = [p.transformer.get_submodule(layer)(x) for p in (half, policy)]
        with policy.as_reference():
            base = policy.transformer.get_submodule(layer)(x)
    torch.testing.assert_close(added[0] - base, (added[1] - base) / 2)


def test_equal_loras_make_equal_files(model: Path, tmp_path: Path):
    """Where neither the order of a set nor that of safetensors' metadata, both random, gets into the file."""
    policies = [Policy.load(model, lora=LORA) for _ in range(2)]
    files = [policy.save_lora(tmp_path / f"{i}") for i in range(4) for policy in policies]
    assert len({fingerprint(file) for file in files}) == 1
    with safetensors.safe_open(files[0], framework="pt") as file:
        settings = json.loads(file.metadata()["lora_adapter_metadata"])
    assert settings["transformer.target_modules"] == ["to_k", "to_out.0", "to_q", "to_v"]


def test_a_new_lora_is_drawn_from_its_own_seed(model: Path):
    first, again, other = (Policy.load(model, lora=Lora(rank=2, seed=seed)).lora_parameters()[0] for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_a_new_lora_leaves_the_other_random_numbers_alone(model: Path):
    torch.manual_seed(5)
    Policy.load(model)
    without = torch.get_rng_state()
    torch.manual_seed(5)
    Policy.load(model, lora=LORA)
    assert torch.equal(torch.get_rng_state(), without)


def test_feed_forward_layers_are_adapted_on_request(model: Path):
    """2 blocks: 8 attention layers each, and 2 of the feed-forward, of 2 matrices."""
    assert len(Policy.load(model, lora=Lora(rank=2)).lora_parameters()) == 2 * 8 * 2
    assert len(Policy.load(model, lora=Lora(rank=2, feed_forward=True)).lora_parameters()) == 2 * 10 * 2


def test_saving_replaces_whole_files(policy: Policy, tmp_path: Path):
    policy.save_lora(tmp_path)
    train(policy, seed=2)
    policy.save_lora(tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == [LORA_FILE]


A, B = "transformer.blocks.0.attn1.to_q.lora_A.weight", "transformer.blocks.0.attn1.to_q.lora_B.weight"


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({}, "holds no LoRA"),
        ({A: (2, 24)}, "its other half"),
        ({A: (2, 32), B: (24, 2)}, "lora_A.weight: 32 channels, this model has 24"),
        ({A: (2, 24), B: (32, 2)}, "lora_B.weight: 32 channels, this model has 24"),
        ({A.replace("blocks.0", "blocks.7"): (2, 24)}, "blocks.7.*no such place"),
        ({"text_encoder.x.lora_A.weight": (2, 24)}, "no such place"),
        ({A.replace("lora_A", "lora_C"): (2, 24)}, "no such place"),
    ],
)
def test_a_lora_for_another_model_is_refused(
    model: Path, tmp_path: Path, tensors: dict[str, tuple[int, int]], message: str
):
    state = {key: torch.zeros(shape) for key, shape in tensors.items()}
    safetensors.torch.save_file(state, tmp_path / LORA_FILE)
    with pytest.raises(PolicyError, match=message) as refused:
        Policy.load(model, lora=tmp_path)
    assert str(tmp_path) in str(refused.value)
    with pytest.raises(PolicyError, match=message):
        require_lora(model, tmp_path)


def test_a_scale_for_no_file_is_refused(model: Path):
    with pytest.raises(PolicyError, match=r"lora_scale=0\.5"):
        Policy.load(model, lora=LORA, lora_scale=0.5)
    with pytest.raises(PolicyError, match=r"lora_scale=0\.5"):
        Policy.load(model, lora_scale=0.5)
