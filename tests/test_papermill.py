"The run notebooks through papermill, and the whole way from training to the report."

import json
import os
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import yaml

from dainv.runs import Run, load_runs

ROOT = Path(__file__).resolve().parents[1]


def papermill(*arguments, cwd):
    "Papermill with its output captured and nothing on standard input, as a script would call it."
    command = [sys.executable, "-m", "papermill", *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, stdin=subprocess.DEVNULL)


def options(params):
    return ["-y", json.dumps(params)]


def test_the_literal_line_trains_from_any_folder(tiny, folders):
    done = papermill(ROOT / "nbs/train.ipynb", "-p", "alpha", "0.1", *options(tiny), cwd=folders)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["metadata"]["papermill"]["exception"] is None
    runs = load_runs()
    assert runs.finished.tolist() == [True] and runs.alpha.tolist() == [0.1]
    again = subprocess.run(
        [
            sys.executable,
            "-m",
            "dainv",
            "train",
            *[t for k, v in tiny.items() for t in (f"--{k}", str(v))],
            "--alpha",
            "0.1",
        ],
        capture_output=True,
        text=True,
        check=True,
    )
    assert "finished already" in again.stdout, "the command line makes the same run as the notebook"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-p", "alhpa", "0.1"], "did you mean 'alpha'"),
        (["-p", "alpha", "x"], "'alpha': expected float"),
        (["-p", "exclude_last", "perhaps"], "write True or False"),
        (["-p", "lr", "1e-"], "'lr': expected float"),
        (["-p", "alpha", "1.5"], "alpha=1.5"),
    ],
)
def test_a_mistyped_parameter_fails(folders, arguments, message):
    done = papermill(ROOT / "nbs/train.ipynb", *arguments, cwd=folders)
    assert done.returncode == 1 and message in done.stderr
    assert not list((folders / "runs").iterdir())


def test_the_notebook_shows_help():
    done = papermill("--help-notebook", ROOT / "nbs/train.ipynb", cwd=ROOT)
    assert "alpha: float (default 0.1)" in done.stdout and "weight of the invariance to augmentation" in done.stdout


def run_workflow(folders, profile):
    "Snakemake on a profile of its own, twice: its figures, and what the second call said."
    (folders / "experiments.yaml").write_text(yaml.safe_dump({"check": profile}))
    snakemake = Path(sys.executable).parent / "snakemake"
    command = [snakemake, "--snakefile", ROOT / "Snakefile", "--directory", folders, "--cores", "2"]
    environment = {**os.environ, "DAINV_EXPERIMENTS": str(folders / "experiments.yaml")}
    how = dict(capture_output=True, text=True, env=environment, stdin=subprocess.DEVNULL)
    done = subprocess.run([*command, "--config", "profile=check"], **how)
    assert done.returncode == 0, done.stderr[-3000:]
    made = {file.name for file in (folders / "figures" / "check").iterdir()}
    for figure in profile["figures"]:
        assert {f"{figure}.{kind}" for kind in ("png", "pdf", "csv", "json")} <= made
        assert f"{figure}.png" in (folders / "figures" / "check" / "index.html").read_text()
    return subprocess.run([*command, "--config", "profile=check"], **how).stderr


@pytest.mark.slow
def test_from_training_to_the_report(tiny, folders):
    profile = {
        "common": tiny,
        "seeds": [0],
        "runs": {"m1": {"views": 1, "alpha": 0.0}, "m8": {"alpha": 0.0}, "dai": {"alpha": 0.1}},
        "measure": {"dai": {"timing_steps": 2, "repeats": 2}},
        "figures": {
            "dai_loss_dynamics": {"baseline": "m8", "dai": "dai"},
            "dai_score": {"baseline": "m1", "views": "m8", "dai": "dai"},
            "dai_time": {"dai": "dai"},
        },
    }
    assert "Nothing to be done" in run_workflow(folders, profile)
    scores = pd.read_parquet(Run.open("check/dai-s0").folder / "score.parquet")
    assert scores.groupby("layer", observed=True).size().tolist() == [32 * 2] * 10


