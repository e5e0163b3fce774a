"""`dainv.augment` against one image at a time in scipy and numpy, and its promises about laws, streams and gradients."""

import dataclasses
import io
import math
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from reference_augment import affine, kornia_pipeline, scipy_pipeline, transform_one

from dainv.augment import PARAMETERS, SCHEMES, Draws, Scheme, affine_maps, draw, draw_views, scheme, transform

ARCHIVE = Path(__file__).resolve().parents[2] / "shared/data/cifar10-jpeg.tar.xz"
EVERYTHING = scheme("heavier", flip_vertical=0.5, noise=(0, 0.1))
CONTINUOUS = [name for name in PARAMETERS if not name.startswith("flip")]


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def photos(n, height=32, width=32, seed=0):
    """Coloured clouds with some structure at every scale (n, 3, height, width) in [0, 1]."""
    coarse, fine = (torch.rand(n, 3, size, size + 1, generator=generator(seed)) for size in (4, 13))
    parts = [torch.nn.functional.interpolate(part, (height, width), mode="bilinear") for part in (coarse, fine)]
    return (0.7 * parts[0] + 0.3 * parts[1]).clamp(0, 1)


def reference(images, draws, order=1):
    rows = []
    for i, image in enumerate(images.double().numpy()):
        values = {name: values[i].item() for name, values in draws.tensors().items() if name != "key"}
        rows.append(transform_one(image, order=order, **values))
    return torch.from_numpy(np.stack(rows))


def same_draws(one, other):
    return one.tensors().keys() == other.tensors().keys() and all(
        torch.equal(values, other.tensors()[name]) for name, values in one.tensors().items()
    )


# ------------------------------------------------------------------------------------------------------- the transform


@pytest.mark.parametrize("height, width", [(32, 32), (24, 41), (64, 64)])
@pytest.mark.parametrize("name", ["light", "heavier", "half_heavier_extremes", "everything"])
def test_transform_equals_the_reference(name, height, width):
    rule = scheme("heavier", flip_vertical=0.5) if name == "everything" else scheme(name)
    images, draws = photos(40, height, width), draw(rule, 40, generator(1))
    torch.testing.assert_close(transform(images, draws).double(), reference(images, draws), atol=1e-4, rtol=0)


def test_transform_equals_the_reference_to_rounding_in_double_precision():
    images = photos(40).double()
    draws = draw(scheme("heavier", flip_vertical=0.5), 40, generator(2))
    draws = Draws(**{n: v.double() if v.is_floating_point() else v for n, v in draws.tensors().items()})
    torch.testing.assert_close(transform(images, draws), reference(images, draws), atol=1e-12, rtol=0)


@pytest.mark.parametrize("name", PARAMETERS[:-1])
@pytest.mark.parametrize("end", [0, 1])
def test_each_parameter_alone_equals_the_reference(name, end):
    low, high = EVERYTHING.ranges[name]
    value = torch.full((5,), bool(end)) if name.startswith("flip") else torch.full((5,), (low, high)[end])
    images, draws = photos(5, 20, 32), Draws(**{name: value})
    torch.testing.assert_close(transform(images, draws).double(), reference(images, draws), atol=1e-4, rtol=0)


def test_nearest_equals_the_reference_up_to_ties():
    images, draws = photos(100), draw(scheme("heavier", interpolation="nearest"), 100, generator(3))
    assert draws.interpolation == "nearest"
    close = (transform(images, draws).double() - reference(images, draws, order=0)).abs() < 1e-4
    assert close.double().mean() >= 0.99


def test_maps_equal_the_product_of_matrices():
    draws = draw("heavier", 20, generator(4))
    values = {name: values for name, values in draws.tensors().items() if name in CONTINUOUS[:6]}
    for i, found in enumerate(affine_maps(Draws(**values), 30, 44, torch.float64)):
        wanted = affine(30, 44, **{name: value[i].item() for name, value in values.items()})
        np.testing.assert_allclose(found, wanted[:2], atol=1e-5)


