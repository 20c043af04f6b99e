"""What train_step.py and memory.py found, as Markdown and as a plot.

python benchmarks/table.py RESULT.json... [--plot PLOT.svg]
"""

import argparse
import re
from collections.abc import Iterable
from pathlib import Path

from measure import outside_ms, read_results
from programs import exit_cleanly

from rasengan import UserError


def number(value: float | None, digits: int = 1, unit: str = "") -> str:
    return "-" if value is None else f"{value:,.{digits}f}{unit}"


def markdown(head: list[str], rows: Iterable[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def newest(runs: list[dict], has) -> dict:
    """Return the last of the runs that has something, or nothing."""
    return next((run for run in reversed(runs) if has(run)), {})


def ratio(peer: dict, ours: list[dict], read) -> str:
    """Return how many times ours a peer's figure is, from one command, or a dash."""
    mine = newest(ours, lambda run: run["invocation"] == peer.get("invocation") and read(run) is not None)
    return f"{read(peer) / read(mine):.1f} x" if mine and read(peer) is not None else "-"


def wall_ms(run: dict) -> float | None:
    """Return the wall time of a step, which only the difference of two whole runs gives."""
    return outside_ms(run["short"], run["long"]) if "short" in run and "long" in run else None


def inside_ms(run: dict) -> float | None:
    """Return the median step of the longest of an invocation's runs that has one."""
    medians = [run.get(name, {}).get("step_ms_median") for name in ("long", "short", "profile")]
    return next((median for median in medians if median is not None), None)


def busy_ms(run: dict) -> float | None:
    return run.get("profile", {}).get("gpu_busy_ms")


def grouped(runs: list[dict], *names: str) -> dict[tuple, list[dict]]:
    groups = {}
    for run in runs:
        groups.setdefault(tuple(run[name] for name in names), []).append(run)
    return groups


def commits_of(runs: Iterable[dict], invocations: list[dict]) -> str:
    """Return the commits at which these runs were measured, in short."""
    numbers = [run["invocation"] for run in runs if run]
    return ", ".join({invocations[number - 1]["commit"][:7]: None for number in sorted(numbers)})


def step_table(runs: list[dict], invocations: list[dict]) -> str:
    """Return a row for each variant that trained; ratios are to ours in the same command.

    A figure is the newest of its kind, so those of a row may be of several commits, which it names.
    """
    groups = grouped([run for run in runs if run["case"] != "start"], "case", "program", "variant")
    rows = []
    for (case, program, variant), group in groups.items():
        ours = [] if program == "ours" else [r for key, g in groups.items() if key[:2] == (case, "ours") for r in g]
        walled, busied = newest(group, wall_ms), newest(group, busy_ms)
        timed = newest(group, lambda run: "step_ms_median" in run.get("long", {}))
        timed = timed or newest(group, lambda run: inside_ms(run) is not None)
        parts = [part for part in timed.values() if isinstance(part, dict)]
        reserved_gib = max((part["peak_reserved_gib"] for part in parts if "peak_reserved_gib" in part), default=None)
        errors = [part["error"] for part in group[-1].values() if isinstance(part, dict) and "error" in part]
        rows.append(
            [
                f"{case}, {program}, {variant}{': ' * bool(errors)}{' '.join(errors)}",
                number(wall_ms(walled)),
                ratio(walled, ours, wall_ms),
                number(wall_ms(walled) / int(re.search(r" b(\d+)", case)[1]) if walled else None),
                number(inside_ms(timed)),
                ratio(timed, ours, inside_ms),
                number(busy_ms(busied)),
                ratio(busied, ours, busy_ms),
                number(busied.get("profile", {}).get("kernels"), 0),
                number(reserved_gib, 2),
                commits_of((walled, timed, busied), invocations),
            ]
        )
    head = [
        "case",
        "wall ms/step",
        "to ours",
        "wall ms/image",
        "inside, median ms",
        "to ours",
        "GPU busy ms",
        "to ours",
    ]
    return markdown([*head, "kernels", "peak reserved GiB", "commits"], rows)


def start_table(runs: list[dict], invocations: list[dict]) -> str:
    """Return a row for each start that was measured."""
    rows = [
        [
            run["program"],
            run["variant"],
            f"failed: {run.get('error', '')}"
            if run["exit_code"]
            else number(run["first_step_s"] if run["program"] == "ours" else run["wall_s"]),
            commits_of([run], invocations),
        ]
        for run in runs
        if run["case"] == "start"
    ]
    return markdown(["program", "start", "s to the first step", "commit"], rows) if rows else ""


def memory_table(runs: list[dict]) -> str:
    rows = []
    for (setting, program), group in grouped(runs, "setting", "program").items():
        run = group[-1]
        state = "" if run["exit_code"] == 0 else f": {run.get('error', 'failed')}"
        rows.append(
            [
                f"{setting}, {program}{state}",
                number(run.get("peak_reserved_gib"), 2),
                number(run.get("peak_allocated_gib"), 2),
                number(run.get("loop_peak_reserved_gib"), 2),
                number(run.get("host_peak_anonymous_gib"), 2),
                number(run.get("host_peak_rss_gib"), 2),
            ]
        )
    head = ["setting", "peak reserved GiB", "peak allocated GiB", "reserved from the first step on"]
    return markdown([*head, "host RssAnon GiB", "host RSS GiB"], rows)


def load_pyplot():
    """Return the plotting library, for files alone.

    Raises:
        UserError: it is missing.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise UserError("--plot needs matplotlib: `pip install -e '.[benchmarks]'`.") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def plot(results: list[dict], file: Path) -> None:
    """Draw the time of a step, of the latest command that compared the most programs in each case, as PNG or SVG.

    Raises:
        UserError: matplotlib is missing, or nothing was timed.
    """
    pyplot = load_pyplot()
    runs = [run for result in results for run in result["runs"] if "case" in run and inside_ms(run) is not None]
    cases = {}

    def worth(group):  # programs first, then long runs, whose median is of many steps
        return len({run["program"] for run in group}), any("step_ms_median" in run.get("long", {}) for run in group)

    for (case, _), group in grouped(runs, "case", "invocation").items():
        if worth(group) >= worth(cases.get(case, [])):
            cases[case] = group
    if not cases:
        raise UserError("--plot has nothing to draw: no result holds a step's time.")
    colors = {"ours": "#e4572e", "diffusers": "#8d99ae", "sd-scripts": "#5c6b84"}
    rows = sum(map(len, cases.values()))
    figure, axes = pyplot.subplots(
        len(cases),
        squeeze=False,
        figsize=(8, 0.9 * len(cases) + 0.4 * rows),
        layout="constrained",
        height_ratios=[len(group) + 1 for group in cases.values()],
    )
    for axis, (case, group) in zip(axes[:, 0], cases.items(), strict=True):
        group = sorted(group, key=inside_ms, reverse=True)
        labels = [f"{run['program']}: {run['variant']}" for run in group]
        drawn = axis.barh(labels, [inside_ms(run) for run in group], color=[colors[run["program"]] for run in group])
        axis.bar_label(drawn, fmt="{:,.0f}", padding=3)
        axis.set_title(f"{case}: ms for a step on one {results[0]['device']}", loc="left", fontsize=10)
        axis.spines[["top", "right"]].set_visible(False)
        axis.margins(x=0.12)
    figure.savefig(file, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, nargs="+", help="what train_step.py or memory.py wrote")
    parser.add_argument("--plot", type=Path, help="a PNG or SVG file to draw")
    args = parser.parse_args()
    results = [read_results(file) for file in args.results]
    if args.plot and not (args.plot.suffix in {".png", ".svg"} and args.plot.parent.is_dir()):
        raise UserError(f"--plot {args.plot} is no .png or .svg file in a folder that is there.")
    for file, result in zip(args.results, results, strict=True):
        versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
        invocations = result["invocations"]
        commits = ", ".join({invocation["commit"][:10]: None for invocation in invocations})
        print(f"{result['device']}; {versions}; commit {commits}\n")
        steps = [run for run in result["runs"] if {"case", "program", "variant"} <= run.keys()]
        memory = [run for run in result["runs"] if {"setting", "program"} <= run.keys()]
        if not steps and not memory:
            raise UserError(f"{file} holds nothing that train_step.py or memory.py found.")
        of_steps = [step_table(steps, invocations), start_table(steps, invocations)] if steps else []
        for table in (*of_steps, memory_table(memory) if memory else ""):
            if table:
                print(table, end="\n\n")
    if args.plot:
        plot(results, args.plot)


if __name__ == "__main__":
    exit_cleanly(main)
