"Runs that go on from another run or from a file of weights."

import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file

from dainv.models import build_model
from dainv.runs import Run
from dainv.training import Trainer, TrainParams, load_model, resolve, train
from dainv.weights import weights_digest


def weights(run):
    return load_file(run.folder / "model.safetensors")


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_two_halves_make_a_whole(tiny, folders):
    whole = train(TrainParams(**{**tiny, "epochs": 4, "lr_decay": 0.1, "milestones": [0.5]}, name="whole"))
    half = {**tiny, "epochs": 2, "lr_decay": 1.0}
    first = train(TrainParams(**half, name="first"))
    second = train(TrainParams(**{**half, "lr": tiny["lr"] * 0.1, "start": "first"}, name="second"))
    assert same(weights(second), weights(whole))
    assert second.log["step"].tolist() == whole.log["step"].tolist()[2:]
    assert second.result["start"] == dict(name="first", digest=weights_digest(weights(first)))


def test_a_new_objective_on_other_batches(tiny, folders):
    first = train(TrainParams(**{**tiny, "alpha": 0.0, "epochs": 1}, name="first"))
    asked = {**tiny, "alpha": 0.1, "beta": 0.9, "views": 2, "start": "first", "epochs": 1}
    p, data = resolve(TrainParams(**asked, name="second"))
    trainer = Trainer(p, data)
    assert same(trainer.bare_model.state_dict(), weights(first)) and trainer.first_step == 0
    assert trainer.optimizer.state_dict()["state"], "the momentum goes on"
    run = train(TrainParams(**asked, name="second"))
    assert "probe_accuracy" in run.log and not same(weights(run), weights(first))


def test_a_started_run_resumes_bit_for_bit(tiny, folders, monkeypatch):
    from dainv import loop

    train(TrainParams(**{**tiny, "epochs": 1}, name="first"))
    asked = {**tiny, "start": "first"}
    undisturbed = train(TrainParams(**asked, name="undisturbed"))

    def stopped(trainer, epoch, bar, whole=loop.train_epoch):
        if epoch == 1:
            raise InterruptedError
        return whole(trainer, epoch, bar)

    with monkeypatch.context() as patched, pytest.raises(InterruptedError):
        patched.setattr(loop, "train_epoch", stopped)
        train(TrainParams(**asked, name="stopped"))
    assert same(weights(train(TrainParams(**asked, name="stopped"))), weights(undisturbed))


@pytest.mark.parametrize("batch_norm", [True, False])
def test_weights_of_a_file(tiny, folders, batch_norm):
    torch.manual_seed(9)
    theirs = build_model("allcnn", 2, width=0.05, batch_norm=batch_norm)
    torch.save({"state_dict": {f"module.{k}": v for k, v in theirs.state_dict().items()}}, folders / "data" / "w.pth")
    asked = {**tiny, "start": "w.pth", "epochs": 1, "lr": 1e-12, "batch_norm": batch_norm}
    run = train(TrainParams(**asked, name="theirs"))
    for name, value in load_model(run).named_parameters():
        torch.testing.assert_close(value, theirs.get_parameter(name))
    assert run.result["start"] == dict(name="w.pth", digest=weights_digest(theirs.state_dict()))
    theirs.conv1.conv.bias.data.add_(1)
    torch.save(theirs.state_dict(), folders / "data" / "w.pth")
    (run.folder / "result.json").unlink()
    with pytest.raises(ValueError, match=r"start='w.pth': its weights have changed since this run was begun"):
        train(TrainParams(**asked, name="theirs"))


@pytest.fixture
def others(tiny, folders):
    "Runs and files that do not fit."
    train(TrainParams(**{**tiny, "epochs": 1}, name="narrow"))
    train(TrainParams(**{**tiny, "epochs": 1, "batch_norm": False}, name="bare"))
    Run.open("unfinished", {"model": "allcnn"})
    data = folders / "data"
    save_file(build_model("allcnn", 10, width=0.05).state_dict(), data / "ten.safetensors")
    (data / "cut.safetensors").write_bytes((data / "ten.safetensors").read_bytes()[:5000])
    torch.save(build_model("allcnn", 2, width=0.05), data / "module.pt")
    (data / "module.pkl").write_bytes((data / "module.pt").read_bytes())
    torch.save({"epoch": 3}, data / "none.pt")
    return tiny


MISTAKES = [
    ({"start": "narrow", "width": 0.1}, "start='narrow': it has width=0.05, and this run width=0.1"),
    ({"start": "narrow", "model": "resnet20"}, "it has model='allcnn', and this run model='resnet20'"),
    ({"start": "narrow", "linear_top": True}, "it has linear_top=False, and this run linear_top=True"),
    ({"start": "bare"}, "conv1.norm.weight"),
    ({"start": "nowhere"}, "start='nowhere': no run 'nowhere'"),
    ({"start": "unfinished"}, "start='unfinished': run 'unfinished' has not finished"),
    ({"start": "nowhere.pth"}, "nowhere.pth: there is no such file"),
    ({"start": "ten.safetensors"}, "conv9.conv.bias has the shape (10,), expected (2,)"),
    ({"start": "cut.safetensors"}, "cut.safetensors: it is truncated, damaged or of another format"),
    ({"start": "module.pt"}, "module.pt: it holds more than tensors (dainv.networks.models.AllCNN)"),
    ({"start": "module.pkl"}, "module.pkl: it holds more than tensors (dainv.networks.models.AllCNN)"),
    ({"start": "none.pt"}, "none.pt: it holds the keys epoch and no weights"),
]


def test_a_start_that_does_not_fit_is_named_and_nothing_is_written(others, folders):
    for change, message in MISTAKES:
        with pytest.raises((ValueError, FileNotFoundError)) as error, warnings.catch_warnings():
            warnings.simplefilter("error")
            train(TrainParams(**{**others, **change}, name="wrong"))
        told = str(error.value)
        assert message in told and told.startswith(f"parameter start={change['start']!r}: "), told
        assert "\n" not in told and not (folders / "runs" / "wrong").exists(), told
