"What cannot be trained is refused before anything is written: by rules, by a rehearsal, and tried with random parameters."

import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from odd_params import TINY, odd_params, outcome
from torch import nn

from dainv import loop
from dainv.data import ImageData, Split
from dainv.loop import memory_of, rehearse
from dainv.pretraining import PretrainParams, pretrain
from dainv.spirograph import spirograph_classes
from dainv.training import TrainParams, resolve, train


@pytest.fixture(scope="module")
def drawings():
    *parts, classes = spirograph_classes(400, 100)
    return ImageData(Split(*parts[:2]), Split(*parts[2:]), classes, "spirograph", "Spirograph classes", "400 drawings")


@pytest.fixture
def small(drawings, monkeypatch):
    "400 of the embedded drawings instead of all, which take seconds to make."
    import odd_params

    monkeypatch.setattr(odd_params, "drawings", lambda: drawings)


TRAINED = {TrainParams: range(0, 30), PretrainParams: range(0, 20)}


@pytest.mark.parametrize("kind", [TrainParams, PretrainParams])
def test_what_is_accepted_is_trained(folders, small, kind):
    found = {number: outcome(kind, odd_params(kind, number)) for number in TRAINED[kind]}
    assert {number: said for number, (how, said) in found.items() if how in ("late", "raw")} == {}
    assert sum(how == "trained" for how, _ in found.values()) >= len(found) / 4


WRONG = [
    (dict(model="vgg"), "model='vgg': expected one of allcnn"),
    (dict(depth=12, model="wrn"), "depth=12"),
    (dict(depth=10**9, model="wrn"), "depth=1000000000: expected 0"),
    (dict(linear_top=True, model="wrn"), "linear_top"),
    (dict(layers=["conv10"]), "parameter layers: 'conv10'"),
    (dict(law="cauchy"), "law"),
    (dict(interpolation="bicubic"), "interpolation"),
    (dict(scheme="heavy"), "scheme='heavy'"),
    (dict(width=float("inf")), "width=inf: expected a finite number"),
    (dict(width=float("nan")), "width=nan: expected a finite number"),
    (dict(width=1e6), "GiB or more.*lower width"),
    (dict(width=1e300), "no network of this width"),
    (dict(classes=["3 lobes, rounded"], test_size=0), "two classes or more, found 3 lobes, rounded"),
    (dict(classes=["cat"]), "'cat' is not a class"),
    (dict(batch_size=1024), "holds 256 images, the data only 40"),
    (dict(batch_size=4), "two images or more in 4 views"),
    (dict(test_size=1), "test_size=1: expected 0 for all, or 2"),
    (dict(train_size=10**12), "fit into memory"),
    (dict(seed=2**63), "seed=9223372036854775808: expected 0 to"),
    (dict(seed=-1), "seed=-1"),
    (dict(lr=1e300), "lr=1e.300: expected above 0 and at most 100"),
    (dict(epochs=10**30), "epochs="),
    (dict(weights_ratio=float("inf")), "weights_ratio=inf"),
    (dict(metric="fisher", shrinkage=0.0), "shrinkage=0"),
    (dict(shrinkage=0.1), "shrinkage=0.1.*msd has no covariance"),
    (dict(name="a b"), "name='a b'"),
    (dict(monitor_every=0), "monitor_every=0"),
    (dict(milestones=[0.5, 1.5]), "milestones"),
    (dict(views=10**9, batch_size=2 * 10**9), "batch"),
]


@pytest.mark.parametrize(("mistake", "message"), WRONG, ids=lambda v: str(v)[:40])
def test_a_network_that_cannot_be_trained_leaves_no_folder(folders, drawings, mistake, message):
    with pytest.raises(ValueError, match=message):
        train(TrainParams(**{**TINY[TrainParams], **mistake}), drawings)
    assert list((folders / "runs").iterdir()) == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize(("kind", "work"), [(TrainParams, train), (PretrainParams, pretrain)])
def test_a_gpu_that_is_not_there_leaves_no_folder(folders, drawings, kind, work):
    with pytest.raises(ValueError, match="no GPU"):
        work(kind(**{**TINY[kind], "device": "cuda"}), *([drawings] if kind is TrainParams else []))
    assert list((folders / "runs").iterdir()) == []


