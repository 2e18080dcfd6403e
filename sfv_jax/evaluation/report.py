"""Reports as files: `scores.json`, `scores.md` and `index.html`, one page that opens from disk without a network.

report = Report("SF-V against SVD")
report.table("Scores", ["method", "FVD ↓"], [["SF-V", 180.9], ["SVD", 153.4]], notes=["N = 2048."])
report.lines("Detail over time", {"SF-V": [1.0, 0.9], "SVD": [1.0, 1.0]}, "frame", "share kept")
report.clips("Side by side", {"dog": {"SF-V": frames, "SVD": frames}}, fps=7)
report.record = {"seed": 0}
report.write("out")
"""

import base64
import html
import json
import math
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from sfv_jax.data.images import fitted
from sfv_jax.data.video import write_video
from sfv_jax.runtime.files import in_markdown, one_line, replacing

COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000", "#999999")
CLIP_HEIGHT = 240, 96  # pixels: taller clips are shrunk, smaller ones enlarged by whole factors
UP, DOWN = "↑", "↓"  # at the end of a column's title: larger, or smaller, is better
IDENTICAL = "identical"  # an infinite PSNR


@dataclass(frozen=True)
class Spread:
    """A cell with mean and standard deviation."""

    mean: float
    std: float


Cell = str | float | int | Spread | None
_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; margin: 2em auto; padding: 0 1em; max-width: 1500px }
h1, h2 { line-height: 1.2 } table { border-collapse: collapse; margin: 1em 0 } .wide { overflow-x: auto }
td, th { padding: .25em .5em; border-bottom: 1px solid #ddd; text-align: right }
th { vertical-align: bottom } td:first-child, th:first-child { text-align: left }
.notes { color: #555; font-size: 13px; max-width: 75em }
.plots { display: flex; flex-wrap: wrap; gap: 1em } .clips td, .clips th { text-align: center; padding: 2px }
.clips { table-layout: fixed; width: 100% } 
.clips th { overflow-wrap: anywhere } .clips th:first-child { width: 7em; vertical-align: middle }
.clips video, .clips img { display: block; width: 100% } .clips video { cursor: pointer }
.small { width: auto } .small td, .small th { width: 108px } .small video, .small img { image-rendering: pixelated }
button { font: inherit; padding: .3em 1em }
"""
_SCRIPT = """
const all = () => [...document.querySelectorAll('video')];
const restart = () => all().forEach(v => { v.currentTime = 0; v.play(); });
const toggle = some => { const paused = some.every(v => v.paused); some.forEach(v => paused ? v.play() : v.pause()); };
const toggleAll = () => toggle(all());
const step = () => all().forEach(v => { v.pause(); v.currentTime = (v.currentTime + 1 / v.dataset.fps) % v.duration; });
"""


@dataclass
class Report:
    """Tables, plots and clips in the order of their addition.

    Attributes:
      title: the title.
      record: content of the JSON file: the scores and everything that determined them.
      missing: one line for each file that was to be scored and could not be read.
      headline: the first table as text for the terminal.
    """

    title: str
    record: dict = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)
    headline: str = ""
    _html: list[str] = field(default_factory=list)
    _markdown: list[str] = field(default_factory=list)

    def text(self, title: str, lines: list[str]) -> None:
        """Adds a heading and a list of sentences."""
        self._html.append(f"<h2>{in_html(title)}</h2><ul>{''.join(f'<li>{in_html(x)}</li>' for x in lines)}</ul>")
        self._markdown.append(f"## {in_markdown(title)}\n\n" + "\n".join(f"- {in_markdown(x)}" for x in lines))

    def table(self, title: str, columns: list[str], rows: Sequence[Sequence[Cell]], notes: Sequence[str] = ()) -> None:
        """Adds rows of text and numbers under `columns`, and `notes` below; None leaves a cell empty.

        In columns whose titles end with an arrow, the best cell is marked.
        """
        self.headline = self.headline or text_table(columns, rows)
        self._html.append(f"<h2>{in_html(title)}</h2>{html_table(columns, rows)}{_notes(notes)}")
        parts = [f"## {in_markdown(title)}", markdown_table(columns, rows), *map(in_markdown, notes)]
        self._markdown.append("\n\n".join(parts))

    def lines(self, title: str, series: dict[str, list[float]], x: str, y: str) -> None:
        """Adds a plot to the page: a line for each of `series`, x counting from 0."""
        self._plot(line_plot(title, series, x, y))

    def dots(self, title: str, series: dict[str, list[float]], x: str) -> None:
        """Adds a plot to the page: a row of dots for each of `series`, with a bar at its mean."""
        self._plot(dot_plot(title, series, x))

    def clips(self, title: str, clips: dict[str, dict[str, np.ndarray]], fps: float) -> None:
        """Adds clips, `{row: {column: uint8 [t, h, w, 3]}}`, to the page, embedded as H.264; a single frame as PNG."""
        self._html.append(f"<h2>{in_html(title)}</h2>{html_clips(clips, fps)}")

    def write(self, folder: str | Path) -> None:
        """Writes `scores.json`, `scores.md` and `index.html` in `folder`, each complete or not at all."""
        folder = Path(folder)
        files = {
            "scores.json": json.dumps(_plain(self.record), indent=1, allow_nan=False) + "\n",
            "scores.md": "\n\n".join([f"# {in_markdown(self.title)}", *self._markdown]) + "\n",
            "index.html": self.page(),
        }
        for name, content in files.items():
            with replacing(folder / name) as temporary:
                temporary.write_text(content, encoding="utf-8")

    def page(self) -> str:
        """Returns the HTML page."""
        head = f'<meta charset="utf-8"><title>{in_html(self.title)}</title><style>{_STYLE}</style>'
        body = f"<h1>{in_html(self.title)}</h1>{''.join(self._html)}<script>{_SCRIPT}</script>"
        return f'<!doctype html><html lang="en"><head>{head}</head><body>{body}</body></html>\n'

    def _plot(self, svg: str) -> None:
        """Adds a plot; consecutive plots are placed side by side."""
        if self._html and self._html[-1].endswith("</svg></div>"):
            self._html[-1] = self._html[-1].removesuffix("</div>") + svg + "</div>"
        else:
            self._html.append(f'<div class="plots">{svg}</div>')


def in_html(text: str) -> str:
    """Returns text as one line of HTML that shows it."""
    return html.escape(one_line(text))


def number(value: Cell) -> str:
    """Formats a cell: three significant digits, all digits of larger numbers; nothing for None, NaN and -inf."""
    if isinstance(value, float | np.floating):
        if not math.isfinite(value):
            return "inf" if value > 0 else ""
        return f"{value:.0f}" if 999.5 <= abs(value) < 1e15 else f"{value:#.3g}".rstrip(".")
    if isinstance(value, Spread):
        return f"{number(value.mean)} ({number(value.std)})" if number(value.mean) else ""
    return "" if value is None else f"{value}"


def interval(ends: tuple[float, float]) -> str:
    """Formats the cell of an interval."""
    return " to ".join(map(number, ends))


def _value(cell: Cell) -> float:
    """Returns the number to compare of a cell; NaN if it has none."""
    if cell == IDENTICAL:
        return math.inf
    cell = cell.mean if isinstance(cell, Spread) else cell
    return float(cell) if isinstance(cell, int | float | np.number) else math.nan


def _texts(columns: list[str], rows: Sequence[Sequence[Cell]], mark: Callable[[str], str]) -> list[list[str]]:
    """Returns the cells as text, with `mark` applied to the best of each column with an arrow, if they differ."""
    texts = [[number(cell) for cell in row] for row in rows]
    for n, title in enumerate(columns):
        values = [_value(row[n]) for row in rows]
        known = [value for value in values if not math.isnan(value)]
        if len(set(known)) > 1 and title.endswith((UP, DOWN)):
            best = max(known) if title.endswith(UP) else min(known)
            for row, value in zip(texts, values, strict=True):
                row[n] = mark(row[n]) if value == best else row[n]
    return texts


def text_table(columns: list[str], rows: Sequence[Sequence[Cell]], width: int | None = None) -> str:
    """Returns a table for the terminal; a star marks the best cell of a column.

    Args:
      columns, rows: the table.
      width: characters of a line, by default the terminal's; a table that is wider is turned, one line per column.
    """
    width = width or shutil.get_terminal_size((120, 24)).columns
    lines = [columns, *([one_line(cell) for cell in row] for row in _texts(columns, rows, "*{}".format))]
    plain, turned = _aligned(lines), _aligned([list(line) for line in zip(*lines, strict=True)])
    return "\n".join(plain if max(map(len, plain)) <= max(width, *map(len, turned)) else turned)


def _aligned(lines: list[list[str]]) -> list[str]:
    """Returns lines of text in columns, all but the first aligned to the right."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    align = lambda n, cell: cell.rjust(widths[n]) if n else cell.ljust(widths[n])  # noqa: E731
    return ["  ".join(align(n, cell) for n, cell in enumerate(line)).rstrip() for line in lines]


def markdown_table(columns: list[str], rows: Sequence[Sequence[Cell]]) -> str:
    """Returns a Markdown table, all columns but the first aligned to the right."""
    lines = ["| " + " | ".join(map(in_markdown, columns)) + " |", "| --- |" + " ---: |" * (len(columns) - 1)]
    safe = [[in_markdown(x) if isinstance(x, str) else x for x in row] for row in rows]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in _texts(columns, safe, "**{}**".format)])


