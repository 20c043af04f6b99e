"""scripts/convert.py: an adapter in every layout, of another rank, or out of a tuned model."""

import json
import runpy
import shutil
import sys
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from rasengan import UserError, adapter_writer, adapters, components, conversion, low_rank
from rasengan.adapter_reader import read_adapter
from rasengan.sources import COMPONENTS


SCRIPT = Path(__file__).parents[2] / "scripts" / "convert.py"
UNET = "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def convert(convert_script):
    """Function that runs the script in this process with an output and further arguments, and returns the output."""

    def run(output, *further):
        words = [*map(str, further), "--output", str(output)]
        convert_script.main(convert_script.parse_args(words))
        return output

    return run


@pytest.fixture(scope="module")
def with_text(train):
    """Output folder of a run that trained the text encoders too, with more than the attention."""
    targets = ["to_q", "to_k", "proj_in", "ff.net.2"]
    few = ["--max_train_samples", 4, "--max_train_steps", 2, "--train_text_encoder", "--rank", 8, "--lora_alpha", 20]
    return train(*few, "--lora_target_modules", *targets)


# --- layouts ---


@pytest.mark.parametrize("run", ["trained", "with_text"])
def test_from_a_run_over_every_layout_and_back_no_bit_is_lost(convert, request, tmp_path, run):
    folder = request.getfixturevalue(run)
    kohya = convert(tmp_path / "kohya.safetensors", "--input", folder, "--format", "kohya")
    diffusers = convert(tmp_path / "diffusers.safetensors", "--input", kohya, "--format", "diffusers")
    peft = convert(tmp_path / "peft", "--input", diffusers, "--format", "peft")
    again = convert(tmp_path / "again.safetensors", "--input", peft, "--format", "kohya")
    assert again.read_bytes() == kohya.read_bytes()
    first = read_adapter(folder)
    for path in (kohya, diffusers, peft, again):
        found = read_adapter(path)
        assert adapter_writer.same_adapter(found, first)
        for name, config in first.configs.items():
            assert (found.configs[name].r, found.configs[name].lora_alpha) == (config.r, config.lora_alpha)
    assert {path.name for path in tmp_path.iterdir()} == {kohya.name, diffusers.name, peft.name, again.name}


def test_diffusers_loads_what_a_run_with_more_than_attention_has_published(tiny_base, with_text):
    pipeline = StableDiffusionXLPipeline(**{name: components.load(name, tiny_base / name) for name in COMPONENTS})
    pipeline.load_lora_weights(with_text)
    for name, weights in read_adapter(with_text).weights.items():
        live = {key for key, _ in getattr(pipeline, name).named_parameters() if ".lora_A." in key}
        assert len(live) == len(adapters.by_module(weights)), name


def test_every_layout_draws_the_same_picture(convert, draw, trained, tmp_path):
    paths = [trained]
    for layout in conversion.LAYOUTS:
        output = tmp_path / (layout if layout == "peft" else f"{layout}.safetensors")
        paths.append(convert(output, "--input", trained, "--format", layout))
    drawn = {next(iter(draw("--prompt", "a star", "--lora_weights", path).values())).tobytes() for path in paths}
    assert len(drawn) == 1


def test_an_adapter_that_changes_nothing_is_told_of(convert, trained, tmp_path, capsys):
    tensors = load_file(trained / adapters.DIFFUSERS_FILE)
    idle = {key: 0 * tensor if ".up." in key else tensor for key, tensor in tensors.items()}
    save_file(idle, tmp_path / "idle.safetensors")
    given = ["--input", tmp_path / "idle.safetensors", "--lora_alpha", 32, "--format", "kohya"]
    convert(tmp_path / "a.safetensors", *given)
    assert "warning: this adapter changes nothing" in capsys.readouterr().out
    convert(tmp_path / "b.safetensors", "--input", trained, "--format", "kohya")
    assert "warning" not in capsys.readouterr().out


def test_the_script_says_what_it_wrote(convert, trained, tmp_path, capsys):
    file = convert(tmp_path / "a.safetensors", "--input", trained, "--format", "kohya", "--dtype", "fp16")
    assert capsys.readouterr().out.splitlines() == [
        "unet: 136 modules, alpha 32 / rank 16",
        f"Saved and verified {file}",
    ]
    assert {t.dtype for key, t in load_file(file).items() if ".lora_" in key} == {torch.float16}


