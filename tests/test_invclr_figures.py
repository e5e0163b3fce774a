"""The figures of the contrastive networks, drawn from made-up runs: files, numbers, captions; and what they are made of."""

import json
from types import SimpleNamespace

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from fake_runs import ALPHA, CONTRASTIVE, INVCLR, invclr_figures, write_contrastive
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from test_plots import NOTEBOOKS, draw

from dainv import invclr_plots as ip
from dainv import report
from dainv.figure import published_data
from dainv.plots import Panel
from dainv.runs import FigureRun, read_json, write_json
from dainv.spirograph import parameter_bounds, spirograph_task
from dainv.views import Drawn, SpirographViews

NAMES = [*INVCLR, "invclr_defects"]
DRAWINGS = ("plain", "gradient", "finite_difference")
PHOTOGRAPHS = ("plain", "gradient")


class Photographs:
    """What a figure needs of views of photographs: two colour numbers, normalised images."""

    task, names, target_names = "classification", ("brightness", "hue"), ("cat", "dog")
    channel_mean, channel_std = torch.full((3, 1, 1), 0.5), torch.full((3, 1, 1), 0.25)

    def count(self, half):
        return 5

    def targets(self, half):
        return torch.arange(5) % 2

    def draw(self, half, ids, passes, views, seed):
        return Drawn(torch.full((len(ids), 2), views + 0.5))

    def images(self, half, ids, drawn):
        shade = 0.0 if drawn is None else drawn.alpha[:, :1, None, None]
        return torch.zeros(len(ids), 3, 8, 8) + shade


def load_views(run):
    """The views of a made-up run."""
    if run.result["data"]["task"] == "classification":
        return Photographs()
    return SpirographViews(spirograph_task(64, 32, size=16, bounds=parameter_bounds(b=(0.5, 1.1))))


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """The figures folder: three seeds on drawings (quick), one of the published protocol (paper), one on photographs."""
    root = tmp_path_factory.mktemp("invclr")
    with pytest.MonkeyPatch.context() as patch:
        write_contrastive(root, profile="quick", roles=DRAWINGS)
        write_contrastive(root, profile="paper", seeds=(4,), roles=PHOTOGRAPHS, task="classification")
        few = dict(profile="photo", roles=("gradient", "plain"), task="classification", title="Tiny ImageNet")
        for name, value in write_contrastive(root, **few).items():
            patch.setenv(name, value)
        patch.setattr("dainv.trainers.pretraining.load_views", load_views)
        for profile, names in dict(quick=NAMES, paper=NAMES, photo=("invclr_claims", "invclr_tasks")).items():
            for name in names:
                draw(name, profile)
    return root / "figures"


def shown(drawn, name, profile="quick"):
    folder = drawn / profile
    return pd.read_csv(folder / f"{name}.csv"), json.loads((folder / f"{name}.json").read_text())


@pytest.mark.parametrize("profile", ["quick", "paper"])
@pytest.mark.parametrize("name", NAMES)
def test_figure_has_four_files_and_its_origin(drawn, profile, name):
    table, record = shown(drawn, name, profile)
    folder = drawn / profile
    assert len(table) and (folder / f"{name}.png").read_bytes()[:4] == b"\x89PNG"
    assert (folder / f"{name}.png").stat().st_size < 300_000 and (folder / f"{name}.pdf").stat().st_size < 300_000
    assert f"Suite: {profile}" in record["caption"] and record["options"] and "commit" in record["drawn_with"]
    if name != "invclr_defects":
        title = dict(quick="Spirograph (16 pixels)", paper="CIFAR-10")[profile]
        assert title in record["caption"] and [data["title"] for data in record["data"]] == [title]
        assert ("one seed (4)" if profile == "paper" else "seed") in record["caption"]


@pytest.mark.parametrize("name", [name for name in NAMES if name not in ("invclr_samples", "invclr_defects")])
def test_caption_says_what_the_published_values_are_for(drawn, name):
    record = shown(drawn, name)[1]
    compared = bool(record["published"])
    assert compared == (name not in ("invclr_jitter", "invclr_labels", "invclr_ensembling"))
    assert ("Spirograph drawings normalised by rows" in record["caption"]) == compared
    assert "for CIFAR-10" not in record["caption"]
    assert "protocol of this suite differs" not in shown(drawn, name, "paper")[1]["caption"]


