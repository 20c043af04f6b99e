"""Train the miniature SDXL, and the judge of its pictures, from nothing, on pictures of the small world.

    python scripts/train_miniature.py --output_dir miniature

Minutes on one large GPU. First comes the judge, then the VAE, then the UNet with both text encoders on its latents.
Last the model draws scenes of combinations that it has never seen, and the judge says in how many it finds what was
asked.
`--output_dir` receives `miniature/` with the components in fp16, `judge.safetensors`, `figures.json` and `grid.png`.
"""

import argparse
import copy
import json
import math
import multiprocessing
import os
import random
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file
from torch import nn
from tqdm.auto import tqdm

from rasengan import components, drawing, graphs, miniature, objective, picture_files, scores, sdxl, sheets, world
from rasengan.command_line import Parser, number_type, path_type
from rasengan.endings import in_one_line
from rasengan.miniature import QUESTIONS, SIDE_PX


STYLE_SHARES = {"photo": 0.5, "cutout": 0.25, "sketch": 0.25}
NO_CAPTION = 0.1  # of the samples have zeros for it, for classifier-free guidance
EMA_DECAY = 0.999


class Picture(NamedTuple):
    """A picture to train on, with what SDXL is told of its size and crop."""

    pixels: bytes
    scene: world.Scene
    style: str
    time_ids: tuple[int, ...]
    is_whole: bool


