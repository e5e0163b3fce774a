"What is left of nuisances in an encoder, and its features on tasks: tables on encoders whose answers are known."

import math

import numpy as np
import pytest
import torch
from torch import nn

import dainv.nuisances as nuisances
from dainv.averaging import averaging_curve, fit_readout, readout_scores
from dainv.data import ImageData, Split
from dainv.encoding import encode, encode_passes
from dainv.nuisances import (
    alpha_prediction,
    downstream_table,
    label_table,
    shift_table,
    single_views,
    training_subset,
    variance_table,
)
from dainv.ridge import fit_ridge
from dainv.spirograph import NUISANCES, TARGETS, spirograph_task
from dainv.variance import variance_parts
from dainv.views import ColourViews, SpirographViews


class Statistics(nn.Module):
    "Mean, standard deviation and extremes of each channel."

    def __init__(self, scale=1.0):
        super().__init__()
        self.scale = scale

    def forward(self, images):
        flat = images.flatten(2)
        return self.scale * torch.cat([flat.mean(2), flat.std(2), flat.amax(2), flat.amin(2)], 1)


class Blind(nn.Module):
    "Features that depend on nothing."

    def forward(self, images):
        return images.new_ones(len(images), 4)


@pytest.fixture(scope="module")
def drawings():
    torch.set_num_threads(1)
    return SpirographViews(spirograph_task(400, 250, size=8))


@pytest.fixture(scope="module")
def photographs():
    "Three classes that differ by colour."
    generator, parts = torch.Generator().manual_seed(0), []
    for n in (180, 90):
        labels = torch.arange(n) % 3
        base = torch.tensor([[200, 60, 60], [60, 200, 60], [60, 60, 200]])[labels][:, :, None, None]
        noise = torch.randint(-50, 50, (n, 3, 8, 8), generator=generator)
        parts.append(Split((base + noise).clamp(0, 255).byte(), labels))
    return ColourViews(ImageData(*parts, ["red", "green", "blue"], "colours", "Colours", "0"))


def value(table, **where):
    "The only value in the rows that are asked for."
    for name, wanted in where.items():
        table = table[table[name] == wanted]
    (found,) = table.value
    return found


def test_parameters_that_are_there_are_found_and_others_are_not(drawings):
    table = alpha_prediction(Statistics(), drawings).set_index(["features", "name"])
    assert set(table.loc["raw"].index) == {*NUISANCES, "mean"}
    assert (table.r2.loc["standardised"][["rback", "gback", "bback"]] > 0.95).all()
    assert abs(table.r2["standardised", "h"]) < 0.1
    assert table.chance["raw", "h"] == pytest.approx(1 / 3) and table.chance["raw", "mean"] == pytest.approx(
        0.080556, rel=1e-4
    )
    assert table.strength.loc["raw"].eq(1e-5).all()


def test_parameters_are_predicted_as_by_hand(drawings):
    ids = dict(train_ids=torch.arange(300), test_ids=torch.arange(20, 200))
    table = alpha_prediction(Statistics(), drawings, seed=5, **ids).set_index(["features", "name"])
    halves = [(half, ids[f"{half}_ids"]) for half in ("train", "test")]
    x, x_test = (encode(Statistics(), drawings, half, some, seed=5) for half, some in halves)
    alpha, truth = (drawings.draw(half, some, 0, 0, 5).alpha for half, some in halves)
    fit = fit_ridge(x, alpha, strengths=[1e-5], held_out=0, standardise=False)
    errors = (fit.predict(x_test) - truth).square().mean(0)
    for name, error in zip(NUISANCES, errors.tolist(), strict=True):
        assert table.mse["raw", name] == pytest.approx(error, rel=1e-9)
    assert table.mse["raw", "mean"] == pytest.approx(errors.mean().item(), rel=1e-9)


def test_small_features_hide_nothing_once_they_are_standardised(drawings):
    large, small = (
        alpha_prediction(Statistics(scale), drawings).set_index(["features", "name"]).r2 for scale in (1.0, 2.0**-12)
    )
    assert large["standardised", "mean"] == pytest.approx(small["standardised", "mean"], rel=1e-6)
    assert large["raw", "mean"] > 0.5 and small["raw", "mean"] < 0.1


def test_an_encoder_that_sees_nothing_is_at_chance(drawings):
    table = alpha_prediction(Blind(), drawings)
    assert (table.mse / table.chance).between(0.85, 1.15).all() and table.r2.between(-0.05, 0.001).all()


