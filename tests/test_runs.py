"Run folders, the guard of the parameters, atomic writes."

import json
import multiprocessing
import os
import resource
import signal
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import yaml

from dainv.files import atomic_write, read_table, write_json, write_table
from dainv.options import params_from_command_line, run_command
from dainv.params import check_params, read_params
from dainv.runs import Run, load_runs, locked, provenance
from dainv.suites import experiments, figure_runs, profile_of, profile_runs, run_group, run_label, run_mismatch


@dataclass
class Params:
    alpha: float = 0.1
    views: int = 8
    name: str = ""
    exclude_last: bool = True
    milestones: list[float] = field(default_factory=list)
    names: list[str] = field(default_factory=list)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"alhpa": 0.1}, "did you mean 'alpha'"),
        ({"nonsense": 1}, "known: alpha, views"),
        ({"alpha": "x"}, "'alpha': expected float, got 'x'"),
        ({"alpha": True}, "'alpha': expected float"),
        ({"views": 2.5}, "'views': expected int"),
        ({"name": 7}, "'name': expected str, got 7"),
        ({"exclude_last": "perhaps"}, "write True or False"),
        ({"exclude_last": 1}, "'exclude_last': expected bool"),
        ({"milestones": 0.5}, "'milestones': expected"),
        ({"milestones": ["a half"]}, "'milestones': expected list[float].*each a number"),
        ({"milestones": [[0.5]]}, "'milestones': expected"),
        ({"milestones": "0.5"}, "'milestones': expected"),
        ({"milestones": None}, "'milestones': expected"),
        ({"names": [1, 2]}, "'names': expected list[str].*in quotes"),
        ({"names": [True, False]}, "'names': expected list[str].*in quotes"),
        ({"alpha": 10**400}, "'alpha': expected float"),
        ({"views": float("inf")}, "'views': expected int, got inf"),
        ({"views": float("nan")}, "'views': expected int, got nan"),
        ({"views": ""}, "'views': expected int"),
    ],
)
def test_a_wrong_parameter_is_named(given, message):
    with pytest.raises(ValueError, match=message.replace("(", r"\(").replace("[", r"\[")):
        check_params(Params, given)


def test_harmless_number_types_are_accepted():
    assert check_params(Params, {"alpha": 1, "views": 1e1}) == Params(alpha=1.0, views=10)


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ({"alpha": "1e-05"}, {"alpha": 1e-5}),  # 0.00001 as JSON writes it and YAML reads it
        ({"alpha": np.float32(0.5), "views": np.int64(4)}, {"alpha": 0.5, "views": 4}),
        ({"views": "8.0"}, {"views": 8}),
        ({"views": str(2**53 + 1)}, {"views": 2**53 + 1}),
        ({"exclude_last": "false"}, {"exclude_last": False}),
        ({"exclude_last": "TRUE"}, {"exclude_last": True}),
        ({"milestones": ["5e-1", 1]}, {"milestones": [0.5, 1.0]}),
        ({"milestones": "[5e-1]"}, {"milestones": [0.5]}),
        ({"names": "[01, NA, yes, 1.0]"}, {"names": ["01", "NA", "yes", "1.0"]}),
        ({"name": "1e-5"}, {"name": "1e-5"}),
    ],
)
def test_text_is_read_as_the_type_of_the_parameter(written, meant):
    assert check_params(Params, written) == Params(**meant)


def test_the_guard_sees_only_what_the_cell_defined():
    namespace = {"torch": torch, "before": None, "alpha": 0.3, "_private": 1}
    namespace["before"] = before = {"torch"}
    assert read_params(Params, namespace, before) == Params(alpha=0.3)
    with pytest.raises(ValueError, match="'aplha'"):
        read_params(Params, {**namespace, "aplha": 0.3}, before)


def test_command_line_reads_the_same_types():
    arguments = ["--alpha", "1e-3", "--views", "4", "--name", "007", "--exclude_last", "false", "--milestones", "[0.5]"]
    assert params_from_command_line(Params, arguments, "p") == Params(0.001, 4, "007", False, [0.5])


