import json
import shutil
from pathlib import Path

import diffusers
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode

from rasengan import UserError, component_checks, components
from rasengan.components import load
from rasengan.sources import COMPONENT_FLAGS, COMPONENTS, TEXT_ENCODERS, TOKENIZERS, Source, fetch


MODELS = list(components.MODELS)


@pytest.fixture
def base(tiny_base, tmp_path):
    """A copy of the tiny base that a test may damage."""
    return Path(shutil.copytree(tiny_base, tmp_path / "base"))


def folders_of(base):
    return {name: base / name for name in MODELS}


def weights_of(folder):
    (file,) = folder.glob("*.safetensors")
    return file


def edit(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({k: v for k, v in (config | changes).items() if v != "absent"}))


def refuse(words, function, *arguments, **options):
    with pytest.raises(UserError, match=words) as error:
        function(*arguments, **options)
    assert "\n" not in str(error.value)


# --- whether they fit together ---


def test_the_tiny_base_is_one_sdxl(base):
    component_checks.check_components(folders_of(base))
    component_checks.check_components({"unet": base / "unet"})


@pytest.mark.parametrize("component", MODELS)
def test_another_class_is_refused_by_its_name(base, component):
    other = MODELS[MODELS.index(component) - 1]
    found, expected = components.MODELS[other].__name__, components.MODELS[component].__name__
    words = f"{base / other} holds an? {found}, not .*{expected}.*{COMPONENT_FLAGS[component]}"
    refuse(words, component_checks.check_components, folders_of(base) | {component: base / other})


@pytest.mark.parametrize(
    ("component", "changes", "words"),
    [
        ("unet", {"cross_attention_dim": 768, "addition_embed_type": "absent"}, r"UNet of Stable Diffusion 1\.x.*768"),
        ("unet", {"cross_attention_dim": 1024, "addition_embed_type": None}, r"UNet of Stable Diffusion 2\.x.*1024"),
        ("unet", {"cross_attention_dim": 640, "addition_embed_type": "text"}, "another model family.*640"),
        ("unet", {"cross_attention_dim": 1280}, "1280 .*the SDXL refiner.*text encoders give 96"),
        ("unet", {"cross_attention_dim": 2048}, "2048, but the text encoders give 96"),
        ("unet", {"in_channels": 9}, r"9 input channels \(inpainting.*--pretrained_unet_name_or_path"),
        ("unet", {"projection_class_embeddings_input_dim": 2816}, "pooled text width of 2624.*gives 64"),
        ("text_encoder_2", {"hidden_size": 128}, "width 96, but the text encoders give 160"),
        ("text_encoder_2", {"projection_dim": 1280}, "pooled text width of 64.*gives 1280"),
        ("vae", {"scaling_factor": "absent"}, "VAE without a scaling_factor.*--pretrained_vae_model_name_or_path"),
        ("text_encoder", {"quantization_config": {"load_in_8bit": True}}, "quantized already.*Give one in fp16"),
        ("unet", {"quantization_config": {"quant_method": "bitsandbytes"}}, "a unet that is quantized already"),
        ("text_encoder_2", {"num_hidden_layers": 10**9}, "of 1000000000 num_hidden_layers; SDXL's have 12 and 32"),
        ("vae", {"scaling_factor": None}, "VAE without a scaling_factor.*--pretrained_vae_model_name_or_path"),
        ("vae", {"latent_channels": "absent"}, "vae/config.json has no latent_channels.*None.*Fetch the vae again"),
        ("unet", {"addition_time_embed_dim": None}, "unet/config.json has no addition_time_embed_dim.*Fetch the unet"),
        ("text_encoder", {"hidden_size": "absent"}, "text_encoder/config.json has no hidden_size"),
        ("vae", {"latent_channels": 16}, "VAE with 16 latent channels.*--pretrained_vae_model_name_or_path"),
        ("unet", {"_class_name": "absent"}, "not SDXL's unet"),
        ("unet", {"time_cond_proj_dim": 256}, "told the guidance scale .time_cond_proj_dim.*Give the base"),
        ("vae", {"latents_mean": [0.0] * 4}, "VAE with latents_mean.*--pretrained_vae_model_name_or_path"),
        ("vae", {"latents_std": [1.0] * 4}, "VAE with latents_mean, latents_std or a shift_factor"),
    ],
)
def test_what_does_not_fit_is_refused_by_its_configuration_alone(base, component, changes, words):
    edit(base / component, **changes)
    for file in base.rglob("*.safetensors"):
        file.unlink()
    refuse(words, component_checks.check_components, folders_of(base))


