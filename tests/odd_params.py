"Random parameters for trainings of a second, many of them odd; what becomes of them."

import random
import shutil
import warnings
from functools import cache

from dainv.data import load_data
from dainv.files import runs_folder
from dainv.params import check_params
from dainv.pretraining import PretrainParams, pretrain
from dainv.training import TrainParams, train

TINY = {
    TrainParams: dict(
        dataset="spirograph", train_size=40, test_size=20, width=0.03, batch_size=16, views=4, epochs=1, device="cpu"
    ),
    PretrainParams: dict(
        train_size=40, test_size=20, image_size=8, width=0.1, batch_size=8, epochs=1, measure_items=8, device="cpu"
    ),
}
CLASSES = [f"{lobes} lobes, {style}" for lobes in (3, 4, 5, 6, 8) for style in ("rounded", "looped")]
NUMBERS = ([0.0, 1.0, 0.5, 0.1, 1e-5, "1e-3"], [-1.0, 1e4, 1e300, float("inf"), float("nan"), "x", True, None])
WHOLE = ([0, 1, 2, 3, 8.0, "16"], [-1, 10**6, 2**31, 2**64, 10**30, 1.5, float("inf"), "many", None])
POOLS = {  # plausible values, and odd ones; what is not here is drawn by its type
    "name": (["", "x/y"], ["a run", "../x", "x" * 300, "$(touch x)", "."]),
    "profile": (["auto", "quick", "paper"], ["fast"]),
    "dataset": (["spirograph"], ["folder", "mnist", "", "cifar10"]),
    "data_root": ([""], ["nowhere", "/dev/null"]),
    "data_title": (["", "drawings"], ["a\nb"]),
    "train_size": ([3, 4, 10, 20, 40, 16], [1, 2, -1, 10**12, 2**70]),
    "test_size": ([2, 3, 20], [1, -1, 10**12]),
    "classes": ([[], CLASSES[:2], CLASSES[:3]], [CLASSES[:1], [0, 1], ["0"], ["cat"], CLASSES[:1] * 2]),
    "model": (["allcnn", "allcnn_large", "wrn", "densenet", "resnet18"], ["vgg", ""]),
    "encoder": (["", "small", "resnet18"], ["vgg", "resnet50 "]),
    "width": ([0.03, 0.1, 1e-300], [-1.0, 1e6, 1e300, float("inf"), float("nan")]),
    "depth": ([0, 10, 16], [4, 12, 11, -2, 10**9]),
    "init": (["", "he"], ["heavy"]),
    "padding": (["zeros", "reflect"], ["mirror", ""]),
    "batch_norm": ([True, False, "inference"], ["never", 0]),
    "epochs": ([1, 2], [-1, 10**7, 10**30, 1.5]),
    "alpha": ([0.0, 0.1, 0.5, 0.9, 1.0], [1.5, -0.1, float("nan")]),
    "beta": ([0.0, 0.1, 0.5, 0.9], [1.5, -0.1, float("inf")]),
    "beta_end": ([-1, 0.0, 0.1], [0.7, -0.5]),
    "layers": (
        [[], ["conv9"], ["conv1", "conv7"], ["block1"]],
        [["conv9", "conv9"], ["conv10"], ["fc"], "conv9", [""]],
    ),
    "weights": (["exponential", "linear", "uniform"], ["cubic"]),
    "weights_ratio": ([10.0, 1.0, 0.1], [0.0, -1.0, 1e300, float("inf")]),
    "metric": (["msd", "per_unit", "fisher"], ["cosine"]),
    "shrinkage": ([0.01, 1.0], [0.0, -1.0, 1e300, float("nan")]),
    "pairs": (["distinct", "all"], ["some"]),
    "reference": (["all", "same_class"], ["none"]),
    "views": ([1, 2, 4, 8, 16], [3, 0, 10**9]),
    "batch_size": ([2, 4, 8, 16, 32, 40], [1, 48, 1024, 0, -4, 10**9, 2**63]),
    "scheme": (["heavier", "light", "none", "half_heavier_extremes", "gaussian"], ["heavy"]),
    "law": (["normal", "uniform", "extremes"], ["cauchy"]),
    "interpolation": (["bilinear", "nearest"], ["bicubic"]),
    "milestones": ([[], [0.5], [1e-1, "5e-1"], "[0.5]"], [[2.0], ["x"], 0.5]),
    "compile": (["auto", "off"], ["of"]),  # on takes a minute
    "device": (["cpu", "auto"], ["cuda", "gpu"]),
    "precision": (["auto", "32-true", "bf16-mixed"], ["bf16-true", "16-mixed", "64-true", "8-bit"]),
    "seed": ([0, 1, 2**31, 2**63 - 1], [2**63, 2**64, -1, 1e30]),
    "lr": ([0.0, 0.1, 1.0, "1e-5"], [-1.0, 1e300, float("inf"), 1e4]),
    "b_bounds": ([[], [0.5, 1.1], [0.1, 1.1]], [[1.1, 0.5], [0.5], [-1.0, 1.0], [1e-300, 1e300], [0.5, float("inf")]]),
    "normalise": (["image", "row"], ["batch"]),
    "penalty": (["gradient", "twin", "forward"], ["none"]),
    "penalty_weight": ([0.0, 0.01, 1.0], [-1.0, 1e300, float("inf")]),
    "penalty_draws": ([0, 2], [-1, 10**9]),
    "limit_per": (["item", "batch"], ["image"]),
    "penalty_statistics": (["batch", "running"], ["both"]),
    "optimizer": (["", "adam", "sgd", "lars"], ["adamw"]),
    "weight_decay": ([0.0, 1e-6, 0.1], [-1.0, 1e30]),
    "schedule": (["cosine", "constant"], ["linear"]),
    "start": ([""], ["nowhere"]),
    "image_size": ([8, 16, 12], [0, 1, 2, 3, 10**6, -8]),
    "devices": ([1], [0, 2, -1]),
    "measure_items": ([8, 2, 20], [1, 0, 10**9]),
    "projection": ([1, 16, 128], [0, 10**9, 2**40]),
    "temperature": ([0.5, 0.1, 10.0], [0.0, 1e-30, 1e300, float("inf")]),
}


