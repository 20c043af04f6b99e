import pytest
from diffusers import StableDiffusionXLPipeline

from rasengan import components, data, imaging


@pytest.fixture(scope="session")
def pipeline(tiny_base):
    """diffusers' own pipeline of the tiny components, as the reference."""
    parts = {name: components.load(name, tiny_base / name) for name in components.COMPONENTS}
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
