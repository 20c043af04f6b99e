"""Pictures against diffusers' own pipelines, on the tiny SDXL in fp32."""

import diffusers
import numpy as np
import pytest
import torch
from diffusers import StableDiffusionXLImg2ImgPipeline, StableDiffusionXLPipeline
from PIL import Image

from rasengan import components, drawing, fused, lora, sdxl


PROMPTS = ["a red star on a green background", "", "a yellow ring"]
SIZE = {"height": 64, "width": 96}
STEPS = {"num_inference_steps": 3, "guidance_scale": 4.0}


@torch.no_grad()
def rows_of(pipeline, prompt, negative_prompt=None, batch_size=1):
    tokenizers, encoders = (pipeline.tokenizer, pipeline.tokenizer_2), (pipeline.text_encoder, pipeline.text_encoder_2)
    pairs = [
        None if text is None else tuple(part[0] for part in sdxl.encode_prompts([text], tokenizers, encoders))
        for text in (prompt, negative_prompt)
    ]
    return sdxl.conditioning(*pairs, batch_size)


def draw(pipeline, scheduler, prompts, seeds, **options):
    options = SIZE | STEPS | options
    latents = drawing.draw(drawing.Denoiser(pipeline.unet), scheduler, prompts, seeds, **options)
    return drawing.decode(pipeline.vae, latents)


def generators(seeds):
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def levels(image):
    return np.asarray(image, dtype=np.float64) / 255


def assert_equal_but_for_rounding(image, other):
    # Rounded to 8 bits, a difference of 1e-4 turns a level over on one value in 40.
    difference = np.abs(levels(image) - levels(other))
    assert difference.max() < 1.01 / 255
    assert (difference > 0).mean() < 255 * 1e-4


# --- from noise ---


@pytest.mark.parametrize("negative_prompt", [None, "blue, dotted"])
def test_a_drawing_is_that_of_the_pipeline_from_the_text_prompt(pipeline, negative_prompt):
    seeds = [5, 6]
    options = {"negative_prompt": negative_prompt, "num_images_per_prompt": 2, "generator": generators(seeds)}
    expected = pipeline(PROMPTS[0], **options, **SIZE, **STEPS).images
    images = draw(pipeline, pipeline.scheduler, rows_of(pipeline, PROMPTS[0], negative_prompt, 2), seeds)
    for image, other in zip(images, expected, strict=True):
        assert image.size == other.size == (96, 64)
        assert_equal_but_for_rounding(image, other)
    assert levels(images[0]).std() > 0
    assert np.abs(levels(images[0]) - levels(images[1])).max() > 0.1


@pytest.mark.parametrize("name", sorted(sdxl.SAMPLERS))
@pytest.mark.parametrize("guidance_scale", [7.5, 1.0])
def test_the_latents_are_the_pipelines_for_every_sampler(pipeline, name, guidance_scale):
    options = {"num_inference_steps": 7, "guidance_scale": guidance_scale}
    sampler = sdxl.make_sampler(pipeline.scheduler, name)
    reference = StableDiffusionXLPipeline(**pipeline.components | {"scheduler": sampler}, add_watermarker=False)
    reference.set_progress_bar_config(disable=True)
    made_of = {"generator": generators([5, 6]), "num_images_per_prompt": 2, "output_type": "latent"}
    expected = reference(PROMPTS[0], **made_of, **SIZE, **options).images
    prompts, steps = rows_of(pipeline, PROMPTS[0], None, 2), []
    sampler = sdxl.make_sampler(pipeline.scheduler, name)
    for _ in range(2):  # a sampler that has drawn before draws the same
        options |= {"on_step": lambda: steps.append(1)}
        latents = drawing.draw(drawing.Denoiser(pipeline.unet), sampler, prompts, [5, 6], **SIZE, **options)
        assert (latents - expected).abs().max() < 1e-4 * expected.abs().max()
    assert len(steps) == 2 * len(sampler.timesteps)
    assert sampler.config.beta_start == 0.00085
    assert sampler.config.timestep_spacing == "leading"
    assert sampler.config.get("use_karras_sigmas", False) == (name == "dpmpp_2m_karras")


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        *((name, {}) for name in ("TCDScheduler", "LCMScheduler", "DDPMScheduler", "DEISMultistepScheduler")),
        ("UniPCMultistepScheduler", {"thresholding": True, "sample_max_value": 1.5}),  # which is not linear
        ("UniPCMultistepScheduler", {"solver_order": 3, "prediction_type": "v_prediction"}),
    ],
)
def test_the_latents_are_the_pipelines_for_a_bases_own_sampler(pipeline, name, changes):
    options = {"num_inference_steps": 5, "guidance_scale": 3.0}
    made = [getattr(diffusers, name).from_config(pipeline.scheduler.config, **changes) for _ in range(2)]
    reference = StableDiffusionXLPipeline(**pipeline.components | {"scheduler": made[0]}, add_watermarker=False)
    reference.set_progress_bar_config(disable=True)
    expected = reference(PROMPTS[0], generator=generators([5]), output_type="latent", **SIZE, **options).images
    denoiser = drawing.Denoiser(pipeline.unet)
    latents = drawing.draw(denoiser, made[1], rows_of(pipeline, PROMPTS[0]), [5], **SIZE, **options)
    assert (latents - expected).abs().max() < 1e-4 * expected.abs().max()


def test_a_drawing_depends_on_prompt_negative_prompt_and_guidance(pipeline):
    settings = [(PROMPTS[0], None, 4.0), (PROMPTS[2], None, 4.0), (PROMPTS[0], "blue", 4.0), (PROMPTS[0], None, 1.0)]
    pictures = set()
    for prompt, negative_prompt, guidance_scale in settings:
        prompts = rows_of(pipeline, prompt, negative_prompt)
        images = draw(pipeline, pipeline.scheduler, prompts, [5], guidance_scale=guidance_scale)
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


