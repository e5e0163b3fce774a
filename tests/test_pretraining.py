"Contrastive training: what a run asks for, several processes, resume, pairs of runs, and what costs nothing."

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import dainv.pretraining as pretraining
from dainv import loop
from dainv.pretraining import (
    ContrastiveTrainer,
    PretrainParams,
    evaluate_online,
    learning_rate,
    load_encoder,
    load_head,
    load_views,
    pretrain,
    resolve,
)
from dainv.runs import Run

TESTS = Path(__file__).parent


@pytest.fixture
def tiny(folders):
    "Parameters of a run that lasts a second."
    torch.set_num_threads(1)
    sizes = dict(train_size=96, test_size=40, batch_size=32, epochs=3, measure_items=20)
    return dict(dataset="spirograph", profile="quick", width=0.25, device="cpu", **sizes)


GRADIENT = dict(penalty="gradient", penalty_weight=1e-3)


def steps(p, views, n=3):
    trainer = ContrastiveTrainer(p, views)
    trainer.set_epoch(0)
    return trainer, torch.stack([trainer.step(number) for number in range(n)])


def weights(run):
    return load_file(run.folder / "model.safetensors")


def same(first, second):
    return all(torch.equal(first[name], second[name]) for name in first) and first.keys() == second.keys()


@pytest.mark.parametrize("penalty", ["gradient", "twin", "forward"])
def test_a_weight_of_zero_costs_nothing_and_changes_nothing(tiny, penalty, monkeypatch):
    p, views = resolve(PretrainParams(**tiny, penalty=penalty))
    _, priced = steps(replace(p, penalty_weight=1e-3), views, 1)
    monkeypatch.setattr(pretraining, "transformation_penalty", lambda *_, **__: pytest.fail("computed"))
    traced = []
    images = type(views).images
    monkeypatch.setattr(
        type(views), "images", lambda *a: traced.append(a[3].alpha.requires_grad) or images(*a), raising=True
    )
    _, plain = steps(p, views, 2)
    same_views = pytest.approx(priced[0, 1].item(), rel=1e-5 if penalty == "forward" else 0)
    assert plain[0, 1] == same_views, "the first step sees the same views with the same weights"
    assert not any(traced) and len(traced) == 4
    assert (plain[:, 3] == -1).all() and torch.equal(plain[:, 0], plain[:, 1])


def test_the_weight_rises_along_its_ramp(tiny):
    p, views = resolve(PretrainParams(**tiny, penalty="twin", penalty_weight=2.0, penalty_ramp=0.5))
    trainer, logged = steps(p, views, 3)
    total = trainer.epochs * trainer.steps_per_epoch
    assert [trainer.weight_at(n) for n in (0, 1, total - 1)] == [0, 2 * 1 / (total / 2), 2]
    assert logged[0, 3] == -1, "at a weight of 0 nothing is computed"
    assert torch.allclose(logged[1:, 0], logged[1:, 1] + torch.tensor([4 / 9, 8 / 9]) * logged[1:, 3])


def test_the_published_schedule(tiny):
    p = pretraining._with_profile(PretrainParams(profile="paper"))
    assert p.lr == 3.0 and p.optimizer == "lars" and p.encoder == "resnet18" and p.epochs == 50
    found = [round(learning_rate(p, epoch), 3) for epoch in (0, 1, 4, 8, 9, 10, 25, 49)]
    assert found == pytest.approx([0.3, 0.6, 1.5, 2.7, 2.767, 2.714, 1.5, 0.003], abs=1e-3)
    assert learning_rate(replace(p, schedule="constant"), 40) == 3.0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(penalty_weight=-0.1), "parameter penalty_weight=-0.1: expected lambda"),
        (dict(penalty_weight=float("nan")), "penalty_weight=nan"),
        (dict(penalty="ridge"), "parameter penalty='ridge': expected one of gradient, twin, forward"),
        (dict(penalty_limit=-1.0), "penalty_limit"),
        (dict(batch_size=1), "at least two items"),
        (dict(batch_size=128), "only 96 training items"),
        (dict(encoder="vgg"), "one of resnet18, resnet50, small"),
        (dict(dataset="cifar11"), "cifar11"),
        (dict(b_bounds=[0.5]), "two numbers"),
        (dict(b_bounds=[1.1, 0.5]), "b_bounds=[1.1, 0.5]: expected two numbers, lowest and highest"),
        (dict(normalise="column"), "normalise"),
        (dict(temperature=-0.5), "temperature"),
        (dict(optimizer="rmsprop"), "one of lars, sgd, adam"),
        (dict(devices=2), "torchrun --nproc_per_node 2"),
        (dict(start="nowhere"), "no run 'nowhere'"),
        (dict(test_size=1), "parameter test_size=1: expected 0, or 2 to"),
        (dict(precision="64-true"), "precision='64-true': expected one of auto, 32-true, bf16-mixed"),
        (dict(b_bounds=[-0.5, 1.1]), "above 0"),
        (dict(profile="fast"), "expected auto, quick or paper"),
    ],
)
def test_a_wrong_parameter_is_named_before_a_folder_is_made(tiny, folders, change, message):
    with pytest.raises((ValueError, FileNotFoundError)) as error:
        pretrain(PretrainParams(**{**tiny, **change}, name="wrong"))
    assert message in str(error.value)
    assert not list((folders / "runs").iterdir())


