"""A whole step as a captured CUDA graph: one launch where there were dozens."""

from collections.abc import Callable

import torch
from torch import Tensor

Step = Callable[[Tensor, Tensor], Tensor]


def capturing() -> bool:
    """Whether a graph is being captured now, in which nothing may wait for the device."""
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


class CapturedStep:
    """Replays `step(inputs, labels)`, captured at the first batch, for every batch of its shape.

    Nothing in `step` may wait for the device, and what changes from step to step (key, sigma)
    must lie in tensors that are written before the call. The parameters' `.grad` are where the
    step leaves its results. A batch of another shape, as at the end of an epoch, is not captured:
    it takes `step` as it is.
    """

    def __init__(self, step: Step, parameters: list[Tensor]):
        self.step, self.parameters = step, parameters
        self.graph: torch.cuda.CUDAGraph | None = None

    def __call__(self, inputs: Tensor, labels: Tensor) -> Tensor:
        if self.graph is None:
            self._capture(inputs, labels)
        if inputs.shape != self.inputs.shape:
            return self.step(inputs, labels)
        self.inputs.copy_(inputs)
        self.labels.copy_(labels)
        self.graph.replay()
        for parameter, grad in zip(self.parameters, self.grads, strict=True):
            parameter.grad = grad
        return self.fitness.clone()  # the next replay overwrites it

    def _capture(self, inputs: Tensor, labels: Tensor) -> None:
        self.inputs, self.labels = inputs.clone(), labels.clone()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # compiles the kernels and fills cuBLAS's workspaces
            for _ in range(3):
                self.step(self.inputs, self.labels)
        torch.cuda.current_stream().wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.fitness = self.step(self.inputs, self.labels)
        self.grads = [parameter.grad for parameter in self.parameters]
