"""Attacks against closed forms, foolbox and their own definition; a network that hides its gradient."""

import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from dainv.attacks import attack_table, fgsm, input_gradient, logit_margin, masking_report, pgd
from dainv.models import build_model, record


class Affine(nn.Module):
    """Logits A x + b of flattened images; whole numbers, so that batches of any size round alike."""

    def __init__(self, classes=3, pixels=12, seed=0):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.weight = nn.Parameter(torch.randint(-8, 9, (classes, pixels), generator=generator) / 8)

    def forward(self, x):
        return (x.flatten(1)[:, None] * self.weight).sum(2)


class Scaled(nn.Module):
    def __init__(self, model, factor):
        super().__init__()
        self.model, self.factor = model, factor

    def forward(self, x):
        return self.factor * self.model(x)


def images(n=7, shape=(3, 2, 2), seed=0):
    return torch.rand(n, *shape, generator=torch.Generator().manual_seed(seed))


def convnet(seed=0):
    torch.manual_seed(seed)
    layers = nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.Tanh(), nn.Flatten(), nn.Linear(6 * 64, 5)
    return nn.Sequential(*layers).eval()


def fallen(model, attacked, labels):
    with torch.no_grad():
        return model(attacked).argmax(1) != labels


# One step


def test_fgsm_on_two_classes_is_a_step_along_the_weights():
    model = Affine(classes=2)
    x, labels = images(), torch.tensor([0, 1, 0, 1, 0, 1, 0])
    towards = (model.weight[1] - model.weight[0]).detach().sign().view(3, 2, 2)
    expected = torch.stack(
        [(x + e * torch.where(labels.view(-1, 1, 1, 1) == 0, towards, -towards)).clamp(0, 1) for e in (0.02, 0.6)]
    )
    assert torch.equal(fgsm(model, x, labels, [0.02, 0.6], loss="margin"), expected)
    moving = (towards != 0).expand_as(expected)  # elsewhere the cross entropy gives the sign of a rounding error
    assert torch.equal(fgsm(model, x, labels, [0.02, 0.6])[moving], expected[moving])


def test_one_gradient_serves_all_strengths():
    model, calls = convnet(), []
    model.register_forward_hook(lambda *_: calls.append(1))
    fgsm(model, images(6, (3, 8, 8)), None, [0.01, 0.02, 0.03, 0.04])
    assert len(calls) == 2  # the predictions and the gradient


def test_the_gradient_is_that_of_finite_differences():
    model, x, labels = convnet().double(), images(3, (3, 8, 8)), torch.tensor([0, 4, 2])
    model.register_forward_pre_hook(lambda _, inputs: inputs[0].double())
    for loss, value in (("cross_entropy", lambda z: F.cross_entropy(z, labels, reduction="none")), ("margin", None)):
        value = value or (lambda z: logit_margin(z, labels))
        found = input_gradient(model, x, labels, loss=loss)[:, 1, 2, 3]
        step = torch.zeros_like(x, dtype=torch.float64)
        step[:, 1, 2, 3] = 1e-4
        with torch.no_grad():
            difference = (value(model(x.double() + step)) - value(model(x.double() - step))) / 2e-4
        torch.testing.assert_close(found.double(), difference, rtol=1e-3, atol=1e-5)


@given(st.integers(2, 6), st.integers(0, 1000))
@settings(max_examples=25, deadline=None)
def test_the_margin_is_positive_exactly_where_another_class_wins(classes, seed):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(20, classes, generator=generator)
    labels = torch.randint(classes, (20,), generator=generator)
    assert torch.equal(logit_margin(logits, labels) > 0, logits.argmax(1) != labels)
    by_hand = [max(z[c] for c in range(classes) if c != y) - z[y] for z, y in zip(logits, labels, strict=True)]
    torch.testing.assert_close(logit_margin(logits, labels), torch.stack(by_hand))


# Many steps


