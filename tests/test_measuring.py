"What is asked of a measurement: parameters out of range are refused before a run is opened or a file written."

import pytest

from dainv.data import load_data
from dainv.evaluating import EVALUATIONS, evaluate_rules
from dainv.measuring import MEASURES, measure_data_rules, measure_rules
from dainv.params import check_params, check_ranges
from dainv.sweeping import PAIRS_KEYS, AttackParams, attack_rules, pairs_asked
from dainv.workflow import notebook_params

RULES = dict(measure=measure_rules, evaluate=evaluate_rules)
NAN, INF = float("nan"), float("inf")
WRONG = dict(  # parameter -> values out of range
    measure=dict(
        run=[""],
        what=[["scores"], ["score", ""], []],
        scheme=["heavy", ""],
        repeats=[0, -1, 10**9],
        timing_steps=[-1],
        probe_fractions=[[], [0.0], [-0.1, 1.0], [1.5], [NAN]],
        attack_images=[0, -200],
        attack_eps=[[], [0.0], [-0.03], [8.0], [0.03, NAN], [INF]],
        attack_hard_eps=[0.0, -0.1, 8.0, NAN],
        attack_steps=[0, -40, 2**31],
        precision=["half", "", "8-bit", "64-true"],
        seed=[-1, 2**32],
    ),
    evaluate=dict(
        run=[""],
        what=[["variances"], [], ["alpha", "score"]],
        train_items=[-1, 1],
        test_items=[-5, 1],
        passes=[0, 1, -3],
        counts=[[], [0, 1], [2, 1], [1, 1], [1], [-2, 3], [10**6]],
        ensemble_counts=[[0], [3, 2], [31], [-1]],
        kinds=[["shape"], ["all", "all"]],
        kind_counts=[[], [0], [10, 1]],
        h_shifts=[[NAN], [0.1, INF]],
        background_shifts=[[-INF]],
        colour_shifts=[[NAN]],
        strengths=[[-0.5], [NAN], [INF]],
        fractions=[[], [0.0], [1.1], [-0.5], [NAN]],
        subsets=[0, -1],
        seed=[-1, 2**64],
    ),
    pairs=dict(classes=[["left"], ["left", "left"]], seeds=[[-1], [0, 0], [2**63]]),
)
RIGHT = dict(
    measure=[
        {},
        dict(what=[], timing_steps=1),
        dict(
            what=list(MEASURES),
            timing_steps=1,
            scheme="none",
            repeats=1,
            attack_images=1,
            attack_eps=[0.0, 1.0],
            attack_steps=1,
        ),
        dict(probe_fractions=[1.0], attack_hard_eps=1.0, precision="bf16-mixed", seed=2**32 - 1),
    ],
    evaluate=[
        {},
        dict(what=["variance"], counts=[1], passes=2, train_items=2, test_items=2, subsets=1),
        dict(what=list(EVALUATIONS), counts=[2], ensemble_counts=[2], kinds=["all", "none"], strengths=[0.0]),
        dict(h_shifts=[], background_shifts=[], colour_shifts=[], fractions=[1e-6], seed=2**32 - 1),
    ],
)


@pytest.mark.parametrize(("notebook", "name"), [(n, name) for n, wrong in WRONG.items() for name in wrong])
def test_values_out_of_range_are_refused_before_anything_is_opened(folders, execute, notebook, name):
    named = {} if notebook == "pairs" else {"run": "no/run"}
    for value in WRONG[notebook][name]:
        with pytest.raises(ValueError, match=rf"^parameter {name}=.*: expected ") as refused:
            execute(notebook, **{**named, name: value})
        assert "\n" not in str(refused.value)
    assert not (folders / "runs").exists() or not any((folders / "runs").iterdir())


def test_every_parameter_has_a_rule():
    for notebook, rules in RULES.items():
        known = set(notebook_params(notebook).__dataclass_fields__)
        assert {name for name, *_ in rules(notebook_params(notebook)(run="a"))} == known - {"attack_source"}
        assert set(WRONG[notebook]) == known - {"attack_source"}
    assert {name for name, *_ in attack_rules(AttackParams())} == set(AttackParams.__dataclass_fields__)


@pytest.mark.parametrize(("notebook", "values"), [(n, values) for n, right in RIGHT.items() for values in right])
def test_the_ends_of_the_ranges_are_right(notebook, values):
    asked = check_params(notebook_params(notebook), {"run": "a", **values})
    check_ranges(asked, RULES[notebook](asked))


def test_what_the_data_have_too_few_images_for(blobs):
    data = load_data("folder", blobs)
    n, measure = len(data.classes), notebook_params("measure")
    fewest = int(data.test.labels.bincount().min())

    def refused(**values):
        return [name for name, holds, _ in measure_data_rules(measure(run="a", **values), data) if not holds]

    assert refused(what=["attacks"], attack_images=n * fewest) == []
    assert refused(what=["attacks"], attack_images=n * (fewest + 1)) == ["attack_images"]
    assert refused(what=["score"], attack_images=n * (fewest + 1)) == []
    assert refused(what=["probes"], probe_fractions=[1e-6]) == ["probe_fractions"]
    assert refused(what=["probes"], probe_fractions=[1e-6, 1.0]) == []
    with pytest.raises(FileNotFoundError, match="no run 'b'"):
        refused(what=["attacks"], attack_images=n, attack_source="b")


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (dict(eps=8), "parameter eps=8.0: expected above 0 and at most 1"),
        (dict(eps=0), "parameter eps=0.0"),
        (dict(eps=NAN), "parameter eps=nan"),
        (dict(attack_images=1), "parameter attack_images=1: expected at least 2"),
        (dict(attack_steps=-1), "parameter attack_steps=-1"),
        (dict(epohcs=3), "unknown parameter 'epohcs': did you mean 'epochs'"),
        (dict(views=3, batch_size=16), "parameter batch_size=16: expected a multiple of views=3"),
        (dict(views=1), "parameter views=1: expected at least 2 when alpha > 0"),
        (dict(beta=0.1), "'beta' is what the sweep itself sets"),
        (dict(lr="fast"), "'lr': expected float"),
    ],
)
def test_the_section_of_a_sweep(asked, message):
    with pytest.raises(ValueError, match=message):
        pairs_asked({"pairs": asked})


def test_a_sweep_takes_its_own_values_before_the_common_ones():
    common, attack = pairs_asked(
        {"common": {"views": 4, "width": 0.5}, "pairs": {"views": 2, "eps": "1e-2", "seeds": [3]}}
    )
    assert common == dict(views=2, width=0.5, exclude_last=False, metric="msd", pool=False)
    assert attack == AttackParams(eps=0.01) and {"seeds", "eps", "views"} <= set(PAIRS_KEYS)
