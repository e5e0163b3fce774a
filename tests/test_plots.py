"""The figures: their statistics against matplotlib's and scipy's, their files, and the notebooks that draw them."""

import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import papermill
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.cbook import boxplot_stats
from scipy import stats

from dainv import attack_plots, layer_plots, plots, representation_plots
from dainv.figure import figure_spec, figure_specs
from dainv.files import read_json
from dainv.jobs import run_notebook

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = ROOT / "nbs" / "figures"


SPECS = {name: spec for name, spec in figure_specs().items() if spec.paper != "invclr" and spec.needs}
NAMES = [name for name in SPECS if not name.startswith("invariance_pairs")]  # these are in test_pairs.py


@pytest.fixture(scope="module")
def as_published(networks, tmp_path_factory):
    "The same runs as a suite that follows the published protocol."
    return networks.under(tmp_path_factory.mktemp("as_published"), "paper")


@pytest.mark.parametrize("n", [5, 40, 1000])
def test_box_statistics_are_those_of_matplotlib(n):
    values = np.random.default_rng(n).standard_t(2, n)
    ours = layer_plots.box_statistics(pd.DataFrame(dict(layer="input", score=values))).iloc[0]
    theirs = boxplot_stats(values)[0]
    names = dict(q1="q1", med="median", q3="q3", whislo="whisker_low", whishi="whisker_high", cilo="notch_low")
    for theirs_name, our_name in {**names, "cihi": "notch_high"}.items():
        assert ours[our_name] == pytest.approx(theirs[theirs_name], abs=1e-12), our_name


def test_box_statistics_of_constant_and_single_values():
    flat = layer_plots.box_statistics(pd.DataFrame(dict(layer="input", score=[0.5] * 7))).iloc[0]
    assert flat.whisker_low == flat.q1 == flat["median"] == flat.q3 == flat.whisker_high == 0.5
    assert layer_plots.box_statistics(pd.DataFrame(dict(layer="a", score=[0.3]))).loc[0, "n"] == 1


def test_boxes_stand_side_by_side_in_the_paper_colours():
    layers = ["input", "conv1"]
    rows = [
        dict(role=r, label=r, layer=x, score=s) for r in ("baseline", "dai") for x in layers for s in (0.1, 0.5, 0.6)
    ]
    fig = layer_plots.score_boxes(pd.DataFrame(rows))
    colours = [matplotlib.colors.to_hex(p.get_facecolor()).upper() for p in fig.axes[0].patches]
    assert colours == ["#BA611B"] * 2 + ["#38637B"] * 2
    middles = [p.get_path().vertices[:, 0].mean() for p in fig.axes[0].patches]
    assert middles[0] < 0 < middles[2] < 0.5 < middles[1] < 1 < middles[3]
    plt.close(fig)


def test_boxes_do_not_depend_on_the_order_of_rows_within_a_layer():
    scores = pd.DataFrame(dict(layer=["input"] * 50 + ["conv1"] * 50, score=np.random.default_rng(0).random(100)))
    mixed = pd.concat([part.sample(frac=1, random_state=1) for _, part in scores.groupby("layer", sort=False)])
    pd.testing.assert_frame_equal(layer_plots.box_statistics(scores), layer_plots.box_statistics(mixed))


def test_layers_keep_their_order_of_appearance_as_text_and_as_category():
    scores = pd.DataFrame(dict(role="dai", layer=["input", "conv10", "conv2"] * 4, score=np.arange(12.0)))
    categories = scores.assign(layer=scores["layer"].astype("category"))
    for table in (scores, categories):
        assert layer_plots.box_statistics(table)["layer"].tolist() == ["input", "conv10", "conv2"]


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
    ticks = layer_plots.epoch_ticks(epochs)
    assert ticks[-1] == epochs and ticks == sorted(set(ticks)) and ticks[0] >= 1
    assert np.diff(np.sqrt(ticks)).min(initial=np.inf) >= 0.07 * np.sqrt(epochs)


