"""An evaluation as text for the terminal, for TensorBoard, and as a page that holds its pictures itself."""

import html
import json
import math
import os
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from torch.utils.tensorboard import SummaryWriter

from rasengan import pages, printable
from rasengan.evaluation import Drawn
from rasengan.files import remove_left_behind, write_atomically
from rasengan.loss_chart import chart, labels_of
from rasengan.loss_comparison import KINDS, signed
from rasengan.validation_loss import LOSS


EVENTS = "events.out.tfevents."  # what TensorBoard's files begin with
FEW_PICTURES = 100  # under which chance weighs much in KID and CMMD
MOST_PAIRS, MOST_HELD_OUT = 48, 200


class Table(NamedTuple):
    """Figures in rows, each with a label before them."""

    title: str
    columns: list[str]
    rows: list[list[str]]


class Pair(NamedTuple):
    """What base and tuned model drew for a prompt, as JPEGs."""

    drawn: Drawn
    base: bytes
    tuned: bytes


# --- tables and sentences ---


def tables(figures: dict) -> list[Table]:
    """Return the figures of an evaluation as tables, but for those of the curve."""
    loss = figures["loss"]
    found = [_loss_table("held-out", loss["held_out"])]
    if loss["trained"]:
        found.append(_loss_table("trained-on", loss["trained"]))
    for name, make in (("judge", _judge_table), ("clip", _clip_table)):
        if scores := figures.get("pictures", {}).get(name):
            found.append(make(scores))
    return found


def _curve_table(points: list[dict]) -> Table:
    rows = [
        [f"{p['step']:,}" if p["step"] else "base", *(_loss(p[name]) for name in labels_of(points))] for p in points
    ]
    return Table("Loss by step", ["step", *labels_of(points).values()], rows)


def _loss_table(what: str, compared: dict) -> Table:
    rows = []
    for name, base in compared["base"].items():
        tuned = compared["tuned"][name]
        label = "all timesteps" if name == LOSS else name.removeprefix(f"{LOSS}/t")
        text = signed(tuned / base - 1)
        if name == LOSS and math.isfinite(compared["error"]):
            text += f" ± {100 * compared['error']:.1f}"
        rows.append([label, _loss(base), _loss(tuned), text])
    count = compared["pictures"]
    return Table(f"Loss of {count:,} {what} picture{'s' * (count != 1)}", ["", *KINDS, "change"], rows)


def _judge_table(scores: dict) -> Table:
    base, tuned = scores["base"], scores["tuned"]
    labels = {"style": "in the style", "content": "with the content"}
    rows = [[labels.get(name, name), _share(base["mean"][name]), _share(tuned["mean"][name])] for name in base["mean"]]
    if len(base["seeds"]) > 1:
        for name, label in labels.items():
            pairs = zip(base["seeds"].items(), tuned["seeds"].values(), strict=True)
            rows += [[f"{label}, seed {seed}", _share(b[name]), _share(t[name])] for (seed, b), t in pairs]
    rows.insert(2, ["content kept", "", _share(scores["content_kept"])])
    return Table("What the judge finds", ["", *KINDS], rows)


def _clip_table(scores: dict) -> Table:
    rows = [["CLIP score (with the prompt; higher is nearer)", *(f"{scores[kind]['score']:.2f}" for kind in KINDS)]]
    if scores["reference_pictures"]:
        text = f"CMMD (to {scores['reference_pictures']:,} of the data; lower is nearer)"
        rows.append([text, *(f"{scores[kind]['cmmd']:.3f}" for kind in KINDS)])
        if all("kid" in scores[kind] for kind in KINDS):
            text = "KID x 1000 (likewise, by CLIP's embeddings; ± over subsets)"
            rows.append([text, *(_kid(scores[kind]) for kind in KINDS)])
    return Table("By CLIP", ["", *KINDS], rows)


def _kid(scores: dict) -> str:
    deviation = scores["kid_std"]
    return f"{1000 * scores['kid']:.3f}" + (f" ± {1000 * deviation:.3f}" if math.isfinite(deviation) else "")


def _loss(value: float) -> str:
    return f"{value:.4f}" if math.isfinite(value) else "-"


