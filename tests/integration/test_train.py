"""What a run leaves behind, and which runs are equal."""

import json
import os
import re
import subprocess
import sys
import weakref

import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors import safe_open
from safetensors.torch import load_file

from rasengan import components, lora
from rasengan.sources import COMPONENT_FLAGS


ADAPTER = "pytorch_lora_weights.safetensors"
PROMPT = ["--validation_prompt", "a red star", "--num_validation_images", "1", "--validation_inference_steps", "2"]


def bits(output_dir) -> dict[str, bytes]:
    """Return the bytes of each of the adapter's matrices."""
    return {key: tensor.numpy().tobytes() for key, tensor in load_file(output_dir / ADAPTER).items()}


def assert_close_adapters(one, other, atol):
    one, other = load_file(one / ADAPTER), load_file(other / ADAPTER)
    assert one.keys() == other.keys()
    for key, tensor in one.items():
        torch.testing.assert_close(tensor, other[key], rtol=0, atol=atol, msg=lambda text, key=key: f"{key}: {text}")


# --- what a run leaves ---


def test_a_run_leaves_what_it_promises_and_nothing_else(trained):
    expected = {ADAPTER, "peft", "checkpoint-2", "checkpoint-4", "logs", "args.json", "README.md"}
    assert {path.name for path in trained.iterdir()} == expected
    assert {path.name for path in (trained / "peft").iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
    inside = [path for path in trained.rglob("*") if "checkpoint" in path.name]
    assert sorted(path.name for path in inside) == ["checkpoint-2", "checkpoint-4"]
    for step in (2, 4):
        folder = trained / f"checkpoint-{step}"
        assert json.loads((folder / "trainer_state.json").read_text())["global_step"] == step
        assert (folder / ADAPTER).is_file()
    assert bits(trained / "checkpoint-4") == bits(trained) != bits(trained / "checkpoint-2")


def test_a_validation_prompt_adds_a_grid_and_changes_no_weight(train, trained):
    output_dir = train(*PROMPT)
    assert {path.name for path in output_dir.iterdir()} - {path.name for path in trained.iterdir()} == {
        "validation.png"
    }
    assert bits(output_dir) == bits(trained)
    card = (output_dir / "README.md").read_text()
    assert "(validation.png)" in card
    assert "a red star" in card


def test_the_diffusers_file_holds_fp32_lora_keys_of_the_unet_and_its_alpha(trained):
    with safe_open(trained / ADAPTER, framework="pt") as file:
        keys, metadata = list(file.keys()), file.metadata()
    assert len(keys) == 2 * 136
    assert all(key.startswith("unet.") for key in keys)
    assert all(key.endswith((".lora.down.weight", ".lora.up.weight")) for key in keys)
    settings = json.loads(metadata["lora_adapter_metadata"])
    assert (settings["unet.r"], settings["unet.lora_alpha"]) == (16, 32)
    weights = load_file(trained / ADAPTER)
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}
    assert all(tensor.abs().max() > 0 for tensor in weights.values())


def test_the_peft_file_holds_the_same_weights_under_base_model(trained):
    weights = load_file(trained / "peft" / "adapter_model.safetensors")
    assert all(key.startswith("base_model.model.") for key in weights)
    names = {".lora_A.weight": ".lora.down.weight", ".lora_B.weight": ".lora.up.weight"}
    renamed = {}
    for key, tensor in weights.items():
        for old, new in names.items():
            key = key.replace(old, new)
        renamed[f"unet.{key.removeprefix('base_model.model.')}"] = tensor
    published = load_file(trained / ADAPTER)
    assert renamed.keys() == published.keys()
    assert all(torch.equal(tensor, published[key]) for key, tensor in renamed.items())


def test_no_file_of_a_run_holds_the_hub_token(train):
    output_dir = train("--hub_token", "hf_a_secret", "--max_train_samples", 4, *PROMPT)
    files = [path for path in output_dir.rglob("*") if path.is_file()]
    assert {"args.json", "README.md", "trainer_state.json", "hparams.yml"} <= {path.name for path in files}
    assert [path for path in files if b"hf_a_secret" in path.read_bytes()] == []


def test_the_settings_and_the_card_tell_the_recipe(trained):
    settings = json.loads((trained / "args.json").read_text())
    shown = {name: settings[name] for name in ("rank", "lora_alpha", "resolution", "learning_rate", "seed")}
    assert shown == {"rank": 16, "lora_alpha": 32, "resolution": 64, "learning_rate": 1e-3, "seed": 0}
    card = (trained / "README.md").read_text()
    assert "| `rank` | 16 |" in card
    assert "| `optimizer_steps` | 4 |" in card
    assert str(trained.parent) not in card


