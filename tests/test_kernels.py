"""The Triton kernels against plain tensors: the same noise, the same outputs, the same estimate.

Triton decides when it is imported whether it compiles or interprets. So without a GPU the checks
run in a process of their own, on CPU tensors, with TRITON_INTERPRET=1; with one they run here.
What GPUs would run is compiled for them in any case.
"""

import os
import re
import sys
from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest
import torch
from conftest import ROOT, run_command
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F

from eggroll import MLP, Population, PopulationError
from eggroll.estimator import materialised_estimate

triton = pytest.importorskip("triton")

from triton import language as tl  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from eggroll import kernels  # noqa: E402
from eggroll.kernels import estimate, project, tiles, twin  # noqa: E402
from eggroll.kernels.backend import Triton  # noqa: E402

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"

DTYPES = [torch.float32, torch.bfloat16]
# of the largest value; bfloat16 has 8 bits, and is rounded after each layer
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
SHARED_MEMORY = {80: 99 * 1024, 90: 227 * 1024}  # bytes that a block may have


def check(test):
    """A test that launches kernels: collected where they can run."""
    return test if INTERPRETED or DEVICE == "cuda" else None


def check_on_gpu(test):
    return test if DEVICE == "cuda" else None


def launch_free(test):
    """A test that launches nothing: the interpreter's process need not repeat it."""
    return None if INTERPRETED else test


@launch_free
def test_importing_the_algorithm_does_not_import_triton():
    code = (
        "import sys, eggroll; sys.exit(any(m.startswith('eggroll.kernels') for m in sys.modules))"
    )
    assert run_command(sys.executable, "-c", code).returncode == 0


@launch_free
def test_all_checks_pass_in_the_interpreter():
    command = [sys.executable, "-m", "pytest", "-n0", ROOT / "tests" / "test_kernels.py"]
    done = run_command(*command, env={"TRITON_INTERPRET": "1"}, timeout=900)
    assert done.returncode == 0, done.stdout
    assert int(re.search(r"(\d+) passed", done.stdout)[1]) > 40


# ---------------------------------------------------------------------------------------- helpers


def key_of(seed=5, step=77):
    return torch.tensor([seed, step], device=DEVICE)


def make_network(in_features=37, hidden=19, outputs=10, *, bias=False, dtype=torch.float32):
    network = MLP(in_features, hidden, outputs, bias=bias, seed=1)
    if bias:
        for layer in network.layers:
            nn.init.normal_(layer.bias)
    return network.to(DEVICE, dtype)


def make_layer(in_features=37, out_features=19, *, bias=True, dtype=torch.float32):
    return nn.Linear(in_features, out_features, bias=bias).to(DEVICE, dtype).requires_grad_(False)


def draw(layer, rank, start, stop, *, seed=5, step=77, layer_index=0):
    key = key_of(seed, step)
    return kernels.draw_layer(layer, rank, key=key, layer_index=layer_index, start=start, stop=stop)


def members(layer, noise, sigma):
    """Weights (P, O, I) and biases (P, O) or None of all members of one layer, in float64."""
    a, b = noise.a.double(), noise.b.double()
    step = sigma * a.mT @ b / a.shape[1] ** 0.5
    signed = torch.stack([step, -step], 1).flatten(0, 1)
    if noise.bias is None:
        return layer.weight.double() + signed, None
    shift = sigma * torch.stack([noise.bias, -noise.bias], 1).flatten(0, 1).double()
    return layer.weight.double() + signed, layer.bias.double() + shift


@torch.no_grad()
def reference_forward(network, inputs, rank, sigma, start, stop):
    """Outputs (P, B, ...) in float64, one materialised member after the other."""
    layers = [
        members(layer, draw(layer, rank, start, stop, layer_index=index), sigma)
        for index, layer in enumerate(network.layers)
    ]
    outputs = []
    for member in range(2 * (stop - start)):
        state = {f"layers.{i}.weight": weight[member] for i, (weight, _) in enumerate(layers)}
        if layers[0][1] is not None:
            state |= {f"layers.{i}.bias": bias[member] for i, (_, bias) in enumerate(layers)}
        outputs.append(functional_call(network, state, (inputs.double(),)))
    return torch.stack(outputs)


