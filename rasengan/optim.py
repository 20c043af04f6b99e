"""Optimizers over one flat parameter, its running average, and learning rates as functions of the step."""

import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout

import torch
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel


# optimizer -> its usual learning rate; Prodigy estimates the rate, and is given a factor on it
LEARNING_RATES = {"adamw": 1e-4, "prodigy": 1.0}
SQUARES = {"exp_avg_sq", "state2", "absmax1", "absmax2"}  # and scales, which are not negative
FOUND = {"lr", "d", "d_max", "d_numerator", "k"}  # what a run finds, and counts: Prodigy's, and the rate of the step
FEW = 8192  # values; of less than 4096 bitsandbytes holds the state in fp32


def make_optimizer(
    flat: torch.nn.Parameter,
    name: str,
    use_8bit_adam: bool,
    learning_rate: float,
    betas: tuple[float, float],
    weight_decay: float,
    eps: float,
) -> torch.optim.Optimizer:
    """Return AdamW over the flat parameter, with 8-bit state (a quarter of the bytes) or fp32 state, or Prodigy.

    Raises:
        ImportError: bitsandbytes or prodigyopt is missing.

    Source: Prodigy is arXiv 2306.06101, with the corrections that its authors recommend for diffusion models.
    """
    options = {"lr": learning_rate, "betas": betas, "weight_decay": weight_decay, "eps": eps}
    if name == "prodigy":
        from prodigyopt import Prodigy

        with redirect_stdout(io.StringIO()):  # it prints that the weight decay is decoupled
            return Prodigy([flat], use_bias_correction=True, safeguard_warmup=True, **options)
    if not use_8bit_adam:
        # The fused one reads the gradient scaler's verdict on the card, so that an update needs no wait for the host.
        return torch.optim.AdamW([flat], fused=flat.device.type == "cuda", **options)
    try:
        from rasengan.adamw_8bit import AdamW8bit
    except ImportError as error:
        raise ImportError(
            "--use_8bit_adam needs bitsandbytes: `pip install bitsandbytes`, or give --no-use_8bit_adam."
        ) from error
    return AdamW8bit(flat, **options)


def expected_update_bytes(parameters: int, name: str, use_8bit_adam: bool, use_ema: bool) -> int:
    """Return the bytes that updates will take beside weights and average: the state, and room to work in."""
    average = 4 * parameters if use_ema else 0
    if name == "prodigy":  # two moments, the sum of the gradients, where it began; and one more while it works
        return 5 * 4 * parameters + average
    if not use_8bit_adam:
        return 2 * 4 * parameters + average
    from rasengan.adamw_8bit import PART

    # An fp32 scale for each block of 256; and copies of weights and state of a part.
    return 2 * parameters + 2 * 4 * parameters // 256 + (4 + 2) * min(parameters, PART) + average


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Return the bytes of all the tensors in the optimizer's state, the shared quantization tables left out."""
    tables = {"qmap1", "qmap2"}
    return sum(
        value.numel() * value.element_size()
        for state in optimizer.state.values()
        for name, value in state.items()
        if torch.is_tensor(value) and name not in tables
    )


