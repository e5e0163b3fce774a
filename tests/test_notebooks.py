"Guards of the notebooks: what nbdev and papermill would let pass in silence."

import ast
import importlib.util
import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import papermill
import pytest
import yaml
from render_parameters import PARAMETERS

from dainv.options import parameters_cell

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted((ROOT / "nbs").rglob("*.ipynb"))
NUMBERED = [n for n in NOTEBOOKS if re.match(r"\d\d_", n.name)]
WINGS = ["core", "inputs", "networks", "losses", "measures", "trainers", "reporting", "audits", ""]  # from below
RUN = [n for n in NOTEBOOKS if n not in NUMBERED and n.stem not in ("index", "howto")]


def cells(notebook, kind="code"):
    return [c for c in json.loads(notebook.read_text())["cells"] if c["cell_type"] == kind]


def source(cell):
    return "".join(cell["source"])


def name(notebook):
    return str(notebook.relative_to(ROOT / "nbs"))


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=name)
def test_a_notebook_is_portable_and_clean(notebook):
    content = json.loads(notebook.read_text())
    assert content["metadata"]["kernelspec"]["name"] == "python3"
    assert all(c["execution_count"] is None for c in cells(notebook))
    assert notebook.stat().st_size < 400_000
    text = notebook.read_text()
    assert "application/vnd.jupyter.widget" not in text
    assert not re.search(r"/(home|root|work|tmp|Users)/", text), "a path of somebody's machine"


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=name)
def test_images_in_outputs_are_small(notebook):
    for cell in cells(notebook):
        for output in cell["outputs"]:
            assert len(output.get("data", {}).get("image/png", "")) < 100_000 * 4 / 3, source(cell)[:60]


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=name)
def test_cells_are_short_and_there_is_prose(notebook):
    "A class that is taught as a whole may be longer."
    lengths = [len(c["source"]) for c in cells(notebook)]
    whole = [c for c in cells(notebook) if re.search(r"^class ", source(c), re.M)]
    assert max(len(c["source"]) for c in cells(notebook) if c not in whole) <= 80
    assert max((len(c["source"]) for c in whole), default=0) <= 95
    assert len(cells(notebook, "markdown")) >= 0.2 * (len(lengths) + len(cells(notebook, "markdown")))


@pytest.mark.parametrize("notebook", NUMBERED, ids=name)
def test_directives_stand_on_the_first_lines(notebook):
    for cell in cells(notebook):
        lines = source(cell).splitlines()
        after_code = [
            line for i, line in enumerate(lines) if line.startswith("#|") and i and not lines[0].startswith("#|")
        ]
        assert not after_code, f"silently ignored: {after_code}"


def place(notebook):
    "Where the module of a notebook lies, from the lowest to the highest: its wing, then its number. The root is the roof."
    wing = notebook.parent.name if notebook.parent != ROOT / "nbs" else ""
    return (WINGS.index(wing), int(notebook.name[:2]))


def module(notebook):
    return ".".join([*notebook.relative_to(ROOT / "nbs").parent.parts, notebook.stem[3:]])


def test_every_module_has_exactly_one_notebook():
    found = set()
    for notebook in NUMBERED:
        exported = re.findall(r"^#\| default_exp (\S+)", "\n".join(map(source, cells(notebook))), re.M)
        assert exported == [module(notebook)], notebook.name
        found.add(exported[0])
    package = ROOT / "dainv"
    files = [m for m in package.rglob("*.py") if m.stem not in ("__init__", "__main__", "_modidx")]
    assert {".".join(m.relative_to(package).with_suffix("").parts) for m in files} == found
    assert len({m.split(".")[-1] for m in found}) == len(found), "a module is also imported without its wing"
    assert not {m.split(".")[-1] for m in found} & set(WINGS)


@pytest.mark.parametrize("notebook", NUMBERED, ids=name)
def test_a_module_imports_only_from_below(notebook):
    below = {module(n) for n in NUMBERED if place(n) < place(notebook)}
    for node in ast.walk(ast.parse("\n".join(source(c) for c in cells(notebook) if source(c).startswith("#| export")))):
        if isinstance(node, ast.ImportFrom) and node.module.startswith("dainv."):
            assert node.module.removeprefix("dainv.") in below, node.module


