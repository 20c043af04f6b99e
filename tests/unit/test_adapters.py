"""Adapters of every kind and layout: read, merged, written. PEFT, diffusers and float64 say what is right."""

import copy
import json
import re
import resource

import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from peft import LoHaConfig, LoKrConfig, LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file, save_file

from rasengan import UserError, adapter_writer, adapters, components, conversion, merging, naming, whole_model
from rasengan.adapter_reader import read_adapter, read_adapters
from rasengan.adapters import DIFFUSERS_FILE, Adapter
from rasengan.sources import COMPONENTS, TEXT_ENCODERS


ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]
CONVOLUTIONS = ["to_q", "conv1", "conv_shortcut", "conv_in", "conv_out", "downsamplers.0.conv", "upsamplers.0.conv"]
EVERYTHING = [*CONVOLUTIONS, "conv2", "time_emb_proj", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2"]
EVERYTHING += ["time_embedding.linear_1", "time_embedding.linear_2", "add_embedding.linear_1", *ATTENTION]
PATTERNS = {
    "rank_pattern": {"attn2.to_k": 2, ".*mid_block.*to_v": 6},
    "alpha_pattern": {"attn2.to_k": 7.0, "attn1.to_q": 0.1},
}
KINDS = {
    "LoRA": LoraConfig(r=4, lora_alpha=12, target_modules=ATTENTION),
    "rsLoRA": LoraConfig(r=4, lora_alpha=3, target_modules=ATTENTION, use_rslora=True),
    "patterns": LoraConfig(r=4, lora_alpha=12, target_modules=ATTENTION, **PATTERNS),
    "DoRA": LoraConfig(r=4, lora_alpha=12, target_modules=ATTENTION, use_dora=True),
    "LoCon": LoraConfig(r=4, lora_alpha=6, target_modules=EVERYTHING),
    "DoRA of convolutions": LoraConfig(r=4, lora_alpha=6, target_modules=CONVOLUTIONS, use_dora=True),
    "LoHa": LoHaConfig(r=4, alpha=6, target_modules=ATTENTION),
    "LoHa of convolutions": LoHaConfig(r=3, alpha=6, target_modules=CONVOLUTIONS, use_effective_conv2d=True),
    "LoKr": LoKrConfig(r=2, alpha=3, target_modules=ATTENTION, decompose_both=True),
    "LoKr by 4": LoKrConfig(r=2, alpha=3, target_modules=ATTENTION, decompose_factor=4),
    "LoKr of convolutions": LoKrConfig(r=2, alpha=3, target_modules=CONVOLUTIONS),
    "LoKr of whole matrices": LoKrConfig(r=64, alpha=64, target_modules=ATTENTION),
}
LORAS = [name for name, config in KINDS.items() if isinstance(config, LoraConfig)]


def load(tiny_base, name="unet", dtype=torch.float32):
    return components.load(name, tiny_base / name, dtype)


def trained(tiny_base, config, seed=0, name="unet"):
    """A component under PEFT, as a training would leave it."""
    model = get_peft_model(load(tiny_base, name), copy.deepcopy(config))
    generator = torch.Generator().manual_seed(seed)
    for key, parameter in model.named_parameters():
        if parameter.requires_grad and "magnitude" in key:
            parameter.data *= 1 + 0.1 * torch.rand(parameter.shape, generator=generator)
        elif parameter.requires_grad:
            # Products of four matrices are smaller; too great a change makes the model amplify every rounding.
            size = 0.05 if "lora" in key else 0.3
            parameter.data = size * torch.randn(parameter.shape, generator=generator)
    return model


def adapter_of(**models):
    """The adapter of some components under PEFT."""
    configs = {name: copy.deepcopy(model.peft_config["default"]) for name, model in models.items()}
    for config in configs.values():
        config.target_modules = sorted(config.target_modules)
    weights = {name: get_peft_model_state_dict(model) for name, model in models.items()}
    weights = {
        name: {key.removeprefix(adapters.PEFT_PREFIX): tensor.detach().clone() for key, tensor in part.items()}
        for name, part in weights.items()
    }
    return Adapter(weights, configs)


@pytest.fixture(scope="module")
def live(tiny_base):
    """Each kind's UNet under PEFT."""
    return {kind: trained(tiny_base, config) for kind, config in KINDS.items()}


@torch.no_grad()
def answer(model):
    generator = torch.Generator().manual_seed(1)
    sample, states, pooled = (torch.randn(s, generator=generator) for s in ((2, 4, 8, 8), (2, 5, 96), (2, 64)))
    added = {"text_embeds": pooled, "time_ids": torch.full((2, 6), 64.0)}
    return model(sample, torch.tensor([3, 700]), states, added_cond_kwargs=added).sample


def merged(tiny_base, *adapters, name="unet", dtype=torch.float32):
    """The tuned component; each adapter may come with its scale."""
    pairs = [pair if type(pair) is tuple else (pair, 1.0) for pair in adapters]
    return merging.merge(load(tiny_base, name, dtype), pairs, name)[0]


def difference(found, expected):
    return ((found - expected).norm() / expected.norm()).item()


def assert_close(found, expected):
    for key, tensor in expected.items():
        torch.testing.assert_close(found[key], tensor, rtol=1e-5, atol=2e-6, msg=key)


def write(path, adapter, layout, dtype=torch.float32):
    conversion.write_adapter(path, adapter, layout, dtype)
    return path


# --- merged = unmerged = diffusers' fuse_lora ---


@pytest.mark.parametrize("scale", [1.0, -1.5])
@pytest.mark.parametrize("kind", KINDS)
def test_a_merge_answers_as_the_unmerged_adapter_does(tiny_base, live, kind, scale):
    model = copy.deepcopy(live[kind])
    for layer in model.modules():
        if isinstance(layer, BaseTunerLayer):
            layer.set_scale("default", scale)
    expected = answer(model)
    tuned = merged(tiny_base, (adapter_of(unet=live[kind]), scale))
    assert not any("lora" in key for key in tuned.state_dict())
    assert difference(answer(load(tiny_base)), expected) > 0.01
    assert difference(answer(tuned), expected) < 1e-5
    assert_close(tuned.state_dict(), model.merge_and_unload().state_dict())


@pytest.mark.parametrize("scale", [0.5, 2.0])
@pytest.mark.parametrize(
    ("layout", "kind"),
    # Of kohya's layout diffusers drops DoRA's vectors, and every alpha but the commonest.
    [*(("diffusers", kind) for kind in LORAS), ("kohya", "LoRA"), ("kohya", "rsLoRA"), ("kohya", "LoCon")],
)
def test_diffusers_own_loader_fuses_the_file_to_the_same_weights(tiny_base, live, tmp_path, kind, scale, layout):
    adapter = adapter_of(unet=live[kind], text_encoder_2=trained(tiny_base, TEXT, name="text_encoder_2"))
    file = write(tmp_path / "a.safetensors", adapter, layout)
    pipeline = StableDiffusionXLPipeline(**{name: load(tiny_base, name) for name in COMPONENTS})
    pipeline.load_lora_weights(file)
    pipeline.fuse_lora(lora_scale=scale)
    pipeline.unload_lora_weights()
    for name in adapter.weights:
        tuned = merged(tiny_base, (read_adapter(file), scale), name=name)
        assert_close(getattr(pipeline, name).state_dict(), tuned.state_dict())


@pytest.mark.parametrize("layout", ["diffusers", "kohya", "peft"])
def test_the_projection_of_the_pooled_text_is_merged_from_every_layout(tiny_base, tmp_path, layout):
    config = LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj", "text_projection"])
    model = trained(tiny_base, config, name="text_encoder_2")
    file = write(tmp_path / f"a{'' if layout == 'peft' else '.safetensors'}", adapter_of(text_encoder_2=model), layout)
    tuned = merged(tiny_base, read_adapter(file), name="text_encoder_2")
    expected = model.merge_and_unload().state_dict()
    assert not torch.equal(
        expected["text_projection.weight"], load(tiny_base, "text_encoder_2").text_projection.weight
    )
    assert_close(tuned.state_dict(), expected)
    if layout == "kohya":  # as ComfyUI and OneTrainer have it
        assert "lora_te2_text_projection.lora_down.weight" in load_file(file)


TEXT = LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj", "out_proj", "fc1"])


# --- several adapters ---


def test_several_adapters_are_summed_and_rounded_once(tiny_base, live):
    base = load(tiny_base, dtype=torch.float16).state_dict()
    pairs = [(adapter_of(unet=live[kind]), scale) for kind, scale in (("LoRA", 0.8), ("patterns", -0.4))]
    pairs.append((adapter_of(unet=trained(tiny_base, KINDS["LoCon"], seed=5)), 0.7))
    expected = {key: tensor.double() for key, tensor in base.items()}
    for adapter, scale in pairs:
        for module, parts in adapters.by_module(adapter.weights["unet"]).items():
            a, b = (parts[f"lora_{part}.weight"].double() for part in "AB")
            strength = adapters.strength_of(adapter.configs["unet"], module)
            if a.ndim == 2:
                expected[f"{module}.weight"] += scale * strength * b @ a
            else:
                product = torch.einsum("or,rihw->oihw", b[:, :, 0, 0], a)
                expected[f"{module}.weight"] += scale * strength * product
    together = merged(tiny_base, *pairs, dtype=torch.float16).state_dict()
    one_by_one = load(tiny_base, dtype=torch.float16)
    for pair in pairs:
        one_by_one, _ = merging.merge(one_by_one, [pair], "unet")
    keys = [key for key in base if not torch.equal(expected[key], base[key].double())]
    assert len(keys) > 200

    def wrong(found):
        count = sum(found[key].numel() for key in keys)
        return sum((found[key] != expected[key].half()).sum().item() for key in keys) / count

    assert wrong(together) < 1e-3
    assert wrong(one_by_one.state_dict()) > 0.01
    assert all(torch.equal(together[key], base[key]) for key in base.keys() - set(keys))


def test_several_adapters_of_other_kinds_are_those_that_peft_merges_one_after_the_other(tiny_base, live):
    kinds = ["LoHa", "LoRA", "LoKr"]
    model = load(tiny_base)
    for kind in kinds:
        live_model = get_peft_model(model, copy.deepcopy(KINDS[kind]))
        live_model.load_state_dict(
            {key: tensor for key, tensor in live[kind].state_dict().items() if "base_layer" not in key}, strict=False
        )
        model = live_model.merge_and_unload()
    assert_close(merged(tiny_base, *(adapter_of(unet=live[kind]) for kind in kinds)).state_dict(), model.state_dict())


def test_a_dora_beside_others_adds_the_change_that_it_makes_alone_in_any_order(tiny_base, live):
    base = load(tiny_base).state_dict()
    several = [adapter_of(unet=live[kind]) for kind in ("LoRA", "DoRA")]
    several.append(adapter_of(unet=trained(tiny_base, KINDS["DoRA"], seed=7)))
    alone = [merged(tiny_base, adapter).state_dict() for adapter in several]
    expected = {key: sum((one[key] - weight for one in alone), start=weight) for key, weight in base.items()}
    assert_close(merged(tiny_base, *several).state_dict(), expected)
    assert_close(merged(tiny_base, *reversed(several)).state_dict(), expected)


def test_of_several_adapters_one_that_does_nothing_is_named(tiny_base, live):
    idle = adapter_of(unet=live["LoRA"])
    idle.weights["unet"] |= {key: 0 * w for key, w in idle.weights["unet"].items() if "lora_B" in key}
    with pytest.raises(UserError, match="Adapter 2 of 2 changes nothing in the unet"):
        merged(tiny_base, adapter_of(unet=live["LoHa"]), idle)
    opposite = [(adapter_of(unet=live["LoRA"]), scale) for scale in (1.0, -1.0)]
    for dtype in (torch.float16, torch.float32):
        with pytest.raises(UserError, match="The adapters cancel each other in the unet"):
            merged(tiny_base, *opposite, dtype=dtype)
    merged(tiny_base, opposite[0], (opposite[1][0], -0.99))
    weak = [(adapter, 1e-9) for adapter, _ in opposite]
    with pytest.raises(UserError, match="too small for float16"):
        merged(tiny_base, *weak, dtype=torch.float16)


@pytest.mark.parametrize(("kind", "factor"), [("LoRA", "lora_B"), ("LoHa", "hada_w2_a"), ("LoKr", "lokr_w1")])
def test_an_adapter_that_does_nothing_is_told_by_its_cause(tiny_base, live, kind, factor):
    adapter = adapter_of(unet=live[kind])
    weights = {key: 0 * w if factor in key else w for key, w in adapter.weights["unet"].items()}
    untrained = "The adapter changes nothing in the unet: a factor of each of its products is zero, as before training"
    with pytest.raises(UserError, match=f"{untrained}. Give one that was trained."):
        merged(tiny_base, Adapter({"unet": weights}, adapter.configs))
    small = "The adapter changes nothing in the unet: at scale 1e-30 its change is too small for float"
    for dtype in (torch.float32, torch.float16):
        with pytest.raises(UserError, match=f"{small}(16|32). Give a greater --lora_scale, or an adapter that was"):
            merged(tiny_base, (adapter, 1e-30), dtype=dtype)
    with pytest.raises(UserError, match="The adapter changes nothing in the unet: at scale 1e-09 .* too small"):
        merged(tiny_base, (adapter, 1e-9), dtype=torch.float16)
    with pytest.raises(UserError, match="Adapter 2 of 2 changes nothing in the unet: at scale 1e-30 its change"):
        merged(tiny_base, adapter_of(unet=live["LoRA"]), (adapter, 1e-30))


# --- round trips ---


def assert_same(one, other):
    assert one.weights.keys() == other.weights.keys()
    for name, part in one.weights.items():
        assert part.keys() == other.weights[name].keys()
        for key, tensor in part.items():
            assert tensor.dtype == other.weights[name][key].dtype
            assert torch.equal(tensor, other.weights[name][key]), key
        for module in adapters.by_module(part):
            for of in (adapters.rank_of, adapters.alpha_of):
                assert of(one.configs[name], module) == of(other.configs[name], module), module


@pytest.mark.parametrize("kind", [kind for kind in LORAS if kind != "rsLoRA"])
def test_from_diffusers_to_kohya_and_back_and_to_peft_every_bit_and_every_alpha_stays(tiny_base, live, tmp_path, kind):
    encoders = {name: trained(tiny_base, TEXT, name=name) for name in TEXT_ENCODERS}
    first = read_adapter(write(tmp_path / "1.safetensors", adapter_of(unet=live[kind], **encoders), "diffusers"))
    second = read_adapter(write(tmp_path / "2.safetensors", first, "kohya"))
    third = read_adapter(write(tmp_path / "3.safetensors", second, "diffusers"))
    fourth = read_adapter(write(tmp_path / "4", third, "peft"))
    assert_same(first, second)
    assert_same(first, third)
    assert adapter_writer.same_adapter(first, fourth)
    for name, model in {"unet": live[kind], **encoders}.items():
        folder = tmp_path / "4" if name == "unet" else tmp_path / "4" / name
        loaded = PeftModel.from_pretrained(load(tiny_base, name), folder)
        expected = model.merge_and_unload().state_dict() if name != "unet" else None
        if expected:
            assert_close(loaded.merge_and_unload().state_dict(), expected)
        else:
            assert difference(answer(loaded), answer(live[kind])) < 1e-6


@pytest.mark.parametrize("layout", ["peft", "kohya"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_merged_alike_from_every_layout_that_holds_it(tiny_base, live, tmp_path, kind, layout):
    adapter = adapter_of(unet=live[kind])
    path = write(tmp_path / ("a" if layout == "peft" else "a.safetensors"), adapter, layout)
    assert_close(merged(tiny_base, read_adapter(path)).state_dict(), merged(tiny_base, adapter).state_dict())


def test_what_a_layout_cannot_hold_is_refused_and_nothing_is_left(live, tmp_path):
    with pytest.raises(UserError, match="is a LOHA, and diffusers' layout holds LoRAs alone. Give --format peft"):
        write(tmp_path / "a.safetensors", adapter_of(unet=live["LoHa"]), "diffusers")
    adapter = adapter_of(unet=live["LoKr of whole matrices"])
    adapter.configs["unet"].alpha = 32
    with pytest.raises(UserError, match="whole matrices at strength 0.5, which kohya's layout has at strength 1"):
        write(tmp_path / "a.safetensors", adapter, "kohya")
    assert list(tmp_path.iterdir()) == []


def test_text_encoders_alone_are_a_peft_folder_too(tiny_base, tmp_path):
    adapter = adapter_of(text_encoder=trained(tiny_base, TEXT, name="text_encoder"))
    assert adapter_writer.same_adapter(read_adapter(write(tmp_path / "a", adapter, "peft")), adapter)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_file_in_another_dtype_is_the_rounded_one_with_exact_alphas(live, tmp_path, dtype):
    adapter = adapter_of(unet=live["patterns"])
    for layout in conversion.LAYOUTS:
        path = write(tmp_path / (layout if layout == "peft" else f"{layout}.safetensors"), adapter, layout, dtype)
        weights = {"unet": {key: tensor.to(dtype) for key, tensor in adapter.weights["unet"].items()}}
        assert_same(read_adapter(path), Adapter(weights, adapter.configs))
    alphas = {t.dtype for k, t in load_file(tmp_path / "kohya.safetensors").items() if k.endswith(".alpha")}
    assert alphas == {torch.float32}


# --- kohya's names, by a rule of the test's own ---


def sgm_name(module):
    """The name of a UNet's module in the original checkpoint, by the places that its blocks have there."""
    resnet = {"norm1": "in_layers_0", "conv1": "in_layers_2", "time_emb_proj": "emb_layers_1", "norm2": "out_layers_0"}
    resnet |= {"conv2": "out_layers_3", "conv_shortcut": "skip_connection"}
    alone = {"conv_in": "input_blocks_0_0", "conv_out": "out_2", "conv_norm_out": "out_0"}
    alone |= {f"time_embedding_linear_{n}": f"time_embed_{2 * n - 2}" for n in (1, 2)}
    alone |= {f"add_embedding_linear_{n}": f"label_emb_0_{2 * n - 2}" for n in (1, 2)}
    name = module.replace(".", "_")
    if name in alone:
        return alone[name]
    side, rest = re.match(r"(down_blocks_\d|mid_block|up_blocks_\d)_(.+)", name).groups()
    kind, layer, rest = re.match(r"(resnets|attentions|downsamplers|upsamplers)_(\d)_(.+)", rest).groups()
    rest = resnet[rest] if kind == "resnets" else rest
    level, layer = int(side[-1]) if side[-1].isdigit() else 0, int(layer)
    if side == "mid_block":
        return f"middle_block_{1 if kind == 'attentions' else 2 * layer}_{rest}"
    if kind == "downsamplers":
        return f"input_blocks_{(3, 6)[level]}_0_op"
    if kind == "upsamplers":
        return f"output_blocks_{(2, 5)[level]}_2_{rest}"
    first = (1, 4, 7)[level] if side.startswith("down") else (0, 3, 6)[level]
    return (
        f"{'input' if side.startswith('down') else 'output'}_blocks_{first + layer}_{int(kind == 'attentions')}_{rest}"
    )


def test_a_kohya_file_has_the_keys_of_sd_scripts_for_the_same_modules(tiny_base, live, tmp_path):
    encoders = {name: trained(tiny_base, TEXT, name=name) for name in TEXT_ENCODERS}
    adapter = adapter_of(unet=live["LoCon"], **encoders)
    found = load_file(write(tmp_path / "a.safetensors", adapter, "kohya"))
    expected = {f"lora_unet_{sgm_name(module)}" for module in adapters.by_module(adapter.weights["unet"])}
    for number, layers in ((1, 2), (2, 3)):
        for layer in range(layers):
            prefix = f"lora_te{number}_text_model_encoder_layers_{layer}_"
            expected |= {prefix + name for name in ("self_attn_q_proj", "self_attn_out_proj", "mlp_fc1")}
    parts = ("lora_down.weight", "lora_up.weight", "alpha")
    assert set(found) == {f"{module}.{part}" for module in expected for part in parts}
    assert all(tensor.shape == () for key, tensor in found.items() if key.endswith(".alpha"))


def test_every_module_of_the_unet_is_found_again_by_either_of_its_kohya_names(tiny_base):
    kinds = (torch.nn.Linear, torch.nn.Conv2d, torch.nn.GroupNorm)
    modules = [name for name, module in load(tiny_base).named_modules() if isinstance(module, kinds)]
    assert len(modules) > 200
    for module in modules:
        dotted = naming.original_unet_name(module)
        names = (f"lora_unet_{sgm_name(module)}", f"lora_unet_{module.replace('.', '_')}", f"diffusion_model.{dotted}")
        for name in names:
            assert naming.parse_kohya_name(name) == ("unet", module), name


# --- what others write ---


def kohya_file(path, weights, alphas, name=sgm_name, dtype=torch.float16):
    tensors = {}
    for module, parts in adapters.by_module(weights).items():
        tensors[f"lora_unet_{name(module)}.lora_down.weight"] = parts["lora_A.weight"].to(dtype)
        tensors[f"lora_unet_{name(module)}.lora_up.weight"] = parts["lora_B.weight"].to(dtype)
        if module in alphas:
            tensors[f"lora_unet_{name(module)}.alpha"] = torch.tensor(alphas[module], dtype=dtype)
    save_file(tensors, path)
    return path


@pytest.mark.parametrize("name", [sgm_name, lambda module: module.replace(".", "_")], ids=["original", "diffusers"])
def test_an_fp16_file_with_ranks_alphas_and_convolutions_of_its_own_is_merged_rightly(tiny_base, tmp_path, name):
    unet, generator = load(tiny_base), torch.Generator().manual_seed(2)
    weights, alphas, expected = {}, {}, {key: tensor.double() for key, tensor in unet.state_dict().items()}
    layers = {n: m for n, m in unet.named_modules() if isinstance(m, torch.nn.Linear | torch.nn.Conv2d)}
    for number, (module, layer) in enumerate(layers.items()):
        rank, alpha = 1 + number % 5, 0.5 * (1 + number % 7)
        a = 0.2 * torch.randn((rank, *layer.weight.shape[1:]), generator=generator)
        b = 0.2 * torch.randn((len(layer.weight), rank, *(1 for _ in a.shape[2:])), generator=generator)
        weights |= {f"{module}.lora_A.weight": a.half(), f"{module}.lora_B.weight": b.half()}
        alphas[module] = alpha
        product = b.half().double().flatten(1) @ a.half().double().flatten(1)
        expected[f"{module}.weight"] += (alpha / rank * product).view(layer.weight.shape)
    adapter = read_adapter(kohya_file(tmp_path / "a.safetensors", weights, alphas, name))
    assert adapter.weights["unet"].keys() == weights.keys()
    model, report = merging.merge(unet, [(adapter, 1.0)], "unet")
    assert report.modules == len(layers)
    assert_close({key: tensor.double() for key, tensor in model.state_dict().items()}, expected)


def test_a_comfyui_file_is_read_with_the_alpha_that_is_given(tiny_base, live, tmp_path):
    adapter = adapter_of(unet=live["LoCon"], text_encoder=trained(tiny_base, TEXT, name="text_encoder"))
    tensors = {}
    for name, prefix in (
        ("unet", "diffusion_model."),
        ("text_encoder", "text_encoders.clip_l.transformer.text_model."),
    ):
        for key, tensor in adapter.weights[name].items():
            module, part = adapters.split_key(key)
            module = naming.original_unet_name(module) if name == "unet" else module
            tensors[f"{prefix}{module}.{'lora_down' if 'A' in part else 'lora_up'}.weight"] = tensor.contiguous()
    save_file(tensors, tmp_path / "a.safetensors")
    with pytest.raises(UserError, match="does not say its alpha.*alpha = rank = 4"):
        read_adapter(tmp_path / "a.safetensors")
    assert adapter_writer.same_adapter(read_adapter(tmp_path / "a.safetensors", lora_alpha=6.0), adapter)


def family_file(path, keys):
    tensors = {}
    for key, in_size in keys.items():
        tensors[f"{key}.lora_down.weight"], tensors[f"{key}.lora_up.weight"] = (
            torch.ones(4, in_size),
            torch.ones(64, 4),
        )
        tensors[f"{key}.alpha"] = torch.tensor(4.0)
    save_file(tensors, path)
    return path


SD1 = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k"
DIT = "a diffusion transformer, such as Stable Diffusion 3 or Qwen-Image"
FAMILIES = {
    "Stable Diffusion 1.x": {SD1: 768, "lora_te_text_model_encoder_layers_0_mlp_fc1": 32},
    "Stable Diffusion 2.x": {SD1: 1024},
    "the SDXL refiner": {"lora_unet_input_blocks_4_1_transformer_blocks_0_attn2_to_k": 1280},
    "Stable Diffusion XL": {"lora_unet_input_blocks_4_1_transformer_blocks_0_attn2_to_k": 2048},
    "Stable Diffusion 3": {"lora_unet_joint_blocks_0_context_block_attn_qkv": 1536},
    "Flux or HunyuanVideo": {"lora_unet_double_blocks_0_img_attn_proj": 3072},
    "Wan": {"diffusion_model.blocks.0.self_attn.q": 1536, "diffusion_model.blocks.0.cross_attn.k": 1536},
    "another model family": {"lora_transformer_blocks_3_layer": 77},
}


@pytest.mark.parametrize("family", FAMILIES)
def test_an_adapter_of_another_family_is_refused_with_a_guess_of_it(tiny_base, tmp_path, family):
    file = family_file(tmp_path / "a.safetensors", FAMILIES[family])
    with pytest.raises(UserError, match=f"(looks as if made for|of) {family}") as caught:
        merged(tiny_base, read_adapter(file))
    assert next(iter(FAMILIES[family])).split("_")[-1].split(".")[0] in str(caught.value)


@pytest.mark.parametrize("lora_alpha", [None, 4.0])
@pytest.mark.parametrize(
    ("family", "module"),
    [
        ("Wan", "diffusion_model.blocks.0.self_attn.q"),
        ("Wan", "lora_unet_blocks_0_cross_attn_k"),
        ("Wan", "transformer.blocks.0.attn1.to_q"),
        ("Flux or HunyuanVideo", "diffusion_model.single_blocks.0.linear1"),
        ("Flux or HunyuanVideo", "lora_unet_double_blocks_0_img_attn_proj"),
        ("Flux or HunyuanVideo", "transformer.single_transformer_blocks.0.attn.to_q"),
        ("Stable Diffusion 3", "diffusion_model.joint_blocks.0.x_block.attn.qkv"),
        (DIT, "transformer.transformer_blocks.0.attn.to_q"),
        (DIT, "diffusion_model.transformer_blocks.0.attn.to_q"),
        (DIT, "lora_unet_transformer_blocks_0_attn_to_q"),
        (DIT, "transformer.context_embedder"),
        ("Flux or HunyuanVideo", "transformer.double_blocks.0.img_attn_qkv"),
        ("another model family", "diffusion_model.layers.0.attention.qkv"),
    ],
)
def test_the_family_of_a_file_without_alpha_is_told_before_its_alpha_is_asked_for(
    tmp_path, family, module, lora_alpha
):
    tensors = {f"{module}.lora_A.weight": torch.ones(4, 64), f"{module}.lora_B.weight": torch.ones(64, 4)}
    save_file(tensors, tmp_path / "a.safetensors")
    with pytest.raises(UserError, match=f"2 keys of 2 that no layout of an SDXL.*as if made for {family}"):
        read_adapter(tmp_path / "a.safetensors", lora_alpha)


def test_stable_diffusion_1_is_told_before_the_alpha_is_asked_for(tmp_path):
    file = family_file(tmp_path / "a.safetensors", {SD1: 768})
    save_file({key: tensor for key, tensor in load_file(file).items() if "alpha" not in key}, file)
    with pytest.raises(UserError, match="a.safetensors looks as if made for Stable Diffusion 1.x. Give an SDXL"):
        read_adapter(file)


def test_a_text_encoder_of_stable_diffusion_1_is_not_taken_for_sdxls_first(tmp_path):
    file = family_file(tmp_path / "a.safetensors", {"lora_te_text_model_encoder_layers_0_mlp_fc1": 32})
    with pytest.raises(UserError, match="3 keys of 3 that no layout.*Stable Diffusion 1.x or 2.x"):
        read_adapter(file)


@pytest.mark.parametrize("part", ["lora_mid.weight", "diff", "norm"])
def test_parts_that_no_kind_here_has_are_named(live, tmp_path, part):
    file = write(tmp_path / "a.safetensors", adapter_of(unet=live["LoRA"]), "kohya")
    tensors = load_file(file)
    key = next(iter(tensors)).partition(".")[0] + f".{part}"
    save_file(tensors | {key: torch.ones(2, 2)}, file)
    with pytest.raises(UserError, match=f"1 key of 409 that no layout of an SDXL adapter has: '{key}'"):
        read_adapter(file)


def named_file(path, model, names):
    """PEFT's state dict as a program saves it by itself: each weight with the name of its adapter."""
    state = {key.removeprefix(adapters.PEFT_PREFIX): tensor for key, tensor in model.state_dict().items()}
    state = {key: tensor for key, tensor in state.items() if ".default" in key}
    save_file(
        {f"unet.{k.replace('.default', f'.{name}')}": t.clone() for name in names for k, t in state.items()}, path
    )
    return path


@pytest.mark.parametrize("name", ["default", "my-style_2"])
@pytest.mark.parametrize("kind", ["LoRA", "DoRA", "LoHa", "LoKr", "DoRA of convolutions"])
def test_weights_with_the_name_of_their_adapter_are_read_without_it(live, tmp_path, kind, name):
    file = named_file(tmp_path / "a.safetensors", live[kind], [name])
    adapter = adapter_of(unet=live[kind])
    found = read_adapter(file, lora_alpha=adapters.default_alpha(adapter.configs["unet"]))
    assert_same(found, adapter)


def test_a_peft_folder_whose_weights_have_the_name_of_their_adapter_is_read_without_it(live, tmp_path):
    adapter = adapter_of(unet=live["DoRA"])
    adapter_writer.write_peft_folders(tmp_path / "a", adapter)
    file = named_file(tmp_path / "a" / adapters.PEFT_FILE, live["DoRA"], ["default"])
    save_file({k.replace("unet.", adapters.PEFT_PREFIX, 1): t for k, t in load_file(file).items()}, file)
    assert_same(read_adapter(tmp_path / "a"), adapter)


def test_weights_of_several_adapters_are_shown(live, tmp_path):
    file = named_file(tmp_path / "a.safetensors", live["LoRA"], ["default", "other"])
    with pytest.raises(UserError, match="holds no LoRA weights, but 544 of other names, such as unet.*default.weight"):
        read_adapter(file)


@pytest.mark.parametrize("part", ["lora_A.weight", "lora.down.weight", "alpha"])
@pytest.mark.parametrize("is_first", [False, True])
def test_a_weight_under_the_names_of_two_layouts_is_shown_under_both(live, tmp_path, part, is_first):
    file = write(tmp_path / "a.safetensors", adapter_of(unet=live["LoRA"]), "kohya")
    tensors = load_file(file)
    module = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    kohya = f"lora_unet_{sgm_name(module)}.{'alpha' if part == 'alpha' else 'lora_down.weight'}"
    # A file has its tensors in the order of their names, and a pickle in that of their writing.
    other = {f"unet.{module}.{part}": torch.zeros_like(tensors[kohya])}
    torch.save(other | tensors if is_first else tensors | other, tmp_path / "a.pt")
    names = [kohya, *other]
    both = re.escape(" a second time, as ".join(reversed(names) if is_first else names))
    with pytest.raises(UserError, match=rf"a.pt holds {both}. Export the adapter again"):
        read_adapter(tmp_path / "a.pt", allow_pickle=True)


@pytest.mark.parametrize("prefix", ["text_model.", ""])
def test_a_text_encoders_weights_under_the_names_of_two_layouts_are_shown(tiny_base, tmp_path, prefix):
    adapter = adapter_of(text_encoder=trained(tiny_base, TEXT, name="text_encoder"))
    tensors = load_file(write(tmp_path / "a.safetensors", adapter, "kohya"))
    weights = {key.removeprefix("text_model."): tensor for key, tensor in adapter.weights["text_encoder"].items()}
    save_file(tensors | {f"text_encoder.{prefix}{k}": t for k, t in weights.items()}, tmp_path / "a.safetensors")
    with pytest.raises(UserError, match="lora_te1_.* a second time, as text_encoder.*, and 11 more of this kind. "):
        read_adapter(tmp_path / "a.safetensors")


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.bool, torch.complex64, torch.float8_e8m0fnu])
@pytest.mark.parametrize("layout", conversion.LAYOUTS)
def test_weights_that_are_no_plain_numbers_are_refused(live, tmp_path, layout, dtype):
    adapter = adapter_of(unet=live["LoRA"])
    key = next(key for key in adapter.weights["unet"] if "mid_block" in key and "lora_B" in key)
    adapter.weights["unet"][key] = adapter.weights["unet"][key].abs().to(dtype)
    path = tmp_path / "a"
    if layout == "peft":
        adapter_writer.write_peft_folders(path, adapter)
    elif layout == "diffusers":
        adapter_writer.write_diffusers(path, adapter)
    else:
        path = tmp_path / "a.safetensors"
        adapter_writer.write_kohya(path, adapter)
    name = str(dtype).removeprefix("torch.")
    with pytest.raises(
        UserError, match=f"{path}: weights are {name}, not plain floating point, such as the unet's mid"
    ):
        read_adapter(path)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_an_adapter_in_8_bits_of_floating_point_is_its_numbers(tiny_base, live, tmp_path, dtype):
    adapter = adapter_of(unet=live["LoRA"])
    weights = {"unet": {key: tensor.to(dtype) for key, tensor in adapter.weights["unet"].items()}}
    adapter_writer.write_kohya(tmp_path / "a.safetensors", Adapter(weights, adapter.configs))
    exact = Adapter({"unet": {key: t.float() for key, t in weights["unet"].items()}}, adapter.configs)
    found = read_adapter(tmp_path / "a.safetensors")
    assert_close(merged(tiny_base, found).state_dict(), merged(tiny_base, exact).state_dict())
    again = read_adapter(write(tmp_path / "b.safetensors", found, "diffusers"))
    assert_same(again, exact)


def test_a_part_of_a_peft_folder_and_mixed_kinds_are_refused(live, tmp_path):
    folder = write(tmp_path / "a", adapter_of(unet=live["LoRA"]), "peft")
    with pytest.raises(UserError, match="adapter_model.safetensors is a part of a PEFT folder. Give the folder"):
        read_adapter(folder / adapters.PEFT_FILE)
    file = write(tmp_path / "a.safetensors", adapter_of(unet=live["LoRA"]), "kohya")
    extra = load_file(write(tmp_path / "b.safetensors", adapter_of(unet=live["LoHa"]), "kohya"))
    extra = {key: tensor for key, tensor in extra.items() if "hada" in key}
    save_file(load_file(file) | extra, file)
    with pytest.raises(UserError, match="several kinds"):
        read_adapter(file)


@pytest.mark.parametrize("alpha", [0.0, -4.0, float("nan")])
def test_an_alpha_that_is_no_strength_is_refused(live, tmp_path, alpha):
    file = write(tmp_path / "a.safetensors", adapter_of(unet=live["LoRA"]), "kohya")
    tensors = load_file(file)
    tensors[next(key for key in tensors if key.endswith(".alpha"))] = torch.tensor(alpha)
    save_file(tensors, file)
    with pytest.raises(UserError, match="the alpha (0|-4|nan), not a positive number"):
        read_adapter(file)


def without_alphas(file, *which):
    """Take the alphas out of a kohya file whose names contain one of these."""
    tensors = load_file(file)
    save_file({k: t for k, t in tensors.items() if not (k.endswith(".alpha") and any(w in k for w in which))}, file)
    return file


def test_the_flag_fills_in_what_a_file_leaves_open_and_nothing_else(tiny_base, live, tmp_path):
    adapter = adapter_of(unet=live["LoRA"])  # at alpha 12
    file = without_alphas(write(tmp_path / "a.safetensors", adapter, "kohya"), "middle_block")
    with pytest.raises(UserError, match="does not say its alpha for 16 of 136 modules.*Give --lora_alpha 4"):
        read_adapter(file)
    found = read_adapter(file, lora_alpha=6.0)
    expected = copy.deepcopy(adapter)
    expected.configs["unet"].alpha_pattern = {".*mid_block.*": 6.0}
    assert_same(found, expected)
    assert_close(merged(tiny_base, found).state_dict(), merged(tiny_base, expected).state_dict())


def test_the_flag_fills_in_a_component_that_has_no_alpha_beside_one_that_has(tiny_base, live, tmp_path):
    adapter = adapter_of(unet=live["LoRA"], text_encoder=trained(tiny_base, TEXT, name="text_encoder"))
    file = without_alphas(write(tmp_path / "a.safetensors", adapter, "kohya"), "lora_te1")
    with pytest.raises(UserError, match="does not say its alpha. "):
        read_adapter(file)
    found = read_adapter(file, lora_alpha=5.0)
    assert {name: adapters.default_alpha(config) for name, config in found.configs.items()} == {
        "unet": 12,
        "text_encoder": 5,
    }


def test_of_several_adapters_the_flag_is_for_those_that_leave_alpha_open(live, tmp_path):
    said = write(tmp_path / "said.safetensors", adapter_of(unet=live["LoRA"]), "kohya")
    left_open = without_alphas(write(tmp_path / "open.safetensors", adapter_of(unet=live["LoRA"]), "kohya"), "")
    folder = write(tmp_path / "peft", adapter_of(unet=live["LoRA"]), "peft")
    found = read_adapters([said, left_open, folder], lora_alpha=6.0)
    assert [adapters.default_alpha(adapter.configs["unet"]) for adapter in found] == [12, 6, 12]


@pytest.mark.parametrize("layout", conversion.LAYOUTS)
def test_a_flag_that_contradicts_a_file_that_states_every_alpha_is_refused(live, tmp_path, layout):
    path = write(tmp_path / ("a" if layout == "peft" else "a.safetensors"), adapter_of(unet=live["LoRA"]), layout)
    with pytest.raises(UserError, match="--lora_alpha is 6, but .* says 12 for the unet. Drop --lora_alpha"):
        read_adapter(path, lora_alpha=6.0)
    assert_same(read_adapter(path, lora_alpha=12.0), read_adapter(path))


@pytest.mark.parametrize("kind", ["DoRA", "DoRA of convolutions"])
def test_a_dora_over_the_inputs_is_refused_by_its_name(tiny_base, live, tmp_path, kind):
    """LyCORIS can norm the weight along its columns, which PEFT's DoRA cannot."""
    file = write(tmp_path / "a.safetensors", adapter_of(unet=live[kind]), "kohya")
    tensors = load_file(file)
    inputs = {key: tensor.shape[1] for key, tensor in tensors.items() if "lora_down" in key}
    for key in [key for key in tensors if key.endswith("dora_scale")]:
        sizes = tensors[key].shape[2:]
        tensors[key] = torch.ones(1, inputs[key.replace("dora_scale", "lora_down.weight")], *sizes)
    save_file({key: tensor for key, tensor in tensors.items() if not key.endswith(".alpha")}, file)
    with pytest.raises(UserError, match=r"a.safetensors is a DoRA over the inputs, as \S+dora_scale of 1 x \d+"):
        read_adapter(file)


def test_a_dora_over_the_inputs_that_are_as_many_as_the_outputs_is_not_taken_for_one_over_these(live, tmp_path):
    file = write(tmp_path / "a.safetensors", adapter_of(unet=live["DoRA of convolutions"]), "kohya")
    tensors = load_file(file)
    key = "lora_unet_middle_block_0_in_layers_2.dora_scale"
    assert tensors[key].shape == (64, 1, 1, 1)
    assert tensors[key.replace("dora_scale", "lora_down.weight")].shape[1] == 64
    save_file(tensors | {key: tensors[key].transpose(0, 1).contiguous()}, file)
    with pytest.raises(UserError, match="DoRA over the inputs, as .*in_layers_2.dora_scale of 1 x 64 x 1 x 1 shows"):
        read_adapter(file)


@pytest.mark.parametrize("kind", ["LoHa", "LoKr", "LoKr by 4", "LoKr of whole matrices", "LoHa of convolutions"])
@pytest.mark.parametrize("shape", [(64, 1), (1, 64)])
def test_a_loha_or_lokr_with_weight_decomposition_is_refused_by_its_name(live, tmp_path, kind, shape):
    file = write(tmp_path / "a.safetensors", adapter_of(unet=live[kind]), "kohya")
    tensors = {key: tensor for key, tensor in load_file(file).items() if not key.endswith(".alpha")}
    modules = {key.partition(".")[0] for key in tensors}
    save_file(tensors | {f"{module}.dora_scale": torch.ones(shape) for module in modules}, file)
    name = kind[:4]
    with pytest.raises(UserError, match=f"a.safetensors is a {name} with weight decomposition, .* is not read here. "):
        read_adapter(file)


def test_equal_adapters_give_equal_files(live, tmp_path):
    adapter = adapter_of(unet=live["patterns"])
    for layout in ("diffusers", "kohya"):
        files = [
            write(tmp_path / name / DIFFUSERS_FILE, adapter, layout) for name in map(mkdir(tmp_path, layout), "ab")
        ]
        assert files[0].read_bytes() == files[1].read_bytes()


def mkdir(folder, layout):
    def make(name):
        (folder / f"{layout}-{name}").mkdir()
        return f"{layout}-{name}"

    return make


def test_an_alpha_without_its_weights_is_named(tmp_path):
    weights = {"lora_unet_mid_block_attentions_0_proj_in.lora_down.weight": torch.ones(4, 8)}
    weights |= {"lora_unet_mid_block_attentions_0_proj_in.lora_up.weight": torch.ones(8, 4)}
    weights |= {f"lora_unet_mid_block_attentions_0_proj_{end}.alpha": torch.tensor(4.0) for end in ("in", "out")}
    save_file(weights, tmp_path / "a.safetensors")
    with pytest.raises(UserError, match="the alpha of 1 modules without their weights, such as mid_block.*proj_out"):
        read_adapter(tmp_path / "a.safetensors")


@pytest.mark.parametrize(
    "pattern",
    [
        r".*(down|up)_blocks.*attentions.*attn.*\.(to_q|to_k|to_v|to_out\.0)",
        r".*blocks\.\d+\.attentions\.\d+\.transformer_blocks\.\d+\.attn\d+\.to_(q|k|v|out\.0)",
    ],
)
def test_an_ordinary_pattern_of_targets_is_merged_as_peft_does(tiny_base, tmp_path, pattern):
    trained(tiny_base, LoraConfig(r=4, lora_alpha=12, target_modules=pattern)).save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(load(tiny_base), tmp_path).merge_and_unload()
    assert_close(merged(tiny_base, read_adapter(tmp_path)).state_dict(), loaded.state_dict())


# --- how a LoRA was begun ---


@pytest.mark.parametrize("init", [True, False, "gaussian", "eva", "orthogonal", "mica"])
def test_a_lora_whose_beginning_left_the_base_alone_is_merged_as_peft_loads_it(tiny_base, tmp_path, init):
    model = trained(tiny_base, LoraConfig(r=4, lora_alpha=12, target_modules=ATTENTION, init_lora_weights=init))
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(load(tiny_base), tmp_path).merge_and_unload()
    assert_close(merged(tiny_base, read_adapter(tmp_path)).state_dict(), loaded.state_dict())


@pytest.mark.parametrize("layout", ["peft", "diffusers"])
@pytest.mark.parametrize("init", ["pissa", "pissa_niter_4", "olora", "OLoRA", "corda", "loftq", "lora_ga", "of_later"])
def test_a_lora_whose_beginning_changed_the_base_is_refused(live, tmp_path, init, layout):
    adapter = adapter_of(unet=live["LoRA"])
    adapter.configs["unet"].init_lora_weights = init
    folder = tmp_path / "a"
    if layout == "peft":
        adapter_writer.write_peft_folders(folder, adapter)
    else:
        folder.mkdir()
        adapter_writer.write_diffusers(folder, adapter)
    remedy = "path_initial_model_for_weight_conversion"
    with pytest.raises(UserError, match=f"init_lora_weights {init!r}.*save_pretrained.*{remedy}"):
        read_adapter(folder)


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_what_peft_converts_to_a_plain_lora_is_merged_as_it_answered(tiny_base, tmp_path, init):
    config = LoraConfig(r=4, lora_alpha=4, target_modules=ATTENTION, init_lora_weights=init)
    model = get_peft_model(load(tiny_base), config)
    initial = tmp_path / "initial"
    # As PEFT's guide has it: saved as if its beginning were plain, before it is trained.
    model.peft_config["default"].init_lora_weights = True
    model.save_pretrained(initial)
    model.peft_config["default"].init_lora_weights = init
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data += 0.02 * torch.randn(parameter.shape, generator=generator)
    model.save_pretrained(tmp_path / "raw")
    with pytest.raises(UserError, match="init_lora_weights"):
        read_adapter(tmp_path / "raw")
    model.save_pretrained(tmp_path / "plain", path_initial_model_for_weight_conversion=initial)
    assert difference(answer(merged(tiny_base, read_adapter(tmp_path / "plain"))), answer(model)) < 1e-4


# --- what is malformed ---


def dropped(part):
    """Without a part of one module."""
    return lambda parts: {key: tensor for key, tensor in parts.items() if key != part}


def cut(part, side):
    """With a part of one module shorter on a side."""
    return lambda parts: parts | {part: parts[part].narrow(side, 0, 1).clone()}


def added(part):
    """With a part more of one module."""
    return lambda parts: parts | {part: torch.ones(4, 4)}


MALFORMED = [
    *(("LoRA", dropped(f"lora_{side}.weight"), f"has no lora_{side}") for side in "AB"),
    ("LoRA", cut("lora_A.weight", 0), "lora_A has rank 1, but .* 4|lora_B has rank 4, but .* 1"),
    ("LoRA", cut("lora_B.weight", 1), "lora_B has rank 1, but .* 4"),
    ("LoRA", added("lora_magnitude_vector"), "magnitude_vector"),
    ("LoCon", lambda parts: parts | {"lora_B.weight": parts["lora_B.weight"][..., None]}, "lora_B is 64 x 4 x 1"),
    ("DoRA", dropped("lora_magnitude_vector"), "has no lora_magnitude_vector"),
    ("DoRA", cut("lora_magnitude_vector", 0), "outputs, but its magnitude vector is 1"),
    *(("LoHa", dropped(f"hada_w{n}_{side}"), f"has no hada_w{n}_{side}") for n in "12" for side in "ab"),
    ("LoHa", cut("hada_w2_a", 1), "hada_w2_a has rank 1"),
    ("LoHa", cut("hada_w2_b", 1), "hada_w1_b is 4 x .*, but its hada_w2_b 4 x 1"),
    ("LoHa of convolutions", dropped("hada_t1"), "has no hada_t1"),
    ("LoHa of convolutions", cut("hada_t2", 1), "hada_t2 has rank 1"),
    *(
        ("LoKr", dropped(f"lokr_w{n}_{side}"), f"has no lokr_w{n}_{side}|half of its lokr_w")
        for n in "12"
        for side in "ab"
    ),
    ("LoKr", cut("lokr_w2_a", 1), "lokr_w2_a has rank 1"),
    ("LoKr", added("lokr_w1"), "lokr_w1_[ab]"),
]


@pytest.mark.parametrize("layout", ["peft", "kohya"])
@pytest.mark.parametrize(("kind", "change", "pattern"), MALFORMED)
def test_a_malformed_adapter_is_refused_when_it_is_read(live, tmp_path, kind, change, pattern, layout):
    adapter = adapter_of(unet=live[kind])
    modules = adapters.by_module(adapter.weights["unet"])
    module = "conv_in" if kind.endswith("convolutions") else "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    parts = change(modules[module])
    modules[module] = parts
    weights = {f"{m}.{part}": tensor for m, of in modules.items() for part, tensor in of.items()}
    adapter = Adapter({"unet": weights}, adapter.configs)
    if layout == "peft":
        adapter_writer.write_peft_folders(tmp_path / "a", adapter)
    else:
        (tmp_path / "a").mkdir()
        adapter_writer.write_kohya(tmp_path / "a" / DIFFUSERS_FILE, adapter)
    with pytest.raises(UserError, match=f"a[/ ].*({pattern})"):
        read_adapter(tmp_path / "a")


def test_a_weight_of_a_peft_folder_that_is_no_part_of_an_adapter_is_named(live, tmp_path):
    adapter = adapter_of(unet=live["LoRA"])
    adapter.weights["unet"]["conv_in.weight"] = torch.ones(4, 4)
    adapter_writer.write_peft_folders(tmp_path / "a", adapter)
    with pytest.raises(UserError, match="conv_in.weight"):
        read_adapter(tmp_path / "a")


@pytest.mark.parametrize("layout", ["peft", "diffusers"])
@pytest.mark.parametrize(
    ("name", "value"),
    [("rank_pattern", 4.0), ("rank_pattern", 0), ("rank_pattern", -4), ("rank_pattern", True)]
    + [("alpha_pattern", 0), ("alpha_pattern", -1.0), ("alpha_pattern", float("inf"))],
)
def test_a_rank_that_is_not_whole_and_a_value_that_is_not_positive_are_refused(live, tmp_path, layout, name, value):
    adapter = adapter_of(unet=live["rsLoRA"])
    setattr(adapter.configs["unet"], name, {"to_q": value})
    if layout == "peft":
        adapter_writer.write_peft_folders(tmp_path / "a", adapter)
    else:
        (tmp_path / "a").mkdir()
        adapter_writer.write_diffusers(tmp_path / "a", adapter)
    with pytest.raises(UserError, match=f"{name} is .*to_q.*, not names with positive"):
        read_adapter(tmp_path / "a")


# --- a merged folder ---


def save_merged(tiny_base, live, place):
    folders = {name: tiny_base / name for name in COMPONENTS}
    scheduler = components.load("scheduler", folders["scheduler"])
    whole_model.save_tuned(place, folders, None, torch.float32, scheduler, [(adapter_of(unet=live["LoRA"]), 1.0)])


def test_a_full_disk_under_a_merged_folder_is_an_error_with_the_remedy(tiny_base, live, tmp_path):
    # A limit on the size of files stops the write of the first weights, as a full disk does.
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, before[1]))
    try:
        with pytest.raises(UserError, match=r"/tuned cannot be written: .*Make room, or give another place"):
            save_merged(tiny_base, live, tmp_path / "tuned")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_write_of_a_merged_folder_leaves_nothing_under_its_name(tiny_base, live, tmp_path, monkeypatch):
    def damage(file):
        content = bytearray(file.read_bytes())
        content[-40] ^= 1
        file.write_bytes(content)

    monkeypatch.setattr(whole_model, "sync", damage, raising=False)
    with pytest.raises(RuntimeError, match="does not read back as it was written"):
        save_merged(tiny_base, live, tmp_path / "tuned")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "value", "pattern"),
    [
        ("use_qalora", True, "says use_qalora: the change of this variant is not the plain product"),
        ("layer_replication", [[0, 1]], "says layer_replication"),
        ("alora_invocation_tokens", [1, 2], "says alora_invocation_tokens"),
        ("arrow_config", {"a": 1}, "says arrow_config"),
        ("use_bdlora", True, "says use_bdlora"),
        ("trainable_token_indices", [1], "says trainable_token_indices"),
        ("use_rslora", "x", "use_rslora is 'x', not true or false"),
    ],
)
def test_a_variant_whose_change_is_another_is_refused(live, tmp_path, name, value, pattern):
    adapter_writer.write_peft_folders(tmp_path / "a", adapter_of(unet=live["LoRA"]))
    file = tmp_path / "a" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {name: value}))
    with pytest.raises(UserError, match=pattern):
        read_adapter(tmp_path / "a")


@pytest.mark.parametrize(
    ("name", "value"), [("task_type", "CAUSAL_LM"), ("lora_dropout", "x"), ("megatron_config", {"a": 1}), ("bias", 5)]
)
def test_what_a_merge_does_not_hang_on_may_be_anything(tiny_base, live, tmp_path, name, value):
    adapter = adapter_of(unet=live["LoRA"])
    adapter_writer.write_peft_folders(tmp_path / "a", adapter)
    file = tmp_path / "a" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {name: value}))
    found, expected = (merged(tiny_base, one).state_dict() for one in (read_adapter(tmp_path / "a"), adapter))
    assert all(torch.equal(found[key], tensor) for key, tensor in expected.items())