def test_layer_losses_average_over_seeds_and_skip_unmeasured_layers():
    log = pd.DataFrame(
        dict(epoch=[1, 2, 1, 2], loss=9.0, invariance_conv1=[0.2, 0.4, 0.4, 0.8], invariance_conv2=np.nan)
    )
    table = layer_plots.layer_losses(log)
    assert table["layer"].tolist() == ["conv1", "conv1"] and table["n"].tolist() == [2, 2]
    assert table["loss"].tolist() == pytest.approx([0.3, 0.6]) and table["highest"].tolist() == [0.4, 0.8]


def test_heatmap_shows_the_losses_at_their_epochs():
    log = pd.DataFrame(dict(epoch=[1, 2, 3], invariance_conv1=[0.1, 0.2, 0.3], invariance_conv2=[0.4, 0.5, 0.6]))
    fig = layer_plots.loss_heatmaps({"a": log, "b": log})
    mesh = fig.axes[1].collections[0]
    assert np.allclose(mesh.get_array(), [[0.1, 0.2, 0.3], [0.4, 0.5, 0.6]])
    assert np.allclose(mesh.get_coordinates()[0, :, 0] ** 2, [0.5, 1.5, 2.5, 3.5])
    # both panels share an axis that is turned upside down once, not twice
    assert all(ax.yaxis_inverted() for ax in fig.axes[:2])
    plt.close(fig)


def test_colours_stay_apart_for_every_reader():
    # Machado, Oliveira and Fernandes (2009): full loss of the red or green receptors, in linear RGB
    green = [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]]
    red = [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]]
    to_xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])

    def lab(linear):
        relative = to_xyz @ linear.clip(0, 1) / [0.9505, 1, 1.089]
        f = np.where(relative > 0.008856, np.cbrt(relative), 7.787 * relative + 16 / 116)
        return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])

    # the roles with markers are those of the contrastive networks; no figure mixes them with the others
    sets = [plots.MARKERS, plots.COLOURS.keys() - plots.MARKERS]
    assert sum(map(len, sets)) == len(plots.COLOURS) and len(set(plots.MARKERS.values())) == len(plots.MARKERS)
    for roles in sets:
        rgb = [np.array(matplotlib.colors.to_rgb(plots.COLOURS[role])) for role in roles]
        linear = [np.where(c <= 0.04045, c / 12.92, ((c + 0.055) / 1.055) ** 2.4) for c in rgb]
        for eye in (np.eye(3), np.array(green), np.array(red)):
            seen = [lab(eye @ colour) for colour in linear]
            assert min(np.linalg.norm(a - b) for k, a in enumerate(seen) for b in seen[:k]) > 20


def test_class_losses_have_a_prefix_of_their_own():
    log = pd.DataFrame(dict(epoch=[1, 2], invariance_conv1=[0.1, 0.2], class_invariance_conv1=[1.1, 1.2]))
    assert layer_plots.layer_losses(log)["loss"].tolist() == [0.1, 0.2]
    assert layer_plots.layer_losses(log, "class_invariance_")["loss"].tolist() == [1.1, 1.2]
    with pytest.raises(ValueError, match="class_invariance_<layer>"):
        layer_plots.layer_losses(log.drop(columns="class_invariance_conv1"), "class_invariance_")


def test_loss_grid_keeps_layers_in_line_where_a_loss_is_missing():
    layers = ("conv1", "conv2", "conv3")
    whole = pd.DataFrame(dict(epoch=[1, 2], **{f"a_{layer}": [0.5, 1.23] for layer in layers}))
    part = whole.assign(a_conv1=np.nan, a_conv2=np.nan, b_conv2=[0.1, 0.2])
    fig = layer_plots.loss_grid({"whole": whole, "part": part}, {"a_": "one", "b_": "other"})
    meshes = [ax.collections[0] if ax.collections else None for ax in fig.axes[:4]]
    assert [m is None for m in meshes] == [False, True, False, False]
    assert meshes[0].get_clim()[1] == pytest.approx(1.3) and fig.axes[1].texts[0].get_text() == "not measured"
    rows = [np.ma.getmaskarray(m.get_array()).all(1).tolist() for m in meshes if m is not None]
    assert rows == [[False] * 3, [True, True, False], [True, False, True]]
    with pytest.raises(ValueError, match="b_.*with values"):
        layer_plots.loss_grid({"whole": whole}, {"b_": "other"})
    plt.close("all")