def test_fixed_point_is_one_pixel_beyond_the_centre():
    maps = affine_maps(Draws(rotation=torch.tensor([90.0])), 32, 32)
    torch.testing.assert_close(maps[0] @ torch.tensor([16.5, 16.5, 1.0]), torch.tensor([16.5, 16.5]))


def test_border_is_repeated():
    ramp = torch.linspace(0, 1, 32).expand(1, 3, 32, 32)
    moved = transform(ramp, Draws(shift_cols=torch.tensor([0.25])))
    torch.testing.assert_close(moved[..., :24], ramp[..., 8:])
    assert (moved[..., 24:] == 1).all()


def test_zoom_above_one_shrinks_the_object():
    square = torch.zeros(1, 3, 32, 32)
    square[..., 10:22, 10:22] = 1
    zoom = Draws(zoom_rows=torch.tensor([1.5]), zoom_cols=torch.tensor([1.5]))
    assert transform(square, zoom).sum() == pytest.approx(square.sum().item() / 1.5**2, rel=0.1)


def test_flip_comes_after_the_affine_map():
    images = photos(1)
    moved = Draws(shift_cols=torch.tensor([0.125]), rotation=torch.tensor([20.0]))
    both = dataclasses.replace(moved, flip=torch.tensor([True]))
    torch.testing.assert_close(transform(images, both), transform(images, moved).flip(3), atol=2e-5, rtol=0)
    assert (transform(images.flip(3), moved) - transform(images, both)).abs().max() > 0.05


def test_brightness_comes_before_contrast_and_both_clip():
    pixels = torch.tensor([0.1, 0.4, 0.6, 0.9]).view(1, 1, 2, 2).expand(1, 3, 2, 2)
    both = transform(pixels, Draws(brightness=torch.tensor([0.25]), contrast=torch.tensor([1.5])))
    wanted = torch.tensor([0.16875, 0.61875, 0.91875, 1.0])  # about .7125, the mean after the first clip
    torch.testing.assert_close(both[0, 0].flatten(), wanted)


def test_contrast_keeps_each_channel_about_its_own_mean():
    images = torch.stack([torch.full((4, 4), level) for level in (0.2, 0.5, 0.8)])[None]
    torch.testing.assert_close(transform(images, Draws(contrast=torch.tensor([1.5]))), images)


@pytest.mark.parametrize("name", [*SCHEMES, "everything"])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_output_stays_in_range_and_input_is_left_alone(name, dtype):
    images = (photos(16) * 255).to(dtype) if dtype == torch.uint8 else photos(16)
    before = images.clone()
    rule = EVERYTHING if name == "everything" else scheme(name)
    out = transform(images, draw(rule, 16, generator(5)))
    assert out.dtype == torch.float32 and out.shape == images.shape
    assert 0 <= out.min() and out.max() <= 1
    assert torch.equal(images, before)


@pytest.mark.parametrize("name", SCHEMES)
def test_bytes_equal_floats(name):
    images = (photos(9) * 255).to(torch.uint8)
    draws = draw(name, 9, generator(6))
    torch.testing.assert_close(transform(images, draws), transform(images / 255, draws), atol=0, rtol=0)


def test_no_augmentation_is_exactly_the_image():
    images = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(2, 3, 16, 16)
    assert torch.equal(transform(images, draw("none", 2)), images / 255)


def test_a_flip_alone_is_exact():
    images, draws = photos(50), draw("light_tiny", 50, generator(7))
    assert 0 < draws.flip.sum() < 50
    assert torch.equal(transform(images, draws), torch.where(draws.flip[:, None, None, None], images.flip(3), images))


@pytest.mark.parametrize("name", ["none", "light_tiny", "heavier", "gaussian"])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_channels_last_gives_the_same_in_channels_last(name, dtype):
    images = (photos(7) * 255).to(dtype)
    images = images if dtype == torch.uint8 else images / 255
    draws = draw(name, 7, generator(8))
    out = transform(images.contiguous(memory_format=torch.channels_last), draws)
    assert out.is_contiguous(memory_format=torch.channels_last)
    assert transform(images, draws).is_contiguous()
    torch.testing.assert_close(out, transform(images, draws), atol=1e-6, rtol=0)


