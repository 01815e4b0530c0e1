"""The population's work as Triton kernels: noise is drawn where it is used and never stored.

Imported only by who asks for it: `import eggroll` works without Triton. Noise is keyed by (seed,
step, layer, pair) as in `eggroll.noise`, but from a generator of its own (`philox`), so the CPU's
members and these are different draws of the same distribution.

key    int64 tensor [seed, step] on the device; overwrite it in place between replays of a graph
sigma  float32 tensor of one number on the device, likewise
"""

from eggroll.kernels.check import KernelError
from eggroll.kernels.draw import draw_layer
from eggroll.kernels.estimate import estimate_layer
from eggroll.kernels.forward import forward, linear
from eggroll.kernels.twin import draw_layer_twin

__all__ = [
    "KernelError",
    "draw_layer",
    "draw_layer_twin",
    "estimate_layer",
    "forward",
    "linear",
]
