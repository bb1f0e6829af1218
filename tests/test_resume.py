"""Runs that are interrupted, killed, starved of room or fed damaged files: what is on the disk stays sound, and the
resumed run ends equal, bit for bit, to one that was never interrupted."""

import contextlib
import errno
import functools
import gc
import io
import math
import os
import platform
import random
import re
import signal
import sys
import time
import zipfile
from pathlib import Path

import pytest
import sklearn.datasets
import torch
from conftest import FORKS, SMALL, by_interval, columns, handlers_kept, history_of, run_here

import attacks
import losses
import measure
import train
from flags import Config
from records import checkpoints, files
from records.history import HISTORY_NAME, read_history, write_history
from records.run import Run

PATIENCE = 300  # seconds after which a process is taken to hang
FSYNC = os.fsync


def files_in(folder):
    """Return {relative path: content} of all files below the folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(Path(folder).rglob("*"))
            if path.is_file()}


def bits(value):
    """Return nested dicts and lists of tensors as something that is equal only if every bit is."""
    if isinstance(value, torch.Tensor):
        return str(value.dtype), tuple(value.shape), value.numpy().tobytes()
    if isinstance(value, dict):
        return {key: bits(entry) for key, entry in value.items()}
    return [bits(entry) for entry in value] if isinstance(value, list) else value


def saved(folder):
    return checkpoints.saved_checkpoints(Path(folder) / "checkpoints")


def outcome(folder):
    """Return all of a finished run that has to repeat: the history, the checkpoints' names, weights, optimizer."""
    paths = saved(folder)
    state = torch.load(paths[0], weights_only=True)
    return (columns(folder), [path.name for path in paths], bits(state["model_state_dict"]),
            bits(state["optimizer_state_dict"]))


def assert_sound(folder):
    """Every file under a final name is whole, whatever happened."""
    if (Path(folder) / "logs" / HISTORY_NAME).exists():
        history_of(folder)
        read_history(Path(folder) / "logs" / HISTORY_NAME)
    for path in (Path(folder) / "checkpoints").glob("*.pt"):
        checkpoints.load_checkpoint(path)


def one_line(text):
    assert text.count("\n") == 1 and text.endswith("\n") and "Traceback" not in text, text
    return text


# ---- interruptions in this process ----------------------------------------------------------------------------------

class Killed(BaseException):
    """Takes the place of a SIGKILL where the run is in this process: nothing of train.py runs after it."""


def kill():
    raise Killed


def terminate():
    os.kill(os.getpid(), signal.SIGTERM)


def after_step(patch, step, act):
    """Let act() happen once exactly `step` steps are made."""
    save_due = Run.save_due

    def due(self):
        if self.step == step:
            act()
        return save_due(self)

    patch.setattr(train, "STRETCH", 1)
    patch.setattr(Run, "save_due", due)


def within_log_step(patch, step, act):
    """Let act() happen in the middle of the measurement at `step`."""
    log_step, attack = train.log_step, attacks.radii_withstood

    def log(run, *rest):
        with pytest.MonkeyPatch.context() as inner:
            if run.step == step:
                inner.setattr(attacks, "radii_withstood", lambda *args, **options: act() or attack(*args, **options))
            log_step(run, *rest)

    patch.setattr(train, "log_step", log)


def between_history_and_checkpoint(patch, step, act):
    """Let act() happen after the history with the row of `step` is written and before its checkpoint is."""
    save_checkpoint = checkpoints.save_checkpoint

    def save(folder, state, keep):
        if state["step"] == step:
            act()
        return save_checkpoint(folder, state, keep)

    patch.setattr(checkpoints, "save_checkpoint", save)


def interrupted_run(folder, flags, where, step, act):
    """Run train.py with --resume in this process until act() ends it, as `where` says at `step`."""
    with pytest.MonkeyPatch.context() as patch:
        where(patch, step, act)
        if act is kill:
            with contextlib.suppress(Killed):
                run_here(folder, *flags, "--resume")
                pytest.fail("the run was not killed")
        else:
            run_here(folder, *flags, "--resume", status=128 + signal.SIGTERM)
    gc.collect()  # a dead process holds no lock; here the traceback's frames did
    assert_sound(folder)


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Parse the digits once, and leave out fsync where the run is in this process: no test takes its power away."""
    monkeypatch.setattr(sklearn.datasets, "load_digits", load_digits)
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    with handlers_kept():
        yield


load_digits = functools.cache(sklearn.datasets.load_digits)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Return a function: flags -> the folder of a run with them that nothing interrupted; to be copied, not changed."""
    folders = {}

    def folder_for(*flags):
        if flags not in folders:
            folders[flags] = tmp_path_factory.mktemp("finished")
            run_here(folders[flags], *flags)
        return folders[flags]

    return folder_for


