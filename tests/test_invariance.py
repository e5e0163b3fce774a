"""The invariance loss against loops over pairs in float64, and the objective in the places people use it."""

import math
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.checkpoint import checkpoint

from dainv.features import Layout, record
from dainv.invariance import InvarianceObjective, invariance_loss, layer_weights


def loop_over_pairs(features, groups, pairs="distinct", labels=None):
    """Mean distance inside groups over mean distance in the reference, one pair at a time."""
    x, inside, reference = features.flatten(1).double(), [], []
    for i in range(len(x)):
        for j in range(i + 1 if pairs == "distinct" else 0, len(x)):
            d = (x[i] - x[j]).square().mean()
            if labels is None or labels[i] == labels[j]:
                reference.append(d)
            if groups[i] == groups[j]:
                inside.append(d)
    return torch.stack(inside).mean() / torch.stack(reference).mean()


def gram_form(x, groups):
    """The pairwise form through the Gram matrix, in the type of x."""
    squares = x.square().sum(1)
    d = (squares[:, None] - 2 * x @ x.T + squares) / x.shape[1]
    distinct = torch.ones(len(x), len(x), dtype=torch.bool).triu(1)
    return d[distinct & (groups[:, None] == groups)].mean() / d[distinct].mean()


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def views(n_images=6, n_views=4, shape=(3, 4, 5), spread=0.5, offset=0.0, seed=0, dtype=torch.float32):
    """Features of shuffled views, and their image ids."""
    generator = seeded(seed)
    groups = torch.arange(n_images).repeat_interleave(n_views)[torch.randperm(n_images * n_views, generator=generator)]
    images = offset + torch.randn(n_images, *shape, generator=generator, dtype=dtype)
    return images[groups] + spread * torch.randn(len(groups), *shape, generator=generator, dtype=dtype), groups


def gradient(loss, features):
    leaf = features.detach().requires_grad_()
    return torch.autograd.grad(loss(leaf), leaf)[0]


def close(a, b, tolerance=1e-6):
    return (a.double() - b.double()).norm() <= tolerance * b.double().norm() + 1e-9


# The value and the gradient


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 5), min_size=2, max_size=6).filter(lambda s: max(s) > 1),
    shape=st.sampled_from([(), (1,), (7,), (3, 2), (2, 3, 4), (2, 1, 3)]),
    offset=st.sampled_from([0.0, -3.0, 100.0]),
    spread=st.sampled_from([0.01, 1.0]),
    pairs=st.sampled_from(["distinct", "all"]),
    reference=st.sampled_from(["all", "same_class"]),
    known=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_loss_and_gradient_match_a_loop_over_pairs(sizes, shape, offset, spread, pairs, reference, known, seed):
    generator = seeded(seed)
    groups = torch.cat([torch.full((n,), i) for i, n in enumerate(sizes)])
    groups = groups[torch.randperm(len(groups), generator=generator)]
    labels = torch.randint(0, 3, groups.shape, generator=generator)
    labels[:2] = 0  # at least one pair of one class
    images = offset + torch.randn(len(sizes), *shape, generator=generator, dtype=torch.float64)
    x = images[groups] + spread * torch.randn(len(groups), *shape, generator=generator, dtype=torch.float64)
    counts = {"n_groups": len(sizes) + 2, "n_labels": 4} if known else {}

    def ours(x):
        return invariance_loss(x, groups, pairs=pairs, reference=reference, labels=labels, **counts)

    def loop(x):
        return loop_over_pairs(x.reshape(len(x), -1), groups, pairs, labels if reference == "same_class" else None)

    assert torch.allclose(ours(x), loop(x), rtol=1e-7)
    assert close(gradient(ours, x), gradient(loop, x), 1e-6)


