"""Finished runs with made-up numbers, for tests of everything that only reads run folders."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import yaml
from safetensors.numpy import save_file

LAYERS = ["input"] + [f"conv{k}" for k in range(1, 10)]
CLASSES = ["plane", "car", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
ROLES = {"baseline": (1, 0.0), "views": (8, 0.0), "dai": (8, 0.1)}
INVARIANCE = {"mixed": (8, 0.45), "pure": (8, 0.1), "fisher": (8, 0.1)}
BETA = {"mixed": 0.45, "pure": 0.9, "fisher": 0.9}
MEDIANS = {
    "baseline": [0.556, 0.485, 0.374, 0.408, 0.425, 0.460, 0.483, 0.500, 0.478, 0.509],
    "views": [0.556, 0.50, 0.40, 0.43, 0.44, 0.49, 0.52, 0.53, 0.50, 0.52],
    "dai": [0.556, 0.567, 0.491, 0.590, 0.866, 0.950, 0.959, 0.983, 0.985, 0.616],
}
ACCURACY = {"baseline": 0.931, "views": 0.932, "dai": 0.9245, "mixed": 0.919, "pure": 0.21, "fisher": 0.905}
PC1 = {"views": 0.085, "mixed": 0.743, "pure": 0.996, "fisher": 0.13}
# accuracy under PGD, and under its margin loss, at strength 0.03
ATTACKED = {"views": (0.08, 0.075), "mixed": (0.3, 0.22), "pure": (0.18, 0.06), "fisher": (0.25, 0.245)}
_FOUR = {"baseline": "views", "mixed": "mixed", "pure": "pure", "fisher": "fisher"}
_INVARIANCE = ("rdms", "pc1", "probes", "tsne", "cka", "attacks", "convergence")
# figure -> role in the figure -> run; the baseline of invariance learning sees eight views, too
FIGURES = {
    "dai_score": {role: role for role in ROLES},
    "dai_loss_dynamics": {role: role for role in ("views", "dai")},
    "dai_samples": {"baseline": "baseline"},
    "dai_accuracy": {role: role for role in ROLES},
    "dai_time": {"dai": "dai"},
    **{f"invariance_{name}": _FOUR for name in _INVARIANCE},
}
ROLES |= INVARIANCE


def write_project(
    root: Path, profile="quick", seeds=(0, 1, 2), epochs=12, title="spirograph classes", figures=FIGURES
) -> dict[str, str]:
    """Runs of the figures and an experiments file under `root`; returns the environment variables that point there."""
    needed = [role for role in ROLES if any(role in roles.values() for roles in figures.values())]
    runs = {f"allcnn_{role}": asked(role) for role in needed}
    figures = {name: {role: f"allcnn_{run}" for role, run in roles.items()} for name, roles in figures.items()}
    section = dict(common=dict(epochs=epochs), seeds=list(seeds), runs=runs, figures=figures)
    path = root / "experiments.yaml"
    known = yaml.safe_load(path.read_text()) if path.exists() else {}
    path.write_text(yaml.safe_dump({**known, profile: section}, sort_keys=False))
    for role in needed:
        for seed in seeds:
            write_run(root / "runs" / profile / f"allcnn_{role}-s{seed}", role, seed, epochs, title)
    variables = dict(DAINV_RUNS="runs", DAINV_FIGURES="figures", DAINV_EXPERIMENTS="experiments.yaml")
    return {name: str(root / place) for name, place in variables.items()}


def asked(role) -> dict:
    """Parameters that tell a role from the others."""
    views, alpha = ROLES[role]
    ours = dict(beta=BETA[role], metric="fisher" if role == "fisher" else "msd") if role in BETA else {}
    return dict(views=views, alpha=alpha, **ours)


def write_run(folder: Path, role: str, seed: int, epochs: int, title: str) -> None:
    """One finished and measured run folder."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng([seed, list(ROLES).index(role)])
    params = dict(dataset="spirograph", seed=seed, epochs=epochs, batch_size=128, **asked(role))
    params |= dict(pairs="distinct", reference="all", weights_ratio=10.0, exclude_last=True)
    (folder / "params.json").write_text(json.dumps(params))
    if role in MEDIANS:
        scores(role, rng).to_parquet(folder / "score.parquet", index=False)
    if role in PC1:
        representations(folder, role, seed)
    log(role, rng, epochs).to_csv(folder / "log.csv", index=False)
    accuracy(role, rng).to_csv(folder / "accuracy.csv", index=False)
    samples(folder, rng)
    if role == "dai":
        timing(rng).to_csv(folder / "timing.csv", index=False)
    measured = dict(run=folder.name, scheme="half_heavier_extremes", repeats=5, timing_steps=15, seed=0)
    (folder / "measured.json").write_text(json.dumps(measured))
    data = dict(name="spirograph", title=title, fingerprint="5f0e2c11", n_train=6000, n_test=1000, in_size=32)
    data["classes"] = CLASSES
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
        falling = np.exp(-4 * part) if role in ("dai", *BETA) and 2 <= k <= 7 else 1
        table[f"invariance_{layer}"] = np.nan if role == "baseline" else rising * falling
        if role in BETA:
            table[f"class_invariance_{layer}"] = 1.08 - (0.03 + 0.09 * k) * (1 - np.exp(-5 * part))
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


