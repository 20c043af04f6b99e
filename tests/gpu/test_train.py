import json
import os
import re
import subprocess
import sys
from pathlib import Path

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


def test_a_deterministic_run_that_was_resumed_equals_the_whole_bit_for_bit(run_script, train_arguments, tmp_path):
    arguments = [*train_arguments, "--mixed_precision", "fp16", "--deterministic", "--checkpointing_steps", 12]
    whole, halved = tmp_path / "whole", tmp_path / "halved"
    for output_dir, steps in ((whole, 24), (halved, 12), (halved, 24)):
        flags = ["--max_train_steps", steps, "--output_dir", output_dir, "--resume_from_checkpoint", "latest"]
        finished = run_script("train_lora_sdxl", *arguments, *flags)
        assert finished.returncode == 0, finished.stderr
    name = "pytorch_lora_weights.safetensors"
    assert (whole / name).read_bytes() == (halved / name).read_bytes()


def test_buckets_have_a_graph_each_and_train_what_eager_steps_do(run_script, train_arguments, tmp_path):
    arguments = [*train_arguments, "--aspect_ratio_buckets", "--bucket_step_px", 16, "--max_train_steps", 40]
    arguments += ["--mixed_precision", "no", "--deterministic", "--checkpointing_steps", 40, "--train_batch_size", 4]
    adapters = []
    for name, flags in (("graph", []), ("eager", ["--no-cuda_graph"])):
        finished = run_script("train_lora_sdxl", *arguments, *flags, "--output_dir", tmp_path / name)
        assert finished.returncode == 0, finished.stderr
        assert finished.stderr.split("by the size of their crop: ")[1].splitlines()[0].count(" px ") > 2
        adapters.append((tmp_path / name / "pytorch_lora_weights.safetensors").read_bytes())
    assert adapters[0] == adapters[1]


def test_two_processes_share_one_gpu_through_gloo(run_script, train_arguments, tmp_path):
    launch = ["--multi_gpu", "--num_processes", "2", "--mixed_precision", "fp16"]
    one = {"CUDA_VISIBLE_DEVICES": os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]}
    finished = run_script("train_lora_sdxl", *train_arguments, "--output_dir", tmp_path, launch=launch, env=one)
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


@pytest.mark.parametrize("flags", [[], ["--aspect_ratio_buckets", "--bucket_step_px", 16]], ids=["square", "buckets"])
def test_a_plan_that_encodes_nothing_is_that_of_a_run_which_does(flags, run_script, train_arguments, tmp_path):
    cache = tmp_path / "cache"
    arguments = [*train_arguments, "--mixed_precision", "fp16", "--vram_budget_gib", 2, "--resolution", 256, *flags]
    arguments += ["--train_batch_size", 4, "--max_train_steps", 1, "--conditioning_cache_dir", cache]
    tables = []
    for output_dir, more in (("planned", ["--plan_only"]), ("encodes", []), ("finds", [])):
        finished = run_script("train_lora_sdxl", *arguments, *more, "--output_dir", tmp_path / output_dir)
        assert finished.returncode == 0, finished.stderr
        filled = [path for path in cache.rglob("*") if not path.name.startswith("pictures-")]  # what was looked at
        assert bool(filled) == (output_dir != "planned")
        tables.append(re.search(r"Memory plan: .*\n(?:  .* GiB.*\n)+", finished.stdout)[0].splitlines())
    sizes = [{line[:28].strip(): float(line[28:36]) for line in table[1:]} for table in tables]
    assert "conditioning cache" in sizes[0]
    for table, found in zip(tables[1:], sizes[1:], strict=True):
        assert table[0] == tables[0][0]
        assert found == pytest.approx(sizes[0], abs=0.015)  # two digits are shown
    assert sizes[0]["predicted peak"] > 0.05


def test_a_budget_that_the_card_does_not_have_is_an_error(run_script, train_arguments, tmp_path):
    arguments = [*train_arguments, "--mixed_precision", "fp16", "--vram_budget_gib", "500"]
    finished = run_script("train_lora_sdxl", *arguments, "--output_dir", tmp_path)
    assert finished.returncode == 2
    assert "--vram_budget_gib is 500" in finished.stderr


