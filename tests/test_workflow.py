"What `make figures` does around its runs: checks, odd paths, failures, kills."

import fcntl
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from unittest.mock import patch

import nbformat
import pandas as pd
import pytest

from dainv.files import runs_folder, write_json
from dainv.jobs import Progress, failed_jobs, note_progress, run_notebook
from dainv.locks import exclusive
from dainv.params import check_params
from dainv.runs import Measurement, Run
from dainv.suites import experiments, profile_of
from dainv.workflow import (
    asked_of_measuring,
    asked_runs,
    check_profile,
    code_digest,
    figure_needs,
    job_stamp,
    measured_as_asked,
    missing_figures,
    notebook_params,
    report_failures,
)

ROOT = Path(__file__).resolve().parents[1]
ODD = "ä $HOME $(touch HIT) `touch HIT` 'q' \"d\" ; & so"
RUN = "seeds: [0], runs: {a: {}}"
FIGURE = "figures: {dai_score: {dai: a}}"


@pytest.fixture
def file(folders, monkeypatch):
    "A function that writes the experiments."
    monkeypatch.setenv("DAINV_EXPERIMENTS", str(folders / "e.yaml"))
    return lambda text: (folders / "e.yaml").write_text(text, encoding="utf-8")


@pytest.mark.parametrize("profile", list(experiments()))
def test_the_experiments_of_the_project_are_right(profile):
    assert check_profile(profile) == []


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "expected profiles"),
        ("q: {}", "profile='p' is not in e.yaml; known: q"),
        ("p: 3", "profile p: expected runs and figures, not 3"),
        (f"p: {{{RUN}}}", "no figures"),
        (f"p: {{{RUN}, {FIGURE}, rusn: {{}}}}", "unknown key 'rusn'; did you mean 'runs'"),
        (f"p: {{seeds: 0, runs: {{a: {{}}}}, {FIGURE}}}", "run a, seeds: expected a list .* found 0"),
        (f"p: {{seeds: [], runs: {{a: {{}}}}, {FIGURE}}}", r"run a, seeds: expected a list .* found \[\]"),
        (f"p: {{seeds: [true], runs: {{a: {{}}}}, {FIGURE}}}", "run a, seeds: expected"),
        (f"p: {{seeds: [0, 0], runs: {{a: {{}}}}, {FIGURE}}}", "run a, seeds: expected a list of different"),
        (f"p: {{runs: {{a: {{}}}}, {FIGURE}}}", "run a, seeds: expected a list .* found None"),
        (f"p: {{seeds: [0], runs: {{a: }}, {FIGURE}}}", "run a: expected .*nothing stands behind it"),
        (f"p: {{seeds: [0], runs: [a], {FIGURE}}}", "p, runs: expected `name: value`"),
        (f"p: {{seeds: [0], runs: {{a: {{alhpa: 1}}}}, {FIGURE}}}", "run a: unknown parameter 'alhpa': did you mean"),
        (f"p: {{seeds: [0], runs: {{a: {{alpha: 2}}}}, {FIGURE}}}", "run a: parameter alpha=2.0: expected 0 <= alpha"),
        (f"p: {{seeds: [0], runs: {{a: {{classes: [1]}}}}, {FIGURE}}}", r"run a: parameter 'classes'.*in quotes"),
        (f"p: {{seeds: [0], runs: {{a: {{seed: 1}}}}, {FIGURE}}}", "run a, seed: the workflow sets it itself"),
        (f"p: {{seeds: [0], runs: {{a: {{name: b}}}}, {FIGURE}}}", "run a, name: the workflow sets it itself"),
        (f"p: {{{RUN[:-1]}, 'b c': {{}}}}, {FIGURE}}}", "run b c: name='b c': use letters"),
        (f"p: {{{RUN[:-1]}, '$(touch x)': {{}}}}, {FIGURE}}}", "run .*touch x.*: use letters"),
        (f"p: {{{RUN[:-1]}, b/c: {{}}}}, {FIGURE}}}", "run b/c: name='b/c': a run has no /"),
        (f"p: {{{RUN[:-1]}, 1: {{}}}}, {FIGURE}}}", "runs: 1 is no word; put it in quotes"),
        (f"p: {{{RUN}, common: {{lr: x}}, {FIGURE}}}", "run a: parameter 'lr': expected float"),
        (f"p: {{{RUN}, common: 3, {FIGURE}}}", "p, common: expected `name: value`"),
        (f"p: {{{RUN}, measure: {{b: {{}}}}, {FIGURE}}}", "measure, b: no such run; known: a"),
        (f"p: {{{RUN}, measure: {{a: {{repeat: 2}}}}, {FIGURE}}}", "measure, a: unknown parameter 'repeat'"),
        (f"p: {{{RUN}, measure: {{a: {{attack_source: b}}}}, {FIGURE}}}", "attack_source: 'b' is no run; known: a"),
        (f"p: {{{RUN}, measure: {{a: {{run: q/b}}}}, {FIGURE}}}", "measure, a, run: the workflow sets it itself"),
        (
            f"p: {{{RUN}, measure: {{a: {{what: [scores]}}}}, {FIGURE}}}",
            r"measure, a: parameter what=\['scores'\]: expected",
        ),
        (f"p: {{{RUN}, measure: {{a: {{repeats: -1}}}}, {FIGURE}}}", "measure, a: parameter repeats=-1: expected 1 to"),
        (
            f"p: {{{RUN}, measure: {{a: {{attack_eps: [8]}}}}, {FIGURE}}}",
            r"a: parameter attack_eps=\[8.0\]: expected 0 to 1",
        ),
        (f"p: {{{RUN}, measure: {{common: {{what: []}}, a: {{}}}}, {FIGURE}}}", "measure, a: parameter what="),
        (f"p: {{encoders: {{{RUN}, measure: {{a: {{passes: 1}}}}}}, {FIGURE}}}", "measure, a: parameter passes=1"),
        (
            f"p: {{encoders: {{{RUN}, measure: {{common: {{counts: [1, 2]}}, a: {{ensemble_counts: [3]}}}}}}, {FIGURE}}}",
            r"measure, a: parameter ensemble_counts=\[3\]: expected at most 2",
        ),
        (
            f"p: {{{RUN}, pairs: {{attack_step: 3}}, {FIGURE}}}",
            "pairs: unknown key 'attack_step'; did you mean 'attack_st",
        ),
        (f"p: {{{RUN}, pairs: {{alpha: 0.5}}, {FIGURE}}}", "pairs: unknown key 'alpha'"),
        (f"p: {{{RUN}, pairs: {{eps: 8}}, {FIGURE}}}", "p, pairs: parameter eps=8.0: expected above 0 and at most 1"),
        (f"p: {{{RUN}, pairs: {{attack_images: -2}}, {FIGURE}}}", "pairs: parameter attack_images=-2"),
        (f"p: {{{RUN}, pairs: {{epochs: -2}}, {FIGURE}}}", "pairs: parameter epochs=-2: expected 1 to"),
        (
            f"p: {{{RUN}, pairs: {{classes: [cat]}}, {FIGURE}}}",
            r"pairs: parameter classes=\['cat'\]: expected two or more",
        ),
        (f"p: {{{RUN}, pairs: {{seeds: [-1], eps: 0.1}}, {FIGURE}}}", "p, pairs, seeds: expected a list of different"),
        (f"p: {{{RUN}, figures: {{dai_tome: {{dai: a}}}}}}", "unknown key 'dai_tome'; did you mean 'dai_time'"),
        (f"p: {{{RUN}, figures: {{dai_time: {{dai: b}}}}}}", "dai_time, dai: 'b' is no run of this suite; known: a"),
        (f"p: {{{RUN}, figures: {{dai_time: }}}}", "dai_time: expected"),
        (f"p: {{{RUN}, figures: {{dai_score: {{day: a}}}}}}", "dai_score: unknown key 'day'; did you mean 'dai'"),
        (
            f"p: {{{RUN}, figures: {{dai_time: {{dai: a}}}}}}",
            "dai_time, dai: timing.csv is not measured on 'a'; ask for timing under `measure`",
        ),
        (f"p: {{{RUN}, figures: {{invariance_pairs_matrix: {{}}}}}}", "there is no such section"),
        (
            f"p: {{seeds: [0], encoders: {{runs: {{a: {{start: b}}, b: {{start: a}}}}}}, {FIGURE}}}",
            "run a, start: 'a' is no run to go on from; it comes back to itself",
        ),
        (
            f"p: {{seeds: [0, 1], encoders: {{runs: {{a: {{start: b}}, b: {{seeds: [1]}}}}}}, {FIGURE}}}",
            "run a, start: 'b' has no seed 0",
        ),
        (f"p: {{{RUN}, encoders: {{runs: {{a: {{}}}}}}, {FIGURE}}}", "among the runs and among the encoders"),
        (f"p: {{{RUN}, encoders: [], {FIGURE}}}", "encoders: expected"),
    ],
)
def test_a_mistake_in_the_experiments_is_one_line(file, text, message):
    file(text)
    problems = check_profile("p")
    assert any(re.search(message, problem) for problem in problems), problems
    assert all("\n" not in problem and "e.yaml" in problem for problem in problems)


