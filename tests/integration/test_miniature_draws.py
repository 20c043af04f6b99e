"""The miniature that comes with the project draws what is asked, and begins to learn the style within seconds.

How well it does in the end, `make test_style` and benchmarks/ablation.py count.
"""

from PIL import Image

from rasengan import miniature, scores, world


SCENES = world.held_out_scenes(16)
BASE = miniature.ASSETS / "miniature"


def test_the_base_draws_what_is_asked_and_a_short_run_brings_the_style(run_script, tmp_path):
    world.write_style_set(tmp_path / "set", count=120)
    (tmp_path / "prompts.txt").write_text("\n".join(scene.caption for scene in SCENES))
    words = ["--pretrained_model_name_or_path", BASE, "--conditioning_cache_dir", tmp_path / "cache"]
    train = ["--train_data_dir", tmp_path / "set", "--output_dir", tmp_path / "run", "--report_to", "none"]
    train += ["--config", miniature.ASSETS / "recipe.yaml", "--seed", 0]
    short = ["--max_train_steps", 150, "--validation_split", 4]
    finished = run_script("train_lora_sdxl", *words, *train, *short)
    assert finished.returncode == 0, finished.stderr
    drawn = ["--prompt_file", tmp_path / "prompts.txt", "--output_dir", tmp_path / "drawn", "--guidance_scale", 5]
    drawn += ["--lora_weights", tmp_path / "run", "--compare", "--num_inference_steps", 12]
    finished = run_script("infer", *words, *drawn)
    assert finished.returncode == 0, finished.stderr

    judge, shares = miniature.load_judge(miniature.ASSETS), {}
    for kind in ("base", "tuned"):
        images = [Image.open(file) for file in sorted((tmp_path / "drawn").glob(f"*-{kind}.png"))]
        shares[kind] = scores.judge_shares(miniature.judge_pictures(judge, images), SCENES)
    assert shares["base"]["content"] >= 0.9, shares
    assert shares["base"]["style"] == 0, shares
    assert shares["tuned"]["style"] >= 0.2, shares  # in the end nearly all
    assert shares["tuned"]["content"] >= 0.6, shares