def geometric(values):
    """Mean and 95 % interval of ratios, from scipy."""
    logs = np.log(np.asarray(values))
    half = stats.t.ppf(0.975, len(logs) - 1) * stats.sem(logs)
    return np.exp([logs.mean(), logs.mean() - half, logs.mean() + half])


def runs_of(drawn, role, profile="quick", seeds=(0, 1, 2)):
    return [drawn.parent / "runs" / profile / f"{role}-s{seed}" for seed in seeds]


def test_claims_are_the_paired_ratios_of_the_run_folders(drawn):
    table = shown(drawn, "invclr_claims")[0].set_index(["claim", "role", "task"])[["mean", "low", "high"]]

    def error(folder, **where):
        found = pd.read_csv(folder / "downstream.csv")
        return found.query(" and ".join(f"{k} == '{v}'" for k, v in where.items()))["value"].item()

    for role in ("gradient", "finite_difference"):
        for method in ("single", "averaged"):
            for task in ("mean", "b"):
                where = dict(method=method, task=task)
                pairs = zip(runs_of(drawn, role), runs_of(drawn, "plain"), strict=True)
                expected = geometric([error(a, **where) / error(b, **where) for a, b in pairs])
                assert np.allclose(table.loc[f"error, {method}", role, task], expected, rtol=1e-3)
                # by hand: the seeds apart by 3 %, three of them
                by_hand = CONTRASTIVE[role][2] * np.exp(np.array([0, -1, 1]) * 4.303 * 0.03 / 3**0.5)
                assert np.allclose(expected, by_hand, rtol=1e-3)
    most = pd.concat(
        pd.read_csv(f / "averaging.csv").query("kind == 'all' and task == 'mean'") for f in runs_of(drawn, "plain")
    )
    ratio = most.query("views == 30")["measured"].to_numpy() / most.query("views == 1")["measured"].to_numpy()
    assert np.allclose(table.loc["averaging", "plain", "mean"], geometric(ratio), rtol=1e-3)


def test_claims_about_variance_are_ratios_to_the_run_without_penalty(drawn):
    table, record = shown(drawn, "invclr_claims")
    rows = table[table["claim"].str.contains("variance|/")].set_index(["claim", "role"])["mean"]
    for role in ("gradient", "finite_difference"):
        _, _, _, conditional, total = CONTRASTIVE[role]
        assert rows["conditional variance", role] == pytest.approx(conditional, rel=1e-6)
        assert rows["total variance", role] == pytest.approx(total, rel=1e-6)
        assert rows["conditional / total", role] == pytest.approx(conditional / total, rel=1e-6)
    assert "plain" not in rows.index.get_level_values("role")
    assert record["options"]["pairs"] == dict(gradient="plain", finite_difference="plain")


def test_claims_have_a_verdict_and_published_ratios(drawn):
    table, record = shown(drawn, "invclr_claims")
    assert set(table["verdict"]) <= {"lower", "open"} and (table["n"] == 3).all()
    assert "averaging: 3 lower" in record["caption"] and "error, single: 2 lower" in record["caption"]
    theirs = {(r["claim"], r["role"], r["task"]): r["published"] for r in record["published"]}
    assert theirs["averaging", "plain", "mean"] == pytest.approx(0.752, abs=5e-4)
    assert theirs["error, single", "gradient", "rfore"] == pytest.approx(0.12, abs=5e-3)
    single = shown(drawn, "invclr_claims", "paper")
    assert set(single[0]["verdict"]) == {"one seed"} and single[0]["low"].isna().all()
    assert "One seed has no interval" in single[1]["caption"]


def test_claims_on_photographs_are_about_error_rates(drawn):
    table = shown(drawn, "invclr_claims", "photo")[0]
    assert set(table["task"]) == {"error rate", "cross entropy", "all"} and "error, untransformed" in set(
        table["claim"]
    )
    rows = table.set_index(["claim", "role", "task"])["mean"]
    # errors, not accuracies, are divided
    assert rows["error, single", "gradient", "error rate"] == pytest.approx(0.8, rel=1e-6)
    # data without published numbers are not compared
    assert shown(drawn, "invclr_claims", "photo")[1]["published"] == []
    assert "published values are" not in shown(drawn, "invclr_claims", "photo")[1]["caption"]


