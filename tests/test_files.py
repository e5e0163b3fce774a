"Files of runs that are damaged, foreign, deleted, half-written or raced for: refused by name, or gone back from."

import multiprocessing
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pandas as pd
import pytest
import torch
from line_trainer import Line

from dainv import files
from dainv.files import (
    load_checkpoint,
    read_json,
    read_table,
    remove_abandoned,
    save_checkpoint,
    sha256_of,
    write_error,
    write_json,
    write_table,
)
from dainv.runs import Measurement, Run, locked, measured_how, run_weights

PARAMS = dict(alpha=0.1, views=8, name="one", classes=["cat", "NA"])
TABLE = pd.DataFrame(dict(layer=["conv1", "NA"] * 50, score=torch.linspace(-1, 1, 100).double().numpy()))


def finished_run(name="one") -> Run:
    "A finished and measured run."
    run = Run.open(name, PARAMS)
    run.save_checkpoint(dict(epoch=1, rows=[], trainer={}))
    run.write("log.csv", pd.DataFrame(dict(epoch=[1, 2, 3], loss=[2.25, 1.125, 0.5])))
    run.write("model.safetensors", dict(weight=torch.linspace(-1, 1, 300), bias=torch.zeros(3)))
    run.finish(dict(metrics=dict(test_accuracy=0.9), data=dict(fingerprint="5f0e2c11")))
    measurement = Measurement(run)
    for file in ("score.parquet", "cka.csv"):
        measurement.write(file, TABLE)
    measurement.write("rdm.safetensors", dict(rdm=torch.rand(10, 10)))
    measurement.write("rdm.json", dict(layer="conv9", ratio=1.25))
    measurement.finish(dict(run=name, scheme="light", seed=3))
    return run


READERS = {
    "params.json": lambda run: run.params,
    "result.json": lambda run: run.result,
    "log.csv": lambda run: run.log,
    "model.safetensors": run_weights,
    "measured.json": lambda run: measured_how(run, "score"),
    "score.parquet": lambda run: run.read_table("score.parquet"),
    "cka.csv": lambda run: run.read_table("cka.csv"),
    "rdm.safetensors": lambda run: run.read("rdm.safetensors"),
    "rdm.json": lambda run: run.read("rdm.json"),
}


@pytest.mark.parametrize("file", READERS)
def test_every_flipped_bit_is_refused_and_the_file_named(folders, file):
    run = finished_run()
    path, drawn = run.folder / file, random.Random(file)
    whole = path.read_bytes()
    READERS[file](run)
    for _ in range(20):
        damaged = bytearray(whole)
        damaged[drawn.randrange(len(whole))] ^= 1 << drawn.randrange(8)
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=f"{path} is damaged .* restore it from a copy, or "):
            READERS[file](run)
    path.write_bytes(whole)
    READERS[file](run)


@pytest.mark.parametrize("file", ["params.json", "result.json", "measured.json", "rdm.json"])
def test_every_bit_of_the_first_line_counts(folders, file):
    run = finished_run()
    path = run.folder / file
    whole = path.read_bytes()
    for bit in range(8 * whole.index(b"\n", 3)):
        damaged = bytearray(whole)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=f"{path} is damaged"):
            read_json(path)


