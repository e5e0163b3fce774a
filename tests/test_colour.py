"Colour distortion and random resized crops."

import math

import pytest
import torch
import torchvision.transforms.functional as TF
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import forward_ad as fwAD
from torch.autograd import gradcheck, gradgradcheck
from torchvision.transforms import InterpolationMode, RandomResizedCrop

from dainv.augment import named_uniforms
from dainv.colour import COLOURS, CROP_NUMBERS, colour_bounds, crop_boxes, distort_colours, greyscale, resized_crops

IDENTITY = torch.tensor([1.0, 1.0, 1.0, 0.0])
SHARES, RATIOS = (0.08, 1.0), (3 / 4, 4 / 3)


def noise(n=4, height=32, width=32, seed=0):
    return torch.rand(n, 3, height, width, generator=torch.Generator().manual_seed(seed))


def uniforms(n, seed=0):
    return named_uniforms(CROP_NUMBERS, torch.arange(n), seed)


@pytest.mark.parametrize(
    ("strength", "factor", "turn"),
    [(0, (1, 1), 0), (0.5, (0.6, 1.4), 0.1), (1, (0.2, 1.8), 0.2), (1.25, (0, 2), 0.25), (3, (0, 3.4), 0.6)],
)
def test_the_bounds_follow_the_strength(strength, factor, turn):
    bounds = colour_bounds(strength)
    assert tuple(bounds) == COLOURS
    for name in COLOURS[:3]:
        assert bounds[name] == pytest.approx(factor)
    assert bounds["hue"] == pytest.approx((-turn, turn))


@pytest.mark.parametrize("strength", [-0.1, -1e-9, math.nan, math.inf, -math.inf])
def test_impossible_strengths_are_refused(strength):
    with pytest.raises(ValueError, match="strength="):
        colour_bounds(strength)


@pytest.mark.parametrize("factor", [0.0, 0.3, 1.0, 1.7, 2.5])
@pytest.mark.parametrize("k", [0, 1, 2])
def test_a_single_factor_is_torchvisions(k, factor):
    images, alpha = noise(), IDENTITY.repeat(4, 1)
    alpha[:, k] = factor
    theirs = [TF.adjust_brightness, TF.adjust_contrast, TF.adjust_saturation][k]
    expected = torch.stack([theirs(image, factor) for image in images])  # contrast: one mean per image
    undistorted = distort_colours(expected, IDENTITY.repeat(4, 1))  # the rounded matrices of the hue
    # torchvision's grey has the weight 0.2989 for red
    torch.testing.assert_close(distort_colours(images, alpha), undistorted, rtol=0, atol=3e-4)
    torch.testing.assert_close(distort_colours(images, alpha), expected, rtol=0, atol=3.2e-3)


def by_definition(image, brightness, contrast, saturation, hue):
    "The four steps, one image and one pixel at a time."
    image = (image * brightness).clamp(0, 1)
    grey = (image * torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1)).sum(0)
    image = (image * contrast + (1 - contrast) * grey.mean()).clamp(0, 1)
    grey = (image * torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1)).sum(0)
    image = (image * saturation + (1 - saturation) * grey).clamp(0, 1)
    to_yiq = torch.tensor([[0.299, 0.587, 0.114], [0.596, -0.274, -0.321], [0.211, -0.523, 0.311]])
    to_rgb = torch.tensor([[1, 0.956, 0.621], [1, -0.272, -0.647], [1, -1.107, 1.705]])
    result = torch.empty_like(image)
    for row in range(image.shape[1]):
        for column in range(image.shape[2]):
            y, i, q = (to_yiq @ image[:, row, column]).tolist()
            point = complex(i, q) * complex(math.cos(2 * math.pi * hue), math.sin(2 * math.pi * hue))
            result[:, row, column] = to_rgb @ torch.tensor([y, point.real, point.imag])
    return result


def test_the_distortion_is_that_of_the_definition():
    images = noise(5, 6, 7)
    low, high = torch.tensor(list(colour_bounds(1.0).values())).unbind(1)
    alpha = low + (high - low) * torch.rand(5, 4, generator=torch.Generator().manual_seed(1))
    expected = torch.stack([by_definition(x, *row.tolist()) for x, row in zip(images, alpha, strict=True)])
    result = distort_colours(images, alpha)
    torch.testing.assert_close(result, expected, rtol=0, atol=2e-6)
    assert result.min() < 0 or result.max() > 1, "nothing is clamped after the hue"


