import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import CLIPConfig, CLIPModel

from rasengan import demo, miniature


ROOT = Path(__file__).parents[1]
SCRIPTS = ROOT / "scripts"


def pytest_collection_modifyitems(items):
    for item in items:
        folder = item.path.relative_to(ROOT / "tests").parts[0]
        item.add_marker(folder)  # the folder is the marker, so a test cannot be filed wrongly
        if folder == "gpu" and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory) -> Path:
    """Folder of the tiny SDXL's components."""
    folder = tmp_path_factory.mktemp("tiny") / "base"
    demo.build_tiny_sdxl(folder)
    return folder


@pytest.fixture(scope="session")
def picture_set(tmp_path_factory) -> Path:
    """Imagefolder of 64 captioned pictures of mixed sizes and modes."""
    folder = tmp_path_factory.mktemp("pictures")
    demo.draw_picture_set(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_clip(tmp_path_factory) -> Path:
    """Folder of a tiny CLIP with random weights."""
    folder, tokenizer = tmp_path_factory.mktemp("clip"), miniature.make_tokenizer(pad_token=miniature.END)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    text, vision = sizes | ids | {"vocab_size": len(tokenizer)}, sizes | {"image_size": 32, "patch_size": 8}
    torch.manual_seed(0)
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    processor = getattr(transformers, "CLIPImageProcessorPil", transformers.CLIPImageProcessor)
    processor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder


def load_script(name: str):
    spec = importlib.util.spec_from_file_location(name, SCRIPTS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def train_script():
    """scripts/train_lora_sdxl.py as a module, to call its functions without a new process."""
    return load_script("train_lora_sdxl")


@pytest.fixture(scope="session")
def infer_script():
    """scripts/infer.py as a module."""
    return load_script("infer")


@pytest.fixture(scope="session")
def convert_script():
    """scripts/convert.py as a module."""
    return load_script("convert")


@pytest.fixture(scope="session")
def check_script():
    """scripts/check_data.py as a module."""
    return load_script("check_data")


@pytest.fixture(scope="session")
def evaluate_script():
    """scripts/evaluate.py as a module."""
    return load_script("evaluate")


@pytest.fixture(scope="session")
def run_script():
    """Function that runs a script in a new process, as a user does, and returns the CompletedProcess with its text.

    `launch` is the options of `accelerate launch`; None runs plain `python`.
    """

    def run(name: str, *arguments, launch: list[str] | None = None, env: dict[str, str] | None = None):
        start = [sys.executable]
        if launch is not None:
            start += ["-m", "accelerate.commands.accelerate_cli", "launch", *launch]
        return subprocess.run(
            [*start, str(SCRIPTS / f"{name}.py"), *map(str, arguments)],
            capture_output=True,
            text=True,
            timeout=300,
            env=os.environ | {"OMP_NUM_THREADS": "1"} | (env or {}),
        )

    return run


@pytest.fixture(scope="session")
def train_arguments(tiny_base, picture_set, tmp_path_factory) -> list[str]:
    """Arguments of a small run, without --output_dir; a later flag wins over an earlier one."""
    cache = tmp_path_factory.mktemp("cache")
    return [
        *("--pretrained_model_name_or_path", str(tiny_base), "--train_data_dir", str(picture_set)),
        *("--conditioning_cache_dir", str(cache), "--resolution", "64", "--train_batch_size", "2", "--seed", "0"),
        *("--max_train_steps", "4", "--checkpointing_steps", "2", "--learning_rate", "1e-3", "--logging_steps", "1"),
    ]


@pytest.fixture(scope="session")
def trained(run_script, train_arguments, tmp_path_factory) -> Path:
    """Output folder of a small run: 4 steps, checkpoint-2 and checkpoint-4, rank 16, alpha 32."""
    folder = tmp_path_factory.mktemp("trained")
    finished = run_script("train_lora_sdxl", *train_arguments, "--output_dir", folder)
    assert finished.returncode == 0, finished.stderr
    return folder


@pytest.fixture(scope="session")
def read_log() -> Callable[[Path], EventAccumulator]:
    """Function that reads the TensorBoard log of a run."""

    def read(output_dir: Path) -> EventAccumulator:
        log = EventAccumulator(str(output_dir / "logs" / "text2image-fine-tune"))
        log.Reload()
        return log

    return read


@pytest.fixture(scope="session")
def read_scalars(read_log) -> Callable[[Path, str], dict[int, float]]:
    """Function that reads a scalar of a run's TensorBoard log, by step."""

    def read(output_dir: Path, name: str) -> dict[int, float]:
        return {event.step: event.value for event in read_log(output_dir).Scalars(name)}

    return read
