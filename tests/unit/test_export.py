import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY
from peft import LoHaConfig, LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from rasengan import (
    UserError,
    adapter_reader,
    adapter_writer,
    adapters,
    components,
    export,
    fitting,
    lora,
    merging,
    safetensors_header,
)
from rasengan.sources import COMPONENTS


RANK, LORA_ALPHA = 4, 12.0
MODULES = {"unet": 136, "text_encoder": 8, "text_encoder_2": 12}


def load(tiny_base, name, dtype=torch.float32):
    return components.load(name, tiny_base / name, dtype)


def train_a_little(models):
    generator = torch.Generator().manual_seed(0)
    for name, model in models.items():
        targets = lora.UNET_TARGETS if name == "unet" else lora.TEXT_ENCODER_TARGETS
        lora.add_lora(model, lora.lora_config(RANK, LORA_ALPHA, targets))
        for parameter in lora.trainable_parameters(model).values():
            parameter.data.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return models


@pytest.fixture(scope="module")
def models(tiny_base):
    """All three adapted components, as a training would leave them; B is not zero, and alpha is not the rank."""
    return train_a_little({name: load(tiny_base, name) for name in MODULES})


@pytest.fixture(scope="module")
def saved(models, tmp_path_factory):
    """Output folder with pytorch_lora_weights.safetensors and peft/."""
    folder = tmp_path_factory.mktemp("saved")
    export.publish(folder, models)
    return folder


@pytest.fixture(scope="module")
def adapted_pipeline(tiny_base, saved):
    """diffusers' own pipeline with what it loaded of the file."""
    pipeline = StableDiffusionXLPipeline(**{name: load(tiny_base, name) for name in COMPONENTS})
    pipeline.load_lora_weights(saved)
    return pipeline


@pytest.fixture
def file(saved, tmp_path):
    """A copy of the file in diffusers' layout, to damage."""
    return shutil.copy(saved / adapters.DIFFUSERS_FILE, tmp_path / "adapter.safetensors")


@torch.no_grad()
def answer(name, model):
    """What a component says to a fixed input, on the way that its LoRA is on."""
    generator = torch.Generator().manual_seed(1)
    model.eval()
    if name != "unet":
        ids = torch.randint(0, 500, (2, 9), generator=generator)
        return model(ids, output_hidden_states=True).hidden_states[-1]
    sample, states, pooled = (torch.randn(s, generator=generator) for s in ((2, 4, 8, 8), (2, 5, 96), (2, 64)))
    added = {"text_embeds": pooled, "time_ids": torch.full((2, 6), 64.0)}
    return model(sample, torch.tensor([3, 700]), states, added_cond_kwargs=added).sample


def difference(found, expected):
    return ((found - expected).norm() / expected.norm()).item()


def merged(tiny_base, name, adapter, dtype=torch.float32, scale=1.0):
    return merging.merge(load(tiny_base, name, dtype), [(adapter, scale)], name)


def rewrite(file, change, metadata=None):
    """Write the file anew with other tensors, and the metadata given or the one it had."""
    with safe_open(file, framework="pt") as content:
        metadata = metadata or content.metadata()
    save_file(change(load_file(file)), file, metadata=metadata)


# --- every way of loading gives the trained model ---


@pytest.mark.parametrize("name", MODULES)
def test_diffusers_peft_and_the_merge_answer_as_the_live_model_does(tiny_base, models, saved, adapted_pipeline, name):
    base = answer(name, load(tiny_base, name))
    live = answer(name, models[name])
    assert difference(live, base) > 0.05

    assert difference(answer(name, getattr(adapted_pipeline, name)), live) < 1e-5

    folder = saved / "peft" if name == "unet" else saved / "peft" / name
    assert difference(answer(name, PeftModel.from_pretrained(load(tiny_base, name), folder)), live) < 1e-5

    for path in (saved, saved / "peft"):
        model, report = merged(tiny_base, name, adapter_reader.read_adapter(path))
        assert type(model) is type(load(tiny_base, name))
        assert not any("lora" in key for key in model.state_dict())
        assert difference(answer(name, model), live) < 1e-5
        assert report.modules == MODULES[name]
        assert report.relative_change > 0.01