@pytest.mark.parametrize("quantization", ["none", "auto", "nf4"])
def test_a_budget_below_the_weights_is_an_error_with_a_figure_that_suffices(
    quantization, run_script, train_arguments, tmp_path
):
    # Of this rank the LoRA alone, fp32, is more than the least budget that can be given.
    targets = ["to_k", "to_q", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2"]
    arguments = [*train_arguments, "--mixed_precision", "fp16", "--rank", 4096, "--lora_target_modules", *targets]
    arguments += ["--base_quantization", quantization, "--output_dir", tmp_path, "--plan_only", "--vram_budget_gib"]
    finished = run_script("train_lora_sdxl", *arguments, 0.5)
    assert finished.returncode == 2, finished.stderr
    assert "Traceback" not in finished.stderr
    (said,) = re.findall("^error: .*", finished.stderr, re.MULTILINE)
    needed_gib = float(re.search("The smallest plan, .* needs at least (.*) GiB, but the budget is 0.50", said)[1])
    assert needed_gib > 1  # the LoRA and its gradient
    assert ("give --base_quantization nf4" in said) == (quantization == "none")
    assert ("the base is quantized to nf4 now" in finished.stderr) == (quantization == "auto")
    finished = run_script("train_lora_sdxl", *arguments, needed_gib)
    assert finished.returncode == 0, finished.stderr
    assert "Memory plan: " in finished.stdout


# Runs a script, and after some optimizer steps leaves the card no more than what is in use.
FILL_THE_CARD = """
import runpy, sys, torch
from torch.optim.optimizer import register_optimizer_step_post_hook

steps = []

def fill(*_):
    steps.append(1)
    if len(steps) == 3:
        torch.cuda.empty_cache()
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(torch.cuda.memory_allocated() / total)

register_optimizer_step_post_hook(fill)
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.parametrize("how", ["eager", "graph"])
def test_a_card_that_fills_up_ends_with_a_checkpoint_that_can_be_resumed(how, run_script, train_arguments, tmp_path):
    output_dir, filler = tmp_path / "run", tmp_path / "fill.py"
    filler.write_text(FILL_THE_CARD)
    arguments = [*map(str, train_arguments), "--mixed_precision", "no", "--checkpointing_steps", "1000"]
    arguments += ["--max_train_steps", "12", "--output_dir", str(output_dir)]
    if how == "eager":
        arguments += ["--no-cuda_graph"]
    else:  # a graph takes no more memory once it is captured: it is captured anew after the pictures of an epoch
        arguments += ["--max_train_samples", "8", "--validation_prompt", "a red star"]
        arguments += ["--validation_inference_steps", "1", "--num_validation_images", "1"]
    script = Path(__file__).parents[2] / "scripts" / "train_lora_sdxl.py"
    finished = subprocess.run(
        [sys.executable, filler, script, *arguments], capture_output=True, text=True, timeout=300
    )
    assert finished.returncode == 2, finished.stderr
    assert "error: Out of memory in step" in finished.stderr
    assert re.search("as measured, .* blocks recomputed take|The smallest plan, one picture .* needs", finished.stderr)
    assert "Traceback" not in finished.stderr
    (saved,) = output_dir.glob("checkpoint-*")
    assert f"{saved.name} is where to resume" in finished.stderr
    step = json.loads((saved / "trainer_state.json").read_text())["global_step"]
    assert step >= 3
    resumed = run_script("train_lora_sdxl", *arguments, "--resume_from_checkpoint", "latest")
    assert resumed.returncode == 0, resumed.stderr
    assert (output_dir / "pytorch_lora_weights.safetensors").is_file()


@pytest.mark.parametrize(
    "flags", [["--use_ema"], ["--optimizer", "prodigy"], ["--base_quantization", "auto"]], ids=" ".join
)
def test_options_of_the_update_work_beside_a_graph(flags, run_script, train_arguments, tmp_path):
    arguments = [*train_arguments, "--mixed_precision", "fp16", *flags, "--max_train_steps", 16]
    finished = run_script("train_lora_sdxl", *arguments, "--output_dir", tmp_path)
    assert finished.returncode == 0, finished.stderr
    weights = load_file(tmp_path / "pytorch_lora_weights.safetensors")
    assert any(tensor.abs().max() > 0 for name, tensor in weights.items() if "lora.up" in name)


def test_a_base_that_the_card_has_no_room_for_is_quantized_where_that_is_allowed(train_arguments, tmp_path):
    # The tiny base fits: weights are kept from the card, until they are quantized or always.
    filler = tmp_path / "refuse.py"
    filler.write_text(
        "import runpy, sys, torch\n"
        "from rasengan import lora\n"
        "stack = lora.stack_weights\n"
        "def refuse(unet, device):\n"
        "    if sys.argv[-1] == 'nf4' or not getattr(unet, 'is_loaded_in_4bit', False):\n"
        "        raise torch.OutOfMemoryError\n"
        "    stack(unet, device)\n"
        "lora.stack_weights = refuse\n"
        "sys.argv = sys.argv[1:]\n"
        "runpy.run_path(sys.argv[0], run_name='__main__')\n"
    )
    script = Path(__file__).parents[2] / "scripts" / "train_lora_sdxl.py"
    arguments = [*map(str, train_arguments), "--mixed_precision", "fp16", "--vram_budget_gib", "2"]
    for allowed, code, size in (
        ("none", 2, "GiB before any quantization"),
        ("auto", 0, "GiB before any quantization"),
        ("nf4", 2, "nf4"),
    ):
        output = ["--output_dir", str(tmp_path / allowed)]
        command = [sys.executable, filler, script, *arguments, *output, "--base_quantization", allowed]
        finished = subprocess.run(command, capture_output=True, text=True, timeout=300)
        assert finished.returncode == code, finished.stderr
        assert "Traceback" not in finished.stderr
        assert re.search(f"The UNet, .*{size}, and its LoRA do not fit into what this card has left", finished.stderr)
    assert json.loads((tmp_path / "auto" / "args.json").read_text())["base_quantization"] == "nf4"
