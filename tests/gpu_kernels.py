"""Compiles the kernels of the augmentation for an H100, without one: `python gpu_kernels.py FOLDER`."""

import re
import sys
import types
from pathlib import Path

import torch
import torch._inductor.config as config
import triton
from torch._inductor import graph
from torch._inductor.runtime import triton_heuristics
from triton.backends.compiler import GPUTarget

TARGET = GPUTarget("cuda", 90, 32)
BLOCKS = dict(XBLOCK=64, YBLOCK=16, ZBLOCK=1, R0_BLOCK=64, R1_BLOCK=1)


class _Driver:
    "What the generator of code asks of a GPU."

    def get_current_target(self):
        return TARGET

    def get_current_device(self):
        return 0


class _Generated(Exception):
    "Carries generated code past the compiler of this machine."


def generated(function, *arguments) -> str:
    "The code that would run the function on a GPU."
    triton.runtime.driver.set_active(_Driver())
    config.cpu_backend, config.compile_threads, config.force_disable_caches = "triton", 1, True
    written, original = [], graph.GraphLowering.codegen

    def codegen(self, *rest):
        code = original(self, *rest)[0]
        written.append(getattr(code, "value", code))
        raise _Generated

    graph.GraphLowering.codegen = codegen
    try:
        torch.compile(function, fullgraph=True)(*arguments)
    except Exception:
        if not written:
            raise
    return written[0]


def compile_kernels(code: str, folder: Path) -> list[str]:
    "Compiles every kernel in the code for an H100, from files in the folder; their names."
    found = []

    def kept(*, triton_meta=None, **options):
        return lambda kernel: types.SimpleNamespace(kernel=kernel, meta=triton_meta)

    for kind in ("pointwise", "reduction", "persistent_reduction"):
        setattr(triton_heuristics, kind, lambda *a, **k: kept(triton_meta=k["triton_meta"]))
    for name, source in re.findall(r"async_compile\.triton\('(\w+)', '''(.*?)''', device", code, re.DOTALL):
        path = folder / f"{name}.py"
        path.write_text(source)
        module = types.ModuleType(name)
        module.__file__ = str(path)
        exec(compile(source, str(path), "exec"), module.__dict__)
        held = getattr(module, name)
        signature = held.meta["signature"]
        places = {key: place for place, key in enumerate(signature)}
        values = {**BLOCKS, **held.meta["constants"]}
        constants = {(places[key],): values[key] for key, kind in signature.items() if kind == "constexpr"}
        source = triton.compiler.ASTSource(fn=held.kernel, signature=signature, constexprs=constants)
        triton.compile(source, target=TARGET)
        found.append(name)
    return found


if __name__ == "__main__":
    from dainv.augment import draw_views, scheme, transform

    images, ids = torch.randint(256, (64, 3, 32, 32), dtype=torch.uint8), torch.arange(64)
    chosen = scheme("heavier", interpolation="nearest")
    code = generated(lambda x, i, views: transform(x, draw_views(chosen, i, i, views, 0)), images, ids, ids)
    print(len(compile_kernels(code, Path(sys.argv[1]))), "kernels compiled")
