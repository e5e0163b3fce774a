"The training loop: resuming, faults, mistakes in the parameters, the two ways to start it."

import json
import os
import resource
import signal
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import dainv.training as training
from dainv import loop
from dainv.models import build_model
from dainv.runs import Run
from dainv.training import (
    Trainer,
    TrainParams,
    load_model,
    load_run_data,
    predict,
    resolve,
    time_steps,
    top_k_accuracy,
    train,
)


def weights(run):
    return load_file(run.folder / "model.safetensors")


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def command(params, name):
    options = [text for key, value in {**params, "name": name}.items() for text in (f"--{key}", str(value))]
    return [sys.executable, "-m", "dainv", "train", *options]


@pytest.fixture
def undisturbed(tiny):
    subprocess.run(command(tiny, "undisturbed"), check=True, capture_output=True)
    return weights(Run.open("undisturbed"))


def test_the_log_has_every_layer_and_the_diagnostics(tiny):
    run = train(TrainParams(**tiny, name="run"))
    log = run.log
    assert log.epoch.tolist() == [1, 2, 3] and log.step.tolist() == [6, 12, 18]
    layers = [f"{kind}invariance_conv{n}" for kind in ("", "class_") for n in range(1, 10)]
    assert log[layers].gt(0).all(axis=None) and log[layers].lt(2).all(axis=None)
    assert log.pc1_share.between(0, 1).all() and log.effective_rank.ge(1).all()
    assert run.result["metrics"]["test_accuracy"] == pytest.approx(log.test_accuracy.iloc[-1])
    assert run.result["data"]["n_train"] == 96 and run.result["provenance"]["versions"]["torch"]


def test_the_objective_is_what_the_log_says(tiny):
    p, data = resolve(TrainParams(**tiny, alpha=0.3))
    trainer = Trainer(p, data)
    trainer.set_epoch(0)
    values = trainer.step(0, monitor=True)
    expected = 0.7 * values[1] + (values[3:12] * torch.tensor(list(trainer.objective.alphas.values()))).sum()
    assert values[0].item() == pytest.approx(expected.item(), rel=1e-5)


def test_a_finished_run_is_not_trained_again(tiny, monkeypatch, capsys):
    first = train(TrainParams(**tiny, name="run"))
    monkeypatch.setattr(loop, "train_epoch", lambda *_: pytest.fail("trained again"))
    assert train(TrainParams(**tiny, name="run")).folder == first.folder
    assert "finished already" in capsys.readouterr().out


def test_the_same_parameters_give_the_same_name_and_others_another(tiny):
    names = {resolve(TrainParams(**{**tiny, **change}))[0].name for change in ({}, {}, {"seed": 1}, {"lr": 0.06})}
    assert len(names) == 3