def copied(folder, to):
    """Copy a run's files, the lock aside."""
    for name, content in files_in(folder).items():
        if not name.endswith(".lock"):
            (to / name).parent.mkdir(parents=True, exist_ok=True)
            (to / name).write_bytes(content)
    return to


TINY = [*SMALL, "--train_size=60", "--batch_size=20", "--adv_size=10", "--lc_samples=4"]  # log steps: 0 1 3 7 17 40
CONV = [*TINY, "--width=4", "--train_size=40", "--batch_size=8"]


EVERYWHERE = [
    (after_step, 2, terminate),  # between log points: a rolling checkpoint
    (after_step, 6, kill),  # back to the checkpoint of step 3
    (after_step, 7, terminate),  # at a log point, before it is measured
    (within_log_step, 17, terminate),
    (between_history_and_checkpoint, 17, kill),  # a row without its checkpoint
    (after_step, 39, terminate),
    (within_log_step, 40, terminate),
    (between_history_and_checkpoint, 40, kill),
]
SELDOM = [EVERYWHERE[i] for i in (0, 3, 4, 5)]


@pytest.mark.parametrize("interruptions, flags", [
    (EVERYWHERE, TINY),
    (SELDOM, [*TINY, "--optimizer=sgd", "--lr=0.1", "--momentum=0.9", "--dtype=float64", "--pgd_restarts=2"]),
    (SELDOM, [*TINY, "--loss=mse", "--activation=tanh", "--label_noise=0.3", "--lc_radius=0.01,0.1"]),
    (EVERYWHERE, [*TINY, "--batch_norm", "--train_size=75"]),
    (SELDOM, [*CONV, "--model=cnn", "--batch_norm", "--optimizer=adam"]),
    (SELDOM, [*CONV, "--model=resnet18"]),
], ids=lambda flags: " ".join(flags[len(TINY):]) if isinstance(flags[0], str) else str(len(flags)))
def test_an_interrupted_run_ends_as_if_it_had_not_been(tmp_path, interruptions, flags):
    flags = [*flags, "--n_steps=40"]
    run_here(tmp_path / "whole", *flags)
    assert history_of(tmp_path / "whole")["step"] == [0, 1, 3, 7, 17, 40]
    for interruption in interruptions:
        interrupted_run(tmp_path / "parts", flags, *interruption)
    run_here(tmp_path / "parts", *flags, "--resume")
    assert outcome(tmp_path / "parts") == outcome(tmp_path / "whole")


@pytest.mark.parametrize("flags", [
    ["--n_steps=700"],  # batches are drawn in blocks of 65 epochs, 325 steps
    ["--n_epochs=140", "--log_interval=60"],
], ids=" ".join)
def test_interruptions_with_every_log_schedule(tmp_path, flags):
    flags = [*(SMALL if flags[1:] == [] else by_interval(SMALL)), "--adv_size=10", "--lc_samples=4", *flags]
    run_here(tmp_path / "whole", *flags)
    parts = tmp_path / "parts"
    for step in (5, 325, 330):
        interrupted_run(parts, flags, after_step, step, terminate)
    interrupted_run(parts, flags, within_log_step, history_of(tmp_path / "whole")["step"][-1], kill)
    run_here(parts, *flags, "--resume")
    assert outcome(parts) == outcome(tmp_path / "whole")


def test_a_run_killed_before_its_first_checkpoint_starts_again(tmp_path, finished, capsys):
    flags = (*TINY, "--n_steps=8")
    interrupted_run(tmp_path, flags, within_log_step, 0, kill)
    assert history_of(tmp_path)["step"] == [] and not saved(tmp_path)
    capsys.readouterr()
    run_here(tmp_path, *flags, "--resume")
    assert "nothing to resume" in capsys.readouterr().out
    assert outcome(tmp_path) == outcome(finished(*flags))


