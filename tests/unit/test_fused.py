"""The fused forward against diffusers' and PEFT's own, on the tiny UNet in float64."""

import copy

import bitsandbytes
import pytest
import torch
from diffusers import DDPMScheduler, UNet2DConditionModel
from torch.autograd.graph import saved_tensors_hooks

from rasengan import components, fused, lora, memory, optim, quantization, step


ALPHAS_CUMPROD = DDPMScheduler(beta_schedule="scaled_linear").alphas_cumprod
RANK, ALPHA = 4, 12.0
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def load_unet(tiny_base):
    """Function that returns the tiny UNet with a LoRA whose lora_B is not zero, and its flat parameter."""

    def load(fuse: bool, dtype=torch.float64, targets=lora.UNET_TARGETS, dropout=0.0, quantize=False):
        unet = components.load("unet", tiny_base / "unet", dtype)
        if quantize:
            quantization.quantize_base(unet, CPU, dtype)
        lora.stack_weights(unet, CPU)
        torch.manual_seed(0)
        lora.add_lora(unet, lora.lora_config(RANK, ALPHA, list(targets), dropout))
        generator = torch.Generator().manual_seed(1)
        for parameter in lora.trainable_parameters(unet).values():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.data = (parameter.data + 0.02 * noise).to(dtype)
        flat = lora.flatten_parameters(lora.flat_order(unet))
        unet.train()
        return unet, flat, fused.FusedUNet(unet, flat, ALPHA / RANK) if fuse else None

    return load


@pytest.fixture(scope="module")
def batch(tiny_base):
    config = components.read_config("unet", tiny_base / "unet")
    generator = torch.Generator().manual_seed(0)
    pooled = config["projection_class_embeddings_input_dim"] - 6 * config["addition_time_embed_dim"]

    def random(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    return {
        "latents": random(3, 4, 8, 8),
        "noise": random(3, 4, 8, 8),
        "timesteps": torch.tensor([3, 500, 980]),
        "prompt_embeds": random(3, 77, config["cross_attention_dim"]),
        "pooled_prompt_embeds": random(3, pooled),
        "time_ids": torch.tensor([[80.0, 64, 4, 0, 64, 64], [64, 64, 0, 0, 64, 64], [70, 99, 0, 9, 64, 64]]),
    }


def losses_of(unet, batch, dtype=torch.float64):
    batch = {name: t.to(dtype) if t.is_floating_point() else t for name, t in batch.items()}
    return step.compute_losses(unet, batch, ALPHAS_CUMPROD, "epsilon", None, dtype)


def loss_and_gradient(unet, flat, batch, dtype=torch.float64):
    flat.grad.zero_()
    losses = losses_of(unet, batch, dtype)
    losses.mean().backward()
    return losses.detach(), flat.grad.clone()


@pytest.mark.parametrize(
    "targets",
    [
        lora.UNET_TARGETS,
        ("to_q", "to_v"),
        ("attn2.to_k",),
        ("to_k", "to_q", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2", "proj_in", "proj_out"),
    ],
    ids=["recipe", "q and v", "text keys", "every layer"],
)
def test_loss_and_gradient_are_pefts(targets, load_unet, batch):
    unet, flat, _ = load_unet(fuse=False, targets=targets)
    expected_loss, expected_gradient = loss_and_gradient(unet, flat, batch)
    unet, flat, _ = load_unet(fuse=True, targets=targets)
    assert fused.why_not(unet) is None
    loss, gradient = loss_and_gradient(unet, flat, batch)
    torch.testing.assert_close(loss, expected_loss, rtol=1e-12, atol=0)
    assert (gradient - expected_gradient).norm() < 1e-12 * expected_gradient.norm()


def test_losses_and_gradient_norms_of_a_training_are_pefts(load_unet, batch):
    def train(fuse):
        unet, flat, _ = load_unet(fuse)
        optimizer = optim.make_optimizer(flat, "adamw", False, 1e-3, (0.9, 0.999), 1e-2, 1e-8)
        found = []
        for number in range(12):
            noise = torch.randn(batch["noise"].shape, generator=torch.Generator().manual_seed(number)).double()
            losses, gradient = loss_and_gradient(unet, flat, batch | {"noise": noise})
            optimizer.step()
            found.append([losses.mean(), gradient.norm()])
        return torch.tensor(found)

    expected = train(fuse=False)
    assert expected[:, 0].std() > 1e-3  # it is no standstill
    torch.testing.assert_close(train(fuse=True), expected, rtol=1e-9, atol=0)


def test_a_size_that_halves_to_odd_ones_is_upsampled_back_to_it(load_unet, batch):
    batch = batch | {name: batch[name][..., :7, :5] for name in ("latents", "noise")}
    unet, flat, _ = load_unet(fuse=False)
    expected_loss, expected_gradient = loss_and_gradient(unet, flat, batch)
    fused.upsample_deterministically(unet)  # alone
    loss, gradient = loss_and_gradient(unet, flat, batch)
    assert torch.equal(loss, expected_loss)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-12, atol=1e-20)
    loss, gradient = loss_and_gradient(*load_unet(fuse=True)[:2], batch)
    torch.testing.assert_close(loss, expected_loss, rtol=1e-12, atol=0)
    assert (gradient - expected_gradient).norm() < 1e-12 * expected_gradient.norm()


def test_gradients_add_up_in_place_and_reach_pefts_parameters(load_unet, batch):
    unet, flat, _ = load_unet(fuse=True)
    address = flat.grad.data_ptr()
    _, once = loss_and_gradient(unet, flat, batch)
    losses_of(unet, batch).mean().backward()
    torch.testing.assert_close(flat.grad, 2 * once)
    assert flat.grad.data_ptr() == address
    assert all(p.grad.abs().max() > 0 for p in lora.trainable_parameters(unet).values())


def test_the_lora_is_cast_to_one_place_in_every_forward(load_unet, batch):
    unet, flat, fused_unet = load_unet(fuse=True)
    projections = fused_unet.projections.with_lora
    losses_of(unet, batch)

    def places():
        return [(projection.lora.lora_A.data_ptr(), projection.lora.lora_B.data_ptr()) for projection in projections]

    before = places()
    with torch.no_grad():
        flat += 0.01
    losses_of(unet, batch)
    assert places() == before
    for projection in projections:
        of_layers = torch.cat([layer.lora_A["default"].weight for layer in projection.layers])
        torch.testing.assert_close(projection.lora.lora_A, of_layers, check_dtype=False)
        for part, layer in zip(projection.lora.lora_B, projection.layers, strict=True):
            torch.testing.assert_close(part, layer.lora_B["default"].weight * ALPHA / RANK, check_dtype=False)


@pytest.mark.parametrize("count", [1, 7, 1000])
def test_recomputing_any_number_of_blocks_changes_no_bit(count, load_unet, batch):
    unet, flat, fused_unet = load_unet(fuse=True, dtype=torch.float32)
    loss, gradient = loss_and_gradient(unet, flat, batch, torch.float32)
    fused_unet.recompute(count)
    assert len(fused_unet.recomputed) == min(count, len(fused_unet.units()))
    again, recomputed = loss_and_gradient(unet, flat, batch, torch.float32)
    assert torch.equal(loss, again)
    assert torch.equal(gradient, recomputed)


def kept_bytes(unet, batch) -> int:
    kept = []
    with saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        losses_of(unet, batch)
    weights = {p.untyped_storage().data_ptr() for p in unet.parameters()}
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in kept}
    return sum(size for address, size in storages.items() if address not in weights)


