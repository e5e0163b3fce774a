"Networks and the recording of activations."

import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from torch.autograd import forward_ad as fwAD

from dainv.models import ENCODERS, MODELS, build_encoder, build_model, evaluating, record

RESNETS = ["resnet18", "resnet50"]


@pytest.mark.parametrize(
    ("name", "n_classes", "in_size", "count"),
    [
        ("allcnn", 10, 32, 1_372_254),
        ("allcnn", 100, 32, 1_372_254 + 90 * (192 + 1 + 2)),
        ("allcnn_large", 200, 64, 8_561_752),
        ("wrn", 10, 32, 36_229_610),
        ("wrn", 200, 64, 36_229_610 - 641 * 10 + (4 * 640 + 1) * 200),
        ("densenet", 10, 32, 769_162),
        ("densenet", 200, 64, 769_162 + 343 * 190),
        ("resnet18", 10, 32, 11_168_832 + 513 * 10),
        ("resnet50", 100, 32, 23_500_352 + 2049 * 100),
    ],
)
def test_the_number_of_parameters_is_the_published_one(name, n_classes, in_size, count):
    with torch.device("meta"):
        model = build_model(name, n_classes, in_size=in_size)
    assert sum(p.numel() for p in model.parameters()) == count


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
        (dict(name="alexnet"), "alexnet.*allcnn, allcnn_large, wrn, densenet, resnet18, resnet50"),
        (dict(n_classes=1), "n_classes=1"),
        (dict(width=0.0), "width=0.0"),
        (dict(width=float("nan")), "width=nan"),
        (dict(width=float("inf")), "width=inf"),
        (dict(in_size=4), "in_size=4"),
        (dict(depth=9), "depth=9: allcnn is built one way only; it is an option of wrn, densenet"),
        (dict(name="resnet18", depth=18), "depth=18: resnet18 is built one way only"),
        (dict(name="resnet50", in_size=7), "in_size=7"),
        (dict(name="small"), "model='small' is unknown"),
        (dict(name="wrn", depth=27), r"depth=27.*6 n \+ 4"),
        (dict(name="wrn", depth=4), "depth=4"),
        (dict(name="densenet", depth=-2), "depth=-2"),
        (dict(name="densenet", depth=101), r"depth=101.*6 n \+ 4"),
    ],
)
def test_impossible_networks_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        build_model(**(dict(name="allcnn", n_classes=10) | arguments))


def test_a_linear_top_is_a_plain_convolution_with_the_same_weights():
    torch.manual_seed(0)
    usual = build_model("allcnn", 5, width=0.1)
    torch.manual_seed(0)
    model = build_model("allcnn", 5, width=0.1, linear_top=True)
    assert torch.equal(model.conv9.weight, usual.conv9.conv.weight) and not model.conv9.bias.any()
    assert model.measured == usual.measured and model.class_layer == "conv9"
    others = [key for key in usual.state_dict() if not key.startswith("conv9")]
    assert list(model.state_dict()) == [*others, "conv9.weight", "conv9.bias"]
    with record(model, ["conv8", "conv9"]) as activations:
        logits = model(torch.rand(4, 3, 32, 32))
    torch.testing.assert_close(activations["conv9"], F.conv2d(activations["conv8"], model.conv9.weight))
    torch.testing.assert_close(activations["conv9"].mean((2, 3)), logits)
    assert logits.min() < 0


@pytest.mark.parametrize("name", ["wrn", "densenet", *RESNETS])
def test_a_linear_top_is_refused_where_the_classifier_is_linear_anyway(name):
    with pytest.raises(
        ValueError, match="linear_top=True: .* is built one way only; it is an option of allcnn, allcnn_large"
    ):
        build_model(name, 5, width=0.1, depth=0 if name in RESNETS else 10, linear_top=True)


def by_hand(norm, x, training):
    "Batch normalisation from its definition; running statistics unless training."
    mean, var = (
        (x.mean((0, 2, 3)), x.var((0, 2, 3), correction=0)) if training else (norm.running_mean, norm.running_var)
    )
    shape = (1, -1, 1, 1)
    z = (x - mean.view(shape)) / (var.view(shape) + 1.001e-5).sqrt()
    return z * norm.weight.view(shape) + norm.bias.view(shape)