def test_a_run_resumed_with_another_attack_says_so(tmp_path, finished, capsys, monkeypatch):
    flags = (*TINY, "--n_steps=8")
    copied(finished(*flags), tmp_path)
    run_here(tmp_path, *TINY, "--n_steps=9", "--resume")
    assert "comparable" not in capsys.readouterr().out
    monkeypatch.setattr(attacks, "ROBUST_VERSION", attacks.ROBUST_VERSION + 1)
    run_here(tmp_path, *TINY, "--n_steps=10", "--resume")
    assert "robust_acc before step 9 is of an earlier version's attack" in " ".join(capsys.readouterr().out.split())
    assert history_of(tmp_path)["derived"]["robust_version"] == attacks.ROBUST_VERSION - 1  # so does the next resume
    run_here(tmp_path / "branch", *TINY, "--n_steps=11", f"--branch_from={saved(tmp_path)[0]}")
    assert "robust_acc before step 10 is" in " ".join(capsys.readouterr().out.split())


# ---- real processes: signals, kills and the lock --------------------------------------------------------------------

STARTED = "in the training loop"


def child(folder, flags, hook, *details):
    """What a started process does: train.py with its output in a file; hook(*details) prepares a fault."""
    train_ = train.train
    train.train = lambda *run: print(STARTED, flush=True) or train_(*run)
    with open(folder / "output", "a") as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    sys.stdout, sys.stderr = (os.fdopen(descriptor, "w", buffering=1) for descriptor in (1, 2))
    os.fsync = FSYNC
    if hook is not None:
        hook(*details)
    sys.exit(train.main([*flags, f"--log_dir={folder}/logs", f"--save_dir={folder}/checkpoints"]))


def start(folder, *flags, hook=None, details=()):
    """Start train.py with --resume in a process of its own; what it prints goes to folder/output."""
    folder.mkdir(exist_ok=True)
    (folder / "output").write_text("")
    process = FORKS.Process(target=child, args=(folder, [*map(str, flags), "--resume"], hook, *details))
    process.start()
    return process


def output_of(folder):
    return (folder / "output").read_text()


def wait_for(process, folder, text):
    """Wait until the process has printed `text` (True) or has ended (False)."""
    deadline = time.monotonic() + PATIENCE
    while text not in output_of(folder):
        if not process.is_alive():
            return text in output_of(folder)
        assert time.monotonic() < deadline, f"no '{text}' in {output_of(folder)}"
        time.sleep(0.002)
    return True


def status_of(process):
    process.join(PATIENCE)
    assert process.exitcode is not None, "the process does not end"
    return process.exitcode


LONG = (*SMALL, "--n_steps=1200", "--log_points=12", "--checkpoint_minutes=0.001")


def seconds_of_a_run(finished):
    """Return how long LONG takes on this machine: random moments are drawn from a part of it."""
    return history_of(finished(*LONG))["seconds"][-1]


def test_runs_killed_at_6_random_moments_end_as_if_they_had_not_been(tmp_path, finished):
    rng = random.Random(0)
    expected, span = outcome(finished(*LONG)), 0.4 * seconds_of_a_run(finished)
    kills = progressed = campaign = 0
    while kills < 6:
        campaign += 1
        assert campaign <= 20, "the runs end before they can be killed"
        folder, alive, last_step = tmp_path / str(campaign), True, 0
        while alive:
            process = start(folder, *LONG)
            if kills < 6 and wait_for(process, folder, STARTED):
                time.sleep(rng.uniform(0, span))
                process.kill()
            status = status_of(process)
            alive = status == -signal.SIGKILL
            if alive:
                kills += 1
                assert_sound(folder)
                step = train_step(folder)
                assert step >= last_step, "work before the last checkpoint was lost"
                progressed += step > last_step
                last_step = step
            else:
                assert status == 0, output_of(folder)
        assert outcome(folder) == expected
        assert not list(folder.rglob("*.part"))
    assert progressed >= 2


def train_step(folder):
    """Return the step of the newest checkpoint; every one has to be sound."""
    state, _ = checkpoints.newest_checkpoint(folder / "checkpoints", pytest.fail)
    return state["step"] if state else 0