def test_a_file_without_alpha_is_converted_with_the_alpha_that_is_given(convert, trained, tmp_path):
    save_file(load_file(trained / adapters.DIFFUSERS_FILE), tmp_path / "plain.safetensors")
    options = ["--input", tmp_path / "plain.safetensors", "--format", "kohya"]
    with pytest.raises(UserError, match="does not say its alpha"):
        convert(tmp_path / "a.safetensors", *options)
    file = convert(tmp_path / "a.safetensors", *options, "--lora_alpha", 32)
    assert adapter_writer.same_adapter(read_adapter(file), read_adapter(trained))


# --- rank ---


def products(adapter, name="unet"):
    """Each module's change, float64."""
    found = {}
    for module, parts in adapters.by_module(adapter.weights[name]).items():
        a, b = (parts[f"lora_{part}.weight"].double().flatten(1) for part in "AB")
        found[module.removeprefix("text_model.")] = adapters.strength_of(adapter.configs[name], module) * b @ a
    return found


@pytest.mark.parametrize("run", ["trained", "with_text"])
def test_another_rank_keeps_the_greatest_singular_values_and_says_their_share(convert, request, tmp_path, capsys, run):
    folder = request.getfixturevalue(run)
    file = convert(tmp_path / "a.safetensors", "--input", folder, "--format", "kohya", "--resize_rank", 3)
    printed, before, after = capsys.readouterr().out, read_adapter(folder), read_adapter(file)
    for name in before.weights:
        kept, whole = 0.0, 0.0
        old, new = products(before, name), products(after, name)
        assert old.keys() == new.keys()
        for module, change in old.items():
            u, values, v = torch.linalg.svd(change, full_matrices=False)
            expected = u[:, :3] * values[:3] @ v[:3]
            assert (new[module] - expected).norm() <= 1e-5 * change.norm()
            kept, whole = kept + values[:3].square().sum(), whole + values.square().sum()
        assert f"{name}: {(kept / whole).sqrt():.2%} of the norm of its linear layers' changes kept" in printed
        assert (after.configs[name].r, after.configs[name].lora_alpha) == (3, 3)


def test_a_rank_above_the_files_changes_nothing_but_the_form(convert, trained, tmp_path, capsys):
    file = convert(tmp_path / "a.safetensors", "--input", trained, "--format", "diffusers", "--resize_rank", 64)
    assert "unet: 100.00% of the norm" in capsys.readouterr().out
    old, new = products(read_adapter(trained)), products(read_adapter(file))
    assert all((new[module] - change).norm() <= 1e-5 * change.norm() for module, change in old.items())


# --- a tuned model ---


@pytest.fixture(scope="module")
def tuned(draw, trained, tmp_path_factory):
    """The tiny base with the run's LoRA merged into it, as a pipeline folder in fp32."""
    folder = tmp_path_factory.mktemp("tuned") / "sdxl"
    draw("--lora_weights", trained, "--save_merged", folder)
    return folder


def test_a_lora_between_two_models_is_the_one_that_was_merged(convert, trained, tuned, tiny_base, tmp_path, capsys):
    options = ["--extract_from", tuned, "--base", tiny_base, "--format", "kohya"]
    file = convert(tmp_path / "a.safetensors", *options, "--rank", 16)
    assert "unet: 100.00% of the norm of its linear layers' changes kept" in capsys.readouterr().out
    found, expected = products(read_adapter(file)), products(read_adapter(trained))
    assert found.keys() == expected.keys()
    for module, change in expected.items():
        assert (found[module] - change).norm() <= 1e-3 * change.norm(), module
    convert(tmp_path / "b.safetensors", *options, "--rank", 2)
    assert "unet: 100.00%" not in capsys.readouterr().out


def test_a_lora_of_a_single_file_is_that_of_the_folder(convert, draw, trained, tuned, tiny_base, tmp_path):
    draw("--lora_weights", trained, "--save_merged", tmp_path / "sdxl.safetensors")
    options = ["--rank", 16, "--format", "kohya"]
    from_folder = convert(tmp_path / "a.safetensors", "--extract_from", tuned, "--base", tiny_base, *options)
    tuned_file = ["--extract_from", tmp_path / "sdxl.safetensors", "--base", tiny_base]
    assert convert(tmp_path / "b.safetensors", *tuned_file, *options).read_bytes() == from_folder.read_bytes()
    # The other way round its sign is the other one.
    back = ["--extract_from", tiny_base, "--base", tmp_path / "sdxl.safetensors"]
    found = products(read_adapter(convert(tmp_path / "c.safetensors", *back, *options)))
    for module, change in products(read_adapter(from_folder)).items():
        assert (found[module] + change).norm() <= 1e-3 * change.norm()


