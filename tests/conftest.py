"What several test files share."

import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import settings
from PIL import Image

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
ROOT = Path(__file__).resolve().parents[1]

settings.register_profile("untimed", deadline=None)  # how long an example takes depends on who shares the machine
settings.load_profile("untimed")


@pytest.fixture
def folders(tmp_path, monkeypatch):
    "Data, runs and figures in a temporary folder; their parent."
    for name in ("data", "runs", "figures"):
        monkeypatch.setenv(f"DAINV_{name.upper()}", str(tmp_path / name))
        (tmp_path / name).mkdir()
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return tmp_path


@pytest.fixture
def blobs(folders):
    "A folder data set named blobs: two classes of 32 x 32 images, 48 to train and 16 to test each."
    rng = np.random.default_rng(0)
    rows, cols = np.mgrid[:32, :32]
    for split, count in (("train", 48), ("test", 16)):
        for label in ("left", "right"):
            target = folders / "data" / "blobs" / split / label
            target.mkdir(parents=True)
            for number in range(count):
                column = rng.uniform(4, 12) + (16 if label == "right" else 0)
                blob = np.exp(-((rows - rng.uniform(8, 24)) ** 2 + (cols - column) ** 2) / 20)
                pixels = 60 + 150 * blob[..., None] * rng.uniform(0.5, 1, 3) + rng.normal(0, 5, (32, 32, 3))
                Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(target / f"{number:03d}.png")
    return "blobs"


@pytest.fixture
def tiny(blobs):
    "Parameters of a run that lasts a second."
    return dict(dataset="folder", data_root=blobs, width=0.05, batch_size=16, views=4, epochs=3, lr=0.05, device="cpu")
