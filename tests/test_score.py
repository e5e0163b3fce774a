"The streamed score against the definition with its N x N matrix."

from dataclasses import fields

import numpy as np
import pandas as pd
import pytest
import torch
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from dainv.augment import Scheme, draw_views, scheme, transform
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
        ({"images": torch.zeros(1, 3, 32, 32)}, "at least 2 image"),
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

    with pytest.raises(ValueError, match=r"'pair' returns a tuple.*choose one of pair\[0\], pair\[1\]"):
        invariance_profile(Whole(), images, layers=["pair"])
    assert list(invariance_profile(Whole(), images, repeats=1).layer.cat.categories) == ["input", "pair[0]", "pair[1]"]


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


def definition(rows, moved):
    "Scores (N,) from all pairs in float64."
    rows, moved = rows.double(), moved.double()
    between = torch.stack([(rows - row).square().sum(1) for row in rows]).mean(1)
    return 1 - (rows - moved).square().sum(1) / between


def networks():
    vision, small = torchvision.models, dict(num_classes=5)
    yield "resnet", vision.resnet18(**small), ["conv1", "layer1.0.bn2", "layer1", "layer4", "avgpool"]
    yield "densenet", vision.DenseNet(4, (2, 2), 8, **small), ["features.denseblock1", "features", "classifier"]
    swin = vision.swin_transformer.SwinTransformer([4, 4], 24, [1, 1], [2, 2], [4, 4], **small)
    yield "swin", swin, ["features.0", "features.1", "features.2", "norm", "head"]
    settings = [vision.convnext.CNBlockConfig(16, 24, 2), vision.convnext.CNBlockConfig(24, None, 1)]
    yield "convnext", vision.ConvNeXt(settings, **small), ["features.0", "features.1.0.block.2", "features.3"]
    yield "vit", vision.VisionTransformer(32, 8, 2, 2, 16, 32, **small), ["conv_proj", "encoder", "heads"]


@pytest.mark.parametrize(
    ("name", "model", "layers"), networks(), ids=lambda value: value if isinstance(value, str) else ""
)
def test_layers_of_strange_networks_against_the_definition(images, name, model, layers):
    torch.manual_seed(0)
    for module in model.modules():  # statistics and gains that matter
        if isinstance(module, nn.BatchNorm2d):
            module.weight.data.uniform_(0.5, 2)
            module.running_mean.normal_()
    model.eval()
    profile = invariance_profile(model, images, layers=layers, repeats=1, batch_size=16)
    ids = torch.arange(len(images))
    views = transform(images, draw_views(scheme("half_heavier_extremes"), ids, ids * 0, ids * 0, 0))
    modules = dict(model.named_modules())
    for layer in layers:
        kept = []
        hook = modules[layer].register_forward_hook(lambda m, a, out, kept=kept: kept.append(out.clone().flatten(1)))
        with torch.no_grad():
            model(images / 255)
            model(views)
        hook.remove()
        np.testing.assert_allclose(profile.query("layer == @layer").score, definition(*kept), rtol=1e-5, atol=2e-5)


class Constant(nn.Module):
    "A bias, or a batch normalisation with gain 0, or rounding errors about a constant."

    def __init__(self, kind):
        super().__init__()
        self.conv, self.norm, self.kind = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), kind
        self.layer, self.varying = nn.Identity(), nn.Identity()
        self.conv.weight.data.mul_(kind != "bias")
        self.norm.weight.data.zero_()
        self.norm.bias.data.uniform_(-1, 1)

    def forward(self, x):
        y = self.conv(x)
        self.varying(x)
        if self.kind == "rounding":
            y = 0.1 + 1e-7 * y
        return self.layer(self.norm(y) if self.kind == "gain" else y)


@pytest.mark.parametrize("kind", ["bias", "gain", "rounding"])
@pytest.mark.parametrize("batch_size", [5, 250])
def test_a_constant_layer_has_no_score(images, kind, batch_size):
    torch.manual_seed(1)
    profile = invariance_profile(Constant(kind), images, layers=["layer", "varying"], repeats=2, batch_size=batch_size)
    assert profile.query("layer == 'layer'").score.isna().all()
    assert profile.query("layer == 'varying'").score.notna().all()


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v3_small"])
def test_equal_images_have_no_score(images, name):
    torch.manual_seed(0)
    same = images[:1].expand(9, -1, -1, -1)
    profile = invariance_profile(getattr(torchvision.models, name)(num_classes=5), same, repeats=1, batch_size=4)
    assert profile.score.isna().all()


