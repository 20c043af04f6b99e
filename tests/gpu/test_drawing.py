"""Drawing on a card: the graph against the eager forward, the fused one against diffusers'."""

import pytest
import torch

from rasengan import components, decoding, drawing, fused, lora, merging, pipeline, sdxl
from rasengan.adapters import Adapter
from rasengan.sources import COMPONENTS


DEVICE = torch.device("cuda", 0)
SIZE = {"height": 64, "width": 96, "num_inference_steps": 4, "guidance_scale": 5.0}


@pytest.fixture
def load_unet(tiny_base):
    """Function that returns the tiny UNet on the card, and what makes it fast, or None."""

    def load(dtype, fuse):
        unet = components.load("unet", tiny_base / "unet", dtype)
        lora.stack_weights(unet, DEVICE)
        unet.to(DEVICE)
        return unet, fused.FusedUNet(unet) if fuse else None

    return load


def prompts_of(unet, count, seed=3):
    generator = torch.Generator().manual_seed(seed)
    pooled = unet.config.projection_class_embeddings_input_dim - 6 * unet.config.addition_time_embed_dim
    row = (
        torch.randn(77, unet.config.cross_attention_dim, generator=generator),
        torch.randn(pooled, generator=generator),
    )
    return sdxl.conditioning(row, None, count)


def draw(denoiser, tiny_base, seeds=(5, 6), sampler="euler", prompt=3, **size):
    scheduler = sdxl.make_sampler(components.load("scheduler", tiny_base / "scheduler"), sampler)
    prompts = prompts_of(denoiser.unet, len(seeds), prompt)
    return drawing.draw(denoiser, scheduler, prompts, list(seeds), **SIZE | size)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("fuse", [True, False])
@pytest.mark.parametrize("sampler", sorted(sdxl.SAMPLERS))
def test_a_graph_draws_the_eager_bits(load_unet, tiny_base, dtype, fuse, sampler):
    unet, fast = load_unet(dtype, fuse)
    eager, graph = (
        draw(drawing.Denoiser(unet, as_graph, fast), tiny_base, sampler=sampler) for as_graph in (False, True)
    )
    assert torch.isfinite(eager).all()
    assert torch.equal(eager, graph)


def test_a_graph_follows_prompts_sizes_of_batch_and_weights_that_change_in_place(load_unet, tiny_base):
    unet, fast = load_unet(torch.float16, True)
    denoiser, eager = drawing.Denoiser(unet, True, fast), drawing.Denoiser(unet, False, fast)
    for seeds in ((5, 6), (7,), (5, 6)):
        found = draw(denoiser, tiny_base, seeds)
        assert torch.equal(found, draw(eager, tiny_base, seeds))
    for name in ("attn1.to_q", "attn2.to_k"):
        unet.get_submodule(f"mid_block.attentions.0.transformer_blocks.0.{name}").weight.data.mul_(1.5)
        tuned = draw(denoiser, tiny_base)
        assert not torch.equal(tuned, found)
        assert torch.equal(tuned, draw(eager, tiny_base))
        found = tuned


def test_graphs_follow_what_is_held_of_prompts_batches_and_sizes(load_unet, tiny_base):
    graph, eager = (
        drawing.Denoiser(unet, as_graph, fast)
        for as_graph in (True, False)
        for unet, fast in [load_unet(torch.float16, True)]
    )
    sizes = [(64, 96), (96, 64), (72, 88), (64, 64)]  # one of them halves to odd sizes
    turns = [(prompt, seeds, size) for size in sizes for prompt, seeds in ((3, (5, 6)), (4, (5, 6)), (4, (7,)))]
    turns += [turns[0], turns[2], turns[1]]  # in the end more shapes than there may be graphs, and the first again
    drawn = {}
    for number, (prompt, seeds, (height, width)) in enumerate(turns):
        options = {"prompt": prompt, "height": height, "width": width}
        found = draw(graph, tiny_base, seeds, **options)
        assert torch.equal(found, draw(eager, tiny_base, seeds, **options)), number
        eager.release()  # so that nothing of it is left over from another prompt
        assert len(graph.graphs) <= drawing.MOST_GRAPHS
        assert torch.equal(drawn.setdefault((prompt, seeds, height, width), found), found)
    assert not torch.equal(drawn[3, (5, 6), 64, 96], drawn[4, (5, 6), 64, 96])
    graph.release()
    assert torch.equal(draw(graph, tiny_base), drawn[3, (5, 6), 64, 96])


