import numpy as np
import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from PIL import Image

from rasengan import components, sdxl


PROMPTS = ["a red star on a green background", "", "らせんがん " * 9]
SIZE = {"height": 64, "width": 96}
STEPS = {"num_inference_steps": 3, "guidance_scale": 4.0}


@pytest.fixture(scope="module")
def pipeline(tiny_base):
    """diffusers' own pipeline of the tiny components, as the reference."""
    parts = {name: components.load(name, tiny_base / name) for name in components.COMPONENTS}
    pipeline = StableDiffusionXLPipeline(**parts, add_watermarker=False)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@torch.no_grad()
def encode(pipeline, prompts):
    tokenizers = [pipeline.tokenizer, pipeline.tokenizer_2]
    return sdxl.encode_prompts(prompts, tokenizers, [pipeline.text_encoder, pipeline.text_encoder_2])


def rows_of(pipeline, prompt, negative_prompt=None, batch_size=1):
    pairs = [
        None if text is None else tuple(p[0] for p in encode(pipeline, [text])) for text in (prompt, negative_prompt)
    ]
    return sdxl.conditioning(*pairs, batch_size)


def draw(pipeline, scheduler, prompts, seeds):
    return sdxl.draw(pipeline.unet, pipeline.vae, scheduler, prompts, seeds, *SIZE.values(), *STEPS.values())


def levels(image):
    return np.asarray(image, dtype=np.float64) / 255


def assert_equal_but_for_rounding(image, other):
    # Rounded to 8 bits, a difference of 1e-4 turns a level over on one value in 40.
    difference = np.abs(levels(image) - levels(other))
    assert difference.max() < 1.01 / 255
    assert (difference > 0).mean() < 255 * 1e-4


# --- conditioning ---


def test_prompts_are_encoded_as_the_pipeline_does(pipeline):
    with torch.no_grad():
        expected = pipeline.encode_prompt(PROMPTS, do_classifier_free_guidance=False)
    prompt_embeds, pooled_prompt_embeds = encode(pipeline, PROMPTS)
    assert prompt_embeds.shape == (3, 77, 96)
    assert pooled_prompt_embeds.shape == (3, 64)
    torch.testing.assert_close(prompt_embeds, expected[0], rtol=0, atol=0)
    torch.testing.assert_close(pooled_prompt_embeds, expected[2], rtol=0, atol=0)


def test_tokens_are_counted_before_any_is_cut_off(pipeline):
    tokenizer = pipeline.tokenizer
    assert sdxl.count_tokens("", tokenizer) == 2
    assert sdxl.count_tokens("!" * 5, tokenizer) == 2 + 5
    assert sdxl.count_tokens("! " * 400, tokenizer) == 2 + 400


def test_time_ids_stand_in_sdxls_order(pipeline):
    original_size, crop_top_left, target_size = (300, 200), (11, 7), (64, 96)
    time_ids = sdxl.compute_time_ids(original_size, crop_top_left, target_size)
    assert time_ids == [300, 200, 11, 7, 64, 96]
    expected = pipeline._get_add_time_ids(original_size, crop_top_left, target_size, torch.float32, 64)
    assert [time_ids] == expected.tolist()


def test_pictures_are_encoded_to_the_moments_of_the_vae_whatever_autocast_says(pipeline):
    generator = torch.Generator().manual_seed(0)
    pixel_values = torch.rand(2, 3, 64, 96, generator=generator) * 2 - 1
    with torch.no_grad():
        expected = pipeline.vae.encode(pixel_values).latent_dist
        mean, std = sdxl.encode_pictures(pipeline.vae, pixel_values)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            under_autocast = sdxl.encode_pictures(pipeline.vae, pixel_values)
    assert mean.shape == std.shape == (2, 4, 8, 12)
    assert torch.equal(mean, expected.mean)
    torch.testing.assert_close(std.square(), expected.var)
    assert all(torch.equal(*pair) for pair in zip(under_autocast, (mean, std), strict=True))


# --- drawing ---


@pytest.mark.parametrize("negative_prompt", [None, "blue, dotted"])
def test_a_drawing_is_that_of_the_pipeline_from_the_text_prompt(pipeline, negative_prompt):
    seeds = [5, 6]
    expected = pipeline(
        PROMPTS[0],
        negative_prompt=negative_prompt,
        num_images_per_prompt=2,
        generator=[torch.Generator().manual_seed(seed) for seed in seeds],
        **SIZE,
        **STEPS,
    ).images
    images = draw(pipeline, pipeline.scheduler, rows_of(pipeline, PROMPTS[0], negative_prompt, 2), seeds)
    for image, other in zip(images, expected, strict=True):
        assert image.size == other.size == (96, 64)
        assert_equal_but_for_rounding(image, other)
    assert levels(images[0]).std() > 0
    assert np.abs(levels(images[0]) - levels(images[1])).max() > 0.1


def test_a_drawing_depends_on_prompt_negative_prompt_and_guidance(pipeline):
    settings = [(PROMPTS[0], None, 4.0), (PROMPTS[2], None, 4.0), (PROMPTS[0], "blue", 4.0), (PROMPTS[0], None, 1.0)]
    pictures = set()
    for prompt, negative_prompt, guidance_scale in settings:
        prompts = rows_of(pipeline, prompt, negative_prompt)
        images = sdxl.draw(pipeline.unet, pipeline.vae, pipeline.scheduler, prompts, [5], 64, 96, 3, guidance_scale)
        pictures.add(images[0].tobytes())
    assert len(pictures) == 4