def test_on_two_classes_no_search_beats_the_single_step():
    model, x = Affine(classes=2), images()
    single = fgsm(model, x, None, [0.05, 0.3])
    reached = model(pgd(model, x, None, [0.05, 0.3]).flatten(0, 1)) - model(single.flatten(0, 1))
    assert (reached[:, 1] - reached[:, 0]).abs().max() < 1e-5
    moving = (model.weight[0] != model.weight[1]).view(3, 2, 2)  # elsewhere the random start stays
    torch.testing.assert_close(pgd(model, x, None, [0.05, 0.3])[..., moving], single[..., moving])


@given(
    eps=st.lists(st.floats(0, 1.0), min_size=1, max_size=3),
    steps=st.integers(1, 5),
    step_size=st.sampled_from([None, 0.01, 1.0]),
    random_start=st.booleans(),
    loss=st.sampled_from(["cross_entropy", "margin"]),
    seed=st.integers(0, 50),
)
@settings(max_examples=40, deadline=None)
def test_attacked_images_stay_in_the_ball_and_are_images(eps, steps, step_size, random_start, loss, seed):
    model, x = convnet(), images(4, (3, 8, 8), seed).round(decimals=1)  # with pixels at 0 and at 1
    options = dict(step_size=step_size, random_start=random_start, loss=loss, seed=seed)
    for attacked in (pgd(model, x, None, eps, steps, **options), fgsm(model, x, None, eps, loss=loss)):
        assert attacked.shape == (len(eps), *x.shape) and attacked.dtype == torch.float32
        assert attacked.min() >= 0 and attacked.max() <= 1
        for e, moved in zip(eps, attacked, strict=True):
            assert (moved - x).abs().max() <= e + 1e-6


def test_a_strength_of_zero_changes_nothing():
    x = images(4, (3, 8, 8))
    for attacked in (fgsm(convnet(), x, None, 0), pgd(convnet(), x, None, 0.0, 3)):
        assert torch.equal(attacked, x)
    both = pgd(convnet(), x, None, [0.0, 0.1], 3)
    assert torch.equal(both[0], x) and not torch.equal(both[1], x)


@pytest.mark.parametrize("attack", [fgsm, pgd])
def test_a_sequence_is_its_single_calls(attack):
    model, x, strengths = Affine(), images(), [0.3, 0.01, 0.1]
    together = attack(model, x, None, strengths)
    for eps, attacked in zip(strengths, together, strict=True):
        assert torch.equal(attacked, attack(model, x, None, eps))
    assert torch.equal(together, attack(model, x, None, torch.tensor(strengths, dtype=torch.float64)))


@pytest.mark.parametrize("attack", [fgsm, pgd])
def test_the_batch_size_does_not_matter(attack):
    model, x = Affine(), images(11)
    expected = attack(model, x, None, [0.05, 0.2], batch_size=250)
    for batch_size in (1, 3, 11, 16):
        assert torch.equal(attack(model, x, None, [0.05, 0.2], batch_size=batch_size), expected)
    assert torch.equal(attack(model, x[:4], None, [0.05, 0.2]), expected[:, :4])


def test_the_seed_draws_the_start():
    model, x = convnet(), images(6, (3, 8, 8))
    first, again, other = (pgd(model, x, None, 0.1, 3, seed=s) for s in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)
    state = torch.get_rng_state()
    pgd(model, x, None, 0.1, 1)
    assert torch.equal(torch.get_rng_state(), state)


def test_the_start_fills_the_ball_evenly():
    class Flat(nn.Module):
        def forward(self, x):
            return torch.stack([0 * x.flatten(1).sum(1), 0 * x.flatten(1).sum(1)], dim=1)

    moved = pgd(Flat(), torch.full((50, 3, 8, 8), 0.5), None, 0.1, 1) - 0.5
    assert moved.mean().abs() < 2e-3 and abs(moved.std().item() - 0.1 / 3**0.5) < 1e-3


