"""The figures of the contrastive networks, drawn of tiny runs: files, numbers, captions; and what they are made of."""

from types import SimpleNamespace

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from dainv import invclr_plots as ip
from dainv import report
from dainv.figure import figure_specs, published_data
from dainv.files import read_json, write_json
from dainv.plots import Panel
from dainv.suites import FigureRun

NAMES = [name for name, spec in figure_specs().items() if spec.paper == "invclr"]
SEEDS = (0, 1)


@pytest.fixture(scope="module")
def as_published(photographs, tmp_path_factory):
    "The encoders of photographs as a suite that follows the published protocol."
    return photographs.under(tmp_path_factory.mktemp("as_published"), "paper")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("published", [False, True])
def test_figure_has_four_files_and_its_origin(drawings, as_published, published, name):
    suite = as_published if published else drawings
    table, record = suite.shown(name)
    paths = {kind: suite.figures / f"{name}.{kind}" for kind in ("png", "pdf")}
    assert len(table) and paths["png"].read_bytes()[:4] == b"\x89PNG" and paths["pdf"].read_bytes()[:5] == b"%PDF-"
    assert all(path.stat().st_size < 300_000 for path in paths.values())
    assert f"Suite: {suite.name}" in record["caption"] and record["options"] and "commit" in record["drawn_with"]
    if name != "invclr_defects":
        title = read_json(suite.runs / f"plain-s{4 if published else 0}" / "result.json")["data"]["title"]
        assert title in record["caption"] and [data["title"] for data in record["data"]] == [title]
        assert ("one seed (4)" in record["caption"]) == published


@pytest.mark.parametrize("name", [name for name in NAMES if name not in ("invclr_samples", "invclr_defects")])
def test_caption_says_what_the_published_values_are_for(drawings, as_published, name):
    record = drawings.shown(name)[1]
    compared = name not in ("invclr_jitter", "invclr_ensembling", "invclr_labels")  # published for photographs only
    assert bool(record["published"]) == compared
    assert ("Spirograph drawings normalised by rows" in record["caption"]) == compared
    assert "for CIFAR-10" not in record["caption"]
    assert "protocol of this suite differs" not in as_published.shown(name)[1]["caption"]


def geometric(values):
    """Mean and 95 % interval of ratios, from scipy."""
    logs = np.log(np.asarray(values))
    half = stats.t.ppf(0.975, len(logs) - 1) * stats.sem(logs)
    return np.exp([logs.mean(), logs.mean() - half, logs.mean() + half])


def test_claims_are_the_paired_ratios_of_the_run_folders(drawings):
    table = drawings.shown("invclr_claims")[0].set_index(["claim", "role", "task"])[["mean", "low", "high"]]

    def error(role, seed, method, task):
        found = drawings.table(f"{role}-s{seed}", "downstream.csv").query("method == @method and task == @task")
        return found["value"].item()

    for role in ("gradient", "finite_difference"):
        for method in ("single", "averaged"):
            for task in ("mean", "b"):
                ratios = [error(role, s, method, task) / error("plain", s, method, task) for s in SEEDS]
                assert np.allclose(table.loc[f"error, {method}", role, task], geometric(ratios), rtol=1e-3)
    ratios = []
    for seed in SEEDS:
        curve = drawings.table(f"plain-s{seed}", "averaging.csv").query("kind == 'all' and task == 'mean'")
        ratios.append(curve.set_index("views")["measured"].pipe(lambda m: m[5] / m[1]))
    assert np.allclose(table.loc["averaging", "plain", "mean"], geometric(ratios), rtol=1e-3)


def test_claims_about_variance_are_ratios_to_the_run_without_penalty(drawings):
    table, record = drawings.shown("invclr_claims")
    rows = table[table["claim"].str.contains("variance|/")].set_index(["claim", "role"])["mean"]
    names = {"conditional variance": "conditional", "total variance": "total", "conditional / total": "ratio"}
    for role in ("gradient", "finite_difference"):
        for claim, column in names.items():
            values = {
                r: [drawings.table(f"{r}-s{s}", "variance.csv").query("space == 'unit'")[column].item() for s in SEEDS]
                for r in (role, "plain")
            }
            ratio = np.divide(values[role], values["plain"])
            assert rows[claim, role] == pytest.approx(np.exp(np.log(ratio).mean()))
    assert "plain" not in rows.index.get_level_values("role")
    assert record["options"]["pairs"] == dict(gradient="plain", finite_difference="plain")


