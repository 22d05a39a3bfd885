"""Train the sandbox's base model: a stock `diffusers.WanPipeline` folder, small enough to ship.

    python -m sandbox.base [FILE.yaml] [key=value ...]

The text encoder is trained first (`sandbox.text`), the VAE is computed (`sandbox.vae`), then the transformer learns
rectified flow on the latents of freshly filmed takes. The same command resumes where it stopped.
"""

import json
import multiprocessing
import os
import shutil
import sys
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler, WanPipeline, WanTransformer3DModel
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast, UMT5EncoderModel

from reward.checkpoint import flatten_optimizer, restore_optimizer, with_prefix
from reward.config import Config, parse
from reward.files import replacing
from reward.run import Run, generator, open_run, ramp, seed_for, stop_on_signal
from sandbox import world
from sandbox.text import encode_texts, make_text_encoder, make_tokenizer, train_text_encoder
from sandbox.vae import encode_frames, make_vae

FILM_AT_ONCE = 500


def make_transformer(
    *, text_dim: int, patch: tuple[int, int, int], dim: int, num_layers: int, latent_channels: int = 12
) -> WanTransformer3DModel:
    """An untrained transformer with the layout and the LoRA targets of Wan 2.1."""
    return WanTransformer3DModel(
        patch_size=patch,
        num_attention_heads=dim // 64,
        attention_head_dim=64,
        in_channels=latent_channels,
        out_channels=latent_channels,
        text_dim=text_dim,
        freq_dim=128,
        ffn_dim=4 * dim,
        num_layers=num_layers,
        cross_attn_norm=True,
        rope_max_seq_len=64,
    )


class BaseConfig(Config):
    """How the sandbox's base model is trained."""

    out: Path = Path("runs/sandbox/base")
    """Run folder; the finished pipeline is its `pipeline/`."""
    seed: int = 0
    patch: tuple[int, int, int] = (2, 4, 2)
    """Latents of a token, along (f, h, w)."""
    dim: int = 384
    """Channels of the transformer, a multiple of 64."""
    num_layers: int = 6
    num_clips: int = 160_000
    """Takes filmed for the transformer; captions are drawn afresh each time one is used."""
    text_steps: int = 400
    num_steps: int = 4_726
    """Steps of the transformer."""
    young_step: int = 700
    """Step whose transformer is kept in `young/`: the weakest of the data set's generators."""
    mixed_precision: Literal["no", "bf16"] = "bf16"
    """`bf16` halves a step's time on processors with AVX-512 BF16 or AMX; on others `no` is faster."""
    batch_size: int = 256
    """A step takes .07 s on an H200; on two cores, about eight times the .5 s that one of 32 takes."""
    learning_rate: float = 1e-3
    warmup_steps: int = 200
    cooldown: float = 0.4
    """Share of the steps, at the end, over which the learning rate falls linearly to zero."""
    ema_decay: float = 0.999
    text_dropout: float = 0.1
    """Share of the samples trained without their caption, for classifier-free guidance."""
    shift: float = 1.5
    """Noise levels are logit-normal, shifted by this towards noise, where layout and flicker are decided."""
    probe_weight: float = 0.05
    """Of a loss for which the second block must also say where each token stands. The architecture knows relative
    places only, and at full noise nothing else tells the corners of the picture apart, or left from right."""
    save_every: int = 500
    log_every: int = 10


def sigmas_for(batch_size: int, *, shift: float, generator: torch.Generator) -> Tensor:
    """Noise levels `(b,)` in (0, 1), logit-normal and shifted towards noise."""
    sigma = torch.sigmoid(torch.randn(batch_size, generator=generator))
    return shift * sigma / (1 + (shift - 1) * sigma)