def test_a_longer_search_and_restarts_are_never_worse():
    model, x = convnet(), images(40, (3, 8, 8))
    labels = model(x).argmax(1)
    for loss in ("cross_entropy", "margin"):
        runs = [pgd(model, x, labels, 0.02, 2, restarts=r, step_size=0.01, loss=loss) for r in (1, 2, 6)]
        for fewer, more in zip(runs, runs[1:], strict=False):
            before, after = fallen(model, fewer, labels), fallen(model, more, labels)
            assert (before <= after).all()
            assert torch.equal(fewer[before], more[before])
            gain = F.cross_entropy(model(more), labels, reduction="none") - F.cross_entropy(
                model(fewer), labels, reduction="none"
            )
            if loss == "cross_entropy":
                assert (gain[~after] >= -1e-6).all() and gain[~after].max() > 1e-4


def test_the_default_step_settles_where_the_published_one_overshoots():
    class Valley(nn.Module):
        def forward(self, x):
            distance = (x - 0.501).square().flatten(1).sum(1)
            return torch.stack([-distance, 0 * distance], dim=1)

    x, labels = torch.full((5, 3, 4, 4), 0.5), torch.ones(5).long()
    published, settled = (pgd(Valley(), x, labels, 0.003, 40, step_size=a) - 0.501 for a in (0.01, None))
    assert published.abs().min() > 0.0019  # on a face of the ball
    assert settled.abs().max() < 0.0002  # within a step of the worst point
    explicit = pgd(Valley(), x, labels, 0.003, 40, step_size=2.5 * 0.003 / 40)
    torch.testing.assert_close(settled + 0.501, explicit, atol=1e-6, rtol=0)


# The network is borrowed


@pytest.mark.parametrize("fails", [False, True])
def test_the_network_comes_back_as_it_was(fails):
    model = convnet().train()
    model[0].eval()
    model[0].bias.requires_grad_(False)
    statistics = {k: v.clone() for k, v in model.state_dict().items()}
    attack = [fgsm, lambda *a: pgd(*a, 2), lambda m, x, y, e: attack_table(m, x, torch.zeros(4).long(), e, steps=2)]
    for each in attack:
        if fails:
            hook = model[1].register_forward_hook(lambda *_: torch.full((4, 6, 8, 8), torch.nan))
            with pytest.raises(ValueError, match="not finite"):
                each(model, images(4, (3, 8, 8)), None, 0.1)
            hook.remove()
        else:
            each(model, images(4, (3, 8, 8)), None, 0.1)
        assert [m.training for m in model] == [False, True, True, True, True] and model.training
        assert [p.requires_grad for p in model.parameters()] == [True, False, True, True, True, True]
        assert all(p.grad is None for p in model.parameters())
        assert all(torch.equal(v, statistics[k]) for k, v in model.state_dict().items())


def test_surroundings_do_not_matter():
    model, x = convnet(), images(5, (3, 8, 8))
    expected = pgd(model, x, None, 0.05, 4)
    for around in (torch.no_grad(), torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16)):
        with around:
            assert torch.equal(pgd(model, x, None, 0.05, 4), expected)
    with torch.inference_mode():
        made_inside, labels = images(5, (3, 8, 8)), torch.tensor([0, 1, 2, 3, 4])
    truth = labels.tolist()
    for image in (made_inside, (made_inside * 255).to(torch.uint8)):
        for attack in (fgsm, lambda *a: pgd(*a, 2)):
            expected = attack(model, image.clone(), torch.tensor(truth), 0.05)
            assert torch.equal(attack(model, image, labels, 0.05), expected)
            with torch.inference_mode():
                assert torch.equal(attack(model, image, labels, 0.05), expected)
    with torch.inference_mode():
        inside = attack_table(model, made_inside, labels, 0.05, steps=2)
    assert inside.equals(attack_table(model, x, torch.tensor(truth), 0.05, steps=2))
    assert not x.requires_grad and torch.equal(x, images(5, (3, 8, 8)))


