"""One step of EGGROLL as pseudocode, for both kinds of members side by side.

Names and shapes are those of the code: eggroll/evolution.py and eggroll/members.py.
"""

# ruff: noqa: RUF001 - the minus, times and sigma are meant: they are drawn

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import cycle, islice

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
INCHES = {"P": 0.6, "B": 0.44, "I": 0.75, "O": 0.5, "R": 0.14}  # of an axis of a drawn matrix
SHEETS, CELLS = {"P": 4, "N": 3}, {"P": 4, "N": 2, "B": 3}  # drawn, for however many there are

NOISE, PLAIN = "#f6cfa9", "#d4d4d4"
SIGNS = ("#f0a863", "#82a9d8")  # of the members 2k and 2k + 1

WIDTH, HEIGHT, ROW = 20.2, 14.4, 1.0
NAME = 0.7  # middle of the phases' names, inches from the left
COLUMNS = (1.25, 10.65)  # where each listing begins
COLUMN = 9.0  # its width
SLOTS = (5.0, 6.85)  # where a line's tensors stand, from the listing's left


@dataclass(frozen=True)
class Shape:
    """A tensor as it is drawn: a row of cells, a matrix, or a stack of matrices."""

    name: str
    axes: str  # one of LETTERS each
    colour: str = PLAIN
    slot: int = 0
    twins: bool = False  # its members alternate between both signs

    @property
    def colours(self) -> Iterable[str]:
        """Of one sheet or cell after the other."""
        return cycle(SIGNS if self.twins else (self.colour,))

    @property
    def label(self) -> str:
        return f"({', '.join(self.axes)}{',' * (len(self.axes) == 1)})"


@dataclass(frozen=True)
class Line:
    """A line of pseudocode, a remark below it, and beside it the tensors that it makes."""

    code: str
    note: str
    shapes: Sequence[Shape] = ()


A, B = Shape("a", "NRO", NOISE), Shape("b", "NRI", NOISE, slot=1)
A_ROWS, SIGN_COLUMNS = Shape("a", "PO", NOISE), Shape("d", "BO", NOISE, slot=1)
ESTIMATE = Shape("g", "OI", NOISE, slot=1)

UNPERTURBED = Line(
    "calls, s₀ = the unperturbed network",
    "once for all members: what each layer reads, x, and writes, y₀ = x Wᵀ; and its scores s₀",
)
GRADIENT = Line(
    "W.grad = −g;   step = step + 1",
    "optimizers descend and fitness is to rise: hence the minus",
)
UPDATE = Line(
    "optimizer.step()",
    "any of torch.optim; nowhere else is a weight written",
)

BATCH = (
    Line("a, b = noise(key)", "Gaussian; a is times σ/√R", (A, B)),
    Line(
        "u = x bᵀ",
        "in the first layer one for both signs",
        (Shape("u", "NBR", NOISE, slot=1),),
    ),
    Line(
        "y = x Wᵀ ± u a",
        "in every layer; W ± σE is never formed",
        (Shape("y", "PBO", slot=1, twins=True),),
    ),
    Line(
        "scores = mean(fitness(outputs, labels))",
        "one for the whole batch",
        (Shape("scores", "P", slot=1, twins=True),),
    ),
    Line(
        "z = z_score(scores)",
        "over the population",
        (Shape("z", "P", slot=1, twins=True),),
    ),
    Line("a, b = noise(key)", "drawn again: same key, same noise", (A, B)),
    Line(
        "w[k] = (z[2k] − z[2k+1]) / (σ P)",
        "weight of the pair: which sign is better",
        (Shape("w", "N", slot=1),),
    ),
    Line(
        "g = Σ w[k] · a[k]ᵀ b[k]",
        "one product for many pairs",
        (ESTIMATE,),
    ),
)
EXAMPLE = (
    Line("c² = σ² · mean of |x|²", "so that σ means what it does for batch members"),
    Line("a, d = noise(layer)", "±c for 16 units, else 0; random signs", (A_ROWS, SIGN_COLUMNS)),
    Line(
        "y = y₀ + d · a",
        "in one layer; those before it are known",
        (Shape("y", "PBO", slot=1),),
    ),
    Line(
        "scores = fitness(outputs, labels)",
        "one for every example",
        (Shape("scores", "PB", slot=1),),
    ),
    Line(
        "change = scores − s₀",
        "against the unperturbed network",
        (Shape("change", "PB", slot=1),),
    ),
    Line("a, d", "kept since evaluate, for the step", (A_ROWS, SIGN_COLUMNS)),
    Line(
        "δ = d · changeᵀ a / (c² m)",
        "m members move each unit",
        (Shape("δ", "BO", NOISE, slot=1),),
    ),
    Line(
        "g = δᵀ x / B",
        "gradient in its weights: x is known",
        (ESTIMATE,),
    ),
)
LISTINGS = (  # name, remark, lines, and which draws what is drawn again
    ("BatchMembers", "each sees the whole batch and perturbs all layers; P in a step", BATCH, 0),
    (
        "ExampleMembers",
        "each sees one example and perturbs one layer; P per example and layer",
        EXAMPLE,
        None,
    ),
)
EVALUATE = 4  # lines of a listing that belong to evaluate; the others belong to backward
SECOND_DRAW = 5  # the line that draws again what the listing's first draw drew