def test_bars_of_tasks_are_one_for_the_run_without_penalty(drawn):
    table, record = shown(drawn, "invclr_tasks")
    assert set(table["role"]) == {"gradient", "finite_difference"} and set(table["task"]) == {
        "mean",
        "m",
        "b",
        "sigma",
        "rfore",
    }
    assert np.allclose(table.query("role == 'gradient'")["mean"], 0.8)
    theirs = {row["task"]: round(row["published"], 2) for row in record["published"]}
    assert theirs == dict(mean=0.67, m=0.75, b=0.65, sigma=0.58, rfore=0.12)


def test_variance_compares_the_total_with_what_was_published_as_conditional(drawn):
    table, record = shown(drawn, "invclr_variance")
    assert table.groupby("quantity")["x"].nunique().eq(6).all(), "every second epoch was measured"
    rows = {(row["quantity"], row["role"]): row for row in record["published"]}
    assert set(rows) == {("mixed", "plain"), ("mixed", "gradient")} and rows["mixed", "plain"]["published"] == 0.789
    last = table.query("quantity == 'total variance' and role == 'plain'").sort_values("x").iloc[-1]
    assert rows["mixed", "plain"]["ours"] == pytest.approx(last["mean"])
    assert "essentially the total variance" in record["caption"]
    photographs = {
        (r["network"], r["quantity"], r["role"]): r["published"]
        for r in shown(drawn, "invclr_variance", "paper")[1]["published"]
    }
    assert (
        photographs["ResNet18", "conditional", "plain"] == 0.2
        and photographs["ResNet50", "mixed", "gradient"] == 0.0042
    )


def test_alpha_has_chance_both_features_and_every_parameter(drawn):
    table, record = shown(drawn, "invclr_alpha")
    assert set(table["name"]) == {*ALPHA, "mean"} and set(table["features"]) == {"standardised", "raw"}
    compared = {(r["features"], r["role"]): r["published"] for r in record["published"]}
    assert compared["raw", "plain"] == 0.0752 and compared["standardised", "gradient"] == 0.0808


def test_target_error_is_an_error_rate_on_photographs(drawn):
    table, record = shown(drawn, "invclr_target_error", "paper")
    log = pd.read_csv(runs_of(drawn, "plain", "paper", (4,))[0] / "log.csv").dropna(subset="target_accuracy")
    ours = table.query("role == 'plain'").sort_values("x")["mean"]
    assert np.allclose(ours, 100 * (1 - log["target_accuracy"])) and set(table["quantity"]) == {"error rate (%)"}
    assert record["published"] == []
    tasks = set(shown(drawn, "invclr_target_error")[0]["quantity"])
    assert tasks == {"mean squared error", "error in $m$", "error in $b$", r"error in $\sigma$", "error in $f_r$"}


def test_averaging_stands_beside_the_published_curve(drawn):
    table, record = shown(drawn, "invclr_averaging")
    assert table["series"].nunique() == 3 and set(table["views"]) == {1, 2, 5, 10, 30}
    rows = {(row["views"], row["role"]): row["published"] for row in record["published"] if row["views"]}
    assert rows[5, "gradient"] == 0.00128 and len([r for r in record["published"] if r["method"] == "single"]) == 2
    photographs, record = shown(drawn, "invclr_averaging", "paper")
    assert photographs.query("metric == 'accuracy'")["mean"].between(50, 100).all(), "in percent"
    untransformed = {
        r["role"]: r["published"] for r in record["published"] if r["method"] and r["metric"] == "accuracy"
    }
    assert untransformed == dict(plain=93.04, gradient=93.37)
    assert "untransformed, without averaging" in record["caption"]


