"""Decoding in strips against diffusers' own decode."""

import copy
import weakref

import pytest
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from rasengan import components, decoding


@pytest.fixture(scope="module")
def vae(tiny_base):
    return components.load("vae", tiny_base / "vae")


def some_latents(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(2))


@torch.no_grad()
def decoded(vae, latents):
    return vae.decode(latents / 0.13025).sample.clamp(-1, 1)


@pytest.mark.parametrize("strip_bytes", [1, 2**14, 2**30], ids=["strips of 8 rows", "some strips", "one strip"])
@pytest.mark.parametrize("kept_bytes", [0, 2**40], ids=["upsampled anew", "upsampled once"])
@pytest.mark.parametrize("size", [(8, 8), (9, 5), (32, 40), (3, 50)])
def test_a_decode_is_diffusers_own(vae, monkeypatch, strip_bytes, kept_bytes, size):
    monkeypatch.setattr(decoding, "STRIP_BYTES", strip_bytes)
    monkeypatch.setattr(decoding, "MOST_KEPT_BYTES", kept_bytes)
    double, latents = copy.deepcopy(vae).double(), some_latents(2, 4, *size).double()
    # Bright on one side, so that a group norm over a part of the picture would differ much.
    latents += torch.linspace(-3, 3, size[1])
    pixels = decoding.decode_latents(double, latents)
    assert pixels.shape == (2, 3, 8 * size[0], 8 * size[1])
    torch.testing.assert_close(pixels, decoded(double, latents), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_in_fp32_it_is_near_the_decode_in_float64(vae, monkeypatch, memory_format):
    monkeypatch.setattr(decoding, "STRIP_BYTES", 2**16)
    expected = decoded(copy.deepcopy(vae).double(), some_latents(1, 4, 24, 40).double())
    single = copy.deepcopy(vae)
    single.decoder.to(memory_format=memory_format)
    latents = some_latents(1, 4, 24, 40).to(memory_format=memory_format)
    torch.testing.assert_close(decoding.decode_latents(single, latents).double(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_decode_is_in_fp32_inside_autocast_and_of_half_precision_latents(vae, dtype):
    latents = some_latents(1, 4, 8, 8).to(dtype)
    expected = decoding.decode_latents(vae, latents.float())
    with torch.no_grad(), torch.autocast("cpu", dtype=dtype):
        assert not torch.equal(vae.decode(latents.float() / 0.13025).sample.clamp(-1, 1), expected)
        pixels = decoding.decode_latents(vae, latents)
    assert pixels.dtype == torch.float32
    assert torch.equal(pixels, expected)


def test_pictures_are_decoded_one_at_a_time(vae):
    latents = some_latents(2, 4, 8, 8)
    both, alone = decoding.decode_latents(vae, latents), [decoding.decode_latents(vae, part[None]) for part in latents]
    assert torch.equal(both, torch.cat(alone))


def test_latents_stay_as_they_are(vae):
    latents = some_latents(1, 4, 8, 8)
    before = latents.clone()
    decoding.decode_latents(vae, latents)
    assert torch.equal(latents, before)


# --- memory ---


class Live(TorchDispatchMode):
    """Counts the bytes of the tensors that exist, and their peak; of tensors on the meta device, which take none."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self.known = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in filter(torch.is_tensor, tree_flatten(result)[0]):
            storage = tensor.untyped_storage()
            if storage._cdata not in self.known:
                self.known.add(storage._cdata)
                self.now += storage.nbytes()
                weakref.finalize(storage, self.forget, storage._cdata, storage.nbytes())
        self.peak = max(self.peak, self.now)
        return result

    def forget(self, storage, size):
        self.known.discard(storage)
        self.now -= size


@pytest.mark.parametrize(("side_px", "most_gib"), [(512, 0.55), (1024, 1.1), (2048, 4.3)])
def test_the_full_sizes_decoder_holds_a_third_of_what_diffusers_does(monkeypatch, side_px, most_gib):
    # The attention, whose kernels on a card keep no matrix of all pairs, does on the meta device.
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda q, k, v, **_: torch.empty_like(q))
    widths = (128, 256, 512, 512)
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    with torch.device("meta"):
        vae = AutoencoderKL(block_out_channels=widths, layers_per_block=2, **blocks)
        latent = torch.randn(1, 4, side_px // 8, side_px // 8)
    peaks_gib = []
    for decode in (lambda: decoding._decode(vae, latent), lambda: vae.decode(latent).sample):
        with torch.no_grad(), Live() as live:
            assert decode().shape == (1, 3, side_px, side_px)
        peaks_gib.append(live.peak / 2**30)
    assert peaks_gib[0] < most_gib
    assert peaks_gib[0] < decoding.decode_gib(side_px, side_px)
    if side_px > 512:
        assert peaks_gib[0] < 0.37 * peaks_gib[1]
