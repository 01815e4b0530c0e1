"""One step of EGGROLL as pseudocode, and beside each line the tensors that it makes or reads."""

# ruff: noqa: RUF001 - the minus and sigma are meant: they are drawn

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import cycle, groupby, islice

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from visualizations.canvas import (
    BODY,
    GREY,
    HEADING,
    INK,
    POSITIVE,
    SMALL,
    TITLE,
    arrow,
    box,
    sheet,
    write,
)

LETTERS = {
    "P": "members",
    "N": "pairs, P / 2",
    "B": "examples",
    "I": "inputs",
    "O": "outputs",
    "R": "rank",
}
INCHES = {"B": 0.5, "I": 1.0, "O": 0.7, "R": 0.15}  # what an axis of a drawn matrix measures
SHEETS, CELLS = {"P": 4, "N": 3}, {"P": 6, "N": 3}  # drawn, for however many there are

NOISE, PLAIN = "#f6cfa9", "#d4d4d4"
SIGNS = ("#f0a863", "#82a9d8")  # of the members 2k and 2k + 1

WIDTH, HEIGHT, ROW = 18.2, 10.4, 1.02
CODE, SLOTS = 2.35, (10.0, 12.45, 14.9)  # inches from the left


@dataclass(frozen=True)
class Shape:
    """A tensor as it is drawn: a row of cells, a matrix, or a stack of matrices."""

    name: str
    axes: str  # one of LETTERS each
    colour: str = PLAIN
    slot: int = 0

    @property
    def colours(self) -> Iterable[str]:
        """Of one sheet or cell after the other; members alternate between both signs."""
        return cycle(SIGNS if self.axes[0] == "P" else (self.colour,))

    @property
    def label(self) -> str:
        return f"({', '.join(self.axes)}{',' * (len(self.axes) == 1)})"


@dataclass(frozen=True)
class Line:
    """A line of pseudocode, a remark below it and the tensors beside it."""

    phase: str
    code: str
    note: str
    shapes: Sequence[Shape] = ()


RESULT = 2  # the slot of what a line makes from what it reads
A, B = Shape("a", "NRO", NOISE), Shape("b", "NRI", NOISE, slot=1)

LINES = (
    Line(
        "ask",
        "key = (seed, step, layer, block)",
        "names the noise of a block of pairs; nothing is drawn yet",
        (Shape("members", "P"),),
    ),
    Line(
        "evaluate",
        "a, b = noise(key)",
        "first draw, shared by the two signs of each pair",
        (A, B),
    ),
    Line(
        "evaluate",
        "y = x Wᵀ ± σ/√R · (x bᵀ) a",
        "W ± σE is never formed; in deeper layers x is (P, B, I)",
        (Shape("x", "BI"), Shape("W", "OI", slot=1), Shape("y", "PBO", slot=RESULT)),
    ),
    Line(
        "evaluate",
        "scores = mean(fitness(y, labels))",
        "from the last layer's y, averaged over the batch",
        (Shape("y", "PBO"), Shape("scores", "P", slot=RESULT)),
    ),
    Line(
        "shape",
        "z = z_score(scores);  w[k] = (z[2k] − z[2k+1]) / P",
        "the better sign of pair k gives the direction, the gap its size",
        (Shape("scores", "P"), Shape("w", "N", slot=RESULT)),
    ),
    Line(
        "estimate",
        "a, b = noise(key)",
        "second draw, from the same keys",
        (A, B),
    ),
    Line(
        "estimate",
        "g = Σ w[k] · a[k]ᵀ b[k] / √R",
        "one matrix product for each block of pairs; no E is formed",
        (Shape("w", "N"), Shape("estimate g", "OI", NOISE, slot=RESULT)),
    ),
    Line(
        "step",
        "W.grad = −g;  optimizer.step();  step = step + 1",
        "optimizers descend and fitness should rise: hence the minus",
        (Shape("estimate g", "OI", NOISE), Shape("W", "OI", slot=RESULT)),
    ),
)
FIRST_DRAW, SECOND_DRAW = (i for i, line in enumerate(LINES) if A in line.shapes)


def draw() -> Figure:
    axes = sheet(WIDTH, HEIGHT)
    write(axes, WIDTH / 2, HEIGHT - 0.55, "One step of EGGROLL", TITLE, fontweight="bold")
    heights = _heights()
    _bands(axes, heights)
    for line, middle in zip(LINES, heights, strict=True):
        _line(axes, line, middle)
    _same_noise(axes, heights[FIRST_DRAW], heights[SECOND_DRAW])
    _letters(axes)
    return axes.figure


