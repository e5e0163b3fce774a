"The program `dainv`: what it prints, refuses and returns."

import dataclasses
import shlex
import subprocess
import sys

import numpy as np
import pytest
import torch

from dainv import __version__
from dainv.audit_page import Report, audit
from dainv.cli import COMMANDS, main
from dainv.files import read_table
from dainv.options import Parser, add_options, field_comments, params_from_options, read_list, run_command
from dainv.pretraining import PretrainParams
from dainv.runs import Run
from dainv.targets import classes_of
from dainv.training import TrainParams
from dainv.weights import read_weights, weights_digest


def outcome(capsys, *arguments: str) -> tuple[int, str, str]:
    "Status, standard output and standard error of a call."
    try:
        status = main(list(arguments))
    except SystemExit as stopped:
        status = stopped.code
    said = capsys.readouterr()
    return status or 0, said.out, said.err


def refused(capsys, *arguments: str) -> str:
    "The one line of an error, whose status is 2."
    status, _, err = outcome(capsys, *arguments)
    assert status == 2 and err.count("\n") == 1 and "Traceback" not in err, err
    return err


def test_help_lists_every_command_and_needs_no_torch():
    code = "import sys; from dainv.cli import main; main(['--help']); sys.exit('torch' in sys.modules)"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert shown.returncode == 0 and all(f"\n  {name} " in shown.stdout for name in COMMANDS)


@pytest.mark.parametrize("module", ["dainv", "dainv.cli"])
def test_the_package_and_the_module_are_programs(module):
    shown = subprocess.run([sys.executable, "-m", module, "--version"], capture_output=True, text=True)
    assert (shown.returncode, shown.stdout) == (0, f"dainv {__version__}\n")


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_its_options(capsys, command):
    status, out, _ = outcome(capsys, command, "--help")
    assert status == 0 and f"usage: dainv {command}" in out and "--debug" in out


@pytest.mark.parametrize("cls", [TrainParams, PretrainParams])
def test_every_parameter_is_an_option_with_its_comment_and_default(cls):
    parser = Parser("p", "")
    add_options(parser, cls)
    shown = " ".join(parser.format_help().split())
    comments = field_comments(cls)
    for one in dataclasses.fields(cls):
        assert f"--{one.name} " in shown and comments[one.name].split(";")[0] in shown, one.name
        given = vars(parser.parse_args([f"--{one.name}=1"]))
        assert given == {one.name: "1"}
    assert params_from_options(cls, {}) == cls()


def test_values_of_all_types_in_both_spellings():
    parser = Parser("p", "")
    add_options(parser, TrainParams)
    line = [
        "--alpha=0.2",
        "--beta-end",
        "-1",
        "--layers",
        "[conv7, conv8]",
        "--classes=a b,007",
        "--milestones",
        "0.5,.75",
    ]
    asked = params_from_options(
        TrainParams, vars(parser.parse_args([*line, "--pool=true", "--name", "=x", "--views", "4"]))
    )
    assert (asked.alpha, asked.beta_end, asked.pool, asked.name, asked.views) == (0.2, -1.0, True, "=x", 4)
    assert (asked.layers, asked.classes, asked.milestones) == (["conv7", "conv8"], ["a b", "007"], [0.5, 0.75])
    assert read_list("") == read_list("[]") == [] and read_list("a") == ["a"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["tran"], "did you mean train?"),
        (["train", "--alhpa", "0.1"], "did you mean --alpha?"),
        (["train", "--alph", "0.1"], "did you mean --alpha?"),
        (["train", "--alpha", "0.1", "--alpha=0.2"], "--alpha is given twice"),
        (["train", "--batch_size", "8", "--batch-size=8"], "--batch_size is given twice"),
        (["train", "--alpha"], "expected one argument"),
        (["train", "--alpha", "x"], "'alpha': expected float"),
        (["train", "--alpha=1.5"], "alpha=1.5"),
        (["train", "--layers", "[a"], "is no list"),
        (["train", "more"], "unknown argument 'more'"),
        (["figures", "--profile", "quik"], "profile='quik'"),
        (["runs", "--format", "xml"], "invalid choice"),
    ],
)
def test_a_mistake_is_one_line(capsys, folders, arguments, said):
    assert said in refused(capsys, *arguments)
    assert not list((folders / "runs").iterdir())


def test_a_traceback_is_shown_on_demand(folders):
    with pytest.raises(ValueError, match="alpha=1.5"):
        main(["train", "--alpha=1.5", "--debug"])


def test_errors_of_the_program_itself_are_told_from_those_of_its_input(capsys):
    assert run_command(lambda a: {}["x"], [], "p") == 2
    assert capsys.readouterr().err == "p: KeyError: 'x' (--debug shows where)\n"

    def interrupted(arguments):
        raise KeyboardInterrupt

    assert run_command(interrupted, [], "p") == 130


def test_a_run_is_trained_and_listed(capsys, folders, tiny):
    line = [f"--{name}={value}" for name, value in {**tiny, "epochs": 1, "name": "mine"}.items()]
    status, out, _ = outcome(capsys, "train", *line)
    accuracy = Run.open("mine").result["metrics"]["test_accuracy"]
    assert status == 0 and out.strip().endswith(f"mine: test accuracy {accuracy:.4f}")
    status, out, _ = outcome(capsys, "runs", "--format=csv", "--columns", "test_accuracy,epochs")
    name, finished, *values = out.splitlines()[1].split(",")
    assert (status, name, finished, float(values[0])) == (0, "mine", "True", 1.0) and float(values[1]) == pytest.approx(
        accuracy
    )
    assert "no run has 'acc'" in refused(capsys, "runs", "--columns", "acc")


