"Probes against scikit-learn, against their own equations, and through a network."

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import LogisticRegression
from torch import nn

from dainv.models import build_model, record
from dainv.probes import (
    STRENGTHS,
    LinearProbe,
    MLPProbe,
    ProbedModel,
    fit_linear_probe,
    fit_mlp_probe,
    held_out_items,
    label_subset,
    probe_accuracy,
    probe_table,
)
from dainv.representation import layer_features

FITS = {
    "linear": fit_linear_probe,
    "mlp": lambda *args, **kw: fit_mlp_probe(*args, **{"steps": 60, "hidden": 32, **kw}),
}


def clouds(n, noise=0, classes=5, seed=0, units=8):
    "Correlated, rectified points around class centres, `noise` units of pure noise, and the labels."
    centres = torch.randn(classes, units, generator=torch.Generator().manual_seed(7))
    mixing = torch.randn(units, units, generator=torch.Generator().manual_seed(8)) * torch.logspace(0, -2, units)
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % classes
    points = ((centres[labels] + torch.randn(n, units, generator=generator)) @ mixing.T).relu()
    return torch.cat([points, torch.randn(n, noise, generator=generator)], 1), labels


@pytest.fixture(scope="module")
def data():
    return clouds(600)


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    return build_model("allcnn", 10, width=0.05)


def standardised(probe, features):
    return ((features.double() - probe.mean.double()) * probe.gain.double()).numpy()


@pytest.mark.parametrize("strength", STRENGTHS)
def test_the_linear_probe_is_that_of_scikit_learn(data, strength):
    features, labels = data
    probe = fit_linear_probe(features, labels, 5, strengths=[strength], held_out=0)
    x = standardised(probe, features)
    reference = LogisticRegression(C=1 / (len(labels) * strength), tol=1e-10, max_iter=100_000).fit(x, labels.numpy())
    np.testing.assert_allclose(probe(features).softmax(1).numpy(), reference.predict_proba(x), atol=1e-4)


@pytest.mark.parametrize("strength", [1.0, 1e-3, 1e-5])
def test_the_gradient_of_the_objective_is_zero(data, strength):
    features, labels = data
    probe = fit_linear_probe(features, labels, 5, strengths=[strength], held_out=0)
    weight, bias = (p.double().requires_grad_() for p in (probe.head.weight, probe.head.bias))
    x = torch.from_numpy(standardised(probe, features))
    loss = F.cross_entropy(x @ weight.T + bias, labels) + strength / 2 * weight.square().sum()
    for gradient in torch.autograd.grad(loss, (weight, bias)):
        assert gradient.abs().max() < 2e-6  # what single precision of the weights leaves


@pytest.mark.parametrize("kind", FITS)
def test_the_strength_is_the_best_on_held_out_items_of_the_training_set(kind):
    features, labels = clouds(300, noise=80)
    grid = [1.0, 0.1, 1e-2, 1e-4]
    probe = FITS[kind](features, labels, 5, strengths=grid, seed=3)
    held_out = held_out_items(labels, 0.2, seed=3)
    part, rest = (features[~held_out], labels[~held_out]), (features[held_out], labels[held_out])
    alone = [FITS[kind](*part, 5, strengths=[s], held_out=0, seed=3) for s in grid]
    losses = [F.cross_entropy(p(rest[0]), rest[1]).item() for p in alone]
    best = losses.index(min(losses))
    assert probe.strength == grid[best] and 0 < best < len(grid) - 1
    assert probe.held_out_accuracy == pytest.approx(probe_accuracy(alone[best], *rest), abs=0.02)


def one_telling_unit(n, seed, noise=150):
    "A first unit that tells two classes apart, not perfectly, and units of noise."
    features = torch.randn(n, 1 + noise, generator=torch.Generator().manual_seed(seed))
    errors = torch.randn(n, generator=torch.Generator().manual_seed(seed + 100))
    return features, (features[:, 0] + 0.5 * errors > 0).long()


