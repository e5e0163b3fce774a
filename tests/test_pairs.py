"Pairs of classes: the sweep through papermill, killed and resumed, and the figures that are drawn of it."

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import psutil
import pytest
import yaml

from dainv.data import load_data, restricted
from dainv.files import read_json, read_table
from dainv.runs import Run

NOTEBOOKS = Path(__file__).resolve().parents[1] / "nbs"
SWEPT = ["a", "b", "model", "seed", "clean", "fgsm", "pgd", "pgd_margin", "transfer", "n_images", "run"]


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


def test_the_sweep_and_its_matrix(asked, folders, monkeypatch, execute):
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


def test_a_run_of_the_sweep_reads_its_own_data(asked, execute):
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
def test_mistakes_are_named_before_anything_is_trained(asked, execute, params, change, message):
    runs = asked(**change)
    with pytest.raises(ValueError, match=message):
        execute("pairs", **{"profile": "check", **params})
    assert not runs.exists()


def test_the_figure_of_one_pair(pairs_of_classes, tmp_path):
    suite = pairs_of_classes.copy(tmp_path)

    def under_attack(table):
        left = np.where(table["loss"] == "margin", 0.0625, 0.6875)
        left = np.where((table["eps"] > 0) & (table["source"] == "self"), left, 0.9375)
        return table.assign(accuracy=left, fooled=1 - left)

    for seed in (0, 1):
        suite.change(f"pure-s{seed}", "attacks.csv", under_attack)
    left = suite.draw("invariance_pairs")
    published = left["published"].set_index(["model", "metric"])["published"]
    assert published["baseline", "pgd"] == 7.6 and published["pure", "fgsm"] == 88.5
    numbers = left["data"].set_index(["role", "series"])["mean"]
    assert numbers["pure", "lowest"] == pytest.approx(6.25), "the margin loss finds more"
    assert numbers["pure", "PGD"] == pytest.approx(68.75)
    metrics = [read_json(suite.runs / f"pure-s{seed}" / "result.json")["metrics"] for seed in (0, 1)]
    assert numbers["pure", "clean"] == pytest.approx(50 * sum(m["probe_accuracy"] for m in metrics))
    assert "masked gradients: " in left["caption"], left["caption"]
    assert "the margin beats the cross entropy" in left["caption"], left["caption"]
    assert "What remains of the advantage" in left["caption"]
    saved = pd.read_csv(left["files"]["csv"])
    planes = saved[saved["quantity"] == "plane"]
    assert set(planes["kind"]) == {"outputs", "pca"} and planes["seed"].unique().tolist() == [0]
    for _, rows in planes[planes["kind"] == "pca"].groupby("role"):
        assert not abs(np.corrcoef(rows["x"], rows["y"])[0, 1]) > 1e-3
    assert os.path.getsize(left["files"]["png"]) > 20_000


def test_the_figure_of_one_pair_wants_a_pair(pairs_of_classes, tmp_path):
    suite = pairs_of_classes.copy(tmp_path)
    three = dict(classes=["car", "dog", "ship"])
    suite.change("ce-s0", "result.json", lambda result: {**result, "data": {**result["data"], **three}})
    with pytest.raises(ValueError, match="two classes"):
        suite.draw("invariance_pairs")


def test_the_matrix_of_all_pairs(pairs_of_classes):
    left = pairs_of_classes.draw("invariance_pairs_matrix")
    table, classes = read_table(pairs_of_classes.runs / "pairs.csv"), left["swept"]["classes"]
    assert table.columns.tolist() == SWEPT and len(table) == 6
    car, dog, cat = (classes.index(name) for name in ("automobile", "dog", "cat"))
    grids = [ax.images[0].get_array() for ax in left["fig"].axes[:4]]
    for grid in grids:
        assert (
            grid.mask.sum() == 100 - 6 and grid.mask[car, cat] and not grid.mask[car, dog] and not grid.mask[dog, car]
        )
    means = 100 * table.query("a == 'automobile' and b == 'dog'").set_index("model")["pgd"]
    pgd = grids[2].filled(np.nan)
    assert (pgd[car, dog], pgd[dog, car]) == pytest.approx((means["baseline"], means["pure"]))
    assert "3 of 45 swept" in left["caption"] and left["wins"].loc["lowest", ["better", "worse"]].sum() <= 3
    lowest = table[["fgsm", "pgd", "pgd_margin", "transfer"]].min(axis=1)
    shown = left["data"].query("quantity == 'lowest'")["mean"]
    assert sorted(shown) == pytest.approx(sorted(100 * lowest))


def test_a_matrix_without_a_sweep_says_what_to_run(folders, execute):
    with pytest.raises(FileNotFoundError, match="run nbs/pairs.ipynb"):
        execute("figures/invariance_pairs_matrix", profile="quick")
