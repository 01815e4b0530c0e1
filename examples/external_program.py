"""Another program's verdict as the fitness: here awk, with the rules in judge.awk.

python mnist_eggroll.py node-perturbation --fitness examples/external_program.py:verdict

The program starts once and is called over pipes: it reads a line with the labels, then a line with
each member's answers, and writes a line with a score for each. It sees digits alone, so it could be
a simulator, a compiler or a person.
"""

import subprocess
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

RULES = Path(__file__).with_name("judge.awk")
AT_ONCE = 256  # answers sent before scores are read: more could fill both pipes, a deadlock


@cache
def judge() -> subprocess.Popen:
    """Start the program; it ends when its input does."""
    version = subprocess.run(
        ["awk", "-W", "version"], capture_output=True, text=True, stdin=subprocess.DEVNULL
    )
    # mawk reads whole buffers unless told to read lines
    unbuffered = ["-W", "interactive"] if "mawk" in version.stdout + version.stderr else []
    command = ["awk", *unbuffered, "-f", str(RULES)]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, bufsize=1 << 16)


def verdict(outputs: Tensor, labels: Tensor) -> Tensor:
    """Return the program's score of each member, (P,), from outputs (P, B, 10), labels (B,)."""
    program = judge()
    program.stdin.write(f"truth {digits(labels)}\n")
    scores = []
    for answers in outputs.argmax(-1).split(AT_ONCE):
        program.stdin.writelines(f"{digits(member)}\n" for member in answers)
        program.stdin.flush()
        scores += [float(program.stdout.readline()) for _ in answers]
    return torch.tensor(scores, device=outputs.device)


def digits(answers: Tensor) -> str:
    """Return answers (B,) as a string of B digits."""
    return (answers + ord("0")).to(torch.uint8).cpu().numpy().tobytes().decode()
