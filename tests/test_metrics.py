"The metrics of invariance against their definitions, and the code that each of them wants."

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dainv.collapse import pc1_share
from dainv.invariance import METRICS, InvarianceObjective, invariance_loss
from dainv.metrics import RunningFisher, RunningLDA, ey, fisher, unit_ratio

RATIOS = [name for name, metric in METRICS.items() if metric.scale_free]


def grouped(sizes, units, seed=0, spread=1.0, offset=0.0):
    "Features of groups of these sizes, shuffled, and their groups."
    generator = torch.Generator().manual_seed(seed)
    groups = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    groups = groups[torch.randperm(len(groups), generator=generator)]
    means = torch.randn(len(sizes), units, generator=generator, dtype=torch.float64)
    return offset + means[groups] + spread * torch.randn(
        len(groups), units, generator=generator, dtype=torch.float64
    ), groups


def mean_over_units(x, groups, distinct, reference=None):
    "The mean over units of a loop over pairs."
    ratios = []
    for column in x.T:
        inside, everything = [], []
        for i in range(len(x)):
            for j in range(i + 1 if distinct else 0, len(x)):
                square = (column[i] - column[j]) ** 2
                if reference is None or reference[i] == reference[j]:
                    everything.append(square)
                if groups[i] == groups[j]:
                    inside.append(square)
        ratios.append(torch.stack(inside).mean() / torch.stack(everything).mean())
    return torch.stack(ratios).mean()


def one_minus_trace(x, groups, shrinkage):
    "Fisher's criterion, as it is defined."
    x = x - x.mean(0)
    total = x.T @ x / len(x)
    means = torch.stack([x[groups == g].mean(0) * (groups == g).double().mean().sqrt() for g in groups.unique()])
    ridge = shrinkage * total.trace() / x.shape[1] * torch.eye(x.shape[1], dtype=x.dtype)
    rank = min(len(groups.unique()) - 1, x.shape[1])
    return 1 - torch.linalg.solve(total + ridge, means.T @ means).trace() / rank


SIZES = st.lists(st.integers(1, 5), min_size=2, max_size=6).filter(lambda s: max(s) > 1)


@settings(max_examples=40, deadline=None)
@given(SIZES, st.integers(1, 4), st.sampled_from(["distinct", "all"]), st.booleans(), st.integers(0, 99))
def test_per_unit_is_the_mean_over_units_of_a_loop_over_pairs(sizes, units, pairs, same_class, seed):
    x, groups = grouped(sizes, units, seed)
    labels = groups // 2 if same_class else None
    ours = invariance_loss(
        x, groups, metric="per_unit", pairs=pairs, reference="same_class" if same_class else "all", labels=labels
    )
    assert ours.item() == pytest.approx(mean_over_units(x, groups, int(pairs == "distinct"), labels).item(), rel=1e-9)


@settings(max_examples=60, deadline=None)
@given(SIZES, st.integers(1, 40), st.sampled_from([1e-3, 1e-2, 1.0]), st.sampled_from([0.0, 1e3]), st.integers(0, 99))
def test_fisher_is_its_definition_with_more_rows_or_more_units(sizes, units, shrinkage, offset, seed):
    x, groups = grouped(sizes, units, seed, offset=offset)
    ours = fisher(x, groups, len(sizes), shrinkage=shrinkage)
    assert ours.item() == pytest.approx(one_minus_trace(x, groups, shrinkage).item(), rel=1e-6, abs=1e-8)
    assert -1e-9 <= ours <= 1


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("units", [3, 30])
def test_gradients(metric, units):
    x, groups = grouped([3, 2, 4, 1], units)
    assert torch.autograd.gradcheck(lambda x: invariance_loss(x, groups, metric=metric), x.requires_grad_())


@pytest.mark.parametrize("metric", RATIOS)
def test_neither_order_nor_scale_nor_names_of_groups_matter(metric):
    x, groups = grouped([4, 4, 4, 4], 5)
    true = invariance_loss(x, groups, metric=metric)
    order = torch.randperm(16, generator=torch.Generator().manual_seed(1))
    assert torch.allclose(invariance_loss(x[order], groups[order], metric=metric), true)
    assert torch.allclose(invariance_loss(100 * x + 7, 10 - 3 * groups, metric=metric), true)
    assert torch.allclose(invariance_loss(x, groups, metric=metric, n_groups=9), true)  # ids without a row