def wrn_by_hand(model, x, training):
    "Measured activations and logits of a wide residual network, 32 x 32 pixels, each in memory of its own."
    measured = {}
    x = F.conv2d(x, model.conv1.weight, model.conv1.bias, padding=1)
    for name in model.measured:
        block = getattr(model, name)
        conv1, conv2 = block.conv1, block.conv2
        z = by_hand(block.norm1, x, training).clamp_min(0)
        if strided := conv1.stride == (2, 2):
            z = F.conv2d(F.pad(z, (0, 1, 0, 1)), conv1.weight, conv1.bias, stride=2)
        else:
            z = F.conv2d(z, conv1.weight, conv1.bias, padding=1)
        z = F.conv2d(by_hand(block.norm2, z, training).clamp_min(0), conv2.weight, conv2.bias, padding=1)
        if strided:
            x = (x[..., ::2, ::2] + x[..., 1::2, ::2] + x[..., ::2, 1::2] + x[..., 1::2, 1::2]) / 4
        before = -(-(z.shape[1] - x.shape[1]) // 2)
        total = z.clone()
        total[:, before : before + x.shape[1]] += x
        x = measured[name] = total
    return measured, model.fc(by_hand(model.norm, x, training).clamp_min(0).mean((2, 3)))


def densenet_by_hand(model, x, training):
    "Measured activations and logits of a DenseNet, each in memory of its own."
    x = F.conv2d(x, model.conv1.weight, padding=1)
    measured = {"conv1": x}
    for number in (1, 2, 3):
        for unit in getattr(model, f"block{number}"):
            z = F.conv2d(by_hand(unit.norm1, x, training).clamp_min(0), unit.conv1.weight)
            z = F.conv2d(by_hand(unit.norm2, z, training).clamp_min(0), unit.conv2.weight, padding=1)
            x = torch.cat([x, z], 1)
        measured[f"block{number}"] = x
        if number < 3:
            norm, _, conv, _ = getattr(model, f"transition{number}")
            z = F.conv2d(by_hand(norm, x, training).clamp_min(0), conv.weight)
            x = (z[..., ::2, ::2] + z[..., 1::2, ::2] + z[..., ::2, 1::2] + z[..., 1::2, 1::2]) / 4
    return measured, model.fc(by_hand(model.norm, x, training).mean((2, 3)))


def small(name, in_size=32, depth=16):
    "A small network whose batch normalisation has something to do."
    torch.manual_seed(0)
    depth = depth if name in ("wrn", "densenet") else 0
    width = dict(wrn=0.17, densenet=0.25).get(name, 0.05)  # 0.17: an odd number of new channels
    model = build_model(name, 5, width=width, in_size=in_size, depth=depth)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for values in (module.weight.data, module.bias.data, module.running_mean, module.running_var):
                values.add_(torch.rand_like(values) - 0.5)
    return model.to(memory_format=torch.channels_last)


def pictures(n=4, in_size=32):
    return torch.rand(n, 3, in_size, in_size).contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(("name", "reference"), [("wrn", wrn_by_hand), ("densenet", densenet_by_hand)])
def test_a_network_and_its_measuring_points_are_those_of_the_definition(name, reference, training):
    model, x = small(name).train(training), pictures()
    expected, logits = reference(model, x, training)
    with record(model, model.measured) as activations:
        torch.testing.assert_close(model(x), logits, rtol=1e-3, atol=1e-4)
    assert list(activations) == list(expected)
    for layer, activation in activations.items():
        torch.testing.assert_close(activation, expected[layer], rtol=1e-3, atol=1e-4)
        assert activation.min() < 0


@pytest.mark.parametrize("name", MODELS)
def test_no_layer_is_overwritten_after_it_was_recorded(name):
    model, x, copies = small(name).train(), pictures(), {}
    layers = [layer for layer, _ in model.named_modules() if layer]
    hooks = [
        module.register_forward_hook(
            lambda module, arguments, output, layer=layer: copies.update({layer: output.clone()})
        )
        for layer, module in model.named_modules()
        if layer
    ]
    with record(model, layers) as activations:
        model(x)
    for hook in hooks:
        hook.remove()
    called_once = [layer for layer in layers if layer in activations]
    assert len(called_once) > 0.8 * len(layers)
    assert all(torch.equal(activations[layer], copies[layer]) for layer in called_once)


def test_layers_before_an_in_place_relu_are_recorded_as_they_were():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(inplace=True), nn.BatchNorm2d(4), nn.ReLU())
    x = pictures()
    with record(model, ["0", "1"]) as activations:
        model(x)
        torch.testing.assert_close(activations["0"], F.conv2d(x, model[0].weight, model[0].bias))
        assert torch.equal(activations["1"], activations["0"].clamp_min(0))
    assert (model[1].inplace, model[3].inplace) == (True, False)
    with pytest.raises(RuntimeError, match="channels"), record(model, ["0"]):
        model(x[:, :2])
    assert model[1].inplace


