"""Two kinds of members: what each perturbs, what it sees, and what its score says of the gradient.

                    BatchMembers                       ExampleMembers
a member sees       the whole batch                    one example of it
it perturbs         all layers, or one, by A B^T       one layer, by A B^T with B along what the
                    (Gaussian factors, any rank)       layer reads of that example
compared with       its antithetic twin                the unperturbed network
its score weights   A B^T                              A: the gradient in the layer's outputs

Source: arXiv 2511.16652, Algorithm 1; for ExampleMembers docs/method.md. Both are pure: what a step
needs is in its arguments. Shapes: P members, B examples, I/O a layer's inputs/outputs, R rank.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import ClassVar

import torch
from torch import Tensor

from eggroll import int8
from eggroll.fitness import SHAPINGS
from eggroll.moved import MovedUnits, spread
from eggroll.noise import ROW_UNITS, Keys, gaussian, most_rows, orthogonal_rows, row_units, signs
from eggroll.seam import Call

# Members per block on an accelerator, which wants few launches; a CPU wants activations that stay
# in its caches, and has a size for each kind. Fixed: no number depends on memory settings.
GPU_BLOCK = 512
# Draws that go into one matrix product of the gradient: enough for a fast GEMM, and no more noise
# than this is ever held.
DRAWS_PER_PRODUCT = 512


class PopulationError(ValueError):
    """A population that cannot be, or a network that it cannot perturb."""


@dataclass(frozen=True)
class Step:
    """What all members of one step have in common."""

    keys: Keys
    weights: Sequence[Tensor]  # those that evolve, (O, I) each
    biases: Sequence[Tensor]  # (O,) each
    calls: Sequence[Call]  # what the unperturbed network read and wrote
    baseline: Tensor  # its scores: (B,), or 0-d for one score per member
    shared: dict[int, dict[str, Tensor]] = field(default_factory=dict)  # by layer, once drawn


@dataclass(frozen=True)
class Block:
    """The unit of work: members that are drawn together, keyed by the block's number."""

    layer: int | None  # position of the weight that they perturb; None: all of them
    number: int
    start: int  # their place in the step's scores
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start


Counts = list[tuple[int | None, int]]  # (layer, members of it)


def make_blocks(counts: Counts, size: int) -> list[Block]:
    """All blocks of a step, one layer after the other; a layer's last block may be cut."""
    blocks, first = [], 0
    for layer, count in counts:
        starts = range(0, count, size)
        blocks += [
            Block(layer, number, first + start, first + min(start + size, count))
            for number, start in enumerate(starts)
        ]
        first += count
    return blocks


def grouped(blocks: Sequence[Block], most: int) -> Iterator[list[Block]]:
    """Runs of at most `most` blocks of one layer."""
    for _, of_layer in groupby(blocks, key=lambda block: block.layer):
        run = list(of_layer)
        yield from (run[i : i + most] for i in range(0, len(run), most))


class _Members:
    """What both kinds have."""

    population: int | tuple[int, ...]
    sigma: float
    antithetic: bool
    shaping: str
    cpu_block: ClassVar[int]
    cpu_chunk: ClassVar[int] = 0

    @property
    def _signs(self) -> int:
        """Members for each draw of the noise."""
        return 2 if self.antithetic else 1

    def block_size(self, device: torch.device) -> int:
        """Members of a whole block."""
        return self.cpu_block if device.type == "cpu" else GPU_BLOCK

    def chunk_size(self, device: torch.device) -> int:
        """Members that are evaluated at once, where nothing else is asked for."""
        return max(self.cpu_chunk, self.cpu_block) if device.type == "cpu" else GPU_BLOCK

    def cost(self, block: Block, outputs: Sequence[int]) -> float:
        """Of evaluating a block, for layers of so many outputs, in the units that are computed for
        one example: those after the perturbed layer."""
        later = outputs if block.layer is None else outputs[block.layer + 1 :]
        return len(block) * (sum(later) + outputs[-1])

    def _check(self, shapings: Sequence[str]) -> None:
        """Raises PopulationError for values that cannot be."""
        counts = self.population if isinstance(self.population, tuple) else (self.population,)
        for count in counts:
            if count < 1:
                raise PopulationError(f"population {count} is below 1 (try 2)")
            if self.antithetic and count % 2:
                raise PopulationError(
                    f"population {count} is odd; antithetic pairs need an even number "
                    f"(try {count + 1})"
                )
        if not self.sigma > 0:
            raise PopulationError(f"sigma {self.sigma} is not above 0 (try 0.02)")
        if self.shaping not in shapings:
            raise PopulationError(
                f"shaping {self.shaping} is not for {type(self).__name__} "
                f"(try {', '.join(shapings)})"
            )


