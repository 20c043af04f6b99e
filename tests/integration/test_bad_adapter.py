"""An adapter that does not fit, or says too little, is never merged in silence."""

import json
import re
import runpy
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from rasengan import UserError, manifest, naming


ADAPTER = "pytorch_lora_weights.safetensors"


def without_alpha(weights, metadata):
    return weights, {}


def with_half_a_pair(weights, metadata):
    return {key: tensor for key, tensor in weights.items() if "attn2.to_k.lora.up" not in key}, metadata


def without_a_module(weights, metadata):
    return {key: tensor for key, tensor in weights.items() if ".mid_block." not in key}, metadata


def of_other_shapes(weights, metadata):
    return {k: torch.cat([v, v], dim=1) if "attn2.to_k.lora.down" in k else v for k, v in weights.items()}, metadata


def of_another_layout(weights, metadata):
    return {key.replace("unet.", "lora_unet_").replace(".", "_"): v for key, v in weights.items()}, metadata


def without_weights(weights, metadata):
    return {}, metadata


def with_numbers_for_targets(weights, metadata):
    config = json.loads(metadata["lora_adapter_metadata"]) | {"unet.target_modules": 5}
    return weights, metadata | {"lora_adapter_metadata": json.dumps(config)}


def of_another_family(weights, metadata):
    return {key.replace("down_blocks.1", "down_blocks.0"): tensor for key, tensor in weights.items()}, metadata


