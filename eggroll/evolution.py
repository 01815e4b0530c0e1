"""The trainer: evaluate a population and fill .grad from its scores, without backpropagation.

evolution = Evolution(network, cross_entropy, BlockLowRank(6000))
optimizer = torch.optim.SGD(network.parameters(), lr=0.002, momentum=0.9)
for inputs, labels in batches:
    scores = evolution.evaluate(inputs, labels)  # forward passes only
    evolution.backward(scores)  # fills .grad, like loss.backward()
    optimizer.step()

Shapes: P members, B examples, I / O inputs / outputs of a layer.
"""

import copy
from collections.abc import Callable, Iterator
from functools import partial
from itertools import groupby
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from eggroll.block_low_rank import BlockLowRank
from eggroll.blocks import Blocks, Call, Chunk, Draw, Layer, PopulationError
from eggroll.fitness import Fitness, check_finite, check_scores, diverged
from eggroll.inspection import Forward, check_leading_axis, route, warn_of_fixed
from eggroll.low_rank import LowRank
from eggroll.mlp_loops import LINEAR, MlpLoops, Score, find, score_of
from eggroll.node_perturbation import NodePerturbation
from eggroll.noise import generator, generator_seed
from eggroll.smoothing import Smoothing

Estimator = BlockLowRank | LowRank | NodePerturbation

# Numbers in the largest tensor of a chunk: what the caches hold (on a card a guess, not measured)
CHUNK = {"cpu": 1 << 20, "cuda": 1 << 23}
STEPS_BETWEEN_CHECKS = 50  # of the scores on a GPU, since the CPU has to wait for them


