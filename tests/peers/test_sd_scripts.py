"""kohya's sd-scripts, of which this is the layout that ComfyUI and AUTOMATIC1111 read."""

import importlib
import logging
import os
import sys
import types

import pytest
import torch
from diffusers import UNet2DConditionModel
from peft import LoraConfig
from safetensors.torch import load_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from rasengan import adapters, conversion


SDXL_UNET = {
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "block_out_channels": (320, 640, 1280),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
TEXT_LAYERS = {"text_encoder": (CLIPTextModel, 12), "text_encoder_2": (CLIPTextModelWithProjection, 32)}
TEXT_TARGETS = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")


@pytest.fixture
def networks(monkeypatch):
    """sd-scripts' networks.lora and its SDXL UNet; what they import and do not need here is left empty."""
    checkout = os.environ.get("SD_SCRIPTS")
    if not checkout:
        pytest.skip("needs a checkout of sd-scripts: make test_peers SD_SCRIPTS=path/to/sd-scripts")
    monkeypatch.syspath_prepend(checkout)
    for name, content in {"einops": {"rearrange": None}, "library.utils": {"setup_logging": lambda: None}}.items():
        module = types.ModuleType(name)
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, name, module)
    yield importlib.import_module("networks.lora"), importlib.import_module("library.sdxl_original_unet")
    for name in [name for name in sys.modules if name.partition(".")[0] in {"networks", "library"}]:
        monkeypatch.delitem(sys.modules, name, raising=False)


def as_in_transformers_4(model):
    """The model under the names that sd-scripts' transformers gives it: all of it lies in text_model."""
    return model if hasattr(model, "text_model") else torch.nn.ModuleDict({"text_model": model})


@pytest.mark.parametrize("conv_dim", [None, 4], ids=["linear layers", "with convolutions"])
def test_a_kohya_file_has_the_very_keys_and_shapes_of_their_network(networks, tmp_path, conv_dim, caplog):
    caplog.set_level(logging.WARNING)
    lora, sdxl = networks
    with torch.device("meta"):
        encoders = {name: kind(CLIPTextConfig(num_hidden_layers=n)) for name, (kind, n) in TEXT_LAYERS.items()}
        theirs = lora.LoRANetwork(
            [as_in_transformers_4(model) for model in encoders.values()],
            sdxl.SdxlUNet2DConditionModel(),
            lora_dim=4,
            alpha=2,
            conv_lora_dim=conv_dim,
            conv_alpha=2,
            is_sdxl=True,
        )
        unet = UNet2DConditionModel(**SDXL_UNET)
        expected = {}
        for module in [*theirs.text_encoder_loras, *theirs.unet_loras]:
            del module.org_module  # as it does where it is applied
            expected |= {f"{module.lora_name}.{key}": tensor.shape for key, tensor in module.state_dict().items()}
    assert len(expected) > 3 * 722

    weights, configs = {}, {}
    for name, model in {"unet": unet, **encoders}.items():
        weights[name] = {}
        for module, layer in model.named_modules():
            attended = ".attentions." in module or (conv_dim and (".resnets." in module or "samplers" in module))
            wanted = attended if name == "unet" else module.endswith(TEXT_TARGETS)
            if wanted and isinstance(layer, torch.nn.Linear | torch.nn.Conv2d):
                out_size, *in_size = layer.weight.shape
                weights[name][f"{module}.lora_A.weight"] = torch.zeros(4, *in_size)
                weights[name][f"{module}.lora_B.weight"] = torch.zeros(out_size, 4, *(1 for _ in in_size[1:]))
        modules = adapters.by_module(weights[name])
        configs[name] = LoraConfig(r=4, lora_alpha=2, target_modules=sorted(modules))
        configs[name].target_modules = sorted(modules)
    file = tmp_path / "a.safetensors"
    conversion.write_adapter(file, adapters.Adapter(weights, configs), "kohya", torch.float16)
    found = {key: tensor.shape for key, tensor in load_file(file).items()}
    assert found == expected
