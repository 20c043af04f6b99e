import os
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, StableDiffusionXLPipeline, UNet2DConditionModel
from diffusers.loaders import single_file_utils
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import CLIPTextModelWithProjection

from rasengan import UserError, components, lora, naming, single_file
from rasengan.sources import COMPONENTS


def weights_of(tiny_base, name):
    return components.load(name, tiny_base / name).state_dict()


@pytest.fixture(scope="module")
def write(tiny_base):
    """Function that writes the tiny base as one file; further options of write_single_file may be given."""
    skeletons = {name: components.skeleton(name, tiny_base / name) for name in single_file.COMPONENTS}

    def run(path, dtype=torch.float32, **options):
        dtypes = {name: torch.float32 if name == "vae" else dtype for name in skeletons}
        load = options.pop("load_weights", lambda name: weights_of(tiny_base, name))
        single_file.write_single_file(path, skeletons, dtypes, load, **options)
        return path

    return run


@pytest.fixture(scope="module")
def written(write, tmp_path_factory):
    return write(tmp_path_factory.mktemp("single") / "sdxl.safetensors")


@pytest.fixture
def benchmark(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "benchmarks")
    import single_file

    return single_file


def assert_equal(weights, back):
    assert set(weights) == set(back)
    for name, tensor in weights.items():
        assert torch.equal(tensor, back[name]), name


@pytest.mark.parametrize(("name", "kind"), [("unet", UNet2DConditionModel), ("vae", AutoencoderKL)])
def test_diffusers_reads_the_original_layout_back(written, tiny_base, name, kind):
    model = kind.from_pretrained(tiny_base / name)
    convert = getattr(single_file_utils, f"convert_ldm_{name}_checkpoint")
    assert_equal(model.state_dict(), convert(load_file(written), dict(model.config)))


@pytest.mark.parametrize("name", single_file.COMPONENTS)
def test_each_tensor_is_read_back_by_its_own_name(written, tiny_base, name):
    for key, tensor in weights_of(tiny_base, name).items():
        found = single_file.read_tensor(written, name, key.removeprefix("text_model."), tensor.shape)
        assert torch.equal(found, tensor), key


def test_a_tensor_that_is_not_there_or_of_another_shape_is_named(written):
    for key, shape, said in (
        ("conv_in.weight", (8, 4, 3, 3), "a .* x 3 x 3 model.diffusion_model.input_blocks.0.0.weight, where"),
        ("conv_in.nothing", (8,), "no model.diffusion_model.input_blocks.0.0.nothing, where SDXL's unet has 8"),
    ):
        with pytest.raises(UserError, match=f"{written} holds {said}"):
            single_file.read_tensor(written, "unet", key, torch.Size(shape))


def test_diffusers_reads_the_second_text_encoder_back(written, tiny_base):
    model = CLIPTextModelWithProjection.from_pretrained(tiny_base / "text_encoder_2")
    prefix = "conditioner.embedders.1.model."
    back = single_file_utils.convert_open_clip_checkpoint(model, load_file(written), prefix=prefix)
    weights = {name.removeprefix("text_model."): tensor for name, tensor in model.state_dict().items()}
    assert_equal(weights, {name.removeprefix("text_model."): tensor for name, tensor in back.items()})


def test_diffusers_loads_a_whole_pipeline_of_the_file_with_the_same_weights(written, tiny_base, tmp_path):
    loaded = {name: components.load(name, tiny_base / name) for name in COMPONENTS}
    StableDiffusionXLPipeline(**loaded).save_pretrained(tmp_path / "base")
    pipeline = StableDiffusionXLPipeline.from_single_file(
        str(written), config=str(tmp_path / "base"), local_files_only=True
    )
    for name in single_file.COMPONENTS:
        assert_equal(loaded[name].state_dict(), getattr(pipeline, name).state_dict())


def test_the_file_is_the_same_in_fp16_with_the_vae_in_fp32(write, written, tmp_path):
    half, whole = load_file(write(tmp_path / "half.safetensors", torch.float16)), load_file(written)
    assert half.keys() == whole.keys()
    for key, tensor in half.items():
        vae = key.startswith("first_stage_model.")
        assert tensor.dtype == (torch.float32 if vae else torch.float16), key
        assert torch.equal(tensor, whole[key].to(tensor.dtype)), key


def test_a_v_prediction_model_is_marked_as_one(write, written, tmp_path):
    path = write(tmp_path / "v.safetensors", markers=["v_pred"])
    assert load_file(path).keys() - load_file(written).keys() == {"v_pred"}


def test_one_component_is_loaded_at_a_time_and_the_file_appears_whole(write, tiny_base, tmp_path):
    path, asked = tmp_path / "sdxl.safetensors", []

    def load(name):
        asked.append(name)
        assert not path.exists()
        if name == "text_encoder_2":
            raise KeyboardInterrupt
        return weights_of(tiny_base, name)

    with pytest.raises(KeyboardInterrupt):
        write(path, load_weights=load)
    assert asked == list(single_file.COMPONENTS)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "change",
    [
        lambda weights: {key: tensor[:1] for key, tensor in weights.items()},
        lambda weights: dict(list(weights.items())[1:]),
        lambda weights: weights | {"more": torch.ones(1)},
    ],
    ids=["other shapes", "one fewer", "one more"],
)
def test_weights_that_are_not_the_configurations_are_refused(write, tiny_base, tmp_path, change):
    def load(name):
        weights = weights_of(tiny_base, name)
        return change(weights) if name == "vae" else weights

    with pytest.raises(RuntimeError, match="the vae's weights are not of the names and shapes of its configuration"):
        write(tmp_path / "sdxl.safetensors", load_weights=load)
    assert list(tmp_path.iterdir()) == []


def test_what_does_not_read_back_as_written_is_refused(write, tiny_base, tmp_path, monkeypatch):
    def damage(file, tensors, dtype, places, write=single_file._write):
        write(file, tensors, dtype, places)
        file.seek(next(iter(places.values())))
        file.write(b"\xff")
        file.flush()

    monkeypatch.setattr(single_file, "_write", damage)
    with pytest.raises(RuntimeError, match="does not read back"):
        write(tmp_path / "sdxl.safetensors")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_permission_is_refused(write, tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(UserError, match="cannot be written.*GiB"):
        write(tmp_path / "sdxl.safetensors")


def test_the_benchmarks_file_is_this_one(benchmark, written, tiny_base, tmp_path):
    benchmark.write_single_file(tiny_base, tmp_path / "base.safetensors")
    assert (tmp_path / "base.safetensors").read_bytes() == written.read_bytes()


def test_the_first_lora_names_the_very_modules_that_are_trained_here(benchmark, tiny_base, tmp_path):
    benchmark.write_first_lora(tiny_base, tmp_path / "first.safetensors", rank=4, alpha=8)
    unet = UNet2DConditionModel.from_pretrained(tiny_base / "unet")
    lora.add_lora(unet, lora.lora_config(4, 8.0, list(lora.UNET_TARGETS)))
    modules = {name.split(".lora_")[0] for name, _ in unet.named_parameters() if ".lora_" in name}
    with safe_open(tmp_path / "first.safetensors", framework="pt") as file:
        found = {key.split(".")[0] for key in file.keys()}  # noqa: SIM118
    assert found == {naming.kohya_name("unet", module) for module in modules}
