"""Files that a visitor of the public repository expects: workflow, citation, metadata, notebook."""

import json
import os
import re
import shutil
import sys
import tomllib
from types import SimpleNamespace

import pytest
from conftest import ROOT
from test_shell import write_program

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
WORKFLOW = ROOT / ".github" / "workflows" / "ci.yml"
CITATION = ROOT / "CITATION.cff"


@pytest.mark.parametrize("path", [WORKFLOW, CITATION], ids=lambda path: path.name)
def test_a_yaml_file_can_be_read(path):
    text = path.read_text()
    assert "\t" not in text and not re.search(r"^( {2})* \S", text, re.MULTILINE)
    yaml = pytest.importorskip("yaml")
    assert isinstance(yaml.safe_load(text), dict)


def test_the_workflow_runs_commands_that_exist():
    commands = re.findall(r"run: (.*)", WORKFLOW.read_text())
    programs = [part.split()[0] for line in commands for part in line.split(" && ")]
    assert len(programs) == 6
    for program in programs:
        assert program.startswith(".venv/bin/") or (ROOT / program).exists()


def test_the_workflow_takes_the_oldest_and_the_newest_python():
    text = "\n".join(PROJECT["classifiers"])
    minors = sorted(map(int, re.findall(r"Python :: 3\.(\d+)", text)))
    assert minors == list(range(minors[0], minors[-1] + 1))
    assert PROJECT["requires-python"] == f">=3.{minors[0]}"
    used = re.findall(r'os: (\w+)-latest, python: "3\.(\d+)"', WORKFLOW.read_text())
    oldest, newest = str(minors[0]), str(minors[-1])
    assert used == [("ubuntu", oldest), ("ubuntu", newest), ("macos", newest)]


def test_the_citation_agrees_with_the_package_and_the_readme():
    citation, readme = CITATION.read_text(), (ROOT / "README.md").read_text()
    assert f'version: "{PROJECT["version"]}"' in citation
    assert f"license: {PROJECT['license']}" in citation
    assert PROJECT["urls"]["Paper"] in citation and PROJECT["urls"]["Paper"] in readme
    names = re.findall(r"family-names: (\w+)", citation)
    assert f"{', '.join(names)} et al." in readme


def notebook_as_a_script():
    """Return the code of the notebook's cells, with `!command` as a call of a shell."""
    cells = json.loads((ROOT / "notebooks" / "eggroll_mnist.ipynb").read_text())["cells"]
    code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    assert len(code) == 4
    shell = r"subprocess.run(r'''\1''', shell=True, check=True)"
    return re.sub(r"^!(.*)$", shell, "\n\n".join(code), flags=re.MULTILINE)


def test_the_notebook_runs_in_a_checkout(tmp_path, monkeypatch, capfd):
    ignored = shutil.ignore_patterns(".*", "results", "data", "build", "__pycache__")
    shutil.copytree(ROOT, tmp_path / "copy", ignore=ignored)
    stand_in = f'#!/bin/sh\nexec {sys.executable} "$@"\n'
    write_program(tmp_path / "copy" / ".venv" / "bin" / "python", stand_in)
    for name in ("requirements.txt", "requirements-dev.txt"):
        os.utime(tmp_path / "copy" / name, (0, 0))
        (tmp_path / "copy" / ".venv" / f"installed-{name}").touch()
    display = SimpleNamespace(Image=str, Markdown=str, display=print)
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(display=display))
    monkeypatch.setitem(sys.modules, "IPython.display", display)
    monkeypatch.setenv("MPLBACKEND", "module://not_in_this_environment")  # as Jupyter does
    monkeypatch.setenv("METHODS", "backprop")
    monkeypatch.setenv("FLAGS", "--dataset mnist-sample --hidden-dim 8 --epochs 1")
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.chdir(tmp_path / "copy" / "notebooks")
    exec(notebook_as_a_script(), {})
    shown = capfd.readouterr().out
    assert "| backprop | cross-entropy |" in shown
    plots = re.findall(r"^results/quick/.*png$", shown, re.MULTILINE)
    assert plots and all((tmp_path / "copy" / path).exists() for path in plots)
    assert float(re.search(r"([\d.]+)% of the test labels", shown)[1]) > 90


def test_the_notebook_outside_of_a_checkout_asks_for_the_address(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="type the repository's address"):
        exec(notebook_as_a_script(), {})
