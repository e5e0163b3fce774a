"The loop, with the smallest thing that can be trained: when it writes, what it says, how it goes on."

import math

import pytest
import torch
from line_trainer import Line

from dainv import loop
from dainv.loop import fit, make_fabric
from dainv.runs import Run


def test_a_run_is_trained_once(folders):
    built = []

    def build():
        built.append(Line())
        return built[-1]

    run = fit(Run.open("line", {}), build, seed=3)
    assert run.finished and run.result["metrics"]["missing"] is None, "NaN is null in JSON"
    assert run.log.epoch.tolist() == [1, 2, 3, 4] and run.result["seconds"] > 0
    assert fit(Run.open("line", {}), build, seed=3).folder == run.folder and len(built) == 1


def test_the_generator_is_left_as_it_was(folders):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    fit(Run.open("line", {}), Line, seed=0)
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("after", [1, 2, 3])
def test_an_interrupted_run_ends_as_if_nothing_had_happened(folders, monkeypatch, after):
    whole = fit(Run.open("whole", {}), Line, seed=0)
    real = loop.train_epoch
    monkeypatch.setattr(loop, "train_epoch", lambda t, e, b: real(t, e, b) if e < after else 1 / 0)
    with pytest.raises(ZeroDivisionError):
        fit(Run.open("broken", {}), Line, seed=0)
    monkeypatch.setattr(loop, "train_epoch", real)
    assert not Run.open("broken").finished and len(Run.open("broken").log) == after
    again = fit(Run.open("broken", {}), Line, seed=0)
    assert again.log.loss.tolist() == whole.log.loss.tolist()
    assert (again.folder / "model.safetensors").read_bytes() == (whole.folder / "model.safetensors").read_bytes()


def test_weights_that_are_not_finite_stop_the_run(folders):
    def poisoned():
        line = Line()
        line.poison = 9  # the last step of the second epoch
        return line

    with pytest.raises(FloatingPointError, match="weights of layer weight are not finite after epoch 2, step 5"):
        fit(Run.open("line", {}), poisoned, seed=0)
    assert len(Run.open("line").log) == 1 and not Run.open("line").finished


def test_the_first_loss_that_is_not_finite_is_named():
    line, values = Line(), torch.ones(3, 3)
    assert loop.first_bad(values, line.columns) is None
    values[2] = math.inf
    values[1, 1] = math.nan
    assert loop.first_bad(values, line.columns) == (1, ["contrast"])
    with pytest.raises(FloatingPointError, match="the contrast is not finite at epoch 1, step 2 .* Lower lr=0.1"):
        loop.check_finite(line, values, 0)


@pytest.mark.parametrize("device", ["gpu", "CUDA", "cuda:0", ""])
def test_an_unknown_device_is_named(device):
    with pytest.raises(ValueError, match=f"parameter device='{device}': expected auto, cpu or cuda"):
        make_fabric(device)


@pytest.mark.parametrize(
    ("world", "devices", "message"),
    [("1", 2, "start it with torchrun --nproc_per_node 2"), ("2", 1, "ask for devices=2")],
)
def test_processes_that_are_asked_for_must_have_been_started(monkeypatch, world, devices, message):
    monkeypatch.setenv("WORLD_SIZE", world)
    with pytest.raises(ValueError, match=message):
        make_fabric("cpu", devices=devices)
    with pytest.raises(ValueError, match="no GPU is available" if not torch.cuda.is_available() else message):
        make_fabric("cuda", devices=devices)