@pytest.mark.slow
def test_killed_again_and_again_ends_in_the_same_weights(tiny, undisturbed):
    run, delays = None, [2.2, 2.6, 3.0, 3.4, 3.8, 4.2]
    for delay in delays:
        process = subprocess.Popen(command(tiny, "killed"), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        time.sleep(delay)
        process.send_signal(signal.SIGKILL)
        process.wait()
    subprocess.run(command(tiny, "killed"), check=True, capture_output=True)
    run = Run.open("killed")
    assert same(weights(run), undisturbed)
    assert run.log.epoch.tolist() == [1, 2, 3]


def test_killed_between_checkpoints_and_with_a_truncated_last_one(tiny, undisturbed, monkeypatch):
    real = loop.train_epoch
    monkeypatch.setattr(
        loop, "train_epoch", lambda t, e, b: real(t, e, b) if e < 2 else os.kill(os.getpid(), signal.SIGKILL)
    )
    child = os.fork()
    if child == 0:
        torch.set_num_threads(1)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        train(TrainParams(**tiny, name="aborted"))
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.WTERMSIG(status) == signal.SIGKILL
    folder = Run.open("aborted").folder
    newest = folder / "checkpoint.pt"
    newest.write_bytes(newest.read_bytes()[: newest.stat().st_size // 2])
    done = subprocess.run(command(tiny, "aborted"), check=True, capture_output=True, text=True)
    assert "damaged" in done.stderr
    assert same(weights(Run.open("aborted")), undisturbed)


def test_a_full_disk_stops_cleanly_and_the_run_resumes(tiny, undisturbed):
    def limited():
        resource.setrlimit(resource.RLIMIT_FSIZE, (8_000, 8_000))
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)

    done = subprocess.run(command(tiny, "full"), preexec_fn=limited, capture_output=True, text=True)
    assert done.returncode == 2 and "dainv train: " in done.stderr.splitlines()[-1]
    folder = Run.open("full").folder
    assert {file.name for file in folder.iterdir()} == {"params.json", ".lock"}
    subprocess.run(command(tiny, "full"), check=True, capture_output=True)
    assert same(weights(Run.open("full")), undisturbed)


def test_a_loss_that_is_not_finite_names_epoch_step_and_layer(tiny, monkeypatch):
    real = Trainer.step

    def poisoned(self, number, monitor=None):
        values = real(self, number, monitor)
        if number == 8:
            values[0] = values[6] = torch.nan
        return values

    monkeypatch.setattr(Trainer, "step", poisoned)
    with pytest.raises(
        FloatingPointError, match="layer conv4 is not finite at epoch 2, step 3 .*last good epoch is kept"
    ):
        train(TrainParams(**tiny, name="nan"))
    run = Run.open("nan")
    assert not run.finished and run.load_checkpoint()["epoch"] == 1


def test_a_diverging_run_stops(tiny, monkeypatch):
    monkeypatch.setattr(training, "learning_rate", lambda p, epoch: 1e30)
    with pytest.raises(FloatingPointError, match="not finite .*Lower lr"):
        train(TrainParams(**tiny, name="diverges"))
    assert not Run.open("diverges").finished


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"alpha": -0.1}, "alpha=-0.1: expected 0 <= alpha <= 1"),
        ({"alpha": 1.1}, "alpha=1.1"),
        ({"beta": -0.1}, "beta=-0.1"),
        ({"beta": 0.95}, "beta=0.95: expected 0 <= beta <= 1 - alpha = 0.9"),
        ({"beta_end": 0.2}, "beta_end=0.2"),
        ({"layers": ["conv77"]}, "'conv77' is no measuring point; known: conv1"),
        ({"metric": "cosine"}, "metric='cosine': expected one of msd, per_unit, fisher"),
        ({"metric": "fisher", "reference": "same_class"}, "fisher refers to the whole batch"),
        ({"balanced": True, "batch_size": 512}, "holds 128 images"),
        ({"classes": ["left"]}, "two classes"),
        ({"beta": 0.5, "train_size": 2}, "class 'left' has 1 training image(s), but beta=0.5 compares"),
        ({"alpha": 0.1, "beta_end": 0.1, "train_size": 2}, "has 1 training image(s)"),
        ({"views": 1}, "views=1: expected at least 2 when alpha > 0"),
        ({"views": 3}, "batch_size=16: expected a multiple of views=3"),
        ({"views": 0, "alpha": 0.0}, "views=0"),
        ({"epochs": -1}, "epochs=-1"),
        ({"lr": -1.0}, "lr=-1.0"),
        ({"scheme": "heavyer"}, "scheme='heavyer': expected one of none, light"),
        ({"model": "alexnet"}, "model='alexnet': expected one of allcnn"),
        ({"dataset": "cifar11"}, "cifar11"),
        ({"data_root": "nowhere"}, "nowhere"),
        ({"profile": "fast"}, "profile='fast'"),
        ({"weights": "cubic"}, "cubic"),
        ({"pairs": "some"}, "some"),
        ({"device": "tpu"}, "device='tpu'"),
        ({"precision": "bf16"}, "precision='bf16': expected one of auto"),
        ({"lr": float("inf")}, "lr=inf"),
        ({"batch_norm": "no"}, "batch_norm='no': expected True, False or inference"),
        ({"init": "xavier"}, "init='xavier': expected one of glorot, he"),
        ({"init_gain": 0.0}, "init_gain=0.0"),
        ({"padding": "mirror"}, "padding='mirror': expected one of zeros, replicate"),
        ({"model": "wrn", "padding": "reflect"}, "padding='reflect': expected 'zeros': wrn is built one way only"),
        ({"model": "wrn", "batch_norm": False}, "batch_norm=False: expected True: wrn is built one way only"),
        ({"model": "densenet", "init": "he"}, "init='he': expected ''"),
        ({"lr_decay": -0.5}, "lr_decay=-0.5"),
        ({"weight_decay": -1e-4}, "weight_decay=-0.0001: expected 0 to 1"),
        ({"batch_size": 4096}, "lower batch_size"),
        ({"train_size": 1000}, "train_size"),
    ],
)
def test_a_wrong_parameter_is_named_before_anything_is_trained(tiny, change, message):
    with pytest.raises((ValueError, FileNotFoundError)) as error:
        train(TrainParams(**{**tiny, **change}, name="wrong"))
    assert message in str(error.value)


