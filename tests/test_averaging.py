"Averages of features against what is known of a linear encoder, and their competitor."

import math
import weakref

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import dainv.averaging as averaging
from dainv.augment import named_uniforms
from dainv.averaging import (
    averaged_features,
    averaging_and_ensembling,
    averaging_curve,
    ensembling_curve,
    fit_readout,
    readout_scores,
)
from dainv.encoding import encode, encode_passes
from dainv.probes import fit_linear_probe
from dainv.ridge import fit_ridge
from dainv.spirograph import spirograph_task
from dainv.views import SpirographViews, ViewDraws


class Noisy:
    "Items of four numbers; a view adds noise of known variance to each."

    names, kinds, device = ("a", "b", "c", "d"), ("all", "fixed", "none"), "cpu"
    deviation = torch.tensor([1.0, 0.5, 0.2, 0.0])

    def __init__(self, items=1500, task="regression", scale=1.0):
        self.task, self.scale, self.n = task, scale, items
        self.target_names = ("first", "second") if task == "regression" else ("low", "middle", "high")
        generator = torch.Generator().manual_seed(0)
        self.items, self._targets = {}, {}
        for half in ("train", "test"):
            x = self.items[half] = torch.randn(items, 4, generator=generator)
            values = torch.stack([x[:, 0] + x[:, 1], x[:, 2] + x[:, 3]], 1)
            values = values + 0.5 * torch.randn(items, 2, generator=generator)
            classes = torch.bucketize(values[:, 0].contiguous(), torch.tensor([-0.5, 0.5]))
            self._targets[half] = values if task == "regression" else classes

    def count(self, half):
        return len(self.items[half])

    def targets(self, half):
        return self._targets[half]

    def draw(self, half, ids, passes, views, seed):
        u = named_uniforms(4, seed, int(half == "test"), ids, passes, views)
        return ViewDraws(self.scale * self.deviation * (u - 0.5) * 12**0.5)

    def images(self, half, ids, draws):
        x = self.items[half][ids]
        return (x if draws is None else x + draws.alpha)[:, :, None, None]

    def restricted(self, only):
        return self if only == "all" else Noisy(self.n, self.task, 0.0)


def mixer(units=6):
    torch.manual_seed(3)
    return nn.Sequential(nn.Flatten(), nn.Linear(4, units, bias=False)).requires_grad_(False)


def means(table):
    return table[table.task == "mean"].set_index("views")


def test_one_view_is_the_plain_pass():
    drawings = SpirographViews(spirograph_task(30, 20, size=8))
    encoder = nn.Sequential(nn.Flatten(), nn.Linear(3 * 64, 5))
    ((views, features),) = averaged_features(encoder, drawings, "test", [1], seed=4)
    assert views == 1 and torch.equal(features, encode(encoder, drawings, "test", seed=4))


@given(st.lists(st.integers(1, 12), min_size=1, max_size=5, unique=True).map(sorted), st.integers(0, 3))
@settings(deadline=None, max_examples=25)
def test_averages_are_those_of_the_stacked_passes(counts, seed):
    views, ids = Noisy(40), torch.tensor([3, 17, 5])
    stacked = torch.stack(list(encode_passes(mixer(), views, "train", counts[-1], ids, seed=seed)))
    found = dict(averaged_features(mixer(), views, "train", counts, ids, seed=seed))
    assert list(found) == counts
    for m, features in found.items():
        torch.testing.assert_close(features, stacked[:m].mean(0))


def test_the_variance_that_is_left_falls_as_one_over_m():
    views, encoder = Noisy(4000), mixer()
    truth = (views.deviation.diag() @ encoder[1].weight.T).square().sum().item()
    still = encode(encoder, views, "test", transformed=False)
    for m, features in averaged_features(encoder, views, "test", [1, 4, 16]):
        assert (features - still).square().sum(1).mean().item() == pytest.approx(truth / m, rel=0.05)