def test_less_is_kept_and_less_again_with_each_block_that_is_recomputed(load_unet, batch):
    unet, _, _ = load_unet(fuse=False)
    plain = kept_bytes(unet, batch)
    unet, _, fused_unet = load_unet(fuse=True)
    sizes = []
    for count in (0, 5, 15, 1000):
        fused_unet.recompute(count)
        sizes.append(kept_bytes(unet, batch))
    assert sizes[0] < 0.85 * plain
    assert sizes == sorted(set(sizes), reverse=True)


def test_in_evaluation_mode_the_modules_run_as_peft_wrote_them(load_unet, batch):
    plain, _, _ = load_unet(fuse=False)
    unet, _, _ = load_unet(fuse=True)
    plain.eval()
    unet.eval()
    with torch.no_grad():
        torch.testing.assert_close(losses_of(unet, batch), losses_of(plain, batch), rtol=1e-12, atol=0)
        unet.disable_adapters()
        plain.disable_adapters()
        torch.testing.assert_close(losses_of(unet, batch), losses_of(plain, batch), rtol=1e-12, atol=0)


def test_stacking_leaves_the_weights_as_they_are(tiny_base):
    unet = components.load("unet", tiny_base / "unet")
    before = copy.deepcopy(unet.state_dict())
    lora.stack_weights(unet, CPU)
    assert unet.state_dict().keys() == before.keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in unet.state_dict().items())
    for group in lora.projection_groups(unet):
        stacked = lora.stacked_weight(group)
        assert torch.equal(stacked, torch.cat([layer.weight for layer in group]))
        assert stacked.data_ptr() == group[0].weight.data_ptr()


