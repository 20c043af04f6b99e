import pytest
import torch
from accelerate import Accelerator

from rasengan import components, drawing, lora, sdxl, validation_pictures


@pytest.fixture
def models(tiny_base):
    """An adapted UNet and an adapted text encoder, in training, with dropout in their LoRA."""
    models = [components.load(name, tiny_base / name) for name in ("unet", "text_encoder")]
    for model, targets in zip(models, (lora.UNET_TARGETS, lora.TEXT_ENCODER_TARGETS), strict=True):
        lora.add_lora(model, lora.lora_config(4, 8.0, targets, dropout=0.5))
        for name, parameter in lora.trainable_parameters(model).items():
            if ".lora_B." in name:
                torch.nn.init.normal_(parameter)
        model.train()
    return models


def answers(unet, text_encoder):
    """What both say to a fixed input; a gradient is kept."""
    generator = torch.Generator().manual_seed(1)
    sample, states, pooled = (torch.randn(s, generator=generator) for s in ((2, 4, 8, 8), (2, 5, 96), (2, 64)))
    added = {"text_embeds": pooled, "time_ids": torch.full((2, 6), 64.0)}
    said = text_encoder(torch.arange(18).reshape(2, 9)).last_hidden_state
    return unet(sample, torch.tensor([3, 700]), states, added_cond_kwargs=added).sample, said


def equal(ones, others):
    return [torch.equal(one, other) for one, other in zip(ones, others, strict=True)]


# --- the models' modes ---


def test_without_adapters_the_models_are_the_base_and_with_them_again_what_they_were(tiny_base, models):
    base = answers(*(components.load(name, tiny_base / name) for name in ("unet", "text_encoder")))
    for model in models:
        model.eval()
    tuned = answers(*models)
    assert equal(tuned, base) == [False, False]
    with lora.adapters_disabled(models):
        assert equal(answers(*models), base) == [True, True]
    assert equal(answers(*models), tuned) == [True, True]


def test_after_an_error_the_adapters_are_on_again(models):
    for model in models:
        model.eval()
    tuned = answers(*models)
    with pytest.raises(KeyboardInterrupt), lora.adapters_disabled(models):
        raise KeyboardInterrupt
    assert equal(answers(*models), tuned) == [True, True]


def test_training_goes_on_after_the_adapters_were_off(models):
    trainable = lora.trainable_parameters(*models)
    flat = lora.flatten_parameters(list(trainable.values()))
    with lora.evaluating(models), lora.adapters_disabled(models):
        answers(*models)
    assert list(lora.trainable_parameters(*models)) == list(trainable)
    sum(answer.square().mean() for answer in answers(*models)).backward()
    assert all(parameter.grad.any() for parameter in trainable.values())
    assert flat.grad.count_nonzero() == sum(parameter.grad.count_nonzero() for parameter in trainable.values())


def test_evaluation_has_no_dropout_and_ends_in_training_mode(models):
    before = [module.training for model in models for module in model.modules()]
    assert all(before)
    assert equal(answers(*models), answers(*models)) == [False, False]
    with lora.evaluating(models):
        assert not any(module.training for model in models for module in model.modules())
        assert equal(answers(*models), answers(*models)) == [True, True]
    assert [module.training for model in models for module in model.modules()] == before
    with pytest.raises(KeyboardInterrupt), lora.evaluating(models):
        raise KeyboardInterrupt
    assert [module.training for model in models for module in model.modules()] == before


# --- drawing ---


def drawn(unet, vae, scheduler, prompt, seed):
    prompts = sdxl.conditioning(prompt, None, 1)
    (image,) = drawing.decode(vae, drawing.draw(drawing.Denoiser(unet), scheduler, prompts, [seed], 64, 64, 2, 5.0))
    return image


def test_each_prompt_is_drawn_with_each_seed_prompt_by_prompt(tiny_base):
    unet, vae, scheduler = (components.load(name, tiny_base / name) for name in ("unet", "vae", "scheduler"))
    generator = torch.Generator().manual_seed(0)
    prompts = [(torch.randn(7, 96, generator=generator), torch.randn(64, generator=generator)) for _ in range(2)]
    accelerator = Accelerator(cpu=True, mixed_precision="no")
    images = validation_pictures.draw_share(accelerator, unet, vae, scheduler, prompts, None, [5, 6], 64, 2)
    expected = [drawn(unet, vae, scheduler, prompt, seed) for prompt in prompts for seed in (5, 6)]
    assert [image.tobytes() for image in images] == [image.tobytes() for image in expected]
    assert len({image.tobytes() for image in images}) == 4
    (image,) = validation_pictures.draw_share(accelerator, unet, vae, scheduler, prompts[:1], prompts[1], [5], 64, 2)
    row = sdxl.conditioning(prompts[0], prompts[1], 1)
    (expected,) = drawing.decode(vae, drawing.draw(drawing.Denoiser(unet), scheduler, row, [5], 64, 64, 2, 5.0))
    assert image.tobytes() == expected.tobytes() != images[0].tobytes()


def test_a_picture_with_non_finite_values_is_grey_and_warned_of(tiny_base, caplog):
    unet, vae, scheduler = (components.load(name, tiny_base / name) for name in ("unet", "vae", "scheduler"))
    generator = torch.Generator().manual_seed(0)
    prompts = [(torch.randn(7, 96, generator=generator), torch.randn(64, generator=generator)) for _ in range(2)]
    prompts[0][0][3, 3] = float("nan")
    accelerator = Accelerator(cpu=True, mixed_precision="no")
    broken, whole = validation_pictures.draw_share(accelerator, unet, vae, scheduler, prompts, None, [5], 64, 2)
    assert broken.size == whole.size == (64, 64)
    assert broken.getextrema() == ((128, 128),) * 3
    assert whole.getextrema() != broken.getextrema()
    (record,) = [record for record in caplog.records if record.name == "rasengan.validation_pictures"]
    assert "seed 5 came out with non-finite values" in record.getMessage()
    assert "--lora_scale" not in record.getMessage()


def test_a_picture_that_does_not_fit_is_grey_and_warned_of(tiny_base, caplog):
    unet, vae, scheduler = (components.load(name, tiny_base / name) for name in ("unet", "vae", "scheduler"))
    generator = torch.Generator().manual_seed(0)
    prompts = [(torch.randn(7, 96, generator=generator), torch.randn(64, generator=generator)) for _ in range(2)]
    calls = []

    def full_at_first(*_):
        calls.append(1)
        if len(calls) == 1:
            raise torch.OutOfMemoryError

    unet.register_forward_pre_hook(full_at_first)
    accelerator = Accelerator(cpu=True, mixed_precision="no")
    missing, drawn = validation_pictures.draw_share(accelerator, unet, vae, scheduler, prompts, None, [5], 64, 2)
    assert missing.getextrema() == ((128, 128),) * 3
    assert drawn.getextrema() != missing.getextrema()
    (record,) = [record for record in caplog.records if record.name == "rasengan.validation_pictures"]
    assert "seed 5 does not fit into the card's memory" in record.getMessage()
