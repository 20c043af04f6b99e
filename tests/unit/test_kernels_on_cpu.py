"""The kernels themselves, compiled for the CPU (cuda_on_cpu.h), against PyTorch's operators in float64.

kernels.cu in fp32, and tensor_cores.cu in bf16, which is all that a CPU needs no instruction of a card for.
tests/gpu/test_kernels.py has all, on a card.
"""

import ctypes
import math
import re
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from rasengan import kernels, norms, nvrtc, text_attention


HERE = Path(__file__).parent
SOURCES = Path(kernels.__file__).parent


class Launcher:
    """Stands for a card's kernels: launches those of the compiled file, with the very arguments of a launch."""

    def __init__(self, library):
        self.library, self.counters = library, torch.zeros(4096, dtype=torch.int32)
        self.has_tensor_cores = library is not None and hasattr(library, "run_add_lora_gradients")
        self.launched, self.grids = [], []

    def blocks_at_once(self, name, threads):
        return {"attend_to_text": 5, "attend_to_text_backward": 2}[name]  # as on an H200

    def launch(self, name, grid, block, *arguments, shared_bytes=0):
        assert shared_bytes <= 48 * 1024  # what every card gives without being asked
        assert block[0] * block[1] <= 1024
        assert all(t.data_ptr() % 16 == 0 for t in arguments if torch.is_tensor(t))  # as a card reads them
        values = [nvrtc.as_c(argument) for argument in arguments]
        pointers = (ctypes.c_void_p * len(values))(*[ctypes.addressof(value) for value in values])
        getattr(self.library, f"run_{name}")((ctypes.c_int * 2)(*grid), (ctypes.c_int * 2)(*block), pointers)
        self.launched.append(name)
        self.grids.append(grid)


@pytest.fixture(scope="module", params=["", "-DAS_16_BITS -DLAST_WARP_FIRST"], ids=["fp32", "as 16 bits"])
def library(request, tmp_path_factory):
    made = [f"{name}_{packs}" for name in ("add_layer_norm", "layer_norm_backward") for packs in (3, 5, 8)]
    return compile_for_cpu(tmp_path_factory.mktemp("kernels"), ["kernels.cu"], made, request.param.split())


@pytest.fixture(scope="module", params=["", "-DLAST_WARP_FIRST"], ids=["first warp first", "last warp first"])
def tensor_cores(request, tmp_path_factory):
    made = [f"lora_gradient_sums_{tiles}" for tiles in (1, 2, 3, 4)]
    folder = tmp_path_factory.mktemp("tensor_cores")
    return compile_for_cpu(folder, ["kernels.cu", "tensor_cores.cu"], made, ["-DBF16", *request.param.split()])


def compile_for_cpu(folder, sources, made, options):
    """Return the kernels of the last source; `made` are those that macros make."""
    if shutil.which("g++") is None:
        pytest.skip("there is no g++ here")
    text = (SOURCES / sources[-1]).read_text()
    names = [*re.findall(r'extern "C" __global__ void (?:__launch_bounds__\([\w, ]+\) )?([a-z]\w+)\(', text), *made]
    lines = [f'#include "{path}"' for path in (HERE / "cuda_on_cpu.h", *(SOURCES / source for source in sources))]
    (folder / "kernels.cpp").write_text("\n".join([*lines, *(f"RUN({name})" for name in names), ""]))
    options = ["-std=c++20", "-O1", "-w", "-shared", "-fPIC", *options, "-o", folder / "kernels.so"]
    version = subprocess.run(["g++", "-dumpversion"], capture_output=True, text=True, check=True).stdout
    if int(version.split(".")[0]) >= 12:
        options.append("-ftrivial-auto-var-init=pattern")  # what was not written is no zero
    subprocess.run(["g++", *options, folder / "kernels.cpp"], check=True, timeout=300)
    return ctypes.CDLL(folder / "kernels.so")


