"""Train the sandbox's base model: a stock `diffusers.WanPipeline` folder, small enough to ship.

    python -m sandbox.base [FILE.yaml] [key=value ...]

The text encoder is trained first (`sandbox.text`), the VAE is computed (`sandbox.vae`), then the transformer learns
rectified flow on the latents of freshly filmed takes. The same command resumes where it stopped.
"""

import shutil
import sys
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler, WanPipeline, WanTransformer3DModel
from torch import Tensor, nn
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast, UMT5EncoderModel

from reward.checkpoint import flatten_optimizer, restore_optimizer, with_prefix
from reward.config import Config, parse
from reward.run import Run, RunError, Step, Stop, Stopped, follow, generator, open_run, ramp, seed_for, stop_on_signal
from sandbox import footage, world
from sandbox.footage import Footage
from sandbox.text import encode_texts, make_text_encoder, make_tokenizer, train_text_encoder
from sandbox.vae import encode_frames, make_vae


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


class Trainer:
    """Rectified flow on latents; `train` runs the steps."""

    def __init__(
        self,
        config: BaseConfig,
        run: Run,
        transformer: WanTransformer3DModel,
        requests: list[world.Request],
        latents: Tensor,
        embed: Callable[[list[str]], Tensor],
    ) -> None:
        """`embed` turns a list of texts into prompt embeddings. Latents lie on the transformer's device."""
        self.config, self.run, self.transformer = config, run, transformer
        self.requests, self.latents, self.embed = requests, latents, embed
        patch = transformer.config.patch_size
        self.probe = PlaceProbe(transformer, tuple(size // p for size, p in zip(latents.shape[2:], patch, strict=True)))
        self.optimizer = torch.optim.AdamW(
            [*transformer.parameters(), *self.probe.head.parameters()],
            lr=config.learning_rate,
            betas=(0.9, 0.98),
            weight_decay=0.01,
            fused=True,
        )
        self.average = {name: value.detach().clone() for name, value in transformer.state_dict().items()}

    def train(self) -> Iterator[Step]:
        """Run the steps that are left; at the end the transformer holds the averaged weights."""
        config = self.config
        for step in range(self._resume(), config.num_steps):
            found = self._step(step)
            done = step + 1
            saves = done % config.save_every == 0 or done == config.num_steps
            measures = {}
            # Reading a number waits for the device, so it is not done at every step.
            if saves or done % config.log_every == 0:
                measures = {name: value.item() for name, value in found.items()}
                if not np.isfinite(list(measures.values())).all():
                    raise RunError(
                        f"{measures} at step {done}: not finite; lower learning_rate ({config.learning_rate})"
                    )
                self.run.log(done, measures)
            if done == config.young_step:
                _keep_young(config.out / "young", self.transformer, self.average)
            if saves:
                self.save(done)
            yield Step(step=done, measures=measures)
        self.probe.remove()
        self.transformer.load_state_dict(self.average)

    def _step(self, step: int) -> dict[str, Tensor]:
        config, device = self.config, self.transformer.device
        for group in self.optimizer.param_groups:
            group["lr"] = config.learning_rate * _schedule(step, config)
        draw = generator(config.seed, step=step, purpose="transformer")
        rng = np.random.default_rng(seed_for(config.seed, 0, step, "captions"))
        picks = torch.randint(len(self.latents), (config.batch_size,), generator=draw)
        texts = [
            "" if rng.random() < config.text_dropout else world.caption(self.requests[pick], rng)
            for pick in picks.tolist()
        ]
        clean = self.latents[picks.to(device)].float()
        noise = torch.randn(
            clean.shape, device=device, generator=generator(config.seed, step=step, purpose="noise", device=device)
        )
        sigma = sigmas_for(len(clean), shift=config.shift, generator=draw).to(device)
        noisy = torch.lerp(clean, noise, sigma.view(-1, 1, 1, 1, 1))
        with torch.autocast(device.type, torch.bfloat16, enabled=config.mixed_precision == "bf16"):
            velocity = self.transformer(
                hidden_states=noisy, timestep=1000 * sigma, encoder_hidden_states=self.embed(texts), return_dict=False
            )[0]
        error = (velocity.float() - (noise - clean)).square().mean()
        loss = error + config.probe_weight * self.probe.loss()
        self.optimizer.zero_grad()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.transformer.parameters(), 1.0)
        self.optimizer.step()
        decay = min(config.ema_decay, (1 + step) / (10 + step))
        for name, value in self.transformer.state_dict().items():
            self.average[name].lerp_(value, 1 - decay)
        return {"error": error, "loss": loss, "gradient_norm": norm}

    def save(self, step: int) -> None:
        """Save a checkpoint after `step` finished steps."""
        tensors, state = flatten_optimizer(self.optimizer)
        tensors |= {f"transformer.{name}": value for name, value in self.transformer.state_dict().items()}
        tensors |= {f"probe.{name}": value for name, value in self.probe.head.state_dict().items()}
        tensors |= {f"average.{name}": value for name, value in self.average.items()}
        self.run.save(step, tensors, {"optimizer": state})

    def _resume(self) -> int:
        point = self.run.resume()
        if point is None:
            return 0
        self.transformer.load_state_dict(with_prefix(point.tensors, "transformer."))
        self.probe.head.load_state_dict(with_prefix(point.tensors, "probe."))
        device = self.transformer.device
        self.average = {name: value.to(device) for name, value in with_prefix(point.tensors, "average.").items()}
        restore_optimizer(self.optimizer, point.tensors, point.state["optimizer"])
        return point.step


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
    with open_run(config.out, config, seed=config.seed) as run, stop_on_signal() as stop:
        if not (config.out / "pipeline").exists():
            try:
                make_pipeline(config, run, stop)
            except Stopped:
                return stop.exit_status
            except RunError as error:
                sys.exit(str(error))
    print(config.out / "pipeline")
    return 0


def make_pipeline(config: BaseConfig, run: Run, stop: Stop) -> None:
    """Train what is not there yet, and save all together.

    Raises: Stopped: the process was asked to stop.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    tokenizer, encoder = make_text_side(config, stop)
    vae, requests, latents = make_latents(config, device, stop)
    torch.manual_seed(seed_for(config.seed, 0, 0, "transformer"))
    transformer = make_transformer(
        text_dim=encoder.config.d_model, patch=config.patch, dim=config.dim, num_layers=config.num_layers
    )
    encoder, transformer = encoder.to(device), transformer.to(device)

    def embed(texts: list[str]) -> Tensor:
        with torch.no_grad():
            return encode_texts(encoder, tokenizer, texts)

    trainer = Trainer(config, run, transformer, requests, latents.to(device), embed)
    follow(trainer.train(), stop, trainer.save, num_steps=config.num_steps, shown=("error",), is_main=run.is_main)
    save_pipeline(config.out / "pipeline", tokenizer, encoder, vae, transformer)


def make_text_side(config: BaseConfig, stop: Stop) -> tuple[PreTrainedTokenizerFast, UMT5EncoderModel]:
    """The tokenizer and the frozen text encoder, trained unless the run has them.

    Raises: Stopped: the process was asked to stop; these few steps are then lost.
    """
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
        stop.check()
    with new_folder(folder) as partial:
        encoder.save_pretrained(partial)
    return tokenizer, encoder.requires_grad_(False).eval()


def make_latents(
    config: BaseConfig, device: torch.device, stop: Stop
) -> tuple[AutoencoderKLWan, list[world.Request], Tensor]:
    """The VAE, and requests with latents `float16 (n, c, f, h, w)` to learn from; filmed unless the run has them.

    Raises: Stopped: the process was asked to stop; the rest is filmed next time.
    """
    parts = footage.parts_of(config.num_clips, seed=config.seed, purpose="clips")
    _, clips = footage.film_clips(parts[0])
    torch.manual_seed(seed_for(config.seed, 0, 0, "vae"))
    vae = make_vae(clips[:, ::2].reshape(-1, *clips.shape[2:])).to(device)

    def keep(filmed: tuple[list[world.Request], np.ndarray]) -> Footage:
        requests, clips = filmed
        return Footage(requests=requests, tensors={"latents": encode_frames(vae, clips).half()})

    found = footage.gather(config.out / "film", parts, footage.film_clips, keep, stop)
    return vae.cpu(), found.requests, found.tensors["latents"]


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