@settings(deadline=None, max_examples=30)
@given(sizes=st.lists(st.integers(2, 12), min_size=2, max_size=6), seed=st.integers(0, 99))
def test_block_means_are_those_of_the_pairs(sizes, seed):
    labels = np.repeat(np.arange(len(sizes)), sizes)
    half = np.random.default_rng(seed).random((len(labels), len(labels)))
    matrix = np.triu(half, 1) + np.triu(half, 1).T
    blocks = representation_plots.block_means(matrix, labels)
    assert blocks["pairs"].sum() == len(labels) * (len(labels) - 1)
    others = ~np.eye(len(labels), dtype=bool)
    for row in blocks.itertuples():
        inside = (labels[:, None] == row.first) & (labels == row.second) & others
        assert row.mean == pytest.approx(matrix[inside].mean()) and row.pairs == inside.sum()


def test_drawn_cells_never_cross_the_border_of_a_class():
    labels = np.repeat([3, 1], [80, 120])
    matrix = (labels[:, None] != labels).astype(float)
    drawn = representation_plots.averaged_in_classes(matrix, labels, cells=10)
    # 40 divides both classes but leaves 5 cells; 20 leaves 10
    assert drawn.shape == (10, 10) and set(np.unique(drawn)) == {0.0, 1.0}
    assert representation_plots.class_blocks(labels) == {3: (0, 80), 1: (80, 200)}
    assert representation_plots.averaged_in_classes(matrix[:-1, :-1], labels[:-1], cells=10).shape == (199, 199)


def test_matrices_have_their_own_scales_and_class_names():
    labels = np.repeat(np.arange(3), 4)
    matrix = (labels[:, None] != labels) + 0.0
    fig = representation_plots.rdm_panels({"a": matrix, "b": 50 * matrix}, labels, ["x", "y", "z"], notes={"b": "far"})
    images = [ax.images[0] for ax in fig.axes[:2]]
    assert [image.get_clim() for image in images] == [(0, 1), (0, 50)]
    assert [t.get_text() for t in fig.axes[0].get_yticklabels()] == ["x", "y", "z"]
    assert [ax.get_xlabel() for ax in fig.axes[:2]] == ["", "far"]
    # a collapsed layer, in which all images coincide, can be drawn, too
    representation_plots.rdm_panels({"flat": 0 * matrix}, labels, ["x", "y", "z"])
    plt.close("all")


def test_strengths_stand_on_a_logarithmic_axis_with_zero_at_its_left():
    places, ticks = attack_plots.strength_places([0.3, 0, 0.003, 0.03, 0.03])
    assert list(places) == [0, 0.003, 0.03, 0.3] and np.diff(list(places.values())) == pytest.approx([1, 1, 1])
    assert list(ticks.values()) == ["0", "0.003", "0.03", "0.3"]
    assert len(attack_plots.strength_places([0])[0]) == 1 and 0 not in attack_plots.strength_places([0.1])[0]


def test_the_strongest_attack_of_a_series_counts_run_by_run():
    row = dict(
        role="a", label="a", victim="self", attack="pgd", loss="cross_entropy", label_kind="predictions", eps=0.1
    )
    rows = [row | dict(seed=s, steps=40, restarts=1, source=o, accuracy=a) for s, o, a in TRANSFER]
    rows += [row | dict(seed=0, steps=200, restarts=1, source="self", accuracy=0.3)]
    rows += [row | dict(seed=0, steps=40, restarts=1, source="self", accuracy=0.0, victim="another")]
    rows += [row | dict(seed=0, steps=40, restarts=1, source="self", accuracy=0.1, label_kind="truth")]
    found = attack_plots.strongest(attack_plots.attack_series(pd.DataFrame(rows))).set_index(["series", "seed"])[
        "accuracy"
    ]
    assert found.to_dict() == {
        ("PGD", 0): 0.5,
        ("PGD", 1): 0.6,
        ("PGD, transfer", 0): 0.7,
        ("PGD, transfer", 1): 0.4,
        ("PGD, more steps", 0): 0.3,
    }