def test_claims_have_a_verdict_and_published_ratios(drawings, as_published):
    table, record = drawings.shown("invclr_claims")
    expected = np.select([table["high"] < 1, table["low"] > 1], ["lower", "higher"], "open")
    assert (table["verdict"] == expected).all() and (table["n"] == 2).all()
    counted = table[table["claim"].eq("averaging") & table["task"].eq("mean")]["verdict"].value_counts()
    assert all(f"{n} {word}" in record["caption"].split("averaging: ")[1].split(";")[0] for word, n in counted.items())
    theirs = {(r["claim"], r["role"], r["task"]): r["published"] for r in record["published"]}
    assert theirs["averaging", "plain", "mean"] == pytest.approx(0.752, abs=5e-4)
    assert theirs["error, single", "gradient", "rfore"] == pytest.approx(0.12, abs=5e-3)
    single = as_published.shown("invclr_claims")
    assert set(single[0]["verdict"]) == {"one seed"} and single[0]["low"].isna().all()
    assert "One seed has no interval" in single[1]["caption"]


def test_claims_on_photographs_are_about_error_rates(photographs, tmp_path):
    suite = photographs.copy(tmp_path)
    for run in ("plain-s4", "gradient-s4"):
        suite.change(
            run, "result.json", lambda result: {**result, "data": {**result["data"], "title": "Tiny ImageNet"}}
        )
    table, record = suite.shown("invclr_claims")
    assert set(table["task"]) == {"error rate", "cross entropy", "all"}
    rows = table.set_index(["claim", "role", "task"])["mean"]
    errors = []
    for role in ("gradient", "plain"):
        found = suite.table(f"{role}-s4", "downstream.csv").query("method == 'untransformed' and metric == 'accuracy'")
        errors.append(1 - found["value"].item())
    assert rows["error, untransformed", "gradient", "error rate"] == pytest.approx(errors[0] / errors[1])
    # data without published numbers are not compared
    assert record["published"] == [] and "published values are" not in record["caption"]


def test_bars_of_tasks_are_one_for_the_run_without_penalty(drawings):
    table, record = drawings.shown("invclr_tasks")
    assert set(table["role"]) == {"gradient", "finite_difference"}
    assert set(table["task"]) == {"mean", "m", "b", "sigma", "rfore"}
    theirs = {row["task"]: round(row["published"], 2) for row in record["published"]}
    assert theirs == dict(mean=0.67, m=0.75, b=0.65, sigma=0.58, rfore=0.12)


def test_variance_compares_the_total_with_what_was_published_as_conditional(drawings, as_published):
    table, record = drawings.shown("invclr_variance")
    assert table.groupby("quantity")["x"].nunique().eq(2).all(), "every epoch was measured"
    rows = {(row["quantity"], row["role"]): row for row in record["published"]}
    assert set(rows) == {("mixed", "plain"), ("mixed", "gradient")} and rows["mixed", "plain"]["published"] == 0.789
    last = table.query("quantity == 'total variance' and role == 'plain'").sort_values("x").iloc[-1]
    assert rows["mixed", "plain"]["ours"] == pytest.approx(last["mean"])
    assert "essentially the total variance" in record["caption"]
    theirs = as_published.shown("invclr_variance")[1]["published"]
    photographs = {(r["network"], r["quantity"], r["role"]): r["published"] for r in theirs}
    assert photographs["ResNet18", "conditional", "plain"] == 0.2
    assert photographs["ResNet50", "mixed", "gradient"] == 0.0042


def test_alpha_has_chance_both_features_and_every_parameter(drawings):
    table, record = drawings.shown("invclr_alpha")
    measured = set(drawings.table("plain-s0", "alpha.csv")["name"])
    assert set(table["name"]) == measured > {"mean", "h"} and set(table["features"]) == {"standardised", "raw"}
    compared = {(r["features"], r["role"]): r["published"] for r in record["published"]}
    assert compared["raw", "plain"] == 0.0752 and compared["standardised", "gradient"] == 0.0808


def test_target_error_is_an_error_rate_on_photographs(drawings, as_published):
    table, record = as_published.shown("invclr_target_error")
    log = as_published.table("plain-s4", "log.csv").dropna(subset="target_accuracy")
    ours = table.query("role == 'plain'").sort_values("x")["mean"]
    assert np.allclose(ours, 100 * (1 - log["target_accuracy"])) and set(table["quantity"]) == {"error rate (%)"}
    assert record["published"] == []
    tasks = set(drawings.shown("invclr_target_error")[0]["quantity"])
    assert tasks == {"mean squared error", "error in $m$", "error in $b$", r"error in $\sigma$", "error in $f_r$"}


