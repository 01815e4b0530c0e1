"""Rules of the house that a machine can check."""

import ast
import os
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from conftest import ROOT, call, run_command

from lab import experiments, flags
from lab.report import BEGIN, readme_with_table

LAYERS = {  # what each part may import of the others
    "eggroll": set(),
    "lab": set(),
    "visualizations": {"eggroll", "lab"},
    "benchmarks": {"eggroll", "lab"},
    "examples": {"eggroll", "lab"},
}
PARTS = {*LAYERS, "mnist_backprop", "mnist_eggroll"}


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


def test_the_package_is_all_of_its_folders():
    packages = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"][
        "packages"
    ]
    folders = {path.parent.relative_to(ROOT) for path in (ROOT / "eggroll").rglob("*.py")}
    assert set(packages) == {".".join(folder.parts) for folder in folders}


@pytest.mark.parametrize("command", [["check"], ["format", "--check"]])
def test_ruff_has_nothing_to_say(command):
    done = run_command(sys.executable, "-m", "ruff", *command, ".")
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("script", ["run_experiments.sh", "run_tests.sh", "lab/setup.sh"])
def test_shell_scripts_parse(script):
    assert subprocess.run(["bash", "-n", ROOT / script]).returncode == 0


def test_an_environment_sees_the_packages_of_the_python_that_it_is_built_on(tmp_path):
    """Even where that python is itself of a virtual environment, as the tests' own may be."""
    script = f"""
        source {ROOT}/lab/setup.sh
        python3 -m venv --system-site-packages --without-pip .venv
        _share_packages_of_python3
        .venv/bin/python -c "import torch, tyro"
    """
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    done = run_command("bash", "-ec", script, cwd=tmp_path, env={"PATH": path})
    assert done.returncode == 0, done.stderr


def test_the_readme_table_is_the_committed_results():
    readme = (ROOT / "README.md").read_text()
    assert BEGIN in readme
    assert readme == readme_with_table(readme), "type: python -m lab.report readme"


PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_file_that_a_page_links_is_there(page):
    links = re.findall(r"\]\(([^)#:]+)\)", page.read_text())
    assert not [link for link in links if not (page.parent / link).exists()]


def blocks_of(page, language):
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(), flags=re.DOTALL)


def test_the_code_in_the_readme_runs():
    """Every python block, one after the other in one process, as a reader would paste them."""
    blocks = blocks_of(ROOT / "README.md", "python")
    assert blocks
    done = run_command(sys.executable, "-c", "\n".join(blocks))
    assert done.returncode == 0, done.stderr
    assert float(re.search(r"accuracy ([\d.]+)", done.stdout)[1]) > 0.9


COMMANDS = [
    line.partition("#")[0].strip()
    for page in PAGES
    for block in blocks_of(page, "bash")
    for line in block.replace("\\\n", " ").splitlines()
    if not line.startswith("export ")
]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_of_the_docs_is_one(command, monkeypatch):
    words = shlex.split(command)
    while "=" in words[0]:
        monkeypatch.setenv(*words.pop(0).split("=", 1))
    program, *flags = words
    if program == "./run_experiments.sh":
        assert experiments.chosen_seeds(on_gpu=False)
        methods = experiments.chosen_methods(everything="--all" in flags)
        check_flags([flag for flag in flags if flag != "--all"], methods)
    elif program == "./run_tests.sh":
        assert flags in ([], ["--setup-only"])
    elif flags[0] == "-m":
        assert (ROOT / flags[1].replace(".", "/")).with_suffix(".py").exists()
    elif program == "torchrun" or flags[0].startswith("mnist_"):
        flags = flags[flags.index("mnist_eggroll.py") :] if program == "torchrun" else flags
        done = call(*flags, "--print-config")
        assert done.returncode == 0, done.stderr
    else:
        assert program == "python" and (ROOT / flags[0]).exists()


def check_flags(flags, methods):
    script, *own = experiments.COMMANDS[methods[-1]]
    done = call(script, *own, *flags, "--print-config")
    assert done.returncode == 0, done.stderr


def test_the_page_of_flags_is_what_the_scripts_print():
    page = (ROOT / "docs" / "flags.md").read_text()
    assert page == flags.text(), "type: python -m lab.flags > docs/flags.md"


def test_the_readme_is_short():
    text = re.sub(r"```.*?```|^\|.*?$", "", (ROOT / "README.md").read_text(), flags=re.M | re.S)
    assert len(text.split()) < 1_000