# --- whole models ---


def weights_of(folder, component):
    (file,) = (folder / component).glob("*.safetensors")
    return file.read_bytes()


@pytest.fixture(scope="module")
def tuned_file(draw, trained, tmp_path_factory):
    """The same tuned model as `tuned`, as `infer.py` writes it in one file."""
    file = tmp_path_factory.mktemp("tuned") / "sdxl.safetensors"
    draw("--lora_weights", trained, "--save_merged", file)
    return file


def test_a_merged_folder_becomes_the_single_file_and_back_bit_for_bit(
    convert, tuned, tuned_file, tiny_base, tmp_path, capsys
):
    file = convert(tmp_path / "sdxl.safetensors", "--input", tuned, "--format", "single_file")
    assert file.read_bytes() == tuned_file.read_bytes()
    folder = convert(tmp_path / "sdxl", "--input", file, "--base", tiny_base, "--format", "pipeline")
    assert "left out" not in capsys.readouterr().out
    for component in components.MODELS:
        assert weights_of(folder, component) == weights_of(tuned, component)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["sdxl", "sdxl.safetensors"]
    index, expected = (json.loads((place / "model_index.json").read_text()) for place in (folder, tuned))
    assert index == expected
    StableDiffusionXLPipeline.from_pretrained(folder)  # the library finds each part


def test_a_model_in_another_dtype_is_the_rounded_one_and_keeps_it_from_then_on(convert, tuned, tiny_base, tmp_path):
    half = convert(tmp_path / "half.safetensors", "--input", tuned, "--format", "single_file", "--dtype", "fp16")
    folder = convert(tmp_path / "half", "--input", half, "--base", tiny_base, "--format", "pipeline")
    for component in components.MODELS:
        (file,) = (folder / component).glob("*.safetensors")
        found, exact = load_file(file), load_file(tuned / component / file.name)
        dtype = torch.float32 if component == "vae" else torch.float16
        assert found.keys() == exact.keys()
        assert all(torch.equal(found[key], exact[key].to(dtype)) for key in exact)
    again = convert(tmp_path / "again.safetensors", "--input", folder, "--format", "single_file")
    assert again.read_bytes() == half.read_bytes()


def test_what_a_single_file_has_besides_is_counted_and_v_prediction_kept(
    convert, tuned_file, tiny_base, tmp_path, capsys
):
    more = {"v_pred": torch.zeros(0), "model_ema.decay": torch.zeros(1), "model_lora.alpha": torch.zeros(1)}
    save_file(load_file(tuned_file) | more, tmp_path / "more.safetensors")
    given = ["--input", tmp_path / "more.safetensors", "--base", tiny_base]
    folder = convert(tmp_path / "sdxl", *given, "--format", "pipeline")
    assert "2 tensors that this SDXL has not are left out, such as model_ema.decay" in capsys.readouterr().out
    config = json.loads((folder / "scheduler" / "scheduler_config.json").read_text())
    assert config["prediction_type"] == "v_prediction"
    back = convert(tmp_path / "back.safetensors", "--input", folder, "--format", "single_file")
    assert load_file(back).keys() - load_file(tuned_file).keys() == {"v_pred"}


def test_a_file_of_zero_terminal_snr_stays_one(convert, tuned_file, tiny_base, tmp_path):
    save_file(load_file(tuned_file) | {"v_pred": torch.zeros(0), "ztsnr": torch.zeros(0)}, tmp_path / "a.safetensors")
    given = ["--input", tmp_path / "a.safetensors", "--base", tiny_base, "--format", "pipeline"]
    folder = convert(tmp_path / "sdxl", *given)
    assert json.loads((folder / "scheduler" / "scheduler_config.json").read_text())["rescale_betas_zero_snr"] is True
    back = convert(tmp_path / "back.safetensors", "--input", folder, "--format", "single_file")
    assert load_file(back).keys() - load_file(tuned_file).keys() == {"v_pred", "ztsnr"}


def test_damaged_weights_are_carried_over_and_none_is_rounded_to_infinity(convert, tuned_file, tiny_base, tmp_path):
    tensors = load_file(tuned_file)
    key = next(key for key in tensors if "attn1.to_q" in key)
    given = ["--base", tiny_base, "--format", "pipeline"]
    for value, name in ((float("nan"), "nan"), (1e6, "great")):
        tensors[key] = torch.full_like(tensors[key], value)
        save_file(tensors, tmp_path / f"{name}.safetensors")
    found = load_file(convert(tmp_path / "nan", "--input", tmp_path / "nan.safetensors", *given) / UNET)
    assert sum(torch.isnan(tensor).any() for tensor in found.values()) == 1
    with pytest.raises(UserError, match="to_q.weight is not finite in float16. Give another"):
        convert(tmp_path / "half", "--input", tmp_path / "great.safetensors", *given, "--dtype", "fp16")
    assert not (tmp_path / "half").exists()