def test_a_signal_stops_a_run_that_can_be_resumed(tmp_path, finished):
    flags = [*LONG, "--checkpoint_minutes=10"]
    process = start(tmp_path, *flags)
    assert wait_for(process, tmp_path, STARTED)
    os.kill(process.pid, signal.SIGUSR1)
    assert status_of(process) == 128 + signal.SIGUSR1, output_of(tmp_path)
    said = f"stopped by SIGUSR1 at step {train_step(tmp_path)}; continue with the same command and --resume"
    assert output_of(tmp_path).splitlines()[-1] == said
    assert_sound(tmp_path)
    assert status_of(start(tmp_path, *flags)) == 0
    assert outcome(tmp_path) == outcome(finished(*LONG))


def test_control_c_before_the_first_step(tmp_path, monkeypatch, capsys):
    def interrupt(*_args):
        raise KeyboardInterrupt

    monkeypatch.setattr(measure, "draw_probes", interrupt)
    run_here(tmp_path, *TINY, "--n_steps=3", status=128 + signal.SIGINT)
    assert "interrupted" in one_line(capsys.readouterr().err)
    monkeypatch.undo()
    run_here(tmp_path, *TINY, "--n_steps=3")


def test_a_folder_belongs_to_one_run_and_to_none_after_its_crash(tmp_path, finished, capsys):
    first = start(tmp_path, *LONG)
    assert wait_for(first, tmp_path, STARTED)
    os.kill(first.pid, signal.SIGSTOP)  # alive, and whatever it was writing stays as it is
    try:
        before = files_in(tmp_path)
        for flags in ([], ["--resume"]):
            run_here(tmp_path, *LONG, *flags, status=2)
            assert "another run is writing to" in one_line(capsys.readouterr().err)
        train.main([*LONG, f"--log_dir={tmp_path}/elsewhere", f"--save_dir={tmp_path}/checkpoints"])
        assert "another run is writing to" in one_line(capsys.readouterr().err)
        after = files_in(tmp_path)
        assert {name: after[name] for name in before} == before and after.keys() - before.keys() <= {"elsewhere/.lock"}
    finally:
        first.kill()
    assert status_of(first) == -signal.SIGKILL
    run_here(tmp_path, *LONG, "--resume")
    assert outcome(tmp_path) == outcome(finished(*LONG))


# ---- faults at the write calls --------------------------------------------------------------------------------------

class Faults:
    """Counts what a run asks of the file system and lets strike() happen at the n-th: within a write, or before the
    fsync, the rename or the removal of a file."""

    def __init__(self, patch, n, strike):
        self.count, self.n, self.strike, self.log = 0, n, strike, []
        patch.setattr(train, "STRETCH", 1)  # so that there is time for a rolling checkpoint
        patch.setattr(files, "write_through", self.write_through)
        for name in ("fsync", "replace", "unlink"):
            patch.setattr(os, name, self.before(name, getattr(os, name)))

    def touch(self, what):
        self.count += 1
        self.log.append(what)
        if self.count == self.n:
            self.strike()

    def before(self, name, function):
        def faulty(*args, **options):
            # The clean-up of a failed write works, and a lock is given back without a word.
            if not str(args[0]).endswith((".part", ".lock")) or name == "replace":
                self.touch(name)
            return function(*args, **options)
        return faulty

    def write_through(self, file, content):
        half = len(content) // 2
        file.write(content[:half])
        file.flush()
        self.touch("write " + re.sub(r"\.[0-9a-f]{16}\.part$", "", Path(file.name).name))
        file.write(content[half:])
        file.flush()
        os.fsync(file.fileno())


def no_room():
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


FAULTY = (*TINY, "--n_steps=3", "--log_points=3", "--checkpoint_minutes=0")  # log steps 0, 1 and 3, rolling between


def file_operations(tmp_path):
    """Return what a run of FAULTY asks of the file system, in order."""
    with pytest.MonkeyPatch.context() as patch:
        faults = Faults(patch, 0, None)
        run_here(tmp_path / "counted", *FAULTY)
    return faults.log


def test_a_full_disk_at_any_write_leaves_a_run_that_can_be_resumed(tmp_path, finished, capsys):
    operations = file_operations(tmp_path)
    names = {name.partition(" ")[2] for name in operations if name.startswith("write")}
    assert {".training_history.json", ".rolling.pt", "training_history.rows.jsonl"} <= names
    expected, started = outcome(finished(*FAULTY)), 0
    for n, operation in enumerate(operations, 1):
        folder = tmp_path / str(n)
        capsys.readouterr()
        with pytest.MonkeyPatch.context() as patch:
            Faults(patch, n, no_room)
            status = train.main([*FAULTY, f"--log_dir={folder}/logs", f"--save_dir={folder}/checkpoints"])
        line = one_line(capsys.readouterr().err)
        started += (folder / "checkpoints" / "rolling.pt").exists() or bool(saved(folder))
        assert status in (1, 2) and "No space left" in line, operation
        began = (folder / "logs" / HISTORY_NAME).exists() and history_of(folder)["step"]
        assert status == 1 or not began, operation
        assert_sound(folder)
        assert not list(folder.rglob("*.part")), operation
        run_here(folder, *FAULTY, "--resume")
        assert outcome(folder) == expected, operation
    assert started > len(operations) / 2


