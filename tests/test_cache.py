import itertools
import signal
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import tiny_wan
import torch
from torch import Tensor

from align import cache as cache_module
from align.cache import LatentCache
from align.folder import PolicyError
from align.policy import Lora, Policy
from align.sample import Sampler
from align.show import show
from reward.preferences import Source, load
from reward.run import Stop
from reward.video import Video, VideoError, probe, write

EXAMPLE = Path(__file__).parents[2] / "shared" / "data" / "videoalign-example"
SAMPLER = Sampler(num_frames=6, height=32, width=32, fps=8)
PROMPTS = [*tiny_wan.PROMPTS, ""]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_wan.build(tmp_path_factory.mktemp("wan"))


@pytest.fixture(scope="module")
def policy(model: Path) -> Policy:
    return Policy.load(model)


@pytest.fixture
def paths(tmp_path: Path) -> list[Path]:
    return [store(tmp_path / f"{seed}.mp4", seed) for seed in range(3)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def store(path: Path, seed: int, num_frames: int = 8) -> Path:
    """Write a video of noise, 48 high and 64 wide, at 10 fps."""
    coarse = np.random.default_rng(seed).integers(0, 256, (num_frames, 6, 8, 3), dtype=np.uint8)
    write(path, Video(frames=coarse.repeat(8, axis=1).repeat(8, axis=2), fps=10))
    return path


def counts(cache: LatentCache) -> tuple[int, int, int]:
    return cache.num_made, cache.num_found, cache.num_damaged


def read_all(cache: LatentCache, paths: Sequence[Path]) -> list[Tensor]:
    return [*map(cache.latents, paths), *map(cache.prompt_embeds, PROMPTS)]


def same(ours: list[Tensor], theirs: list[Tensor]) -> bool:
    return all(a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


# The same bits ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cached_is_fresh_bit_for_bit(model: Path, paths: list[Path], folder: Path, dtype: torch.dtype):
    policy = Policy.load(model, dtype=dtype)
    fresh = [policy.encode(show(probe(path), SAMPLER)[None])[0] for path in paths]
    fresh += [policy.encode_prompts([text])[0] for text in PROMPTS]
    assert same(read_all(LatentCache(folder / "a", policy, SAMPLER), paths), fresh)
    LatentCache(folder / "b", policy, SAMPLER).fill(paths, PROMPTS)
    filled = LatentCache(folder / "b", policy, SAMPLER)
    assert same(read_all(filled, paths), fresh)
    assert counts(filled) == (0, 6, 0)
    assert filled.latents(paths[0]).dtype == torch.float32


def test_a_second_cache_computes_nothing(policy: Policy, paths: list[Path], folder: Path):
    LatentCache(folder, policy, SAMPLER).fill(paths, PROMPTS)
    calls = []
    networks = (policy.pipeline.vae.encoder, policy.pipeline.text_encoder)
    hooks = [network.register_forward_hook(lambda *_: calls.append(1)) for network in networks]
    second = LatentCache(folder, policy, SAMPLER)
    read_all(second, paths)
    second.fill(paths, PROMPTS)
    assert (counts(second), calls) == ((0, 12, 0), [])
    read_all(LatentCache(folder / "other", policy, SAMPLER), paths)
    assert len(calls) >= 6
    for hook in hooks:
        hook.remove()


def test_an_embedding_is_kept_without_its_padding(policy: Policy, folder: Path):
    """512 places of 16 numbers are 32 KB; the prompt takes 6 of them."""
    assert LatentCache(folder, policy, SAMPLER).prompt_embeds(PROMPTS[0]).shape == (512, 16)
    [shard] = folder.iterdir()
    assert shard.stat().st_size < 1000


def test_once_asked_to_stop_no_more_is_made(policy: Policy, folder: Path):
    cache = LatentCache(folder, policy, SAMPLER)
    cache.fill([], PROMPTS[:2], Stop(signal=signal.SIGTERM))
    assert cache.num_made == 0
    cache.fill([], PROMPTS[:2], Stop())
    assert cache.num_made == 2


def test_the_embeddings_last_read_stay_in_memory_and_no_more(
    policy: Policy, folder: Path, monkeypatch: pytest.MonkeyPatch
):
    """Of two places, the third prompt takes that of the first, which is read again: 4 reads. None is changed."""
    monkeypatch.setattr(cache_module, "RECENT", 2)
    LatentCache(folder, policy, SAMPLER).fill([], PROMPTS)
    cache = LatentCache(folder, policy, SAMPLER)
    for place in (0, 1, 0, 1, 2, 0):
        embeds = cache.prompt_embeds(PROMPTS[place])
        assert torch.equal(embeds, policy.encode_prompts([PROMPTS[place]])[0])
        embeds.zero_()
    assert counts(cache) == (0, 4, 0)


# What an entry depends on -----------------------------------------------------------------------------------


def test_equal_files_share_an_entry_and_others_do_not(policy: Policy, paths: list[Path], folder: Path):
    cache = LatentCache(folder, policy, SAMPLER)
    first = cache.latents(paths[0])
    paths[1].write_bytes(paths[0].read_bytes())
    assert torch.equal(cache.latents(paths[1]), first)
    assert counts(cache) == (1, 1, 0)
    store(paths[1], 7)
    assert not torch.equal(cache.latents(paths[1]), first)
    assert counts(cache) == (2, 1, 0)


@pytest.mark.parametrize("change", [{"num_frames": 4}, {"height": 16}, {"width": 48}, {"fps": 9.0}])
def test_another_size_or_rate_has_entries_of_its_own(policy: Policy, paths: list[Path], folder: Path, change: dict):
    LatentCache(folder, policy, SAMPLER).latents(paths[0])
    cache = LatentCache(folder, policy, SAMPLER.model_copy(update=change))
    cache.latents(paths[0])
    assert counts(cache) == (1, 0, 0)


def test_another_model_or_precision_has_entries_of_its_own(model: Path, paths: list[Path], folder: Path):
    def counted(policy: Policy, **sampling: int) -> tuple[int, int, int]:
        cache = LatentCache(folder, policy, SAMPLER.model_copy(update=sampling))
        cache.fill(paths[:1], ["red"])
        return counts(cache)

    assert counted(Policy.load(model)) == (2, 0, 0)
    other = tiny_wan.build(folder / "other", seed=1)
    assert counted(Policy.load(other)) == (2, 0, 0)
    settings = other / "tokenizer" / "tokenizer_config.json"
    settings.write_text(settings.read_text() + " ")
    assert counted(Policy.load(other)) == (1, 1, 0)
    # The VAE is always in float32, and neither LoRA nor way of sampling touches an entry.
    assert counted(Policy.load(model, dtype=torch.bfloat16)) == (1, 1, 0)
    assert counted(Policy.load(model, lora=Lora(rank=2)), steps=3) == (0, 2, 0)


def test_another_kind_of_device_has_entries_of_its_own(model: Path, policy: Policy, paths: list[Path], folder: Path):
    """A device without numbers cannot make any, and must not find those of the processor."""
    LatentCache(folder, policy, SAMPLER).fill(paths[:1], ["red"])
    other = LatentCache(folder, Policy.load(model, device="meta"), SAMPLER)
    for make in (lambda: other.latents(paths[0]), lambda: other.prompt_embeds("red")):
        with pytest.raises(RuntimeError, match="meta tensor"):
            make()


# Filling ----------------------------------------------------------------------------------------------------


def test_filling_makes_each_entry_once_in_one_shard(policy: Policy, paths: list[Path], folder: Path):
    cache = LatentCache(folder, policy, SAMPLER)
    cache.latents(paths[0])
    cache.fill([*paths, paths[2]], [*PROMPTS, PROMPTS[0]])
    assert counts(cache) == (6, 3, 0)
    assert len(list(folder.iterdir())) == 2


@pytest.mark.parametrize(("limit", "value"), [("SHARD_ENTRIES", 2), ("SHARD_BYTES", 2 * 4 * 6 * 4 * 4 * 4)])
def test_a_full_shard_is_written_before_the_next_entry_is_made(
    policy: Policy, paths: list[Path], folder: Path, monkeypatch: pytest.MonkeyPatch, limit: str, value: int
):
    """Latents of 4 channels, 6 frames and 4 x 4 places, in float32: two make a shard, and the third fails."""
    monkeypatch.setattr(cache_module, limit, value)
    paths[2].write_bytes(b"no video")
    cache = LatentCache(folder, policy, SAMPLER)
    with pytest.raises(VideoError, match=r"2\.mp4"):
        cache.fill(paths, [])
    assert counts(cache) == (2, 0, 0)
    assert len(list(folder.iterdir())) == 1
    cache.fill(paths[:2], PROMPTS)
    assert counts(cache) == (5, 2, 0)


def test_two_caches_fill_one_folder_without_harm(policy: Policy, paths: list[Path], folder: Path):
    """Both begin before either has written; for processes see tests/test_shards.py."""
    first, second = (LatentCache(folder, policy, SAMPLER) for _ in range(2))
    first.fill(paths[:2], PROMPTS[:1])
    second.fill(paths[1:], PROMPTS)
    assert (counts(first), counts(second)) == ((3, 0, 0), (3, 2, 0))
    assert same(read_all(first, paths), read_all(second, paths))
    assert (first.num_made, second.num_made) == (3, 3)


@pytest.mark.parametrize("damage", ["cut", "flipped"])
def test_entries_of_a_damaged_shard_are_made_again(
    policy: Policy, paths: list[Path], folder: Path, monkeypatch: pytest.MonkeyPatch, damage: str
):
    monkeypatch.setattr(cache_module, "RECENT", 0)
    cache = LatentCache(folder, policy, SAMPLER)
    cache.fill(paths, PROMPTS)
    whole = read_all(cache, paths)
    [shard] = folder.iterdir()
    data = shard.read_bytes()
    shard.write_bytes(data[:-1] + (b"" if damage == "cut" else bytes([data[-1] ^ 1])))
    assert same(read_all(cache, paths), whole)  # what was read before the damage was met goes with the shard
    assert cache.num_damaged == 1
    cache.fill(paths, PROMPTS)
    after = LatentCache(folder, policy, SAMPLER)
    assert same(read_all(after, paths), whole)
    assert counts(after) == (0, 6, 0)


# Refusals ---------------------------------------------------------------------------------------------------


def test_nothing_is_kept_of_what_cannot_be_encoded(model: Path, paths: list[Path], folder: Path):
    policy = Policy.load(model)
    cache = LatentCache(folder, policy, SAMPLER)
    with pytest.raises(VideoError, match=r"0\.mp4: too short"):
        cache.latents(store(paths[0], 0, num_frames=6))
    for parameter in itertools.chain(policy.pipeline.vae.parameters(), policy.pipeline.text_encoder.parameters()):
        parameter.fill_(torch.nan)
    with pytest.raises(PolicyError, match=r"1\.mp4: the model gives numbers that are not finite"):
        cache.latents(paths[1])
    with pytest.raises(PolicyError, match="prompt 'red': the model gives numbers"):
        cache.fill([], ["red"])
    assert not list(folder.iterdir())


def test_a_size_that_the_model_cannot_make_is_refused_at_once(policy: Policy, folder: Path):
    with pytest.raises(PolicyError, match="num_frames=5"):
        LatentCache(folder, policy, SAMPLER.model_copy(update={"num_frames": 5}))


@pytest.mark.skipif(not EXAMPLE.is_dir(), reason=f"needs VideoAlign's example pairs in {EXAMPLE}")
def test_real_pairs_go_through_the_reader_and_the_cache(policy: Policy, folder: Path):
    """12 rows: three pairs four times over, of which the third has no files. Sizes and rates differ within a pair."""
    data = load(Source(path=EXAMPLE / "example.csv", missing="drop"))
    assert dict(data.num_dropped) == {"duplicate": 9, "missing_video": 1}
    cache = LatentCache(folder, policy, Sampler(num_frames=8, height=32, width=48, fps=8))
    pairs = data.pairs("train")
    cache.fill([video.path for video in data.videos("train")], [pair.prompt.text for pair in pairs])
    for pair in pairs:
        first, second = pair.video_0.path, pair.video_1.path
        assert cache.latents(first).shape == (4, 8, 4, 6)
        assert (cache.latents(first) - cache.latents(second)).abs().mean() > 0.01
        assert cache.prompt_embeds(pair.prompt.text).any()
    assert counts(cache) == (6, 8, 0)
