"Known answers of audits, and what must hold whatever the network and the images are."

import warnings

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

from dainv import Report, audit
from dainv.auditing import batch_dependence
from dainv.augment import draw_views, scheme, transform
from dainv.collapse import border_share
from dainv.equivariance import image_derivative, local_equivariance
from dainv.families import FunctionFamily, families, kind_families
from dainv.points import find_points, measuring_points
from dainv.spirograph import spirograph_classes

QUICK = dict(progress=False, untrained=0, equivariance=False)


@pytest.fixture(scope="module")
def drawings():
    "Drawings uint8 (24, 3, 16, 16) and their labels."
    return [part[:24] for part in spirograph_classes(n_train=30, n_test=10, size=16, seed=0)[:2]]


def small(padding_mode="zeros", pool=True):
    "A convolutional network with random weights."
    torch.manual_seed(1)
    head = (
        [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 4)] if pool else [nn.Flatten(), nn.Linear(6 * 16 * 16, 4)]
    )
    return nn.Sequential(nn.Conv2d(3, 6, 3, padding=1, padding_mode=padding_mode), nn.ReLU(), *head).eval()


class Turned(nn.Module):
    "A network averaged over four quarter turns of its input."

    def __init__(self):
        super().__init__()
        self.inner, self.out = small(pool=False), nn.Identity()

    def forward(self, x):
        return self.out(sum(self.inner(x.rot90(k, (2, 3))) for k in range(4)) / 4)


def of(report, layer, transformation, column="score"):
    table = report.scores
    return table[(table.layer == layer) & (table.transformation == transformation)][column].item()


def test_a_network_averaged_over_quarter_turns_is_invariant_to_them_and_not_to_45_degrees(drawings):
    images, _ = drawings
    between = scheme("none", rotation=45, law="extremes")
    report = audit(
        Turned().eval(), images, layers=["out"], transformations=["quarter_turn", dict(half=between)], **QUICK
    )
    assert of(report, "out", "quarter_turn") == pytest.approx(1, abs=1e-6)
    assert of(report, "input", "quarter_turn") < 0.9
    assert of(report, "out", "half") < 0.999


def test_cyclic_convolution_and_global_pooling_are_exactly_invariant_to_cyclic_shifts(drawings):
    images, _ = drawings
    report = audit(small("circular"), images, layers="all", transformations="exact", **QUICK)
    assert of(report, "4", "roll") == pytest.approx(1, abs=1e-5)
    assert of(report, "1", "roll") < 0.95  # the maps move
    assert of(report, "1", "roll", "aligned") > of(report, "1", "roll") + 0.03  # with the image
    stride = nn.Sequential(
        nn.Conv2d(3, 6, 3, 2, 1, padding_mode="circular"), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    )
    assert of(audit(stride, images, layers="all", transformations="roll", **QUICK), "3", "roll") < 0.99999


def test_an_untrained_convolution_moves_with_the_image_though_it_is_not_invariant(drawings):
    images, _ = drawings
    found = local_equivariance(small("circular"), images, ["0"], cyclic=True).set_index(["layer", "kind"])
    assert found.error["0", "shift_rows"] < 1e-8
    assert found.change["0", "shift_rows"] > 0.01
    assert of(audit(small("circular"), images, layers=["0"], transformations="roll", **QUICK), "0", "roll") < 0.95


def test_the_lie_derivative_of_a_linear_map_is_its_analytic_one(drawings):
    images, x = drawings[0], drawings[0].double() / 255
    torch.manual_seed(0)
    linear = nn.Sequential(nn.Flatten(), nn.Linear(768, 5))
    found = local_equivariance(linear, images, ["1"]).set_index(["layer", "kind"])
    weight, out = linear[1].weight.double(), linear.double()(x)
    scatter = (out - out.mean(0)).square().sum()
    for kind in ("shift_cols", "rotation", "scale", "brightness", "contrast"):
        expected = (image_derivative(x, kind).flatten(1) @ weight.T).square().sum() / scatter
        assert found.error["1", kind] == pytest.approx(expected.item(), rel=1e-3)
        assert found.error["1", kind] == found.change["1", kind]
    assert (
        found.error["input"][["shift_rows", "rotation", "scale"]]
        < 1e-6 * found.change["input"][["shift_rows", "rotation", "scale"]]
    ).all()