def test_recorded_networks_channels_last_and_bytes():
    model, x = build_model("allcnn", 4, 0.05, 8), images(6, (3, 8, 8))
    bytes_ = (x * 255).round().to(torch.uint8)
    expected = pgd(model, bytes_.float() / 255, None, 0.1, 3)
    assert torch.equal(pgd(model, bytes_, None, 0.1, 3), expected)
    with record(model, ["conv3"]) as activations:
        assert torch.equal(pgd(model, bytes_, None, 0.1, 3), expected)
    assert activations["conv3"].shape[0] == 6
    model = model.to(memory_format=torch.channels_last)
    last = pgd(model, (bytes_.float() / 255).contiguous(memory_format=torch.channels_last), None, 0.1, 3)
    # the order of sums differs, and with it the sign of a gradient near 0
    assert ((last - expected).abs() < 1e-6).float().mean() > 0.98


# What is refused


@pytest.mark.parametrize("attack", [fgsm, pgd])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(eps=-0.1), "eps"),
        (dict(eps=[0.1, -1e-9]), "eps"),
        (dict(eps=float("nan")), "eps"),
        (dict(eps=[0.1, float("inf")]), "eps"),
        (dict(eps=[]), "eps"),
        (dict(eps="large"), "eps"),
        (dict(eps=[[0.1]]), "eps"),
        (dict(images=images() - 0.5), "preprocess="),
        (dict(images=images() * 255), "divide by 255"),
        (dict(images=images() * torch.nan), "NaN"),
        (dict(images=images().long()), "int64"),
        (dict(images=images()[:0]), "at least 1"),
        (dict(labels=torch.tensor([0, 1, 2, 3, 0, 0, 0])), r"0 to 3.*0\.\.2"),
        (dict(labels=torch.tensor([0, 1, 2, -1, 0, 0, 0])), "-1 to 2"),
        (dict(labels=torch.zeros(6).long()), r"expected \(7,\)"),
        (dict(labels=torch.zeros(7)), "whole numbers"),
        (dict(loss="hinge"), "cross_entropy, margin"),
        (dict(model=Scaled(Affine(), torch.nan)), "not finite"),
        (dict(model=nn.Flatten(0)), "logits"),
        (dict(model=Affine(classes=1)), "two classes"),
    ],
)
def test_mistakes_are_named(attack, change, message):
    call = dict(model=Affine(), images=images(), labels=None, eps=0.1) | change
    with pytest.raises(ValueError, match=message):
        attack(**call)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(steps=0), "steps=0"),
        (dict(steps=2.5), "steps=2.5"),
        (dict(restarts=0), "restarts=0"),
        (dict(restarts=2, random_start=False), "random_start"),
        (dict(step_size=0.0), "step_size"),
        (dict(step_size=float("nan")), "step_size"),
        (dict(batch_size=0), "batch_size"),
    ],
)
def test_mistakes_of_the_search_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        pgd(Affine(), images(), None, 0.1, **change)


ATTACKS = {
    "gradient": lambda m, x, **o: input_gradient(m, x, **o),
    "fgsm": lambda m, x, **o: fgsm(m, x, None, 0.05, **o),
    "pgd": lambda m, x, **o: pgd(m, x, None, [0.01, 0.05], 2, **o),
    "table": lambda m, x, **o: attack_table(m, x, torch.zeros(len(x)).long(), 0.05, steps=2, **o),
}


@pytest.mark.parametrize("attack", ATTACKS)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: x * 255, "divide by 255"),
        (lambda x: (x - 0.45) / 0.25, "preprocess="),
        (lambda x: x.mul(255).long(), "torch.int64"),
        (lambda x: x.masked_fill(x == x[2].max(), torch.nan), "image 2 holds NaN"),
        (lambda x: x[:0], "at least 1"),
    ],
)
def test_every_attack_refuses_what_are_no_pixels(attack, change, message):
    with pytest.raises(ValueError, match=message):
        ATTACKS[attack](convnet(), change(images(4, (3, 8, 8))))


