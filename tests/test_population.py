"""Population forward: the same as forming every member, in any shape, however it is cut."""

import sys

import pytest
import torch
from conftest import run_command
from torch import nn

from eggroll import (
    MLP,
    Evolution,
    Population,
    PopulationError,
    cross_entropy,
    plain_linear,
    reference_forward,
)
from eggroll.noise import CPU_BLOCK
from eggroll.perturbed import PerturbedLinear


def fast_forward(population, inputs, chunk_size=None):
    with torch.no_grad():
        return torch.cat([c.forward(inputs) for c in population.chunks(chunk_size)])


@pytest.mark.parametrize("rank", [1, 2, 3, 4])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("sizes", [(7, 5, 3), (1, 1, 1), (33, 17, 10)])
def test_population_forward_equals_materialised_forward(rank, bias, sizes):
    network = MLP(*sizes, bias=bias, seed=2)
    if bias:
        for layer in network.layers:
            nn.init.normal_(layer.bias)
    inputs = torch.randn(13, sizes[0])
    population = Population(network, 2 * CPU_BLOCK + 10, rank, 0.3, seed=4, step=5)
    expected = reference_forward(population, inputs).detach()
    torch.testing.assert_close(fast_forward(population, inputs), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_population_forward_follows_the_dtype_of_the_weights(dtype):
    network = MLP(20, 16, 10, seed=2).to(dtype)
    inputs = torch.randn(8, 20, dtype=dtype)
    population = Population(network, 8, 2, 0.05, seed=4, step=5)
    outputs = fast_forward(population, inputs)
    assert outputs.dtype == dtype
    tolerance = {torch.float64: 1e-10, torch.bfloat16: 0.1}[dtype]
    expected = reference_forward(population, inputs).detach()
    torch.testing.assert_close(outputs, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("pairs", [CPU_BLOCK - 1, CPU_BLOCK, 3 * CPU_BLOCK + 5])
@pytest.mark.parametrize("rank", [1, 2])
def test_chunk_size_changes_no_bit_of_scores_or_estimate(pairs, rank):
    inputs, labels = torch.randn(128, 784), torch.randint(0, 10, (128,))
    results = []
    for chunk_size in (1, 2 * CPU_BLOCK, 4 * CPU_BLOCK, 10**6):
        network = MLP(784, 64, 10, bias=True, seed=0)
        evolution = Evolution(
            network, cross_entropy(), population=2 * pairs, rank=rank, chunk_size=chunk_size
        )
        scores = evolution.evaluate(evolution.ask(), inputs, labels)
        evolution.tell(evolution.ask(), scores)
        results.append([scores, *(p.grad for p in network.parameters())])
    for other in results[1:]:
        for mine, theirs in zip(results[0], other, strict=True):
            assert torch.equal(mine, theirs)


def test_evaluation_never_writes_the_weights(small_network, batch):
    before = [p.clone() for p in small_network.parameters()]
    evolution = Evolution(small_network, cross_entropy(), population=10)
    evolution.estimate(*batch)
    for old, new in zip(before, small_network.parameters(), strict=True):
        assert torch.equal(old, new)


class Tokens(nn.Module):
    """A network of a user's own: sequences, a layer that is used twice, a normalisation."""

    def __init__(self):
        super().__init__()
        self.embed, self.mix, self.head = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 4)
        self.norm = nn.LayerNorm(8)

    def forward(self, x, linear=plain_linear):  # (..., T, 6) -> (..., 4)
        x = torch.sign(linear(self.embed, x))
        x = self.norm(linear(self.mix, x))
        x = torch.relu(linear(self.mix, x))
        return linear(self.head, x.mean(-2))


@pytest.mark.parametrize("rank", [1, 3])
def test_any_network_that_calls_linear_can_be_perturbed(rank):
    network, inputs = Tokens(), torch.randn(5, 9, 6)
    population = Population(network, 2 * CPU_BLOCK + 2, rank, 0.1, seed=0, step=0)
    expected = reference_forward(population, inputs).detach()
    torch.testing.assert_close(fast_forward(population, inputs), expected, rtol=1e-4, atol=1e-5)


class Preprocessing(nn.Module):
    """The members' inputs are no longer one shared view by the time of the first layer."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(6, 4)

    def forward(self, x, linear=plain_linear):
        return linear(self.layer, x * 2 + 1)


def test_inputs_may_be_changed_before_the_first_layer():
    network, inputs = Preprocessing(), torch.randn(5, 6)
    population = Population(network, 6, 2, 0.1, seed=0, step=0)
    expected = reference_forward(population, inputs).detach()
    torch.testing.assert_close(fast_forward(population, inputs), expected, rtol=1e-4, atol=1e-5)


def test_a_layer_that_bypasses_the_seam_is_refused():
    class Bypass(Preprocessing):
        def forward(self, x, linear=plain_linear):
            return self.layer(x)

    evolution = Evolution(Bypass(), cross_entropy(), population=4)
    with pytest.raises(PopulationError, match=r"linear\(layer, x\)"):
        evolution.estimate(torch.randn(5, 6), torch.zeros(5, dtype=torch.long))


def test_a_network_that_merges_its_leading_axis_is_told_so():
    class Flatten(Preprocessing):
        def forward(self, x, linear=plain_linear):
            return linear(self.layer, x.reshape(-1, 6))

    evolution = Evolution(Flatten(), cross_entropy(), population=4)
    with pytest.raises(PopulationError, match="leading axis"):
        evolution.estimate(torch.randn(5, 6), torch.zeros(5, dtype=torch.long))


def test_a_foreign_layer_is_refused(small_network):
    population = Population(small_network, 4, 1, 0.1, 0, 0)
    noise = next(population.chunks()).draw()
    linear = PerturbedLinear(population.layers, noise, population.sigma, [None])
    with pytest.raises(PopulationError, match=r"not an nn\.Linear of the evolving network"):
        linear(nn.Linear(7, 5), torch.randn(4, 3, 7))


def test_a_network_without_linear_layers_is_refused():
    with pytest.raises(PopulationError, match="nothing to evolve"):
        Evolution(nn.Conv2d(1, 1, 3), cross_entropy(), population=4)


PEAKS = """
import torch
from eggroll import MLP, Evolution, cross_entropy
from eggroll.memory import keep_freed_memory
from lab.clock import peak_memory_mb
keep_freed_memory()
inputs, labels = torch.randn(128, 784), torch.randint(0, 10, (128,))
for population, steps in ((256, 30), (5120, 3)):
    evolution = Evolution(MLP(), cross_entropy(), population=population)
    for _ in range(steps):
        evolution.estimate(inputs, labels)
    print(peak_memory_mb(torch.device("cpu")))
"""


def test_memory_does_not_grow_with_the_population():
    """In one process, the small population first: two processes' heaps differ by 5 % by chance."""
    done = run_command(sys.executable, "-c", PEAKS)
    small, large = map(float, done.stdout.split())
    assert large / small < 1.05


@pytest.mark.parametrize("examples", [12, 13])
def test_each_group_of_members_sees_its_own_part_of_the_batch(examples):
    """Parts may differ by one example; together they are the batch."""
    network = MLP(7, 5, 3, seed=2)
    inputs = torch.randn(examples, 7)
    population = Population(network, 4 * (CPU_BLOCK + 3), 1, 0.3, 0, 0, groups=2)
    expected = reference_forward(population, inputs).detach()
    seen = []
    for chunk in population.chunks(10**6):
        part = expected[chunk.members, chunk.group :: 2]
        torch.testing.assert_close(chunk.forward(chunk.part(inputs)), part, rtol=1e-4, atol=1e-5)
        seen.append((chunk.group, len(chunk), part.shape[1]))
    half = 2 * (CPU_BLOCK + 3)
    assert seen == [(0, half, -(-examples // 2)), (1, half, examples // 2)]


def test_groups_must_share_the_pairs_evenly(small_network):
    with pytest.raises(PopulationError, match="try a population of 12 with 3 groups"):
        Population(small_network, 10, 1, 0.1, 0, 0, groups=3)


def test_a_batch_smaller_than_the_groups_is_refused(small_network):
    evolution = Evolution(small_network, cross_entropy(), population=8, groups=4)
    with pytest.raises(PopulationError, match="batch of 3 cannot be shared among 4 groups"):
        evolution.estimate(torch.randn(3, 12), torch.zeros(3, dtype=torch.long))
