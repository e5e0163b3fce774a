"""The one check of images, labels and strengths: what is taken, what is refused, and what the refusal says."""

import numpy as np
import pytest
import torch

from dainv.images import TOLERANCE, as_floats, as_tensor, check_images, check_labels, check_strength, network_input


@pytest.fixture
def pixels():
    return torch.rand(4, 3, 6, 5, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_floats_of_every_precision_are_taken(pixels, dtype):
    assert check_images(pixels.to(dtype)).dtype == dtype


def test_arrays_in_any_memory_layout(pixels):
    array = pixels.numpy()
    frozen = array.copy()
    frozen.flags.writeable = False
    channels_last = np.ascontiguousarray(array.transpose(0, 2, 3, 1)).transpose(0, 3, 1, 2)
    for given in (
        array,
        frozen,
        array.astype(">f4"),
        np.asfortranarray(array),
        channels_last,
        array[:, :, ::-1][:, :, ::-1],
    ):
        assert torch.equal(check_images(given), pixels)
    assert torch.equal(check_images(array[:, :, ::-1]), pixels.flip(2))
    record = np.zeros(4, dtype=[("tag", "u1"), ("image", "f4", (3, 6, 5))])
    record["image"] = array
    assert torch.equal(check_images(record["image"]), pixels)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda x: x * 255, "divide by 255"),
        (lambda x: (x - 0.45) / 0.25, "normalised"),
        (lambda x: x * 2 - 1, "normalised"),
        (lambda x: x / 0.25, "clamp them"),
        (lambda x: x + 2 * TOLERANCE, "expected floats in"),
        (lambda x: x.mul(255).long(), "torch.int64"),
        (lambda x: x > 0.5, "torch.bool"),
        (lambda x: x.to(torch.complex64), "torch.complex64"),
        (lambda x: x.permute(0, 2, 3, 1), "images.permute(0, 3, 1, 2)"),
        (lambda x: x[0].permute(1, 2, 0), "image.permute(2, 0, 1)[None]"),
        (lambda x: x[0], "images[None]"),
        (lambda x: x[:, :1], "expand"),
        (lambda x: torch.cat([x, x[:, :1]], 1), "images[:, :3]"),
        (lambda x: x[:0], "at least 1"),
        (lambda x: x[:, :, :0], "each with pixels"),
        (lambda x: x[None], "(1, 4, 3, 6, 5)"),
        (lambda x: x.to_sparse(), "dense"),
    ],
)
def test_what_is_no_image_in_unit_range_is_refused_with_advice(pixels, change, said):
    with pytest.raises(ValueError, match="images: ") as error:
        check_images(change(pixels.clamp(0.001, 1)))
    assert said in str(error.value)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_a_pixel_that_is_not_finite_names_its_image(pixels, bad):
    pixels[2, 1, 3, 3] = pixels[3, 0, 0, 0] = bad
    with pytest.raises(ValueError, match="photographs: image 2 holds NaN or infinity, as do 2 of 4"):
        check_images(pixels, "photographs")


@pytest.mark.parametrize("given", [[np.zeros((3, 4, 4))], "images.npy", None, 3])
def test_what_is_no_array_is_a_type_error(given):
    with pytest.raises(TypeError, match="images: a tensor or a NumPy array"):
        check_images(given)
    ragged = np.empty(2, dtype=object)
    with pytest.raises(TypeError, match="of one size"):
        check_images(ragged)


def test_a_pillow_image_is_told_where_its_channels_belong():
    from PIL import Image

    with pytest.raises(ValueError, match="permute"):
        check_images(Image.new("RGB", (5, 4)))


def test_rounding_over_the_ends_is_clamped_and_nothing_else_is_copied(pixels):
    assert check_images(pixels) is pixels
    over = pixels.clone()
    over[0, 0, 0, 0], over[0, 0, 0, 1] = 1 + TOLERANCE / 2, -TOLERANCE / 2
    found = check_images(over)
    assert found[0, 0, 0, :2].tolist() == [1.0, 0.0] and over[0, 0, 0, 0] > 1


def test_twice_divided_images_are_warned_of(pixels):
    with pytest.warns(UserWarning, match="divided by 255 twice"):
        check_images(pixels / 255)
    check_images(torch.zeros(1, 3, 2, 2))  # black is black


def test_only_floats_are_looked_at(pixels):
    assert check_images(pixels * 255, values=False).max() > 1
    assert check_images(pixels.flatten(1), channels=None).shape == (4, 90)