@pytest.mark.parametrize("reference", ["all", "same_class"])
@pytest.mark.parametrize("pairs", ["distinct", "all"])
def test_gradcheck(pairs, reference):
    x, groups = views(shape=(2, 3), dtype=torch.float64)
    labels = (groups + torch.arange(len(groups))) % 3  # classes that cut across the groups
    assert torch.autograd.gradcheck(
        lambda x: invariance_loss(x, groups, pairs=pairs, reference=reference, labels=labels), x.requires_grad_()
    )


def test_the_tiles_of_a_large_layer_leave_no_seam():
    x, groups = views(16, 8, shape=(6151,))  # no multiple of any tile
    assert close(invariance_loss(x, groups), gram_form(x.double(), groups))
    exact = gradient(lambda x: gram_form(x, groups), x.double())
    assert close(gradient(lambda x: invariance_loss(x, groups), x), exact)


@pytest.mark.parametrize(
    ("spread", "offset", "units"), [(1e-3, 5.0, 12288), (1e-2, 5.0, 3000), (1e-2, 50.0, 3000), (1e-3, 50.0, 3000)]
)
def test_exact_where_invariance_is_good(spread, offset, units):
    x, groups = views(16, 8, shape=(units,), spread=spread, offset=offset)
    true = torch.stack([(row - x.double()).square_().mean(1) for row in x.double()])
    distinct = torch.ones_like(true, dtype=torch.bool).triu(1)
    true = true[distinct & (groups[:, None] == groups)].mean() / true[distinct].mean()
    assert abs(invariance_loss(x, groups).double() / true - 1) < 1e-6
    if (spread, offset) == (1e-3, 50.0):
        assert abs(gram_form(x, groups).double() / true - 1) > 0.2
    exact = gradient(lambda x: invariance_loss(x, groups), x.double())
    assert close(gradient(lambda x: invariance_loss(x, groups), x), exact, 2e-3)


def test_identical_views_give_zero_and_random_groups_one():
    x, groups = views(spread=0.0)
    assert invariance_loss(x, groups) < 1e-12
    x = torch.randn(300, 8, 5, generator=seeded())
    losses = torch.stack([invariance_loss(batch, torch.arange(4).repeat(2)) for batch in x])
    assert abs(losses.mean() - 1) < 4 * losses.std() / 300**0.5


def test_printed_form_is_a_multiple_of_the_share_of_variance():
    x, groups = views(16, 8, shape=(20,), dtype=torch.float64)
    share = torch.stack([x[groups == g].var(0, unbiased=False).sum() for g in range(16)]).mean()
    share = share / x.var(0, unbiased=False).sum()
    assert torch.allclose(invariance_loss(x, groups, pairs="all"), share)
    assert torch.allclose(invariance_loss(x, groups), share * 8 / 7 * 127 / 128)


def test_neither_scale_nor_order_nor_offset_nor_the_names_of_groups_matter():
    x, groups = views()
    loss, order = invariance_loss(x, groups), torch.randperm(len(x), generator=seeded())
    units = torch.randperm(60, generator=seeded())
    assert torch.allclose(loss, invariance_loss(1e3 * x, groups))
    assert torch.allclose(loss, invariance_loss(x + 2, groups), rtol=1e-5)
    assert torch.allclose(loss, invariance_loss(x[order], groups[order]))
    assert torch.allclose(loss, invariance_loss(x.flatten(1)[:, units], groups))
    assert torch.allclose(loss, invariance_loss(x, 1000 - 77 * groups.int()))
    slope = gradient(lambda x: invariance_loss(x, groups), x)
    assert abs((slope * x).sum()) < 1e-6 * slope.norm() * x.norm()
    assert slope.sum(0).abs().max() < 1e-6 * slope.abs().sum(0).max()


def test_no_variance_is_no_loss_and_a_nan_stays_visible():
    _, groups = views()
    dead = torch.full((len(groups), 5), 7.0)
    for labels in (None, groups % 2):
        options = {"reference": "all" if labels is None else "same_class", "labels": labels}
        assert invariance_loss(dead, groups, **options) == 0
        assert (gradient(lambda x: invariance_loss(x, groups, **options), dead) == 0).all()  # noqa: B023
    broken = torch.randn(len(groups), 5)
    broken[3, 2] = float("nan")
    assert invariance_loss(broken, groups).isnan()


