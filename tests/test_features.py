"What layers return: recording, layouts, rows, and what does not vary."

import gc
import weakref
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from torch.utils.checkpoint import checkpoint

from dainv.features import (
    LayerReader,
    Layout,
    as_rows,
    check_finite,
    evaluating,
    find_layouts,
    network_output,
    only_tensor,
    pooled,
    record,
    varies,
)


def pictures(n=2, size=32):
    return torch.rand(n, 3, size, size, generator=torch.Generator().manual_seed(n))


class InPlace(nn.Module):
    "Overwrites what its layers return in four ways."

    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.shortcut, self.last = (
            nn.Conv2d(3, 4, 3, padding=1),
            nn.BatchNorm2d(4),
            nn.Conv2d(3, 4, 1),
            nn.Conv2d(4, 4, 1),
        )
        self.fc = nn.Linear(4, 5)

    def forward(self, x):
        y = self.norm(F.relu(self.conv(x), inplace=True))
        y += self.shortcut(x)
        z = self.last(y)
        z[:, 0].mul_(3)
        z.data.add_(0)
        return self.fc(z.mean((2, 3)))


LAYERS = ["conv", "norm", "shortcut", "last", "fc"]


def by_hand(model, layers, x):
    "Copies made in hooks of their own."
    kept, modules = {}, dict(model.named_modules())
    hooks = [
        modules[layer].register_forward_hook(lambda m, a, out, layer=layer: kept.update({layer: out.clone()}))
        for layer in layers
    ]
    model(x)
    for hook in hooks:
        hook.remove()
    return kept


@pytest.mark.parametrize("mode", ["grad", "no_grad", "inference", "frozen"])
def test_recorded_is_what_the_layer_returned_pass_after_pass(mode):
    torch.manual_seed(0)
    model = InPlace().train(mode == "grad").requires_grad_(mode != "frozen")
    context = dict(no_grad=torch.no_grad, inference=torch.inference_mode).get(mode, torch.enable_grad)
    with context(), record(model, LAYERS) as activations:
        for number in range(3):
            x = pictures(2 + number)
            model(x)
            recorded = dict(activations)
            expected = by_hand(model, LAYERS, x)
            assert list(recorded) == LAYERS
            for layer in LAYERS:
                assert torch.equal(recorded[layer], expected[layer]), (layer, number)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("layer", LAYERS)
def test_gradients_of_recorded_values_are_those_of_the_layer(layer):
    torch.manual_seed(0)
    model, x = InPlace(), pictures(3)
    parameters = [p for p in model.parameters()]
    with record(model, LAYERS) as activations:
        for _ in range(3):
            loss = model(x).square().sum() + activations[layer].square().sum()
            slopes = torch.autograd.grad(loss, parameters)
            kept = {}
            module = model.get_submodule(layer)
            hook = module.register_forward_hook(lambda m, a, out, kept=kept: kept.update(out=out.clone()))
            loss = model(x).square().sum() + kept["out"].square().sum()
            hook.remove()
            for slope, expected in zip(slopes, torch.autograd.grad(loss, parameters), strict=True):
                torch.testing.assert_close(slope, expected)


def test_training_copies_only_what_is_overwritten():
    model, x = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(inplace=True), nn.Conv2d(4, 4, 3)), pictures()
    outputs = {}
    for index in (0, 2):
        model[index].register_forward_hook(lambda m, a, out, index=index: outputs.update({index: out}))
    with record(model, ["0", "2"]) as activations:
        model(x)
        model(x)
        assert activations["2"] is outputs[2] and activations["0"] is not outputs[0]


def test_a_layer_that_is_overwritten_in_a_later_pass_only_is_not_given_out():
    class Sometimes(nn.Sequential):
        overwrite = False

        def forward(self, x):
            x = self[0](x)
            return F.relu(x, inplace=self.overwrite)

    model = Sometimes(nn.Conv2d(3, 4, 3))
    with record(model, ["0"]) as activations:
        model(pictures())
        assert activations["0"].min() < 0
        model.overwrite = True
        model(pictures())
        with pytest.raises(ValueError, match="'0' was overwritten after it was recorded.*repeat this pass"):
            activations["0"]
        model(pictures())
        assert activations["0"].min() < 0


