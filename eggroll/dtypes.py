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
    full = torch.ones(4096, 256), torch.ones(256, 256)
    few = tuple(matrix.bfloat16() for matrix in full)
    # in turn, and the best of each: another program must not change the answer
    taken = [(_seconds(*full), _seconds(*few)) for _ in range(8)]
    of_full, of_few = map(min, zip(*taken, strict=True))
    return of_full > WORTH * of_few


def _seconds(x: torch.Tensor, weight: torch.Tensor) -> float:
    started = time.perf_counter()
    x @ weight
    return time.perf_counter() - started
