"""Pages that hold everything themselves: they can be sent, and opened anywhere."""

import base64
import html
import io

from PIL import Image


PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark"><title>{title}</title><style>
:root {{ color-scheme: light dark; --ink: #222; --soft: #666; --line: #ddd; --ground: #fff; --card: #f5f5f3;
  --bar: #9db8d9; --bad: #a33; --good: #2f6b45; --first: #2a6ebb; --second: #c2621b }}
@media (prefers-color-scheme: dark) {{ :root {{ --ink: #ddd; --soft: #999; --line: #3a3a3a; --ground: #181818;
  --card: #222; --bar: #46648a; --bad: #f0908a; --good: #84c79b; --first: #77b0f0; --second: #efa263 }} }}
* {{ box-sizing: border-box }}
body {{ font: 15px/1.5 system-ui, sans-serif; margin: 0 auto; padding: 1.5rem; max-width: 76rem;
  color: var(--ink); background: var(--ground); overflow-wrap: anywhere }}
h1 {{ font-size: 1.5rem; margin: 0 }}
h2 {{ font-size: 1.05rem; margin: 2rem 0 .6rem }}
header p {{ margin: .2rem 0; color: var(--soft) }}
header p.refusal {{ color: var(--bad) }}
.side {{ display: grid; grid-template-columns: repeat(auto-fit, minmax(min(22rem, 100%), 1fr)); gap: 0 2.5rem }}
table {{ border-collapse: collapse; width: 100%; max-width: 76rem }}
td {{ padding: .25rem 0; vertical-align: top; border-bottom: 1px solid var(--line) }}
td:first-child {{ padding-right: 1rem; color: var(--soft); width: 42% }}
table.bars td:nth-child(2) {{ width: 4rem; padding-right: 1rem; text-align: right }}
.bar {{ height: .7rem; margin-top: .4rem; background: var(--bar); border-radius: 2px }}
.findings {{ display: grid; grid-template-columns: repeat(auto-fit, minmax(min(27rem, 100%), 1fr)); gap: .7rem }}
.finding {{ background: var(--card); border-radius: 6px; padding: .7rem 1rem }}
.finding p {{ margin: 0 }} .finding p + p, summary {{ color: var(--soft) }}
code {{ white-space: nowrap }}
summary {{ cursor: pointer }} .finding ul {{ margin: .3rem 0 0; padding-left: 1.2rem }}
.sheet {{ display: grid; grid-template-columns: repeat(auto-fill, minmax(9.5rem, 1fr)); gap: 1.2rem .9rem }}
figure {{ margin: 0; min-width: 0 }}
img {{ display: block; width: 100%; height: auto; border-radius: 3px; outline: 1px solid var(--line) }}
figcaption {{ font-size: .82rem; line-height: 1.35; margin-top: .35rem; max-height: 8rem; overflow: auto }}
figcaption small {{ display: block; color: var(--soft) }}
figcaption p {{ margin: .1rem 0 0 }}
.scroll {{ overflow-x: auto }}
table.figures td, table.figures th {{ text-align: right; padding: .25rem 0 .25rem 1rem; white-space: nowrap;
  border-bottom: 1px solid var(--line); font-variant-numeric: tabular-nums }}
table.figures th {{ font-weight: normal; color: var(--soft) }}
table.figures td:first-child, table.figures th:first-child {{ text-align: left; padding-left: 0; width: auto;
  white-space: normal }}
.good {{ color: var(--good) }} .bad {{ color: var(--bad) }}
.pairs {{ display: grid; grid-template-columns: repeat(auto-fill, minmax(min(19rem, 100%), 1fr)); gap: 1.4rem }}
.pair {{ display: grid; grid-template-columns: 1fr 1fr; gap: .3rem }}
body:has(.row) {{ max-width: none }}
.row {{ display: grid; gap: .75rem; overflow-x: auto; grid-template-columns:
  repeat(var(--columns), minmax(clamp(6rem, var(--width), 16rem), max(6rem, var(--width)))) }}
.row img {{ width: auto; max-width: 100%; margin: 0 auto }} .row figcaption {{ text-align: center }}
svg {{ display: block; width: 100%; max-width: 32rem; height: auto; font: 12px system-ui, sans-serif }}
svg text {{ fill: var(--soft) }} svg .axis {{ stroke: var(--line) }}
svg .line {{ fill: none; stroke-width: 2 }} svg .base {{ stroke: var(--soft); stroke-dasharray: 4 4 }}
svg .first {{ stroke: var(--first) }} svg .second {{ stroke: var(--second) }}
svg circle.first, svg text.first {{ fill: var(--first); stroke: none }}
svg circle.second, svg text.second {{ fill: var(--second); stroke: none }}
</style></head><body>
<header><h1>{title}</h1>{header}</header>
{body}
</body></html>
"""


def document(title: str, header: str, body: str) -> str:
    """Return a page, for light and dark screens of any width.

    Args:
        title: plain text.
        header: HTML below the title.
        body: HTML.
    """
    return PAGE.format(title=html.escape(title), header=header, body=body)


def table(rows: dict[str, str]) -> str:
    """Return a table of names and values, both plain text."""
    cells = (f"<tr><td>{html.escape(name)}</td><td>{html.escape(value)}</td></tr>" for name, value in rows.items())
    return f"<table>{''.join(cells)}</table>"


def as_jpeg(image: Image.Image, most_px: int = 256, quality: int = 85) -> bytes:
    """Return a JPEG of the picture, at most `most_px` a side."""
    small, file = image.convert("RGB"), io.BytesIO()
    small.thumbnail((most_px, most_px), Image.Resampling.LANCZOS)
    small.save(file, "JPEG", quality=quality)
    return file.getvalue()


def image(jpeg: bytes, text: str) -> str:
    """Return a picture that the page holds; `text` is plain, for those who do not see it."""
    width, height = Image.open(io.BytesIO(jpeg)).size
    source = f"data:image/jpeg;base64,{base64.b64encode(jpeg).decode()}"
    return f'<img loading="lazy" src="{source}" alt="{html.escape(text)}" width="{width}" height="{height}">'
