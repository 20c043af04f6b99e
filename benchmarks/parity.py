"""Does the fused step learn what PEFT's forward under autocast learns, and how far off is a quantized base?

    python benchmarks/parity.py

500 steps on the tiny SDXL and 200 on the full-size architecture (512 px, batch 1), random weights, fp16, r = 16, 8-bit
AdamW, a gradient scaler: the same samples for each way of running the UNet. What two runs may differ by without being
different is measured too, as the autocast run with another of PyTorch's attention kernels ("noise"). With the scaler
"overflowing", which begins far too high and grows often, steps overflow and are skipped: are they the same ones? There
the fused step runs once more with the LoRA's gradients rounded to fp16, in which autocast sums them.
"""

import argparse
import tempfile
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import full_size
import torch
from measure import ROOT, Results
from programs import exit_cleanly
from torch.nn.attention import SDPBackend, sdpa_kernel

from rasengan import UserError, components, demo, fused, lora, optim, quantization, step


RANK, ALPHA = 16, 32.0
SCALERS = {"default": {}, "overflowing": {"init_scale": 2.0**32, "growth_interval": 25}}
DEVICE = torch.device("cuda", 0)
# size -> side of the latents, batch size, steps, learning rate
SIZES = {"tiny": (8, 2, 500, 1e-3), "full size": (64, 1, 200, 1e-4)}
ROUNDED = "fused, LoRA's gradients in fp16"
WAYS = {scaling: ["autocast", "noise", "fused", "fused, nf4"] for scaling in SCALERS}
WAYS["overflowing"].append(ROUNDED)


def samples(unet: torch.nn.Module, number: int, size: int, side: int) -> dict[str, torch.Tensor]:
    """Return the batch of a step: 96 pictures and captions that come again, each time with other noise."""
    config, generator = unet.config, torch.Generator().manual_seed(number)
    pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
    pictures = [torch.Generator().manual_seed(10**6 + (number * size + k) % 96) for k in range(size)]
    batch = {
        "latents": torch.stack([torch.randn(4, side, side, generator=g) for g in pictures]),
        "prompt_embeds": torch.stack([torch.randn(77, config.cross_attention_dim, generator=g) for g in pictures]),
        "pooled_prompt_embeds": torch.stack([torch.randn(pooled, generator=g) for g in pictures]),
        "noise": torch.randn(size, 4, side, side, generator=generator),
        "timesteps": torch.randint(1000, (size,), generator=generator),
        "time_ids": torch.tensor([[8.0 * side, 8.0 * side, 0, 0, 8.0 * side, 8.0 * side]] * size),
    }
    return {name: tensor.to(DEVICE) for name, tensor in batch.items()}


def build(base: Path, way: str, scaling: str = "default"):
    """Return the UNet with its LoRA, the flat parameter, the step run in a way of WAYS, with one of SCALERS."""
    unet = components.load("unet", base / "unet", torch.float16)
    if way == "fused, nf4":
        quantization.quantize_base(unet, DEVICE, torch.float16)
    lora.stack_weights(unet, DEVICE)
    unet.to(DEVICE)
    torch.manual_seed(0)
    lora.add_lora(unet, lora.lora_config(RANK, ALPHA, list(lora.UNET_TARGETS)))
    unet.train()
    flat = lora.flatten_parameters(lora.flat_order(unet))
    is_fused = way.startswith("fused")
    if is_fused:
        fused.FusedUNet(unet, flat, ALPHA / RANK)
    scheduler = components.load("scheduler", base / "scheduler")
    scaler = torch.amp.GradScaler(**SCALERS[scaling])
    compute = partial(
        step.compute_losses,
        unet,
        alphas_cumprod=scheduler.alphas_cumprod.to(DEVICE),
        prediction_type="epsilon",
        snr_gamma=None,
        weight_dtype=torch.float16,
        autocast=not is_fused,
    )

    def backward(loss):
        scaler.scale(loss).backward()
        if way == ROUNDED:
            flat.grad.copy_(flat.grad.half())

    return unet, flat, step.TrainingStep(compute, backward, flat, True), scaler


def train(base: Path, way: str, scaling: str, side: int, size: int, steps: int, learning_rate: float) -> dict:
    """Train, and return the losses and gradient norms of all steps, and what the LoRA became."""
    unet, flat, train_step, scaler = build(base, way, scaling)
    start = flat.detach().clone()
    optimizer = optim.make_optimizer(flat, "adamw", True, learning_rate, (0.9, 0.999), 1e-2, 1e-8)
    found = []
    attention = sdpa_kernel(SDPBackend.EFFICIENT_ATTENTION) if way == "noise" else nullcontext()
    with attention:
        for number in range(steps):
            losses = train_step(samples(unet, number, size, side))
            scaler.unscale_(optimizer)
            norm = torch.nn.utils.clip_grad_norm_([flat], 1.0)
            found.append(torch.stack([losses.mean(), norm]))
            scaler.step(optimizer)
            scaler.update()
            flat.grad.zero_()
    losses, norms = torch.stack(found).cpu().unbind(1)
    change = (flat.detach() - start).cpu()
    train_step.release()
    return {"losses": losses, "norms": norms, "change": change}


def compare(found: dict, reference: dict) -> dict:
    """Return how far a run is from another."""
    skipped = [(~run["norms"].isfinite()).nonzero().flatten().tolist() for run in (found, reference)]
    both = found["norms"].isfinite() & reference["norms"].isfinite()
    losses, expected = found["losses"], reference["losses"]
    norms = (found["norms"] / reference["norms"] - 1).abs()[both]
    tail = len(losses) // 10
    return {
        "loss_relative_difference_max": ((losses - expected).abs() / expected).max().item(),
        "loss_relative_difference_mean": ((losses - expected) / expected).mean().item(),
        "last_tenth_loss": losses[-tail:].mean().item(),
        "last_tenth_loss_of_reference": expected[-tail:].mean().item(),
        "grad_norm_relative_difference_median": norms.median().item(),
        "grad_norm_relative_difference_max": norms.max().item(),
        "trained_change_relative_difference": (
            (found["change"] - reference["change"]).norm() / reference["change"].norm()
        ).item(),
        "skipped_steps": skipped[0],
        "skipped_steps_of_reference": skipped[1],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--out", type=Path, default=ROOT / "benchmarks" / "results" / "parity.json", help="added to [%(default)s]")
    add("--base", type=Path, help="a full-size base, such as train_step.py leaves in --work_dir [built]")
    add("--sizes", nargs="+", choices=list(SIZES), default=list(SIZES), help="[both]")
    add("--commit", help="of this project, where there is no git")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        raise UserError("There is no GPU here, and fp16 with a gradient scaler needs one.")
    results = Results(args.out, args.commit, {})
    with tempfile.TemporaryDirectory() as folder:
        for size in args.sizes:
            base = args.base if size == "full size" and args.base else Path(folder) / size
            if not base.exists():
                base.mkdir()
                (demo.build_tiny_sdxl if size == "tiny" else full_size.build)(base)
            for scaling in SCALERS:
                runs = {}
                for way in WAYS[scaling]:
                    runs[way] = train(base, way, scaling, *SIZES[size])
                    if way == "autocast":
                        continue
                    found = compare(runs[way], runs["autocast"])
                    names = {"size": size, "scaler": scaling, "way": way, "against": "autocast"}
                    results.keep(names | {"steps": SIZES[size][2]}, found)
                    print(size, scaling, way, found, flush=True)


if __name__ == "__main__":
    exit_cleanly(main)