def test_the_interval_of_a_local_equivariance_error_is_over_images(drawings):
    columns = ["error", "error_low", "error_high"]
    tables = [local_equivariance(small(), drawings[0], ["0"], ["rotation"], batch_size=size) for size in (24, 5)]
    whole, split = (table.set_index("layer").loc["0", columns].astype(float) for table in tables)
    assert 0 < whole.error_low < whole.error < whole.error_high
    assert np.allclose(whole, split, rtol=1e-4)


def test_scores_are_those_of_the_definition(drawings):
    images, labels = drawings
    network, chosen = small(pool=False), scheme("half_heavier_extremes")
    report = audit(
        network, images, labels=labels, layers="all", transformations="half_heavier_extremes", repeats=3, **QUICK
    )
    ids, x, double = torch.arange(24), images.double() / 255, small(pool=False).double()
    points = {"input": lambda x: x, **{f"{k}": double[: k + 1] for k in (0, 1, 2, 3)}}
    for layer, part in points.items():
        still = part(x).flatten(1)
        between = torch.cdist(still, still).square().mean(1)
        expected = []
        for repeat in range(3):
            moved = part(transform(images, draw_views(chosen, ids, repeat, 0, 0)).double()).flatten(1)
            expected.append(1 - (moved - still).square().sum(1) / between)
        expected = torch.stack(expected).mean(0)
        k = report.header["layers"].index(layer)
        order = torch.from_numpy(report.arrays["image_ids"])
        torch.testing.assert_close(
            torch.from_numpy(report.arrays["image_scores"][0, k]).double(), expected[order], atol=1e-5, rtol=0
        )
        assert of(report, layer, "half_heavier_extremes") == pytest.approx(expected.mean().item(), abs=1e-5)


def test_the_report_does_not_depend_on_batches_or_on_how_images_are_given(drawings):
    images, labels = drawings
    ways = [images, images.numpy(), images.float() / 255, images.permute(0, 2, 3, 1).numpy()]
    ways += [
        torch.utils.data.TensorDataset(images, labels),
        DataLoader(torch.utils.data.TensorDataset(images), batch_size=5),
    ]
    ways += [lambda: iter(images.split(7)), list(images)]
    noisy = FunctionFamily("noise", function=lambda x: x + 0.1 * torch.randn_like(x))
    tables = []
    for number, way in enumerate(ways):
        report = audit(small(), way, transformations=["kinds", noisy], batch_size=4 + number, **QUICK)
        tables.append(report.scores[["score", "median", "whole"]].to_numpy())
        np.testing.assert_allclose(tables[-1], tables[0], atol=2e-5)


def test_images_of_one_channel_and_of_other_shapes(drawings):
    grey = drawings[0][:, :1, :, :11]
    network = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    report = audit(
        network, grey, transformations=["kinds", "flip", "shift_exact"], progress=False, untrained=1, control_images=8
    )
    assert report.scores.score.notna().all() and "hue" not in set(report.equivariance.kind)
    with pytest.raises(ValueError, match="cannot be turned by a quarter"):
        audit(network, grey, transformations="quarter_turn", **QUICK)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.rand(8, 3, 16, 16) * 255, "say so with pixels='0-255'"),
        (torch.randn(8, 3, 16, 16), "seems to be normalised"),
        (torch.rand(8, 3, 16, 16).where(torch.arange(8)[:, None, None, None] != 5, torch.nan), "image 5 holds NaN"),
        (torch.rand(1, 3, 16, 16), "at least 2 are needed"),
        (torch.rand(3, 16, 16), "expected"),
        (iter([torch.rand(4, 3, 16, 16)]), "cannot be gone through twice"),
        ("no such folder", "is not a folder"),
    ],
)
def test_images_that_cannot_be_used_are_named(images, message):
    with pytest.raises((ValueError, TypeError), match=message):
        audit(small(), images, **QUICK)


def test_grey_levels_are_taken_at_the_users_word(drawings):
    images, _ = drawings
    a = audit(small(), images, transformations="rotation", **QUICK).scores.score
    b = audit(small(), images.float(), transformations="rotation", pixels="0-255", **QUICK).scores.score
    np.testing.assert_allclose(a, b, atol=1e-6)


