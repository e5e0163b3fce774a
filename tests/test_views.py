"Drawings and photographs under random transformations."

import math

import pytest
import torch
import torchvision.transforms.functional as TF
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import forward_ad as fwAD
from torch.autograd import gradcheck
from torchvision.transforms import InterpolationMode

from dainv.colour import COLOURS, colour_bounds, distort_colours
from dainv.data import ImageData, Split
from dainv.spirograph import BOUNDS, NUISANCES, TARGETS, parameter_bounds, spirograph_task
from dainv.views import ColourViews, SpirographViews, ViewDraws


def half(n, size, seed):
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (n, 3, size, size), dtype=torch.uint8, generator=generator)
    return Split(images, torch.arange(n) % 3)


def data(size=32, name="folder", n=60):
    return ImageData(half(n, size, 0), half(30, size, 1), ["a", "b", "c"], name, "Noise", "0123")


def drawings(**options):
    return SpirographViews(spirograph_task(60, 30, size=16, bounds=parameter_bounds(b=(0.5, 1.1))), **options)


BOTH = pytest.mark.parametrize("views", [drawings(), ColourViews(data())], ids=["drawings", "photographs"])
IDS = torch.tensor([3, 14, 15, 9, 26, 5])


def flat(draws):
    "All that was drawn, as one matrix."
    parts = [draws.alpha, *(() if draws.base is None else draws.base)]
    return torch.cat([part.reshape(len(part), -1).double() for part in parts if part is not None], 1)


@BOTH
def test_what_both_kinds_of_views_offer(views):
    assert (
        len(views.names) == len(views.mean) == len(views.variance) == views.draw("train", IDS, 0, 0, 0).alpha.shape[1]
    )
    assert (views.count("train"), views.count("test")) == (60, 30)
    assert len(views.targets("train")) == 60 and views.title and views.name and views.fingerprint
    images = views.images("test", IDS, views.draw("test", IDS, 0, 0, 0))
    assert images.shape == (6, 3, views.size, views.size) and images.dtype == torch.float32 and images.isfinite().all()
    assert torch.equal(images, views.to("cpu").images("test", IDS, views.to("cpu").draw("test", IDS, 0, 0, 0)))
    assert views.draw("test", IDS[:0], 0, 0, 0).alpha.shape[0] == 0
    for call in (views.count, views.targets, lambda h: views.draw(h, IDS, 0, 0, 0)):
        with pytest.raises(ValueError, match="half='valid'"):
            call("valid")


def test_targets():
    photographs, curves = ColourViews(data()), drawings()
    assert photographs.task == "classification" and photographs.target_names == ("a", "b", "c")
    assert torch.equal(photographs.targets("test"), torch.arange(30) % 3)
    assert curves.task == "regression" and curves.target_names == TARGETS
    assert torch.equal(curves.targets("train"), curves.source.train)


@BOTH
@settings(max_examples=20, deadline=None)
@given(
    name=st.tuples(st.sampled_from(["train", "test"]), st.integers(0, 29), *[st.integers(0, 50)] * 3),
    others=st.lists(st.integers(0, 29), min_size=1, max_size=5),
)
def test_a_view_is_a_function_of_its_name(views, name, others):
    part, item, passes, view, seed = name
    alone = flat(views.draw(part, torch.tensor([item]), passes, view, seed))
    ids = torch.tensor([*others, item])
    company = [torch.tensor([*range(len(others)), number]) for number in (passes, view)]
    assert torch.equal(flat(views.draw(part, ids, *company, seed))[-1:], alone)
    for other in [("test" if part == "train" else "train", item, passes, view, seed)] + [
        (part, *(n + (k == place) for place, n in enumerate(name[1:]))) for k in range(4)
    ]:
        assert not (
            views.draw(other[0], torch.tensor([other[1]]), *other[2:]).alpha == alone[:, : len(views.names)]
        ).any()