def test_memory_does_not_grow_with_the_number_of_views(monkeypatch):
    "No more than two passes are alive at any time, in both halves, with and without ensembling."
    alive, seen = [], []

    def watched(*args, **options):
        for features in encode_passes(*args, **options):
            seen.append(weakref.ref(features))
            yield features
            del features
            alive.append(sum(reference() is not None for reference in seen))

    monkeypatch.setattr(averaging, "encode_passes", watched)
    list(averaged_features(mixer(), Noisy(50), "test", [1, 8]))
    averaging_and_ensembling(mixer(), Noisy(50), [1, 2, 8], ensembling=True)
    assert len(alive) == 8 + 8 + 8 and max(alive) <= 1


@pytest.mark.parametrize("task", ["regression", "classification"])
def test_fewer_views_can_be_ensembled_than_averaged(task):
    "The rows are those of ensembling all, and no readout of copies is fitted beyond."
    views, encoder = Noisy(300, task), mixer()
    averages, compared = averaging_and_ensembling(encoder, views, [1, 2, 6], ensembling=[1, 2])
    all_averages, of_all = averaging_and_ensembling(encoder, views, [1, 2, 6])
    fewer = compared[compared.method == "ensembling"].reset_index(drop=True)
    assert averages.equals(all_averages) and set(fewer.views) == {1, 2}
    assert fewer.equals(of_all[(of_all.method == "ensembling") & (of_all.views < 6)].reset_index(drop=True))
    between = ensembling_curve(encoder, views, [1, 6], ensembling=[2])
    assert between[between.method == "ensembling"].value.tolist() == fewer[fewer.views == 2].value.tolist()


def test_copies_beyond_the_largest_ensemble_are_not_kept(monkeypatch):
    "Once the last ensemble is fitted, no more than the current pass is alive."
    alive, seen = [], []

    def watched(*args, **options):
        for features in encode_passes(*args, **options):
            seen.append(weakref.ref(features))
            yield features
            del features
            alive.append(sum(reference() is not None for reference in seen))

    monkeypatch.setattr(averaging, "encode_passes", watched)
    averaging_and_ensembling(mixer(), Noisy(200, "classification"), [1, 2, 8], ensembling=[1, 3])
    assert alive[:2] == [1, 2] and len(alive) == 16 and max(alive[2:]) == 1


def test_the_prediction_is_right_within_sampling_error():
    "For a fixed head, over many fresh draws of the test views."
    views, encoder = Noisy(1500), mixer()
    table = means(averaging_and_ensembling(encoder, views, [1, 2, 5, 20], ensembling=False)[0])
    features = dict(averaged_features(encoder, views, "train", [20]))[20]
    head, targets = fit_readout(views, features, views.targets("train")), views.targets("test")
    for m in (1, 2, 5):
        draws = [dict(averaged_features(encoder, views, "test", [m], passes=p))[m] for p in range(1, 13)]
        errors = [readout_scores(views, head(x), targets)[("mse", "mean")] for x in draws]
        assert table.predicted[m] == pytest.approx(np.mean(errors), rel=0.02), m
    assert (table.fixed_head / table.predicted).between(0.9, 1.1).all()
    assert table.measured[20] == table.fixed_head[20] == table.predicted[20]


def test_the_prediction_is_the_closed_form():
    "Error of the infinite average, plus the variance of the answers over M, from the true covariance."
    views, encoder = Noisy(4000), mixer()
    table = averaging_and_ensembling(encoder, views, [1, 3, 30], ensembling=False)[0]
    features = dict(averaged_features(encoder, views, "train", [30]))[30]
    head, targets = fit_readout(views, features, views.targets("train")), views.targets("test").double()
    limit = (head(encode(encoder, views, "test", transformed=False)) - targets).square().mean(0)
    response = encoder[1].weight.T.double() @ head.fitted.weight
    variance = (views.deviation[:, None] * response).square().sum(0)
    for number, task in enumerate(views.target_names):
        part = table[table.task == task].set_index("views").predicted
        for m in (1, 3, 30):
            expected = (limit[number] + variance[number] / m).item()
            assert part[m] == pytest.approx(expected, rel=0.03), (task, m)


