"Dissimilarities, contrasts, alignment and maps against their definitions, written out."

import itertools
import json
import math
import time

import numpy as np
import pytest
import torch
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import dainv.collapse
from dainv import representation
from dainv.augment import draw_views, transform
from dainv.collapse import effective_rank, pc1_share
from dainv.data import SOURCES
from dainv.features import record
from dainv.models import build_model
from dainv.representation import (
    balanced_order,
    cka,
    group_contrast,
    layer_features,
    minibatch_cka,
    rdm,
    tsne,
    view_features,
)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def images():
    noise = torch.rand(37, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    return (nn.functional.avg_pool2d(noise, 5, 1, 2) * 255).to(torch.uint8)


@pytest.fixture
def network():
    torch.manual_seed(0)
    return build_model("allcnn", 10, width=0.05).train()


# Features of layers


def activations_of(network, x, layer):
    part = nn.Sequential(*[getattr(network, name) for name in network.measured[: network.measured.index(layer) + 1]])
    modes = {module: module.training for module in network.modules()}
    network.eval()
    with torch.no_grad():
        out = part(x)
    for module, mode in modes.items():
        module.training = mode
    return out


@pytest.mark.parametrize("batch_size", [1, 5, 37, 500])
@pytest.mark.parametrize("layer", ["conv1", "conv9"])
def test_features_are_those_of_the_layer(network, images, layer, batch_size):
    expected = activations_of(network, images / 255, layer)
    pooled = layer_features(network, images, [layer], batch_size=batch_size)
    full = layer_features(network, images, [layer], pool=False, batch_size=batch_size)
    torch.testing.assert_close(pooled[layer], expected.mean((2, 3)), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(full[layer], expected.flatten(1), atol=1e-5, rtol=1e-4)
    assert list(pooled) == [layer] and pooled[layer].dtype == torch.float32


def test_the_network_is_left_as_it_was(network, images):
    network.conv3.eval()
    before = {k: v.clone() for k, v in network.state_dict().items()}
    modes, state = [m.training for m in network.modules()], torch.get_rng_state()
    features = layer_features(network, images, transformation="heavier")
    assert list(features) == network.measured
    assert modes == [m.training for m in network.modules()]
    assert all(torch.equal(v, before[k]) for k, v in network.state_dict().items())
    assert torch.equal(state, torch.get_rng_state())
    assert not any(m._forward_hooks for m in network.modules())


def test_bytes_and_fractions_give_the_same(network, images):
    a, b = (layer_features(network, x, ["conv8"])["conv8"] for x in (images, images.double() / 255))
    torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("batch_size", [8, 500])
def test_views_are_named_by_seed_image_and_view(network, images, batch_size):
    ids = torch.arange(len(images))
    for seed, view in ((0, 0), (3, 0), (0, 2)):
        moved = transform(images, draw_views("heavier", ids, 0, view, seed))
        expected = layer_features(network, moved, ["conv5"])["conv5"]
        options = dict(transformation="heavier", seed=seed, view=view, batch_size=batch_size)
        ours = layer_features(network, images, ["conv5"], **options)["conv5"]
        torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-4)
    assert not torch.allclose(ours, layer_features(network, images, ["conv5"])["conv5"], atol=1e-3)


def test_preprocessing_comes_after_the_transformation(network, images):
    ours = layer_features(network, images, ["conv2"], transformation="light", preprocess=lambda x: (x - 0.5) / 0.2)
    moved = transform(images, draw_views("light", torch.arange(37), 0, 0, 0))
    expected = activations_of(network, (moved - 0.5) / 0.2, "conv2").mean((2, 3))
    torch.testing.assert_close(ours["conv2"], expected, atol=1e-5, rtol=1e-4)


def test_features_can_be_trained_on(network, images):
    probe = nn.Linear(10, 2)
    probe(layer_features(network, images, ["conv9"])["conv9"]).sum().backward()
    assert probe.weight.grad is not None


def test_any_network_and_any_precision_of_it(images):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4 * 30 * 30, 5)).double()
    features = layer_features(model, images[:3])
    assert {k: tuple(v.shape) for k, v in features.items()} == {"0": (3, 4), "1": (3, 3600), "2": (3, 5)}
    assert all(v.dtype == torch.float32 for v in features.values())


