"""The autograd nodes against finite differences, and what they keep for the backward pass."""

import gc
import weakref

import pytest
import torch
from torch.autograd import gradcheck
from torch.autograd.graph import saved_tensors_hooks

from rasengan import kernels, nodes, norms, side_stream


def random(*shape, grad=False):
    return torch.randn(*shape, dtype=torch.float64).requires_grad_(grad)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def kept_bytes(run) -> int:
    """Return the bytes that autograd keeps of what a forward computes."""
    kept = []
    with saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        run()
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in kept}.values())


class LoraProductOfInputs(torch.autograd.Function):
    """nodes.LoraProduct with the LoRA's matrices as inputs, and what it adds to their gradients as their gradients."""

    @staticmethod
    def forward(ctx, x, lora_A, lora_B, weight, bias, scale):
        ctx.x, ctx.grads = x.detach().requires_grad_(x.requires_grad), [torch.zeros_like(t) for t in (lora_A, lora_B)]
        lora = nodes.LoraMatrices(lora_A.detach(), scale * lora_B.detach(), *ctx.grads, scale)
        with torch.enable_grad():
            ctx.y = nodes.LoraProduct.apply(ctx.x, torch.zeros((), requires_grad=True), lora, weight, bias)
        return ctx.y.detach()

    @staticmethod
    def backward(ctx, grad_y):
        ctx.x.grad = None
        for grad in ctx.grads:
            grad.zero_()
        ctx.y.backward(grad_y, retain_graph=True)
        return ctx.x.grad, *(grad.clone() for grad in ctx.grads), None, None, None


@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("x_grad", [True, False])
def test_lora_product(layers, has_bias, x_grad):
    x, lora_A, lora_B = random(5, 6, grad=x_grad), random(layers * 2, 6, grad=True), random(layers, 4, 2, grad=True)
    weight, bias = random(layers * 4, 6), random(layers * 4) if has_bias else None
    assert gradcheck(LoraProductOfInputs.apply, (x, lora_A, lora_B, weight, bias, 3.0))
    delta = 3.0 * torch.block_diag(*lora_B) @ lora_A
    expected = torch.nn.functional.linear(x, weight + delta, bias)
    torch.testing.assert_close(LoraProductOfInputs.apply(x, lora_A, lora_B, weight, bias, 3.0), expected)


def test_a_backward_pass_that_fails_joins_the_side_stream_and_leaves_nothing_of_itself(monkeypatch):
    joined, join = [], side_stream.SideStream.join
    monkeypatch.setattr(side_stream.SideStream, "join", lambda side: joined.append(side) or join(side))

    def fail(*inputs):
        raise torch.OutOfMemoryError("no room")

    x = random(5, 4, grad=True)
    matrices = [random(2, 4), random(1, 4, 2)]
    lora = nodes.LoraMatrices(*matrices, *map(torch.zeros_like, matrices), 1.0)
    kept = x * 2
    there = weakref.ref(kept)
    y = nodes.LoraProduct.apply(kept, torch.zeros((), requires_grad=True), lora, random(4, 4), None)
    del kept
    monkeypatch.setattr(kernels, "add_lora_gradients", fail)
    with pytest.raises(torch.OutOfMemoryError, match="no room"):
        y.sum().backward()
    assert len(joined) == 1
    del y
    gc.collect()
    assert there() is None


@pytest.mark.parametrize("has_delta", [True, False])
def test_add_layer_norm(has_delta):
    x, delta = random(4, 8, grad=True), random(4, 8, grad=True) if has_delta else None
    weight, bias = random(8), random(8)
    assert gradcheck(nodes.AddLayerNorm.apply, (x, delta, weight, bias, 1e-5))
    total, y = nodes.AddLayerNorm.apply(x, delta, weight, bias, 1e-5)
    torch.testing.assert_close(total, x + delta if has_delta else x)
    torch.testing.assert_close(y, torch.nn.functional.layer_norm(total, (8,), weight, bias))


@pytest.mark.parametrize("used", [(True, False), (False, True)])
def test_a_norm_of_which_one_output_is_used_has_the_gradient_of_that_one(used):
    x, weight, bias = random(4, 8, grad=True), random(8), random(8)
    outputs = nodes.AddLayerNorm.apply(x, None, weight, bias, 1e-5)
    (sum(out.square().sum() for out, use in zip(outputs, used, strict=True) if use)).backward()
    found, x.grad = x.grad, None
    plain = torch.nn.functional.layer_norm(x, (8,), weight, bias) if used[1] else x
    plain.square().sum().backward()
    torch.testing.assert_close(found, x.grad)


@pytest.mark.parametrize("silu", [True, False])
@pytest.mark.parametrize("shift", [None, "frozen", "trained"])
@pytest.mark.parametrize("skipped", [0, 3])  # the second of 4 groups lies in both
def test_group_norm_silu(silu, shift, skipped):
    x = random(2, 8 - skipped, 3, 3, grad=True)
    skip = random(2, skipped, 3, 3, grad=True) if skipped else None
    shift = random(2, 8, grad=shift == "trained") if shift else None
    weight, bias = random(8), random(8)

    def outputs(*inputs):
        return tuple(output for output in nodes.GroupNormSilu.apply(*inputs) if output is not None)

    assert gradcheck(outputs, (x, skip, shift, weight, bias, 4, 1e-5, silu))
    past, past_skip, y = nodes.GroupNormSilu.apply(x, skip, shift, weight, bias, 4, 1e-5, silu)
    whole = torch.cat([x, skip], dim=1) if skipped else x
    shifted = whole if shift is None else whole + shift[:, :, None, None]
    expected = torch.nn.functional.group_norm(shifted, 4, weight, bias)
    torch.testing.assert_close(y, torch.nn.functional.silu(expected) if silu else expected)
    assert torch.equal(past, x)
    assert torch.equal(past_skip, skip) if skipped else past_skip is None