def _heights() -> list[float]:
    """The middle of each line above the bottom of the sheet; phases stand a little apart."""
    heights, top = [], HEIGHT - 1.1
    for _, lines in groupby(LINES, key=lambda line: line.phase):
        for _ in lines:
            heights.append(top - ROW / 2)
            top -= ROW
        top -= 0.1
    return heights


def _bands(axes: Axes, heights: Sequence[float]) -> None:
    """One background and one name for each phase."""
    placed = zip(LINES, heights, strict=True)
    for phase, lines in groupby(placed, key=lambda pair: pair[0].phase):
        middles = [middle for _, middle in lines]
        top, bottom = middles[0] + ROW / 2, middles[-1] - ROW / 2
        box(axes, 0.3, bottom, WIDTH - 0.6, top - bottom, facecolor="#f6f6f6", edgecolor="none")
        write(axes, 0.55, (top + bottom) / 2, phase, HEADING, ha="left", fontweight="bold")


def _line(axes: Axes, line: Line, middle: float) -> None:
    write(axes, CODE, middle + 0.17, line.code, BODY, ha="left", family="DejaVu Sans Mono")
    write(axes, CODE, middle - 0.2, line.note, SMALL, ha="left", color=GREY)
    for shape in line.shapes:
        _shape(axes, shape, middle)
    if any(shape.slot == RESULT for shape in line.shapes):
        arrow(axes, (SLOTS[RESULT] - 0.6, middle), (SLOTS[RESULT] - 0.12, middle))


def _shape(axes: Axes, shape: Shape, middle: float) -> None:
    """The tensor, and to the right of it its name over its shape."""
    left = SLOTS[shape.slot]
    draw_it = _cells if len(shape.axes) == 1 else _stack
    right = draw_it(axes, shape, left, middle)
    write(axes, right + 0.15, middle + 0.16, shape.name, SMALL, ha="left", fontweight="bold")
    write(axes, right + 0.15, middle - 0.16, shape.label, SMALL, ha="left")


def _cells(axes: Axes, shape: Shape, left: float, middle: float) -> float:
    """A vector as a row of squares, members with their sign; returns its right end."""
    side, count = 0.24, CELLS[shape.axes]
    for place, colour in enumerate(islice(shape.colours, count)):
        _rectangle(axes, left + place * side, middle - side / 2, side, side, colour)
        if shape.axes == "P":
            write(axes, left + (place + 0.5) * side, middle, "+−"[place % 2], SMALL - 2)
    return left + count * side


def _stack(axes: Axes, shape: Shape, left: float, middle: float) -> float:
    """A matrix, or several one behind the other; returns the right end."""
    height, width = (INCHES[letter] for letter in shape.axes[-2:])
    sheets = SHEETS[shape.axes[0]] if len(shape.axes) == 3 else 1
    offset = 0.08
    reach = (sheets - 1) * offset
    colours = list(islice(shape.colours, sheets))
    for depth in reversed(range(sheets)):
        bottom = middle - (height + reach) / 2 + depth * offset
        _rectangle(axes, left + depth * offset, bottom, width, height, colours[depth])
    return left + width + reach


def _rectangle(
    axes: Axes, left: float, bottom: float, width: float, height: float, colour: str
) -> None:
    axes.add_patch(Rectangle((left, bottom), width, height, fc=colour, ec=INK, lw=1))


def _same_noise(axes: Axes, first: float, second: float) -> None:
    """From the first draw to the second: the keys are kept in place of the noise."""
    start, corner = SLOTS[RESULT] - 0.12, WIDTH - 0.55
    axes.plot([start, corner, corner], [first, first, second], "--", color=POSITIVE, lw=2)
    arrow(axes, (corner, second), (start, second), color=POSITIVE, linestyle="--", lw=2)
    middle = (start + corner) / 2
    write(axes, middle, first + 0.22, "kept: the key alone", SMALL, color=POSITIVE)
    write(axes, middle, second + 0.22, "same key, same noise", SMALL, color=POSITIVE)


def _letters(axes: Axes) -> None:
    text = "      ".join(f"{letter}  {meaning}" for letter, meaning in LETTERS.items())
    write(axes, WIDTH / 2, 0.35, text, SMALL, color=GREY)