class Odd(nn.Module):
    "Layers that give no tensor, too few rows, a NaN for image 4, or nothing at all."

    def __init__(self):
        super().__init__()
        self.pair, self.one, self.bad, self.idle, self.flat = Pair(), Sum(), Spoil(), nn.ReLU(), nn.Flatten(0)

    def forward(self, x):
        self.pair(x), self.one(x), self.bad(x), self.flat(x)
        return x


class Pair(nn.Module):
    def forward(self, x):
        return x, x


class Sum(nn.Module):
    def forward(self, x):
        return x.sum(0)


class Spoil(nn.Module):
    def forward(self, x):
        return torch.where(x.amax((1, 2, 3), keepdim=True) == 1, torch.nan, x)


@pytest.mark.parametrize(
    "layer, message",
    [
        ("pair", "layer 'pair' returns a tuple"),
        ("one", "layer 'one' gives"),
        ("idle", "layer 'idle' takes no part in the forward pass"),
        ("bad", "layer 'bad': the activations of image 4 are not finite"),
        ("gone", "layer 'gone' is not in the model; known: pair, one"),
    ],
)
def test_a_layer_without_features_is_named(images, layer, message):
    x = (images / 255).clamp(max=0.9)
    x[4] = 1.0
    with pytest.raises(ValueError, match=message):
        layer_features(Odd(), x, [layer], batch_size=3)
    torch.testing.assert_close(layer_features(Odd(), x, ["flat"], batch_size=3, pool=False)["flat"], x.flatten(1))


def test_bad_requests(network, images):
    for arguments, message in [
        ((network, images[0]), "expected \\(N, 3, H, W\\)"),
        ((network, images[:0]), "at least 1 image"),
        ((network, images, "conv1"), "write \\['conv1'\\]"),
    ]:
        with pytest.raises(ValueError, match=message):
            layer_features(*arguments)
    with pytest.raises(ValueError, match="batch_size=0"):
        layer_features(network, images, batch_size=0)
    with pytest.raises(ValueError, match="unknown name 'blurry'"):
        layer_features(network, images, transformation="blurry")


# Dissimilarity matrices


def brute_rdm(x):
    x = x.double().numpy()
    return np.array([[sum((a - b) ** 2) / len(a) for b in x] for a in x])


@settings(max_examples=25, deadline=None)
@given(st.integers(2, 12), st.integers(1, 9), st.floats(1e-6, 1e6), st.floats(-1e3, 1e3), st.integers(0, 99))
def test_the_rdm_is_that_of_the_definition(n, d, scale, offset, seed):
    x = (normal(n, d, seed=seed) + offset) * scale
    expected = brute_rdm(x)
    ours = rdm(x)
    np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-12 * expected.max())
    assert ours.dtype == torch.float32 and torch.equal(ours, ours.T) and ours.min() >= 0
    assert (ours.diagonal() == 0).all()


@pytest.mark.parametrize("n, d", [(127, 2), (128, 1024), (129, 1026), (257, 2050)])
def test_blocks_and_slices_leave_no_seam(n, d):
    x = normal(n, d) + 5
    expected = torch.cdist(x.double(), x.double(), compute_mode="donot_use_mm_for_euclid_dist").square() / d
    np.testing.assert_allclose(rdm(x), expected, rtol=1e-6)
    assert torch.equal(rdm(x), rdm(x.view(n, 2, -1)))
    np.testing.assert_allclose(rdm(x, "correlation"), 1 - np.corrcoef(x.double()), atol=1e-6)


def test_close_images_keep_their_digits():
    "Views a millionth of the spread apart, next to images that are far away, on a large mean."
    x = torch.cat([100 + 1e-4 * normal(3, 300), 100 + normal(3, 300, seed=1)])
    expected = brute_rdm(x)
    np.testing.assert_allclose(rdm(x)[:3, :3], expected[:3, :3], rtol=1e-6)
    gram = x @ x.T
    lossy = (gram.diag()[:, None] + gram.diag() - 2 * gram)[0, 1].item() / 300
    assert abs(lossy / expected[0, 1] - 1) > 0.5, "the short form was good enough"