def test_a_picture_with_non_finite_values_is_an_error(pipeline):
    prompts = rows_of(pipeline, PROMPTS[0])
    prompts["prompt_embeds"][0, 3, 3] = float("nan")
    with pytest.raises(ValueError, match="non-finite values.*--mixed_precision no"):
        draw(pipeline, pipeline.scheduler, prompts, [5])


# --- from a picture ---


@pytest.mark.parametrize("name", sorted(sdxl.SAMPLERS))
@pytest.mark.parametrize("strength", [0.3, 0.8, 1.0])
def test_from_a_picture_the_latents_are_those_of_the_img2img_pipeline(pipeline, name, strength):
    picture = Image.effect_mandelbrot((96, 64), (-2, -1, 1, 1), 50).convert("RGB")
    sampler = sdxl.make_sampler(pipeline.scheduler, name)
    reference = StableDiffusionXLImg2ImgPipeline(**pipeline.components | {"scheduler": sampler}, add_watermarker=False)
    reference.set_progress_bar_config(disable=True)
    options = {"num_inference_steps": 10, "guidance_scale": 4.0, "strength": strength}
    made_of = {"image": picture, "generator": generators([5, 6]), "num_images_per_prompt": 2, "output_type": "latent"}
    expected = reference(PROMPTS[0], **made_of, **options).images
    pixels = torch.from_numpy(np.asarray(picture).copy()).permute(2, 0, 1)[None] / 127.5 - 1
    with torch.no_grad():
        init = [part * pipeline.vae.config.scaling_factor for part in sdxl.encode_pictures(pipeline.vae, pixels)]
    sampler, prompts = sdxl.make_sampler(pipeline.scheduler, name), rows_of(pipeline, PROMPTS[0], None, 2)
    latents = drawing.draw(drawing.Denoiser(pipeline.unet), sampler, prompts, [5, 6], **SIZE, **options, init=init)
    assert (latents - expected).abs().max() < 1e-4 * expected.abs().max()


# --- the fused forward ---


@pytest.fixture(scope="module")
def fused_unet(tiny_base):
    unet = components.load("unet", tiny_base / "unet")
    assert fused.why_not(unet) is None
    lora.stack_weights(unet, torch.device("cpu"))
    return fused.FusedUNet(unet)


@torch.no_grad()
@pytest.mark.parametrize("holds", [True, False], ids=["condition held", "condition anew each step"])
def test_the_fused_forward_draws_what_diffusers_does(pipeline, fused_unet, holds):
    prompts = rows_of(pipeline, PROMPTS[0], "blue", 2)
    found, expected = (
        drawing.draw(denoiser, pipeline.scheduler, prompts, [5, 6], **SIZE, **STEPS)
        for denoiser in (
            drawing.Denoiser(fused_unet.unet, fused_unet=fused_unet if holds else None),
            drawing.Denoiser(pipeline.unet),
        )
    )
    assert not torch.equal(found, expected)
    assert (found - expected).abs().max() < 1e-4 * expected.abs().max()


def test_a_condition_is_held_in_one_place_and_follows_prompts_sizes_and_weights(pipeline, fused_unet):
    """A graph reads what is held by its address: each of these must change what is there, and nothing else."""
    denoiser, anew = drawing.Denoiser(fused_unet.unet, fused_unet=fused_unet), drawing.Denoiser(fused_unet.unet)
    to_k = fused_unet.unet.get_submodule("mid_block.attentions.0.transformer_blocks.0.attn2.to_k")
    weight, addresses, drawn = to_k.weight.data.clone(), {}, []
    turns = [(PROMPTS[0], 2, 64), (PROMPTS[1], 2, 64), (PROMPTS[0], 1, 64), (PROMPTS[0], 2, 96), (PROMPTS[0], 2, 64)]
    for number, (prompt, count, height) in enumerate(turns):
        if number == len(turns) - 1:
            to_k.weight.data.mul_(3)
        rows, size = rows_of(pipeline, prompt, None, count), SIZE | {"height": height}
        seeds = list(range(count))
        found = drawing.draw(denoiser, pipeline.scheduler, rows, seeds, **size, **STEPS)
        expected = drawing.draw(anew, pipeline.scheduler, rows, seeds, **size, **STEPS)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
        places = {key: tensor.data_ptr() for key, tensor in fused_unet.held.items()}
        assert addresses.setdefault(count, places) == places
        drawn.append(found)
    assert (drawn[0] - drawn[1]).abs().max() > 1e-3
    assert (drawn[0] - drawn[4]).abs().max() > 1e-3
    to_k.weight.data.copy_(weight)
    denoiser.release()
    assert not fused_unet.held
    assert not fused_unet.conditions


@pytest.mark.parametrize("name", sorted(sdxl.SAMPLERS))
@pytest.mark.parametrize("guidance_scale", [1.0, 5.0])
def test_a_prediction_may_be_overwritten_by_the_next(pipeline, name, guidance_scale):
    class Overwriting(drawing.Denoiser):
        """As a graph does, it returns the same memory each time."""

        def __call__(self, sample, timestep):
            prediction = super().__call__(sample, timestep)
            self.output = prediction.clone() if not hasattr(self, "output") else self.output.copy_(prediction)
            return self.output

    prompts, options = (
        rows_of(pipeline, PROMPTS[0]),
        SIZE | {"num_inference_steps": 7, "guidance_scale": guidance_scale},
    )
    found, expected = (
        drawing.draw(kind(pipeline.unet), sdxl.make_sampler(pipeline.scheduler, name), prompts, [5], **options)
        for kind in (Overwriting, drawing.Denoiser)
    )
    assert torch.equal(found, expected)
