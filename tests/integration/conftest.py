"""The scripts' own main functions, called in this process: a new one costs ten seconds of imports."""

import importlib.util
import os
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from PIL import Image

from rasengan import UserError, components


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """Compute with one thread, as `run_script` does: the last bits of a sum depend on their number."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def train(train_script, train_arguments, tmp_path_factory) -> Callable[..., Path]:
    """Function that trains with `train_arguments` and further ones, and returns the output folder.

    Without gradient checkpointing, for speed: a test shows that this changes no bit. `without` names flags of
    `train_arguments` to leave out.
    """

    def run(*further, output_dir: Path | None = None, without: tuple[str, ...] = ()) -> Path:
        output_dir = output_dir or tmp_path_factory.mktemp("run")
        pairs = zip(train_arguments[::2], train_arguments[1::2], strict=True)
        kept = [word for flag, value in pairs if flag not in without for word in (flag, value)]
        words = [*kept, "--no-gradient_checkpointing", *map(str, further), "--output_dir", str(output_dir)]
        environment = dict(os.environ)
        forget_accelerator()
        try:
            train_script.main(train_script.parse_args(words))
        finally:
            forget_accelerator()
            os.environ.clear()
            os.environ.update(environment)
        return output_dir

    return run


def forget_accelerator() -> None:
    """Drop what accelerate keeps for a whole process."""
    AcceleratorState._reset_state(True)
    GradientState._reset_state()


@pytest.fixture(scope="session")
def draw(infer_script, tiny_base, tmp_path_factory) -> Callable[..., dict[str, Image.Image]]:
    """Function that draws small pictures with the tiny base, and returns them by file name."""
    cache = tmp_path_factory.mktemp("prompts")

    def run(*arguments) -> dict[str, Image.Image]:
        folder = tmp_path_factory.mktemp("pictures")
        small = ["--height", "64", "--width", "64", "--num_inference_steps", "3", "--output_dir", str(folder)]
        base = ["--pretrained_model_name_or_path", str(tiny_base), "--conditioning_cache_dir", str(cache)]
        infer_script.main(infer_script.parse_args([*base, *small, *map(str, arguments)]))
        return {path.name: Image.open(path) for path in sorted(folder.glob("*.png"))}

    return run


@pytest.fixture
def loaded(monkeypatch) -> list[str]:
    """Names of the components that are loaded during a test."""
    names, load = [], components.load

    def note(component, *arguments, **options):
        names.append(component)
        return load(component, *arguments, **options)

    monkeypatch.setattr(components, "load", note)
    return names


@pytest.fixture
def refused(loaded) -> Callable[..., str]:
    """Function that asserts that a call is refused before any model is loaded, and returns the error.

    The error is one line, and matches a pattern.
    """

    def check(pattern: str, call, *arguments, **options) -> str:
        with pytest.raises(UserError) as caught:
            call(*arguments, **options)
        message = str(caught.value)
        assert re.search(pattern, message), message
        assert "\n" not in message
        assert set(loaded) <= {"scheduler", "tokenizer"}
        return message

    return check


@pytest.fixture(scope="session")
def save_script():
    """scripts/save_components.py as a module."""
    path = Path(__file__).parents[2] / "scripts" / "save_components.py"
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