def run_forward(network, inputs, rank=2, sigma=0.3, start=1, stop=3, fuse=True, key=None):
    sigma = torch.as_tensor(sigma, device=DEVICE)
    key = key_of() if key is None else key
    return kernels.forward(
        network, inputs, key=key, start=start, stop=stop, rank=rank, sigma=sigma, fuse=fuse
    )


def run_linear(layer, x, rank=2, sigma=0.3, start=1, stop=3, gelu=False):
    place = {"layer_index": 0, "start": start, "stop": stop}
    sigma = torch.tensor(sigma, device=DEVICE)
    return kernels.linear(layer, x, key=key_of(), rank=rank, sigma=sigma, gelu=gelu, **place)


def run_estimate(layer, weights, rank):
    return kernels.estimate_layer(
        layer, key=key_of(), layer_index=0, pairs=len(weights), rank=rank, weights=weights
    )


def assert_near(actual, expected, dtype=torch.float32):
    assert actual.shape == expected.shape
    error = (actual.double() - expected.double()).abs().max() / expected.abs().max()
    assert error < TOLERANCE[dtype], f"{error:.1e} of the largest value"


@pytest.fixture(params=["shipped", "small"])
def any_tiles(request, monkeypatch):
    """The tiles as shipped, one of which covers a layer, and small ones, of which it takes many."""
    if request.param == "small":
        small = tiles.Tile(rows=16, columns=16, depth=16)
        for name in ("DRAW", "PROJECT_OWN", "HIDDEN_SHARED", "ESTIMATE_BIAS"):
            monkeypatch.setattr(tiles, name, small)
        for name in ("PROJECT_SHARED", "HIDDEN_OWN", "MLP", "ESTIMATE"):
            monkeypatch.setattr(tiles, name, dict.fromkeys(DTYPES, small))


# ------------------------------------------------------------------------------------------ noise


@launch_free
@pytest.mark.parametrize(
    ("counter", "seed", "words"),
    [
        ([0] * 4, 0, "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ([0xFFFFFFFF] * 4, 0xFFFFFFFFFFFFFFFF, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            0x299F31D0A4093822,
            "d16cfe09 94fdcceb 5001e420 24126ea1",
        ),
    ],
)
def test_the_twin_gives_the_words_that_philox_was_published_with(counter, seed, words):
    assert [f"{int(word):08x}" for word in twin.philox(counter, seed)] == words.split()


@triton.jit
def words_kernel(key_ptr, out_ptr, pair, stream):
    group = tl.arange(0, 16).to(tl.uint32)
    seed, step = tl.load(key_ptr), tl.load(key_ptr + 1).to(tl.uint32)
    words = tl.philox(seed, group, pair.to(tl.uint32), stream.to(tl.uint32), step)
    for i in tl.static_range(4):
        tl.store(out_ptr + i * 16 + tl.arange(0, 16), words[i].to(tl.int64))


@check
@pytest.mark.parametrize("seed", [0, 7, 2**63 - 1, -(2**40) - 3])
@pytest.mark.parametrize("step", [0, 123456])
def test_twin_and_kernels_agree_in_every_bit_of_the_random_words(seed, step):
    out = torch.empty(4, 16, dtype=torch.int64, device=DEVICE)
    words_kernel[(1,)](key_of(seed, step), out, 12345, 9 << 16)
    expected = twin.philox((np.arange(16), 12345, 9 << 16, step), seed)
    assert np.array_equal(out.cpu().numpy(), np.stack(expected).astype(np.int64))


@check
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("seed", "step"), [(0, 0), (-(2**40) - 3, 99), (2**62, 2**32 - 1)])
@pytest.mark.usefixtures("any_tiles")
def test_drawn_noise_equals_its_twin(dtype, seed, step):
    layer = make_layer(dtype=dtype)
    place = {"key": key_of(seed, step), "layer_index": 3, "start": 2, "stop": 7}
    drawn = kernels.draw_layer(layer, 3, **place)
    expected = kernels.draw_layer_twin(layer, 3, **place)
    # the interpreter cuts off where a GPU rounds to bfloat16: one unit in the last place
    rtol, atol = (2e-6, 2e-6) if dtype == torch.float32 else (2**-7, 1e-6)
    for name in ("a", "b", "bias"):
        actual = getattr(drawn, name)
        assert actual.dtype == dtype
        torch.testing.assert_close(actual, getattr(expected, name), rtol=rtol, atol=atol)


