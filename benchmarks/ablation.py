"""What does each setting of the recipe buy? Style and content that the miniature learns with other ones.

    python benchmarks/ablation.py [--jobs 16] [--plot benchmarks/results/ablation.png]
    python benchmarks/ablation.py --show benchmarks/results/ablation_gpu.json [--plot ablation.png]

The miniature SDXL is trained on its style set by train_lora_sdxl.py, and scored by evaluate.py, with one setting of
the recipe changed at a time. Beside them stand the techniques that are not exact: 8-bit AdamW, fp16 and nf4. The table
is printed as Markdown.
"""

import argparse
import json
import math
import os
import sys
import tempfile
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from pathlib import Path
from statistics import mean

import torch
import yaml
from measure import ROOT, Results, run
from programs import exit_cleanly
from table import load_pyplot, markdown

from rasengan import UserError, miniature, world


RECIPE = miniature.ASSETS / "recipe.yaml"  # of scripts/demo.sh too
SETTINGS = yaml.safe_load(RECIPE.read_text())
# Values of one setting, the recipe's own among them; alpha stays twice the rank where the rank is another.
VALUES = {
    "rank": ("2", "4", "8", "16", "32", "64"),
    "lora_alpha": ("4", "8", "16", "32", "64"),
    "learning_rate": ("5e-4", "1e-3", "2e-3", "3e-3", "6e-3"),
    "max_train_steps": ("100", "225", "450", "900", "1800"),
}
TECHNIQUES = {"AdamW in 32 bits": ["--no-use_8bit_adam"]}  # in the recipe's precision: fp16 on a GPU
ON_A_GPU = {
    "fp32": ["--mixed_precision", "no"],
    "fp32, AdamW in 32 bits": ["--mixed_precision", "no", "--no-use_8bit_adam"],
    "base in nf4": ["--base_quantization", "nf4"],
}
# Shares of the pictures, and the change of the held-out loss as a share of the base's, None where training diverged.
FIGURES = ("style", "content", "style_of_base", "content_of_base", "loss_change")


def cases() -> list[tuple[str, str, list[str]]]:
    """Return each case's setting, its value, and the flags that the recipe does not have."""
    found = [("recipe", "recipe", [])]
    for name, values in VALUES.items():
        for value in values:
            if float(value) != float(SETTINGS[name]):
                alpha = ["--lora_alpha", str(2 * int(value))] if name == "rank" else []
                found.append((name, value, [f"--{name}", value, *alpha]))
    techniques = TECHNIQUES | (ON_A_GPU if torch.cuda.is_available() else {})
    return found + [("technique", name, words) for name, words in techniques.items()]


def measure(
    made: Path, work: Path, logs: Path, name: str, words: list[str], seed: int, drawing: list[str], gpu: str
) -> dict:
    """Train and evaluate once, with the scripts' output in `logs`; return `FIGURES`.

    That a run diverges, and stops, is a result too: no picture has style or content then. The runs see the one GPU.

    Raises:
        UserError: a script failed otherwise.
    """
    base = made / "miniature"
    with tempfile.TemporaryDirectory(dir=work) as out:
        train = ["train_lora_sdxl.py", "--pretrained_model_name_or_path", str(base), "--train_data_dir"]
        train += [f"{work}/set", "--conditioning_cache_dir", f"{work}/cache", "--config", str(RECIPE)]
        train += ["--mixed_precision", "fp16" if torch.cuda.is_available() else "no", "--seed", str(seed)]
        train += ["--report_to", "none", "--output_dir", out, *words]
        evaluate = ["evaluate.py", "--lora_weights", out, "--judge", str(made), *drawing]
        evaluate += ["--picture_seeds", str(seed)]
        for script, *rest in (train, evaluate):
            log = logs / f"{name}-{Path(script).stem}.txt"
            command = [sys.executable, str(ROOT / "scripts" / script), *rest]
            found = run(command, log, environment={"CUDA_VISIBLE_DEVICES": gpu})
            if found["exit_code"] and "finite" in found["error"]:
                return dict.fromkeys(FIGURES) | {"style": 0.0, "content": 0.0, "error": found["error"]}
            if found["exit_code"]:
                raise UserError(f"{script} failed: {found['error']} (--logs FOLDER keeps all that it says).")
        report = json.loads((Path(out) / "evaluation" / "evaluation.json").read_text())
    judge, loss = report["pictures"]["judge"], report["loss"]["held_out"]
    of_base, of_tuned = judge["base"]["mean"], judge["tuned"]["mean"]
    return {
        "style": of_tuned["style"],
        "content": of_tuned["content"],
        "style_of_base": of_base["style"],
        "content_of_base": of_base["content"],
        "loss_change": loss["change"],
    }


def visible_gpus() -> list[str]:
    """Return what CUDA_VISIBLE_DEVICES takes for each GPU of this command; where there is none, what hides them."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    found = named.split(",") if named else [str(index) for index in range(torch.cuda.device_count())]
    return found[: torch.cuda.device_count()] or [""]


def grouped(runs: list[dict]) -> dict[tuple[str, str], dict[str, float]]:
    """Return the mean over the seeds of each case's figures, of the newest run of each."""
    newest, found = {(one["setting"], one["value"], one["seed"]): one for one in runs}, {}
    for (setting, value, _), one in newest.items():
        found.setdefault((setting, value), []).append(one)
    shares = {case: {name: [one[name] for one in of] for name in FIGURES} for case, of in found.items()}
    return {
        case: {name: math.nan if None in values else mean(values) for name, values in by_name.items()}
        for case, by_name in shares.items()
    }


