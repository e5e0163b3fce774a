"Functions compiled from C++: made once, and nothing at all where they cannot be made."

import ctypes
import os
import stat
import subprocess
import sys

import pytest

from dainv.native import _commands, native

SOURCE = 'extern "C" long twice(long n) { return 2 * n; }'
CALL = f"from dainv.native import native; library = native({SOURCE!r}); print(library and library.twice(21))"

needs_a_compiler = pytest.mark.skipif(not _commands(), reason="needs a C++ compiler")


@pytest.fixture
def cache(tmp_path, monkeypatch):
    "An empty cache."
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    native.cache_clear()
    yield tmp_path / "dainv"
    native.cache_clear()


@needs_a_compiler
def test_a_library_is_compiled_once_and_found_again(cache, monkeypatch):
    assert native(SOURCE).twice(21) == 42
    (library,) = cache.iterdir()
    assert stat.S_IMODE(cache.stat().st_mode) == 0o700
    native.cache_clear()
    monkeypatch.setattr(subprocess, "run", lambda *a, **k: pytest.fail("compiled again"))
    assert native(SOURCE).twice(21) == 42 and list(cache.iterdir()) == [library]


@needs_a_compiler
def test_processes_may_start_together(cache):
    calls = [subprocess.Popen([sys.executable, "-c", CALL], stdout=subprocess.PIPE, text=True) for _ in range(2)]
    assert [call.communicate()[0].strip() for call in calls] == ["42", "42"]
    assert len(list(cache.iterdir())) == 1


@needs_a_compiler
def test_a_cache_that_cannot_be_written_and_a_library_that_cannot_be_read(cache):
    cache.parent.joinpath("dainv").write_text("a file, not a folder")
    assert native(SOURCE).twice(21) == 42
    os.remove(cache)
    native.cache_clear()
    assert native(SOURCE).twice(21) == 42
    (library,) = cache.iterdir()
    library.write_bytes(b"damaged")
    native.cache_clear()
    assert native(SOURCE + "\n").twice(21) == 42


@needs_a_compiler
def test_a_compiler_that_fails_is_passed_over(cache, monkeypatch):
    monkeypatch.setenv("CXX", "false")
    assert native(SOURCE).twice(21) == 42


def test_without_a_compiler_there_is_none(cache, monkeypatch, capfd):
    monkeypatch.setenv("PATH", str(cache))
    monkeypatch.delenv("CXX", raising=False)
    assert native(SOURCE) is None and _commands() == []
    assert capfd.readouterr() == ("", "")


def test_it_can_be_switched_off_and_mistakes_are_silent(cache, monkeypatch, capfd):
    assert native("no C++") is None
    monkeypatch.setenv("DAINV_NATIVE", "0")
    assert native(SOURCE) is None
    assert capfd.readouterr() == ("", "")


@needs_a_compiler
def test_the_instructions_are_those_that_torch_uses(cache, monkeypatch):
    monkeypatch.setattr("torch.backends.cpu.get_cpu_capability", lambda: "DEFAULT")
    assert not [option for option in _commands()[0] if option.startswith("-m")]
    assert isinstance(native(SOURCE), ctypes.CDLL) and next(cache.iterdir()).name.endswith("-default.so")