def test_the_prediction_for_one_view_is_the_mean_error_of_the_single_views():
    views, encoder = Noisy(200), mixer()
    table = averaging_and_ensembling(encoder, views, [1, 6], ensembling=False)[0]
    features = dict(averaged_features(encoder, views, "train", [6]))[6]
    head, targets = fit_readout(views, features, views.targets("train")), views.targets("test")
    errors = [(head(x) - targets).square().mean().item() for x in encode_passes(encoder, views, "test", 6)]
    assert means(table).predicted[1] == pytest.approx(np.mean(errors), rel=1e-5)


def test_averaging_helps_and_a_head_of_its_own_helps_at_few_views():
    table = means(averaging_curve(mixer(), Noisy(2000), counts=[1, 5, 30]))
    assert table.measured.is_monotonic_decreasing and table.measured[30] < 0.5 * table.measured[1]
    assert table.measured[1] < 0.95 * table.fixed_head[1]
    assert set(averaging_curve(mixer(), Noisy(100), [1, 2]).task) == {"mean", "first", "second"}


def test_the_head_of_all_copies_is_that_of_the_stacked_copies():
    views, encoder = Noisy(1200), mixer()
    _, compared = averaging_and_ensembling(encoder, views, [1, 4], readout=dict(strengths=[1e-3], held_out=0))
    stacked = torch.cat(list(encode_passes(encoder, views, "train", 4)))
    head = fit_ridge(stacked, views.targets("train").repeat(4, 1), strengths=[1e-3], held_out=0)
    answers = torch.stack([head.predict(x) for x in encode_passes(encoder, views, "test", 4)]).mean(0)
    value = compared.set_index(["method", "views"]).value
    assert value["ensembling", 4] == pytest.approx((answers - views.targets("test")).square().mean().item(), rel=1e-6)


@pytest.mark.parametrize("task", ["regression", "classification"])
def test_with_one_view_averaging_and_ensembling_are_the_same(task):
    value = ensembling_curve(mixer(), Noisy(1200, task), [1, 3]).set_index(["method", "views", "metric"]).value
    for metric in {"regression": ["mse"], "classification": ["accuracy", "cross_entropy"]}[task]:
        assert value["averaging", 1, metric] == pytest.approx(value["ensembling", 1, metric], rel=2e-3)


def test_copies_of_a_held_out_item_are_held_out():
    "Otherwise the strength would be chosen on items whose other views were fitted."
    views, encoder = Noisy(1200), mixer(200)
    generator = torch.Generator().manual_seed(1)
    views._targets["train"] = torch.randn(
        1200, 2, generator=generator
    )  # nothing to learn: the strongest penalty is best
    copies = averaging._Copies(views, views.targets("train"), seed=0, options={})
    for features in encode_passes(encoder, views, "train", 5):
        copies.add(features)
    assert copies.readout().strength == 10.0
    assert [part.n_items for part in copies.parts] == [5 * 960, 5 * 240]


def test_classes_are_averaged_and_ensembled():
    views, encoder = Noisy(1200, "classification"), mixer()
    table, compared = averaging_and_ensembling(encoder, views, [1, 3, 10])
    accuracy, loss = (
        table[table.metric == metric].set_index("views").measured for metric in ("accuracy", "cross_entropy")
    )
    assert accuracy[10] > accuracy[1] + 0.05 and loss[10] < loss[1]
    assert table.predicted.isna().all() and set(table.task) == {"all"}
    value = compared.set_index(["method", "views", "metric"]).value
    assert value["ensembling", 10, "accuracy"] > accuracy[1] and value["ensembling", 10, "cross_entropy"] < loss[1]
    features = dict(averaged_features(encoder, views, "train", [10]))[10]
    probe = fit_linear_probe(features, views.targets("train"), 3)
    test = dict(averaged_features(encoder, views, "test", [10]))[10]
    logits, labels = probe(test), views.targets("test")
    assert accuracy[10] == (logits.argmax(1) == labels).double().mean().item()
    assert loss[10] == pytest.approx(nn.functional.cross_entropy(logits, labels).item(), rel=1e-5)