# --- which runs are equal ---


def test_equal_runs_in_two_processes_write_identical_files(train, run_script, train_arguments, tmp_path):
    # PEFT keeps the target modules as a set: the other process has a hash seed that orders it otherwise.
    def order(hash_seed: int) -> str:
        code = f"print(list(set({list(lora.UNET_TARGETS)})))"
        env = os.environ | {"PYTHONHASHSEED": str(hash_seed)}
        return subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True).stdout.strip()

    here = str(list(set(lora.UNET_TARGETS)))
    hash_seed = next(number for number in range(100) if order(number) not in {here, ""})
    env = {"PYTHONHASHSEED": str(hash_seed)}
    finished = run_script("train_lora_sdxl", *train_arguments, "--output_dir", tmp_path, env=env)
    assert finished.returncode == 0, finished.stderr
    output_dir = train()
    names = (ADAPTER, "peft/adapter_config.json", "peft/adapter_model.safetensors", f"checkpoint-2/{ADAPTER}")
    assert [name for name in names if (tmp_path / name).read_bytes() != (output_dir / name).read_bytes()] == []


def test_another_seed_gives_another_adapter(train, trained):
    assert bits(train("--seed", 1)) != bits(trained)


def test_components_given_one_by_one_train_the_same_adapter(train, trained, tiny_base, tmp_path):
    flags = []
    for name, flag in COMPONENT_FLAGS.items():
        (tmp_path / f"my {name}").symlink_to(tiny_base / name)
        flags += [flag, tmp_path / f"my {name}"]
    output_dir = train(*flags, without=("--pretrained_model_name_or_path",))
    assert bits(output_dir) == bits(trained)


def test_a_config_file_equals_the_flags_and_a_flag_wins_over_it(train, trained, tmp_path):
    config = tmp_path / "run.yaml"
    config.write_text("resolution: 64\ntrain_batch_size: 2\nlearning_rate: 1e-3\nseed: 7\nmax_train_steps: 4\n")
    without = ("--resolution", "--train_batch_size", "--learning_rate", "--max_train_steps")
    output_dir = train("--config", config, without=without)  # which leaves --seed 0
    assert bits(output_dir) == bits(trained)
    settings = json.loads((output_dir / "args.json").read_text())
    assert settings.items() >= {"seed": 0, "max_train_steps": 4, "learning_rate": 1e-3}.items()


def test_two_micro_batches_of_one_equal_a_batch_of_two(train):
    # SGD would agree to rounding; AdamW divides by a gradient's own size, which enlarges the rounding of small ones.
    plain = ["--no-use_8bit_adam", "--adam_epsilon", "1e-4", "--report_to", "none", "--max_train_steps", 3]
    whole = train(*plain)
    halved = train(*plain, "--train_batch_size", 1, "--gradient_accumulation_steps", 2)
    assert_close_adapters(whole, halved, atol=1e-6)


def test_encoding_in_the_loop_equals_the_cache(train):
    # The last bits of an encoding depend on the size of its batch.
    plain = ["--no-use_8bit_adam", "--adam_epsilon", "1e-4", "--report_to", "none", "--max_train_steps", 3]
    assert_close_adapters(train(*plain), train(*plain, "--no-cache_conditioning"), atol=1e-5)


def test_buckets_are_split_into_parts_of_one_shape_and_cached_as_in_the_loop(train, caplog):
    # 11 pictures of several shapes, 5 in a step: most steps mix them.
    plain = ["--no-use_8bit_adam", "--adam_epsilon", "1e-4", "--report_to", "none", "--max_train_steps", 4]
    plain += ["--aspect_ratio_buckets", "--bucket_step_px", 8, "--max_train_samples", 11]
    whole = train(*plain, "--train_batch_size", 5)
    assert caplog.text.count("Steps run without a CUDA graph: the device is cpu") == 1
    counts = re.search(r"by the size of their crop: (.*)", caplog.text).group(1)
    assert counts.count(" px ") > 3
    halved = train(*plain, "--train_batch_size", 1, "--gradient_accumulation_steps", 5)
    assert_close_adapters(whole, halved, atol=1e-6)
    assert_close_adapters(whole, train(*plain, "--train_batch_size", 5, "--no-cache_conditioning"), atol=1e-5)