@pytest.mark.parametrize(
    "arguments",
    [
        ["--alhpa", "1"],
        ["--alpha"],
        ["alpha", "1"],
        ["--alpha", "x"],
        ["--milestones", "[0.5"],
        ["--views", "2", "--views", "4"],
        ["--views=2", "--views", "4"],
        ["--exclude_last", "--views", "4"],
        ["--name", "a", "b"],
        ["--names", "[a"],
    ],
)
def test_command_line_mistakes_exit_with_2(arguments, capsys):
    with pytest.raises(SystemExit) as stopped:
        params_from_command_line(Params, arguments, "program")
    said = capsys.readouterr().err
    assert stopped.value.code == 2 and said.startswith("program: ") and said.count("\n") == 1


def test_both_ways_of_writing_an_option_mean_the_same():
    apart = ["--alpha", "1e-5", "--name", "a=b", "--exclude_last", "no"]
    joined = ["--alpha=1e-5", "--name=a=b", "--exclude-last=false"]
    assert params_from_command_line(Params, joined, "p") == Params(alpha=1e-5, name="a=b", exclude_last=False)
    with pytest.raises(SystemExit):
        params_from_command_line(Params, apart, "p")


@pytest.mark.parametrize("error", [ValueError("two\nlines"), FileNotFoundError(2, "none", "x"), RuntimeError("busy")])
def test_an_error_of_the_work_is_one_line(error, capsys):
    def fail(arguments):
        raise error

    status, said = run_command(fail, [], "program"), capsys.readouterr().err
    assert status == 2 and said.startswith("program: ") and said.count("\n") == 1


def _write_beyond_the_limit(path):
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        atomic_write(path, lambda p: p.write_bytes(b"x" * 100_000))
    except OSError:
        os._exit(3)
    os._exit(0)


def test_a_full_disk_leaves_the_old_file_and_no_other(tmp_path):
    path = atomic_write(tmp_path / "file", lambda p: p.write_text("old"))
    worker = multiprocessing.get_context("fork").Process(target=_write_beyond_the_limit, args=(path,))
    worker.start()
    worker.join()
    assert worker.exitcode == 3
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_tables_keep_their_content_in_both_formats(tmp_path):
    table = pd.DataFrame({"a": [1, 2], "b": [0.5, None]})
    pd.testing.assert_frame_equal(pd.read_csv(write_table(tmp_path / "t.csv", table)), table)
    pd.testing.assert_frame_equal(pd.read_parquet(write_table(tmp_path / "t.parquet", table)), table)
    with pytest.raises(ValueError, match="xlsx"):
        write_table(tmp_path / "t.xlsx", table)


@pytest.mark.parametrize(
    "names",
    [["ant", "bee"], ["0", "1"], ["01", "1e5"], ["NA", "None"], ["null", "nan"], ["True", "no"], ["a, b", 'a "b"']],
)
def test_text_in_a_table_stays_text(tmp_path, names):
    table = pd.DataFrame({"name": names, "n": [1, 2], "value": [None, float("inf")], "right": [True, False]})
    found = read_table(write_table(tmp_path / "t.csv", table))
    assert found["name"].tolist() == names
    pd.testing.assert_frame_equal(found[["n", "value", "right"]], table[["n", "value", "right"]])


def test_text_with_holes_and_tables_of_other_tools(tmp_path):
    table = pd.DataFrame({"name": ["01", None, "NA"], "line": ["a\nb", "c", None]})
    found = read_table(write_table(tmp_path / "t.csv", table))
    assert found.isna().to_numpy().tolist() == table.isna().to_numpy().tolist()
    assert found.stack().tolist() == table.stack().tolist()
    (tmp_path / "other.csv").write_text("name,value\nx,1\n,2.5\n")
    pd.testing.assert_frame_equal(read_table(tmp_path / "other.csv"), pd.read_csv(tmp_path / "other.csv"))