@pytest.mark.parametrize(
    ("change", "pattern"),
    [
        (without_alpha, r"does not say its alpha.*alpha = rank = 16.*Give --lora_alpha 16"),
        (with_half_a_pair, r"is damaged: .*attn2\.to_k has no lora_B"),
        (without_a_module, r"mid_block\.\S* is targeted, but has no weights"),
        (of_other_shapes, r"attn2\.to_k is \d+ x 96 at rank 16, but its lora_B and lora_A are \d+ x 16 and 16 x 192"),
        (
            of_another_layout,
            r"272 keys of 272 that no layout of an SDXL adapter has: 'lora_unet_.*, \.\.\..* another model family",
        ),
        (without_weights, "holds no LoRA weights"),
        (with_numbers_for_targets, "target_modules is 5, not names"),
        (of_another_family, r"does not fit the unet: .*has no linear layer in the model"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_an_adapter_that_does_not_fit_is_refused(change, pattern, draw, refused, trained, tmp_path):
    with safe_open(trained / ADAPTER, framework="pt") as file:
        weights, metadata = change(load_file(trained / ADAPTER), file.metadata())
    save_file({key: tensor.contiguous() for key, tensor in weights.items()}, tmp_path / ADAPTER, metadata or None)
    refused(pattern, draw, "--lora_weights", tmp_path, "--prompt", "a star")


def test_an_adapter_without_alpha_loads_with_the_alpha_given(draw, trained, tmp_path):
    save_file(load_file(trained / ADAPTER), tmp_path / "plain.safetensors")
    prompt = ["--prompt", "a star"]
    (expected,) = draw("--lora_weights", trained, *prompt).values()
    (image,) = draw("--lora_weights", tmp_path / "plain.safetensors", "--lora_alpha", 32, *prompt).values()
    assert image.tobytes() == expected.tobytes()


def test_an_adapter_that_is_missing_cut_or_malformed_is_refused(draw, refused, trained, tmp_path):
    def start(path):
        draw("--lora_weights", path, "--prompt", "a star")

    refused("There is no adapter at", start, tmp_path)
    for step in (50, 100):
        (tmp_path / f"checkpoint-{step}").mkdir()
    (tmp_path / "checkpoint-²").mkdir()
    refused("has not ended. Its newest checkpoint is .*checkpoint-100: give that", start, tmp_path)
    refused(r"There is no adapter at .*typo.safetensors\. Give", start, tmp_path / "typo.safetensors")
    (tmp_path / "cut.safetensors").write_bytes((trained / ADAPTER).read_bytes()[:-1000])
    refused("is no whole safetensors file", start, tmp_path / "cut.safetensors")
    shutil.copytree(trained / "peft", tmp_path / "peft")
    (tmp_path / "peft" / "adapter_config.json").write_text("{")
    refused("adapter_config.json cannot be read", start, tmp_path / "peft")
    (tmp_path / "peft" / "adapter_config.json").unlink()
    refused("peft holds adapter_model.safetensors without adapter_config.json, which", start, tmp_path / "peft")


def test_an_adapter_that_changes_too_little_to_be_seen_is_told_of(draw, trained, tmp_path, capsys):
    tensors = load_file(trained / ADAPTER)
    small = {key: tensor * (1e-8 if "lora_B" in key or ".up." in key else 1) for key, tensor in tensors.items()}
    save_file(small, tmp_path / "a.safetensors", safe_open(trained / ADAPTER, framework="pt").metadata())
    draw("--lora_weights", tmp_path / "a.safetensors", "--prompt", "a star")
    assert "warning: this is too small a change to be seen" in capsys.readouterr().out
    draw("--lora_weights", trained, "--prompt", "a star")
    assert "warning" not in capsys.readouterr().out


def test_an_adapter_that_changes_nothing_is_refused(draw, train, tmp_path):
    output_dir = train("--learning_rate", 0, "--max_train_samples", 4, "--max_train_steps", 1)
    with pytest.raises(UserError, match="changes nothing in the unet"):
        draw("--lora_weights", output_dir, "--prompt", "a star")


def test_a_peft_folder_without_weights_is_refused(draw, refused, trained, tmp_path):
    shutil.copytree(trained / "peft", tmp_path / "peft")
    save_file({}, tmp_path / "peft" / "adapter_model.safetensors")
    refused("holds no LoRA weights", draw, "--lora_weights", tmp_path / "peft", "--prompt", "a star")


@pytest.mark.parametrize("layout", ["diffusers", "peft"])
def test_an_adapter_that_does_not_name_its_targets_is_merged_by_its_keys(layout, draw, trained, tmp_path):
    if layout == "diffusers":
        with safe_open(trained / ADAPTER, framework="pt") as file:
            config = json.loads(file.metadata()["lora_adapter_metadata"])
        metadata = {
            "lora_adapter_metadata": json.dumps({k: v for k, v in config.items() if "target_modules" not in k})
        }
        save_file(load_file(trained / ADAPTER), tmp_path / ADAPTER, metadata)
    else:
        shutil.copytree(trained / "peft", tmp_path, dirs_exist_ok=True)
        config = json.loads((tmp_path / "adapter_config.json").read_text()) | {"target_modules": None}
        (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    prompt = ["--prompt", "a star"]
    expected, found = (draw("--lora_weights", place, *prompt) for place in (trained, tmp_path))
    assert [image.tobytes() for image in found.values()] == [image.tobytes() for image in expected.values()]


# --- pickles ---


class Runs:
    """What a stranger may write into a pickle."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return (open, (str(self.mark), "w"))


@pytest.mark.parametrize("suffix", [".bin", ".pt", ".ckpt", ".pth"])
def test_a_pickled_adapter_is_refused_unless_it_is_allowed_and_holds_tensors_alone(
    suffix, trained, infer_script, draw, refused, tmp_path
):
    file, mark = tmp_path / f"adapter{suffix}", tmp_path / "it-ran"
    torch.save(load_file(trained / ADAPTER), file)
    infer = ["--prompt", "a red star", "--lora_alpha", 32, "--lora_weights", file]
    refused(rf"{file} is a pickle, which can run.*safetensors, or --allow_pickle", draw, *infer)
    torch.save({"unet.a": torch.zeros(1), "b": Runs(mark)}, file)
    refused("adapter.* holds more than tensors, and is not read", draw, *infer, "--allow_pickle")
    torch.save([torch.zeros(1)], file)
    refused("adapter.* cannot be read: it holds more than tensors", draw, *infer, "--allow_pickle")
    assert not mark.exists()
    torch.save(load_file(trained / ADAPTER), file)
    allowed = draw(*infer, "--allow_pickle")
    plain = draw("--prompt", "a red star", "--lora_weights", trained)
    assert [image.tobytes() for image in allowed.values()] == [image.tobytes() for image in plain.values()]


def test_a_folder_with_a_pickle_in_the_adapters_place_is_refused(trained, draw, refused, tmp_path):
    torch.save(load_file(trained / ADAPTER), tmp_path / "pytorch_lora_weights.bin")
    refused("pytorch_lora_weights.bin is a pickle", draw, "--prompt", "a", "--lora_weights", tmp_path)
    folder = tmp_path / "peft"
    shutil.copytree(trained / "peft", folder)
    torch.save(load_file(folder / "adapter_model.safetensors"), folder / "adapter_model.bin")
    (folder / "adapter_model.safetensors").unlink()
    refused("adapter_model.bin is a pickle", draw, "--prompt", "a", "--lora_weights", folder)


def test_a_checkpoint_whose_optimizer_runs_something_is_refused(train, trained, tmp_path):
    folder, mark = tmp_path / "checkpoint-2", tmp_path / "it-ran"
    shutil.copytree(trained / "checkpoint-2", folder)
    torch.save({"state": Runs(mark)}, folder / "optimizer.bin")
    (folder / "manifest.json").unlink()
    manifest.write_manifest(folder)  # as a stranger would
    said = (
        r"checkpoint-2 is damaged: optimizer\.bin: it holds more than numbers and tensors.* was not read\. Remove it"
    )
    with pytest.raises(UserError, match=said):
        train("--resume_from_checkpoint", "latest", output_dir=tmp_path)
    assert not mark.exists()


# --- the script's end ---


def idle(weights):
    return {key: 0 * tensor if ".up." in key else tensor for key, tensor in weights.items()}


def of_stable_diffusion_1(weights):
    block = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k.lora"
    return {f"{block}.down.weight": torch.ones(16, 768), f"{block}.up.weight": torch.ones(320, 16)}


def half_of_another(weights):
    return weights | of_stable_diffusion_1(weights)


@pytest.mark.parametrize("layout", ["diffusers", "kohya"])
@pytest.mark.parametrize(
    ("change", "keeps_alpha", "error"),
    [
        (idle, True, "The adapter changes nothing in the unet"),
        (of_stable_diffusion_1, True, "does not fit the unet: .*looks as if made for Stable Diffusion 1.x"),
        (half_of_another, True, "does not fit the unet: down_blocks.0.attentions.0.*Stable Diffusion 1.x"),
        (dict, False, "does not say its alpha.*Give --lora_alpha 16"),
    ],
    ids=["no-op", "wrong family", "half", "without alpha"],
)
def test_the_script_ends_with_one_line_and_exit_code_2(
    change, keeps_alpha, error, layout, trained, tiny_base, tmp_path, monkeypatch, capsys
):
    tensors = change(load_file(trained / ADAPTER))
    if layout == "kohya":
        modules = {key: naming.kohya_name("unet", key.removeprefix("unet.").partition(".lora.")[0]) for key in tensors}
        renamed = {
            f"{modules[key]}.lora_{key.rpartition('.lora.')[2]}": tensor.clone() for key, tensor in tensors.items()
        }
        alphas = {f"{module}.alpha": torch.tensor(32.0) for module in modules.values()}
        save_file(renamed | (alphas if keeps_alpha else {}), tmp_path / "a.safetensors")
    else:
        with safe_open(trained / ADAPTER, framework="pt") as file:
            save_file(tensors, tmp_path / "a.safetensors", file.metadata() if keeps_alpha else None)
    script = Path(__file__).parents[2] / "scripts" / "infer.py"
    words = ["--pretrained_model_name_or_path", tiny_base, "--lora", tmp_path / "a.safetensors", "--prompt", "a star"]
    words += ["--height", 64, "--width", 64, "--num_inference_steps", 1, "--output_dir", tmp_path / "pictures"]
    monkeypatch.setattr(sys, "argv", [str(script), *map(str, words)])
    with pytest.raises(SystemExit) as caught:
        runpy.run_path(str(script), run_name="__main__")
    assert caught.value.code == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert len(lines) == 1
    assert re.search(error, lines[0]), lines[0]
    assert not list((tmp_path / "pictures").glob("*tuned*"))
