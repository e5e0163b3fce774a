"Writes constraints.txt: what is installed, and for what does not install on every Python of the project, on which it does."

import subprocess
import sys
from importlib.metadata import metadata
from pathlib import Path

from packaging.specifiers import SpecifierSet

ROOT = Path(__file__).resolve().parents[1]
OLDEST = "3.11.0"  # requires-python in pyproject.toml


def constraint(
    pinned: str,  # name==version, of an installed package
) -> str:
    "The line of constraints.txt: on a Python that the version does not support, pip chooses another version."
    needed = SpecifierSet(metadata(pinned.partition("==")[0])["Requires-Python"] or "")
    if needed.contains(OLDEST):
        return pinned
    markers = sorted(f'python_full_version {s.operator} "{s.version}"' for s in needed)
    return f"{pinned} ; {' and '.join(markers)}"


if __name__ == "__main__":
    freeze = [sys.executable, "-m", "pip", "freeze", "--exclude-editable"]
    listed = subprocess.run(freeze, capture_output=True, text=True, check=True).stdout.splitlines()
    pinned = [line for line in listed if "==" in line and "+" not in line and not line.startswith("#")]
    (ROOT / "constraints.txt").write_text("".join(constraint(line) + "\n" for line in pinned))