@check
@pytest.mark.usefixtures("any_tiles")
def test_noise_of_a_pair_depends_on_its_index_alone():
    layer = make_layer()
    whole = draw(layer, 3, 0, 9)
    for start, stop in [(0, 4), (4, 5), (5, 9)]:
        part = draw(layer, 3, start, stop)
        for name in ("a", "b", "bias"):
            assert torch.equal(getattr(part, name), getattr(whole, name)[start:stop])
    assert torch.equal(draw(layer, 2, 0, 9).a, whole.a[:, :2])


@launch_free
def test_noise_is_standard_normal():
    layer = make_layer(2048, 1024, bias=False)
    place = {"layer_index": 0, "start": 0, "stop": 200}
    numbers = kernels.draw_layer_twin(layer, 1, key=key_of(), **place).b.double().flatten()
    n = numbers.numel()
    for power, moment in [(1, 0), (2, 1), (3, 0), (4, 3), (6, 15)]:
        powers = numbers**power
        assert abs(powers.mean() - moment) < 5 * powers.std() / n**0.5, power
    for bound, share in [(1, 0.317311), (3, 0.0026998), (4.5, 6.795e-6)]:
        expected = share * n
        assert abs((numbers.abs() > bound).sum() - expected) < 5 * expected**0.5 + 1
    # numbers of one counter, and of neighbouring ones
    lags = [(numbers[:-lag] * numbers[lag:]).mean().item() for lag in (1, 2, 3, 4, 2048)]
    assert max(map(abs, lags)) < 5 / n**0.5
    squares = (numbers**2 - 1) / 2**0.5
    lags = [(squares[:-lag] * squares[lag:]).mean().item() for lag in (1, 2, 3, 4)]
    assert max(map(abs, lags)) < 5 / n**0.5


@launch_free
def test_seeds_steps_layers_factors_pairs_and_ranks_are_independent():
    layer = make_layer(1000, 1000)

    def noise(seed=5, step=7, layer_index=0, start=0):
        place = {"layer_index": layer_index, "start": start, "stop": start + 1}
        return kernels.draw_layer_twin(layer, 2, key=key_of(seed, step), **place)

    here = noise()
    vectors = [here.a[0, 0], here.a[0, 1], here.b[0, 0], here.b[0, 1], here.bias[0]]
    others = [{"seed": 6}, {"seed": 5 + 2**32}, {"step": 8}, {"layer_index": 1}, {"start": 1}]
    for other in others:
        elsewhere = noise(**other)
        vectors += [elsewhere.a[0, 0], elsewhere.b[0, 0], elsewhere.bias[0]]
    for one, two in combinations(vectors, 2):
        assert abs(torch.dot(one, two) / 1000) < 5 / 1000**0.5


# ---------------------------------------------------------------------------------------- forward


@check
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rank", [1, 3])
@pytest.mark.usefixtures("any_tiles")
def test_projections_equal_products_with_the_drawn_factor(dtype, rank):
    layer = make_layer(dtype=dtype)
    b = draw(layer, rank, 1, 4).b.double()
    place = {"key": key_of(), "layer_index": 0, "start": 1, "rank": rank}
    shared = torch.randn(9, 37, device=DEVICE, dtype=dtype)
    expected = torch.einsum("bi,nri->nrb", shared.double(), b)
    # products of bfloat16 are exact in float32, so both dtypes are held to float32's tolerance
    assert_near(project.project_shared(shared, stop=4, **place), expected)
    own = torch.randn(3, 18, 37, device=DEVICE, dtype=dtype)
    expected = torch.einsum("nbi,nri->nrb", own.double(), b)
    assert_near(project.project_own(own, **place), expected)


@check
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rank", "bias", "gelu"), [(1, False, True), (3, True, False)])
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.usefixtures("any_tiles")
def test_a_layer_equals_its_materialised_members(dtype, rank, bias, gelu, shared):
    layer = make_layer(bias=bias, dtype=dtype)
    x = torch.randn(1 if shared else 4, 9, 37, device=DEVICE, dtype=dtype).expand(4, 9, 37)
    weight, shift = members(layer, draw(layer, rank, 1, 3), 0.3)
    expected = x.double() @ weight.mT + (0 if shift is None else shift[:, None])
    expected = F.gelu(expected) if gelu else expected
    assert_near(run_linear(layer, x, rank, gelu=gelu), expected, dtype)


