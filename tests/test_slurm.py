"""run_mnist_mlp.sh: what it asks of train.py, how it hands on signals, and, on a real SLURM of one node, that a job
that is stopped comes back and ends as if it had not been."""

import getpass
import os
import shutil
import signal
import subprocess
import sys

import pytest
import torch
from conftest import ENVIRONMENT, PATIENCE, ROOT, SMALL, columns, run_here, wait_for

import sweep
from flags import parse_args
from records import checkpoints

SCRIPT = ROOT / "run_mnist_mlp.sh"
FLAGS = [*SMALL, "--n_steps=3000"]


def write_program(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)


def same_python(folder):
    """Return an environment in which the script finds the Python of these tests."""
    write_program(folder / "venv" / "bin" / "python", f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    return {**ENVIRONMENT, "VIRTUAL_ENV": str(folder / "venv")}


def final_weights(folder):
    state, path = checkpoints.newest_checkpoint(folder / "checkpoints", pytest.fail)
    assert path.name.startswith("checkpoint_epoch_")
    return state["model_state_dict"]


# ---- the script with stand-ins for Python and SLURM -----------------------------------------------------------------

RUNS_UNTIL_STOPPED = "trap 'exit 138' USR1; trap 'exit 143' TERM; touch started; while :; do sleep 0.05; done"
SAVES_WHEN_STOPPED = RUNS_UNTIL_STOPPED.replace("exit", "mkdir -p checkpoints; touch checkpoints/rolling.pt; exit")
# A Python that has torch or, with the other answer, has not; that reads flags as train.py and sweep.py do; that writes
# what train.py would get into a file and then runs $RUN.
PYTHON = f"""#!/bin/sh
case "$1 $2" in
    *sweep.py*|"-c import flags"*) PYTHONPATH={ROOT} exec {sys.executable} "$@";;
    -c*) touch probed; sleep ${{PROBE_TAKES:-0}}; exit ANSWER;;
esac
printf "%s\\n" "$0" "$@" > arguments
exec sh -c "$RUN"
"""
SCONTROL = """#!/bin/sh
[ $1 = show ] && printf "   JobState=$STATE\\n   Command=$COMMAND\\n   WorkDir=/\\n" || echo "$@" >> requeued
"""


def write_python(path, has_torch=True):
    write_program(path, PYTHON.replace("ANSWER", "0" if has_torch else "1"))


@pytest.fixture
def stand_ins(tmp_path):
    """An environment whose Python is PYTHON and whose SLURM is SCONTROL."""
    for name in ("python", "python3"):
        write_python(tmp_path / "bin" / name, has_torch=False)
    write_python(tmp_path / "venv" / "bin" / "python")
    write_program(tmp_path / "bin" / "scontrol", SCONTROL)
    (tmp_path / "spool").mkdir()
    shutil.copy(SCRIPT, tmp_path / "spool" / "slurm_script")
    outside = {name: value for name, value in os.environ.items()
               if not name.startswith("SLURM_") and name != "CONDA_PREFIX"}
    return {**outside, "VIRTUAL_ENV": str(tmp_path / "venv"), "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}",
            "RUN": "exit 0", "STATE": "RUNNING", "COMMAND": f"{SCRIPT} --n_steps=1"}


@pytest.fixture
def job(tmp_path, stand_ins):
    """The environment of job 7 of that SLURM."""
    return {**stand_ins, "SLURM_JOB_ID": "7", "SLURM_SUBMIT_DIR": str(tmp_path)}


def run_script(folder, environment, *flags, status=0):
    """Run the script, as a batch job if the environment is one's; return what it prints."""
    script = folder / "spool" / "slurm_script" if "SLURM_JOB_ID" in environment else SCRIPT
    done = subprocess.run(["bash", script, *flags], cwd=folder, env=environment, timeout=PATIENCE, text=True,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert done.returncode == status, done.stdout
    return done.stdout


def arguments_of(folder, environment, *flags):
    """Run the script; return what train.py's command line parser makes of the arguments that it would get."""
    run_script(folder, environment, *flags)
    _python, program, *arguments = (folder / "arguments").read_text().splitlines()
    assert program == str(ROOT / "train.py")
    return parse_args(arguments)


def test_bash_finds_no_fault_in_the_scripts():
    for script in (SCRIPT, ROOT / "tests" / "start_slurm.sh", ROOT / "results" / "run.sh"):
        assert subprocess.run(["bash", "-n", script], capture_output=True, text=True, timeout=PATIENCE).stderr == ""


def test_the_default_is_the_papers_experiment(tmp_path, stand_ins):
    args = arguments_of(tmp_path, stand_ins)
    assert (args.model, args.dataset, args.train_size, args.batch_size) == ("mlp", "mnist", 1000, 200)
    assert (args.lr, args.weight_decay, args.n_epochs, args.device) == (0.001, 0.01, 100_000, "auto")
    assert (args.log_dir, args.save_dir, args.resume) == ("logs", "checkpoints", True)
    assert args.optimizer == "adamw" and args.depth is None and args.width is None


def test_the_users_flags_win(tmp_path, stand_ins):
    args = arguments_of(tmp_path, stand_ins, "--width=1000", "--n_steps=300", "--lr", "0.1", "--dataset=digits")
    assert (args.width, args.n_steps, args.lr, args.dataset) == (1000, 300, 0.1, "digits")
    assert arguments_of(tmp_path, stand_ins, "--n_epochs=7").n_epochs == 7
    assert arguments_of(tmp_path, stand_ins, "--preset=modular") == parse_args(["--preset=modular", "--resume"])


@pytest.mark.parametrize("flags", [["--width=1000", "--lr", "1e-2", "--n_steps=7"],
                                   ["--threads=1", "--lr=0.01", "--width", "1000", "--no_plot"]], ids=" ".join)
def test_a_task_of_an_array_has_its_seed_and_the_folder_that_a_sweep_has(tmp_path, job, flags):
    args = arguments_of(tmp_path, {**job, "SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "12"}, *flags)
    (folder,) = sweep.combinations([*flags, "--seed=12"])
    assert args.seed == 12 and str(folder) == "runs/lr_0.01_width_1000_seed_12"
    assert (args.log_dir, args.save_dir) == (f"{folder}/logs", f"{folder}/checkpoints")


@pytest.mark.parametrize("flags, name", [(["--width=3", "--seed", "7"], "seed"), (["--log_dir=x"], "log_dir")])
def test_an_array_refuses_what_would_make_its_tasks_one_run(tmp_path, job, flags, name):
    task = {**job, "SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "12"}
    said = run_script(tmp_path, task, *flags, status=2).splitlines()
    assert said[1:] == ["run_mnist_mlp.sh: error: in an array the task's number is the seed, and each task has its own "
                        f"folder: leave out --{name}"]
    assert not (tmp_path / "arguments").exists()


@pytest.mark.parametrize("task", [{}, {"SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "12"}])
def test_a_wrong_flag_ends_a_job_with_one_line(tmp_path, job, task):
    said = run_script(tmp_path, {**job, **task}, "--width=x", status=2).splitlines()
    assert len(said) == 2 and "'x' is not a whole number" in said[1]


# ---- where the program and its Python are ---------------------------------------------------------------------------

@pytest.mark.parametrize("linked, project, flags", [
    (False, "work", []), (True, "work", ["--data_dir=/home/jane.shaw/mnist.sh/x"]),
    (False, "jane.shaw/a project.sh by me", ["--data_dir=/a b/c.sh d"])])
def test_a_job_finds_the_program_next_to_its_script(tmp_path, job, linked, project, flags):
    script = tmp_path / project / "run_mnist_mlp.sh"
    script.parent.mkdir(parents=True)
    shutil.copy(SCRIPT, script)
    (script.parent / "train.py").touch()
    if linked:
        (tmp_path / "submit.sh").symlink_to(script)
        script = tmp_path / "submit.sh"
    run_script(tmp_path, {**job, "COMMAND": " ".join([str(script), *flags])}, *flags)
    assert (tmp_path / "arguments").read_text().splitlines()[1] == str(tmp_path / project / "train.py")


def test_a_script_that_came_through_a_pipe_looks_where_it_was_submitted(tmp_path, job):
    piped = {**job, "COMMAND": "(null)"}
    assert f"error: no train.py next to the script nor in {tmp_path}" in run_script(tmp_path, piped, status=2)
    (tmp_path / "train.py").touch()
    run_script(tmp_path, piped)
    assert (tmp_path / "arguments").read_text().splitlines()[1] == str(tmp_path / "train.py")


@pytest.mark.parametrize("active, beside, chosen", [
    ({"VIRTUAL_ENV": "venv", "CONDA_PREFIX": "conda"}, True, "venv"), ({"CONDA_PREFIX": "conda"}, True, "conda"),
    ({"CONDA_PREFIX": "base"}, True, "work/.venv"), ({}, True, "work/.venv"), ({}, False, "module"), ({}, False, None)])
def test_the_python_is_the_first_that_has_torch(tmp_path, job, active, beside, chosen):
    work = tmp_path / "work"
    work.mkdir()
    shutil.copy(SCRIPT, work)
    (work / "train.py").touch()
    write_python(tmp_path / "conda/bin/python")
    write_python(tmp_path / "base/bin/python", has_torch=False)
    write_python(tmp_path / "module/bin/python")
    if beside:
        write_python(work / ".venv/bin/python")
    del job["VIRTUAL_ENV"]
    job["COMMAND"] = str(work / "run_mnist_mlp.sh")
    job |= {name: str(tmp_path / folder) for name, folder in active.items()}
    if chosen == "module":
        job["PATH"] = f"{tmp_path / 'module/bin'}:{job['PATH']}"
    said = run_script(tmp_path, job, status=0 if chosen else 2)
    if chosen:
        python = (tmp_path / "arguments").read_text().splitlines()[0]
        assert python == str(tmp_path / chosen / "bin/python")
    else:
        assert "error: no Python (3.11 or newer) with PyTorch found" in said and len(said.splitlines()) == 2
        assert all(word in said for word in ("conda", "module", f"{work}/.venv"))


# ---- signals --------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("run, sent, state, status, requeued", [
    ("exit 0", None, "RUNNING", 0, False),
    ("exit 2", None, "RUNNING", 2, False),
    (SAVES_WHEN_STOPPED, signal.SIGUSR1, "RUNNING", 138, True),  # the time is nearly up
    (RUNS_UNTIL_STOPPED, signal.SIGUSR1, "RUNNING", 138, False),  # and was too short to save anything
    ("touch started; exec sleep 60", signal.SIGUSR1, "RUNNING", 138, False),  # or for Python to be up
    (SAVES_WHEN_STOPPED, signal.SIGTERM, "RUNNING", 143, True),  # preempted, with time to save
    (RUNS_UNTIL_STOPPED, signal.SIGTERM, "RUNNING", 143, True),  # and again: that is not the job's fault
    (SAVES_WHEN_STOPPED, signal.SIGTERM, "COMPLETING PreemptTime=2030-01-01T00:00:00", 143, True),
    (SAVES_WHEN_STOPPED, signal.SIGTERM, "COMPLETING PreemptTime=None", 143, False),  # cancelled
    (SAVES_WHEN_STOPPED.replace("exit 138", "sleep 0.5; exit 138"), signal.SIGUSR1, "RUNNING", 138, True),
    (SAVES_WHEN_STOPPED.replace("exit 138", "sleep 0.5; exit 0"), signal.SIGUSR1, "RUNNING", 0, False),
], ids=["done", "wrong", "time", "too little time", "no time", "preempted", "preempted early", "preempting",
        "cancelled", "slow to save", "done in time"])
def test_a_job_is_requeued_when_it_was_stopped_and_only_then(tmp_path, job, run, sent, state, status, requeued):
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "rolling.pt").write_text("of an earlier start")
    said = stop_script(tmp_path, {**job, "RUN": run, "STATE": state}, "started" if sent else None, sent, status)
    assert said.startswith("job 7 on ")
    assert (tmp_path / "requeued").exists() == requeued
    if requeued:
        assert (tmp_path / "requeued").read_text() == "requeue 7\n"
    assert ("its time limit cannot hold one log step" in said) == (status == 138 and not requeued)


def stop_script(folder, job, mark, number, status, *flags):
    """Run the script as a batch job, send it the signal once the file `mark` is there, and return what it printed."""
    script = subprocess.Popen(["bash", folder / "spool" / "slurm_script", *flags], cwd=folder, env=job, text=True,
                              stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    try:
        if number:
            wait_for((folder / mark).exists)
            script.send_signal(number)
        said = script.communicate(timeout=PATIENCE)[0]
        assert script.returncode == status, said
        return said
    finally:
        script.kill()


@pytest.mark.parametrize("number, status", [(signal.SIGUSR1, 138), (signal.SIGTERM, 143)])
def test_a_signal_before_the_run_has_begun_is_not_lost(tmp_path, job, number, status):
    # Without the signal this run would last until PATIENCE is over.
    job |= {"RUN": f"exec sleep {2 * PATIENCE}", "PROBE_TAKES": "1"}
    stop_script(tmp_path, job, "probed", number, status)
    assert (tmp_path / "arguments").exists()


@pytest.mark.parametrize("flags", [["--save_dir=else where"], ["--save_dir", "else where", "--width=3"]])
def test_what_was_saved_is_looked_for_where_it_is_saved(tmp_path, job, flags):
    (tmp_path / "else where").mkdir()
    run = RUNS_UNTIL_STOPPED.replace("exit 138", 'touch "else where/rolling.pt"; exit 138')
    stop_script(tmp_path, {**job, "RUN": run}, "started", signal.SIGUSR1, 138, *flags)
    assert (tmp_path / "requeued").exists()


# ---- without SLURM --------------------------------------------------------------------------------------------------

def test_without_slurm_the_script_becomes_the_run(tmp_path, stand_ins):
    script = subprocess.Popen(["bash", SCRIPT], cwd=tmp_path, env={**stand_ins, "RUN": "echo $$; exit 5"}, text=True,
                              stdout=subprocess.PIPE)
    assert script.communicate(timeout=PATIENCE)[0] == f"{script.pid}\n"  # so Ctrl-C and kill reach it
    assert script.returncode == 5


# ---- a real SLURM ---------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def slurm(tmp_path_factory):
    """Start a SLURM of one node; yields a function that runs one of its commands and returns what it prints."""
    path = f"{os.environ['PATH']}:/usr/sbin:/sbin"
    missing = [name for name in ("munged", "slurmctld", "slurmd", "sbatch") if shutil.which(name, path=path) is None]
    if missing:
        pytest.skip(f"no {', '.join(missing)} here: apt-get install slurm-wlm munge")
    place = tmp_path_factory.mktemp("slurm")
    start = [ROOT / "tests" / "start_slurm.sh"]
    started = subprocess.run([*start, "start", place / "node"], capture_output=True, text=True, timeout=PATIENCE)
    if started.returncode:
        pytest.skip(f"SLURM does not start here: {started.stderr.strip()}")
    environment = {**same_python(place), "PATH": path, "SLURM_CONF": started.stdout.strip()}

    def command(*words, cwd=place):
        return subprocess.run([*map(str, words)], cwd=cwd, env=environment, check=True, capture_output=True, text=True,
                              timeout=PATIENCE).stdout

    yield command
    command("scancel", "--full", f"--user={getpass.getuser()}")
    subprocess.run([*start, "stop", place / "node"], timeout=PATIENCE)


@pytest.mark.slow
@pytest.mark.slurm
def test_an_array_that_is_stopped_twice_ends_like_runs_that_were_not(slurm, tmp_path):
    job = slurm("sbatch", "--parsable", "--array=3-4", SCRIPT, *FLAGS, cwd=tmp_path).strip()

    def output(seed):
        path = tmp_path / f"slurm-{job}_{seed}.out"
        return path.read_text() if path.exists() else ""

    def folder(seed):
        found = list(tmp_path.glob(f"runs/*_seed_{seed}"))
        return found[0] if found else tmp_path / "not yet"

    for seed, stop in ((3, ["scancel", "--batch", "--signal=USR1"]), (4, ["scontrol", "requeue"])):
        wait_for(lambda seed=seed: len(list(folder(seed).glob("checkpoints/checkpoint_*.pt"))) > 2)
        slurm(*stop, f"{job}_{seed}")
    for seed in (3, 4):
        wait_for(lambda seed=seed: "restarts: 1" in output(seed))
    wait_for(lambda: slurm("squeue", "-h", "-j", job) == "")
    for seed, name, requeued in ((3, "SIGUSR1", 1), (4, "SIGTERM", 0)):
        said = output(seed)
        assert f"stopped by {name} at step" in said and said.count(f"requeueing job {job}_{seed}") == requeued
        assert "continuing from runs/" in said
        # SLURM's own message; of a job that requeues itself SLURM says it only if the script has not ended by then.
        assert requeued or "DUE TO JOB REQUEUE" in said
        assert "JobState=COMPLETED" in slurm("scontrol", "show", "job", f"{job}_{seed}")
        reference = tmp_path / f"uninterrupted{seed}"
        run_here(reference, *FLAGS, f"--seed={seed}")
        assert columns(folder(seed)) == columns(reference)
        ours, theirs = final_weights(folder(seed)), final_weights(reference)
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert columns(folder(3))["train_loss"] != columns(folder(4))["train_loss"]


@pytest.mark.slow
@pytest.mark.slurm
def test_a_job_with_a_mistake_fails_once_and_says_why(slurm, tmp_path):
    job = slurm("sbatch", "--parsable", SCRIPT, "--dataset=imagefolder", "--data_dir=nowhere", cwd=tmp_path).strip()
    wait_for(lambda: slurm("squeue", "-h", "-j", job) == "")
    state = slurm("scontrol", "show", "job", job)
    assert "JobState=FAILED" in state and "ExitCode=2:0" in state and "Restarts=0" in state
    assert "train.py: error: " in (tmp_path / f"slurm-{job}.out").read_text()


@pytest.mark.slow
@pytest.mark.slurm
def test_a_job_whose_time_does_not_hold_one_log_step_is_not_requeued_for_ever(slurm, tmp_path):
    flags = [*FLAGS, "--adv_size=all", "--pgd_steps=1000000"]
    job = slurm("sbatch", "--parsable", SCRIPT, *flags, cwd=tmp_path).strip()
    output = tmp_path / f"slurm-{job}.out"
    wait_for(lambda: output.exists() and "compl." in output.read_text())  # the table's head: the log step has begun
    slurm("scancel", "--batch", "--signal=USR1", job)
    wait_for(lambda: slurm("squeue", "-h", "-j", job) == "")
    state = slurm("scontrol", "show", "job", job)
    assert "JobState=FAILED" in state and "ExitCode=138:0" in state and "Restarts=0" in state
    assert f"job {job} is not requeued" in output.read_text() and "raise --time, or lower" in output.read_text()
