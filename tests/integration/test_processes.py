"""Several processes train what one would, with the same script."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from rasengan import demo


ADAPTER = "pytorch_lora_weights.safetensors"
CONFIG = Path(__file__).parents[2] / "accelerate_configs" / "cpu.yaml"
# Any free port, so that two test runs on one machine do not meet.
TWO = ["--config_file", str(CONFIG), "--main_process_port", "0", "--num_processes", "2"]
# With beta1 = 0 the optimizer's first moment, which every checkpoint holds, is the gradient of its last step. The
# great epsilon makes the step nearly that of SGD: otherwise AdamW would enlarge the rounding of small gradients.
SHOW_GRADIENTS = ["--no-use_8bit_adam", "--adam_beta1", 0, "--adam_epsilon", 0.01, "--max_grad_norm", 1e9]
STEPS = 3


@pytest.fixture(scope="module")
def flags(tmp_path_factory) -> list:
    """Flags of three steps of 32 samples over 67 pictures: more than a cache shard holds, and odd.

    The third step spans two epochs.
    """
    folder = tmp_path_factory.mktemp("many")
    demo.draw_picture_set(folder, count=67, seed=1)
    captions = [json.loads(line)["text"] for line in (folder / "metadata.jsonl").read_text().splitlines()]
    assert len(set(captions)) > 64
    prompt = ["--validation_prompt", "a red star", "--num_validation_images", 1, "--validation_inference_steps", 2]
    run = ["--train_data_dir", folder, "--max_train_steps", STEPS, "--checkpointing_steps", 1, "--learning_rate", 0.01]
    return [*run, *prompt, *SHOW_GRADIENTS]


@pytest.fixture(scope="module")
def two(run_script, train_arguments, flags, tmp_path_factory):
    """Output folder of two processes with 16 samples each; the cache that they built is inside."""
    folder = tmp_path_factory.mktemp("two")
    run = [*train_arguments, *flags, "--train_batch_size", 16, "--no-gradient_checkpointing", "--output_dir", folder]
    finished = run_script("train_lora_sdxl", *run, "--conditioning_cache_dir", folder / "cache", launch=TWO)
    assert finished.returncode == 0, finished.stderr
    return folder


@pytest.fixture(scope="module", params=[(32, 1), (8, 4)], ids=["batch 32", "batch 8, accumulation 4"])
def one(train, flags, request, tmp_path_factory):
    """Output folder of one process with the same samples in a step."""
    folder = tmp_path_factory.mktemp("one")
    batch_size, accumulation_steps = request.param
    split = ["--train_batch_size", batch_size, "--gradient_accumulation_steps", accumulation_steps]
    return train(*flags, *split, "--conditioning_cache_dir", folder / "cache", output_dir=folder)


def gradient(output_dir: Path, global_step: int) -> torch.Tensor:
    (state,) = torch.load(output_dir / f"checkpoint-{global_step}" / "optimizer.bin")["state"].values()
    return state["exp_avg"]


def test_two_processes_have_the_gradients_of_one_also_across_an_epochs_edge(two, one):
    for step in range(1, STEPS + 1):
        mine, expected = gradient(two, step), gradient(one, step)
        assert mine.shape == (295_936,)
        # In the first step lora_B is zero, and with it the gradient of lora_A.
        assert (expected != 0).float().mean() > (0.4 if step == 1 else 0.9)
        assert (mine - expected).abs().max() < 1e-5 * expected.abs().max(), step


def test_two_processes_log_the_losses_and_train_the_adapter_of_one(two, one, read_scalars):
    for name in ("train_loss", "grad_norm"):
        assert read_scalars(two, name) == pytest.approx(read_scalars(one, name), rel=1e-5)
    mine, expected = load_file(two / ADAPTER), load_file(one / ADAPTER)
    assert mine.keys() == expected.keys()
    for key, tensor in mine.items():
        torch.testing.assert_close(tensor, expected[key], rtol=0, atol=1e-5)
    assert {path.name for path in two.iterdir()} == {path.name for path in one.iterdir()}


def test_two_processes_build_the_cache_that_one_builds(two, one):
    shards = [
        {path.relative_to(folder): load_file(path) for path in folder.rglob("*.safetensors")}
        for folder in (two / "cache", one / "cache")
    ]
    assert len(shards[0]) == 5  # two of pictures, two of captions, one of the validation prompt
    assert shards[0].keys() == shards[1].keys()
    for name, tensors in shards[0].items():
        assert all(torch.equal(tensor, shards[1][name][key]) for key, tensor in tensors.items()), name


def test_processes_that_would_train_alone_are_refused(run_script, train_arguments, tmp_path):
    # Without a config that says otherwise, this starts a single process.
    launch = ["--cpu", "--num_processes", "2", "--main_process_port", "0"]
    one_step = ["--max_train_steps", 1, "--max_train_samples", 2, "--report_to", "none"]
    finished = run_script("train_lora_sdxl", *train_arguments, *one_step, "--output_dir", tmp_path, launch=launch)
    assert finished.returncode == 1
    errors = [line for line in finished.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert "distributed_type: MULTI_GPU" in errors[0]
    assert "unset MASTER_ADDR" in errors[0]


@pytest.fixture
def half(two):
    """Function that copies the first checkpoint of the two processes' run, and returns flags to go on from it."""

    def start(folder: Path) -> list:
        shutil.copytree(two / "checkpoint-1", folder / "checkpoint-1")
        return ["--conditioning_cache_dir", two / "cache", "--resume_from_checkpoint", "latest"]

    return start


def test_one_process_goes_on_where_two_were(half, two, train, flags, caplog, tmp_path):
    train(*flags, *half(tmp_path), "--train_batch_size", 32, output_dir=tmp_path)
    assert "--num_processes was 2, and is 1; --train_batch_size was 16, and is 32" in caplog.text
    mine, expected = load_file(tmp_path / ADAPTER), load_file(two / ADAPTER)
    for key, tensor in mine.items():
        torch.testing.assert_close(tensor, expected[key], rtol=0, atol=1e-5)


def test_two_processes_go_on_where_one_was(train, run_script, train_arguments, two, flags, tmp_path):
    cache = ["--conditioning_cache_dir", two / "cache"]
    train(*flags, *cache, "--train_batch_size", 32, "--max_train_steps", 1, output_dir=tmp_path)
    run = [*train_arguments, *flags, *cache, "--train_batch_size", 16, "--no-gradient_checkpointing"]
    run += ["--resume_from_checkpoint", "latest", "--output_dir", tmp_path]
    finished = run_script("train_lora_sdxl", *run, launch=TWO)
    assert finished.returncode == 0, finished.stderr
    mine, expected = load_file(tmp_path / ADAPTER), load_file(two / ADAPTER)
    for key, tensor in mine.items():
        torch.testing.assert_close(tensor, expected[key], rtol=0, atol=1e-5)