def html_table(columns: list[str], rows: Sequence[Sequence[Cell]]) -> str:
    """Returns an HTML table."""
    head = "".join(f"<th>{_breakable(name)}</th>" for name in columns)
    safe = [[_breakable(x) if isinstance(x, str) and x != IDENTICAL else x for x in row] for row in rows]
    texts = _texts(columns, safe, "<b>{}</b>".format)
    body = "".join("<tr>" + "".join(f"<td>{x}</td>" for x in row) + "</tr>" for row in texts)
    return f'<div class="wide"><table><tr>{head}</tr>{body}</table></div>'


def _breakable(text: str) -> str:
    """Returns HTML of a text that may be broken after underscores and slashes, but not before an arrow."""
    text = re.sub(f" (?=[{UP}{DOWN}]$)", "\u00a0", in_html(text))
    return re.sub("([_/])", r"\1<wbr>", text)


def html_clips(clips: dict[str, dict[str, np.ndarray]], fps: float) -> str:
    """Returns an HTML table of embedded playable clips; see `Report.clips`."""
    columns = list(dict.fromkeys(name for row in clips.values() for name in row))
    lines = ["<tr><th></th>" + "".join(f"<th>{_breakable(name)}</th>" for name in columns) + "</tr>"]
    for name, row in clips.items():
        cells = "".join(f"<td>{_picture(row[c], fps) if c in row else ''}</td>" for c in columns)
        lines.append(f"<tr><th>{_breakable(name)}</th>{cells}</tr>")
    small = any(x.shape[1] < CLIP_HEIGHT[1] for row in clips.values() for x in row.values())
    calls = {"all from the start": "restart()", "play or pause": "toggleAll()", "next frame": "step()"}
    buttons = " ".join(f'<button onclick="{call}">{name}</button>' for name, call in calls.items())
    table = f'<table class="clips{" small" if small else ""}">{"".join(lines)}</table>'
    return f'{buttons}<div class="wide">{table}</div>'