# x's channels of 32 in 8 groups of 4 end with a group, within one, and in the last: 2, 2 for packs of 8, 4, and all 8
@pytest.mark.parametrize("channels", [8, 5, 13, 30])
@pytest.mark.parametrize("is_past", [True, False])  # a gradient comes past the norm
def test_a_norm_and_convolution_of_a_skip_without_gradient(channels, is_past):
    x, skip = random(2, channels, 3, 4, grad=True), random(2, 32 - channels, 3, 4)
    options = random(32), random(32), 8, 1e-5, random(6, 32, 3, 3), 1

    def outputs(x):
        return nodes.GroupNormSiluConv.apply(x, skip, *options)[not is_past :]

    assert gradcheck(outputs, (x,))
    weight, bias, groups, eps, conv_weight, padding = options
    y = torch.nn.functional.group_norm(torch.cat([x, skip], dim=1), groups, weight, bias, eps)
    expected = torch.nn.functional.conv2d(torch.nn.functional.silu(y), conv_weight, padding=padding)
    torch.testing.assert_close(outputs(x)[-1], expected)
    grads = [torch.autograd.grad(y.square().sum(), x)[0] for y in (outputs(x)[-1], expected)]
    torch.testing.assert_close(*grads)
    # It keeps x, skip and the statistics alone.
    assert kept_bytes(lambda: outputs(x)) == sum(t.numel() * 8 for t in (x, skip)) + 2 * groups * 2 * 8


@pytest.mark.parametrize(
    ("channels", "all_channels", "groups", "expected"),
    [(640, 960, 32, (24, 720)), (320, 640, 32, (16, 320)), (8, 12, 4, (4, 12)), (960, 960, 32, (32, 960))],
)
def test_the_groups_that_have_a_channel(channels, all_channels, groups, expected):
    assert norms.groups_with(channels, all_channels, groups) == expected


@pytest.mark.parametrize("is_last", [True, False])
def test_a_product_of_pixels_is_the_convolution_of_what_is_concatenated(is_last):
    x, skip, weight = random(2, 5, 3, 4, grad=True), random(2, 3, 3, 4, grad=True), random(6, 8, 1, 1)
    if is_last:
        x, skip = (t.detach().to(memory_format=torch.channels_last).requires_grad_() for t in (x, skip))
    assert gradcheck(nodes.PixelProduct.apply, (x, skip, weight))
    assert gradcheck(nodes.PixelProduct.apply, (x, skip.detach(), weight))
    y = nodes.PixelProduct.apply(x, skip, weight)
    torch.testing.assert_close(y, torch.nn.functional.conv2d(torch.cat([x, skip], dim=1), weight))
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert kept_bytes(lambda: nodes.PixelProduct.apply(x, skip, weight)) == 0


def test_geglu():
    h = random(3, 16, grad=True)
    assert gradcheck(nodes.Geglu.apply, (h,))
    value, gate = h.chunk(2, dim=-1)
    torch.testing.assert_close(nodes.Geglu.apply(h), value * torch.nn.functional.gelu(gate))


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("side", [6, 7])
@pytest.mark.parametrize("kernel", [1, 3])
def test_frozen_conv(stride, side, kernel):
    x, weight, bias = random(2, 3, side, side, grad=True), random(4, 3, kernel, kernel), random(4)
    padding = (kernel // 2, kernel // 2)
    assert gradcheck(nodes.FrozenConv.apply, (x, weight, bias, (stride, stride), padding))
    for added in (bias, None):
        y = nodes.FrozenConv.apply(x, weight, added, (stride, stride), padding)
        torch.testing.assert_close(y, torch.nn.functional.conv2d(x, weight, added, stride, padding))


def test_upsample():
    x = random(2, 3, 4, 5, grad=True)
    assert gradcheck(nodes.Upsample.apply, (x,))
    assert torch.equal(nodes.Upsample.apply(x), torch.nn.functional.interpolate(x, scale_factor=2.0, mode="nearest"))


def test_add_with_bias():
    x, h, bias = random(2, 8, 3, 3, grad=True), random(2, 8, 3, 3, grad=True), random(8)
    assert gradcheck(nodes.AddWithBias.apply, (x, h, bias))


def test_frozen_layers_keep_nothing():
    x, weight = random(1, 8, 16, 16, grad=True), random(8, 8, 3, 3)
    assert kept_bytes(lambda: nodes.FrozenConv.apply(x, weight, None, (1, 1), (1, 1))) == 0
    assert kept_bytes(lambda: torch.nn.functional.conv2d(x, weight)) >= x.nbytes  # what this is about


def test_a_norm_keeps_its_input_and_statistics_alone():
    x, weight, bias = random(64, 128, grad=True), random(128), random(128)
    assert kept_bytes(lambda: nodes.AddLayerNorm.apply(x, x * 2, weight, bias, 1e-5)) == x.nbytes + 64 * 2 * 8
    picture, weight, bias = random(1, 32, 16, 16, grad=True), random(32), random(32)
    kept = kept_bytes(lambda: nodes.GroupNormSilu.apply(picture, None, None, weight, bias, 4, 1e-5, True))
    assert kept <= picture.nbytes + 128
