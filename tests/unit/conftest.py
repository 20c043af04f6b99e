import pytest
from diffusers import StableDiffusionXLPipeline

from rasengan import components


@pytest.fixture(scope="session")
def pipeline(tiny_base):
    """diffusers' own pipeline of the tiny components, as the reference."""
    parts = {name: components.load(name, tiny_base / name) for name in components.COMPONENTS}
    pipeline = StableDiffusionXLPipeline(**parts, add_watermarker=False)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