def test_the_neutral_parameters_change_almost_nothing():
    images = noise()
    change = distort_colours(images, IDENTITY.repeat(4, 1)) - images
    # 0.0014 is the largest deviation of the matrices' product from the identity; a white pixel adds up three of them
    assert change.abs().mean() < 1e-3 and change.abs().max() < 2.82e-3
    black_and_white = torch.tensor([0.0, 1.0]).view(2, 1, 1, 1).repeat(1, 3, 2, 2)
    torch.testing.assert_close(
        distort_colours(black_and_white, IDENTITY.repeat(2, 1)), black_and_white, rtol=0, atol=3e-3
    )


@settings(max_examples=30, deadline=None)
@given(hue=st.floats(-2, 2), level=st.floats(0, 1))
def test_hue_is_periodic_and_leaves_grey_alone(hue, level):
    images = noise(1, 2, 2)
    turned, again = (distort_colours(images, torch.tensor([[1, 1, 1, h]])) for h in (hue, hue + 1))
    torch.testing.assert_close(turned, again, rtol=0, atol=1e-4)
    torch.testing.assert_close(greyscale(turned), greyscale(images), rtol=0, atol=2e-3)
    grey = torch.full((1, 3, 2, 2), level)
    torch.testing.assert_close(distort_colours(grey, torch.tensor([[1, 1, 1, hue]])), grey, rtol=0, atol=5e-3)


def gentle():
    "Images and parameters where nothing is clamped, in float64."
    images = 0.35 + 0.3 * noise(2, 3, 3).double()
    alpha = torch.tensor([[1.1, 0.9, 1.2, 0.05], [0.8, 1.2, 0.7, -0.3]], dtype=torch.float64, requires_grad=True)
    return images, alpha


def test_first_and_second_derivatives_and_those_in_forward_mode():
    images, alpha = gentle()
    for k in range(4):
        one = alpha.detach()[:, k].requires_grad_()
        assert gradcheck(
            lambda x, k=k: distort_colours(images, alpha.detach().index_copy(1, torch.tensor([k]), x[:, None])), one
        )
    assert gradcheck(lambda alpha: distort_colours(images, alpha), alpha, check_forward_ad=True)
    assert gradgradcheck(lambda alpha: distort_colours(images, alpha), alpha)
    assert gradcheck(lambda images: distort_colours(images, alpha.detach()), images.requires_grad_())


def test_forward_and_reverse_mode_agree_where_values_are_clamped():
    images, (low, high) = (
        noise().double(),
        torch.tensor(list(colour_bounds(1.0).values()), dtype=torch.float64).unbind(1),
    )
    alpha = (low + (high - low) * torch.rand(4, 4, dtype=torch.float64)).requires_grad_()
    direction = torch.randn_like(alpha)
    (slope,) = torch.autograd.grad(distort_colours(images, alpha).square().sum(), alpha)
    with fwAD.dual_level():
        dual = distort_colours(images, fwAD.make_dual(alpha.detach(), direction)).square().sum()
        torch.testing.assert_close(fwAD.unpack_dual(dual).tangent, (slope * direction).sum())


def test_each_image_depends_on_its_own_row_alone():
    images, alpha = noise(), IDENTITY.repeat(4, 1) + 0.1
    alpha.requires_grad_()
    (slope,) = torch.autograd.grad(distort_colours(images, alpha)[2].sum(), alpha)
    assert slope[2].all() and not slope[[0, 1, 3]].any()
    alone = distort_colours(images[2:3], alpha[2:3])
    torch.testing.assert_close(alone[0], distort_colours(images, alpha)[2])


def test_single_images_and_wrong_shapes_are_refused():
    whole = torch.tensor([[0, 0, 4, 4]])
    for call in (lambda x: distort_colours(x, IDENTITY[None]), lambda x: resized_crops(x, whole, 32), greyscale):
        with pytest.raises(ValueError, match=r"\(N, 3, H, W\).*images\[None\]"):
            call(noise()[0])
        with pytest.raises(ValueError, match=r"\(1, 1, 4, 4\)"):
            call(torch.zeros(1, 1, 4, 4))
    with pytest.raises(ValueError, match=r"alpha: shape \(4, 4\)"):
        distort_colours(noise(), IDENTITY[None])
    with pytest.raises(ValueError, match=r"boxes: shape \(4, 4\)"):
        resized_crops(noise(), torch.zeros(4, 2), 32)
    with pytest.raises(ValueError, match=r"\(N, 22\)"):
        crop_boxes(torch.rand(22), 32, 32)