@pytest.mark.parametrize(
    ("component", "file", "changes", "words"),
    [
        (
            "scheduler",
            "scheduler_config.json",
            {"_class_name": 5},
            "names the scheduler class 5, which diffusers does",
        ),
        ("scheduler", "scheduler_config.json", {"num_train_timesteps": 0}, "a scheduler of 0 num_train_timesteps"),
        ("vae", "config.json", {"scaling_factor": "x"}, "whose scaling_factor is 'x'; SDXL's is 0.13025"),
        ("vae", "config.json", {"scaling_factor": float("inf")}, "whose scaling_factor is inf"),
        ("vae", "config.json", {"scaling_factor": 10**400}, "whose scaling_factor is 1000"),
        ("vae", "config.json", {"shift_factor": 0.5}, "latents_std or a shift_factor"),
        ("scheduler", "scheduler_config.json", {"num_train_timesteps": 10**9}, "scheduler of 1000000000 num"),
        ("text_encoder", "config.json", {"architectures": 5}, "holds a model of no named class"),
        ("tokenizer", "tokenizer_config.json", {"model_max_length": 5}, "its model_max_length is 5; SDXL's is 77"),
        ("tokenizer_2", "tokenizer_config.json", {"model_max_length": "x"}, "cannot be loaded"),
    ],
)
def test_values_that_nothing_can_be_done_with_are_refused(base, component, file, changes, words):
    path = base / component / file
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    where = {name: base / name for name in COMPONENTS}

    def check_and_load():
        component_checks.check_components(where)
        components.load(component, where[component])

    refuse(words, check_and_load)


def test_a_tokenizer_that_says_no_length_has_that_of_the_encoders(base):
    path = base / "tokenizer" / "tokenizer_config.json"
    config = json.loads(path.read_text())
    del config["model_max_length"]
    path.write_text(json.dumps(config))
    assert components.load("tokenizer", base / "tokenizer").model_max_length == 77


@pytest.mark.parametrize("content", ["[" * 100_000, '{"a": ' + "9" * 10_000 + "}"])
def test_a_configuration_that_cannot_be_read_is_refused(base, content):
    (base / "unet" / "config.json").write_text(content)
    refuse("config.json is not JSON", components.read_config, "unet", base / "unet")


@pytest.mark.parametrize("schedule", [None, "scaled_linear"])
def test_a_scheduler_of_another_family_is_refused(base, schedule):
    diffusers.FlowMatchEulerDiscreteScheduler().save_pretrained(base / "scheduler")
    file = base / "scheduler" / "scheduler_config.json"
    if schedule:
        file.write_text(json.dumps(json.loads(file.read_text()) | {"beta_schedule": schedule}))
    words = f"holds a FlowMatchEulerDiscreteScheduler with{'' if schedule else 'out'} a beta_schedule, as of SD 3 or"
    where = folders_of(base) | {"scheduler": base / "scheduler"}
    refuse(f"{words} Flux.*--pretrained_scheduler_name_or_path", component_checks.check_components, where)


@pytest.mark.parametrize("content", ["{", "", "[1]", "\x00"])
def test_a_damaged_configuration_is_refused(base, content):
    (base / "vae" / "config.json").write_text(content)
    refuse("vae.*config.json is not", component_checks.check_components, folders_of(base))


