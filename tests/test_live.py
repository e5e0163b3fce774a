"Scores of chosen layers during training."

import pandas as pd
import pytest
import torch
from torch import nn

from dainv import live as live_module
from dainv.augment import draw, transform
from dainv.live import LiveAudit


@pytest.fixture
def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.5), nn.Flatten())


IMAGES = torch.rand(6, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def test_the_scores_are_those_of_the_formula_and_the_network_stays_as_it_was(network):
    network.train()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    found = LiveAudit(network, IMAGES, ["0"], seed=3).scores()["0"]
    views = transform(IMAGES, draw("half_heavier_extremes", 6, torch.Generator().manual_seed(3)))
    f, g = (network[0](x).flatten(1) for x in (IMAGES, views))
    spread = (f - f.mean(0)).square().sum(1)
    assert found == pytest.approx((1 - (f - g).square().sum(1) / (spread + spread.mean())).mean().item(), abs=1e-5)
    assert network.training and all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert not any(part._forward_hooks for part in network.modules())


def test_measuring_keeps_to_its_share(network, monkeypatch, tmp_path):
    clock = [0.0]
    monkeypatch.setattr(live_module.time, "perf_counter", lambda: clock[0])
    live = LiveAudit(network, IMAGES, ["0", "2"], share=0.1, file=tmp_path / "log.csv")

    def scores():
        clock[0] += 1.0
        return {"0": 0.5, "2": 0.25}

    live.scores = scores
    for step in range(100):
        clock[0] += 1.0
        live.step(step)
    assert live.spent <= 0.1 * clock[0] and live.spent >= 0.08 * clock[0]
    written = pd.read_csv(tmp_path / "log.csv")
    assert len(written) == live.spent and (written.score_2 == 0.25).all()


def test_scores_go_to_a_writer(network):
    class Writer(list):
        def add_scalar(self, *entry):
            self.append(entry)

    live = LiveAudit(network, IMAGES, ["0"], tensorboard=Writer())
    found = live.step(7)
    assert live.writer == [("invariance/0", found["0"], 7)]


def test_a_constant_layer_has_no_score_and_a_share_is_one(network):
    nn.init.zeros_(network[0].weight)
    assert torch.isnan(torch.tensor(LiveAudit(network, IMAGES, ["0"]).scores()["0"]))
    with pytest.raises(ValueError, match="share=0"):
        LiveAudit(network, IMAGES, ["0"], share=0)