@pytest.mark.parametrize("metric", RATIOS)
def test_identical_views_give_nothing_and_a_nan_stays_visible(metric):
    x, groups = grouped([4] * 8, 2, spread=0.0)
    # shrinkage alone is left of the Fisher loss
    assert invariance_loss(x, groups, metric=metric) < (1e-12 if METRICS[metric].pairs else 0.05)
    x[3, 1] = torch.nan
    assert invariance_loss(x, groups, metric=metric).isnan()


@pytest.mark.parametrize("metric", METRICS)
def test_a_dead_layer_has_a_finite_loss_and_no_gradient(metric):
    dead = torch.full((8, 6), 3.0, requires_grad=True)
    loss = invariance_loss(dead, torch.arange(8) // 2, metric=metric)
    loss.backward()
    assert loss.item() == (0.0 if METRICS[metric].pairs else 1.0) and not dead.grad.any()


def test_a_unit_that_does_not_vary_is_left_out():
    x, groups = grouped([3, 3, 3], 4)
    silent = torch.cat([x, torch.ones(9, 2)], 1)
    assert unit_ratio(silent, groups, 3, None, 1, 1).item() == pytest.approx(
        unit_ratio(x, groups, 3, None, 1, 1).item()
    )


def test_half_types_are_computed_wider():
    x, groups = grouped([8, 8, 8], 5)
    for metric in METRICS:
        half = invariance_loss(x.bfloat16(), groups, metric=metric)
        assert half.dtype == torch.float32
        assert half.item() == pytest.approx(
            invariance_loss(x.bfloat16().double(), groups, metric=metric).item(), rel=1e-5
        )


def test_only_fisher_refuses_a_rank_one_code():
    x, labels = grouped([20] * 6, 5, spread=0.3)
    direction = torch.linalg.svd(x - x.mean(0))[2][0]
    line = torch.outer(x @ direction, torch.ones(5, dtype=x.dtype))
    for metric in RATIOS:
        lower = invariance_loss(line, labels, metric=metric) < invariance_loss(x, labels, metric=metric)
        assert bool(lower) == METRICS[metric].rank_one, metric


@pytest.mark.parametrize("wrong", [0.0, -1.0, float("nan")])
def test_mistakes_are_named(wrong):
    x, groups = grouped([3, 3], 2)
    with pytest.raises(ValueError, match="shrinkage"):
        fisher(x, groups, 2, shrinkage=wrong)
    with pytest.raises(ValueError, match="no meaning"):
        fisher(x, groups, 2, groups, 2)


# Without an inverse, and with statistics that outlast a batch


def ten_classes(units, lam=0.6, rows=128, seed=0):
    "Ten classes in nine directions of variance 1 inside, with this share of the variance between them; D - 9 are noise."
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 10, (rows,), generator=generator)
    simplex = torch.linalg.svd(torch.eye(10, dtype=torch.float64) - 0.1)[0][:, :9] * (10 * lam / (1 - lam)) ** 0.5
    means = torch.cat([simplex, torch.zeros(10, units - 9, dtype=torch.float64)], 1)
    return means[ids] + torch.randn(rows, units, generator=generator, dtype=torch.float64), ids


def ey_by_pairs(x, groups, images=None):
    "The criterion, one pair of rows at a time."
    c, pairs, inside, squares = x - x.mean(0), [], [], []
    for i in range(len(x)):
        for j in range(i + 1, len(x)):
            pairs.append((x[i] - x[j]).square().sum())
            if groups[i] == groups[j]:
                inside.append(pairs[-1])
            if images is None or images[i] != images[j]:
                squares.append((c[i] @ c[j]) ** 2)
    rank = min(len(groups.unique()) - 1, x.shape[1])
    between = torch.stack(pairs).mean() - torch.stack(inside).mean()
    return 1 + (torch.stack(squares).mean() - between) / rank


@settings(max_examples=30, deadline=None)
@given(SIZES, st.integers(1, 9), st.booleans(), st.integers(0, 99))
def test_ey_is_its_definition(sizes, units, with_images, seed):
    x, groups = grouped(sizes, units, seed, offset=3.0)
    images = torch.arange(len(groups)) // 2 if with_images and len(groups) > 2 else None
    assert ey(x, groups, len(sizes), images=images).item() == pytest.approx(ey_by_pairs(x, groups, images).item())