def test_a_damaged_checkpoint_is_passed_over(tmp_path):
    run = Run(tmp_path)
    for epoch in (1, 2):
        run.save_checkpoint({"epoch": epoch, "weights": torch.arange(1000.0)})
    newest = tmp_path / "checkpoint.pt"
    content = bytearray(newest.read_bytes())
    content[len(content) // 2] ^= 0xFF
    newest.write_bytes(content)
    with pytest.warns(UserWarning, match="damaged"):
        assert run.load_checkpoint()["epoch"] == 1
    (tmp_path / "checkpoint.previous.pt").write_bytes(b"")
    with pytest.warns(UserWarning, match="damaged"):
        assert run.load_checkpoint() is None


def test_checkpoints_execute_no_code(tmp_path):
    run = Run(tmp_path)
    torch.save({"function": os.getcwd}, tmp_path / "checkpoint.pt")
    with pytest.raises(Exception, match="[Ww]eights.only"):
        run.load_checkpoint()


def test_a_second_process_is_refused(tmp_path):
    with locked(Run(tmp_path)), pytest.raises(RuntimeError, match="another process"), locked(Run(tmp_path)):
        pass


def test_the_same_name_with_other_parameters_is_an_error(folders):
    Run.open("a/b", {"alpha": 0.1})
    assert Run.open("a/b", {"alpha": 0.1}).name == "a/b"
    with pytest.raises(ValueError, match=r"alpha was 0.1, now 0.2.*delete"):
        Run.open("a/b", {"alpha": 0.2})
    with pytest.raises(FileNotFoundError, match="no run 'c'"):
        Run.open("c")
    for name in ("../x", "/x", "a b", "", ".", "a/./b", "a/", "$(touch x)", "a;b", "a\nb", "x" * 201, "ü" * 101):
        with pytest.raises(ValueError, match="name="):
            Run.open(name, {})
    assert sorted(path.name for path in (folders / "runs").iterdir()) == ["a"]


def test_the_table_of_runs_has_unfinished_ones_too(folders):
    Run.open("done", {"alpha": 0.1}).finish({"metrics": {"test_accuracy": 0.5}})
    Run.open("started", {"alpha": 0.2})
    table = load_runs().set_index("name")
    assert table.finished.to_dict() == {"done": True, "started": False}
    assert table.test_accuracy["done"] == 0.5


def parts_of(profile):
    "The lists of networks and of encoders of a profile."
    section = profile_of(profile)
    return [part for part in (section, section.get("encoders")) if part]


def test_experiments_name_every_run_that_a_figure_needs():
    for profile in experiments():
        listed = {name for part in parts_of(profile) for name in part.get("runs", {})}
        for figure, roles in profile_of(profile)["figures"].items():
            assert (Path(__file__).parents[1] / "nbs" / "figures" / f"{figure}.ipynb").exists()
            assert set(roles.values()) <= listed, figure
        for part in parts_of(profile):
            assert set(part.get("measure", {})) - {"common"} <= set(part.get("runs", {}))


def test_experiments_use_known_parameters():
    from dainv.pretraining import PretrainParams
    from dainv.training import WEIGHT_FILES, TrainParams

    kinds = dict(train=TrainParams, pretrain=PretrainParams)
    for profile in experiments():
        section, runs = profile_of(profile), profile_runs(profile)
        for name, params in runs.items():
            run, _, seed = name.split("/")[1].rpartition("-s")
            assert check_params(kinds[run_group(section, run)[0]], params).seed == int(seed)
            start = params.get("start", name)
            assert start in runs or start.endswith(WEIGHT_FILES), "a run that it goes on from has this seed, too"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "expected profiles"),
        ("- a\n- b\n", "expected profiles"),
        ("p: {seeds: [0]\n", r"line 2: expected"),
        ("p:\n  seeds: [0]\n  runs: {}\n  seeds: [1]\n", "line 4: 'seeds' is given twice"),
        ("p: {runs: {a: {lr: 1, lr: 2}}}", "line 1: 'lr' is given twice"),
        ("p: *nowhere", "line 1: found undefined alias"),
        ("p: \t\x01", "is not YAML"),
        ("p: !!python/name:os.system", "line 1: could not determine a constructor"),
    ],
)
def test_a_wrong_experiments_file_is_one_line(folders, monkeypatch, text, message):
    monkeypatch.setenv("DAINV_EXPERIMENTS", str(folders / "e.yaml"))
    (folders / "e.yaml").write_text(text)
    with pytest.raises(ValueError, match=message) as found:
        experiments()
    assert "e.yaml" in str(found.value) and "\n" not in str(found.value)
    (folders / "e.yaml").write_text("p: {common: &c {lr: 1}, runs: {a: {<<: *c, lr: 2}}}")
    assert profile_of("p")["runs"]["a"] == {"lr": 2}, "a merged key may be replaced"