def test_noise_asks_for_a_strong_penalty_and_gets_it():
    data, test = one_telling_unit(400, seed=0), one_telling_unit(4000, seed=1)
    chosen, weak = fit_linear_probe(*data, 2), fit_linear_probe(*data, 2, strengths=[1e-5])
    assert chosen.strength == 0.1
    assert probe_accuracy(weak, *data) > probe_accuracy(chosen, *data), "training accuracy would choose the other"
    assert probe_accuracy(chosen, *test) > probe_accuracy(weak, *test) + 0.02


def test_the_order_of_the_strengths_is_of_no_consequence(data):
    a, b = (fit_linear_probe(*data, 5, strengths=s) for s in (STRENGTHS, STRENGTHS[::-1]))
    assert a.strength == b.strength and torch.equal(a.head.weight, b.head.weight)


@pytest.mark.parametrize("kind", FITS)
def test_scale_and_offset_of_the_units_do_not_matter(data, kind):
    features, labels = data
    factors, offsets = torch.logspace(-3, 3, features.shape[1]), torch.linspace(-100, 100, features.shape[1])
    plain = FITS[kind](features, labels, 5, strengths=[1e-2], held_out=0)
    moved = FITS[kind](features.double() * factors + offsets, labels, 5, strengths=[1e-2], held_out=0)
    difference = plain(features).softmax(1) - moved.double()(features.double() * factors + offsets).softmax(1)
    assert difference.abs().max() < 0.02


@pytest.mark.parametrize("kind", FITS)
def test_constant_units_are_left_out_also_when_they_wake_up(data, kind):
    features, labels = data
    more = torch.cat([features, torch.full((len(features), 1), 0.1)], 1)
    probe = FITS[kind](more, labels, 5, strengths=[1e-2], held_out=0)
    before = probe(more)
    more[:, -1] = 1e6
    assert torch.equal(probe(more), before) and before.isfinite().all()


@pytest.mark.parametrize("kind", FITS)
def test_a_probe_is_deterministic_and_leaves_the_random_state_alone(data, kind):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    a = FITS[kind](*data, 5, seed=1)
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(3)
    b = FITS[kind](*data, 5, seed=1)
    assert all(torch.equal(a.state_dict()[name], b.state_dict()[name]) for name in a.state_dict())
    assert (a.strength, a.held_out_accuracy) == (b.strength, b.held_out_accuracy)


@pytest.mark.parametrize("kind", FITS)
def test_features_of_inference_mode_are_welcome(data, kind):
    with torch.inference_mode():
        features, labels = data[0] * 1, data[1] * 1
        inside = FITS[kind](features, labels, 5, strengths=[1e-2])
    outside = FITS[kind](features, labels, 5, strengths=[1e-2])
    assert torch.equal(inside(data[0]), outside(data[0]))
    x = data[0].clone().requires_grad_()
    assert torch.autograd.grad(inside(x).sum(), x)[0].abs().sum() > 0


def test_a_probe_is_saved_as_a_whole(data):
    for fitted, fresh in (
        (fit_linear_probe(*data, 5), LinearProbe(8, 5)),
        (FITS["mlp"](*data, 5, hidden=12), MLPProbe(8, 5, hidden=12)),
    ):
        assert not torch.equal(fresh(data[0]), fitted(data[0]))
        fresh.load_state_dict(fitted.state_dict())
        assert torch.equal(fresh(data[0]), fitted(data[0]))
        assert fitted(data[0]).dtype == torch.float32


def test_a_hidden_layer_finds_what_no_plane_does():
    corners = torch.randn(800, 2, generator=torch.Generator().manual_seed(0))
    labels = (corners.prod(1) > 0).long()
    linear, mlp = fit_linear_probe(corners, labels, 2), fit_mlp_probe(corners, labels, 2, hidden=32, steps=150)
    assert linear.held_out_accuracy < 0.65 < 0.9 < mlp.held_out_accuracy


@pytest.mark.parametrize("kind", FITS)
def test_a_collapsed_representation_gives_a_low_accuracy_and_no_crash(kind):
    points, labels = clouds(500, classes=10)
    line = points[:, :1] * torch.randn(1, 20, generator=torch.Generator().manual_seed(1))
    assert FITS[kind](line, labels, 10).held_out_accuracy < 0.5
    assert FITS[kind](torch.ones(500, 20), labels, 10).held_out_accuracy == pytest.approx(0.1)