@pytest.mark.parametrize("name", MODELS)
def test_the_gradient_flows_through_recorded_activations(name):
    model = small(name).train()
    with record(model, model.measured) as activations:
        model(pictures())
    for layer, activation in activations.items():
        model.zero_grad()
        activation.square().mean().backward(retain_graph=True)
        assert next(model.parameters()).grad.any(), layer
    top = model.get_submodule(model.measured[-1])
    assert all(p.grad is not None and p.grad.isfinite().all() for p in top.parameters())


@pytest.mark.parametrize("name", MODELS)
def test_activations_stay_in_channels_last(name):
    model = small(name).train()
    with record(model, model.measured) as activations:
        model(pictures())
    assert all(a.is_contiguous(memory_format=torch.channels_last) for a in activations.values())


@pytest.mark.parametrize(
    ("name", "training"),
    [("allcnn", True), ("wrn", True), ("wrn", False), ("densenet", True), ("densenet", False), ("resnet18", True)],
)
def test_a_recorded_pass_is_one_graph(name, training):
    model, x = small(name, depth=10), pictures()
    model.train(training)

    def loss(x):
        logits = model(x)
        return logits.square().mean() + sum(a.square().mean() for a in activations.values()), dict(activations)

    parameters = list(model.parameters())
    with record(model, model.measured) as activations:
        expected, recorded = loss(x)
        slopes = torch.autograd.grad(expected, parameters)
        activations.clear()
        value, compiled = torch.compile(loss, fullgraph=True, backend="aot_eager" if training else "eager")(x)
        torch.testing.assert_close(value, expected)
    assert list(compiled) == model.measured
    for layer in model.measured:
        torch.testing.assert_close(compiled[layer], recorded[layer], rtol=1e-4, atol=1e-5)
    for slope, other in zip(slopes, torch.autograd.grad(value, parameters), strict=True):
        torch.testing.assert_close(slope, other, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("in_size", [8, 28, 30, 33, 48, 64, 100, 128])
@pytest.mark.parametrize("name", ["wrn", "densenet", *RESNETS])
def test_images_of_any_size(name, in_size):
    model = small(name, in_size, depth=10)
    assert model(pictures(2, in_size)).shape == (2, 5)
    with pytest.raises(ValueError, match=rf"built for \(N, 3, {in_size}, {in_size}\)"):
        model(pictures(2, in_size + 1))


@pytest.mark.parametrize(
    ("in_size", "windows", "size"), [(32, 1, 8), (64, 4, 8), (128, 16, 8), (28, 1, 7), (48, 1, 12), (8, 1, 2)]
)
def test_the_classifier_of_the_wide_residual_network_sees_all_of_the_last_maps(in_size, windows, size):
    model = small("wrn", in_size, depth=10)
    assert (model.fc.in_features, model.window) == (windows * model.norm.num_features, size)
    with record(model, ["norm"]) as activations, evaluating(model):
        logits = model(pictures(1, in_size))
    side = round(windows**0.5)
    cells = activations["norm"].relu().unflatten(3, (side, size)).unflatten(2, (side, size)).mean((3, 5))
    torch.testing.assert_close(model.fc(cells.flatten(1)), logits)


@pytest.mark.parametrize(
    ("name", "width", "depth", "channels"),
    [
        ("wrn", 1.0, 16, [160, 160, 320, 320, 640, 640]),
        ("wrn", 0.05, 10, [8, 16, 32]),
        ("wrn", 1e-3, 10, [1, 1, 1]),
        ("wrn", 0.17, 10, [27, 54, 109]),
        ("densenet", 1.0, 40, [24, 96, 120, 132]),
        ("densenet", 10 / 3, 10, [80, 120, 100, 90]),
        ("densenet", 1e-3, 10, [2, 3, 2, 2]),
    ],
)
def test_width_and_depth_of_the_networks(name, width, depth, channels):
    with torch.device("meta"):
        model = build_model(name, 10, width, depth=depth)
        with record(model, model.measured) as activations:
            model(torch.rand(1, 3, 32, 32))
    assert [a.shape[1] for a in activations.values()] == channels
    assert isinstance(model.fc, nn.Linear) and model.class_layer is None


@pytest.mark.parametrize("name", ["wrn", "densenet"])
def test_weights_start_he_normal_and_the_norms_as_in_keras(name):
    torch.manual_seed(0)
    model = build_model(name, 100, width=0.5 if name == "wrn" else 3.0, depth=10)
    for path, layer in model.named_modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            expected = (2 / layer.weight[0].numel()) ** 0.5
            error = 5 / layer.weight.numel() ** 0.5
            assert layer.weight.std().item() == pytest.approx(expected, rel=error), path
            assert layer.weight.abs().max() > 2 * expected, "uniform"
            assert layer.bias is None or not layer.bias.any()
            assert (layer.bias is not None) == (name == "wrn" or path == "fc"), path
    norms = {(m.momentum, m.eps) for m in model.modules() if isinstance(m, nn.BatchNorm2d)}
    assert norms == {(0.01, 1.001e-5)}


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


def torchvisions(name, n_classes=5):
    "The network of torchvision with the stem for small images."
    network = getattr(torchvision.models, name)(num_classes=n_classes)
    network.conv1, network.maxpool = nn.Conv2d(3, 64, 3, padding=1, bias=False), nn.Identity()
    return network


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", RESNETS)
def test_a_resnet_is_torchvisions_with_another_stem(name, training):
    torch.manual_seed(0)
    theirs, ours, encoder = torchvisions(name), build_model(name, 5), build_encoder(name)
    ours.load_state_dict(theirs.state_dict())
    encoder.load_state_dict({key: value for key, value in theirs.state_dict().items() if not key.startswith("fc")})
    x, networks = pictures(3), [network.train(training) for network in (theirs, ours, encoder)]
    assert ours.measured == ["relu", "layer1", "layer2", "layer3", "layer4"] and ours.class_layer is None
    with record(theirs, ours.measured) as expected, record(ours, ours.measured) as recorded:
        logits, result, features = (network(x) for network in networks)
    torch.testing.assert_close(result, logits, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(theirs.fc(features), logits, rtol=1e-3, atol=1e-3)
    assert list(recorded) == ours.measured
    for layer in ours.measured:
        torch.testing.assert_close(recorded[layer], expected[layer], rtol=1e-3, atol=1e-3)
        assert recorded[layer].min() >= 0
    assert [a.shape[-1] for a in recorded.values()] == [32, 32, 16, 8, 4]


@pytest.mark.parametrize("name", RESNETS)
def test_the_weights_of_a_resnet_start_as_torchvisions(name):
    torch.manual_seed(0)
    model = build_model(name, 100, width=0.5)
    for path, layer in model.named_modules():
        if isinstance(layer, nn.Conv2d):
            expected = (2 / (layer.out_channels * layer.kernel_size[0] ** 2)) ** 0.5
            assert layer.weight.std().item() == pytest.approx(expected, rel=6 / layer.weight.numel() ** 0.5), path
            assert layer.bias is None
        if isinstance(layer, nn.BatchNorm2d):
            assert (layer.weight == 1).all() and not layer.bias.any() and (layer.momentum, layer.eps) == (0.1, 1e-5)


@pytest.mark.parametrize(
    ("name", "width", "channels"),
    [
        ("resnet18", 0.25, [16, 16, 32, 64, 128]),
        ("resnet18", 1e-3, [1] * 5),
        ("resnet18", 2, [128, 128, 256, 512, 1024]),
        ("resnet50", 0.3, [19, 76, 152, 308, 616]),
        ("small", 0.25, [4, 8, 16, 16]),
        ("small", 1e-3, [1] * 4),
        ("small", 2, [32, 64, 128, 128]),
    ],
)
def test_the_width_of_an_encoder(name, width, channels):
    with torch.device("meta"):
        encoder = build_encoder(name, width, 16)
        with record(encoder, encoder.measured) as activations:
            features = encoder(torch.rand(2, 3, 16, 16))
    assert [a.shape[1] for a in activations.values()] == channels
    assert features.shape == (2, encoder.n_features) == (2, channels[-1])


def test_the_small_encoder_is_that_of_the_definition():
    torch.manual_seed(0)
    encoder = build_encoder("small", in_size=16)
    expected = x = torch.rand(8, 3, 16, 16)
    for name, stride in zip(encoder.measured, (1, 2, 2, 1), strict=True):
        conv, norm, _ = getattr(encoder, name)
        z = F.conv2d(expected, conv.weight, stride=stride, padding=1)
        mean, var = z.mean((0, 2, 3), keepdim=True), z.var((0, 2, 3), correction=0, keepdim=True)
        assert (norm.momentum, norm.eps) == (0.1, 1e-5) and norm.weight.all()
        expected = ((z - mean) / (var + 1e-5).sqrt()).clamp_min(0)
    torch.testing.assert_close(encoder(x), expected.mean((2, 3)), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", ENCODERS)
def test_an_encoder_has_second_derivatives_and_those_in_forward_mode(name, training):
    torch.manual_seed(0)
    encoder = build_encoder(name, 0.25 if name == "small" else 0.06, 16).double().train(training)
    x, direction = torch.rand(16, 3, 16, 16).double(), 0.1 * torch.randn(16, 3, 16, 16).double()
    alpha = torch.zeros(16, dtype=torch.float64, requires_grad=True)

    def loss(alpha):
        return F.normalize(encoder(x + alpha[:, None, None, None] * direction)).cumsum(1).sin().sum()

    (slope,) = torch.autograd.grad(loss(alpha), alpha, create_graph=True)
    weights = torch.autograd.grad(slope.square().sum(), list(encoder.parameters()), allow_unused=True)
    assert all(w is None or w.isfinite().all() for w in weights) and weights[0].any()
    with fwAD.dual_level():
        dual = loss(fwAD.make_dual(alpha.detach(), torch.ones_like(alpha)))
        torch.testing.assert_close(fwAD.unpack_dual(dual).tangent, slope.sum().detach())
    step = 1e-7  # a deep network at its start is rough
    difference = (loss(alpha.detach() + step) - loss(alpha.detach() - step)) / (2 * step)
    torch.testing.assert_close(difference, slope.sum().detach(), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", ENCODERS)
def test_an_encoder_is_measured_and_evaluated_like_a_model(name):
    encoder = build_encoder(name, 0.1, 16).to(memory_format=torch.channels_last).train()
    with record(encoder, encoder.measured) as activations:
        features = encoder(pictures(4, 16))
    assert encoder.class_layer is None and features.shape == (4, encoder.n_features)
    torch.testing.assert_close(activations[encoder.measured[-1]].mean((2, 3)), features)
    with evaluating(encoder), torch.no_grad():
        assert torch.equal(encoder(pictures(2, 16) * 0), encoder(pictures(2, 16) * 0))
    with pytest.raises(ValueError, match=r"built for \(N, 3, 16, 16\)"):
        encoder(pictures(4, 32))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(name="allcnn"), "encoder='allcnn' is unknown; known: resnet18, resnet50, small"),
        (dict(width=0), "width=0"),
        (dict(width=float("nan")), "width=nan"),
        (dict(in_size=7), "in_size=7: small needs images of at least 8 x 8"),
    ],
)
def test_impossible_encoders_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        build_encoder(**(dict(name="small") | arguments))


def variances(name, **options):
    "Per convolution of All-CNN: its weights' variance times the number of inputs of a unit, and the bound of |weight|."
    model = build_model(name, 10, **options)
    convs = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
    assert not any(conv.bias.any() for conv in convs)
    inputs = [conv.in_channels * conv.kernel_size[0] ** 2 for conv in convs]
    outputs = [conv.out_channels * conv.kernel_size[0] ** 2 for conv in convs]
    return convs, inputs, outputs


@pytest.mark.parametrize("init", ["glorot", "he", "glorot_normal", "he_normal"])
@pytest.mark.parametrize("gain", [1.0, 1.3])
def test_the_law_of_the_initial_weights(init, gain):
    torch.manual_seed(0)
    for conv, fan_in, fan_out in zip(*variances("allcnn", init=init, init_gain=gain, batch_norm=False), strict=True):
        deviation = gain * (2 / (fan_in if init.startswith("he") else (fan_in + fan_out) / 2)) ** 0.5
        deviation /= 1 if init.startswith("he") else 2**0.5
        assert conv.weight.std().item() == pytest.approx(deviation, rel=0.06)
        largest = conv.weight.abs().max().item() / deviation
        assert largest > 3**0.5 + 0.5 if init.endswith("normal") else 1.6 < largest <= 3**0.5 + 1e-5


@pytest.mark.parametrize("kind", [False, "inference"])
def test_without_effective_batch_normalisation_the_initial_weights_are_the_same(kind):
    found = []
    for batch_norm in (True, kind):
        torch.manual_seed(3)
        state = build_model("allcnn", 10, width=0.1, batch_norm=batch_norm).state_dict()
        found.append({name: value for name, value in state.items() if ".conv." in name})
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_no_batch_normalisation_is_convolution_and_relu():
    model, x = build_model("allcnn", 10, width=0.1, batch_norm=False, init="he").train(), torch.rand(4, 3, 32, 32)
    expected = x
    for name in model.measured:
        expected = getattr(model, name).conv(expected).relu()
    assert torch.equal(model(x), expected.mean((2, 3)))
    assert not any("norm" in name for name in model.state_dict())


def test_fixed_statistics_stay_while_scale_and_shift_learn():
    torch.manual_seed(0)
    model, plain = (build_model("allcnn", 10, width=0.1, batch_norm=kind, init="he") for kind in ("inference", False))
    plain.load_state_dict({n: v for n, v in model.state_dict().items() if ".conv." in n})
    x = torch.rand(4, 3, 32, 32)
    torch.testing.assert_close(model.train()(x), plain(x), rtol=1e-3, atol=1e-5)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    F.cross_entropy(model(x), torch.arange(4)).backward()
    optimizer.step()
    after, trained = model.state_dict(), model(x)
    for name in after:
        statistic = name.split(".")[-1] in ("running_mean", "running_var", "num_batches_tracked")
        assert torch.equal(before[name], after[name]) == statistic, name
    assert torch.equal(trained, model.eval()(x))


def test_a_network_with_batch_normalisation_goes_on_with_the_statistics_that_it_has():
    torch.manual_seed(0)
    model, x = build_model("allcnn", 10, width=0.1), torch.rand(8, 3, 32, 32)
    for _ in range(20):
        model(x)
    fixed = build_model("allcnn", 10, width=0.1, batch_norm="inference").train()
    fixed.load_state_dict(model.state_dict())
    torch.testing.assert_close(fixed(x), model.eval()(x))


@pytest.mark.parametrize("name", ["allcnn", "allcnn_large"])
@pytest.mark.parametrize(("padding", "mode"), [("replicate", "edge"), ("reflect", "reflect"), ("circular", "wrap")])
def test_padding_is_that_of_numpy(name, padding, mode):
    plain, padded = (build_model(name, 3, width=0.05, padding=how).eval() for how in ("zeros", padding))
    padded.load_state_dict(plain.state_dict())
    x = torch.rand(2, 3, 32, 32)
    for block in padded.children():
        conv = block.conv
        width = ((0, 0), (0, 0), *[conv.pad[:2] if conv.pad else (0, 0)] * 2)
        expected = F.conv2d(torch.from_numpy(np.pad(x.numpy(), width, mode)), conv.weight, conv.bias, conv.stride)
        torch.testing.assert_close(conv(x), expected)
        x = block(x).detach()


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("allcnn", dict(batch_norm="yes"), "batch_norm='yes'.*True, False or 'inference'"),
        ("allcnn", dict(batch_norm=None), "batch_norm=None"),
        ("allcnn", dict(init="xavier"), "init='xavier'.*glorot, he"),
        ("allcnn", dict(init_gain=0.0), "init_gain=0.0"),
        ("allcnn", dict(padding="mirror"), "padding='mirror'.*zeros, replicate"),
        ("resnet18", dict(padding="reflect"), "padding=.* is built one way only; it is an option of allcnn"),
        ("allcnn", dict(init_gain=float("nan")), "init_gain=nan"),
        ("wrn", dict(batch_norm=False), "batch_norm=.* is built one way only; it is an option of allcnn"),
        ("resnet18", dict(init="he"), "init=.* is built one way only; it is an option of allcnn"),
        ("densenet", dict(init_gain=2.0), "init_gain=.* is built one way only; it is an option of allcnn"),
    ],
)
def test_impossible_readings_are_named(name, options, message):
    with pytest.raises(ValueError, match=message):
        build_model(name, 10, width=0.1, **options)


def test_few_channels_do_not_corrupt_memory():
    """On processors without AVX-512 the strided kernel of 1 x 1 convolutions did, and ended the process."""
    program = """
import torch
from dainv.models import build_encoder
for _ in range(8):
    network = build_encoder("resnet18", 0.1, in_size=8).to(memory_format=torch.channels_last)
    images = torch.rand(16, 3, 8, 8).contiguous(memory_format=torch.channels_last)
    network(images).square().sum().backward()
    kept = [torch.empty(n) for n in range(1, 2000, 7)]
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-500:]
