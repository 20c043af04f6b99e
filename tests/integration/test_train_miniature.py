import json

import torch
from diffusers import StableDiffusionXLPipeline
from safetensors.torch import load_file

from rasengan import components, miniature


def test_the_script_trains_a_model_that_diffusers_draws_with(run_script, tmp_path):
    few = ("--pictures", 48, "--judge_steps", 1, "--vae_steps", 2, "--vae_batch_size", 2)
    few += ("--unet_steps", 2, "--unet_batch_size", 2, "--scenes", 2)
    finished = run_script("train_miniature", "--output_dir", tmp_path, *few)
    assert finished.returncode == 0, finished.stderr
    names = ("unet", "vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "scheduler")
    parts = {name: components.load(name, tmp_path / "miniature" / name) for name in names}
    pipeline = StableDiffusionXLPipeline(**parts, add_watermarker=False)
    image = pipeline("a red ball on a blue background", num_inference_steps=1, height=128, width=128).images[0]
    assert image.size == (128, 128)

    figures = json.loads((tmp_path / "figures.json").read_text())
    assert figures["vae"]["steps"] == figures["unet"]["steps"] == 2
    assert sum(figures["parameters"].values()) <= 11e6
    assert set(figures["drawn"]) == {"guidance 3", "guidance 5", "guidance 7.5"}
    # The scaling factor brings the latents that the UNet learns to a standard deviation of about 1.
    assert parts["vae"].config.scaling_factor != 0.18215
    weights = load_file(tmp_path / "judge.safetensors")
    judge = miniature.Judge()
    judge.load_state_dict({name: weight.float() for name, weight in weights.items()})
    assert {weight.dtype for weight in weights.values()} == {torch.float16}
    assert (tmp_path / "grid.png").exists()