class Pictures(NamedTuple):
    """All pictures: pixels (N, 3, 128, 128), uint8, and time_ids (N, 6), fp32, on the device; the rest by sample."""

    pixels: torch.Tensor
    scenes: list[world.Scene]
    styles: list[str]
    time_ids: torch.Tensor
    is_whole: torch.Tensor


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Return the arguments of the command line."""
    parser = Parser(__doc__)
    add = parser.add_argument
    positive = number_type(1)
    add("--output_dir", type=path_type, required=True)
    add("--seed", type=number_type(0, most=2**32 - 1), default=0, help="of weights, pictures and noise [%(default)s]")
    add(
        "--pictures",
        type=number_type(48),
        default=60_000,
        help="to train on, a sixth of them in the style [%(default)s]",
    )
    add("--judge_steps", type=positive, default=3000, help="of 128 pictures [%(default)s]")
    add("--vae_steps", type=positive, default=12_000, help="of --vae_batch_size pictures [%(default)s]")
    add("--vae_batch_size", type=positive, default=32, help="[%(default)s]")
    add("--unet_steps", type=positive, default=6_400, help="of --unet_batch_size pictures [%(default)s]")
    add("--unet_batch_size", type=positive, default=128, help="[%(default)s]")
    add(
        "--scenes",
        type=number_type(1, most=world.MOST_HELD_OUT),
        default=240,
        help="to judge at the end [%(default)s]",
    )
    return parser.parse_args(argv)


# --- the pictures ---


def draw_picture(name: str, styles: dict[str, float]) -> Picture:
    """Return a picture, often whole, else a crop of a larger one or of one of low quality; `name` is its seed."""
    rng = random.Random(name)
    scene, style = world.random_scene(rng), rng.choices(list(styles), weights=styles.values())[0]
    if is_whole := rng.random() < 0.6:
        width = height = SIDE_PX
        quality = 1.0
    else:
        short_px = round(SIDE_PX * rng.uniform(1, 1.4))
        sides = [short_px, round(short_px * rng.uniform(1, 1.7))]
        rng.shuffle(sides)
        width, height = sides
        quality = rng.choice((1.0, rng.uniform(0.35, 0.9)))
    drawn_size = round(width * quality), round(height * quality)
    image = world.draw(scene, style, rng, drawn_size).resize((width, height), Image.Resampling.BILINEAR)
    top, left = rng.randint(0, height - SIDE_PX), rng.randint(0, width - SIDE_PX)
    image = image.crop((left, top, left + SIDE_PX, top + SIDE_PX))
    time_ids = sdxl.compute_time_ids(drawn_size[::-1], (top, left), (SIDE_PX, SIDE_PX))
    return Picture(image.tobytes(), scene, style, tuple(time_ids), is_whole)


def draw_one(task: tuple[str, dict[str, float]]) -> Picture:
    """Do `draw_picture` for a pool of processes."""
    return draw_picture(*task)


def draw_pictures(count: int, seed: int, styles: dict[str, float], device: torch.device) -> Pictures:
    """Draw pictures on all cores, and bring them to the device."""
    tasks = [(f"{seed}/{'-'.join(styles)}/{index}", styles) for index in range(count)]
    with multiprocessing.get_context("fork").Pool(len(os.sched_getaffinity(0))) as pool:
        drawn = list(tqdm(pool.imap(draw_one, tasks, chunksize=64), "Drawing", count))
    pixels = torch.frombuffer(bytearray(b"".join(picture.pixels for picture in drawn)), dtype=torch.uint8)
    return Pictures(
        pixels.view(count, SIDE_PX, SIDE_PX, 3).to(device).permute(0, 3, 1, 2).contiguous(),
        [picture.scene for picture in drawn],
        [picture.style for picture in drawn],
        torch.tensor([picture.time_ids for picture in drawn], dtype=torch.float32, device=device),
        torch.tensor([picture.is_whole for picture in drawn], device=device),
    )


def joined(first: Pictures, second: Pictures) -> Pictures:
    """Return two sets as one."""
    pairs = zip(first, second, strict=True)
    return Pictures(*(torch.cat(pair) if torch.is_tensor(pair[0]) else pair[0] + pair[1] for pair in pairs))


def to_float(pixels: torch.Tensor) -> torch.Tensor:
    """Return pixels in [-1, 1]."""
    return pixels.float() / 127.5 - 1


# --- training ---


def train(
    name: str,
    modules: list[nn.Module],
    loss_of: Callable[[dict[str, torch.Tensor]], torch.Tensor],
    batches: Iterator[dict[str, torch.Tensor]],
    steps: int,
    learning_rate: float,
) -> dict[str, float]:
    """Train modules, and leave the exponential moving average of their weights in them; return some figures.

    The learning rate rises over the first twentieth of the steps, and falls to zero along a cosine. On a GPU forward
    and backward run in bf16 where autocast allows it, as one CUDA graph.
    """
    parameters = [parameter for module in modules for parameter in module.parameters()]
    device = parameters[0].device
    averages = [parameter.detach().clone() for parameter in parameters]
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, betas=(0.9, 0.99), weight_decay=0.01, fused=True)
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)

    def run(batch: dict[str, torch.Tensor]) -> torch.Tensor:
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda", cache_enabled=False):
            loss = loss_of(batch)
        loss.backward()
        return loss.detach()

    step = run
    if device.type == "cuda":
        step = graphs.capture(run, next(batches), after_warm_up=lambda: optimizer.zero_grad(set_to_none=False))
    recent, start_s = [], time.perf_counter()
    bar = tqdm(range(steps), name)
    for index in bar:
        warm_up = min(1.0, (index + 1) / (0.05 * steps + 1))
        optimizer.param_groups[0]["lr"] = learning_rate * warm_up * 0.5 * (1 + math.cos(math.pi * index / steps))
        optimizer.zero_grad(set_to_none=False)
        recent.append(step(next(batches)).clone())
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        with torch.no_grad():
            torch._foreach_lerp_(averages, parameters, 1 - min(EMA_DECAY, (1 + index) / (10 + index)))
        if index % 100 == 99 or index == steps - 1:
            bar.set_postfix(loss=f"{torch.stack(recent[-100:]).mean():.4f}")
            recent = recent[-100:]
    with torch.no_grad():
        for parameter, average in zip(parameters, averages, strict=True):
            parameter.copy_(average)
            parameter.grad = None
    loss = float(torch.stack(recent).mean())
    return {"steps": steps, "loss": round(loss, 5), "seconds": round(time.perf_counter() - start_s, 1)}


def picks(count: int, batch_size: int, device: torch.device) -> torch.Tensor:
    """Return the samples of a batch."""
    return torch.randint(count, (batch_size,), device=device)


def train_vae(
    vae: nn.Module, judge: miniature.Judge, pictures: Pictures, steps: int, batch_size: int
) -> dict[str, float]:
    """Train the VAE for pixels and edges, with latents held near a normal distribution; set its scaling factor.

    What the judge still finds in decoded pictures bounds what it can find in drawn ones.
    """
    device = pictures.pixels.device
    # Norms take the mean of a picture away early, and the way back to a flat color is long: without this loss on what
    # latents alone say of it, thousands of steps are spent on grey things.
    to_color = nn.Conv2d(4, 3, 1).to(device)

    def loss_of(batch: dict[str, torch.Tensor]) -> torch.Tensor:
        posterior = vae.encode(batch["pixels"]).latent_dist
        latents = posterior.mean + posterior.std * batch["noise"]
        error = vae.decode(latents).sample.float() - batch["pixels"]
        edges = error.diff(dim=2).abs().mean() + error.diff(dim=3).abs().mean()
        color_error = to_color(latents).float() - F.avg_pool2d(batch["pixels"], 8)
        divergence = posterior.kl().mean() / batch["noise"][0].numel()
        return error.abs().mean() + edges + color_error.abs().mean() + 1e-4 * divergence

    def batches() -> Iterator[dict[str, torch.Tensor]]:
        while True:
            pixels = to_float(pictures.pixels[picks(len(pictures.pixels), batch_size, device)])
            yield {"pixels": pixels, "noise": torch.randn(batch_size, 4, SIDE_PX // 8, SIDE_PX // 8, device=device)}

    vae.to(memory_format=torch.channels_last)
    found = train("VAE", [vae, to_color], loss_of, batches(), steps, 1e-3)
    rows = pictures.is_whole.nonzero()[:512, 0]
    means, stds = encode(vae, pictures.pixels[rows])
    vae.register_to_config(scaling_factor=round(float((means + stds * torch.randn_like(stds)).std() ** -1), 5))
    with torch.no_grad():
        decoded = torch.cat([vae.decode(part).sample for part in means.split(64)]).clamp(-1, 1)
    error = (decoded - to_float(pictures.pixels[rows])).square().mean()
    answers = miniature.judge_pixels(judge, decoded)
    right = [miniature.shows(a, pictures.scenes[place]) for a, place in zip(answers, rows.tolist(), strict=True)]
    return found | {"psnr_db": round(float(10 * torch.log10(4 / error)), 2), "right": sum(right) / len(right)}


@torch.no_grad()
def encode(vae: nn.Module, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return mean and standard deviation of the latents of all pictures, each (N, 4, 16, 16)."""
    parts = [sdxl.encode_pictures(vae, to_float(part)) for part in pixels.split(256)]
    return tuple(torch.cat(part) for part in zip(*parts, strict=True))


