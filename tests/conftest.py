"What several test files share."

import os
import shutil
from contextlib import contextmanager
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from hypothesis import settings
from PIL import Image

from dainv.evaluating import Encoder, EvaluateParams
from dainv.files import read_json, read_table, write_json
from dainv.jobs import run_notebook
from dainv.measuring import MeasureParams, Trained, measured
from dainv.params import check_params
from dainv.pretraining import PretrainParams, pretrain
from dainv.runs import Measurement, Run
from dainv.suites import profile_runs, run_group
from dainv.training import TrainParams, train
from dainv.workflow import asked_of_measuring

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
ROOT = Path(__file__).resolve().parents[1]

settings.register_profile("untimed", deadline=None)  # how long an example takes depends on who shares the machine
settings.load_profile("untimed")


@pytest.fixture
def folders(tmp_path, monkeypatch):
    "Data, runs and figures in a temporary folder; their parent."
    for name in ("data", "runs", "figures"):
        monkeypatch.setenv(f"DAINV_{name.upper()}", str(tmp_path / name))
        (tmp_path / name).mkdir()
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return tmp_path


@pytest.fixture
def blobs(folders):
    "A folder data set named blobs: two classes of 32 x 32 images, 48 to train and 16 to test each."
    rng = np.random.default_rng(0)
    rows, cols = np.mgrid[:32, :32]
    for split, count in (("train", 48), ("test", 16)):
        for label in ("left", "right"):
            target = folders / "data" / "blobs" / split / label
            target.mkdir(parents=True)
            for number in range(count):
                column = rng.uniform(4, 12) + (16 if label == "right" else 0)
                blob = np.exp(-((rows - rng.uniform(8, 24)) ** 2 + (cols - column) ** 2) / 20)
                pixels = 60 + 150 * blob[..., None] * rng.uniform(0.5, 1, 3) + rng.normal(0, 5, (32, 32, 3))
                Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(target / f"{number:03d}.png")
    return "blobs"


@pytest.fixture
def tiny(blobs):
    "Parameters of a run that lasts a second."
    return dict(dataset="folder", data_root=blobs, width=0.05, batch_size=16, views=4, epochs=3, lr=0.05, device="cpu")


@pytest.fixture
def execute():
    "A function that runs the cells of a notebook in this process with other parameters; the names that they leave."

    def run(notebook, **params):
        left = run_notebook(ROOT / "nbs" / f"{notebook}.ipynb", params)
        plt.close("all")
        return left

    return run


CIFAR10 = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]


def ten_classes(folder):
    "A folder data set of blobs, each class in a direction of its own: 12 images of each class to train and 8 to test."
    rng = np.random.default_rng(0)
    rows, cols = np.mgrid[:32, :32]
    for split, count in (("train", 12), ("test", 8)):
        for number, label in enumerate(CIFAR10):
            (folder / split / label).mkdir(parents=True)
            for image in range(count):
                x, y = 16 + 9 * np.array([np.cos(0.628 * number), np.sin(0.628 * number)]) + rng.normal(0, 1, 2)
                blob = np.exp(-((rows - y) ** 2 + (cols - x) ** 2) / 20)
                pixels = 60 + 150 * blob[..., None] * rng.uniform(0.5, 1, 3) + rng.normal(0, 5, (32, 32, 3))
                picture = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
                picture.save(folder / split / label / f"{image:03d}.png")