@BOTH
def test_the_law_of_alpha_is_uniform_within_its_bounds(views):
    n = 20_000
    alpha = views.draw("train", torch.arange(n) % 60, torch.arange(n) // 60, 1, seed=3).alpha.double()
    low, high = torch.tensor([views.bounds[name] for name in views.names], dtype=torch.float64).unbind(1)
    assert (alpha >= low - 1e-6).all() and (alpha <= high + 1e-6).all()
    torch.testing.assert_close(views.mean.double(), (low + high) / 2, check_dtype=False)
    torch.testing.assert_close(views.variance.double(), (high - low) ** 2 / 12, check_dtype=False)
    assert ((alpha.mean(0) - views.mean).abs() < 4 * (views.variance / n).sqrt()).all()
    torch.testing.assert_close(alpha.var(0), views.variance.double(), rtol=0.03, atol=0)
    correlation = torch.corrcoef(alpha.T) - torch.eye(alpha.shape[1], dtype=torch.float64)
    assert correlation.abs().max() < 4 / n**0.5


def test_a_drawing_is_the_task_with_the_nuisances_drawn():
    views = drawings()
    draws = views.draw("test", IDS, 0, 1, seed=2)
    expected = views.source.images(views.source.test[IDS], draws.alpha)
    assert torch.equal(views.images("test", IDS, draws), expected) and draws.base is None
    with pytest.raises(ValueError, match="no untransformed image"):
        views.images("test", IDS, None)


def test_restricted_drawings():
    views = drawings()
    full = views.draw("train", IDS, 0, 0, 0).alpha
    for only, free in (("all", NUISANCES), ("h", ("h",)), ("colours", NUISANCES[1:]), ("fixed", ())):
        alpha = views.restricted(only).draw("train", IDS, 0, 0, 0).alpha
        for k, name in enumerate(NUISANCES):
            expected = full[:, k] if name in free else views.mean[k].expand(6)
            torch.testing.assert_close(alpha[:, k], expected, msg=f"{only} {name}")
        assert [v > 0 for v in views.restricted(only).variance.tolist()] == [name in free for name in NUISANCES]
    with pytest.raises(ValueError, match="only='hue' is unknown; known: all, h, colours, fixed"):
        views.restricted("hue")


@pytest.mark.parametrize(
    ("group", "kind", "amount", "moved"),
    [
        ("h", "mean", -0.3, dict(h=(0.2, 2.2))),
        ("h", "spread", 0.5, dict(h=(0.0, 3.0))),
        ("h", "spread", -0.5, dict(h=(1.0, 2.0))),
        ("background", "mean", 0.4, dict.fromkeys(("rback", "gback", "bback"), (0.4, 1.0))),
        ("background", "spread", 0.1, dict.fromkeys(("rback", "gback", "bback"), (-0.1, 0.7))),
        (
            "all",
            "strength",
            0.5,
            dict(
                h=(1.0, 2.0),
                rback=(0.15, 0.45),
                gback=(0.15, 0.45),
                bback=(0.15, 0.45),
                gfore=(0.55, 0.85),
                bfore=(0.55, 0.85),
            ),
        ),
        ("all", "strength", 1.0, {}),
    ],
)
def test_shifted_drawings(group, kind, amount, moved):
    views = drawings()
    bounds = views.shifted(group, kind, amount).bounds
    for name in NUISANCES:
        assert bounds[name] == pytest.approx(moved.get(name, BOUNDS[name])), name
    assert views.bounds == {name: BOUNDS[name] for name in NUISANCES}


@pytest.mark.parametrize(
    ("shift", "message"),
    [
        (("hue", "mean", 0.1), "group='hue' is unknown; known: h, background, colours, all"),
        (("h", "median", 0.1), "kind='median' is unknown; known: mean, spread, strength"),
        (("h", "spread", -1.1), "no interval of h"),
        (("h", "strength", -1), "no interval of h"),
        (("background", "mean", math.nan), "no interval of rback"),
        (("all", "mean", math.inf), "no interval of h"),
    ],
)
def test_impossible_shifts_of_drawings(shift, message):
    with pytest.raises(ValueError, match=message):
        drawings().shifted(*shift)


def test_no_strength_means_every_nuisance_at_its_mean():
    still = drawings().shifted("all", "strength", 0.0)
    alpha = still.draw("train", IDS, 0, 0, 0).alpha
    torch.testing.assert_close(alpha, drawings().mean.expand(6, -1))


@BOTH
def test_derivatives_by_alpha(views):
    draws = views.draw("train", IDS, 0, 0, seed=1)
    alpha, direction = draws.alpha.requires_grad_(), torch.randn_like(draws.alpha)

    def loss(alpha):
        return views.images("train", IDS, ViewDraws(alpha, draws.base)).square().sum()

    (slope,) = torch.autograd.grad(loss(alpha), alpha, create_graph=True)
    (second,) = torch.autograd.grad((slope * direction).sum(), alpha)
    assert slope.isfinite().all() and second.isfinite().all() and second.any()
    with fwAD.dual_level():
        tangent = fwAD.unpack_dual(loss(fwAD.make_dual(alpha.detach(), direction))).tangent
    torch.testing.assert_close(tangent, (slope * direction).sum().detach(), rtol=1e-3, atol=1e-3)


def test_gradcheck_through_crop_distortion_and_grey():
    split = half(4, 8, 0)
    split = Split((split.images // 4 + 96).to(torch.uint8), split.labels)  # nothing is clamped
    views = ColourViews(ImageData(split, split, ["a", "b", "c"], "folder", "Noise", ""), strength=0.25, probability=0.7)
    ids = torch.arange(4).repeat(3)
    draws = views.draw("train", ids, torch.arange(12) // 4, 0, seed=0)
    assert draws.base.jitter.any() and not draws.base.jitter.all() and draws.base.grey.any()
    weights = torch.randn(12, 3, 8, 8, dtype=torch.float64)

    def summed(alpha):
        return (views.images("train", ids, ViewDraws(alpha, draws.base)) * weights).sum((1, 2, 3))

    alpha = draws.alpha.double().requires_grad_()
    assert gradcheck(summed, alpha, atol=1e-4, check_forward_ad=True)
    (slope,) = torch.autograd.grad(summed(alpha).sum(), alpha)
    assert torch.equal(slope.abs().sum(1) > 0, draws.base.jitter)


def photograph_by_torchvision(image, alpha, box, flip, jitter, grey, mean, std):
    "One view, step by step, from PIL's crop on."
    x = TF.resized_crop(TF.to_pil_image(image), *box.tolist(), list(image.shape[1:]), InterpolationMode.LANCZOS)
    x = TF.to_tensor(TF.hflip(x) if flip else x)
    if jitter:
        x = TF.adjust_brightness(x, alpha[0].item())
        x = TF.adjust_contrast(x, alpha[1].item())
        x = TF.adjust_saturation(x, alpha[2].item())
        x = distort_colours(x[None], torch.tensor([[1, 1, 1, alpha[3]]]))[0]
    if grey:
        x = (x * torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1)).sum(0).expand(3, -1, -1)
    return TF.normalize(x, mean, std)


@pytest.mark.parametrize("name", ["cifar10", "cifar100", "folder"])
def test_a_view_of_a_photograph_is_that_of_the_definition(name):
    source = data(name=name)
    published = dict(
        cifar10=((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)),
        cifar100=((0.5071, 0.4865, 0.4409), (0.2009, 0.1984, 0.2023)),
    )
    pixels = source.train.images.double() / 255
    mean, std = published.get(name, (pixels.mean((0, 2, 3)).tolist(), pixels.std((0, 2, 3), correction=0).tolist()))
    views, ids = ColourViews(source), torch.arange(30)
    draws = views.draw("test", ids, 0, 0, seed=0)
    rows = zip(source.test.images, draws.alpha, *draws.base, strict=True)
    expected = torch.stack([photograph_by_torchvision(*row, mean, std) for row in rows])
    # two levels of a byte, times the strongest brightness, contrast and saturation, in units of the deviation
    assert (views.images("test", ids, draws) - expected).abs().max() < 2 * 1.4**3 / 255 / min(std)
    plain = torch.stack([TF.normalize(x.float() / 255, mean, std) for x in source.test.images])
    torch.testing.assert_close(views.images("test", ids, None), plain)


def test_how_often_photographs_are_mirrored_distorted_and_grey():
    n = 20_000
    for options, expected in (
        (dict(), (0.5, 0.8, 0.2)),
        (dict(probability=0.3, grey=0.9), (0.5, 0.3, 0.9)),
        (dict(probability=1, grey=0), (0.5, 1, 0)),
    ):
        views = ColourViews(data(), **options)
        base = views.draw("train", torch.arange(n) % 60, torch.arange(n) // 60, 0, seed=0).base
        masks = torch.stack([base.flip, base.jitter, base.grey]).double()
        torch.testing.assert_close(masks.mean(1), torch.tensor(expected).double(), rtol=0, atol=4 * 0.5 / n**0.5)
        assert torch.corrcoef(masks).nan_to_num().triu(1).abs().max() < 4 / n**0.5


def test_restricted_photographs():
    views = ColourViews(data())
    draws = views.draw("train", IDS, 2, 1, seed=0)
    colours = views.restricted("differentiable")
    only = colours.draw("train", IDS, 2, 1, seed=0)
    assert only.base.boxes is None and only.base.flip is None
    assert torch.equal(only.alpha, draws.alpha) and torch.equal(only.base.grey, draws.base.grey)
    x = data().train.images[IDS].float() / 255
    x = torch.where(only.base.jitter[:, None, None, None], distort_colours(x, only.alpha), x)
    shown = colours.images("train", IDS, only)[~only.base.grey]
    torch.testing.assert_close(shown, ((x - views.channel_mean) / views.channel_std)[~only.base.grey])
    none = views.restricted("none")
    nothing = none.draw("train", IDS, 0, 0, 0)
    assert torch.equal(none.images("train", IDS, nothing), views.images("train", IDS, None))
    assert not none.variance.any() and torch.equal(nothing.alpha, torch.tensor([1.0, 1, 1, 0]).repeat(6, 1))
    assert torch.equal(flat(views.restricted("all").draw("train", IDS, 2, 1, 0)), flat(draws))
    with pytest.raises(ValueError, match="only='h' is unknown; known: all, differentiable, none"):
        views.restricted("h")


def test_shifted_photographs():
    views = ColourViews(data())
    for strength in (0.0, 0.2, 1.0):
        shifted = views.shifted("colour", "strength", strength)
        draws = shifted.draw("test", IDS, 0, 0, 0)
        assert shifted.bounds == colour_bounds(strength) and draws.base.boxes is None
        assert draws.base.jitter.all() and not draws.base.grey.any()
        x = distort_colours(data().test.images[IDS].float() / 255, draws.alpha)
        torch.testing.assert_close(shifted.images("test", IDS, draws), (x - views.channel_mean) / views.channel_std)
    for amount, factor, turn in (
        (0.5, (1.0, 1.8), (0.15, 0.35)),
        (-1.0, (0.0, 0.6), (-0.6, -0.4)),
        (0.0, (0.6, 1.4), (-0.1, 0.1)),
    ):
        bounds = views.shifted("colour", "mean", amount).bounds
        for name in COLOURS:
            assert bounds[name] == pytest.approx(turn if name == "hue" else factor)
    centres = views.shifted("colour", "mean", 0.25).mean
    torch.testing.assert_close(centres, torch.tensor([1.2, 1.2, 1.2, 0.125]))


@pytest.mark.parametrize(
    ("shift", "message"),
    [
        (("h", "mean", 0.1), "group='h' is unknown; known: colour"),
        (("colour", "spread", 0.1), "kind='spread' is unknown; known: strength, mean"),
        (("colour", "strength", -0.1), "strength=-0.1"),
        (("colour", "strength", math.nan), "strength=nan"),
        (("colour", "mean", -2.0), "no interval of brightness"),
        (("colour", "mean", math.inf), "no interval of"),
    ],
)
def test_impossible_shifts_of_photographs(shift, message):
    with pytest.raises(ValueError, match=message):
        ColourViews(data()).shifted(*shift)


@pytest.mark.parametrize(
    ("options", "message"),
    [(dict(grey=-0.1), "grey=-0.1"), (dict(probability=1.5), "probability=1.5"), (dict(strength=-1), "strength=-1")],
)
def test_impossible_options(options, message):
    with pytest.raises(ValueError, match=message):
        ColourViews(data(), **options)


def test_images_that_are_not_square_and_a_missing_base_are_refused():
    tall = Split(torch.zeros(2, 3, 8, 6, dtype=torch.uint8), torch.zeros(2, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"images of \(8, 6\) pixels"):
        ColourViews(ImageData(tall, tall, ["a", "b"], "folder", "", ""))
    views = ColourViews(data())
    with pytest.raises(ValueError, match="drawn.base is missing"):
        views.images("train", IDS, ViewDraws(views.draw("train", IDS, 0, 0, 0).alpha))


def test_images_stay_bytes_until_they_are_used_and_a_constant_channel_is_only_centred():
    source = data()
    source.train.images[:, 1] = 51
    views = ColourViews(source)
    assert views.data.train.images.dtype == torch.uint8
    plain = views.images("train", torch.arange(60), None)
    assert not plain[:, 1].any() and plain[:, 0].std(correction=0).item() == pytest.approx(1, abs=1e-5)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@BOTH
def test_views_on_a_gpu_are_those_on_the_cpu(views):
    there = views.to("cuda")
    draws, here = there.draw("train", IDS, 0, IDS, 0), views.draw("train", IDS, 0, IDS, 0)
    torch.testing.assert_close(flat(draws).cpu(), flat(here), rtol=0, atol=1e-6)
    images = there.images("train", IDS, draws)
    assert images.is_cuda and (images.cpu() - views.images("train", IDS, here)).abs().max() < 1e-3