def die_at(n):
    Faults(pytest.MonkeyPatch(), n, lambda: os.kill(os.getpid(), signal.SIGKILL))


def test_a_kill_at_any_write_leaves_a_run_that_can_be_resumed(tmp_path, finished):
    operations = file_operations(tmp_path)
    expected = outcome(finished(*FAULTY))
    for n in random.Random(1).sample(range(1, len(operations) + 1), 12):
        folder = tmp_path / str(n)
        assert status_of(start(folder, *FAULTY, hook=die_at, details=(n,))) == -signal.SIGKILL, operations[n - 1]
        assert_sound(folder)
        run_here(folder, *FAULTY, "--resume")
        assert outcome(folder) == expected, operations[n - 1]
        assert not list(folder.rglob("*.part")), operations[n - 1]


def test_output_to_a_full_disk(tmp_path, finished, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        patch.setattr(sys.stdout, "write", lambda text: no_room())
        run_here(tmp_path, *FAULTY, status=1)
    assert "No space left" in one_line(capsys.readouterr().err)
    assert_sound(tmp_path)
    run_here(tmp_path, *FAULTY, "--resume")
    assert outcome(tmp_path) == outcome(finished(*FAULTY))


# ---- damaged, foreign and malicious checkpoints ---------------------------------------------------------------------

class Malice:
    """Unpickled by a careless reader, this makes a file."""

    def __init__(self, proof):
        self.proof = proof

    def __reduce__(self):
        return os.system, (f"touch {self.proof}",)


def truncated(content, _proof):
    return content[:-100]


def one_bit_flipped(content, _proof):
    """Flip a bit in the middle of the largest tensor: PyTorch loads such a file without a word."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        largest = max(archive.infolist(), key=lambda entry: entry.file_size)
    middle = largest.header_offset + largest.file_size // 2 + 256
    return content[:middle] + bytes([content[middle] ^ 16]) + content[middle + 1:]


def malicious_checkpoint(content, proof):
    """A sound checkpoint whose config runs a command when it is unpickled."""
    state = torch.load(io.BytesIO(content), weights_only=True)
    state["config"]["model"] = Malice(proof)
    file = io.BytesIO()
    torch.save(state, file)
    return file.getvalue()


@pytest.mark.parametrize("damage", [truncated, one_bit_flipped, malicious_checkpoint])
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(tmp_path, finished, capsys, damage):
    flags = (*TINY, "--n_steps=8")
    copied(finished(*flags), tmp_path)
    newest, before = saved(tmp_path)[:2]
    rolling = newest.with_name(checkpoints.ROLLING_NAME)
    for path in (rolling, newest):
        path.write_bytes(damage(newest.read_bytes(), tmp_path / "proof"))
    run_here(tmp_path, *flags, "--resume")
    out = capsys.readouterr().out
    for path in (newest, rolling):
        assert sum(str(path) in line and "passed over" in line for line in out.splitlines()) == 1
    assert f"continuing from {before}" in out
    assert not (tmp_path / "proof").exists()
    assert outcome(tmp_path) == outcome(finished(*flags))


# ---- what may change between a run and its continuation -------------------------------------------------------------

RUN = (*TINY, "--n_steps=8")


def test_a_value_given_as_it_is_meant_is_no_other_experiment(tmp_path, capsys):
    flags = [*SMALL, "--dataset=modular_addition", "--lr_schedule=constant"]
    run_here(tmp_path, *flags, "--n_steps=4")
    run_here(tmp_path, *flags, "--n_steps=8", "--modulus=97", "--train_fraction=0.5", "--depth=4", "--resume")
    assert "at step 4" in capsys.readouterr().out
    config, earlier = history_of(tmp_path)["config"], {"modulus": None, "train_fraction": None}  # as versions before
    assert (config["modulus"], config["train_fraction"], config["image_size"]) == (97, 0.5, None)
    assert checkpoints.differences({**config, **earlier}, Config(**config), earlier) == []


@pytest.mark.parametrize("flag, said", [
    ("--depth=3", "--depth was 4, is 3; give this run its own --log_dir and"), ("--batch_norm", "--batch_norm was"),
    ("--log_from=2", "--log_from was 1, is 2"), ("--epsilons=0.2", "--epsilons was"),
    ("--n_steps=7", "--n_steps=7 is less than the 8 of ")])
def test_another_experiment_and_a_shorter_run_are_not_resumed(tmp_path, finished, capsys, flag, said):
    copied(finished(*RUN), tmp_path)
    before = files_in(tmp_path)
    run_here(tmp_path, *RUN, "--resume", flag, status=2)
    for lock in tmp_path.glob("*/.lock"):
        lock.unlink()
    line = one_line(capsys.readouterr().err)
    assert said in line and str(tmp_path) in line
    assert files_in(tmp_path) == before


def test_a_longer_run_continues_and_keeps_its_log_points(tmp_path, finished):
    short, long = finished(*RUN), finished(*TINY, "--n_steps=40")
    copied(short, tmp_path)
    run_here(tmp_path, *TINY, "--n_steps=40", "--resume")
    assert history_of(tmp_path)["step"] == sorted({*history_of(short)["step"],
                                                   *(step for step in history_of(long)["step"] if step > 8)})
    for name in ("train_loss", "weight_norm", "local_complexity", "robust_acc"):
        column, before = history_of(tmp_path)[name], history_of(short)[name]
        while isinstance(column, dict):
            key = next(iter(column))
            column, before = column[key], before[key]
        assert column[:len(before)] == before and len(column) > len(before)
    assert outcome(tmp_path)[2:] == outcome(long)[2:]


def test_resuming_a_complete_run_changes_nothing(tmp_path, finished, capsys):
    copied(finished(*RUN), tmp_path)
    run_here(tmp_path, *RUN, "--resume")
    assert "no delay to measure" in capsys.readouterr().out
    once = files_in(tmp_path)
    assert outcome(tmp_path) == outcome(finished(*RUN))
    run_here(tmp_path, *RUN, "--resume")
    assert files_in(tmp_path) == once
    assert {name: once[name] for name in once if name.endswith(".pt")} == {
        name: content for name, content in files_in(finished(*RUN)).items() if name.endswith(".pt")}


def test_flags_that_do_not_change_the_result_may_change(tmp_path, finished):
    copied(finished(*RUN), tmp_path)
    saved(tmp_path)[0].unlink()
    path = tmp_path / "logs" / HISTORY_NAME
    write_history(path, {**read_history(path), "environment": {"python": "2.7"}})
    flags = [flag for flag in RUN if flag != "--no_plot"]
    run_here(tmp_path, *flags, "--resume", "--checkpoint_minutes=0", "--keep_checkpoints=last", "--on_nan=continue",
             "--device=auto" if not torch.cuda.is_available() else "--device=cpu", "--data_dir=nowhere")
    assert columns(tmp_path) == columns(finished(*RUN))
    after = history_of(tmp_path)  # says how it went on
    assert after["config"]["data_dir"] == "nowhere" and "data_dir" in after["asked"]
    assert after["environment"]["python"] == platform.python_version()
    assert len(saved(tmp_path)) == 1 and (tmp_path / "logs" / "training_history.svg").exists()


# ---- how many checkpoints are kept ----------------------------------------------------------------------------------

@pytest.mark.parametrize("keep, steps", [("all", [0, 1, 2, 4, 8]), ("last", [8]), ("2", [4, 8])])
def test_keep_checkpoints(tmp_path, keep, steps):
    flags = [*TINY, "--n_steps=8", "--log_points=5", f"--keep_checkpoints={keep}"]
    mine = tmp_path / "checkpoints" / "checkpoint_epoch_best.pt"
    mine.parent.mkdir()
    interrupted_run(tmp_path, flags, after_step, 5, terminate)
    mine.write_bytes(b"a file that the user put there")
    run_here(tmp_path, *flags, "--resume")
    assert sorted(checkpoints.step_in_name(path) for path in saved(tmp_path)) == steps
    assert mine.exists() and not (tmp_path / "checkpoints" / checkpoints.ROLLING_NAME).exists()


# ---- a loss that is not finite --------------------------------------------------------------------------------------

def training_losses(patch):
    """Return a list that gets the loss of every training step."""
    made = []
    for name, function in losses.LOSSES.items():
        def recorded(logits, labels, function=function):
            loss = function(logits, labels)
            if torch.is_grad_enabled():
                made.append(loss.item())
            return loss

        patch.setitem(losses.LOSSES, name, recorded)
    return made


@pytest.mark.parametrize("flags", [["--optimizer=sgd", "--lr=1e6"], ["--lr=1e30"],
                                   ["--lr=1e30", "--n_steps=1", "--keep_checkpoints=last"],
                                   ["--loss=mse", "--init_scale=1e10", "--depth=2"]], ids=" ".join)
def test_a_loss_that_is_not_finite_stops_the_run(tmp_path, monkeypatch, capsys, flags):
    flags = [*TINY, "--n_steps=200", "--log_points=30", "--weight_decay=0", *flags]
    made = training_losses(monkeypatch)
    run_here(tmp_path, *flags, status=1)
    # After the last good step comes a step with a bad loss, or a log step that finds the weights bad.
    first = next((step for step, loss in enumerate(made, 1) if not math.isfinite(loss)), len(made) + 1)
    line = one_line(capsys.readouterr().err)
    rate = f"is not finite (learning rate {train.parse_args(flags).lr:g})"
    assert f"the loss of step {first} {rate}" in line or f"the training loss at step {first - 1} {rate}" in line
    good = [path for path in saved(tmp_path) if checkpoints.step_in_name(path) < first - 1]
    assert (f"the last good checkpoint is {good[0]};" if good else "there is no good checkpoint;") in line
    assert good or first == 1
    if good:
        state = checkpoints.load_checkpoint(good[0])
        assert all(tensor.isfinite().all() for tensor in state["model_state_dict"].values())
    assert_sound(tmp_path)
    run_here(tmp_path, *flags, "--resume", status=1)
    assert one_line(capsys.readouterr().err).partition("; ")[0] == line.partition("; ")[0]


def test_weights_whose_next_loss_is_not_finite_are_no_good_checkpoint(tmp_path, monkeypatch, capsys):
    made = []

    def loss_of(logits, labels):
        made.extend([None] * torch.is_grad_enabled())
        return torch.nn.functional.cross_entropy(logits, labels) * (math.inf if len(made) == 18 else 1)

    monkeypatch.setitem(losses.LOSSES, "ce", loss_of)
    run_here(tmp_path, *TINY, "--n_steps=40", status=1)
    line = one_line(capsys.readouterr().err)
    assert "the loss of step 18 is not finite" in line
    assert [checkpoints.step_in_name(path) for path in saved(tmp_path)][:2] == [17, 7]
    assert f"the last good checkpoint is {saved(tmp_path)[1]};" in line


def test_on_nan_continue_goes_on_and_writes_null(tmp_path, capsys):
    flags = [flag for flag in TINY if flag != "--no_plot"] + ["--n_steps=40", "--lr=1e30", "--on_nan=continue"]
    interrupted_run(tmp_path, flags, after_step, 10, terminate)
    run_here(tmp_path, *flags, "--resume")
    history = history_of(tmp_path)
    assert history["step"] == train.log_schedule(40, 6)
    assert math.isfinite(history["train_loss"][0]) and history["train_loss"][-1] is history["weight_norm"][-1] is None
    # A network of NaNs is never right, and has no local complexity.
    assert history["test_acc"][-1] == history["train_acc"][-1] == 0
    assert history["adv_acc"]["0.1"][-1] == history["robust_acc"]["0.1"][-1] == 0
    assert [history["local_complexity"][kind]["0.05"][-1][-1] for kind in ("train", "test", "random")] == [None] * 3
    assert b"NaN" not in (tmp_path / "logs" / HISTORY_NAME).read_bytes()
    assert (tmp_path / "logs" / "training_history.png").stat().st_size > 10_000
    assert "Traceback" not in "".join(capsys.readouterr())


# ---- the first log step ---------------------------------------------------------------------------------------------

def test_a_signal_in_the_first_log_step_with_the_default_flags(tmp_path, monkeypatch, capsys):
    flags = [flag for flag in TINY if flag != "--no_plot"] + ["--n_steps=3"]  # the figure has nothing to draw yet
    interrupted_run(tmp_path, flags, within_log_step, 0, terminate)
    assert "stopped by SIGTERM at step 0" in capsys.readouterr().out
    run_here(tmp_path, *flags, "--resume")
    assert history_of(tmp_path)["step"] == [0, 1, 2, 3]


def test_a_stop_that_brought_nothing_new_touches_no_checkpoint(tmp_path):
    flags = [*TINY, "--n_steps=40"]
    interrupted_run(tmp_path, flags, within_log_step, 17, terminate)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "checkpoints").glob("*.pt")}
    assert tmp_path / "checkpoints" / "rolling.pt" in before
    interrupted_run(tmp_path, flags, within_log_step, 17, terminate)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "checkpoints").glob("*.pt")} == before


def test_the_seconds_of_the_parts_add_up_and_the_largest_loss_outlives_an_interruption(tmp_path):
    flags = [*TINY, "--n_steps=40", "--lr=0.05"]  # log steps 0 1 3 7 17 40
    interrupted_run(tmp_path, flags, after_step, 30, terminate)
    rolling = checkpoints.load_checkpoint(tmp_path / "checkpoints" / "rolling.pt")
    assert rolling["largest_loss"] > 0
    run_here(tmp_path, *flags, "--resume")
    run_here(tmp_path / "whole", *flags)
    history = history_of(tmp_path)
    assert history["max_batch_loss"] == history_of(tmp_path / "whole")["max_batch_loss"]
    assert history["seconds"] == sorted(history["seconds"]) and (
        history["seconds"][4] < rolling["seconds"] < history["seconds"][5])


# ---- data that changed ----------------------------------------------------------------------------------------------

def test_other_data_is_another_experiment(tmp_path, finished, capsys, monkeypatch):
    copied(finished(*RUN), tmp_path)
    digits = sklearn.datasets.load_digits()
    images = digits.images.copy()
    images[:, 3, 3] = 15 - images[:, 3, 3]
    monkeypatch.setattr(sklearn.datasets, "load_digits", lambda: type(digits)(images=images, target=digits.target))
    before = files_in(tmp_path)
    run_here(tmp_path, *RUN, "--resume", status=2)
    assert "other data" in one_line(capsys.readouterr().err)
    assert {name: content for name, content in files_in(tmp_path).items() if ".lock" not in name} == before


def test_a_run_goes_on_with_a_flag_and_a_column_that_it_did_not_know(tmp_path, finished):
    copied(finished(*RUN), tmp_path)
    for path in saved(tmp_path)[:1]:
        path.unlink()
    state = checkpoints.load_checkpoint(saved(tmp_path)[0])
    path = tmp_path / "logs" / HISTORY_NAME
    history = read_history(path)
    for config in (state["config"], history["config"]):
        del config["adam_eps"], config["orthogonal_gradient"]
        config["products"] = "mkl"  # a flag of earlier versions
    for source in (state, history):
        del source["asked"], source["derived"]
    for column in ("outcomes", "max_batch_loss", "train_saturated"):
        del history[column]
    checkpoints.save_state(saved(tmp_path)[0], state)
    write_history(path, history)
    run_here(copied(tmp_path, tmp_path / "again"), *(flag for flag in RUN if flag != "--threads=1"), "--resume")
    run_here(tmp_path, *RUN, "--resume")
    after, whole = history_of(tmp_path), history_of(finished(*RUN))
    assert after["train_loss"] == whole["train_loss"]
    assert after["max_batch_loss"] == [*[None] * (len(after["step"]) - 1), whole["max_batch_loss"][-1]]
    assert after["outcomes"]["robust"][-1] == whole["outcomes"]["robust"][-1]
    run_here(tmp_path, *RUN, "--resume", "--adam_eps=1e-6", status=2)


def test_a_checkpoint_whose_optimizer_state_is_lost_is_not_continued_from(tmp_path, capsys):
    run_here(tmp_path, *SMALL, "--n_steps=6")
    newest = sorted((tmp_path / "checkpoints").glob("*.pt"))[-1]
    state = torch.load(newest)
    torch.save({**state, "optimizer_state_dict": {"state": {}}}, newest)
    run_here(tmp_path, *SMALL, "--n_steps=9", "--resume", status=2)
    assert f"{newest}: its state does not fit the optimizer" in capsys.readouterr().err