class Shaky(Dataset):
    "Random augmentation inside a data set."

    def __len__(self):
        return 8

    def __getitem__(self, index):
        return torch.rand(3, 16, 16), 0


def test_images_that_change_between_passes_are_refused():
    with pytest.raises(ValueError, match="not the same in the second pass"):
        audit(small(), Shaky(), transformations="flip", **QUICK)


def test_images_without_contrast_are_named(drawings):
    images = drawings[0].clone()
    images[13] = 7
    report = audit(small(), images, transformations="flip", **QUICK)
    assert report.header["constant_images"] == [13]
    assert any("number 13" in note for note in report.header["notes"])


class Blind(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.constant, self.line = nn.Conv2d(3, 6, 3), nn.Identity(), nn.Identity()

    def forward(self, x):
        x = self.conv(x)
        brightness = x.mean((1, 2, 3))[:, None]
        direction = torch.linspace(1, 2, 8)
        return self.constant(torch.full((len(x), 5), 0.3))[:, :1] + self.line(brightness * direction)


def test_a_constant_layer_has_no_score_and_a_collapsed_one_is_flagged(drawings):
    torch.manual_seed(0)
    report = audit(Blind().eval(), drawings[0], layers=["conv", "constant", "line"], transformations=["flip"], **QUICK)
    layers = report.layers.set_index("layer")
    assert np.isnan(of(report, "constant", "flip")) and not layers.varies["constant"] and layers.dead["constant"] == 1
    assert "same for every image" in layers.sentence["constant"]
    assert layers.collapsed["line"] and not layers.collapsed["conv"]
    assert "collapsed" in layers.sentence["line"]
    assert layers.pc1_share["line"] == pytest.approx(1, abs=1e-4)


class Bordered(nn.Module):
    "Maps, the same with a first row of great variance, in either memory format, and their means."

    def __init__(self):
        super().__init__()
        self.conv, self.marked, self.last = nn.Conv2d(3, 6, 3, padding=1), nn.Identity(), nn.Identity()
        self.pooled = nn.Identity()

    def forward(self, x):
        x = self.conv(x)
        rows = self.marked(torch.cat([100 * x[:, :, :1], x[:, :, 1:]], 2))
        return self.pooled(self.last(rows.to(memory_format=torch.channels_last)).mean((2, 3)))


def test_a_layer_whose_variance_lies_in_the_border_of_its_maps_is_named(drawings):
    torch.manual_seed(0)
    model, images = Bordered().eval(), drawings[0]
    report = audit(model, images, layers=["conv", "marked", "last", "pooled"], transformations=["flip"], **QUICK)
    layers = report.layers.set_index("layer")
    with torch.no_grad():
        maps = model.conv(images / 255)
    margin = images.shape[-1] // 8
    assert layers.border_share["conv"] == pytest.approx(border_share(maps, margin), rel=1e-4)
    assert layers.border_area["conv"] == pytest.approx(1 - 0.75**2)
    assert layers.border_share["marked"] > 0.95
    assert layers.border_share["last"] == pytest.approx(layers.border_share["marked"], rel=1e-5)
    assert "in the border of its maps, 44% of their area" in layers.sentence["marked"]
    assert "border" not in layers.sentence["conv"] and np.isnan(layers.border_share["pooled"])


@pytest.mark.parametrize("layers", ["top_level", "blocks", "all"])
def test_a_network_without_maps(drawings, layers):
    torch.manual_seed(0)
    size = drawings[0].shape[-1]
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * size**2, 20), nn.ReLU(), nn.Linear(20, 4)).eval()
    report = audit(model, drawings[0], layers=layers, transformations=["flip"], **QUICK)
    found = report.layers.set_index("layer")
    assert {"input", "2", "3"} <= set(found.index) and found.n_units["2"] == 20
    assert found.border_share.drop("input").drop("0", errors="ignore").isna().all() and found.varies.all()
    rows = [model[:3](x / 255) for x in (drawings[0], drawings[0].flip(3))]
    still, moved = (x.detach().double() for x in rows)
    spread = (still - still.mean(0)).square().sum(1)
    expected = (1 - (still - moved).square().sum(1) / (spread + spread.mean())).mean().item()
    assert of(report, "2", "flip") == pytest.approx(expected, abs=1e-4)


