"""The compiler of a training step: what it makes for a GPU, and what happens where it fails."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dainv.training import or_eager


@pytest.mark.slow
def test_the_augmentation_compiles_for_a_gpu(tmp_path):
    pytest.importorskip("triton")
    script = Path(__file__).with_name("gpu_kernels.py")
    done = subprocess.run([sys.executable, script, tmp_path], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert int(done.stdout.split()[0]) >= 5


def test_a_step_that_cannot_be_compiled_is_taken_eagerly():
    calls = []

    def compiled(x):
        calls.append(x)
        raise torch._dynamo.exc.BackendCompilerFailed(compiled, ValueError("no kernel"), None)

    step = or_eager(compiled, lambda x: x + 1)
    with pytest.warns(UserWarning, match="parameter compile='auto': the compiler failed .*no kernel"):
        assert step(1) == 2
    assert step(2) == 3
    assert calls == [1]


def test_an_error_of_the_step_itself_is_passed_on():
    def compiled(x):
        raise ValueError("batch_size")

    with pytest.raises(ValueError, match="batch_size"):
        or_eager(compiled, lambda x: x)(1)