def table(runs: list[dict]) -> str:
    """Return a row for each case: the base, the recipe, then each setting's other values, and the techniques."""
    found, rows = grouped(runs), []
    order = [("recipe", "recipe"), *((name, value) for name, values in VALUES.items() for value in values)]
    order += [("technique", name) for name in TECHNIQUES | ON_A_GPU]
    for setting, value in sorted(found, key=order.index):
        of = found[setting, value]
        name = f"`--{setting} {value}`" if setting in VALUES else value
        shares = [f"{100 * of[key]:.1f} %" for key in ("style", "content")]
        change = "diverged" if math.isnan(of["loss_change"]) else f"{100 * of['loss_change']:+.1f} %"
        rows.append([name, *shares, change])
    if of := found.get(("recipe", "recipe")):
        rows.insert(
            0, ["the base, untrained", *(f"{100 * of[f'{key}_of_base']:.1f} %" for key in ("style", "content")), ""]
        )
    head = ["changed", "in the style", "content right", "held-out loss, to the base's"]
    return markdown(head, rows)


def plot(runs: list[dict], file: Path) -> None:
    """Draw style and content over each setting, as PNG or SVG."""
    pyplot = load_pyplot()
    found = grouped(runs)
    figure, axes = pyplot.subplots(1, len(VALUES), figsize=(11, 2.8), sharey=True, layout="constrained")
    for axis, name in zip(axes, VALUES, strict=True):
        ours = float(SETTINGS[name])
        points = {float(value): of for (setting, value), of in found.items() if setting == name}
        points |= {ours: found["recipe", "recipe"]} if ("recipe", "recipe") in found else {}
        x = sorted(points)
        for share, color in (("style", "#e4572e"), ("content", "#5c6b84")):
            axis.plot(x, [100 * points[value][share] for value in x], "o-", color=color, label=share)
        axis.axvline(ours, color="#cccccc", zorder=0)
        axis.set_xscale("log")
        axis.set_xticks(x, [f"{value:g}" for value in x], fontsize=8)
        axis.minorticks_off()
        axis.set_title(f"--{name}", fontsize=10, loc="left")
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("% of pictures")
    axes[0].set_ylim(0, 102)
    axes[0].legend(frameon=False)
    figure.savefig(file, dpi=150)


def show(runs: list[dict], file: Path | None) -> None:
    """Print the table of the runs, and draw the plot where a file for it is given."""
    print(f"\n{table(runs)}")
    if file:
        plot(runs, file)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add(
        "--miniature",
        type=Path,
        default=miniature.ASSETS,
        help="folder that train_miniature.py wrote [the project's]",
    )
    add("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of training and of the pictures [0, 1 and 2]")
    add("--pictures", type=int, default=200, help="for each seed, of scenes never trained on [%(default)s]")
    add("--guidance_scale", type=float, default=3, help="of the pictures [%(default)s]")
    settings = ["recipe", *VALUES, "technique"]
    what = f"of {', '.join(settings)} [all]"
    add("--only", nargs="+", choices=settings, default=settings, metavar="SETTING", help=what)
    add("--jobs", type=int, default=1, help="runs side by side, over all GPUs [%(default)s]")
    add("--plot", type=Path, help="a PNG or SVG file to draw")
    add("--show", type=Path, metavar="FILE", help="only the table, and the plot, of what is in such a file")
    add("--out", type=Path, default=ROOT / "benchmarks" / "results" / "ablation.json", help="added to [%(default)s]")
    add("--logs", type=Path, help="folder for the scripts' output [a temporary one]")
    add("--commit", help="of this project, where there is no git")
    args = parser.parse_args()
    if args.plot:
        load_pyplot()  # hours before it is needed
    if args.show:
        show(json.loads(args.show.read_text())["runs"], args.plot)
        return
    results = Results(args.out, args.commit, {})
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(args.jobs) as pool:
        work = Path(folder)
        world.write_style_set(work / "set", side_px=miniature.SIDE_PX)
        drawing = ["--num_pictures", str(args.pictures), "--guidance_scale", str(args.guidance_scale)]
        wanted, gpus = [case for case in cases() if case[0] in args.only], visible_gpus()
        # All cases with one seed before the next seed's, so that a command that is cut short has each of them.
        waiting: dict[Future, dict] = {}
        for seed in args.seeds:
            for setting, value, words in wanted:
                name = f"{setting}-{value}-{seed}".replace(" ", "_")
                made, logs = args.miniature.resolve(), args.logs or work
                gpu = gpus[len(waiting) % len(gpus)]
                future = pool.submit(measure, made, work, logs, name, words, seed, drawing, gpu)
                waiting[future] = {"setting": setting, "value": value, "seed": seed}
        try:
            for future in as_completed(waiting):
                results.keep(waiting[future], future.result())
                print(*waiting[future].values(), future.result(), flush=True)
        finally:
            pool.shutdown(cancel_futures=True)
    show(results.data["runs"], args.plot)


if __name__ == "__main__":
    exit_cleanly(main)
