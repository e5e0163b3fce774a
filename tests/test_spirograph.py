"""The Spirograph renderer against its literal formula, and the ten-class data set drawn with it."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dainv.spirograph import (
    BOUNDS,
    draw_parameters,
    draw_spirograph,
    parameter_bounds,
    render_curves,
    spirograph_classes,
    trace_pen,
)

PIXELS = 16


def literal(params, normalise, size):
    "One exponential for each image, pixel and point of the curve, as the equations read."
    m, b, h, sigma = (params[name] for name in ("m", "b", "h", "sigma"))
    images = torch.empty(len(m), 3, size, size, dtype=torch.float64)
    grid = torch.linspace(-6, 6, size, dtype=torch.float64)
    for i in range(len(m)):
        ink = torch.zeros(size, size, dtype=torch.float64)
        for step in range(40):
            t = 2 * math.pi * step / 39
            x = (m[i] - h[i]) * math.cos(t) + h[i] * math.cos(t * (m[i] - h[i]) / b[i])
            y = (m[i] - h[i]) * math.sin(t) - h[i] * math.sin(t * (m[i] - h[i]) / b[i])
            ink += torch.exp(-((grid[:, None] - x) ** 2 + (grid[None, :] - y) ** 2) / sigma[i]) / 40
        for row in ink if normalise == "row" else [ink]:
            row /= row.max() + 1e-8
        for channel, letter in enumerate("rgb"):
            fore, back = params[letter + "fore"][i], params[letter + "back"][i]
            images[i, channel] = ink * fore + (1 - ink) * back
    return images


@st.composite
def parameters(draw):
    n = draw(st.integers(1, 3))
    values = {name: [draw(st.floats(low, high)) for _ in range(n)] for name, (low, high) in BOUNDS.items()}
    return {name: torch.tensor(v, dtype=torch.float64) for name, v in values.items()}


@settings(max_examples=25, deadline=None)
@given(params=parameters(), normalise=st.sampled_from(["image", "row"]), size=st.integers(2, 33))
def test_renderer_is_the_literal_formula(params, normalise, size):
    expected = literal(params, normalise, size)
    torch.testing.assert_close(draw_spirograph(params, normalise, size), expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("normalise", ["image", "row"])
def test_single_precision_stays_within_1e_4(normalise):
    params = draw_parameters(30, seed=5)
    params["b"] = params["b"].clamp(min=0.3)  # smaller wheels turn so fast that the angle itself loses digits
    exact = literal({name: values.double() for name, values in params.items()}, normalise, PIXELS)
    images = draw_spirograph(params, normalise, PIXELS)
    assert images.dtype == torch.float32 and images.shape == (30, 3, PIXELS, PIXELS)
    assert (images - exact).abs().max() < 1e-4


def test_image_and_row_normalisation_differ_where_the_pen_never_comes():
    params = draw_parameters(20, seed=1)
    ink = {}
    for normalise in ("image", "row"):
        black_on_white = {
            name: torch.full((20,), float("back" in name)) for name in BOUNDS if name[1:] in ("fore", "back")
        }
        ink[normalise] = 1 - draw_spirograph({**params, **black_on_white}, normalise)[:, 0]
    assert torch.allclose(ink["image"].amax((1, 2)), torch.ones(20), atol=1e-5)
    assert (ink["image"].amax(2).amin(1) < 0.2).all(), "by image, some row of each drawing stays empty"
    inked = ink["row"].amax(2)
    assert ((inked - 1).abs() < 1e-3).float().mean() > 0.8, "by row, nearly every row reaches full strength"


@settings(max_examples=50, deadline=None)
@given(params=parameters())
def test_pen_stays_within_its_reach(params):
    m, h = params["m"], params["h"]
    t = torch.linspace(0, 2 * math.pi, 500, dtype=torch.float64)
    reach = trace_pen(m, params["b"], h, t).norm(dim=-1).amax(1)
    assert (reach <= torch.where(h <= m, m, 2 * h - m) + 1e-9).all()
    assert (reach < 6).all()


def test_gradient_of_every_parameter_matches_finite_differences():
    params = {name: values.double() for name, values in draw_parameters(3, seed=4).items()}
    params["b"] = params["b"].clamp(min=0.5)

    def draw(*values):
        return draw_spirograph(dict(zip(BOUNDS, values, strict=True)), size=8)

    leaves = [params[name].requires_grad_() for name in BOUNDS]
    assert torch.autograd.gradcheck(draw, leaves, eps=1e-6, atol=1e-5)


def test_parameters_are_uniform_within_their_bounds_and_seeded():
    params = draw_parameters(20_000, seed=0)
    assert list(params) == list(BOUNDS)
    for name, (low, high) in BOUNDS.items():
        values = params[name]
        assert values.min() >= low and values.max() <= high
        assert abs(values.mean() - (low + high) / 2) < 0.02 * (high - low)
        assert abs(values.var() * 12 / (high - low) ** 2 - 1) < 0.05
    correlation = torch.corrcoef(torch.stack(list(params.values()))) - torch.eye(10)
    assert correlation.abs().max() < 0.04
    assert torch.equal(draw_parameters(7, seed=0)["h"], params["h"][:7])
    assert not torch.equal(draw_parameters(7, seed=1)["h"], params["h"][:7])


def test_errors_name_what_is_wrong():
    params = draw_parameters(4)
    with pytest.raises(ValueError, match=r"missing: \['h'\]"):
        draw_spirograph({name: values for name, values in params.items() if name != "h"})
    with pytest.raises(ValueError, match=r"unknown: \['radius'\]"):
        draw_spirograph({**params, "radius": params["m"]})
    with pytest.raises(ValueError, match=r"same length.*'sigma': 3"):
        draw_spirograph({**params, "sigma": params["sigma"][:3]})
    with pytest.raises(ValueError, match=r"params\['m'\] must be a float tensor"):
        draw_spirograph({**params, "m": torch.full((4,), 3)})
    with pytest.raises(ValueError, match=r"params\['b'\].*\(N,\)"):
        draw_spirograph({**params, "b": params["b"][:, None]})
    with pytest.raises(ValueError, match='"image" or "row".*column'):
        draw_spirograph(params, normalise="column")
    with pytest.raises(ValueError, match="size must be"):
        draw_spirograph(params, size=1)


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(wheel=(0, 1)), "unknown parameter 'wheel'"),
        (dict(h=(2, 1)), r"bounds of h: \(2, 1\) is no interval"),
        (dict(m=(2, math.inf)), "bounds of m: .* is no interval"),
        (dict(b=(-0.5, 1.1)), r"bounds of b: \(-0.5, 1.1\): it must be above 0"),
        (dict(b=(0, 1.1)), "bounds of b: .* above 0"),
        (dict(sigma=(0.0, 1)), r"bounds of sigma: \(0.0, 1\): it must be above 0"),
    ],
)
def test_impossible_bounds_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        parameter_bounds(**changes)
    assert parameter_bounds(b=(0.5, 1), rback=(0, 0)) == BOUNDS | dict(b=(0.5, 1.0), rback=(0.0, 0.0))


@pytest.fixture(scope="module")
def small():
    return spirograph_classes(n_train=230, n_test=100)


def test_class_set_has_the_promised_types_and_shapes(small):
    train_images, train_labels, test_images, test_labels, classes = small
    assert train_images.shape == (230, 3, 32, 32) and test_images.shape == (100, 3, 32, 32)
    assert train_images.dtype == test_images.dtype == torch.uint8
    assert train_labels.shape == (230,) and test_labels.shape == (100,)
    assert train_labels.dtype == test_labels.dtype == torch.int64
    assert len(set(classes)) == 10 and classes[0] == "3 lobes, rounded" and classes[9] == "8 lobes, looped"
    assert spirograph_classes(n_train=3, n_test=1, size=48)[0].shape == (3, 3, 48, 48)


def test_class_set_is_balanced(small):
    assert (small[1].bincount() == 23).all() and (small[3].bincount() == 10).all()
    counts = spirograph_classes(n_train=27, n_test=0)[1].bincount(minlength=10)
    assert counts.sum() == 27 and counts.max() - counts.min() == 1


def test_class_set_depends_on_the_seed_alone(small):
    again = spirograph_classes(n_train=230, n_test=100)
    assert all(torch.equal(a, b) for a, b in zip(small[:4], again[:4], strict=True))
    fewer = spirograph_classes(n_train=40, n_test=100)
    assert torch.equal(fewer[0], small[0][:40]) and torch.equal(fewer[2], small[2])
    other = spirograph_classes(n_train=230, n_test=100, seed=1)
    assert not torch.equal(other[1], small[1]) and (other[0] != small[0]).flatten(1).any(1).all()


def test_class_set_ignores_and_keeps_the_global_generator(small):
    torch.manual_seed(123)
    before = torch.get_rng_state()
    again = spirograph_classes(n_train=20, n_test=0)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(again[0], small[0][:20])


def test_no_image_is_shared_by_train_and_test_or_by_seeds(small):
    parts = [*small[:4:2], *spirograph_classes(n_train=230, n_test=100, seed=1)[:4:2]]
    images = [image.numpy().tobytes() for part in parts for image in part]
    assert len(set(images)) == len(images) == 660


def rotational_symmetry(image, orders):
    "Strength of each order of rotational symmetry of the ink, in polar coordinates around the centre."
    ink = (image.float() - image[:, :1, :1].float()).sum(0)
    angle = torch.arange(360) * (2 * math.pi / 360)
    radius = torch.linspace(0.1, 0.85, 30)[:, None]
    at = torch.stack([radius * angle.cos(), radius * angle.sin()], dim=-1)[None]
    polar = torch.nn.functional.grid_sample(ink[None, None], at, align_corners=True)[0, 0]
    spectrum = torch.fft.rfft(polar, dim=1).abs().square().sum(0)
    return torch.stack([spectrum[k] + spectrum[2 * k] for k in orders])


def test_every_drawing_has_as_many_lobes_as_its_class_says(small):
    lobes = torch.tensor([3, 4, 5, 6, 8])[small[3] // 2]
    strength = torch.stack([rotational_symmetry(image, orders=range(1, 9)) for image in small[2]])
    own = strength[torch.arange(len(lobes)), lobes - 1]
    for order in (1, 5, 7):  # none is a multiple of another class's lobes, nor is its double
        others = lobes != order
        assert (own[others] > 3 * strength[others, order - 1]).float().mean() > 0.98


def test_pen_is_always_lighter_than_the_paper(small):
    images = small[0].float() / 255
    paper = images[:, :, 0, 0]
    ink = (images - paper[:, :, None, None]).sum(1)
    assert (ink.amax((1, 2)) > 1.15).all() and (ink.amin((1, 2)) > -0.02).all()


def test_raw_images_leave_room_for_invariance():
    augment = pytest.importorskip("dainv.augment")
    raw = spirograph_classes(n_train=0, n_test=1000)[2] / 255
    for seed in range(2):
        draws = augment.draw("half_heavier_extremes", 1000, torch.Generator().manual_seed(seed))
        moved = augment.transform(raw, draws)
        spread = (raw - raw.mean(0)).square().sum((1, 2, 3))
        score = 1 - (raw - moved).square().sum((1, 2, 3)) / (spread + spread.mean())
        assert 0.2 < score.median() < 0.6


@pytest.mark.parametrize("options", [dict(n_train=-1), dict(n_test=1.5), dict(seed=-2), dict(size=0)])
def test_class_set_refuses_impossible_sizes(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        spirograph_classes(**{"n_train": 10, "n_test": 10, **options})


def test_any_curve_can_be_rendered():
    dot = torch.zeros(1, 1, 2, dtype=torch.float64)
    black, white = torch.zeros(1, 3, dtype=torch.float64), torch.ones(1, 3, dtype=torch.float64)
    image = render_curves(dot, torch.ones(1, dtype=torch.float64), white, black, size=13)
    squared = torch.arange(-6, 7, dtype=torch.float64) ** 2  # grid spacing is one
    assert torch.allclose(image[0, 0], torch.exp(-(squared[:, None] + squared[None])), atol=1e-7)
