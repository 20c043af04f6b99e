"""The CUDA kernels against PyTorch's operators in float64 on the CPU."""

import pytest
import torch

from rasengan import kernels, norms, nvrtc, text_attention


DTYPES = {torch.float16: 2e-3, torch.bfloat16: 1.6e-2, torch.float32: 2e-6}
DEVICE = torch.device("cuda", 0)


@pytest.mark.parametrize("capability", [(7, 5), (8, 0), (8, 6), (8, 9)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_kernels_compile_for_older_cards(dtype, capability):
    """Which have less shared memory for a block, and other tensor cores or none for a dtype."""
    assert nvrtc.compile_kernels(dtype, capability, nvrtc._libraries()[0])[:4] == b"\x7fELF"


@pytest.fixture(params=DTYPES, ids=str)
def dtype(request):
    assert nvrtc.prepare(request.param, DEVICE), "the kernels do not compile here"
    return request.param


def random(*shape, dtype, like=1.0, shift=0.0):
    return (
        torch.randn(*shape, generator=torch.Generator().manual_seed(len(shape)), dtype=torch.float64) * like + shift
    ).to(dtype)


def on_gpu(*tensors):
    return [None if t is None else t.to(DEVICE) for t in tensors]


def exact(*tensors):
    return [None if t is None else t.double() for t in tensors]


def assert_close(found, expected, dtype):
    error = (found.cpu().double() - expected).norm() / expected.norm()
    assert error < DTYPES[dtype], f"relative error {error:.2e}"


@pytest.mark.parametrize(("rows", "width"), [(1, 8), (77, 2560), (4097, 5120)])
def test_geglu(dtype, rows, width):
    h, grad = random(rows, 2 * width, dtype=dtype, like=2), random(rows, width, dtype=dtype)
    assert_close(kernels.geglu(*on_gpu(h)), kernels.geglu(*exact(h)), dtype)
    assert_close(kernels.geglu_backward(*on_gpu(h, grad)), kernels.geglu_backward(*exact(h, grad)), dtype)


def test_gates_far_from_zero(dtype):
    """The fast instructions of CUDA end where the numbers do, in GEGLU and in the SiLU of a norm that is its bias."""
    gate = torch.tensor([-1e4, -100, -20, -4, -2, -1e-3, 0, 1e-3, 2, 4, 20, 100, 1e4, torch.inf, torch.nan, 1])
    gate = gate.to(dtype)[None]
    tolerance = {"rtol": 2 * DTYPES[dtype], "atol": 2e-7, "equal_nan": True}
    found = kernels.geglu(*on_gpu(torch.cat([torch.ones_like(gate), gate], dim=1)))
    expected = gate.double() * torch.special.erfc(-gate.double() / 2**0.5) / 2
    torch.testing.assert_close(found.cpu().double(), expected, **tolerance)
    x = random(1, 16, 2, 2, dtype=dtype).to(DEVICE, memory_format=torch.channels_last)
    y, _ = norms.group_norm(x, None, *on_gpu(torch.zeros(16, dtype=dtype), gate[0]), 2, 1e-5, True)
    expected = torch.nn.functional.silu(gate[0].double())
    for pixel in y.cpu().double().permute(0, 2, 3, 1).flatten(0, 2):
        torch.testing.assert_close(pixel, expected, **tolerance)


@pytest.mark.parametrize(("rows", "width"), [(1, 8), (77, 640), (1025, 1280), (3, 2048)])
@pytest.mark.parametrize("has_delta", [True, False])
def test_add_layer_norm(dtype, rows, width, has_delta):
    x, weight, bias = random(rows, width, dtype=dtype, shift=3), random(width, dtype=dtype), random(width, dtype=dtype)
    delta = random(rows, width, dtype=dtype, like=0.5) if has_delta else None
    total, y, statistics = norms.add_layer_norm(*on_gpu(x, delta, weight, bias), 1e-5)
    exact_total = total.cpu().double()  # the sum is rounded, and the norm is of what was rounded
    _, expected, exact_statistics = norms.add_layer_norm(exact_total, None, *exact(weight, bias), 1e-5)
    assert_close(y, expected, dtype)
    assert_close(statistics, exact_statistics, torch.float32)
    if has_delta:
        assert_close(total, x.double() + delta.double(), dtype)
    grad_y, past = random(rows, width, dtype=dtype, like=2), random(rows, width, dtype=dtype)
    for grad_total in (past, None):
        found = norms.layer_norm_backward(total, *on_gpu(weight), statistics, *on_gpu(grad_y, grad_total))
        of = exact_total, *exact(weight), exact_statistics, *exact(grad_y, grad_total)
        expected = norms.layer_norm_backward(*of)
        assert_close(found, expected, dtype)


@pytest.mark.parametrize(
    ("pictures", "channels", "side", "groups"),
    [(1, 320, 64, 32), (8, 640, 32, 32), (3, 1280, 16, 32), (1, 2560, 16, 32), (2, 1920, 7, 32), (1, 32, 5, 4)],
)
@pytest.mark.parametrize("silu", [True, False])
@pytest.mark.parametrize("has_shift", [True, False])
@pytest.mark.parametrize("has_skip", [True, False])  # of channels so wide that a group lies in both, but for 32
def test_group_norm(dtype, pictures, channels, side, groups, silu, has_shift, has_skip):
    x = random(pictures, channels, side, side, dtype=dtype, shift=2)
    split = 8 * (channels // 24) if has_skip else channels

    def parts(tensor):
        """Return a part, or None, for x and for skip."""
        if tensor is None:
            return None, None
        of = (
            part.contiguous(memory_format=torch.channels_last) for part in tensor.split([split, channels - split], 1)
        )
        return tuple(of) if has_skip else (next(of), None)

    x, skip = parts(x)
    shift = random(pictures, channels, dtype=dtype) if has_shift else None
    weight, bias = random(channels, dtype=dtype), random(channels, dtype=dtype)
    options = (groups, 1e-5, silu)
    y, statistics = norms.group_norm(*on_gpu(x, shift, weight, bias), *options, *on_gpu(skip))
    expected, exact_statistics = norms.group_norm(*exact(x, shift, weight, bias), *options, *exact(skip))
    assert_close(y, expected, dtype)
    assert_close(statistics, exact_statistics, torch.float32)
    grad_y, past = (random(pictures, channels, side, side, dtype=dtype, like=like) for like in (1, 0.3))
    for grad_past in (past, None):
        past_x, past_skip = parts(grad_past)
        of = grad_y, past_x, skip, past_skip
        found = norms.group_norm_backward(*on_gpu(x, shift, weight, bias), *options, statistics, *on_gpu(*of))
        expected = norms.group_norm_backward(*exact(x, shift, weight, bias), *options, exact_statistics, *exact(*of))
        for part, exact_part in zip(found, expected, strict=True):
            assert (part is None) == (exact_part is None)
            if part is not None:
                assert_close(part, exact_part, dtype)


def test_a_norm_is_the_same_bits_every_time(dtype):
    x = random(4, 640, 32, 32, dtype=dtype).to(DEVICE, memory_format=torch.channels_last)
    weight, bias = on_gpu(random(640, dtype=dtype), random(640, dtype=dtype))
    first = norms.group_norm(x, None, weight, bias, 32, 1e-5, True)
    for _ in range(20):
        again = norms.group_norm(x, None, weight, bias, 32, 1e-5, True)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize("shape", [(1, 8, 1, 1), (3, 640, 31, 17), (8, 1280, 32, 32)])
def test_upsample(dtype, shape):
    x, grad = random(*shape, dtype=dtype), random(*shape[:2], 2 * shape[2], 2 * shape[3], dtype=dtype)
    on_card = [t.to(DEVICE, memory_format=torch.channels_last) for t in (x, grad)]
    assert torch.equal(kernels.upsample(on_card[0]).cpu(), kernels.upsample(x))
    assert_close(kernels.upsample_backward(on_card[1]), kernels.upsample_backward(*exact(grad)), dtype)


def test_add_with_bias(dtype):
    x, h = (random(3, 640, 9, 9, dtype=dtype, like=like) for like in (1, 2))
    bias = random(640, dtype=dtype)
    assert_close(kernels.add_with_bias(*on_gpu(x, h, bias)), kernels.add_with_bias(*exact(x, h, bias)), dtype)
    on_card = h.to(DEVICE, memory_format=torch.channels_last)
    assert kernels.add_bias_(on_card, bias.to(DEVICE)) is on_card
    assert torch.equal(on_card.cpu(), kernels.add_bias_(h, bias))  # one addition, rounded once by both


@pytest.mark.parametrize(
    ("rows", "width", "out_width"), [(1, 8, 8), (77, 136, 264), (256, 1280, 1280), (4097, 640, 320)]
)
@pytest.mark.parametrize(("layers", "rank"), [(1, 16), (1, 8), (1, 40), (1, 64), (1, 72), (1, 4), (3, 16), (2, 32)])
def test_lora_gradients_are_added(dtype, rows, width, out_width, layers, rank):
    x, grad_y = random(rows, width, dtype=dtype), random(rows, layers * out_width, dtype=dtype, like=2)
    h, grad_h = random(rows, layers * rank, dtype=dtype), random(rows, layers * rank, dtype=dtype, like=0.5)
    grads = [random(layers * rank, width, dtype=torch.float32), random(layers, out_width, rank, dtype=torch.float32)]
    found, expected = on_gpu(*grads), exact(*grads)
    for _ in range(2):  # the second time it must add to what the first one left
        kernels.add_lora_gradients(*on_gpu(x, h, grad_y, grad_h), *found, 1.5)
        kernels.add_lora_gradients(*exact(x, h, grad_y, grad_h), *expected, 1.5)
    for one, other in zip(found, expected, strict=True):
        # Without the kernel, the products are rounded to the dtype before they are added.
        by_kernel = dtype != torch.float32 and rank % 8 == 0 and rank <= kernels.MOST_RANKS and layers == 1
        error = (one.cpu().double() - other).norm() / other.norm()
        assert error < (1e-5 if by_kernel else max(1e-5, DTYPES[dtype])), f"relative error {error:.2e}"


def test_lora_gradients_are_the_same_bits_every_time(dtype):
    x, grad_y = on_gpu(random(1000, 640, dtype=dtype), random(1000, 640, dtype=dtype))
    h, grad_h = on_gpu(random(1000, 48, dtype=dtype), random(1000, 48, dtype=dtype, like=2))
    results = []
    for _ in range(20):
        grads = torch.zeros(48, 640, device=DEVICE), torch.zeros(1, 640, 48, device=DEVICE)
        kernels.add_lora_gradients(x, h, grad_y, grad_h, *grads, 2.0)
        results.append(torch.cat([grad.flatten() for grad in grads]))
    assert all(torch.equal(result, results[0]) for result in results)


def attended(q, k, v, grad_y):
    """Return what attends, and the gradients of all three."""
    inputs = [t.detach().requires_grad_() for t in (q, k, v)]
    y = text_attention.attend(*inputs)
    return y, *torch.autograd.grad(y, inputs, grad_y)


@pytest.mark.parametrize(
    ("pictures", "tokens", "heads", "keys"), [(1, 1, 1, 1), (2, 988, 3, 77), (1, 4096, 10, 77), (8, 256, 20, 80)]
)
@pytest.mark.parametrize("is_stacked", [True, False], ids=["stacked", "apart"])
def test_attention_to_text(dtype, pictures, tokens, heads, keys, is_stacked):
    q, grad_y = (random(pictures, tokens, heads, 64, dtype=dtype, like=like) for like in (2, 1))
    k, v = random(pictures, keys, 2, heads, 64, dtype=dtype, like=2).unbind(2)
    expected = attended(*exact(q, k, v, grad_y))
    on_card = q.to(DEVICE), *torch.stack([k, v], 2).to(DEVICE).unbind(2), grad_y.to(DEVICE)
    found = attended(*on_card if is_stacked else (t.contiguous() for t in on_card))
    for name, one, other in zip("yqkv", found, expected, strict=True):
        if keys > 1 or name in "yv":
            assert_close(one, other, dtype)
        else:  # one key's weight is 1, whatever q and k are
            assert one.abs().max() < 10 * DTYPES[dtype]


def test_attention_to_text_with_wild_scores(dtype, monkeypatch):
    """Scores of hundreds, so that a weight is nearly 1: no worse than PyTorch's operator in the same dtype."""
    q, grad_y = (random(2, 300, 3, 64, dtype=dtype, like=like) for like in (30, 1))
    inputs = q, *random(2, 77, 2, 3, 64, dtype=dtype, like=30).unbind(2), grad_y
    found, expected = attended(*on_gpu(*inputs)), attended(*exact(*inputs))
    monkeypatch.setattr(nvrtc, "kernels_for", lambda x, width, widest: None)
    for name, one, by_pytorch, other in zip("yqkv", found, attended(*on_gpu(*inputs)), expected, strict=True):
        error, of_pytorch = ((t.cpu().double() - other).norm() / other.norm() for t in (one, by_pytorch))
        assert error < 1.2 * of_pytorch + DTYPES[dtype], f"{name}: {error:.2e}, PyTorch {of_pytorch:.2e}"


def test_scores_that_overflow_downwards_are_no_result(dtype):
    if dtype == torch.float32:
        pytest.skip("PyTorch's operator does it")
    q, v = torch.ones(1, 2, 1, 64, dtype=dtype, device=DEVICE), torch.ones(1, 77, 1, 64, dtype=dtype, device=DEVICE)
    assert text_attention.attend(q, torch.full_like(v, -torch.inf), v).isnan().all()


def test_a_card_has_room_for_the_attention(dtype):
    of_dtype = nvrtc.load(dtype, DEVICE)
    if not of_dtype.has_tensor_cores:
        pytest.skip("PyTorch's operator does it")
    assert of_dtype.blocks_at_once("attend_to_text", text_attention.FORWARD_THREADS) >= 2
    assert of_dtype.blocks_at_once("attend_to_text_backward", text_attention.BACKWARD_THREADS) >= 1


@pytest.mark.parametrize("shape", [(8, 256, 20), (1, 1024, 10)])  # one block has a head, and several share it
def test_attention_to_text_is_the_same_bits_every_time(dtype, shape):
    if dtype == torch.float32:
        pytest.skip("PyTorch's operator does it, which gives other bits each time")
    q, grad_y = (random(*shape, 64, dtype=dtype, like=like).to(DEVICE) for like in (2, 1))
    k, v = random(shape[0], 77, 2, shape[2], 64, dtype=dtype).to(DEVICE).unbind(2)
    first = attended(q, k, v, grad_y)
    for _ in range(20):
        assert all(torch.equal(a, b) for a, b in zip(first, attended(q, k, v, grad_y), strict=True))


def test_an_overflow_in_attention_to_text_is_not_lost(dtype):
    q, k, v = (torch.ones(1, 64, 2, 64, dtype=dtype, device=DEVICE) for _ in range(3))
    q[0, 3, 1], k[0, 5, 0] = torch.inf, torch.nan
    y = text_attention.attend(q, k[:, :33], v[:, :33])
    assert y[0, 3, 1].isnan().all()
    assert y[0, :, 0].isnan().all()
    assert y[0, 4:, 1].isfinite().all()


def test_a_thread_without_a_context_can_launch(dtype):
    from concurrent.futures import ThreadPoolExecutor

    h = random(16, 64, dtype=dtype).to(DEVICE)
    with ThreadPoolExecutor(1) as pool:
        assert torch.equal(pool.submit(kernels.geglu, h).result(), kernels.geglu(h))
