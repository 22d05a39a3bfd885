"""The cache: latents of video files and prompt embeddings, made once for all runs and objectives.

An entry is found by content: the SHA-256 of the VAE's files, of how videos are shown, and of the video file; or of text
encoder and tokenizer, their precision, and the text. So a changed model, size or file has entries of its own,
and many processes may share a folder. Kept are the very bits that `Policy` gives, by kind of device, for processors and
GPUs round differently. Once the cache is filled, neither VAE nor text encoder is needed: see `Policy.offload`.
"""

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property, lru_cache, partial
from pathlib import Path

from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import pad
from tqdm import tqdm

from align.folder import PolicyError, fingerprint
from align.policy import Policy
from align.sample import Sampler
from align.shards import Shards
from align.show import RECIPE, show
from reward.checkpoint import sha256
from reward.run import Stop
from reward.video import probe

SHARD_BYTES, SHARD_ENTRIES = 64 * 2**20, 1024
"""A shard is written when it has as much as one of these."""

RECENT = 512
"""Prompt embeddings that stay in memory, those last read: a step asks for many, and a shard is slow to open."""

_SIZE = {"num_frames", "height", "width", "fps"}

_Stamp = tuple[Path, int, int]


class LatentCache:
    """Latents and prompt embeddings on disk; what is missing, or damaged, is made and counted.

    Each video and text is encoded alone, so that its entry is the same whatever it is filled with. In memory stay only
    the names of entries, the hashes of files, by time and size, and `RECENT` prompts.

    Raises: PolicyError: the model cannot make videos of the sampler's size.
    """

    def __init__(self, folder: Path, policy: Policy, sampler: Sampler):
        policy.geometry.latent_shape(sampler.num_frames, sampler.height, sampler.width)
        self.policy = policy
        self.sampler = sampler
        self.num_found = self.num_made = 0
        self._shards = Shards(folder)
        self._hashes: dict[_Stamp, str] = {}
        self._recent = lru_cache(RECENT)(self._used)

    @property
    def num_damaged(self) -> int:
        """How many shards were damaged; they are removed, and their entries made again when asked for."""
        return self._shards.num_damaged

    def latents(self, path: Path) -> Float[Tensor, "c f h w"]:
        """Give the latents of a video file, on the CPU; where they are known, it is not decoded.

        Raises: VideoError: the file cannot be read, or is too short. PolicyError: its latents are not finite.
        """
        return self._get(self._video_key(path), partial(self._encode, path))

    def prompt_embeds(self, text: str) -> Float[Tensor, "tokens d"]:
        """Give the embedding of a prompt, on the CPU.

        Raises: PolicyError: it is not finite.
        """
        used = self._recent(text)
        return pad(used, (0, 0, 0, self.policy.num_tokens - len(used)))

    def fill(self, paths: Sequence[Path], texts: Sequence[str], stop: Stop | None = None) -> None:
        """Make all entries that are missing, in shards, with a progress bar; once asked to stop, keep what is made.

        Processes that share the work give each its part of it.

        Raises: VideoError, PolicyError: as `latents` and `prompt_embeds`.
        """
        self._shards.refresh()
        made: dict[str, Tensor] = {}
        bar = tqdm(
            self._jobs(paths, texts),
            total=len(paths) + len(texts),
            desc="latents and prompts",
            unit="entry",
            leave=False,
        )
        for key, make in bar:
            if stop:
                break
            if key in self._shards or key in made:
                self.num_found += 1
                continue
            made[key] = make()
            if len(made) == SHARD_ENTRIES or sum(tensor.nbytes for tensor in made.values()) >= SHARD_BYTES:
                self._add(made)
                made = {}
        self._add(made)

    def _jobs(self, paths: Sequence[Path], texts: Sequence[str]) -> Iterator[tuple[str, Callable[[], Tensor]]]:
        for path in paths:
            yield self._video_key(path), partial(self._encode, path)
        for text in texts:
            yield self._text_key(text), partial(self._embed, text)

    def _used(self, text: str) -> Tensor:
        return self._get(self._text_key(text), partial(self._embed, text))

    def _get(self, key: str, make: Callable[[], Tensor]) -> Tensor:
        found = self._shards.get(key)
        if found is not None:
            self.num_found += 1
            return found
        made = make()
        self._add({key: made})
        return made

    def _add(self, made: Mapping[str, Tensor]) -> None:
        if made:
            self._shards.add(made)
            self.num_made += len(made)

    # Keys ---------------------------------------------------------------------------------------------------

    def _video_key(self, path: Path) -> str:
        stamp = _stamp(path)
        if stamp not in self._hashes:
            self._hashes[stamp] = sha256(path)
        return _digest(f"latents 1 {self._vae} {self._device} {RECIPE} {self._size} {self._hashes[stamp]}")

    def _text_key(self, text: str) -> str:
        policy = self.policy
        return _digest(
            f"prompt 1 {self._text_encoder} {self._device} {policy.dtype} {policy.num_tokens} {_digest(text)}"
        )

    @cached_property
    def _vae(self) -> str:
        return fingerprint(self.policy.folder / "vae")

    @cached_property
    def _text_encoder(self) -> str:
        return " ".join(fingerprint(self.policy.folder / name) for name in ("text_encoder", "tokenizer"))

    @property
    def _device(self) -> str:
        return self.policy.device.type

    @cached_property
    def _size(self) -> str:
        return self.sampler.model_dump_json(include=_SIZE)

    # Entries ------------------------------------------------------------------------------------------------

    def _encode(self, path: Path) -> Tensor:
        frames = show(probe(path), self.sampler)
        return _finite(self.policy.encode(frames[None])[0].cpu(), str(path))

    def _embed(self, text: str) -> Tensor:
        """Give a prompt's embedding up to its last place in use, often a tenth of all; the rest is zero."""
        embeds = self.policy.encode_prompts([text])[0].cpu()
        num_used = int(embeds.any(dim=-1).cumsum(0).argmax()) + 1
        return _finite(embeds[:num_used].clone(), f"prompt {text!r}")


def _stamp(path: Path) -> _Stamp:
    state = path.stat()
    return path, state.st_mtime_ns, state.st_size


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _finite(tensor: Tensor, source: str) -> Tensor:
    if not tensor.isfinite().all():
        raise PolicyError(f"{source}: the model gives numbers that are not finite; is its folder damaged?")
    return tensor
