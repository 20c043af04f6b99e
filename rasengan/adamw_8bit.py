"""bitsandbytes' AdamW with 8-bit state, without its waits: the card alone decides whether an update counts."""

import bitsandbytes
import torch


# Elements that are updated together, a multiple of the 256 that share a scale. Their copies are all the room it takes.
PART = 2**22


class AdamW8bit(bitsandbytes.optim.AdamW8bit):
    """AdamW over one flat parameter, as bitsandbytes computes it; the card can be told to leave an update out.

    bitsandbytes takes no overflow flag, so that a gradient scaler waits for its own before each update, and it waits
    for the card after each: then the card has nothing to do while the host prepares the next step. Here an update that
    has a flag, `found_inf`, is computed on copies, and taken where the flag is zero. Only the number of updates done,
    on which the bias correction hangs, is the host's: it reads one flag, that of the update before, while the card is
    busy with the step after it.
    """

    _step_supports_amp_scaling = True  # torch.amp.GradScaler sets `found_inf` then, and waits for nothing

    def __init__(self, flat: torch.nn.Parameter, **options):
        """Take the parameter (N,), and the options of `bitsandbytes.optim.AdamW8bit`."""
        super().__init__([flat], **options)
        self.verdict = None  # on the last update: whether it was left out, and when that has reached the host

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Update from the gradient; where `found_inf` is there and not zero, change nothing.

        Raises:
            RuntimeError: the gradient is still scaled.
        """
        if getattr(self, "grad_scale", None) is not None:
            raise RuntimeError("The gradient is still scaled: call the scaler's unscale_ before its step.")
        (group,) = self.param_groups
        (flat,) = group["params"]
        self.settle()
        if not self.state[flat]:
            self.init_state(group, flat, 0, 0)
        found_inf = getattr(self, "found_inf", None)
        if found_inf is None:
            self.update_step(group, flat, 0, 0)
            return
        is_left_out = found_inf != 0
        for start in range(0, flat.numel(), PART):
            self._update_part(group, flat, slice(start, start + PART), is_left_out)
        self.state[flat]["step"] += 1
        is_left_out = is_left_out.to("cpu", non_blocking=True)
        self.verdict = is_left_out, torch.cuda.current_stream().record_event() if flat.is_cuda else None

    def _update_part(self, group: dict, flat: torch.nn.Parameter, part: slice, is_left_out: torch.Tensor) -> None:
        state = self.state[flat]
        blocks = slice(part.start // 256, -(-part.stop // 256))
        live = {name: state[name][part] for name in ("state1", "state2")}
        live |= {name: state[name][blocks] for name in ("absmax1", "absmax2") if name in state}
        copies = {name: tensor.clone() for name, tensor in live.items()}
        weights = flat.detach()[part]
        updated = weights.clone()
        updated.grad = flat.grad[part]
        self.state[updated] = state | copies
        self.update_step(group, updated, 0, 0)
        del self.state[updated]
        for tensor, new in ((weights, updated), *((live[name], copies[name]) for name in live)):
            torch.where(is_left_out, tensor, new, out=tensor)

    def settle(self) -> None:
        """Count the last update, or not, as the card has decided; waits for that step of the card."""
        if self.verdict is not None:
            (is_left_out, arrival), self.verdict = self.verdict, None
            if arrival is not None:
                arrival.synchronize()
            (flat,) = self.param_groups[0]["params"]
            self.state[flat]["step"] -= int(is_left_out)

    def state_dict(self) -> dict:
        """Return the state after the updates that counted."""
        self.settle()
        return super().state_dict()

    def load_state_dict(self, state_dict: dict, move_to_device: bool = True) -> None:
        """Take the place of what is there, and of what the card has not decided yet."""
        self.verdict = None
        super().load_state_dict(state_dict, move_to_device)