def test_shifts_keep_both_heads_and_compare_the_refitted(drawn):
    table, record = shown(drawn, "invclr_shifts")
    assert set(table["kind"]) == {"mean", "spread"} and table["series"].nunique() == 2
    rows = {(r["group"], r["kind"], r["shift"], r["role"]): r for r in record["published"]}
    assert ("background", "spread", 0.2, "plain") not in rows and rows["h", "mean", -0.5, "plain"][
        "published"
    ] == 0.005058
    place = "group == 'h' and kind == 'mean' and x == -0.5 and role == 'plain' and series == 'head of the shifted data'"
    assert rows["h", "mean", -0.5, "plain"]["ours"] == pytest.approx(table.query(place)["mean"].item())


def test_jitter_has_the_strengths_and_their_published_values(drawn):
    assert set(shown(drawn, "invclr_jitter")[0]["group"]) == {"all"}
    rows = shown(drawn, "invclr_jitter", "paper")[1]["published"]
    found = {(r["metric"], r["strength"], r["role"]): r["published"] for r in rows}
    assert found["accuracy", 0.5, "plain"] == 92.59 and found["cross_entropy", 1.0, "gradient"] == 0.3759


def test_labels_are_averaged_over_parts_before_seeds(drawn):
    table = shown(drawn, "invclr_labels")[0].set_index(["role", "fraction"])
    assert (table["n"] == 3).all()
    folders = runs_of(drawn, "plain")
    parts = [pd.read_csv(f / "labels.csv").query("fraction == 0.1")["value"].mean() for f in folders]
    assert table.loc[("plain", 0.1), "mean"] == pytest.approx(np.mean(parts))
    whole = shown(drawn, "invclr_labels", "paper")[1]["published"]
    assert {(r["metric"], r["fraction"], r["role"]): r["published"] for r in whole}[
        "accuracy", 1.0, "gradient"
    ] == 93.38


def test_ensembling_and_kinds_compare_photographs_with_the_paper(drawn):
    found = shown(drawn, "invclr_ensembling", "paper")[1]["published"]
    assert {(r["method"], r["metric"], r["views"], r["role"]): r["published"] for r in found}[
        "ensembling", "accuracy", 5, "plain"
    ] == 93.62
    kinds = shown(drawn, "invclr_averaging_kinds", "paper")
    assert set(kinds[0]["kind"]) == {"all", "differentiable", "none"}
    rows = {(r["kind"], r["metric"], r["views"], r["role"]): r["published"] for r in kinds[1]["published"]}
    assert rows["differentiable", "accuracy", 5, "gradient"] == 93.17


def test_samples_show_items_twice_and_photographs_untransformed_too(drawn):
    drawings = shown(drawn, "invclr_samples")[0]
    assert len(drawings) == 16 and set(ALPHA) <= set(drawings)
    assert (
        drawings.groupby("item")["target"].nunique().eq(1).all() and drawings.groupby("item")["h"].nunique().eq(2).all()
    )
    photographs, record = shown(drawn, "invclr_samples", "paper")
    assert photographs["target"].tolist()[:4] == ["cat", "cat", "dog", "dog"] and "untransformed" in record["caption"]


def test_defects_are_the_table_itself(drawn):
    table, record = shown(drawn, "invclr_defects")
    assert table["number"].unique().tolist() == list(range(1, 26)) and record["runs"] == []
    assert "13 of 25 defects touch numbers" in record["caption"]


@pytest.mark.parametrize("roles", [["gradient"], ["finite_difference", "gradient"]])
def test_any_roles_can_be_drawn(monkeypatch, tmp_path, roles):
    for name, value in write_contrastive(tmp_path, profile="small", seeds=(0,), roles=roles).items():
        monkeypatch.setenv(name, value)
    for name in ("invclr_claims", "invclr_alpha", "invclr_averaging"):
        draw(name, "small")
        record = json.loads((tmp_path / "figures/small" / f"{name}.json").read_text())
        assert list(dict.fromkeys(run["role"] for run in record["runs"])) == roles
    claims = pd.read_csv(tmp_path / "figures/small/invclr_claims.csv")
    assert set(claims["claim"]) == {"averaging"}, "without a run without penalty there is nothing to compare with"
    with pytest.raises(ValueError, match="invclr_tasks: no run has a paired run"):
        draw("invclr_tasks", "small")