def test_what_older_libraries_saved_besides_does_not_count(convert, tuned, tuned_file, tmp_path):
    shutil.copytree(tuned, tmp_path / "old")
    file = tmp_path / "old" / "text_encoder" / "model.safetensors"
    save_file(load_file(file) | {"text_model.embeddings.position_ids": torch.arange(77)[None]}, file, {"format": "pt"})
    again = convert(tmp_path / "a.safetensors", "--input", tmp_path / "old", "--format", "single_file")
    assert again.read_bytes() == tuned_file.read_bytes()


def test_weights_that_are_scaled_by_others_are_refused(convert, tuned_file, tiny_base, tmp_path):
    tensors = load_file(tuned_file)
    key = next(key for key in tensors if "attn1.to_q" in key)
    scale = {key.replace("weight", "scale_weight"): torch.ones(1)}
    save_file(tensors | scale, tmp_path / "a.safetensors")
    given = ["--input", tmp_path / "a.safetensors", "--base", tiny_base, "--format", "pipeline"]
    with pytest.raises(UserError, match="holds weights that are to be multiplied by others, such as .*scale_weight"):
        convert(tmp_path / "sdxl", *given, "--dtype", "fp16")
    save_file(tensors | {"edm_vpred.sigma_max": torch.ones(1)}, tmp_path / "edm.safetensors")
    with pytest.raises(UserError, match="is an EDM model, as edm_vpred.sigma_max says, not one of SDXL's kind"):
        convert(tmp_path / "sdxl", "--input", tmp_path / "edm.safetensors", *given[2:])


def test_scaled_weights_have_no_lora_either_and_are_none_of_a_folder(convert, tuned, tuned_file, tiny_base, tmp_path):
    key = "model.diffusion_model.input_blocks.0.0.scale_weight"
    save_file(load_file(tuned_file) | {key: torch.ones(1)}, tmp_path / "a.safetensors")
    shutil.copytree(tuned, tmp_path / "folder")
    tensors = load_file(tuned / UNET) | {"conv_in.scale_weight": torch.ones(1)}
    save_file(tensors, tmp_path / "folder" / UNET, {"format": "pt"})
    said = "holds weights that are to be multiplied by others, such as .*scale_weight"
    for place in (tmp_path / "a.safetensors", tmp_path / "folder"):
        words = ["--extract_from", place, "--base", tiny_base, "--rank", 4, "--format", "kohya"]
        with pytest.raises(UserError, match=said):
            convert(tmp_path / "b.safetensors", *words)
    for dtype in ([], ["--dtype", "fp16"]):
        words = ["--input", tmp_path / "folder", "--format", "single_file", *dtype]
        with pytest.raises(UserError, match=said):
            convert(tmp_path / "b.safetensors", *words)


def test_a_damaged_model_has_no_lora(convert, tuned, tuned_file, tiny_base, tmp_path):
    (tmp_path / "cut.safetensors").write_bytes(tuned_file.read_bytes()[:100_000])
    shutil.copytree(tuned, tmp_path / "cut")
    (tmp_path / "cut" / UNET).write_bytes((tuned / UNET).read_bytes()[:100_000])
    for place, said in (
        (tmp_path / "cut.safetensors", "cut.* cannot be read: .* Give a whole .safetensors file"),
        (tmp_path / "cut", "cut.* is damaged: .* Fetch it again, or give another folder by {flag}"),
    ):
        for flag, places in (("--extract_from", (place, tiny_base)), ("--base", (tiny_base, place))):
            words = ["--extract_from", places[0], "--base", places[1], "--rank", 4, "--format", "kohya"]
            with pytest.raises(UserError, match=said.format(flag=flag)):
                convert(tmp_path / "a.safetensors", *words)


