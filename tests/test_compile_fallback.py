"""What happens where the compiler of a training step fails."""

import types

import pytest
import torch

from dainv.trainers.training import BatchLoss


def test_a_step_that_cannot_be_compiled_is_taken_eagerly():
    calls, loss = [], types.SimpleNamespace(batch="unfinished", probed=None, compute=lambda x: x + 1)

    def compiled(x):
        calls.append(x)
        raise torch._dynamo.exc.BackendCompilerFailed(compiled, ValueError("no kernel"), None)

    step = BatchLoss.or_eager(loss, compiled)
    with pytest.warns(UserWarning, match="not compiled"):
        assert step(1) == 2
    assert step(2) == 3
    assert calls == [1] and loss.batch is None


def test_an_error_of_the_step_itself_is_passed_on():
    def compiled(x):
        raise ValueError("batch_size")

    with pytest.raises(ValueError, match="batch_size"):
        BatchLoss.or_eager(types.SimpleNamespace(), compiled)(1)
