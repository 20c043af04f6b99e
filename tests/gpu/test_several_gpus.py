"""Two GPUs, through NCCL, with the scripts and the config that the README names."""

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file


pytestmark = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")

CONFIG = Path(__file__).parents[2] / "accelerate_configs" / "multi_gpu.yaml"
TWO = ["--config_file", str(CONFIG), "--main_process_port", "0", "--num_processes", "2"]
ONE_GPU = {"CUDA_VISIBLE_DEVICES": os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]}
ADAPTER = "pytorch_lora_weights.safetensors"
# AdamW would enlarge the rounding of small gradients: with a great epsilon its step is nearly that of SGD.
EXACT = ["--no-use_8bit_adam", "--adam_epsilon", 0.01, "--deterministic"]
# Graphs are captured anew after pictures, and the last of 6 steps of 8 of 40 pictures begins a second epoch.
PROMPT = ["--validation_prompt", "a red star", "--num_validation_images", 2, "--validation_inference_steps", 2]
RUN = [*EXACT, *PROMPT, "--max_train_samples", 40, "--max_train_steps", 6, "--learning_rate", 0.01]


@pytest.fixture(scope="module")
def runs(run_script, train_arguments, tmp_path_factory):
    """Output folders of two GPUs with graphs, of two without, and of one, with the same samples in a step."""
    folders = {}
    for name, size, launch, flags in (
        ("two", 4, TWO, []),
        ("two, eager", 4, TWO, ["--no-cuda_graph"]),
        ("one", 8, None, []),
    ):
        folders[name] = tmp_path_factory.mktemp("run")
        words = [*train_arguments, *RUN, "--train_batch_size", size, "--mixed_precision", "no", *flags]
        cache = ["--conditioning_cache_dir", folders[name] / "cache", "--output_dir", folders[name]]
        finished = run_script("train_lora_sdxl", *words, *cache, launch=launch, env=None if launch else ONE_GPU)
        assert finished.returncode == 0, finished.stderr
        assert "gloo" not in finished.stderr
    return folders


def assert_close(run: Path, other: Path) -> None:
    """Assert that what was trained differs by no more than convolutions in TF32 do, whose batches have other sizes."""
    # lora_B, which is zero before training: of all that moves, the largest part.
    one, two = (torch.cat([part.flatten() for _, part in sorted(trained(of).items())]) for of in (run, other))
    assert one.norm() > 0
    assert (one - two).norm() < 1e-2 * one.norm()


def trained(run: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in load_file(run / ADAPTER).items() if "lora.up" in name}


@pytest.mark.parametrize("other", ["two, eager", "one"])
def test_two_gpus_train_what_one_does_with_and_without_graphs(runs, other, read_scalars):
    losses = [read_scalars(runs[name], "train_loss") for name in ("two", other)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    assert_close(runs["two"], runs[other])


def test_a_run_of_two_gpus_goes_on_with_one(runs, run_script, train_arguments, tmp_path):
    words = [*train_arguments, *RUN, "--mixed_precision", "no", "--output_dir", tmp_path]
    words += ["--conditioning_cache_dir", runs["one"] / "cache", "--resume_from_checkpoint", "latest"]
    first = run_script("train_lora_sdxl", *words, "--train_batch_size", 4, "--max_train_steps", 4, launch=TWO)
    assert first.returncode == 0, first.stderr
    second = run_script("train_lora_sdxl", *words, "--train_batch_size", 8, env=ONE_GPU)
    assert second.returncode == 0, second.stderr
    assert json.loads((tmp_path / "checkpoint-6" / "trainer_state.json").read_text())["global_step"] == 6
    assert_close(tmp_path, runs["one"])


def test_fp16_trains_on_two_gpus(run_script, train_arguments, tmp_path):
    # 24 steps: the gradient scaler skips the first ones on both at once, while it halves its scale.
    words = ["--mixed_precision", "fp16", "--max_train_steps", 24, "--output_dir", tmp_path]
    finished = run_script("train_lora_sdxl", *train_arguments, *words, launch=TWO)
    assert finished.returncode == 0, finished.stderr
    weights = load_file(tmp_path / ADAPTER)
    assert any(tensor.abs().max() > 0 for name, tensor in weights.items() if "lora.up" in name)


def test_two_gpus_draw_the_pictures_of_one(runs, run_script, tiny_base, tmp_path):
    words = ["--pretrained_model_name_or_path", tiny_base, "--lora_weights", runs["two"], "--compare"]
    words += ["--height", 64, "--width", 64, "--num_inference_steps", 3, "--prompt", "a star", "a ring", "a dot"]
    words += ["--mixed_precision", "fp16"]  # the config says bf16
    pictures = {}
    for name, launch in (("one", None), ("two", TWO)):
        output = ["--output_dir", tmp_path / name]
        finished = run_script("infer", *words, *output, launch=launch, env=None if launch else ONE_GPU)
        assert finished.returncode == 0, finished.stderr
        pictures[name] = {path.name: path.read_bytes() for path in (tmp_path / name).glob("*.png")}
    assert len(pictures["one"]) == 3 * 2 + 1
    assert pictures["two"] == pictures["one"]