class Suite:
    "Runs that were trained and measured by the code of the project, at tiny size, and the figures drawn of them."

    def __init__(self, root, section, name="quick"):
        self.root, self.section, self.name = root, section, name
        self.figures, self.runs = root / "figures" / name, root / "runs" / name
        (root / "experiments.yaml").write_text(yaml.safe_dump({name: section}, sort_keys=False))

    @contextmanager
    def inside(self):
        "A context in which the project's folders are those of the suite."
        with pytest.MonkeyPatch.context() as patch:
            for folder in ("data", "runs", "figures"):
                patch.setenv(f"DAINV_{folder.upper()}", str(self.root / folder))
            patch.setenv("DAINV_EXPERIMENTS", str(self.root / "experiments.yaml"))
            yield patch

    def make(self):
        "Trains and measures every run that the suite lists."
        torch.set_num_threads(1)
        with self.inside():
            for name, asked in profile_runs(self.name).items():
                networks = self.notebook_of(name.split("/")[1].rpartition("-s")[0]) == "train"
                params, work = (TrainParams, train) if networks else (PretrainParams, pretrain)
                work(check_params(params, {**asked, "name": name}))
            for name in profile_runs(self.name):
                kind, _, seed = name.split("/")[1].rpartition("-s")
                asked = {"run": name, **asked_of_measuring(self.section, kind)}
                if asked.get("attack_source"):
                    asked["attack_source"] = f"{self.name}/{asked['attack_source']}-s{seed}"
                params, subject = (
                    (MeasureParams, Trained) if self.notebook_of(kind) == "train" else (EvaluateParams, Encoder)
                )
                list(measured(subject(check_params(params, asked))))
        return self

    def notebook_of(self, kind):
        "The notebook that trains a run of the suite."
        return run_group(self.section, kind)[0]

    def draw(self, figure):
        "Names left by the cells of a figure notebook."
        with self.inside():
            left = run_notebook(ROOT / "nbs" / "figures" / f"{figure}.ipynb", {"profile": self.name})
        plt.close("all")
        return left

    def shown(self, figure):
        "The table and the record of a figure, which is drawn if it has not been."
        if not (self.figures / f"{figure}.json").exists():
            self.draw(figure)
        return pd.read_csv(self.figures / f"{figure}.csv"), read_json(self.figures / f"{figure}.json")

    def table(self, run, file):
        "A table of a run."
        return read_table(self.runs / run / file)

    def under(self, root, name, **changes):
        "The same runs as another suite, with its own figures."
        root.mkdir(exist_ok=True)
        other = Suite(root, {**self.section, **changes}, name)
        (root / "runs").mkdir(exist_ok=True)
        other.runs.symlink_to(self.runs)
        (root / "data").symlink_to(self.root / "data")
        return other

    def copy(self, root):
        "A copy whose runs may be changed."
        shutil.copytree(self.root / "runs", root / "runs", ignore=shutil.ignore_patterns("checkpoint*"))
        (root / "data").symlink_to(self.root / "data")
        return Suite(root, self.section, self.name)

    def change(self, run, file, edit):
        "Replaces what is in a file of a run by what `edit` makes of it, as a measurement would, or a training."
        with self.inside():
            opened = Run.open(f"{self.name}/{run}")
            if file == "result.json":
                write_json(opened.folder / file, edit(read_json(opened.folder / file)))
            else:
                measurement, how = Measurement(opened), opened.read("measured.json")
                measurement.write(file, edit(opened.read(file)))
                measurement.finish({k: v for k, v in how.items() if k not in ("tables", "digests")})


@pytest.fixture(scope="session")
def networks(tmp_path_factory):
    "A suite of networks: all figures of data augmentation invariance and of invariance instead of categorization."
    deep = dict(what=["representation", "probes", "attacks"], probe_fractions=[1.0], attack_images=20)
    deep |= dict(attack_steps=3, attack_eps=[0.03, 0.3], attack_source="m8")
    pure = dict(alpha=0.1, beta=0.9, exclude_last=False)
    four = dict(baseline="m8", mixed="mixed", pure="pure", fisher="fisher")
    three = dict(baseline="m1", views="m8", dai="dai")
    common = dict(dataset="folder", data_root="tiny", data_title="CIFAR-10", device="cpu", width=0.05, batch_size=16)
    section = dict(
        common=common | dict(views=4, epochs=3, lr=0.05),
        seeds=[0],
        runs=dict(
            m1=dict(views=1, alpha=0.0),
            m8=dict(alpha=0.0, seeds=[0, 1]),
            dai=dict(alpha=0.1),
            mixed=dict(alpha=0.45, beta=0.45),
            pure=dict(**pure, seeds=[0, 1]),
            fisher=dict(**pure, metric="fisher", pool=True, layers=["conv8", "conv9"]),
            ce=dict(alpha=0.0, beta=0.0, linear_top=True),
            wrn=dict(model="wrn", depth=10, alpha=0.0),
            wrn_dai=dict(model="wrn", depth=10, alpha=0.1),
        ),
        measure={run: deep for run in ("mixed", "pure", "fisher", "ce")}
        | dict(m1=dict(repeats=2), dai=dict(repeats=2, timing_steps=3))
        | dict(m8={**deep, "what": ["score", "accuracy", "samples", *deep["what"]], "repeats": 2, "attack_source": ""}),
        figures=dict(
            dai_score=three,
            dai_loss_dynamics=dict(views="m8", dai="dai"),
            dai_prefix=dict(baseline="m8", dai="dai"),
            dai_samples=dict(baseline="m8"),
            dai_accuracy=three,
            dai_time=dict(dai="dai"),
            dai_collapse=dict(views="m8", dai="dai"),
            dai_finetuning=dict(views="m8", dai="dai"),
            **{
                f"dai_networks_{x}": dict(allcnn_baseline="m1", wrn_views="wrn", wrn_dai="wrn_dai")
                for x in ("score", "accuracy", "components")
            },
            **{f"invariance_{x}": four for x in ("rdms", "pc1", "probes", "tsne", "cka", "attacks", "convergence")},
            open_problem=dict(ce="ce", fisher="fisher"),
        ),
    )
    section["measure"]["fisher"] = {**deep, "probe_fractions": [0.5, 1.0]}
    root = tmp_path_factory.mktemp("networks")
    ten_classes(root / "data" / "tiny")
    return Suite(root, section).make()