def test_equal_images_are_at_zero():
    x = normal(5, 400).repeat(2, 1) + 3
    assert rdm(x)[:5, 5:].diagonal().max() < 1e-12
    assert (rdm(torch.full((4, 7), 0.1)) == 0).all()


def test_images_are_features_too(images):
    np.testing.assert_allclose(rdm(images[:4]), brute_rdm(images[:4].flatten(1)), rtol=1e-6)


def test_no_rdm_without_features():
    x = normal(6, 4)
    for bad in (torch.nan, torch.inf):
        spoilt = x.clone()
        spoilt[3, 1] = bad
        for metric in ("msd", "correlation"):
            with pytest.raises(ValueError, match="features: row 3 holds a value that is not finite"):
                rdm(spoilt, metric)
    with pytest.raises(ValueError, match="N of at least 2"):
        rdm(x[:1])
    with pytest.raises(ValueError, match="metric='cosine' is unknown; known: msd, correlation"):
        rdm(x, "cosine")
    x[2], x[5] = 0.1, 0
    with pytest.raises(ValueError, match="row 2 are equal \\(2 such rows of 6\\)"):
        rdm(x, "correlation")
    assert rdm(x).isfinite().all()


def test_a_thousand_images_take_less_than_a_second():
    "Processor time on one thread, so that other programs do not count."
    x, threads, best = normal(1000, 12288), torch.get_num_threads(), math.inf
    torch.set_num_threads(1)
    try:
        for _ in range(3):
            start = time.process_time()
            matrix = rdm(x)
            best = min(best, time.process_time() - start)
    finally:
        torch.set_num_threads(threads)
    assert matrix[7, 800].item() == pytest.approx((x[7] - x[800]).double().square().mean().item(), rel=1e-6)
    assert best < 1, best


# Order of the images


def test_order_is_balanced_repeatable_and_nested():
    labels = torch.randint(0, 4, (400,), generator=torch.Generator().manual_seed(0))
    state = torch.get_rng_state()
    order = balanced_order(labels, 60)
    assert torch.equal(labels[order], torch.arange(4).repeat_interleave(60))
    assert len(order.unique()) == 240
    assert torch.equal(order, balanced_order(labels, 60)) and not torch.equal(order, balanced_order(labels, 60, 1))
    small = balanced_order(labels, 9).view(4, 9)
    assert torch.equal(small, order.view(4, 60)[:, :9])
    assert torch.equal(state, torch.get_rng_state())


def test_order_with_too_few_images():
    labels = torch.tensor([0, 0, 0, 1, 1, 3, 3, 3])
    with pytest.raises(ValueError, match="class 2 has 0 images"):
        balanced_order(labels, 2)
    with pytest.raises(ValueError, match="class 'dog' has 2 images: per_class=3"):
        balanced_order(labels[:5], 3, classes=["cat", "dog"])
    with pytest.raises(ValueError, match="per_class=0"):
        balanced_order(labels, 0)
    with pytest.raises(ValueError, match="0 labels"):
        balanced_order(labels[:0], 1)


# Groups


def brute_contrast(matrix, groups):
    inside, across = [], []
    for i, j in itertools.combinations(range(len(groups)), 2):
        (inside if groups[i] == groups[j] else across).append(float(matrix[i, j]))
    return np.mean(inside), np.mean(across)


def brute_p_value(matrix, groups, blocks):
    names = sorted(set(blocks))
    truth = [next(g for g, b in zip(groups, blocks, strict=True) if b == name) for name in names]
    within, between = brute_contrast(matrix, groups)
    differences = []
    for order in sorted(set(itertools.permutations(truth))):
        moved = dict(zip(names, order, strict=True))
        w, b = brute_contrast(matrix, [moved[block] for block in blocks])
        differences.append(b - w)
    return np.mean(np.array(differences) >= between - within - 1e-9), len(differences)