def _share(value: float) -> str:
    return f"{100 * value:.1f} %" if math.isfinite(value) else "-"


def sentences(figures: dict) -> list[str]:
    """Return what there is to say beside the figures."""
    loss = figures["loss"]
    compared, error = loss["held_out"], loss["held_out"]["error"]
    said = f"On held-out pictures the loss changes by {signed(compared['change'])}"
    if not math.isfinite(compared["change"]):
        said = "The tuned model's loss is not finite"
    elif math.isfinite(error) and abs(compared["change"]) <= 2 * error:
        said += ", which so few pictures do not tell from chance"
    elif compared["pictures"] == 1:
        said += ", which a single picture does not tell from chance"
    if loss["trained"]:
        said += f", on pictures trained on by {signed(loss['trained']['change'])}"
    verdict = [loss["curve"]["verdict"]] if loss["curve"] else []
    return [f"{said}.", *verdict, *_few_scored(figures["pictures"]), *figures["notes"]]


def _few_scored(pictures: dict) -> list[str]:
    clip, drawn = pictures.get("clip"), pictures["count"]
    if not clip or min(drawn, clip["reference_pictures"]) >= FEW_PICTURES:
        return []
    return [
        f"KID and CMMD are of {drawn:,} pictures and {clip['reference_pictures']:,} of the data: of fewer than "
        f"{FEW_PICTURES}, chance weighs much in both, and CMMD is the larger the fewer there are."
    ]


# --- text ---


def as_text(figures: dict) -> str:
    """Return the evaluation for a terminal."""
    parts, curve = [], figures["loss"]["curve"]
    for table in tables(figures) + ([_curve_table(curve["points"])] if curve else []):
        rows = [[table.title, *table.columns[1:]], *([f"  {row[0]}", *row[1:]] for row in table.rows)]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        starts = [f"{row[0]:{widths[0]}}" for row in rows]
        ends = [[f"{text:>{width}}" for text, width in zip(row, widths, strict=True)][1:] for row in rows]
        lines = ["  ".join([start, *end]) for start, end in zip(starts, ends, strict=True)]
        parts.append("\n".join(line.rstrip() for line in lines))
    return "\n\n".join([*parts, "\n".join(map(printable, sentences(figures)))])


# --- TensorBoard ---


def write_scalars(folder: Path, figures: dict, step: int) -> None:
    """Write the figures for TensorBoard, in place of those in the folder; those of no curve are of `step`."""
    temporary = folder.with_name(f".{folder.name}.{uuid.uuid4().hex}")
    with SummaryWriter(str(temporary)) as writer:
        for name, (value, at) in _scalars(figures, step):
            writer.add_scalar(f"evaluation/{name}", value, at)
    folder.mkdir(exist_ok=True)
    old = [*folder.glob(f"{EVENTS}*")]  # what else lies there is somebody's
    for file in temporary.iterdir():
        os.replace(file, folder / file.name)
    temporary.rmdir()
    for file in old:
        file.unlink()


def _scalars(figures: dict, step: int) -> Iterator[tuple[str, tuple[float, int]]]:
    loss = figures["loss"]
    points = loss["curve"]["points"] if loss["curve"] else []
    for name, plot in (("held_out", LOSS), ("trained", "trained_loss")):
        if loss[name]:
            by_step = {step: loss[name]["tuned"][LOSS]} | {point["step"]: point[name] for point in points}
            for at, value in by_step.items():
                yield f"{plot}/base", (loss[name]["base"][LOSS], at)
                yield f"{plot}/tuned", (value, at)
    judge, clip = (figures["pictures"].get(name) for name in ("judge", "clip"))
    for kind in KINDS:
        shares = {f"{name}_score": judge[kind]["mean"][name] for name in ("style", "content")} if judge else {}
        near = (
            {"clip_score": clip[kind]["score"]} | {n: clip[kind][n] for n in ("cmmd", "kid") if n in clip[kind]}
            if clip
            else {}
        )
        for name, value in (shares | near).items():
            yield f"{name}/{kind}", (value, step)


# --- page ---