@pytest.mark.parametrize("name", MODULES)
def test_a_merge_into_fp16_rounds_once(tiny_base, saved, name):
    adapter = adapter_reader.read_adapter(saved)
    base = {key: tensor.double() for key, tensor in load(tiny_base, name, torch.float16).state_dict().items()}
    expected, squared_change, squared_norm = dict(base), 0, 0
    weights = adapter.weights[name]
    for key in weights:
        file_module, _, part = key.partition(".lora_")
        if part == "A.weight":
            a, b = weights[key].double(), weights[f"{file_module}.lora_B.weight"].double()
            change = 0.7 * LORA_ALPHA / RANK * b @ a
            module = file_module if f"{file_module}.weight" in base else file_module.removeprefix("text_model.")
            expected[f"{module}.weight"] = base[f"{module}.weight"] + change
            squared_change += change.square().sum()
            squared_norm += base[f"{module}.weight"].square().sum()
    model, report = merged(tiny_base, name, adapter, torch.float16, scale=0.7)
    found = model.state_dict()
    assert found.keys() == expected.keys()
    changed = {key for key in base if not torch.equal(base[key], expected[key])}
    assert len(changed) == MODULES[name]
    differing = sum((found[key] != expected[key].half()).sum().item() for key in changed)
    assert differing <= 1e-3 * sum(found[key].numel() for key in changed)
    assert all(torch.equal(found[key], base[key].half()) for key in base.keys() - changed)
    assert report.relative_change == pytest.approx((squared_change / squared_norm).sqrt().item(), rel=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_scale_0_leaves_the_base_bit_for_bit(tiny_base, saved, dtype):
    model, report = merged(tiny_base, "unet", adapter_reader.read_adapter(saved), dtype, scale=0.0)
    base = load(tiny_base, "unet", dtype).state_dict()
    assert report == (0, 0)  # modules changed, and by how much
    for key, tensor in model.state_dict().items():
        assert torch.equal(tensor.view(torch.uint8), base[key].view(torch.uint8)), key


# --- files ---


def digests_of_three_exports(base, folder):
    models = train_a_little({name: load(base, name) for name in MODULES})
    found = set()
    for _ in range(3):
        export.publish(folder, models)
        files = [path for path in folder.rglob("*") if path.is_file()]
        found |= {f"{path.relative_to(folder)} {hashlib.sha256(path.read_bytes()).hexdigest()}" for path in files}
    return found


def run_python(code, hash_seed):
    environment = os.environ | {"PYTHONHASHSEED": str(hash_seed), "PYTHONPATH": os.path.dirname(__file__)}
    return subprocess.run(
        [sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, text=True, check=True
    ).stdout


def test_equal_weights_give_equal_files_in_a_process_with_another_hash_seed(tiny_base, tmp_path):
    ours = str(list(set(lora.UNET_TARGETS)))
    order = f"print(list(set({lora.UNET_TARGETS})), end='')"
    hash_seed = next(seed for seed in range(20) if run_python(order, seed) != ours)
    here, there = tmp_path / "here", tmp_path / "there"
    here.mkdir()
    there.mkdir()
    code = "import pathlib, test_export\n"
    code += f"base, folder = pathlib.Path({str(tiny_base)!r}), pathlib.Path({str(there)!r})\n"
    code += "print(*test_export.digests_of_three_exports(base, folder), sep='\\n')"
    found = digests_of_three_exports(tiny_base, here) | set(run_python(code, hash_seed).splitlines())
    files = 1 + 2 * len(MODULES)  # diffusers' file, and PEFT's weights and configuration of each
    assert len({line.split()[0] for line in found}) == files
    assert len(found) == files


@pytest.mark.parametrize(
    ("writer", "name"),
    [
        ("write_diffusers", adapters.DIFFUSERS_FILE),
        ("write_peft_folders", adapters.PEFT_FILE),
        ("write_peft_folders", f"text_encoder/{adapters.PEFT_FILE}"),
    ],
)
@pytest.mark.parametrize("bit", [0, 7])
def test_one_changed_bit_on_disk_is_noticed(models, tmp_path, monkeypatch, writer, name, bit):
    write = getattr(export, writer)

    def write_and_flip(folder, adapter):
        write(folder, adapter)
        content = bytearray((folder / name).read_bytes())
        content[-len(content) // 4] ^= 1 << bit
        (folder / name).write_bytes(content)

    monkeypatch.setattr(export, writer, write_and_flip)
    with pytest.raises(RuntimeError, match=f"{'peft' if 'peft' in writer else name} does not hold the trained"):
        export.publish(tmp_path, models)


@pytest.mark.parametrize(
    "change", [{"lora_alpha": 4.0}, {"r": 8}, {"alpha_pattern": {"to_q": 4.0}}, {"use_rslora": True}]
)
def test_another_strength_on_disk_is_noticed(models, saved, change):
    live = export.live_adapter(models)
    for path in (saved, saved / "peft"):
        assert adapter_writer.same_adapter(adapter_reader.read_adapter(path), live)
    for field, value in change.items():
        setattr(live.configs["unet"], field, value)
    for path in (saved, saved / "peft"):
        assert not adapter_writer.same_adapter(adapter_reader.read_adapter(path), live)


def test_an_encoder_of_an_older_run_goes_once_the_new_adapter_is_whole(tiny_base, models, tmp_path, monkeypatch):
    export.publish(tmp_path, models)
    newer = train_a_little({"unet": load(tiny_base, "unet")})
    for parameter in lora.trainable_parameters(*newer.values()).values():
        parameter.data.mul_(2)
    live, seen, rename = export.adapter_weights(newer["unet"]), [], Path.rename

    def look_and_rename(path, target):
        there = [adapter_reader.read_adapter(place).weights["unet"] for place in (tmp_path, tmp_path / "peft")]
        seen.append([all(torch.equal(weights[key], live[key]) for key in live) for weights in there])
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", look_and_rename)
    export.publish(tmp_path, newer)
    assert seen == [[True, True]] * 2  # as each of both encoders went: a run that is killed there has lost nothing
    assert {path.name for path in tmp_path.iterdir()} == {adapters.DIFFUSERS_FILE, "peft"}
    for place in (tmp_path, tmp_path / "peft"):
        assert list(adapter_reader.read_adapter(place).weights) == ["unet"]


def test_a_component_on_disk_that_was_not_trained_is_noticed(models, saved):
    for path in (saved, saved / "peft"):
        found, live = adapter_reader.read_adapter(path), export.live_adapter({"unet": models["unet"]})
        assert not adapter_writer.same_adapter(found, live)


def test_a_diverged_adapter_is_not_blamed_on_the_disk(tiny_base, tmp_path):
    models = train_a_little({"text_encoder": load(tiny_base, "text_encoder")})
    next(iter(lora.trainable_parameters(*models.values()).values())).data[0, 0] = float("nan")
    with pytest.raises((UserError, RuntimeError), match="(?i)non-finite|not finite"):
        export.publish(tmp_path, models)


# --- refused, with a reason ---


def test_a_missing_adapter_is_refused(tmp_path):
    for path, missing in ((tmp_path / "no", tmp_path / "no"), (tmp_path, tmp_path / adapters.DIFFUSERS_FILE)):
        with pytest.raises(UserError, match=f"no adapter at {missing}. Give a .safetensors file"):
            adapter_reader.read_adapter(path)


@pytest.mark.parametrize("kept", [0, 5, 100, 5000, -1])
def test_a_truncated_file_is_refused(file, kept):
    content = file.read_bytes()
    file.write_bytes(content[:kept])
    with pytest.raises(UserError, match="adapter.safetensors is no whole safetensors file.*[Cc]opy or download"):
        adapter_reader.read_adapter(file)


def test_a_file_without_alpha_names_both_readings_and_loads_with_the_flag(tiny_base, models, file):
    rewrite(file, dict, metadata={"format": "pt"})
    with pytest.raises(UserError) as caught:
        adapter_reader.read_adapter(file)
    assert "does not say its alpha" in str(caught.value)
    assert f"alpha = rank = {RANK}" in str(caught.value)
    assert "alpha that is unknown" in str(caught.value)
    assert f"--lora_alpha {RANK}" in str(caught.value)

    adapter = adapter_reader.read_adapter(file, lora_alpha=LORA_ALPHA)
    assert difference(answer("unet", merged(tiny_base, "unet", adapter)[0]), answer("unet", models["unet"])) < 1e-5
    weaker = merged(tiny_base, "unet", adapter_reader.read_adapter(file, lora_alpha=RANK))[0]
    assert difference(answer("unet", weaker), answer("unet", models["unet"])) > 0.01


@pytest.mark.parametrize("metadata", ["{", "[]", '{"unet.lora_alpha": "12", "unet.r": 4}'])
def test_damaged_metadata_are_refused(file, metadata):
    def only_unet(tensors):
        return {key: tensor for key, tensor in tensors.items() if key.startswith("unet.")}

    rewrite(file, only_unet, metadata={LORA_ADAPTER_METADATA_KEY: metadata})
    with pytest.raises(UserError, match="adapter.safetensors"):
        adapter_reader.read_adapter(file)


@pytest.mark.parametrize("text", ["{", "{}", '{"peft_type": "LORA", "r": 4, "target_modules": ["to_q"]}'])
def test_a_peft_folder_with_a_damaged_config_or_without_alpha_is_refused(saved, tmp_path, text):
    shutil.copytree(saved / "peft", tmp_path / "peft")
    (tmp_path / "peft" / "adapter_config.json").write_text(text)
    with pytest.raises(UserError, match="adapter_config.json"):
        adapter_reader.read_adapter(tmp_path / "peft")


# What the merge reads of an adapter's settings, each with a value that it cannot be.
UNUSABLE = [
    ("target_modules", 5),
    ("target_modules", [5]),
    ("rank_pattern", 5),
    ("rank_pattern", {"(": 4}),
    ("alpha_pattern", []),
    ("task_type", "X"),
    ("r", 4.5),
    ("r", True),
    ("lora_alpha", float("inf")),
]


@pytest.mark.parametrize("layout", ["diffusers", "peft"])
@pytest.mark.parametrize(("setting", "value"), UNUSABLE)
def test_settings_that_cannot_be_used_are_refused_by_name(saved, tmp_path, file, layout, setting, value):
    if layout == "diffusers":
        with safe_open(file, framework="pt") as content:
            settings = json.loads(content.metadata()[LORA_ADAPTER_METADATA_KEY])
        settings[f"unet.{setting}"] = value
        rewrite(file, dict, metadata={LORA_ADAPTER_METADATA_KEY: json.dumps(settings)})
    else:
        file = shutil.copytree(saved / "peft", tmp_path / "peft")
        settings = json.loads((file / "adapter_config.json").read_text())
        (file / "adapter_config.json").write_text(json.dumps(settings | {setting: value}))
    with pytest.raises(UserError, match=f"adapter.*{setting}|adapter.*task type"):
        adapter_reader.read_adapter(file)


def test_patterns_that_are_null_are_none(tiny_base, saved, tmp_path):
    folder = shutil.copytree(saved / "peft", tmp_path / "peft")
    settings = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(settings | {"rank_pattern": None, "alpha_pattern": None}))
    _, report = merged(tiny_base, "unet", adapter_reader.read_adapter(folder))
    assert report.modules == MODULES["unet"]


@pytest.mark.parametrize("kind", ["IA3", "OFT", "unheard of"])
def test_a_peft_folder_of_another_kind_is_refused_by_its_name(saved, tmp_path, kind):
    folder = shutil.copytree(saved / "peft", tmp_path / "peft")
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": kind, "target_modules": ["to_q"]}))
    with pytest.raises(UserError, match=f"holds a {kind} adapter, not a LoRA, LoHa or LoKr"):
        adapter_reader.read_adapter(folder)


@pytest.mark.parametrize("lora_alpha", [None, 16.0])
@pytest.mark.parametrize(
    "tensors",
    [
        {"unet.conv_in.weight": torch.ones(4, 4)},
        {"unet.mid_block.to_q.lora_A.weight": torch.ones(())},
        {"unet.mid_block.to_q.lora_A.weight": torch.ones(0, 8), "unet.mid_block.to_q.lora_B.weight": torch.ones(8, 0)},
    ],
    ids=["a whole model", "numbers", "rank 0"],
)
def test_a_file_of_the_layout_without_a_lora_in_it_is_refused_whatever_its_alpha(tmp_path, tensors, lora_alpha):
    save_file(tensors, tmp_path / "adapter.safetensors")
    with pytest.raises(UserError, match=r"adapter.safetensors holds no LoRA weights"):
        adapter_reader.read_adapter(tmp_path / "adapter.safetensors", lora_alpha)


WRONG_OPTIONS = [
    {"target_modules": 5},
    {"target_modules": [1, 2]},
    {"target_modules": {"to_q": 1}},
    {"rank_pattern": ["to_q"]},
    {"alpha_pattern": {"to_q": "8"}},
    {"r": "4"},
    {"lora_alpha": True},
]


def change_options(saved, tmp_path, layout, changes):
    """Copy the adapter of the UNet in a layout, with other options of its LoRA; absent takes one away."""
    if layout == "peft":
        folder = shutil.copytree(saved / "peft", tmp_path / "peft", ignore=shutil.ignore_patterns("text_*"))
        options = json.loads((folder / "adapter_config.json").read_text()) | changes
        kept = {name: value for name, value in options.items() if value != "absent"}
        (folder / "adapter_config.json").write_text(json.dumps(kept))
        return folder
    file = shutil.copy(saved / adapters.DIFFUSERS_FILE, tmp_path / "adapter.safetensors")
    with safe_open(file, framework="pt") as content:
        options = json.loads(content.metadata()[LORA_ADAPTER_METADATA_KEY])
    options |= {f"unet.{name}": value for name, value in changes.items()}
    kept = {name: value for name, value in options.items() if value != "absent" and name.startswith("unet.")}
    metadata = {LORA_ADAPTER_METADATA_KEY: json.dumps(kept)}
    rewrite(file, lambda tensors: {k: v for k, v in tensors.items() if k.startswith("unet.")}, metadata)
    return file


@pytest.mark.parametrize("layout", ["diffusers", "peft"])
@pytest.mark.parametrize("changes", WRONG_OPTIONS, ids=lambda changes: str(changes)[:40])
def test_options_of_another_kind_are_refused_by_the_files_name(saved, tmp_path, layout, changes):
    path = change_options(saved, tmp_path, layout, changes)
    name = "adapter_config.json" if layout == "peft" else "adapter.safetensors"
    with pytest.raises(UserError, match=f"{name}.*({'|'.join(changes)}|missing|unterminated)") as error:
        adapter_reader.read_adapter(path)
    assert "\n" not in str(error.value)


def halved(weights):
    return {key: tensor for key, tensor in weights.items() if ".attn1." not in key or ".lora_A." in key}


def without_a_module(weights):
    return {key: tensor for key, tensor in weights.items() if ".mid_block." not in f".{key}"}


def foreign(weights):
    return {key.replace("to_q", "to_quarry"): tensor for key, tensor in weights.items()}


def of_another_width(weights):
    return {
        key: torch.cat([tensor, tensor], dim=1) if ".lora_A." in key else tensor for key, tensor in weights.items()
    }


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (halved, r"attn1.to_\S+ has no lora_B"),
        (without_a_module, r"mid_block\S+ is targeted, but has no weights"),
        (foreign, r"attn1.to_quarry.lora_\S+ has no linear layer in the model"),
        (of_another_width, r"is 64 x 64 at rank 4, but its lora_B and lora_A are 64 x 4 and 4 x 128"),
        (lambda weights: {}, "it holds no weights|is targeted, but has no weights"),
        (
            lambda weights: {k: 0 * w if ".lora_B." in k else w for k, w in weights.items()},
            "changes nothing in the unet",
        ),
        (lambda weights: {k: w / 0 if ".lora_B." in k else w for k, w in weights.items()}, "makes unet.* non-finite"),
    ],
)
def test_an_adapter_that_does_not_fit_or_act_is_refused(tiny_base, saved, change, reason):
    adapter = adapter_reader.read_adapter(saved)
    adapter.weights["unet"] = change(adapter.weights["unet"])
    with pytest.raises(UserError, match=reason):
        merged(tiny_base, "unet", adapter)