def test_numbers_that_yaml_reads_as_words_are_numbers(file):
    file(f"p: {{seeds: [0], runs: {{a: {{lr: 1e-5}}}}, {FIGURE}}}")
    assert check_profile("p") == [] and asked_runs("p") == {"p/a-s0": {"lr": 1e-5, "seed": 0}}


def test_the_parameters_of_notebooks_are_read_from_their_cells():
    found = check_params(notebook_params("evaluate"), {"run": "x", "counts": "[1, 2]"})
    assert (found.run, found.counts, found.passes) == ("x", [1, 2], 10)
    with pytest.raises(ValueError, match="did you mean 'repeats'"):
        check_params(notebook_params("measure"), {"repeat": 3})


def test_why_a_figure_is_missing(file, folders):
    attacked = "measure: {b: {attack_source: a}}"
    encoders = "encoders: {seeds: [3], runs: {c: {}, d: {start: c}}}"
    figures = "figures: {dai_time: {dai: b}, invclr_variance: {plain: d}, dai_score: {dai: e}, invclr_defects: {}}"
    file(f"p: {{seeds: [0], runs: {{a: {{}}, b: {{}}, e: {{}}}}, {attacked}, {encoders}, {figures}}}")
    failed = {"train-a-s0": "one", "train-c-s3": "two", "measure-e-s0": "three", "figure-invclr_defects": "four"}
    assert missing_figures("p", failed) == {
        "dai_time": "train a-s0 failed: one",
        "invclr_variance": "train c-s3 failed: two",
        "dai_score": "measure e-s0 failed: three",
        "invclr_defects": "figure invclr_defects failed: four",
    }
    (folders / "figures/p").mkdir()
    write_json(folders / "figures/p/dai_time.json", {})
    assert "dai_time" not in missing_figures("p", failed)
    assert figure_needs("p", "invclr_variance") == [str(runs_folder() / "p/d-s3/result.json")]
    (folders / "figures/p/dai_time.json").unlink()
    logs = runs_folder() / "p" / "logs"
    logs.mkdir(parents=True)
    (logs / "train-a-s0.failed").write_text("ValueError: <no>")
    said = report_failures("p", since=0)
    assert "1 job(s) failed" in said and "train a-s0: ValueError: <no>" in said and "train-a-s0.log" in said
    page = (folders / "figures/p/index.html").read_text()
    assert "Missing figures" in page and "train a-s0 failed: ValueError: &lt;no&gt;" in page
    assert failed_jobs(logs, since=time.time() + 10) == {}