def representations(folder: Path, role, seed) -> None:
    """What is measured on the representations of a run."""
    rng = np.random.default_rng([seed, list(ROLES).index(role), 1])
    components(role, rng).to_csv(folder / "representation.csv", index=False)
    dissimilarities(folder, role, rng)
    similarities(role, rng).to_csv(folder / "cka.csv", index=False)
    embeddings(role, rng).to_csv(folder / "embedding.csv", index=False)
    probes(role, rng).to_csv(folder / "probes.csv", index=False)
    attacks(role, rng).to_csv(folder / "attacks.csv", index=False)


def components(role, rng, images=500) -> pd.DataFrame:
    """Share of the first component and effective rank, of both kinds of features; the published share at the top."""
    rows = []
    for kind, extra in (("full", 0.0), ("pooled", 0.02)):
        for k, layer in enumerate(LAYERS[1:]):
            share = 0.3 + (PC1[role] - 0.3) * k / 8
            share = min(0.999, share * (1 + extra) + rng.normal(0, 0.002))
            rows.append(dict(layer=layer, kind=kind, pc1_share=share, effective_rank=share**-1.5, n_images=images))
    return pd.DataFrame(rows)


def dissimilarities(folder: Path, role, rng, per_class=20) -> None:
    """Distances of two big groups, of classes within them, and of images."""
    n = len(CLASSES) * per_class
    labels = np.repeat(np.arange(len(CLASSES)), per_class)
    animate = np.isin(labels, range(2, 8)).astype(float)
    classes = rng.normal(0, 1, (len(CLASSES), 8))[labels]
    strength = dict(views=(0.3, 0.8, 1.5), mixed=(3, 0.8, 0.8), pure=(3, 0.02, 0.2), fisher=(0.4, 2, 0.7))[role]
    groups = np.outer(animate, np.ones(8))
    codes = np.stack([groups, classes, rng.normal(0, 1, (n, 8))], -1) @ np.array(strength)
    matrix = ((codes[:, None] - codes) ** 2).mean(-1).astype(np.float32)
    save_file(dict(rdm=matrix, labels=labels), folder / "rdm.safetensors")
    same = animate[:, None] == animate
    of_class = labels[:, None] == labels
    contrast = {"class": contrast_of(matrix, of_class, 0.001), "animate": contrast_of(matrix, same, 1 / 210)}
    found = dict(layer="conv9", classes=CLASSES, metric="msd", contrast=contrast)
    (folder / "rdm.json").write_text(json.dumps(found))


def contrast_of(matrix, same, p_value) -> dict:
    """Mean dissimilarity within and between groups."""
    within, between = float(matrix[same & ~np.eye(len(matrix), dtype=bool)].mean()), float(matrix[~same].mean())
    return dict(within=within, between=between, ratio=between / within, p_value=p_value)