CONTRASTIVE = [
    (dict(encoder="vgg"), "encoder='vgg'"),
    (dict(strength=float("inf")), "strength=inf"),
    (dict(temperature=float("inf")), "temperature=inf"),
    (dict(temperature=1e-30), "temperature=1e-30"),
    (dict(penalty_limit=float("inf")), "penalty_limit=inf"),
    (dict(penalty_weight=1e300), "penalty_weight"),
    (dict(width=1e6), "GiB or more"),
    (dict(projection=2**50), "GiB or more"),
    (dict(image_size=10**6), "image_size=1000000: expected .* 1024 pixels"),
    (dict(batch_size=41), "only 40 training items"),
    (dict(test_size=1), "test_size=1"),
    (dict(train_size=10**12), "fit into memory"),
    (dict(seed=2**64), "seed="),
    (dict(lr=float("inf")), "lr=inf"),
    (dict(b_bounds=[0.5, float("inf")]), "b_bounds"),
    (dict(devices=2), "devices=2, but 1 process"),
    (dict(start="nowhere"), "no run 'nowhere'"),
]


@pytest.mark.parametrize(("mistake", "message"), CONTRASTIVE, ids=lambda v: str(v)[:40])
def test_an_encoder_that_cannot_be_trained_leaves_no_folder(folders, mistake, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        pretrain(PretrainParams(**{**TINY[PretrainParams], **mistake}))
    assert list((folders / "runs").iterdir()) == []


def test_batches_whose_similarities_fill_no_memory_are_refused(folders, monkeypatch):
    monkeypatch.setattr("dainv.pretraining.memory_of", lambda device: 1000 if device.type == "cpu" else 0)
    monkeypatch.setattr("dainv.pretraining._penalty_rules", lambda p: [])
    with pytest.raises(ValueError, match="similarities"):
        pretrain(PretrainParams(**TINY[PretrainParams]))


def test_the_memory_is_that_of_the_container(monkeypatch, tmp_path):
    whole = memory_of(torch.device("cpu"))
    assert 2**28 < whole < 2**50
    (tmp_path / "memory.max").write_text("123456\n")
    monkeypatch.setattr(loop, "Path", lambda name: tmp_path / name.rsplit("/", 1)[1])
    assert memory_of(torch.device("cpu")) == 123456
    (tmp_path / "memory.max").write_text("max\n")
    assert memory_of(torch.device("cpu")) >= whole


def test_a_rehearsal_leaves_the_generator_and_the_default_device(tmp_path):
    torch.manual_seed(0)
    state, built = torch.get_rng_state(), []
    rehearse(lambda: built.append(nn.Linear(3, 3)) or built[0], (2, 3, 3, 3), torch.device("cpu"))
    assert built[0].weight.is_meta and torch.equal(torch.get_rng_state(), state) and not torch.ones(1).is_meta
    assert not built[0]._forward_hooks
    with pytest.raises(ValueError, match="batches"):
        rehearse(lambda: nn.Linear(4, 3), (2, 3, 3, 3), torch.device("cpu"))


def test_values_of_other_types_become_those_of_the_fields(drawings):
    asked = TrainParams(**{**TINY[TrainParams], "lr": "1e-2", "views": "4", "seed": 3.0, "milestones": ["5e-1"]})
    found = resolve(asked, drawings)[0]
    assert (found.lr, found.views, found.seed, found.milestones) == (0.01, 4, 3, [0.5])
    assert found == resolve(replace(asked, lr=0.01, views=4, seed=3, milestones=[0.5]), drawings)[0]


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("train", ["--alpha", "2"]),
        ("train", ["--model=vgg"]),
        ("train", ["--dataset", "folder", "--data_root", "nowhere"]),
        ("pretrain", ["--start", "nowhere", "--train_size=40", "--test_size=20", "--batch_size=8"]),
        ("pretrain", ["--lr"]),
    ],
)
def test_a_mistake_in_a_shell_is_one_line(folders, name, arguments):
    done = subprocess.run([sys.executable, "-m", "dainv", name, *arguments], capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith(f"dainv {name}: ") and done.stderr.count("\n") == 1
    assert list((folders / "runs").iterdir()) == []
