"""Finished runs with made-up numbers, for tests of everything that only reads run folders."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import yaml
from safetensors.numpy import save_file

from dainv.spirograph import parameter_bounds, spirograph_task

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


# role -> kind of penalty, its weight, errors relative to the run without, the same for conditional and total variance
CONTRASTIVE = {
    "plain": ("gradient", 0.0, 1.0, 1.0, 1.0),
    "gradient": ("gradient", 0.01, 0.8, 0.5, 0.7),
    "weak": ("gradient", 0.001, 0.95, 0.8, 0.9),
    "strong": ("gradient", 0.1, 1.3, 0.05, 0.03),
    "finite_difference": ("twin", 1.0, 0.85, 0.4, 0.6),
    "forward": ("forward", 0.01, 0.9, 0.6, 0.8),
}
_NAMED = ("samples", "variance", "alpha", "target_error", "tasks", "averaging", "averaging_kinds", "ensembling")
INVCLR = [f"invclr_{name}" for name in (*_NAMED, "shifts", "jitter", "labels", "claims")]
TASK_ERRORS = {"m": 0.004, "b": 0.03, "sigma": 0.001, "rfore": 0.0002}
ALPHA = {"h": 0.3333, "rback": 0.03, "gfore": 0.03, "gback": 0.03, "bfore": 0.03, "bback": 0.03}
COLOURS = {"brightness": 0.0533, "contrast": 0.0533, "saturation": 0.0533, "hue": 0.0033}


def invclr_figures(roles=tuple(CONTRASTIVE)) -> dict[str, dict[str, str]]:
    """Figure -> role -> run of the figures of contrastive runs; the table of defects has no run."""
    return {name: {role: role for role in roles} for name in INVCLR} | {"invclr_defects": {}}


def write_contrastive(
    root: Path, profile="quick", seeds=(0, 1, 2), roles=tuple(CONTRASTIVE), task="regression", title="", epochs=12
) -> dict[str, str]:
    """Contrastive runs and an experiments file under `root`; returns the environment variables that point there."""
    title = title or dict(regression="Spirograph (16 pixels)", classification="CIFAR-10")[task]
    runs = {role: contrastive_params(role, task, epochs) for role in roles}
    section = dict(common={}, seeds=list(seeds), runs=runs, figures=invclr_figures(roles))
    path = root / "experiments.yaml"
    known = yaml.safe_load(path.read_text()) if path.exists() else {}
    path.write_text(yaml.safe_dump({**known, profile: section}, sort_keys=False))
    for role in roles:
        for seed in seeds:
            write_contrastive_run(root / "runs" / profile / f"{role}-s{seed}", role, seed, task, title, epochs)
    variables = dict(DAINV_RUNS="runs", DAINV_FIGURES="figures", DAINV_EXPERIMENTS="experiments.yaml")
    return {name: str(root / place) for name, place in variables.items()}


def contrastive_params(role, task, epochs) -> dict:
    """What tells a contrastive run from the others."""
    penalty, weight, *_ = CONTRASTIVE[role]
    data = dict(dataset="spirograph", train_size=64, test_size=32, image_size=16, b_bounds=[0.5, 1.1])
    data = data if task == "regression" else dict(dataset="cifar10")
    how = dict(encoder="small", width=1.0, batch_size=32, epochs=epochs, start="", profile="quick", measure_items=10)
    return dict(**data, **how, penalty=penalty, penalty_weight=weight)


def level(role, seed, part=2) -> float:
    """What an error (2), conditional (3) or total variance (4) is multiplied by: a seed's own factor, shared by all roles, times the role's."""
    apart = 0.0 if role == "plain" else 0.03 * (part - 1) * ((seed % 3) - 1)
    return CONTRASTIVE[role][part] * (1.0, 1.1, 0.93)[seed % 3] * float(np.exp(apart))


def write_contrastive_run(folder: Path, role, seed, task, title, epochs) -> None:
    """One finished and evaluated contrastive run."""
    folder.mkdir(parents=True)
    params = dict(seed=seed, **contrastive_params(role, task, epochs))
    (folder / "params.json").write_text(json.dumps(params))
    contrastive_log(role, seed, task, epochs).to_csv(folder / "log.csv", index=False)
    tables = dict(variance=variances(role, seed), alpha=alpha_errors(role, seed, task))
    tables |= dict(averaging=averaging(role, seed, task), ensembling=ensembling(role, seed, task))
    tables |= dict(shifts=shifts(role, seed, task), labels=label_shares(role, seed, task))
    tables |= dict(downstream=downstream(role, seed, task))
    for name, table in tables.items():
        table.to_csv(folder / f"{name}.csv", index=False)
    (folder / "measured.json").write_text(json.dumps(dict(run=folder.name)))
    items = spirograph_task(64, 32, size=16, bounds=parameter_bounds(b=(0.5, 1.1)))
    mark = items.fingerprint if task == "regression" else "5f0e2c11"
    data = dict(name=params["dataset"], title=title, fingerprint=mark, task=task, n_train=64, n_test=32)
    metrics = dict(accuracy=0.9)
    (folder / "result.json").write_text(json.dumps(dict(schema=1, params=params, metrics=metrics, data=data)))


def scores_of(task, factor, tasks=True) -> list[dict]:
    """Metric, task and value of an evaluation whose error is so many times the usual one."""
    if task == "classification":
        pairs = [("accuracy", 1 - 0.3 * factor), ("cross_entropy", 0.9 * factor)]
        return [dict(metric=metric, task="all", value=value) for metric, value in pairs]
    errors = {"mean": sum(TASK_ERRORS.values()) / 4} | (TASK_ERRORS if tasks else {})
    return [dict(metric="mse", task=name, value=factor * error) for name, error in errors.items()]


def contrastive_log(role, seed, task, epochs) -> pd.DataFrame:
    """A log whose measurements are made every second epoch."""
    epoch = np.arange(1, epochs + 1)
    falling = 1 + 2 * np.exp(-4 * epoch / epochs)
    table = pd.DataFrame(dict(epoch=epoch, step=78 * epoch, lr=0.003, penalty_weight=CONTRASTIVE[role][1]))
    table = table.assign(loss=4 + falling, contrastive=4 + falling, accuracy=0.9, seconds=5.0, images_per_second=1e4)
    table["conditional_variance"] = 0.013 * level(role, seed, 3) * falling
    table["total_variance"] = 0.3 * level(role, seed, 4) / falling
    table["variance_ratio"] = table["conditional_variance"] / table["total_variance"]
    chance = ALPHA if task == "regression" else COLOURS
    table["alpha_error"] = (1.01 - 0.5 * CONTRASTIVE[role][3] * falling / 3) * float(np.mean(list(chance.values())))
    table["alpha_r2"] = 0.5 * CONTRASTIVE[role][3] * falling / 3 - 0.01
    for row in scores_of(task, level(role, seed)):
        names = {"mean": "target_error", "all": "target_accuracy"}
        if row["metric"] != "cross_entropy":
            value = row["value"] * falling if task == "regression" else row["value"] / falling
            table[names.get(row["task"], f"error_{row['task']}")] = value
    measured = table.columns[9:]
    table.loc[table["epoch"] % 2 == 1, measured] = np.nan
    return table


def variances(role, seed) -> pd.DataFrame:
    """Conditional and total variance in three spaces."""
    rows = []
    for space, scale in dict(unit=1.0, raw=7.0, projected=3.0).items():
        conditional, total = 0.013 * scale * level(role, seed, 3), 0.3 * scale * level(role, seed, 4)
        rows.append(dict(space=space, conditional=conditional, total=total, ratio=conditional / total))
    return pd.DataFrame(rows).assign(n_items=32, n_passes=10)


def alpha_errors(role, seed, task) -> pd.DataFrame:
    """Errors of the predicted parameters, nearer to chance from raw features."""
    law = ALPHA if task == "regression" else COLOURS
    law = law | {"mean": float(np.mean(list(law.values())))}
    rows = []
    for features, seen in dict(standardised=0.5, raw=0.3).items():
        r2 = seen * CONTRASTIVE[role][3] + 0.001 * seed
        rows += [
            dict(features=features, name=k, mse=(1 - r2) * v, chance=v, r2=r2, strength=1e-5) for k, v in law.items()
        ]
    return pd.DataFrame(rows)


def averaging(role, seed, task, views=(1, 2, 5, 10, 30)) -> pd.DataFrame:
    """Errors after averaging, which fall to a floor that differs a little from seed to seed."""
    kinds = dict(all=0.4, h=0.5, colours=0.9, fixed=1.0) if task == "regression" else KINDS
    rows = []
    for kind, floor in kinds.items():
        left = floor * float(np.exp(0.02 * ((seed % 3) - 1)))
        for m in views:
            factor = level(role, seed) * (left + (1 - left) / m)
            for row in scores_of(task, factor):
                value = row.pop("value")
                predicted = 1.02 * value if row["metric"] == "mse" else np.nan
                rows.append(
                    dict(kind=kind, views=m, **row, measured=value, predicted=predicted, fixed_head=1.05 * value)
                )
    return pd.DataFrame(rows)


KINDS = {"all": 0.4, "differentiable": 0.9, "none": 1.0}


def ensembling(role, seed, task) -> pd.DataFrame:
    """Averaging beside ensembling, which is worse in everything but accuracy."""
    rows = []
    for method, worse in dict(averaging=1.0, ensembling=1.2).items():
        for m in (1, 2, 5, 10):
            for row in scores_of(task, level(role, seed) * (0.4 + 0.6 / m), tasks=False):
                value = row["value"] * (1 if row["metric"] == "accuracy" else worse)
                rows.append(dict(method=method, views=m, metric=row["metric"], value=value))
    return pd.DataFrame(rows)


def shifts(role, seed, task) -> pd.DataFrame:
    """Errors that grow with the shift, more without a new head."""
    grids = {("h", "mean"): (-0.5, -0.1, 0.1, 0.5), ("h", "spread"): (-0.5, 0.1, 0.5)}
    grids |= {("background", "mean"): (0.0, 0.2, 0.4), ("background", "spread"): (0.0, 0.2, 0.4)}
    grids |= {("all", "strength"): (0.0, 0.5, 1.0, 1.5)}
    if task == "classification":
        grids = {("colour", "strength"): (0.0, 0.25, 0.5, 1.0), ("colour", "mean"): (0.0, 0.2)}
    rows = []
    for (group, kind), amounts in grids.items():
        for amount in amounts:
            for refit in (True, False):
                factor = level(role, seed) * (1 + abs(amount) * (0.4 if refit else 1.2))
                names = dict(group=group, kind=kind, shift=amount, refit=refit)
                rows += [names | row for row in scores_of(task, factor)]
    return pd.DataFrame(rows)


def label_shares(role, seed, task) -> pd.DataFrame:
    """Errors of heads on a part of the items, in three parts of each size but the whole."""
    rows = []
    for fraction in (0.05, 0.1, 0.25, 0.5, 1.0):
        for subset in range(1 if fraction == 1 else 3):
            factor = level(role, seed) * fraction**-0.15 * (1 + 0.02 * subset)
            names = dict(fraction=fraction, n_train=int(64 * fraction), subset=subset)
            rows += [names | row for row in scores_of(task, factor, tasks=False)]
    return pd.DataFrame(rows).drop(columns="task")


def downstream(role, seed, task) -> pd.DataFrame:
    """Errors of single, averaged and (photographs) untransformed views."""
    methods = {"single": (1, 1.0), "averaged": (30, 0.42)}
    methods |= {"untransformed": (1, 0.7)} if task == "classification" else {}
    rows = []
    for method, (views, factor) in methods.items():
        rows += [dict(method=method, views=views, **row) for row in scores_of(task, level(role, seed) * factor)]
    return pd.DataFrame(rows)