@pytest.mark.parametrize("name", ["euler_a", "dpmpp_2m"])
def test_a_picture_does_not_depend_on_its_batch(pipeline, name):
    scheduler = sdxl.make_sampler(pipeline.scheduler, name)
    together = draw(pipeline, scheduler, rows_of(pipeline, PROMPTS[0], None, 3), [5, 6, 7])
    alone = [draw(pipeline, scheduler, rows_of(pipeline, PROMPTS[0]), [seed])[0] for seed in (5, 6, 7)]
    for image, other in zip(together, alone, strict=True):
        assert_equal_but_for_rounding(image, other)
    assert len({image.tobytes() for image in alone}) == 3


@pytest.fixture(scope="module")
def base_picture(pipeline):
    return draw(pipeline, pipeline.scheduler, rows_of(pipeline, PROMPTS[0]), [5])[0]


@pytest.mark.parametrize("name", [None, *sorted(sdxl.SAMPLERS)])
def test_every_sampler_draws_with_sdxls_schedule(pipeline, base_picture, name):
    scheduler = sdxl.make_sampler(pipeline.scheduler, name)
    steps = []
    prompts = rows_of(pipeline, PROMPTS[0])
    size = (*SIZE.values(), *STEPS.values())
    image = sdxl.draw(pipeline.unet, pipeline.vae, scheduler, prompts, [5], *size, lambda: steps.append(1))[0]
    assert isinstance(image, Image.Image)
    assert levels(image).std() > 0
    assert len(steps) == len(scheduler.timesteps)
    assert scheduler.config.beta_start == 0.00085
    assert scheduler.config.timestep_spacing == "leading"
    assert scheduler.config.get("use_karras_sigmas", False) == (name == "dpmpp_2m_karras")
    if name in {None, "euler", "ddim"}:  # DDIM without noise is Euler's method in other variables
        assert_equal_but_for_rounding(image, base_picture)
    else:
        assert np.abs(levels(image) - levels(base_picture)).max() > 0.05


def test_a_picture_with_non_finite_values_is_an_error(pipeline):
    prompts = rows_of(pipeline, PROMPTS[0])
    prompts["prompt_embeds"][0, 3, 3] = float("nan")
    with pytest.raises(ValueError, match="non-finite values.*--mixed_precision no"):
        draw(pipeline, pipeline.scheduler, prompts, [5])


# --- decoding ---


def some_latents(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(2))


@torch.no_grad()
def decoded(vae, latents):
    return vae.decode(latents / 0.13025).sample.clamp(-1, 1)


def psnr(pixels, expected):
    return 10 * torch.log10(4 / (pixels - expected).square().mean())


@torch.no_grad()
def test_a_picture_up_to_the_tile_is_decoded_whole(pipeline):
    latents = some_latents(2, 4, 8, 12)
    pixels = sdxl.decode_latents(pipeline.vae, latents, tile_px=96)
    assert pixels.shape == (2, 3, 64, 96)
    torch.testing.assert_close(pixels, decoded(pipeline.vae, latents), rtol=1e-4, atol=1e-5)
    assert not pipeline.vae.use_tiling


@torch.no_grad()
def test_a_picture_over_the_tile_is_decoded_in_tiles_to_nearly_the_same(pipeline):
    # Noise has the same statistics in every tile; a group norm over a tile is not the one over the picture.
    latents = some_latents(1, 4, 32, 40)
    tile_inputs = []
    hook = pipeline.vae.decoder.register_forward_pre_hook(lambda module, inputs: tile_inputs.append(inputs[0].shape))
    pixels = sdxl.decode_latents(pipeline.vae, latents, tile_px=128)
    hook.remove()
    assert len(tile_inputs) > 1
    assert max(max(shape[-2:]) for shape in tile_inputs) == 128 // 8
    assert pixels.shape == (1, 3, 256, 320)
    whole = decoded(pipeline.vae, latents)
    assert psnr(pixels, whole) > 30
    assert psnr(whole.roll(8, dims=-1), whole) < 15  # what a picture that is off by one latent would have
    assert not pipeline.vae.use_tiling


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_decode_is_in_fp32_inside_autocast_and_of_half_precision_latents(pipeline, dtype):
    latents = some_latents(1, 4, 8, 8).to(dtype)
    expected = sdxl.decode_latents(pipeline.vae, latents.float())
    with torch.autocast("cpu", dtype=dtype):
        assert not torch.equal(pipeline.vae.decode(latents.float() / 0.13025).sample.clamp(-1, 1), expected)
        pixels = sdxl.decode_latents(pipeline.vae, latents)
    assert pixels.dtype == torch.float32
    assert torch.equal(pixels, expected)


def test_a_failed_decode_leaves_no_tiling_behind(pipeline):
    with pytest.raises(RuntimeError):
        sdxl.decode_latents(pipeline.vae, torch.zeros(1, 5, 8, 8))
    assert not pipeline.vae.use_tiling


@torch.no_grad()
def test_pictures_are_decoded_one_at_a_time(pipeline):
    sizes = []
    hook = pipeline.vae.decoder.register_forward_pre_hook(lambda module, inputs: sizes.append(len(inputs[0])))
    try:
        assert sdxl.decode_latents(pipeline.vae, some_latents(2, 4, 8, 8)).shape == (2, 3, 64, 64)
    finally:
        hook.remove()
    assert sizes == [1, 1]