def test_a_second_run_with_the_same_cache_encodes_nothing(train, train_arguments, trained, loaded):
    cache = train_arguments[train_arguments.index("--conditioning_cache_dir") + 1]
    shards = {path: path.stat().st_mtime_ns for path in sorted(trained.joinpath(cache).rglob("*.safetensors"))}
    assert len(shards) >= 2
    output_dir = train()
    assert {path: path.stat().st_mtime_ns for path in shards} == shards
    assert sorted(loaded) == ["scheduler", "tokenizer", "unet"]
    assert bits(output_dir) == bits(trained)


@pytest.mark.parametrize("limit", [1, 2])
def test_the_limit_keeps_the_newest_checkpoints(train, limit):
    output_dir = train(
        *("--max_train_steps", 3, "--checkpointing_steps", 1, "--checkpoints_total_limit", limit),
        *("--max_train_samples", 4, "--report_to", "none"),
    )
    kept = sorted(path.name for path in output_dir.glob("checkpoint-*"))
    assert kept == ["checkpoint-1", "checkpoint-2", "checkpoint-3"][-limit:]


# --- memory, and what is somebody else's ---


def test_the_encoders_have_left_memory_when_the_unet_comes(train, monkeypatch, tmp_path):
    alive, gone, load = {}, {}, components.load

    def watch(component, *arguments, **options):
        if component == "unet":
            gone.update({name: reference() is None for name, reference in alive.items()})
        model = load(component, *arguments, **options)
        if component in components.MODELS:
            alive[component] = weakref.ref(model)
        return model

    monkeypatch.setattr(components, "load", watch)
    few = ["--max_train_samples", 4, "--max_train_steps", 1, "--report_to", "none"]
    train(*few, "--conditioning_cache_dir", tmp_path)
    assert gone == {"vae": True, "text_encoder": True, "text_encoder_2": True}
    alive.clear()
    gone.clear()
    train(*few, "--no-cache_conditioning")
    assert gone == {"vae": False, "text_encoder": False, "text_encoder_2": False}


def test_the_unet_is_asked_for_in_half_precision(train, monkeypatch):
    seen, from_pretrained = [], UNet2DConditionModel.from_pretrained.__func__

    def note(cls, *arguments, **options):
        seen.append((options["torch_dtype"], options["low_cpu_mem_usage"]))
        return from_pretrained(cls, *arguments, **options)

    monkeypatch.setattr(UNet2DConditionModel, "from_pretrained", classmethod(note))
    train("--mixed_precision", "bf16", "--max_train_samples", 4, "--max_train_steps", 1, "--report_to", "none")
    assert seen == [(torch.bfloat16, True)]


def test_a_readme_of_somebody_else_stays(train, caplog, tmp_path):
    few = ["--max_train_samples", 4, "--report_to", "none", "--resume_from_checkpoint", "latest"]
    (tmp_path / "README.md").write_text("# My notes\n")
    train(*few, "--max_train_steps", 1, output_dir=tmp_path)
    assert (tmp_path / "README.md").read_text() == "# My notes\n"
    assert "README.md is no model card of this program: it stays" in caplog.text
    (tmp_path / "README.md").unlink()
    for steps in (2, 3):
        train(*few, "--max_train_steps", steps, output_dir=tmp_path)
        assert f"| `optimizer_steps` | {steps} |" in (tmp_path / "README.md").read_text()


def test_a_home_in_a_path_is_the_users(train_script, infer_script, save_script, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", "/home/me")
    names = "pretrained_model_name_or_path cache_dir dataset_name train_data_dir conditioning_cache_dir output_dir"
    names += " config resume_from_checkpoint " + " ".join(f.removeprefix("--") for f in COMPONENT_FLAGS.values())
    config = tmp_path / "run.yaml"
    for name in set(names.split()) - {"config"}:
        config.write_text(f"{name}: ~/there\n")
        for words in ([f"--{name}", "~/there"], ["--config", str(config)]):
            assert getattr(train_script.parse_args(words), name) == "/home/me/there", name
    (tmp_path / "mine.yaml").write_text("rank: 4\n")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert train_script.parse_args(["--config", "~/mine.yaml"]).rank == 4
    assert infer_script.parse_args(["--lora_weights", "~/there"]).lora_weights == [f"{tmp_path}/there"]
    for name in (
        "save_merged",
        "init_image",
        "conditioning_cache_dir",
        "prompt_file",
        "output_dir",
        "pretrained_unet_name_or_path",
        "cache_dir",
    ):
        assert getattr(infer_script.parse_args([f"--{name}", "~/there"]), name) == f"{tmp_path}/there", name
    saved = save_script.parse_args(["~/base", "~/there", "--cache_dir", "~/cache"])
    assert (saved.base, saved.directory, saved.cache_dir) == tuple(
        f"{tmp_path}/{n}" for n in ("base", "there", "cache")
    )