def test_more_units_than_items(data):
    features, labels = clouds(40, noise=200)
    assert probe_accuracy(fit_linear_probe(features, labels, 5, strengths=[1e-3], held_out=0), features, labels) == 1


@settings(deadline=None, max_examples=50)
@given(
    st.lists(st.integers(1, 40), min_size=2, max_size=6),
    st.floats(0.001, 1),
    st.floats(0.001, 1),
    st.integers(0, 3),
)
def test_label_subsets_are_stratified_and_nested(counts, one, other, seed):
    labels = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    labels = labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(9))]
    small, large = (label_subset(labels, fraction, seed) for fraction in sorted((one, other)))
    assert torch.isin(small, large).all() and torch.equal(small, label_subset(labels, min(one, other), seed))
    kept = labels[small].bincount(minlength=len(counts)).tolist()
    assert all(n >= 1 and abs(n - min(one, other) * of) < 1 for n, of in zip(kept, counts, strict=True))
    assert len(label_subset(labels, 1.0)) == len(labels)


def test_label_subsets_differ_between_seeds():
    labels = torch.arange(200) % 4
    assert not torch.equal(label_subset(labels, 0.2, seed=0), label_subset(labels, 0.2, seed=1))


@given(st.lists(st.integers(1, 30), min_size=2, max_size=5), st.floats(0.01, 0.99))
def test_no_class_is_held_out_as_a_whole(counts, fraction):
    labels = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    if max(counts) > 1:
        held_out = held_out_items(labels, fraction, seed=0)
        assert set(labels[~held_out].tolist()) == set(range(len(counts)))
        assert all(held_out[labels == c].any() for c, n in enumerate(counts) if n > 1)


def test_the_table_has_a_row_for_everything_and_agrees_with_single_probes(data):
    features, labels = data
    test_features, test_labels = clouds(300, seed=1)
    layers, tests = {"a": features, "b": features[:, :3]}, {"a": test_features, "b": test_features[:, :3]}
    table = probe_table(layers, labels, tests, test_labels, 5, kinds=["linear"], fractions=(0.1, 1.0), seed=2)
    columns = ["layer", "probe", "fraction", "n_train", "strength", "held_out_accuracy", "test_accuracy"]
    assert list(table) == columns and table.n_train.tolist() == [60, 600] * 2
    rows = label_subset(labels, 0.1, seed=2)
    probe = fit_linear_probe(features[rows], labels[rows], 5, seed=2)
    first = table.iloc[0]
    assert (first.strength, first.held_out_accuracy) == (probe.strength, probe.held_out_accuracy)
    assert first.test_accuracy == probe_accuracy(probe, test_features, test_labels)
    full = table.query("fraction == 1.0").set_index("layer").test_accuracy
    assert full.a > full.b


def test_test_labels_change_nothing_but_the_test_accuracy(data):
    features, labels = data
    tables = [
        probe_table({"a": features}, labels, {"a": features}, answers, 5, kinds=["linear"])
        for answers in (labels, labels.flip(0))
    ]
    columns = ["strength", "held_out_accuracy"]
    assert tables[0][columns].equals(tables[1][columns])
    assert tables[0].test_accuracy[0] != tables[1].test_accuracy[0]


def hooks(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


@pytest.mark.parametrize("layer", ["conv1", "conv8", "conv9", "conv4.norm"])
def test_a_probed_model_is_the_probe_behind_the_layer(network, layer):
    images = torch.rand(6, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    network.eval()
    with torch.no_grad(), record(network, [layer]) as activations:
        network(images)
    pooled = activations[layer].mean((2, 3))
    probe = MLPProbe(pooled.shape[1], 4, hidden=6)
    torch.testing.assert_close(ProbedModel(network, layer, probe)(images), probe(pooled))


def test_a_probed_model_is_differentiable_in_the_images_alone(network):
    network.train()
    state = {name: value.clone() for name, value in network.state_dict().items()}
    probed = ProbedModel(network, "conv9", LinearProbe(10, 10))
    images = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0)).requires_grad_()
    for _ in range(3):
        loss = F.cross_entropy(probed(images), torch.arange(4))
        loss.backward()
    assert (images.grad.flatten(1).norm(dim=1) > 0).all()
    assert all(parameter.grad is None for parameter in probed.parameters())
    assert all(parameter.requires_grad for parameter in network.parameters())
    assert hooks(network) == 0 and all(module.training for module in network.modules())
    assert all(torch.equal(state[name], value) for name, value in network.state_dict().items())


