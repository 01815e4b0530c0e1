"""Scores of an MLP's members by C++ loops on a CPU: torch's to rounding, and several times as fast.

In torch, members write every activation to memory. mlp_loops.cpp goes from what the perturbed layer
wrote to the scores in tiles that stay in the caches. `find` says what it covers.

Shapes: n directions, K blocks, P = K n members, B examples, I / O inputs / outputs, C classes.
"""

from collections.abc import Mapping
from functools import cached_property, partial
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

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

    loops: ClassVar[Loops] = LOOPS

    def __init__(self, layers: list[Layer], activations: tuple):
        self.layers, self.activation = layers, ACTIVATIONS.index(activations)

    def begin(self, calls: list[Call], score: Score) -> None:
        """Lay out a step's weights and unperturbed outputs, (O, padded examples)."""
        assert calls[0].y.dtype == torch.float32, "the network's dtype has changed"
        self.kind, self.target = score.kind, self._padded(score.target.T)
        self.scale, start = torch.tensor(score.scale), score.unperturbed
        subtracted = torch.zeros_like(self.target) if start is None else self._padded(start.T)
        outputs = [self._padded(call.y[0].T) for call in calls]
        self.still = [*outputs[:-1], subtracted]
        outputs[-1] = outputs[-1] - subtracted
        # of the layers after the first: it is never a later layer
        self.weights = [layer.module.weight.T.contiguous() for layer in self.layers[1:]]
        self.sums = outputs[1:]
        self.biases = [
            _expanded(layer.module.bias, y)
            for layer, y in zip(self.layers[1:], self.sums, strict=True)
        ]
        if self.biases:
            self.biases[-1] = self.biases[-1] - subtracted

    def scores(self, draw: Draw, moved: Tensor) -> Tensor:
        """Return scores (P, B), by direction, of what the perturbed layer wrote, (n, B, O)."""
        first, (n, examples, units) = draw.first_call, moved.shape
        weights, still = self.weights[first:], self.still[first]
        starts = self.sums[first : first + 1] + self.biases[first + 1 :]
        out = moved.new_empty(n, draw.blocks, examples)
        sizes = (n, examples, still.shape[1], units, draw.units, len(weights))
        outputs = torch.tensor([weight.shape[1] for weight in weights])
        later = (_addresses(weights), _addresses(starts), outputs)
        self.loops.call("members", moved, still, *sizes, *later, *self._arithmetic(first), out)
        return out.flatten(0, 1)

    def _arithmetic(self, first: int) -> tuple[Tensor | int, ...]:
        """Return arguments for the activations and scores of members of layer `first`."""
        return self.activation, self.kind, self.target, self.scale

    def _padded(self, x: Tensor) -> Tensor:
        """Return x (O, B) with zeros for the examples that fill the last tile."""
        return F.pad(x, (0, -x.shape[1] % self._tile)).contiguous()

    @cached_property
    def _tile(self) -> int:
        """Examples that the loops work on together."""
        assert self.loops.library
        return self.loops.library.tile()


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


def _expanded(bias: Tensor | None, y: Tensor) -> Tensor:
    """Return a bias (O,) for each example of y (O, padded examples)."""
    return torch.zeros_like(y) if bias is None else bias[:, None].expand_as(y).contiguous()


def _addresses(tensors: list[Tensor]) -> Tensor:
    return torch.tensor([tensor.data_ptr() for tensor in tensors])
