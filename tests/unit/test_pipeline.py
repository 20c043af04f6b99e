"""One model for base and tuned, in whatever fits."""

import pytest
import torch

from rasengan import UserError, components, drawing, lora, pipeline, sdxl
from rasengan.adapters import Adapter
from rasengan.sources import COMPONENTS


CPU = torch.device("cpu")
SIZE = {"height": 64, "width": 64, "num_inference_steps": 2, "guidance_scale": 5.0}


@pytest.fixture
def model(tiny_base):
    folders = {name: tiny_base / name for name in COMPONENTS}
    return pipeline.Pipeline(folders, None, CPU, torch.float32)


@pytest.fixture(scope="module")
def scheduler(tiny_base):
    return components.load("scheduler", tiny_base / "scheduler")


def prompts_of(tiny_base, count):
    config = components.read_config("unet", tiny_base / "unet")
    pooled = config["projection_class_embeddings_input_dim"] - 6 * config["addition_time_embed_dim"]
    generator = torch.Generator().manual_seed(0)
    row = (
        torch.randn(77, config["cross_attention_dim"], generator=generator),
        torch.randn(pooled, generator=generator),
    )
    return sdxl.conditioning(row, None, count)


def random_adapter(tiny_base, seed, targets=lora.UNET_TARGETS):
    skeleton, generator = components.skeleton("unet", tiny_base / "unet"), torch.Generator().manual_seed(seed)
    weights = {}
    for name, module in skeleton.named_modules():
        if any(name.endswith(f".{target}") for target in targets):
            weights[f"{name}.lora_A.weight"] = torch.randn(4, module.in_features, generator=generator)
            weights[f"{name}.lora_B.weight"] = torch.randn(module.out_features, 4, generator=generator)
    return Adapter({"unet": weights}, {"unet": lora.lora_config(4, 2.0, list(targets))})


def weights_of(model):
    return {name: tensor.clone() for name, tensor in model.denoiser.unet.state_dict().items()}


def equal(one, other):
    return all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def test_adapters_take_turns_in_the_same_memory(model, tiny_base):
    one, other = random_adapter(tiny_base, 1), random_adapter(tiny_base, 2, ("to_q", "ff.net.2"))
    assert model.use([]) is None
    base, places = weights_of(model), [parameter.data_ptr() for parameter in model.denoiser.unet.parameters()]
    report = model.use([(one, 1.0)])
    tuned = weights_of(model)
    assert report.modules == len(one.weights["unet"]) // 2
    assert not equal(base, tuned)
    model.use([(other, 0.5)])
    assert not equal(weights_of(model), tuned)
    model.use([(one, 1.0)])
    assert equal(weights_of(model), tuned)
    for nothing in ([], [(one, 0.0)]):
        assert model.use(nothing) is None
        assert equal(weights_of(model), base)
    assert [parameter.data_ptr() for parameter in model.denoiser.unet.parameters()] == places


def test_the_last_adapter_needs_no_copy_of_the_base(model, tiny_base):
    model.use([])
    model.use([(random_adapter(tiny_base, 1), 1.0)], is_last=True)
    assert not model.weights.base


def test_an_adapter_that_does_not_fit_leaves_the_base_as_it_was(model, tiny_base):
    model.use([])
    base, adapter = weights_of(model), random_adapter(tiny_base, 1)
    first = next(iter(adapter.weights["unet"]))
    adapter.weights["unet"][first] = adapter.weights["unet"][first][:, :-1]
    with pytest.raises(UserError, match="does not fit the unet"):
        model.use([(random_adapter(tiny_base, 2), 1.0), (adapter, 1.0)])
    assert equal(weights_of(model), base)


