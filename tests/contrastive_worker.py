"""Three contrastive steps of networks without batch normalisation, in as many processes as `torchrun` started.

    contrastive_worker.py OUTPUT.pt

Batch normalisation takes its statistics from the part of the batch that a process has, as published; without it the
weights after a few steps must not depend on the number of processes.
"""

import os
import sys

import torch
from torch import nn

import dainv.pretraining as pretraining
from dainv.loop import make_fabric
from dainv.pretraining import ContrastiveTrainer, PretrainParams, resolve


def plain_encoder(name, width, in_size):
    encoder = nn.Sequential(nn.Conv2d(3, 6, 3, 2, 1), nn.Softplus(), nn.Flatten(), nn.Linear(6 * 64, 16))
    encoder.n_features = 16
    return encoder


PENALTIES = {"none": dict(), "twin": dict(penalty="twin", penalty_weight=1.0)}
PENALTIES |= {"gradient": dict(penalty="gradient", penalty_weight=0.01)}


def three_steps(fabric, **penalty) -> dict:
    asked = dict(train_size=64, test_size=8, batch_size=16, image_size=16, epochs=1, projection=8, device="cpu")
    asked |= dict(optimizer="sgd", lr=0.1, name="worker", devices=fabric.world_size)
    p, views = resolve(PretrainParams(**asked, **penalty, precision="32-true"))
    trainer = ContrastiveTrainer(p, views, fabric)
    trainer.set_epoch(0)
    logged = torch.stack([trainer.step(number) for number in range(3)])
    return dict(weights=trainer.bare_model.state_dict(), logged=fabric.all_reduce(logged, reduce_op="mean"))


def main(output: str) -> None:
    torch.set_num_threads(1)
    pretraining.build_encoder = plain_encoder
    pretraining.ProjectionHead = lambda n_features, n_out: nn.Linear(n_features, n_out)
    fabric = make_fabric("cpu", "32-true", devices=int(os.environ.get("WORLD_SIZE", 1)))
    found = {name: three_steps(fabric, **penalty) for name, penalty in PENALTIES.items()}
    if fabric.is_global_zero:
        torch.save(found, output)


if __name__ == "__main__":
    main(sys.argv[1])
