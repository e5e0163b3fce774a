"The notebook that evaluates a contrastive run: its tables, their columns, and what it refuses."

import json
import subprocess
import sys
from functools import partial
from pathlib import Path

import pandas as pd
import pytest
import torch

from dainv.pretraining import PretrainParams, pretrain
from dainv.runs import Run

NOTEBOOK = Path(__file__).resolve().parents[1] / "nbs" / "evaluate.ipynb"
COLUMNS = dict(
    variance="space conditional total ratio n_items n_passes",
    alpha="features name mse chance r2 strength",
    averaging="kind views metric task measured predicted fixed_head",
    ensembling="method views metric value",
    shifts="group kind shift refit metric task value",
    labels="fraction n_train subset metric value",
    downstream="method views metric task value",
)
SMALL = dict(passes=2, counts=[1, 2], kind_counts=[1, 2], fractions=[0.5, 1.0], subsets=1)


@pytest.fixture
def evaluate(execute):
    "A function that runs the notebook with these parameters."
    return partial(execute, "evaluate")


def tables(run):
    return {name: pd.read_csv(run.folder / f"{name}.csv") for name in COLUMNS if (run.folder / f"{name}.csv").exists()}


@pytest.fixture
def drawings(folders):
    torch.set_num_threads(1)
    sizes = dict(train_size=150, test_size=60, batch_size=32, epochs=1, measure_items=20)
    return pretrain(PretrainParams(name="drawings", profile="quick", width=0.25, device="cpu", **sizes))


@pytest.fixture
def photographs(blobs):
    torch.set_num_threads(1)
    data = dict(dataset="folder", data_root=blobs)
    sizes = dict(batch_size=32, epochs=1, measure_items=20)
    return pretrain(PretrainParams(name="photographs", profile="quick", width=0.25, device="cpu", **data, **sizes))


def test_drawings_get_every_table(drawings, evaluate):
    shifts = dict(h_shifts=[-0.5, 0.5], background_shifts=[0.0, 0.4])
    evaluate(run="drawings", **SMALL, **shifts, strengths=[0.0])
    found = tables(drawings)
    assert {name: list(table.columns) for name, table in found.items()} == {n: c.split() for n, c in COLUMNS.items()}
    assert not any(table.isna().any().any() for name, table in found.items() if name != "averaging")
    assert found["averaging"].groupby("kind").views.max().to_dict() == dict.fromkeys(
        ("all", "h", "colours", "fixed"), 2
    )
    assert set(found["averaging"].task) == {"mean", "m", "b", "sigma", "rfore"}
    moved = found["shifts"][["group", "kind", "shift"]].drop_duplicates()
    assert len(moved) == 9 and set(moved.kind) == {"mean", "spread", "strength"}
    assert set(found["variance"].space) == {"unit", "raw", "projected"}
    measured = json.loads((drawings.folder / "measured.json").read_text())
    assert measured["n_train"] == 150 and measured["kinds"] == ["all", "h", "colours", "fixed"]


def test_the_tables_agree_where_they_overlap(drawings, evaluate):
    evaluate(run="drawings", **SMALL, h_shifts=[0.0], background_shifts=[], strengths=[1.0])
    found = tables(drawings)
    single = found["downstream"].query("method == 'single' and task == 'mean'").value.item()
    assert found["averaging"].query("kind == 'all' and views == 1 and task == 'mean'").measured.item() == single
    for value in (
        found["ensembling"].query("method == 'averaging' and views == 1").value,
        found["labels"].query("fraction == 1").value,
        found["shifts"].query("task == 'mean'").value,
    ):
        assert value.to_numpy() == pytest.approx(single, rel=1e-9)


def test_photographs_get_every_table(photographs, evaluate):
    evaluate(run="photographs", **SMALL, strengths=[0.0, 0.5], colour_shifts=[0.25])
    found = tables(photographs)
    assert {name: list(table.columns) for name, table in found.items()} == {n: c.split() for n, c in COLUMNS.items()}
    assert set(found["averaging"].kind) == {"all", "differentiable", "none"}
    moved = found["shifts"].groupby("kind")["shift"].unique().map(sorted).to_dict()
    assert moved == {"mean": [0.25], "strength": [0.0, 0.5]} and set(found["shifts"].group) == {"colour"}
    plain = found["downstream"].query("method == 'untransformed'").set_index("metric").value
    of_all = found["labels"].query("fraction == 1").set_index("metric").value
    assert plain["accuracy"] == of_all["accuracy"]
    none = found["averaging"].query("kind == 'none' and views == 1").set_index("metric").measured
    assert none["accuracy"] == plain["accuracy"]