def test_networks_that_return_the_same_buffer():
    class Buffered(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("kept", torch.zeros(2, 3, 32, 32))

        def forward(self, x):
            return self.kept.copy_(x)

    model = nn.Sequential(Buffered(), nn.Flatten())
    with record(model, ["0"]) as activations, torch.no_grad():
        model(a := pictures())
        first = activations["0"]
        model(1 - a)
        assert torch.equal(first, a) and torch.equal(activations["0"], 1 - a)


class Several(nn.Module):
    "One module called three times, one never, one under two names, one that returns a tuple."

    def __init__(self):
        super().__init__()
        self.act, self.conv, self.unused = nn.ReLU(), nn.Conv2d(3, 3, 3, padding=1), nn.Linear(2, 2)
        self.same, self.lstm = self.conv, nn.LSTM(3, 4, batch_first=True)

    def forward(self, x):
        x = self.act(-self.act(self.conv(self.act(x - 0.5))))
        return self.lstm(x.flatten(2).transpose(1, 2))


def test_every_call_is_to_be_had_and_none_silently():
    model = Several()
    with record(model, ["act", "act#1", "act#2", "act#4", "unused", "same", "conv", "lstm", "lstm[0]"]) as activations:
        model(pictures())
    with pytest.raises(ValueError, match="'act' is called 3 times in a pass: choose one of act#1, act#2, act#3"):
        activations["act"]
    assert torch.equal(activations["act#1"], (pictures() - 0.5).relu())
    assert torch.equal(activations["act#3"], torch.zeros(2, 3, 32, 32))
    assert torch.equal(activations["same"], activations["conv"])
    with pytest.raises(ValueError, match=r"'act' is called 3 time\(s\)"):
        activations["act#4"]
    with pytest.raises(ValueError, match="'unused' takes no part"):
        activations["unused"]
    with pytest.raises(ValueError, match=r"returns a tuple.*choose one of lstm\[0\], lstm\[1\]\[0\], lstm\[1\]\[1\]"):
        activations["lstm"]
    assert activations["lstm[0]"].shape == (2, 1024, 4)


@dataclass
class Output:
    logits: torch.Tensor
    loss: torch.Tensor | None = None


@pytest.mark.parametrize(
    "output", [lambda t: t, lambda t: (t, None), lambda t: [t], lambda t: dict(logits=t, n=3), lambda t: Output(t)]
)
def test_one_tensor_inside_is_taken(output):
    tensor = torch.rand(2, 5)
    assert only_tensor(output(tensor), "head") is tensor


@pytest.mark.parametrize(
    ("output", "path", "message"),
    [
        (None, "", "returns a NoneType, not a tensor of floats"),
        (torch.arange(3), "", "returns torch.int64"),
        (dict(a=torch.ones(2), b=torch.ones(2)), "", r"choose one of head\[\"a\"\], head\[\"b\"\]"),
        (Output(torch.ones(1), torch.ones(1)), "", r"choose one of head\[\"logits\"\], head\[\"loss\"\]"),
        ((torch.ones(2),), "[3]", r"does not return \[3\]; there are head\[0\]"),
    ],
)
def test_outputs_that_are_not_one_tensor(output, path, message):
    with pytest.raises(ValueError, match=message):
        only_tensor(output, "head" + path, path)
    assert only_tensor(Output(torch.ones(1), torch.zeros(1)), 'head["loss"]', '["loss"]') == 0


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointed_layers_are_recorded_once(reentrant):
    class Checkpointed(nn.Sequential):
        def forward(self, x):
            return checkpoint(super().forward, x, use_reentrant=reentrant)

    model, x = Checkpointed(nn.Conv2d(3, 4, 3), nn.ReLU()), pictures().requires_grad_()
    with record(model, ["0"]) as activations:
        out = model(x)
        value = activations["0"]
        out.sum().backward()
        assert activations["0"] is value and value.requires_grad == (not reentrant)


@pytest.mark.parametrize(
    "wrap",
    [
        nn.DataParallel,
        torch.optim.swa_utils.AveragedModel,
        lambda m: torch.compile(m, backend="eager"),
        lambda m: nn.DataParallel(torch.compile(m, backend="eager")),
    ],
)
def test_names_through_wrappers(wrap):
    inner = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()).eval()
    model, x = wrap(inner), pictures()
    with torch.no_grad():
        model(x)
    for name in ("0", "module.0", "_orig_mod.0"):
        with record(model, [name]) as activations, torch.no_grad():
            model(x)
        torch.testing.assert_close(activations[name], inner[0](x))
    assert list(find_layouts(model, x)) == ["0", "1"]


