"""Updates on the card, which the host does not wait for."""

import bitsandbytes
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState

from rasengan import adamw_8bit, optim


DEVICE = torch.device("cuda", 0)
ADAM = {"learning_rate": 1e-3, "betas": (0.9, 0.99), "weight_decay": 0.1, "eps": 1e-6}
ELEMENTS = 2 * adamw_8bit.PART + 1000


@pytest.mark.parametrize("mixed_precision", ["fp16", "bf16"])
def test_8_bit_adamw_waits_for_nothing_and_is_bitsandbytes_own(mixed_precision):
    AcceleratorState._reset_state(True)
    accelerator = Accelerator(mixed_precision=mixed_precision)
    start = torch.randn(ELEMENTS, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    flat, theirs = torch.nn.Parameter(start.clone()), torch.nn.Parameter(start.clone())
    flat.grad = torch.zeros_like(flat)
    optimizer = accelerator.prepare(optim.make_optimizer(flat, "adamw", True, **ADAM))
    asked = bitsandbytes.optim.AdamW8bit([theirs], lr=1e-3, betas=(0.9, 0.99), weight_decay=0.1, eps=1e-6)
    generator = torch.Generator(DEVICE).manual_seed(1)
    for number in range(8):
        scale = accelerator.scaler.scale(torch.ones((), device=DEVICE)).item() if accelerator.scaler else 1.0
        is_finite = number not in (0, 3)
        grad = 1e-6 * torch.randn(ELEMENTS, device=DEVICE, generator=generator)
        grad[-1] = grad[-1] if is_finite else torch.inf
        flat.grad.copy_(grad * scale)
        theirs.grad = grad
        torch.cuda.synchronize()

        torch.cuda._sleep(10**9)  # the card is busy for half a second
        grad_norm = accelerator.clip_grad_norm_([flat], 1e9)
        optim.step_if_finite(optimizer, grad_norm, accelerator.scaler)
        if number > 1:  # loading a kernel, or getting pinned memory, waits
            assert not torch.cuda.current_stream().query()  # and the host is here already

        if is_finite:
            asked.step()
        assert torch.equal(flat, theirs)
    assert not torch.equal(flat, start)
    states = (optimizer.state_dict(), asked.state_dict())
    assert states[0]["state"][0]["step"] == states[1]["state"][0]["step"] == 6
    for name in ("state1", "state2", "absmax1", "absmax2"):
        assert torch.equal(optimizer.optimizer.state[flat][name], asked.state[theirs][name])
    if accelerator.scaler:
        assert accelerator.scaler.get_scale() == 65536.0 / 4  # halved for each that was left out


def test_fp32_adamw_without_a_scaler_waits_for_nothing_and_leaves_out_what_is_not_finite():
    AcceleratorState._reset_state(True)
    accelerator = Accelerator(mixed_precision="bf16")
    start = torch.randn(ELEMENTS, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    flat, theirs = torch.nn.Parameter(start.clone()), torch.nn.Parameter(start.clone())
    flat.grad = torch.zeros_like(flat)
    optimizer = accelerator.prepare(optim.make_optimizer(flat, "adamw", False, **ADAM))
    asked = torch.optim.AdamW([theirs], lr=1e-3, betas=(0.9, 0.99), weight_decay=0.1, eps=1e-6, fused=True)
    generator = torch.Generator(DEVICE).manual_seed(1)
    for number in range(6):
        is_finite = number not in (0, 3)
        flat.grad.copy_(torch.randn(ELEMENTS, device=DEVICE, generator=generator))
        theirs.grad = flat.grad.clone()
        flat.grad[-1] = flat.grad[-1] if is_finite else torch.nan
        torch.cuda.synchronize()

        torch.cuda._sleep(10**9)
        optim.step_if_finite(optimizer, flat.grad.norm(), accelerator.scaler)
        if number > 1:
            assert not torch.cuda.current_stream().query()

        if is_finite:
            asked.step()
        assert torch.equal(flat, theirs)
    assert not torch.equal(flat, start)
