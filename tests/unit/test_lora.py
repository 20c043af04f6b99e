import copy

import pytest
import torch
from diffusers import UNet2DConditionModel

from rasengan import UserError, lora, optim


# The configuration of stabilityai/stable-diffusion-xl-base-1.0's UNet.
SDXL_UNET = {
    "sample_size": 128,
    "in_channels": 4,
    "out_channels": 4,
    "layers_per_block": 2,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "block_out_channels": (320, 640, 1280),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}


@pytest.fixture(scope="module")
def sdxl_unet():
    """SDXL's UNet without memory; nothing here trains it."""
    with torch.device("meta"):
        return UNet2DConditionModel(**SDXL_UNET)


@pytest.fixture
def unet(tiny_base):
    return UNet2DConditionModel.from_pretrained(tiny_base / "unet").requires_grad_(False)


def adapted(unet, init="gaussian"):
    torch.manual_seed(0)
    lora.add_lora(unet, lora.lora_config(4, 8.0, lora.UNET_TARGETS, init=init))
    for name, parameter in lora.trainable_parameters(unet).items():
        if ".lora_B." in name:
            torch.nn.init.normal_(parameter, std=0.02)
    return unet


def loss_of(unet, seed):
    generator = torch.Generator().manual_seed(seed)
    batch = [torch.randn(shape, generator=generator) for shape in ((2, 4, 8, 8), (2, 5, 96), (2, 64))]
    added = {"text_embeds": batch[2], "time_ids": torch.full((2, 6), 64.0)}
    return unet(batch[0], torch.tensor([3, 700]), batch[1], added_cond_kwargs=added).sample.square().mean()


def test_sdxl_has_the_parameters_and_modules_of_the_recipe(sdxl_unet):
    assert sum(p.numel() for p in sdxl_unet.parameters()) == 2_567_463_684
    lora.check_targets(sdxl_unet, lora.UNET_TARGETS)

    tuned = copy.deepcopy(sdxl_unet).requires_grad_(False)
    with torch.device("meta"):
        lora.add_lora(tuned, lora.lora_config(16, 32.0, lora.UNET_TARGETS))
    trainable = lora.trainable_parameters(tuned)
    assert sum(p.numel() for p in trainable.values()) == 23_224_320
    modules = {name.rpartition(".lora_")[0] for name in trainable}
    assert len(modules) == 560
    assert {name.rpartition(".lora_")[2] for name in trainable} == {"A.default.weight", "B.default.weight"}
    assert sum(p.numel() for p in tuned.parameters() if not p.requires_grad) == 2_567_463_684
    scalings = {module.scaling["default"] for module in tuned.modules() if hasattr(module, "lora_A")}
    assert scalings == {2.0}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_lora_weights_are_fp32_on_a_base_in_half_precision(tiny_base, dtype):
    unet = UNet2DConditionModel.from_pretrained(tiny_base / "unet", torch_dtype=dtype).requires_grad_(False)
    before = sum(p.numel() for p in unet.parameters())
    lora.add_lora(unet, lora.lora_config(4, 8.0, lora.UNET_TARGETS))
    trainable = list(lora.trainable_parameters(unet).values())
    assert trainable
    assert {p.dtype for p in trainable} == {torch.float32}
    frozen = [p for p in unet.parameters() if not p.requires_grad]
    assert sum(p.numel() for p in frozen) == before
    assert {p.dtype for p in frozen} == {dtype}


@pytest.mark.parametrize(("init", "least", "most"), [("gaussian", 1.5, 100), ("default", 0.9, 1)])
def test_lora_a_is_gaussian_of_width_1_over_rank_or_uniform_as_pefts(unet, init, least, most):
    torch.manual_seed(0)
    lora.add_lora(unet, lora.lora_config(4, 8.0, ["to_q"], init=init))
    trainable = lora.trainable_parameters(unet)
    assert not any(p.any() for name, p in trainable.items() if ".lora_B." in name)
    firsts = [p.detach() for name, p in trainable.items() if ".lora_A." in name]
    if init == "gaussian":
        assert torch.cat([p.flatten() for p in firsts]).std() == pytest.approx(1 / 4, rel=0.02)
    # Kaiming's uniform distribution with a = sqrt(5) ends at 1 / sqrt(in).
    assert least < max(p.abs().max() * p.shape[1] ** 0.5 for p in firsts) <= most