@pytest.mark.parametrize("component", MODELS)
def test_a_skeleton_has_every_name_and_shape_and_no_memory(tiny_base, component):
    skeleton = components.skeleton(component, tiny_base / component)
    loaded = load(component, tiny_base / component)
    assert type(skeleton) is type(loaded)
    assert {tensor.device.type for tensor in skeleton.parameters()} == {"meta"}
    shapes = [{name: tensor.shape for name, tensor in m.state_dict().items()} for m in (skeleton, loaded)]
    assert shapes[0] == shapes[1]


# --- precision and loading ---


def test_the_frozen_weights_are_in_the_precision_asked_for():
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert components.weight_dtype("no", cpu) == components.weight_dtype("no", cuda) == torch.float32
    assert components.weight_dtype("bf16", cpu) == torch.bfloat16
    assert components.weight_dtype("fp16", cuda) == torch.float16
    refuse("fp16 .*CPU.*--mixed_precision no", components.weight_dtype, "fp16", cpu)
    refuse("fp8", components.weight_dtype, "fp8", cpu)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("component", MODELS)
def test_a_model_is_loaded_frozen_in_the_dtype_and_the_vae_always_in_fp32(base, component, dtype):
    if component == "vae":  # as the fp16 variant stores it
        save_file({k: v.half() for k, v in load_file(weights_of(base / "vae")).items()}, weights_of(base / "vae"))
    model = load(component, base / component, dtype)
    expected = torch.float32 if component == "vae" else dtype
    assert type(model) is components.MODELS[component]
    assert {tensor.dtype for tensor in model.state_dict().values()} == {expected}
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    stored, loaded = load_file(weights_of(base / component)), model.state_dict()
    assert stored.keys() == loaded.keys()
    assert all(torch.equal(loaded[name], tensor.to(expected)) for name, tensor in stored.items())


@pytest.mark.parametrize("damage", ["truncated", "empty", "of other shapes", "incomplete", "of other names"])
@pytest.mark.parametrize("component", MODELS)
def test_damaged_weights_are_refused_by_the_components_name(base, component, damage):
    file = weights_of(base / component)
    tensors = load_file(file)
    name = next(name for name in reversed(tensors) if name.endswith(".weight"))
    if damage == "truncated":
        file.write_bytes(file.read_bytes()[:-100])
    elif damage == "empty":
        file.write_bytes(b"")
    elif damage == "of other shapes":
        save_file(tensors | {name: torch.zeros(3, 5)}, file)
    elif damage == "incomplete":
        save_file({key: tensor for key, tensor in tensors.items() if key != name}, file)
    else:
        save_file({f"wrapped.{key}": tensor for key, tensor in tensors.items()}, file)
    words = f"{component} in .*cannot be loaded.*{COMPONENT_FLAGS[component]}"
    refuse(words, load, component, base / component)


def test_text_encoders_load_with_the_hubs_names_of_tensors(base):
    for name in TEXT_ENCODERS:  # which have the prefix in both, and a position_ids that is no weight now
        before, file = load(name, base / name).state_dict(), weights_of(base / name)
        tensors = {f"text_model.{k.removeprefix('text_model.')}": v for k, v in load_file(file).items()}
        if name == "text_encoder_2":
            tensors["text_projection.weight"] = tensors.pop("text_model.text_projection.weight")
        save_file(tensors | {"text_model.embeddings.position_ids": torch.arange(77)[None]}, file)
        after = load(name, base / name).state_dict()
        assert all(torch.equal(after[key], tensor) for key, tensor in before.items())