@pytest.fixture
def launcher(library, monkeypatch):
    """The kernels, which take all fp32 tensors from here on, and PyTorch's operators those of float64."""
    return launch_by(library, torch.float32, monkeypatch)


@pytest.fixture
def tensor_core_launcher(tensor_cores, monkeypatch):
    """The same for bf16."""
    return launch_by(tensor_cores, torch.bfloat16, monkeypatch)


def launch_by(library, dtype, monkeypatch):
    launcher = Launcher(library)

    def kernels_for(x, width, widest):
        return launcher if x.dtype == dtype and width % 8 == 0 and width <= widest else None

    monkeypatch.setattr(nvrtc, "kernels_for", kernels_for)
    monkeypatch.setattr(nvrtc, "multiprocessors", lambda device: 40)  # as on a T4
    return launcher


def random(*shape, like=1.0, shift=0.0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(len(shape))) * like + shift


def pictures(*shape, **how):
    return random(*shape, **how).contiguous(memory_format=torch.channels_last)


def exact(*tensors):
    return [None if t is None else t.double() for t in tensors]


def assert_close(found, expected):
    assert found.dtype == torch.float32
    error = (found.double() - expected).norm() / expected.norm()
    assert error < 2e-6, f"relative error {error:.2e}"


def test_geglu(launcher):
    h, grad = random(77, 2 * 136, like=2), random(77, 136)
    assert_close(kernels.geglu(h), kernels.geglu(*exact(h)))
    assert_close(kernels.geglu_backward(h, grad), kernels.geglu_backward(*exact(h, grad)))
    assert launcher.launched == ["geglu_forward", "geglu_backward"]


def test_geglu_far_from_zero(launcher):
    """The gate's share is exact to 1.5e-7, as fine as fp16 keeps a gelu, and what overflows does so as in PyTorch."""
    gate = torch.cat([torch.linspace(-9, 9, 3611)[:3608], torch.tensor([0, 100, -100, -1e30, 1e30, torch.inf])])
    gate = torch.cat([gate, torch.tensor([-torch.inf, torch.nan])]).view(-1, 8)
    found = kernels.geglu(torch.cat([torch.ones_like(gate), gate], dim=1)).double()
    exact_gate = gate.double()
    expected = exact_gate * torch.special.erfc(-exact_gate / 2**0.5) / 2
    excess = (found - expected).abs() - 1.5e-7 * exact_gate.abs() - 3e-7 * expected.abs()
    worst = excess.nan_to_num(nan=-1).argmax()
    assert excess.flatten()[worst] <= 0, f"{found.flatten()[worst]} at {gate.flatten()[worst]}"
    assert torch.equal(found.isnan(), expected.isnan())
    assert torch.equal(found.isinf(), expected.isinf())


def test_silu_far_from_zero(launcher):
    """A norm with a weight of 0 is its bias."""
    bias = torch.tensor([-1e30, -100, -20, -1e-3, 0, 100, 1e30, torch.inf])
    y, _ = norms.group_norm(pictures(1, 8, 2, 2), None, torch.zeros(8), bias, 1, 1e-5, True)
    expected = torch.nn.functional.silu(bias.double()).expand(4, 8)
    torch.testing.assert_close(y.permute(0, 2, 3, 1).flatten(0, 2).double(), expected, rtol=1e-6, atol=1e-30)


@pytest.mark.parametrize(("rows", "width"), [(1, 8), (5, 640), (6, 1280), (3, 2048)])
@pytest.mark.parametrize("has_delta", [True, False])
def test_add_layer_norm(launcher, rows, width, has_delta):
    x, weight, bias = random(rows, width, shift=3), random(width), random(width, like=2)
    delta = random(rows, width, like=0.5) if has_delta else None
    total, y, statistics = norms.add_layer_norm(x, delta, weight, bias, 1e-5)
    exact_total, expected, exact_statistics = norms.add_layer_norm(*exact(x, delta, weight, bias), 1e-5)
    assert_close(total, exact_total)
    assert_close(y, expected)
    assert_close(statistics, exact_statistics)
    grad_y, past = random(rows, width, like=2), random(rows, width)
    for grad_total in (past, None):
        found = norms.layer_norm_backward(total, weight, statistics, grad_y, grad_total)
        of = exact_total, *exact(weight), exact_statistics, *exact(grad_y, grad_total)
        assert_close(found, norms.layer_norm_backward(*of))
    assert len(launcher.launched) == 3


