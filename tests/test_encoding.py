"Features of views: which items, in which mode, the same in any company."

import pytest
import torch
from torch import nn

from dainv.data import load_data
from dainv.encoding import encode, encode_passes, some_items
from dainv.models import build_encoder
from dainv.pretraining import evaluate_online
from dainv.spirograph import spirograph_task
from dainv.views import ColourViews, SpirographViews


@pytest.fixture(scope="module")
def drawings():
    return SpirographViews(spirograph_task(60, 30, size=16))


@pytest.fixture(scope="module")
def encoder():
    torch.manual_seed(0)
    return build_encoder("small", 0.25, in_size=16)


def test_features_do_not_depend_on_the_batch_or_on_the_mode(drawings, encoder):
    encoder.train()
    before = [buffer.clone() for buffer in encoder.buffers()]
    whole = encode(encoder, drawings, "test", seed=3, precision="32-true")
    some = encode(encoder, drawings, "test", torch.tensor([4, 9]), seed=3, batch_size=1, precision="32-true")
    torch.testing.assert_close(some, whole[[4, 9]], rtol=1e-5, atol=1e-6)
    assert encoder.training and all(torch.equal(a, b) for a, b in zip(before, encoder.buffers(), strict=True))
    assert not whole.requires_grad and whole.shape == (30, encoder.n_features)


def test_passes_differ_and_begin_alike(drawings, encoder):
    exact = dict(precision="32-true")
    three, two = (list(encode_passes(encoder, drawings, "train", n, **exact)) for n in (3, 2))
    assert torch.equal(three[0], two[0]) and torch.equal(three[1], two[1])
    assert not torch.equal(three[0], three[1])
    assert not torch.equal(three[0], encode(encoder, drawings, "train", seed=1, **exact))
    head = nn.Linear(encoder.n_features, 2)
    torch.testing.assert_close(encode(encoder, drawings, "train", head=head, **exact), head(three[0]).detach())


def test_what_cannot_be_encoded_is_refused(drawings, encoder):
    with pytest.raises(ValueError, match="n_passes=0"):
        encode_passes(encoder, drawings, "test", 0)
    with pytest.raises(ValueError, match="no item of the test half"):
        encode(encoder, drawings, "test", torch.arange(0))
    with pytest.raises(ValueError, match="no canonical value"):
        encode(encoder, drawings, "test", transformed=False)
    broken = nn.Sequential(nn.Flatten(), nn.Linear(768, 2))
    broken[1].weight.data.fill_(float("nan"))
    with pytest.raises(ValueError, match="features of item 0 are not finite"):
        encode(broken, drawings, "test")


def test_photographs_in_the_order_of_their_classes_are_picked_from_all(blobs):
    photographs = ColourViews(load_data("folder", blobs))
    labels = photographs.targets("train")
    assert (labels.diff() >= 0).all(), "as the folders are read"
    for half, n in (("train", 20), ("test", 6)):
        assert photographs.targets(half)[some_items(photographs, half, n)].bincount().tolist() == [n // 2] * 2
    assert len(some_items(photographs, "test", 0)) == len(some_items(photographs, "test", 999)) == 32

    class Columns(nn.Module):
        "Brightness of the left and of the right half: what tells the classes apart."

        def forward(self, images):
            return images.mean((1, 2)).unflatten(1, (2, -1)).mean(2)

    uncropped = ColourViews(load_data("folder", blobs), crop=False)
    assert evaluate_online(Columns(), uncropped, n_items=16)["target_accuracy"] > 0.7
    assert some_items(SpirographViews(spirograph_task(9, 5)), "train", 4).tolist() == [0, 1, 2, 3]


def test_features_in_16_bits_are_near_those_in_32(drawings, encoder, monkeypatch):
    exact, rounded = (encode(encoder, drawings, "test", precision=kind) for kind in ("32-true", "bf16-mixed"))
    assert not torch.equal(exact, rounded) and rounded.dtype == torch.float32
    torch.testing.assert_close(rounded, exact, rtol=0.03, atol=0.03)
    monkeypatch.setattr("dainv.precision.fast_bf16", lambda device: True)
    assert torch.equal(encode(encoder, drawings, "test"), rounded)


class Odd(nn.Module):
    "Flattens with .view, keeps a mask from its first pass, writes into its input, and returns a dictionary."

    def __init__(self, kind):
        super().__init__()
        self.conv, self.fc, self.kind, self.mask = nn.Conv2d(3, 4, 3), nn.Linear(784, 5), kind, None

    def forward(self, x):
        x -= 0.5
        x = self.conv(x)
        if self.mask is None:
            self.mask = torch.full_like(x[:1], 0.9)
        features = self.fc((x * self.mask).view(len(x), -1))
        return {
            "tensor": features,
            "one": (features, None),
            "several": (features, features),
            "maps": x,
            "mean": features.mean(0, keepdim=True),
        }[self.kind]


def test_encoders_of_others():
    torch.manual_seed(0)
    views = SpirographViews(spirograph_task(n_train=6, n_test=6, size=16))
    encoder = Odd("tensor")
    features = encode(encoder, views, "test", precision="32-true")
    encoder.kind = "one"
    assert torch.equal(encode(encoder, views, "test", precision="32-true"), features)
    encoder(torch.rand(2, 3, 16, 16))[0].sum().backward()
    for kind, message in (
        ("several", "choose one of"),
        ("maps", r"\(6, 4, 14, 14\) for 6"),
        ("mean", r"\(1, 5\) for 6"),
    ):
        encoder.kind = kind
        with pytest.raises(ValueError, match=message):
            encode(encoder, views, "test")
