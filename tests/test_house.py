"""Rules of the house that a machine can check."""

import ast
import importlib
import re
import shlex
import statistics
import subprocess
import sys
import tomllib

import pytest
from conftest import ROOT, call, run_command
from mutations import MUTATIONS
from runs import read_csv

from experiment.report import PAGES
from experiment.tables import BLOCK, with_tables

LAYERS = {  # what each part may import of the others
    "eggroll": set(),
    "experiment": set(),
    "visualizations": {"eggroll", "experiment", "model"},
    "benchmarks": {"eggroll", "experiment", "model"},
    "examples": {"eggroll", "experiment", "model"},
}
TRAINING = ["mnist_backprop.py", "mnist_eggroll.py", "mnist_eggroll_int8.py"]
SCRIPTS = [*TRAINING, "evaluate.py", "search.py"]
PARTS = {*LAYERS, "model", *(script.removesuffix(".py") for script in SCRIPTS)}
LAYERS["benchmarks"] |= PARTS  # they time the scripts' own presets


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


def test_the_algorithm_needs_torch_alone():
    allowed = {"eggroll", "torch"} | set(sys.stdlib_module_names)
    for path in (ROOT / "eggroll").rglob("*.py"):
        assert set(imported(path)) <= allowed, path


def test_nothing_outside_of_the_integer_part_names_it():
    for path in (ROOT / "eggroll").glob("*.py"):
        assert not re.search(r"(?<!u)int8", path.read_text(), re.IGNORECASE), path


def test_the_package_is_all_of_its_folders():
    pyproject = tomllib.loads((ROOT / "pyproject.toml").read_text())
    packages = pyproject["tool"]["setuptools"]["packages"]
    folders = {path.parent.relative_to(ROOT) for path in (ROOT / "eggroll").rglob("*.py")}
    assert set(packages) == {".".join(folder.parts) for folder in folders}


@pytest.mark.parametrize("command", ["ruff check .", "ruff format --check .", "pyright"])
def test_linters_and_type_checker_have_nothing_to_say(command):
    python = ["--pythonpath", sys.executable] if command == "pyright" else []
    done = run_command(sys.executable, "-m", *command.split(), *python)
    if command == "pyright" and "nodeenv" in done.stderr:
        pytest.skip("pyright could not set itself up")
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(
    "script",
    [
        "run_experiments.sh",
        "run_tests.sh",
        "setup.sh",
        "benchmarks/gpu.sh",
        "benchmarks/results.sh",
    ],
)
def test_shell_scripts_parse(script):
    assert subprocess.run(["bash", "-n", ROOT / script]).returncode == 0


OPENINGS = r'^ *"""(Of|What|Whether|How|The same|Where|So) '


def test_docstrings_open_with_a_verb_or_with_what_is_returned():
    for path in ROOT.glob("**/*.py"):
        if ".venv" not in path.parts and path.parent.name != "tests":
            assert not re.findall(OPENINGS, path.read_text(), re.MULTILINE), path


def test_every_mutation_has_a_place_in_the_code():
    for name, (file, old, *_) in MUTATIONS.items():
        assert old in (ROOT / file).read_text(), name


# ---- the pages ----

EACH_PAGE = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
RESULTS = ROOT / "results" / "reference" / "third-edition" / "summary.csv"


@EACH_PAGE
def test_tables_are_the_committed_results(page):
    text = page.read_text()
    assert text == with_tables(text), "type: python -m experiment.report pages"


@EACH_PAGE
def test_every_file_that_a_page_links_exists(page):
    links = re.findall(r"\]\(([^)#:]+)[)#]", page.read_text())
    files = [link for link in links if not link.startswith("../../actions/")]  # a page of GitHub
    assert not [link for link in files if not (page.parent / link).exists()]


def blocks_of(page, language):
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(), flags=re.DOTALL)


def test_the_code_in_the_readme_runs():
    (block,) = blocks_of(ROOT / "README.md", "python")
    done = run_command(sys.executable, "-c", block)
    assert done.returncode == 0, done.stderr
    assert float(re.search(r"accuracy ([\d.]+)", done.stdout)[1]) > 0.9


COMMANDS = [
    line.partition("#")[0].strip()
    for page in PAGES
    for block in blocks_of(page, "bash")
    for line in block.replace("\\\n", " ").splitlines()
    if line.strip() and not line.startswith(("export ", "#"))
]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_of_the_pages_exists_and_takes_its_flags(command, monkeypatch):
    words = shlex.split(command)
    while "=" in words[0]:
        monkeypatch.setenv(*words.pop(0).split("=", 1))
    program, *flags = words
    if program == "./run_experiments.sh":
        assert set(flags) <= {"--quick", "--all", "--threads", "2"}
    elif program == "./run_tests.sh":
        assert set(flags) <= {"--setup-only"}
    elif flags[0] == "-m":
        assert (ROOT / flags[1].replace(".", "/")).with_suffix(".py").exists()
    elif program.endswith(".sh"):
        assert (ROOT / program).exists()
    else:
        script = next(i for i, word in enumerate(flags) if word.endswith(".py"))
        assert (ROOT / flags[script]).exists()
        if flags[script] in SCRIPTS and flags[script] != "evaluate.py":
            done = call(*flags[script:], "--help")
            assert done.returncode == 0, done.stderr


def test_results_in_docstrings_are_the_committed_ones():
    seen = 0
    rows = read_csv(RESULTS)
    for script in TRAINING:
        examples = re.findall(
            r"^python (\S+) *(\S*?) +#.*?([\d.]+) % in (\d+) s", (ROOT / script).read_text(), re.M
        )
        for name, preset, accuracy, seconds in examples:
            method = preset or next(iter(importlib.import_module(name[:-3]).PRESETS))
            own = [row for row in rows if row["row"] == method]
            mean = 100 * statistics.mean(float(row["test_accuracy"]) for row in own)
            assert f"{mean:.1f}" == accuracy, script
            median = statistics.median(float(row["train_seconds"]) for row in own)
            assert float(seconds) == pytest.approx(median, rel=0.1), script
            seen += 1
    assert seen >= 4


def test_accuracies_in_the_readmes_text_are_in_a_table():
    readme = re.sub(r"```.*?```", "", (ROOT / "README.md").read_text(), flags=re.DOTALL)
    tables = "".join(found[0] for page in PAGES for found in BLOCK.finditer(page.read_text()))
    for number in re.findall(r"\d\d\.\d\d(?= %)", BLOCK.sub("", readme)):
        assert f"{number} " in tables, number


def test_the_readme_is_short():
    text = re.sub(r"```.*?```|^\|.*?$", "", (ROOT / "README.md").read_text(), flags=re.M | re.S)
    assert len(text.split()) < 900