def test_no_runs_is_no_error(capsys, folders):
    status, out, err = outcome(capsys, "runs")
    assert status == 0 and not out and "no runs in" in err


NETWORK = """
from torch import nn

def make_net(num_classes=3):
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, num_classes))

wrong = lambda: 3
"""
QUICK = ["--transformations=rotation,flip", "--untrained", "1", "--repeats=1", "--layers", "all"]


@pytest.fixture
def network(tmp_path):
    "A file with a function that makes a network, and weights for it with two classes."
    file = tmp_path / "my_net.py"
    file.write_text(NETWORK)
    namespace = {}
    exec(NETWORK, namespace)
    torch.manual_seed(0)
    model = namespace["make_net"](2)
    torch.save({"state_dict": {f"module.{k}": v for k, v in model.state_dict().items()}}, tmp_path / "weights.pth")
    return file, tmp_path / "weights.pth", model


def test_a_network_of_ones_own_is_audited_on_a_folder_of_images(capsys, blobs, folders, network):
    file, weights, model = network
    line = [f"{file}:make_net", "--weights", str(weights), "--images", str(folders / "data" / blobs / "test")]
    status, out, err = outcome(
        capsys, "audit", *line, f"--out={folders / 'report'}", "--mean=.5,.5,.5", "--std", "[1, 1, 1]", *QUICK
    )
    assert status == 0, err
    report = Report.load(folders / "report")
    head = report.header
    assert (head["classes"], head["n_images"], head["weights"]) == (
        ["left", "right"],
        32,
        weights_digest(model.state_dict(), counters=True),
    )
    assert head["preprocess"] == "(x - (0.5, 0.5, 0.5)) / (1, 1, 1)" and shlex.split(head["command"])[:2] == [
        "dainv",
        "audit",
    ]
    assert out.count("\n") == len(report.layers) + 1 and out.strip().endswith("index.html")
    page = (folders / "report" / "index.html").read_text(encoding="utf-8")
    assert "hash of the weights" in page and head["weights"] in page
    expected = audit(
        model,
        str(folders / "data" / blobs / "test"),
        preprocess=lambda x: x - 0.5,
        layers="all",
        transformations=["rotation", "flip"],
        repeats=1,
        untrained=0,
        progress=False,
    )
    np.testing.assert_allclose(report.scores.score, expected.scores.score, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "network"),
        (["resnet19", "--images", "spirograph"], "'resnet19' is no network"),
        (["resnet18"], "--images is missing"),
        (["resnet18", "--images", "nowhere/photos"], "expected a folder"),
        (["resnet18", "--images", "spirograph", "--weights", "nowhere.pth"], "nowhere.pth"),
        (["resnet18", "--images", "spirograph", "--size", "big"], "--size big"),
        (["resnet18", "--images", "spirograph", "--imagenet", "--cifar10"], "two normalisations"),
        (["resnet18", "--images", "spirograph", "--mean=.5,.5,.5"], "--mean and --std come together"),
        (["resnet18", "--images", "spirograph", "--mean=a", "--std=b"], "--mean a --std b"),
        (["NET:make", "--images", "spirograph"], "defines no 'make'; it has make_net, wrong"),
        (["NET:wrong", "--images", "spirograph"], "returns a int"),
        (["NET:make_net", "--images", "spirograph", "--limit=20", "--layers", "conv9"], "conv9"),
        (
            ["NET:make_net", "--images", "spirograph", "--limit=20", "--transformations", "rotatoin"],
            "'rotatoin' is unknown",
        ),
    ],
)
def test_a_mistake_in_an_audit_is_one_line(capsys, folders, network, arguments, said):
    line = [argument.replace("NET", str(network[0])) for argument in arguments]
    status, _, err = outcome(capsys, "audit", *line, f"--out={folders / 'report'}")
    assert status == 2 and said in err.splitlines()[-1] and "Traceback" not in err
    assert not (folders / "report").exists()


def test_a_run_is_audited_on_its_own_data(capsys, folders, tiny):
    outcome(capsys, "train", *[f"--{name}={value}" for name, value in {**tiny, "epochs": 1, "name": "mine"}.items()])
    status, _, err = outcome(capsys, "audit", "mine", "--out", str(folders / "report"), *QUICK[:3])
    assert status == 0, err
    head = Report.load(folders / "report").header
    assert (head["model"], head["n_images"], head["classes"]) == ("mine", 32, ["left", "right"])
    assert "has its own weights" in refused(capsys, "audit", "mine", "--weights", "x.pth")


def test_the_number_of_classes_is_that_of_the_weights(network):
    _, weights, _ = network
    assert classes_of(read_weights(weights)) == 2 and classes_of({"a": torch.zeros(3)}) is None


def test_two_audits_are_compared(capsys, folders, network):
    file, weights, _ = network
    for name, extra in (("a", []), ("b", ["--weights", str(weights)])):
        line = [f"{file}:make_net", "--images=spirograph", "--limit=12", *extra, *QUICK, "--untrained=0"]
        line.remove("--untrained"), line.remove("1")
        assert outcome(capsys, "audit", *line, f"--out={folders / name}")[0] == 0
    first, second = str(folders / "a"), str(folders / "b")
    status, _, err = outcome(capsys, "compare", first, second, f"--out={folders / 'c'}", "--pairs", "0=0,input=input")
    assert status == 0, err
    table = read_table(folders / "c" / "differences.csv")
    np.testing.assert_allclose(table.difference, table.score_b - table.score_a, atol=1e-6)
    assert set(table.layer_a) == {"0", "input"} and (folders / "c" / "index.html").is_file()
    assert "holds no report" in refused(capsys, "compare", first, str(folders / "c"))
    assert "--pairs 0" in refused(capsys, "compare", first, second, "--pairs", "0")