# Types and memory


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_types_are_computed_in_float32(dtype):
    x, groups = views(16, 8, shape=(500,), spread=0.02, offset=3.0)
    x = x.to(dtype)
    loss = invariance_loss(x, groups)
    assert loss.dtype == torch.float32
    assert close(loss, gram_form(x.double(), groups))
    slope = gradient(lambda x: invariance_loss(x, groups), x)
    exact = gradient(lambda x: invariance_loss(x, groups), x.double())
    assert slope.dtype == dtype
    assert close(slope, exact, 0.01 if dtype == torch.bfloat16 else 0.05)  # float16 loses small gradients


def test_autocast_changes_nothing():
    x, groups = views(16, 8, shape=(500,), spread=0.01, offset=3.0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = invariance_loss(x, groups)
    assert torch.equal(inside, invariance_loss(x, groups))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced", "units_first", "expanded"])
def test_any_layout(layout):
    x, groups = views(shape=(6, 4, 5), dtype=torch.float64)
    laid = {
        "contiguous": lambda x: x.clone(),
        "channels_last": lambda x: x.to(memory_format=torch.channels_last),
        "sliced": lambda x: torch.cat([x, x], 3)[..., 2:7],
        "units_first": lambda x: x.flatten(1).T.contiguous().T,
        "expanded": lambda x: x[:, :, :1].expand(-1, -1, 4, -1),
    }[layout](x)
    assert close(invariance_loss(laid, groups), loop_over_pairs(laid.reshape(len(laid), -1), groups), 1e-12)
    slope = gradient(lambda x: invariance_loss(x, groups), laid)
    exact = gradient(lambda x: gram_form(x, groups), laid.reshape(len(laid), -1)).reshape(laid.shape)
    assert close(slope, exact, 1e-9)
    if layout in ("contiguous", "channels_last"):
        assert slope.stride() == laid.stride()


PEAK_MEMORY = r"""
import re, torch
from dainv.invariance import invariance_loss

def peak():
    return int(re.search(r"VmHWM:\s+(\d+) kB", open("/proc/self/status").read())[1])

groups = torch.arange(64).repeat(8)
invariance_loss(torch.randn(512, 8, requires_grad=True), groups).backward()
x = torch.empty(512, 96, 16, 16, memory_format=torch.channels_last).uniform_().requires_grad_()
before = peak()
invariance_loss(x, groups).backward()
print((peak() - before) / (x.numel() * 4 / 1024))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_channels_last_is_not_copied_and_memory_stays_below_one_and_a_half_gradients():
    ran = subprocess.run([sys.executable, "-c", PEAK_MEMORY], capture_output=True, text=True, check=True)
    assert 1.0 < float(ran.stdout) < 1.5  # in gradients, the gradient included


def test_second_derivatives_are_refused():
    x, groups = views()
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(invariance_loss(x.requires_grad_(), groups), x, create_graph=True)


# Compilation


@pytest.mark.parametrize("reference", ["all", "same_class"])
@pytest.mark.parametrize("known", [True, False])
def test_compiles_without_a_graph_break(known, reference):
    x, groups = views()
    labels, counts = groups % 3, {"n_groups": 6, "n_labels": 3} if known else {}

    def loss(x):
        return invariance_loss(x, groups, reference=reference, labels=labels, **counts)

    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    assert torch.allclose(compiled(x), loss(x))
    assert close(gradient(compiled, x), gradient(loss, x))


@pytest.mark.slow
def test_a_whole_step_compiles():
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.ReLU(), torch.nn.Conv2d(4, 5, 3))
    objective, (x, groups) = InvarianceObjective(["first", "last"], 0.3, exclude_last=False), views(shape=(3, 8, 8))

    def step(x):
        first = net[1](net[0](x))
        last = net[2](first)
        return objective({"first": first, "last": last}, last.mean((2, 3)), groups % 5, groups, n_groups=6)

    torch._dynamo.reset()
    total, parts = torch.compile(step, fullgraph=True)(x)
    total.backward()
    compiled = [p.grad.clone() for p in net.parameters()]
    net.zero_grad()
    eager, eager_parts = step(x)
    eager.backward()
    assert torch.allclose(total, eager) and torch.allclose(
        parts["invariance"]["first"], eager_parts["invariance"]["first"]
    )
    assert all(close(a, p.grad, 1e-4) for a, p in zip(compiled, net.parameters(), strict=True))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_nothing_waits_and_a_graph_can_hold_it():
    x, groups = (t.cuda() for t in views(16, 8, shape=(3000,)))
    exact = invariance_loss(x.double().cpu(), groups.cpu())
    loss = torch.cuda.make_graphed_callables(lambda x: invariance_loss(x, groups, n_groups=16), (x.requires_grad_(),))
    torch.cuda.set_sync_debug_mode("error")
    try:
        value = invariance_loss(x, groups, n_groups=16)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert close(value.cpu(), exact) and close(loss(x).cpu(), exact)


# Mistakes


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"metric": "cosine"}, "known: msd"),
        ({"pairs": "some"}, "known: distinct, all"),
        ({"reference": "classes"}, "known: all, same_class"),
        ({"reference": "same_class"}, "labels are missing"),
        ({"reference": "same_class", "labels": torch.zeros(3).long()}, "labels: .* expected integers"),
        ({"reference": "same_class", "labels": torch.arange(24)}, "no two rows share a class"),
        ({"groups": torch.arange(24)}, "2 views"),
        ({"groups": torch.arange(24), "n_groups": 24}, "2 views"),
        ({"groups": torch.zeros(24)}, "expected integers"),
        ({"groups": torch.zeros(24).long()}, "share one group"),
        ({"groups": torch.zeros(23).long()}, r"expected integers \(24,\)"),
        ({"n_groups": 5}, "n_groups=5, but the ids run from 0 to 5"),
        ({"features": torch.zeros(1, 4), "groups": torch.zeros(1).long()}, "B >= 2"),
        ({"features": torch.zeros(24, 0)}, "features"),
        ({"features": torch.zeros(24, 3).long()}, "expected floats"),
        ({"features": torch.tensor(1.0)}, "expected floats"),
    ],
)
def test_mistakes_are_named(change, message):
    x, groups = views()
    with pytest.raises(ValueError, match=message):
        invariance_loss(**({"features": x, "groups": groups} | change))


# Weights


def test_weights_of_the_paper():
    assert layer_weights(4, 0.1, exclude_last=False).mul(1e5).round().tolist() == [562, 1211, 2608, 5619]
    nine = layer_weights(9, 0.1)
    assert nine[-1] == 0 and nine[:-1].mul(1e5).round().tolist() == [302, 420, 583, 810, 1126, 1564, 2174, 3021]


@given(
    n=st.integers(2, 30),
    total=st.floats(0, 1),
    ratio=st.floats(0.1, 1000),
    kind=st.sampled_from(["exponential", "linear", "uniform"]),
    exclude_last=st.booleans(),
)
def test_weights_sum_to_their_total(n, total, ratio, kind, exclude_last):
    weights = layer_weights(n, total, ratio, kind, exclude_last)
    assert len(weights) == n and abs(weights.sum() - total) < 1e-12 and (weights >= 0).all()
    used = weights[:-1] if exclude_last else weights
    if len(used) > 1 and kind != "uniform":
        assert abs(used[-1] - ratio * used[0]) < 1e-9


@pytest.mark.parametrize(
    ("arguments", "message"),
    [((1, 0.1), "no layer left"), ((4, 0.1, 0.0), "ratio"), ((4, 0.1, 10, "cubic"), "known: exp")],
)
def test_weights_refuse(arguments, message):
    with pytest.raises(ValueError, match=message):
        layer_weights(*arguments)


# The objective


def batch(n_images=6, n_views=4):
    x, groups = views(n_images, n_views, shape=(5, 3, 3))
    x.requires_grad_()
    return {"a": x, "b": x.square(), "c": x[:, :4]}, x[:, :4].mean((2, 3)), groups % 4, groups


def test_total_is_the_weighted_sum_and_parts_are_detached():
    activations, logits, labels, ids = batch()
    objective = InvarianceObjective(["a", "b", "c"], 0.4)
    total, parts = objective(activations, logits, labels, ids)
    losses = {layer: invariance_loss(x, ids) for layer, x in activations.items()}
    weights = layer_weights(3, 0.4).tolist()
    by_hand = 0.6 * F.cross_entropy(logits, labels) + sum(w * losses[n] for w, n in zip(weights, "abc", strict=True))
    assert torch.allclose(total, by_hand)
    assert list(parts["invariance"]) == ["a", "b", "c"] and torch.allclose(
        parts["cross_entropy"], F.cross_entropy(logits, labels)
    )
    assert all(torch.allclose(parts["invariance"][n], losses[n]) for n in "abc")
    assert total.requires_grad and not any(
        p.requires_grad for p in (parts["cross_entropy"], *parts["invariance"].values())
    )


def test_both_invariances_are_weighed_and_the_class_layer_gets_no_gradient_without_cross_entropy():
    activations, logits, labels, ids = batch()
    head = logits.detach().requires_grad_()
    objective = InvarianceObjective(["a", "b", "c"], 0.1, 0.9, weights_ratio=3)
    total, parts = objective(activations, head, labels, ids)
    losses = {n: (invariance_loss(x, ids), loop_over_pairs(x.detach(), labels)) for n, x in activations.items()}
    shares = layer_weights(3, 1.0, 3).tolist()
    by_hand = sum(w * (0.1 * losses[n][0] + 0.9 * losses[n][1]) for w, n in zip(shares, "abc", strict=True))
    assert torch.allclose(total.double(), by_hand.double())
    assert all(torch.allclose(parts["class_invariance"][n].double(), losses[n][1]) for n in "abc")
    assert objective.cross_entropy_weight == 0 and sum(objective.betas.values()) == pytest.approx(0.9)
    total.backward()
    assert head.grad is None and torch.isfinite(parts["cross_entropy"])


def test_a_layer_can_be_chosen_and_its_maps_pooled():
    activations, logits, labels, ids = batch()
    total, parts = InvarianceObjective(["a", "b", "c"], 0.0, 1.0, only=["b"], pool=True)(
        activations, logits, labels, ids
    )
    means = activations["b"].detach().mean((2, 3))
    assert torch.allclose(total.double(), loop_over_pairs(means, labels))
    assert set(parts["class_invariance"]) == {"a", "b", "c"}


def test_weight_wanders_from_images_to_classes():
    activations, logits, labels, ids = batch()
    objective = InvarianceObjective(["a"], 0.9, 0.1, beta_end=0.9, exclude_last=False)
    image, by_class = invariance_loss(activations["a"], ids), invariance_loss(activations["a"], labels)
    for progress in (0.0, torch.tensor(0.25), 1.0):
        beta = 0.1 + 0.8 * float(progress)
        total, _ = objective(activations, logits, labels, ids, progress=progress)
        assert total.item() == pytest.approx(((1 - beta) * image + beta * by_class).item(), rel=1e-5)


def test_single_views_can_carry_the_class_wise_loss():
    activations, logits, labels, _ = batch()
    total, parts = InvarianceObjective(["a", "b"], 0.0, 1.0)(activations, logits, labels, torch.arange(len(labels)))
    assert parts["invariance"] == {} and total.requires_grad


def test_options_reach_the_loss():
    activations, logits, labels, ids = batch()
    objective = InvarianceObjective(["a", "b"], 0.1, pairs="all", reference="same_class")
    _, parts = objective(activations, logits, labels, ids, n_groups=6, n_labels=4)
    true = loop_over_pairs(activations["a"].detach(), ids, "all", labels)
    assert torch.allclose(parts["invariance"]["a"].double(), true)


def test_layers_of_weight_zero_are_measured_without_gradient_or_not_at_all():
    activations, logits, labels, ids = batch()
    lone = activations["c"].detach().requires_grad_()
    total, parts = InvarianceObjective(["a", "b", "c"], 0.5)(activations | {"c": lone}, logits, labels, ids)
    total.backward()
    assert lone.grad is None and "c" in parts["invariance"]
    activations, logits, labels, ids = batch()
    objective = InvarianceObjective(["a", "b", "c"], 0.5)
    assert list(objective(activations, logits, labels, ids, monitor=False)[1]["invariance"]) == ["a", "b"]


def test_alpha_zero_is_plain_cross_entropy():
    activations, logits, labels, ids = batch()
    objective = InvarianceObjective(["a", "b", "c"], 0.0)
    total, parts = objective(activations, logits, labels, ids)
    assert torch.equal(total, F.cross_entropy(logits, labels)) and len(parts["invariance"]) == 3
    quiet = objective({}, logits, labels, ids, monitor=False)[1]
    assert quiet["invariance"] == quiet["class_invariance"] == {}
    single = torch.arange(len(ids))  # one view each: there is nothing to measure
    for n_groups in (None, len(ids)):
        assert objective(activations, logits, labels, single, n_groups=n_groups)[1]["invariance"] == {}


def test_the_objective_refuses():
    activations, logits, labels, ids = batch()
    for alpha, beta in ((-0.1, 0.0), (1.1, 0.0), (float("nan"), 0.0), (0.6, 0.5), (0.5, -0.1), (0.0, float("nan"))):
        with pytest.raises(ValueError, match="expected both >= 0"):
            InvarianceObjective(["a", "b"], alpha, beta)
    for wrong, message in (
        ({"beta_end": 0.3}, "beta_end=0.3"),
        ({"only": ["z"]}, "layer 'z'"),
        ({"only": "a"}, "only="),
    ):
        with pytest.raises(ValueError, match=message):
            InvarianceObjective(["a", "b"], 0.1, 0.1, **wrong)
    with pytest.raises(ValueError, match="no meaning"):
        InvarianceObjective(["a", "b"], metric="fisher", reference="same_class")
    for far in (labels + 1, labels - 1):
        with pytest.raises(ValueError, match=r"labels run from .* expected 0\.\.3"):
            InvarianceObjective(["a", "b"])(activations, logits, far, ids)
    with pytest.raises(ValueError, match="one class only"):
        InvarianceObjective(["a", "b"], 0.0, 1.0)(activations, logits[:, :1], labels * 0, ids)
    for wrong in ({"metric": "cosine"}, {"pairs": "some"}, {"reference": "some"}, {"weights": "cubic"}):
        with pytest.raises(ValueError, match="known"):
            InvarianceObjective(["a", "b"], **wrong)
    for layers in ("conv1", ["a", "a"]):
        with pytest.raises(ValueError, match="layers"):
            InvarianceObjective(layers)
    with pytest.raises(ValueError, match="layer 'z'.*a, b, c"):
        InvarianceObjective(["z", "a"])(activations, logits, labels, ids)
    for n_groups in (None, len(ids)):
        with pytest.raises(ValueError, match=r"views \(M\) must be at least 2"):
            InvarianceObjective(["a", "b"])(activations, logits, labels, torch.arange(len(ids)), n_groups=n_groups)


# What cannot be trained with


@pytest.mark.parametrize("ratio", [math.inf, math.nan, 0.0, -1.0])
def test_ratios_that_make_no_weights_are_refused(ratio):
    for call in (
        lambda: layer_weights(3, 0.1, ratio),
        lambda: InvarianceObjective(["a", "b"], alpha=0.5, weights_ratio=ratio),
    ):
        with pytest.raises(ValueError, match=r"ratio=.*expected a positive, finite number"):
            call()
    with pytest.raises(ValueError, match="total=inf: expected a finite number"):
        layer_weights(3, math.inf)


@pytest.mark.parametrize("n_groups", [None, 1, 3])
def test_a_batch_of_one_image_is_refused(n_groups):
    activations, logits, labels, ids = batch()
    objective = InvarianceObjective(["a", "b", "c"], 0.4)
    with pytest.raises(ValueError, match="all 24 rows show one image.*micro-batch"):
        objective(activations, logits, labels, ids * 0, n_groups=n_groups)
    InvarianceObjective(["a", "b", "c"], 0.0)(activations, logits, labels, ids * 0, n_groups=n_groups)


def test_activations_without_gradient_are_refused():
    activations, logits, labels, ids = batch()
    objective = InvarianceObjective(["a", "b", "c"], 0.4)
    dead = activations | {"b": activations["b"].detach()}
    with pytest.raises(ValueError, match="layer 'b': its activations carry no gradient.*use_reentrant=False"):
        objective(dead, logits, labels, ids)
    without = {**activations, "c": activations["c"].detach()}  # the last layer carries no weight
    assert objective(without, logits, labels, ids)[0].requires_grad
    InvarianceObjective(["a", "b", "c"], 0.0)(dead, logits, labels, ids)
    InvarianceObjective(["a", "b", "c"], 0.4, only=["a"])(dead, logits, labels, ids)
    with torch.no_grad():
        objective(dead, logits, labels, ids)
    detached = {layer: x.detach() for layer, x in activations.items()}
    assert not objective(detached, logits.detach(), labels, ids)[0].requires_grad


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointed_layers_train_or_say_why_not(reentrant):
    class Checkpointed(nn.Sequential):
        def forward(self, x):
            return checkpoint(super().forward, x, use_reentrant=reentrant)

    torch.manual_seed(0)
    inner = Checkpointed(nn.Conv2d(3, 4, 3), nn.ReLU())
    model = nn.Sequential(inner, nn.Flatten(), nn.Linear(144, 3))
    x, ids = torch.rand(8, 3, 8, 8, requires_grad=True), torch.arange(4).repeat_interleave(2)
    objective = InvarianceObjective(["0.0"], alpha=1.0, exclude_last=False)
    with record(model, ["0.0"]) as activations:
        logits = model(x)
        if reentrant:
            with pytest.raises(ValueError, match="use_reentrant=False"):
                objective(activations, logits, ids % 3, ids)
            return
        objective(activations, logits, ids % 3, ids)[0].backward()
    assert inner[0].weight.grad.any()


def test_rows_that_are_not_images_are_refused_or_read_with_a_layout():
    torch.manual_seed(0)
    n, places = 8, 8
    tokens = torch.randn(n, places, 5, requires_grad=True)
    logits, ids = tokens.mean((1, 2))[:, None].expand(n, 4), torch.arange(4).repeat_interleave(2)
    expected = invariance_loss(tokens.flatten(1), ids)
    options = dict(alpha=1.0, exclude_last=False)
    plain = InvarianceObjective(["encoder"], **options)
    for shown in (tokens, tokens.transpose(0, 1)):  # as many positions as images: one shape for both
        with pytest.raises(ValueError, match=r"'encoder' gives \(8, 8, 5\) for 8 images, which may be axis 0 or 1"):
            plain(dict(encoder=shown), logits, ids, ids)
    with pytest.raises(ValueError, match="its rows are not images"):
        plain(dict(encoder=tokens[:, :6].transpose(0, 1)), logits, ids, ids)
    for batch_axis, shown in ((0, tokens), (1, tokens.transpose(0, 1))):
        told = InvarianceObjective(["encoder"], **options, layouts=dict(encoder=Layout(batch_axis, 2)))
        torch.testing.assert_close(told(dict(encoder=shown), logits, ids, ids)[0], expected)
        means = InvarianceObjective(["encoder"], **options, pool=True, layouts=told.layouts)
        found = means(dict(encoder=shown), logits, ids, ids)[0]
        torch.testing.assert_close(found, invariance_loss(tokens.mean(1), ids))
    with pytest.raises(ValueError, match="which axis holds the channels"):
        InvarianceObjective(["encoder"], **options, pool=True)(dict(encoder=tokens[:, :6]), logits, ids, ids)


def test_the_loss_of_a_batch_is_not_the_mean_of_its_parts():
    x, ids = torch.randn(8, 30), torch.arange(4).repeat_interleave(2)
    parts = torch.stack([invariance_loss(a, b) for a, b in zip(x.split(4), ids.split(4), strict=True)])
    assert (parts.mean() - invariance_loss(x, ids)).abs() > 1e-3


def _distributed_losses(rank, folder, kwargs):
    "The objective on this process's half of a batch, with the gradients of its rows."
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    features, labels, ids = (part[rank] for part in torch.load(f"{folder}/batch.pt"))
    leaves = {"a": features.clone().requires_grad_(), "b": features.square().requires_grad_()}
    objective = InvarianceObjective(["a", "b"], exclude_last=False, distributed=True, **kwargs)
    known = dict(n_labels=3) if objective.beta else {}
    loss, parts = objective(leaves, torch.zeros(len(labels), 3), labels, ids, **known)
    loss.backward()
    torch.save((parts, {name: leaf.grad for name, leaf in leaves.items()}), f"{folder}/found{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("kwargs", [dict(alpha=1.0), dict(alpha=0.4, beta=0.6), dict(alpha=0.4, beta=0.6, pairs="all")])
def test_two_processes_have_the_loss_of_the_whole_batch(tmp_path, kwargs):
    generator = torch.Generator().manual_seed(0)
    ids = torch.arange(8).repeat_interleave(4)
    features = 20 + torch.randn(8, 30, generator=generator)[ids] + 0.2 * torch.randn(32, 30, generator=generator)
    labels = torch.tensor([0, 1, 1, 0, 2, 1, 0, 1])[ids]  # class 2 is in one process only
    torch.save(
        ([features[:12], features[12:]], [labels[:12], labels[12:]], [ids[:12], ids[12:]]), tmp_path / "batch.pt"
    )
    torch.multiprocessing.spawn(_distributed_losses, (str(tmp_path), kwargs), nprocs=2)
    whole = {"a": features.clone().requires_grad_(), "b": features.square().requires_grad_()}
    loss, parts = InvarianceObjective(["a", "b"], exclude_last=False, **kwargs)(
        whole, torch.zeros(32, 3), labels, ids, n_labels=3
    )
    loss.backward()
    found = [torch.load(tmp_path / f"found{rank}.pt") for rank in (0, 1)]
    for kind in ("invariance", "class_invariance") if "beta" in kwargs else ("invariance",):
        for layer, value in parts[kind].items():
            assert found[0][0][kind][layer].item() == pytest.approx(value.item(), rel=1e-5)
            assert found[1][0][kind][layer].item() == pytest.approx(value.item(), rel=1e-5)
    for name, leaf in whole.items():  # averaged over processes, as DistributedDataParallel does
        grads = torch.cat([gradients[name] for _, gradients in found]) / 2
        assert torch.allclose(grads, leaf.grad, rtol=1e-3, atol=1e-5 * leaf.grad.abs().max())


def test_what_is_not_distributed_is_refused():
    with pytest.raises(ValueError, match="only for metric='msd'"):
        InvarianceObjective(["a"], 0.5, metric="fisher", distributed=True)
    objective = InvarianceObjective(["a"], 0.5, exclude_last=False, distributed=True)
    with pytest.raises(ValueError, match="init_process_group"):
        objective.batch(torch.zeros(4, dtype=torch.long), torch.arange(4) // 2)
