import json
import math
import re
import statistics

import pytest
import torch

from rasengan import cache, components, drawing, evaluation, lora, pipeline, prompts, sdxl
from rasengan.adapters import Adapter
from rasengan.evaluation import Drawn, Losses, Point
from rasengan.imaging import Picture


CPU = torch.device("cpu")
PICTURES = [Picture(f"{n}.png", f"digest {n}", 64, 64, None, n) for n in range(50)]


# --- which pictures ---


def test_as_many_trained_pictures_are_chosen_by_seed_and_contents_alone():
    rows = list(range(10, 50))
    chosen = evaluation.trained_sample(PICTURES, rows, 7, 0)
    assert len(chosen) == len(set(chosen)) == 7
    assert set(chosen) <= set(rows)
    turned = [picture._replace(name="another") for picture in reversed(PICTURES)]
    found = evaluation.trained_sample(turned, list(range(40)), 7, 0)
    assert {turned[row].digest for row in found} == {PICTURES[row].digest for row in chosen}
    assert evaluation.trained_sample(PICTURES, rows, 7, 1) != chosen
    assert evaluation.trained_sample(PICTURES, [3, 4], 7, 0) == [3, 4]


def test_copies_of_a_trained_picture_count_once():
    copies = [PICTURES[0], PICTURES[0], PICTURES[1]]
    assert evaluation.trained_sample(copies, [0, 1, 2], 3, 0) == [0, 2]


# --- the figures ---


def losses_of(*means, spread=0.0):
    """Losses (pictures, 4) whose bands differ, of these means."""
    return torch.tensor([[mean - spread, mean, mean, mean + spread] for mean in means], dtype=torch.float64)


def test_a_comparison_is_of_the_same_picture_before_and_after():
    base, tuned = [1.0, 3.0, 2.0, 6.0], [0.9, 2.5, 2.1, 5.0]
    found = evaluation.compare(losses_of(*base, spread=0.5), losses_of(*tuned, spread=0.1), 1000)
    differences = [after - before for before, after in zip(base, tuned, strict=True)]
    assert found["pictures"] == 4
    assert found["change"] == pytest.approx(statistics.mean(differences) / 3.0)
    assert found["error"] == pytest.approx(statistics.stdev(differences) / 2 / 3.0)
    assert found["base"]["validation_loss"] == pytest.approx(3.0)
    assert found["base"]["validation_loss/t0-249"] == pytest.approx(2.5)
    assert found["tuned"]["validation_loss/t750-999"] == pytest.approx(2.625 + 0.1)
    assert math.isnan(evaluation.compare(losses_of(1.0), losses_of(0.9), 1000)["error"])


class Rows:
    """What is looked at of samples: of every other picture."""

    pictures, captions, rows = PICTURES, [[f"caption {n}"] for n in range(50)], [2, 4, 6]


def test_each_picture_has_its_losses_and_the_most_improved_comes_first():
    base, tuned = losses_of(1.0, 2.0, 3.0, spread=0.1), losses_of(math.nan, 1.0, 2.7)
    found = evaluation.each_picture(Rows, base, tuned)
    assert [about["row"] for about in found] == [4, 6, 2]
    assert found[0] == {
        "row": 4,
        "name": "4.png",
        "captions": ["caption 4"],
        "base": pytest.approx(2.0),
        "tuned": pytest.approx(1.0),
        "change": pytest.approx(-0.5),
        "base_bands": pytest.approx([1.9, 2.0, 2.0, 2.1]),
        "tuned_bands": [1.0] * 4,
    }


def test_without_trained_pictures_or_checkpoints_these_figures_are_left_out():
    none = torch.zeros(0, 4, dtype=torch.float64)
    losses = {"base": Losses(losses_of(1, 2, 3), none), "tuned": Losses(losses_of(0.9, 1.8, 2.7), none)}
    points = [Point(9, losses["tuned"]), Point(0, losses["base"])]
    found = evaluation.loss_figures(Rows, losses, points, 1000)
    assert (found["trained"], found["curve"]) == (None, None)
    found = evaluation.loss_figures(Rows, losses, [*points, Point(4, losses["base"])], 1000)
    assert [point["step"] for point in found["curve"]["points"]] == [0, 4, 9]
    assert found["curve"]["lowest_step"] == 9