def test_a_batch_that_does_not_fit_is_split(model, tiny_base, scheduler, monkeypatch):
    model.use([])
    prompts, seeds, batches = prompts_of(tiny_base, 5), [1, 2, 3, 4, 5], []
    expected = model.draw(scheduler, prompts, seeds, **SIZE)
    predict = drawing.Denoiser.__call__

    def on_a_small_card(denoiser, sample, timestep):
        batches.append(len(sample) // 2)
        if batches[-1] > 2:
            raise torch.OutOfMemoryError
        return predict(denoiser, sample, timestep)

    monkeypatch.setattr(drawing.Denoiser, "__call__", on_a_small_card)
    found = model.draw(scheduler, prompts, seeds, **SIZE)
    assert batches == [5, 2, 2, 2, 2, 1, 1]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    batches.clear()
    model.draw(scheduler, prompts, seeds, **SIZE)
    assert max(batches) == 2, "what does not fit is tried once"


def test_a_picture_for_which_graphs_of_others_leave_no_memory_is_drawn_without_them(
    model, tiny_base, scheduler, monkeypatch
):
    model.use([])
    prompts, predict = prompts_of(tiny_base, 1), drawing.Denoiser.__call__
    expected = model.draw(scheduler, prompts, [1], **SIZE)

    def beside_no_graph(denoiser, sample, timestep):
        if denoiser.graphs:
            raise torch.OutOfMemoryError
        return predict(denoiser, sample, timestep)

    monkeypatch.setattr(drawing.Denoiser, "__call__", beside_no_graph)
    model.denoiser.graphs["another size"] = None
    assert torch.equal(model.draw(scheduler, prompts, [1], **SIZE), expected)
    assert model.most_at_once is None


def test_a_picture_that_does_not_fit_alone_is_an_error(model, tiny_base, scheduler, monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError

    model.use([])
    monkeypatch.setattr(drawing.Denoiser, "__call__", full)
    with pytest.raises(
        UserError, match="One picture takes more memory than this card, or --vram_budget_gib, leaves.*--height"
    ):
        model.draw(scheduler, prompts_of(tiny_base, 2), [1, 2], **SIZE)


def test_a_decode_that_does_not_fit_is_done_without_the_unet(model, monkeypatch):
    model.use([])
    latents, decode = torch.randn(1, 4, 8, 8), drawing.decode
    (expected,) = model.decode(latents)

    def beside_the_unet(vae, latents):
        if model.denoiser is not None:
            raise torch.OutOfMemoryError
        return decode(vae, latents)

    monkeypatch.setattr(drawing, "decode", beside_the_unet)
    (found,) = model.decode(latents)
    assert found.tobytes() == expected.tobytes()
    assert model.denoiser is None


def test_the_unet_comes_back_with_its_adapters(model, tiny_base, scheduler):
    model.use([(random_adapter(tiny_base, 1), 1.0)])
    prompts = prompts_of(tiny_base, 1)
    expected = model.draw(scheduler, prompts, [1], **SIZE)
    model.drop_unet()
    assert torch.equal(model.draw(scheduler, prompts, [1], **SIZE), expected)
    model.use([])
    assert not torch.equal(model.draw(scheduler, prompts, [1], **SIZE), expected)


def test_a_decode_that_does_not_fit_alone_is_an_error(model, monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(drawing, "decode", full)
    with pytest.raises(UserError, match="A picture cannot be decoded.*--height"):
        model.decode(torch.randn(1, 4, 8, 8))


def test_what_is_merged_already_is_not_merged_again(model, tiny_base, monkeypatch):
    adapter = random_adapter(tiny_base, 1)
    report = model.use([(adapter, 1.0)])
    merges, merge = [], pipeline.merging.merge
    monkeypatch.setattr(pipeline.merging, "merge", lambda *inputs: merges.append(1) or merge(*inputs))
    assert model.use([(adapter, 1.0)]) is report
    assert not merges
    model.use([(adapter, 0.5)])
    assert merges


def test_after_a_merge_that_failed_the_base_is_whole_again(model, tiny_base):
    model.use([])
    base, adapter = weights_of(model), random_adapter(tiny_base, 1)
    last = list(adapter.weights["unet"])[-1]
    adapter.weights["unet"][last] = adapter.weights["unet"][last] * float("inf")
    with pytest.raises(UserError, match="non-finite"):
        model.use([(adapter, 1.0)])
    model.use([])
    assert equal(weights_of(model), base)