@pytest.mark.parametrize("component", TOKENIZERS)
def test_a_tokenizer_loads_from_the_hubs_files_and_not_without_its_vocabulary(base, component):
    text = "A red star, on striped らせんがん"
    folder, expected = base / component, load(component, base / component)(text).input_ids
    model = json.loads((folder / "tokenizer.json").read_text())["model"]
    (folder / "tokenizer.json").unlink()
    (folder / "vocab.json").write_text(json.dumps(model["vocab"]))
    lines = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *lines]) + "\n")
    assert fetch(component, Source(str(base), component)) == folder
    assert load(component, folder)(text).input_ids == expected
    (folder / "merges.txt").unlink()
    refuse(f"{component}.*merges.txt", fetch, component, Source(str(base), component))
    (folder / "tokenizer.json").write_text("{")
    refuse(f"{component} in .*cannot be loaded", load, component, folder)


@pytest.mark.parametrize(
    ("own", "given", "expected"),
    [
        ("v_prediction", None, "v_prediction"),
        ("v_prediction", "epsilon", "epsilon"),
        ("sample", "epsilon", "epsilon"),
        (None, None, "epsilon"),
    ],
)
def test_a_scheduler_has_the_prediction_type_that_is_given_or_its_own(base, own, given, expected):
    file = base / "scheduler" / "scheduler_config.json"
    config = json.loads(file.read_text()) | {"prediction_type": own}
    file.write_text(json.dumps({name: value for name, value in config.items() if value}))
    assert components.load_scheduler(base / "scheduler", given).config.prediction_type == expected


def test_a_scheduler_without_a_prediction_type_predicts_the_noise(base):
    (base / "scheduler" / "scheduler_config.json").write_text('{"_class_name": "FlowMatchEulerDiscreteScheduler"}')
    assert "prediction_type" not in load("scheduler", base / "scheduler").config
    assert components.load_scheduler(base / "scheduler", None).config.prediction_type == "epsilon"


def test_a_scheduler_is_of_the_class_that_its_configuration_names(base):
    assert type(load("scheduler", base / "scheduler")) is diffusers.EulerDiscreteScheduler
    file = base / "scheduler" / "scheduler_config.json"
    for name in ("NoScheduler", "UNet2DConditionModel"):
        file.write_text(json.dumps({"_class_name": name}))
        refuse(f"'{name}'.*--pretrained_scheduler_name_or_path", load, "scheduler", base / "scheduler")


# --- the precision of the recipe ---


def test_bf16_on_a_card_without_it_is_refused_with_the_remedy(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *arguments: True)
    assert components.weight_dtype("bf16", torch.device("cuda")) == torch.bfloat16
    asked = []
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *arguments: asked.append(arguments))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *arguments: "Tesla T4")
    refuse("bf16 .*Tesla T4.*--mixed_precision fp16", components.weight_dtype, "bf16", torch.device("cuda"))
    assert asked == [(False,)]  # emulated bf16, which a T4 has, does not count


def test_a_unet_in_half_precision_never_exists_in_fp32(base):
    file = weights_of(base / "unet")
    save_file({key: tensor.half() for key, tensor in load_file(file).items()}, file)
    large, made = max(tensor.numel() for tensor in load_file(file).values()), set()

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, arguments=(), options=None):
            result = function(*arguments, **(options or {}))
            if isinstance(result, torch.Tensor) and result.numel() == large and result.device.type == "cpu":
                made.add(result.dtype)
            return result

    with Watch():
        model = load("unet", base / "unet", torch.float16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float16}
    assert torch.float32 not in made
    with Watch():
        load("unet", base / "unet", torch.float32)
    assert torch.float32 in made  # so it would have been seen


def test_no_configuration_chooses_the_code_of_the_attention(base):
    edit(base / "text_encoder", _attn_implementation="kernels-community/x", attn_implementation="kernels-community/x")
    for encoder in (
        components.load("text_encoder", base / "text_encoder"),
        components.skeleton("text_encoder", base / "text_encoder"),
    ):
        assert encoder.config._attn_implementation == components.ATTENTION