def test_ey_at_its_optimum_is_one_minus_the_mean_squared_eigenvalue_at_any_width():
    for units in (16, 64, 192):
        scale = torch.zeros(units, dtype=torch.float64)
        scale[:9] = (0.6 * 0.4) ** 0.5  # S_T = 1 / .4 becomes .6
        losses = [ey(x * scale, ids, 10) for x, ids in (ten_classes(units, seed=s) for s in range(60))]
        assert torch.stack(losses).mean() == pytest.approx(1 - 0.36, abs=0.025)
        both = [f * scale for f in (0.9, 1.1)]  # the scale is right
        assert all(
            torch.stack([ey(x * other, ids, 10) for x, ids in (ten_classes(units, seed=s) for s in range(60))]).mean()
            > torch.stack(losses).mean()
            for other in both
        )


@pytest.mark.parametrize("units", [128, 192, 400])
def test_noise_is_at_chance_with_more_units_than_rows(units):
    generator, running, lasting, each = torch.Generator().manual_seed(0), RunningFisher(10, units, 0.98), [], []
    for _ in range(150):
        x, ids = torch.randn(128, units, generator=generator), torch.randint(0, 10, (128,), generator=generator)
        lasting.append(running(x, ids))
        each.append(ey(0.1 * x, ids, 10))
    assert torch.stack(lasting[-50:]).mean() > 0.88 and torch.stack(each).mean() == pytest.approx(1.0, abs=0.01)
    assert fisher(x, ids, 10) < 0.1  # which calls it separated


def test_gradient_of_running_fisher_is_that_of_the_criterion_with_the_inverse_lagged():
    x, ids = ten_classes(12, rows=200)
    running = RunningFisher(10, 12, rate=0.0, shrinkage=0.05)
    running.take_in(x, ids)
    ours, check = x.clone().requires_grad_(), x.clone().requires_grad_()
    loss = running(ours, ids)
    centred = check - check.mean(0)
    total = centred.T @ centred / 200
    ridge = 0.05 * total.detach().trace() / 12 * torch.eye(12, dtype=x.dtype)
    means = torch.stack([centred[ids == g].mean(0) * (ids == g).double().mean().sqrt() for g in range(10)])
    # d(S_T^-1) = -S_T^-1 dS_T S_T^-1, with all inverses of the running sums
    inverse = torch.linalg.inv(total.detach() + ridge)
    between = means.T @ means
    true = (inverse @ between).trace() - (inverse @ total @ inverse @ between.detach()).trace()
    (-true / 9).backward()
    loss.backward()
    assert torch.allclose(ours.grad, check.grad, rtol=1e-9, atol=1e-12)
    assert loss.item() == pytest.approx(one_minus_trace(x, ids, 0.05).item(), rel=0.1)


def test_running_lda_is_the_posterior_of_normal_distributions_and_forgets_its_scale():
    batches = [ten_classes(12, rows=200, seed=s) for s in range(8)]
    leaf = batches[-1][0].requires_grad_()
    running, scaled = (RunningLDA(10, 12, rate=0.5, shrinkage=0.05) for _ in range(2))
    for x, ids in batches:
        loss, again = running(x, ids), scaled(1000 * x + 7, ids)
        assert again.item() == pytest.approx(loss.item(), rel=1e-6)
    weights = torch.cat([torch.full((200,), 0.5 ** (7 - s), dtype=torch.float64) for s in range(8)])
    rows, labels = torch.cat([x.detach() for x, _ in batches]).double(), torch.cat([ids for _, ids in batches])
    share = torch.stack([weights[labels == g].sum() for g in range(10)]) / weights.sum()
    means = torch.stack(
        [(weights[labels == g, None] * rows[labels == g]).sum(0) / weights[labels == g].sum() for g in range(10)]
    )
    centred, inside = rows - (weights[:, None] * rows).sum(0) / weights.sum(), rows - means[labels]
    total, within = (v.T @ (v * weights[:, None]) / weights.sum() for v in (centred, inside))
    common = within + 0.05 * total.trace() / 12 * torch.eye(12, dtype=torch.float64)
    normal = torch.distributions.MultivariateNormal
    joint = torch.stack(
        [normal(m, common).log_prob(leaf.double()) + p.log() for m, p in zip(means, share, strict=True)]
    )
    true = -joint.log_softmax(0).gather(0, ids[None]).mean() / math.log(10)
    assert loss.item() == pytest.approx(true.item(), rel=1e-6)
    torch.testing.assert_close(*(torch.autograd.grad(v, leaf)[0] for v in (loss, true)), rtol=1e-5, atol=1e-9)