@pytest.mark.parametrize("factor", [1e-25, 1e-6, 1e6, 1e25])
def test_the_score_does_not_depend_on_the_scale_of_a_layer(images, factor):
    class Scaled(nn.Module):
        def forward(self, x):
            return x * factor

    profile = invariance_profile(nn.Sequential(Scaled()), images, repeats=1)
    scores = [profile.query("layer == @layer").score.to_numpy() for layer in ("input", "0")]
    np.testing.assert_allclose(*scores, atol=1e-4)


def test_not_finite_views_and_layers_are_named(images):
    class Fragile(nn.Module):
        "Overflows for the transformed images only."

        def forward(self, x):
            return torch.where(self.seen(x), x, torch.inf)

        def seen(self, x):
            return (torch.from_numpy(still[: len(x)]) == x).flatten(1).all(1)[:, None, None, None] | (x.shape[0] < 4)

    still = (images / 255).numpy()
    with pytest.raises(ValueError, match="layer '0': the activations of image 0 are not finite"):
        invariance_profile(nn.Sequential(Fragile()), images, repeats=1)


def test_nothing_of_the_caller_is_changed(images):
    class InPlace(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)

        def forward(self, x):
            x -= 0.45
            return self.conv(x)

    torch.manual_seed(0)
    model, mine = InPlace(), images / 255
    copy = mine.clone()
    first = invariance_profile(model, mine, repeats=1, preprocess=lambda x: x.div_(0.3))
    assert torch.equal(mine, copy)
    pd.testing.assert_frame_equal(
        first, invariance_profile(model, mine.numpy(), repeats=1, preprocess=lambda x: x / 0.3)
    )
    model(mine).sum().backward()  # still trainable


def test_a_layer_called_input_does_not_replace_the_pixels(images):
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.input, self.last = nn.Conv2d(3, 4, 3), nn.Flatten()

        def forward(self, x):
            return self.last(self.input(x))

    torch.manual_seed(0)
    profile = invariance_profile(Named(), images, repeats=1)
    assert list(profile.layer.cat.categories) == ["input", "input#1", "last"]
    score = {layer: part.score.to_numpy() for layer, part in profile.groupby("layer", observed=True)}
    np.testing.assert_allclose(score["input#1"], score["last"], atol=1e-5)
    assert abs(score["input"] - score["last"]).max() > 1e-3
    other = invariance_profile(nn.Sequential(nn.Identity()), images, repeats=1).query("layer == 'input'").score
    np.testing.assert_allclose(score["input"], other, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_networks_of_other_types_have_about_the_same_score(network, images, dtype):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3))
    expected = invariance_profile(model, images, repeats=1).score
    np.testing.assert_allclose(invariance_profile(model.to(dtype), images, repeats=1).score, expected, atol=0.08)


def test_every_field_of_a_scheme_is_a_kind():
    assert list(single_transformations("gaussian")) == ["noise"]
    for field in fields(Scheme):
        if field.name in ("law", "interpolation"):
            continue
        value = (0.5, 0.7) if isinstance(field.default, tuple) else 0.3
        (alone,) = single_transformations(scheme("none", **{field.name: value})).values()
        assert getattr(alone, field.name) == value


def test_equidistant_samples_of_a_constant_layer_are_refused(images):
    with pytest.raises(ValueError, match="layer 'layer' does not vary over the images"):
        equidistant_samples(Constant("gain"), images, torch.arange(37) % 5, "layer", candidates=1, views=3)


def test_quartiles_in_16_bits_are_those_in_32(monkeypatch):
    torch.manual_seed(0)
    network, images = build_model("allcnn", 10, width=0.1).eval(), torch.rand(60, 3, 8, 8).repeat(1, 1, 4, 4)
    tables = [invariance_profile(network, images, repeats=2, precision=kind) for kind in ("32-true", "bf16-mixed")]
    quartiles = [t.groupby("layer", observed=True)["score"].quantile([0.25, 0.5, 0.75]) for t in tables]
    assert not tables[0].equals(tables[1]) and (quartiles[0] - quartiles[1]).abs().max() < 0.005
    monkeypatch.setattr("dainv.precision.fast_bf16", lambda device: True)
    assert invariance_profile(network, images, repeats=2, precision="auto").equals(tables[1])
    assert invariance_profile(network, images, repeats=2).equals(tables[0]), "32 bits unless asked"
