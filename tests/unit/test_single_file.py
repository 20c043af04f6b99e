from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.loaders import single_file_utils
from safetensors.torch import load_file
from transformers import CLIPTextModelWithProjection

from rasengan import lora


@pytest.fixture
def single_file(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "benchmarks")
    import single_file

    return single_file


def assert_equal(weights, back):
    assert set(weights) == set(back)
    for name, tensor in weights.items():
        assert torch.equal(tensor, back[name]), name


@pytest.mark.parametrize(("name", "kind"), [("unet", UNet2DConditionModel), ("vae", AutoencoderKL)])
def test_diffusers_reads_the_original_layout_back(single_file, tiny_base, name, kind):
    model = kind.from_pretrained(tiny_base / name)
    convert = getattr(single_file_utils, f"convert_ldm_{name}_checkpoint")
    assert_equal(model.state_dict(), convert(single_file.original_layout(tiny_base), dict(model.config)))


def test_diffusers_reads_the_second_text_encoder_back(single_file, tiny_base):
    model = CLIPTextModelWithProjection.from_pretrained(tiny_base / "text_encoder_2")
    prefix = "conditioner.embedders.1.model."
    original = single_file.original_layout(tiny_base)
    back = single_file_utils.convert_open_clip_checkpoint(model, original, prefix=prefix)
    weights = {name.removeprefix("text_model."): tensor for name, tensor in model.state_dict().items()}
    assert_equal(weights, {name.removeprefix("text_model."): tensor for name, tensor in back.items()})


def test_the_first_lora_names_the_very_modules_that_are_trained_here(single_file, tiny_base, tmp_path):
    single_file.write_first_lora(tiny_base, tmp_path / "first.safetensors", rank=4, alpha=8)
    unet = UNet2DConditionModel.from_pretrained(tiny_base / "unet")
    lora.add_lora(unet, lora.lora_config(4, 8.0, list(lora.UNET_TARGETS)))
    modules = {name.split(".lora_")[0] for name, _ in unet.named_parameters() if ".lora_" in name}
    expected = {"lora_unet_" + single_file.unet_name(f"{module}.").rstrip(".").replace(".", "_") for module in modules}
    assert {name.split(".")[0] for name in load_file(tmp_path / "first.safetensors")} == expected