def test_controls_score_what_they_must(drawings):
    images, labels = drawings
    report = audit(
        small(),
        images.repeat(4, 1, 1, 1) ^ torch.arange(96, dtype=torch.uint8)[:, None, None, None] % 4,
        transformations="flip",
        **QUICK,
    )
    assert (report.layers.identity == 1).all()
    assert report.layers.others.abs().max() < 0.25


def test_only_images_that_change_are_passed_again(drawings):
    half = scheme("none", flip=0.5)
    report = audit(small(), drawings[0], transformations=dict(half=half, none=scheme("none")), repeats=4, **QUICK)
    full = 24 * (2 + 4 + 4)
    assert report.header["passes"] < 24 * (2 + 4 * 0.75) + 24 + 2 < full
    assert (report.scores[report.scores.transformation == "none"].score == 1).all()


def test_everything_is_put_back_after_an_error(drawings):
    network = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(inplace=True), nn.Dropout(0.5), nn.Flatten())
    network.train()
    network[1].eval()
    network[0].weight.requires_grad_(False)
    before = [(m.training, len(m._forward_hooks), len(m._forward_pre_hooks)) for m in network.modules()]
    weights = {name: value.clone() for name, value in network.state_dict().items()}
    images, calls = drawings[0].clone(), []

    def fails(x):
        calls.append(1)
        torch.rand(1)
        if len(calls) > 12:
            raise KeyError("no more")
        return x + 0.01

    torch.manual_seed(5)
    np.random.seed(5)  # noqa: NPY002
    states = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    for transformations, error in ((dict(bad=fails), KeyError), ("flip", None)):
        if error:
            with pytest.raises(error):
                audit(network, images, transformations=transformations, **QUICK)
        else:
            audit(network, images, transformations=transformations, progress=False, untrained=1, control_images=4)
        assert [(m.training, len(m._forward_hooks), len(m._forward_pre_hooks)) for m in network.modules()] == before
        assert all(torch.equal(weights[name], value) for name, value in network.state_dict().items())
        assert not network[0].weight.requires_grad and network[1].weight.requires_grad and torch.is_grad_enabled()
        assert torch.equal(states[0], torch.get_rng_state()) and (np.random.get_state()[1] == states[1]).all()  # noqa: NPY002
        assert torch.equal(images, drawings[0])
    network(images.float()).sum().backward()


class Spoils(nn.Module):
    "Works in place on what it is given, as a normalisation or a first activation may."

    def __init__(self, inplace):
        super().__init__()
        self.conv, self.inplace = nn.Conv2d(3, 6, 3), inplace

    def forward(self, x):
        x = x.mul_(2).sub_(1) if self.inplace else x * 2 - 1
        y = self.conv(x)
        y = y.relu_() if self.inplace else y.relu()
        return y.flatten(1)


def test_networks_that_work_in_place_are_measured_like_others(drawings):
    def preprocess(x):
        return x.sub_(0.5)

    reports = []
    for inplace in (True, False):
        torch.manual_seed(0)
        reports.append(
            audit(
                Spoils(inplace), drawings[0], layers=["conv"], preprocess=preprocess, transformations="kinds", **QUICK
            )
        )
    pd.testing.assert_frame_equal(reports[0].scores, reports[1].scores)


class Several(nn.Module):
    "An activation used twice, an output with logits."

    def __init__(self):
        super().__init__()
        self.conv, self.act, self.fc = nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Linear(6, 4)
        self.aux = nn.Linear(6, 2)

    def forward(self, x):
        x = self.act(self.conv(self.act(x))).mean((2, 3))
        return dict(features=x, logits=self.fc(x))


def test_modules_used_twice_and_networks_that_return_dictionaries(drawings):
    report = audit(Several().eval(), drawings[0], layers="top_level", transformations="rotation", **QUICK)
    assert {"act#1", "act#2", "fc"} <= set(report.header["layers"])
    assert any(note.startswith("aux was left out") for note in report.header["notes"])
    assert report.predictions.flip_rate.between(0, 1).all()
    with pytest.raises(ValueError, match="aux"):
        audit(Several().eval(), drawings[0], layers=["aux"], transformations="rotation", **QUICK)