@pytest.mark.parametrize("attack", ATTACKS)
def test_networks_and_preprocessing_that_overwrite_their_input(attack):
    """The images stay, and the result is that of the same network written without overwriting."""

    class Overwriting(nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model = model

        def forward(self, x):
            x -= 0.45
            x /= 0.25
            return self.model(x)

    class Normalised(Overwriting):
        def forward(self, x):
            return self.model((x - 0.45) / 0.25)

    def normalise(x):
        return x.sub_(0.45).div_(0.25)

    model, x = convnet(), images(4, (3, 8, 8))
    before = x.clone()
    expected = ATTACKS[attack](Normalised(model), x)
    for found in (ATTACKS[attack](Overwriting(model), x), ATTACKS[attack](model, x, preprocess=normalise)):
        assert expected.equals(found) if attack == "table" else torch.equal(expected, found)
    assert torch.equal(x, before)


@pytest.mark.parametrize("eps", [8, [0.1, 8], 1.001])
def test_strengths_in_grey_levels_are_refused(eps):
    for attack in (fgsm, pgd, attack_table):
        with pytest.raises(ValueError, match="eps=.*divide grey levels by 255"):
            attack(convnet(), images(4, (3, 8, 8)), torch.zeros(4).long(), eps)
    with pytest.raises(ValueError, match="step_size=2.*divide grey levels by 255"):
        pgd(convnet(), images(4, (3, 8, 8)), None, 0.1, step_size=2)


def test_arrays_lists_of_labels_and_half_precision():
    model, x, y = convnet(), images(4, (3, 8, 8)), torch.tensor([0, 1, 2, 0])
    assert torch.equal(fgsm(model, x.numpy(), y.tolist(), 0.1), fgsm(model, x, y, 0.1))
    assert torch.equal(pgd(model, x.numpy(), y.numpy(), 0.1, 2), pgd(model, x, y, 0.1, 2))
    moved = fgsm(convnet().bfloat16(), x, y, 0.1)
    assert moved.dtype == torch.float32 and 0 < (moved - x).abs().max() <= 0.1 + 1e-6


def test_answers_that_are_no_logits_are_named():
    class Pair(Affine):
        def forward(self, x):
            return super().forward(x), x

    with pytest.raises(ValueError, match="model gives a tuple"):
        fgsm(Pair(), images(), None, 0.1)
    with pytest.raises(ValueError, match="labels: expected the true class"):
        attack_table(Affine(), images(), None, 0.1)
    with pytest.raises(ValueError, match="labels: shape"):
        logit_margin(torch.zeros(3, 2), torch.zeros(2).long())


def test_a_network_that_detaches_its_images_is_no_robust_network():
    class Detached(Affine):
        def forward(self, x):
            return super().forward(x.detach())

    for attack in (fgsm, pgd):
        with pytest.raises(ValueError, match="do not depend on the images"):
            attack(Detached(), images(), None, 0.1)


def test_an_infinite_gradient_is_refused():
    class Cusp(Affine):
        def forward(self, x):
            return super().forward(x) + (x - x.detach()).abs().sqrt().sum((1, 2, 3))[:, None] * self.weight[:, 0]

    with pytest.raises(ValueError, match="gradient"):
        fgsm(Cusp(), images(), None, 0.1)


# Another implementation


@pytest.fixture
def foolbox():
    return pytest.importorskip("foolbox", reason="foolbox is not installed: pip install foolbox")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_agrees_with_foolbox(foolbox):
    model, x = convnet(), images(24, (3, 8, 8))
    labels = torch.randint(5, (24,), generator=torch.Generator().manual_seed(3))
    wrapped = foolbox.PyTorchModel(model, bounds=(0, 1), device="cpu")
    strengths = [0.003, 0.03, 0.3]
    _, theirs, _ = foolbox.attacks.LinfFastGradientAttack()(wrapped, x, labels, epsilons=strengths)
    torch.testing.assert_close(fgsm(model, x, labels, strengths), torch.stack(theirs), atol=1e-6, rtol=0)
    descent = foolbox.attacks.LinfProjectedGradientDescentAttack(abs_stepsize=0.01, steps=40, random_start=False)
    _, theirs, _ = descent(wrapped, x, labels, epsilons=strengths)
    for eps, expected in zip(strengths, theirs, strict=True):
        ours = pgd(model, x, labels, eps, 40, step_size=0.01, random_start=False)
        torch.testing.assert_close(ours, expected, atol=1e-6, rtol=0)


# Tables, and signs of masking


def classified(n=60, seed=0):
    """A network that is right about most of its images, and their labels."""
    model, x = convnet(), images(n, (3, 8, 8), seed)
    model[4].weight.data *= 10
    labels = model(x).argmax(1)
    labels[: n // 10] = (labels[: n // 10] + 1) % 5
    return model, x, labels


def test_the_table_is_the_attacks_counted():
    (model, x, labels), other = classified(), convnet(1)
    kinds = dict(losses=["cross_entropy", "margin"], label_kinds=["truth", "predictions"])
    table = attack_table(model, x, labels, [0.05, 0.01], victims={"other": other}, steps=4, restarts=2, seed=5, **kinds)
    assert len(table) == 2 * 2 * 2 * 2 * 3
    wanted = {"victim", "attack", "loss", "label_kind", "eps", "accuracy", "fooled", "n_images", "steps", "restarts"}
    assert set(table) == wanted and set(table.n_images) == {60}
    for row in table.itertuples():
        target = labels if row.label_kind == "truth" else None
        assert (row.steps, row.restarts) == ((1, 1) if row.attack == "fgsm" else (4, 2))
        search = {} if row.attack == "fgsm" else dict(steps=4, restarts=2, seed=5)
        attacked = {"fgsm": fgsm, "pgd": pgd}[row.attack](model, x, target, row.eps, loss=row.loss, **search)
        victim = model if row.victim == "self" else other
        answers = victim(attacked).argmax(1)
        # a sequence and its single calls meet in other batches: at most an image on the boundary
        assert abs(row.accuracy - (answers == labels).double().mean().item()) <= 1 / 60 + 1e-9
        assert abs(row.fooled - (answers != victim(x).argmax(1)).double().mean().item()) <= 1 / 60 + 1e-9
        if row.eps == 0:
            assert row.fooled == 0 and row.accuracy == (victim(x).argmax(1) == labels).double().mean().item()


def test_attacked_images_are_made_once_for_all_victims():
    model, x, labels = classified()
    gradients = []
    model[0].register_full_backward_hook(lambda *_: gradients.append(1))
    attack_table(model, x, labels, 0.05, steps=3, victims={str(i): convnet(i) for i in range(4)})
    assert len(gradients) == 1 + 3


def test_the_strength_zero_is_in_the_table_once():
    model, x, labels = classified(20)
    for eps in (0, [0.0, 0.1], 0.1):
        table = attack_table(model, x, labels, eps, steps=1)
        assert (table.eps == 0).sum() == 2 and not table.duplicated().any()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(attacks=["fgsm", "cw"]), "attacks"),
        (dict(attacks="fgsm"), "attacks"),
        (dict(label_kinds=["guesses"]), "label_kinds"),
        (dict(losses=["hinge"]), "hinge"),
        (dict(victims={"self": convnet()}), "self"),
        (dict(labels=torch.full((20,), 5)), "5 to 5"),
        (dict(eps=-1), "eps"),
    ],
)
def test_mistakes_of_the_table_are_named(change, message):
    model, x, labels = classified(20)
    with pytest.raises(ValueError, match=message):
        attack_table(**(dict(model=model, images=x, labels=labels, eps=0.1) | change))


