"""The project as a static site in `_docs/site`: README, notebooks as they are stored, figures, and the API.

No notebook is executed. The pages are gathered in `_docs/source`, in the folders that they have in the project, so that
their links hold.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import yaml
from latex2mathml.converter import convert

ROOT = Path(__file__).resolve().parents[1]
OUT = ROOT / "_docs"
SOURCE = OUT / "source"
WINGS = ("core", "inputs", "networks", "losses", "measures", "trainers", "reporting", "audits")
CSS = """
.md-typeset table:not([class]) { display: block; overflow-x: auto; }
.md-typeset img, .jp-OutputArea img { max-width: 100%; height: auto; }
.jp-OutputArea-output, .highlight-ipynb { overflow-x: auto; }
.jp-InputPrompt, .jp-OutputPrompt, .jp-Cell .jp-InputArea-prompt { display: none !important; }
math[display="block"] { overflow-x: auto; overflow-y: hidden; padding: .3em 0; }
"""
FORMULA = re.compile(r"(```.*?```|`[^`\n]*`)|\$\$(.+?)\$\$|(?<![\\$\w])\$(?=\S)([^$`\n]+?)(?<=\S)\$(?!\d)", re.S)


def title(notebook: Path) -> str:
    "The first heading of a notebook, else its name."
    for cell in json.loads(notebook.read_text())["cells"]:
        if cell["cell_type"] == "markdown" and (found := re.match(r"# (.+)", "".join(cell["source"]))):
            return found[1].strip()
    return notebook.stem


def page(path: Path) -> dict[str, str]:
    return {title(path): str(path.relative_to(SOURCE))}


def api(module: Path) -> dict[str, str]:
    "A page with the public definitions of a module; its entry in the navigation."
    name = ".".join(module.relative_to(ROOT).with_suffix("").parts)
    target = SOURCE / "api" / f"{name}.md"
    target.parent.mkdir(exist_ok=True)
    short = f"Imported as `dainv.{module.stem}`.\n\n" if module.parent != ROOT / "dainv" else ""
    target.write_text(f"# {name}\n\n{short}::: {name}\n")
    return {module.stem: str(target.relative_to(SOURCE))}


def with_formulas(text: str) -> str:
    "Markdown whose LaTeX formulas are MathML, which browsers draw without a script."

    def drawn(match: re.Match) -> str:
        code, block, inline = match.groups()
        return code or convert((block or inline).strip(), display="block" if block else "inline")

    return FORMULA.sub(drawn, text)


def readable(notebook: Path) -> None:
    "The copy of a notebook as its reader sees it: without directives, hidden cells and front matter."
    content, cells = json.loads(notebook.read_text()), []
    for cell in content["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "raw" or re.match(r"#\|\s*(hide\b|default_exp)", source):
            continue
        if cell["cell_type"] == "markdown":
            cell["source"] = with_formulas(source).splitlines(keepends=True)
        else:
            cell["source"] = re.sub(r"^#\|.*\n", "", source, flags=re.M).splitlines(keepends=True)
        cells.append(cell)
    notebook.write_text(json.dumps({**content, "cells": cells}))


def gather() -> list:
    "Copies what the site shows; the navigation."
    shutil.rmtree(SOURCE, ignore_errors=True)
    SOURCE.mkdir(parents=True)
    shutil.copytree(ROOT / "nbs", SOURCE / "nbs", ignore=shutil.ignore_patterns(".ipynb_checkpoints"))
    left_out = shutil.ignore_patterns("quick", "*.pdf", "*.parquet")
    shutil.copytree(ROOT / "paper_figures", SOURCE / "paper_figures", ignore=left_out)
    (SOURCE / "index.md").write_text(with_formulas((ROOT / "README.md").read_text()))
    (SOURCE / "nbs" / "index.ipynb").unlink()  # the README
    for notebook in (SOURCE / "nbs").rglob("*.ipynb"):
        readable(notebook)
    for name in ("CONTRIBUTING.md", "CHANGELOG.md", "LICENSE", "experiments.yaml", "Snakefile", "CITATION.cff"):
        shutil.copy(ROOT / name, SOURCE / name)
    (SOURCE / "extra.css").write_text(CSS)
    notebooks = SOURCE / "nbs"
    runs = [
        page(notebooks / f"{name}.ipynb") for name in ("howto", "train", "pretrain", "measure", "evaluate", "pairs")
    ]
    lessons = [{wing.title(): [page(n) for n in sorted((notebooks / wing).glob("*.ipynb"))]} for wing in WINGS]
    figures = [{"Gallery": "paper_figures/README.md"}]
    figures += [page(n) for n in sorted((notebooks / "figures").glob("*.ipynb"))]
    modules = [
        {wing.title(): [api(m) for m in sorted((ROOT / "dainv" / wing).glob("[a-z]*.py"))]} for wing in WINGS
    ] + [api(ROOT / "dainv" / "cli.py")]
    project = [{"Contributing": "CONTRIBUTING.md"}, {"Changes": "CHANGELOG.md"}, page(notebooks / "benchmarks.ipynb")]
    return [
        {"dainv": "index.md"},
        {"Run": runs},
        {"Lessons": lessons},
        {"Figures": figures},
        {"API": modules},
        {"Project": project},
    ]


def mend_links() -> None:
    "Links from page to page end in .html, where the project's files end in .ipynb."
    for file in (OUT / "site").rglob("*.html"):
        text = file.read_text()
        mended = re.sub(r'(href="(?!https?:)[^"#]*)\.ipynb(?=["#])', r"\1.html", text)
        if mended != text:
            file.write_text(mended)


def main() -> None:
    config = yaml.safe_load((ROOT / "docs" / "mkdocs.yml").read_text())
    config["nav"] = gather()
    (OUT / "mkdocs.yml").write_text(yaml.safe_dump(config, sort_keys=False))
    command = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--config-file", str(OUT / "mkdocs.yml")]
    subprocess.run(command, check=True, cwd=OUT, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"})
    mend_links()
    print(f"Open {(OUT / 'site' / 'index.html').relative_to(ROOT)}")


if __name__ == "__main__":
    main()
