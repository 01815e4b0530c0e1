"""Settings for a search to try, as a TOML file holds them."""

import random
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from experiment.errors import UserError


@dataclass(frozen=True)
class Grid:
    """Content of a file of results/grids.

    flags     of every trial
    settings  {flag: list of values, or {low, high, log} of a range}
    preset    {flag: value} where the preset lies at the members and epochs of `flags`
    """

    flags: str
    settings: Mapping[str, Any]
    preset: Mapping[str, Any]

    @classmethod
    def read(cls, path: Path) -> "Grid":
        """Raises UserError for a file that cannot be read or that holds something else."""
        try:
            content = tomllib.loads(path.read_text())
        except (OSError, ValueError) as error:
            raise UserError(f"{path} cannot be read: {error}") from error
        unknown = content.keys() - {"flags", "settings", "preset"}
        if unknown or not content.get("settings"):
            raise UserError(
                f"{path} must hold the table settings, and may hold flags and preset; got "
                f"{', '.join(content) or 'nothing'}"
            )
        for name, values in content["settings"].items():
            if not _is_list_or_range(values):
                raise UserError(
                    f"{path}: {name} must be a list of values or {{ low = .., high = .. }}, got "
                    f"{values}"
                )
        return cls(content.get("flags", ""), content["settings"], content.get("preset", {}))

    @property
    def has_range(self) -> bool:
        return any(isinstance(values, dict) for values in self.settings.values())

    @property
    def first(self) -> list[dict[str, Any]]:
        """Settings to try before any others: all cells, or the preset where there is a range.

        Cells are in an order that covers the grid evenly.
        """
        if self.has_range:
            return [dict(self.preset)] if self.preset.keys() == self.settings.keys() else []
        cells = [
            dict(zip(self.settings, values, strict=True))
            for values in product(*self.settings.values())
        ]
        random.Random(0).shuffle(cells)
        return sorted(cells, key=lambda cell: cell != self.preset)


def _is_list_or_range(values: Any) -> bool:
    match values:
        case [_, *_]:
            return True
        case {"low": float() | int() as low, "high": float() | int() as high}:
            return low < high
    return False
