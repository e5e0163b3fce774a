"The benchmark notebook, at sizes that show nothing but that every line of its table is made."

import json
import math
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

ROOT = Path(__file__).resolve().parents[1]
COLUMNS = (
    "benchmark case ours reference reference_name ours_value reference_value unit ratio goal met repeats threads "
    "precision processor"
).split()
GOALS = {  # (benchmark, reference) -> goals of its lines, in order; an empty one is a line for information
    ("loss time", "gram"): [">= 8", "", ">= 8", ""],
    ("loss in clones", "clone"): ["<= 6", "", "<= 6", "", "", "", "", ""],
    ("class-wise loss", "images"): ["<= 1.1", "<= 1.1"],
    ("loss memory", "gradient"): ["<= 1.5", "", "<= 1.5", ""],
    ("loss error", "float64"): ["<= 1e-6", ""],
    ("augmentation", "scipy"): [">= 12"],
    ("augmentation", "kornia"): [">= 2"],
    ("score audit", "passes"): ["<= 1.3"],
    ("audit", "passes"): ["<= 1.3"],
    ("score and variance", "variance"): ["<= 1"],
    ("local equivariance", "tangents"): ["<= 1.3"],
    ("DAI step", "alpha0"): ["<= 1.15"] * 6,
    ("DAI step", "single"): [""] * 6,
    ("two runs", "one"): [""],
    ("Fisher step", "msd"): ["<= 1.15", "<= 1.15"],
    ("RDM", "second"): ["<= 1"],
    ("drawing", "literal"): [">= 8"],
    ("NT-Xent time", "broadcast"): [">= 8"],
    ("NT-Xent memory", "broadcast"): ["<= 0.1"],
    ("contrastive step", "none"): ["", "<= 1.1", ""],
    ("training loop", "bare"): [">= 0.9", "", ""],
}


@pytest.fixture(scope="module")
def figures(tmp_path_factory):
    "The folder that the notebook wrote to."
    folder = tmp_path_factory.mktemp("figures")
    options = [part for pair in dict(threads=1, repeats=1, full=False).items() for part in ("-p", *map(str, pair))]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DAINV_FIGURES", str(folder))
        patch.setenv("OMP_NUM_THREADS", "1")
        command = [sys.executable, "-m", "papermill", str(ROOT / "nbs/benchmarks.ipynb"), *options]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


@pytest.mark.slow
def test_every_line_is_there(figures):
    table = pd.read_csv(figures / "benchmarks.csv", keep_default_na=False)
    assert list(table.columns) == COLUMNS
    assert {key: group.goal.tolist() for key, group in table.groupby(["benchmark", "reference"])} == GOALS
    assert not table[["benchmark", "case"]].duplicated().any()
    for column in ("ours_value", "reference_value", "ratio"):
        assert table[column].map(lambda value: math.isfinite(value) and value >= 0).all(), column
    assert table.repeats.isin([1, 2, 3]).all() and (table.threads == 1).all()
    assert set(table.precision) == {"fp32", "bf16"} and table.processor.nunique() == 1 and len(table.processor[0]) > 5


@pytest.mark.slow
def test_ratios_and_verdicts_follow_from_the_values(figures):
    for line in pd.read_csv(figures / "benchmarks.csv", keep_default_na=False).itertuples():
        if line.benchmark == "loss error":
            expected = abs(line.ours_value / line.reference_value - 1)
        elif line.benchmark in ("loss time", "augmentation", "drawing", "NT-Xent time"):
            expected = line.reference_value / line.ours_value
        else:
            expected = line.ours_value / line.reference_value
        assert line.ratio == pytest.approx(expected, rel=1e-6, abs=1e-9), line
        sign, bound = line.goal.split() if line.goal else ("", "nan")
        met = {">=": line.ratio >= float(bound), "<=": line.ratio <= float(bound), "": ""}[sign]
        assert line.met == str(met), line


@pytest.mark.slow
def test_the_loss_is_exact_where_the_gram_form_is_not(figures):
    errors = pd.read_csv(figures / "benchmarks.csv").query("benchmark == 'loss error'").set_index("ours").ratio
    assert errors["invariance_loss"] < 1e-6 < errors["gram_loss"]


@pytest.mark.slow
def test_single_measurements_and_provenance_are_kept(figures):
    made = json.loads((figures / "benchmarks.json").read_text())
    assert made["params"] == dict(threads=1, repeats=1, full=False)
    assert made["provenance"]["threads"] == 1 and made["provenance"]["versions"]["torch"]
    assert all(len(times) <= 3 for sides in made["samples"].values() for times in sides.values())
    table = pd.read_csv(figures / "benchmarks.csv")
    line = table.query("benchmark == 'loss time'").iloc[0]
    kept = made["samples"][f"loss time, {line.case}"]
    assert line.ours_value == pytest.approx(1e3 * kept["ours"][0])
    assert set(made["samples"]) >= {
        f"DAI step, width {width}, {precision}"
        for width in ("0.167", "0.0833", "0.0417")
        for precision in ("fp32", "bf16")
    }