def curve_of(*rows, trained=(1.0, 1.0, 1.0)):
    """The curve of a run whose held-out pictures had these losses after 0, 10, 20, ... steps."""
    of_trained = losses_of(*(0.5 * value for value in trained))
    return evaluation.curve([Point(10 * n, Losses(losses_of(*row), of_trained)) for n, row in enumerate(rows)])


@pytest.mark.parametrize(
    ("rows", "lowest", "rises", "said"),
    [
        ([(1.0, 1.2, 1.4), (0.9, 1.1, 1.2), (0.8, 1.0, 1.1)], 20, False, "at the last step, 20: no overfitting"),
        (
            [(1.0, 1.2, 1.4), (0.8, 1.0, 1.2), (0.9, 1.11, 1.29)],
            10,
            True,
            r"lowest after step 10, and \+10\.0 % from there after step 20: overfitting starts there\. Meanwhile that",
        ),
        (
            [(1.0, 1.2, 1.4), (0.8, 1.0, 1.2), (0.7, 1.4, 1.2)],
            10,
            False,
            r"lowest after step 10, and \+10\.0 % .* step 20, which so few pictures do not tell from chance",
        ),
        ([(1.0, 1.2, 1.4), (1.1, 1.31, 1.5)], 0, True, "lowest without the adapter, .*: overfitting starts at once"),
        ([(1.0, 1.2, 1.4), (0.9, 1.1, 1.3), (math.nan, 1, 1)], 10, False, "not finite after step 20: .* diverged"),
        ([(math.nan, 1, 1), (math.nan, 1, 1)], None, False, "No loss is finite"),
        ([(1.0,), (0.9,), (0.95,)], 10, False, "do not tell from chance"),
    ],
    ids=["falls", "rises", "by chance", "at once", "diverged", "never finite", "one picture"],
)  # fmt: skip
def test_the_curve_says_where_overfitting_starts(rows, lowest, rises, said):
    found = curve_of(*rows)
    assert (found["lowest_step"], found["rises"]) == (lowest, rises)
    assert len(found["points"]) == len(rows)
    assert re.search(said, found["verdict"]), found["verdict"]


def test_where_what_was_trained_on_rises_too_the_run_went_wrong():
    held_out, trained = [(1.0, 1.2, 1.4), (2.0, 2.3, 2.6)], [(1.1, 1.2, 1.3), (1.9, 2.1, 2.2)]
    points = [
        Point(10 * n, Losses(losses_of(*a), losses_of(*b)))
        for n, (a, b) in enumerate(zip(held_out, trained, strict=True))
    ]
    verdict = evaluation.curve(points)["verdict"]
    assert re.search(
        r"lowest without the adapter, .* the run went wrong, since .* too, by \+\d+\.\d %\. Lower", verdict
    )
    assert "overfitting" not in verdict


def test_json_has_no_word_for_what_is_not_finite():
    figures = {"a": math.nan, 1: [math.inf, 0.5, ("x", -math.inf)], "b": {"c": True, "d": None}}
    written = evaluation.as_json(figures)
    assert written == {"a": None, "1": [None, 0.5, ["x", None]], "b": {"c": True, "d": None}}
    assert json.loads(json.dumps(written, allow_nan=False)) == written


# --- the bench ---

TEXTS = ["a red star", "two blue balls", "a tent", "a green box", "a white ring"]
SMALL = {"height": 64, "width": 64, "num_inference_steps": 2, "guidance_scale": 5.0}


@pytest.fixture(scope="module")
def folders(tiny_base):
    return {name: tiny_base / name for name in components.COMPONENTS}


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
