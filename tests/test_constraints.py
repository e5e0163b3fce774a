"The pinned versions install on every Python that the project supports, not only on the one that pinned them."

import tomllib
from importlib.metadata import PackageNotFoundError, metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

ROOT = Path(__file__).resolve().parents[1]
PINNED = [Requirement(line) for line in (ROOT / "constraints.txt").read_text().splitlines()]
PATCHES = [f"3.11.{patch}" for patch in range(16)]


def supported(pinned):
    "Requires-Python of a pinned package; None where another version is installed, or none."
    try:
        installed = metadata(pinned.name)
    except PackageNotFoundError:
        return None
    return SpecifierSet(installed["Requires-Python"] or "") if installed["Version"] in pinned.specifier else None


def test_a_version_is_asked_for_only_where_it_installs():
    assert SpecifierSet(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["requires-python"]).contains(
        "3.11.0"
    )
    known = {pinned: needed for pinned in PINNED if (needed := supported(pinned)) is not None}
    assert len(known) > 100
    refused = [
        f"{pinned.name} on Python {python}: it needs {needed}"
        for pinned, needed in known.items()
        for python in PATCHES
        if (not pinned.marker or pinned.marker.evaluate({"python_full_version": python}))
        and not needed.contains(python)
    ]
    assert refused == []


def test_a_marker_admits_the_python_that_it_was_written_for():
    marked = {pinned.name: pinned.marker for pinned in PINNED if pinned.marker}
    for python, pinned in {"3.11.2": set(), "3.11.15": set(marked)}.items():
        assert {name for name, m in marked.items() if m.evaluate({"python_full_version": python})} == pinned
