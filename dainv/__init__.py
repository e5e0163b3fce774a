"Measure and train representational invariance in PyTorch."

__version__ = "0.1.0"

_PUBLIC = {"audit": "audit_page", "Report": "audit_page", "compare": "comparing"}  # loaded when they are asked for, so that importing stays fast


def __getattr__(name):
    if name in _PUBLIC:
        from importlib import import_module

        return getattr(import_module(f"dainv.{_PUBLIC[name]}"), name)
    raise AttributeError(f"module 'dainv' has no attribute {name!r}")


def __dir__():
    return sorted([*globals(), *_PUBLIC])
