import re

import pytest
import torch

from rasengan import components, diagnosis


@pytest.fixture(scope="module")
def unet(tiny_base):
    return components.load("unet", tiny_base / "unet")


@pytest.fixture
def batch(unet):
    generator = torch.Generator().manual_seed(0)
    pooled = unet.config.projection_class_embeddings_input_dim - 6 * unet.config.addition_time_embed_dim
    return {
        "latents": torch.randn(2, 4, 8, 8, generator=generator),
        "prompt_embeds": torch.randn(2, 77, unet.config.cross_attention_dim, generator=generator),
        "pooled_prompt_embeds": torch.randn(2, pooled, generator=generator),
        "time_ids": torch.full((2, 6), 64.0),
    }


NAMES = ["a/zero.jpg", "a/one.jpg", "a/two.jpg"]  # of a step whose last part is the batch


def explain(unet, flat, batch, dtype=torch.float16):
    def losses(tensors):
        added = {"text_embeds": tensors["pooled_prompt_embeds"], "time_ids": tensors["time_ids"]}
        return unet(tensors["latents"], torch.tensor(3), tensors["prompt_embeds"], added_cond_kwargs=added)

    return diagnosis.explain(unet, flat, batch, NAMES, losses, dtype, 30, 25, "checkpoint-4")


def test_step_samples_and_the_last_good_checkpoint_are_named(unet, batch):
    text = explain(unet, torch.zeros(3), batch)
    assert text.startswith(
        "25 steps in a row had no finite gradient, up to step 30 with a/zero.jpg, a/one.jpg, a/two.jpg,"
    )
    assert "go on from checkpoint-4" in text
    assert "the forward pass is finite, and its gradient is not" in text
    assert "--mixed_precision no" in text
    assert "--mixed_precision" not in explain(unet, torch.zeros(3), batch, torch.float32)


@pytest.mark.parametrize(
    ("broken", "where"),
    [
        ("latents", "the latents are not finite. Likely the VAE"),
        ("pooled_prompt_embeds", "pooled_prompt_embeds is not finite. Likely the text encoders"),
    ],
)
def test_what_comes_in_broken_is_named(unet, batch, broken, where):
    batch[broken][0].view(-1)[3] = float("nan")
    assert where in explain(unet, torch.zeros(3), batch)


def test_weights_that_diverged_are_named(unet, batch):
    text = explain(unet, torch.tensor([1.0, float("inf")]), batch)
    assert "the LoRA's weights are not finite. Likely the run diverged: lower --learning_rate" in text


def test_a_unet_that_is_damaged_is_told(unet, batch):
    weight = unet.down_blocks[1].attentions[0].transformer_blocks[0].attn1.to_v.weight
    before = weight.data[0, 0].clone()
    weight.data[0, 0] = float("nan")
    try:
        text = explain(unet, torch.zeros(3), batch)
    finally:
        weight.data[0, 0] = before
    assert re.search(r"the UNet's down_blocks.1.*attn1.to_v.weight is not finite. Likely the base is damaged", text)


def test_the_first_module_that_overflows_is_named(unet, batch):
    module = unet.down_blocks[1].attentions[0].transformer_blocks[0].attn1.to_v
    before, unet_was_training = module.weight.data.clone(), unet.training
    module.weight.data[0] = 3e38
    try:
        text = explain(unet, torch.zeros(3), batch)
    finally:
        module.weight.data.copy_(before)
    assert "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_v is the first of the UNet's modules" in text
    assert unet.training == unet_was_training
    assert not any(m._forward_hooks for m in unet.modules())
