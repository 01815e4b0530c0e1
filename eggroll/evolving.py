"""What of a network evolves, and whether the network leaves the member axis alone."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from eggroll.members import BatchMembers, Block, PopulationError, Step
from eggroll.noise import Keys
from eggroll.seam import Call, forward, record, through


@dataclass(frozen=True)
class Evolving:
    """Parameters of a network that members perturb, each once, and the names of all others."""

    weights: list[nn.Parameter]
    biases: list[nn.Parameter]
    fixed: list[str]

    def bias_index(self, bias: Tensor | None) -> int | None:
        for index, known in enumerate(self.biases):
            if bias is known:
                return index
        return None


def find_evolving(network: nn.Module, used: tuple[set[int], set[int]] | None = None) -> Evolving:
    """Weights and biases of every nn.Linear, in the order in which modules are registered.

    Frozen parameters (requires_grad=False) are left out, and those that are not among the positions
    `used`. Raises PopulationError where nothing is left.
    """
    linears = [module for module in network.modules() if isinstance(module, nn.Linear)]
    weights = _distinct([layer.weight for layer in linears])
    biases = _distinct([layer.bias for layer in linears if layer.bias is not None])
    if used is not None:
        weights = [weight for index, weight in enumerate(weights) if index in used[0]]
        biases = [bias for index, bias in enumerate(biases) if index in used[1]]
    if not weights:
        raise PopulationError("the network has no nn.Linear to evolve, or never calls F.linear")
    evolving = {id(parameter) for parameter in (*weights, *biases)}
    fixed = [name for name, p in network.named_parameters() if id(p) not in evolving]
    return Evolving(weights, biases, fixed)


def positions(evolving: Evolving, calls: Sequence[Call]) -> tuple[set[int], set[int]]:
    """Which of the weights and of the biases the calls used."""
    biases = {evolving.bias_index(call.bias) for call in calls} - {None}
    return {call.index for call in calls}, biases


def _distinct(parameters: list[nn.Parameter]) -> list[nn.Parameter]:
    # integer parameters cannot require a gradient
    trained = [p for p in parameters if p.requires_grad or not p.is_floating_point()]
    return list({id(p): p for p in trained}.values())


def inspect(network: nn.Module, evolving: Evolving, inputs: Tensor) -> tuple[list[Call], bool]:
    """The network's calls, and whether inputs must be expanded to all members, since a leading axis
    of 1 does not broadcast in it.

    Found out by comparing two members with each by itself, its perturbations formed. Raises
    PopulationError, with what to write instead, for a network that moves or folds the leading axis.
    """
    if not evolving.weights[0].is_floating_point():  # integer networks are the package's own
        return record(network, evolving.weights, inputs)[0], False
    training = network.training
    network.eval()  # dropout would draw different masks
    try:
        plain = network(inputs)  # what fails here is the network's own error
        failure = ""
        for expand in (False, True):
            try:
                calls, outputs = record(network, evolving.weights, inputs)
                if outputs.shape == (1, *plain.shape) and _members_agree(
                    network, evolving, calls, inputs, plain, expand
                ):
                    return calls, expand
            except Exception as error:  # any shape error of any layer
                failure = f" ({' '.join(str(error).split())[:80]})"
    finally:
        network.train(training)
    members = (2, *inputs.shape)
    raise PopulationError(
        f"the network does not keep the leading axis of inputs {members}, the members{failure}: "
        "address axes from the end (flatten(-3) instead of flatten(1), mean(-2) instead of mean(1))"
    )


def _members_agree(
    network: nn.Module,
    evolving: Evolving,
    calls: Sequence[Call],
    inputs: Tensor,  # (B, ...)
    plain: Tensor,  # the network's outputs for them
    expand: bool,
) -> bool:
    """Whether two members' outputs are those that each has by itself, whatever they perturb."""
    keys = Keys(0, 0, inputs.device)
    step = Step(keys, evolving.weights, evolving.biases, calls, plain)
    # large enough to be told from rounding, relative to each network's own weights
    sigma = 0.1 * float(torch.stack([w.float().std(correction=0) for w in step.weights]).mean())
    members = BatchMembers(2, sigma=sigma or 0.1, antithetic=False)
    seen = inputs.expand(2, *inputs.shape) if expand else inputs.unsqueeze(0)
    for layer in (None, *range(len(step.weights))):
        noise = members.draw(step, [Block(layer, 0, 0, 2)])

        def add(call, index, bias, x, y, noise=noise):
            return members.add(noise, call, index, evolving.bias_index(bias), x, y)

        found = forward(network, evolving.weights, [], add, seen)
        for member, outputs in enumerate(found):
            formed = _one_member(network, evolving, noise, member, inputs)
            if outputs.shape != formed.shape or not _close(outputs, formed, plain):
                return False
    return True


def _one_member(
    network: nn.Module, evolving: Evolving, noise: dict[str, Tensor], member: int, inputs: Tensor
) -> Tensor:
    """Outputs (B, ...) of one member by itself, its perturbations formed in full."""

    def visit(call, index, bias, x, product):
        y, place = product(), evolving.bias_index(bias)
        if f"a{index}" in noise:
            y = y + x @ (noise[f"a{index}"][member].T @ noise[f"b{index}"][member]).T
        return y + noise[f"e{place}"][member] if f"e{place}" in noise else y

    return through(network, evolving.weights, visit, inputs)


def _close(found: Tensor, formed: Tensor, plain: Tensor) -> bool:
    """Most outputs agree, relative to what the perturbation did: rounding may flip a sign unit."""
    error, effect = (found - formed).abs().float(), (formed - plain).abs().float()
    tolerance = 0.05 * effect.mean() + 1e-4 * formed.abs().float().mean()
    return bool((error <= tolerance).float().mean() > 0.9)
