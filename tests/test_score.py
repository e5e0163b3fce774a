"The streamed score against the definition with its N x N matrix."

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from dainv.augment import draw_views, scheme, transform
from dainv.collapse import effective_rank, pc1_share
from dainv.models import build_model
from dainv.score import equidistant_samples, invariance_profile, single_transformations


@pytest.fixture(scope="module")
def images():
    noise = torch.rand(37, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    return (nn.functional.avg_pool2d(noise, 5, 1, 2) * 255).to(torch.uint8)


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    return build_model("allcnn", 10, width=0.05)


def brute_force(network, images, layer, repeat, seed=0):
    "sigma_i = 1 - d(x_i, G(x_i)) / mean_j d(x_i, x_j), by explicit pairs in float64."
    part = nn.Sequential(*[getattr(network, name) for name in network.measured[: network.measured.index(layer) + 1]])
    ids = torch.arange(len(images))
    moved = transform(images, draw_views(scheme("half_heavier_extremes"), ids, ids * 0 + repeat, ids * 0, seed))
    with torch.no_grad():
        a, b = (part.eval()(x).flatten(1).double() for x in (images / 255, moved))
    numerator = ((a - b) ** 2).mean(1)
    denominator = torch.stack([((a - row) ** 2).mean(1) for row in a]).mean(1)
    return (1 - numerator / denominator).numpy()


@pytest.mark.parametrize("layer", ["conv1", "conv5", "conv9"])
@pytest.mark.parametrize("batch_size", [5, 37, 250])
def test_the_score_is_that_of_the_definition(network, images, layer, batch_size):
    profile = invariance_profile(network, images, repeats=2, batch_size=batch_size)
    for repeat in (0, 1):
        ours = profile.query("layer == @layer and repeat == @repeat").sort_values("image").score.to_numpy()
        np.testing.assert_allclose(ours, brute_force(network, images, layer, repeat), atol=2e-4)


@settings(max_examples=10, deadline=None)
@given(st.integers(2, 20), st.floats(0.1, 100), st.floats(-50, 50))
def test_the_score_of_the_input_survives_scale_and_offset(n, factor, offset):
    class Affine(nn.Module):
        def forward(self, x):
            return x * factor + offset

    images = torch.rand(n, 3, 8, 8, generator=torch.Generator().manual_seed(n))
    model = nn.Sequential(Affine())
    profile = invariance_profile(model, images, repeats=1)
    scores = [profile.query("layer == @layer").score.to_numpy() for layer in ("input", "0")]
    np.testing.assert_allclose(*scores, atol=2e-3)


def test_rows_are_complete_and_the_model_is_left_as_it_was(network, images):
    network.train()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    profile = invariance_profile(network, images, layers=["conv2"], repeats=3)
    assert network.training and all(torch.equal(before[n], v) for n, v in network.state_dict().items())
    assert len(profile) == 2 * 37 * 3 and not profile.duplicated(["layer", "image", "repeat"]).any()
    assert profile.score.le(1).all() and profile.score.notna().all()


def test_a_layer_that_ignores_the_image_has_no_score(images):
    class Constant(nn.Module):
        def forward(self, x):
            return torch.ones(len(x), 4)

    profile = invariance_profile(nn.Sequential(Constant()), images, repeats=1)
    assert profile.query("layer == '0'").score.isna().all()


def test_preprocessing_goes_before_the_model_and_not_into_the_input_score(network, images):
    plain = invariance_profile(network, images, repeats=1)
    inverted = invariance_profile(network, images, repeats=1, preprocess=lambda x: 1 - x)
    by_layer = [t.groupby("layer", observed=True).score.median() for t in (plain, inverted)]
    assert by_layer[0]["input"] == by_layer[1]["input"] and by_layer[0]["conv3"] != by_layer[1]["conv3"]


def test_each_kind_of_transformation_alone(network, images):
    kinds = single_transformations("heavier")
    assert set(kinds) == {"flip", "rotation", "shift", "shear", "zoom", "brightness", "contrast"}
    flip = invariance_profile(network, images, kinds["flip"], layers=[], repeats=2).score
    assert (flip == 1).any() and (flip < 1).any(), "about half of the images are flipped, the others untouched"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layers": ["conv99"]}, "conv99"),
        ({"repeats": 0}, "repeats=0"),
        ({"layers": "conv1"}, r"write \['conv1'\]"),
        ({"scheme": "heavy"}, "heavy"),
        ({"images": torch.zeros(1, 3, 32, 32)}, "N of at least 2"),
        ({"images": torch.zeros(4, 1, 32, 32)}, r"\(4, 1, 32, 32\)"),
    ],
)
def test_mistakes_are_named(network, images, change, message):
    with pytest.raises(ValueError, match=message):
        invariance_profile(network, **{"images": images, **change})


def test_a_layer_without_a_tensor_is_named(images):
    class Pair(nn.Module):
        def forward(self, x):
            return x, x

    class Whole(nn.Module):
        def __init__(self):
            super().__init__()
            self.pair = Pair()

        def forward(self, x):
            return self.pair(x)[0]

    with pytest.raises(TypeError, match="'pair' returns a tuple"):
        invariance_profile(Whole(), images)


def test_equidistant_samples_are_of_four_classes_and_tell_their_distances(network, images):
    labels = torch.arange(37) % 6
    found = equidistant_samples(network, images, labels, "conv9", candidates=4, views=9)
    chosen = [found["reference"], *found["others"]]
    assert len({int(labels[i]) for i in chosen}) == 4
    part = nn.Sequential(*[getattr(network, name) for name in network.measured]).eval()
    with torch.no_grad():
        f = part(images[chosen] / 255).flatten(1)
        t = part(found["transformed"] / 255).flatten(1)
    np.testing.assert_allclose(((f[1:] - f[0]) ** 2).mean(1), found["other_distances"], rtol=1e-3)
    np.testing.assert_allclose(((t - f[0]) ** 2).mean(1), found["transformed_distances"], rtol=0.1)
    with pytest.raises(ValueError, match="3 classes"):
        equidistant_samples(network, images, torch.arange(37) % 3, "conv9")


@given(st.integers(1, 8), st.integers(10, 30))
def test_effective_rank_counts_equal_directions(rank, units):
    generator = torch.Generator().manual_seed(rank)
    basis = torch.linalg.qr(torch.randn(units, units, generator=generator, dtype=torch.float64))[0][:rank]
    corners = torch.cat([basis, -basis])
    assert effective_rank(corners) == pytest.approx(rank, rel=1e-6)
    assert pc1_share(corners) == pytest.approx(1 / rank, rel=1e-6)
