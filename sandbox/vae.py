"""The base model's VAE: a stock `AutoencoderKLWan` set to principal components in closed form, without training.

Each 8 x 8 patch of a frame becomes 12 numbers; there is no temporal compression, so flashes survive. Found by trial
(docs/log.md): on a CPU, gradient descent on the same architecture stays more than 10 dB behind.
"""

import types
from collections.abc import Generator
from contextlib import contextmanager

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders import autoencoder_kl_wan as wan_vae
from torch import Tensor, nn

PATCH = 8
LINEAR_LEVEL = 1024.0
"""Level of the constant channel that keeps the VAE's norms from bending small signals."""


def make_vae(frames: np.ndarray, *, latent_channels: int = 12) -> AutoencoderKLWan:
    """A VAE that codes each 8 x 8 patch by its principal components, fitted to `frames` `uint8 (n, h, w, 3)`.

    The stock architecture becomes linear by construction: signals run as pairs (+s, -s) because silu(s) - silu(-s) = s;
    a constant channel makes each norm a fixed scale; the residual branches start at zero and every convolution sees
    only its own place and frame. So it codes frames one by one, and fine-tuning can only improve on it.
    """
    mean, components, spread = principal_components(frames, latent_channels)
    # Between whitened latents, where fine detail weighs as much as layout, and plain pixels; unit variance overall.
    weight = spread**0.4
    weight /= np.sqrt(np.mean(weight**2))
    vae = AutoencoderKLWan(
        base_dim=32,
        decoder_base_dim=64,
        z_dim=latent_channels,
        dim_mult=[1],
        num_res_blocks=1,
        attn_scales=[],
        temperal_downsample=[],
        in_channels=3 * PATCH**2,
        out_channels=3 * PATCH**2,
        patch_size=PATCH,
        latents_mean=[0.0] * latent_channels,
        latents_std=(spread / weight).tolist(),
        scale_factor_temporal=1,
        scale_factor_spatial=PATCH,
    )
    _make_linear(vae, mean, components)
    return vae


