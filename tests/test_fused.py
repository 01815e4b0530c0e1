"""The fused kernel against the eager seam: the same noise, the same outputs of all members.

Triton decides when it is imported whether it compiles or interprets. So without a GPU the
comparisons run in a process of their own, on CPU tensors, with TRITON_INTERPRET=1; with one they
run here. What cards would run is compiled for them in any case.
"""

import os
import re
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, run_command
from torch import nn

from eggroll import MLP, BatchMembers, ExampleMembers, fused
from eggroll.evolving import find_evolving
from eggroll.members import Step, make_blocks
from eggroll.noise import Keys
from eggroll.seam import forward, record

triton = pytest.importorskip("triton", reason="Triton is not installed")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"
PTXAS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "ptxas"

BOTH = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
# of the largest output; bfloat16 has 8 bits, and is rounded after each layer
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


def launches(test):
    """A test that launches the kernel: collected where it can run."""
    return test if INTERPRETED or DEVICE == "cuda" else None


def launch_free(test):
    """A test that launches nothing: the interpreter's process need not repeat it."""
    return None if INTERPRETED else test


class Case:
    """A network, a batch, and the noise of a population on it."""

    def __init__(self, sizes, *, dtype, rank=1, bias=False, batch=11, population=6, sigma=0.3):
        inputs, hidden1, hidden2, outputs = sizes
        self.network = MLP(inputs, hidden1, outputs, bias=bias, seed=1)
        self.network.layers[1] = nn.Linear(hidden1, hidden2, bias=bias)
        self.network.layers[2] = nn.Linear(hidden2, outputs, bias=bias)
        self.network.to(DEVICE, dtype)
        self.inputs = torch.randn(batch, inputs).to(DEVICE, dtype)
        self.members = BatchMembers(population, sigma=sigma, rank=rank)
        assert fused.fits(self.network, self.members)
        self.evolving = find_evolving(self.network)
        self.draw(step=0)

    @torch.no_grad()
    def draw(self, step):
        weights, biases = self.evolving.weights, self.evolving.biases
        self.calls, outputs = record(self.network, weights, self.inputs)
        keys = Keys(0, step, self.inputs.device)
        size = self.members.block_size(keys.device)
        blocks = make_blocks([(None, self.members.population)], size)
        self.noise = self.members.draw(Step(keys, weights, biases, self.calls, outputs), blocks)

    def fused(self, pairs=slice(None)):
        noise = {name: part[pairs] for name, part in self.noise.items()}
        return fused.mlp_forward(self.network, noise, self.calls[0].y, self.inputs)

    @torch.no_grad()
    def eager(self):
        def add(call, index, bias, x, y):
            place = self.evolving.bias_index(bias)
            return self.members.add(self.noise, call, index, place, x, y)

        first = [self.calls[0].y]
        return forward(self.network, self.evolving.weights, first, add, self.inputs[None])


def assert_near(found, expected):
    assert found.shape == expected.shape
    assert found.dtype == expected.dtype
    error = (found.double() - expected.double()).abs().max() / expected.double().abs().max()
    assert error < TOLERANCE[found.dtype], f"{error:.1e} of the largest output"


# ------------------------------------------------------------------------------------ the numbers


@launches
@BOTH
@pytest.mark.parametrize(
    ("rank", "bias"), [(1, False), (1, True), (3, True), (4, False), (17, True)]
)
@pytest.mark.parametrize("sizes", [(7, 33, 20, 3), (13, 20, 33, 17)])
def test_outputs_are_those_of_the_eager_forward(dtype, rank, bias, sizes):
    case = Case(sizes, dtype=dtype, rank=rank, bias=bias)
    assert_near(case.fused(), case.eager())


@launches
@BOTH
@pytest.mark.parametrize(("rank", "bias"), [(1, False), (4, True)])
def test_outputs_are_those_of_the_eager_forward_at_the_real_size(dtype, rank, bias):
    sizes = (784, 256, 256, 10)
    case = Case(sizes, dtype=dtype, rank=rank, bias=bias, batch=128, population=4, sigma=0.02)
    assert_near(case.fused(), case.eager())


@launches
def test_a_batch_larger_than_a_tile_of_several_blocks():
    case = Case((7, 33, 20, 3), dtype=torch.float32, batch=70, population=36)
    assert_near(case.fused(), case.eager())


@launches
@BOTH
def test_other_noise_gives_other_outputs_and_pairs_are_independent_of_each_other(dtype):
    case = Case((7, 33, 20, 3), dtype=dtype, rank=2, bias=True)
    before = case.fused()
    for pair in range(3):
        own = case.fused(slice(pair, pair + 1))
        torch.testing.assert_close(own, before[2 * pair : 2 * pair + 2])
    case.draw(step=1)
    assert_near(case.fused(), case.eager())
    assert (case.fused() - before).abs().max() > 0.1