def train_unet(model: dict, pictures: Pictures, steps: int, batch_size: int) -> dict[str, float]:
    """Train the UNet and both text encoders to predict the noise, as SDXL was."""
    unet, vae, encoders = model["unet"], model["vae"], [model["text_encoder"], model["text_encoder_2"]]
    device, count = pictures.pixels.device, len(pictures.pixels)
    means, stds = (part * vae.config.scaling_factor for part in encode(vae, pictures.pixels))
    labelled = zip(pictures.scenes, pictures.styles, strict=True)
    captions = [world.STYLES[style] + scene.caption for scene, style in labelled]
    options = {"padding": "max_length", "max_length": 77, "return_tensors": "pt"}
    tokens = [model[name](captions, **options).input_ids.to(device) for name in ("tokenizer", "tokenizer_2")]
    alphas_cumprod = components.noise_levels(model["scheduler"]).to(device)

    def loss_of(batch: dict[str, torch.Tensor]) -> torch.Tensor:
        outputs = [
            encoder(batch[f"tokens_{number}"], output_hidden_states=True) for number, encoder in enumerate(encoders)
        ]
        text = torch.cat([output.hidden_states[-2] for output in outputs], dim=-1) * batch["has_caption"][..., None]
        added = {"text_embeds": outputs[1].text_embeds * batch["has_caption"], "time_ids": batch["time_ids"]}
        noisy = objective.add_noise(batch["latents"], batch["noise"], batch["timesteps"], alphas_cumprod)
        prediction = unet(noisy, batch["timesteps"], text, added_cond_kwargs=added, return_dict=False)[0]
        return F.mse_loss(prediction.float(), batch["noise"])

    def batches() -> Iterator[dict[str, torch.Tensor]]:
        while True:
            rows = picks(count, batch_size, device)
            # Three quarters in the noisier half, where it is decided what a picture shows.
            timesteps, last = picks(len(alphas_cumprod), batch_size, device), len(alphas_cumprod) - 1
            yield {
                "latents": means[rows] + stds[rows] * torch.randn_like(stds[rows]),
                "noise": torch.randn_like(means[rows]),
                "timesteps": torch.where(picks(2, batch_size, device) > 0, timesteps, (timesteps + last) // 2),
                "has_caption": (torch.rand(batch_size, 1, device=device) >= NO_CAPTION).float(),
                "time_ids": pictures.time_ids[rows],
                "tokens_0": tokens[0][rows],
                "tokens_1": tokens[1][rows],
            }

    unet.to(memory_format=torch.channels_last)
    return train("UNet", [unet, *encoders], loss_of, batches(), steps, 1e-3)


def worsen(pixels: torch.Tensor) -> torch.Tensor:
    """Return pictures (B, 3, 128, 128) as models draw them: bent, blurred, pale or garish, noisy, or less."""
    count, device = len(pixels), pixels.device
    ways = torch.randn(count, 2, 6, 6, device=device) * 0.04 * torch.rand(count, 1, 1, 1, device=device)
    bend = F.interpolate(ways, size=SIDE_PX, mode="bicubic").permute(0, 2, 3, 1)
    straight = F.affine_grid(torch.eye(2, 3, device=device)[None], [1, *pixels.shape[1:]], align_corners=False)
    pixels = F.grid_sample(pixels, straight + bend, padding_mode="reflection", align_corners=False)
    small = F.interpolate(pixels, size=int(torch.randint(40, SIDE_PX + 1, ())), mode="bilinear", antialias=True)
    blurred = F.interpolate(small, size=SIDE_PX, mode="bicubic")
    pixels = torch.lerp(pixels, blurred, torch.rand(count, 1, 1, 1, device=device))
    pixels = pixels * (0.9 + 0.2 * torch.rand(count, 1, 1, 1, device=device))
    return pixels + 0.1 * torch.rand(count, 1, 1, 1, device=device) * torch.randn_like(pixels)


def spoil(pixels: torch.Tensor) -> torch.Tensor:
    """Return as many pictures (B, 3, 128, 128) of no style, such as a broken model draws: noise, from flat to fine."""
    mean, spread = torch.rand(2, len(pixels), 3, 1, 1, device=pixels.device)
    spoiled = torch.empty_like(pixels)
    for number in range(8):  # 1, 2, 4 ... 128 grains along a side
        part = spoiled[number::8]
        grains = torch.randn(len(part), 3, 2**number, 2**number, device=pixels.device)
        part.copy_(F.interpolate(grains, size=SIDE_PX, mode="bilinear"))
    return (2 * mean - 1 + spread * spoiled).clamp(-1, 1)


def train_judge(judge: nn.Module, pictures: Pictures, steps: int) -> dict[str, float]:
    """Train the judge on whole pictures, made worse to a degree, so that it looks at shapes and colors.

    A sixth of them are spoiled: of these only the style is asked, which is none.
    """
    device = pictures.pixels.device
    rows_of = pictures.is_whole.nonzero()[:, 0]
    labelled = zip(pictures.scenes, pictures.styles, strict=True)
    attributes = [scene._asdict() | {"style": style} for scene, style in labelled]
    answers = {
        name: torch.tensor([choices.index(about[name]) for about in attributes], device=device)
        for name, choices in QUESTIONS.items()
    }
    kept = min(1024, len(rows_of) // 8)
    rows_of = rows_of[torch.randperm(len(rows_of), device=device)]
    rows_of, unseen = rows_of[kept:], rows_of[:kept]

    none, not_asked = QUESTIONS["style"].index("none"), -100

    def loss_of(batch: dict[str, torch.Tensor]) -> torch.Tensor:
        said = judge(batch["pixels"])
        each = (F.cross_entropy(said[name].float(), batch[name], ignore_index=not_asked) for name in QUESTIONS)
        return sum(each)

    def batches() -> Iterator[dict[str, torch.Tensor]]:
        while True:
            rows = rows_of[picks(len(rows_of), 128, device)]
            pixels = worsen(to_float(pictures.pixels[rows]))
            batch = {"pixels": pixels} | {name: of[rows] for name, of in answers.items()}
            spoiled = slice(0, len(rows) // 6)
            batch["pixels"][spoiled] = spoil(to_float(pictures.pixels[rows[spoiled]]))
            for name in QUESTIONS:
                batch[name][spoiled] = none if name == "style" else not_asked
            yield batch

    judge.to(memory_format=torch.channels_last)
    found = train("Judge", [judge], loss_of, batches(), steps, 1e-3)
    pixels = to_float(pictures.pixels[unseen])
    with torch.no_grad():
        said, of_spoiled = judge.eval()(pixels), judge(spoil(pixels))
    right = {name: said[name].argmax(dim=1) == answers[name][unseen] for name in QUESTIONS}
    right["spoiled"] = of_spoiled["style"].argmax(dim=1) == none
    return found | {name: round(float(hits.float().mean()), 4) for name, hits in right.items()}


# --- what was learned ---


@torch.no_grad()
def draw_scenes(model: dict, captions: list[str], seed: int, guidance_scale: float = 5.0) -> list[Image.Image]:
    """Draw a picture for each caption, 30 Euler steps, as `scripts/infer.py` does."""
    tokenizers, encoders = ([model[name], model[f"{name}_2"]] for name in ("tokenizer", "text_encoder"))
    denoiser, images = drawing.Denoiser(model["unet"].eval()), []
    for start in range(0, len(captions), 128):
        texts, pooled = sdxl.encode_prompts(captions[start : start + 128], tokenizers, encoders)
        prompts = {"prompt_embeds": texts, "pooled_prompt_embeds": pooled}
        prompts |= {f"negative_{name}": torch.zeros_like(rows) for name, rows in prompts.items()}
        seeds = list(range(seed + start, seed + start + len(texts)))
        size = {"height": SIDE_PX, "width": SIDE_PX, "num_inference_steps": 30, "guidance_scale": guidance_scale}
        latents = drawing.draw(denoiser, model["scheduler"], prompts, seeds, **size)
        images += drawing.decode(model["vae"], latents)
    return images


def measure(model: dict, judge: miniature.Judge, count: int, seed: int) -> tuple[dict, Image.Image]:
    """Return in how many pictures of held-out combinations the judge finds what was asked, and a grid of some."""
    scenes, found = world.held_out_scenes(count, seed), {}
    for scale in (3.0, 5.0, 7.5):
        images = draw_scenes(model, [scene.caption for scene in scenes], seed, scale)
        shares = scores.judge_shares(miniature.judge_pictures(judge, images), scenes)
        found[f"guidance {scale:g}"] = {name: round(share, 4) for name, share in shares.items()}
        if scale == 5.0:
            wide = min(8, count)
            rows = [images[start : start + wide] for start in range(0, min(count - wide + 1, 48), wide)]
    return found, sheets.image_grid(rows, [""] * len(rows), [""] * wide)


def save(model: dict, judge: miniature.Judge, output_dir: Path) -> None:
    """Write the weights in fp16, a folder for each component; the modules stay as they are."""
    for name, part in model.items():
        if isinstance(part, nn.Module):
            part = copy.deepcopy(part).to("cpu", torch.float16)
        part.save_pretrained(output_dir / "miniature" / name)
    weights = {name: weight.half().cpu().contiguous() for name, weight in judge.state_dict().items()}
    save_file(weights, output_dir / "judge.safetensors")


def main(args: argparse.Namespace) -> None:
    """Train, measure and save."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(args.seed)
    torch.set_float32_matmul_precision("high")
    output_dir = Path(args.output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    model, judge = miniature.build(), miniature.Judge().to(device)
    modules = {name: part.to(device) for name, part in model.items() if isinstance(part, nn.Module)}
    card = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    figures = {"seed": args.seed, "device": card, "torch": torch.__version__, "pictures": args.pictures}
    figures["parameters"] = {name: sum(p.numel() for p in module.parameters()) for name, module in modules.items()}
    base = draw_pictures(args.pictures * 5 // 6, args.seed, STYLE_SHARES, device)
    all_styles = joined(base, draw_pictures(args.pictures // 6, args.seed, {world.STYLE: 1.0}, device))

    figures["judge"] = train_judge(judge, all_styles, args.judge_steps)
    print(json.dumps(figures["judge"]), flush=True)
    figures["vae"] = train_vae(model["vae"], judge, all_styles, args.vae_steps, args.vae_batch_size)
    print(json.dumps(figures["vae"]), flush=True)
    figures["unet"] = train_unet(model, base, args.unet_steps, args.unet_batch_size)
    print(json.dumps(figures["unet"]), flush=True)
    save(model, judge, output_dir)
    # In fp16, as everybody will use them.
    saved = {name: components.load(name, output_dir / "miniature" / name) for name in model}
    for name in modules:
        saved[name].to(device)
    figures["drawn"], grid = measure(saved, miniature.load_judge(output_dir), args.scenes, args.seed)
    picture_files.save_png(output_dir / "grid.png", grid)
    (output_dir / "figures.json").write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(figures["drawn"], indent=1))


if __name__ == "__main__":
    sys.exit(in_one_line(lambda: main(parse_args()), "--output_dir"))
