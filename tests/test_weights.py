"Weights from files: formats, wrappings, marks of wrappers, and what is refused by name."

import os
import pickle

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from dainv.models import build_model, load_weights
from dainv.weights import weights_digest


def network(seed=0, n_classes=10):
    torch.manual_seed(seed)
    return build_model("resnet20", n_classes, width=0.25)


def same(a, b):
    a, b = a.state_dict(), b.state_dict()
    return all(torch.equal(a[k], b[k]) for k in a if not k.endswith("num_batches_tracked"))


def marked(state, mark):
    return {f"{mark}{name}": value for name, value in state.items()}


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: state,
        lambda state: {"state_dict": marked(state, "module."), "best_prec1": 91.8, "epoch": 3},
        lambda state: {"model": marked(state, "_orig_mod."), "accuracy": torch.tensor(0.9)},
        lambda state: marked(state, "module._orig_mod."),
        lambda state: {"n_averaged": torch.tensor(5), **marked(state, "module.")},
        lambda state: {"rows": [], "trainer": {"model": state, "optimizer": {}}},
        lambda state: {k.replace("layer1.", "layer1._orig_mod."): v for k, v in state.items()},
        lambda state: {k: v for k, v in state.items() if not k.endswith("num_batches_tracked")},
        lambda state: {k: v.double() if v.is_floating_point() else v for k, v in state.items()},
    ],
)
def test_weights_are_found_in_whatever_surrounds_them(tmp_path, wrap, legacy):
    trained = network(1)
    torch.save(wrap(trained.state_dict()), tmp_path / "w.th", _use_new_zipfile_serialization=not legacy)
    model = load_weights(network(2), tmp_path / "w.th")
    assert same(model, trained) and next(model.parameters()).dtype == torch.float32
    assert weights_digest(model.state_dict()) == weights_digest(trained.state_dict())


def test_safetensors_and_a_compiled_network(tmp_path):
    trained = network(1)
    save_file(marked(trained.state_dict(), "module."), tmp_path / "w.safetensors")
    assert same(load_weights(network(2), tmp_path / "w.safetensors"), trained)
    compiled = torch.compile(nn.Linear(3, 2))
    torch.save(compiled.state_dict(), tmp_path / "c.pt")
    assert load_weights(compiled, tmp_path / "c.pt") is compiled


class Trap:
    def __reduce__(self):
        return os.mkdir, ("sprung",)


def bad_files(folder):
    "Name -> a file that cannot be loaded, and what its error says."
    state = network(1).state_dict()
    torch.save({"state_dict": state}, folder / "good.pth")
    whole = (folder / "good.pth").read_bytes()
    torch.save(state, folder / "good_legacy.th", _use_new_zipfile_serialization=False)
    legacy = (folder / "good_legacy.th").read_bytes()
    save_file(state, folder / "good.safetensors")
    tensors = (folder / "good.safetensors").read_bytes()
    contents = {
        "cut.pth": (whole[: len(whole) // 2], "truncated, damaged or of another format"),
        "short.pth": (whole[:10], "damaged"),
        "cut.th": (legacy[: len(legacy) // 2], "truncated, damaged or of another format"),
        "cut.safetensors": (tensors[: len(tensors) // 2], "expected a .safetensors file"),
        "empty.pth": (b"", "damaged"),
        "empty.safetensors": (b"", "damaged"),
        "text.pth": (b"not a file of weights\n" * 50, "damaged"),
        "zip.safetensors": (whole, "expected a .safetensors file"),
        "code.pth": (pickle.dumps(Trap()), "more than tensors"),
        "array.pth": (pickle.dumps({"weight": np.zeros(3)}), "more than tensors"),
    }
    for name, (content, message) in contents.items():
        (folder / name).write_bytes(content)
        yield name, message
    objects = {
        "whole.pth": (network(1), "more than tensors (dainv.networks.models.CifarResNet)"),
        "trap.pth": ({"state_dict": state, "x": Trap()}, "more than tensors"),
        "list.pth": ([1, 2], "no dictionary and no weights"),
        "none.pth": ({"epoch": 3, "state_dict": {}}, "the keys epoch, state_dict and no weights"),
        "missing.pth": ({k: v for k, v in state.items() if k != "linear.bias"}, "linear.bias (1) missing"),
        "surplus.pth": ({**state, "head.weight": torch.zeros(2)}, "head.weight (1) not in this network"),
        "classes.pth": (network(1, 5).state_dict(), "linear.weight has the shape (5, 16), expected (10, 16)"),
        "nan.pth": ({**state, "bn1.bias": torch.full((4,), torch.nan)}, "bn1.bias holds values that are not finite"),
        "other.pth": (build_model("resnet32", 10, width=0.25).state_dict(), "layer1.3.conv1.weight"),
        "allcnn.pth": (build_model("allcnn", 10, width=0.05).state_dict(), "of another network"),
    }
    for name, (value, message) in objects.items():
        torch.save(value, folder / name)
        yield name, message


def test_what_does_not_fit_is_named_in_one_line_and_changes_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model, before = network(2), network(2)
    for name, message in bad_files(tmp_path):
        with pytest.raises(ValueError) as error:
            load_weights(model, tmp_path / name)
        told = str(error.value)
        assert message in told and told.startswith(str(tmp_path / name)) and "\n" not in told, (name, told)
        assert same(model, before), name
    assert not (tmp_path / "sprung").exists()
    with pytest.raises(FileNotFoundError, match=r"nowhere\.pth: there is no such file"):
        load_weights(model, tmp_path / "nowhere.pth")


def test_the_digest_is_of_names_and_values_alone():
    state = network(1).state_dict()
    assert weights_digest(dict(reversed(state.items()))) == weights_digest(state)
    counted = {k: v + 1 if k.endswith("num_batches_tracked") else v for k, v in state.items()}
    moved = {**state, "linear.bias": state["linear.bias"] + 1e-3}
    assert weights_digest(counted) == weights_digest(state) != weights_digest(moved)
    assert weights_digest(counted, counters=True) != weights_digest(state, counters=True)
    assert weights_digest({**state, "_extra_state": {"of": "another kind"}}) == weights_digest(state)