def test_large_batches_are_worked_off_in_pieces_that_do_not_show():
    images, draws = photos(1100), draw(EVERYTHING, 1100, generator(9))
    whole = transform(images, draws)
    for rows in (slice(0, 3), slice(510, 515), slice(1097, 1100)):
        torch.testing.assert_close(whole[rows], transform(images[rows], draws[rows]), atol=1e-6, rtol=0)
    last = transform(images.contiguous(memory_format=torch.channels_last), draws)
    assert last.is_contiguous(memory_format=torch.channels_last)
    assert transform(images[:0], draws[:0]).shape == (0, 3, 32, 32)


def test_half_precision_and_autocast_do_not_move_pixels():
    images, draws = photos(8), draw("heavier", 8, generator(10))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(transform(images, draws), transform(images.float(), draws))
        inside = transform(images, draws)
    assert inside.dtype == torch.float32 and torch.equal(inside, transform(images, draws))
    half = transform(images.half(), draws)
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, inside, atol=2e-3, rtol=0)


@pytest.mark.parametrize(
    "images, draws, message",
    [
        (torch.zeros(3, 32, 32), Draws(), r"\(N, 3, H, W\)"),
        (torch.zeros(2, 32, 32, 3), Draws(), r"images.permute\(0, 3, 1, 2\)"),
        (torch.zeros(2, 3, 8, 8, dtype=torch.int64), Draws(), "uint8 in 0..255"),
        (torch.full((2, 3, 8, 8), 200.0), draw("light", 2), "divide by 255"),
        (torch.full((2, 3, 8, 8), -2.0), draw("light", 2), "preprocess="),
        (torch.full((2, 3, 8, 8), torch.nan), draw("light", 2), "image 0 holds NaN"),
        (torch.zeros(2, 3, 8, 8), Draws(brightness=torch.tensor([0.0, -64.0])), "brightness of 64.*pixels in"),
        (torch.zeros(2, 3, 8, 8), Draws(rotation=torch.tensor([0.0, torch.nan])), "rotation of nan"),
        (torch.zeros(2, 3, 8, 8), Draws(rotation=torch.zeros(3)), "2 images need one draw each, but rotation"),
        (torch.zeros(2, 3, 8, 8), Draws(brightness=torch.zeros(2, 1)), "brightness is"),
        (torch.zeros(2, 3, 8, 8), draw("none", 5), "2 images need one draw each"),
        (torch.zeros(2, 3, 8, 8), Draws(noise=torch.ones(2)), "noise needs a key"),
        (torch.zeros(2, 3, 8, 8), Draws(rotation=torch.zeros(2, device="meta")), "use draws.to"),
    ],
)
def test_mistakes_are_named(images, draws, message):
    with pytest.raises(ValueError, match=message):
        transform(images, draws)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.uint8])
@pytest.mark.parametrize("name", ["none", "heavier", "gaussian"])
def test_images_are_left_alone_and_the_result_is_another_tensor(name, dtype):
    images = (photos(3) * (255 if dtype == torch.uint8 else 1)).to(dtype)
    before, moved = images.clone(), transform(images, draw(name, 3, generator(3)))
    moved.zero_()
    assert torch.equal(images, before)


def test_arrays_are_transformed_like_tensors():
    images, draws = photos(3), draw("heavier", 3, generator(4))
    assert torch.equal(transform(images.numpy(), draws), transform(images, draws))


# ----------------------------------------------------------------------------------------------------------- gradients


def smooth_and_draws(n=3):
    images = torch.nn.functional.avg_pool2d(photos(n, 12, 12).double(), 3, 1, 1) * 0.5 + 0.25
    rule = scheme("heavier", brightness=0.1, contrast=(0.8, 1.2), noise=(0.01, 0.02), flip_vertical=0.5)
    draws = draw(rule, n, generator(11))
    return images, Draws(**{k: v.double() if v.is_floating_point() else v for k, v in draws.tensors().items()})


