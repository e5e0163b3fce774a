"Variance under transformation against NumPy, closed forms and encoders that ignore one thing or the other."

import math
import weakref

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from dainv.encoding import encode_passes
from dainv.spirograph import spirograph_task
from dainv.variance import Spread, variance_parts
from dainv.views import SpirographViews


def passes(n_passes, items, units, seed=0, within=0.3):
    generator = torch.Generator().manual_seed(seed)
    of_item = torch.randn(items, units, generator=generator)
    return of_item + within * torch.randn(n_passes, items, units, generator=generator)


class Answers(nn.Module):
    "Features that are some function of the images."

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, images):
        return self.function(images)


@given(st.integers(2, 6), st.integers(2, 7), st.integers(1, 5), st.booleans())
@settings(deadline=None, max_examples=40)
def test_it_is_that_of_numpy_on_the_stacked_passes(n_passes, items, units, normalise):
    stacked = passes(n_passes, items, units)
    h = (F.normalize(stacked.double(), dim=2) if normalise else stacked.double()).numpy()
    within = np.var(h, axis=0, ddof=1).sum(1).mean()
    total = within * (1 - 1 / n_passes) + np.var(h.mean(0), axis=0, ddof=1).sum()
    parts = variance_parts(iter(stacked), normalise)
    np.testing.assert_allclose([parts["conditional"], parts["total"]], [within, total], rtol=1e-9, atol=1e-12)
    assert (parts["n_items"], parts["n_passes"]) == (items, n_passes)


def test_both_variances_are_unbiased():
    "Mean over many small experiments, where the factors (P - 1) / P and (N - 1) / N would show."
    found = [variance_parts(passes(3, 4, 2, seed, within=1.0), normalise=False) for seed in range(2000)]
    means = {name: np.mean([parts[name] for parts in found]) for name in ("conditional", "total")}
    assert means == {"conditional": pytest.approx(2, abs=0.06), "total": pytest.approx(4, abs=0.12)}


def test_an_encoder_that_ignores_the_transformation_has_no_variance_under_it():
    drawings = SpirographViews(spirograph_task(2, 50, size=8)).restricted("fixed")
    encoder = Answers(lambda images: images.flatten(1))
    parts = variance_parts(encode_passes(encoder, drawings, "test", 4))
    assert parts["conditional"] == parts["ratio"] == 0 and parts["total"] > 0.01


def test_an_encoder_that_ignores_the_item_has_the_ratio_one():
    "It answers with the nuisances."
    drawings = SpirographViews(spirograph_task(2, 800, size=8))
    draws = [drawings.draw("test", torch.arange(800), 0, view, 0).alpha for view in range(6)]
    assert variance_parts(draws, normalise=False)["ratio"] == pytest.approx(1, abs=0.02)


def test_passes_and_items_are_not_mixed_up():
    "The published script reads passes of a batch where the items' copies lie one after the other."
    stacked = passes(10, 100, 8, within=0.1).double()
    mixed = stacked.transpose(0, 1).reshape(10, 100, 8).var(0).sum(1).mean().item()
    parts = variance_parts(stacked, normalise=False)
    assert mixed > 0.8 * parts["total"] > 20 * parts["conditional"]
    assert parts["conditional"] == pytest.approx(8 * 0.01, rel=0.1)


def test_small_movements_far_from_the_origin_are_seen():
    stacked = 1e4 + 1e-4 * passes(10, 300, 4, within=1.0).double()
    parts = variance_parts(stacked, normalise=False)
    assert parts["conditional"] == pytest.approx(4e-8, rel=0.1)


def test_the_order_of_the_passes_is_of_no_consequence():
    stacked = passes(5, 20, 3)
    forwards, backwards = variance_parts(stacked), variance_parts(stacked.flip(0))
    assert all(forwards[name] == pytest.approx(backwards[name], rel=1e-12) for name in forwards)


def test_memory_is_that_of_one_pass():
    "Passes are taken one at a time, and none is kept."
    alive = []

    def watched():
        for number in range(6):
            yield (features := passes(1, 30, 4, number)[0])
            alive.append(sum(storage() is not None for storage in storages))
            storages.append(weakref.ref(features))
            del features

    storages = []
    variance_parts(watched())
    assert max(alive) <= 1


def test_features_that_never_vary_have_no_ratio():
    parts = variance_parts([torch.ones(5, 3)] * 3)
    assert parts["conditional"] == parts["total"] == 0 and math.isnan(parts["ratio"])
    assert variance_parts([torch.zeros(5, 3)] * 3)["total"] == 0


@pytest.mark.parametrize(
    ("given_passes", "message"),
    [
        ([torch.ones(5, 3)], "1 pass"),
        ([torch.ones(1, 3)] * 4, "1 item"),
        ([], "0 pass"),
        ([torch.ones(5, 3), torch.ones(4, 3)], "pass 1 is of shape"),
        ([torch.ones(5, 3, 2)], "expected"),
        ([torch.ones(5, 3), torch.ones(5, 3).index_fill(0, torch.tensor([4]), torch.inf)], "item 4 are not finite"),
    ],
)
def test_what_is_wrong_is_named(given_passes, message):
    with pytest.raises(ValueError, match=message):
        variance_parts(given_passes)


def test_several_measures_share_the_passes():
    unit, raw = Spread(), Spread(normalise=False)
    for features in passes(4, 10, 3):
        unit.add(features), raw.add(features)
    assert unit.parts() == variance_parts(passes(4, 10, 3))
    assert raw.parts() == variance_parts(passes(4, 10, 3), normalise=False)


@pytest.mark.parametrize("normalise", [True, False])
def test_noise_about_a_constant_has_no_ratio(normalise):
    torch.manual_seed(0)
    passes = [0.1 + 1e-8 * torch.randn(20, 5) for _ in range(3)]
    assert math.isnan(variance_parts(passes, normalise)["ratio"])
    assert variance_parts([p + torch.randn(20, 5) for p in passes], normalise)["ratio"] > 0.1
