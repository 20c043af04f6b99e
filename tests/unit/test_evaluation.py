import pytest
import torch

from rasengan import cache, components, drawing, evaluation, lora, pipeline, prompts, sdxl
from rasengan.adapters import Adapter
from rasengan.evaluation import Drawn
from rasengan.sources import COMPONENTS


CPU = torch.device("cpu")


# --- what is drawn ---


def test_captions_are_drawn_each_from_several_noises_where_they_are_fewer_than_the_pictures():
    found = evaluation.to_draw(["a", "b", "c"], 8, [3, 5])
    assert [one.prompt for one in found] == [*"abcabcab"] * 2
    assert [one.group for one in found] == [3] * 8 + [5] * 8
    assert len({one.seed for one in found}) == 16
    few = evaluation.to_draw([str(n) for n in range(10)], 3, [0])
    assert few == [Drawn("0", 0, 0), Drawn("3", 0, 1), Drawn("6", 0, 2)]
    assert evaluation.to_draw(["a"], 0, [0]) == []


# --- the bench ---

TEXTS = ["a red star", "two blue balls", "a tent", "a green box", "a white ring"]
SMALL = {"height": 64, "width": 64, "num_inference_steps": 2, "guidance_scale": 5.0}


@pytest.fixture(scope="module")
def folders(tiny_base):
    return {name: tiny_base / name for name in COMPONENTS}


@pytest.fixture
def bench(folders):
    tokenizers, encoders = components.load_text_encoders(folders, None, CPU, torch.float32)
    rows = {text: cache.encode_captions([text], tokenizers, encoders) for text in TEXTS}
    embeds = {text: {name: part[0] for name, part in of.items()} for text, of in rows.items()}
    scheduler = components.load("scheduler", folders["scheduler"])
    return evaluation.Bench(pipeline.Pipeline(folders, None, CPU, torch.float32), scheduler, embeds, 0.5, 4)


def random_adapter(folders, component, targets):
    generator, weights = torch.Generator().manual_seed(0), {}
    for name, module in components.skeleton(component, folders[component]).named_modules():
        if any(name.endswith(f".{target}") for target in targets):
            weights[f"{name}.lora_A.weight"] = torch.randn(2, module.in_features, generator=generator) / 20
            weights[f"{name}.lora_B.weight"] = torch.randn(module.out_features, 2, generator=generator) / 20
    return Adapter({component: weights}, {component: lora.lora_config(2, 2.0, list(targets))})


def test_pictures_are_drawn_each_from_its_own_seed_whatever_is_drawn_beside(bench, folders):
    bench.use(None)
    sampler = sdxl.make_sampler(bench.scheduler, None)
    jobs, done = [Drawn(text, 0, 10 + n) for n, text in enumerate(TEXTS)], []
    latents = bench.draw(sampler, jobs, done.append, **SMALL)
    assert sum(done) == len(latents) == len(TEXTS)
    for one, found in zip(jobs, latents, strict=True):
        embeds = bench.base_embeds[one.prompt]
        row = sdxl.conditioning((embeds["prompt_embeds"], embeds["pooled_prompt_embeds"]), None, 1)
        alone = drawing.draw(bench.pipeline.denoiser, sampler, row, [one.seed], **SMALL)[0]
        assert torch.allclose(found, alone, atol=1e-4)
    assert not torch.allclose(latents[0], latents[1], atol=1e-2)
    bench.negative_prompt = TEXTS[1]
    (found,) = bench.draw(sampler, jobs[:1], done.append, **SMALL)
    texts = [tuple(bench.base_embeds[text].values()) for text in TEXTS[:2]]
    row = sdxl.conditioning(*texts, 1)
    alone = drawing.draw(bench.pipeline.denoiser, sampler, row, [jobs[0].seed], **SMALL)[0]
    assert torch.allclose(found, alone, atol=1e-4)
    assert not torch.allclose(found, latents[0], atol=1e-2)


def test_an_adapter_of_a_text_encoder_changes_the_embeddings_and_the_next_ones_do_not_keep_it(bench, folders):
    adapter = random_adapter(folders, "text_encoder", lora.TEXT_ENCODER_TARGETS)
    bench.use(adapter)
    expected, _ = prompts.encode_tuned(TEXTS, folders, None, CPU, torch.float32, [(adapter, 0.5)])
    for text in TEXTS:
        assert torch.equal(bench.embeds[text]["prompt_embeds"], expected[text][0])
        assert not torch.allclose(bench.embeds[text]["prompt_embeds"], bench.base_embeds[text]["prompt_embeds"])
    assert bench.use(random_adapter(folders, "unet", ("to_q",))).modules > 0
    assert bench.embeds is bench.base_embeds
