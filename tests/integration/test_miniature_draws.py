"""The demo runs, its miniature draws what is asked, and begins to learn the style within seconds.

How well it does in the end, `make test_style` and benchmarks/ablation.py count.
"""

import os
import subprocess
import sys
from pathlib import Path

from PIL import Image

from rasengan import miniature, scores, world


ROOT = Path(__file__).parents[2]
SCENES = world.held_out_scenes(16)


def test_the_base_draws_what_is_asked_and_a_short_demo_brings_the_style(run_script, tmp_path):
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    command = ["bash", ROOT / "scripts" / "demo.sh", tmp_path, "--max_train_steps", "150", "--report_to", "none"]
    environment = os.environ | {"PATH": path, "OMP_NUM_THREADS": "1"}
    finished = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert finished.returncode == 0, finished.stderr
    assert "Done, after" in finished.stdout
    assert {path.suffix for path in (tmp_path / "images").iterdir()} == {".png", ".html"}
    assert len(list((tmp_path / "images").glob("*-tuned.png"))) == 4

    prompts = tmp_path / "more.txt"
    prompts.write_text("\n".join(scene.caption for scene in SCENES))
    words = ["--pretrained_model_name_or_path", miniature.ASSETS / "miniature", "--lora_weights", tmp_path / "lora"]
    words += ["--conditioning_cache_dir", tmp_path / "cache", "--prompt_file", prompts, "--guidance_scale", 3]
    finished = run_script(
        "infer", *words, "--output_dir", tmp_path / "drawn", "--compare", "--num_inference_steps", 12
    )
    assert finished.returncode == 0, finished.stderr

    judge, shares = miniature.load_judge(miniature.ASSETS), {}
    for kind in ("base", "tuned"):
        images = [Image.open(file) for file in sorted((tmp_path / "drawn").glob(f"*-{kind}.png"))]
        shares[kind] = scores.judge_shares(miniature.judge_pictures(judge, images), SCENES)
    assert shares["base"]["content"] >= 0.9, shares
    assert shares["base"]["style"] == 0, shares
    assert shares["tuned"]["style"] >= 0.2, shares  # in the end nearly all
    assert shares["tuned"]["content"] >= 0.6, shares