@pytest.mark.parametrize("name", CONTINUOUS)
def test_gradient_of_each_parameter_equals_finite_differences(name):
    images, draws = smooth_and_draws()
    values = getattr(draws, name).clone().requires_grad_()
    weights = torch.rand(images.shape, generator=generator(12), dtype=torch.float64)

    def total(values):
        return (transform(images, dataclasses.replace(draws, **{name: values})) * weights).sum((1, 2, 3))

    (slope,) = torch.autograd.grad(total(values).sum(), values)
    with torch.no_grad():
        finite = (total(values + 1e-7) - total(values - 1e-7)) / 2e-7
    assert (slope.abs() > 1e-6).all()
    torch.testing.assert_close(slope, finite, rtol=1e-4, atol=1e-5)
    assert torch.equal(total(values), total(values.detach()))  # overwriting or not, the values are the same


def test_gradient_reaches_the_images_and_leaves_them_alone():
    images, draws = smooth_and_draws()
    images.requires_grad_()
    before = images.detach().clone()
    transform(images, draws).sum().backward()
    assert images.grad.abs().sum() > 0 and torch.equal(images.detach(), before)


def test_gradients_of_single_images_by_torch_func():
    """Nothing is overwritten where a gradient is wanted: torch.func could not write into what it has not wrapped."""
    images = (photos(2, 8, 8) * 255).to(torch.uint8)
    deltas = torch.tensor([[0.05, -0.05], [0.1, -0.1]])

    def total(delta):
        return transform(images, Draws(brightness=delta)).square().sum()

    found = torch.func.vmap(torch.func.grad(total))(deltas)
    wanted = [torch.autograd.functional.jacobian(total, delta) for delta in deltas]
    torch.testing.assert_close(found, torch.stack(wanted))


def test_forward_mode_and_double_backward():
    images, draws = smooth_and_draws()
    angle = draws.rotation.clone().requires_grad_()
    out = transform(images, dataclasses.replace(draws, rotation=angle)).square().sum()
    (slope,) = torch.autograd.grad(out, angle, create_graph=True)
    (second,) = torch.autograd.grad(slope.sum(), angle)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(draws.rotation, torch.ones_like(angle))
        moved = transform(images, dataclasses.replace(draws, rotation=dual)).square().sum()
        tangent = torch.autograd.forward_ad.unpack_dual(moved).tangent
    torch.testing.assert_close(tangent, slope.sum().detach())
    assert second.isfinite().all() and (second != 0).all()


# ----------------------------------------------------------------------------------------------------- laws and streams


@pytest.mark.parametrize("law, spread", [("normal", 0.879626 / 4), ("uniform", 1 / math.sqrt(12)), ("extremes", 0.5)])
@pytest.mark.parametrize("drawn", ["draw", "draw_views"])
def test_moments_of_each_law(law, spread, drawn):
    n, rule = 40_000, scheme("heavier", law=law, noise=(0, 0.2), contrast=(0.25, 1.25))
    draws = draw(rule, n, generator(13)) if drawn == "draw" else draw_views(rule, torch.arange(n), 2, 1, 13)
    for name in CONTINUOUS:
        (low, high), values = rule.ranges[name], getattr(draws, name).double()
        assert low - 1e-6 <= values.min() and values.max() <= high + 1e-6, name
        assert values.mean() == pytest.approx((low + high) / 2, abs=5 * spread * (high - low) / n**0.5), name
        assert values.std() == pytest.approx(spread * (high - low), rel=0.02), name
    assert draws.flip.double().mean() == pytest.approx(0.5, abs=0.0125)


def test_truncated_normal_has_the_right_shape():
    values = draw(scheme("none", rotation=40), 100_000, generator(14)).rotation.double() / 20  # in standard deviations
    inside = math.erf(math.sqrt(2))
    for edge in (0.5, 1, 1.5):
        wanted = math.erf(edge / math.sqrt(2)) / inside
        assert (values.abs() <= edge).double().mean() == pytest.approx(wanted, abs=0.006)
    assert values.abs().max() <= 2


def test_extremes_are_only_at_the_ends():
    draws = draw("half_heavier_extremes", 2000, generator(15))
    for name, ends in SCHEMES["half_heavier_extremes"].ranges.items():
        if name != "flip":
            found, counts = getattr(draws, name).unique(return_counts=True)
            assert torch.equal(found, torch.tensor(ends)), name
            assert counts.min() > 900, name