class PlaceProbe:
    """Reads a token's place (frame, row, column) from a block's output."""

    def __init__(self, transformer: WanTransformer3DModel, grid: tuple[int, int, int]) -> None:
        """Attach to the second block; `grid` is the number of tokens along (f, h, w)."""
        dim, device = transformer.config.num_attention_heads * transformer.config.attention_head_dim, transformer.device
        self.head = nn.Linear(dim, sum(grid)).to(device)
        self.grid = grid
        self.places = torch.cartesian_prod(*(torch.arange(size, device=device) for size in grid))
        self._hidden: Tensor | None = None
        self._hook = transformer.blocks[1].register_forward_hook(self._keep)

    def loss(self) -> Tensor:
        """Cross-entropy of the three coordinates at the last forward pass."""
        assert self._hidden is not None, "call the transformer first"
        hidden = self._hidden.float()
        logits = self.head(hidden).split(self.grid, dim=-1)
        places = self.places.expand(len(hidden), -1, -1)
        errors = [F.cross_entropy(z.flatten(0, 1), places[..., axis].flatten()) for axis, z in enumerate(logits)]
        return torch.stack(errors).sum()

    def remove(self) -> None:
        """Let go of the transformer."""
        self._hook.remove()

    def _keep(self, module: nn.Module, inputs: Any, output: Tensor) -> None:
        self._hidden = output


