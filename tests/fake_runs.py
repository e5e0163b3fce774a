"""Finished runs with made-up numbers, for tests of everything that only reads run folders."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import yaml
from safetensors.numpy import save_file

LAYERS = ["input"] + [f"conv{k}" for k in range(1, 10)]
ROLES = {"baseline": (1, 0.0), "views": (8, 0.0), "dai": (8, 0.1)}
MEDIANS = {
    "baseline": [0.556, 0.485, 0.374, 0.408, 0.425, 0.460, 0.483, 0.500, 0.478, 0.509],
    "views": [0.556, 0.50, 0.40, 0.43, 0.44, 0.49, 0.52, 0.53, 0.50, 0.52],
    "dai": [0.556, 0.567, 0.491, 0.590, 0.866, 0.950, 0.959, 0.983, 0.985, 0.616],
}
ACCURACY = {"baseline": 0.931, "views": 0.915, "dai": 0.9245}
FIGURES = {
    "dai_score": ["baseline", "views", "dai"],
    "dai_loss_dynamics": ["views", "dai"],
    "dai_samples": ["baseline"],
    "dai_accuracy": ["baseline", "views", "dai"],
    "dai_time": ["dai"],
}


def write_project(
    root: Path, profile="quick", seeds=(0, 1, 2), epochs=12, title="spirograph classes"
) -> dict[str, str]:
    """Runs of three roles and an experiments file under `root`; returns the environment variables that point there."""
    runs = {f"allcnn_{role}": dict(views=views, alpha=alpha) for role, (views, alpha) in ROLES.items()}
    figures = {name: {role: f"allcnn_{role}" for role in roles} for name, roles in FIGURES.items()}
    section = dict(common=dict(epochs=epochs), seeds=list(seeds), runs=runs, figures=figures)
    path = root / "experiments.yaml"
    known = yaml.safe_load(path.read_text()) if path.exists() else {}
    path.write_text(yaml.safe_dump({**known, profile: section}, sort_keys=False))
    for role in ROLES:
        for seed in seeds:
            write_run(root / "runs" / profile / f"allcnn_{role}-s{seed}", role, seed, epochs, title)
    variables = dict(DAINV_RUNS="runs", DAINV_FIGURES="figures", DAINV_EXPERIMENTS="experiments.yaml")
    return {name: str(root / place) for name, place in variables.items()}


def write_run(folder: Path, role: str, seed: int, epochs: int, title: str) -> None:
    """One finished and measured run folder."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng([seed, list(ROLES).index(role)])
    views, alpha = ROLES[role]
    params = dict(dataset="spirograph", views=views, alpha=alpha, seed=seed, epochs=epochs, batch_size=128)
    params |= dict(pairs="distinct", reference="all", weights_ratio=10.0, exclude_last=True)
    (folder / "params.json").write_text(json.dumps(params))
    scores(role, rng).to_parquet(folder / "score.parquet", index=False)
    log(role, rng, epochs).to_csv(folder / "log.csv", index=False)
    accuracy(role, rng).to_csv(folder / "accuracy.csv", index=False)
    samples(folder, rng)
    if role == "dai":
        timing(rng).to_csv(folder / "timing.csv", index=False)
    measured = dict(run=folder.name, scheme="half_heavier_extremes", repeats=5, timing_steps=15, seed=0)
    (folder / "measured.json").write_text(json.dumps(measured))
    data = dict(name="spirograph", title=title, fingerprint="5f0e2c11", n_train=6000, n_test=1000, in_size=32)
    provenance = dict(commit="0" * 40, dirty=False, device="x86_64", threads=2)
    result = dict(schema=1, params=params, metrics=dict(test_accuracy=ACCURACY[role]), data=data, provenance=provenance)
    (folder / "result.json").write_text(json.dumps(result))


def scores(role, rng, images=200, repeats=5) -> pd.DataFrame:
    """Scores whose medians are the published ones, give or take a seed."""
    parts = []
    for layer, median in zip(LAYERS, MEDIANS[role], strict=True):
        median = median + (0 if layer == "input" else rng.normal(0, 0.004))
        score = 1 - (1 - median) * rng.lognormal(0, 0.45, images * repeats)
        rows = dict(image=np.repeat(np.arange(images), repeats), repeat=np.tile(np.arange(repeats), images))
        parts.append(pd.DataFrame(dict(layer=layer, **rows, score=score.astype(np.float32))))
    return pd.concat(parts)


def log(role, rng, epochs) -> pd.DataFrame:
    """A training log; without repeated images there is no invariance loss."""
    epoch = np.arange(1, epochs + 1)
    part = epoch / epochs
    table = pd.DataFrame(dict(epoch=epoch, step=47 * epoch, lr=0.01, loss=2 * np.exp(-3 * part)))
    table = table.assign(train_accuracy=1 - 0.9 * np.exp(-4 * part), test_accuracy=1 - 0.9 * np.exp(-3.5 * part))
    for k, layer in enumerate(LAYERS[1:]):
        rising = 0.3 - 0.02 * k + (0.3 + 0.05 * min(k, 3)) * (1 - np.exp(-6 * part)) + rng.normal(0, 0.005, epochs)
        falling = np.exp(-4 * part) if role == "dai" and 2 <= k <= 7 else 1
        table[f"invariance_{layer}"] = np.nan if role == "baseline" else rising * falling
    return table


def accuracy(role, rng) -> pd.DataFrame:
    """Top-1, top-3 and top-5 for both ways to look at an image."""
    top1 = ACCURACY[role] + rng.normal(0, 0.002) + np.array([0.0, 0.008])
    return pd.DataFrame(dict(view=["single", "ten_light"], top1=top1, top3=top1 + 0.05, top5=np.nan, n_images=1000))


def timing(rng, repeats=15) -> pd.DataFrame:
    """Seconds per step of three variants, repetition by repetition."""
    slow = rng.lognormal(0, 0.05, repeats)
    variants = [(1, 0.0, 0.060), (8, 0.0, 0.0602), (8, 0.1, 0.063)]
    rows = [
        dict(variant=f"M={m}, alpha={a:g}", views=m, alpha=a, repeat=k, seconds=s * slow[k] * rng.lognormal(0, 0.01))
        for k in range(repeats)
        for m, a, s in variants
    ]
    return pd.DataFrame(rows)


def samples(folder: Path, rng) -> None:
    """Seven smooth random pictures and where they came from."""
    coarse = rng.integers(30, 226, (7, 3, 4, 4))
    pictures = np.kron(coarse, np.ones((8, 8))).astype(np.uint8)
    tensors = dict(reference=pictures[0], images=pictures[1:4], transformed=pictures[4:])
    save_file({name: np.ascontiguousarray(array) for name, array in tensors.items()}, folder / "samples.safetensors")
    names = ["3 lobes, looped", "8 lobes, rounded", "5 lobes, looped"]
    found = dict(layer="conv9", reference=dict(index=17, label="6 lobes, rounded"))
    found["images"] = [dict(index=k, label=name, distance=0.98 + 0.01 * k) for k, name in enumerate(names)]
    found["transformed"] = [dict(distance=d) for d in (0.985, 0.99, 1.0)]
    (folder / "samples.json").write_text(json.dumps(found))