def draw() -> Figure:
    axes = sheet(WIDTH, HEIGHT)
    write(axes, WIDTH / 2, HEIGHT - 0.5, "One step of EGGROLL", TITLE, fontweight="bold")
    top = HEIGHT - 2.05
    evaluate = [top - ROW * (i + 1.5) for i in range(EVALUATE)]
    backward = [evaluate[-1] - 0.1 - ROW * (i + 1) for i in range(len(BATCH) - EVALUATE)]
    gradient = backward[-1] - ROW
    last = gradient - 0.1 - ROW
    _band(axes, "evaluate", top, evaluate[-1] - ROW / 2)
    _band(axes, "backward", backward[0] + ROW / 2, gradient - ROW / 2)
    _band(axes, "step", last + ROW / 2, last - ROW / 2)
    _line(axes, UNPERTURBED, COLUMNS[0], top - ROW / 2)
    _line(axes, GRADIENT, COLUMNS[0], gradient)
    _line(axes, UPDATE, COLUMNS[0], last)
    for (name, remark, lines, first_draw), left in zip(LISTINGS, COLUMNS, strict=True):
        write(axes, left, HEIGHT - 1.3, name, HEADING, ha="left", fontweight="bold")
        write(axes, left, HEIGHT - 1.7, remark, SMALL, ha="left", color=GREY)
        heights = evaluate + backward
        for line, middle in zip(lines, heights, strict=True):
            _line(axes, line, left, middle)
        if first_draw is not None:
            _same_noise(axes, left + COLUMN, heights[first_draw], heights[SECOND_DRAW])
    between = COLUMNS[1] - 0.2
    axes.plot([between, between], [evaluate[0] + 0.4, backward[-1] - 0.4], color="#cccccc", lw=1.5)
    _letters(axes)
    return axes.figure


def _band(axes: Axes, phase: str, top: float, bottom: float) -> None:
    """One background and one name for each phase."""
    box(axes, 0.3, bottom, WIDTH - 0.6, top - bottom, facecolor="#f6f6f6", edgecolor="none")
    write(axes, NAME, (top + bottom) / 2, phase, HEADING, rotation=90, fontweight="bold")


def _line(axes: Axes, line: Line, left: float, middle: float) -> None:
    write(axes, left, middle + 0.17, line.code, BODY, ha="left", family="DejaVu Sans Mono")
    write(axes, left, middle - 0.2, line.note, SMALL, ha="left", color=GREY)
    for shape in line.shapes:
        _shape(axes, shape, left + SLOTS[shape.slot], middle)


def _shape(axes: Axes, shape: Shape, left: float, middle: float) -> None:
    """The tensor, and to the right of it its name over its shape."""
    draw_it = _cells if len(shape.axes) == 1 else _stack
    right = draw_it(axes, shape, left, middle)
    write(axes, right + 0.12, middle + 0.16, shape.name, SMALL, ha="left", fontweight="bold")
    write(axes, right + 0.12, middle - 0.16, shape.label, SMALL, ha="left")


def _cells(axes: Axes, shape: Shape, left: float, middle: float) -> float:
    """A vector as a row of squares, twins with their sign; returns its right end."""
    side, count = 0.24, CELLS[shape.axes]
    for place, colour in enumerate(islice(shape.colours, count)):
        _rectangle(axes, left + place * side, middle - side / 2, side, side, colour)
        if shape.twins:
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


def _same_noise(axes: Axes, corner: float, first: float, second: float) -> None:
    """From the first draw to the second: the key is kept in place of the noise."""
    axes.plot([corner - 0.15, corner, corner], [first, first, second], "--", color=POSITIVE, lw=2)
    arrow(axes, (corner, second), (corner - 0.22, second), color=POSITIVE, linestyle="--", lw=2)


def _letters(axes: Axes) -> None:
    key = (
        "key = (seed, step, parameter, block), layer = (seed, step, parameter): "
        "along the dashed line the key is kept, not the noise"
    )
    text = "      ".join(f"{letter}  {meaning}" for letter, meaning in LETTERS.items())
    write(axes, WIDTH / 2, 0.78, key, SMALL, color=POSITIVE)
    write(axes, WIDTH / 2, 0.36, text, SMALL, color=GREY)