def test_weights_that_are_not_stacked_are_refused(tiny_base):
    unet = components.load("unet", tiny_base / "unet")
    with pytest.raises(RuntimeError, match="stack_weights"):
        lora.stacked_weight(lora.projection_groups(unet)[0])


def test_the_flat_order_holds_each_parameter_once(load_unet):
    unet, flat, _ = load_unet(fuse=False)
    order = lora.flat_order(unet)
    assert {id(p) for p in order} == {id(p) for p in lora.trainable_parameters(unet).values()}
    assert len(order) == len({id(p) for p in order})
    assert flat.numel() == sum(p.numel() for p in order)


def test_what_cannot_be_fused_is_named(load_unet):
    unet, _, _ = load_unet(fuse=False, dropout=0.1)
    assert "dropout" in fused.why_not(unet)
    unet, _, _ = load_unet(fuse=False, targets=("time_embedding.linear_1",))
    assert "time_embedding.linear_1 has a LoRA outside the transformer blocks" in fused.why_not(unet)


@pytest.mark.parametrize("changed", [{"act_fn": "gelu"}, {"encoder_hid_dim": 40, "encoder_hid_dim_type": "text_proj"}])
def test_a_unet_with_another_activation_or_a_projection_of_the_text_is_not_fused(changed, tiny_base):
    unet = UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(tiny_base / "unet"), **changed)
    assert fused.why_not(unet) is not None


def test_a_quantized_base_is_near_the_whole_one(load_unet, batch):
    # Each weight moves by a tenth of their spread: the loss by less than 2 %, and the gradient keeps its direction.
    unet, flat, _ = load_unet(fuse=True, dtype=torch.float32)
    loss, gradient = loss_and_gradient(unet, flat, batch, torch.float32)
    whole = memory.weight_bytes(unet)
    unet, flat, fused_unet = load_unet(fuse=True, dtype=torch.float32, quantize=True)
    assert memory.weight_bytes(unet) < 0.6 * whole  # convolutions and embeddings stay as they are
    weights = [module.weight for module in unet.modules() if isinstance(module, bitsandbytes.nn.Linear4bit)]
    assert len(weights) > 50
    for weight in weights:  # NF4, and its scales quantized once more
        assert (weight.quant_state.quant_type, weight.quant_state.nested) == ("nf4", True)
    quantized_loss, quantized_gradient = loss_and_gradient(unet, flat, batch, torch.float32)
    torch.testing.assert_close(quantized_loss, loss, rtol=0.02, atol=0)
    assert not torch.equal(quantized_loss, loss)
    assert torch.cosine_similarity(gradient, quantized_gradient, dim=0) > 0.8
    fused_unet.recompute(1000)
    _, recomputed = loss_and_gradient(unet, flat, batch, torch.float32)
    assert torch.equal(quantized_gradient, recomputed)


@pytest.mark.parametrize(
    "targets",
    [lora.UNET_TARGETS, ("to_out.0",), ("attn2.to_k",), ("attn1.to_q", "attn1.to_k", "attn1.to_v"), ("ff.net.2",)],
    ids=" ".join,
)
def test_a_quantized_base_gives_pefts_gradient(targets, load_unet, batch):
    unet, flat, _ = load_unet(fuse=False, dtype=torch.float32, quantize=True, targets=targets)
    expected_loss, expected = loss_and_gradient(unet, flat, batch, torch.float32)
    unet, flat, _ = load_unet(fuse=True, dtype=torch.float32, quantize=True, targets=targets)
    loss, gradient = loss_and_gradient(unet, flat, batch, torch.float32)
    torch.testing.assert_close(loss, expected_loss, rtol=1e-5, atol=0)
    assert (gradient - expected).norm() < 1e-4 * expected.norm()


@pytest.mark.parametrize("blocks", [0, 1000], ids=["kept", "recomputed"])
def test_the_texts_gradients_are_pefts_where_the_text_encoders_are_trained(load_unet, batch, blocks):
    """Text reaches the UNet by its tokens, and pooled by the time embedding, which every residual block adds."""
    gradients = []
    for fuse in (False, True):
        unet, _, fused_unet = load_unet(fuse=fuse)
        if fuse:
            fused_unet.recompute(blocks)
        texts = {name: batch[name].clone().requires_grad_() for name in ("prompt_embeds", "pooled_prompt_embeds")}
        losses_of(unet, batch | texts).mean().backward()
        gradients.append([text.grad for text in texts.values()])
    for expected, found in zip(*gradients, strict=True):
        assert expected.norm() > 0
        assert (found - expected).norm() < 1e-12 * expected.norm()