def test_keys_of_another_layout_are_refused(file):
    rewrite(file, lambda tensors: tensors | {"lora_unet_nothing": torch.ones(1)})
    with pytest.raises(UserError, match="1 key of 313 that no layout of an SDXL adapter has: 'lora_unet_nothing"):
        adapter_reader.read_adapter(file)


BLOCK = "down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k"


def of_sdxl(prefix, width=2048):
    return {
        f"{prefix}{BLOCK}.lora_A.weight": torch.ones(4, width),
        f"{prefix}{BLOCK}.lora_B.weight": torch.ones(640, 4),
    }


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (
            of_sdxl("unet.") | {"emb_params": torch.ones(1)},
            "1 key of 3 that no layout of an SDXL adapter has: 'emb_params'. Export the adapter again without it.",
        ),
        (
            of_sdxl("unet.") | {"emb_params": torch.ones(1), "more": torch.ones(1)},
            "holds 2 keys of 4 that no layout of an SDXL adapter has: 'emb_params', 'more'. Export the adapter again "
            "without them.",
        ),
        (
            of_sdxl(""),
            f"holds 2 keys of 2 without the component in front: '{BLOCK}.lora_A.weight', '{BLOCK}.lora_B.weight'. Put "
            "unet. there, as diffusers' layout has it, or give the PEFT folder that they come from.",
        ),
        (
            of_sdxl("model/"),
            f"holds 2 keys of 2 that no layout of an SDXL adapter has: 'model/{BLOCK}.lora_A.weight', "
            f"'model/{BLOCK}.lora_B.weight'. Give it in diffusers', kohya's or ComfyUI's layout, or as a PEFT folder.",
        ),
        (
            of_sdxl("", width=768),
            "It looks as if made for Stable Diffusion 1.x. Give an SDXL adapter: a file of diffusers', kohya's or",
        ),
        (
            of_sdxl("unet.") | {"bundle_emb.x": torch.ones(1)},
            "They are of an embedding that was trained beside it, which is not read here. Give an SDXL adapter: a",
        ),
    ],
    ids=["a stray", "two", "bare", "other names", "another family", "another method"],
)
def test_of_keys_that_are_no_adapters_the_fault_and_its_remedy_are_said(tmp_path, tensors, message):
    save_file(tensors, tmp_path / "a.safetensors")
    with pytest.raises(UserError) as caught:
        adapter_reader.read_adapter(tmp_path / "a.safetensors")
    assert message in str(caught.value)
    assert "Stable Diffusion XL" not in str(caught.value)


