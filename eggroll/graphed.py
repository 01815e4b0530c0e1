"""Training steps that a GPU repeats as one CUDA graph, where the CPU would launch each kernel anew.

def train(images, labels):
    scores = evolution.evaluate(images, labels)
    evolution.backward(scores)
    optimizer.step()
    return evolution.mean_fitness

step = GraphedStep(train, network, optimizer, evolution)
step.warm_up((images, labels))
for images, labels in batches:
    fitness = step(images, labels)

A graph repeats the same kernels on the same memory. What changes from step to step is written to
that memory before: the batch to buffers, learning rates to tensors, and to each generator of noise
the key of the step.
"""

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from eggroll.evolution import Evolution, process

Batch = tuple[Tensor, ...]
Work = Callable[[], None]
Generators = Callable[[], list[torch.Generator]]
Capture = Callable[[Work, Generators], Work]


def capture_cuda_graph(work: Work, generators: Generators) -> Work:
    """Return a function that repeats the kernels of `work`.

    generators  returns those that `work` draws from, once it has run
    """
    stream = torch.cuda.Stream()  # torch wants the first calls on a stream of their own
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            work()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    if torch.__version__ < "2.15":  # later ones find the generators that are drawn from
        for generator in generators():
            graph.register_generator_state(generator)
    with torch.cuda.graph(graph):
        work()
    return graph.replay


class GraphedStep:
    """A training step: on CUDA and in one process a graph, elsewhere a plain call.

    train      takes a batch and returns its mean fitness, 0-d. To be captured it must not wait for
               the GPU (.item(), .cpu()), and its optimizer has to read learning rates from the GPU
               (fused=True)
    network, optimizer, evolution  what it changes; evolution is None for backprop
    graph      False: always a plain call

    Batches of another shape than the captured one are plain calls.
    """

    def __init__(
        self,
        train: Callable[..., Tensor],
        network: nn.Module,
        optimizer: torch.optim.Optimizer,
        evolution: Evolution | None = None,
        *,
        graph: bool = True,
    ):
        self.train, self.network = train, network
        self.optimizer, self.evolution = optimizer, evolution
        _, processes = process()
        graph = graph and processes == 1 and next(network.parameters()).is_cuda
        self.capture: Capture | None = capture_cuda_graph if graph else None
        self._replay: Work | None = None
        self._fitness = torch.zeros(())

    @property
    def captured(self) -> bool:
        """Return whether full batches are a graph; known after `warm_up`."""
        return self._replay is not None

    def __call__(self, *batch: Tensor) -> Tensor:
        """Train on a batch, and return its mean fitness, 0-d; a graph's next call overwrites it."""
        if self._replay is None or batch[0].shape != self._batch[0].shape:
            return self.train(*batch)
        for buffer, tensor in zip(self._batch, batch, strict=True):
            buffer.copy_(tensor)
        for rate, group in zip(self._rates, self.optimizer.param_groups, strict=True):
            rate.fill_(group["lr"])
        if self.evolution:
            self.evolution.replay(self._replay)
        else:
            self._replay()
        return self._fitness

    def warm_up(self, batch: Batch, *others: Batch) -> None:
        """Train on all batches and capture the first one; then undo what that changed.

        Where that fails, one line says why, and steps are plain calls.
        """
        tensors = {key: tensor.clone() for key, tensor in self._changed().items()}
        state = self.evolution.state_dict() if self.evolution else {}
        self.train(*batch)
        if self.capture:
            for other in others:
                self.train(*other)
            self._replay = self._captured(self.capture, batch)
            self(*batch)
        with torch.no_grad():
            for key, tensor in self._changed().items():  # an optimizer's state begins at 0
                tensor.copy_(tensors[key]) if key in tensors else tensor.zero_()
        self.optimizer.zero_grad()
        if self.evolution:
            self.evolution.load_state_dict(state)

    def _changed(self) -> dict[Any, Tensor]:
        """Return the tensors that a step changes in place."""
        state = {
            (parameter, name): value
            for parameter, values in self.optimizer.state.items()
            for name, value in values.items()
            if isinstance(value, Tensor)
        }
        return {**self.network.state_dict(), **state}

    def _captured(self, capture: Capture, batch: Batch) -> Work | None:
        """Return a function that repeats the step on the buffers; None where that fails."""
        evolution, groups = self.evolution, self.optimizer.param_groups
        self._batch = tuple(tensor.clone() for tensor in batch)
        rates = [group["lr"] for group in groups]
        self._rates = [_as_tensor(group) for group in groups]

        def work() -> None:
            self._fitness = self.train(*self._batch)

        for group, rate in zip(groups, self._rates, strict=True):
            group["lr"] = rate
        if evolution:
            evolution.capturing = True
        try:
            return capture(work, lambda: evolution.generators if evolution else [])
        except RuntimeError as error:
            reason = " ".join(str(error).split())[:100]
            warnings.warn(f"no CUDA graph ({reason}): steps take longer", stacklevel=3)
            return None
        finally:
            if evolution:
                evolution.capturing = False
            for group, rate in zip(groups, rates, strict=True):
                group["lr"] = rate  # schedules compute with Python's numbers


def _as_tensor(group: dict[str, Any]) -> Tensor:
    """Return the learning rate of a group of parameters as a tensor on their device."""
    parameter = group["params"][0]
    dtype = parameter.dtype if parameter.is_floating_point() else torch.float64
    return torch.full((), group["lr"], dtype=dtype, device=parameter.device)
