"""Settings for a search to try, as a TOML file holds them."""

import random
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from experiment.errors import UserError
from experiment.files import ROOT

GRIDS = ROOT / "results" / "grids"


@dataclass(frozen=True)
class Grid:
    """Content of a file of results/grids.

    flags     of every trial, as they are typed
    settings  {flag: list of values, or {low, high, log} of a range, of integers where low is one}
    preset    {flag: value}, ringed in the heat map; its learning rate is that of the preset at the
              members and epochs of `flags`
    """

    flags: str
    settings: Mapping[str, Any]
    preset: Mapping[str, Any]

    @classmethod
    def read(cls, path: Path) -> "Grid":
        """Read a file. Raises UserError where it cannot be read or holds something else."""
        try:
            content = tomllib.loads(path.read_text())
        except OSError as error:
            raise UserError(f"{path} cannot be read: {error.strerror} (give --grid)") from error
        except ValueError as error:
            raise UserError(f"{path} is not TOML: {error}") from error
        match content:
            case {"settings": {**settings}} if settings and content.keys() <= KEYS:
                pass
            case _:
                raise UserError(
                    f"{path} must hold a table settings, and may hold a string flags and a table "
                    f"preset; got {', '.join(content) or 'nothing'}"
                )
        flags, preset = content.get("flags", ""), content.get("preset", {})
        if not isinstance(flags, str) or not isinstance(preset, dict) or preset.keys() - settings:
            raise UserError(f"{path}: flags must be a string, and preset may name settings alone")
        for name, values in settings.items():
            if not _is_list_or_range(values):
                raise UserError(
                    f"{path}: {name} must be a list of numbers or strings, or {{ low = .., high = "
                    f".. }}, got {values}"
                )
        return cls(flags, settings, preset)

    @property
    def has_range(self) -> bool:
        return any(isinstance(values, dict) for values in self.settings.values())

    @property
    def first(self) -> list[dict[str, Any]]:
        """Settings to try before any others, the preset first.

        All cells, in random order; with a range, where there are no cells, the preset alone.
        """
        if self.has_range:
            inside = self.preset.keys() == self.settings.keys() and all(
                _holds(self.settings[name], value) for name, value in self.preset.items()
            )
            return [dict(self.preset)] if inside else []
        cells = [
            dict(zip(self.settings, values, strict=True))
            for values in product(*self.settings.values())
        ]
        random.Random(0).shuffle(cells)
        return sorted(cells, key=lambda cell: cell != self.preset)


KEYS = {"flags", "settings", "preset"}


def _is_list_or_range(values: Any) -> bool:
    match values:
        case [_, *_]:
            return all(isinstance(value, str | int | float) for value in values)
        case {"low": float() | int() as low, "high": float() | int() as high, **rest}:
            logarithmic = rest.get("log", False)
            return low < high and rest.keys() <= {"log"} and (low > 0 or not logarithmic)
    return False


def _holds(values: Any, value: Any) -> bool:
    """Return whether a value is in the list, or in the range."""
    return value in values if isinstance(values, list) else values["low"] <= value <= values["high"]