@pytest.mark.parametrize("truth", ["aabb", "abab", "aaab", "aabbcc", "abcabc"])
@pytest.mark.parametrize("seed", [0, 1])
def test_all_assignments_of_blocks(truth, seed):
    rng = np.random.default_rng(seed)
    blocks = np.repeat(np.arange(len(truth)), rng.integers(1, 4, len(truth)))
    rng.shuffle(blocks)
    groups = [truth[block] for block in blocks]
    means = normal(len(truth), 5, seed=seed) + 2 * torch.eye(5)[[ord(g) - 97 for g in truth]]
    matrix = rdm(means[blocks] + 0.3 * normal(len(blocks), 5, seed=seed + 9))
    ours = group_contrast(matrix, groups, blocks=[f"class {b}" for b in blocks])
    assert (ours["within"], ours["between"]) == pytest.approx(brute_contrast(matrix, groups))
    assert ours["difference"] == pytest.approx(ours["between"] - ours["within"])
    assert ours["ratio"] == pytest.approx(ours["between"] / ours["within"])
    p_value, count = brute_p_value(matrix, groups, blocks.tolist())
    assert ours["exact"] and ours["n_permutations"] == count
    assert ours["p_value"] == pytest.approx(p_value)


def test_animals_and_things():
    classes = "airplane automobile bird cat deer dog frog horse ship truck".split()
    known = SOURCES["cifar10"].animate
    assert known < set(classes) and len(known) == 6
    labels = torch.arange(10).repeat_interleave(7)
    animate = torch.tensor([name in known for name in classes])
    matrix = rdm(normal(70, 30) + 3 * torch.eye(30)[0] * animate[labels][:, None])
    before = matrix.clone()
    ours = group_contrast(matrix, animate[labels], blocks=labels)
    assert ours["exact"] and ours["n_permutations"] == 210 and ours["p_value"] == pytest.approx(1 / 210)
    assert torch.equal(matrix, before) and json.loads(json.dumps(ours)) == ours
    mixed = torch.randperm(70, generator=torch.Generator().manual_seed(1))
    again = group_contrast(matrix[mixed][:, mixed], animate[labels][mixed], blocks=labels[mixed])
    assert again == pytest.approx(ours)


def test_random_permutations_come_close_to_all():
    labels, groups = np.repeat(np.arange(10), 3), np.repeat([0] * 4 + [1] * 6, 3)
    matrix = rdm(normal(10, 8)[labels] + 0.3 * normal(30, 8, seed=1) + torch.eye(8)[0] * groups[:, None])
    exact = group_contrast(matrix, groups, 210, labels)
    drawn = group_contrast(matrix, groups, 209, labels)
    assert exact["exact"] and not drawn["exact"] and drawn["n_permutations"] == 209
    assert 0.02 < exact["p_value"] < 0.98
    assert drawn["p_value"] == pytest.approx(exact["p_value"], abs=0.1)
    assert drawn == group_contrast(matrix, groups, 209, labels)
    seeds = {group_contrast(matrix, groups, 150, labels, seed=seed)["p_value"] for seed in range(5)}
    assert len(seeds) > 1


def test_classes_against_chance():
    "Separated classes have the smallest p-value there can be; p-values of arbitrary groups are spread out."
    labels = torch.arange(3).repeat_interleave(20)
    clear = group_contrast(rdm(normal(60, 10) + 3 * torch.eye(10)[labels]), labels, 199)
    assert clear["p_value"] == 1 / 200 and clear["ratio"] > 1.2
    chance = [group_contrast(rdm(normal(60, 10, seed=s)), labels, 99)["p_value"] for s in range(40)]
    assert 0.3 < np.mean(chance) < 0.7 and min(chance) > 0


def test_collapsed_features_are_no_structure():
    ours = group_contrast(torch.zeros(6, 6), [0, 0, 0, 1, 1, 1])
    assert ours["p_value"] == 1 and math.isnan(ours["ratio"]) and ours["difference"] == 0