@pytest.mark.parametrize(
    ("count", "channels", "side", "groups", "split"),
    [(2, 320, 7, 32, 320), (2, 320, 7, 32, 104), (1, 32, 5, 4, 8), (3, 640, 17, 32, 320), (1, 2560, 3, 32, 1280)],
)
@pytest.mark.parametrize(("silu", "has_shift"), [(True, True), (False, False)])
@pytest.mark.parametrize(("multiprocessors", "rounds"), [(132, 1), (40, 2), (1, 2)])
def test_group_norm(
    launcher, count, channels, side, groups, split, silu, has_shift, multiprocessors, rounds, monkeypatch
):
    monkeypatch.setattr(nvrtc, "multiprocessors", lambda device: multiprocessors)
    monkeypatch.setattr(norms, "LEAST_ROUNDS", rounds)

    def parts(tensor):
        """Return a part, or None, for x and for skip."""
        of = [
            part.contiguous(memory_format=torch.channels_last) for part in tensor.split([split, channels - split], 1)
        ]
        return of[0], of[1] if split < channels else None

    x, skip = parts(random(count, channels, side, side, shift=2))
    shift = random(count, channels) if has_shift else None
    weight, bias = random(channels), random(channels, like=2)
    options = (groups, 1e-5, silu)
    y, statistics = norms.group_norm(x, shift, weight, bias, *options, skip)
    expected, exact_statistics = norms.group_norm(*exact(x, shift, weight, bias), *options, *exact(skip))
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert_close(y, expected)
    assert_close(statistics, exact_statistics)
    grad_y = random(count, channels, side, side)
    for past in (parts(random(count, channels, side, side, like=0.3)), (None, None)):
        of = grad_y, past[0], skip, past[1]
        found = norms.group_norm_backward(x, shift, weight, bias, *options, statistics, *of)
        expected = norms.group_norm_backward(*exact(x, shift, weight, bias), *options, exact_statistics, *exact(*of))
        for part, exact_part in zip(found, expected, strict=True):
            assert (part is None) == (exact_part is None)
            if part is not None:
                assert_close(part, exact_part)
    assert not launcher.counters.any()  # ready for the next launch
    assert len(launcher.launched) == 6


def test_add_with_bias(launcher):
    x, h, bias = pictures(3, 40, 5, 5), pictures(3, 40, 5, 5, like=2), random(40)
    assert_close(kernels.add_with_bias(x, h, bias), kernels.add_with_bias(*exact(x, h, bias)))
    with_bias = kernels.add_bias_(h, bias)
    assert with_bias is h
    assert_close(h, pictures(3, 40, 5, 5, like=2).double() + bias.double()[:, None, None])
    assert launcher.launched == ["add_with_bias"] * 2


@pytest.mark.parametrize("shape", [(1, 8, 1, 1), (3, 40, 5, 7)])
def test_upsample(launcher, shape):
    x, grad = pictures(*shape), pictures(*shape[:2], 2 * shape[2], 2 * shape[3])
    y = kernels.upsample(x)
    assert torch.equal(y.double(), kernels.upsample(*exact(x)))
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert_close(kernels.upsample_backward(grad), kernels.upsample_backward(*exact(grad)))
    assert launcher.launched == ["upsample_forward", "upsample_backward"]