def test_figure_runs_come_by_role_and_seed(folders, monkeypatch):
    text = "p: {seeds: [3, 4], runs: {base: {alpha: 0.0}, dai: {}}, figures: {f: {baseline: base, dai: dai}}}"
    (folders / "e.yaml").write_text(text)
    monkeypatch.setenv("DAINV_EXPERIMENTS", str(folders / "e.yaml"))
    for name, params in profile_runs("p").items():
        write_json(folders / "runs" / name / "params.json", params)
    found = [(f.run.name, f.role, f.label, f.seed) for f in figure_runs("p", "f")]
    assert found[0] == ("p/base-s3", "baseline", "baseline, M = 8", 3)
    assert found[3] == ("p/dai-s4", "dai", "DAI, M = 8, alpha = 0.1", 4)
    with pytest.raises(ValueError, match="known: f"):
        figure_runs("p", "g")
    with pytest.raises(ValueError, match="known: p"):
        profile_of("q")


def test_a_run_made_with_other_parameters_is_reported(folders):
    write_json(folders / "runs" / "p" / "params.json", {"alpha": 0.1, "views": 8})
    assert run_mismatch("p", {"alpha": 0.1}) == ""
    assert "alpha was 0.1, now 0.2" in run_mismatch("p", {"alpha": 0.2})
    assert run_mismatch("absent", {"alpha": 0.2}) == ""


def test_provenance_is_json_and_names_versions():
    record = json.loads(json.dumps(provenance()))
    assert (
        record["versions"]["torch"] == torch.__version__.split("+")[0]
        or record["versions"]["torch"] == torch.__version__
    )


ENCODERS = {
    "seeds": [0, 1],
    "common": {"epochs": 2},
    "runs": {"base": {}},
    "encoders": {
        "common": {"measure_every": 3},
        "runs": {"start": {"epochs": 5}, "priced": {"start": "start", "penalty_weight": 0.1, "seeds": [1]}},
    },
}


def test_a_profile_holds_networks_and_encoders(folders, monkeypatch):
    monkeypatch.setenv("DAINV_EXPERIMENTS", str(folders / "experiments.yaml"))
    (folders / "experiments.yaml").write_text(
        yaml.safe_dump(sort_keys=False, data={"both": ENCODERS, "alone": {**ENCODERS, "runs": {}}})
    )
    runs = profile_runs("both")
    assert list(runs) == ["both/base-s0", "both/base-s1", "both/start-s0", "both/start-s1", "both/priced-s1"]
    assert runs["both/base-s1"] == {"epochs": 2, "seed": 1}
    assert runs["both/priced-s1"] == dict(measure_every=3, start="both/start-s1", penalty_weight=0.1, seed=1)
    assert list(profile_runs("alone")) == ["alone/start-s0", "alone/start-s1", "alone/priced-s1"]
    assert [run_group(ENCODERS, run)[0] for run in ("base", "start")] == ["train", "pretrain"]
    with pytest.raises(ValueError, match="'elsewhere' is not listed among the runs: base, start, priced"):
        run_group(ENCODERS, "elsewhere")
    with pytest.raises(ValueError, match="'start' is listed twice"):
        run_group({**ENCODERS, "runs": {"start": {}}}, "start")


def test_labels_of_contrastive_runs():
    asked = [dict(penalty="twin", penalty_weight=weight) for weight in (0.0, 0.5)]
    assert [run_label(params) for params in asked] == ["no regularisation", "finite difference, λ = 0.5"]


def test_what_draws_figures_does_not_wait_for_torch():
    code = "import sys, dainv.plots, dainv.paper, dainv.invclr_plots; print(sorted({'torch', 'sklearn'} & set(sys.modules)))"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert shown.strip() == "[]"


def test_a_figure_of_runs_that_are_under_way(folders, monkeypatch):
    path = folders / "e.yaml"
    path.write_text("p: {seeds: [0, 1], runs: {a: {start: b}, b: {}, c: {start: w.pth}}, figures: {f: {x: a}}}\n")
    monkeypatch.setenv("DAINV_EXPERIMENTS", str(path))
    assert profile_runs("p")["p/a-s1"]["start"] == "p/b-s1", "a run of the profile"
    assert profile_runs("p")["p/c-s0"]["start"] == "w.pth", "a file of weights"
    with pytest.raises(FileNotFoundError, match="no run of figure 'f' has been begun"):
        figure_runs("p", "f", begun=True)
    Run.open("p/a-s1", {})
    with pytest.raises(FileNotFoundError):
        figure_runs("p", "f", begun=True)
    (Run.open("p/a-s1").folder / "log.csv").write_text("epoch\n1\n")
    assert [r.seed for r in figure_runs("p", "f", begun=True)] == [1]
    with pytest.raises(FileNotFoundError, match="no run 'p/a-s0'"):
        figure_runs("p", "f")
