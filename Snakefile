# train -> measure -> figure -> report, for one suite of experiments.yaml:
#     python -m snakemake --cores 2 --config profile=quick
# The same file runs on Slurm or Kubernetes with Snakemake's executor plugins.
import json
import shutil
import sys
import time
from collections import Counter
from pathlib import Path

from dainv.jobs import note_progress, show_progress
from dainv.locks import exclusive
from dainv.files import figures_folder, project_root, runs_folder
from dainv.suites import profile_of, run_group, run_mismatch
from dainv.workflow import (
    MEASURED_BY,
    asked_of_measuring,
    asked_runs,
    check_profile,
    figure_needs,
    job_stamp,
    measured_as_asked,
    report_failures,
)

PROFILE = str(config.get("profile", "quick"))
if workflow.is_main_process and (problems := check_profile(PROFILE)):
    sys.exit("\n".join(problems))
SECTION = profile_of(PROFILE)
TRAINED = asked_runs(PROFILE)
if workflow.is_main_process and (problems := [p for name, asked in TRAINED.items() if (p := run_mismatch(name, asked))]):
    sys.exit("\n".join(problems))

RUNS, FIGURES = str(runs_folder() / PROFILE), str(figures_folder(PROFILE))
NOTEBOOKS, LOGS, PYTHON = str(project_root() / "nbs"), str(runs_folder() / PROFILE / "logs"), sys.executable
ON_GPU = shutil.which("nvidia-smi") is not None
BEGAN = time.time()

for folder, variable in ((RUNS, "DAINV_RUNS"), (FIGURES, "DAINV_FIGURES")):
    if set("{}\n") & set(folder):
        sys.exit(f"{folder}: Snakemake takes {{ }} in a path for a wildcard; put the folder elsewhere with {variable}")

# Held until this process ends, however it ends. Snakemake's own lock would outlive it: see `figures` in the Makefile.
if workflow.is_main_process and not workflow.dryrun:
    here = runs_folder() / PROFILE / "logs"
    LOCK = exclusive(here / ".workflow.lock", f"waiting for another workflow that works in {here.parent}")
    exclusive(here / ".jobs.lock", f"waiting for jobs in {here.parent} that a stopped workflow has left running").close()


def for_papermill(path):
    "A path as papermill reads it, which fills parameters into {names}: its own braces are doubled."
    return path.replace("{", "{{").replace("}", "}}")


def asked_of(run):
    "Parameters of the training run in this folder, as JSON for papermill."
    return json.dumps({"name": f"{PROFILE}/{run}", **TRAINED[f"{PROFILE}/{run}"]})


def group_of(run):
    "The notebook that trains a run, and the part of the suite that lists it."
    return run_group(SECTION, run.rpartition("-s")[0])


def started_from(run):
    "The result of the run that this one goes on from, if it is one of the suite."
    start = TRAINED[f"{PROFILE}/{run}"].get("start", "")
    return [f"{RUNS}/{start.removeprefix(PROFILE + '/')}/result.json"] if start in TRAINED else []


def measured_on(run):
    "Parameters of the measuring of a run, with the names of this seed."
    kind, _, seed = run.rpartition("-s")
    asked = asked_of_measuring(SECTION, kind)
    source = {"attack_source": f"{PROFILE}/{asked['attack_source']}-s{seed}"} if "attack_source" in asked else {}
    return {"run": f"{PROFILE}/{run}", **asked, **source}


def trained_for(run):
    "Results that the measuring of a run needs: its own, and that of the run whose attacks it is shown."
    asked = measured_on(run)
    return [f"{RUNS}/{name.split('/', 1)[1]}/result.json" for name in (asked["run"], asked.get("attack_source")) if name]


def stamp_of(job, notebook, asked, done_so=True):
    "A file that is newer than what a job has made if its parameters or its code have changed since."
    return job_stamp(PROFILE, job, project_root() / "nbs" / f"{notebook}.ipynb", asked, done_so)


def measure_stamp(run):
    "The same for the measuring of a run."
    asked = measured_on(run)
    return stamp_of(f"measure-{run}", MEASURED_BY[group_of(run)[0]], asked, measured_as_asked(PROFILE, run, asked))


def figure_stamp(figure):
    "The same for a figure."
    return stamp_of(f"figure-{figure}", f"figures/{figure}", SECTION["figures"][figure])


# All of them now: Snakemake looks into a folder once, and a file that is made afterwards is missing to it.
if workflow.is_main_process:
    for stamp, names in ((measure_stamp, [name.split("/", 1)[1] for name in TRAINED]), (figure_stamp, SECTION["figures"])):
        for name in names:
            stamp(name)