def test_what_has_changed_is_made_anew(folders):
    notebook = notebook_of(folders / "n.ipynb", "x: int = 1", "# says nothing\nx + 1")

    def old(asked=None, done_so=True):
        return os.path.getmtime(job_stamp("p", "measure-a-s0", notebook, asked or {}, done_so)) == 1

    assert old() and old() and not old({"repeats": 3}) and old(), "a change that was taken back is none"
    notebook_of(notebook, "x: int = 1", "x + 1  # a comment\n")
    code_digest.cache_clear()
    assert old(), "comments do nothing"
    notebook_of(notebook, "x: int = 1", "x + 2")
    code_digest.cache_clear()
    assert not old() and not old()
    done = job(runs_folder() / "p/logs/measure-a-s0.log", notebook, "{}")
    assert done.returncode == 0 and old(), "once it is made, it is as asked"
    (runs_folder() / "p/logs/measure-a-s0.made").unlink()
    assert not old(done_so=False)


def test_edited_plots_change_the_figures_that_use_them():
    figure = ROOT / "nbs" / "figures" / "dai_time.ipynb"
    text = (ROOT / "dainv" / "reporting" / "plots.py").read_text()
    before = code_digest(figure)
    code_digest.cache_clear()
    with patch.object(Path, "read_text", lambda self, **how: self.read_bytes().decode().replace("0.27 *", "0.28 *")):
        assert "0.27 *" in text and code_digest(figure) != before
    code_digest.cache_clear()