def test_weight_decay_pulls_the_network_and_not_the_probe(tiny):
    asked = {**tiny, "alpha": 0.1, "beta": 0.9}
    p, data = resolve(TrainParams(**asked))
    after = {}
    for decay in (0.0, 0.01):
        trainer = Trainer(replace(p, weight_decay=decay), data)
        initial = {n: w.detach().clone() for n, w in trainer.bare_model.named_parameters()}
        trainer.step(0)
        after[decay] = (
            {n: w.detach().clone() for n, w in trainer.bare_model.named_parameters()},
            trainer.probe.state_dict(),
        )
    (free, probe), (pulled, probe_pulled) = after[0.0], after[0.01]
    in_play = [name for name in initial if not name.startswith("conv9")]  # no loss reaches the class layer
    for name in in_play:  # Nesterov's first step is 1 + momentum times the gradient, of which decay * weight is a part
        pull = p.lr * (1 + p.momentum) * 0.01 * initial[name]
        torch.testing.assert_close(free[name] - pulled[name], pull, rtol=1e-3, atol=1e-6)
    assert len(in_play) >= 8
    assert all(torch.equal(probe[name], probe_pulled[name]) for name in probe)


def test_images_of_the_wrong_size_are_refused(tiny):
    p, data = resolve(TrainParams(**tiny))
    trainer = Trainer(p, data)
    with pytest.raises(ValueError, match=r"\(N, 3, 32, 32\)"):
        predict(trainer.model, torch.zeros(2, 3, 28, 28, dtype=torch.uint8))


def test_the_baseline_is_measured_without_changing_its_training(tiny):
    p, data = resolve(TrainParams(**{**tiny, "alpha": 0.0}))
    finals = []
    for monitor in (True, False):
        trainer = Trainer(p, data)
        trainer.set_epoch(0)
        values = torch.stack([trainer.step(n, monitor=monitor) for n in range(3)])
        assert (values[:, 3:] >= 0).all() if monitor else (values[:, 3:] == -1).all()
        finals.append(trainer.bare_model.state_dict())
    assert same(*finals)


PURE = {"alpha": 0.1, "beta": 0.9}
FISHER = {**PURE, "metric": "fisher", "pool": True, "layers": ["conv9"], "linear_top": True}
CHANGES = [{}, {"alpha": 0.0}, {"alpha": 0.0, "views": 1}, PURE, FISHER, {**PURE, "beta": 0.0, "beta_end": 0.1}]


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("change", CHANGES)
def test_the_whole_step_is_one_graph(tiny, change, precision):
    p, data = resolve(TrainParams(**{**tiny, **change, "precision": precision}))
    trainer = Trainer(p, data)
    trainer.set_epoch(0)
    batch = trainer.sampler[0]
    index = (batch.images, batch.views, batch.groups, batch.passes)
    explained = torch._dynamo.explain(trainer.batch_loss.compute)(*index, True, trainer.progress(0))
    assert (explained.graph_count, explained.graph_break_count) == (1, 0), explained.break_reasons