def test_no_contrast_without_groups():
    matrix = rdm(normal(6, 3))
    for groups, blocks, message in [
        ([0] * 6, None, "groups: there is only one"),
        ([0, 1, 0], None, "groups of shape \\(3,\\): expected one value for each of the 6 images"),
        ([0, 0, 0, 1, 1, 1], [0, 1], "blocks of shape \\(2,\\)"),
        ([0, 0, 0, 1, 1, 1], [0, 0, 1, 1, 2, 2], "blocks: one of them has images in two groups"),
        ([0, 0, 0, 1, 1, 1], [5, 5, 5, 7, 7, 7], "each of the 2 is a single block"),
        (range(6), None, "each of the 6 is a single block"),
    ]:
        with pytest.raises(ValueError, match=message):
            group_contrast(matrix, groups, blocks=blocks)
    with pytest.raises(ValueError, match="rdm of shape \\(6, 5\\)"):
        group_contrast(matrix[:, :5], [0, 0, 0, 1, 1, 1])
    with pytest.raises(ValueError, match="finite"):
        group_contrast(matrix / 0, [0, 0, 0, 1, 1, 1])
    with pytest.raises(ValueError, match="n_permutations=0"):
        group_contrast(matrix, [0, 0, 0, 1, 1, 1], 0)


# Alignment


def brute_hsic(x, y, unbiased):
    "Sums over all pairs and quadruples of images."
    k, other, n = (x @ x.T).tolist(), (y @ y.T).tolist(), len(x)
    quadruples = itertools.permutations(range(n), 4) if unbiased else itertools.product(range(n), repeat=4)
    terms = [k[i][j] * (other[i][j] + other[q][r] - 2 * other[i][q]) for i, j, q, r in quadruples]
    return sum(terms) / len(terms) * (1 if unbiased else (n / (n - 1)) ** 2)


def brute_cka(x, y, unbiased):
    x, y = x.double(), y.double()
    pairs = ((x, y), (x, x), (y, y))
    xy, xx, yy = (brute_hsic(a, b, unbiased) for a, b in pairs)
    return xy / math.sqrt(xx * yy)


@pytest.mark.parametrize("unbiased", [True, False])
@pytest.mark.parametrize("d_x, d_y", [(2, 3), (20, 3), (3, 20), (20, 30)])
def test_cka_is_that_of_the_definition(unbiased, d_x, d_y):
    x = normal(8, d_x) * torch.linspace(3, 0.1, d_x)
    y = normal(8, d_y, seed=1) * torch.linspace(3, 0.1, d_y) + x[:, :1]
    assert cka(x, y, unbiased) == pytest.approx(brute_cka(x, y, unbiased), abs=1e-9)


@settings(max_examples=25, deadline=None)
@given(st.integers(5, 30), st.integers(1, 40), st.integers(1, 40), st.booleans(), st.integers(0, 99))
def test_cka_does_not_see_rotation_scale_and_offset(n, d_x, d_y, unbiased, seed):
    source = normal(n, 2, seed=seed)
    x, y = (source @ normal(2, d, seed=seed + 1) + 0.1 * normal(n, d, seed=seed + 2) for d in (d_x, d_y))
    turn = torch.linalg.qr(normal(d_x, d_x, seed=seed + 3)).Q
    value = cka(x, y, unbiased)
    assert cka(-7 * x @ turn + 2, y, unbiased) == pytest.approx(value, abs=1e-4)
    assert cka(y, x, unbiased) == pytest.approx(value, abs=1e-9)
    assert cka(x, x, unbiased) == pytest.approx(1, abs=1e-9)
    if not unbiased:
        assert 0 <= value <= 1 + 1e-9


def test_cka_sees_other_linear_maps():
    x = normal(100, 5)
    assert cka(x, x * torch.tensor([20.0, 1, 1, 1, 1])) < 0.6


def test_chance_is_zero_for_the_unbiased_alone():
    draws = [(normal(30, 300, seed=2 * s), normal(30, 200, seed=2 * s + 1)) for s in range(100)]
    unbiased, biased = ([cka(x, y, choice) for x, y in draws] for choice in (True, False))
    assert abs(np.mean(unbiased)) < 4 * np.std(unbiased) / 10 < 0.05
    assert min(unbiased) < 0 and min(biased) > 0.8


