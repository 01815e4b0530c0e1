"""Report of an experiment as one page of HTML without scripts, which needs no network."""

import base64
import shlex
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

STYLE = """
:root { color-scheme: light dark; --ink: #1b1b1b; --paper: #fff; --line: #ccc; --pale: #f4f4f4 }
@media (prefers-color-scheme: dark) { :root {
  --ink: #e6e6e6; --paper: #15171a; --line: #444; --pale: #22252a } }
body { color: var(--ink); background: var(--paper); font: 16px/1.5 sans-serif;
  max-width: 60rem; margin: auto; padding: 0 1rem 2rem; overflow-wrap: anywhere }
div { overflow-x: auto; overflow-wrap: normal } table { border-collapse: collapse; font-size: 14px }
th, td { padding: .3rem .6rem; border-bottom: 1px solid var(--line); text-align: left }
:is(th, td):nth-child(n + 3) { text-align: right }
pre { background: var(--pale); padding: .8rem; font-size: 13px; white-space: pre-wrap }
@media (max-width: 40rem) { table { font-size: 12px } th, td { padding: .2rem } }
img { width: 100%; max-width: 50rem; border-radius: 6px; margin: .5rem 0 }
"""


def page(
    columns: Sequence[str],
    tables: Iterable[tuple[Sequence[Sequence[str]], str]],  # rows, caption
    plots: Iterable[Path],  # PNG files
    configs: Sequence[Mapping[str, Any]],  # config.json of each run
    folder: Path,
) -> str:
    """Return tables, plots, the environment of the runs and the commands that make them again."""
    shown = [f"{_table(columns, rows)}<p>{escape(caption)}</p>" for rows, caption in tables]
    machines = dict.fromkeys(map(_environment, configs))
    commands = [f"python {shlex.join(c['command'])}" for c in configs]
    commands.append(f"python -m experiment.report {shlex.quote(str(folder))}")
    return f"""<!DOCTYPE html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>EGGROLL MNIST: results</title><style>{STYLE}</style>
<h1>EGGROLL MNIST: results</h1>{"".join(shown)}
<h2>Plots</h2>{"".join(map(_image, plots))}
<h2>Environment</h2>{"".join(machines)}
<h2>To make this page again</h2><pre>{escape(chr(10).join(commands))}</pre></html>
"""


def _table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = ["".join(f"<td>{escape(cell)}" for cell in row) for row in rows]
    head = "".join(f"<th>{escape(column)}" for column in columns)
    return f"<div><table><tr>{'<tr>'.join([head, *lines])}</table></div>"


def _environment(config: Mapping[str, Any]) -> str:
    parts = {"": config["device"]} | config["versions"] | {"commit": config["commit"]}
    return f"<p>{escape(', '.join(f'{name} {part}'.strip() for name, part in parts.items()))}"


def _image(path: Path) -> str:
    data, name = base64.b64encode(path.read_bytes()).decode(), path.stem.replace("_", " ")
    return f'<img alt="{escape(name)}" src="data:image/png;base64,{data}">'
