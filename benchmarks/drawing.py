"""How fast is drawing, and how much memory does it take, here and in diffusers?

    python benchmarks/drawing.py

Full-size SDXL with random weights, fp16, 30 Euler steps, guidance 7.5, a LoRA of rank 16 on 560 projections. Ours is
`scripts/infer.py`, whole; diffusers is its pipeline, with the adapter unmerged or without one. Each draws two prompts;
the time of a step is the median over both. Memory is the peak of the whole run, the host's read from outside. "T4"
settings run under a 14.3 GiB cap that fails like a smaller card, with flash attention off. "decode" is the VAE alone.
Times of a start differ by seconds from one to the next on the same host: compare those of several --rounds.
"""

import argparse
import itertools
import json
import os
import shutil
import statistics
from pathlib import Path


# As the scripts do, for "decode".
os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")

import torch
from instrument import T4_BUDGET_GIB
from measure import run_instrumented
from programs import ALPHA, RANK, ROOT, Bench, exit_cleanly, joined_path, make_parser, open_bench
from train_step import chosen

from rasengan import adapter_writer, components, decoding, lora, memory
from rasengan.adapters import Adapter


# setting -> side in px, pictures at once, our arguments, options of instrument.py
SETTINGS = (
    {
        "512px b1": (512, 1, [], []),
        "1024px b1": (1024, 1, [], []),
        "1024px b4": (1024, 4, [], []),
        "1024px b1, 5.8 GiB": (1024, 1, ["--vram_budget_gib", "5.8"], []),
    }
    | {f"512px b1, {name}": (512, 1, ["--scheduler", name], []) for name in ("unipc", "euler_a")}
    | {
        f"T4: 1024px b{size}": (1024, size, ["--vram_budget_gib", str(T4_BUDGET_GIB)], ["--as_t4"])
        for size in range(1, 9)
    }
)
PROGRAMS = ("ours", "diffusers, adapter unmerged", "diffusers, no adapter", "ours, no adapter")
PROMPTS = ["a red fox in the snow", "a lighthouse in a storm"]
LORA = "lora"


def write_adapter(bench: Bench, folder: Path) -> None:
    """Write a LoRA of the recipe whose matrices are random, small and none of them zero."""
    skeleton, generator = components.skeleton("unet", bench.work / "base" / "unet"), torch.Generator().manual_seed(0)
    weights = {}
    for name, module in skeleton.named_modules():
        if any(name.endswith(f".{target}") for target in lora.UNET_TARGETS):
            weights[f"{name}.lora_A.weight"] = torch.randn(RANK, module.in_features, generator=generator) / RANK
            weights[f"{name}.lora_B.weight"] = torch.randn(module.out_features, RANK, generator=generator) * 1e-3
    config = lora.lora_config(RANK, ALPHA, list(lora.UNET_TARGETS))
    config.target_modules = sorted(config.target_modules)
    adapter_writer.write_diffusers(folder, Adapter({"unet": weights}, {"unet": config}))


def draw(bench: Bench, program: str, side_px: int, pictures: int, arguments: list[str], options: list[str]) -> dict:
    """Draw under instrument.py, and return what was found."""
    bench.output_count += 1
    output = bench.work / "pictures-drawn" / f"{bench.output_count:03d}"
    shutil.rmtree(output, ignore_errors=True)
    steps = 4 if bench.tiny or "--as_t4" in options else 30
    prompts = ["--prompt", *PROMPTS]
    if program.startswith("ours"):
        command = [str(ROOT / "scripts" / "infer.py"), "--pretrained_model_name_or_path", str(bench.work / "base")]
        command += ["--lora_weights", str(bench.work / LORA)] if program == "ours" else []
        command += ["--conditioning_cache_dir", str(bench.work / "cache")]
        command += ["--height", str(side_px), "--width", str(side_px), "--num_images_per_prompt", str(pictures)]
        command += ["--num_inference_steps", str(steps), "--output_dir", str(output), *arguments, *prompts]
    else:
        command = [str(ROOT / "benchmarks" / "draw_with_diffusers.py"), str(bench.work / "pipeline"), str(output)]
        command += ["--side_px", str(side_px), "--pictures", str(pictures), "--steps", str(steps), *prompts]
        command += ["--lora", str(bench.work / LORA)] if program == "diffusers, adapter unmerged" else []
    slug = f"{bench.output_count:03d}-{program.split(',')[0]}-{side_px}px-b{pictures}"
    options = ["--of", "drawing", *options]
    found = run_instrumented(
        command, bench.logs / f"{slug}.log", options, environment={"PYTHONPATH": joined_path(ROOT)}
    )
    found["pictures"] = len(list(output.glob("*-*.png")))
    print(slug, json.dumps(found), flush=True)
    return found