def similarities(role, rng) -> pd.DataFrame:
    """CKA of both sides of a transformation; the unbiased one of a collapsed layer may fall below 0."""
    rows = []
    for k, layer in enumerate(LAYERS):
        value = 0.6 + 0.03 * k - (0.93 * (k == 9) if role == "pure" else 0) + rng.normal(0, 0.01)
        rows += [dict(layer=layer, kind=kind, value=value + extra) for kind, extra in CKA.items()]
    return pd.DataFrame(rows)


CKA = {"biased": 0.05, "unbiased": 0.0, "minibatch": -0.01}


def embeddings(role, rng, images=20, views=10, per_class=20) -> pd.DataFrame:
    """Points around the place of their image, and around that of their class."""
    spread = dict(views=6, mixed=2, pure=12, fisher=2)[role]
    place = rng.normal(0, 20, (len(CLASSES), 2))
    label = np.arange(images) % len(CLASSES)
    centre = place[label] + rng.normal(0, spread, (images, 2))
    moved = np.repeat(centre, views, 0) + rng.normal(0, 1, (images * views, 2))
    first = dict(kind="tsne_views", x=moved[:, 0], y=moved[:, 1], image=np.repeat(np.arange(images), views))
    label = np.repeat(label, views)
    classes = np.repeat(np.arange(len(CLASSES)), per_class)
    points = place[classes] + rng.normal(0, spread, (len(classes), 2))
    second = dict(kind="tsne_classes", x=points[:, 0], y=points[:, 1], image=np.arange(len(classes)), label=classes)
    second = pd.DataFrame(second)
    return pd.concat([pd.DataFrame(dict(**first, label=label)), second, second.assign(kind="pca")])


def probes(role, rng, fractions=(0.01, 0.1, 1.0)) -> pd.DataFrame:
    """Accuracies of both probes on two layers, for several shares of the labels."""
    rows = []
    for layer in ("conv8", "conv9"):
        for kind in ("linear", "mlp"):
            for fraction in fractions:
                best = ACCURACY[role] - 0.01 * (layer == "conv8") + 0.004 * (kind == "mlp")
                accuracy = 0.1 + (best - 0.1) * (1 + 0.2 * np.log10(fraction)) + rng.normal(0, 0.003)
                row = dict(layer=layer, probe=kind, fraction=fraction, n_train=int(6000 * fraction), strength=1e-3)
                rows.append(row | dict(held_out_accuracy=accuracy - 0.005, test_accuracy=accuracy))
    return pd.DataFrame(rows)


def attacks(role, rng, strengths=(0.0, 0.003, 0.01, 0.03, 0.1)) -> pd.DataFrame:
    """Accuracy under attack: white box with two losses, and on images made against another run."""
    pgd, margin = ATTACKED[role]
    clean = ACCURACY[role]
    variants = [("fgsm", "cross_entropy", "self", pgd + 0.2, 1), ("pgd", "cross_entropy", "self", pgd, 40)]
    variants += [("fgsm", "margin", "self", margin + 0.2, 1), ("pgd", "margin", "self", margin, 40)]
    variants += [("pgd", "cross_entropy", "quick/allcnn_views-s0", pgd + 0.3, 40)] * (role != "views")
    variants += [("pgd", "margin", "self", 0.98 * margin, 80)]
    rows = []
    for attack, loss, source, left, steps in variants:
        for eps in strengths if steps < 80 else (0.0, 0.03):
            accuracy = clean * min(1, left / clean) ** (eps / 0.03) + rng.normal(0, 0.003) * (eps > 0)
            row = dict(victim="self", attack=attack, loss=loss, label_kind="predictions", eps=eps)
            row["fooled"] = 1 - accuracy / clean if eps else 0.0
            rows.append(row | dict(accuracy=accuracy, n_images=200, steps=steps, restarts=1, source=source))
    return pd.DataFrame(rows)