@pytest.mark.parametrize("wrap", [nn.DataParallel, lambda m: torch.compile(m, backend="eager")])
def test_wrapped_networks_give_what_is_inside(drawings, wrap):
    network = small()
    if wrap is not nn.DataParallel:
        with torch.no_grad():
            wrap(network)(torch.rand(2, 3, 16, 16))
    inside = audit(network, drawings[0], transformations="rotation", **QUICK)
    wrapped = audit(wrap(network), drawings[0], transformations="rotation", **QUICK)
    pd.testing.assert_frame_equal(inside.scores, wrapped.scores)
    assert inside.header["weights"] == wrapped.header["weights"]


def test_scripted_networks_are_refused(drawings):
    with pytest.raises((TypeError, ValueError), match="script"):
        audit(torch.jit.trace(small(), torch.rand(1, 3, 16, 16)), drawings[0], **QUICK)


class FirstForAll(nn.Module):
    def forward(self, x):
        return x + x[:1]


def test_a_module_that_mixes_the_images_of_a_batch_is_named(drawings):
    network = nn.Sequential(nn.Conv2d(3, 4, 3), FirstForAll(), nn.Flatten(), nn.Linear(4 * 14 * 14, 3))
    report = audit(network, drawings[0], layers="all", transformations="flip", **QUICK)
    assert report.layers.set_index("layer").batch_dependent.to_dict() == {
        "input": False,
        "0": False,
        "1": True,
        "2": True,
        "3": True,
    }
    assert any("first in '1'" in note for note in report.header["notes"])
    found, why = batch_dependence(
        nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.BatchNorm1d(784)).train(), torch.rand(4, 3, 16, 16)
    )
    assert not found and not why  # in evaluation mode it uses running statistics


def test_a_random_network_fails_the_identity_control(drawings):
    class Noisy(nn.Module):
        def forward(self, x):
            return x + 0.3 * torch.randn_like(x)

    report = audit(
        nn.Sequential(nn.Conv2d(3, 4, 3), Noisy(), nn.Flatten()),
        drawings[0],
        layers="all",
        transformations="flip",
        **QUICK,
    )
    identity = report.layers.set_index("layer").identity
    assert identity["0"] == 1 and identity["1"] < 0.99


def test_untrained_copies_are_calibrated_and_networks_without_a_way_back_are_named(drawings):
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 3)
    )
    options = dict(layers="all", transformations=["rotation", "flip"], progress=False, equivariance=False)
    report = audit(network, drawings[0], untrained=3, control_images=16, **options)
    assert sorted(report.untrained["copy"].unique()) == [0, 1, 2]
    assert (report.scores.untrained_low <= report.scores.untrained_high).all()
    flip = report.untrained[(report.untrained.layer == "1") & (report.untrained.transformation == "flip")].score
    assert flip.nunique() == 3

    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.kernel = nn.Parameter(torch.randn(4, 3, 3, 3))
            self.out = nn.Identity()

        def forward(self, x):
            return self.out(nn.functional.conv2d(x, self.kernel)).mean((2, 3))

    report = audit(Own(), drawings[0], untrained=2, **options)
    assert "untrained" not in report.tables and any(
        "cannot be initialised again" in note for note in report.header["notes"]
    )
    report = audit(Own(), drawings[0], untrained=lambda seed: Own(), control_images=8, **options)
    assert report.untrained["copy"].nunique() == 3


def test_shares_of_a_layer_that_sees_brightness_alone(drawings):
    class Brightness(nn.Module):
        def __init__(self):
            super().__init__()
            self.mean = nn.Identity()

        def forward(self, x):
            return self.mean(x.mean((1, 2, 3))[:, None])

    middle = drawings[0] // 2 + 64  # far from black and white, so that nothing is clipped
    base = scheme("none", brightness=0.1, flip=0.5, law="uniform")
    report = audit(
        Brightness(),
        middle,
        layers=["mean"],
        base=base,
        transformations="kinds",
        sobol=True,
        progress=False,
        untrained=0,
    )
    shares = report.shares.set_index(["layer", "kind"])
    assert shares.total["mean", "brightness"] == pytest.approx(1, abs=1e-3)
    assert shares.first_order["mean", "brightness"] == pytest.approx(1, abs=1e-3)
    assert shares.total["mean", "flip"] == pytest.approx(0, abs=1e-3)
    assert shares.total["input", "flip"] > 0.1