def as_page(figures: dict, pairs: list[Pair], thumbnails: list[bytes]) -> str:
    """Return the evaluation as HTML.

    Args:
        figures: all of them.
        pairs: of pictures to show; some, evenly spread, where they are many.
        thumbnails: JPEGs of the held-out pictures, in the order of the figures, for as many as are to be shown.
    """
    settings = {name: printable(str(value)) for name, value in figures["settings"].items() if value is not None}
    said = "".join(f"<p>{html.escape(printable(text)).replace(' %', '&nbsp;%')}</p>" for text in sentences(figures))
    body, curve = [], figures["loss"]["curve"]
    if curve:
        as_table = f"<details><summary>As a table</summary>{_rows(_curve_table(curve['points']))}</details>"
        body.append(f"<h2>Loss by step</h2>{chart(curve)}{as_table}")
    sections = (f"<section><h2>{html.escape(table.title)}</h2>{_rows(table)}</section>" for table in tables(figures))
    body.append(f'<div class="side">{"".join(sections)}</div>')
    if pairs:
        body.append(f"<h2>{len(pairs):,} of {figures['pictures']['count']:,} pictures: base, tuned</h2>")
        body.append(f'<div class="pairs">{"".join(map(_pair, pairs))}</div>')
    each = figures["loss"]["pictures"]
    shown = list(zip(each, thumbnails, strict=False))
    body.append(f"<h2>{len(shown):,} of {len(each):,} held-out pictures, the most improved first</h2>")
    body.append(f'<div class="sheet">{"".join(_picture(*item) for item in shown)}</div>')
    body.append(f"<h2>Settings</h2>{pages.table(settings)}")
    return pages.document("Evaluation", said, "\n".join(body))


def _rows(table: Table) -> str:
    head = "".join(f"<th>{html.escape(text)}</th>" for text in table.columns)
    rows = "".join(f"<tr>{''.join(f'<td>{html.escape(text)}</td>' for text in row)}</tr>" for row in table.rows)
    return f'<div class="scroll"><table class="figures"><tr>{head}</tr>{rows}</table></div>'


def _pair(pair: Pair) -> str:
    prompt = printable(pair.drawn.prompt)
    images = "".join(
        pages.image(jpeg, f"{kind}: {prompt}") for kind, jpeg in zip(KINDS, (pair.base, pair.tuned), strict=True)
    )
    title = f'<small>seed {pair.drawn.seed}</small><p dir="auto">{html.escape(prompt)}</p>'
    return f'<figure><div class="pair">{images}</div><figcaption>{title}</figcaption></figure>'


def _picture(about: dict, jpeg: bytes) -> str:
    name = printable(about["name"].replace("\\", "/").rpartition("/")[2])
    kind = "good" if about["change"] < 0 else "bad"
    change = f'<b class="{kind}">{signed(about["change"]).replace(" ", "&nbsp;")}</b>'
    losses = f"{_loss(about['base'])} → {_loss(about['tuned'])} {change}"
    captions = "".join(f'<p dir="auto">{html.escape(printable(text)) or "(empty)"}</p>' for text in about["captions"])
    title = f"{losses}<small><bdi>{html.escape(name)}</bdi></small>"
    return f"<figure>{pages.image(jpeg, name)}<figcaption>{title}{captions}</figcaption></figure>"


# --- all of it ---


def write_report(output_dir: Path, figures: dict, pairs: list[Pair], thumbnails: list[bytes]) -> None:
    """Write the figures as a page, for TensorBoard and as JSON; the arguments are those of `as_page`."""
    output_dir.mkdir(parents=True, exist_ok=True)
    remove_left_behind(output_dir)
    write_atomically(output_dir / "evaluation.html", as_page(figures, pairs, thumbnails).encode())
    write_scalars(output_dir / "tensorboard", figures, figures["step"] or 0)
    content = json.dumps(as_json(figures), indent=1, allow_nan=False)
    write_atomically(output_dir / "evaluation.json", content.encode())  # last: where it is, the rest is


def as_json(value: object) -> object:
    """Return a value with None in place of what is not finite, which JSON has no word for."""
    if isinstance(value, dict):
        return {str(name): as_json(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [as_json(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