@pytest.mark.slow
@pytest.mark.parametrize("change", [*CHANGES[:3], FISHER])
def test_the_whole_step_compiles_and_agrees_with_eager(tiny, change, monkeypatch):
    torch._dynamo.reset()  # every case is a recompilation of the same function, and their number is limited

    def compiled(batch_loss, gpu):
        whole = torch.compile(batch_loss.compute, backend="aot_eager", fullgraph=True)
        return whole if batch_loss.p.compile == "on" else batch_loss.compute

    monkeypatch.setattr(training.BatchLoss, "compiled", compiled)
    p, data = resolve(TrainParams(**{**tiny, **change}))
    eager, compiled = Trainer(p, data), Trainer(replace(p, compile="on"), data)
    for trainer in (eager, compiled):
        trainer.set_epoch(0)
    for number in range(2):
        torch.testing.assert_close(eager.step(number), compiled.step(number), rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("change", [PURE, FISHER, {"alpha": 0.0, "beta": 1.0, "views": 1, "balanced": True}])
def test_without_cross_entropy_a_probe_learns_and_the_network_does_not_notice(tiny, change):
    p, data = resolve(TrainParams(**{**tiny, **change}))
    trainer, lonely = Trainer(p, data), Trainer(p, data)
    lonely.probe = lonely.batch_loss.probe = None
    lonely.columns = lonely.columns[:-1]
    lonely.optimizer.param_groups.pop()
    for each in (trainer, lonely):
        each.set_epoch(0)
        values = [each.step(number) for number in range(4)]
        assert len(values[0]) == len(each.columns)
    assert same(trainer.bare_model.state_dict(), lonely.bare_model.state_dict())
    assert trainer.probe.linear.weight.abs().sum() > 0 and trainer.columns[-1] == "probe_right"


def test_the_head_of_a_pure_run_gets_no_gradient_from_the_objective(tiny):
    p, data = resolve(TrainParams(**{**tiny, **PURE}))
    trainer = Trainer(p, data)
    before = {name: value.clone() for name, value in trainer.bare_model.named_parameters()}
    trainer.set_epoch(0)
    trainer.step(0)
    moved = {n.split(".")[0] for n, v in trainer.bare_model.named_parameters() if not torch.equal(v, before[n])}
    assert moved == {f"conv{n}" for n in range(1, 9)}


@pytest.mark.parametrize(
    "change",
    [
        FISHER,
        {**FISHER, "metric": "running_fisher"},
        {**FISHER, "metric": "running_lda"},
        {**PURE, "beta": 0.0, "beta_end": 0.1},
    ],
)
def test_a_pure_run_resumes_bit_for_bit_its_probe_included(tiny, change, monkeypatch):
    whole = train(TrainParams(**{**tiny, **change}, name="whole"))
    real = loop.train_epoch
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(loop, "train_epoch", lambda t, e, b: real(t, e, b) if e < 2 else 1 / 0)
        train(TrainParams(**{**tiny, **change}, name="halves"))
    halves = train(TrainParams(**{**tiny, **change}, name="halves"))
    assert same(weights(whole), weights(halves))
    timed = ["seconds", "images_per_second"]
    assert whole.log.drop(columns=timed).equals(halves.log.drop(columns=timed))
    assert ("probe_accuracy" in whole.log) == ("metric" in change)


def test_a_nan_feature_names_its_layer_in_any_metric(tiny):
    p, data = resolve(TrainParams(**{**tiny, **FISHER}, name="nan"))
    trainer = Trainer(p, data)
    trainer.bare_model.conv9.weight.data[0] = torch.nan
    trainer.set_epoch(0)
    with pytest.raises(FloatingPointError, match="invariance loss of layer conv9 is not finite"):
        loop.check_finite(trainer, torch.stack([trainer.step(0)]), 0)


def test_a_run_gives_back_its_network_and_its_data(tiny, folders):
    run = train(TrainParams(**tiny, name="run"))
    data = load_run_data(run)
    probabilities = predict(load_model(run), data.test.images)
    accuracy = (probabilities.argmax(1) == data.test.labels).float().mean().item()
    assert accuracy == pytest.approx(run.result["metrics"]["test_accuracy"])
    next((folders / "data" / "blobs" / "train" / "left").iterdir()).unlink()
    with pytest.raises(ValueError, match="data have changed"):
        load_run_data(run)


@pytest.mark.parametrize(
    "reading", [dict(batch_norm=False, init="he"), dict(batch_norm="inference", init_gain=1.2, padding="replicate")]
)
def test_a_run_gives_back_its_network_in_its_own_reading(tiny, reading):
    run = train(TrainParams(**{**tiny, **reading, "epochs": 1}, name="reading"))
    model, state = load_model(run), weights(run)
    assert same(model.state_dict(), state)
    assert any("norm" in name for name in state) == (reading["batch_norm"] != False)  # noqa: E712


def test_a_run_older_than_the_readings_is_still_that_run(tiny, capsys):
    p = TrainParams(**tiny, name="old")
    run = train(p)
    older = {k: v for k, v in run.params.items() if k not in ("batch_norm", "init", "init_gain", "padding")}
    result = {k: v for k, v in run.result.items() if k != "digests"}
    for file, content in {"params.json": older, "result.json": result}.items():
        (run.folder / file).write_text(json.dumps(content))  # as they were written before they had digests
    assert same(load_model(run).state_dict(), weights(run)) and len(load_run_data(run).test.images) == 32
    train(p)
    assert "finished already" in capsys.readouterr().out
    with pytest.raises(ValueError, match="batch_norm was True, now False"):
        train(TrainParams(**{**tiny, "batch_norm": False}, name="old"))


def on_a_processor(monkeypatch, fast):
    "Whether it multiplies bfloat16 in hardware, as far as the package knows."
    monkeypatch.setattr("dainv.precision.fast_bf16", lambda device: fast)


@pytest.mark.parametrize("begun_fast", [True, False])
def test_a_run_goes_on_in_the_precision_that_it_was_begun_in(tiny, monkeypatch, begun_fast):
    on_a_processor(monkeypatch, begun_fast)
    begun = "bf16-mixed" if begun_fast else "32-true"
    undisturbed = train(TrainParams(**tiny, name="undisturbed"))
    assert undisturbed.result["precision"] == begun and undisturbed.params["precision"] == "auto"

    def stopped(trainer, epoch, bar, whole=loop.train_epoch):
        if epoch == 2:
            raise InterruptedError
        return whole(trainer, epoch, bar)

    with monkeypatch.context() as patched, pytest.raises(InterruptedError):
        patched.setattr(loop, "train_epoch", stopped)
        train(TrainParams(**tiny, name="moved"))
    on_a_processor(monkeypatch, not begun_fast)
    with pytest.warns(UserWarning, match=f"'moved' was begun in {begun} and goes on in it"):
        moved = train(TrainParams(**tiny, name="moved"))
    assert moved.result["precision"] == begun and same(weights(moved), weights(undisturbed))
    elsewhere = train(TrainParams(**tiny, name="elsewhere"))
    assert elsewhere.result["precision"] != begun and not same(weights(elsewhere), weights(undisturbed))


def test_a_checkpoint_that_does_not_say_its_precision_is_of_32_bits(tiny, monkeypatch):
    on_a_processor(monkeypatch, False)
    reference = train(TrainParams(**tiny, name="reference"))
    checkpoint = reference.load_checkpoint()
    run = Run.open("older", {**reference.params, "name": "older"})
    run.save_checkpoint({k: v for k, v in checkpoint.items() if k != "precision"})
    on_a_processor(monkeypatch, True)
    with pytest.warns(UserWarning, match="begun in 32-true"):
        assert train(TrainParams(**tiny, name="older")).result["precision"] == "32-true"


def test_predictions_are_made_in_the_precision_that_is_asked_for(tiny, monkeypatch):
    on_a_processor(monkeypatch, True)
    run = train(TrainParams(**{**tiny, "precision": "32-true"}, name="single"))
    model, images = load_model(run), load_run_data(run).test.images
    exact, rounded, auto = (predict(model, images, precision=kind) for kind in ("32-true", "bf16-mixed", "auto"))
    assert torch.equal(auto, rounded) and not torch.equal(exact, rounded)
    torch.testing.assert_close(rounded, exact, atol=0.02, rtol=0)
    accuracy = (exact.argmax(1) == load_run_data(run).test.labels).float().mean().item()
    assert run.result["metrics"]["test_accuracy"] == pytest.approx(accuracy)
    losses = -exact.gather(1, load_run_data(run).test.labels[:, None]).log().mean()
    assert run.result["metrics"]["test_cross_entropy"] == pytest.approx(losses.item(), abs=1e-6)


def test_steps_are_timed_in_turn(tiny):
    p, data = resolve(TrainParams(**tiny))
    table = time_steps(p, data, [{"views": 1, "alpha": 0.0}, {"alpha": 0.1}], repeats=3)
    assert table.variant.tolist() == ["M=1, alpha=0", "M=4, alpha=0.1"] * 3 and (table.seconds > 0).all()


def test_the_command_line_helps_and_refuses(tiny):
    shown = subprocess.run([sys.executable, "-m", "dainv", "train", "--help"], capture_output=True, text=True)
    assert shown.returncode == 0 and "--alpha X" in shown.stdout and "(default: 0.1)" in shown.stdout
    refused = subprocess.run(command({**tiny, "alhpa": 0.1}, "x"), capture_output=True, text=True)
    assert refused.returncode == 2 and "did you mean --alpha?" in refused.stderr


def photographs(root, height, width, n=8):
    "A folder of noise, two classes."
    from PIL import Image

    rng = np.random.default_rng(0)
    for half in ("train", "test"):
        for name in "ab":
            (folder := root / half / name).mkdir(parents=True)
            for i in range(n):
                Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(folder / f"{i}.png")
    return root


def test_images_that_are_not_square_need_a_size(tmp_path, monkeypatch):
    monkeypatch.setenv("DAINV_DATA", str(tmp_path / "data"))
    asked = dict(dataset="folder", data_root=str(photographs(tmp_path / "set", 12, 16)), batch_size=4, views=2)
    with pytest.raises(ValueError, match=r"parameter size=0: the images are 16x12 pixels.*size=12"):
        resolve(TrainParams(**asked))
    p, data = resolve(TrainParams(**asked, size=10))
    assert p.size == 10 and data.train.images.shape == (16, 3, 10, 10)
    with pytest.raises(ValueError, match=r"parameter size=12: the images are 10x10 pixels"):
        resolve(TrainParams(**asked, size=12), loaded=data)


def test_predict_checks_its_images():
    network, x = build_model("allcnn", 3, 0.05, in_size=16), torch.rand(4, 3, 16, 16)
    assert torch.equal(predict(network, x.numpy()), predict(network, x))
    for wrong, said in ((x * 255, "divide by 255"), (x - 0.5, "preprocess="), (x[0], r"images\[None\]")):
        with pytest.raises(ValueError, match=said):
            predict(network, wrong)
    with pytest.raises(ValueError, match="views=0"):
        predict(network, x, views=0)
    answers = torch.tensor([[0.1, 0.7, 0.2], [0.5, 0.2, 0.3]])
    assert top_k_accuracy(answers.numpy(), [1, 2]) == 0.5
    with pytest.raises(ValueError, match=r"labels run from 1 to 3: expected 0\.\.2"):
        top_k_accuracy(answers, [1, 3])