@pytest.mark.parametrize("file", READERS)
def test_every_truncation_is_refused(folders, file):
    run = finished_run()
    path = run.folder / file
    whole = path.read_bytes()
    for length in (0, 1, len(whole) // 2, len(whole) - 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=f"{path} is damaged"):
            READERS[file](run)
    path.write_bytes(whole + b"\n")
    with pytest.raises(ValueError, match=f"{path} is damaged"):
        READERS[file](run)


def test_bytes_that_are_no_text_are_named(folders):
    run = finished_run()
    (run.folder / "result.json").write_bytes(b"\xff\xfe{}")
    with pytest.raises(ValueError, match="result.json is damaged"):
        _ = run.result


def test_runs_of_earlier_versions_are_read(folders):
    "They have no digests; but a file that cannot be parsed is named."
    folder = folders / "runs" / "old"
    folder.mkdir(parents=True)
    (folder / "params.json").write_text('{"alpha": 0.1}')
    (folder / "result.json").write_text('{"schema": 1, "metrics": {}}')
    (folder / "log.csv").write_text("epoch,loss\n1,0.5\n")
    TABLE.to_parquet(folder / "score.parquet")
    (folder / "measured.json").write_text('{"seed": 3}')
    run = Run.open("old", dict(alpha=0.1))
    assert run.log.loss.tolist() == [0.5] and run.result["schema"] == 1 and measured_how(run, "score") == dict(seed=3)
    assert len(run.read_table("score.parquet")) == 100
    (folder / "score.parquet").write_bytes(b"PAR1")
    with pytest.raises(ValueError, match="score.parquet is damaged .* measure the run again"):
        run.read_table("score.parquet")
    (folder / "params.json").write_text("[]")
    with pytest.raises(ValueError, match=r"params.json is damaged"):
        Run.open("old", dict(alpha=0.1))


def test_an_old_run_that_is_measured_anew_keeps_its_training_files(folders):
    folder = folders / "runs" / "old"
    folder.mkdir(parents=True)
    (folder / "params.json").write_text('{"alpha": 0.1}')
    (folder / "result.json").write_text('{"schema": 1, "metrics": {}}')
    (folder / "log.csv").write_text("epoch,loss\n1,0.5\n")
    measurement = Measurement(run := Run.open("old"))
    measurement.write("cka.csv", TABLE)
    measurement.finish(dict(seed=3))
    assert len(run.log) == 1 and len(run.read_table("cka.csv")) == 100 and run.params == dict(alpha=0.1)


def test_digests_are_computed_once(folders, monkeypatch):
    run = finished_run()
    for file in run.folder.iterdir():
        os.utime(file, ns=(time.time_ns() - 10**10, time.time_ns() - 10**10))
    run.read_table("score.parquet")
    monkeypatch.setattr(files.hashlib, "file_digest", None)
    assert len(run.read_table("score.parquet")) == 100


def test_a_table_beside_its_own_record_is_checked(tmp_path):
    digest = sha256_of(write_table(tmp_path / "pairs.csv", TABLE))
    write_json(tmp_path / "pairs.json", dict(seeds=[0], digests={"pairs.csv": digest}))
    assert len(read_table(tmp_path / "pairs.csv")) == 100
    write_table(tmp_path / "pairs.csv", TABLE.assign(score=0.5))
    with pytest.raises(ValueError, match="does not have the digest in pairs.json"):
        read_table(tmp_path / "pairs.csv")


def test_a_record_describes_only_what_its_measurement_wrote(folders):
    run = finished_run()
    second = Measurement(run)
    second.write("cka.csv", TABLE.assign(score=0.5))  # and is killed
    with pytest.raises(ValueError, match=r"cka.csv is damaged \(no record describes it"):
        run.read_table("cka.csv")
    assert measured_how(run, "score")["seed"] == 3 and len(run.read_table("score.parquet")) == 100
    third = Measurement(run)
    third.write("cka.csv", TABLE.assign(score=0.25))
    third.finish(dict(run="one", scheme="heavier", seed=4))
    assert [measured_how(run, name)["seed"] for name in ("score", "rdm", "cka")] == [3, 3, 4]
    assert run.read_table("cka.csv").score.unique() == [0.25]


def test_weights_that_are_not_finite_are_refused(folders):
    run = Run.open("one", PARAMS)
    run.write("model.safetensors", {"conv.weight": torch.tensor([1.0, torch.inf]), "n": torch.tensor(3)})
    run.finish({})
    with pytest.raises(ValueError, match=r"model.safetensors: weights of layer conv.weight are not finite"):
        run_weights(run)


def test_every_damage_of_a_checkpoint_leads_to_the_one_before(tmp_path):
    newest, older, drawn = tmp_path / "c.pt", tmp_path / "c.previous.pt", random.Random(0)
    for epoch in (1, 2):
        save_checkpoint(newest, dict(epoch=epoch, weights=torch.arange(100.0)))
    whole = newest.read_bytes()
    assert torch.load(newest)["epoch"] == 2, "PyTorch reads it without us"
    flips = [drawn.randrange(len(whole)) for _ in range(40)] + list(range(len(whole) - 200, len(whole), 5))
    damaged = [bytes(b ^ (1 << n % 8) if k == n else b for k, b in enumerate(whole)) for n in flips]
    damaged += [whole[:length] for length in (0, 1, 100, len(whole) - 64, len(whole) - 1)] + [b"\0" * len(whole)]
    for content in damaged:
        newest.write_bytes(content)
        with pytest.warns(UserWarning, match=r"c.pt is damaged and was passed over"):
            assert load_checkpoint(newest, older)["epoch"] == 1
    torch.save([1, 2], newest)
    with pytest.warns(UserWarning, match="c.pt is damaged"):
        assert load_checkpoint(newest, older)["epoch"] == 1


def test_damage_to_checkpoints_without_a_digest_raises_nothing_raw(tmp_path):
    torch.save(dict(epoch=2, weights=torch.arange(100.0)), path := tmp_path / "c.pt")
    whole, drawn, found = path.read_bytes(), random.Random(1), 0
    assert load_checkpoint(path)["epoch"] == 2
    for _ in range(60):
        content = bytearray(whole)
        content[drawn.randrange(len(whole))] ^= 1 << drawn.randrange(8)
        path.write_bytes(content)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            state = load_checkpoint(path)
        found += state is None
    assert found > 20


def test_a_checkpoint_of_another_run_is_refused(folders):
    first, second = Run.open("first", dict(alpha=0.1)), Run.open("second", dict(alpha=0.2))
    first.save_checkpoint(dict(epoch=1))
    shutil.copy(first.folder / "checkpoint.pt", second.folder)
    with pytest.raises(ValueError, match="its checkpoint is of another run"):
        second.load_checkpoint()
    assert first.load_checkpoint()["epoch"] == 1


def test_a_result_of_another_run_is_refused(folders):
    first, second = finished_run("first"), Run.open("second", PARAMS)
    shutil.copy(first.folder / "result.json", second.folder)
    with pytest.raises(ValueError, match="params.json is damaged .* digest in result.json"):
        _ = second.result


def test_a_deleted_folder_is_not_written_anew(folders):
    run = Run.open("one", PARAMS)
    run.save_checkpoint(dict(epoch=1))
    shutil.rmtree(run.folder)
    for write in (
        lambda: run.save_checkpoint(dict(epoch=2)),
        lambda: run.write("log.csv", TABLE),
        lambda: run.finish({}),
    ):
        with pytest.raises(RuntimeError, match="was removed or replaced while this process worked on it"):
            write()
    assert not run.folder.exists()
    Run.open("one", PARAMS)  # the same name and parameters, another run
    with pytest.raises(RuntimeError, match="removed or replaced"):
        run.save_checkpoint(dict(epoch=2))


def test_training_stops_when_its_folder_is_deleted(folders, monkeypatch):
    from dainv import loop

    run, real = Run.open("line", {}), loop.train_epoch

    def deleted(trainer, epoch, bar):
        if epoch == 1:
            shutil.rmtree(run.folder)
        return real(trainer, epoch, bar)

    monkeypatch.setattr(loop, "train_epoch", deleted)
    with pytest.raises(RuntimeError, match="was removed or replaced"):
        loop.fit(run, Line, seed=0)
    assert not run.folder.exists()


@pytest.mark.parametrize("file", ["checkpoint.pt", "checkpoint.previous.pt", "model.safetensors", "result.json"])
def test_leftovers_without_parameters_are_not_taken_over(folders, file):
    run = finished_run()
    run.save_checkpoint(dict(epoch=2))
    (run.folder / "params.json").unlink()
    for other in run.folder.iterdir():
        if other.name != file:
            other.unlink()
    with pytest.raises(ValueError, match=f"holds {file} of a run whose params.json is missing"):
        Run.open("one", PARAMS)


def _race(name, number, results):
    "Opens a run, and notes whose parameters it trains with."
    try:
        run = Run.open(name, dict(number=number))
        with locked(run):
            time.sleep(0.002)
            results.put((name, number, run.params["number"]))
    except (ValueError, RuntimeError):
        pass


def test_the_parameters_are_those_of_the_process_that_trains(folders):
    context, rounds = multiprocessing.get_context("fork"), 15
    results = context.Queue()
    for number in range(rounds):
        workers = [context.Process(target=_race, args=(f"r{number}", k, results)) for k in range(4)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
    found = [results.get(timeout=5) for _ in range(results.qsize())]
    assert found and all(asked == had for _, asked, had in found)
    for number in range(rounds):
        assert read_json(folders / "runs" / f"r{number}" / "params.json")["number"] in range(4)


def test_temporary_files_of_dead_writers_are_removed_at_the_next_start(folders):
    run = Run.open("one", PARAMS)
    ended = subprocess.Popen(["true"])
    ended.wait()
    left, alive, other = (
        run.folder / f".checkpoint.{ended.pid}.tmp.pt",
        run.folder / ".log.1.tmp.csv",
        run.folder / ".note.tmp.csv",
    )
    for file in (left, alive, other):
        file.touch()
    with locked(run):
        assert not left.exists() and alive.exists() and other.exists()
    os.utime(alive, (0, 0))  # its writer's number was given to another process long ago
    assert remove_abandoned(run.folder) == [alive.name]
    left.touch()
    run.write("log.csv", TABLE)
    assert not left.exists()


def _save_beyond_the_limit(run, said):
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    tensors = dict(weight=torch.zeros(10_000))
    table = pd.DataFrame(dict(x=torch.rand(30_000).numpy()))
    for write in (
        lambda: run.save_checkpoint(tensors),
        lambda: run.write("model.safetensors", tensors),
        lambda: run.write("log.csv", table),
        lambda: run.write("score.parquet", table),
        lambda: run.write("rdm.json", dict(x=["long"] * 5000)),
    ):
        try:
            write()
        except Exception as error:
            said.put(f"{type(error).__name__}: {error}")


def test_a_disk_that_is_full_says_so(folders):
    context = multiprocessing.get_context("fork")
    run, said = Run.open("one", PARAMS), context.Queue()
    run.save_checkpoint(dict(epoch=1))
    worker = context.Process(target=_save_beyond_the_limit, args=(run, said))
    worker.start()
    messages = [said.get(timeout=30) for _ in range(5)]
    worker.join()
    for message, file in zip(
        messages, ("checkpoint.pt", "model.safetensors", "log.csv", "score.parquet", "rdm.json"), strict=True
    ):
        assert f"while writing {run.folder / file}: free at least 1 MB and start again" in message, message
    assert run.load_checkpoint()["epoch"] == 1
    assert {p.name for p in run.folder.iterdir()} == {".lock", "params.json", "checkpoint.pt"}


def test_a_library_that_hides_a_full_disk_is_seen_through(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(files.shutil, "disk_usage", lambda folder: usage._replace(free=1000))
    error = write_error(RuntimeError("unexpected pos 31168 vs 31064"), tmp_path / "no" / "c.pt", 3_000_000)
    assert "the disk is full while writing" in str(error) and "free at least 7 MB" in str(error)


def test_folders_that_cannot_be_made_are_named(folders, monkeypatch):
    (folders / "runs" / "taken").write_text("a file")
    with pytest.raises(OSError, match="taken/one cannot be written .not a directory.: choose"):
        Run.open("taken/one", PARAMS)
    with pytest.raises(OSError, match=r"taken cannot be written .file exists.: choose"):
        Run.open("taken", PARAMS)
    with pytest.raises(OSError, match="cannot be written .file name too long.: choose"):
        Run.open("/".join(["x" * 100] * 50), PARAMS)

    def read_only(self, *args, **kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "mkdir", read_only)
    with pytest.raises(PermissionError, match="one cannot be written .permission denied.: choose"):
        Run.open("one", PARAMS)


STOPPED = """
import signal, sys, time
sys.path.append("tests")
from line_trainer import Line
from dainv.loop import fit
from dainv.runs import Run

class Slow(Line):
    epochs = 1000
    def step(self, number):
        print("step", flush=True)
        time.sleep(0.02)
        return super().step(number)

signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell turns off in what it starts with &
fit(Run.open("slow", {}), Slow, seed=0)
"""


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_stopped_run_says_how_it_goes_on(folders, number, status):
    root = Path(__file__).resolve().parents[1]
    process = subprocess.Popen(
        [sys.executable, "-c", STOPPED],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=root,
        env={**os.environ, "PYTHONPATH": str(root)},
    )
    for _ in range(8):  # an epoch has 5 steps
        process.stdout.readline()
    process.send_signal(number)
    said = process.communicate(timeout=60)[1]
    assert process.returncode == status, said
    assert "Traceback" not in said
    epoch = len(Run.open("slow").log) + 1
    assert f"run 'line' was stopped: started again with the same parameters, it goes on from epoch {epoch}" in said


class Threads(Line):
    "Notes how many threads its steps have."

    seen: list[int] = []

    def step(self, number):
        self.seen.append(torch.get_num_threads())
        return super().step(number)


def interrupted(run, trainable, monkeypatch, epochs=2):
    "Trains some epochs, and is then interrupted."
    from dainv import loop

    real = loop.train_epoch
    with monkeypatch.context() as patched, pytest.raises(ZeroDivisionError):
        patched.setattr(loop, "train_epoch", lambda t, e, b: real(t, e, b) if e < epochs else 1 / 0)
        loop.fit(run, trainable, seed=0)


def test_a_run_goes_on_with_the_threads_of_its_beginning(folders, monkeypatch, capsys):
    from dainv.loop import fit

    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        interrupted(Run.open("line", {}), Threads, monkeypatch)
        torch.set_num_threads(1)
        Threads.seen.clear()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            fit(Run.open("line", {}), Threads, seed=0)
        assert set(Threads.seen) == {2} and torch.get_num_threads() == 1
        assert "was begun with 2 thread(s), and is continued with as many" in capsys.readouterr().out
    finally:
        torch.set_num_threads(before)


def test_another_processor_is_named(folders, monkeypatch):
    from dainv.loop import fit

    interrupted(Run.open("line", {}), Line, monkeypatch)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "NO SUCH")
    with pytest.warns(
        UserWarning, match=r"'line' is continued in another environment \(processor was .*, is NO SUCH\)"
    ):
        fit(Run.open("line", {}), Line, seed=0)


def test_a_run_begins_again_when_no_checkpoint_is_whole(folders, monkeypatch, capsys):
    from dainv.loop import fit

    whole = fit(Run.open("whole", {}), Line, seed=0)
    run = Run.open("line", {})
    interrupted(run, Line, monkeypatch)
    for file in run.folder.glob("checkpoint*"):
        file.write_bytes(file.read_bytes()[:-1])
    with pytest.warns(UserWarning, match="damaged"):
        again = fit(Run.open("line", {}), Line, seed=0)
    assert "no checkpoint is whole, so it begins again with epoch 1" in capsys.readouterr().out
    assert sha256_of(again.folder / "model.safetensors") == sha256_of(whole.folder / "model.safetensors")


def test_running_statistics_that_are_not_finite_stop_a_run():
    from dainv.loop import check_finite

    line = Line()
    line.bare_model.register_buffer("running_mean", torch.tensor([torch.nan]))
    with pytest.raises(FloatingPointError, match="weights of layer running_mean are not finite"):
        check_finite(line, torch.ones(1, 3), 0)


def test_every_flipped_bit_of_a_report_is_refused(tmp_path):
    from dainv.auditing import Report

    arrays = dict(image_scores=torch.rand(2, 3, 4).numpy(), image_ids=torch.arange(4).numpy())
    folder = Report(dict(layers=["a", "b", "c"]), dict(scores=TABLE), arrays).save(tmp_path / "report")
    drawn = random.Random(0)
    assert len(Report.load(folder).tables["scores"]) == 100
    for file in ("report.json", "scores.parquet", "arrays.npz"):
        whole = (folder / file).read_bytes()
        for _ in range(20):
            content = bytearray(whole)
            content[drawn.randrange(len(whole))] ^= 1 << drawn.randrange(8)
            (folder / file).write_bytes(content)
            with pytest.raises(ValueError, match=rf"{file} is damaged"):
                Report.load(folder)
        (folder / file).write_bytes(whole)
