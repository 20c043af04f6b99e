import json

import pytest
import torch

from rasengan import components, sdxl


PROMPTS = ["a red star on a green background", "", "らせんがん " * 9]
SIZE = {"height": 64, "width": 96}
STEPS = {"num_inference_steps": 3, "guidance_scale": 4.0}


@torch.no_grad()
def encode(pipeline, prompts):
    tokenizers = [pipeline.tokenizer, pipeline.tokenizer_2]
    return sdxl.encode_prompts(prompts, tokenizers, [pipeline.text_encoder, pipeline.text_encoder_2])


def rows_of(pipeline, prompt, negative_prompt=None, batch_size=1):
    pairs = [
        None if text is None else tuple(p[0] for p in encode(pipeline, [text])) for text in (prompt, negative_prompt)
    ]
    return sdxl.conditioning(*pairs, batch_size)


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


@pytest.mark.parametrize("name", [None, *sdxl.SAMPLERS])
def test_a_sampler_keeps_the_prediction_type_that_the_bases_settings_leave_unsaid(name, tiny_base, tmp_path):
    settings = json.loads((tiny_base / "scheduler" / "scheduler_config.json").read_text())
    settings.pop("prediction_type", None)
    (tmp_path / "scheduler_config.json").write_text(json.dumps(settings))
    scheduler = components.load_scheduler(tmp_path, "v_prediction")
    assert sdxl.make_sampler(scheduler, name).config.prediction_type == "v_prediction"