@pytest.mark.parametrize(("kind", "name"), [("LORA", "lora_alpha"), ("LOHA", "alpha")])
@pytest.mark.parametrize(
    "change", [lambda settings, name: settings.pop(name), lambda settings, name: settings.update({name: None})]
)
def test_a_peft_folder_that_does_not_say_its_alpha_takes_it_from_the_flag(tiny_base, tmp_path, kind, name, change):
    config = {"LORA": LoraConfig, "LOHA": LoHaConfig}[kind](r=4, target_modules=["to_k"])
    unet = components.load("unet", tiny_base / "unet")
    get_peft_model(unet, config).save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    settings = json.loads(file.read_text())
    change(settings, name)
    file.write_text(json.dumps(settings))
    with pytest.raises(UserError, match=f"{file} has no {name}, .* Give --lora_alpha, that of its training, or copy"):
        adapter_reader.read_adapter(tmp_path)
    found = adapter_reader.read_adapter(tmp_path, lora_alpha=6.0)
    assert adapters.alpha_of(found.configs["unet"], "down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k") == 6
    settings[name] = -1
    file.write_text(json.dumps(settings))
    with pytest.raises(UserError, match=f"{name} is -1, not a positive number"):
        adapter_reader.read_adapter(tmp_path, lora_alpha=6.0)