def test_measuring_is_compared_with_what_was_asked(file, folders):
    run, asked = Run.open("p/a-s0", {"views": 8}), {"run": "p/a-s0", "what": ["score"], "repeats": 3}
    file(f"p: {{{RUN}, measure: {{a: {{what: [score], repeats: 3}}}}, {FIGURE}}}")
    assert measured_as_asked("p", "a-s0", asked), "what is not there is measured anyway"
    for repeats, right in ((5, False), (3, True)):
        measurement = Measurement(run)
        measurement.write("score.parquet", pd.DataFrame({"score": [1.0]}))
        measurement.finish({"run": "p/a-s0", "what": ["score"], "repeats": repeats, "precision": "32-true"})
        assert measured_as_asked("p", "a-s0", asked) == right
    file(f"p: {{{RUN}, measure: {{a: {{what: [score, probes], repeats: 3}}}}, {FIGURE}}}")
    assert not measured_as_asked("p", "a-s0", asked | {"what": ["score", "probes"]})


def test_progress_counts_jobs_and_epochs(tmp_path):
    logs = tmp_path / "q" / "logs"
    assert Progress.read(logs).seconds_left(0.0) == 0 and Progress.read(logs).total == 0
    note_progress(logs, kinds={"train": 3, "measure": 3, "figure": 2, "report": 1}, cores=2)
    note_progress(logs, job="train-a-s0", began=10.0)
    assert Progress.read(logs).seconds_left(20.0) is None
    (logs.parent / "a-s0").mkdir()
    (logs.parent / "a-s0/params.json").write_text('{"epochs": 4}')
    (logs.parent / "a-s0/log.csv").write_text("epoch\n1\n2\n")
    found = Progress.read(logs)
    assert found.seconds_left(20.0) == (6 * 20 + 3 * 4 - 10) / 2
    assert found.line(20.0, 120) == "0 of 9 jobs done, 61 s left: train a-s0, epoch 3 of 4"
    note_progress(logs, job="train-a-s0", began=10.0, ended=40.0, failed=False)
    found = Progress.read(logs)
    assert not found.running and found.ended == {"train-a-s0": 30.0} and len(found.line(40.0, 20)) < 20


def notebook_of(path, *sources):
    "A notebook of these code cells, of which the first holds the parameters."
    content = nbformat.v4.new_notebook()
    content.cells = [nbformat.v4.new_code_cell(source) for source in sources]
    content.cells[0].metadata.tags = ["parameters"]
    nbformat.write(content, path)
    return path


def test_a_notebook_runs_without_a_kernel(tmp_path):
    path = notebook_of(tmp_path / "n.ipynb", "side: int = 1", "display(side)", "area = side**2\narea")
    assert run_notebook(path, {})["area"] == 1 and run_notebook(path, {"side": 3})["area"] == 9
    content = nbformat.read(path, 4)
    del content.cells[0].metadata["tags"]
    nbformat.write(content, path)
    with pytest.raises(ValueError, match="no cell is tagged"):
        run_notebook(path, {})


def job(log, *arguments, **options):
    command = [sys.executable, "-m", "dainv.core.jobs", str(log), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, **options)