def test_gradients_pass_through(pixels):
    pixels.requires_grad_()
    network_input(as_floats(check_images(pixels)), lambda x: x.mul_(2)).sum().backward()
    assert torch.equal(pixels.grad, torch.full_like(pixels, 2))


def test_uint8_becomes_floats_without_touching_the_images():
    levels = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    assert torch.equal(as_floats(levels), torch.arange(256).view(1, 1, 16, 16) / 255)
    assert levels[0, 0, 15, 15] == 255


def test_the_input_of_a_network_is_a_copy(pixels):
    before = pixels.clone()
    network_input(pixels).zero_()
    network_input(pixels, lambda x: x.mul_(0))
    assert torch.equal(pixels, before)
    for wrong in (lambda x: x[:1], lambda x: x.numpy(), lambda x: None):
        with pytest.raises(ValueError, match="preprocess returns"):
            network_input(pixels, wrong)


@pytest.mark.parametrize(
    "given", [[1, 0, 2], (1, 0, 2), np.array([1, 0, 2]), np.array([1, 0, 2], np.uint16), torch.tensor([1, 0, 2]).byte()]
)
def test_labels_of_every_kind_become_int64(given):
    found = check_labels(given, 3, 3)
    assert found.dtype == torch.int64 and found.tolist() == [1, 0, 2]


def test_labels_are_a_copy():
    labels = torch.tensor([1, 0])
    check_labels(labels).zero_()
    assert labels.tolist() == [1, 0]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (torch.eye(3), "argmax"),
        (torch.zeros(3, 1, dtype=torch.int64), "one label per image"),
        (torch.zeros(2, dtype=torch.int64), r"expected \(3,\)"),
        (torch.zeros(3), "long"),
        (torch.zeros(3, dtype=torch.bool), "torch.bool"),
        ([0, 1, 3], r"0 to 3: expected 0\.\.2"),
        ([0, 1, -1], r"from -1 to 1"),
        (["a", "b", "c"], "classes.index"),
        ([[0], [1, 2], [0]], "one whole number"),
    ],
)
def test_labels_that_are_refused(given, said):
    with pytest.raises(ValueError, match=said):
        check_labels(given, 3, 3)


def test_strengths():
    assert check_strength([0, 0.5, 1]).tolist() == [0, 0.5, 1]
    assert check_strength(np.float32(0.5)).shape == () and check_strength(torch.tensor([0.25])).tolist() == [0.25]
    for wrong in (8, [0.1, 8], 1.0001, -0.1, float("nan"), float("inf"), [], [[0.1]], "a", None, True):
        with pytest.raises(ValueError, match="radius="):
            check_strength(wrong, "radius")


def test_arrays_are_shared_where_they_can_be(pixels):
    array = pixels.numpy()
    assert as_tensor(array, "x").data_ptr() == pixels.data_ptr()


def test_labels_features_and_parameters_may_be_arrays_everywhere(pixels):
    """An array or a list gives what the tensor gives."""
    from dainv.augment import draw, draw_views
    from dainv.collapse import variance_shares
    from dainv.colour import distort_colours, resized_crops
    from dainv.data import balanced_subset
    from dainv.nuisances import training_subset
    from dainv.probes import label_subset
    from dainv.representation import balanced_order, rdm

    labels, features = torch.arange(12) % 3, torch.rand(12, 5, generator=torch.Generator().manual_seed(1))
    for call in (
        lambda x: balanced_subset(x, 6),
        lambda x: label_subset(x, 0.5),
        lambda x: balanced_order(x, 2),
        lambda x: training_subset(x, 0.5),
        lambda x: draw_views("light", x, 0, 0, 0).key,
    ):
        assert torch.equal(call(labels.numpy()), call(labels))
    for call in (rdm, variance_shares, lambda x: training_subset(x, 0.5)):
        assert torch.equal(call(features.numpy()), call(features))
    assert len(draw("light", np.int64(3))) == 3
    alpha, boxes = torch.tensor([[1.1, 0.9, 1.0, 0.1]] * 4), torch.tensor([[0, 0, 4, 4]] * 4)
    assert torch.equal(distort_colours(pixels.numpy(), alpha.numpy()), distort_colours(pixels, alpha))
    assert torch.equal(resized_crops(pixels.numpy(), boxes.numpy(), 5), resized_crops(pixels, boxes, 5))