def test_a_large_mean_costs_no_digits():
    x, y = normal(50, 10), normal(50, 80, seed=1)
    y[:, 0] += 3 * x[:, 0]
    shifted = [(rows + 1000).double().float() for rows in (x, y)]
    assert cka(*shifted) == pytest.approx(cka(*(rows.double() - 1000 for rows in shifted)), abs=1e-9)


def test_minibatches_give_the_ratio_of_mean_hsics():
    x, y = normal(23, 4), normal(23, 9, seed=1)
    y[:, :4] += x
    batches = list(zip(x.split(6), y.split(6), strict=True))
    means = np.mean(
        [[brute_hsic(a.double(), b.double(), True) for a, b in ((p, q), (p, p), (q, q))] for p, q in batches],
        axis=0,
    )
    assert minibatch_cka(iter(batches)) == pytest.approx(means[0] / math.sqrt(means[1] * means[2]), abs=1e-9)
    assert minibatch_cka([(x, y)]) == pytest.approx(cka(x, y), abs=1e-12)


def test_minibatches_agree_with_everything_at_once():
    source = normal(2000, 10)
    x, y = (source @ normal(10, 60, seed=s) + 3 * normal(2000, 60, seed=s + 5) for s in (1, 2))
    assert minibatch_cka(zip(x.split(50), y.split(50), strict=True)) == pytest.approx(cka(x, y), abs=0.03)
    assert np.mean([cka(a, b, False) for a, b in zip(x.split(50), y.split(50), strict=True)]) > cka(x, y) + 0.1


def test_no_alignment_without_variation():
    x, y = normal(10, 5), normal(10, 4, seed=1)
    spoilt = y.clone()
    spoilt[3, 0] = torch.nan
    for first, second, message in [
        (x, y[:9], "x has 10 rows and y 9"),
        (x, torch.full((10, 3), 0.1), "y: all 10 rows are equal"),
        (x, spoilt, "y: row 3 holds a value that is not finite"),
        (x[:3], y[:3], "x of shape \\(3, 5\\): expected \\(N, ...\\) with N of at least 4"),
        (torch.eye(10), y, "x: the unbiased HSIC with itself is 0, not above 0, so CKA is undefined"),
    ]:
        with pytest.raises(ValueError, match=message):
            cka(first, second)
    assert 0 < cka(x[:3], y[:3], unbiased=False) <= 1
    assert 0 < cka(torch.eye(10), y, unbiased=False) <= 1
    with pytest.raises(ValueError, match="batches: there are none"):
        minibatch_cka([])
    with pytest.raises(ValueError, match="N of at least 4"):
        minibatch_cka([(x[:2], y[:2])])


@pytest.mark.parametrize("sizes", [(20, 20, 1), (1, 20, 20), (20, 3, 20), (1, 1, 2, 20, 2)])
def test_small_batches_join_the_one_before(sizes):
    x = normal(sum(sizes), 5)
    y = x + normal(sum(sizes), 5, seed=1)
    parts = x.split(sizes), y.split(sizes)
    value = minibatch_cka(zip(*parts, strict=True))
    joined = {(20, 20, 1): (20, 21), (1, 20, 20): (21, 20), (20, 3, 20): (23, 20), (1, 1, 2, 20, 2): (4, 22)}[sizes]
    assert value == minibatch_cka(zip(x.split(joined), y.split(joined), strict=True))


def test_noise_about_a_constant_has_no_alignment():
    still = 0.1 + 1e-8 * normal(10, 3)
    with pytest.raises(ValueError, match="y: all 10 rows are equal"):
        cka(normal(10, 5), still)
    with pytest.raises(ValueError, match="all units of row 0 are equal"):
        rdm(0.1 + 1e-8 * normal(10, 300), "correlation")
    assert (pc1_share(still), effective_rank(still)) == (0, 0)