def test_averaging_stands_beside_the_published_curve(drawings, as_published):
    table, record = drawings.shown("invclr_averaging")
    assert table["series"].nunique() == 3 and set(table["views"]) == {1, 2, 5}
    rows = {(row["views"], row["role"]): row["published"] for row in record["published"] if row["views"]}
    assert rows[5, "gradient"] == 0.00128 and len([r for r in record["published"] if r["method"] == "single"]) == 2
    photographs, record = as_published.shown("invclr_averaging")
    shares = as_published.table("plain-s4", "averaging.csv").query("kind == 'all' and metric == 'accuracy'")["measured"]
    shown = photographs.query("metric == 'accuracy' and role == 'plain' and series == 'head of each M'")["mean"]
    assert np.allclose(sorted(shown), sorted(100 * shares)), "in percent"
    untransformed = {
        r["role"]: r["published"] for r in record["published"] if r["method"] and r["metric"] == "accuracy"
    }
    assert untransformed == dict(plain=93.04, gradient=93.37)
    assert "untransformed, without averaging" in record["caption"]


def test_shifts_keep_both_heads_and_compare_the_refitted(drawings):
    table, record = drawings.shown("invclr_shifts")
    assert set(table["kind"]) == {"mean", "spread"} and table["series"].nunique() == 2
    rows = {(r["group"], r["kind"], r["shift"], r["role"]): r for r in record["published"]}
    assert ("background", "spread", 0.2, "plain") not in rows
    assert rows["h", "mean", -0.5, "plain"]["published"] == 0.005058
    place = "group == 'h' and kind == 'mean' and x == -0.5 and role == 'plain' and series == 'head of the shifted data'"
    assert rows["h", "mean", -0.5, "plain"]["ours"] == pytest.approx(table.query(place)["mean"].item())


def test_jitter_has_the_strengths_and_their_published_values(drawings, as_published):
    assert set(drawings.shown("invclr_jitter")[0]["group"]) == {"all"}
    rows = as_published.shown("invclr_jitter")[1]["published"]
    found = {(r["metric"], r["strength"], r["role"]): r["published"] for r in rows}
    assert found["accuracy", 0.5, "plain"] == 92.59 and found["cross_entropy", 1.0, "gradient"] == 0.3759


def test_labels_are_averaged_over_parts_before_seeds(drawings, as_published):
    table = drawings.shown("invclr_labels")[0].set_index(["role", "fraction"])
    assert (table["n"] == 2).all()
    parts = [drawings.table(f"plain-s{s}", "labels.csv").query("fraction == 0.5")["value"] for s in SEEDS]
    assert [len(part) for part in parts] == [2, 2]
    assert table.loc[("plain", 0.5), "mean"] == pytest.approx(np.mean([part.mean() for part in parts]))
    whole = as_published.shown("invclr_labels")[1]["published"]
    found = {(r["metric"], r["fraction"], r["role"]): r["published"] for r in whole}
    assert found["accuracy", 1.0, "gradient"] == 93.38


def test_ensembling_and_kinds_compare_photographs_with_the_paper(as_published):
    found = as_published.shown("invclr_ensembling")[1]["published"]
    theirs = {(r["method"], r["metric"], r["views"], r["role"]): r["published"] for r in found}
    assert theirs["ensembling", "accuracy", 5, "plain"] == 93.62
    kinds, record = as_published.shown("invclr_averaging_kinds")
    assert set(kinds["kind"]) == {"all", "differentiable", "none"}
    rows = {(r["kind"], r["metric"], r["views"], r["role"]): r["published"] for r in record["published"]}
    assert rows["all", "accuracy", 5, "gradient"] > 90


def test_samples_show_items_twice_and_photographs_untransformed_too(drawings, as_published):
    table = drawings.shown("invclr_samples")[0]
    assert len(table) == 16 and {"item", "view", "target", "h"} <= set(table)
    assert table.groupby("item")["target"].nunique().eq(1).all() and table.groupby("item")["h"].nunique().eq(2).all()
    photographs, record = as_published.shown("invclr_samples")
    classes = {folder.name for folder in (as_published.root / "data" / "tiny" / "train").iterdir()}
    assert set(photographs["target"]) <= classes and photographs["target"].notna().all()
    assert "untransformed" in record["caption"]


def test_defects_are_the_table_itself(drawings):
    table, record = drawings.shown("invclr_defects")
    assert table["number"].unique().tolist() == list(range(1, 26)) and record["runs"] == []
    assert "13 of 25 defects touch numbers" in record["caption"]


@pytest.mark.parametrize("roles", [["gradient"], ["finite_difference", "gradient"]])
def test_any_roles_can_be_drawn(drawings, tmp_path, roles):
    figures = {
        name: {role: role for role in roles} for name in NAMES if name not in ("invclr_samples", "invclr_defects")
    }
    few = drawings.under(tmp_path / "few", "small", figures=figures)
    for name in figures:
        if name == "invclr_tasks":
            with pytest.raises(ValueError, match="no run has a paired run"):
                few.draw(name)
        else:
            record = few.shown(name)[1]
            assert list(dict.fromkeys(run["role"] for run in record["runs"])) == roles
    assert "Without a paired run" in few.shown("invclr_claims")[1]["caption"]