def test_flip_probability():
    assert draw(scheme("none", flip=0.2), 20_000, generator(16)).flip.float().mean() == pytest.approx(0.2, abs=0.015)
    assert draw(scheme("none", flip=1), 500, generator(16)).flip.all()


@pytest.mark.parametrize("drawn", ["draw", "draw_views"])
def test_parameters_of_an_image_are_independent(drawn):
    n, rule = 20_000, EVERYTHING
    draws = draw(rule, n, generator(17)) if drawn == "draw" else draw_views(rule, torch.arange(n), 0, 0, 17)
    table = torch.stack([values.double() for name, values in draws.tensors().items() if name != "key"])
    assert (table.corrcoef() - torch.eye(len(table))).abs().max() < 5 / n**0.5


def test_views_are_independent_along_every_part_of_their_name():
    n = 20_000
    ids = torch.arange(n)
    rotations = [draw_views("heavier", ids + i, p, v, s).rotation for i, p, v, s in torch.eye(4).int().tolist()]
    table = torch.stack([draw_views("heavier", ids, 0, 0, 0).rotation, *rotations])
    assert (table.corrcoef() - torch.eye(5)).abs().max() < 5 / n**0.5


def test_names_do_not_collide():
    ids, passes, views = torch.meshgrid(torch.arange(200), torch.arange(20), torch.arange(8), indexing="ij")
    keys = draw_views("none", ids.flatten(), passes.flatten(), views.flatten(), 0).key
    assert len(keys.unique()) == 200 * 20 * 8


def test_a_view_depends_on_its_own_name_only():
    ids, passes, views = torch.randint(1000, (3, 64), generator=generator(18))
    whole = draw_views(EVERYTHING, ids, passes, views, 5)
    order = torch.randperm(64, generator=generator(19))
    assert same_draws(draw_views(EVERYTHING, ids[order], passes[order], views[order], 5), whole[order])
    assert same_draws(draw_views(EVERYTHING, ids[9:10], int(passes[9]), int(views[9]), 5), whole[9])
    assert same_draws(draw_views(EVERYTHING, ids.int(), passes.int(), views.int(), 5), whole)
    images = photos(64)
    torch.testing.assert_close(
        transform(images[order], whole[order]), transform(images, whole)[order], atol=1e-6, rtol=0
    )


def test_a_parameter_keeps_its_draws_whatever_the_others_do():
    whole, ids = draw_views(EVERYTHING, torch.arange(50), 0, 0, 0), torch.arange(50)
    assert torch.equal(draw_views(scheme("none", shear=0.15), ids, 0, 0, 0).shear, whole.shear)
    assert torch.equal(draw_views(scheme(EVERYTHING, flip=0, zoom=(1, 1)), ids, 0, 0, 0).contrast, whole.contrast)


def test_views_are_the_same_for_ever():
    """The stream is part of a run's provenance: a change of these numbers changes every result."""
    views = draw_views("heavier", torch.tensor([0, 1, 49_999]), 3, 7, 2019)
    assert views.key.tolist() == KEYS
    torch.testing.assert_close(views.rotation, torch.tensor(ROTATIONS), atol=1e-4, rtol=0)


KEYS = [2453663988614320272, -5377251774780544019, 6306346008284836920]
ROTATIONS = [8.6844, 2.2273, -5.2934]


def test_draw_follows_its_generator():
    first, second = draw(EVERYTHING, 20, generator(20)), draw(EVERYTHING, 20, generator(20))
    assert same_draws(first, second)
    assert not same_draws(first, draw(EVERYTHING, 20, generator(21)))
    torch.manual_seed(3)
    first = draw(EVERYTHING, 20)
    torch.manual_seed(3)
    assert same_draws(first, draw(EVERYTHING, 20))