def train_transformer(
    config: BaseConfig,
    run: Run,
    transformer: WanTransformer3DModel,
    requests: list[world.Request],
    latents: Tensor,
    embed: Callable[[list[str]], Tensor],
) -> Iterator[tuple[int, dict[str, float]]]:
    """Rectified flow on the latents; yields (finished steps, measures), saves and resumes through `run`.

    `embed` turns a list of texts into prompt embeddings. Latents lie on the transformer's device. On return the
    transformer holds the averaged weights.
    """
    device = transformer.device
    patch = transformer.config.patch_size
    probe = PlaceProbe(transformer, tuple(size // p for size, p in zip(latents.shape[2:], patch, strict=True)))
    optimizer = torch.optim.AdamW(
        [*transformer.parameters(), *probe.head.parameters()],
        lr=config.learning_rate,
        betas=(0.9, 0.98),
        weight_decay=0.01,
        fused=True,
    )
    average = {name: value.detach().clone() for name, value in transformer.state_dict().items()}
    start = 0
    if point := run.resume():
        start = point.step
        transformer.load_state_dict(with_prefix(point.tensors, "transformer."))
        probe.head.load_state_dict(with_prefix(point.tensors, "probe."))
        average = {name: value.to(device) for name, value in with_prefix(point.tensors, "average.").items()}
        restore_optimizer(optimizer, point.tensors, point.state["optimizer"])
    for step in range(start, config.num_steps):
        for group in optimizer.param_groups:
            group["lr"] = config.learning_rate * _schedule(step, config)
        draw = generator(config.seed, step=step, purpose="transformer")
        rng = np.random.default_rng(seed_for(config.seed, 0, step, "captions"))
        picks = torch.randint(len(latents), (config.batch_size,), generator=draw)
        texts = [
            "" if rng.random() < config.text_dropout else world.caption(requests[pick], rng) for pick in picks.tolist()
        ]
        clean = latents[picks.to(device)].float()
        noise = torch.randn(
            clean.shape, device=device, generator=generator(config.seed, step=step, purpose="noise", device=device)
        )
        sigma = sigmas_for(len(clean), shift=config.shift, generator=draw).to(device)
        noisy = torch.lerp(clean, noise, sigma.view(-1, 1, 1, 1, 1))
        with torch.autocast(device.type, torch.bfloat16, enabled=config.mixed_precision == "bf16"):
            velocity = transformer(
                hidden_states=noisy, timestep=1000 * sigma, encoder_hidden_states=embed(texts), return_dict=False
            )[0]
        error = (velocity.float() - (noise - clean)).square().mean()
        loss = error + config.probe_weight * probe.loss()
        optimizer.zero_grad()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(transformer.parameters(), 1.0)
        optimizer.step()
        decay = min(config.ema_decay, (1 + step) / (10 + step))
        for name, value in transformer.state_dict().items():
            average[name].lerp_(value, 1 - decay)
        done = step + 1
        saves = done % config.save_every == 0 or done == config.num_steps
        measures = {}
        # Reading a number waits for the device, so it is not done at every step.
        if saves or done % config.log_every == 0:
            measures = {"error": error.item(), "loss": loss.item(), "gradient_norm": norm.item()}
            if not np.isfinite(list(measures.values())).all():
                raise ValueError(f"{measures} at step {done}: not finite; lower learning_rate ({config.learning_rate})")
            run.log(done, measures)
        if done == config.young_step:
            _keep_young(config.out / "young", transformer, average)
        if saves:
            parts = {"transformer": transformer.state_dict(), "probe": probe.head.state_dict(), "average": average}
            _save(run, done, optimizer, parts)
        if measures:
            yield done, measures
    probe.remove()
    transformer.load_state_dict(average)


def _save(run: Run, step: int, optimizer: torch.optim.Optimizer, parts: Mapping[str, Mapping[str, Tensor]]) -> None:
    tensors, state = flatten_optimizer(optimizer)
    for name, part in parts.items():
        tensors |= {f"{name}.{key}": value for key, value in part.items()}
    run.save(step, tensors, {"optimizer": state})


def _keep_young(folder: Path, transformer: WanTransformer3DModel, average: Mapping[str, Tensor]) -> None:
    young = WanTransformer3DModel.from_config(transformer.config)
    young.load_state_dict(average)
    with new_folder(folder) as partial:
        young.to(torch.bfloat16).save_pretrained(partial)


def _schedule(step: int, config: BaseConfig) -> float:
    total = config.num_steps
    return ramp(step, total=total, rise=config.warmup_steps, fall=config.cooldown * total)


# ---------------------------------------------------------------------------------------------- program


def main(argv: list[str]) -> int:
    """Train what is not there yet and save the pipeline; returns the exit status."""
    config = parse(BaseConfig, argv, prog="python -m sandbox.base")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with open_run(config.out, config, seed=config.seed) as run, stop_on_signal() as stop:
        tokenizer, encoder = make_text_side(config)
        vae, requests, latents = make_latents(config, device)
        torch.manual_seed(seed_for(config.seed, 0, 0, "transformer"))
        transformer = make_transformer(
            text_dim=encoder.config.d_model, patch=config.patch, dim=config.dim, num_layers=config.num_layers
        )
        encoder, transformer = encoder.to(device), transformer.to(device)

        def embed(texts: list[str]) -> Tensor:
            with torch.no_grad():
                return encode_texts(encoder, tokenizer, texts)

        steps = train_transformer(config, run, transformer, requests, latents.to(device), embed)
        with tqdm(total=config.num_steps, desc="transformer", unit="step") as bar:
            for step, measures in steps:
                bar.update(step - bar.n)
                bar.set_postfix(error=f"{measures['error']:.3f}")
                if stop:
                    return stop.exit_status
        if not (config.out / "pipeline").exists():
            save_pipeline(config.out / "pipeline", tokenizer, encoder, vae, transformer)
    print(config.out / "pipeline")
    return 0


def make_text_side(config: BaseConfig) -> tuple[PreTrainedTokenizerFast, UMT5EncoderModel]:
    """The tokenizer and the frozen text encoder, trained unless the run has them."""
    tokenizer, folder = make_tokenizer(), config.out / "text_encoder"
    if folder.exists():
        return tokenizer, UMT5EncoderModel.from_pretrained(folder, dtype=torch.float32).requires_grad_(False).eval()
    torch.manual_seed(seed_for(config.seed, 0, 0, "text encoder"))
    encoder = make_text_encoder(tokenizer)
    seed = seed_for(config.seed, 0, 0, "text data")
    for _ in tqdm(
        train_text_encoder(encoder, tokenizer, seed=seed, num_steps=config.text_steps),
        total=config.text_steps,
        desc="text encoder",
        unit="step",
    ):
        pass
    with new_folder(folder) as partial:
        encoder.save_pretrained(partial)
    return tokenizer, encoder.requires_grad_(False).eval()


def make_latents(config: BaseConfig, device: torch.device) -> tuple[AutoencoderKLWan, list[world.Request], Tensor]:
    """The VAE, and requests with latents `float16 (n, c, f, h, w)` to learn from; filmed unless the run has them."""
    first, *others = [
        (seed_for(config.seed, 0, place, "clips"), min(FILM_AT_ONCE, config.num_clips - place))
        for place in range(0, config.num_clips, FILM_AT_ONCE)
    ]
    requests, clips = film_part(first)
    torch.manual_seed(seed_for(config.seed, 0, 0, "vae"))
    vae = make_vae(clips[:, ::2].reshape(-1, *clips.shape[2:]))
    path = config.out / "latents.safetensors"
    if path.exists():
        with safe_open(path, framework="pt") as file:
            captions = json.loads(file.metadata()["captions"])
            return vae, [world.parse(text) for text in captions], file.get_tensor("latents")
    vae.to(device)
    latents = [encode_frames(vae, clips).half()]
    with tqdm(total=config.num_clips, initial=len(clips), desc="filming", unit="clip") as bar:
        for more, clips in film_parts(others):
            requests += more
            latents.append(encode_frames(vae, clips).half())
            bar.update(len(clips))
    rng = np.random.default_rng(seed_for(config.seed, 0, 0, "captions"))
    captions = [world.caption(request, rng) for request in requests]
    with replacing(path) as partial:
        save_file({"latents": torch.cat(latents)}, partial, metadata={"captions": json.dumps(captions)})
    return vae.cpu(), requests, torch.cat(latents)


def film_parts(parts: Sequence[tuple[int, int]]) -> Iterator[tuple[list[world.Request], np.ndarray]]:
    """Film parts in order, on all processors; no more are held at a time than there are processors."""
    if not parts:
        return
    number = len(os.sched_getaffinity(0))
    # Spawned: torch's threads do not survive a fork.
    with multiprocessing.get_context("spawn").Pool(number) as pool:
        for start in range(0, len(parts), number):
            yield from pool.map(film_part, parts[start : start + number])


def film_part(part: tuple[int, int]) -> tuple[list[world.Request], np.ndarray]:
    """Film one part, given its seed and how many clips it has."""
    seed, num_clips = part
    return film_clips(num_clips, np.random.default_rng(seed))


def film_clips(num_clips: int, rng: np.random.Generator) -> tuple[list[world.Request], np.ndarray]:
    """Requests of the training distribution and a take of each, `uint8 (n, f, h, w, 3)`."""
    requests = [world.sample_training_request(rng) for _ in range(num_clips)]
    return requests, np.stack([world.render(world.film(request, rng)) for request in requests])


def save_pipeline(
    folder: Path,
    tokenizer: PreTrainedTokenizerFast,
    encoder: UMT5EncoderModel,
    vae: AutoencoderKLWan,
    transformer: WanTransformer3DModel,
) -> None:
    """Save a folder that `DiffusionPipeline.from_pretrained` opens: bfloat16, but for the small text encoder.

    transformers reads weights in the precision that they are saved in, diffusers in float32.
    """
    pipeline = WanPipeline(
        tokenizer=tokenizer,
        text_encoder=encoder,
        vae=vae,
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
    )
    pipeline.to(dtype=torch.bfloat16)
    pipeline.text_encoder.float()
    with new_folder(folder) as partial:
        pipeline.save_pretrained(partial)


@contextmanager
def new_folder(path: Path) -> Generator[Path]:
    """A folder that appears at `path` whole when the block ends, or not at all."""
    partial = path.with_name(f".{path.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    yield partial
    shutil.rmtree(path, ignore_errors=True)
    partial.rename(path)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