def test_what_is_no_whole_model_is_refused(convert, trained, tuned_file, tuned, tiny_base, tmp_path):
    tensors = load_file(tuned_file)
    key = next(key for key in tensors if "attn1.to_q" in key)
    save_file({name: value for name, value in tensors.items() if name != key}, tmp_path / "less.safetensors")
    save_file(tensors | {key: tensors[key].to(torch.float8_e4m3fn)}, tmp_path / "small.safetensors")
    (tmp_path / "cut.safetensors").write_bytes(tuned_file.read_bytes()[:10_000])
    adapter = trained / adapters.DIFFUSERS_FILE
    of_adapters = "Give --format diffusers, peft or kohya; `infer.py --save_merged` is what merges it into a base.$"
    for words, said in (
        (
            [trained / "checkpoint-2" / "trainer_state.json", "--base", tiny_base],
            "trainer_state.json cannot be read: .* Give a whole .safetensors file",
        ),
        ([adapter, "--base", tiny_base], f"--input {adapter} is an adapter, and no whole SDXL. {of_adapters}"),
        ([adapter], f"--input {adapter} is an adapter, and no whole SDXL. {of_adapters}"),
        (
            [tmp_path / "less.safetensors", "--base", tiny_base],
            f"lacks 1 of the .* unet, .* such as {key}. Give an SD",
        ),
        ([tmp_path / "small.safetensors", "--base", tiny_base], "the unet is stored in F8_E4M3. Give a --dtype"),
        ([tmp_path / "cut.safetensors", "--base", tiny_base], "cut.safetensors cannot be read: .* Give a whole"),
        ([tuned_file], "--base is for a whole SDXL that is a single file"),
        ([tmp_path / "no.safetensors", "--base", tiny_base], "There is no file at .*no.safetensors. Correct --input"),
        ([tuned, "--base", tiny_base], "--base is for a whole SDXL that is a single file"),
        ([tuned_file, "--base", tuned_file], "--base .*sdxl.safetensors is a file, which holds no configuration"),
        ([trained], f"--input {trained} is an adapter, and no whole SDXL. {of_adapters}"),
        ([trained / "peft"], f"--input {trained / 'peft'} is an adapter, and no whole SDXL. {of_adapters}"),
        ([trained / "logs"], "holds no tokenizer: it has no tokenizer_config.json. Give a whole SDXL by --input.$"),
        ([tmp_path / "none"], "none is neither a folder nor a hub id.* Correct --input"),
        ([tuned, "--resize_rank", 4], "writes a whole SDXL: --extract_from, .* belong to adapters. Drop them"),
    ):
        with pytest.raises(UserError, match=said):
            convert(tmp_path / "sub" / "sdxl", "--format", "pipeline", "--input", *words)
    with pytest.raises(UserError, match="--format single_file writes a whole SDXL: give it by --input"):
        convert(tmp_path / "a.safetensors", "--format", "single_file", "--extract_from", tuned)
    with pytest.raises(UserError, match="--format pipeline is a folder, without .safetensors"):
        convert(tmp_path / "a.safetensors", "--format", "pipeline", "--input", tuned)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        f"{name}.safetensors" for name in ("cut", "less", "small")
    ]


# --- extraction from what is none ---


def test_what_is_no_model_is_refused_by_the_flags_of_this_script(convert, trained, tuned_file, tiny_base, tmp_path):
    file, options = trained / adapters.DIFFUSERS_FILE, ["--rank", 4, "--format", "kohya"]
    tuned_one = "Give the tuned model; --input is what reads an adapter.$"
    for tuned, base, said in (
        (tuned_file, tuned_file, "are both single files, which do not hold their configuration"),
        (file, tiny_base, f"--extract_from {file} is an adapter, and no whole SDXL. {tuned_one}"),
        (
            trained / "peft",
            tiny_base,
            f"--extract_from {trained / 'peft'} is an adapter, and no whole SDXL. {tuned_one}",
        ),
        (
            tiny_base,
            trained,
            f"--base {trained} is an adapter, and no whole SDXL. Give the SDXL that the other place",
        ),
        (
            trained / "logs",
            tiny_base,
            "logs/unet holds no unet: it has no config.json. Give a whole SDXL by --extract_from.$",
        ),
        (
            tmp_path / "none",
            tiny_base,
            "none is neither a folder nor a hub id, so there is no unet. Correct --extract_from",
        ),
        (tuned_file, tmp_path / "none", r"none is neither a folder nor a hub id.* Correct --base\."),
    ):
        with pytest.raises(UserError, match=said):
            convert(tmp_path / "a.safetensors", "--extract_from", tuned, "--base", base, *options)