class Evolution:
    """EGGROLL on any nn.Module: weights and biases of every nn.Linear evolve.

    network    takes inputs (B, ...), and the same with one more leading axis
    fitness    outputs (P, B, ...), labels -> scores (P, B) or (P,); higher is better
    estimator  BlockLowRank, LowRank or NodePerturbation
    seed       keys all noise, together with the step and the layer
    smoothing  scores noisy copies of the outputs in place of the members' outputs

    Under torch.distributed every process scores its share of the members, and all make the same
    update; the fitness has to be deterministic there.

    Raises PopulationError for a network without nn.Linear and, on the first batch, for one that
    folds the leading axis or that the population does not fit.
    Source: arXiv 2511.16652, Algorithm 1.
    """

    def __init__(
        self,
        network: nn.Module,
        fitness: Fitness,
        estimator: Estimator,
        seed: int = 0,
        smoothing: Smoothing | None = None,
    ):
        self.network, self.fitness, self.estimator = network, fitness, estimator
        self.seed, self.smoothing, self.step = seed, smoothing, 0
        # The population runs on a copy of the modules that shares their tensors: the network itself
        # is never touched
        shared = (*network.parameters(), *network.buffers())
        self._copy = copy.deepcopy(network, {id(tensor): tensor for tensor in shared})
        self.layers = [Layer(m) for m in self._copy.modules() if isinstance(m, nn.Linear)]
        if not self.layers:
            raise PopulationError("the network has no nn.Linear to evolve")
        for index, layer in enumerate(self.layers):
            layer.module.forward = partial(self._linear, index)
        self.draws: list[Draw] = []  # planned on the first batch
        self._drawn: dict[tuple[int, ...], tuple[Draw, dict[int, Any]]] = {}
        self._loops: MlpLoops | None = None
        self.in_bfloat16 = False  # members on a card; decided on the first batch
        self.capturing = False  # set while a step is captured
        self._generators: dict[tuple[int, int], torch.Generator] = {}  # of a captured step

    # ---- a step ----

    @torch.no_grad()
    def evaluate(self, inputs: Tensor, labels: Any) -> Tensor:
        """Score all members on one batch: (P,), or (P, B) of an estimator with a score per example.

        Weights are read and never written. Raises FitnessError, and PopulationError on the first
        batch.
        """
        if not self.draws:
            self.inspect(inputs)
        self._score_unperturbed(self._record(inputs), labels)
        if self._loops:
            self._loops.begin(self.calls, self._score(labels))
        scores = self.baseline.new_zeros(self.population, *self.baseline.shape)
        rank, processes = process()
        for number, chunk in enumerate(self._chunks()):
            if number % processes == rank:
                scores[chunk.members] = self._scores(chunk, inputs, labels)
        if processes > 1:
            dist.all_reduce(scores)  # zeros where another process scored: the sum is exact
        self._check(scores)
        return scores

    @torch.no_grad()
    def backward(self, scores: Tensor) -> None:
        """Leave minus the ascent direction in `.grad`: optimizers descend, fitness is to rise."""
        ascent: dict[Tensor, Tensor] = {}
        for _, group in groupby(self.draws, key=lambda draw: draw.layers):
            draws = list(group)
            start, stop = draws[0].start, draws[-1].start + draws[-1].members
            weights = self.estimator.weights(scores[start:stop], self.baseline)
            for draw in draws:
                own = weights[draw.start - start :][: draw.members]
                own = own.unflatten(0, (draw.directions, draw.blocks))
                for index, noise in self._noise(draw).items():
                    layer = self.layers[index]
                    self._add(ascent, layer, self.estimator.gradient(noise, own, layer))
        for parameter, direction in ascent.items():
            self._store(parameter, direction)
        self._count_step()

    def replay(self, graph: Callable[[], None]) -> None:
        """Repeat a captured `evaluate` and `backward`, with the noise of this step.

        graph  replays the kernels that were launched while `capturing` was set
        """
        for key, rng in self._generators.items():
            rng.manual_seed(generator_seed(self.seed, self.step, *key))
        graph()
        self._count_step()

    @staticmethod
    def _add(ascent: dict[Tensor, Tensor], layer: Layer, direction: Tensor) -> None:
        """Add an ascent direction of [W, bias] (O, I); tied Parameters get the sum."""
        parts = direction.split(layer.module.in_features, 1)
        for parameter, part in zip((layer.module.weight, layer.module.bias), parts, strict=False):
            part = part.view_as(parameter)
            ascent[parameter] = ascent[parameter] + part if parameter in ascent else part

    def _store(self, parameter: Tensor, direction: Tensor) -> None:
        parameter.grad = direction.neg()

    # ---- members ----

    def _scores(self, chunk: Chunk, inputs: Tensor, labels: Any) -> Tensor:
        """Scores (P, B), or (P,) of an estimator with one per member, by direction."""
        if self._loops:
            first = chunk.draw.first_call
            moved = self._moved(chunk, first, self.calls[first].x, self.calls[first].y)
            return self._one_per_member(self._loops.scores(chunk.draw, moved))
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.in_bfloat16):
            outputs = self._run(partial(self._perturbed, chunk), self._inputs(chunk, inputs))
        return chunk.by_direction(self._fitness_of(outputs, labels))

    def _perturbed(self, chunk: Chunk, position: int, index: int, x: Tensor) -> Tensor:
        """Output of a layer in the population's forward: y + move where it is perturbed."""
        draw, layer, call = chunk.draw, self.layers[index], self.calls[position]
        if position < draw.first_call:  # copied, since an activation may work in place
            return call.y.expand(len(x), *call.y.shape[1:]).clone()
        product, last = layer.product, position == len(self.calls) - 1
        if self.in_bfloat16 and last:  # where bfloat16 would round away how outputs differ
            product = layer.product_in_float32
        if index in draw.layers:
            x, y = (call.x, call.y) if position == draw.first_call else (x, product(x))
            if self.in_bfloat16 and not last and isinstance(self.estimator, LowRank):
                y = y.bfloat16()  # what members write to memory has y's dtype
            moved = self._moved(chunk, position, x, y)
            return torch.cat([y, moved]) if draw.splits else moved
        if isinstance(self.estimator, Blocks) and position in draw.splits:
            return self.estimator.split(layer, x, draw, product)
        return product(x)

    def _moved(self, chunk: Chunk, position: int, x: Tensor, y: Tensor) -> Tensor:
        """Output of a perturbed layer for each direction (or member, of LowRank)."""
        index = self.calls[position].layer
        noise = self._noise(chunk.draw)[index].part(chunk.directions)
        return self.estimator.perturb(noise, self.layers[index], position, x, y)

    def _inputs(self, chunk: Chunk, inputs: Tensor) -> Tensor:
        """Inputs (1, B, ...), which broadcast, or (P, B, ...) where the network needs that."""
        expand = any(self.layers[index].expand for index in chunk.draw.layers)
        members = chunk.members.stop - chunk.members.start
        return inputs.expand(members if expand else 1, *inputs.shape)

    def _noise(self, draw: Draw) -> dict[int, Any]:
        """Noise of a draw by layer; drawn again from its key unless it was these layers' last."""
        if self._drawn.get(draw.layers, (None,))[0] != draw:
            noise = {
                index: self.estimator.sample(
                    self.layers[index], draw, self._rng(index, draw.number)
                )
                for index in draw.layers
            }
            self._drawn[draw.layers] = draw, noise
        return self._drawn[draw.layers][1]

    def _rng(self, parameter: int, block: int = 0) -> torch.Generator:
        """Return the generator of a key; while capturing, one whose key `replay` sets."""
        if not self.capturing:
            return generator(self.seed, self.step, parameter, block, self.device)
        if (parameter, block) not in self._generators:
            self._generators[parameter, block] = torch.Generator(self.device)
        return self._generators[parameter, block]

    @property
    def device(self) -> torch.device:
        return self.layers[0].module.weight.device

    @property
    def generators(self) -> list[torch.Generator]:
        """Return the generators that a captured step draws from."""
        return list(self._generators.values())

    def _chunks(self) -> Iterator[Chunk]:
        """Directions that are evaluated together; depends on the batch, never on the processes."""
        for draw in self.draws:
            call = self.calls[draw.first_call]
            later = [self.layers[c.layer].outputs for c in self.calls[draw.first_call + 1 :]]
            members = 0 if self._loops else draw.blocks  # whose activations are in memory
            widest = max(call.y.shape[-1], members * max(later, default=0))
            largest = CHUNK.get(call.y.device.type, CHUNK["cpu"])
            count = max(1, largest // (widest * call.y[..., 0].numel()))
            for first in range(0, draw.directions, count):
                yield Chunk(draw, slice(first, min(first + count, draw.directions)))

    # ---- the population's network ----

    def _run(self, forward: Forward, inputs: Tensor) -> Tensor:
        """Outputs of the copy, whose layers compute `forward`; inputs (1 or P, B, ...)."""
        self._forward, self._position = forward, 0
        return self._copy(inputs)

    def _linear(self, index: int, input: Tensor) -> Tensor:
        """Stand in for the forward of layer `index`."""
        position, self._position = self._position, self._position + 1
        return self._forward(position, index, input)

    def _record(self, inputs: Tensor) -> Tensor:
        """Outputs (1, B, ...) of the unperturbed network, whose layers' calls are recorded."""
        for module, original in zip(self._copy.modules(), self.network.modules(), strict=True):
            module.training = original.training
        self.calls: list[Call] = []
        self._drawn = {}  # noise may depend on the batch
        outputs = self._run(self._recorded, inputs[None])
        for index, layer in enumerate(self.layers):
            layer.calls = {p: call for p, call in enumerate(self.calls) if call.layer == index}
        return outputs

    def _recorded(self, position: int, index: int, x: Tensor) -> Tensor:
        y = self.layers[index].product(x)
        self.calls.append(Call(index, x.clone(), y.clone()))  # later modules may work in place
        return y

    # ---- fitness ----

    def _score_unperturbed(self, outputs: Tensor, labels: Any) -> None:
        """Set the scores that members are compared with, (B,) or 0-d, and the mean fitness."""
        if self.smoothing:
            rng, self._outputs = self._rng(len(self.layers)), outputs
            self._direction, self._unperturbed = self.smoothing.direction(
                self.fitness, outputs[0], labels, rng
            )
        self.baseline = self._fitness_of(outputs, labels)[0]
        if not self.smoothing:
            self._unperturbed = self.baseline

    def _fitness_of(self, outputs: Tensor, labels: Any) -> Tensor:
        """Scores (P, B), or (P,) of an estimator with one per member. Raises FitnessError."""
        if self.smoothing:
            scores = self.smoothing.score(outputs, self._outputs, self._direction)
        else:
            scores = self.fitness(outputs, labels)
        members, examples, per_example = len(outputs), outputs.shape[1], self.estimator.per_example
        scores = check_scores(scores, members, examples, per_example=per_example)
        if outputs.is_floating_point():  # in few bits, members would hardly differ
            scores = scores.to(outputs.device, torch.promote_types(outputs.dtype, torch.float32))
        return self._one_per_member(scores)

    def _one_per_member(self, scores: Tensor) -> Tensor:
        """Average scores (P, B) over the examples unless the estimator has one for each."""
        return scores.mean(1) if scores.dim() == 2 and not self.estimator.per_example else scores

    def _check(self, scores: Tensor) -> None:
        """Raise FitnessError where a score is not finite; on CUDA, note it for `_count_step`."""
        if self.device.type == "cuda":
            self._finite.logical_and_(scores.isfinite().all())
        else:
            check_finite(scores, self.step)

    def _count_step(self) -> None:
        """Count a step. Raises FitnessError where a noted score on CUDA was not finite."""
        self.step += 1
        due = self.device.type == "cuda" and self.step % STEPS_BETWEEN_CHECKS == 0
        if due and not self.capturing and not self._finite:
            raise diverged("some members", self.step)

    def _score(self, labels: Any) -> Score:
        """Return what the loops compute."""
        if self.smoothing:
            return Score(LINEAR, self._direction, unperturbed=self._outputs[0])
        return score_of(self.fitness, labels, self.calls[-1].y)

    @property
    def mean_fitness(self) -> Tensor:
        """Fitness of the unperturbed network on the last batch, 0-d, in the fitness's units."""
        return self._unperturbed.float().mean()

    # ---- the first batch ----

    @torch.no_grad()
    def inspect(self, inputs: Tensor) -> None:
        """Check the network on inputs (B, ...), and plan the population. Raises PopulationError.

        Called by the first `evaluate`; call it before to know the population that is used.
        """
        training = [module.training for module in self.network.modules()]
        self.network.eval()  # dropout would draw other masks
        try:
            check_leading_axis(self.network, inputs)
            self._record(inputs)
            for layer in self.layers:
                if layer.evolves:
                    route(layer, self.layers, self._run, inputs)
            evolving = self._plan()
        finally:
            for module, mode in zip(self.network.modules(), training, strict=True):
                module.training = mode
        warn_of_fixed(self.network, evolving)

    def _plan(self) -> list[Layer]:
        """Plan the draws, look for loops, and return the layers that evolve."""
        evolving = {i: layer for i, layer in enumerate(self.layers) if layer.evolves}
        if not evolving:
            raise PopulationError("the network never calls an nn.Linear that is trainable")
        self.draws = self.estimator.draws(evolving)
        if isinstance(self.estimator, Blocks) and len(evolving) == len(self.layers):
            self._loops = self._find_loops()
        if self.device.type == "cuda":
            self._finite = torch.ones((), dtype=torch.bool, device=self.device)
            floats = all(layer.module.weight.dtype == torch.float32 for layer in self.layers)
            self.in_bfloat16 = floats and torch.cuda.is_bf16_supported(including_emulation=False)
        return list(evolving.values())

    def _find_loops(self) -> MlpLoops | None:
        """Return C++ loops that score the members, where they cover network and fitness."""
        smoothed = self.smoothing is not None
        return find(self.network, self.layers, self.calls, self.fitness, smoothed=smoothed)

    # ---- what is used, and saved ----

    @property
    def population(self) -> int:
        """Members of a step, rounded; known after the first batch or `inspect`."""
        return sum(draw.members for draw in self.draws)

    def describe_population(self) -> str:
        """Return a line that says how many members are used, and of which layers."""
        counts = [sum(d.members for d in g) for _, g in groupby(self.draws, lambda d: d.layers)]
        layers = f" ({' + '.join(f'{count:,}' for count in counts)} by layer)"
        each = "example" if self.estimator.per_example else "batch"
        return (
            f"population {self.population:,}{layers if len(counts) > 1 else ''}, "
            f"one score for each member and {each}"
        )

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs to draw the same noise and shape the same scores."""
        scale = self.smoothing.scale.clone() if self.smoothing else None
        return {"step": self.step, "scale": scale}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.step = state["step"]
        if self.draws and self.device.type == "cuda":
            self._finite.fill_(True)  # in place: a captured step writes to it
        if self.smoothing:
            self.smoothing.scale.copy_(state["scale"])


def process() -> tuple[int, int]:
    """Return the rank of this process, and the number of processes."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1
