"""Shares over shares as lines, side by side: the picture of the coverage bench."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from PIL import Image, ImageDraw

from kttrio.cli.heatmap import INK, PAPER, Colour, font

Lines = Mapping[str, Sequence[tuple[float, float]]]

GRID: Colour = (225, 225, 225)
COLOURS: tuple[Colour, ...] = (
    (150, 150, 150),
    (86, 130, 190),
    (140, 100, 180),
    (40, 140, 80),
    (200, 60, 20),
    (230, 150, 60),
    (60, 60, 60),
)
SIDE = 520
LEFT, TOP, RIGHT, BOTTOM = 76, 56, 150, 64
TENTHS = range(11)


def draw_lines(panels: Mapping[str, Lines], *, x: str, y: str) -> Image.Image:
    """A square for each panel, from 0 to 100 % both ways; points (x, y) are from 0 to 1."""
    width, height = LEFT + SIDE + RIGHT, TOP + SIDE + BOTTOM
    image = Image.new("RGB", (width * len(panels), height), PAPER)
    draw = ImageDraw.Draw(image)
    for number, (title, lines) in enumerate(panels.items()):
        left = number * width + LEFT
        draw.text((left, 20), title, INK, font(16))
        _axes(draw, left, x, y)
        for points, colour in zip(lines.values(), COLOURS, strict=False):
            draw.line([_at(left, *point) for point in points], colour, 3)
        _names(draw, left, lines)
    return image


def _at(left: int, x: float, y: float) -> tuple[int, int]:
    return left + round(x * SIDE), TOP + round((1 - y) * SIDE)


def _axes(draw: ImageDraw.ImageDraw, left: int, x: str, y: str) -> None:
    for tenth in TENTHS:
        share = tenth / 10
        draw.line((_at(left, share, 0), _at(left, share, 1)), GRID)
        draw.line((_at(left, 0, share), _at(left, 1, share)), GRID)
        across, up = _at(left, share, 0), _at(left, 0, share)
        draw.text((across[0], across[1] + 6), f"{share:.0%}", INK, font(12), anchor="mt")
        draw.text((up[0] - 6, up[1]), f"{share:.0%}", INK, font(12), anchor="rm")
    draw.text((left + SIDE // 2, TOP + SIDE + 28), x, INK, font(14), anchor="mt")
    draw.text((left, TOP - 6), y, INK, font(14), anchor="lb")


def _names(draw: ImageDraw.ImageDraw, left: int, lines: Lines) -> None:
    """Beside the grid, in the lines' own order."""
    for number, (name, colour) in enumerate(zip(lines, COLOURS, strict=False)):
        x, y = left + SIDE + 12, TOP + 20 + 24 * number
        draw.line((x, y, x + 24, y), colour, 3)
        draw.text((x + 32, y), name, INK, font(14), anchor="lm")
