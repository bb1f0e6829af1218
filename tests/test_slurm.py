"""run_mnist_mlp.sh: what it asks of train.py, how it hands on signals, and, on a real SLURM of one node, that a job
that is stopped comes back and ends as if it had not been."""

import functools
import getpass
import os
import shutil
import signal
import subprocess
import sys

import pytest
import torch
from conftest import ENVIRONMENT, PATIENCE, ROOT, SMALL, columns, run_here, wait_for

import runlog
import train

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
    state, path = runlog.newest_checkpoint(folder / "checkpoints", pytest.fail)
    assert path.name.startswith("checkpoint_epoch_")
    return state["model_state_dict"]


def assert_same_run(folder, reference):
    assert columns(folder) == columns(reference)
    ours, theirs = final_weights(folder), final_weights(reference)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """Return a function: seed -> the folder of the run with FLAGS and that seed that nothing stopped."""
    @functools.cache
    def folder_for(seed):
        folder = tmp_path_factory.mktemp("uninterrupted")
        run_here(folder, *FLAGS, f"--seed={seed}")
        return folder

    return folder_for


# ---- the script with stand-ins for Python and SLURM -----------------------------------------------------------------

RUNS_UNTIL_STOPPED = "trap 'exit 138' USR1; trap 'exit 143' TERM; touch started; while :; do sleep 0.05; done"


@pytest.fixture
def stand_ins(tmp_path):
    """An environment whose python writes its arguments to a file and then does $RUN, and whose SLURM knows job 7."""
    write_program(tmp_path / "venv" / "bin" / "python",
                  '#!/bin/sh\nprintf "%s\\n" "$@" > arguments\nexec sh -c "$RUN"\n')
    write_program(tmp_path / "bin" / "scontrol", f"""#!/bin/sh
[ $1 = show ] && printf "   JobState=$STATE\\n   Command={SCRIPT} --n_steps=1\\n" || echo "$@" >> requeued
""")
    spool = tmp_path / "spool"
    spool.mkdir()
    shutil.copy(SCRIPT, spool / "slurm_script")
    outside = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
    return {**outside, "VIRTUAL_ENV": str(tmp_path / "venv"), "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}",
            "RUN": "exit 0", "STATE": "RUNNING"}


def arguments_of(folder, environment, *flags, script=SCRIPT):
    """Run the script; return what train.py's command line parser makes of the arguments that it would get."""
    subprocess.run(["bash", str(script), *flags], cwd=folder, env=environment, check=True, timeout=PATIENCE,
                   stdout=subprocess.DEVNULL)
    program, *arguments = (folder / "arguments").read_text().splitlines()
    assert program == str(ROOT / "train.py")
    return train.parse_args(arguments)


def test_bash_finds_no_fault_in_the_scripts():
    for script in (SCRIPT, ROOT / "tests" / "start_slurm.sh"):
        assert subprocess.run(["bash", "-n", script], capture_output=True, text=True, timeout=PATIENCE).stderr == ""
        assert os.access(script, os.X_OK)


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


def test_each_task_of_an_array_has_its_seed_and_its_folder(tmp_path, stand_ins):
    job = {**stand_ins, "SLURM_JOB_ID": "8", "SLURM_ARRAY_JOB_ID": "7", "SLURM_SUBMIT_DIR": str(tmp_path)}
    script = tmp_path / "spool" / "slurm_script"

    def folders(task, *flags):
        args = arguments_of(tmp_path, {**job, "SLURM_ARRAY_TASK_ID": task}, *flags, script=script)
        assert args.seed == int(task) and args.log_dir.endswith("/logs") and args.save_dir.endswith("/checkpoints")
        assert args.log_dir.removesuffix("logs") == args.save_dir.removesuffix("checkpoints")
        return args.log_dir.removesuffix("/logs")

    assert folders("3") == "runs/seed_3"
    assert folders("12", "--width=1000", "--lr", "1e-2") == "runs/width_1000_lr_1e_2_seed_12"
    many = [f"--data_dir=/{'long/' * 60}", "--depth=6"]
    assert folders("0", *many) == folders("0", *many) != folders("1", *many) != folders("1", many[0], "--depth=5")
    assert len(folders("0", *many)) < 200
    assert "job 7_12 on" in (tmp_path / "logs" / "slurm-7_12.out").read_text()