def test_pixels_on_another_scale_are_refused():
    whole = torch.tensor([[0, 0, 4, 4]])
    for call in (lambda x: distort_colours(x, IDENTITY[None]), lambda x: resized_crops(x, whole, 32)):
        for pixel, said in ((200.0, "divide by 255"), (-1.5, "preprocess="), (math.nan, "image 0 holds NaN")):
            with pytest.raises(ValueError, match=said):
                call(torch.full((1, 3, 4, 4), pixel))


def test_bytes_are_the_same_images():
    levels = torch.randint(0, 256, (2, 3, 4, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    alpha, boxes = torch.tensor([[1.2, 0.7, 1.1, 0.1]] * 2), torch.tensor([[0, 0, 3, 3]] * 2)
    for call in (lambda x: distort_colours(x, alpha), lambda x: resized_crops(x, boxes, 4), greyscale):
        assert torch.equal(call(levels), call(levels / 255)) and call(levels).max() > 0.5


@pytest.mark.parametrize("box", [[0, 0, 5, 4], [-1, 0, 3, 3], [0, 2, 4, 3], [0, 0, 0, 4]])
def test_boxes_outside_of_the_image_are_refused(box):
    with pytest.raises(ValueError, match="of image 1 is no part of 4 x 4 pixels"):
        resized_crops(torch.rand(2, 3, 4, 4), torch.tensor([[0, 0, 4, 4], box]), 4)


@pytest.mark.parametrize("options", [dict(scale=(8, 100)), dict(scale=(0, 1)), dict(ratio=(0, 1)), dict(ratio=(2, 1))])
def test_impossible_crops_are_refused(options):
    with pytest.raises(ValueError, match="scale="):
        crop_boxes(torch.rand(1, 22), 32, 32, **options)


def box_by_loop(row, height, width, scale, ratio):
    "The definition: ten attempts, then the largest crop in the middle."
    place, shares, stretches = row[:2], row[2:12], row[12:]
    for share, stretch in zip(shares, stretches, strict=True):
        area = height * width * (scale[0] + (scale[1] - scale[0]) * share)
        aspect = math.exp(math.log(ratio[0]) + (math.log(ratio[1]) - math.log(ratio[0])) * stretch)
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            return [int(place[0] * (height - h + 1)), int(place[1] * (width - w + 1)), h, w]
    w, h = width, height
    if width / height < ratio[0]:
        h = round(width / ratio[0])
    elif width / height > ratio[1]:
        w = round(height * ratio[1])
    return [(height - h) // 2, (width - w) // 2, h, w]


@pytest.mark.parametrize(("height", "width"), [(32, 32), (16, 16), (8, 40), (40, 8), (31, 20), (1, 1)])
def test_boxes_are_those_of_ten_attempts(height, width):
    numbers = uniforms(500)
    for scale in (SHARES, (0.9, 1.0), (1.0, 1.0)):  # the last hardly ever fits
        expected = [box_by_loop(row, height, width, scale, RATIOS) for row in numbers.double().tolist()]
        boxes = crop_boxes(numbers, height, width, scale, RATIOS)
        assert boxes.tolist() == expected and boxes.dtype == torch.int64
        assert (boxes[:, :2] >= 0).all() and (boxes[:, 2:] >= 1).all()
        assert (boxes[:, :2] + boxes[:, 2:] <= torch.tensor([height, width])).all()


def test_the_law_of_the_crops_is_torchvisions():
    n = 6000
    torch.manual_seed(0)
    blank = torch.zeros(3, 32, 32)
    theirs = torch.tensor([RandomResizedCrop.get_params(blank, SHARES, RATIOS) for _ in range(n)]).double()
    ours = crop_boxes(uniforms(n), 32, 32).double()

    def properties(b):
        top, left, tall, wide = b.unbind(1)
        return torch.stack([top, left, tall, wide, tall * wide, wide / tall, (tall == 32) * 1.0, (top == 0) * 1.0], 1)

    a, b = properties(ours), properties(theirs)
    error = ((a.var(0) + b.var(0)) / n).sqrt()
    assert ((a.mean(0) - b.mean(0)).abs() < 4 * error).all()
    torch.testing.assert_close(a.std(0), b.std(0), rtol=0.06, atol=0)
    for k in range(5):  # the whole distributions, by Kolmogorov and Smirnov
        grid = torch.cat([a[:, k], b[:, k]]).unique()
        gap = (
            torch.searchsorted(a[:, k].sort()[0], grid, right=True)
            - torch.searchsorted(b[:, k].sort()[0], grid, right=True)
        ) / n
        assert gap.abs().max() < 1.95 * (2 / n) ** 0.5


def by_pil(image, box, size, flip=False):
    crop = TF.resized_crop(TF.to_pil_image(image), *box.tolist(), [size, size], InterpolationMode.LANCZOS)
    return TF.to_tensor(TF.hflip(crop) if flip else crop)


@pytest.mark.parametrize(("side", "size"), [(32, 32), (16, 16), (48, 32), (64, 16), (20, 33)])
def test_resampling_is_pils_within_rounding(side, size):
    n = 150
    # Noise overshoots more than any photograph. Where an image gets smaller, the order of PIL's two passes, between
    # which it clips, depends on its version: nothing is clipped there.
    contrast = 1.0 if side <= size else 0.5
    levels = (255 * (0.5 + contrast * (noise(n, side, side) - 0.5))).round().to(torch.uint8)
    boxes, flip = crop_boxes(uniforms(n), side, side), torch.arange(n) % 2 == 0
    expected = torch.stack([by_pil(*each[:2], size, each[2]) for each in zip(levels, boxes, flip, strict=True)])
    result = resized_crops(levels.float() / 255, boxes, size, flip)
    assert (255 * (result - expected)).abs().max() < 1.5
    assert (255 * (result - expected)).abs().mean() < 0.4
    assert result.min() >= 0 and result.max() <= 1


def test_narrow_boxes_and_whole_images():
    images = noise(4)
    narrow = torch.tensor([[0, 0, 1, 1], [31, 31, 1, 1], [5, 0, 1, 32], [0, 7, 32, 2]])
    result = resized_crops(images, narrow, 32)
    torch.testing.assert_close(result[0], images[0, :, :1, :1].expand(3, 32, 32))
    torch.testing.assert_close(result[1], images[1, :, 31:, 31:].expand(3, 32, 32))
    assert result.isfinite().all()
    whole = torch.tensor([[0, 0, 32, 32]]).repeat(4, 1)
    torch.testing.assert_close(resized_crops(images, whole, 32), images, rtol=0, atol=1e-6)
    mirrored = resized_crops(images, whole, 32, torch.ones(4, dtype=torch.bool))
    torch.testing.assert_close(mirrored, images.flip(3), rtol=0, atol=1e-6)


@settings(max_examples=30, deadline=None)
@given(level=st.floats(0, 1), seed=st.integers(0, 1000), size=st.integers(1, 40))
def test_a_constant_image_stays_constant(level, seed, size):
    images = torch.full((3, 3, 20, 20), level)
    result = resized_crops(images, crop_boxes(uniforms(3, seed), 20, 20), size)
    torch.testing.assert_close(result, torch.full((3, 3, size, size), level), rtol=0, atol=1e-5)


def test_nothing_outside_of_the_box_is_seen_and_the_crop_is_differentiable():
    images, box = (0.3 + 0.4 * noise(2, 8, 8)).double().requires_grad_(), torch.tensor([[2, 1, 4, 5], [0, 3, 8, 4]])
    (slope,) = torch.autograd.grad(resized_crops(images, box, 8).sum(), images)
    inside = torch.zeros(2, 8, 8, dtype=torch.bool)
    inside[0, 2:6, 1:6] = inside[1, :, 3:7] = True
    assert not slope[:, 0][~inside].any() and slope[:, 0][inside].all()
    assert gradcheck(lambda x: resized_crops(x, box, 5), images, check_forward_ad=True)


def test_a_crop_does_not_depend_on_its_company():
    images, boxes = noise(40), crop_boxes(uniforms(40), 32, 32)
    together = resized_crops(images, boxes, 32)
    torch.testing.assert_close(resized_crops(images[7:8], boxes[7:8], 32), together[7:8], rtol=0, atol=1e-6)
    assert torch.equal(crop_boxes(uniforms(40)[7:8], 32, 32), boxes[7:8])