# --- what others write ---


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": r".*\.(to_[qkv]|to_out\.0)"},
        # Nothing can be missing of what a regular expression says: it is not matched.
        {"target_modules": r".*\.(to_[qkv]|to_out\.0|proj_in)"},
        {"target_modules": [*lora.UNET_TARGETS, "proj_in"], "exclude_modules": r".*\.proj_in"},
    ],
)
@pytest.mark.parametrize("layout", ["diffusers", "peft"])
def test_an_adapter_whose_targets_are_a_regular_expression_or_exclude_modules_fits(
    tiny_base, saved, tmp_path, options, layout
):
    adapter = adapter_reader.read_adapter(change_options(saved, tmp_path, layout, options))
    of = adapter.weights["unet"], adapter.configs["unet"]
    assert len(fitting.check_adapter(*of, load(tiny_base, "unet"), "unet")) == MODULES["unet"]


def test_text_encoder_keys_are_written_under_text_model_and_read_with_or_without_it(tiny_base, models, file):
    """Other programs know them as transformers 4 named them; transformers 5 names only the second encoder's so."""
    encoders = [name for name in MODULES if name != "unet"]
    keys = [key for key in load_file(file) if key.startswith("text_encoder")]
    assert keys
    assert all(key.split(".")[1] == "text_model" for key in keys)
    rewrite(file, lambda tensors: {key.replace("text_model.", ""): tensor for key, tensor in tensors.items()})
    for name in encoders:
        model, _ = merged(tiny_base, name, adapter_reader.read_adapter(file))
        assert difference(answer(name, model), answer(name, models[name])) < 1e-5