@pytest.mark.parametrize("run, sent, state, status, requeued", [
    ("exit 0", None, "RUNNING", 0, False),
    ("exit 1", None, "RUNNING", 1, False),
    ("exit 2", None, "RUNNING", 2, False),
    (RUNS_UNTIL_STOPPED, signal.SIGUSR1, "RUNNING", 138, True),  # the time is nearly up
    (RUNS_UNTIL_STOPPED, signal.SIGTERM, "RUNNING", 143, True),  # preempted, with time to save
    (RUNS_UNTIL_STOPPED, signal.SIGTERM, "COMPLETING PreemptTime=2030-01-01T00:00:00", 143, True),
    (RUNS_UNTIL_STOPPED, signal.SIGTERM, "COMPLETING PreemptTime=None", 143, False),  # cancelled
    (RUNS_UNTIL_STOPPED.replace("exit 138", "sleep 0.5; exit 138"), signal.SIGUSR1, "RUNNING", 138, True),
    (RUNS_UNTIL_STOPPED.replace("exit 138", "sleep 0.5; exit 0"), signal.SIGUSR1, "RUNNING", 0, False),
    ("touch started; exec sleep 60", signal.SIGUSR1, "RUNNING", 138, True),  # Python is not up yet
], ids=["done", "failed", "wrong", "time", "warned", "preempted", "cancelled", "slow to save", "done in time",
        "early"])
def test_a_job_is_requeued_when_it_was_stopped_and_only_then(tmp_path, stand_ins, run, sent, state, status, requeued):
    job = {**stand_ins, "SLURM_JOB_ID": "7", "SLURM_SUBMIT_DIR": str(tmp_path), "RUN": run, "STATE": state}
    script = subprocess.Popen(["bash", tmp_path / "spool" / "slurm_script"], cwd=tmp_path, env=job,
                              stdout=subprocess.DEVNULL)
    try:
        if sent:
            wait_for((tmp_path / "started").exists)
            script.send_signal(sent)
        assert script.wait(PATIENCE) == status
    finally:
        script.kill()
    assert (tmp_path / "requeued").exists() == requeued
    if requeued:
        assert (tmp_path / "requeued").read_text() == "requeue 7\n"
    assert "job 7 on" in (tmp_path / "logs" / "slurm-7.out").read_text()


# ---- without SLURM --------------------------------------------------------------------------------------------------

def test_without_slurm_ctrl_c_saves_and_the_same_command_continues(tmp_path, uninterrupted):
    flags = [*FLAGS, "--seed=3"]
    folder = tmp_path / "run"
    folder.mkdir()
    environment = same_python(tmp_path)
    first = subprocess.Popen(["bash", SCRIPT, *flags], cwd=folder, env=environment, stdout=subprocess.PIPE, text=True)
    try:
        wait_for(lambda: first.poll() is not None or len(list(folder.glob("checkpoints/*.pt"))) > 2)
        first.send_signal(signal.SIGINT)
        said = first.communicate(timeout=PATIENCE)[0]
    finally:
        first.kill()
    assert first.returncode == 128 + signal.SIGINT and "stopped by SIGINT at step" in said
    again = subprocess.run(["bash", SCRIPT, *flags], cwd=folder, env=environment, capture_output=True, text=True,
                           timeout=PATIENCE)
    assert again.returncode == 0 and "continuing from checkpoints/rolling.pt at step" in again.stdout
    assert_same_run(folder, uninterrupted(3))


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


@pytest.mark.slurm
def test_an_array_that_is_stopped_twice_ends_like_runs_that_were_not(slurm, tmp_path, uninterrupted):
    job = slurm("sbatch", "--parsable", "--array=3-4", SCRIPT, *FLAGS, cwd=tmp_path).strip()

    def output(seed):
        path = tmp_path / "logs" / f"slurm-{job}_{seed}.out"
        return path.read_text() if path.exists() else ""

    def folder(seed):
        found = list(tmp_path.glob(f"runs/*_seed_{seed}"))
        return found[0] if found else tmp_path / "not yet"

    for seed, stop in ((3, ["scancel", "--batch", "--signal=USR1"]), (4, ["scontrol", "requeue"])):
        wait_for(lambda seed=seed: len(list(folder(seed).glob("checkpoints/checkpoint_*.pt"))) > 2)
        slurm(*stop, f"{job}_{seed}")
    wait_for(lambda: slurm("squeue", "-h", "-j", job) == "")
    for seed, name, requeued in ((3, "SIGUSR1", 1), (4, "SIGTERM", 0)):
        said = output(seed)
        assert f"stopped by {name} at step" in said and said.count(f"requeueing job {job}_{seed}") == requeued
        assert "restarts: 1" in said and "rolling.pt at step" in said
        assert "JobState=COMPLETED" in slurm("scontrol", "show", "job", f"{job}_{seed}")
        assert_same_run(folder(seed), uninterrupted(seed))
    assert columns(folder(3))["train_loss"] != columns(folder(4))["train_loss"]


@pytest.mark.slurm
def test_a_job_with_a_mistake_fails_once_and_says_why(slurm, tmp_path):
    job = slurm("sbatch", "--parsable", SCRIPT, "--dataset=imagefolder", "--data_dir=nowhere", cwd=tmp_path).strip()
    wait_for(lambda: slurm("squeue", "-h", "-j", job) == "")
    state = slurm("scontrol", "show", "job", job)
    assert "JobState=FAILED" in state and "ExitCode=2:0" in state and "Restarts=0" in state
    assert "train.py: error: " in (tmp_path / "logs" / f"slurm-{job}.out").read_text()
