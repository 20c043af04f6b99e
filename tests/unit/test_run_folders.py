"""Which adapters a folder of runs holds, and that no name from outside leads out of it."""

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from rasengan import UserError
from rasengan.adapter_reader import read_adapter
from rasengan.run_folders import choose_adapter, find_adapters


def write(file: Path, key: str = "unet.to_q.lora_A.weight", minutes_ago: int = 0) -> Path:
    """Write a file of one tensor, so and so old, and return it."""
    file.parent.mkdir(parents=True, exist_ok=True)
    save_file({key: torch.zeros(1)}, file)
    when = 1_700_000_000 - 60 * minutes_ago
    os.utime(file, (when, when))
    return file


def write_peft(folder: Path, **options) -> Path:
    write(folder / "adapter_model.safetensors", **options)
    (folder / "adapter_config.json").write_text("{}")
    return folder


@pytest.fixture
def runs(tmp_path) -> Path:
    """Two runs of which one goes on, adapters from elsewhere, and much that is none."""
    root = tmp_path / "runs"
    write(root / "naruto" / "pytorch_lora_weights.safetensors", minutes_ago=5)
    write_peft(root / "naruto" / "peft", minutes_ago=5)
    write(root / "naruto" / "checkpoint-2" / "pytorch_lora_weights.safetensors", minutes_ago=7)
    write(root / "naruto" / "checkpoint-2" / "ema" / "pytorch_lora_weights.safetensors", minutes_ago=7)
    write(root / "new" / "checkpoint-1" / "pytorch_lora_weights.safetensors", minutes_ago=1)
    write(root / "others" / "kohya style.safetensors", "lora_unet_down_to_q.lora_down.weight", minutes_ago=9)
    write(root / "others" / "loha.safetensors", "lora_unet_to_q.hada_w1_a", minutes_ago=8)
    write(root / "tuned" / "unet" / "diffusion_pytorch_model.safetensors", "conv_in.weight")
    write(root / ".cache" / "pytorch_lora_weights.safetensors")
    (root / "others" / "half.safetensors").write_bytes(b"half of a file")
    (root / "naruto" / "optimizer.bin").write_bytes(b"")
    return root


def test_all_layouts_are_found_and_the_newest_is_first(runs):
    assert list(find_adapters(runs)) == [
        "new/checkpoint-1",
        "naruto",
        "naruto/peft",
        "naruto/checkpoint-2",
        "naruto/checkpoint-2/ema",
        "others/loha.safetensors",
        "others/kohya style.safetensors",
    ]


def test_a_whole_model_with_a_stray_tensor_of_an_adapters_is_none(runs):
    before = find_adapters(runs)
    names = ("model.diffusion_model.input_blocks.0.0.weight", "model.diffusion_model.to_q.lora_A.weight")
    save_file({name: torch.zeros(1) for name in names}, runs / "tuned" / "model.safetensors")
    assert find_adapters(runs) == before


def test_a_damaged_adapter_is_offered_and_refused_when_it_is_read(runs):
    (runs / "new" / "checkpoint-1" / "pytorch_lora_weights.safetensors").write_bytes(b"half of a file")
    with pytest.raises(UserError, match="is no whole safetensors file"):
        read_adapter(choose_adapter(runs, "new/checkpoint-1"))


def test_a_run_itself_may_be_given(runs):
    found = find_adapters(runs / "naruto")
    assert list(found) == ["pytorch_lora_weights.safetensors", "peft", "checkpoint-2", "checkpoint-2/ema"]
    assert found["pytorch_lora_weights.safetensors"] == runs / "naruto" / "pytorch_lora_weights.safetensors"
    assert find_adapters(runs / "naruto" / "peft") == {"peft/": runs / "naruto" / "peft"}


def test_the_parts_of_a_peft_folder_are_one_adapter(tmp_path):
    write_peft(tmp_path / "peft")
    write_peft(tmp_path / "peft" / "text_encoder")
    write_peft(tmp_path / "texts" / "text_encoder_2")
    assert set(find_adapters(tmp_path)) == {"peft", "texts"}


def test_a_new_adapter_is_there_at_once_and_an_old_one_gone(runs):
    file = write(runs / "new" / "checkpoint-2" / "pytorch_lora_weights.safetensors")
    assert choose_adapter(runs, "new/checkpoint-2") == file
    file.unlink()
    with pytest.raises(UserError, match="'new/checkpoint-2' is none of the 7 adapters here"):
        choose_adapter(runs, "new/checkpoint-2")


def outside(runs: Path) -> Path:
    return write(runs.parent / "outside" / "pytorch_lora_weights.safetensors")


def test_links_lead_nowhere_else(runs):
    before = set(find_adapters(runs))
    file = outside(runs)
    (runs / "file.safetensors").symlink_to(file)
    (runs / "folder").symlink_to(file.parent)
    write_peft(file.parent / "peft")
    (runs / "peft").mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (runs / "peft" / name).symlink_to(file.parent / "peft" / name)
    write_peft(runs / "mixed")
    (runs / "mixed" / "text_encoder").symlink_to(file.parent / "peft")
    assert set(find_adapters(runs)) == before
    (runs / "alias.safetensors").symlink_to(runs / "others" / "loha.safetensors")
    assert set(find_adapters(runs)) == before | {"alias.safetensors"}


def test_the_folder_itself_may_be_a_link(runs, tmp_path):
    (tmp_path / "link").symlink_to(runs)
    assert find_adapters(tmp_path / "link") == find_adapters(runs)


@pytest.mark.parametrize(
    "name",
    [
        "../outside",
        "../outside/pytorch_lora_weights.safetensors",
        "naruto/../../outside",
        "naruto/../naruto",
        "naruto/",
        "./naruto",
        ".cache",
        "naruto/optimizer.bin",
        "/etc/passwd",
        "org/name",
        "naruto\0",
        ["naruto"],
        {"path": "naruto"},
    ],
)
def test_a_name_that_is_not_in_the_list_is_refused_and_nothing_read(name, runs, monkeypatch):
    outside(runs)
    opened = []
    monkeypatch.setattr("rasengan.run_folders.holds_adapter", lambda file: opened.append(file) or True)
    with pytest.raises(UserError, match="is none of the .* adapters here. Choose one from the list."):
        choose_adapter(runs, name)
    assert all(file.is_relative_to(runs) for file in opened)


@pytest.mark.parametrize("name", [None, "", []])
def test_no_name_is_told_apart(name, runs):
    with pytest.raises(UserError, match="No adapter is chosen. Choose one from the list, which holds 7"):
        choose_adapter(runs, name)


def test_an_absolute_path_of_an_adapter_is_refused_too(runs):
    for path in (outside(runs), runs / "naruto"):
        with pytest.raises(UserError, match="is none of"):
            choose_adapter(runs, str(path))


def test_what_could_hang_or_break_a_page_is_left_out(runs):
    before = find_adapters(runs)
    os.mkfifo(runs / "pytorch_lora_weights.safetensors")
    write(runs / "two\nlines.safetensors")
    (runs / os.fsdecode(b"\xff")).mkdir()
    write(runs / os.fsdecode(b"\xff") / "pytorch_lora_weights.safetensors")
    write(runs / "a" / "b" / "c" / "d" / "e" / "pytorch_lora_weights.safetensors")
    assert find_adapters(runs) == before
