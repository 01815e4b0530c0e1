"""Networks from saved weights."""

from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from lab.errors import UserError


def start_from(path: Path | None, network: nn.Module) -> None:
    """Load the weights of a model.safetensors into the network, where a file is given.

    Raises UserError for a file that cannot be read, or that holds another network.
    """
    if path is None:
        return
    try:
        weights = load_file(path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} cannot be read ({error})") from error
    own = {name: (tuple(t.shape), t.dtype) for name, t in network.state_dict().items()}
    found = {name: (tuple(t.shape), t.dtype) for name, t in weights.items()}
    if own != found:
        name = next(n for n in {**own, **found} if own.get(n) != found.get(n))
        raise UserError(
            f"{path} holds another network: {name} is {_described(found.get(name))} there and "
            f"{_described(own.get(name))} here (type the flags that it was trained with)"
        )
    network.load_state_dict(weights)


def _described(entry: tuple | None) -> str:
    return f"{entry[0]} {str(entry[1]).removeprefix('torch.')}" if entry else "missing"
