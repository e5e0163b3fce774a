"""Compares the stored outputs of the lessons with those of an execution: `make outputs`, or with --write to renew them.

Text is compared word by word, numbers with a tolerance; pictures and what depends on the machine are not. Networks that
are trained are other ones on other processors: of the lessons that show them, the number of lines is compared.
"""

import argparse
import json
import math
import os
import re
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

ROOT = Path(__file__).resolve().parents[1]
NUMBER = re.compile(r"[-+]?(?:\d+\.?\d*|\.\d+)(?:e[-+]?\d+)?")
TOLERANCE = 0.02  # relative; 0.02 absolute below 1
MAY_DIFFER = re.compile(  # times, speeds, memory, addresses, temporary names
    r"second|\b\d m?s\b|\bms\b|<Figure|torch._C.Generator|of the time|img/s|it/s|MiB|GiB|AVX|/tmp/|0x[0-9a-f]+|\[IPKernelApp\]|Warning|threads?\b|epoch.*%\|",
    re.I,
)


TRAINED = {
    "30_invariance",
    "34_penalties",
    "38_loop",
    "40_training",
    "42_pretraining",
    "56_attacks",
    "67_measuring",
    "68_evaluating",
}
NOISE = re.compile(r"^/.*site-packages/.*Warning", re.M)  # warnings of packages that name a path of the machine


def lessons() -> list[Path]:
    "The notebooks that `nbdev_test` executes."
    found = sorted((ROOT / "nbs").rglob("*.ipynb"))
    return [n for n in found if "skip_exec: true" not in n.read_text()]


def text_of(outputs: list[dict]) -> str:
    "What outputs say as text, without pictures."
    parts = []
    for output in outputs:
        text = output.get("text") or output.get("data", {}).get("text/plain", "")
        parts.append("".join(text))
    return "\n".join(parts)


def differs(stored: str, fresh: str, lines_only: bool = False) -> str:
    "The first line that differs by more than the tolerance, both ways; empty where none does."
    old, new = (
        [line.rstrip() for line in text.splitlines() if line.strip() and not MAY_DIFFER.search(line)]
        for text in (re.sub(r" at 0x[0-9a-f]+", "", whole) for whole in (stored, fresh))  # nbdev_clean removes them
    )
    for before, after in () if lines_only else zip(old, new, strict=False):
        words = (re.sub(r"\s+(?=[,\]\)])", "", NUMBER.sub("#", re.sub(r"\s+", " ", line))) for line in (before, after))
        numbers = ([float(n) for n in NUMBER.findall(line)] for line in (before, after))
        if len(set(words)) > 1 or any(
            not math.isclose(a, b, rel_tol=TOLERANCE, abs_tol=TOLERANCE) for a, b in zip(*numbers, strict=True)
        ):
            return f"{before!r} is now {after!r}"
    return f"{len(old)} lines are now {len(new)}" if len(old) != len(new) else ""


def executed(path: Path) -> nbformat.NotebookNode:
    "The notebook with the outputs of an execution, during which its last cell does not export the package."
    notebook = nbformat.read(path, 4)
    options = dict(timeout=580, kernel_name="python3", resources={"metadata": {"path": str(path.parent)}})
    env = {**os.environ, "IN_TEST": "1"}  # nbdev's own sign, at which nbdev_export() does nothing
    return NotebookClient(notebook, **options).execute(env=env)


def stored_form(output: dict) -> dict:
    "An output as a clean notebook stores it."
    output = json.loads(json.dumps(output))
    if "execution_count" in output:
        output["execution_count"] = None
    data = output.get("data", {})
    if "image/png" in data and data.get("text/plain", "").startswith("<Figure"):
        del data["text/plain"]
    for holder, key in [(output, "text"), *((data, k) for k in data)]:
        if isinstance(holder.get(key), str) and key != "image/png":
            holder[key] = holder[key].splitlines(keepends=True)
    return output


def check(path: Path, write: bool) -> list[str]:
    "What differs in a notebook, a line each; with `write` its outputs are renewed."
    content, found = json.loads(path.read_text()), []
    try:
        cells = executed(path).cells
    except CellExecutionError as error:
        return [f"{path.relative_to(ROOT)}: {error.ename}: {error.evalue}"]
    for cell, fresh in zip(content["cells"], cells, strict=True):
        if cell["cell_type"] != "code":
            continue
        outputs = [stored_form(o) for o in fresh.outputs if not NOISE.search(text_of([o]))]
        if how := differs(text_of(cell["outputs"]), text_of(outputs), path.stem in TRAINED):
            found.append(f"{path.relative_to(ROOT)} [{cell['id']}]: {how}")
        cell["outputs"] = outputs
    if write and found:
        path.write_text(json.dumps(content, ensure_ascii=False, indent=1) + "\n")
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("notebooks", nargs="*", type=Path, help="all lessons, if none is named")
    parser.add_argument(
        "--write", action="store_true", help="renew the outputs of notebooks in which something differs"
    )
    parser.add_argument("--jobs", type=int, default=2, help="notebooks side by side (default: 2)")
    asked = parser.parse_args()
    paths, found = [p.resolve() for p in asked.notebooks] or lessons(), []
    with ThreadPoolExecutor(asked.jobs) as pool:
        for lines in pool.map(lambda p: check(p, asked.write), paths):
            print(*lines, sep="\n", end="\n" * bool(lines), flush=True)
            found += lines
    print(
        f"{len(found)} outputs differ"
        if found
        else f"the stored outputs of {len(paths)} notebooks are those of an execution"
    )
    return bool(found) and not asked.write


if __name__ == "__main__":
    sys.exit(main())
