"Which precision is chosen where, and that a run goes on in the one it was begun in."

import pytest
import torch
from torch import nn

from dainv import precision
from dainv.precision import choose_precision, fast_bf16, inference_precision


@pytest.mark.parametrize(
    ("capabilities", "fast"),
    [
        ({"amx_bf16": True, "amx_tile": True}, True),
        ({"amx_bf16": False, "avx512_bf16": True}, True),
        ({"avx512_f": True, "avx512_bf16": False}, False),
        ({}, False),
    ],
)
def test_a_processor_is_fast_where_it_multiplies_bfloat16(monkeypatch, capabilities, fast):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    assert fast_bf16("cpu") is fast and choose_precision("auto", "cpu") == ("bf16-mixed" if fast else "32-true")


@pytest.mark.parametrize("asked", ["_is_amx_tile_supported", "_is_avx512_bf16_supported"])
@pytest.mark.parametrize("there", [True, False, None])
def test_a_version_of_pytorch_that_knows_less_is_asked_what_it_knows(monkeypatch, asked, there):
    for name in ("get_capabilities", "_is_amx_tile_supported", "_is_avx512_bf16_supported"):
        monkeypatch.delattr(torch.cpu, name, raising=False)
    if there is not None:
        monkeypatch.setattr(torch.cpu, asked, lambda: there, raising=False)
    assert fast_bf16() is bool(there)


@pytest.mark.parametrize("native", [True, False])
def test_a_gpu_that_only_emulates_the_format_computes_in_32_bits(monkeypatch, native):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation or native)
    assert choose_precision("auto", "cuda:0") == ("bf16-mixed" if native else "32-true")


def test_a_precision_by_name_is_what_is_taken(monkeypatch):
    monkeypatch.setattr(precision, "fast_bf16", lambda device: True)
    assert choose_precision("32-true") == "32-true" and choose_precision("64-true") == "64-true"
    with pytest.raises(ValueError, match="precision='half': expected one of auto, 32-true"):
        choose_precision("half")


@pytest.mark.parametrize("fast", [True, False])
def test_a_network_runs_in_what_auto_chooses(monkeypatch, fast):
    monkeypatch.setattr(precision, "fast_bf16", lambda device: fast)
    layer, x = nn.Linear(4, 4), torch.rand(2, 4)
    with torch.no_grad(), inference_precision("cpu"):
        assert layer(x).dtype == (torch.bfloat16 if fast else torch.float32)
    with torch.no_grad(), inference_precision("cpu", "32-true"):
        assert torch.equal(layer(x), layer(x).float())


def test_a_context_around_stays_in_force():
    layer, x = nn.Linear(4, 4), torch.rand(2, 4)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16), inference_precision("cpu", "32-true"):
        assert layer(x).dtype == torch.bfloat16


def test_double_weights_stay_double():
    layer, x = nn.Conv2d(3, 4, 3).double(), torch.rand(2, 3, 8, 8).double()
    with torch.no_grad(), inference_precision("cpu", "bf16-mixed"):
        assert torch.equal(layer(x), nn.functional.conv2d(x, layer.weight, layer.bias))
