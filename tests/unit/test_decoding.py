import copy

import pytest
import torch

from rasengan import components, decoding


@pytest.fixture(scope="module")
def vae(tiny_base):
    return components.load("vae", tiny_base / "vae")


def some_latents(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(2))


@torch.no_grad()
def decoded(vae, latents):
    return vae.decode(latents / 0.13025).sample.clamp(-1, 1)


def psnr(pixels, expected):
    return 10 * torch.log10(4 / (pixels - expected).square().mean())


def watch(vae, request, look):
    seen = []
    hook = vae.decoder.register_forward_pre_hook(lambda module, inputs: seen.append(look(inputs[0])))
    request.addfinalizer(hook.remove)
    return seen


@pytest.mark.parametrize("tile", [None, 12])
def test_a_picture_up_to_the_tile_is_decoded_whole(vae, tile):
    latents = some_latents(2, 4, 8, 12)
    pixels = decoding.decode_latents(vae, latents, tile)
    assert pixels.shape == (2, 3, 64, 96)
    torch.testing.assert_close(pixels, decoded(vae, latents), rtol=1e-4, atol=1e-5)


def test_a_picture_over_the_tile_is_decoded_in_tiles_to_nearly_the_same(vae, request):
    # Noise has the same statistics in every tile; a group norm over a tile is not the one over the picture.
    latents = some_latents(1, 4, 32, 40)
    whole, tiles = decoded(vae, latents), watch(vae, request, lambda tensor: tensor.shape[-2:])
    pixels = decoding.decode_latents(vae, latents, tile=22, overlap=8)
    assert tiles == [(20, 19)] * 6
    assert pixels.shape == (1, 3, 256, 320)
    assert psnr(pixels, whole) > 30
    assert psnr(whole.roll(8, dims=-1), whole) < 15  # what a picture that is off by one latent would have


@pytest.mark.parametrize("side", [73, 96, 97, 128, 130, 255, 256, 384])
@pytest.mark.parametrize(("tile", "overlap"), [(72, 16), (36, 8), (20, 1)])
def test_tiles_cover_a_side_and_their_weights_sum_to_one(side, tile, overlap):
    tiles = decoding.spans(side, tile, overlap)
    assert tiles[0][0] == 0
    assert tiles[-1][1] == side
    assert len({end - start for start, end in tiles}) == 1
    assert tiles[0][1] <= tile
    total = torch.zeros(8 * side)
    for number, (start, end) in enumerate(tiles):
        if number:
            assert tiles[number - 1][1] - start >= overlap
        if number > 1:
            assert tiles[number - 2][1] <= start, "no more than two blend anywhere"
        total[8 * start : 8 * end] += decoding._weights(tiles, number, 8, torch.device("cpu"))
    torch.testing.assert_close(total, torch.ones(8 * side))


def test_1024_px_takes_four_tiles():
    assert decoding.spans(128, decoding.TILE, decoding.OVERLAP) == [(0, 72), (56, 128)]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_decode_is_in_fp32_inside_autocast_and_of_half_precision_latents(vae, dtype):
    latents = some_latents(1, 4, 8, 8).to(dtype)
    expected = decoding.decode_latents(vae, latents.float())
    with torch.no_grad(), torch.autocast("cpu", dtype=dtype):
        assert not torch.equal(vae.decode(latents.float() / 0.13025).sample.clamp(-1, 1), expected)
        pixels = decoding.decode_latents(vae, latents)
    assert pixels.dtype == torch.float32
    assert torch.equal(pixels, expected)


def test_pictures_are_decoded_one_at_a_time(vae, request):
    sizes = watch(vae, request, len)
    assert decoding.decode_latents(vae, some_latents(2, 4, 8, 8)).shape == (2, 3, 64, 64)
    assert sizes == [1, 1]


@torch.no_grad()
def test_a_fused_decoder_decodes_as_diffusers_in_float64(vae):
    plain, latents = copy.deepcopy(vae).double(), some_latents(1, 4, 8, 8).double()
    fused = copy.deepcopy(plain)
    decoding.fuse_decoder(fused)
    found, expected = fused.decode(latents).sample, plain.decode(latents).sample
    assert not torch.equal(found, expected)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
