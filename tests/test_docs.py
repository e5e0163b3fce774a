"""The pages of the site: formulas, and what a reader of a notebook sees."""

import json
import sys
from pathlib import Path

import pytest

pytest.importorskip("latex2mathml", reason="the packages of `make docs` are not installed")
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "docs"))
import build  # noqa: E402


def test_formulas_become_mathml_and_code_stays():
    text = build.with_formulas("Cost $5 `$HOME` and $K = 16$:\n\n$$\\frac{a}{b}$$\n\n```\n$x$\n```")
    assert text.count("<math") == 2 and "`$HOME`" in text and "```\n$x$\n```" in text and "Cost $5 " in text
    assert 'display="block"' in text and "<mfrac>" in text


def test_a_reader_sees_neither_directives_nor_hidden_cells(tmp_path):
    cells = [
        {"cell_type": "raw", "metadata": {}, "source": ["---\n", "skip_exec: true\n", "---"]},
        {"cell_type": "code", "metadata": {}, "source": ["#| default_exp a.b"], "outputs": []},
        {"cell_type": "code", "metadata": {}, "source": ["#| hide\n", "import os"], "outputs": []},
        {"cell_type": "code", "metadata": {}, "source": ["#| export\n", "x = 1"], "outputs": []},
        {"cell_type": "markdown", "metadata": {}, "source": ["# Title\n", "$x$"]},
    ]
    notebook = tmp_path / "one.ipynb"
    notebook.write_text(json.dumps({"cells": cells}))
    build.readable(notebook)
    code, text = json.loads(notebook.read_text())["cells"]
    assert code["source"] == ["x = 1"] and "<math" in "".join(text["source"])
    assert build.title(notebook) == "Title"
