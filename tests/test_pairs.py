"Pairs of classes: the sweep through papermill, killed and resumed, and the figures that are drawn of it."

import json
import os
import subprocess
import sys
import time
from itertools import combinations
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import psutil
import pytest
import yaml
from fake_runs import CLASSES, write_project

from dainv.data import load_data, restricted
from dainv.runs import Run

NOTEBOOKS = Path(__file__).resolve().parents[1] / "nbs"
SWEPT = ["a", "b", "model", "seed", "clean", "fgsm", "pgd", "pgd_margin", "transfer", "n_images", "run"]


def execute(notebook, **params):
    "Names left by the cells of a notebook, run in this process with other parameters."
    namespace = {"display": print}
    for cell in json.loads((NOTEBOOKS / f"{notebook}.ipynb").read_text())["cells"]:
        if cell["cell_type"] == "code":
            exec("".join(cell["source"]), namespace)
            if "parameters" in cell["metadata"].get("tags", []):
                namespace.update(params)
    plt.close("all")
    return namespace


@pytest.fixture
def asked(tiny, folders, monkeypatch):
    "An experiments file with a sweep of the blobs that lasts seconds; change it and call `write`."
    path = folders / "experiments.yaml"
    monkeypatch.setenv("DAINV_EXPERIMENTS", str(path))
    pairs = dict(epochs=2, attack_images=8, attack_steps=2, eps=0.03)
    section = dict(common=tiny, seeds=[0], runs={}, figures={"invariance_pairs_matrix": {}}, pairs=pairs)

    def write(**more):
        section["pairs"] |= more
        path.write_text(yaml.safe_dump({"check": section}))
        return folders / "runs" / "check"

    write()
    return write


@pytest.mark.slow
def test_a_killed_sweep_resumes(asked, folders):
    runs = asked(epochs=3)
    command = [sys.executable, "-m", "papermill", NOTEBOOKS / "pairs.ipynb", "-", "-p", "profile", "check"]
    how = dict(cwd=folders, stdin=subprocess.DEVNULL, text=True)
    first = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, **how)
    started = runs / "pairs" / "left-right-ce-s0" / "checkpoint.pt"
    deadline = time.monotonic() + 120
    while not started.exists() and first.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    for process in [*psutil.Process(first.pid).children(recursive=True), first]:
        process.kill()
    first.wait()
    assert started.exists() and not (runs / "pairs.csv").exists(), "killed while it worked"
    before = Run.open("check/pairs/left-right-ce-s0").load_checkpoint()["rows"]
    second = subprocess.run(command, capture_output=True, **how)
    assert second.returncode == 0, second.stderr[-3000:]
    log = Run.open("check/pairs/left-right-ce-s0").log
    assert len(log) == 3 and before[0]["seconds"] == log["seconds"][0], "the first epoch was not trained again"
    table = pd.read_csv(runs / "pairs.csv")
    assert table.columns.tolist() == SWEPT and table["model"].tolist() == ["baseline", "pure"]
    assert (table[["a", "b"]] == ["left", "right"]).all(axis=None) and (table["n_images"] == 8).all()
    assert table[["clean", "fgsm", "pgd", "pgd_margin", "transfer"]].isin(np.arange(9) / 8).all(axis=None)


def test_the_sweep_and_its_matrix(asked, folders, monkeypatch):
    runs = asked()
    left = execute("pairs", profile="check")
    both = [Run.open(f"check/pairs/left-right-{short}-s0").params for short in ("ce", "invariance")]
    assert {k for k in both[0] if both[0][k] != both[1][k]} == {"name", "alpha", "beta"}, "only the objective differs"
    assert [(p["alpha"], p["beta"]) for p in both] == [(0, 0), (0.1, 0.9)] and not both[1]["exclude_last"]
    written = {f: f.stat().st_mtime_ns for f in runs.rglob("*") if f.name in ("attacks.csv", "result.json")}
    assert len(written) == 4
    again = execute("pairs", profile="check")
    pd.testing.assert_frame_equal(again["table"], left["table"])
    assert {f: f.stat().st_mtime_ns for f in written} == written, "nothing is trained or attacked twice"
    asked(attack_images=12)
    assert (execute("pairs", profile="check")["table"]["n_images"] == 12).all(), "but other attacks are made anew"
    monkeypatch.setenv("DAINV_FIGURES", str(folders / "figures"))
    drawn = execute("figures/invariance_pairs_matrix", profile="check")
    assert all((folders / "figures" / "check" / drawn["files"][kind].name).exists() for kind in ("png", "csv", "json"))
    record = json.loads(drawn["files"]["json"].read_text())
    assert record["options"]["eps"] == 0.03 and len(record["runs"]) == 2 and len(record["data"]) == 1