@pytest.fixture(scope="session")
def pairs_of_classes(tmp_path_factory):
    "A suite of two networks on one pair of classes, and a sweep over three classes."
    pure = dict(alpha=0.1, beta=0.9, exclude_last=False)
    deep = dict(what=["representation", "attacks"], attack_images=12, attack_steps=3, attack_eps=[0.03])
    common = dict(dataset="folder", data_root="tiny", data_title="CIFAR-10", device="cpu", width=0.05, batch_size=16)
    section = dict(
        common=common | dict(views=4, epochs=3, lr=0.05),
        seeds=[0, 1],
        runs=dict(ce=dict(classes=["automobile", "dog"], alpha=0.0), pure=dict(classes=["automobile", "dog"], **pure)),
        measure=dict(ce={**deep, "attack_source": "pure"}, pure={**deep, "attack_source": "ce"}),
        figures=dict(invariance_pairs=dict(baseline="ce", pure="pure"), invariance_pairs_matrix={}),
        pairs=dict(classes=["automobile", "dog", "ship"], seeds=[0], epochs=2, attack_images=8, attack_steps=2),
    )
    root = tmp_path_factory.mktemp("pairs")
    ten_classes(root / "data" / "tiny")
    suite = Suite(root, section).make()
    with suite.inside():
        run_notebook(ROOT / "nbs" / "pairs.ipynb", {"profile": "quick"})
    plt.close("all")
    return suite


def encoders_of(root, section, roles):
    "A suite of encoders, each figure of InvCLR with all of them."
    figures = sorted(file.stem for file in (ROOT / "nbs" / "figures").glob("invclr_*.ipynb"))
    drawn = {name: {role: role for role in roles} for name in figures}
    return Suite(
        root, section | dict(figures=drawn | dict(invclr_samples=dict(plain="plain"), invclr_defects={}))
    ).make()


EVALUATED = dict(passes=2, counts=[1, 2, 5], kind_counts=[1, 2], fractions=[0.5, 1.0], subsets=2)


@pytest.fixture(scope="session")
def drawings(tmp_path_factory):
    "A suite of encoders of drawings: without a penalty, with the gradient and with the finite-difference penalty."
    common = dict(profile="quick", dataset="spirograph", width=0.25, device="cpu", train_size=100, test_size=40)
    runs = dict(plain={}, gradient=dict(penalty="gradient", penalty_weight=0.01))
    runs["finite_difference"] = dict(penalty="twin", penalty_weight=1.0)
    common |= dict(batch_size=32, epochs=2, measure_every=1, measure_items=20)
    few = EVALUATED | dict(h_shifts=[-0.5, 0.5], background_shifts=[0.0, 0.2], strengths=[0.0, 1.0])
    encoders = dict(common=common, seeds=[0, 1], runs=runs, measure=dict(common=few))
    return encoders_of(tmp_path_factory.mktemp("drawings"), dict(encoders=encoders), list(runs))


@pytest.fixture(scope="session")
def photographs(tmp_path_factory):
    "A suite of encoders of photographs, one seed, without and with the gradient penalty."
    root = tmp_path_factory.mktemp("photographs")
    ten_classes(root / "data" / "tiny")
    common = dict(profile="quick", dataset="folder", data_root="tiny", data_title="CIFAR-10", width=0.25, device="cpu")
    common |= dict(batch_size=32, epochs=2, measure_every=1, measure_items=20)
    runs = dict(plain={}, gradient=dict(penalty="gradient", penalty_weight=0.1))
    few = EVALUATED | dict(strengths=[0.0, 0.5, 1.0], colour_shifts=[0.25])
    encoders = dict(common=common, seeds=[4], runs=runs, measure=dict(common=few))
    return encoders_of(root, dict(encoders=encoders), list(runs))