def test_the_gradient_of_a_probed_model_is_that_of_finite_differences():
    torch.manual_seed(1)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Tanh(), nn.Conv2d(4, 5, 3)).double()
    probed = ProbedModel(model, "2", LinearProbe(5, 3).double())
    images = torch.rand(2, 3, 7, 7, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(probed, (images,))


def test_a_probed_model_takes_flat_layers_and_follows_the_training_of_its_model():
    class Flat(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Flatten()
            self.fc = nn.Linear(12, 5)
            self.unused = nn.Linear(2, 2)

        def forward(self, x):
            return self.fc(self.body(x)).relu()

    model, images = Flat(), torch.rand(3, 3, 2, 2)
    probed = ProbedModel(model, "fc", LinearProbe(5, 2))
    before = probed(images)
    with torch.no_grad():
        model.fc.weight.add_(1)
    assert not torch.equal(probed(images), before)
    with pytest.raises(ValueError, match="'unused' takes no part"):
        ProbedModel(model, "unused", LinearProbe(2, 2))(images)


BAD = {
    "nan": (dict(features=torch.full((60, 8), torch.nan), layer="conv8"), "layer 'conv8': 60 of 60"),
    "infinite": (dict(features=torch.full((60, 8), torch.inf)), "60 of 60"),
    "maps": (dict(features=torch.zeros(60, 8, 2, 2)), r"\(60, 8, 2, 2\): expected \(N, C\)"),
    "empty": (dict(features=torch.zeros(0, 8), labels=torch.zeros(0).long()), r"\(0, 8\)"),
    "lengths": (dict(labels=torch.arange(59) % 5), r"\(59,\) for 60"),
    "float labels": (dict(labels=(torch.arange(60) % 5).float()), "float32: expected integers 0..4"),
    "above": (dict(labels=torch.arange(60) % 6), "0..5: expected 0..4"),
    "below": (dict(labels=torch.arange(60) % 5 - 1), "-1..3: expected 0..4"),
    "missing class": (dict(labels=torch.arange(60) % 4), "no training item of class 4"),
    "one class": (dict(n_classes=1, labels=torch.zeros(60).long()), "n_classes=1"),
    "one class of five": (dict(labels=torch.zeros(60).long()), "no training item of class 1, 2, 3, 4"),
    "nothing to hold out": (dict(features=torch.rand(5, 8), labels=torch.arange(5)), "no class has two items"),
    "all held out": (dict(held_out=1.0), "held_out=1.0"),
    "nothing held out": (dict(held_out=0), "held_out=0"),
    "no strength": (dict(strengths=[]), r"strengths=\[\]"),
    "zero strength": (dict(strengths=[0.1, 0]), "positive"),
}


@pytest.mark.parametrize("kind", FITS)
@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_named(kind, case):
    change, message = BAD[case]
    given = {"features": torch.rand(60, 8), "labels": torch.arange(60) % 5, "n_classes": 5, **change}
    with pytest.raises(ValueError, match=message):
        FITS[kind](given.pop("features"), given.pop("labels"), given.pop("n_classes"), **given)


def test_other_mistakes_are_named(data, network):
    features, labels = data
    probe = LinearProbe(8, 5)
    broken = {"conv3": features, "conv4": features / 0}
    for call, message in (
        (lambda: label_subset(labels, 0.0), "fraction=0.0"),
        (lambda: label_subset(labels, 1.5), "fraction=1.5"),
        (lambda: probe_accuracy(probe, features, labels[:-1]), "one per item"),
        (lambda: probe_accuracy(probe, features, labels + 1), "expected 0..4"),
        (lambda: probe_accuracy(probe, features[:, :3], labels), r"this probe takes \(N, 8\)"),
        (lambda: probe_table({"a": features}, labels, {"b": features}, labels, 5), "'a' is not in both"),
        (lambda: probe_table({"a": features}, labels, {"a": features}, labels, 5, kinds=["svm"]), "svm"),
        (lambda: probe_table({}, labels, {}, labels, 5, kinds="linear"), "expected a list"),
        (lambda: probe_table(broken, labels, broken, labels, 5, kinds=["linear"]), "layer 'conv4'"),
        (lambda: ProbedModel(network, "conv99", probe), "conv99"),
        (lambda: ProbedModel(network, "conv1", probe)(torch.rand(2, 3, 32, 32)), r"this probe takes \(N, 8\)"),
        (lambda: fit_mlp_probe(features, labels, 5, hidden=0), "hidden=0"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def test_more_units_than_items_are_fitted_without_a_matrix_of_units():
    torch.manual_seed(0)
    features, labels = torch.randn(24, 30_000), torch.arange(24) % 3  # 30,000 x 30,000 numbers would take 7 GB
    options = dict(strengths=[0.1], held_out=0)
    wide = fit_linear_probe(features, labels, 3, **options)
    scaled = (features - wide.mean) * wide.gain
    weight = wide.head.weight.requires_grad_()
    loss = F.cross_entropy(scaled @ weight.T + wide.head.bias, labels) + 0.05 * weight.square().sum()
    (slope,) = torch.autograd.grad(loss, weight)
    assert slope.abs().max() < 1e-5


def test_both_forms_of_the_linear_probe_agree():
    torch.manual_seed(0)
    labels = torch.arange(40) % 4
    few = torch.randn(40, 39) + labels[:, None]
    padded = torch.cat([few, few[:, :1].expand(-1, 3) * 0], 1)  # constant units change the form, not the probe
    probes = [fit_linear_probe(x, labels, 4, strengths=[0.01], held_out=0) for x in (few, padded)]
    torch.testing.assert_close(probes[1].head.weight[:, :39], probes[0].head.weight, rtol=1e-3, atol=1e-4)


def test_a_probed_model_preprocesses_as_its_features_were():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()
    images, labels = torch.rand(60, 3, 8, 8), torch.arange(60) % 3
    mine = images.clone()

    def normalised(x):
        return x.sub_(0.5).div_(0.25)

    features = layer_features(model, images, ["0"], preprocess=normalised)["0"]
    probe = fit_linear_probe(features, labels, 3, strengths=[0.1], held_out=0)
    probed = ProbedModel(model, "0", probe, preprocess=normalised)
    torch.testing.assert_close(probed(images), probe(features), rtol=1e-4, atol=1e-5)
    assert torch.equal(images, mine)
    assert (ProbedModel(model, "0", probe)(images).argmax(1) != probe(features).argmax(1)).any()


@pytest.mark.parametrize("pool", [True, "class", False])
def test_a_probed_model_pools_as_its_features_were(pool):
    torch.manual_seed(0)
    vit = torchvision.models.VisionTransformer(16, 8, 1, 2, 16, 32, num_classes=5).eval()
    images, labels = torch.rand(20, 3, 16, 16), torch.arange(20) % 3
    features = layer_features(vit, images, ["encoder"], pool=pool)["encoder"]
    probe = fit_linear_probe(features, labels, 3, strengths=[0.1], held_out=0)
    pixels = images.clone().requires_grad_()
    logits = ProbedModel(vit, "encoder", probe, pool=pool)(pixels)
    torch.testing.assert_close(logits, probe(features), rtol=1e-4, atol=1e-5)
    assert torch.autograd.grad(logits.sum(), pixels)[0].any()


def test_arrays_and_lists_are_taken(data):
    features, labels = data[0][:60], data[1][:60]
    options = dict(strengths=[0.1], held_out=0)
    n = int(labels.max()) + 1
    probe = fit_linear_probe(features, labels, n, **options)
    for x, y in ((features.numpy(), labels.numpy()), (features, labels.tolist())):
        assert torch.equal(fit_linear_probe(x, y, n, **options).head.weight, probe.head.weight)
        assert probe_accuracy(probe, x, y) == probe_accuracy(probe, features, labels)