def test_noise_is_named_by_the_view_and_is_gaussian():
    ids, grey = torch.arange(300), torch.full((300, 3, 32, 32), 0.5)
    rule = scheme("gaussian", noise=(0.05, 0.05))
    noise = transform(grey, draw_views(rule, ids, 0, 0, 0)) - 0.5
    assert noise.std() == pytest.approx(0.05, rel=0.01) and noise.mean().abs() < 3e-4
    assert noise.square().square().mean() / noise.square().mean() ** 2 == pytest.approx(3, abs=0.05)
    flat = noise.flatten(1)
    for one, other in ((flat[1:], flat[:-1]), (flat[:, 1:], flat[:, :-1]), (flat[:, :1536], flat[:, 1536:])):
        assert (one * other).mean().abs() / 0.05**2 < 5 / one.numel() ** 0.5
    again = transform(grey[:2], draw_views(rule, ids[[200, 7]], 0, 0, 0)) - 0.5
    torch.testing.assert_close(again, noise[[200, 7]], atol=1e-6, rtol=0)


def test_noise_stands_before_brightness_and_clips():
    images, field = photos(4), Draws(noise=torch.full((4,), 0.2), key=torch.arange(4))
    noisy = transform(images, field)
    assert noisy.min() == 0 or noisy.max() == 1
    both = dataclasses.replace(field, brightness=torch.full((4,), -0.2))
    torch.testing.assert_close(transform(images, both), (noisy - 0.2).clamp(0, 1))


def test_draws_are_indexed_and_moved():
    draws = draw(EVERYTHING, 10, generator(22))
    assert len(draws) == 10 and len(draws[3]) == 1 and len(draws[2:6]) == 4 and len(draws[-1]) == 1
    chosen = draws[torch.tensor([4, 1])]
    assert torch.equal(chosen.shear, draws.shear[[4, 1]]) and chosen.interpolation == draws.interpolation
    assert len(draws[draws.flip]) == draws.flip.sum()
    assert draws.to("meta").rotation.device.type == "meta" and len(Draws()) == 0


def test_draw_views_refuses_what_is_no_id():
    for bad in (torch.zeros(3), torch.zeros(3, 1, dtype=torch.int64)):
        with pytest.raises(ValueError, match="image_ids are integers"):
            draw_views("heavier", bad, 0, 0, 0)
    with pytest.raises(ValueError, match="number of images"):
        draw("heavier", -1)


# -------------------------------------------------------------------------------------------------------------- schemes


def test_named_schemes_are_those_of_the_papers():
    ranges = SCHEMES["heavier"].ranges
    assert ranges["rotation"] == (-22.5, 22.5) and ranges["shift_rows"] == ranges["shift_cols"] == (-0.1, 0.1)
    assert ranges["shear"] == (-0.15, 0.15) and ranges["zoom_rows"] == ranges["zoom_cols"] == (0.85, 1.15)
    assert ranges["brightness"] == (-0.25, 0.25) and ranges["contrast"] == (0.5, 1.5) and ranges["flip"] == (0, 0.5)
    assert set(SCHEMES["light"].ranges) == {"flip", "shift_rows", "shift_cols"}
    assert SCHEMES["gaussian"].ranges == {"noise": (0, 0.2)}
    assert {name: found.law for name, found in SCHEMES.items() if found.law != "normal"} == {
        name: "extremes" for name in SCHEMES if "extremes" in name
    }
    for name in ("light", "heavier", "half_heavier_extremes"):
        tiny = set(SCHEMES[name].ranges) - {"shift_rows", "shift_cols"}
        assert set(SCHEMES[name + "_tiny"].ranges) == tiny


