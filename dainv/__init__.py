"""Measure and train representational invariance in PyTorch.

Modules lie in wings, a folder each (`dainv.measures.score`). Users leave the wing out: `from dainv.score import invariance_profile`.
"""

import sys
from importlib import import_module, util
from pathlib import Path

__version__ = "0.1.0"

_PUBLIC = {"audit": "audits.audit_page", "Report": "audits.audit_page", "compare": "audits.comparing"}  # loaded when asked for: importing stays fast
_MODULES = {file.stem: f"dainv.{file.parent.name}.{file.stem}" for file in Path(__file__).parent.glob("*/[a-z]*.py")}


class _WithoutWing:
    "Finds `dainv.score` as `dainv.measures.score`: the same module object under both names."

    @staticmethod
    def find_spec(name, path=None, target=None):
        short = name.removeprefix("dainv.")
        return util.spec_from_loader(name, _WithoutWing) if short != name and short in _MODULES else None

    @staticmethod
    def create_module(spec):
        module = import_module(_MODULES[spec.name.removeprefix("dainv.")])
        spec.loader_state = module.__spec__  # the import system is about to replace it by this one
        return module

    @staticmethod
    def exec_module(module):
        module.__spec__ = module.__spec__.loader_state


sys.meta_path.append(_WithoutWing)


def __getattr__(name):
    if name in _PUBLIC:
        return getattr(import_module(f"dainv.{_PUBLIC[name]}"), name)
    raise AttributeError(f"module 'dainv' has no attribute {name!r}")


def __dir__():
    return sorted([*globals(), *_PUBLIC])