def test_numpy_arrays_are_taken(network, images):
    x, y = normal(10, 5).numpy(), normal(10, 4, seed=1).double().numpy()
    assert torch.equal(rdm(x), rdm(torch.from_numpy(x)))
    assert cka(x, y) == cka(torch.from_numpy(x), torch.from_numpy(y))
    mine, theirs = (layer_features(network, part, ["conv2"])["conv2"] for part in (images, images.numpy()))
    assert torch.equal(mine, theirs)


def test_maps_and_tokens_of_every_layout_are_pooled(images):
    torch.manual_seed(0)
    swin = torchvision.models.swin_transformer.SwinTransformer([4, 4], 24, [1, 1], [2, 2], [4, 4], num_classes=5).eval()
    vit = torchvision.models.VisionTransformer(32, 8, 1, 2, 16, 32, num_classes=5).eval()
    x = images / 255
    with torch.no_grad(), record(swin, ["features.1"]) as maps, record(vit, ["encoder"]) as tokens:
        swin(x), vit(x)
    found = layer_features(swin, images, ["features.1"])["features.1"]
    torch.testing.assert_close(found, maps["features.1"].mean((1, 2)), rtol=1e-4, atol=1e-5)
    for pool, expected in ((True, tokens["encoder"][:, 1:].mean(1)), ("class", tokens["encoder"][:, 0])):
        found = layer_features(vit, images, ["encoder"], pool=pool)["encoder"]
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


# Maps


def test_maps_are_repeatable_and_keep_neighbours():
    features = 4 * torch.eye(4, 30).repeat_interleave(15, 0) + 0.3 * normal(60, 30)
    states = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    mapped = tsne(features, perplexity=8, seed=2)
    assert mapped.shape == (60, 2) and mapped.dtype == torch.float32 and mapped.isfinite().all()
    assert torch.equal(mapped, tsne(features.view(60, 5, 6), perplexity=8, seed=2))
    assert torch.equal(states[0], torch.get_rng_state())
    assert (states[1] == np.random.get_state()[1]).all()  # noqa: NPY002
    nearest = torch.cdist(mapped, mapped).fill_diagonal_(torch.inf).argmin(1)
    assert torch.equal(nearest // 15, torch.arange(60) // 15)
    assert not torch.equal(mapped, tsne(features, perplexity=8, init="random"))


def test_no_map_of_nothing():
    x = normal(20, 5)
    for features, perplexity, message in [
        (x, 20, "perplexity=20: must be above 0 and below the number of rows, 20"),
        (x, 0, "perplexity=0"),
        (x[:, :1], 5, "at least two units"),
        (torch.ones(20, 5), 5, "rows that differ"),
        (x / 0, 5, "row 0 holds a value that is not finite"),
    ]:
        with pytest.raises(ValueError, match=message):
            tsne(features, perplexity)


def test_views_and_the_images_that_they_show(network, images):
    features, ids = view_features(network, images[:6], "heavier", 4, "conv7", seed=5, batch_size=4)
    assert features.shape == (24, 10) and ids.tolist() == [i for i in range(6) for _ in range(4)]
    for view in range(4):
        options = dict(transformation="heavier", seed=5, view=view)
        alone = layer_features(network, images[:6], ["conv7"], **options)["conv7"]
        torch.testing.assert_close(features[view::4], alone, atol=1e-6, rtol=1e-5)
    assert len(features.unique(dim=0)) == 24
    top, _ = view_features(network, images[:2], views=3)
    assert top.shape == (6, 10)
    torch.testing.assert_close(top, view_features(network, images[:2], views=3, layer=network.measured[-1])[0])
    with pytest.raises(ValueError, match="views=0"):
        view_features(network, images, views=0)
    with pytest.raises(ValueError, match="layer 'conv0' is not in the model"):
        view_features(network, images, layer="conv0")


@pytest.mark.parametrize("name", ["variance_shares", "pc1_share", "effective_rank"])
def test_measures_of_collapse_are_found_here_too(name):
    assert name in representation.__all__
    assert getattr(representation, name) is getattr(dainv.collapse, name)
