"""An audit's figures as SVG pictures: losses with their intervals, and bars, the longest first."""

from collections.abc import Sequence
from xml.sax.saxutils import escape

from studio.core.text import plain

Loss = tuple[str, float, float | None, float | None]
"""Name, value, low and high end."""

_ROW, _LEFT, _WIDTH, _RIGHT = 24, 210, 420, 90
_TEXT = 'font-family="sans-serif" font-size="12" fill="#333"'
_LINE, _DOT, _BAR = "#8a8a8a", "#0072b2", "#d55e00"
"""Blue and vermilion of Okabe and Ito's palette: told apart with any kind of colour vision."""


def losses_svg(title: str, losses: Sequence[Loss]) -> str:
    """Return a picture of losses, each with its interval."""
    ends = [end for _, value, low, high in losses for end in (value, low, high) if end is not None]
    first, last = min(ends), max(ends)
    span = (last - first) or 1.0

    def place(value: float) -> float:
        return _LEFT + 10 + (value - first) / span * (_WIDTH - 20)

    marks = []
    for row, (name, value, low, high) in enumerate(losses):
        y = 44 + row * _ROW
        marks.append(_label(name, y))
        if low is not None and high is not None:
            ends_of = f'x1="{place(low):.1f}" x2="{place(high):.1f}" y1="{y}" y2="{y}"'
            marks.append(f'<line {ends_of} stroke="{_LINE}" stroke-width="4" stroke-linecap="round"/>')
        marks.append(f'<circle cx="{place(value):.1f}" cy="{y}" r="5" fill="{_DOT}"/>')
        marks.append(f'<text x="{_LEFT + _WIDTH + 8}" y="{y + 4}" {_TEXT}>{value:.4f}</text>')
    return _picture(title, len(losses), marks)


def bars_svg(title: str, bars: Sequence[tuple[str, float]], form: str = ".2%") -> str:
    """Return a picture of bars from zero."""
    longest = max((value for _, value in bars), default=0.0) or 1.0
    marks = []
    for row, (name, value) in enumerate(bars):
        y = 44 + row * _ROW
        width = max(0.0, value) / longest * _WIDTH
        marks.append(_label(name, y))
        marks.append(f'<rect x="{_LEFT}" y="{y - 8}" width="{width:.1f}" height="16" fill="{_BAR}"/>')
        marks.append(f'<text x="{_LEFT + _WIDTH + 8}" y="{y + 4}" {_TEXT}>{format(value, form)}</text>')
    return _picture(title, len(bars), marks)


def _label(name: str, y: int) -> str:
    shown = escape(plain(name, one_line=True, limit=34))
    return f'<text x="{_LEFT - 8}" y="{y + 4}" text-anchor="end" {_TEXT}>{shown}</text>'


def _picture(title: str, rows: int, marks: Sequence[str]) -> str:
    width, height = _LEFT + _WIDTH + _RIGHT, 60 + rows * _ROW
    head = f'<text x="8" y="20" font-weight="bold" {_TEXT}>{escape(plain(title, one_line=True, limit=100))}</text>'
    frame = f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}">'
    return "\n".join([frame, '<rect width="100%" height="100%" fill="#ffffff"/>', head, *marks, "</svg>", ""])
