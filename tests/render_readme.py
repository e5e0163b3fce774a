"Writes README.md from nbs/index.ipynb, deterministically and without quarto."

import re
from pathlib import Path

import nbformat
from nbconvert import MarkdownExporter

ROOT = Path(__file__).resolve().parents[1]


def _shown(cell) -> list:
    "The cell as a reader of the README sees it: hidden ones dropped, of `#| hide_input` ones only the output."
    directive = re.match(r"#\|\s*(\w+)", cell.source)
    if cell.cell_type != "code" or directive is None:
        return [cell]
    if directive[1] == "hide_input":
        text = [o["data"].get("text/markdown", o["data"].get("text/plain", "")) for o in cell.outputs if "data" in o]
        return [nbformat.v4.new_markdown_cell("\n".join(text))]
    return [] if directive[1] == "hide" else [cell]


def rendered() -> str:
    "The index notebook as markdown, its links relative to the project's root."
    notebook = nbformat.read(ROOT / "nbs" / "index.ipynb", as_version=4)
    notebook.metadata["language_info"] = {"name": "python"}
    notebook.cells = [shown for cell in notebook.cells for shown in _shown(cell)]
    body, _ = MarkdownExporter().from_notebook_node(notebook)
    body = re.sub(r"<style.*?</style>\n?", "", body, flags=re.DOTALL)
    body = re.sub(r"(\]\(|src=\")\.\./", r"\1", body)
    return re.sub(r"\n{3,}", "\n\n", body).strip() + "\n"


if __name__ == "__main__":
    (ROOT / "README.md").write_text(rendered())
