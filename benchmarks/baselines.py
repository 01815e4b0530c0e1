"""mnist_eggroll.py with other baselines of the scores, as presets: for ablations.py.

python benchmarks/baselines.py unperturbed [flags]   # scores relative to the unperturbed network's
python benchmarks/baselines.py twins [flags]         # each member relative to its antithetic twin

The preset of EGGROLL subtracts the mean score of a layer's members.
"""

import sys
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # as a file, from any folder

import mnist_eggroll
from eggroll import BlockLowRank
from eggroll.blocks import Draw, Layer
from eggroll.factors import Factors
from experiment.script import run_script


def over_rms(scores: Tensor) -> Tensor:
    """Scale to a root mean square of 1, without subtracting the mean."""
    return scores / scores.square().mean().sqrt().clamp_min(torch.finfo(scores.dtype).tiny)


@dataclass(frozen=True)
class Twins(BlockLowRank):
    """BlockLowRank with directions in pairs: E and -E."""

    def rounded(self, directions: float, layer: Layer) -> int:
        """Return an even number of directions."""
        return 2 * super().rounded(directions / 2, layer)

    def sample(self, layer: Layer, draw: Draw, rng: torch.Generator) -> Factors:
        """Draw A and B of half of the directions; the others have -A."""
        a, b = super().sample(layer, draw._replace(directions=draw.directions // 2), rng)
        return Factors(torch.cat([a, -a]), torch.cat([b, b]))


EGGROLL = mnist_eggroll.PRESETS["eggroll"]
OTHERS = {
    "unperturbed": replace(EGGROLL, es=replace(EGGROLL.es, shaping=over_rms)),
    "twins": replace(EGGROLL, es=Twins(EGGROLL.es.population)),
}

if __name__ == "__main__":
    mnist_eggroll.PRESETS.update(OTHERS)
    mnist_eggroll.METHODS[Twins] = "eggroll"
    run_script(mnist_eggroll.main, "baselines.py")