def test_where_the_cross_entropy_is_blind_the_margin_is_not():
    model, x, _ = classified()
    masked, eps = Scaled(model, 1e4), 0.05
    assert (input_gradient(masked, x).flatten(1) == 0).all(1).float().mean() > 0.9
    assert (input_gradient(masked, x, loss="margin").flatten(1) != 0).any(1).all()
    labels = model(x).argmax(1)
    blind, seeing, plain = (
        fallen(model, pgd(m, x, None, eps, 20, loss=loss), labels).float().mean().item()
        for m, loss in ((masked, "cross_entropy"), (masked, "margin"), (model, "margin"))
    )
    assert blind < 0.1 and seeing > 0.9
    assert abs(seeing - plain) < 0.05
    assert torch.equal(fgsm(masked, x, None, eps, loss="margin"), fgsm(model, x, None, eps, loss="margin"))


def reports(model, twin, x, labels):
    strengths = [0.02, 0.3]
    published = attack_table(model, x, labels, strengths, steps=5)
    hard = attack_table(
        model, x, labels, strengths, attacks=["pgd"], losses=["cross_entropy", "margin"], steps=10, restarts=2
    )
    outside = attack_table(twin, x, labels, strengths, steps=5, victims={"model": model})
    outside = outside[outside.victim == "model"]
    together = pd.concat([published, hard])
    return [masking_report(*tables).set_index("sign") for tables in ((published, outside), (together, outside))]