@pytest.mark.slow
def test_invariance_instead_of_categorization_from_training_to_the_report(tiny, folders):
    models = {"baseline": "ce", "pure": "pure", "fisher": "fisher"}
    kinds = ("rdms", "pc1", "probes", "tsne", "cka", "attacks", "convergence")
    attacks = {"attack_images": 8, "attack_steps": 2, "attack_eps": [0.03]}
    pure = {"alpha": 0.1, "beta": 0.9, "exclude_last": False}
    fisher = {"metric": "fisher", "pool": True, "layers": ["conv9"], "linear_top": True}
    everything = {"what": ["representation", "probes", "attacks"], **attacks}
    profile = {
        "common": tiny,
        "seeds": [0],
        "runs": {"ce": {"alpha": 0.0, "linear_top": True}, "pure": pure, "fisher": {**pure, **fisher}},
        "measure": {"ce": everything, **{name: {**everything, "attack_source": "ce"} for name in ("pure", "fisher")}},
        "figures": {
            **{f"invariance_{kind}": models for kind in kinds},
            "invariance_pairs": {"baseline": "ce", "pure": "pure"},
            "invariance_pairs_matrix": {},
            "open_problem": {"ce": "ce", "fisher": "fisher", "pure": "pure"},
        },
        "pairs": {"epochs": 1, "attack_images": 8, "attack_steps": 2, "eps": 0.03},
    }
    assert "Nothing to be done" in run_workflow(folders, profile)
    folder = Run.open("check/fisher-s0").folder
    table = pd.read_csv(folder / "attacks.csv")
    assert {"self", "check/ce-s0"} == set(table.source) and table.accuracy.between(0, 1).all()
    assert pd.read_csv(folder / "masking.csv").tested.any()
    probes = pd.read_csv(folder / "probes.csv")
    assert set(probes.probe) == {"linear", "mlp"} and set(probes.layer) == {"conv8", "conv9"}
    problem = pd.read_csv(folders / "figures" / "check" / "open_problem.csv").set_index("role")
    assert problem.loc["ce", "difference"] == 0 and problem.loc["fisher", "paired"] == problem.loc["ce", "probe"]


@pytest.mark.slow
def test_encoders_from_a_common_start_to_the_report(folders):
    roles = {"plain": "plain", "gradient": "gradient"}
    priced = {"start": "start", "penalty_weight": 0.01}
    sizes = {"train_size": 128, "test_size": 60, "batch_size": 32, "epochs": 1, "measure_items": 20}
    quick = {"counts": [1, 2], "kind_counts": [1], "fractions": [1.0], "h_shifts": [0.5], "background_shifts": []}
    profile = {
        "encoders": {
            "common": {"profile": "quick", "width": 0.25, "device": "cpu", **sizes},
            "seeds": [3],
            "runs": {"start": {}, "plain": {"start": "start"}, "gradient": priced},
            "measure": {"common": {"passes": 2, "strengths": [0.5, 1.0], **quick}},
        },
        "figures": {"invclr_claims": roles, "invclr_variance": roles, "invclr_defects": {}},
    }
    assert "Nothing to be done" in run_workflow(folders, profile)
    plain, gradient = (Run.open(f"check/{name}-s3") for name in roles)
    assert plain.params["start"] == gradient.params["start"] == "check/start-s3"
    assert plain.log.step.tolist() == [8] and gradient.log.penalty.gt(0).all()
    claims = pd.read_csv(folders / "figures" / "check" / "invclr_claims.csv")
    ratio = claims.query("claim == 'conditional / total' and role == 'gradient'")["mean"].item()
    ours = [pd.read_csv(r.folder / "variance.csv").set_index("space").ratio["unit"] for r in (gradient, plain)]
    assert ratio == pytest.approx(ours[0] / ours[1])