def test_a_module_is_the_same_without_its_wing():
    import dainv.measures.score
    import dainv.score

    assert dainv.score is dainv.measures.score and dainv.score.__spec__.name == "dainv.measures.score"
    assert importlib.util.find_spec("dainv.nothing") is None
    code = "from dainv.models import build_model; from dainv.networks import models; print(models.build_model is build_model)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "True\n"


@pytest.mark.parametrize("notebook", RUN, ids=name)
def test_run_notebooks_are_guarded(notebook):
    tagged = [c for c in cells(notebook) if "parameters" in c["metadata"].get("tags", [])]
    assert len(tagged) == 1, "without its tag, papermill's values are overwritten in silence"
    after = cells(notebook)[cells(notebook).index(tagged[0]) + 1]
    assert re.search(r"\b(read_params|declared_params|Figure)\(", source(after)), (
        "an unknown parameter would be ignored"
    )
    assert "skip_exec: true" in source(cells(notebook, "raw")[0])
    declared = [node.target.id for node in ast.parse(source(tagged[0])).body]
    parsed = papermill.inspect_notebook(str(notebook))
    assert list(parsed) == declared
    assert all(p["help"] for p in parsed.values())


@pytest.mark.parametrize("notebook", PARAMETERS)
def test_the_parameters_cell_is_the_dataclass(notebook):
    cell = next(c for c in cells(ROOT / f"nbs/{notebook}.ipynb") if "parameters" in c["metadata"].get("tags", []))
    assert source(cell) == parameters_cell(PARAMETERS[notebook]), "make parameters writes it"
    namespace = {}
    exec(source(cell), namespace)
    defaults = {k: v for k, v in namespace.items() if k not in ("__builtins__", "__annotations__")}
    kind = PARAMETERS[notebook]
    assert kind(**defaults) == kind() and list(defaults) == list(kind.__dataclass_fields__)


def test_the_environment_of_conda_is_that_of_pip():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = project["dependencies"] + project["optional-dependencies"]["dev"]
    conda = yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]
    given = next(d["pip"] for d in conda if isinstance(d, dict))
    assert given == [*wanted, "-e ."]


def test_the_installed_package_is_this_checkout():
    code = "import dainv, importlib.metadata as m; print(dainv.__file__, m.version('dainv'))"
    shown = subprocess.run([sys.executable, "-c", code], cwd="/", capture_output=True, text=True, check=True).stdout
    settings = (ROOT / "settings.ini").read_text()
    assert shown.split() == [str(ROOT / "dainv" / "__init__.py"), re.search(r"^version = (.*)$", settings, re.M)[1]]


def test_the_readme_is_the_index():
    from render_readme import rendered

    assert (ROOT / "README.md").read_text() == rendered()


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=name)
def test_links_lead_to_files(notebook):
    texts = [source(c) for c in cells(notebook, "markdown")]
    for text in texts:
        for link in re.findall(r"\]\(([^)#\s]+)\)", text):
            if not re.match(r"[a-z]+:", link):
                assert (notebook.parent / link).exists(), link
        for named in re.findall(r"\bnbs/[\w/]+\.ipynb", text):
            assert (ROOT / named).exists(), named


@pytest.mark.parametrize("notebook", PARAMETERS)
def test_a_list_in_the_parameters_cell_stands_on_one_line(notebook):
    lines = parameters_cell(PARAMETERS[notebook]).splitlines()
    assert all(len(line) <= 120 for line in lines if "= [" in line and "= []" not in line)


@pytest.mark.slow
def test_outputs_are_compared_without_touching_the_package():
    exported = [*(ROOT / "dainv").rglob("*.py")]
    before = [file.stat().st_mtime_ns for file in exported]
    done = subprocess.run(
        [sys.executable, "tests/outputs.py", "nbs/core/00_registry.ipynb"], cwd=ROOT, capture_output=True
    )
    assert done.returncode == 0, done.stderr.decode()
    assert [file.stat().st_mtime_ns for file in exported] == before
