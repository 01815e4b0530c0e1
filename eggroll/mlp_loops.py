"""Scores of an MLP's members by C++ loops on a CPU: torch's to rounding, and several times as fast.

In torch, members write every activation to memory. mlp_loops.cpp goes from what the perturbed layer
wrote to the scores in tiles that stay in the caches. `find` says what it covers.

Shapes: n directions, K blocks, P = K n members, B examples, I / O inputs / outputs, C classes.
"""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from eggroll.blocks import Call, Draw, Layer
from eggroll.compiled import Loops
from eggroll.fitness import Fitness, accuracy, cross_entropy, smoothed_targets

LOOPS = Loops(
    Path(__file__).with_name("mlp_loops.cpp"),
    "members are scored by torch, about 5 times as slowly",
)
GELU, RELU, SIGN = (F.gelu, nn.GELU), (F.relu, torch.relu, nn.ReLU), (torch.sign,)
ACTIVATIONS = (GELU, RELU, SIGN)
CROSS_ENTROPY, ACCURACY, LINEAR = range(3)  # kinds of score


class Score(NamedTuple):
    """A score that the loops compute of the outputs."""

    kind: int
    target: Tensor  # (B, C)
    scale: float = 1.0  # of the outputs
    unperturbed: Tensor | None = None  # outputs (B, C), which a LINEAR score subtracts


def score_of(fitness: Fitness, labels: Tensor, outputs: Tensor) -> Score:
    """Return the score that equals cross_entropy or accuracy."""
    function, options = _unwrapped(fitness)
    if function is accuracy:
        classes = torch.arange(outputs.shape[-1], device=outputs.device)
        return Score(ACCURACY, (classes == labels.view(-1, 1)).to(outputs))
    target = smoothed_targets(labels, outputs, options.get("label_smoothing", 0.0))
    return Score(CROSS_ENTROPY, target, 1 / options.get("temperature", 1.0))


class MlpLoops:
    """The loops for one network: `begin` at each step, then `scores` of each chunk."""

    def __init__(self, layers: list[Layer], activations: tuple):
        self.layers, self.activation = layers, ACTIVATIONS.index(activations)
        self.tile = LOOPS.library.tile() if LOOPS.library else 1

    def begin(self, calls: list[Call], score: Score) -> None:
        """Lay out a step's weights and unperturbed outputs, (O, padded examples)."""
        self.weights = [layer.module.weight.T.contiguous() for layer in self.layers[1:]]
        self.sums = [self._padded(call.y[0].T) for call in calls]
        biases = [layer.module.bias for layer in self.layers]
        self.biases = [
            torch.zeros_like(y) if bias is None else bias[:, None].expand_as(y).contiguous()
            for bias, y in zip(biases, self.sums, strict=True)
        ]
        self.subtracted = torch.zeros_like(self.sums[-1])
        if score.unperturbed is not None:
            self.subtracted = self._padded(score.unperturbed.T)
        for starts in (self.sums, self.biases):
            starts[-1] = starts[-1] - self.subtracted
        self.kind, self.target = score.kind, self._padded(score.target.T)
        self.scale = torch.tensor(score.scale)

    def scores(self, draw: Draw, moved: Tensor) -> Tensor:
        """Return scores (P, B), by direction, of what the perturbed layer wrote, (n, B, O)."""
        assert moved.dtype == torch.float32, "the network's dtype has changed"
        first, (n, examples, units) = draw.first_call, moved.shape
        weights = self.weights[first:]  # of the later layers
        starts = self.sums[first + 1 : first + 2] + self.biases[first + 2 :]
        still = self.sums[first] if weights else self.subtracted
        out = moved.new_empty(n, draw.blocks, examples)
        sizes = (n, examples, still.shape[1], units, draw.units, len(weights))
        outputs = torch.tensor([weight.shape[1] for weight in weights])
        parts = (_addresses(weights), _addresses(starts), outputs, self.activation, self.kind)
        LOOPS.call("members", moved, still, *sizes, *parts, self.target, self.scale, out)
        return out.flatten(0, 1)

    def _padded(self, x: Tensor) -> Tensor:
        """Return x (O, B) with zeros for the examples that fill the last tile."""
        return F.pad(x, (0, -x.shape[1] % self.tile)).contiguous()


def find(
    network: nn.Module, layers: list[Layer], calls: list[Call], fitness: Fitness, *, smoothed: bool
) -> MlpLoops | None:
    """Return the loops where they cover the network, in evaluation mode, and the fitness.

    That is float32 layers of type nn.Linear with inputs (B, I), one of ACTIVATIONS between them,
    and nothing after the last; cross_entropy, accuracy, and any smoothed fitness.
    """
    covered = smoothed or _unwrapped(fitness)[0] in (cross_entropy, accuracy)
    floats = all(call.y.dim() == 3 and call.y.dtype == torch.float32 for call in calls)
    if covered and floats and [call.layer for call in calls] == list(range(len(layers))):
        kinds = {_activations(network.train(mode), len(layers)) for mode in (True, False)}
        activations = kinds.pop()
        if activations and not kinds and LOOPS.available(calls[0].y):
            return MlpLoops(layers, activations)
    return None


def _activations(network: nn.Module, layers: int) -> tuple | None:
    """Return the one of ACTIVATIONS that is between the nn.Linear with which the network ends."""
    if any(map(_is_patched, network.modules())):
        return None
    try:
        traced = fx.symbolic_trace(network)
    except Exception:  # control flow that depends on the input
        return None
    modules, kinds = dict(traced.named_modules()), set()
    node: Any = next(node for node in traced.graph.nodes if node.op == "output").args[0]
    for number in range(layers):
        if number:
            kinds.add(_kind(node, modules))
            node = _input(node)
        if type(_module(node, modules)) is not nn.Linear:
            return None
        node = _input(node)
    return kinds.pop() if len(kinds) == 1 else None


def _is_patched(module: nn.Module) -> bool:
    """Return whether a module computes something that a trace does not show."""
    return bool(module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module))


def _kind(node: Any, modules: Mapping[str, nn.Module]) -> tuple | None:
    """Return the one of ACTIVATIONS that the node computes."""
    module = _module(node, modules)
    options = {"approximate": getattr(module, "approximate", "none"), **getattr(node, "kwargs", {})}
    if options["approximate"] != "none":
        return None
    called = type(module) if module else getattr(node, "target", None)
    return next((kind for kind in ACTIVATIONS if called in kind), None)


def _module(node: Any, modules: Mapping[str, nn.Module]) -> nn.Module | None:
    """Return the module that a node calls."""
    called = isinstance(node, fx.Node) and node.op == "call_module"
    return modules.get(str(node.target)) if called else None


def _input(node: Any) -> Any:
    """Return the only positional argument of a node."""
    return node.args[0] if isinstance(node, fx.Node) and len(node.args) == 1 else None


def _unwrapped(fitness: Fitness) -> tuple[Any, dict[str, Any]]:
    """Return a function and the options that partial gives it."""
    if isinstance(fitness, partial) and not fitness.args:
        return fitness.func, fitness.keywords
    return fitness, {}


def _addresses(tensors: list[Tensor]) -> Tensor:
    return torch.tensor([tensor.data_ptr() for tensor in tensors])