def odd_params(kind: type, number: int) -> dict:
    "The parameters of this number: those of a tiny run with some replaced; in every second one of them by an odd value."
    rng, fields = random.Random(f"{kind.__name__} {number}"), kind.__dataclass_fields__
    values, names = dict(TINY[kind]), rng.sample(sorted(fields), rng.randint(2, 7))
    for place, name in enumerate(names):
        by_type = {"bool": ([True, False, "false"], [0, "x"]), "int": WHOLE}.get(
            getattr(fields[name].type, "__name__", "")
        )
        values[name] = rng.choice(POOLS.get(name, by_type or NUMBERS)[number % 2 and not place])
    return values


@cache
def drawings():
    return load_data("spirograph")


def outcome(kind: type, values: dict) -> tuple[str, str]:
    "`refused` with nothing written, `trained`, `late`: failed after something was written, or `raw`; and what was said."
    shutil.rmtree(runs_folder(), ignore_errors=True)
    runs_folder().mkdir()
    loaded = (
        [drawings()]
        if kind is TrainParams and (values["dataset"], values.get("data_root", "")) == ("spirograph", "")
        else []
    )
    try:
        params = check_params(kind, values)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            (train if kind is TrainParams else pretrain)(params, *loaded)
        return "trained", ""
    except Exception as error:
        said = f"{type(error).__name__}: {error}"
        if list(runs_folder().iterdir()):
            return "late", said
        return "refused" if isinstance(error, ValueError | OSError) else "raw", said


if __name__ == "__main__":
    import collections
    import sys
    import time

    first, last, shown = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3:]
    kinds = {"train": TrainParams, "pretrain": PretrainParams}
    for name, kind in kinds.items():
        if shown and name not in shown:
            continue
        counts = collections.Counter()
        for number in range(first, last):
            values, began = odd_params(kind, number), time.monotonic()
            how, said = outcome(kind, values)
            counts[how] += 1
            changed = {k: v for k, v in values.items() if TINY[kind].get(k, "absent") != v}
            seconds = time.monotonic() - began
            if how in ("late", "raw") or seconds > 20 or "-v" in sys.argv:
                print(name, number, how, f"{seconds:.1f}s", str(changed)[:200], "->", said[:200], flush=True)
        print(name, dict(counts), flush=True)