def test_what_cannot_be_recorded_says_so():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())
    traced = torch.jit.trace(model, pictures())
    for scripted, layers in ((traced, ["0"]), (nn.Sequential(traced), ["0"])):
        with pytest.raises(ValueError, match="TorchScript.*made from"), record(scripted, layers):
            pass
    with pytest.raises(TypeError, match="torch.nn.Module is expected, not a function"), record(lambda x: x, ["0"]):
        pass
    with pytest.raises(ValueError, match=r"write \['0'\]"), record(model, "0"):
        pass
    with pytest.raises(ValueError, match="'relu' is not in the model; known: 0, 1"), record(model, ["relu"]):
        pass


def test_hooks_go_when_the_network_fails():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())
    with pytest.raises(RuntimeError, match="channels"), record(model, ["0"]):
        model(torch.rand(2, 5, 8, 8))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_nothing_but_the_last_pass_is_kept_alive():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())
    with record(model, ["0"]) as activations:
        model(pictures())
        first = weakref.ref(activations["0"])
        model(pictures())
        gc.collect()
        assert first() is None


class Tokens(nn.Module):
    "A transformer layer with the positions first or second, T of them, and a class token where asked for."

    def __init__(self, first=False, grid=4, class_token=False):
        super().__init__()
        self.first, self.patch = first, nn.Conv2d(3, 16, 32 // grid, 32 // grid)
        self.token = nn.Parameter(torch.randn(1, 1, 16)) if class_token else None
        self.encoder = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=not first)

    def forward(self, x):
        tokens = self.patch(x).flatten(2).transpose(1, 2)
        if self.token is not None:
            tokens = torch.cat([self.token.expand(len(x), -1, -1), tokens], 1)
        if self.first:
            return self.encoder(tokens.transpose(0, 1)).mean(0)
        return self.encoder(tokens).mean(1)


@pytest.mark.parametrize("n", [2, 3, 16, 17])
@pytest.mark.parametrize("class_token", [False, True])
def test_positions_first_or_second_are_the_same_rows(n, class_token):
    torch.manual_seed(0)
    right, other = Tokens(False, class_token=class_token), Tokens(True, class_token=class_token)
    other.load_state_dict(right.state_dict())
    x = pictures(n)
    rows, means, classes = [], [], []
    for model in (right, other):
        with LayerReader(model, x, ["encoder"]) as reader:
            found = reader(x)["encoder"]
            rows.append(as_rows(found, n, "encoder", reader.layouts["encoder"]))
            means.append(reader.pooled(x)["encoder"])
            if class_token:
                classes.append(reader.pooled(x, tokens="class")["encoder"])
    assert rows[0].shape == (n, (16 + class_token) * 16) and means[0].shape == (n, 16)
    for a, b in (rows, means, *([classes] if class_token else [])):
        torch.testing.assert_close(a, b)
    tokens = rows[0].view(n, -1, 16)
    torch.testing.assert_close(means[0], tokens[:, int(class_token) :].mean(1))
    if class_token:
        torch.testing.assert_close(classes[0], tokens[:, 0])


