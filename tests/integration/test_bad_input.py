"""What a user may get wrong: one line that says what and the remedy, before any weights are loaded."""

import importlib.util
import json
import os
import re
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from rasengan import UserError, training_settings
from rasengan.pairs import PairDrawer
from rasengan.pipeline import Pipeline
from rasengan.sources import COMPONENTS


def link_base(tiny_base: Path, folder: Path, without: str = "") -> Path:
    """Make a base of links to the tiny one's components."""
    folder.mkdir()
    for name in COMPONENTS:
        if name != without:
            (folder / name).symlink_to(tiny_base / name)
    return folder


def change_unet(tiny_base: Path, folder: Path, **changes) -> Path:
    """Make a base whose UNet's configuration says something else."""
    link_base(tiny_base, folder, without="unet")
    shutil.copytree(tiny_base / "unet", folder / "unet")
    config = json.loads((folder / "unet" / "config.json").read_text())
    (folder / "unet" / "config.json").write_text(json.dumps(config | changes))
    return folder


# --- both scripts ---


@pytest.fixture(params=["train", "draw"])
def start(request):
    """Function that starts either script with further arguments."""
    call = request.getfixturevalue(request.param)
    return (lambda *words: call(*words, "--prompt", "a star")) if request.param == "draw" else call


def test_a_base_that_is_nowhere_is_refused(start, refused, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    refused("neither a folder nor a hub id", start, "--pretrained_model_name_or_path", "/nowhere/sdxl")
    refused(
        "README.md is a file, where the .*convert.py --input .*README.md --base .* --format pipeline",
        start,
        "--pretrained_model_name_or_path",
        Path(__file__).parents[2] / "README.md",
    )
    message = refused("is no path here, and the hub", start, "--pretrained_model_name_or_path", "nobody/sdxl")
    assert re.search(r"[^.]\. Correct the name", message)


def test_a_missing_component_folder_is_refused(start, refused, tiny_base, tmp_path):
    base = link_base(tiny_base, tmp_path / "base", without="text_encoder_2")
    pattern = r"text_encoder_2 holds no text_encoder_2.*--pretrained_text_encoder_2_name_or_path"
    refused(pattern, start, "--pretrained_model_name_or_path", base)


def test_another_familys_unet_is_refused_by_its_name(start, refused, tiny_base, tmp_path):
    base = change_unet(tiny_base, tmp_path / "base", cross_attention_dim=768, addition_embed_type=None)
    pattern = r"UNet of Stable Diffusion 1\.x.*--pretrained_unet_name_or_path"
    refused(pattern, start, "--pretrained_unet_name_or_path", base / "unet")


def test_the_refiner_is_refused_by_its_name(start, refused, tiny_base, tmp_path):
    base = change_unet(tiny_base, tmp_path / "base", cross_attention_dim=1280)
    refused("as the SDXL refiner does", start, "--pretrained_model_name_or_path", base)


def test_an_inpainting_unet_is_refused(start, refused, tiny_base, tmp_path):
    base = change_unet(tiny_base, tmp_path / "base", in_channels=9)
    refused("9 input channels", start, "--pretrained_model_name_or_path", base)


def test_a_text_encoder_in_place_of_the_unet_is_refused(start, refused, tiny_base):
    pattern = r"holds a CLIPTextModel, not SDXL's unet"
    refused(pattern, start, "--pretrained_unet_name_or_path", tiny_base / "text_encoder")


def test_weights_that_are_no_safetensors_are_refused(start, refused, tiny_base, tmp_path):
    base = link_base(tiny_base, tmp_path / "base", without="vae")
    shutil.copytree(tiny_base / "vae", base / "vae")
    (base / "vae" / "diffusion_pytorch_model.safetensors").rename(base / "vae" / "diffusion_pytorch_model.bin")
    refused("Save it as safetensors", start, "--pretrained_model_name_or_path", base)
    message = refused("Drop --variant", start, "--variant", "fp16")
    assert "diffusion_pytorch_model.safetensors" in message or "model.safetensors" in message


def test_an_output_folder_below_a_file_is_refused(train_script, infer_script, train_arguments, refused, tmp_path):
    (tmp_path / "file").write_text("")
    path = str(tmp_path / "file" / "run")
    for script, words in ((train_script, train_arguments), (infer_script, ["--prompt", "a star"])):
        refused(r"--output_dir .* cannot be", script.main, script.parse_args([*words, "--output_dir", path]))


@pytest.mark.skipif(torch.cuda.is_available(), reason="where there is a GPU, fp16 runs")
def test_fp16_on_a_cpu_is_refused_with_the_remedy(start, refused):
    refused("on a CPU. Use --mixed_precision no", start, "--mixed_precision", "fp16")


@pytest.mark.parametrize(
    ("name", "words", "said"),
    [
        ("train", ["--lr_scheduler", "sine"], "invalid choice: 'sine'"),
        ("train", ["--rank", "0"], "argument --rank: '0' is not a whole number from 1 to 4096"),
        ("train", ["--learning_rate", "nan"], "argument --learning_rate: 'nan' is not"),
        ("train", ["--seed", "4294967296"], "argument --seed: '4294967296' is not"),
        ("train", ["--lora_rank", "4"], "unrecognized arguments: --lora_rank. --help"),
        ("train", ["--train_data_dir", ""], "argument --train_data_dir: it is empty"),
        ("train", ["--output_dir", " "], "argument --output_dir: it is empty"),
        ("infer", ["--scheduler", "k_euler"], "invalid choice: 'k_euler'"),
        ("infer", ["--lora_weights", ""], "argument --lora_weights: it is empty"),
        ("infer", ["--lora_scale", "nan"], "argument --lora_scale: 'nan' is not a number"),
        ("infer", ["--lora_scale", "-1,x"], "argument --lora_scale: '-1,x' is not a number, nor several"),
        ("infer", ["--lora_alpha", "0"], "argument --lora_alpha: '0' is not a number of"),
        ("infer", ["--lora_alpha", "inf"], "argument --lora_alpha: 'inf' is not a number of"),
        ("infer", ["--guidance_scale", "nan"], "argument --guidance_scale: 'nan' is not a number"),
        ("infer", ["--height", "0"], "argument --height: '0' is not a whole number of 8 or more"),
        ("infer", ["--seed", "-1"], "argument --seed: '-1' is not a whole number from 0 to"),
        ("infer", ["--seed", "9223372036854775808"], "argument --seed: '9223372036854775808' is not a whole number"),
    ],
)
def test_an_unknown_flag_or_value_is_refused_in_one_line(name, words, said, request):
    script = request.getfixturevalue(f"{name}_script")
    with pytest.raises(UserError) as caught:
        script.parse_args(words)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_refused_run_leaves_no_folder_behind(train, draw, infer_script, refused, tiny_base, tmp_path):
    new = tmp_path / "a" / "run"
    cache = ["--conditioning_cache_dir", tmp_path / "cache"]
    (tmp_path / "empty").mkdir()
    for words in (["--train_data_dir", tmp_path / "empty"], ["--pretrained_unet_name_or_path", tiny_base / "vae"]):
        refused("holds", train, *words, *cache, output_dir=new)
    words = ["--pretrained_model_name_or_path", str(tiny_base / "vae"), "--prompt", "a star", "--output_dir", str(new)]
    refused("holds no", infer_script.main, infer_script.parse_args(words))
    assert not new.parent.exists()


def test_a_users_error_is_one_line_and_exit_code_2_without_a_traceback(run_script, tmp_path):
    calls = [
        ("train_lora_sdxl", "--resolution", "100", "--train_data_dir", "x", "--output_dir", tmp_path),
        ("infer", "--prompt", "x", "--output_dir", tmp_path),
    ]
    with ThreadPoolExecutor() as pool:  # each takes ten seconds to import what it needs
        for finished in pool.map(lambda call: run_script(*call), calls):
            assert finished.returncode == 2
            lines = [line for line in finished.stderr.splitlines() if "PyTorch finds no GPU" not in line]
            assert [line.startswith("error: ") for line in lines] == [True]
            assert finished.stdout == ""


def test_a_refused_run_leaves_no_folder(train_script, infer_script, train_arguments, refused, tmp_path):
    where = ["--output_dir", str(tmp_path / "new" / "run")]
    targets = ["--max_train_samples", "2", "--lora_target_modules", "to_w"]
    refused("matches no module", train_script.main, train_script.parse_args([*train_arguments, *targets, *where]))
    base = ["--pretrained_model_name_or_path", str(tmp_path / "none"), "--prompt", "a star"]
    refused("neither a folder nor", infer_script.main, infer_script.parse_args([*base, *where]))
    assert list(tmp_path.iterdir()) == []


# --- training ---


def test_a_run_without_pictures_is_refused(train, refused):
    refused("There is no data: give --dataset_name, or --train_data_dir", train, without=("--train_data_dir",))


def test_a_folder_that_is_missing_or_empty_is_refused(train, refused, tmp_path):
    refused(r"--train_data_dir .*missing is no folder", train, "--train_data_dir", tmp_path / "missing")
    (tmp_path / "empty").mkdir()
    refused(r"--train_data_dir .*empty", train, "--train_data_dir", tmp_path / "empty")


def test_a_folder_without_pictures_is_refused(train, refused, tmp_path):
    (tmp_path / "note.txt").write_text("no picture")
    refused("holds no pictures", train, "--train_data_dir", tmp_path)
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.png", "text": "a"}')
    refused("holds no pictures", train, "--train_data_dir", tmp_path)


@pytest.mark.skipif(torch.cuda.is_available(), reason="where there is a GPU, there is a plan")
def test_a_plan_without_a_card_is_refused(train, refused):
    refused("--plan_only needs a CUDA GPU", train, "--plan_only")


def test_empty_or_wrong_words_are_refused_by_their_flag(train, refused):
    refused("--lora_target_modules has an empty name", train, "--lora_target_modules", "")
    rules = ["--lr_scheduler", "piecewise_constant", "--lr_step_rules", "a:b"]
    refused("piecewise_constant with --lr_step_rules a:b cannot be used so", train, *rules)


def test_an_output_folder_among_the_pictures_is_refused(train, refused, picture_set, tmp_path):
    (tmp_path / "link").symlink_to(picture_set)
    refused("--output_dir .*run lies in --train_data_dir", train, output_dir=tmp_path / "link" / "run")
    for flag in ("--conditioning_cache_dir", "--cache_dir"):
        refused(f"{flag} .*run lies in --train_data_dir", train, flag, tmp_path / "link" / "run")
    logs = os.path.relpath(picture_set / "logs", tmp_path / "run")
    refused("--logging_dir .*logs lies in --train_data_dir", train, "--logging_dir", logs, output_dir=tmp_path / "run")
    assert not (picture_set / "run").exists()


@pytest.mark.parametrize(
    "name", ["checkpoint-7", "peft", "best/logs", "evaluation", "logs/../peft", ".", ".saving-3", "README.md"]
)
def test_a_log_folder_with_the_name_of_something_else_is_refused(train, refused, name):
    refused(f"--logging_dir {name} is for other files in --output_dir", train, "--logging_dir", name)


def test_a_cache_with_the_name_of_something_else_is_refused(train, refused, tmp_path):
    place = ["--conditioning_cache_dir", tmp_path / "checkpoint-1"]
    said = "--conditioning_cache_dir .*checkpoint-1 is for other files in --output_dir"
    refused(said, train, *place, output_dir=tmp_path)


def test_a_cache_in_the_output_folder_that_is_a_home_is_none_of_its_own_files(train_script, train_arguments, tmp_path):
    words = [*train_arguments, "--output_dir", str(tmp_path), "--conditioning_cache_dir", str(tmp_path / ".cache/x")]
    training_settings.check(vars(train_script.parse_args(words)), os.environ)
    words = [*train_arguments, "--output_dir", "elsewhere", "--conditioning_cache_dir", str(tmp_path / "cache")]
    training_settings.check(vars(train_script.parse_args(words)), os.environ)


@pytest.mark.parametrize(
    ("flag", "value"),
    [("--rank", 10**8), ("--lora_alpha", 1e300), ("--learning_rate", 1e300), ("--validation_inference_steps", 10**15)],
)
def test_a_rank_or_alpha_beyond_all_use_is_refused(train, refused, flag, value):
    refused(rf"{flag}.* from .* to ", train, flag, value)


def test_a_size_that_is_no_multiple_of_8_is_refused(train, draw, refused):
    refused(r"--resolution is 100\. Give a multiple of 8, such as 96", train, "--resolution", 100)
    refused(r"--height is 100\. Give a multiple of 8, such as 96", draw, "--prompt", "a star", "--height", 100)


def test_a_target_that_matches_nothing_is_refused(train, refused):
    refused("--lora_target_modules to_w matches no module", train, "--lora_target_modules", "to_q", "to_w")
    refused("conv1, a Conv2d", train, "--lora_target_modules", "conv1")


def test_a_tracker_that_is_not_installed_is_refused(train, refused):
    refused(
        "--report_to blackboard is not installed here; installed are: .*tensorboard",
        train,
        "--report_to",
        "blackboard",
    )


def test_a_push_without_network_or_login_is_refused(train, refused, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    refused(r"--push_to_hub: .*hf auth login", train, "--push_to_hub", "--hub_model_id", "me/lora")


def test_drawing_needs_a_prompt_and_comparing_needs_an_adapter(draw, refused, tmp_path):
    refused("give --prompt or --prompt_file", draw)
    refused("need an adapter: give --lora_weights", draw, "--prompt", "a star", "--compare")
    refused("cannot be read", draw, "--prompt_file", tmp_path / "none.txt")
    (tmp_path / "blank.txt").write_text("\n  \n")
    refused("blank.txt holds no prompt. Write one a line", draw, "--prompt_file", tmp_path / "blank.txt")
    refused("'-3' is not a number of 0 or more", draw, "--prompt", "a star", "--guidance_scale", -3)


def test_an_alpha_or_scale_that_cannot_act_is_refused(draw, refused, trained):
    for flag in ("--lora_alpha", "--lora_scale"):
        refused("act on an adapter: give --lora_weights", draw, "--prompt", "a star", flag, 1)
    adapter = ["--lora_weights", trained, "--prompt", "a star"]
    refused("--lora_alpha is 16, but .* says 32", draw, *adapter, "--lora_alpha", 16)
    refused("has 1000 timesteps. Give fewer", draw, *adapter, "--num_inference_steps", 1001)


def test_a_negative_prompt_that_cannot_act_is_refused(draw, refused):
    words = ["--prompt", "a star", "--negative_prompt", "a circle", "--guidance_scale", 1]
    refused("--negative_prompt does nothing at --guidance_scale 1. Drop", draw, *words)


def test_a_base_that_leaves_its_defaults_unsaid_draws(draw, tiny_base, tmp_path):
    base = change_unet(tiny_base, tmp_path / "base", sample_size=None)
    config = json.loads((tiny_base / "scheduler" / "scheduler_config.json").read_text())
    del config["num_train_timesteps"]
    (base / "scheduler").unlink()
    (base / "scheduler").mkdir()
    (base / "scheduler" / "scheduler_config.json").write_text(json.dumps(config))
    assert draw("--pretrained_model_name_or_path", base, "--prompt", "a star")


def test_a_scheduler_without_a_target_is_refused(train, draw, refused, tiny_base, tmp_path):
    base = link_base(tiny_base, tmp_path / "base", without="scheduler")
    config = json.loads((tiny_base / "scheduler" / "scheduler_config.json").read_text())
    (base / "scheduler").mkdir()
    (base / "scheduler" / "scheduler_config.json").write_text(json.dumps(config | {"prediction_type": "sample"}))
    few, pattern = ["--pretrained_model_name_or_path", base], "'sample'.*--prediction_type epsilon or v_prediction"
    refused(pattern, train, *few, "--max_train_samples", 2)
    refused(pattern, draw, *few, "--prompt", "a star")
    folders = {name: base / name for name in COMPONENTS}
    with pytest.raises(UserError, match=pattern):
        PairDrawer(Pipeline(folders, None, torch.device("cpu"), torch.float32))


def test_what_the_machine_does_not_have_is_refused_first(train, refused, monkeypatch):
    refused("--enable_npu_flash_attention needs an Ascend NPU", train, "--enable_npu_flash_attention")
    refused("--enable_xformers_memory_efficient_attention", train, "--enable_xformers_memory_efficient_attention")
    both = ["--deterministic", "--enable_xformers_memory_efficient_attention"]
    refused("Drop one of the flags", train, *both)
    find_spec = importlib.util.find_spec
    missing = lambda name, *rest: None if name == "bitsandbytes" else find_spec(name, *rest)  # noqa: E731
    monkeypatch.setattr(importlib.util, "find_spec", missing)
    refused("--use_8bit_adam needs bitsandbytes.*--no-use_8bit_adam", train, "--train_data_dir", "/nowhere")
    refused("--base_quantization nf4 needs bitsandbytes", train, "--no-use_8bit_adam", "--base_quantization", "nf4")


def test_a_launchers_wish_that_would_not_come_true_is_refused(train, refused, monkeypatch):
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR")
    refused("dynamo_backend to INDUCTOR", train)
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "NO")
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    refused("FSDP", train)