def _picture(frames: np.ndarray, fps: float) -> str:
    """Returns a video without controls, which would cover a small one (a click plays or pauses it), or an image."""
    t, h, w, _ = frames.shape
    tall, least = CLIP_HEIGHT
    if h > tall:
        frames = fitted(frames, tall, round(w * tall / h / 2) * 2, "crop")
    elif h < least:
        frames = frames.repeat(-(-least // h), axis=1).repeat(-(-least // h), axis=2)
    kind = "image/png" if t == 1 else "video/mp4"
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / f"clip.{kind[-3:]}"
        write_video(file, frames, fps)
        source = f'src="data:{kind};base64,{base64.b64encode(file.read_bytes()).decode()}"'
    if t == 1:
        return f'<img alt="" {source}>'
    return f'<video {source} data-fps="{fps:g}" muted loop autoplay playsinline onclick="toggle([this])"></video>'


def _notes(notes: Sequence[str]) -> str:
    return '<p class="notes">' + "<br>".join(map(in_html, notes)) + "</p>" if notes else ""


def _plain(value):
    """Converts a value for JSON: numpy numbers to Python's, NaN and infinity to None."""
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    if isinstance(value, np.generic | np.ndarray):
        return _plain(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return str(value) if isinstance(value, Path) else value


# ---- plots ----

_MOST = sys.float_info.max
_WIDTH, _HEIGHT, _LEFT, _BOTTOM, _TOP, _RIGHT = 460, 280, 76, 42, 34, 14


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Returns about `count` round numbers in [low, high], a range from `_limits`."""
    raw = high / count - low / count
    size = 10.0 ** math.floor(math.log10(raw))
    step = next(size * m for m in (1, 2, 5, 10) if size * m >= raw * 0.999)
    return [n * step for n in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def _limits(values: list[float]) -> tuple[float, float]:
    """Returns the range of a plot of `values`: with room on both sides, neither empty nor beyond floats."""
    known = _known(values) or [0.0]
    low, high = min(known), max(known)
    room = 0.06 * high - 0.06 * low
    room = room if room > 1e-300 else 0.5 * abs(high)  # near the least floats nothing can be divided
    room = room if room > 1e-300 else 0.5
    return max(low - room, -_MOST), min(high + room, _MOST)


def _known(values: list[float]) -> list[float]:
    """Returns the finite numbers of `values`, which may come from a damaged file."""
    plain = (v.item() if isinstance(v, np.number) else v for v in values)
    return [float(v) for v in plain if isinstance(v, int | float) and abs(v) <= _MOST]


def _share(value: float, low: float, high: float) -> float:
    """Returns where `value` is between `low`, 0, and `high`, 1; halves, as a difference may be no float."""
    return (value / 2 - low / 2) / (high / 2 - low / 2)


def _text(x: float, y: float, text: str, anchor: str = "middle", **attributes) -> str:
    more = "".join(f' {key.replace("_", "-")}="{value}"' for key, value in attributes.items())
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{more}>{in_html(text)}</text>'


def _svg(title: str, content: list[str], height: float = _HEIGHT) -> str:
    box = f'viewBox="0 0 {_WIDTH} {height:g}" width="{_WIDTH}" height="{height:g}"'
    font = 'font-family="system-ui, sans-serif" font-size="12"'
    heading = _text(_WIDTH / 2, 18, title, font_size=14)
    return f'<svg xmlns="http://www.w3.org/2000/svg" {box} {font} role="img">{heading}{"".join(content)}</svg>'


def _axis(values: list[float], place, across: tuple[float, float], vertical: bool) -> list[str]:
    """Draws grid lines and labels at `values`; `place(value)` is a line's coordinate, `across` its two ends."""
    lines, least = [], 1e-9 * max(map(abs, values), default=0)
    for value in values:
        at, (first, last), label = place(value), across, f"{value:g}" if abs(value) > least else "0"
        if vertical:
            lines.append(f'<path d="M{first:.1f} {at:.1f}H{last:.1f}" stroke="#ddd"/>')
            lines.append(_text(first - 6, at + 4, label, "end"))
        else:
            lines.append(f'<path d="M{at:.1f} {first:.1f}V{last:.1f}" stroke="#ddd"/>')
            lines.append(_text(at, last + 16, label))
    return lines


def line_plot(title: str, series: dict[str, list[float]], x: str, y: str) -> str:
    """Returns an SVG of lines over 0, 1, 2, ..., with a legend below."""
    low, high = _limits([v for values in series.values() for v in values])
    last = max(max(len(values) for values in series.values()) - 1, 1)
    right, bottom = _WIDTH - _RIGHT, _HEIGHT - _BOTTOM
    across = lambda n: _LEFT + (right - _LEFT) * n / last  # noqa: E731
    down = lambda v: bottom - (bottom - _TOP) * _share(v, low, high)  # noqa: E731
    content = _axis(ticks(low, high), down, (_LEFT, right), True)
    content += _axis([n for n in ticks(0, last, 7) if n == int(n)], across, (_TOP, bottom), False)
    middle = (_TOP + bottom) / 2
    content += [_text((_LEFT + right) / 2, bottom + 34, x), _text(14, middle, y, transform=f"rotate(-90 14 {middle})")]
    for n, (name, values) in enumerate(series.items()):
        points = [f"{across(k):.1f} {down(v):.1f}" for k, value in enumerate(values) for v in _known([value])]
        color, line = COLORS[n % len(COLORS)], "M" + "L".join(points)
        content.append(f'<path d="{line}" fill="none" stroke="{color}" stroke-width="2"/>' if points else "")
        content.append(f'<rect x="{_LEFT}" y="{_HEIGHT + 4 + 18 * n}" width="18" height="4" fill="{color}"/>')
        content.append(_text(_LEFT + 26, _HEIGHT + 10 + 18 * n, name, "start"))
    return _svg(title, content, _HEIGHT + 18 * len(series) + 6)


def _short(name: str, most: int = 18) -> str:
    """Returns a name that fits beside a plot: the middle of a long one is left out."""
    return name if len(name) <= most else f"{name[: most // 2]}\u2026{name[-(most // 2 - 1) :]}"


def dot_plot(title: str, series: dict[str, list[float]], x: str) -> str:
    """Returns an SVG with one row per name: a dot per value and a bar at the mean."""
    low, high = _limits([v for values in series.values() for v in values])
    left, right, bottom = 150, _WIDTH - _RIGHT, _TOP + 26 * len(series)
    across = lambda v: left + (right - left) * _share(v, low, high)  # noqa: E731
    content = _axis(ticks(low, high), across, (_TOP, bottom), False)
    content.append(_text((left + right) / 2, bottom + 34, x))
    for n, (name, values) in enumerate(series.items()):
        y, color = _TOP + 26 * n + 13, COLORS[n % len(COLORS)]
        known = _known(values)
        content.append(_text(left - 8, y + 4, _short(name), "end"))
        content += [f'<circle cx="{across(v):.1f}" cy="{y}" r="4" fill="{color}" fill-opacity=".5"/>' for v in known]
        if known:
            at = across(sum(v / len(known) for v in known))
            content.append(f'<path d="M{at:.1f} {y - 10}V{y + 10}" stroke="{color}" stroke-width="3"/>')
    return _svg(title, content, bottom + _BOTTOM)