def test_a_job_says_how_it_went(tmp_path):
    folder = tmp_path / ODD.replace("/", "")
    folder.mkdir()
    good = notebook_of(folder / "good.ipynb", "x: int = 1", "print('seen')")
    bad = notebook_of(folder / "bad.ipynb", "x: int = 1", "1 / x")
    done = job(folder / "logs/figure-good.log", good, "{}", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "") and "figure good: done in" in done.stdout
    assert (folder / "logs/figure-good.log").read_text() == "seen\n"
    done = job(folder / "logs/figure-bad.log", bad, '{"x": 0}', cwd=tmp_path)
    assert (
        done.returncode == 1 and "figure bad: FAILED in code cell 2: ZeroDivisionError: division by zero" in done.stdout
    )
    assert "1 / x" in (folder / "logs/figure-bad.log").read_text(), "the line that failed"
    assert failed_jobs(folder / "logs") == {"figure-bad": "in code cell 2: ZeroDivisionError: division by zero"}
    done = job(folder / "logs/figure-bad.log", "-m", "json.tool", "--help", cwd=tmp_path)
    assert done.returncode == 0 and failed_jobs(folder / "logs") == {}
    done = job(folder / "logs/train-none.log", "-m", "json.tool", "nowhere.json", cwd=tmp_path)
    assert done.returncode == 1 and "nowhere.json" in failed_jobs(folder / "logs")["train-none"]
    assert not list(tmp_path.rglob("HIT"))


def test_a_job_that_is_killed_has_failed(tmp_path):
    slow = notebook_of(tmp_path / "n.ipynb", "x: int = 1", "import time; print('up', flush=True); time.sleep(60)")
    log = tmp_path / "logs/train-slow.log"
    process = subprocess.Popen(
        [sys.executable, "-m", "dainv.core.jobs", str(log), str(slow), "{}"], stdout=subprocess.PIPE
    )
    process.stdout.readline()
    with open(tmp_path / "logs/.jobs.lock") as lock, pytest.raises(BlockingIOError):
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    process.kill()
    process.wait()
    assert "ended from outside" in failed_jobs(tmp_path / "logs")["train-slow"]
    exclusive(tmp_path / "logs/.jobs.lock", "waits").close()


def test_a_workflow_waits_for_what_another_has_left_running(tmp_path):
    held = exclusive(tmp_path / ".lock", "", shared=True)
    code = "from dainv.locks import Path, exclusive; import sys; exclusive(Path(sys.argv[1]), 'waiting'); print('free')"
    command = [sys.executable, "-c", code, str(tmp_path / ".lock")]
    other = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert other.stderr.readline() == "waiting\n" and other.poll() is None
    held.close()
    assert other.communicate(timeout=60)[0] == "free\n"


def recipe():
    "The options that `make figures` gives Snakemake."
    shown = subprocess.run(["make", "-n", "-o", ".venv/.ready", "figures"], cwd=ROOT, capture_output=True, text=True)
    line = next(x for x in shown.stdout.replace("\\\n", " ").splitlines() if "snakemake" in x)
    words = shlex.split(line.split("<")[0])
    return words[words.index("snakemake") + 1 :]


TINY = dict(dataset="spirograph", train_size=64, test_size=40, batch_size=16, views=4, epochs=1, width=0.05)


def profile_of_two(**of_bad):
    runs = {"bad": {**of_bad}, "größer=1": {"alpha": 0.1, "lr": "1e-2"}}
    figures = {"dai_score": {"dai": "bad"}, "dai_loss_dynamics": {"dai": "größer=1"}}
    return json.dumps({"quick": dict(common=TINY, seeds=[0], runs=runs, figures=figures)})


