"""Which models are drawn with, how they are called, and what is said of a merge."""

import pytest
import torch
from peft import LoraConfig

from rasengan import UserError, adapters, compared_models
from rasengan.adapter_writer import write_diffusers
from rasengan.compared_models import Model, describe_merge, short_names
from rasengan.merging import MergeReport


MODULE = "mid_block.attentions.0.proj_in"


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """Two folders, each with an adapter of an alpha of its own."""
    root = tmp_path_factory.mktemp("adapters")
    for number, alpha in enumerate((4, 8), start=1):
        config = LoraConfig(r=2, lora_alpha=alpha, target_modules=[MODULE])
        weights = {f"{MODULE}.lora_A.weight": torch.ones(2, 8), f"{MODULE}.lora_B.weight": torch.ones(8, 2)}
        write_diffusers(root / str(number), adapters.Adapter({"unet": weights}, {"unet": config}))
    return str(root / "1"), str(root / "2")


def read(compared=(), summed=(), scales=(1.0,), with_base=False):
    return compared_models.read_models(list(compared), list(summed), list(scales), with_base, None, False, None)


def alphas(model):
    return [(adapter.configs["unet"].lora_alpha, scale) for adapter, scale in model.adapters]


def test_without_an_adapter_the_base_is_drawn():
    assert read() == [Model("base", "base", [], "none")]


def test_one_adapter_at_one_scale_is_the_tuned_model(places):
    (tuned,) = read(places[:1])
    assert (tuned.label, tuned.kind, alphas(tuned)) == ("LoRA x 1", "tuned", [(4, 1.0)])
    assert tuned.places == f"{places[0]} at scale 1"
    base, tuned = read(places[:1], with_base=True)
    assert (base.label, tuned.label) == ("base", "LoRA x 1")


def test_scales_make_models_of_their_own_and_0_is_the_base(places):
    models = read(places[:1], scales=[0.0, 0.5, -1.0])
    assert [(m.label, m.kind) for m in models] == [
        ("base", "base"),
        ("LoRA x 0.5", "LoRA x 0.5"),
        ("LoRA x -1", "LoRA x -1"),
    ]
    assert [alphas(m) for m in models] == [[], [(4, 0.5)], [(4, -1.0)]]
    assert models[1].adapters[0][0] is models[2].adapters[0][0]  # read once


def test_places_are_compared_by_the_ends_of_their_names(places):
    models = read(places, scales=[1.0, 2.0])
    assert [m.label for m in models] == ["1 x 1", "1 x 2", "2 x 1", "2 x 2"]
    assert [alphas(m) for m in models] == [[(4, 1.0)], [(4, 2.0)], [(8, 1.0)], [(8, 2.0)]]


def test_summed_adapters_are_one_model_with_its_weights_times_the_scale(places):
    (tuned,) = read(summed=[(places[0], 0.5), (places[1], 2.0)], scales=[3.0])
    assert alphas(tuned) == [(4, 1.5), (8, 6.0)]
    assert tuned.places == f"{places[0]} at scale 1.5 + {places[1]} at scale 6"
    (tuned,) = read(summed=[(places[0], 0.0), (places[1], 2.0)])
    assert alphas(tuned) == [(8, 2.0)]
    (base,) = read(summed=[(places[0], 0.0)])
    assert base.kind == "base"


@pytest.mark.parametrize(
    ("given", "names"),
    [
        (["a/b/one.safetensors", "a/c/two.safetensors"], ["one.safetensors", "two.safetensors"]),
        (["a/b/x", "c/b/x"], ["a/b/x", "c/b/x"]),
        (["x", "c/x"], ["x", "c/x"]),
        ([], []),
    ],
)
def test_short_names_are_as_long_as_they_must_be(given, names):
    assert short_names(given) == names


def test_a_place_that_is_there_twice_is_refused(places):
    with pytest.raises(UserError, match="names a place twice"):
        read([places[0], places[0] + "/"])


def test_a_merge_is_described_and_a_strange_one_warned_of(places):
    model = read(summed=[(places[0], 0.5), (places[1], 2.0)])[0]
    (said,) = describe_merge(model, "unet", MergeReport(7, 0.01))
    how = "alpha 4 / rank 2 x 0.5 + alpha 8 / rank 2 x 2"
    assert said == f"Merged 7 modules of the unet at {how}: relative weight change 1.000e-02"
    assert "too small a change to be seen" in describe_merge(model, "unet", MergeReport(7, 1e-7))[1]
    assert "drowns what the model had" in describe_merge(model, "unet", MergeReport(7, 11.0))[1]
    model.adapters[0][0].configs["unet"].use_rslora = True
    assert "alpha 4 / root of rank 2 x 0.5" in describe_merge(model, "unet", MergeReport(7, 0.01))[0]
