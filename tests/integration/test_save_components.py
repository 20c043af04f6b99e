"""scripts/save_components.py: a base is written once, whole, and verified."""

import json
import os
import resource
import shutil

import pytest
import torch
from safetensors.torch import load_file

from rasengan import UserError
from rasengan.sources import COMPONENTS


UNET = "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def save(save_script, tiny_base):
    """Function that saves the tiny base's components, or another's, into a folder."""

    def run(directory, *further, base=tiny_base):
        save_script.main(save_script.parse_args([str(base), str(directory), *further]))
        return directory

    return run


@pytest.fixture(scope="module")
def saved(save, tmp_path_factory):
    return save(tmp_path_factory.mktemp("drive") / "sdxl")


@pytest.fixture
def copied(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "sdxl")


def state(directory) -> dict[str, tuple[int, bytes]]:
    files = [path for path in sorted(directory.rglob("*")) if path.is_file()]
    return {str(path.relative_to(directory)): (path.stat().st_mtime_ns, path.read_bytes()) for path in files}


def contents(directory) -> dict[str, bytes]:
    return {name: content for name, (_, content) in state(directory).items()}


def test_seven_folders_are_written_the_unet_in_fp16_and_the_vae_in_fp32(saved, tiny_base):
    assert {path.name for path in saved.iterdir()} == {*COMPONENTS, "components.json"}
    for name, dtype in (("unet", torch.float16), ("text_encoder_2", torch.float16), ("vae", torch.float32)):
        (file,) = (saved / name).glob("*.safetensors")
        (original,) = (tiny_base / name).glob("*.safetensors")
        weights, expected = load_file(file), load_file(original)
        assert weights.keys() == expected.keys()
        assert all(torch.equal(tensor, expected[key].to(dtype)) for key, tensor in weights.items()), name


def test_both_scripts_start_from_that_folder_alone(saved, train, draw):
    output_dir = train(
        *("--pretrained_model_name_or_path", saved, "--max_train_samples", 4, "--max_train_steps", 1),
    )
    assert draw("--pretrained_model_name_or_path", saved, "--lora_weights", output_dir, "--prompt", "a star")


def test_a_second_call_verifies_and_writes_nothing(copied, save, loaded):
    before = state(copied)
    save(copied)
    assert state(copied) == before
    assert loaded == []


def test_a_save_that_was_killed_goes_on_where_it_was(saved, save, loaded, tmp_path):
    copied = shutil.copytree(saved, tmp_path / "sdxl")
    manifest = json.loads((copied / "components.json").read_text())
    # Killed while the UNet was written: it has no folder of its own yet, and the scheduler comes after it.
    (copied / "unet").rename(copied / ".unet.unfinished")
    (copied / ".unet.unfinished" / "diffusion_pytorch_model.safetensors").write_bytes(b"half")
    shutil.rmtree(copied / "scheduler")
    del manifest["components"]["unet"], manifest["components"]["scheduler"]
    (copied / "components.json").write_text(json.dumps(manifest))
    before = state(copied)
    save(copied)
    after = state(copied)
    assert loaded == ["unet", "scheduler"]
    assert contents(copied) == contents(saved)
    kept = [name for name in before if not name.startswith((".unet", "components.json"))]
    assert {name: after[name] for name in kept} == {name: before[name] for name in kept}


@pytest.mark.parametrize("damage", ["flipped", "cut", "removed", "added"])
def test_a_damaged_component_is_noticed_and_written_again(damage, copied, saved, save, loaded):
    file = copied / UNET
    content = bytearray(file.read_bytes())
    if damage == "flipped":
        content[-5] ^= 1
        file.write_bytes(content)
    elif damage == "cut":
        file.write_bytes(content[:-100])
    elif damage == "removed":
        file.unlink()
    else:
        (copied / "unet" / "model.safetensors").write_bytes(b"?")
    save(copied)
    assert loaded == ["unet"]
    assert contents(copied) == contents(saved)


def test_the_same_base_by_another_path_goes_on(copied, save, loaded, tiny_base, tmp_path):
    before = state(copied)
    (tmp_path / "link").symlink_to(tiny_base)
    save(copied, base=f"{tmp_path / 'link'}/")
    assert state(copied) == before
    assert loaded == []


@pytest.mark.parametrize("moment", ["before the name", "before the name, and half on the disk", "after the name"])
def test_a_run_that_was_cut_off_beside_its_manifest_goes_on(moment, copied, save, loaded):
    before = contents(copied)
    unet = copied / "unet"
    if "half" in moment or moment == "after the name":
        (unet / "config.json").write_text("{}")  # a disk that lost the end of it
    if "before" in moment:
        unet.rename(copied / ".unet.unfinished")  # the manifest has it already
    save(copied)
    assert loaded == ([] if moment == "before the name" else ["unet"])  # what is whole by its hash is not read again
    assert contents(copied) == before


@pytest.mark.parametrize("changed", ["base", "dtype"])
def test_another_base_or_dtype_into_the_same_folder_is_refused(changed, copied, save, loaded, tiny_base, tmp_path):
    other = shutil.copytree(tiny_base, tmp_path / "other")
    before = state(copied)
    with pytest.raises(UserError, match=r"Give another folder\."):
        save(copied, base=other) if changed == "base" else save(copied, "--dtype", "fp32")
    assert state(copied) == before
    assert loaded == []


def test_a_base_that_is_no_sdxl_is_refused_before_anything_is_written(tiny_base, save, loaded, tmp_path):
    base = shutil.copytree(tiny_base, tmp_path / "base")
    config = json.loads((base / "unet" / "config.json").read_text())
    (base / "unet" / "config.json").write_text(json.dumps(config | {"in_channels": 9}))
    with pytest.raises(UserError, match="9 input channels"):
        save(tmp_path / "drive", base=base)
    assert loaded == []
    assert not (tmp_path / "drive").exists()


def test_a_full_disk_is_an_error_with_the_remedy_and_what_is_finished_stays(save, saved, loaded, tmp_path):
    # A limit on the size of files stops the write of the first weights, as a full disk does.
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, before[1]))
    try:
        with pytest.raises(UserError, match=r"text_encoder cannot be written: .*Make room .*what is finished stays"):
            save(tmp_path / "sdxl")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    loaded.clear()
    save(tmp_path / "sdxl")
    assert "tokenizer" not in loaded
    assert contents(tmp_path / "sdxl") == contents(saved)


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"settings": {}, "components": [1]}'])
def test_a_damaged_manifest_is_an_error_with_the_remedy(copied, save, loaded, content):
    (copied / "components.json").write_text(content)
    with pytest.raises(UserError, match=rf"components.json is damaged.*Remove {copied} and run again"):
        save(copied)
    assert loaded == []


def test_saved_files_can_be_read_by_whom_the_umask_allows(saved):
    mask = os.umask(0o077)
    os.umask(mask)
    assert {path.stat().st_mode & 0o777 for path in saved.rglob("*") if path.is_file()} == {0o666 & ~mask}
