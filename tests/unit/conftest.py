import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from accelerate.tracking import GeneralTracker
from diffusers import StableDiffusionXLPipeline
from peft import LoraConfig, inject_adapter_in_model

from rasengan import components, data, imaging, lora
from rasengan.sources import COMPONENTS


@pytest.fixture(scope="session")
def pipeline(tiny_base):
    """diffusers' own pipeline of the tiny components, as the reference."""
    parts = {name: components.load(name, tiny_base / name) for name in COMPONENTS}
    pipeline = StableDiffusionXLPipeline(**parts, add_watermarker=False)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="session")
def column(picture_set, tmp_path_factory):
    """The undecoded pictures of the set."""
    folder = tmp_path_factory.mktemp("datasets")
    return data.load_pictures(None, None, str(picture_set), "image", "text", str(folder))["image"]


@pytest.fixture(scope="session")
def pictures(column, tmp_path_factory):
    """What is known of each."""
    return imaging.inspect_pictures(column, tmp_path_factory.mktemp("memory"))


@pytest.fixture
def run():
    """What a run gives to be saved, by the names of the arguments."""
    model = torch.nn.Sequential(torch.nn.Linear(8, 8))
    inject_adapter_in_model(LoraConfig(r=2, lora_alpha=4, target_modules=["0"]), model)
    model.peft_config = {"default": LoraConfig(r=2, lora_alpha=4, target_modules=["0"])}
    flat = lora.flatten_parameters([p for p in model.parameters() if p.requires_grad])
    optimizer = torch.optim.AdamW([flat])
    flat.grad.fill_(1.0)
    optimizer.step()
    return {"optimizer": optimizer, "scaler": None, "models": {"unet": model}, "flat": flat, "ema": None}


class Notes(GeneralTracker):
    """A tracker that keeps what it is given, with the step."""

    name, requires_logging_directory, tracker = "notes", False, None

    def __init__(self):
        super().__init__()
        self.kept = []

    def store_init_configuration(self, values):
        pass

    def log(self, values, step=None, **_):
        self.kept.append((step, values))


@pytest.fixture
def notes():
    return Notes()


@pytest.fixture
def accelerator(notes):
    """An accelerator with that tracker alone."""
    AcceleratorState._reset_state(True)
    accelerator = Accelerator(cpu=True, log_with=notes)
    accelerator.init_trackers("test")
    yield accelerator
    AcceleratorState._reset_state(True)
    GradientState._reset_state()