@pytest.mark.parametrize("layout", ["diffusers", "peft"])
@pytest.mark.parametrize(
    "options",
    [{"exclude_modules": ["attn2.to_k"]}, {"layers_to_transform": [0], "layers_pattern": "transformer_blocks"}],
    ids=lambda options: next(iter(options)),
)
def test_what_a_training_left_out_does_not_keep_a_merge_from_changing_what_has_weights(
    tiny_base, saved, tmp_path, options, layout
):
    expected = merged(tiny_base, "unet", adapter_reader.read_adapter(saved))[0].state_dict()
    adapter = adapter_reader.read_adapter(change_options(saved, tmp_path, layout, options))
    model, report = merged(tiny_base, "unet", adapter)
    assert report.modules == MODULES["unet"]
    assert all(torch.equal(tensor, expected[key]) for key, tensor in model.state_dict().items())


def test_a_merge_counts_the_modules_that_it_changed(tiny_base, saved):
    adapter = adapter_reader.read_adapter(saved)
    key = next(key for key in adapter.weights["unet"] if "attn2.to_k.lora_B" in key)
    adapter.weights["unet"][key] = torch.zeros_like(adapter.weights["unet"][key])
    assert merged(tiny_base, "unet", adapter)[1].modules == MODULES["unet"] - 1