def test_a_run_of_the_sweep_reads_its_own_data(asked):
    execute("pairs", profile="check")
    run = Run.open("check/pairs/left-right-ce-s0")
    alone = load_data("folder", "blobs", classes=["left", "right"])
    assert run.result["data"]["fingerprint"] == alone.fingerprint
    assert restricted(load_data("folder", "blobs"), ["right"], train_size=5).classes == ["right"]


@pytest.mark.parametrize(
    ("params", "change", "message"),
    [
        (dict(classes=["left", "rihgt"]), {}, "'rihgt' is not a class; known: left, right"),
        (dict(classes=["left"]), {}, "parameter classes=.*: expected two or more different classes"),
        (dict(profile="chekc"), {}, "profile='chekc' is not in experiments.yaml"),
        (dict(), dict(epohcs=3), "did you mean 'epochs'"),
        (dict(), dict(eps="strong"), "'eps': expected float"),
        (dict(), dict(attack_images=1), "attack_images=1: expected at least 2"),
        (dict(), dict(attack_images=200), "attack_images=200"),
        (dict(), dict(eps=8), "eps=8.0: expected above 0"),
        (dict(), dict(seeds=[-1]), "seeds=.*: expected different whole numbers"),
        (dict(), dict(alpha=0.5), "'alpha' is what the sweep itself sets"),
        (dict(), dict(views=3), "batch_size=16"),
    ],
)
def test_mistakes_are_named_before_anything_is_trained(asked, params, change, message):
    runs = asked(**change)
    with pytest.raises(ValueError, match=message):
        execute("pairs", **{"profile": "check", **params})
    assert not runs.exists()


def planes(collapsed, n=60):
    "Rows of embedding.csv: outputs of two classes on a line, with or without width, and their component scores."
    rng = np.random.default_rng(0)
    label = np.arange(n) % 2
    along = np.where(label, 2.0, -2.0) + rng.normal(0, 0.5, n)
    outputs = np.outer(along, [1, -0.8]) + (0 if collapsed else 1) * rng.normal(0, 0.4, (n, 2)) + 3
    centred = outputs - outputs.mean(0)
    scores = centred @ np.linalg.svd(centred, full_matrices=False)[2].T
    image = dict(image=np.arange(n), label=label)
    tables = [dict(kind=kind, x=x[:, 0], y=x[:, 1], **image) for kind, x in (("outputs", outputs), ("pca", scores))]
    return pd.concat(map(pd.DataFrame, tables))


@pytest.fixture
def project(tmp_path, monkeypatch):
    "Two made-up runs on a pair of classes, three seeds each."
    figures = {"invariance_pairs": {"baseline": "views", "pure": "pure"}}
    for name, value in write_project(tmp_path, figures=figures).items():
        monkeypatch.setenv(name, value)
    for folder in (tmp_path / "runs" / "quick").iterdir():
        result = json.loads((folder / "result.json").read_text())
        result["data"]["classes"] = ["car", "dog"]
        result["metrics"] |= dict(probe_accuracy=0.97) if "pure" in folder.name else {}
        (folder / "result.json").write_text(json.dumps(result))
        planes("pure" in folder.name).to_csv(folder / "embedding.csv", index=False)
    return tmp_path