# One thread a run: two runs side by side train more images a second than one on two cores, and steps are timed as they
# are trained. Huge pages and memory that is kept spare a narrow network's step up to a quarter of its time.
# What is handed over stands in quotes (`:q`): no name or path can be taken for a command.
JOB = (
    "OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE MPLBACKEND=Agg "
    "THP_MEM_ALLOC_ENABLE=1 MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=4000000000 "
    "{PYTHON:q} -m dainv.core.jobs {params.log:q} "
)
PAPERMILL = JOB + "-m papermill --no-progress-bar --log-level WARNING {params.notebook:q} {params.executed:q} -y {params.asked:q} < /dev/null"
FIGURE = JOB + "{params.notebook:q} {params.asked:q} < /dev/null"


wildcard_constraints:
    run="[^/]+",
    figure="(?!index)[a-z0-9_]+",


localrules: all, first_figure, report


rule all:
    default_target: True
    input:
        f"{FIGURES}/index.html",
        # Named here too, so that what somebody has deleted is made anew although the page is there.
        [[f"{FIGURES}/{figure}.json", *figure_needs(PROFILE, figure)] for figure in SECTION["figures"]],


# Of so many runs the scheduler may take those last that the first picture waits for: `make figures` prioritizes it.
rule first_figure:
    input:
        f"{FIGURES}/{next(iter(SECTION['figures']))}.json",


rule train:
    input:
        lambda w: started_from(w.run),
    output:
        RUNS + "/{run}/result.json",
    params:
        log=lambda w: f"{LOGS}/train-{w.run}.log",
        notebook=lambda w: for_papermill(f"{NOTEBOOKS}/{group_of(w.run)[0]}.ipynb"),
        executed=lambda w: for_papermill(f"{RUNS}/{w.run}/{group_of(w.run)[0]}.ipynb"),
        asked=lambda w: asked_of(w.run),
    threads: 1
    resources:
        gpu=int(ON_GPU),
    shell:
        PAPERMILL


rule measure:
    input:
        lambda w: [*trained_for(w.run), measure_stamp(w.run)],
    output:
        RUNS + "/{run}/measured.json",
    params:
        log=lambda w: f"{LOGS}/measure-{w.run}.log",
        notebook=lambda w: for_papermill(f"{NOTEBOOKS}/{MEASURED_BY[group_of(w.run)[0]]}.ipynb"),
        executed=lambda w: for_papermill(f"{RUNS}/{w.run}/{MEASURED_BY[group_of(w.run)[0]]}.ipynb"),
        asked=lambda w: json.dumps(measured_on(w.run)),
    priority: 5
    # Seconds per step are only worth measuring on a machine that does nothing else: all cores are reserved for them.
    threads: lambda w: workflow.cores if "timing_steps" in measured_on(w.run) else 1
    resources:
        gpu=int(ON_GPU),
    shell:
        PAPERMILL


rule pairs:
    input:
        lambda w: stamp_of("pairs", "pairs", SECTION.get("pairs", {})),
    output:
        f"{RUNS}/pairs.csv",
    params:
        log=lambda w: f"{LOGS}/pairs.log",
        notebook=lambda w: for_papermill(f"{NOTEBOOKS}/pairs.ipynb"),
        executed=lambda w: for_papermill(f"{RUNS}/pairs.ipynb"),
        asked=lambda w: json.dumps({"profile": PROFILE}),
    threads: 1
    resources:
        gpu=int(ON_GPU),
    shell:
        PAPERMILL


rule figure:
    input:
        lambda w: figure_needs(PROFILE, w.figure),
        lambda w: figure_stamp(w.figure),
    output:
        multiext(FIGURES + "/{figure}", ".png", ".pdf", ".csv", ".json"),
    params:
        log=lambda w: f"{LOGS}/figure-{w.figure}.log",
        notebook=lambda w: f"{NOTEBOOKS}/figures/{w.figure}.ipynb",
        asked=lambda w: json.dumps({"profile": PROFILE}),
    priority: 10
    shell:
        FIGURE


rule report:
    input:
        [f"{FIGURES}/{figure}.json" for figure in SECTION["figures"]],
        lambda w: stamp_of("report", "figures/report", {}),
    output:
        f"{FIGURES}/index.html",
    params:
        log=lambda w: f"{LOGS}/report.log",
        notebook=lambda w: f"{NOTEBOOKS}/figures/report.ipynb",
        asked=lambda w: json.dumps({"profile": PROFILE}),
    shell:
        FIGURE


END_DISPLAY = []


onstart:
    kinds = Counter(job.rule.name for job in workflow.dag.needrun_jobs() if job.rule.name not in ("all", "first_figure"))
    note_progress(Path(LOGS), kinds=kinds, cores=workflow.cores)
    END_DISPLAY.append(show_progress(Path(LOGS)))


onsuccess:
    for end in END_DISPLAY:
        end()


onerror:
    for end in END_DISPLAY:
        end()
    print(report_failures(PROFILE, since=BEGAN), file=sys.stderr)