@launch_free
@pytest.mark.skipif(DEVICE == "cuda", reason="the kernel runs on the card itself")
def test_all_numbers_agree_in_the_interpreter():
    command = [sys.executable, "-m", "pytest", "-n0", ROOT / "tests" / "test_fused.py"]
    done = run_command(*command, env={"TRITON_INTERPRET": "1"})
    assert done.returncode == 0, done.stdout
    assert int(re.search(r"(\d+) passed", done.stdout)[1]) > 25


# ----------------------------------------------------------------------------------- what it takes


@launch_free
def test_the_kernel_is_for_antithetic_members_of_all_layers_of_the_mlp():
    network, members = MLP(), BatchMembers(4)
    assert fused.fits(network, members)
    assert fused.fits(MLP(bias=True).bfloat16(), BatchMembers(4, rank=4))
    frozen, mixed = MLP(), MLP()
    frozen.layers[0].weight.requires_grad_(False)
    mixed.layers[0].bfloat16()
    others = (MLP(activation="relu"), MLP(hidden_dim=257), MLP(out_features=65), MLP().half())
    for other in (*others, frozen, mixed, nn.Linear(784, 10)):
        assert not fused.fits(other, members)
    alone = (BatchMembers(4, antithetic=False), BatchMembers(6, perturb="one"))
    for other in (*alone, BatchMembers(4, rank=fused.MAX_RANK + 1), ExampleMembers(144)):
        assert not fused.fits(network, other)


@launch_free
def test_without_triton_the_module_still_says_what_fits():
    code = """if True:
        import sys
        sys.modules["triton"] = None
        from eggroll import BackendError, BatchMembers, MLP, fused
        assert fused.fits(MLP(), BatchMembers(4)) and fused.MAX_HIDDEN == 256
        try:
            fused.mlp_forward(MLP(), {}, None, None)
        except BackendError as error:
            sys.exit("pip install triton" not in str(error))
        sys.exit("no error")"""
    done = run_command(sys.executable, "-c", code)
    assert done.returncode == 0, done.stderr


# ------------------------------------------------------------------------------------- compilation


def source_of_launch(monkeypatch, case):
    """What Triton would compile at a launch, and its options."""
    seen = []
    monkeypatch.setattr(
        triton.JITFunction, "run", lambda *args, **named: seen.append((args, named))
    )
    case.fused()
    [((kernel, *values), options)] = seen
    named = dict(zip(kernel.arg_names, values, strict=False)) | options
    pointers = {torch.float32: "*fp32", torch.bfloat16: "*bf16"}
    signature, constants, attributes = {}, {}, {}
    for place, parameter in enumerate(kernel.params):
        value = named[parameter.name]
        if parameter.is_constexpr or value is None:
            signature[parameter.name], constants[(place,)] = "constexpr", value
            continue
        is_tensor = isinstance(value, torch.Tensor)
        signature[parameter.name] = pointers[value.dtype] if is_tensor else "i32"
        if (value.data_ptr() if is_tensor else value) % 16 == 0:
            attributes[(place,)] = [["tt.divisibility", 16]]
    options = {name: options[name] for name in ("num_warps", "num_stages")}
    return ASTSource(kernel, signature, constants, attributes), options


def spilled_bytes(ptx, arch, folder):
    """Bytes of registers that a thread has to keep in memory."""
    path = folder / "kernel.ptx"
    path.write_text(ptx)
    target = re.search(r"\.target (sm_\w+)", ptx)[1]
    done = run_command(PTXAS, "-v", f"--gpu-name={target}", path, "-o", folder / "kernel.cubin")
    assert done.returncode == 0, done.stderr
    return sum(map(int, re.findall(r"(\d+) bytes spill", done.stderr)))


@launch_free
@pytest.mark.skipif(not PTXAS.exists(), reason="Triton came without ptxas")
@BOTH
@pytest.mark.parametrize(("rank", "bias"), [(1, False), (4, True)])
@pytest.mark.parametrize("arch", [80, 86, 89, 90])
def test_the_kernel_compiles_and_stays_on_the_chip(monkeypatch, tmp_path, dtype, rank, bias, arch):
    sizes = (784, 256, 256, 10)
    case = Case(sizes, dtype=dtype, rank=rank, bias=bias, batch=128, population=4)
    source, options = source_of_launch(monkeypatch, case)
    built = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    assert built.asm["cubin"]
    assert built.metadata.shared < 99 * 1024
    if dtype == torch.bfloat16:
        assert spilled_bytes(built.asm["ptx"], arch, tmp_path) == 0
