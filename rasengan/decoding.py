"""Decode latents to pictures in fp32, exactly, within little memory.

A decoder's tensors of full size are what fills a card: at 1024 px each holds half a GiB or a whole one, and diffusers
has five at once. Here at most two exist; what stands between them (norm, SiLU, upsampling) is made in strips of rows,
as each convolution needs it. Group norms take their statistics from the whole picture, so that there are no tiles and
no seams: the picture is that of a decode in one piece, but for the order of summation, and for TF32 in convolutions
where PyTorch allows it, as it does by default.
"""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from diffusers.models.resnet import ResnetBlock2D
from torch import nn

from rasengan import norms
from rasengan.memory import GIB


# An upsampler's output that takes more than this, together with what is made from it, is computed twice more instead.
MOST_KEPT_BYTES = GIB
STRIP_BYTES = 2**24


@torch.no_grad()
def decode_latents(vae: AutoencoderKL, latents: torch.Tensor) -> torch.Tensor:
    """Return pixels (B, 3, H, W), fp32 in [-1, 1], of latents (B, 4, H/8, W/8) in any dtype, outside autocast.

    One picture at a time, within about 1.2 KiB for each of its pixels.

    Args:
        vae: fp32; SDXL's overflows in fp16. Its modules are diffusers' own; those of the decoder are read here.
        latents: as the UNet gave them, on the VAE's device.
    """
    latents = latents.to(vae.dtype) / vae.config.scaling_factor
    with torch.autocast(latents.device.type, enabled=False):
        return torch.cat([_decode(vae, latent[None]) for latent in latents]).clamp_(-1, 1)


def decode_gib(height: int, width: int) -> float:
    """Return what `decode_latents` takes for a picture of this size, in GiB, the VAE's weights left out."""
    return max(0.6, 1.2 * height * width / 1024**2)


def use_channels_last(vae: AutoencoderKL) -> None:
    """Let the decoder run by `kernels` on a CUDA device: for cards with TF32, whose convolutions are fastest so."""
    vae.decoder.to(memory_format=torch.channels_last)


def _decode(vae: AutoencoderKL, latent: torch.Tensor) -> torch.Tensor:
    decoder = vae.decoder
    latent = latent if vae.post_quant_conv is None else vae.post_quant_conv(latent)
    source = decoder.mid_block(decoder.conv_in(latent))
    for block in decoder.up_blocks:
        for resnet in block.resnets:
            source = _resnet(resnet, source)
        if block.upsamplers is not None:
            source = Upsampled(source, block.upsamplers[0].conv)
    strips = _after_norm_in_strips(source, decoder.conv_norm_out, decoder.conv_out)
    return torch.cat([rows for _, _, rows in strips], dim=2)