def test_a_part_can_be_asked_for(drawings, evaluate):
    evaluate(run="drawings", what=["variance", "downstream"], train_items=100, test_items=30, **SMALL)
    found = tables(drawings)
    assert set(found) == {"variance", "downstream"} and set(found["variance"].n_items) == {30}
    assert set(found["downstream"].method) == {"single", "averaged"}
    measured = json.loads((drawings.folder / "measured.json").read_text())
    assert (measured["n_train"], measured["n_test"]) == (100, 30)


def test_a_second_evaluation_leaves_the_record_of_the_other_tables(drawings, evaluate):
    small = {**SMALL, "passes": 3}
    evaluate(run="drawings", what=["variance", "labels"], **SMALL)
    evaluate(run="drawings", what=["variance"], test_items=30, seed=1, **small)
    measured = json.loads((drawings.folder / "measured.json").read_text())
    assert measured["what"] == ["variance"] and (measured["n_test"], measured["seed"]) == (30, 1)
    of_each = measured["tables"]
    assert set(of_each) == {"variance", "labels"}
    assert [of_each["variance"][key] for key in ("n_test", "seed", "passes")] == [30, 1, 3]
    assert [of_each["labels"][key] for key in ("n_test", "seed", "passes")] == [60, 0, 2]


def test_photographs_are_ensembled_in_small_numbers(photographs, evaluate):
    "As many copies as there are passes would fill the memory."
    counts = {**SMALL, "counts": [1, 2, 6]}
    evaluate(run="photographs", what=["ensembling"], **counts)
    found = tables(photographs)["ensembling"]
    assert found.groupby("method").views.unique().map(list).to_dict() == {"averaging": [1, 2, 6], "ensembling": [1, 2]}
    evaluate(run="photographs", what=["ensembling"], ensemble_counts=[3], **counts)
    assert tables(photographs)["ensembling"].query("method == 'ensembling'").views.unique() == [3]


def test_the_usual_head_of_photographs_is_that_of_their_usual_colours(photographs, evaluate):
    "At the strength of training nothing has shifted, so both heads are the same."
    evaluate(run="photographs", what=["shifts"], **SMALL, strengths=[0.0, 0.5], colour_shifts=[])
    value = tables(photographs)["shifts"].set_index(["shift", "refit", "metric"]).value
    for metric in ("accuracy", "cross_entropy"):
        assert value[0.5, True, metric] == value[0.5, False, metric]
    assert value[0.0, True, "cross_entropy"] != value[0.0, False, "cross_entropy"]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (dict(what=["variances"]), r"parameter what=\['variances'\]: expected a list out of"),
        (dict(kinds=["shape"]), r"parameter kinds=\['shape'\]: expected"),
        (dict(kinds=["none"]), "parameter kinds: 'none' is unknown; these data know all, h"),
        (dict(counts=[2, 1]), "counts="),
        (dict(fractions=[0.0]), r"fractions=\[0.0\]"),
        (dict(background_shifts=[-9.0]), "leaves no interval of "),
        (dict(passses=3), "did you mean 'passes'"),
        (dict(train_items=1.5), "'train_items': expected int"),
    ],
)
def test_a_mistake_is_named_and_nothing_counts_as_measured(drawings, evaluate, values, message):
    with pytest.raises(ValueError, match=message):
        evaluate(run="drawings", **{**SMALL, **values})
    assert not (drawings.folder / "measured.json").exists()


@pytest.mark.slow
def test_papermill_evaluates_from_any_folder(drawings, folders):
    asked = ["-r", "run", "drawings", "-y", json.dumps(dict(what=["variance"], passes=2, test_items=20))]
    command = [sys.executable, "-m", "papermill", NOTEBOOK, "-", *asked]
    done = subprocess.run(command, cwd=folders, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, done.stderr
    assert set(tables(Run.open("drawings"))) == {"variance"} and (drawings.folder / "measured.json").exists()
