"A training of one number, for tests of what surrounds a training."

import math

import torch
from torch import nn

from dainv.loop import Trainable, make_fabric


class Line(Trainable):
    "Fits y = slope * x; the generator of PyTorch is part of what it depends on."

    name, epochs, steps_per_epoch, items_per_step, answers_per_step = "line", 4, 5, 8, 8
    columns, lr = ["loss", "contrast", "right"], 0.1

    def __init__(self):
        self.fabric, self.bare_model, self.poison = make_fabric("cpu"), nn.Linear(1, 1, bias=False), None
        self.optimizer = torch.optim.SGD(self.bare_model.parameters(), lr=self.lr, momentum=0.9)

    def set_epoch(self, epoch):
        self.epoch = epoch

    def step(self, number):
        x = torch.randn(8, 1, generator=torch.Generator().manual_seed(number))
        loss = (self.bare_model(x) - 2 * x).square().mean()
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        if self.poison == number:
            self.bare_model.weight.data.fill_(math.nan)
        return torch.stack([loss.detach(), loss.detach(), torch.tensor(4.0)])

    def epoch_row(self, values, epoch, seconds):
        missing = math.nan if epoch else 1.0
        return dict(epoch=epoch + 1, loss=values[:, 0].mean().item(), seconds=seconds, missing=missing)

    def state(self):
        return dict(model=self.bare_model.state_dict(), optimizer=self.optimizer.state_dict())

    def load_state(self, state):
        self.bare_model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])

    def described(self):
        return dict(params=dict(name=self.name), data=dict(title="points"))
