"""Check the tests: make plausible mistakes one at a time, each of which some test has to notice.

python tests/mutations.py [NAME ...]    # some minutes; not part of the test suite

A mistake is an edit of one place in a copy of the repository. Prints the test that notices each,
and exits with code 1 if one survives.
"""

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CORE = ["tests/test_estimators.py", "tests/test_evolution.py", "tests/test_fitness.py"]
RUNS = ["tests/test_run.py", "tests/test_data.py"]
INT8 = ["tests/test_int8.py"]
LOOPS = ["tests/test_mlp_loops.py"]
GRAPH = ["tests/test_graphed.py"]
CARD = ["tests/test_fake_cuda.py"]

MUTATIONS = {  # file, what stands there, what replaces it, tests
    "sign of the update": (
        "eggroll/evolution.py",
        "parameter.grad = direction.neg()",
        "parameter.grad = direction",
        CORE,
    ),
    "mean over all members in place of a unit's": (
        "eggroll/block_low_rank.py",
        "per_unit / len(per_unit)",
        "per_unit / weights.numel()",
        CORE,
    ),
    "missing 1 / n of node perturbation": (
        "eggroll/node_perturbation.py",
        "(weights.shape[1], -1)) / len(weights)",
        "(weights.shape[1], -1))",
        CORE,
    ),
    "missing 1 / B": (
        "eggroll/node_perturbation.py",
        "layer, position) / weights.shape[-1]",
        "layer, position)",
        CORE,
    ),
    "missing 1 / sqrt(R)": (
        "eggroll/low_rank.py",
        "Factors(a / self.rank**0.5, b)",
        "Factors(a, b)",
        CORE,
    ),
    "sigma squared": (
        "eggroll/low_rank.py",
        "(scores - baseline) / self.sigma)",
        "(scores - baseline) / self.sigma**2)",
        CORE,
    ),
    "noise keyed without the step": (
        "eggroll/evolution.py",
        "generator(self.seed, self.step,",
        "generator(self.seed, 0,",
        CORE,
    ),
    "noise keyed without the layer": (
        "eggroll/evolution.py",
        "self._rng(index, draw.number)",
        "self._rng(0, draw.number)",
        CORE,
    ),
    "noise keyed without the block": (
        "eggroll/evolution.py",
        "self._rng(index, draw.number)",
        "self._rng(index, 0)",
        CORE,
    ),
    "blocks in the order of directions": (
        "eggroll/blocks.py",
        "scores.unflatten(0, (self.draw.blocks, -1)).transpose(0, 1).flatten(0, 1)",
        "scores",
        CORE,
    ),
    "a member moves the unperturbed values too": (
        "eggroll/blocks.py",
        "pad(x[1:] - x[:1], draw.units)",
        "pad(x[1:], draw.units)",
        CORE,
    ),
    "forgotten bias": (
        "eggroll/low_rank.py",
        "add_low_rank(y, layer.with_one(x), torch.cat([a, -a]), b)",
        "add_low_rank(y, x, torch.cat([a, -a]), b[..., : x.shape[-1]])",
        CORE,
    ),
    "both of a pair with sign +": (
        "eggroll/low_rank.py",
        "torch.cat([a, -a])",
        "torch.cat([a, a])",
        CORE,
    ),
    "rows that are not shuffled": (
        "eggroll/node_perturbation.py",
        "torch.randperm(order, generator=rng, device=rng.device)",
        "torch.arange(order, device=rng.device)",
        CORE,
    ),
    "no check that units stay apart": (
        "eggroll/inspection.py",
        "self.elementwise &= not mixed",
        "pass",
        CORE,
    ),
    "an activation that works in place on what is recorded": (
        "eggroll/evolution.py",
        "Call(index, x.clone(), y.clone())",
        "Call(index, x, y)",
        CORE,
    ),
    "tied Parameters get the last gradient alone": (
        "eggroll/evolution.py",
        "ascent[parameter] + part if parameter in ascent else part",
        "part",
        CORE,
    ),
    "smoothing without its pull": (
        "eggroll/smoothing.py",
        " - OUTPUT_DECAY / self.tau * outputs",
        "",
        CORE,
    ),
    "smoothing that forgets its scale": (
        "eggroll/evolution.py",
        'self.smoothing.scale.copy_(state["scale"])',
        "pass",
        [*CORE, *RUNS],
    ),
    "ties broken by position": (
        "eggroll/fitness.py",
        "mean_rank[place]",
        "scores.flatten().argsort().argsort().view_as(scores).double()",
        CORE,
    ),
    "a spread of rounding errors amplified": (
        "eggroll/fitness.py",
        "torch.where(spread > smallest, centered / spread.clamp_min(smallest), 0.0)",
        "centered / spread",
        CORE,
    ),
    "a checkpoint without the optimizer": (
        "experiment/run.py",
        'load_optimizer(self.optimizer, state["optimizer"])',
        "pass",
        RUNS,
    ),
    "a checkpoint without the noise's step": (
        "experiment/run.py",
        'self.evolution.load_state_dict(state["evolution"])',
        "pass",
        RUNS,
    ),
    "the same order of examples in every epoch": (
        "experiment/data.py",
        "(seed << 20 | epoch)",
        "(seed << 20)",
        RUNS,
    ),
    "a validation split that is trained on": (
        "experiment/data.py",
        "train = train[permutation[:kept]]",
        "train = train[permutation]",
        RUNS,
    ),
    "noise of the batch before": (
        "eggroll/evolution.py",
        "self._drawn = {}  # noise may depend on the batch",
        "pass",
        CORE,
    ),
    "positions that share their signs": (
        "eggroll/node_perturbation.py",
        "if shape or len(layer.calls) > 1:",
        "if False:",
        CORE,
    ),
    "rounding down in integers": (
        "eggroll/int8/arithmetic.py",
        "(x + (1 << bits >> 1)) >> bits",
        "x >> bits",
        INT8,
    ),
    "remembered sums left out of a member's next layer": (
        "eggroll/member_loops.h",
        "sums[i][v] = load(start + i * padded + v * LANES);",
        "sums[i][v] = Vector{};",
        LOOPS,
    ),
    "smoothed scores with the unperturbed outputs in them": (
        "eggroll/mlp_loops.py",
        "self.still = [*outputs[:-1], subtracted]",
        "self.still = [*outputs[:-1], torch.zeros_like(subtracted)]",
        LOOPS,
    ),
    "hooks that a trace hides": (
        "eggroll/mlp_loops.py",
        "if any(map(_is_patched, network.modules())):",
        "if False:",
        LOOPS,
    ),
    "learning rate of the captured step": (
        "eggroll/graphed.py",
        'rate.fill_(group["lr"])',
        "pass",
        GRAPH,
    ),
    "noise of the captured step": (
        "eggroll/evolution.py",
        "generator_seed(self.seed, self.step, *key)",
        "generator_seed(self.seed, 0, *key)",
        GRAPH,
    ),
    "batch of the captured step": (
        "eggroll/graphed.py",
        "buffer.copy_(tensor)",
        "pass",
        GRAPH,
    ),
    "cut batch as large as the captured one": (
        "eggroll/graphed.py",
        " or batch[0].shape != self._batch[0].shape",
        "",
        GRAPH,
    ),
    "smoothing whose scale moves in memory": (
        "eggroll/smoothing.py",
        "self.scale.copy_(torch.maximum(self.scale, scores.std() * examples**0.5))",
        "self.scale = torch.maximum(self.scale, scores.std() * examples**0.5)",
        GRAPH,
    ),
    "warm-up that leaves a momentum": (
        "eggroll/graphed.py",
        "if key in tensors else tensor.zero_()",
        "if key in tensors else None",
        GRAPH,
    ),
    "targets that are copied to the card": (
        "eggroll/fitness.py",
        "outputs.new_full((*labels.shape, classes), label_smoothing / classes)",
        "torch.full((*labels.shape, classes), label_smoothing / classes).to(outputs)",
        CARD,
    ),
    "a step that waits for its scores": (
        "eggroll/evolution.py",
        "self._finite.logical_and_(scores.isfinite().all())",
        "check_finite(scores, self.step)",
        CARD,
    ),
}


def survives(folder: Path, name: str) -> bool:
    """Return True if all tests pass on a copy with the mistake."""
    file, old, new, tests = MUTATIONS[name]
    path = folder / file
    text = path.read_text()
    if text.count(old) < 1:
        raise SystemExit(f"{name}: {file} no longer has {old!r}")
    path.write_text(text.replace(old, new, 1))
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *tests]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    path.write_text(text)
    failed = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
    print(
        f"{'SURVIVES' if not done.returncode else 'noticed '}  {name}  {' '.join(failed[:1])}",
        flush=True,
    )
    return done.returncode == 0


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "copy"
        ignore = shutil.ignore_patterns(".git", ".venv", "results", "data", "__pycache__")
        shutil.copytree(ROOT, copy, ignore=ignore)
        survivors = [name for name in sys.argv[1:] or MUTATIONS if survives(copy, name)]
    print(f"{len(survivors)} of {len(sys.argv[1:] or MUTATIONS)} survive")
    raise SystemExit(bool(survivors))


if __name__ == "__main__":
    main()
