# train -> measure -> figure -> report, for one profile of experiments.yaml:
#     snakemake --cores 2 --config profile=quick
# The same file runs on Slurm or Kubernetes with Snakemake's executor plugins.
import json
import os
import shutil
import sys

from dainv.runs import figures_folder, profile_of, profile_runs, project_root, run_group, run_mismatch, run_seeds, runs_folder

PROFILE = config.get("profile", "quick")
SECTION = profile_of(PROFILE)
RUNS, FIGURES, NOTEBOOKS = str(runs_folder()), str(figures_folder(PROFILE)), str(project_root() / "nbs")
TRAINED = profile_runs(PROFILE)
ON_GPU = shutil.which("nvidia-smi") is not None

for name, asked in TRAINED.items():
    if problem := run_mismatch(name, asked):
        sys.exit(problem)


def asked_of(run):
    "Parameters of the training run in this folder, as JSON for papermill."
    return json.dumps({"name": f"{PROFILE}/{run}", **TRAINED[f"{PROFILE}/{run}"]})


def group_of(run):
    "The notebook that trains a run, and the part of the profile that lists it."
    return run_group(SECTION, run.rpartition("-s")[0])


def started_from(run):
    "The result of the run that this one goes on from, if there is one."
    start = TRAINED[f"{PROFILE}/{run}"].get("start")
    return [f"{RUNS}/{start}/result.json"] if start in TRAINED else []


def measured_on(run):
    "Parameters of the measuring of a run; those for all runs of a group are named `common`."
    kind, _, seed = run.rpartition("-s")
    measure = group_of(run)[1].get("measure", {})
    asked = {**measure.get("common", {}), **measure.get(kind, {})}
    source = {"attack_source": f"{PROFILE}/{asked['attack_source']}-s{seed}"} if "attack_source" in asked else {}
    return {"run": f"{PROFILE}/{run}", **asked, **source}


MEASURED_BY = {"train": "measure", "pretrain": "evaluate"}


def trained_for(run):
    "Results that the measuring of a run needs: its own, and that of the run whose attacks it is shown."
    asked = measured_on(run)
    return [f"{RUNS}/{name}/result.json" for name in (asked["run"], asked.get("attack_source")) if name]


FROM_THE_LOG = (
    "dai_loss_dynamics",
    "dai_prefix",
    "invariance_convergence",
    "invclr_samples",
    "invclr_variance",
)


def runs_of(figure):
    "What a figure needs of each of its runs and seeds: what was measured, or for the losses only the log."
    if figure == "invariance_pairs_matrix":
        return f"{RUNS}/{PROFILE}/pairs.csv"
    names = dict.fromkeys(SECTION["figures"][figure].values())
    file = "result.json" if figure in FROM_THE_LOG else "measured.json"
    return [f"{RUNS}/{PROFILE}/{name}-s{seed}/{file}" for name in names for seed in run_seeds(SECTION, name)]


# One thread a run: two runs side by side train more images a second than one on two cores, and steps are timed as they
# are trained. Huge pages and memory that is kept spare a narrow network's step up to a quarter of its time.
PAPERMILL = (
    "OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE "
    "THP_MEM_ALLOC_ENABLE=1 MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=4000000000 "
    + sys.executable
    + " -m papermill --no-progress-bar --log-level WARNING "
)


localrules: all, first_figure, report


rule all:
    default_target: True
    input:
        f"{FIGURES}/index.html",


# Of so many runs the scheduler may take those last that the first picture waits for: `make figures` asks for it first.
rule first_figure:
    input:
        f"{FIGURES}/{next(iter(SECTION['figures']))}.json",


rule train:
    input:
        lambda w: started_from(w.run),
    output:
        RUNS + "/" + PROFILE + "/{run}/result.json",
    params:
        notebook=lambda w: group_of(w.run)[0],
        asked=lambda w: asked_of(w.run),
        executed=lambda w: f"{RUNS}/{PROFILE}/{w.run}/{group_of(w.run)[0]}.ipynb",
    threads: 1
    resources:
        gpu=int(ON_GPU),
    shell:
        PAPERMILL + NOTEBOOKS + "/{params.notebook}.ipynb {params.executed} -y {params.asked:q} < /dev/null"


rule measure:
    input:
        lambda w: trained_for(w.run),
    output:
        RUNS + "/" + PROFILE + "/{run}/measured.json",
    params:
        notebook=lambda w: MEASURED_BY[group_of(w.run)[0]],
        asked=lambda w: json.dumps(measured_on(w.run)),
        executed=lambda w: f"{RUNS}/{PROFILE}/{w.run}/{MEASURED_BY[group_of(w.run)[0]]}.ipynb",
    priority: 5
    # Seconds per step are only worth measuring on a machine that does nothing else: all cores are reserved for them.
    threads: lambda w: workflow.cores if "timing_steps" in measured_on(w.run) else 1
    resources:
        gpu=int(ON_GPU),
    shell:
        PAPERMILL + NOTEBOOKS + "/{params.notebook}.ipynb {params.executed} -y {params.asked:q} < /dev/null"


rule pairs:
    output:
        f"{RUNS}/{PROFILE}/pairs.csv",
    params:
        executed=f"{RUNS}/{PROFILE}/pairs.ipynb",
        profile=PROFILE,
    threads: 1
    resources:
        gpu=int(ON_GPU),
    shell:
        PAPERMILL + NOTEBOOKS + "/pairs.ipynb {params.executed} -p profile {params.profile} < /dev/null"


rule figure:
    input:
        lambda w: runs_of(w.figure),
    output:
        multiext(FIGURES + "/{figure}", ".png", ".pdf", ".csv", ".json"),
    params:
        profile=PROFILE,
    wildcard_constraints:
        figure="(?!index)[a-z0-9_]+",
    priority: 10
    shell:
        PAPERMILL + NOTEBOOKS + "/figures/{wildcards.figure}.ipynb - -p profile {params.profile} < /dev/null > /dev/null"


rule report:
    input:
        expand(FIGURES + "/{figure}.json", figure=SECTION["figures"]),
    output:
        f"{FIGURES}/index.html",
    params:
        profile=PROFILE,
    shell:
        PAPERMILL + NOTEBOOKS + "/figures/report.ipynb - -p profile {params.profile} < /dev/null > /dev/null"