def test_the_greatest_singular_values_of_a_large_change_are_found_by_projection(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    change = torch.randn(96, 12, generator=generator) @ torch.randn(12, 200, generator=generator)
    change += 0.01 * torch.randn(96, 200, generator=generator)
    exact = low_rank._nearest(change, 8)
    monkeypatch.setattr(low_rank, "FULL_SVD_SIZE", 4)
    state = torch.get_rng_state()
    a, b, norm = low_rank._nearest(change, 8)
    assert torch.equal(torch.get_rng_state(), state)
    assert (b @ a - exact[1] @ exact[0]).norm() < 1e-4 * change.norm()
    assert norm == pytest.approx(exact[2], rel=1e-5)


def test_what_differs_outside_of_linear_layers_is_counted_and_models_that_do_not_differ_are_refused(
    convert, tuned, tiny_base, tmp_path, capsys
):
    weights = load_file(tuned / UNET)
    save_file(weights | {"conv_in.weight": 2 * weights["conv_in.weight"]}, tuned / UNET)
    options = ["--format", "kohya", "--rank", 4, "--base", tiny_base]
    convert(tmp_path / "a.safetensors", "--extract_from", tuned, *options)
    assert "warning: 1 tensors of the unet differ outside of its linear layers" in capsys.readouterr().out
    save_file(weights, tuned / UNET)
    with pytest.raises(UserError, match="do not differ in any linear layer"):
        convert(tmp_path / "b.safetensors", "--extract_from", tiny_base, *options)
    assert not (tmp_path / "b.safetensors").exists()


def test_a_whole_model_in_the_place_of_an_adapter_is_told_how_to_be_one(convert, trained, tuned, tmp_path):
    said = f"--input {tuned} is a whole model, and no adapter. Give it by --extract_from, with --base and --rank"
    with pytest.raises(UserError, match=said):
        convert(tmp_path / "a.safetensors", "--input", tuned, "--format", "kohya")
    shutil.copytree(tuned, tmp_path / "both")
    shutil.copyfile(trained / adapters.DIFFUSERS_FILE, tmp_path / "both" / adapters.DIFFUSERS_FILE)
    convert(tmp_path / "a.safetensors", "--input", tmp_path / "both", "--format", "kohya")
    convert(tmp_path / "b.safetensors", "--input", tmp_path / "both", "--format", "single_file")


# --- errors ---


@pytest.mark.parametrize(
    ("words", "pattern"),
    [
        (["--format", "kohya"], "Give either --input, or --extract_from with --base and --rank"),
        (["--input", "a", "--extract_from", "b", "--format", "kohya"], "Give either --input"),
        (["--extract_from", "b", "--format", "kohya"], "--extract_from needs --base and --rank"),
        (["--input", "a", "--rank", 4, "--format", "kohya"], "--base, --rank and --variant belong to --extract_from"),
        (
            ["--extract_from", "b", "--base", "c", "--rank", 4, "--resize_rank", 2, "--format", "kohya"],
            "belong to --input",
        ),
        (["--input", "a", "--format", "peft"], "--output is .*a.safetensors, but --format peft is a folder"),
        (["--input", "/no/such/adapter", "--format", "kohya"], "There is no adapter at /no/such/adapter"),
        (["--input", "/no/such.ckpt", "--base", "b", "--format", "pipeline"], "There is no file at /no/such.ckpt"),
        (["--input", "a"], "required: --format"),
    ],
)
def test_wrong_arguments_are_refused(convert, tmp_path, words, pattern):
    with pytest.raises(UserError, match=pattern) as error:
        convert(tmp_path / "a.safetensors", *words)
    assert "\n" not in str(error.value)
    assert list(tmp_path.iterdir()) == []


def test_a_whole_model_that_is_a_pickle_is_refused(convert, tmp_path):
    (tmp_path / "model.ckpt").write_bytes(b"x")
    with pytest.raises(UserError, match="model.ckpt is a pickle, which is not read. Give the model as safetensors"):
        convert(tmp_path / "out", "--input", tmp_path / "model.ckpt", "--base", "b", "--format", "pipeline")


def test_weights_that_overflow_are_refused_by_their_name(convert, trained, tmp_path):
    tensors = load_file(trained / adapters.DIFFUSERS_FILE)
    save_file({key: 1e6 * tensor for key, tensor in tensors.items()}, tmp_path / "great.safetensors")
    options = ["--input", tmp_path / "great.safetensors", "--lora_alpha", 32, "--format", "kohya"]
    with pytest.raises(UserError, match="The unet's .*lora_[AB].weight is not finite in float16.*Give fp32"):
        convert(tmp_path / "a.safetensors", *options, "--dtype", "fp16")
    assert [path.name for path in tmp_path.iterdir()] == ["great.safetensors"]


def test_weights_that_would_become_zero_are_refused_by_their_name(convert, trained, tmp_path):
    tensors = load_file(trained / adapters.DIFFUSERS_FILE)
    small = {key: tensor * (1e-8 if "lora_B" in key or ".up." in key else 1) for key, tensor in tensors.items()}
    save_file(small, tmp_path / "small.safetensors")
    options = ["--input", tmp_path / "small.safetensors", "--lora_alpha", 32, "--format", "kohya"]
    with pytest.raises(UserError, match="The unet's .*lora_B.weight would be all zeros in float16.*Give fp32"):
        convert(tmp_path / "a.safetensors", *options, "--dtype", "fp16")
    assert [path.name for path in tmp_path.iterdir()] == ["small.safetensors"]
    convert(tmp_path / "a.safetensors", *options)


def test_a_model_that_is_not_finite_has_no_lora(convert, tuned, tiny_base, tmp_path):
    shutil.copytree(tuned, tmp_path / "ruined")
    (file,) = (tmp_path / "ruined" / "unet").glob("*.safetensors")
    tensors = load_file(file)
    key = next(key for key in tensors if key.endswith("to_q.weight"))
    tensors[key][0, 0] = float("nan")
    save_file(tensors, file)
    words = ["--extract_from", tmp_path / "ruined", "--base", tiny_base, "--rank", 4, "--format", "kohya"]
    with pytest.raises(UserError, match=f"The unet's {key} is not finite in"):
        convert(tmp_path / "a.safetensors", *words)


def pair(module, in_size=64, lycoris=False):
    """A module of rank 4 in kohya's layout, with its alpha."""
    down, up = torch.ones(4, in_size), torch.ones(64, 4)
    parts = {"lora_down.weight": down, "lora_up.weight": up}
    if lycoris:
        parts = {f"hada_w{number}_{side}": part.clone() for number in "12" for side, part in (("b", down), ("a", up))}
    parts["alpha"] = torch.tensor(4.0)
    return {f"{module}.{part}": tensor for part, tensor in parts.items()}


BLOCK = "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0"


@pytest.mark.parametrize("layout", conversion.LAYOUTS)
@pytest.mark.parametrize(
    ("tensors", "pattern"),
    [
        (pair(f"{BLOCK}_attn2_to_k", 768), "looks as if made for Stable Diffusion 1.x"),
        (pair(f"{BLOCK}_attn2_to_v", 1024), "looks as if made for Stable Diffusion 2.x"),
        (pair(f"{BLOCK}_attn2_to_k", 1280), "looks as if made for the SDXL refiner"),
        (pair(f"{BLOCK}_attn2_to_k", 768, lycoris=True), "looks as if made for Stable Diffusion 1.x"),
        # Without the text's width, the fourth level tells: SDXL has three.
        (
            pair("lora_unet_mid_block_attentions_0_proj_in")
            | pair("lora_unet_up_blocks_3_attentions_0_transformer_blocks_0_attn1_to_q"),
            "1 modules of 2 that no SDXL has, such as the unet's up_blocks.3.attentions.0.transformer_blocks.0.attn1",
        ),
        (pair(f"{BLOCK}_attn1_to_qkv"), "1 modules of 1 that no SDXL has"),
        (pair("lora_te1_text_model_encoder_layers_12_mlp_fc1"), "no SDXL has, such as the text_encoder's .*12.mlp"),
    ],
)
def test_an_adapter_of_another_family_is_not_passed_off_as_sdxls(convert, tmp_path, tensors, pattern, layout):
    save_file(tensors, tmp_path / "other.safetensors")
    output = tmp_path / ("a" if layout == "peft" else "a.safetensors")
    with pytest.raises(UserError, match=f"other.safetensors .*{pattern}.*Give an SDXL adapter"):
        convert(output, "--input", tmp_path / "other.safetensors", "--format", layout)
    assert [path.name for path in tmp_path.iterdir()] == ["other.safetensors"]


def test_every_layer_of_sdxl_is_known_as_sdxls():
    """Of the full size: its levels, depths and text encoders."""
    with torch.device("meta"):
        unet = UNet2DConditionModel(
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            block_out_channels=(320, 640, 1280),
            transformer_layers_per_block=(1, 2, 10),
            attention_head_dim=(5, 10, 20),
            cross_attention_dim=2048,
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=256,
            projection_class_embeddings_input_dim=2816,
        )
        models = {
            "unet": unet,
            "text_encoder": CLIPTextModel(CLIPTextConfig(num_hidden_layers=12)),
            "text_encoder_2": CLIPTextModelWithProjection(CLIPTextConfig(num_hidden_layers=32)),
        }
    weights = {
        name: {
            f"{key}.{part}": layer.weight
            for key, layer in model.named_modules()
            if isinstance(layer, torch.nn.Linear | torch.nn.Conv2d) and "patch_embed" not in key
            for part in ("lora_A.weight", "lora_B.weight")
        }
        for name, model in models.items()
    }
    assert len(weights["unet"]) == 2 * 794
    conversion.check_family(adapters.Adapter(weights, {}), "a.safetensors")


def spoil(tensors, how):
    """Return an adapter's tensors with one of them spoiled."""
    key = next(key for key in tensors if key.endswith("lora.down.weight"))
    if how == "not finite":
        return tensors | {key: tensors[key] * float("nan")}
    if how == "half a pair":
        return {name: tensor for name, tensor in tensors.items() if name != key}
    module = key.removesuffix("lora.down.weight")
    return tensors | {
        key: tensors[key][:4].clone(),
        f"{module}lora.up.weight": tensors[f"{module}lora.up.weight"][:, :4],
    }


@pytest.mark.parametrize(
    ("how", "further", "pattern"),
    [
        ("not finite", ["--resize_rank", 4], "is not finite: the adapter is damaged"),
        ("half a pair", [], "has no lora_A"),
        ("half a pair", ["--resize_rank", 4], "has no lora_A"),
        ("another rank", [], "has rank 4, but the adapter's settings or other parts say 16"),
    ],
)
def test_a_spoiled_adapter_is_refused(convert, trained, tmp_path, how, further, pattern):
    with safe_open(trained / adapters.DIFFUSERS_FILE, framework="pt") as file:
        metadata = file.metadata()
    tensors = spoil(load_file(trained / adapters.DIFFUSERS_FILE), how)
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, tmp_path / "bad.safetensors", metadata)
    with pytest.raises(UserError, match=pattern):
        convert(tmp_path / "a.safetensors", "--input", tmp_path / "bad.safetensors", "--format", "kohya", *further)
    assert [path.name for path in tmp_path.iterdir()] == ["bad.safetensors"]


