"""Drawing on a card: the graph against the eager forward, the fused one against diffusers'."""

import pytest
import torch

from rasengan import components, decoding, drawing, fused, lora, sdxl


DEVICE = torch.device("cuda", 0)
SIZE = {"height": 64, "width": 96, "num_inference_steps": 4, "guidance_scale": 5.0}


@pytest.fixture
def load_unet(tiny_base):
    """Function that returns the tiny UNet on the card."""

    def load(dtype, fuse):
        unet = components.load("unet", tiny_base / "unet", dtype)
        lora.stack_weights(unet, DEVICE)
        unet.to(DEVICE)
        if fuse:
            fused.FusedUNet(unet)
        return unet

    return load


def prompts_of(unet, count):
    generator = torch.Generator().manual_seed(3)
    pooled = unet.config.projection_class_embeddings_input_dim - 6 * unet.config.addition_time_embed_dim
    row = (
        torch.randn(77, unet.config.cross_attention_dim, generator=generator),
        torch.randn(pooled, generator=generator),
    )
    return sdxl.conditioning(row, None, count)


def draw(unet, tiny_base, as_graph, seeds=(5, 6), sampler="euler", denoiser=None):
    scheduler = sdxl.make_sampler(components.load("scheduler", tiny_base / "scheduler"), sampler)
    denoiser = denoiser or drawing.Denoiser(unet, as_graph)
    return drawing.draw(denoiser, scheduler, prompts_of(unet, len(seeds)), list(seeds), **SIZE)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("fuse", [True, False])
@pytest.mark.parametrize("sampler", sorted(sdxl.SAMPLERS))
def test_a_graph_draws_the_eager_bits(load_unet, tiny_base, dtype, fuse, sampler):
    unet = load_unet(dtype, fuse)
    eager, graph = (draw(unet, tiny_base, as_graph, sampler=sampler) for as_graph in (False, True))
    assert torch.isfinite(eager).all()
    assert torch.equal(eager, graph)


def test_a_graph_follows_prompts_sizes_of_batch_and_weights_that_change_in_place(load_unet, tiny_base):
    unet = load_unet(torch.float16, True)
    denoiser = drawing.Denoiser(unet, as_graph=True)
    for seeds in ((5, 6), (7,), (5, 6)):
        found = draw(unet, tiny_base, True, seeds, denoiser=denoiser)
        assert torch.equal(found, draw(unet, tiny_base, False, seeds))
    unet.get_submodule("mid_block.attentions.0.transformer_blocks.0.attn1.to_q").weight.data.mul_(1.5)
    tuned = draw(unet, tiny_base, True, (5, 6), denoiser=denoiser)
    assert not torch.equal(tuned, found)
    assert torch.equal(tuned, draw(unet, tiny_base, False, (5, 6)))


def test_the_fused_forward_draws_what_diffusers_does(load_unet, tiny_base):
    found, expected = (draw(load_unet(torch.float32, fuse), tiny_base, False) for fuse in (True, False))
    assert not torch.equal(found, expected)
    assert (found - expected).abs().max() < 1e-3 * expected.abs().max()


@torch.no_grad()
def test_a_fused_decoder_decodes_as_diffusers(tiny_base):
    latents = torch.randn(1, 4, 24, 40, generator=torch.Generator().manual_seed(2)).to(DEVICE)
    plain, own = (components.load("vae", tiny_base / "vae").to(DEVICE) for _ in range(2))
    decoding.use_channels_last(own)
    with torch.backends.cudnn.flags(allow_tf32=False):
        found, expected = (decoding.decode_latents(vae, latents) for vae in (own, plain))
    assert not torch.equal(found, expected)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