class Windows(nn.Module):
    "Windows of maps, those of an image together or those of a place; or a table that no image is in."

    def __init__(self, kind):
        super().__init__()
        self.kind, self.conv, self.window = kind, nn.Conv2d(3, 6, 4, 4), nn.Identity()

    def forward(self, x):
        x = self.conv(x).permute(0, 2, 3, 1)
        n, h, w, c = x.shape
        x = x.reshape(n, h // 2, 2, w // 2, 2, c).permute(0, 1, 3, 2, 4, 5).reshape(n, -1, 4, c)
        if self.kind == "image":
            return self.window(x.flatten(0, 1)).view(n, -1, 4, c).mean((1, 2))
        if self.kind == "place":
            return self.window(x.transpose(0, 1).flatten(0, 1)).view(-1, n, 4, c).mean((0, 2))
        if self.kind == "none":
            return self.window(x.mean(0)).mean()
        if self.kind == "pairs":
            x = x.flatten(1)
            return self.window(x @ x.T).mean(1)
        return self.window(x[torch.randperm(n)].flatten(0, 1)).mean(1)


@pytest.mark.parametrize("kind", ["image", "place"])
def test_windows_are_rows_of_their_images(kind):
    torch.manual_seed(0)
    model, x = Windows(kind), pictures(4)
    with LayerReader(model, x, ["conv", "window"]) as reader:
        rows, means = reader.rows(x), reader.pooled(x)
    assert rows["window"].shape == (4, 16 * 4 * 6) and means["window"].shape == (4, 6)
    torch.testing.assert_close(rows["window"].sort(1).values, rows["conv"].sort(1).values)
    torch.testing.assert_close(means["window"], means["conv"])


@pytest.mark.parametrize("kind", ["none", "pairs"])
def test_rows_that_are_not_images_are_refused(kind):
    with pytest.raises(ValueError, match="layer 'window' gives .* for 2 images .* for 3: its rows are not images"):
        find_layouts(Windows(kind), pictures(), ["window"])


def channels(model, x, layers):
    return {layer: layout.channels for layer, layout in find_layouts(model, x, layers).items()}


def test_channels_last_parts_are_found():
    swin = torchvision.models.swin_transformer.SwinTransformer([4, 4], 8, [1, 1], [2, 2], [4, 4], num_classes=5)
    found = channels(swin, pictures(size=32), ["features.0.0", "features.1", "features.1.0.norm1", "permute", "head"])
    assert list(found.values()) == [1, 3, 3, 1, 1]  # maps of 8 x 8 with 8 channels
    settings = [torchvision.models.convnext.CNBlockConfig(8, None, 2)]
    convnext = torchvision.models.ConvNeXt(settings, num_classes=5)
    found = channels(convnext, pictures(), ["features.0", "features.1", "features.1.0.block.2", "features.1.0.block.5"])
    assert list(found.values()) == [1, 1, 3, 3]


@pytest.mark.parametrize("name", ["resnet18", "densenet121", "mobilenet_v2", "efficientnet_b0", "squeezenet1_0"])
def test_convolutional_networks_have_channels_second(name):
    model, x = getattr(torchvision.models, name)(num_classes=5).eval(), pictures(2, 64)
    layouts = find_layouts(model, x)
    assert len(layouts) >= 2 and all((v.batch, v.rows, v.channels) == (0, 1, 1) for v in layouts.values())


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "deit_tiny_distilled_patch16_224", "mixer_s16_224"])
def test_tokens_of_timm(name):
    timm = pytest.importorskip("timm")
    model = timm.create_model(name, num_classes=5, img_size=32)
    layout = find_layouts(model, pictures(), ["blocks"])["blocks"]
    assert layout == Layout(0, 2, tokens=({"vit": 1, "dei": 2, "mix": 0}[name[:3]], 0))