def test_what_is_there_is_never_overwritten(convert, trained, tmp_path):
    (tmp_path / "a.safetensors").write_text("mine")
    with pytest.raises(UserError, match="--output .* exists"):
        convert(tmp_path / "a.safetensors", "--input", trained, "--format", "kohya")
    assert (tmp_path / "a.safetensors").read_text() == "mine"
    (tmp_path / "link.safetensors").symlink_to(tmp_path / "nowhere")
    with pytest.raises(UserError, match="--output .* exists"):
        convert(tmp_path / "link.safetensors", "--input", trained, "--format", "kohya")
    assert (tmp_path / "link.safetensors").is_symlink()


def test_what_appears_meanwhile_is_not_overwritten_either(convert, trained, tmp_path, monkeypatch):
    def write_and_wait(file, adapter, write=conversion.write_kohya):
        write(file, adapter)
        (tmp_path / "a.safetensors").write_text("mine")

    monkeypatch.setattr(conversion, "write_kohya", write_and_wait)
    with pytest.raises(UserError, match="--output .* exists"):
        convert(tmp_path / "a.safetensors", "--input", trained, "--format", "kohya")
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("a.safetensors", "mine")]


def test_a_damaged_write_leaves_nothing_under_the_final_name(convert, trained, tmp_path, monkeypatch):
    def damage(file, adapter, write=conversion.write_kohya):
        write(file, adapter)
        content = bytearray(file.read_bytes())
        content[-40] ^= 1
        file.write_bytes(content)

    monkeypatch.setattr(conversion, "write_kohya", damage)
    with pytest.raises(RuntimeError, match="reading it back gave another adapter"):
        convert(tmp_path / "a.safetensors", "--input", trained, "--format", "kohya")
    assert list(tmp_path.iterdir()) == []


def test_the_script_ends_with_one_line_and_exit_code_2(monkeypatch, capsys, tmp_path):
    words = ["--input", str(tmp_path / "no"), "--output", str(tmp_path / "a.safetensors"), "--format", "kohya"]
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *words])
    with pytest.raises(SystemExit) as caught:
        runpy.run_path(str(SCRIPT), run_name="__main__")
    assert caught.value.code == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert [line.startswith("error: There is no adapter at") for line in error] == [True]