def test_the_figure_of_one_pair(project):
    left = execute("figures/invariance_pairs", profile="quick")
    published = left["published"].set_index(["model", "metric"])["published"]
    assert published["baseline", "pgd"] == 7.6 and published["pure", "fgsm"] == 88.5
    numbers = left["data"].set_index(["role", "series"])["mean"]
    assert numbers["pure", "lowest"] == pytest.approx(6, abs=1), "the margin loss finds more"
    assert numbers["pure", "PGD"] == pytest.approx(18, abs=1)
    assert numbers["pure", "clean"] == pytest.approx(97) and numbers["baseline", "clean"] == pytest.approx(93.2)
    assert "masked gradients: the margin beats the cross entropy" in left["caption"]
    assert "What remains of the advantage" in left["caption"]
    saved = pd.read_csv(left["files"]["csv"])
    for (_, kind), rows in saved[saved["quantity"] == "plane"].groupby(["role", "kind"]):
        r = np.corrcoef(rows["x"], rows["y"])[0, 1]
        assert (abs(r) > 0.9) if kind == "outputs" else (not abs(r) > 1e-6 or rows["y"].std() < 1e-6)
    assert os.path.getsize(left["files"]["png"]) > 20_000


def test_the_figure_of_one_pair_wants_a_pair(project):
    for file in project.glob("runs/quick/*/result.json"):
        result = json.loads(file.read_text())
        result["data"]["classes"] = ["car", "dog", "ship"]
        file.write_text(json.dumps(result))
    with pytest.raises(ValueError, match="two classes"):
        execute("figures/invariance_pairs", profile="quick")


def sweep_of(root, classes, missing):
    "A made-up table of all pairs but one: invariance only is better under PGD, not under the margin loss."
    rows, rng = [], np.random.default_rng(0)
    for a, b in (pair for pair in combinations(classes, 2) if pair != missing):
        hard = rng.uniform(0, 0.2)
        for seed in range(3):
            left = dict(baseline=(0.98, 0.3, 0.08, 0.07, 0.4), pure=(0.97, 0.85, 0.6, 0.06, 0.5))
            for (model, values), run in zip(left.items(), ("views", "pure"), strict=True):
                values = [max(0, v - hard + rng.normal(0, 0.01)) for v in values]
                row = dict(a=a, b=b, model=model, seed=seed, **dict(zip(SWEPT[4:9], values, strict=True)))
                rows.append(row | dict(n_images=200, run=f"quick/allcnn_{run}-s{seed}"))
    swept = dict(classes=classes, title="made up", pairs=len(rows) // 6, seeds=[0, 1, 2])
    swept |= dict(eps=0.03, attack_steps=40, attack_images=200)
    (root / "pairs.json").write_text(json.dumps(swept))
    pd.DataFrame(rows).to_csv(root / "pairs.csv", index=False)


def test_the_matrix_of_all_pairs(project):
    sweep_of(project / "runs" / "quick", CLASSES, missing=("car", "dog"))
    left = execute("figures/invariance_pairs_matrix", profile="quick")
    grids = [ax.images[0].get_array() for ax in left["fig"].axes[:4]]
    car, dog, cat = (CLASSES.index(name) for name in ("car", "dog", "cat"))
    for grid in grids:
        assert grid.mask[car, dog] and grid.mask[dog, car] and grid.mask.diagonal().all() and grid.mask.sum() == 12
    clean, fgsm, pgd, lowest = (grid.filled(np.nan) for grid in grids)
    table = pd.read_csv(project / "runs" / "quick" / "pairs.csv").query("a == 'cat' and b == 'dog'")
    means = 100 * table.groupby("model")["pgd"].mean()
    assert (pgd[cat, dog], pgd[dog, cat]) == pytest.approx((means["baseline"], means["pure"]))
    assert "44 of 45 swept" in left["caption"] and "better: 0," in left["caption"]
    gain = left["gain"]
    assert gain["pgd"].mean() > 30 and gain["lowest"].mean() < 5
    assert np.nansum(np.tril(lowest)) < np.nansum(np.tril(pgd)), "the margin loss finds more"


def test_a_matrix_without_a_sweep_says_what_to_run(folders):
    with pytest.raises(FileNotFoundError, match="run nbs/pairs.ipynb"):
        execute("figures/invariance_pairs_matrix", profile="quick")