def test_curves_say_on_how_many_items_and_are_not_what_is_compared(drawn):
    "The logs hold measurements on few items; published errors stand beside the final evaluation."
    assert "of 10 test items over ten random views" in shown(drawn, "invclr_variance")[1]["caption"]
    for name in ("invclr_alpha", "invclr_target_error"):
        assert "fitted on 40 training items, tested on 10 test items" in shown(drawn, name)[1]["caption"]
    record = shown(drawn, "invclr_target_error")[1]
    ours = {row["role"]: row["ours"] for row in record["published"]}
    for role, value in ours.items():
        single = [
            pd.read_csv(f / "downstream.csv").query("method == 'single' and task == 'mean'")["value"].item()
            for f in runs_of(drawn, role)
        ]
        assert value == pytest.approx(np.mean(single))
    assert set(ours) == {"plain", "gradient"} and "final evaluation" in record["caption"]
    assert "final evaluation" not in shown(drawn, "invclr_target_error", "paper")[1]["caption"]


def test_captions_say_what_photographs_were_shown_as(drawn):
    assert "features of single views" in shown(drawn, "invclr_labels")[1]["caption"]
    labels = shown(drawn, "invclr_labels", "paper")[1]["caption"]
    assert "features of untransformed images" in labels and "only 100 % is certain" in labels
    for name in ("invclr_jitter", "invclr_shifts"):
        assert "without crops and greys" in shown(drawn, name, "paper")[1]["caption"]
        assert "without crops and greys" not in shown(drawn, name)[1]["caption"]
    assert "cannot exceed about .8" in shown(drawn, "invclr_alpha", "paper")[1]["caption"]
    assert "cannot exceed" not in shown(drawn, "invclr_alpha")[1]["caption"]


def test_missing_tables_and_strengths_are_named(monkeypatch, tmp_path):
    for name, value in write_contrastive(tmp_path, profile="small", seeds=(0,), roles=["plain"]).items():
        monkeypatch.setenv(name, value)
    folder = tmp_path / "runs/small/plain-s0"
    table = pd.read_csv(folder / "shifts.csv")
    table[table["kind"] != "strength"].to_csv(folder / "shifts.csv", index=False)
    with pytest.raises(ValueError, match="no rows of kind strength"):
        draw("invclr_jitter", "small")
    table = pd.read_csv(folder / "averaging.csv")
    table[table["views"] > 1].to_csv(folder / "averaging.csv", index=False)
    with pytest.raises(ValueError, match="averaging.csv has no row for one view; evaluate with 1 in counts"):
        draw("invclr_claims", "small")
    (folder / "averaging.csv").unlink()
    with pytest.raises(FileNotFoundError, match="averaging.csv"):
        draw("invclr_averaging", "small")


def test_report_puts_them_last(drawn, monkeypatch):
    monkeypatch.setenv("DAINV_FIGURES", str(drawn))
    record = read_json(drawn / "quick" / "invclr_defects.json")
    for other in ("open_problem", "dai_time"):
        write_json(drawn / "quick" / f"{other}.json", record | dict(name=other))
    text = report.write_report("quick").read_text()
    expected = ["dai_time", "open_problem", "invclr_claims", "invclr_samples", "invclr_variance", "invclr_defects"]
    assert sorted(expected, key=lambda name: text.index(f'<section id="{name}">')) == expected
    for other in ("open_problem", "dai_time"):
        (drawn / "quick" / f"{other}.json").unlink()


def figure_run(role, seed=0, title="CIFAR-10", task="classification", **params):
    """A run that was never made."""
    run = SimpleNamespace(params=params, result=dict(data=dict(title=title, task=task)))
    return FigureRun(run, role, role, seed)


def test_twins_agree_in_everything_but_the_penalty():
    runs = [figure_run("plain", penalty_weight=0.0, epochs=5, start="quick/base-s0")]
    runs += [figure_run("gradient", 1, penalty_weight=0.1, epochs=5, start="quick/base-s1", penalty="gradient")]
    runs += [figure_run("strong", penalty_weight=0.5, epochs=5, start="")]
    runs += [figure_run("weak", penalty_weight=0.5, epochs=6, start="quick/base-s0")]
    assert ip.paired_runs(runs) == dict(gradient="plain")