def test_without_a_shift_both_heads_are_the_same(drawings):
    table = shift_table(Statistics(), drawings, [("background", "mean", 0.0), ("h", "spread", 0.0)])
    usual, test = single_views(Statistics(), drawings)
    head = fit_readout(drawings, usual, drawings.targets("train"))
    expected = readout_scores(drawings, head(test), drawings.targets("test"))
    for group in ("background", "h"):
        for refit in (True, False):
            for task in ("mean", *TARGETS):
                found = value(table, group=group, refit=refit, task=task)
                assert found == pytest.approx(expected[("mse", task)], rel=1e-9)


def test_a_shift_moves_what_is_tested_and_if_asked_what_is_fitted(drawings):
    table = shift_table(Statistics(), drawings, [("background", "mean", 0.4)], seed=2)
    moved = drawings.shifted("background", "mean", 0.4)
    test = encode(Statistics(), moved, "test", seed=2)
    for refit, source in ((True, moved), (False, drawings)):
        head = fit_readout(drawings, encode(Statistics(), source, "train", seed=2), drawings.targets("train"), seed=2)
        error = readout_scores(drawings, head(test), drawings.targets("test"))[("mse", "mean")]
        assert value(table, refit=refit, task="mean") == pytest.approx(error, rel=1e-9)
    assert value(table, refit=True, task="mean") < value(table, refit=False, task="mean")


def test_features_at_hand_spare_a_pass(drawings, monkeypatch):
    train, test = single_views(Statistics(), drawings)
    tables = [
        shift_table(Statistics(), drawings, [("h", "mean", 0.1)]),
        alpha_prediction(Statistics(), drawings),
        label_table(Statistics(), drawings, [0.5, 1.0], 1),
    ]
    passes, counted = nuisances.encode, []
    monkeypatch.setattr(nuisances, "encode", lambda *a, **k: counted.append(a[2]) or passes(*a, **k))
    assert shift_table(Statistics(), drawings, [("h", "mean", 0.1)], train_features=train).equals(tables[0])
    assert counted == ["test", "train"]
    assert alpha_prediction(Statistics(), drawings, features=(train, test)).equals(tables[1])
    assert label_table(Statistics(), drawings, [0.5, 1.0], 1, features=(train, test)).equals(tables[2])
    assert len(counted) == 2


def test_fewer_labels_leave_the_test_items_alone(drawings, monkeypatch):
    judged, score = [], nuisances.readout_scores
    monkeypatch.setattr(nuisances, "readout_scores", lambda v, a, t: judged.append(len(t)) or score(v, a, t))
    table = label_table(Statistics(), drawings, [0.1, 0.5, 1.0], subsets=2)
    assert set(judged) == {250} and len(judged) == 5
    assert table.groupby("fraction").n_train.unique().map(list).tolist() == [[40], [200], [400]]
    assert table.groupby("fraction").subset.nunique().tolist() == [2, 2, 1]
    means = table.groupby("fraction").value.mean()
    assert means[1.0] < means[0.1]


def test_parts_are_nested_and_each_class_has_its_share():
    numbers, classes = torch.zeros(100, 4), torch.arange(100) % 4
    for targets in (numbers, classes):
        smaller, larger = (training_subset(targets, fraction, 3).tolist() for fraction in (0.2, 0.6))
        assert set(smaller) < set(larger) and smaller == sorted(smaller)
        assert (len(smaller), len(larger)) == (20, 60)
        assert training_subset(targets, 0.2, 4).tolist() != smaller
    assert classes[training_subset(classes, 0.2, 3)].bincount().tolist() == [5] * 4
    assert len(training_subset(numbers, 1e-9)) == 1 and len(training_subset(numbers, 1.0)) == 100


def test_photographs_have_the_same_tables(photographs):
    labels = label_table(Statistics(), photographs, [0.1, 1.0], subsets=2)
    assert set(labels.metric) == {"accuracy", "cross_entropy"}
    assert labels.groupby("fraction").n_train.first().tolist() == [18, 180]
    shifts = shift_table(Statistics(), photographs, [("colour", "strength", s) for s in (0.0, 0.5)])
    assert value(shifts, shift=0.0, refit=True, metric="accuracy") == 1.0
    alpha = alpha_prediction(Statistics(), photographs)
    assert set(alpha.name) == {*photographs.names, "mean"}
    table = downstream_table(Statistics(), photographs, n_views=3)
    assert set(table.method) == {"single", "averaged", "untransformed"} and set(table.task) == {"all"}
    plain = single_views(Statistics(), photographs, transformed=False)
    assert downstream_table(Statistics(), photographs, n_views=3, untransformed=plain).equals(table)
    assert value(table, method="untransformed", metric="accuracy") == 1.0