def test_the_report_catches_the_masked_network_and_spares_the_plain_one():
    model, x, labels = classified(200)
    twin, _, _ = classified()
    with torch.no_grad():
        twin[4].weight += 0.2 * twin[4].weight.std() * images(1, twin[4].weight.shape)[0]
    published, together = reports(model, twin, x, labels)
    assert not published.suspicious.any() and not together.suspicious.any() and together.tested.all()
    published, together = reports(Scaled(model, 1e4), twin, x, labels)
    suspected = set(published.index[published.suspicious])
    assert suspected == {"transfer beats the white box", "a huge strength leaves some"}
    assert "the margin beats the cross entropy" in set(together.index[together.suspicious])


def row(attack="pgd", eps=0.1, accuracy=0.5, fooled=0.4, **changes):
    base = dict(victim="self", attack=attack, loss="cross_entropy", label_kind="truth", eps=eps, accuracy=accuracy)
    return base | dict(fooled=fooled, n_images=100, steps=40 if attack == "pgd" else 1, restarts=1) | changes


@pytest.mark.parametrize(
    ("rows", "sign", "observed", "eps"),
    [
        ([row("fgsm", accuracy=0.3), row(accuracy=0.5)], "one step beats many", 0.2, 0.1),
        ([row("fgsm", 0.2, 0.1), row(accuracy=0.5)], "one step beats many", None, None),
        ([row(accuracy=0.5), row(loss="margin", accuracy=0.1)], "the margin beats the cross entropy", 0.4, 0.1),
        ([row(accuracy=0.5), row(restarts=5, accuracy=0.25)], "more steps or restarts beat fewer", 0.25, 0.1),
        ([row(accuracy=0.5), row(steps=400, accuracy=0.6)], "more steps or restarts beat fewer", -0.1, 0.1),
        ([row(eps=0.5, accuracy=0.2), row(eps=0.3, accuracy=0.4)], "a huge strength leaves some", 0.2, 0.5),
        (
            [row(eps=0.5, accuracy=0.2, fooled=0.9, label_kind="predictions")],
            "a huge strength leaves some",
            0.1,
            0.5,
        ),
        ([row(eps=0.2, accuracy=0.2)], "a huge strength leaves some", None, None),
        ([row(eps=0.0, accuracy=0.9), row("fgsm", 0.0, 0.1)], "one step beats many", None, None),
        ([row(victim="other", eps=0.5, accuracy=0.9)], "a huge strength leaves some", None, None),
    ],
)
def test_a_sign_is_read_off_the_table(rows, sign, observed, eps):
    found = masking_report(pd.DataFrame(rows)).set_index("sign").loc[sign]
    assert found.tested == (observed is not None)
    assert found.suspicious == (observed is not None and observed > 0.05)
    if observed is not None:
        assert found.observed == pytest.approx(observed) and found.eps == eps


def test_transfer_is_held_against_the_strongest_own_attack():
    own = pd.DataFrame([row(accuracy=0.6), row("fgsm", accuracy=0.5)])
    outside = pd.DataFrame([row(victim="us", accuracy=0.42), row(victim="us", loss="margin", accuracy=0.7)])
    sign = "transfer beats the white box"
    found = masking_report(own, outside).set_index("sign").loc[sign]
    assert found.observed == pytest.approx(0.08) and found.suspicious
    assert not masking_report(own, outside, tolerance=0.1).set_index("sign").loc[sign].suspicious
    assert not masking_report(own).set_index("sign").loc[sign].tested
