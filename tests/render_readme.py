"Writes README.md from nbs/index.ipynb, whose hidden cells are executed first: what they say comes from tables of figures."

import re
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbconvert import MarkdownExporter

ROOT = Path(__file__).resolve().parents[1]
INDEX = ROOT / "nbs" / "index.ipynb"


def refresh() -> None:
    "Executes the cells of the index notebook of which the README shows the output alone, and stores what they show."
    notebook = nbformat.read(INDEX, as_version=4)
    hidden = [cell for cell in notebook.cells if re.match(r"#\|\s*hide_input", cell.source)]
    alone = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell.source) for cell in hidden])
    NotebookClient(alone, kernel_name="python3", resources={"metadata": {"path": INDEX.parent}}).execute()
    changed = False
    for cell, done in zip(hidden, alone.cells, strict=True):
        shown = [o["data"]["text/markdown"] for o in done.outputs]
        if shown != [o["data"]["text/markdown"] for o in cell.outputs if "data" in o]:
            for output in done.outputs:
                output["execution_count"], changed = None, True
            cell.outputs = done.outputs
    if changed:
        nbformat.write(notebook, INDEX)


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
    notebook = nbformat.read(INDEX, as_version=4)
    notebook.metadata["language_info"] = {"name": "python"}
    notebook.cells = [shown for cell in notebook.cells for shown in _shown(cell)]
    body, _ = MarkdownExporter().from_notebook_node(notebook)
    body = re.sub(r"<style.*?</style>\n?", "", body, flags=re.DOTALL)
    body = re.sub(r"(\]\(|src=\")\.\./", r"\1", body)
    return re.sub(r"\n{3,}", "\n\n", body).strip() + "\n"


if __name__ == "__main__":
    refresh()
    (ROOT / "README.md").write_text(rendered())