def test_what_is_held_keeps_its_place_while_graphs_read_it(load_unet, tiny_base):
    unet, fast = load_unet(torch.float16, True)
    denoiser, places = drawing.Denoiser(unet, True, fast), {}
    for prompt, seeds in ((3, (5, 6)), (4, (7,)), (5, (5, 6)), (6, (7,))):
        draw(denoiser, tiny_base, seeds, prompt=prompt)
        found = {key: tensor.data_ptr() for key, tensor in fast.held.items()}
        assert places.setdefault(len(seeds), found) == found
    assert not set(places[1].values()) & set(places[2].values())


def test_the_fused_forward_draws_what_diffusers_does(load_unet, tiny_base):
    # Without TF32, which rounds convolutions of another memory format otherwise.
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        found, expected = (
            draw(drawing.Denoiser(unet, False, fast), tiny_base)
            for unet, fast in (load_unet(torch.float32, fuse) for fuse in (True, False))
        )
    assert not torch.equal(found, expected)
    assert (found - expected).abs().max() < 1e-3 * expected.abs().max()


@torch.no_grad()
@pytest.mark.parametrize("strip_bytes", [2**14, 2**30], ids=["strips", "one strip"])
@pytest.mark.parametrize("kept_bytes", [0, 2**40], ids=["upsampled anew", "upsampled once"])
def test_a_decode_in_strips_is_diffusers_own(tiny_base, monkeypatch, strip_bytes, kept_bytes):
    monkeypatch.setattr(decoding, "STRIP_BYTES", strip_bytes)
    monkeypatch.setattr(decoding, "MOST_KEPT_BYTES", kept_bytes)
    latents = torch.randn(1, 4, 24, 40, generator=torch.Generator().manual_seed(2)).to(DEVICE)
    plain, own = (components.load("vae", tiny_base / "vae").to(DEVICE) for _ in range(2))
    decoding.use_channels_last(own)
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        expected = plain.decode(latents / plain.config.scaling_factor).sample.clamp(-1, 1)
        found = decoding.decode_latents(own, latents)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
    # As it ships, with TF32 in the convolutions.
    error = (decoding.decode_latents(own, latents) - expected).square().mean()
    assert 10 * torch.log10(4 / error) > 50


@pytest.mark.parametrize("guidance_scale", [1.0, 5.0])
def test_adapters_take_turns_under_one_graph(tiny_base, guidance_scale):
    folders = {name: tiny_base / name for name in COMPONENTS}
    skeleton, generator = components.skeleton("unet", tiny_base / "unet"), torch.Generator().manual_seed(0)
    weights = {}
    for name, module in skeleton.named_modules():
        if any(name.endswith(f".{target}") for target in lora.UNET_TARGETS):
            weights[f"{name}.lora_A.weight"] = torch.randn(4, module.in_features, generator=generator)
            weights[f"{name}.lora_B.weight"] = torch.randn(module.out_features, 4, generator=generator) / 10
    adapter = Adapter({"unet": weights}, {"unet": lora.lora_config(4, 2.0, list(lora.UNET_TARGETS))})
    scheduler = sdxl.make_sampler(components.load("scheduler", tiny_base / "scheduler"), "pndm")
    drawn = {}
    for as_graph in (True, False):
        model = pipeline.Pipeline(folders, None, DEVICE, torch.float32)
        model.use([])
        model.denoiser.as_graph = as_graph
        prompts = prompts_of(model.denoiser.unet, 1)
        for turn, scale in enumerate((0.0, 1.0, 0.0, 0.5)):
            model.use([(adapter, scale)])
            options = SIZE | {"guidance_scale": guidance_scale}
            drawn[as_graph, turn] = model.draw(scheduler, prompts, [5], **options)
    assert all(torch.equal(drawn[True, turn], drawn[False, turn]) for turn in range(4))
    assert torch.equal(drawn[True, 0], drawn[True, 2])
    assert not torch.equal(drawn[True, 0], drawn[True, 1])


def test_a_convolutions_lora_is_merged_without_tf32():
    layer = torch.nn.Conv2d(32, 32, 3, padding=1, bias=False)
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(8, 32, 3, 3, generator=generator), torch.randn(32, 8, 1, 1, generator=generator) / 10
    expected = layer.weight.double() + torch.einsum("or,rihw->oihw", b[:, :, 0, 0].double(), a.double())
    config = lora.lora_config(8, 8.0, ["conv"])
    adapter = Adapter({"unet": {"conv.lora_A.weight": a, "conv.lora_B.weight": b}}, {"unet": config})
    model = torch.nn.ModuleDict({"conv": layer}).to(DEVICE)
    merging.merge(model, [(adapter, 1.0)], "unet")
    assert (model["conv"].weight.cpu() - expected).norm() < 1e-6 * expected.norm()
