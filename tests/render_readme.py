"Writes README.md from nbs/index.ipynb, deterministically and without quarto."

import re
from pathlib import Path

from nbconvert import MarkdownExporter
from traitlets.config import Config

ROOT = Path(__file__).resolve().parents[1]


def rendered() -> str:
    "The index notebook as markdown, its links relative to the project's root."
    config = Config()
    config.RegexRemovePreprocessor.patterns = [r"^#\|\s*hide"]
    config.MarkdownExporter.preprocessors = ["nbconvert.preprocessors.RegexRemovePreprocessor"]
    body, _ = MarkdownExporter(config=config).from_filename(str(ROOT / "nbs" / "index.ipynb"))
    body = re.sub(r"(\]\(|src=\")\.\./", r"\1", body)
    return re.sub(r"\n{3,}", "\n\n", body).strip() + "\n"


if __name__ == "__main__":
    (ROOT / "README.md").write_text(rendered())