def test_the_main_table_is_that_of_the_averages(drawings):
    table = downstream_table(Statistics(), drawings, n_views=4)
    curve = averaging_curve(Statistics(), drawings, [1, 2, 4])
    for method, m in (("single", 1), ("averaged", 4)):
        for task in ("mean", *TARGETS):
            expected = curve[(curve.views == m) & (curve.task == task)].measured.item()
            assert value(table, method=method, task=task) == pytest.approx(expected, rel=1e-9)
    assert set(table.method) == {"single", "averaged"}
    assert downstream_table(Statistics(), drawings, 4, curve=curve).value.tolist() == pytest.approx(
        table.value.tolist()
    )


def test_variances_of_three_spaces_come_from_the_same_passes(drawings):
    torch.manual_seed(0)
    head = nn.Sequential(nn.Linear(12, 5), nn.BatchNorm1d(5)).train()
    table = variance_table(Statistics(), drawings, 3, head=head, seed=1).set_index("space")
    passes = list(encode_passes(Statistics(), drawings, "test", 3, seed=1))
    with torch.no_grad():
        projected = [head.eval()(x) for x in passes]
    for space, (found, normalise) in dict(
        unit=(passes, True), raw=(passes, False), projected=(projected, True)
    ).items():
        expected = variance_parts(found, normalise)
        np.testing.assert_allclose([table.loc[space][k] for k in expected], list(expected.values()), rtol=1e-5)
    assert set(variance_table(Statistics(), drawings, 2).space) == {"unit", "raw"}


def test_the_head_is_left_in_its_mode(drawings):
    head = nn.Sequential(nn.Linear(12, 5), nn.BatchNorm1d(5)).train()
    before = head[1].running_mean.clone()
    variance_table(Statistics(), drawings, 2, head=head)
    assert head.training and torch.equal(before, head[1].running_mean)


def test_what_never_varies_is_told(drawings):
    fixed = drawings.restricted("fixed")
    table = variance_table(Statistics(), fixed, 3).set_index("space")
    assert table.conditional.eq(0).all() and table.ratio.eq(0).all()
    assert variance_table(Blind(), drawings, 3).ratio.isna().all()
    alpha = alpha_prediction(Statistics(), fixed)
    assert alpha.r2.isna().all() and alpha.mse.max() < 1e-9 and alpha.chance.eq(0).all()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda v: shift_table(Statistics(), v, []), "shifts="),
        (lambda v: shift_table(Statistics(), v, [("h", 0.1)]), "triples"),
        (lambda v: shift_table(Statistics(), v, [("shape", "mean", 0.1)]), "'shape' is unknown"),
        (lambda v: shift_table(Statistics(), v, [("h", "rotate", 0.1)]), "'rotate' is unknown"),
        (lambda v: label_table(Statistics(), v, []), "fractions="),
        (lambda v: label_table(Statistics(), v, [0.0]), "fraction=0.0"),
        (lambda v: label_table(Statistics(), v, [1.5]), "fraction=1.5"),
        (lambda v: label_table(Statistics(), v, [0.5], subsets=0), "subsets=0"),
        (lambda v: label_table(Statistics(), v, [1e-6]), "1 item"),
        (lambda v: alpha_prediction(Statistics(), v, train_ids=torch.arange(0)), "no item of the train half"),
        (lambda v: label_table(Statistics(), v, test_ids=torch.arange(0)), "no item of the test half"),
        (lambda v: downstream_table(Statistics(), v, n_views=1), "n_views=1"),
        (lambda v: variance_table(Statistics(), v, 1), "at least two"),
        (lambda v: variance_table(Statistics(), v, 0), "n_passes=0"),
        (lambda v: variance_table(Statistics(math.inf), v), "not finite"),
    ],
)
def test_what_is_wrong_is_named(drawings, call, message):
    with pytest.raises(ValueError, match=message):
        call(drawings)