def check_state(
    optimizer: torch.optim.Optimizer, make_like: Callable[[torch.nn.Parameter], torch.optim.Optimizer], may_lack: bool
) -> None:
    """Check that a loaded state has the tensors of an update of this optimizer, of their sizes and dtypes, all finite.

    Args:
        optimizer: of one parameter.
        make_like: returns one of its kind for another parameter.
        may_lack: whether it may have none, since no update was done.

    Raises:
        ValueError: it does not.
    """
    (flat,) = optimizer.param_groups[0]["params"]
    state = optimizer.state.get(flat, {})
    if not state and may_lack:
        return
    few = torch.nn.Parameter(torch.ones(min(flat.numel(), FEW), device=flat.device))
    few.grad = torch.zeros_like(few)
    example = make_like(few)
    example.step()
    blocks = -(-few.numel() // 256), -(-flat.numel() // 256)  # of values with one scale
    numbers = dict([(few.numel(), flat.numel()), blocks] if few.numel() > 1 else [])
    for name, expected in example.state[few].items():
        found = state.get(name)
        if type(found) is not type(expected):
            raise ValueError(f"{name} is {'missing' if found is None else f'a {type(found).__name__}'}")
        if not torch.is_tensor(found):
            continue
        shape = (numbers.get(expected.numel(), expected.numel()),) if expected.dim() else ()
        if (found.shape, found.dtype) != (shape, expected.dtype) or not found.is_contiguous():
            raise ValueError(f"{name} is {tuple(found.shape)} of {found.dtype}, not {shape} of {expected.dtype}")
        if found.is_floating_point() and not torch.isfinite(found).all():
            raise ValueError(f"{name} is not finite")
        if name in SQUARES and (found < 0).any():
            raise ValueError(f"{name} is negative")
        if name.startswith("qmap") and not torch.equal(found.cpu(), expected.cpu()):
            raise ValueError(f"{name} is no table of bitsandbytes'")
    if not 0 <= float(state["step"]) < 2**31:
        raise ValueError(f"it has done {float(state['step']):g} updates")
    for name, own in example.param_groups[0].items():
        found = optimizer.param_groups[0].get(name)
        if name in FOUND:
            least = -1e39 if name == "d_numerator" else 0  # a sum of products, of either sign
            if type(found) not in (int, float) or not least <= found < 1e39:
                raise ValueError(f"{name} is {found!r}")
        elif name not in {"params", "fused"} and found != own:
            raise ValueError(f"{name} is {found!r}, not {own!r}")


def make_ema(flat: torch.nn.Parameter, decay: float) -> EMAModel:
    """Return a running average of the flat parameter, which begins with what it is now.

    Its `step([flat])` follows every optimizer step, a skipped one too. The decay is 0 in the first, and grows to
    `decay` as (1 + n) / (10 + n), n steps after it.
    """
    return EMAModel([flat], decay=decay, foreach=True)


def step_if_finite(optimizer, grad_norm: torch.Tensor, scaler: torch.amp.GradScaler | None) -> None:
    """Update, but where the gradient is not finite.

    Args:
        optimizer: that accelerate prepared. One that takes a verdict on the card needs no wait for the host.
        grad_norm: of the gradient, which is finite if and only if all of it is.
        scaler: the gradient's, which makes that sure by itself.
    """
    if scaler is None and getattr(optimizer.optimizer, "_step_supports_amp_scaling", False):
        optimizer.optimizer.found_inf = (~torch.isfinite(grad_norm)).float()
        optimizer.step()
        del optimizer.optimizer.found_inf
    elif scaler is not None or torch.isfinite(grad_norm):
        optimizer.step()


@contextmanager
def averaged(ema: EMAModel | None, flat: torch.nn.Parameter) -> Iterator[None]:
    """Put the running average in the place of the flat parameter for a while; without one, change nothing."""
    if ema is None:
        yield
        return
    ema.store([flat])
    ema.copy_to([flat])
    try:
        yield
    finally:
        ema.restore([flat])


def learning_rate_schedule(
    name: str,
    learning_rate: float,
    num_warmup_steps: int,
    num_training_steps: int,
    num_cycles: int = 1,
    power: float = 1.0,
    step_rules: str | None = None,
) -> Callable[[int], float]:
    """Return the factor on the learning rate as a pure function of the number of optimizer steps done.

    A function of the step alone needs no state in a checkpoint, and does not run ahead with several processes.

    Args:
        name: a schedule of `diffusers.optimization`.
        learning_rate: the peak, which the factor multiplies; "polynomial" ends at 1e-7 whatever it is.
        num_warmup_steps: optimizer steps of linear warm-up, for the schedules that have one.
        num_training_steps: optimizer steps until a decaying schedule ends.
        num_cycles: hard restarts of "cosine_with_restarts".
        power: of "polynomial".
        step_rules: of "piecewise_constant", as "1:10,0.1" (a factor of 1 until step 10, then of 0.1).

    Raises:
        ValueError: the name or the rules are not a schedule.
    """
    # The optimizer here only lends its learning rate, from which the polynomial schedule decays.
    scheduler = get_scheduler(
        name,
        torch.optim.SGD([torch.zeros(1)], lr=learning_rate),
        step_rules=step_rules,
        num_warmup_steps=num_warmup_steps,
        num_training_steps=num_training_steps,
        num_cycles=num_cycles,
        power=power,
    )
    return scheduler.lr_lambdas[0]