@pytest.mark.parametrize(
    ("value", "dtype"), [(float("nan"), torch.float32), (float("inf"), torch.bfloat16), (1e7, torch.float16)]
)
def test_a_weight_that_a_merge_makes_non_finite_is_refused_by_name(tiny_base, saved, value, dtype):
    adapter = adapter_reader.read_adapter(saved)
    key = next(key for key in adapter.weights["unet"] if key.endswith("lora_B.weight"))
    adapter.weights["unet"][key][0, 0] = value
    module = key.removesuffix(".lora_B.weight")
    with pytest.raises(UserError, match=f"Merging makes unet.{re.escape(module)} non-finite: .* overflows in {dtype}"):
        merged(tiny_base, "unet", adapter, dtype)


def test_the_relative_change_is_that_of_all_changed_weights(tiny_base, saved):
    adapter, before = adapter_reader.read_adapter(saved), load(tiny_base, "unet").state_dict()
    model, report = merged(tiny_base, "unet", adapter)
    names = [f"{module}.weight" for module in adapters.by_module(adapter.weights["unet"])]
    old, new = (
        torch.cat([state[name].double().flatten() for name in names]) for state in (before, model.state_dict())
    )
    assert report.relative_change == pytest.approx(((new - old).norm() / old.norm()).item(), rel=1e-6)


def test_a_module_that_a_merge_leaves_out_is_refused_by_name(tiny_base, saved, monkeypatch):
    adapter = adapter_reader.read_adapter(saved)
    key = next(key for key in adapter.weights["unet"] if "attn2.to_k.lora_B" in key)
    left_out = adapter.weights["unet"][key]

    def forget_one(model, weights, load=merging.set_peft_model_state_dict, **options):
        kept = {k: torch.zeros_like(w) if torch.equal(w, left_out) else w for k, w in weights.items()}
        return load(model, kept, **options)

    monkeypatch.setattr(merging, "set_peft_model_state_dict", forget_one)
    with pytest.raises(UserError, match=rf"left out unet\.{key.split('.lora_')[0]}"):
        merged(tiny_base, "unet", adapter)


