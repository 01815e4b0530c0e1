"""The verdict of another program as the fitness: here awk, with the rules in judge.awk.

python mnist_eggroll.py --fitness examples/external_program.py:verdict

What comes out after six epochs: 97.4 % of the test digits. The judge counts what
is right in a batch; other rules are other lines of awk.

The program is started once and asked over pipes: a line with the right digits, then a line with
each member's answers, for which it returns a line with a score. Only digits reach it and only
scores come back, so it might as well be a simulator, a compiler or a person.
"""

import subprocess
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

RULES = Path(__file__).with_name("judge.awk")
AT_ONCE = 256  # answers on the way to the judge: more could fill both pipes, and each side wait


@cache
def judge() -> subprocess.Popen:
    """The one judge of this process; it ends when its input does."""
    version = subprocess.run(
        ["awk", "-W", "version"], capture_output=True, text=True, stdin=subprocess.DEVNULL
    )
    # mawk alone waits for a full buffer, unless it is told that somebody waits for it
    unbuffered = ["-W", "interactive"] if "mawk" in version.stdout + version.stderr else []
    command = ["awk", *unbuffered, "-f", str(RULES)]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, bufsize=1 << 16)


def verdict(outputs: Tensor, labels: Tensor) -> Tensor:
    """Outputs (P, B, 10) and labels (B,) to what the judge says of each member, (P,)."""
    program = judge()
    program.stdin.write(f"truth {digits(labels)}\n")
    scores = []
    for answers in outputs.argmax(-1).split(AT_ONCE):
        program.stdin.writelines(f"{digits(member)}\n" for member in answers)
        program.stdin.flush()
        scores += [float(program.stdout.readline()) for _ in answers]
    return torch.tensor(scores, device=outputs.device)


def digits(answers: Tensor) -> str:
    """(B,) as a string of B digits."""
    return (answers + ord("0")).to(torch.uint8).cpu().numpy().tobytes().decode()