def test_default_layers_take_part_in_the_pass():
    assert list(find_layouts(Several(), pictures())) == [
        *("act#1", "act#2", "act#3", "conv"),
        *("lstm[0]", "lstm[1][0]", "lstm[1][1]"),
    ]

    class Listed(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks, self.loss = nn.ModuleList(nn.Conv2d(3, 3, 1) for _ in range(3)), nn.CrossEntropyLoss()

        def forward(self, x):
            for block in self.blocks:
                x = block(x)
            return x

    assert list(find_layouts(Listed(), pictures())) == ["blocks.0", "blocks.1", "blocks.2"]
    googlenet = torchvision.models.googlenet(num_classes=5, aux_logits=True, init_weights=False)
    assert not {"aux1", "aux2"} & set(find_layouts(googlenet, pictures()))


def test_without_a_layout_what_is_unclear_is_refused():
    maps, tokens = torch.rand(4, 8, 5, 5), torch.rand(4, 9, 8)
    torch.testing.assert_close(pooled(maps, 4, "conv"), maps.mean((2, 3)))
    torch.testing.assert_close(as_rows(tokens, 4, "encoder"), tokens.flatten(1))
    for call, message in (
        (lambda: pooled(maps.permute(0, 2, 3, 1), 4, "norm"), "which axis holds the channels"),
        (lambda: pooled(tokens, 4, "encoder"), "which axis holds the channels"),
        (lambda: as_rows(tokens, 9, "encoder"), "its rows are not images"),
        (lambda: as_rows(torch.rand(4, 4, 8), 4, "encoder"), "axis 0 or 1"),
        (lambda: pooled(maps, 4, "conv", Layout(0, 1), "class"), "without a class token"),
        (lambda: pooled(maps, 4, "conv", tokens="cls"), "known: patches, class, all"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def test_rows_keep_their_order_when_the_memory_format_changes():
    class Changing(nn.Module):
        def forward(self, x):
            return x.contiguous(memory_format=torch.channels_last) if len(x) > 2 else x.contiguous()

    model, x = nn.Sequential(Changing(), nn.Flatten()), pictures(5)
    with LayerReader(model, x, ["0"]) as reader:
        together = reader.rows(x)["0"]
        parts = torch.cat([reader.rows(part)["0"] for part in x.split(2)])
    assert torch.equal(together, parts)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_networks_of_other_types(dtype):
    model, x = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(3600, 5)).to(dtype), pictures()
    with LayerReader(model, x) as reader:
        rows = reader.rows(x)
        pooled_rows = reader.pooled(x)
    assert reader.dtypes["0"] == dtype
    assert {r.dtype for r in rows.values()} == {torch.promote_types(dtype, torch.float32)}
    torch.testing.assert_close(pooled_rows["0"], rows["0"].view(2, 4, -1).mean(2), rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore")
def test_quantised_networks():
    model = nn.Sequential(nn.Flatten(), nn.Linear(3072, 8), nn.ReLU(), nn.Linear(8, 5)).eval()
    quantised = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
    with LayerReader(quantised, pictures()) as reader:
        rows = reader.rows(pictures())
    with torch.no_grad():
        expected = model[1](pictures().flatten(1))
    torch.testing.assert_close(rows["1"], expected, rtol=0.1, atol=0.05)


def test_reading_leaves_everything_as_it_was():
    class Keeping(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.mask = nn.Conv2d(3, 4, 3), None

        def forward(self, x):
            x -= 0.45
            x = self.conv(x)
            if self.mask is None:
                self.mask = torch.full_like(x[:1], 0.9)
            return (x * self.mask).mean((2, 3))

    model, x = Keeping().train(), pictures()
    mine = x.clone()
    with torch.inference_mode(), LayerReader(model, x) as reader:
        reader.rows(x)
        assert not torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
    assert torch.equal(x, mine) and model.training and model.conv.training
    model(mine).sum().backward()
    assert model.conv.weight.grad is not None


def test_a_network_that_fails_says_where_the_noise_comes_from():
    with pytest.raises(RuntimeError) as caught:
        find_layouts(nn.Sequential(nn.Linear(5, 5)), pictures())
    assert any("images of noise" in note for note in caught.value.__notes__)


def test_not_finite_is_named():
    rows = torch.zeros(4, 3)
    assert check_finite(rows, "conv") is rows
    rows[2, 1], rows[3, 0] = torch.inf, torch.nan
    with pytest.raises(ValueError, match=r"layer 'conv': the activations of image 12 are not finite \(2 of 4"):
        check_finite(rows, "conv", first=10)


@pytest.mark.parametrize("size", [1e-20, 1e-3, 1.0, 1e6, 1e15])
def test_what_varies_does_not_depend_on_the_scale(size):
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(50, 40, generator=generator, dtype=torch.float64)
    for spread, expected in ((0, False), (1e-7, False), (1e-5, True), (1.0, True)):
        rows = (size * (1 + spread * noise)).float().double()
        variance = (rows - rows.mean(0)).square().sum(1).mean()
        assert varies(variance, rows.square().sum(1).mean()) == expected, spread


def test_half_precision_varies_by_more_than_a_step():
    rows = 1 + torch.randn(50, 40, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for spread, expected in ((1e-3, False), (0.1, True)):
        part = (1 + spread * (rows - 1)).bfloat16().double()
        variance = (part - part.mean(0)).square().sum(1).mean()
        assert varies(variance, part.square().sum(1).mean(), torch.bfloat16) == expected


def test_preprocessing_and_devices_of_network_output():
    model = nn.Sequential(nn.Flatten(), nn.Linear(3072, 5))
    x = pictures()
    doubled = network_output(model, x, lambda images: images.mul_(2))
    torch.testing.assert_close(doubled, model(2 * x))
    assert torch.equal(x, pictures())


def test_modes_come_back():
    model = nn.Sequential(nn.Dropout(), nn.Dropout())
    model[1].eval()
    with evaluating(model):
        assert not model[0].training
    assert model[0].training and not model[1].training