@check
def test_a_layer_takes_any_axes_between_members_and_features():
    layer = make_layer(13, 8)
    x = torch.randn(4, 3, 5, 13, device=DEVICE)
    y = run_linear(layer, x, start=0, stop=2)
    assert torch.equal(y, run_linear(layer, x.flatten(1, 2), start=0, stop=2).view(4, 3, 5, 8))
    shared = x[:1].expand(4, 3, 5, 13)
    assert_near(run_linear(layer, shared, start=0, stop=2)[0], y[0])


@check
@pytest.mark.parametrize("shared", [True, False])
def test_antithetic_members_average_to_the_unperturbed_layer(shared):
    layer = make_layer()
    x = torch.randn(1, 9, 37, device=DEVICE).expand(4, 9, 37)
    y = run_linear(layer, x if shared else x.clone())
    plus, minus = y[0::2], y[1::2]
    assert_near((plus + minus) / 2, layer(x[0::2]))
    assert (plus - minus).abs().amax((1, 2)).min() > 0.1


@check
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rank", "bias"), [(1, False), (2, True), (8, False)])
@pytest.mark.parametrize("fuse", [True, False])
def test_forward_equals_materialised_forward(dtype, rank, bias, fuse):
    network = make_network(bias=bias, dtype=dtype)
    inputs = torch.randn(7, 37, device=DEVICE, dtype=dtype)
    expected = reference_forward(network, inputs, rank, 0.3, 1, 3)
    assert_near(run_forward(network, inputs, rank, fuse=fuse), expected, dtype)


@check
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", [(13, 33, 3), (20, 16, 17)])
@pytest.mark.usefixtures("any_tiles")
def test_fused_and_layered_forward_agree_for_any_sizes(dtype, sizes):
    network = make_network(*sizes, bias=True, dtype=dtype)
    inputs = torch.randn(9, sizes[0], device=DEVICE, dtype=dtype)
    fused = run_forward(network, inputs)
    assert_near(fused, run_forward(network, inputs, fuse=False), dtype)
    assert_near(fused, reference_forward(network, inputs, 2, 0.3, 1, 3), dtype)


@check
def test_any_activation_is_applied_between_the_layers():
    network = make_network()
    network.activation = torch.tanh
    inputs = torch.randn(7, 37, device=DEVICE)
    expected = reference_forward(network, inputs, 2, 0.3, 1, 3)
    assert_near(run_forward(network, inputs), expected)


@check
@pytest.mark.parametrize("fuse", [True, False])
def test_chunks_change_no_bit_of_the_outputs(fuse):
    network = make_network(13, 7)
    inputs = torch.randn(5, 13, device=DEVICE)
    whole = run_forward(network, inputs, start=0, stop=3, fuse=fuse)
    for start, stop in [(0, 1), (1, 3)]:
        part = run_forward(network, inputs, start=start, stop=stop, fuse=fuse)
        assert torch.equal(part, whole[2 * start : 2 * stop])


@check
def test_key_and_sigma_are_read_anew_by_every_launch():
    network, inputs = make_network(), torch.randn(7, 37, device=DEVICE)
    key, sigma = key_of(5, 1), torch.tensor(0.3, device=DEVICE)
    first = run_forward(network, inputs, key=key, sigma=sigma)
    key[1] += 1
    second = run_forward(network, inputs, key=key, sigma=sigma)
    assert (first - second).abs().max() > 0.1
    sigma.zero_()
    unperturbed = run_forward(network, inputs, key=key, sigma=sigma)
    assert_near(unperturbed, network(inputs).detach().expand(4, -1, -1))


@check_on_gpu
@pytest.mark.parametrize("fuse", [True, False])
def test_a_captured_graph_replays_with_a_new_step(fuse):
    network, inputs = make_network(), torch.randn(7, 37, device=DEVICE)
    key, sigma = key_of(5, 1), torch.tensor(0.3, device=DEVICE)
    weights = torch.randn(3, device=DEVICE)

    def step():
        outputs = run_forward(network, inputs, key=key, sigma=sigma, fuse=fuse)
        return outputs, kernels.estimate_layer(
            network.layers[0], key=key, layer_index=0, pairs=3, rank=2, weights=weights
        )[0]

    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        replayed = step()
    key[1], sigma[()] = 9, 0.1
    graph.replay()
    for actual, expected in zip(replayed, step(), strict=True):
        assert torch.equal(actual, expected)


