"""The losses of a run by step, as a chart: SVG that stands in a page."""

import html
import math


WIDTH, HEIGHT = 400, 240  # of the chart, in its own units
LEFT, RIGHT, TOP, BOTTOM = 50, 14, 14, 40  # its margins


def labels_of(points: list[dict]) -> dict[str, str]:
    """Return the names of a curve's losses with their labels: that of pictures trained on where these are known."""
    has_trained = any(math.isfinite(point["trained"]) for point in points)
    return {"held_out": "held out"} | ({"trained": "trained on"} if has_trained else {})


def chart(curve: dict) -> str:
    """Return the losses by step as SVG, with the base's as a dashed line; what is not finite is left out.

    Args:
        curve: as `loss_comparison.curve` returns it.
    """
    points, kinds = curve["points"], {"held_out": "first", "trained": "second"}
    series = {name: (kinds[name], label) for name, label in labels_of(points).items()}
    values = [point[name] for point in points for name in series if math.isfinite(point[name])]
    if not values:
        return "<p>No loss is finite.</p>"
    levels, steps = _ticks(min(values), max(values), 1e-6), _ticks(0, points[-1]["step"], 1)
    low, high, last = levels[0], levels[-1], steps[-1]

    def place(step: float, value: float) -> tuple[float, float]:
        across = LEFT + (WIDTH - LEFT - RIGHT) * step / last
        return across, TOP + (HEIGHT - TOP - BOTTOM) * (high - value) / (high - low)

    parts, digits = [], max(0, math.ceil(-math.log10(levels[1] - levels[0]) - 1e-9))
    for value in levels:
        x, y = place(0, value)
        parts.append(f'<line class="axis" x1="{x}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{x - 8}" y="{y + 4:.1f}" text-anchor="end">{value:.{digits}f}</text>')
    for step in steps:
        parts.append(f'<text x="{place(step, low)[0]:.1f}" y="{HEIGHT - 22}" text-anchor="middle">{step:,.0f}</text>')
    for name, (kind, _) in series.items():
        found = [(point["step"], point[name]) for point in points if math.isfinite(point[name])]
        if found and found[0][0] == 0:
            y = place(0, found[0][1])[1]
            parts.append(f'<line class="{kind} base" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        line = " ".join(f"{x:.1f},{y:.1f}" for x, y in (place(*item) for item in found))
        parts.append(f'<polyline class="line {kind}" points="{line}"/>')
        for step, value in found:
            radius = 5 if name == "held_out" and step == curve["lowest_step"] else 2.5
            x, y = place(step, value)
            title = f"<title>step {step:,}: {value:.4f}</title>"
            parts.append(f'<circle class="{kind}" cx="{x:.1f}" cy="{y:.1f}" r="{radius}">{title}</circle>')
    for x, (kind, label) in zip((LEFT, LEFT + 74), series.values(), strict=False):
        parts.append(f'<text class="{kind}" x="{x}" y="{HEIGHT - 4}">● {label}</text>')
    parts.append(f'<text x="{WIDTH - RIGHT}" y="{HEIGHT - 4}" text-anchor="end">steps; dashed: base</text>')
    text = html.escape(curve["verdict"])
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{text}">{"".join(parts)}</svg>'


def _ticks(low: float, high: float, least: float) -> list[float]:
    """Return up to seven round numbers at equal distances, `least` or more, around a range."""
    span = max((high - low) / 5, least)
    size = 10 ** math.floor(math.log10(span))
    step = next(size * n for n in (1, 2, 5, 10) if size * n >= span * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [number * step for number in range(first, max(last, first + 1) + 1)]