def command(asked, name):
    options = [text for key, value in asked.items() for text in (f"--{key}", str(value))]
    return [sys.executable, "-m", "dainv", "pretrain", *options, "--name", name]


@pytest.mark.slow
def test_a_killed_run_ends_in_the_same_weights(tiny):
    asked = {**tiny, **GRADIENT, "epochs": 30}
    undisturbed = pretrain(PretrainParams(**asked, name="undisturbed"))
    process = subprocess.Popen(command(asked, "killed"), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    log = Run(undisturbed.folder.parent / "killed").folder / "log.csv"
    while not log.exists() and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    killed = Run.open("killed")
    assert not killed.finished and 1 <= len(killed.log) < 30
    subprocess.run(command(asked, "killed"), check=True, capture_output=True)
    assert same(weights(killed), weights(undisturbed))
    columns = ["loss", "penalty", "variance_ratio", "target_error"]
    assert killed.log[columns].equals(undisturbed.log[columns])


def test_runs_from_the_same_start_are_paired(tiny, monkeypatch):
    base = pretrain(PretrainParams(**tiny, name="base"))
    seen, draw = {}, pretraining.SpirographViews.draw

    def watched(self, half, ids, passes, views, seed):
        if half == "train" and seed == 0:
            seen.setdefault(name, []).append((ids.tolist(), passes.tolist(), views))
        return draw(self, half, ids, passes, views, seed)

    monkeypatch.setattr(pretraining.SpirographViews, "draw", watched)
    for name, change in dict(plain={}, gradient=GRADIENT, twin=dict(penalty="twin", penalty_weight=1.0)).items():
        run = pretrain(PretrainParams(**{**tiny, **change}, name=name, start="base"))
        assert run.log.step.tolist() == [12, 15, 18], "steps are counted from the beginning of the first run"
    assert seen["plain"] == seen["gradient"] == seen["twin"]
    assert max(max(passes) for _, passes, _ in seen["plain"]) > 2, "the order of the items goes on"
    assert not same(weights(Run.open("plain")), weights(Run.open("gradient")))
    changed = dict(tiny, start="base", name="other")
    with pytest.raises(ValueError, match="was trained on other data"):
        pretrain(PretrainParams(**{**changed, "train_size": 128}))
    with pytest.raises(ValueError, match="normalise='image', and this run normalise='row'"):
        pretrain(PretrainParams(**changed, normalise="row"))
    (base.folder / "checkpoint.pt").unlink()
    (base.folder / "checkpoint.previous.pt").unlink()
    with pytest.warns(UserWarning, match="only its weights"):
        pretrain(PretrainParams(**changed))


@pytest.mark.parametrize("penalty", ["none", "gradient", "twin", "forward"])
def test_half_precision_trains_like_the_full_one(tiny, penalty):
    priced = dict(penalty=penalty, penalty_weight=1e-2) if penalty != "none" else {}
    p, views = resolve(PretrainParams(**tiny, **priced))
    (_, full), (_, half) = (steps(replace(p, precision=name), views, 2) for name in ("32-true", "bf16-mixed"))
    assert half[0, 1] == pytest.approx(full[0, 1].item(), rel=0.02) and half.isfinite().all()
    assert half[0, 3] == pytest.approx(full[0, 3].item(), rel=0.2)


def test_a_continued_run_keeps_its_own_options(tiny):
    sgd = {**tiny, "optimizer": "sgd", "lr": 0.05}
    pretrain(PretrainParams(**sgd, name="base", momentum=0.9))
    p, views = resolve(PretrainParams(**sgd, start="base", momentum=0.5, weight_decay=0.1))
    group = ContrastiveTrainer(p, views).optimizer.param_groups[0]
    assert (group["momentum"], group["weight_decay"]) == (0.5, 0.1)
    for change, named in ((dict(seed=1), "seed=0"), (dict(batch_size=16), "batch_size=32")):
        with pytest.raises(ValueError, match=named):
            pretrain(PretrainParams(**{**sgd, **change}, start="base", name="other"))


def test_running_statistics_leave_each_view_its_own_crop(blobs):
    torch.set_num_threads(1)
    asked = dict(dataset="folder", data_root=blobs, batch_size=16, width=0.25, device="cpu")
    asked |= dict(penalty="twin", penalty_weight=1.0, penalty_statistics="running")
    p, views = resolve(PretrainParams(**asked))
    trainer = ContrastiveTrainer(p, views)
    batch, module = trainer.sampler[0], trainer.bare_model
    logged = module(views, trainer.part, batch.images, batch.passes, 0, 1.0)[1]
    encoder = module.encoder.eval()
    pair = [
        views.images("train", batch.images, views.draw("train", batch.images, batch.passes, v, p.seed)) for v in (0, 1)
    ]
    first, second = (torch.nn.functional.normalize(encoder(x), dim=1) for x in pair)
    assert logged[3].item() == pytest.approx((first - second).square().sum(1).mean().item(), rel=1e-3)


def test_a_diverging_run_says_what_diverged(tiny, monkeypatch):
    p, views = resolve(PretrainParams(**{**tiny, **GRADIENT}, name="diverging"))
    trainer, logged = steps(p, views, 2)
    logged[1, [0, 3]] = float("inf")
    with pytest.raises(FloatingPointError, match="penalty on transformations is not finite at epoch 1, step 2"):
        loop.check_finite(trainer, logged, 0)


def test_the_finished_run_gives_back_what_it_was_trained_on(tiny):
    run = pretrain(PretrainParams(**tiny, **GRADIENT, name="whole"))
    views, encoder, head = load_views(run), load_encoder(run), load_head(run)
    assert views.fingerprint == run.result["data"]["fingerprint"]
    assert evaluate_online(encoder, views, 20)["target_error"] == pytest.approx(run.log.target_error.iloc[-1], rel=1e-6)
    assert head(torch.zeros(2, encoder.n_features)).shape == (2, 128)
    row = run.log.iloc[-1]
    assert row.variance_ratio == pytest.approx(row.conditional_variance / row.total_variance)
    errors = row[["error_m", "error_b", "error_sigma", "error_rfore"]]
    assert row.target_error == pytest.approx(errors.mean())
    assert pretrain(PretrainParams(**tiny, **GRADIENT, name="whole")).folder == run.folder


def test_measurements_at_some_epochs_only(tiny):
    log = pretrain(PretrainParams(**tiny, name="rarely", measure_every=2)).log
    assert log.target_error.notna().tolist() == [False, True, True]


def test_photographs_are_classified(blobs):
    torch.set_num_threads(1)
    asked = dict(dataset="folder", data_root=blobs, batch_size=16, epochs=2, width=0.25, device="cpu", measure_items=20)
    run = pretrain(PretrainParams(**asked, **GRADIENT, name="photographs"))
    assert run.params["penalty_limit"] == 1.0 and run.result["data"]["task"] == "classification"
    assert run.log.target_accuracy.between(0, 1).all() and run.log.variance_ratio.between(0, 1.2).all()
    assert run.log.penalty.gt(0).all() and load_views(run).names == ("brightness", "contrast", "saturation", "hue")


@pytest.mark.slow
def test_two_processes_take_the_steps_of_one(tmp_path):
    found = []
    for processes in (1, 2):
        output = tmp_path / f"{processes}.pt"
        launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"] if processes > 1 else []
        worker = [sys.executable, *launch, str(TESTS / "contrastive_worker.py"), str(output)]
        done = subprocess.run(worker, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
        assert done.returncode == 0, done.stderr[-3000:]
        found.append(torch.load(output))
    for penalty, one in found[0].items():
        two = found[1][penalty]
        assert torch.allclose(one["logged"], two["logged"], atol=1e-5), penalty
        for name, value in one["weights"].items():
            assert torch.allclose(value, two["weights"][name], atol=1e-6), (penalty, name)


@pytest.mark.slow
def test_a_run_of_two_processes_finishes_and_is_found_finished(tiny):
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    asked = {**tiny, "penalty": "twin", "penalty_weight": 1.0, "devices": 2, "epochs": 2}
    both = [*launch, *command(asked, "pair")[1:]]
    for _ in range(2):
        done = subprocess.run(both, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
    assert "finished already" in done.stdout
    run = Run.open("pair")
    assert run.log.epoch.tolist() == [1, 2] and run.log.target_error.notna().all()
    assert load_encoder(run)(torch.rand(2, 3, 16, 16)).isfinite().all()


def test_auto_stores_the_data_set_that_it_stands_for(folders):
    sizes = dict(train_size=96, test_size=40, batch_size=32, epochs=1, measure_items=20, width=0.25, device="cpu")
    run = pretrain(PretrainParams(dataset="auto", profile="quick", name="auto", **sizes))
    assert run.params["dataset"] == "spirograph" and run.params["image_size"] == 16
    assert load_views(run).count("test") == 40


def test_photographs_are_resized_if_asked(tmp_path, monkeypatch):
    from PIL import Image

    monkeypatch.setenv("DAINV_DATA", str(tmp_path / "data"))
    for half in ("train", "test"):
        (tmp_path / "set" / half / "a").mkdir(parents=True)
        for i in range(8):
            Image.new("RGB", (24, 16 + i), (0, 30 * i, 200)).save(tmp_path / f"set/{half}/a/{i}.png")
    asked = dict(dataset="folder", data_root=str(tmp_path / "set"), batch_size=4, device="cpu")
    with pytest.raises(ValueError, match=r"with `size`, such as size=16"):
        resolve(PretrainParams(**asked))
    assert resolve(PretrainParams(**asked, image_size=12))[1].size == 12