# --------------------------------------------------------------------------------------- estimate


@check
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rank", "bias", "pairs"), [(1, False, 5), (3, True, 3), (2, True, 21)])
@pytest.mark.usefixtures("any_tiles")
def test_estimate_equals_the_sum_of_materialised_perturbations(dtype, rank, bias, pairs):
    layer = make_layer(bias=bias, dtype=dtype)
    noise, weights = draw(layer, rank, 0, pairs), torch.randn(pairs, device=DEVICE)
    weight_estimate, bias_estimate = run_estimate(layer, weights, rank)
    each = noise.a.double().mT @ noise.b.double() / rank**0.5
    assert weight_estimate.dtype == dtype
    assert_near(weight_estimate, (weights.double()[:, None, None] * each).sum(0), dtype)
    if bias:
        assert_near(bias_estimate, weights.double() @ noise.bias.double(), dtype)
    else:
        assert bias_estimate is None


@check
@pytest.mark.usefixtures("any_tiles")
def test_estimate_is_reproducible_to_the_bit():
    layer, weights = make_layer(), torch.randn(21, device=DEVICE)
    for one, two in zip(*(run_estimate(layer, weights, 2) for _ in range(2)), strict=True):
        assert torch.equal(one, two)


@check
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("own_network", [False, True])
def test_the_backend_evaluates_and_estimates_from_the_same_noise(groups, own_network):
    """What the trainer calls: any network, a part of the batch for each group, several chunks."""
    network = OwnNetwork() if own_network else make_network(bias=True)
    population = Population(
        network.to(DEVICE), 140, rank=2, sigma=0.1, seed=-3, step=9, groups=groups
    )
    backend = Triton()
    population = replace(population, draw=backend.noise)
    backend.prepare(population)
    inputs = torch.randn(12, 37, device=DEVICE)
    for chunk in population.chunks(64):
        expected = chunk.forward(chunk.part(inputs))  # plain tensors, the kernels' noise
        outputs = backend.forward(chunk, chunk.part(inputs))
        torch.testing.assert_close(outputs, expected, rtol=1e-4, atol=1e-4)
    weights = torch.randn(population.pairs, device=DEVICE)
    for index, layer in enumerate(population.layers):
        expected = materialised_estimate(layer, population.noise_blocks(index), weights)
        for got, wanted in zip(backend.estimate(population, index, weights), expected, strict=True):
            torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-3)


class OwnNetwork(nn.Module):
    """Goes through `linear` layer by layer: only the project's own MLP is fused."""

    def __init__(self):
        super().__init__()
        self.first, self.head = make_layer(), make_layer(19, 10)

    def forward(self, x, linear):
        return linear(self.head, torch.relu(linear(self.first, x)))


@check
def test_the_backend_refuses_a_layer_that_was_not_called():
    network = OwnNetwork().to(DEVICE)
    network.forgotten = make_layer()
    backend = Triton()
    population = Population(network, 4, rank=1, sigma=0.1, seed=0, step=0, draw=backend.noise)
    (chunk,) = population.chunks()
    with pytest.raises(PopulationError, match="not called through linear"):
        backend.forward(chunk, torch.randn(5, 37, device=DEVICE))


@launch_free
@pytest.mark.parametrize("rows", [1, 16, 17, 1000, 40_000])
@pytest.mark.parametrize("across", [1, 14, 1000])
def test_the_parts_of_a_sum_cover_it_once(rows, across):
    parts, part_rows = estimate.split(rows, 16, across)
    assert part_rows % 16 == 0
    assert (parts - 1) * part_rows < rows <= parts * part_rows
    assert parts == 1 or parts * across <= tiles.ESTIMATE_PROGRAMS


# ----------------------------------------------------------------------------------------- errors


