"""Every backend gives what the plain twin gives; what is not there says what to install."""

import shutil

import pytest
import torch

from eggroll import MLP, BackendError, Evolution, Population, cross_entropy
from eggroll.backends import WORTH_COMPILING, Compiled, Eager, choose_backend
from eggroll.noise import CPU_BLOCK

CPU = torch.device("cpu")
needs_compiler = pytest.mark.skipif(
    not any(map(shutil.which, ("c++", "g++", "clang++"))), reason="no C++ compiler"
)


def scores(backend, population, inputs, labels):
    found = []
    for chunk in population.chunks():
        seen, own = chunk.part(inputs), chunk.part(labels)
        shared = backend.share(population, seen)
        found.append(backend.score(chunk, seen, own, cross_entropy(), shared))
    return torch.cat(found)


@needs_compiler
@pytest.mark.parametrize(("rank", "bias"), [(1, False), (3, True)])
def test_compiled_scores_equal_the_plain_ones(rank, bias):
    network = MLP(33, 17, 10, bias=bias, seed=2)
    inputs, labels = torch.randn(12, 33), torch.randint(0, 10, (12,))
    compiled = Compiled()
    for step, sigma in ((0, 0.3), (1, 0.1)):  # neither noise nor sigma may be compiled in
        # a last block with fewer pairs, and groups of unequal parts, go through the twin
        population = Population(network, 4 * CPU_BLOCK + 8, rank, sigma, 4, step, groups=2)
        expected = scores(Eager(), population, inputs, labels)
        found = scores(compiled, population, inputs, labels)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@needs_compiler
def test_compiled_training_follows_eager_training():
    inputs, labels = torch.randn(16, 12), torch.randint(0, 5, (16,))
    results = []
    for backend in ("eager", "compile"):
        network = MLP(12, 8, 5, seed=0)
        evolution = Evolution(network, cross_entropy(), population=64, backend=backend)
        optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
        for _ in range(3):
            evolution.estimate(inputs, labels)
            optimizer.step()
        results.append(network.layers[0].weight.detach())
    torch.testing.assert_close(*results, rtol=1e-3, atol=1e-5)


def test_auto_never_compiles_a_short_run_on_a_cpu():
    assert choose_backend("auto", CPU, forward_passes=WORTH_COMPILING) == "eager"


@needs_compiler
def test_auto_compiles_a_long_run_on_a_cpu():
    assert choose_backend("auto", CPU, forward_passes=2 * WORTH_COMPILING) == "compile"


def test_auto_stays_eager_without_a_compiler(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda _: None)
    assert choose_backend("auto", CPU, forward_passes=1e12) == "eager"
    with pytest.raises(BackendError, match=r"C\+\+ compiler.*apt install"):
        choose_backend("compile", CPU)


@pytest.mark.parametrize(
    ("name", "message"), [("triton", "need a CUDA GPU"), ("jit", "not known.*try auto")]
)
def test_a_backend_that_is_not_there_says_so(name, message):
    with pytest.raises(BackendError, match=message):
        choose_backend(name, CPU)


def test_a_graph_is_captured_of_the_kernels_only(small_network):
    with pytest.raises(ValueError, match="capture needs the triton backend"):
        Evolution(small_network, cross_entropy(), population=4, capture=True)


def test_bfloat16_members_estimate_for_float32_weights():
    """The copy follows the weights, and the estimate lands on them."""
    network = MLP(12, 8, 5, seed=0)
    inputs, labels = torch.randn(16, 12), torch.randint(0, 5, (16,))
    evolutions = [
        Evolution(network, cross_entropy(), population=20_000, sigma=0.05, dtype=dtype)
        for dtype in (None, torch.bfloat16)
    ]
    for _ in range(2):
        grads = []
        for evolution in evolutions:
            evolution.estimate(inputs, labels)
            grads.append(network.layers[0].weight.grad.flatten())
        assert grads[1].dtype == torch.float32
        # 10,000 pairs each, of different noise: rounded normals are not the same normals
        assert torch.cosine_similarity(*grads, dim=0) > 0.95
        with torch.no_grad():
            network.layers[0].weight.mul_(-1)  # the next estimate must be of these weights
