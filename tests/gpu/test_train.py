import json

import pytest
import torch
from safetensors.torch import load_file


SINGLE = ["--config_file", "accelerate_configs/single_t4.yaml"]


@pytest.mark.parametrize(
    ("launch", "flags"),
    [
        (SINGLE, []),
        (["--mixed_precision", "no"], ["--mixed_precision", "fp16"]),
        (None, ["--mixed_precision", "fp16"]),
    ],
    ids=["fp16 by the config", "fp16 by the flag", "fp16 by plain python"],
)
def test_fp16_trains_fp32_weights_whichever_way_it_was_asked_for(launch, flags, run_script, train_arguments, tmp_path):
    # The gradient scaler may skip the first steps, while it halves its scale: four would not do.
    prompt = ["--validation_prompt", "a red star", "--validation_inference_steps", "2", "--num_validation_images", "1"]
    prompt += ["--max_train_steps", "16", "--checkpointing_steps", "8"]
    finished = run_script(
        "train_lora_sdxl", *train_arguments, *flags, *prompt, "--output_dir", tmp_path, launch=launch
    )
    assert finished.returncode == 0, finished.stderr
    weights = load_file(tmp_path / "pytorch_lora_weights.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}
    assert any(tensor.abs().max() > 0 for name, tensor in weights.items() if "lora.up" in name)
    assert (tmp_path / "checkpoint-8" / "scaler.pt").is_file()


def test_a_resumed_fp16_run_ends_near_the_uninterrupted_one(run_script, train_arguments, tmp_path):
    arguments = [*train_arguments, "--mixed_precision", "fp16", "--max_train_steps", 24, "--checkpointing_steps", 12]
    whole, halved = tmp_path / "whole", tmp_path / "halved"
    assert run_script("train_lora_sdxl", *arguments, "--output_dir", whole).returncode == 0
    first = run_script("train_lora_sdxl", *arguments, "--output_dir", halved, "--max_train_steps", 12)
    assert first.returncode == 0, first.stderr
    second = run_script("train_lora_sdxl", *arguments, "--output_dir", halved, "--resume_from_checkpoint", "latest")
    assert second.returncode == 0, second.stderr
    name = "pytorch_lora_weights.safetensors"
    for key, tensor in load_file(whole / name).items():
        torch.testing.assert_close(load_file(halved / name)[key], tensor, rtol=0, atol=2e-3)


def test_two_processes_share_one_gpu_through_gloo(run_script, train_arguments, tmp_path):
    launch = ["--multi_gpu", "--num_processes", "2", "--mixed_precision", "fp16"]
    finished = run_script("train_lora_sdxl", *train_arguments, "--output_dir", tmp_path, launch=launch)
    assert finished.returncode == 0, finished.stderr
    assert "through gloo" in finished.stderr
    assert json.loads((tmp_path / "checkpoint-4" / "trainer_state.json").read_text())["global_step"] == 4


def test_infer_draws_in_fp16_with_a_merged_adapter(run_script, trained, tiny_base, tmp_path):
    finished = run_script(
        "infer",
        *("--pretrained_model_name_or_path", tiny_base, "--lora_weights", trained, "--compare", "--prompt", "a star"),
        *("--num_inference_steps", 2, "--height", 64, "--width", 64, "--output_dir", tmp_path),
    )
    assert finished.returncode == 0, finished.stderr
    assert "Merged" in finished.stdout
    assert (tmp_path / "grid.png").is_file()


def test_a_plan_is_printed_kept_and_used_again(run_script, train_arguments, tmp_path):
    arguments = [*train_arguments, "--mixed_precision", "fp16", "--output_dir", tmp_path]
    arguments += ["--train_batch_size", 1, "--gradient_accumulation_steps", 2, "--vram_budget_gib", 2]
    only = run_script("train_lora_sdxl", *arguments, "--plan_only")
    assert only.returncode == 0, only.stderr
    assert "Memory plan: 2 pictures at once, 1 times a step; 0 of " in only.stdout
    assert not list(tmp_path.glob("checkpoint-*"))
    first = run_script("train_lora_sdxl", *arguments, "--max_train_steps", 2)
    assert first.returncode == 0, first.stderr
    plan = json.loads((tmp_path / "checkpoint-2" / "trainer_state.json").read_text())["memory_plan"]
    assert plan[:2] == [2, 0]
    again = run_script("train_lora_sdxl", *arguments, "--resume_from_checkpoint", "latest")
    assert again.returncode == 0, again.stderr
    plan_again = json.loads((tmp_path / "checkpoint-4" / "trainer_state.json").read_text())["memory_plan"]
    assert plan_again == plan


def test_a_budget_that_is_too_small_is_an_error(run_script, train_arguments, tmp_path):
    arguments = [*train_arguments, "--mixed_precision", "fp16", "--vram_budget_gib", "500"]
    finished = run_script("train_lora_sdxl", *arguments, "--output_dir", tmp_path)
    assert finished.returncode == 2
    assert "--vram_budget_gib is 500" in finished.stderr