def test_curves_say_on_how_many_items_and_are_not_what_is_compared(drawings, as_published):
    "The logs hold measurements on few items; published errors stand beside the final evaluation."
    assert "of 20 test items over ten random views" in drawings.shown("invclr_variance")[1]["caption"]
    for name in ("invclr_alpha", "invclr_target_error"):
        assert "fitted on 80 training items, tested on 20 test items" in drawings.shown(name)[1]["caption"]
    record = drawings.shown("invclr_target_error")[1]
    ours = {row["role"]: row["ours"] for row in record["published"]}
    for role, value in ours.items():
        tables = [drawings.table(f"{role}-s{seed}", "downstream.csv") for seed in SEEDS]
        single = [table.query("method == 'single' and task == 'mean'")["value"].item() for table in tables]
        assert value == pytest.approx(np.mean(single))
    assert set(ours) == {"plain", "gradient"} and "final evaluation" in record["caption"]
    assert "final evaluation" not in as_published.shown("invclr_target_error")[1]["caption"]


def test_captions_say_what_photographs_were_shown_as(drawings, as_published):
    assert "features of single views" in drawings.shown("invclr_labels")[1]["caption"]
    labels = as_published.shown("invclr_labels")[1]["caption"]
    assert "features of untransformed images" in labels and "only 100 % is certain" in labels
    for name in ("invclr_jitter", "invclr_shifts"):
        assert "without crops and greys" in as_published.shown(name)[1]["caption"]
        assert "without crops and greys" not in drawings.shown(name)[1]["caption"]
    assert "cannot exceed about .8" in as_published.shown("invclr_alpha")[1]["caption"]
    assert "cannot exceed" not in drawings.shown("invclr_alpha")[1]["caption"]


def test_missing_tables_and_strengths_are_named(drawings, tmp_path):
    suite = drawings.copy(tmp_path)
    suite.change("plain-s0", "averaging.csv", lambda table: table[table["views"] > 1])
    for run in suite.runs.glob("*-s?"):
        suite.change(run.name, "shifts.csv", lambda table: table[table["kind"] != "strength"])
        suite.change(run.name, "averaging.csv", lambda table: table[table["views"] > 1])
    with pytest.raises(ValueError, match="no rows of kind strength"):
        suite.draw("invclr_jitter")
    with pytest.raises(ValueError, match="averaging.csv has no row for one view; evaluate with 1 in counts"):
        suite.draw("invclr_claims")
    (suite.runs / "plain-s0" / "averaging.csv").unlink()
    with pytest.raises(FileNotFoundError, match="averaging.csv"):
        suite.draw("invclr_averaging")


def test_report_puts_them_last(drawings, tmp_path):
    suite = drawings.under(tmp_path / "report", "quick")
    for name in ("invclr_claims", "invclr_samples", "invclr_variance", "invclr_defects"):
        suite.draw(name)
    record = read_json(suite.figures / "invclr_defects.json")
    for other in ("open_problem", "dai_time"):
        write_json(suite.figures / f"{other}.json", record | dict(name=other))
    with suite.inside():
        text = report.write_report("quick").read_text()
    expected = ["dai_time", "open_problem", "invclr_claims", "invclr_samples", "invclr_variance", "invclr_defects"]
    assert sorted(expected, key=lambda name: text.index(f'<section id="{name}">')) == expected


def figure_run(role, seed=0, title="CIFAR-10", task="classification", **params):
    """A run that was never made."""
    run = SimpleNamespace(params=params, result=dict(data=dict(title=title, task=task)))
    return FigureRun(run, role, role, seed)


def test_paired_runs_agree_in_everything_but_the_penalty():
    runs = [figure_run("plain", penalty_weight=0.0, epochs=5, start="quick/base-s0")]
    runs += [figure_run("gradient", 1, penalty_weight=0.1, epochs=5, start="quick/base-s1", penalty="gradient")]
    runs += [figure_run("strong", penalty_weight=0.5, epochs=5, start="")]
    runs += [figure_run("weak", penalty_weight=0.5, epochs=6, start="quick/base-s0")]
    assert ip.paired_runs(runs) == dict(gradient="plain")


@pytest.mark.parametrize("name", ["temperature", "momentum", "schedule", "test_size", "precision", "ramp_epochs"])
def test_a_pair_differs_in_nothing_else(name):
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