def test_parameters_and_gradients_become_views_of_one_tensor(unet):
    before = {name: p.detach().clone() for name, p in lora.trainable_parameters(adapted(unet)).items()}
    flat = lora.flatten_parameters(list(lora.trainable_parameters(unet).values()))
    assert flat.shape == (sum(p.numel() for p in before.values()),)
    assert flat.is_leaf
    offset = 0
    for name, parameter in lora.trainable_parameters(unet).items():
        assert torch.equal(parameter, before[name])
        for view, whole in ((parameter, flat), (parameter.grad, flat.grad)):
            assert view.data_ptr() == whole.data_ptr() + 4 * offset
            assert view.is_contiguous()
        offset += parameter.numel()
    assert offset == flat.numel()

    with torch.no_grad():
        flat.fill_(0.5)
    assert all((p == 0.5).all() for p in lora.trainable_parameters(unet).values())


def test_a_backward_fills_the_flat_gradient_and_a_second_one_adds_to_it(unet):
    reference = copy.deepcopy(adapted(unet))
    leaves = list(lora.trainable_parameters(reference).values())
    expected = torch.cat([g.flatten() for g in torch.autograd.grad(loss_of(reference, 0), leaves)])
    flat = lora.flatten_parameters(list(lora.trainable_parameters(unet).values()))
    loss_of(unet, 0).backward()
    assert flat.grad.norm() > 0
    assert torch.equal(flat.grad, expected)
    loss_of(unet, 0).backward()
    assert torch.equal(flat.grad, 2 * expected)


def test_flat_adamw_trains_as_one_adamw_over_every_tensor_does(unet):
    """Three steps, so that a gradient lost after the first zeroing would show."""
    options = {"lr": 1e-2, "weight_decay": 0.1}
    reference = copy.deepcopy(adapted(unet))
    per_tensor = torch.optim.AdamW(lora.trainable_parameters(reference).values(), **options)
    flat = lora.flatten_parameters(list(lora.trainable_parameters(unet).values()))
    optimizer = optim.make_optimizer(flat, "adamw", False, 1e-2, (0.9, 0.999), 0.1, 1e-8)
    for seed in range(3):
        before = flat.detach().clone()
        loss_of(reference, seed).backward()
        per_tensor.step()
        per_tensor.zero_grad()
        loss_of(unet, seed).backward()
        optimizer.step()
        flat.grad.zero_()
        assert (flat - before).abs().max() > 5e-3
        expected = lora.trainable_parameters(reference)
        for name, parameter in lora.trainable_parameters(unet).items():
            assert torch.equal(parameter, expected[name]), name
            assert not parameter.grad.any()


def test_a_second_model_follows_the_first_under_a_name_of_its_own(unet):
    other = copy.deepcopy(adapted(unet))
    both = lora.trainable_parameters(unet, other)
    half = len(both) // 2
    assert list(both.values())[:half] == list(lora.trainable_parameters(unet).values())
    assert [p.data_ptr() for p in both.values()][half:] == [
        p.data_ptr() for p in other.parameters() if p.requires_grad
    ]
    assert {name[:2] for name in both} == {"0.", "1."}


def test_a_target_that_matches_nothing_is_refused_with_its_name_and_the_recipes(sdxl_unet):
    with pytest.raises(UserError) as caught:
        lora.check_targets(sdxl_unet, ["to_q", "to_quarry"])
    message = str(caught.value)
    assert "--lora_target_modules to_quarry matches no module of the UNet2DConditionModel" in message
    assert "to_k to_q to_v to_out.0" in message


@pytest.mark.parametrize(
    ("target", "found"),
    [
        ("conv1", "down_blocks.0.resnets.0.conv1, a Conv2d"),
        ("to_out", "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_out, a ModuleList"),
        ("mid_block", "mid_block, a UNetMidBlock2DCrossAttn"),
    ],
)
def test_a_target_that_is_no_linear_layer_is_refused_with_what_it_is(sdxl_unet, target, found):
    with pytest.raises(UserError) as caught:
        lora.check_targets(sdxl_unet, ["to_q", target])
    assert f"--lora_target_modules {target} matches {found}" in str(caught.value)


def test_a_target_is_the_whole_end_of_a_name(sdxl_unet):
    lora.check_targets(sdxl_unet, ["ff.net.2", "attn2.to_q", "mid_block.attentions.0.proj_in"])
    with pytest.raises(UserError, match="matches no module"):
        lora.check_targets(sdxl_unet, ["o_q"])
