"""docs/flags.md from the help texts of the scripts.

python -m lab.flags > docs/flags.md
"""

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = ("mnist_eggroll.py", "mnist_backprop.py")
WIDTH = "100"  # columns
STYLES = re.compile(r"\x1b\[[0-9;]*m")


def text() -> str:
    """The whole of docs/flags.md."""
    parts = ["# Flags", "What the scripts print with `--help`."]
    parts += [f"## {script}\n\n```text\n{help_of(script)}\n```" for script in SCRIPTS]
    return "\n\n".join(parts) + "\n"


def help_of(script: str) -> str:
    environment = {**os.environ, "COLUMNS": WIDTH, "NO_COLOR": "1", "TERM": "dumb"}
    command = [sys.executable, str(ROOT / script), "--help"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    lines = STYLES.sub("", done.stdout).strip().splitlines()
    return "\n".join(line.rstrip() for line in lines)


if __name__ == "__main__":
    print(text(), end="")