def test_half_heavier_is_half_of_heavier_but_for_the_contrast_as_run():
    whole, half = (SCHEMES[name].ranges for name in ("heavier", "half_heavier_extremes_consistent"))
    for name in set(whole) - {"flip"}:
        centre = sum(whole[name]) / 2
        assert half[name] == pytest.approx([centre + (end - centre) / 2 for end in whole[name]]), name
    assert SCHEMES["half_heavier_extremes"].contrast == (0.25, 1.25)
    assert SCHEMES["half_heavier_extremes"].flip == 0.5


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(flip=1.5), "flip is a number between 0 and 1"),
        (dict(rotation=-3), "rotation is a number between 0 and 180"),
        (dict(rotation=float("nan")), "rotation"),
        (dict(shear="much"), "shear"),
        (dict(zoom=1.2), "zoom is a pair"),
        (dict(zoom=(0, 1)), "zoom"),
        (dict(contrast=(1.5, 0.5)), "contrast is a pair"),
        (dict(noise=(0, 1, 2)), "noise is a pair"),
        (dict(noise=(0, 8)), "noise is a pair .* between 0 and 1, on the scale of pixels"),
        (dict(shear=15), "shear is a number between 0 and 1.5 radians"),
        (dict(zoom="12"), "zoom is a pair"),
        (dict(law="gauss"), "law is one of normal, uniform, extremes, not 'gauss'"),
        (dict(interpolation="cubic"), "interpolation is one of bilinear, nearest"),
        (dict(rotate=3), "unknown field rotate; known are flip"),
    ],
)
def test_bad_schemes_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        scheme("heavier", **changes)


def test_schemes_are_values():
    assert scheme("heavier") is SCHEMES["heavier"] and scheme(Scheme()) == SCHEMES["none"]
    assert scheme("heavier", zoom=[0.85, 1.15]) == SCHEMES["heavier"]
    assert len({hash(found) for found in SCHEMES.values()}) == len(SCHEMES)
    with pytest.raises(ValueError, match="unknown name 'heaver'; known are none, light, heavier"):
        draw("heaver", 3)
    with pytest.raises(dataclasses.FrozenInstanceError):
        SCHEMES["heavier"].rotation = 3


# ------------------------------------------------------------------------------------------------------ whole pipelines


def test_the_peers_that_it_is_timed_against_do_the_same_kind_of_thing():
    images = photos(64)
    ours = transform(images, draw("heavier", 64, generator(23)))
    peers = torch.from_numpy(scipy_pipeline(images.numpy())), kornia_pipeline()(images)
    spread = [(out - images).square().mean().item() for out in (ours, *peers)]
    assert all(out.shape == images.shape and out.min() >= 0 and out.max() <= 1 for out in peers)
    assert spread[1] == pytest.approx(spread[0], rel=0.3)
    assert spread[2] > 0.5 * spread[0]  # kornia's draws are uniform


@pytest.mark.slow
@pytest.mark.parametrize("name", ["heavier", "gaussian"])
def test_compiled_equals_eager(name):
    def views(images, ids, passes, views):
        return transform(images, draw_views(name, ids, passes, views, 4))

    images, ids, copies = photos(16), torch.arange(16), torch.arange(16) % 4
    passes = torch.tensor(2).expand(16)
    compiled = torch.compile(views, fullgraph=True)(images, ids, passes, copies)
    torch.testing.assert_close(compiled, views(images, ids, passes, copies), atol=1e-4, rtol=0)


def cifar_test_images(every):
    if not ARCHIVE.exists():
        pytest.skip(f"{ARCHIVE.name} is not beside the checkout")
    pictures, found = [], 0
    with tarfile.open(ARCHIVE, "r|xz") as archive:
        for member in archive:
            if member.isfile() and member.name.startswith("test/"):
                if found % every == 0:
                    data = archive.extractfile(member).read()
                    pictures.append(np.asarray(Image.open(io.BytesIO(data)).convert("RGB")))
                found += 1
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).contiguous()


def input_scores(images, rule):
    pixels = images / 255
    far = (pixels - pixels.mean(0)).square().sum((1, 2, 3))
    moved = transform(images, draw_views(rule, torch.arange(len(images)), 0, 0, 0))
    return 1 - (pixels - moved).square().sum((1, 2, 3)) / (far + far.mean())


@pytest.mark.archive
def test_scores_of_the_pixels_meet_the_published_input_box():
    images = cifar_test_images(every=5)
    assert len(images) == 2000
    box = torch.tensor([0.25, 0.5, 0.75])
    assert input_scores(images, "half_heavier_extremes").median() == pytest.approx(0.556, abs=0.05)
    as_run = input_scores(images, scheme("half_heavier_extremes", interpolation="nearest")).quantile(box)
    assert as_run.tolist() == pytest.approx([0.441, 0.556, 0.650], abs=0.015)
