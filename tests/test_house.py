"""Rules of the house that a machine can check."""

import ast
import re
import subprocess
import sys

import pytest
from conftest import ROOT, run_command

from lab.report import BEGIN, readme_with_table

LAYERS = {  # what each part may import of the others
    "eggroll": set(),
    "lab": set(),
    "visualizations": {"eggroll", "lab"},
    "benchmarks": {"eggroll", "lab"},
    "examples": {"eggroll", "lab"},
}
PARTS = {
    "eggroll",
    "lab",
    "visualizations",
    "benchmarks",
    "examples",
    "mnist_backprop",
    "mnist_eggroll",
}


def imported(path):
    """Top-level names of all modules that a file imports."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module.split(".")[0]


@pytest.mark.parametrize("part", LAYERS)
def test_imports_run_one_way(part):
    for path in (ROOT / part).rglob("*.py"):
        foreign = set(imported(path)) & PARTS - {part} - LAYERS[part]
        assert not foreign, f"{path} imports {foreign}"


def test_the_algorithm_needs_torch_and_numpy_alone():
    allowed = {"eggroll", "torch", "numpy", "triton"} | set(sys.stdlib_module_names)
    for path in (ROOT / "eggroll").rglob("*.py"):
        assert set(imported(path)) <= allowed, path


@pytest.mark.parametrize("command", [["check"], ["format", "--check"]])
def test_ruff_has_nothing_to_say(command):
    done = run_command(sys.executable, "-m", "ruff", *command, ".")
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("script", ["run_experiments.sh", "run_tests.sh", "lab/setup.sh"])
def test_shell_scripts_parse(script):
    assert subprocess.run(["bash", "-n", ROOT / script]).returncode == 0


def test_the_readme_table_is_the_committed_results():
    readme = (ROOT / "README.md").read_text()
    assert BEGIN in readme
    assert readme == readme_with_table(readme), "type: python -m lab.report readme"


def test_every_file_that_the_readme_links_is_there():
    readme = (ROOT / "README.md").read_text()
    links = re.findall(r"\]\(([^)#:]+)\)", readme)
    missing = [link for link in links if not (ROOT / link).exists()]
    assert links and not missing


def test_the_code_in_the_readme_runs():
    """Every python block, one after the other in one process, as a reader would paste them."""
    readme = (ROOT / "README.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", readme, flags=re.DOTALL)
    assert blocks
    done = run_command(sys.executable, "-c", "\n".join(blocks))
    assert done.returncode == 0, done.stderr
