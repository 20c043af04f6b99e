"""infer.py on a card."""

import os

import numpy as np
import pytest
import torch
from PIL import Image


PROMPT = "a big red star"


@pytest.fixture(scope="module")
def trained(run_script, train_arguments, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    words = ["--mixed_precision", "fp16", "--max_train_steps", 4, "--learning_rate", 0.01, "--output_dir", folder]
    finished = run_script("train_lora_sdxl", *train_arguments, *words)
    assert finished.returncode == 0, finished.stderr
    return folder


@pytest.fixture
def draw(run_script, tiny_base, trained, tmp_path):
    """Function that draws base and tuned, and returns what was printed and the pictures by file name."""

    def run(*arguments, env=None):
        folder = tmp_path / f"pictures-{len(list(tmp_path.iterdir()))}"
        words = ["--pretrained_model_name_or_path", tiny_base, "--lora_weights", trained, "--compare", "--height", 64]
        words += ["--width", 64, "--num_inference_steps", 3, "--prompt", PROMPT, "a ring", "--output_dir", folder]
        finished = run_script("infer", *words, *arguments, env=env)
        assert finished.returncode == 0, finished.stderr
        return finished.stdout, {path.name: np.asarray(Image.open(path)).astype(int) for path in folder.glob("*.png")}

    return run


def test_the_card_draws_what_the_host_does(draw):
    said, pictures = draw("--mixed_precision", "no")
    assert "Peak: " in said
    _, expected = draw("--mixed_precision", "no", env={"CUDA_VISIBLE_DEVICES": ""})
    assert pictures.keys() == expected.keys()
    for name, picture in pictures.items():
        assert np.abs(picture - expected[name]).mean() < 2, name


def test_fp16_draws_base_and_tuned(draw):
    _, pictures = draw("--num_images_per_prompt", 2)
    base, tuned = (pictures[f"000-0-a-big-red-star-{kind}.png"] for kind in ("base", "tuned"))
    assert np.abs(base - tuned).mean() > 1
    assert len(pictures) == 2 * 2 * 2 + 1


def test_a_small_budget_decodes_at_the_end_and_draws_the_same(draw):
    _, expected = draw()
    said, pictures = draw("--vram_budget_gib", 0.9)
    assert float(said.split("Peak: ")[1].split()[0]) < 0.9
    for name, picture in pictures.items():
        assert np.array_equal(picture, expected[name]), name


@pytest.mark.skipif(torch.cuda.device_count() < 1, reason="needs a card")
def test_a_budget_that_the_card_does_not_have_is_an_error(run_script, tiny_base, tmp_path):
    words = ["--pretrained_model_name_or_path", tiny_base, "--prompt", PROMPT, "--vram_budget_gib", 5000]
    finished = run_script("infer", *words, "--output_dir", tmp_path, env=dict(os.environ))
    assert finished.returncode == 2
    assert "--vram_budget_gib is 5000, but this card has" in finished.stderr