@pytest.mark.parametrize("name", ["temperature", "momentum", "schedule", "test_size", "precision", "ramp_epochs"])
def test_no_twin_differs_in_anything_else(name):
    plain, other = (figure_run(role, penalty_weight=w, **{name: w}) for role, w in (("plain", 0.0), ("gradient", 0.1)))
    assert ip.paired_runs([plain, other]) == {}


def test_ratios_pair_seeds_and_drop_what_has_no_counterpart():
    rows = [("plain", 0, 2.0), ("plain", 1, 4.0), ("gradient", 1, 1.0), ("gradient", 2, 1.0), ("weak", 0, 1.0)]
    table = pd.DataFrame(rows, columns=["role", "seed", "value"])
    found = ip.paired_ratios(table, dict(gradient="plain"))
    assert found[["role", "seed", "ratio"]].values.tolist() == [["gradient", 1, 0.25]]
    assert np.isnan(ip.ratio_intervals(found, ["role"])["low"].item())
    assert ip.paired_ratios(table, {}).empty


@settings(deadline=None, max_examples=60)
@given(low=st.floats(1e-6, 1e3), span=st.floats(1.05, 1e6))
def test_log_ticks_are_few_round_and_inside(low, span):
    ticks = ip.log_ticks(low, low * span)
    assert len(ticks) <= 6 and ticks == sorted(set(ticks))
    assert all(low <= tick <= low * span and float(f"{tick:.2g}") == tick for tick in ticks)
    assert len(ticks) >= 2 or span < 1.3


@pytest.mark.parametrize(
    ("title", "task", "expected"),
    [
        ("CIFAR-10", "classification", "CIFAR-10"),
        ("CIFAR-100", "classification", "CIFAR-100"),
        ("CIFAR-10 (JPEG copy)", "classification", "CIFAR-10"),
        ("Spirograph (16 pixels)", "regression", "Spirograph"),
        ("Spirograph classes", "classification", ""),
    ],
)
def test_published_data_is_told_by_the_run(title, task, expected):
    run = figure_run("plain", title=title, task=task)
    assert published_data(run) == expected


def test_published_values_and_levels_stay_within_the_axes():
    table = pd.DataFrame(dict(role="plain", label="x", x=[1, 10], mean=[0.1, 0.2], low=np.nan, high=np.nan))
    theirs = pd.DataFrame(dict(role=["plain", "plain"], x=[1, 10], published=[0.001, np.nan]))
    levels = pd.DataFrame(dict(role=[""], y=[3.0], name=["chance"]))
    fig = ip.curve_plot([ip.Curves("", "M", "error", table, log=True, log_x=True, published=theirs, levels=levels)])
    low, high = fig.axes[0].get_ylim()
    assert low < 0.001 and high > 3 and (fig.axes[0].get_xscale(), fig.axes[0].get_yscale()) == ("log", "log")
    assert [t.get_text() for t in fig.legends[0].get_texts()] == ["chance", "published"]
    plt.close("all")


def test_bars_have_their_heights_and_only_real_whiskers():
    table = pd.DataFrame(
        dict(role=["a", "b"] * 2, label=["a", "b"] * 2, task=["m", "m", "b", "b"], mean=[0.5, 0.6, 0.7, 0.8])
    )
    table = table.assign(low=[0.4, np.nan] * 2, high=[0.9, np.nan] * 2)
    fig = ip.ratio_bars(table, "y", pd.DataFrame(dict(role=["a", "c"], task=["m", "m"], published=[0.55, 0.1])))
    assert [bar.get_height() for bar in fig.axes[0].patches] == [0.5, 0.7, 0.6, 0.8]
    assert [t.get_text() for t in fig.legends[0].get_texts()] == ["a", "b", "published"]
    plt.close("all")


def test_ratio_plot_is_logarithmic_with_a_line_at_one():
    table = pd.DataFrame(dict(role="gradient", label=["a"], mean=[0.5], low=[0.4], high=[0.6]))
    fig = ip.ratio_plot([Panel("t", "x", table)])
    assert fig.axes[0].get_xscale() == "log" and any(set(line.get_xdata()) == {1} for line in fig.axes[0].lines)
    plt.close("all")


def test_every_figure_is_among_the_made_up_ones():
    assert set(invclr_figures()) == set(NAMES) == {path.stem for path in NOTEBOOKS.glob("invclr_*.ipynb")}