@pytest.fixture
def odd(folders, monkeypatch):
    "Runs and figures in folders of odd names; the command of `make figures`."
    for name in ("runs", "figures"):
        monkeypatch.setenv(f"DAINV_{name.upper()}", str(folders / ODD / name))
    monkeypatch.setenv("DAINV_EXPERIMENTS", str(folders / "e.yaml"))
    return [sys.executable, "-m", "snakemake", "-s", str(ROOT / "Snakefile"), "-d", str(folders), *recipe()]


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("make"), reason="needs make")
def test_what_does_not_need_the_failed_run_is_made(odd, folders):
    (folders / "e.yaml").write_text(profile_of_two(dataset="folder", data_root="nowhere"))
    done = subprocess.run(odd, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert done.returncode == 1
    assert re.search(r"train bad-s0: in code cell \d: FileNotFoundError", done.stderr)
    assert "Figures that are missing: dai_score" in done.stderr
    figures = folders / ODD / "figures" / "quick"
    assert (figures / "dai_loss_dynamics.png").exists() and not (figures / "dai_score.png").exists()
    page = (figures / "index.html").read_text()
    assert "dai_loss_dynamics.png" in page and re.search(
        r"train bad-s0 failed: in code cell \d: FileNotFoundError", page
    )
    assert not re.search("IPKernelApp", (folders / ODD / "runs/quick/logs/train-größer=1-s0.log").read_text())
    assert re.search(r"^\[\d/\d\] figure dai_loss_dynamics: done in", done.stdout, re.M)
    assert len((done.stdout + done.stderr).splitlines()) < 30 and "IPKernelApp" not in done.stdout + done.stderr
    assert not list(folders.rglob("HIT"))


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("make"), reason="needs make")
def test_it_goes_on_after_a_kill(odd, folders):
    (folders / "e.yaml").write_text(
        json.dumps(
            {
                "quick": dict(
                    common={**TINY, "epochs": 15},
                    seeds=[0],
                    runs={"one": {}},
                    figures={"dai_loss_dynamics": {"dai": "one"}},
                )
            }
        )
    )
    first = subprocess.Popen(odd, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, stdin=subprocess.DEVNULL)
    checkpoint = folders / ODD / "runs/quick/one-s0/checkpoint.pt"
    until = time.monotonic() + 120
    while not checkpoint.exists() and time.monotonic() < until:
        time.sleep(0.1)
    first.send_signal(signal.SIGKILL)
    first.wait()
    done = subprocess.run(odd, capture_output=True, text=True, stdin=subprocess.DEVNULL, env=os.environ)
    assert done.returncode == 0, done.stderr
    figure = folders / ODD / "figures/quick/dai_loss_dynamics.png"
    assert figure.exists()
    shutil.rmtree(checkpoint.parent)  # what is deleted is made anew, as the message for changed parameters promises
    figure.unlink()
    done = subprocess.run(odd, capture_output=True, text=True, stdin=subprocess.DEVNULL, env=os.environ)
    assert done.returncode == 0, done.stderr
    assert figure.exists() and (checkpoint.parent / "result.json").exists()


@pytest.mark.slow
def test_several_runs_are_measured_by_name(odd, folders):
    (folders / "e.yaml").write_text(profile_of_two())
    runs = folders / ODD / "runs" / "quick"
    (runs / "logs").mkdir(parents=True)
    asked = [str(runs / name / "measured.json") for name in ("bad-s0", "größer=1-s0")]
    by_name = [*odd[:7], "--cores", "1", "--config", "profile=quick", "--nolock", "-n", "--", *asked]
    done = subprocess.run(by_name, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert done.returncode == 0 and re.search(r"^measure +2$", done.stdout, re.M), done.stdout + done.stderr


def test_what_a_figure_needs_is_measured_on_its_runs(file):
    file(f"p: {{{RUN}, measure: {{a: {{repeats: 2}}}}, figures: {{invariance_probes: {{baseline: a}}}}}}")
    assert check_profile("p") == []
    asked = asked_of_measuring(profile_of("p"), "a")
    assert asked["repeats"] == 2 and "score" in asked["what"] and "probes" in asked["what"]
    file(f"p: {{{RUN}, measure: {{a: {{what: [probes]}}}}, figures: {{invariance_probes: {{baseline: a}}}}}}")
    assert asked_of_measuring(profile_of("p"), "a")["what"] == ["probes"]
    file(f"p: {{{RUN}, figures: {{dai_time: {{dai: a}}}}}}")  # timing keeps all cores busy: it must be asked for
    assert "timing" not in asked_of_measuring(profile_of("p"), "a").get("what", [])
    assert any("timing.csv" in problem for problem in check_profile("p"))