def principal_components(frames: np.ndarray, num_components: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean `(192,)`, orthonormal components `(k, 192)` and their spread `(k,)` of patches in the VAE's own layout."""
    pixels = _to_pixels(torch.from_numpy(frames))
    patches = wan_vae.patchify(pixels, PATCH).squeeze(2).permute(0, 2, 3, 1).flatten(0, 2).double()
    mean = patches.mean(0)
    variance, axes = torch.linalg.eigh((patches - mean).T.cov())
    order = variance.argsort(descending=True)[:num_components]
    return mean.numpy(), axes[:, order].T.numpy(), variance[order].sqrt().numpy()


@torch.no_grad()
def _make_linear(vae: AutoencoderKLWan, mean: np.ndarray, components: np.ndarray) -> None:
    num_components = len(components)
    matrix, offset = torch.tensor(components, dtype=torch.float32), torch.tensor(mean, dtype=torch.float32)
    for module in vae.modules():
        if isinstance(module, wan_vae.WanCausalConv3d):
            module.weight[:, :, :-1] = 0.0
        if isinstance(module, wan_vae.WanResidualBlock):
            module.conv2.weight.zero_()
            module.conv2.bias.zero_()
        if isinstance(module, wan_vae.WanAttentionBlock):
            module.proj.weight.zero_()
            module.proj.bias.zero_()
        if isinstance(module, wan_vae.WanRMS_norm):
            module.gamma.fill_(LINEAR_LEVEL / module.gamma.numel() ** 0.5)
    identity = torch.eye(num_components)
    _set_pairs_in(vae.encoder.conv_in, matrix, -(matrix @ offset))
    # The second half of the code is its log-variance: as good as none.
    _set_pairs_out(vae.encoder.conv_out, identity, torch.zeros(num_components), rest=-20.0)
    _set_identity(vae.quant_conv)
    _set_identity(vae.post_quant_conv)
    _set_pairs_in(vae.decoder.conv_in, identity, torch.zeros(num_components))
    _set_pairs_out(vae.decoder.conv_out, matrix.T, offset)


def _set_pairs_in(conv: nn.Conv3d, matrix: Tensor, offset: Tensor) -> None:
    """Channel 0 becomes the constant, then +(matrix x + offset), then its negative; the rest stay zero."""
    num = len(matrix)
    conv.weight.zero_()
    conv.weight[1 : 1 + num, :, -1, 1, 1] = matrix
    conv.weight[1 + num : 1 + 2 * num, :, -1, 1, 1] = -matrix
    _bias(conv).copy_(
        F.pad(torch.cat([torch.tensor([LINEAR_LEVEL]), offset, -offset]), (0, len(_bias(conv)) - 1 - 2 * num))
    )


def _set_pairs_out(conv: nn.Conv3d, matrix: Tensor, offset: Tensor, *, rest: float = 0.0) -> None:
    """The inverse of `_set_pairs_in` behind a silu: rows of `matrix` times (silu(+s) - silu(-s))."""
    rows, num = matrix.shape
    conv.weight.zero_()
    conv.weight[:rows, 1 : 1 + num, -1, 1, 1] = matrix
    conv.weight[:rows, 1 + num : 1 + 2 * num, -1, 1, 1] = -matrix
    _bias(conv).copy_(F.pad(offset, (0, len(_bias(conv)) - rows), value=rest))


def _set_identity(conv: nn.Conv3d) -> None:
    conv.weight.copy_(torch.eye(len(conv.weight))[:, :, None, None, None])
    nn.init.zeros_(_bias(conv))


def _bias(conv: nn.Conv3d) -> Tensor:
    assert conv.bias is not None
    return conv.bias


def _to_pixels(frames: Tensor) -> Tensor:
    """`uint8 (n, h, w, 3)` to `float (n, 3, 1, h, w)` in [-1, 1]: every frame a clip of its own."""
    return (frames.permute(0, 3, 1, 2).float() / 127.5 - 1.0).unsqueeze(2)


@contextmanager
def frame_by_frame(vae: AutoencoderKLWan) -> Generator[None]:
    """Run the VAE's causal convolutions on single frames as the 2-D ones they are: several times faster.

    Exact only for clips of one frame: the taps on the past see padding there.
    """

    def planar(conv: wan_vae.WanCausalConv3d, x: Tensor, cache_x: Tensor | None = None) -> Tensor:
        side = int(conv.kernel_size[-1]) // 2
        return F.conv2d(x.squeeze(2), conv.weight[:, :, -1], conv.bias, padding=side).unsqueeze(2)

    convolutions = [m for m in vae.modules() if isinstance(m, wan_vae.WanCausalConv3d)]
    for conv in convolutions:
        conv.forward = types.MethodType(planar, conv)
    try:
        yield
    finally:
        for conv in convolutions:
            del conv.forward


@torch.no_grad()
def encode_frames(vae: AutoencoderKLWan, clips: np.ndarray, *, batch_size: int = 64) -> Tensor:
    """Normalised latents `(n, c, f, h, w)` of clips `uint8 (n, f, h, w, 3)`."""
    std = torch.tensor(vae.config.latents_std, device=vae.device).view(1, -1, 1, 1, 1)
    num_frames, out = clips.shape[1], []
    with frame_by_frame(vae):
        for start in range(0, len(clips), batch_size):
            frames = torch.from_numpy(clips[start : start + batch_size]).to(vae.device).flatten(0, 1)
            pixels = wan_vae.patchify(_to_pixels(frames), PATCH)
            code = vae.quant_conv(vae.encoder(pixels))[:, : vae.config.z_dim] / std
            out.append(code.squeeze(2).unflatten(0, (-1, num_frames)).transpose(1, 2).contiguous().cpu())
    return torch.cat(out)


@torch.no_grad()
def decode_frames(vae: AutoencoderKLWan, latents: Tensor) -> Tensor:
    """Frames `(n, 3, h, w)` in [-1, 1] of normalised latents `(n, c, h, w)`."""
    std = torch.tensor(vae.config.latents_std, device=latents.device).view(1, -1, 1, 1)
    with frame_by_frame(vae):
        return vae.decode((latents * std).unsqueeze(2), return_dict=False)[0].squeeze(2)