TRANSFER = [(0, "self", 0.5), (1, "self", 0.6), (0, "x", 0.7), (0, "y", 0.8), (1, "x", 0.9), (1, "y", 0.4)]


@pytest.mark.parametrize("n", [1, 3, 5])
def test_line_plot_has_a_legend_only_where_it_tells_something(n):
    table = pd.DataFrame(dict(role="pure", label="pure", x=[0, 1], mean=[0.1, 0.2], low=np.nan, high=np.nan))
    fig = plots.line_plot([plots.Lines(str(k), "x", "y", table) for k in range(n)])
    assert not fig.legends and sum(ax.axison for ax in fig.axes) == n
    both = pd.concat([table, table.assign(role="mixed", label="mixed", series="b")]).fillna({"series": "a"})
    fig = plots.line_plot([plots.Lines("", "x", "y", both)], styles=dict(a={}, b=dict(linestyle="--"), c={}))
    assert [t.get_text() for t in fig.legends[0].get_texts()] == ["pure", "mixed", "a", "b"]
    assert [line.get_linestyle() for line in fig.axes[0].lines] == ["-", "--"]
    plt.close("all")


def test_a_table_shows_every_number_and_only_real_intervals():
    rows = [("a", "x", 1.25, 1.0, 1.5), ("a", "y", 2.0, np.nan, np.nan), ("b", "x", np.nan, np.nan, np.nan)]
    table = pd.DataFrame(rows, columns=["label", "column", "mean", "low", "high"]).assign(role="pure")
    texts = [t.get_text() for t in plots.number_table(table, digits=2).axes[0].texts]
    assert texts == ["x", "y", "a", "b", "1.25", "[1.00, 1.50]", "2.00", "–"]
    plt.close("all")


def test_style_is_restored_even_after_an_error():
    before = dict(plt.rcParams)
    with pytest.raises(KeyError), plots.use_style():
        assert plt.rcParams["pdf.fonttype"] == 42
        raise KeyError
    plt.close(layer_plots.score_boxes(pd.DataFrame(dict(layer="input", score=[0.1, 0.2, 0.3]))))
    assert dict(plt.rcParams) == before