def test_a_sweep_says_at_which_strength_the_score_falls_to_one_half(drawings):
    noise = kind_families(scheme("none", noise=(0, 0.25)), sweep=(0.25, 1, 8))
    report = audit(small(pool=False), drawings[0], layers=["0"], transformations=noise, repeats=2, **QUICK)
    strengths = report.strengths.set_index("layer")
    scores = report.scores[report.scores.layer == "0"].sort_values("strength")
    assert 0 < strengths.half_strength["0"] < 1.6
    around = np.interp(strengths.half_strength["0"], [0, *scores.strength], [1, *scores.score])
    assert around == pytest.approx(0.5, abs=1e-6)


def test_predictions_agree_with_counting(drawings):
    images, labels = drawings
    network = small()
    report = audit(network, images, labels=labels % 4, transformations="flip", **QUICK)
    with torch.no_grad():
        p, q = (network(x.float() / 255).softmax(1) for x in (images, images.flip(3)))
    flips = (p.argmax(1) != q.argmax(1)).float().mean().item()
    effective = torch.where(p.argmax(1) == q.argmax(1), (p.max(1).values * q.max(1).values).sqrt(), 0).mean().item()
    row = report.predictions.iloc[0]
    assert row.flip_rate == pytest.approx(flips, abs=1e-6)
    assert row.effective_invariance == pytest.approx(effective, abs=1e-5)
    assert row.accuracy == pytest.approx((q.argmax(1) == labels % 4).float().mean().item(), abs=1e-6)
    worst = report.worst.iloc[0]
    pictures = report.arrays["worst_pictures"][0]
    assert (pictures[0] == images[int(worst.image)].numpy()).all()
    assert (pictures[1] == images[int(worst.image)].flip(2).numpy()).all()


def test_a_report_is_saved_whole_and_read_back(drawings, tmp_path):
    report = audit(
        small(),
        drawings[0],
        labels=drawings[1],
        transformations=["kinds"],
        progress=False,
        untrained=1,
        control_images=8,
    )
    folder = report.save(tmp_path / "a" / "report")
    loaded = Report.load(folder)
    assert set(loaded.tables) == set(report.tables) and loaded.header["weights"] == report.header["weights"]
    for name, table in report.tables.items():
        pd.testing.assert_frame_equal(loaded.tables[name], table)
    np.testing.assert_array_equal(loaded.arrays["image_scores"], report.arrays["image_scores"])
    assert len(loaded.image_scores) == report.arrays["image_scores"].size
    report.save(folder)
    assert [p.name for p in folder.parent.iterdir()] == ["report"]
    (folder / "scores.parquet").write_bytes(b"broken")
    with pytest.raises(ValueError, match="damaged"):
        Report.load(folder)
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "holiday.jpg").write_bytes(b"")
    with pytest.raises(ValueError, match="other things"):
        report.save(tmp_path / "photos")
    assert (tmp_path / "photos" / "holiday.jpg").exists()


def test_functions_of_other_libraries_are_drawn_per_image(drawings):
    v2 = pytest.importorskip("torchvision.transforms.v2")
    kornia = pytest.importorskip("kornia")
    images = drawings[0].float() / 255
    given = dict(
        v2=v2.RandomRotation(30),
        kornia=kornia.augmentation.RandomAffine(20.0, p=1.0),
        numpy=lambda image: image[::-1].copy() if image.shape[2] == 3 else 1 / 0,
        albumentations=lambda *, image: dict(image=image * np.random.uniform(0.5, 1)),  # noqa: NPY002
    )
    for family in families(given):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            whole = family.apply(images, family.draw(torch.arange(24), 0, 0))
            part = family.apply(images[[5, 3]], family.draw(torch.tensor([5, 3]), 0, 0))
            other = family.apply(images, family.draw(torch.arange(24), 1, 0))
        torch.testing.assert_close(whole[[5, 3]], part)
        assert (whole - images).abs().max() > 0.01, family.name
        assert family.name == "numpy" or (whole - other).abs().max() > 0.01
    assert [family.on for family in families(given)] == ["auto"] * 4


def test_transformations_that_break_the_contract_are_named(drawings):
    for broken, message in (
        (lambda x: x[..., :-1], "same size|must keep the size|gives no image"),
        (lambda x: x / 0, "NaN or infinity"),
        (lambda x: None, "gives no image"),
    ):
        with pytest.raises(ValueError, match=message):
            audit(small(), drawings[0], transformations=dict(broken=broken), **QUICK)


