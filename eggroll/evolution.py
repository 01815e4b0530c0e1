"""The trainer: evaluate a population, and fill .grad from its scores. No gradient is ever taken.

evolution = Evolution(network, cross_entropy(), ExampleMembers(144))
optimizer = torch.optim.SGD(network.parameters(), lr=0.04, momentum=0.9)
for inputs, labels in batches:
    scores = evolution.evaluate(inputs, labels)  # forwards only
    evolution.backward(scores)  # where backprop has loss.backward()
    optimizer.step()
"""

import copy
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from eggroll import distributed, fused
from eggroll.compiled import BackendError, Compiled
from eggroll.evolving import find_evolving, inspect, positions
from eggroll.fitness import Fitness, check_finite, check_scores
from eggroll.int8 import kernels
from eggroll.members import (
    BatchMembers,
    Block,
    ExampleMembers,
    Step,
    grouped,
    make_blocks,
)
from eggroll.noise import Keys
from eggroll.seam import forward, record


class Evolution:
    """EGGROLL on any nn.Module: weights and biases of every nn.Linear evolve.

    network     takes inputs (B, ...), and the same with one more leading axis
    fitness     outputs (P, B, ...), labels -> scores (P, B) or (P,); higher is better. One that has
                `prepare(outputs, labels, generator)`, as Smoothed does, is asked for it first, with
                the unperturbed outputs (B, ...): it returns what the fitness reads in place of
                labels, and the unperturbed network's scores
    members     BatchMembers or ExampleMembers
    seed        keys all noise, with the step
    chunk_size  members evaluated at once, in whole blocks: memory and speed, never a result
    backend     "eager", "compile" (a fitness from elsewhere runs eagerly with either; integers have
                kernels of their own on a CPU), or on CUDA "fused", for antithetic batch members of
                the package's MLP
    dtype       of the population's forward where it is not the network's own: members then perturb
                a copy, and the estimate goes to the network

    Where torch.distributed has a process group, its processes share the members' evaluation, and
    all make the same update; a fitness from elsewhere is asked by the first alone.

    Raises PopulationError for a population that cannot be and a network without nn.Linear, and on
    the first batch for a network that folds the leading axis; BackendError.
    Source: Algorithm 1 of arXiv 2511.16652.
    """

    def __init__(
        self,
        network: nn.Module,
        fitness: Fitness,
        members: BatchMembers | ExampleMembers,
        seed: int = 0,
        chunk_size: int | None = None,
        backend: str = "eager",
        dtype: torch.dtype | None = None,
    ):
        self.network, self.fitness, self.members, self.seed = network, fitness, members, seed
        self.evaluated = copy.deepcopy(network).to(dtype) if dtype else network
        self.evolving = find_evolving(self.evaluated)
        self.device = self.evolving.weights[0].device
        size = members.block_size(self.device)
        self.blocks_at_once = max(1, (chunk_size or members.chunk_size(self.device)) // size)
        self.step = 0
        self.expand: bool | None = None  # known from the first batch
        self._scorers: dict[int | None, Compiled] = {}
        self._backend = backend
        self._plan()  # raises at once what the first step would raise

    def _plan(self) -> None:
        """Share the members out among the layers, and make a forward for each layer."""
        weights = self.evolving.weights
        self.counts = self.members.counts([len(weight) for weight in weights])
        self.blocks = make_blocks(self.counts, self.members.block_size(self.device))
        outputs = [len(weight) for weight in weights]
        self.shares = distributed.share_out(
            self.blocks, lambda block: self.members.cost(block, outputs), distributed.count()
        )
        if self._backend == "fused":
            self._scorers[None] = Compiled(self._fused_scorer(), "eager", self.device)
            return
        backend = self._backend
        if backend == "compile" and weights[0].dtype == torch.int8 and self.device.type == "cpu":
            backend = self._use_kernels()
        for layer, _ in self.counts:
            self._scorers[layer] = Compiled(self._scorer(layer), backend, self.device)

    def _use_kernels(self) -> str:
        """Compile the loops of integer training; the backend of everything between them."""
        if failed := kernels.compile_kernels():
            self._backend = "eager"
            warnings.warn(
                f"the int8 kernels did not compile, going on with backend eager ({failed})",
                stacklevel=2,
            )
        return "eager"

    # ---- what there is to know ----

    @property
    def population(self) -> int:
        """Members that see each example; at most what was asked for."""
        return sum(count for _, count in self.counts)

    @property
    def fixed(self) -> list[str]:
        """Names of the parameters that stay as they are; complete after the first batch."""
        return self.evolving.fixed

    @property
    def backend(self) -> str:
        """The backend in use: eager where the compiler failed."""
        failed = any(scorer.failed for scorer in self._scorers.values())
        return "eager" if failed else self._backend

    @property
    def mean_fitness(self) -> Tensor:
        """Of the unperturbed network on the last batch, 0-d, in nats or the fitness's own units."""
        return self._own_scores.float().mean() * getattr(self.fitness, "fitness_per_unit", 1.0)

    # ---- a step ----

    @torch.no_grad()
    def evaluate(self, inputs: Tensor, labels: Any) -> Tensor:
        """Scores of all members on one batch: (P,) of batch members, (P, B) of example members.

        Weights are read and never written. Raises FitnessError, and PopulationError on the first
        batch.
        """
        if self.expand is None:
            self._meet(inputs)
        inputs = self._follow_the_network(inputs)
        weights, biases = self.evolving.weights, self.evolving.biases
        calls, outputs = record(self.evaluated, weights, inputs)
        outputs = _widened(outputs)
        keys = Keys(self.seed, self.step, self.device)
        labels, own = self._prepared(outputs, labels, keys)
        baseline = self._checked(self._ask(outputs, labels), 1, len(inputs))[0]
        self._own_scores = baseline if own is None else own
        step = self._last = Step(keys, weights, biases, calls, baseline)
        found = outputs if self._asked_at_the_end else baseline[None]
        # one tensor for all: a small one left by each chunk would lie in the space of the next
        scores = found.new_zeros(self.population, *found.shape[1:])
        for blocks in grouped(self.shares[distributed.rank()], self.blocks_at_once):
            own = scores[blocks[0].start : blocks[-1].stop]
            own.copy_(self._score(step, blocks, inputs, labels))
        distributed.gather(scores)
        if self._asked_at_the_end:  # what was gathered are the members' outputs
            scores = self._checked(self._ask(scores, labels), self.population, len(inputs))
        check_finite(scores, self.step)
        return scores

    @torch.no_grad()
    def backward(self, scores: Tensor) -> None:
        """Leave minus the ascent direction in `.grad` of every evolving parameter; next step.

        Minus, since optimizers descend and fitness is to rise. The members' noise is drawn again
        from its keys. Of an int8 weight the ascent direction itself, int32, is in `.ascent`.
        """
        on_weights, on_biases = self.members.gradients(self._last, scores, self.blocks)
        targets = (*self._targets.weights, *self._targets.biases)
        for parameter, ascent in zip(targets, (*on_weights, *on_biases), strict=True):
            if parameter.dtype == torch.int8:
                parameter.ascent = ascent
            else:
                parameter.grad = ascent.neg_().to(parameter.dtype)
        self.step += 1

    def warm_up(self, inputs: Tensor, labels: Any) -> None:
        """What a step does, without a trace: compiles, and fills caches."""
        before = self.state_dict()
        scores = self.evaluate(inputs, labels)
        self.members.gradients(self._last, scores, self.blocks)
        self.load_state_dict(before)

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs to go on with the same noise and scores."""
        keeps = hasattr(self.fitness, "state_dict")
        return {"step": self.step, "fitness": self.fitness.state_dict() if keeps else None}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.step = state["step"]
        if state["fitness"] is not None:
            self.fitness.load_state_dict(state["fitness"])

    # ---- its parts ----

    def _meet(self, inputs: Tensor) -> None:
        """On the first batch: which weights the network uses, and how it treats the member axis."""
        # the network itself: in a copy of few bits rounding could pass for a difference
        own = find_evolving(self.network)
        calls, self.expand = inspect(self.network, own, inputs)
        used = positions(own, calls)
        self._targets = find_evolving(self.network, used)
        self.evolving = find_evolving(self.evaluated, used)
        self._plan()
        if self.fixed:
            warnings.warn(f"these stay as they are: {', '.join(self.fixed)}", stacklevel=4)

    def _follow_the_network(self, inputs: Tensor) -> Tensor:
        """Inputs in the dtype of the forward, and a copied network brought up to date."""
        if self.evaluated is self.network:
            return inputs
        for copied, own in zip(self.evaluated.parameters(), self.network.parameters(), strict=True):
            copied.copy_(own)
        dtype = self.evolving.weights[0].dtype
        return inputs.to(dtype) if inputs.is_floating_point() else inputs

    def _prepared(self, outputs: Tensor, labels: Any, keys: Keys) -> tuple[Any, Tensor | None]:
        """What the fitness reads in place of labels, and the unperturbed network's own scores."""
        if not hasattr(self.fitness, "prepare"):
            return labels, None
        place = len(self.evolving.weights) + len(self.evolving.biases)  # after the parameters
        generator = keys.generator(place)
        if distributed.count() == 1 or _is_own(getattr(self.fitness, "fitness", self.fitness)):
            return self.fitness.prepare(outputs[0], labels, generator)

        def ask() -> Any:
            return self.fitness.prepare(outputs[0], labels, generator), self.state_dict()

        prepared, state = distributed.from_first(ask)
        self.load_state_dict(state)
        return prepared

    def _ask(self, outputs: Tensor, labels: Any) -> Tensor:
        """The fitness of outputs; one from elsewhere is asked by the first process alone."""
        if _is_own(self.fitness):
            return self.fitness(outputs, labels)
        return distributed.from_first(lambda: self.fitness(outputs, labels))

    @property
    def _asked_at_the_end(self) -> bool:
        """Whether a fitness from elsewhere waits for the outputs of all processes' members."""
        return distributed.count() > 1 and not _is_own(self.fitness)

    def _score(self, step: Step, blocks: list[Block], inputs: Tensor, labels: Any) -> Tensor:
        """Scores of the members of some blocks of one layer, (P,) or (P, B)."""
        layer, members = blocks[0].layer, blocks[-1].stop - blocks[0].start
        noise = self.members.draw(step, blocks)
        order = [call.index for call in step.calls]
        # up to the first call that members change, all of them do what the network does
        known = step.calls[: 1 if layer is None else order.index(layer) + 1]
        seen = inputs.expand(members if self.expand else 1, *inputs.shape)
        found = self._scorers[layer](noise, [call.y for call in known], seen, labels)
        if self._asked_at_the_end:
            return found
        if not _is_own(self.fitness):
            found = self.fitness(found, labels)
        return self._checked(found, members, len(inputs))

    def _checked(self, scores: Tensor, members: int, examples: int) -> Tensor:
        """Scores in the form that the members read: (P,), or (P, B). Raises FitnessError."""
        check_scores(scores, members, examples, by_example=self.members.by_example)
        dtype = self.evolving.weights[0].dtype
        if dtype != torch.int8:  # whose scores stay integers
            scores = scores.to(self.device, torch.promote_types(dtype, torch.float32))
        if self.members.by_example:
            return scores
        return scores.mean(1) if scores.dim() == 2 else scores

    def _scorer(self, layer: int | None) -> Callable[..., Tensor]:
        """From the noise of members of one layer to their scores, or to their outputs for a fitness
        that no compiler should follow: it may read files and talk to programs."""
        network, members, evolving = self.evaluated, self.members, self.evolving
        fitness = self.fitness if _is_own(self.fitness) else None

        def score(
            noise: dict[str, Tensor], known: list[Tensor], inputs: Tensor, labels: Any
        ) -> Tensor:
            of_layer: list[int] = []

            def add(call, index, bias, x, y):
                if layer not in (None, index):
                    return y
                of_layer.append(call)
                place = evolving.bias_index(bias)
                return members.add(noise, len(of_layer) - 1, index, place, x, y)

            outputs = _widened(forward(network, evolving.weights, known, add, inputs))
            return outputs if fitness is None else fitness(outputs, labels)

        return score

    def _fused_scorer(self) -> Callable[..., Tensor]:
        """The same by the fused kernel. Raises BackendError where it does not fit."""
        if self.device.type != "cuda" or not fused.fits(self.evaluated, self.members):
            raise BackendError(
                "backend fused is for antithetic batch members of the MLP on CUDA (try compile)"
            )
        fitness = self.fitness if _is_own(self.fitness) else None

        def score(
            noise: dict[str, Tensor], known: list[Tensor], inputs: Tensor, labels: Any
        ) -> Tensor:
            outputs = _widened(fused.mlp_forward(self.evaluated, noise, known[0], inputs[0]))
            return outputs if fitness is None else fitness(outputs, labels)

        return score


def _widened(outputs: Tensor) -> Tensor:
    """Of a forward in few bits the outputs in float32: members differ by little."""
    return outputs.float() if outputs.dtype in (torch.bfloat16, torch.float16) else outputs


def _is_own(fitness: Fitness) -> bool:
    """Whether a fitness is the package's, which the compiler can follow."""
    return getattr(fitness, "__module__", "").startswith("eggroll.")