@pytest.mark.parametrize("published", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_figure_has_four_files_and_its_origin(networks, as_published, published, name):
    suite = as_published if published else networks
    table, record = suite.shown(name)
    paths = {kind: suite.figures / f"{name}.{kind}" for kind in ("png", "pdf")}
    assert paths["png"].read_bytes()[:4] == b"\x89PNG" and paths["pdf"].read_bytes()[:5] == b"%PDF-"
    assert paths["png"].stat().st_size < 300_000 and paths["pdf"].stat().st_size < 500_000
    assert len(table) and record["title"] == SPECS[name].title and record["options"]
    assert "CIFAR-10 (120 training images)" in record["caption"] and f"Suite: {suite.name}" in record["caption"]
    warned = bool(SPECS[name].paper) and not (published or SPECS[name].same_protocol)
    assert ("protocol of this suite differs" in record["caption"]) == warned
    fingerprint = read_json(networks.runs / "m8-s0" / "result.json")["data"]["fingerprint"]
    assert record["data"] == [dict(title="CIFAR-10", fingerprint=fingerprint, n_train=120, n_test=80)]
    assert all(run["name"].startswith(suite.name) and run["params"]["batch_size"] == 16 for run in record["runs"])
    assert list(dict.fromkeys(run["role"] for run in record["runs"])) == list(networks.section["figures"][name])
    assert "commit" in record["drawn_with"] and not list(suite.root.rglob("figures/**/*.tmp*"))


def test_every_figure_has_a_notebook_of_its_name_and_a_test(networks, pairs_of_classes):
    assert [
        path.stem for path in NOTEBOOKS.glob("*.ipynb") if figure_spec(path) and figure_spec(path).name != path.stem
    ] == []
    drawn = {*networks.section["figures"], *pairs_of_classes.section["figures"]}
    assert drawn == set(SPECS), "every figure of the first two papers is drawn by some test"


@pytest.mark.parametrize("roles", [["pure"], ["fisher", "baseline"]])
def test_any_roles_can_be_drawn_in_any_order(networks, tmp_path, roles):
    invariance = [name for name in NAMES if name.startswith("invariance")]
    names = invariance if len(roles) > 1 else ["invariance_rdms", "invariance_probes", "invariance_attacks"]
    wanted = {name: {role: networks.section["figures"][name][role] for role in roles} for name in names}
    few = networks.under(tmp_path / "few", "small", figures=wanted)
    for name in wanted:
        assert list(dict.fromkeys(run["role"] for run in few.shown(name)[1]["runs"])) == roles


def test_rdm_table_has_the_contrasts_of_every_seed(networks):
    table, record = networks.shown("invariance_rdms")
    contrasts = table[table["quantity"] == "contrast"].set_index(["role", "seed", "groups"])
    assert contrasts.groupby("role").size().to_dict() == dict(baseline=4, mixed=2, pure=4, fisher=2)
    measured = read_json(networks.runs / "pure-s1" / "rdm.json")["contrast"]
    for kind, groups in {"class": "classes", "animate": "animate / inanimate"}.items():
        row = contrasts.loc[("pure", 1, groups)]
        assert (row["ratio"], row["p_value"]) == pytest.approx((measured[kind]["ratio"], measured[kind]["p_value"]))
    pairs = table[table["quantity"] == "class pair"]
    assert len(pairs) == 6 * 10**2 and pairs["first"].nunique() == 10
    assert "seed 0" in record["caption"] and record["options"]["metric"] == "msd"


def test_shares_of_the_first_component_stand_beside_the_published(networks):
    table, record = networks.shown("invariance_pc1")
    rows = {row["role"]: row for row in record["published"] if row["kind"] == "full"}
    assert {role: row["published"] for role, row in rows.items()} == dict(baseline=0.085, mixed=0.743, pure=0.996)
    top = table.query("layer == 'conv9' and kind == 'full' and quantity == 'pc1_share'").set_index("role")
    shares = [
        networks.table(f"pure-s{seed}", "representation.csv")
        .query("layer == 'conv9' and kind == 'full'")["pc1_share"]
        .item()
        for seed in (0, 1)
    ]
    assert top["mean"]["pure"] == pytest.approx(np.mean(shares)) == pytest.approx(rows["pure"]["ours"])
    assert top["n"].to_dict() == dict(baseline=2, mixed=1, pure=2, fisher=1) and np.isnan(top["low"]["mixed"])


def test_probe_table_compares_what_the_paper_compared(networks):
    table, record = networks.shown("invariance_probes")
    compared = {row["role"]: (row["probe"], row["published"]) for row in record["published"]}
    assert compared == dict(baseline=("network", 93.2), mixed=("network", 91.9), pure=("linear", 21.0))
    # without cross entropy there is no accuracy of the network's own
    assert set(table.query("probe == 'network'")["role"]) == {"baseline", "mixed"}
    fractions = table.query("probe != 'network'").groupby(["role", "layer", "probe"])["fraction"].nunique()
    assert fractions.groupby("role").unique().map(list).to_dict() == dict(baseline=[1], fisher=[2], mixed=[1], pure=[1])


def under_attack(table, pgd, margin):
    "The table of attacks with other accuracies: under PGD at strength 0.03 and under its margin loss; nothing survives more."
    left = np.where(table["loss"] == "margin", margin, pgd) + 0.1 * (table["attack"] == "fgsm")
    left = np.where(table["source"] == "self", np.where(table["eps"] == 0.03, left, 0.0), 0.9)
    left = np.where(table["eps"] > 0, left, 0.95)
    return table.assign(accuracy=left, fooled=1 - left)


def test_attack_caption_says_what_the_checks_found(networks, tmp_path):
    suite = networks.copy(tmp_path)
    for run, left in dict(m8=(0.1, 0.1), mixed=(0.3, 0.1), pure=(0.4, 0.1), fisher=(0.2, 0.2)).items():
        for folder in suite.runs.glob(f"{run}-s?"):
            suite.change(folder.name, "attacks.csv", lambda table, left=left: under_attack(table, *left))
    table, record = suite.shown("invariance_attacks")
    baseline, mixed, pure, fisher = record["caption"].split("At strength 0.03: ")[1].split("PGD leaves")[1:]
    found = "the margin beats the cross entropy (by"
    assert found in mixed and "1 of 2 seeds" in mixed and found in pure and "2 of 2 seeds" in pure
    assert found not in baseline and found not in fisher
    signs = table[table["quantity"] == "sign of masked gradients"]
    assert signs.groupby("role")["seed"].nunique().to_dict() == dict(baseline=2, mixed=1, pure=2, fisher=1)
    assert set(table["series"].dropna()) >= {"PGD", "FGSM", "PGD, margin loss"}


def test_convergence_leaves_out_what_was_not_measured(networks, tmp_path):
    wanted = dict(invariance_convergence=dict(baseline="m1", pure="pure"))
    table, record = networks.under(tmp_path / "few", "small", figures=wanted).shown("invariance_convergence")
    groups = table.groupby("role")["groups"].unique().map(sorted).to_dict()
    assert groups == dict(pure=["images of a class", "views of an image"]), "single views have no such losses"
    assert any(isinstance(v, dict) and v.get("beta") == 0.9 for v in record["options"].values())


def test_cka_is_shown_as_it_is(networks, tmp_path):
    suite = networks.copy(tmp_path)
    suite.change(
        "fisher-s0", "cka.csv", lambda table: table.assign(value=table["value"].where(table["layer"] != "conv9", -0.07))
    )
    table = suite.shown("invariance_cka")[0]
    assert set(table["kind"]) == {"unbiased", "biased", "minibatch"} and table["layer"].nunique() == 9
    assert (table.query("role == 'fisher' and layer == 'conv9'")["mean"] == -0.07).all()


def test_embedding_shows_the_first_seed(networks):
    table, record = networks.shown("invariance_tsne")
    assert table["seed"].unique().tolist() == [0] and record["seeds"] == [0]
    spreads = {(row["label"], row["kind"]): row["spread"] for row in record["options"]["spreads"]}
    assert len(spreads) == 8 and all(0 < value < 1 for value in spreads.values())


def test_score_csv_pools_for_the_box_and_keeps_seeds_apart(networks):
    table = networks.shown("dai_score")[0].set_index(["role", "layer"])
    assert len(table) == 30 and table["n"].groupby("role").unique().map(list).to_dict() == dict(
        baseline=[160], dai=[160], views=[320]
    )
    two, one = table.loc["views"], table.loc["dai"]
    assert (two["seeds"] == 2).all() and (two["median_low"] < two["median_high"]).drop("input").all()
    assert one["median_low"].isna().all() and np.allclose(one["median"], one["median_mean"])
    scores = networks.table("dai-s0", "score.parquet").query("layer == 'conv5'")["score"]
    assert one["median"]["conv5"] == pytest.approx(scores.median())


def test_time_ratio_is_taken_within_a_repetition(networks, tmp_path):
    suite = networks.copy(tmp_path)
    seconds = {(1, 0.0): 0.060, (4, 0.0): 0.0602, (4, 0.1): 0.063}

    def slowed(table):
        base = [seconds[views, alpha] for views, alpha in zip(table["views"], table["alpha"], strict=True)]
        return table.assign(seconds=np.array(base) * (1 + table["repeat"]))  # each repetition slower than the last

    suite.change("dai-s0", "timing.csv", slowed)
    table = suite.shown("dai_time")[0].query("quantity == 'step time, DAI / baseline'")
    assert table["median"].tolist() == pytest.approx([0.063 / 0.0602, 0.063 / 0.060])
    assert (table["q3"] - table["q1"]).max() < 1e-9


def test_published_median_is_marked_only_on_the_paper_s_data(networks, tmp_path):
    suite = networks.copy(tmp_path)
    assert len(suite.draw("dai_score")["fig"].axes[0].collections) == 1
    for run in ("m1-s0", "m8-s0", "m8-s1", "dai-s0"):
        suite.change(run, "result.json", lambda result: {**result, "data": {**result["data"], "title": "other images"}})
    assert len(suite.draw("dai_score")["fig"].axes[0].collections) == 0


def test_missing_runs_and_tables_are_named(networks, tmp_path):
    suite = networks.copy(tmp_path)
    (suite.runs / "dai-s0/score.parquet").unlink()
    with pytest.raises(FileNotFoundError, match="score.parquet.*measure"):
        suite.draw("dai_score")
    (suite.runs / "dai-s0/timing.csv").unlink()
    with pytest.raises(FileNotFoundError, match="timing"):
        suite.draw("dai_time")
    (suite.runs / "dai-s0/result.json").unlink()
    with pytest.raises(FileNotFoundError, match="has not finished"):
        suite.draw("dai_accuracy")
    (suite.runs / "m1-s0/params.json").unlink()
    with pytest.raises(FileNotFoundError, match="m1-s0"):
        suite.draw("dai_accuracy")
    assert not (suite.figures / "dai_accuracy.png").exists()


@pytest.mark.parametrize("limits", [None, (0, 50)])
def test_a_shared_axis_shows_the_values_of_all_panels(limits):
    tables = [pd.DataFrame(dict(role="ce", label="ce", x=[0, 1], mean=v, low=v, high=v)) for v in ([80, 81], [20, 99])]
    fig = plots.line_plot([plots.Lines("", "x", "y", t, limits=limits) for t in tables], sharey=True)
    low, high = fig.axes[1].get_ylim()
    assert (low, high) == limits if limits else (low < 20 and high > 99)


ALLCNN, RESNET = [f"conv{k}" for k in range(1, 10)], ["relu", *(f"layer{s}.{b}" for s in (1, 2, 3) for b in range(3))]


@pytest.mark.parametrize(("layers", "upright"), [(ALLCNN, False), (RESNET, True), (["block1", "block2"], False)])
def test_names_of_layers_do_not_touch(layers, upright):
    x = range(len(layers))
    table = pd.DataFrame(dict(role="ce", label="ce", x=x, mean=0.5, low=0.5, high=0.5))
    fig = plots.line_plot([plots.Lines("", "layer", "y", table, plots.layer_ticks(layers))] * 2)
    fig.canvas.draw()
    for ax in fig.axes:
        names = ax.get_xticklabels()
        assert {name.get_rotation() for name in names} == {90.0 * upright}
        boxes = [name.get_window_extent() for name in names]
        assert all(a.x1 < b.x0 for a, b in pairwise(boxes))
    plt.close("all")


def test_architectures_have_a_panel_each_and_the_price_of_the_loss(networks):
    table, record = networks.shown("dai_networks_score")
    assert table.groupby(["network", "model"], sort=False)["layer"].nunique().to_dict() == {
        ("All-CNN", "baseline"): 10,
        ("WRN", "views"): 4,
        ("WRN", "dai"): 4,
    }
    drawn = networks.draw("dai_networks_score")
    assert [name for name, _ in drawn["by_network"]] == [("CIFAR-10", "All-CNN"), ("CIFAR-10", "WRN")]
    assert [name for name, _ in drawn["complete"]] == [("CIFAR-10", "WRN")]
    rows = pd.DataFrame(
        dict(
            layer=["input", "conv1", "block1"] * 2,
            model=["views"] * 3 + ["dai"] * 3,
            median=[0.5, 0.4, 0.6, 0.5, 0.3, 0.96],
        )
    )
    assert drawn["ours"]("WRN", rows) == ["block1", "block1", "0.96"]
    caption = networks.shown("dai_networks_accuracy")[1]["caption"]
    found = [pd.read_csv(networks.runs / f"{run}-s0/accuracy.csv") for run in ("wrn_dai", "wrn")]
    with_loss, without = (t[t["view"] == "single"]["top1"].item() for t in found)
    assert f"WRN on CIFAR-10: {100 * (with_loss - without):+.2f}." in caption


def test_the_open_problem_is_drawn_without_attacks(networks, tmp_path):
    suite = networks.copy(tmp_path)
    attacked = suite.draw("open_problem")
    assert "attacked   " in attacked["panels"][0].columns
    assert "nan" not in attacked["caption"] and "No run with cross entropy" in attacked["caption"]
    for file in suite.runs.glob("*/attacks.csv"):
        file.unlink()
    without = suite.draw("open_problem")
    assert [name.strip() for name in without["panels"][0].columns] == ["minus paired", "PC1", "rank"]
    assert "attack" not in without["caption"] and without["rows"]["attacked"].isna().all()


def test_a_misspelt_parameter_is_refused(networks):
    with networks.inside(), pytest.raises(ValueError, match="did you mean 'profile'"):
        run_notebook(NOTEBOOKS / "dai_time.ipynb", dict(profil="quick"))


SAVE = """
import hashlib
from dainv import layer_plots
from dainv.figure import Figure
names = dict(profile="quick", __annotations__=dict(profile=str))
figure = Figure("dai_loss_dynamics", names, title="Same", paper="dai", needs=["log.csv"])
table = figure.table("log.csv")
files = figure.save(layer_plots.loss_heatmaps(figure.logs), table, figure.caption("Same."))
print({kind: hashlib.sha256(path.read_bytes()).hexdigest() for kind, path in files.items()})
"""


def test_files_are_the_same_bytes_in_another_process(networks, tmp_path):
    suite, found = networks.under(tmp_path / "same", "quick"), []
    with suite.inside():
        for hash_seed in ("1", "2"):
            env = {**os.environ, "PYTHONHASHSEED": hash_seed, "MPLBACKEND": "Agg"}
            done = subprocess.run([sys.executable, "-c", SAVE], cwd=ROOT, env=env, capture_output=True, text=True)
            assert done.returncode == 0, done.stderr
            found.append(done.stdout)
    assert found[0] == found[1]


@pytest.mark.slow
def test_papermill_draws_and_refuses_a_misspelt_parameter(networks):
    source, how = str(NOTEBOOKS / "dai_time.ipynb"), dict(kernel_name="python3", progress_bar=False)
    with networks.inside():
        papermill.execute_notebook(source, None, dict(profile="quick"), **how)
        with pytest.raises(papermill.PapermillExecutionError, match="did you mean 'profile'"):
            papermill.execute_notebook(source, None, dict(profil="quick"), **how)
    assert (networks.figures / "dai_time.png").exists()


def two_models(column):
    rng = np.random.default_rng(0)
    index = pd.MultiIndex.from_product([["a", "b"], ["input", "fc"], range(20), range(2)])
    table = index.to_frame(index=False, name=[column, "layer", "image", "repeat"])
    return table.assign(score=rng.normal((table[column] == "b") * 0.5, 0.1))


@pytest.mark.parametrize("column", ["label", "model", "role"])
def test_two_models_are_two_boxes(column):
    table = two_models(column)
    fig = layer_plots.score_boxes(table)
    boxes = [patch for patch in fig.axes[0].patches if patch.get_label()]
    assert len(fig.axes[0].patches) == 4 and len({patch.get_facecolor() for patch in boxes}) == 2
    left = {round(patch.get_path().vertices[:, 0].mean(), 3) for patch in fig.axes[0].patches}
    assert len(left) == 4 and fig.legends
    plt.close(fig)
    with pytest.raises(ValueError, match="tell models apart by a column label"):
        layer_plots.score_boxes(table.drop(columns=column))


def test_layers_without_a_score_have_no_box():
    table = two_models("label")
    table.loc[table.layer == "fc", "score"] = np.nan
    table.loc[0, "score"] = np.nan
    statistics = layer_plots.box_statistics(table)
    assert statistics.n.tolist() == [39, 0, 40, 0] and statistics["median"].isna().tolist() == [
        False,
        True,
        False,
        True,
    ]
    fig = layer_plots.score_boxes(table)
    assert len(fig.axes[0].patches) == 2 and len(fig.axes[0].get_xticks()) == 2
    plt.close(fig)
