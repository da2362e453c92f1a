# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Shapes and words as SVG, for tools/pictures.py."""

from collections.abc import Iterable
from typing import Any

WIDTH = 760
INK, QUIET, CARD, EDGE = "#1f2328", "#59636e", "#ffffff", "#d1d9e0"
BLUE, ORANGE, GREY, GREEN, RED = "#2f6fd6", "#e08a1e", "#8c959f", "#2da44e", "#cf222e"
_FONT = "Helvetica, Arial, 'DejaVu Sans', sans-serif"

Point = tuple[float, float]


class Canvas:
    """A picture of `WIDTH` pixels on a card of its own, so that it reads on light and
    on dark pages. Coordinates are pixels from the upper left corner."""

    def __init__(self, height: int, title: str):
        self._height, self._title = height, title
        self._parts: list[str] = []
        self.text(24, 34, title, 16, font_weight="bold")

    def box(self, x: float, y: float, width: float, height: float, **more: Any) -> None:
        self._add("rect", x=x, y=y, width=width, height=height, **more)

    def line(self, x1: float, y1: float, x2: float, y2: float, **more: Any) -> None:
        self._add("line", x1=x1, y1=y1, x2=x2, y2=y2, **{"stroke": EDGE, **more})

    def curve(self, points: Iterable[Point], colour: str) -> None:
        """A line through `points`."""
        line = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        self._add("polyline", points=line, stroke=colour, stroke_width=2.5, fill="none")

    def ring(self, x: float, y: float, colour: str) -> None:
        self._add("circle", cx=x, cy=y, r=5, fill=CARD, stroke=colour, stroke_width=2)

    def arrow(self, start: Point, end: Point, colour: str) -> None:
        """From `start` up or down to `end`, which has the tip."""
        (x1, y1), (x2, y2) = start, end
        bend = (y1 + y2) / 2
        path = f"M{x1} {y1} C{x1} {bend} {x2} {bend} {x2} {y2}"
        self._add("path", d=path, stroke=colour, stroke_width=2, fill="none")
        back = y2 + (7 if y2 < y1 else -7)
        tip = f"{x2},{y2} {x2 - 5},{back} {x2 + 5},{back}"
        self._add("polygon", points=tip, fill=colour)

    def text(self, x: float, y: float, text: str, size: int = 13, **more: Any) -> None:
        attributes = _attributes(x=x, y=y, font_size=size, **{"fill": INK, **more})
        self._parts.append(f"<text {attributes}>{text}</text>")

    def key(self, x: float, y: float, colour: str, text: str) -> None:
        """A colour and what it stands for."""
        self.box(x, y, 13, 13, fill=colour)
        self.text(x + 19, y + 11, text, 12)

    def _add(self, tag: str, **attributes: Any) -> None:
        self._parts.append(f"<{tag} {_attributes(**attributes)}/>")

    def svg(self) -> str:
        size = f'width="{WIDTH}" height="{self._height}"'
        card = _attributes(
            x=0.5, y=0.5, width=WIDTH - 1, height=self._height - 1, rx=8, fill=CARD
        )
        return "\n".join(
            (
                f'<svg xmlns="http://www.w3.org/2000/svg" {size} '
                f'viewBox="0 0 {WIDTH} {self._height}" role="img" '
                f'font-family="{_FONT}">',
                f"<title>{self._title}</title>",
                f'<rect {card} stroke="{EDGE}"/>',
                *self._parts,
                "</svg>\n",
            )
        )


def _attributes(**values: Any) -> str:
    rounded = {
        name: round(value, 1) if isinstance(value, float) else value
        for name, value in values.items()
    }
    return " ".join(f'{n.replace("_", "-")}="{v}"' for n, v in rounded.items())
