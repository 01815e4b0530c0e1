"""Tile sizes of the kernels: fixed, so that a run's numbers never hang on a tuner's timing.

A tile changes the order in which a product is summed, hence its last bits; it never changes the
noise, whose keys know nothing of tiles. Each size below has its reason beside it. Shared memory
stays below 99 KB, the least that a GPU with bfloat16 tensor cores offers to a block.
"""

from dataclasses import dataclass

import torch
import triton.language as tl

# the dtypes that the kernels take
TRITON = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16}


@dataclass(frozen=True)
class Tile:
    """What one program works on: an output of rows x columns, summed over steps of `depth`."""

    rows: int
    columns: int = 1
    depth: int = 0  # 0 where nothing is summed
    warps: int = 4
    stages: int = 1  # steps of the sum whose loads are in flight

    @property
    def options(self) -> dict[str, int | bool]:
        """What Triton is to be told at a launch."""
        # fused multiply-add is asked for by name: its default differs among Triton's versions
        return {"num_warps": self.warps, "num_stages": self.stages, "enable_fp_fusion": True}


# Writing factors out is bound by memory: any tile that fills a few registers does.
DRAW = Tile(rows=16, columns=128)

# rows = (pair, rank), columns = examples. A whole batch of 128 in one tile draws each number once;
# 16 rows are the fewest that a tensor core takes, and give 2,000 pairs 125 programs.
PROJECT_SHARED = {
    torch.bfloat16: Tile(rows=16, columns=128, depth=64, stages=3),
    torch.float32: Tile(rows=16, columns=128, depth=32, stages=3),
}

# rows = examples of one pair, both signs. Bound by reading x: 32 values per thread and step keep
# enough loads in flight, and outweigh the one Philox call that each thread makes per step.
PROJECT_OWN = Tile(rows=32, depth=128, stages=2)

# rows = examples, columns = outputs. Bound by writing y for both signs.
HIDDEN_SHARED = Tile(rows=32, columns=128)

# rows = examples of one pair, both signs; columns = outputs. 128 x 128 reads x and W half as often
# as 64 x 64; float32 splits its operands into three products and has registers for 64 x 64 only.
HIDDEN_OWN = {
    torch.bfloat16: Tile(rows=128, columns=128, depth=32, warps=8, stages=3),
    torch.float32: Tile(rows=64, columns=64, depth=32, warps=4, stages=3),
}

# rows = examples of one pair, both signs. A program holds the second hidden layer's outputs, all
# 256, in registers: 64 rows are the most that fit in bfloat16 without spilling, and 32 in float32.
MLP = {
    torch.bfloat16: Tile(rows=64, depth=32, warps=8, stages=2),
    torch.float32: Tile(rows=32, depth=32, warps=8, stages=2),
}

# rows = outputs, columns = inputs, depth = (pair, rank). Drawing the factors is the cost, and a
# tile of 128 x 128 draws each number half as often as one of 64 x 64.
ESTIMATE = {
    torch.bfloat16: Tile(rows=128, columns=128, depth=32, warps=8),
    torch.float32: Tile(rows=128, columns=128, depth=16, warps=8),
}
ESTIMATE_BIAS = Tile(rows=1, columns=64, depth=32)

# Programs among which an estimate's sum over pairs is split: about two for each multiprocessor of
# the largest GPUs. A constant, and not the device's own count: the order of the sum, and so its
# last bits, should not depend on the machine.
ESTIMATE_PROGRAMS = 256
