"Networks and the recording of activations."

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dainv.models import build_model, record


@pytest.mark.parametrize(
    ("name", "n_classes", "in_size", "count"),
    [
        ("allcnn", 10, 32, 1_372_254),
        ("allcnn", 100, 32, 1_372_254 + 90 * (192 + 1 + 2)),
        ("allcnn_large", 200, 64, 8_564_416),
    ],
)
def test_the_number_of_parameters_is_the_published_one(name, n_classes, in_size, count):
    model = build_model(name, n_classes, in_size=in_size)
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(count, rel=1e-3 if "large" in name else 0)


def test_the_sizes_of_the_maps():
    model = build_model("allcnn_large", 200, width=0.05, in_size=64)
    with record(model, model.measured) as activations:
        model(torch.rand(2, 3, 64, 64))
    assert [a.shape[-1] for a in activations.values()] == [32, 32, 16, 16, 16, 8, 8, 8, 4, 4, 4, 4]


def test_a_network_is_convolution_norm_relu_nine_times_then_the_mean():
    model = build_model("allcnn", 10, width=0.1).eval()
    x = expected = torch.rand(2, 3, 32, 32)
    for name in model.measured:
        block = getattr(model, name)
        stride = block.conv.stride[0]
        padding = block.conv.kernel_size[0] // 2
        padded = F.pad(expected, (0, 1, 0, 1)) if stride == 2 else F.pad(expected, (padding,) * 4)
        z = F.conv2d(padded, block.conv.weight, block.conv.bias, stride)
        norm = block.norm
        shape = (1, -1, 1, 1)
        z = (z - norm.running_mean.view(shape)) / (norm.running_var.view(shape) + 1.001e-5).sqrt()
        expected = (z * norm.weight.view(shape) + norm.bias.view(shape)).clamp_min(0)
    torch.testing.assert_close(model(x), expected.mean((2, 3)), rtol=1e-4, atol=1e-5)


def test_batch_normalisation_moves_as_in_keras():
    norms = [m for m in build_model("allcnn", 10, width=0.1).modules() if isinstance(m, nn.BatchNorm2d)]
    assert {(n.momentum, n.eps) for n in norms} == {(0.01, 1.001e-5)}


def test_weights_start_glorot_uniform_and_biases_at_zero():
    conv = build_model("allcnn", 10).conv5.conv
    limit = (6 / (9 * (192 + 192))) ** 0.5
    assert conv.weight.abs().max().item() <= limit * 1.0001 and conv.weight.std().item() == pytest.approx(
        limit / 3**0.5, rel=0.01
    )
    assert not conv.bias.any()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("alexnet", 10), "alexnet"),
        (("allcnn", 1), "n_classes=1"),
        (("allcnn", 10, 0.0), "width"),
        (("allcnn", 10, 1.0, 4), "in_size=4"),
    ],
)
def test_impossible_networks_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        build_model(*arguments)


def test_recording_leaves_no_hooks_and_keeps_the_graph():
    model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    x = torch.rand(5, 4)
    with record(model, ["1"]) as activations:
        model(x)
    activations["1"].sum().backward()
    assert model[0].weight.grad is not None and not any(m._forward_hooks for m in model.modules())
    with pytest.raises(ValueError, match="'3'.*known: 0, 1, 2"), record(model, ["0", "3"]):
        pass
    assert not any(m._forward_hooks for m in model.modules())