@dataclass(frozen=True)
class BatchMembers(_Members):
    """Members that each see the whole batch: Algorithm 1 of the paper.

    population  members per step; each sees every example
    sigma       scale of the perturbation E = A B^T / sqrt(R), in the weights' own units
    perturb     "all" layers at once, or "one" layer per member
    antithetic  in pairs with signs + and -; otherwise compared with the unperturbed network
    shaping     one of SHAPINGS. "none" keeps the fitness's units: the estimate is its gradient. The
                others divide by the scores' spread, which leaves 1 / sigma to the learning rate

    Raises PopulationError for values that cannot be.
    """

    population: int
    sigma: float = 0.02
    rank: int = 1
    perturb: str = "all"
    antithetic: bool = True
    shaping: str = "z-score"

    by_example: ClassVar[bool] = False  # one score per member
    cpu_block: ClassVar[int] = 32

    def __post_init__(self):
        self._check(list(SHAPINGS))
        if self.rank < 1:
            raise PopulationError(f"rank {self.rank} is below 1 (try 1)")
        if self.perturb not in ("all", "one"):
            raise PopulationError(f"perturb {self.perturb!r} is not known (try 'all' or 'one')")

    def counts(self, outputs: Sequence[int]) -> Counts:
        """Members of each layer, for layers of so many outputs; layer None is all at once."""
        if self.perturb == "all":
            return [(None, self.population)]
        most = [self.population] * len(outputs)
        return list(enumerate(share(self.population, most, self._signs)))

    # ---- what a member adds ----

    def draw(self, step: Step, blocks: Sequence[Block]) -> dict[str, Tensor]:
        """Noise of the blocks' N draws: for weight i a{i} (N, R, O), which is sigma / sqrt(R) times
        A, and b{i} (N, R, I); for bias j e{j} (N, O), which is sigma times the noise."""
        layer, noise = blocks[0].layer, {}
        for i, weight in enumerate(step.weights):
            if layer in (None, i):
                drawn = self._gaussian(step.keys, i, weight, blocks, self.rank, sum(weight.shape))
                a, b = drawn.split(list(weight.shape), dim=-1)
                noise[f"a{i}"], noise[f"b{i}"] = a * (self.sigma / math.sqrt(self.rank)), b
        for j, bias in enumerate(step.biases):
            if layer is None or any(c.index == layer and c.bias is bias for c in step.calls):
                place = len(step.weights) + j
                drawn = self._gaussian(step.keys, place, bias, blocks, len(bias))
                noise[f"e{j}"] = drawn * self.sigma
        return noise

    def _gaussian(
        self, keys: Keys, parameter: int, like: Tensor, blocks: Sequence[Block], *shape: int
    ) -> Tensor:
        """Of every block as many draws as it has members of; whole blocks are drawn."""
        whole = (self.block_size(keys.device) // self._signs, *shape)
        parts = []
        for block in blocks:
            drawn = gaussian(whole, keys.generator(parameter, block.number), like)
            parts.append(drawn[: len(block) // self._signs])
        return _joined(parts)

    def add(
        self,
        noise: dict[str, Tensor],
        call: int,
        index: int,
        bias: int | None,
        x: Tensor,  # (P, ..., I), or (1, ..., I) while all members read the same
        y: Tensor,  # (P, ..., O) or (1, ..., O): the unperturbed product
    ) -> Tensor:
        """y plus each member's term, (P, ..., O)."""
        if f"a{index}" in noise:
            y = self._add_product(noise[f"a{index}"], noise[f"b{index}"], x, y)
        if f"e{bias}" in noise:
            e = noise[f"e{bias}"]
            e = torch.stack([e, -e], 1).flatten(0, 1) if self.antithetic else e
            y = y + e.view(-1, *[1] * (y.dim() - 2), y.shape[-1])
        return y

    def _add_product(self, a: Tensor, b: Tensor, x: Tensor, y: Tensor) -> Tensor:
        """y + (x b^T) a, where the second member of a pair has -a."""
        if len(x) == 1:  # one product x b^T serves both signs
            u = _project_shared(x.flatten(0, -2), b, self.block_size(x.device) // self._signs)
            u = u.repeat_interleave(self._signs, 0)
        else:
            u = _project_own(x.flatten(1, -2), b.repeat_interleave(self._signs, 0))
        a = torch.stack([a, -a], 1).flatten(0, 1) if self.antithetic else a
        return _add_outer(y.flatten(1, -2), u, a).view(len(a), *y.shape[1:])

    # ---- what its score says ----

    def gradients(
        self, step: Step, scores: Tensor, blocks: Sequence[Block]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Ascent direction of every weight, (O, I), and bias, (O,), from scores (P,).

        One matrix product for every few blocks: no E is formed, and no population's noise held.
        Source: Algorithm 1; with antithetic pairs.
        """
        differences = self._differences(scores, step.baseline)
        on_weights = [torch.zeros_like(weight) for weight in step.weights]
        on_biases = [torch.zeros_like(bias) for bias in step.biases]
        members = dict.fromkeys((None, *range(len(on_weights))), 0)
        for block in blocks:
            members[block.layer] += len(block)
        together = DRAWS_PER_PRODUCT * self._signs // self.block_size(step.keys.device)
        # the noise is already times sigma
        unit = self.sigma**2 if self.shaping == "none" else self.sigma
        for group in grouped(blocks, max(1, together)):
            noise = self.draw(step, group)
            draws = slice(group[0].start // self._signs, group[-1].stop // self._signs)
            share = differences[draws] / (unit * members[group[0].layer])
            for i, total in enumerate(on_weights):
                if f"a{i}" in noise:
                    weighted = noise[f"a{i}"] * share.to(total.dtype)[:, None, None]
                    total.addmm_(weighted.flatten(0, 1).T, noise[f"b{i}"].flatten(0, 1))
            for j, total in enumerate(on_biases):
                if f"e{j}" in noise:
                    total.addmv_(noise[f"e{j}"].T, share.to(total.dtype))
        return on_weights, on_biases

    def _differences(self, scores: Tensor, baseline: Tensor) -> Tensor:
        """Of each draw, (N,): member less twin, or less the unperturbed network, shaped."""
        if self.shaping == "sign":
            return self._compared(scores, baseline).sign()
        if self.shaping == "none":
            return self._compared(scores, baseline)
        shaped = SHAPINGS[self.shaping](scores)
        return self._compared(shaped, torch.zeros_like(baseline))  # shaped scores are centred

    def _compared(self, scores: Tensor, baseline: Tensor) -> Tensor:
        return scores[0::2] - scores[1::2] if self.antithetic else scores - baseline


@dataclass(frozen=True)
class ExampleMembers(_Members):
    """Members that each see one example and perturb one layer (docs/method.md).

    Algorithm 1 with one datum per member, Rao-Blackwellised; it coincides with node perturbation
    (Werfel, Xie, Seung 2003).

    population  members that see each example: a number, shared equally among the layers, each up
                to its full set of orthogonal rows; or a count for each layer
    sigma       scale of the perturbation, in the weights' own units
    antithetic  in pairs with signs + and -; otherwise compared with the unperturbed network
    shaping     "none": the estimate is the gradient of the fitness. "sign": one vote per member
    units       of a layer that a member moves, or more where members are few. With 16 they cost
                least; a layer of units that jump learns better where all of them move

    Raises PopulationError for values that cannot be.
    """

    population: int | tuple[int, ...]
    sigma: float = 0.004
    antithetic: bool = False
    shaping: str = "none"
    units: int = ROW_UNITS

    by_example: ClassVar[bool] = True  # one score per member and example
    cpu_block: ClassVar[int] = 16
    cpu_chunk: ClassVar[int] = 128

    def __post_init__(self):
        self._check(("none", "sign"))
        if self.units < 1:
            raise PopulationError(f"units {self.units} is below 1 (try {ROW_UNITS})")

    def counts(self, outputs: Sequence[int]) -> Counts:
        """Members of each layer that see each example, for layers of so many outputs.

        Raises PopulationError where they cannot be shared out.
        """
        most = [self._signs * most_rows(count, self.units) for count in outputs]
        if isinstance(self.population, int):
            return list(enumerate(share(self.population, most, self._signs)))
        typed = "+".join(map(str, self.population))
        if len(self.population) != len(outputs):
            raise PopulationError(
                f"population {typed} names {len(self.population)} layers, and {len(outputs)} evolve"
            )
        possible = [min(count, limit) for count, limit in zip(self.population, most, strict=True)]
        if possible != list(self.population):
            raise PopulationError(
                f"population {typed} is more than the layers have orthogonal members "
                f"(try {'+'.join(map(str, possible))})"
            )
        return list(enumerate(self.population))

    # ---- what a member adds ----

    def shared(self, step: Step, layer: int) -> dict[str, Tensor]:
        """Noise of a layer, drawn once a step. N orthogonal rows, each of the signs of one block
        of units: blocks (N,). For the layer's k-th call s{k} (N, 1, ..., G), those signs; the size
        of a move, c{k}; and random signs of each example's units, d{k} (B, ..., O)."""
        if layer in step.shared:
            return step.shared[layer]
        generator, outputs = step.keys.generator(layer), len(step.weights[layer])
        calls = _calls_of(step, layer)
        dtype = calls[0].y.dtype
        count = dict(self.counts([len(weight) for weight in step.weights]))[layer]
        size = row_units(outputs, count // self._signs, self.units)
        rows, blocks = orthogonal_rows(outputs, size, generator, dtype)
        noise = {"blocks": blocks}
        for k, call in enumerate(calls):
            positions = call.y.shape[2:-1]
            own = rows.view(len(rows), *[1] * (len(positions) + 1), -1)
            if positions or len(calls) > 1:  # one score speaks for all of them: tell them apart
                own = own * signs((len(rows), 1, *positions, 1), generator, dtype)
            noise |= {f"s{k}": own, f"c{k}": self._size(call)}
            noise[f"d{k}"] = signs(call.y.shape[1:], generator, dtype)
        step.shared[layer] = noise
        return noise

    def _size(self, call: Call) -> Tensor:
        """How far a member moves what it adds A to, 0-d: sigma times the root of the mean of
        |x|^2, so that sigma means what it means for BatchMembers."""
        if call.x.dtype == torch.int8:
            return int8.perturbation_size(call.x, self.sigma)
        mean = call.x.square().sum(-1).mean() + (call.bias is not None)
        return self.sigma * mean.sqrt()

    def draw(self, step: Step, blocks: Sequence[Block]) -> dict[str, Tensor]:
        """Of the blocks' P members, for the layer's k-th call: a{k} (P, ..., O), negative for the
        second member of a pair, and d{k} (B, ..., O)."""
        shared, noise = self.shared(step, blocks[0].layer), {}
        start = blocks[0].number * self.block_size(step.keys.device) // self._signs
        stop = start + sum(map(len, blocks)) // self._signs
        noise["blocks"] = shared["blocks"][start:stop]
        if self.antithetic:
            noise["blocks"] = noise["blocks"].repeat_interleave(2)
        for k in range(len(_calls_of(step, blocks[0].layer))):
            own = shared[f"s{k}"][start:stop]
            own = torch.stack([own, -own], 1).flatten(0, 1) if self.antithetic else own
            noise |= {f"s{k}": own, f"c{k}": shared[f"c{k}"], f"d{k}": shared[f"d{k}"]}
        return noise

    @staticmethod
    def rows(noise: dict[str, Tensor], call: int) -> Tensor:
        """A without the examples' signs, (P, 1, ..., O): moves in their places, 0 elsewhere."""
        units = noise[f"d{call}"].shape[-1]
        return spread(noise[f"s{call}"], noise["blocks"], units) * noise[f"c{call}"]

    def add(
        self,
        noise: dict[str, Tensor],
        call: int,  # of this layer
        index: int,
        bias: int | None,
        x: Tensor,
        y: Tensor,  # (P, B, ..., O) or (1, B, ..., O): the unperturbed product
    ) -> Tensor:
        """y plus each member's term, d a, (P, B, ..., O)."""
        everywhere = noise[f"s{call}"].shape[-1] >= y.shape[-1]  # few units: all of them move
        if everywhere or len(y) > 1 or torch.compiler.is_compiling():
            return torch.addcmul(y, noise[f"d{call}"], self.rows(noise, call))
        move = noise[f"d{call}"] * noise[f"c{call}"]
        return MovedUnits(torch.cat([y, y + move, y - move]), noise[f"s{call}"], noise["blocks"])

    # ---- what its score says ----

    def gradients(
        self, step: Step, scores: Tensor, blocks: Sequence[Block]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Ascent direction of every weight, (O, I), and bias, (O,), from scores (P, B).

        delta = mean over members of (s - s0) d a / c^2 is on average the derivative of an example's
        fitness in what the layer wrote for it; the weights follow by an outer product with what it
        read. Source: docs/method.md.
        """
        on_weights = [torch.zeros_like(weight, dtype=scores.dtype) for weight in step.weights]
        on_biases = [torch.zeros_like(bias, dtype=scores.dtype) for bias in step.biases]
        change = scores - step.baseline
        for of_layer in grouped(blocks, len(blocks)):
            layer, noise = of_layer[0].layer, self.draw(step, of_layer)
            own = change[of_layer[0].start : of_layer[-1].stop]
            for k, call in enumerate(_calls_of(step, layer)):
                size = step.shared[layer][f"c{k}"]
                if self.shaping == "sign":
                    own = own.sign() * size
                per_unit = self._per_unit(noise, call.y.shape[-1])
                if call.x.dtype == torch.int8:
                    drawn = (noise[f"s{k}"], noise["blocks"], noise[f"d{k}"], size, per_unit)
                    on_weights[layer] = int8.layer_gradient(call.x, own, *drawn)
                    continue
                args = (self.rows(noise, k), noise[f"d{k}"], size.square() * per_unit)
                delta = self._delta(own, *(arg.to(own.dtype) for arg in args))
                x = call.x.reshape(len(delta), -1).to(own.dtype)
                on_weights[layer].addmm_(delta.T, x, alpha=1 / scores.shape[1])
                for bias, total in zip(step.biases, on_biases, strict=True):
                    if call.bias is bias:
                        total.add_(delta.sum(0), alpha=1 / scores.shape[1])
        return on_weights, on_biases

    @staticmethod
    def _per_unit(noise: dict[str, Tensor], outputs: int) -> Tensor:
        """How many members move each unit, (O,)."""
        size = noise["s0"].shape[-1]
        return torch.bincount(noise["blocks"]).repeat_interleave(size)[:outputs]

    def _delta(self, change: Tensor, a: Tensor, d: Tensor, unit: Tensor) -> Tensor:
        """Derivative of each example's fitness in each of its rows of outputs, (B * ..., O)."""
        # 0 where nothing moves, as with a batch of blanks, and gives a gradient of 0
        unit = unit.clamp_min(torch.finfo(unit.dtype).tiny)
        on_outputs = (change.T @ a.flatten(1)).view_as(d) / unit
        return (on_outputs * d).flatten(0, -2)


def share(population: int, most: Sequence[int], unit: int) -> list[int]:
    """Members of each layer: equal numbers in multiples of `unit`, up to each layer's most; what is
    left over goes to the others. Raises PopulationError where a layer would have none."""
    if population < unit * len(most):
        raise PopulationError(
            f"population {population} leaves some of the {len(most)} layers without a member "
            f"(try {unit * len(most)})"
        )
    counts, left = [0] * len(most), min(population, sum(most))
    while left >= unit:
        waiting = [i for i, limit in enumerate(most) if counts[i] < limit]
        each = max(left // len(waiting) // unit * unit, unit)
        for i in waiting:
            more = min(each, most[i] - counts[i], left)
            counts[i], left = counts[i] + more, left - more
    return counts


def _calls_of(step: Step, layer: int) -> list[Call]:
    return [call for call in step.calls if call.index == layer]


def _joined(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))


def _project_shared(x: Tensor, b: Tensor, draws: int) -> Tensor:
    """x b^T for x (rows, I) and b (N, R, I): (N, rows, R), one product for so many draws.

    A product's rounding may depend on its shape, and the chunk size must not change a bit.
    """
    parts = [part.flatten(0, 1) @ x.T for part in b.split(draws)]
    return torch.cat(parts).unflatten(0, b.shape[:2]).transpose(1, 2)


def _project_own(x: Tensor, b: Tensor) -> Tensor:
    """x b^T for x (P, rows, I) and b (P, R, I): (P, rows, R)."""
    if torch.compiler.is_compiling():  # a sum of products fuses with what comes before it
        return torch.stack([(x * row.unsqueeze(1)).sum(-1) for row in b.unbind(1)], -1)
    return torch.bmm(x, b.mT)


def _add_outer(y: Tensor, u: Tensor, a: Tensor) -> Tensor:
    """y + u a for y (P or 1, rows, O), u (P, rows, R) and a (P, R, O)."""
    if torch.compiler.is_compiling():
        return sum((u[..., r, None] * a[:, None, r] for r in range(a.shape[1])), y)
    return torch.baddbmm(y, u, a)