def test_an_answer_that_rules_out_the_truth_has_a_finite_loss():
    views = Noisy(10, "classification")
    certain = torch.tensor([[1.0, 0.0, 0.0]]).double()
    assert math.isfinite(readout_scores(views, certain, torch.tensor([1]))[("cross_entropy", "all")])


@pytest.mark.parametrize("task", ["regression", "classification"])
def test_where_nothing_varies_one_view_is_as_good_as_many(task, monkeypatch):
    views, asked = Noisy(300, task), []
    passes = averaging.encode_passes
    monkeypatch.setattr(averaging, "encode_passes", lambda *a, **k: asked.append(a[3]) or passes(*a, **k))
    table = averaging_curve(mixer(), views, [1, 5, 20], kinds=["fixed"])
    assert asked == [1, 1] and list(table.views.unique()) == [1, 5, 20]
    assert (table.groupby(["metric", "task"]).measured.nunique() == 1).all()
    assert table.predicted.equals(table.measured) if task == "regression" else table.predicted.isna().all()
    mean = table[table.task.isin(["mean", "all"])].iloc[0].measured
    single = averaging_curve(mixer(), views.restricted("fixed"), [1])
    assert single[single.task.isin(["mean", "all"])].iloc[0].measured == mean


def test_items_and_seeds_are_those_that_were_asked_for():
    views, encoder = Noisy(400), mixer()
    ids = dict(train_ids=torch.arange(200), test_ids=torch.arange(50, 150))
    first, again, other = (averaging_curve(encoder, views, [1, 3], seed=seed, **ids) for seed in (0, 0, 1))
    assert first.equals(again) and not first.measured.equals(other.measured)
    features = dict(averaged_features(encoder, views, "train", [3], ids["train_ids"]))[3]
    head = fit_readout(views, features, views.targets("train")[:200])
    test = dict(averaged_features(encoder, views, "test", [3], ids["test_ids"]))[3]
    error = (head(test) - views.targets("test")[50:150]).square().mean().item()
    assert means(first).measured[3] == pytest.approx(error, rel=1e-9)


def test_a_single_count_has_no_prediction():
    assert averaging_curve(mixer(), Noisy(100), [1]).predicted.isna().all()


def test_numbers_of_views_may_come_from_numpy():
    views = Noisy(100)
    curve = averaging_curve(mixer(), views, np.array([1, 3]))
    assert curve.equals(averaging_curve(mixer(), views, [1, 3]))


@pytest.mark.parametrize("counts", [[], [0, 1], [-1], [2, 1], [1, 1], [1.5], [True, 2]])
def test_numbers_of_views_are_checked(counts):
    for call in (
        lambda: averaging_curve(mixer(), Noisy(50), counts),
        lambda: ensembling_curve(mixer(), Noisy(50), counts),
        lambda: averaged_features(mixer(), Noisy(50), "test", counts),
    ):
        with pytest.raises(ValueError, match="counts="):
            call()


def test_other_mistakes_are_named():
    with pytest.raises(ValueError, match="at least one"):
        averaging_curve(mixer(), Noisy(50), kinds=[])
    with pytest.raises(ValueError, match="ensembling=.* at most 3, the largest of counts"):
        ensembling_curve(mixer(), Noisy(50), [1, 3], ensembling=[1, 5])
    with pytest.raises(ValueError, match="ensembling="):
        ensembling_curve(mixer(), Noisy(50), [1, 3], ensembling=[])
    with pytest.raises(ValueError, match="no item of the train half"):
        averaging_curve(mixer(), Noisy(50), train_ids=torch.arange(0))
    with pytest.raises(ValueError, match="only='shape' is unknown"):
        averaging_curve(mixer(), SpirographViews(spirograph_task(5, 5, size=8)), kinds=["shape"])