def test_running_fisher_finds_the_truth_where_a_batch_cannot():
    running, found = RunningFisher(10, 192, 0.98), []
    for seed in range(200):
        found.append(running(*ten_classes(192, seed=seed)))
    assert torch.stack(found[-50:]).mean() == pytest.approx(0.4, abs=0.05)
    assert fisher(*ten_classes(192), 10) < 0.05


@pytest.mark.parametrize("metric", ["ey", "running_fisher", "running_lda"])
def test_no_collapse_and_no_loss_of_classes_in_some_hundred_steps(metric):
    torch.manual_seed(0)
    mixing = torch.randn(64, 64, dtype=torch.float64) / 8
    net = torch.nn.Sequential(
        torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 32), torch.nn.BatchNorm1d(32)
    )
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9, nesterov=True)
    objective = InvarianceObjective(["top"], 0.0, 1.0, exclude_last=False, metric=metric)
    for step in range(400):
        x, ids = ten_classes(64, lam=0.8, seed=step)
        top = net((x @ mixing).float())
        total, _ = objective({"top": top}, top[:, :10], ids, torch.arange(128), n_labels=10)
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
    net.eval()
    with torch.no_grad():
        (x, ids), (new, true) = (ten_classes(64, lam=0.8, rows=1000, seed=s) for s in (1000, 1001))
        train, test = net((x @ mixing).float()), net((new @ mixing).float())
    means = torch.stack([train[ids == g].mean(0) for g in range(10)])
    accuracy = (torch.cdist(test, means).argmin(1) == true).double().mean()
    assert pc1_share(test) < 0.3 and accuracy > 0.9


def test_running_statistics_are_the_state_of_the_objective():
    objectives = [InvarianceObjective(["a"], 0.0, 1.0, exclude_last=False, metric="running_fisher") for _ in range(2)]
    batches = [ten_classes(16, seed=s) for s in range(40)]

    def loss(objective, batch):
        x, ids = batch
        return objective({"a": x.requires_grad_()}, x[:, :10], ids, torch.arange(128))[0]

    for batch in batches[:30]:
        loss(objectives[0], batch)
    objectives[1].load_state_dict(objectives[0].state_dict())
    for batch in batches[30:]:
        assert torch.equal(*(loss(objective, batch) for objective in objectives))
    assert InvarianceObjective(["a"], metric="ey", exclude_last=False).state_dict() == {}


@pytest.mark.parametrize("metric", ["fisher", "running_fisher", "running_lda"])
def test_shrinkage_of_the_objective_reaches_the_criterion_and_a_checkpoint(metric):
    def total(objective, batch):
        x, ids = batch
        return objective({"a": x.requires_grad_()}, x[:, :10], ids, torch.arange(len(x)), n_labels=10)[0].item()

    options = dict(exclude_last=False, metric=metric)
    weak, strong = (InvarianceObjective(["a"], 0.0, 1.0, shrinkage=s, **options) for s in (0.01, 0.5))
    running = (RunningLDA if metric == "running_lda" else RunningFisher)(10, 16, shrinkage=0.5)
    batches = [ten_classes(16, seed=s) for s in range(40)]
    for x, ids in batches:
        expected = fisher(x, ids, 10, shrinkage=0.5).item() if metric == "fisher" else running(x, ids).item()
        low, high = total(weak, (x, ids)), total(strong, (x, ids))
        assert high == pytest.approx(expected, abs=1e-9) and high > low
    again = InvarianceObjective(["a"], 0.0, 1.0, shrinkage=0.5, **options)
    again.load_state_dict(strong.state_dict())
    assert total(again, batches[0]) == total(strong, batches[0])
    for wrong in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="shrinkage=.*covariance invertible"):
            InvarianceObjective(["a"], 0.0, 1.0, shrinkage=wrong, **options)


def test_running_fisher_says_what_it_needs():
    x, ids = ten_classes(9000)
    objective = InvarianceObjective(["a"], 0.0, 1.0, exclude_last=False, metric="running_fisher")
    with pytest.raises(ValueError, match="layer 'a' has 9000 units.*set pool"):
        objective({"a": x.requires_grad_()}, x[:, :10], ids, torch.arange(128))
    with pytest.raises(ValueError, match="n_labels is missing"):
        objective.batch(ids, torch.arange(128))
    for metric in ("ey", "running_fisher", "running_lda"):
        with pytest.raises(ValueError, match=f"no meaning for metric='{metric}'"):
            InvarianceObjective(["a", "b"], metric=metric, reference="same_class")
    with pytest.raises(ValueError, match="no meaning"):
        ey(x, ids, 10, ids, 10)
