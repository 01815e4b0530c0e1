"""Whether a forward in fewer bits is worth it on this device."""

import time

import torch

WORTH = 1.3  # times as fast: less would be lost in conversions


def bfloat16_pays(device: torch.device) -> bool:
    """Whether products of bfloat16 are WORTH it: on CUDA by the card's capability, on a CPU by a
    measurement of a few hundredths of a second."""
    if device.type == "cuda":  # tensor cores take it from there on
        return torch.cuda.get_device_capability(device) >= (8, 0)
    if device.type != "cpu":
        return False
    x, weight = torch.randn(4096, 256), torch.randn(256, 256)
    full, few = [], []
    for _ in range(8):  # in turn, and the best of each: another program must not change the answer
        full.append(_seconds(x, weight))
        few.append(_seconds(x.bfloat16(), weight.bfloat16()))
    return min(full) > WORTH * min(few)


def _seconds(x: torch.Tensor, weight: torch.Tensor) -> float:
    started = time.perf_counter()
    x @ weight
    return time.perf_counter() - started