class Upsampled(NamedTuple):
    """An upsampler's output, twice as high and wide as `low`; its rows are computed when they are asked for."""

    low: torch.Tensor
    conv: nn.Conv2d

    @property
    def shape(self) -> torch.Size:
        """Return (1, C, H, W)."""
        _, _, height, width = self.low.shape
        return torch.Size((1, self.conv.out_channels, 2 * height, 2 * width))

    def rows(self, start: int, end: int) -> torch.Tensor:
        """Return the rows from `start` to before `end`."""
        height = self.shape[2]
        first, last = max(start - 1, 0), min(end + 1, height)
        raised = F.interpolate(self.low[:, :, first // 2 : (last + 1) // 2], scale_factor=2.0, mode="nearest")
        raised = raised[:, :, first % 2 : first % 2 + last - first]
        return _convolve(self.conv, raised, start == 0, end == height)


Source = torch.Tensor | Upsampled


def _rows(source: Source, start: int, end: int) -> torch.Tensor:
    """Return rows of a source, without those that are outside of it."""
    start, end = max(start, 0), min(end, source.shape[2])
    return source.rows(start, end) if isinstance(source, Upsampled) else source[:, :, start:end]


def _strips(source: Source) -> Iterator[tuple[int, int]]:
    """Yield the first row of each strip, and the first behind it."""
    _, channels, height, width = source.shape
    rows = max(8, STRIP_BYTES // (4 * channels * width))
    for start in range(0, height, rows):
        yield start, min(start + rows, height)


def _convolve(conv: nn.Conv2d, x: torch.Tensor, at_top: bool, at_bottom: bool) -> torch.Tensor:
    """Run a 3 x 3 convolution on rows that have a neighbour above and below, zeros where the picture ends."""
    if at_top or at_bottom:
        x = F.pad(x, (0, 0, int(at_top), int(at_bottom)))
    return F.conv2d(x, conv.weight, conv.bias, padding=(0, 1))


def _statistics(source: Source, norm: nn.GroupNorm) -> torch.Tensor:
    """Return mean and 1 / standard deviation of the groups (1, groups, 2), over the whole picture."""
    if not isinstance(source, Upsampled):
        return norms.group_norm_statistics(source, None, norm.num_groups, norm.eps)
    parts, counts = [], []
    for start, end in _strips(source):
        parts.append(norms.group_norm_statistics(source.rows(start, end), None, norm.num_groups, norm.eps).double())
        counts.append(end - start)
    means, deviations = torch.stack(parts).unbind(-1)  # each (strips, 1, groups)
    shares = means.new_tensor(counts)[:, None, None] / source.shape[2]
    mean = (shares * means).sum(dim=0)
    variance = (shares * (deviations**-2 - norm.eps + (means - mean) ** 2)).sum(dim=0)
    return torch.stack([mean, (variance + norm.eps) ** -0.5], dim=-1).to(source.low.dtype)


def _after_norm_in_strips(
    source: Source, norm: nn.GroupNorm, conv: nn.Conv2d
) -> Iterator[tuple[int, int, torch.Tensor]]:
    """Yield conv(silu(norm(source))) in strips: the first row, the first behind, and the rows."""
    statistics, height = _statistics(source, norm), source.shape[2]
    for start, end in _strips(source):
        x = _rows(source, start - 1, end + 1)
        x = norms.group_norm_forward(x, None, statistics, norm.weight, norm.bias, norm.num_groups, silu=True)
        yield start, end, _convolve(conv, x, start == 0, end == height)


def _resnet(module: ResnetBlock2D, source: Source) -> torch.Tensor:
    """Return a residual block's output; it takes the place of its input, or of what is between its convolutions."""
    _, channels, height, width = source.shape
    if isinstance(source, Upsampled):
        kept_bytes = (channels + module.out_channels) * height * width * source.low.element_size()
        if kept_bytes <= MOST_KEPT_BYTES:
            source = _gather(source.shape, ((start, end, source.rows(start, end)) for start, end in _strips(source)))
    inner = _gather((1, module.out_channels, height, width), _after_norm_in_strips(source, module.norm1, module.conv1))
    is_free = module.conv_shortcut is None and not isinstance(source, Upsampled)
    output, done = (source if is_free else inner), None
    for start, end, rows in _after_norm_in_strips(inner, module.norm2, module.conv2):
        own = _rows(source, start, end)
        rows += own if module.conv_shortcut is None else module.conv_shortcut(own)
        if done is not None:  # one strip late: the next one reads its last row
            output[:, :, done[0] : done[1]] = done[2]
        done = (start, end, rows)
    output[:, :, done[0] : done[1]] = done[2]
    return output


def _gather(shape: tuple[int, ...], strips: Iterable[tuple[int, int, torch.Tensor]]) -> torch.Tensor:
    """Return strips of rows as one tensor, in their own memory format."""
    whole = None
    for start, end, rows in strips:
        if whole is None:
            is_last = rows.is_contiguous(memory_format=torch.channels_last)
            layout = torch.channels_last if is_last else torch.contiguous_format
            whole = torch.empty(shape, dtype=rows.dtype, device=rows.device, memory_format=layout)
        whole[:, :, start:end] = rows
    return whole
