"""The figures: their statistics against matplotlib's and scipy's, their files, and the notebooks that draw them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from fake_runs import FIGURES, write_project
from matplotlib.cbook import boxplot_stats
from scipy import stats

from dainv import plots
from dainv.runs import figure_runs

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = ROOT / "nbs" / "figures"


def draw(notebook: str, profile: str) -> dict:
    """Names left by the cells of a figure notebook, run in this process with another profile."""
    namespace = {}
    for cell in json.loads((NOTEBOOKS / f"{notebook}.ipynb").read_text())["cells"]:
        if cell["cell_type"] == "code":
            exec("".join(cell["source"]), namespace)
            if "parameters" in cell["metadata"].get("tags", []):
                namespace["profile"] = profile
    plt.close("all")
    return namespace


def point_to(root: Path, monkeypatch, **project) -> Path:
    for name, value in write_project(root, **project).items():
        monkeypatch.setenv(name, value)
    return root / "figures"


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """The figures folder of a made-up project, every notebook run on profile quick (three seeds) and paper (one)."""
    root = tmp_path_factory.mktemp("project")
    with pytest.MonkeyPatch.context() as patch:
        point_to(root, patch, profile="quick")
        figures = point_to(root, patch, profile="paper", seeds=(4,), epochs=350, title="CIFAR-10")
        for profile in ("quick", "paper"):
            for notebook in (*FIGURES, "report"):
                draw(notebook, profile)
    return figures


@pytest.mark.parametrize("n", [5, 40, 1000])
def test_box_statistics_are_those_of_matplotlib(n):
    values = np.random.default_rng(n).standard_t(2, n)
    ours = plots.box_statistics(pd.DataFrame(dict(layer="input", score=values))).iloc[0]
    theirs = boxplot_stats(values)[0]
    names = dict(q1="q1", med="median", q3="q3", whislo="whisker_low", whishi="whisker_high", cilo="notch_low")
    for theirs_name, our_name in {**names, "cihi": "notch_high"}.items():
        assert ours[our_name] == pytest.approx(theirs[theirs_name], abs=1e-12), our_name


def test_box_statistics_of_constant_and_single_values():
    flat = plots.box_statistics(pd.DataFrame(dict(layer="input", score=[0.5] * 7))).iloc[0]
    assert flat.whisker_low == flat.q1 == flat["median"] == flat.q3 == flat.whisker_high == 0.5
    assert plots.box_statistics(pd.DataFrame(dict(layer="a", score=[0.3]))).loc[0, "n"] == 1


def test_boxes_stand_side_by_side_in_the_paper_colours():
    layers = ["input", "conv1"]
    rows = [
        dict(role=r, label=r, layer=x, score=s) for r in ("baseline", "dai") for x in layers for s in (0.1, 0.5, 0.6)
    ]
    fig = plots.score_boxes(pd.DataFrame(rows))
    colours = [matplotlib.colors.to_hex(p.get_facecolor()).upper() for p in fig.axes[0].patches]
    assert colours == ["#BA611B"] * 2 + ["#38637B"] * 2
    middles = [p.get_path().vertices[:, 0].mean() for p in fig.axes[0].patches]
    assert middles[0] < 0 < middles[2] < 0.5 < middles[1] < 1 < middles[3]
    plt.close(fig)


def test_boxes_do_not_depend_on_the_order_of_rows_within_a_layer():
    scores = pd.DataFrame(dict(layer=["input"] * 50 + ["conv1"] * 50, score=np.random.default_rng(0).random(100)))
    mixed = pd.concat([part.sample(frac=1, random_state=1) for _, part in scores.groupby("layer", sort=False)])
    pd.testing.assert_frame_equal(plots.box_statistics(scores), plots.box_statistics(mixed))


def test_layers_keep_their_order_of_appearance_as_text_and_as_category():
    scores = pd.DataFrame(dict(role="dai", layer=["input", "conv10", "conv2"] * 4, score=np.arange(12.0)))
    categories = scores.assign(layer=scores["layer"].astype("category"))
    for table in (scores, categories):
        assert plots.box_statistics(table)["layer"].tolist() == ["input", "conv10", "conv2"]


@pytest.mark.parametrize("n", [2, 3, 10, 31, 200])
def test_seed_interval_is_students(n):
    values = np.random.default_rng(n).normal(3, 2, n)
    ours = plots.seed_intervals(pd.DataFrame(dict(label="a", value=values)), ["label"]).iloc[0]
    low, high = stats.t.interval(0.95, n - 1, values.mean(), stats.sem(values))
    # beyond the table the normal quantile stands in: at most 4 % too narrow
    assert ours.n == n and ours["mean"] == pytest.approx(values.mean())
    assert ours.high - ours.low == pytest.approx(high - low, rel=1e-3 if n <= 31 else 0.04)


def test_one_seed_has_no_interval():
    one = plots.seed_intervals(pd.DataFrame(dict(label=["a"], value=[1.0])), ["label"]).iloc[0]
    assert one["mean"] == 1 and np.isnan(one.low) and np.isnan(one.high) and one.n == 1


@pytest.mark.parametrize("epochs", [1, 2, 3, 7, 15, 30, 60, 200, 350, 1000])
def test_epoch_ticks_fit_and_end_at_the_last_epoch(epochs):
    ticks = plots.epoch_ticks(epochs)
    assert ticks[-1] == epochs and ticks == sorted(set(ticks)) and ticks[0] >= 1
    assert np.diff(np.sqrt(ticks)).min(initial=np.inf) >= 0.07 * np.sqrt(epochs)


def test_layer_losses_average_over_seeds_and_skip_unmeasured_layers():
    log = pd.DataFrame(
        dict(epoch=[1, 2, 1, 2], loss=9.0, invariance_conv1=[0.2, 0.4, 0.4, 0.8], invariance_conv2=np.nan)
    )
    table = plots.layer_losses(log)
    assert table["layer"].tolist() == ["conv1", "conv1"] and table["n"].tolist() == [2, 2]
    assert table["loss"].tolist() == pytest.approx([0.3, 0.6]) and table["highest"].tolist() == [0.4, 0.8]


def test_heatmap_shows_the_losses_at_their_epochs():
    log = pd.DataFrame(dict(epoch=[1, 2, 3], invariance_conv1=[0.1, 0.2, 0.3], invariance_conv2=[0.4, 0.5, 0.6]))
    fig = plots.loss_heatmaps({"a": log, "b": log})
    mesh = fig.axes[1].collections[0]
    assert np.allclose(mesh.get_array(), [[0.1, 0.2, 0.3], [0.4, 0.5, 0.6]])
    assert np.allclose(mesh.get_coordinates()[0, :, 0] ** 2, [0.5, 1.5, 2.5, 3.5])
    # both panels share an axis that is turned upside down once, not twice
    assert all(ax.yaxis_inverted() for ax in fig.axes[:2])
    plt.close(fig)


def test_style_is_restored_even_after_an_error():
    before = dict(plt.rcParams)
    with pytest.raises(KeyError), plots.use_style():
        assert plt.rcParams["pdf.fonttype"] == 42
        raise KeyError
    plt.close(plots.score_boxes(pd.DataFrame(dict(layer="input", score=[0.1, 0.2, 0.3]))))
    assert dict(plt.rcParams) == before


@pytest.mark.parametrize("profile", ["quick", "paper"])
@pytest.mark.parametrize("name", FIGURES)
def test_figure_has_four_files_and_its_origin(drawn, profile, name):
    folder = drawn / profile
    record = json.loads((folder / f"{name}.json").read_text())
    assert (folder / f"{name}.png").read_bytes()[:4] == b"\x89PNG"
    assert (folder / f"{name}.pdf").read_bytes()[:5] == b"%PDF-"
    assert len(pd.read_csv(folder / f"{name}.csv")) > 0
    title = dict(quick="spirograph classes", paper="CIFAR-10")[profile]
    assert title in record["caption"] and f"Profile: {profile}" in record["caption"]
    assert ("protocol of this profile differs" in record["caption"]) == (profile == "quick")
    assert record["data"] == [dict(title=title, fingerprint="5f0e2c11", n_train=6000, n_test=1000)]
    assert all(run["name"].startswith(profile) and run["params"]["batch_size"] == 128 for run in record["runs"])
    assert {run["role"] for run in record["runs"]} == set(FIGURES[name])
    assert "commit" in record["drawn_with"] and record["options"]


def test_score_csv_pools_for_the_box_and_keeps_seeds_apart(drawn):
    table = pd.read_csv(drawn / "quick" / "dai_score.csv")
    assert len(table) == 30 and (table["n"] == 3 * 1000).all() and (table["seeds"] == 3).all()
    assert (table["median_low"] < table["median_high"]).all()
    single = pd.read_csv(drawn / "paper" / "dai_score.csv")
    assert single["median_low"].isna().all() and np.allclose(single["median"], single["median_mean"])


def test_time_ratio_is_taken_within_a_repetition(drawn):
    table = pd.read_csv(drawn / "paper" / "dai_time.csv").query("quantity == 'step time, DAI / baseline'")
    # the made-up times share a slow-down of 5 % per repetition and differ by 1 % otherwise
    assert table["median"].tolist() == pytest.approx([0.063 / 0.0602, 0.063 / 0.060], abs=0.01)
    assert (table["q3"] - table["q1"]).max() < 0.04


def test_published_median_is_marked_only_on_the_paper_s_data(monkeypatch, tmp_path):
    point_to(tmp_path, monkeypatch, profile="quick", seeds=(0,))
    point_to(tmp_path, monkeypatch, profile="paper", seeds=(0,), title="CIFAR-10")
    marks = {profile: len(draw("dai_score", profile)["fig"].axes[0].collections) for profile in ("quick", "paper")}
    assert marks == dict(quick=0, paper=1)


def test_missing_run_and_missing_table_are_named(monkeypatch, tmp_path):
    point_to(tmp_path, monkeypatch, seeds=(0,))
    (tmp_path / "runs/quick/allcnn_dai-s0/score.parquet").unlink()
    with pytest.raises(FileNotFoundError, match="score.parquet.*measure"):
        draw("dai_score", "quick")
    (tmp_path / "runs/quick/allcnn_dai-s0/timing.csv").unlink()
    with pytest.raises(FileNotFoundError, match="timing"):
        draw("dai_time", "quick")
    (tmp_path / "runs/quick/allcnn_baseline-s0/params.json").unlink()
    with pytest.raises(FileNotFoundError, match="allcnn_baseline-s0"):
        draw("dai_accuracy", "quick")


def test_an_unfinished_run_is_not_drawn(monkeypatch, tmp_path):
    figures = point_to(tmp_path, monkeypatch, seeds=(0,))
    (tmp_path / "runs/quick/allcnn_dai-s0/result.json").unlink()
    with pytest.raises(FileNotFoundError, match="has not finished"):
        draw("dai_accuracy", "quick")
    assert not (figures / "quick" / "dai_accuracy.png").exists()


def test_save_figure_refuses_a_caption_without_profile(monkeypatch, tmp_path):
    point_to(tmp_path, monkeypatch, seeds=(0,))
    fig = plots.score_boxes(table := pd.DataFrame(dict(layer="input", score=[0.1, 0.2])))
    with pytest.raises(ValueError, match="caption"):
        plots.save_figure(fig, "x", "quick", table, "some figure", figure_runs("quick", "dai_time"))
    plt.close(fig)


SAVE = """
import matplotlib; matplotlib.use("Agg")
import sys, hashlib
sys.path.insert(0, "tests")
from pathlib import Path
import pandas as pd
from fake_runs import log, samples
import numpy as np
from dainv import plots
from dainv.runs import figure_runs
rng = np.random.default_rng(0)
table = log("dai", rng, 20)
runs = figure_runs("quick", "dai_loss_dynamics")
fig = plots.loss_heatmaps({"a": table, "b": table})
paths = plots.save_figure(fig, "same", "quick", table, plots.caption_of("Same.", "quick", runs), runs)
print({kind: hashlib.sha256(path.read_bytes()).hexdigest() for kind, path in paths.items()})
"""


def test_files_are_the_same_bytes_in_another_process(monkeypatch, tmp_path):
    point_to(tmp_path, monkeypatch, seeds=(0,))
    found = []
    for hash_seed in ("1", "2"):
        env = {**os.environ, "PYTHONHASHSEED": hash_seed}
        done = subprocess.run([sys.executable, "-c", SAVE], cwd=ROOT, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        found.append(done.stdout)
    assert found[0] == found[1]


def test_no_temporary_file_is_left(drawn):
    suffixes = {path.suffix for path in (drawn / "quick").iterdir()}
    assert suffixes == {".png", ".pdf", ".csv", ".json", ".html"}
    assert not [path for path in drawn.rglob("*") if ".tmp" in path.name]


@pytest.mark.slow
def test_papermill_draws_and_refuses_a_misspelt_parameter(monkeypatch, tmp_path):
    papermill = pytest.importorskip("papermill")
    figures = point_to(tmp_path, monkeypatch, seeds=(0,))
    source = str(NOTEBOOKS / "dai_time.ipynb")
    papermill.execute_notebook(source, None, dict(profile="quick"), kernel_name="python3", progress_bar=False)
    assert (figures / "quick" / "dai_time.png").exists()
    with pytest.raises(papermill.PapermillExecutionError, match="did you mean 'profile'"):
        papermill.execute_notebook(source, None, dict(profil="quick"), kernel_name="python3", progress_bar=False)