def error_of(found, expected):
    return ((found.double() - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize(("rows", "width", "out_width", "rank"), [(1, 8, 8, 8), (150, 136, 264, 16), (70, 40, 8, 56)])
@pytest.mark.parametrize("most_splits", [1, 32])  # with one, a block has several stages of rows
def test_lora_gradients_are_added(tensor_core_launcher, rows, width, out_width, rank, most_splits, monkeypatch):
    monkeypatch.setattr(kernels, "MOST_SPLITS", most_splits)
    sizes = (rows, width), (rows, rank), (rows, out_width), (rows, rank)
    inputs = [random(*size, like=like).bfloat16() for size, like in zip(sizes, (1, 2, 0.5, 1), strict=True)]
    grads = random(rank, width), random(1, out_width, rank)
    expected = exact(*grads)
    kernels.add_lora_gradients(*inputs, *grads, 1.5)
    kernels.add_lora_gradients(*exact(*inputs), *expected, 1.5)
    assert tensor_core_launcher.launched == [f"lora_gradient_sums_{-(-rank // 16)}", "add_lora_gradients"]
    assert all(error_of(*pair) < 1e-6 for pair in zip(grads, expected, strict=True))


@pytest.mark.parametrize(
    ("pictures", "tokens", "heads", "keys", "multiprocessors", "blocks"),
    [(1, 1, 1, 1, 40, 1), (2, 200, 2, 77, 2, 1), (1, 200, 3, 77, 4, 2), (2, 200, 1, 80, 40, 3)],
)
@pytest.mark.parametrize("is_stacked", [True, False], ids=["stacked", "apart"])
def test_attention_to_text(
    tensor_core_launcher, pictures, tokens, heads, keys, multiprocessors, blocks, is_stacked, monkeypatch
):
    monkeypatch.setattr(nvrtc, "multiprocessors", lambda device: multiprocessors)
    q = random(pictures, tokens, heads, 64, like=2).bfloat16().requires_grad_()
    k, v = random(pictures, keys, 2, heads, 64, like=2).bfloat16().unbind(2)
    k, v = (t.requires_grad_() if is_stacked else t.contiguous().requires_grad_() for t in (k, v))
    y, grad_y = text_attention.attend(q, k, v), random(pictures, tokens, heads, 64).bfloat16()
    grads = torch.autograd.grad(y, (q, k, v), grad_y)
    inputs = [t.detach().double().requires_grad_() for t in (q, k, v)]
    expected = text_attention.attend(*inputs)
    exact_grads = torch.autograd.grad(expected, inputs, grad_y.double())
    assert tensor_core_launcher.launched == ["attend_to_text", "attend_to_text_backward"]
    assert (y.dtype, y.shape, y.is_contiguous()) == (torch.bfloat16, q.shape, True)
    assert tensor_core_launcher.grids[1] == (blocks, pictures * heads)
    assert not tensor_core_launcher.counters.any()  # ready for the next launch
    for name, found, exact_one in zip("yqkv", (y, *grads), (expected, *exact_grads), strict=True):
        if keys > 1 or name in "yv":  # one key's weight is 1, whatever q and k are
            assert error_of(found, exact_one) < 5e-3, name
        else:
            assert found.abs().max() < 1e-5


def attended(q, k, v, grad_y):
    """Return what attends, and the gradients of all three."""
    inputs = [t.detach().requires_grad_() for t in (q, k, v)]
    y = text_attention.attend(*inputs)
    return y, *torch.autograd.grad(y, inputs, grad_y)


def test_attention_to_text_with_wild_scores(tensor_core_launcher, monkeypatch):
    """Scores of hundreds, so that a weight is nearly 1: no worse than PyTorch's operator in the same dtype."""
    inputs = [random(1, 70, 2, 64, like=30), *random(1, 77, 2, 2, 64, like=30).unbind(2), random(1, 70, 2, 64)]
    inputs = [t.bfloat16() for t in inputs]
    found, expected = attended(*inputs), attended(*exact(*inputs))
    monkeypatch.setattr(nvrtc, "kernels_for", lambda x, width, widest: None)
    for name, one, of_pytorch, exact_one in zip("yqkv", found, attended(*inputs), expected, strict=True):
        assert error_of(one, exact_one) < 1.2 * error_of(of_pytorch, exact_one) + 1e-3, name


def test_scores_that_overflow_downwards_are_no_result(tensor_core_launcher):
    """Scores that are all -inf have no softmax, also where there are keys too few for a tile."""
    q, k = torch.full((1, 2, 1, 64), 1.0).bfloat16(), torch.full((1, 77, 1, 64), -torch.inf).bfloat16()
    assert text_attention.attend(q, k, random(1, 77, 1, 64).bfloat16()).isnan().all()


@pytest.mark.parametrize("which", ["q", "k", "v", "k and v", "grad_y"])
def test_attention_to_text_takes_tensors_that_lie_anywhere(tensor_core_launcher, which):
    """The kernels read 16 bytes at once, from where those begin."""
    q, grad_y = random(1, 40, 2, 64).bfloat16(), random(1, 40, 2, 64, like=2).bfloat16()
    k, v = random(1, 77, 2, 2, 64).bfloat16().unbind(2)
    expected = attended(q, k, v, grad_y)

    def moved(t, name):
        return t if name not in which.split(" and ") else torch.cat([t.new_zeros(1), t.flatten()])[1:].view(t.shape)

    found = attended(moved(q, "q"), moved(k, "k"), moved(v, "v"), moved(grad_y, "grad_y"))
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


def test_attention_to_text_of_unlike_tensors_is_pytorchs(tensor_core_launcher):
    q, k, of_two = random(1, 4, 1, 64).bfloat16(), random(1, 5, 1, 64).bfloat16(), random(1, 5, 2, 64).bfloat16()
    with pytest.raises(RuntimeError, match="dtype"):
        text_attention.attend(q, k.float(), k.float())
    assert text_attention.attend(q, of_two, of_two).shape == (1, 4, 2, 64)  # one head of queries for two of keys
    assert not tensor_core_launcher.launched


def test_keys_that_are_missing_weigh_nothing_where_all_others_weigh_less(tensor_core_launcher):
    """A missing key's score would be 0, those of the others are -128: e^128 is more than fp32 holds."""
    q, k = torch.full((1, 32, 1, 64), -4.0).bfloat16(), torch.full((1, 77, 1, 64), 4.0).bfloat16()
    v, grad_y = random(1, 77, 1, 64).bfloat16(), random(1, 32, 1, 64).bfloat16()
    y, *grads = attended(q, k, v, grad_y)
    assert error_of(y[0, 0, 0], v.double().mean((0, 1, 2))) < 5e-3
    assert all(grad.isfinite().all() for grad in grads)


def test_what_kernels_do_not_take_is_left_to_pytorch(monkeypatch):
    monkeypatch.setattr(nvrtc, "load", lambda dtype, device: "kernels")

    def stands_for(*shape, dtype=torch.float16):
        return SimpleNamespace(
            device=torch.device("cuda", 0), dtype=dtype, shape=shape, numel=lambda: math.prod(shape)
        )

    assert nvrtc.kernels_for(stands_for(5, 64), 64, 64) == "kernels"
    for x, width in [(stands_for(5, 60), 60), (stands_for(5, 72), 72), (stands_for(5, 64, dtype=torch.float64), 64)]:
        assert nvrtc.kernels_for(x, width, 64) is None
    assert nvrtc.kernels_for(stands_for(2**28 - 1, 64), 64, 64) == "kernels"
    assert nvrtc.kernels_for(stands_for(2**28, 64), 64, 64) is None  # its packs are 2**31


def test_a_number_that_c_would_cut_is_not_launched():
    assert nvrtc.as_c(2**31 - 1).value == 2**31 - 1
    with pytest.raises(OverflowError, match="2147483648"):
        nvrtc.as_c(2**31)