def decode_with_diffusers(vae: torch.nn.Module, latents: torch.Tensor) -> torch.Tensor:
    return vae.decode(latents / vae.config.scaling_factor, return_dict=False)[0].clamp(-1, 1)


@torch.no_grad()
def measure_decode(bench: Bench) -> dict:
    """Time the decode of one picture of 1024 px, by ours and by diffusers', whole and in its tiles of 512 px."""
    found, side = {}, 8 if bench.tiny else 128
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    latents = torch.randn(1, 4, side, side, generator=torch.Generator().manual_seed(0)).to(device)
    whole = None
    for name in ("diffusers", "diffusers, tiles", "ours"):
        vae = components.load("vae", bench.work / "base" / "vae").to(device)
        decode = decoding.decode_latents if name == "ours" else decode_with_diffusers
        if name == "ours" and device.type == "cuda":
            decoding.use_channels_last(vae)
        if name == "diffusers, tiles":
            vae.enable_tiling()
            vae.tile_sample_min_size, vae.tile_latent_min_size = 512, 64
        times_ms = []
        memory.give_back()
        before = torch.cuda.memory_reserved() if device.type == "cuda" else 0
        memory.reset_peak(device)
        for _ in range(6):
            events = [torch.cuda.Event(enable_timing=True) for _ in range(2)] if device.type == "cuda" else []
            events and events[0].record()
            pixels = decode(vae, latents)
            if events:
                events[1].record()
                torch.cuda.synchronize()
                times_ms.append(events[0].elapsed_time(events[1]))
        extra_gib = memory.peak_reserved_gib(device) - before / memory.GIB
        found[name] = {"extra_gib": round(extra_gib, 3)}
        whole = pixels if whole is None else whole
        if pixels is not whole:
            error = (pixels - whole).square().mean()
            found[name]["psnr_db"] = round(float(10 * torch.log10(4 / error)), 1)
        if times_ms:
            found[name]["ms"] = round(statistics.median(times_ms[1:]), 1)
        del vae, pixels
    print("decode", json.dumps(found), flush=True)
    return found


def main() -> None:
    parser: argparse.ArgumentParser = make_parser(__doc__, "drawing.json")
    parser.add_argument("--settings", help=f"separated by semicolons, of: {'; '.join([*SETTINGS, 'decode'])} [all]")
    parser.add_argument("--programs", help=f"separated by semicolons, of: {'; '.join(PROGRAMS)} [all]")
    parser.add_argument("--rounds", type=int, default=1, help="so often, the programs in turns [%(default)s]")
    args = parser.parse_args()
    settings = chosen("--settings", args.settings, [*SETTINGS, "decode"])
    programs = chosen("--programs", args.programs, list(PROGRAMS))
    bench = open_bench(args)
    bench.once("pipeline", bench.write_pipeline)
    bench.once(LORA, lambda folder: write_adapter(bench, folder))
    for name in settings:
        if name == "decode":
            bench.results.keep({"setting": name}, measure_decode(bench))
            continue
        side_px, pictures, arguments, options = SETTINGS[name]
        for number, program in itertools.product(range(args.rounds), programs):
            if program == "ours" or not (arguments or options):
                side = 64 if bench.tiny else side_px
                found = draw(bench, program, side, pictures, arguments, options)
                names = {"setting": name, "program": program} | ({"round": number + 1} if args.rounds > 1 else {})
                bench.results.keep(names, {"arguments": " ".join(arguments)} | found)


if __name__ == "__main__":
    exit_cleanly(main)