@pytest.fixture(scope="module")
def patterned(tiny_base):
    """A UNet with ranks and alphas of their own for some modules, as PEFT's patterns give them."""
    model = load(tiny_base, "unet")
    config = lora.lora_config(RANK, LORA_ALPHA, lora.UNET_TARGETS)
    config.rank_pattern, config.alpha_pattern = {"attn2.to_k": 2, ".*mid_block.*to_v": 6}, {"attn2.to_k": 7.0}
    lora.add_lora(model, config)
    generator = torch.Generator().manual_seed(0)
    for parameter in lora.trainable_parameters(model).values():
        parameter.data.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    assert {p.shape[0] for n, p in lora.trainable_parameters(model).items() if ".lora_A." in n} == {2, RANK, 6}
    return model


@pytest.mark.parametrize("place", [".", "peft"])
def test_ranks_and_alphas_of_single_modules_are_merged_as_they_were_trained(tiny_base, patterned, tmp_path, place):
    export.publish(tmp_path, {"unet": patterned})
    adapter = adapter_reader.read_adapter(tmp_path / place)
    assert difference(answer("unet", merged(tiny_base, "unet", adapter)[0]), answer("unet", patterned)) < 1e-5
    adapter.configs["unet"].rank_pattern = {"attn2.to_k": 3}
    with pytest.raises(UserError, match=r"attn2.to_k is 64 x 96 at rank 3, but its lora_B and lora_A are 64 x 2"):
        merged(tiny_base, "unet", adapter)


def test_ranks_of_single_modules_in_a_file_without_metadata_are_those_of_the_shapes(tiny_base, patterned, tmp_path):
    export.publish(tmp_path, {"unet": patterned})
    file = tmp_path / adapters.DIFFUSERS_FILE
    weights = adapter_reader.read_adapter(file).weights["unet"]
    rewrite(file, dict, metadata={"format": "pt"})
    model, report = merged(tiny_base, "unet", adapter_reader.read_adapter(file, lora_alpha=5.0))
    assert report.modules == MODULES["unet"]
    base = load(tiny_base, "unet")
    for key, a in weights.items():
        if ".lora_A." in key:
            module, b = key.partition(".lora_")[0], weights[key.replace("lora_A", "lora_B")]
            expected = base.get_submodule(module).weight + 5.0 / a.shape[0] * b @ a
            torch.testing.assert_close(model.get_submodule(module).weight, expected, rtol=1e-5, atol=1e-6)


def test_an_alpha_that_contradicts_the_files_is_refused(saved):
    for path in (saved, saved / "peft"):
        assert adapter_reader.read_adapter(path, lora_alpha=LORA_ALPHA).configs["unet"].lora_alpha == LORA_ALPHA
        with pytest.raises(UserError, match=r"--lora_alpha is 5, but .* says 12 for the unet.*--lora_scale"):
            adapter_reader.read_adapter(path, lora_alpha=5.0)


def test_published_files_can_be_read_by_whom_the_umask_allows(models, tmp_path):
    before = os.umask(0o027)
    try:
        export.publish(tmp_path, models)
    finally:
        os.umask(before)
    modes = {path.name: oct(path.stat().st_mode & 0o777) for path in tmp_path.rglob("*") if path.is_file()}
    assert set(modes.values()) == {"0o640"}, modes


def test_sorting_the_metadata_moves_no_weight_and_changes_no_character(tmp_path):
    file = tmp_path / "a.safetensors"
    metadata = {"z": 'é"\\\n\x01\x7f\u2028\U0001f600/', "a": json.dumps({"x": 1.5e-05}), "ключ": "\x1f\x08</>"}
    tensors = {"t.ü": torch.arange(6.0).view(2, 3), "a": torch.ones(1, dtype=torch.bfloat16)}
    contents = set()
    for _ in range(8):  # safetensors shuffles it
        save_file(tensors, file, metadata=metadata)
        size = file.stat().st_size
        safetensors_header.sort_metadata(file)
        assert file.stat().st_size == size
        contents.add(file.read_bytes())
    assert len(contents) == 1
    with safe_open(file, "pt") as content:
        assert content.metadata() == metadata
        assert all(torch.equal(content.get_tensor(name), tensor) for name, tensor in tensors.items())