def test_points_of_many_architectures():
    tv = pytest.importorskip("torchvision").models
    with torch.device("meta"):
        expected = dict(
            resnet18=10, densenet121=9, vit_b_16=14, swin_t=17, convnext_tiny=23, vgg11_bn=11, mobilenet_v2=20
        )
        assert {name: len(find_points(getattr(tv, name)())) for name in expected} == expected
    plain = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    assert find_points(plain) == ["1", "2"] and find_points(plain, "top_level") == ["0", "1", "2"] == find_points(
        plain, "all"
    )
    with pytest.raises(ValueError, match="no module"):
        find_points(plain, "layer*")
    layouts, _ = measuring_points(nn.Sequential(nn.Flatten(), plain), torch.rand(2, 1, 2, 2), "all")
    assert list(layouts) == ["0", "1.0", "1.1", "1.2"]


def test_a_network_that_diverges_is_named_with_layer_and_image(drawings):
    class Log(nn.Module):
        def forward(self, x):
            return (x.flatten(1).mean(1, keepdim=True) - x.flatten(1)).log()

    with pytest.raises(ValueError, match="'1'.*not finite"):
        audit(nn.Sequential(nn.Identity(), Log()), drawings[0], layers="all", transformations="flip", **QUICK)


def test_class_tokens_are_told_from_patches():
    class Tokens(nn.Module):
        "Patches and a class token that is a constant plus the brightness of the image."

        def __init__(self):
            super().__init__()
            self.patch, self.token, self.block = nn.Conv2d(3, 8, 4, 4), nn.Parameter(torch.ones(1, 1, 8)), nn.Identity()

        def forward(self, x):
            patches = self.patch(x).flatten(2).transpose(1, 2)
            tokens = torch.cat([self.token.expand(len(x), -1, -1), patches], 1)
            return self.block(tokens + patches.mean((1, 2), keepdim=True))

    torch.manual_seed(0)
    images = torch.rand(16, 3, 16, 16)
    report = audit(
        Tokens().eval(), images, layers=["block"], transformations=["rotation", "roll"], progress=False, untrained=1
    )
    assert report.header["layers"] == ["input", "block:class", "block:patches"]
    shapes = report.layers.set_index("layer")["shape"]
    assert shapes.to_dict() == {"input": "3 x 16 x 16", "block:class": "8", "block:patches": "16 x 8"}
    explained = report.equivariance.set_index(["layer", "kind"]).explained
    assert np.isnan(explained["block:class", "shift_rows"]) and np.isfinite(explained["block:patches", "shift_rows"])
    assert report.scores.score.notna().all()


def test_buffers_that_a_network_changes_are_put_back_and_named(drawings):
    class Counts(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 5, 3)
            self.register_buffer("seen", torch.zeros(()))

        def forward(self, x):
            self.seen += len(x)
            return self.conv(x).mean((2, 3))

    network = Counts()
    report = audit(network, drawings[0], transformations="flip", **QUICK)
    assert network.seen == 0
    assert any("changes its own weights or buffers" in note for note in report.header["notes"])


def test_parametrised_and_lazy_layers(drawings):
    normed = nn.Sequential(nn.utils.parametrizations.spectral_norm(nn.Conv2d(3, 4, 3)), nn.ReLU(), nn.Flatten())
    assert audit(normed, drawings[0], transformations="flip", **QUICK).header["layers"] == ["input", "1"]
    assert "0.parametrizations.weight" not in find_points(normed, "all")
    with pytest.raises(ValueError, match="lazy modules"):
        audit(nn.Sequential(nn.LazyConv2d(4, 3), nn.ReLU()), drawings[0], **QUICK)


def test_data_sets_of_mixed_sizes_need_a_size(drawings):
    mixed = [drawings[0][k, :, : 16 - k % 2 * 4].float() / 255 for k in range(6)]
    with pytest.raises(ValueError, match="give size="):
        audit(small(), mixed, transformations="flip", **QUICK)
    assert audit(small(), mixed, size=12, transformations="flip", **QUICK).header["image_shape"] == [3, 12, 12]
    whole = [(image * 255).round().to(torch.uint8) for image in mixed]
    assert audit(small(), whole, size=12, transformations="flip", **QUICK).header["image_shape"] == [3, 12, 12]