@launch_free
def test_errors_say_what_to_type():
    network, inputs = MLP(7, 5, 3), torch.randn(4, 7)
    sigma, key = torch.tensor(0.1), torch.tensor([1, 2])
    place = {"start": 0, "stop": 2, "rank": 1}
    with pytest.raises(kernels.KernelError, match=r"float64.*try network\.bfloat16"):
        kernels.forward(MLP(7, 5, 3).double(), inputs, key=key, sigma=sigma, **place)
    with pytest.raises(kernels.KernelError, match=r"inputs are torch\.bfloat16 and weights"):
        kernels.forward(network, inputs.bfloat16(), key=key, sigma=sigma, **place)
    with pytest.raises(kernels.KernelError, match=r"try torch\.tensor\(\[seed, step\]"):
        kernels.forward(network, inputs, key=key.int(), sigma=sigma, **place)
    with pytest.raises(kernels.KernelError, match=r"sigma is 0\.1 \(try torch\.tensor"):
        kernels.forward(network, inputs, key=key, sigma=0.1, **place)
    with pytest.raises(kernels.KernelError, match="must be the 4 members"):
        x = inputs.expand(3, 4, 7)
        kernels.linear(network.layers[0], x, key=key, sigma=sigma, layer_index=0, **place)
    with pytest.raises(kernels.KernelError, match=r"\(3,\) for 2 pairs"):
        kernels.estimate_layer(
            network.layers[0], key=key, layer_index=0, pairs=2, rank=1, weights=torch.ones(3)
        )


# ------------------------------------------------------------------------------------ compilation


def launches_of_a_step(monkeypatch, dtype, rank, bias):
    """(kernel, arguments by name, options) of all launches of the experiment's own network."""
    launches = []

    def record(kernel, *args, grid, warmup, **kwargs):
        bound = dict(zip(kernel.arg_names, args, strict=False)) | kwargs
        arguments = {name: bound.pop(name) for name in kernel.arg_names}
        launches.append((kernel, arguments, bound))

    monkeypatch.setattr(triton.JITFunction, "run", record)
    network = MLP(bias=bias).to(dtype)
    inputs, weights = torch.zeros(128, 784, dtype=dtype), torch.zeros(2000)
    key, sigma = torch.tensor([1, 2]), torch.tensor(0.1)
    place = {"key": key, "start": 0, "stop": 4, "rank": rank}
    for fuse in (True, False):
        kernels.forward(network, inputs, sigma=sigma, fuse=fuse, **place)
    layer, place = network.layers[0], {"key": key, "layer_index": 0}
    kernels.draw_layer(layer, rank, start=0, stop=4, **place)
    kernels.estimate_layer(layer, pairs=2000, rank=rank, weights=weights, **place)
    return launches


def source_of(kernel, arguments):
    """What Triton would compile at this launch."""
    pointers = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.int64: "*i64"}
    signature, constants, attributes = {}, {}, {}
    for place, parameter in enumerate(kernel.params):
        value = arguments[parameter.name]
        if parameter.is_constexpr or value is None:
            signature[parameter.name], constants[(place,)] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[parameter.name] = pointers[value.dtype]
            attributes[(place,)] = [["tt.divisibility", 16]]
        else:
            signature[parameter.name] = "i32"
            if value % 16 == 0 and not parameter.do_not_specialize:
                attributes[(place,)] = [["tt.divisibility", 16]]
    return ASTSource(kernel, signature, constants, attributes)


@launch_free
@pytest.mark.parametrize(
    ("dtype", "rank", "bias"), [(torch.bfloat16, 1, False), (torch.float32, 4, True)]
)
@pytest.mark.parametrize("arch", SHARED_MEMORY)
def test_every_kernel_compiles_and_fits_in_shared_memory(monkeypatch, dtype, rank, bias, arch):
    try:
        assert triton.knobs.nvidia.ptxas
    except RuntimeError:
        pytest.skip("Triton came without ptxas")
    sources = {}
    for kernel, arguments, options in launches_of_a_step(monkeypatch, dtype, rank, bias):
        source = source_of(kernel, arguments)
        sources[source.hash()] = (source, options)
    assert len({source.name for source, _ in sources.values()}) == (8 if bias else 7)
    for source, options in sources.values():
        built = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
        assert built.metadata.shared <= SHARED_MEMORY[arch], source.name
        assert built.asm["cubin"]
