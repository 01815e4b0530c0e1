"""Files that a visitor of the public repository expects: workflow, citation, metadata, notebook."""

import re
import tomllib

import pytest
from conftest import ROOT

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
