"""Train many combinations of flags, as many at a time as the machine has room for.

    python sweep.py --seed=0-3 --depth=2,4,6 --dataset=digits --n_steps=20000

The flags are train.py's. Any may hold a list (2,4,6), a range (0-3) or both (0-3,7), except those whose value is itself
a list (--epsilons, --lc_radius) and --data_dir. Each combination is a run of its own in a folder under runs/ that is
named by the experiment, as the tasks of a SLURM array of run_mnist_mlp.sh name theirs: the same command again continues
what was stopped and skips what is complete. Ctrl-C stops all runs, each saved. What a run prints is in its output.txt.

    python sweep.py --folder FLAGS                                  # only print the folder of one run

Exit status: 0 all runs are complete; 1 one failed; 2 the command is wrong; 128 + n stopped by signal n.
"""

import contextlib
import hashlib
import itertools
import os
import queue
import re
import signal
import subprocess
import sys
from concurrent import futures
from pathlib import Path

import torch
from tqdm import tqdm

import data
import models
import train
from analysis import figure, report
from runtime import files, signals
from runtime.history import MAY_CHANGE, read_history

PASSED_ON = {"--epsilons", "--lc_radius", "--data_dir"}  # a comma in their value does not make two runs
LONGEST_NAME = 150  # characters; file systems take 255


# ---- which runs -----------------------------------------------------------------------------------------------------

def folder_name(args):
    """Return the folder under runs/ of the experiment that args, train.parse_args()'s, describe.

    It is named by the flags that say what is trained and measured (not those of MAY_CHANGE) and differ from
    their default, and by the seed; so neither the flags' order nor, say, --n_steps or --threads changes it.
    """
    usual = train.defaults()
    # what a flag that is left out stands for, where that depends on no more than the model or the data set
    model, source = models.MODELS[args.model], data.DATASETS[args.dataset]
    implied = {"width": model.width, "depth": model.depth, "train_size": source.train_size or "all"}
    told = {flag: value for flag, value in vars(args).items() if flag not in MAY_CHANGE and flag != "seed"
            and value not in (usual[flag], implied.get(flag, usual[flag]))}
    if told.get("epsilons"):
        told["epsilons"] = sorted(told["epsilons"])
    if args.dataset == "imagefolder":  # here the folder is the data; its last part, so that it may be moved
        told["data_dir"] = Path(args.data_dir).resolve().name
    words = [flag if value is True else f"{flag}_{text(value)}" for flag, value in sorted(told.items())]
    name = re.sub(r"[^A-Za-z0-9.,+-]", "_", "_".join(words))
    if len(name) > LONGEST_NAME:
        name = f"{name[:LONGEST_NAME - 9]}_{hashlib.sha256(name.encode()).hexdigest()[:8]}"
    return Path("runs") / "_".join([*filter(None, [name]), f"seed_{args.seed}"])


def text(value):
    if isinstance(value, list):
        return ",".join(map(text, value))
    return f"{value:g}" if isinstance(value, float) and float(f"{value:g}") == value else str(value)


def combinations(argv):
    """Return {folder: (its command line, its args)} of the combinations that a sweep's command line stands for.

    Raises ValueError if two of them would share a folder, or if the command line names the folders itself.
    """
    runs = {}
    for words in itertools.product(*alternatives(argv)):
        args = train.parse_args(words)
        if {args.log_dir, args.save_dir} != {"logs", "checkpoints"}:
            raise ValueError("each run has its own folder under runs/: leave --log_dir and --save_dir out")
        _, before = runs.setdefault(folder_name(args), (words, args))
        several = [f"--{flag}" for flag, value in vars(args).items() if getattr(before, flag) != value]
        if several:
            raise ValueError(f"{', '.join(several)}: several values make no other experiment, so the runs would share "
                             f"the folder {folder_name(args)}; give one value")
    return runs


def alternatives(argv):
    """Return for each word of a command line the list of words that it stands for."""
    flag, words = None, []
    for word in argv:
        name, equals, value = word.partition("=") if word.startswith("--") else ("", "", word)
        flag = name or flag
        words.append([name + equals + one for one in ([value] if flag in PASSED_ON else expanded(value))])
    return words


def expanded(value):
    """Return the values that a flag's value lists: "0-2,7" -> ["0", "1", "2", "7"]."""
    values = []
    for part in value.split(","):
        ends = re.fullmatch(r"(\d+)-(\d+)", part)
        values += map(str, range(int(ends[1]), int(ends[2]) + 1)) if ends else [part]
    return values or [value]  # a range that runs backwards: train.py says what is wrong with it


# ---- running them ---------------------------------------------------------------------------------------------------

def places(args):
    """Return the device of each of the runs that are trained at the same time.

    One for each core, or each --threads of them; one for each GPU: the steps of one run, replayed as CUDA graphs, leave
    it no gap for another's, and what one needs of its memory is not known before.
    """
    gpus = torch.cuda.device_count()
    if args.device in ("auto", "cuda") and gpus:
        return [f"cuda:{i}" for i in range(gpus)]
    if args.device in ("auto", "cpu"):
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        return ["cpu"] * max(1, cores // (args.threads or 1))
    return [args.device]


def progress(folder, args):
    """Return the share of its steps, 0 to 1, that the run in folder has behind it at its last log step."""
    try:
        history = read_history(folder / "logs" / files.HISTORY_NAME)
        config = history["config"]
        n_steps = args.n_steps or args.n_epochs * (config["train_size"] // config["batch_size"])
        return min(1.0, history["step"][-1] / n_steps)
    except (OSError, ValueError, LookupError, TypeError, ArithmeticError):  # train.py says what is wrong with it
        return 0.0


def train_one(folder, words, args, devices, running, received):
    """Run train.py in folder on the next free device; return its exit status and the line that says why.

    The status is None where a signal in received came first. running: where the process is noted while it runs.
    """
    device = devices.get()
    command = [sys.executable, Path(__file__).with_name("train.py"), "--threads=1", *words, "--resume",
               f"--device={device}", f"--log_dir={folder}/logs", f"--save_dir={folder}/checkpoints"]
    try:
        if received:
            return None, ""
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder / "output.txt", "a+", encoding="utf-8", errors="replace") as output:
            begin = output.tell()
            # A session of its own: Ctrl-C in a terminal would reach it as well, and a second one ends it unsaved.
            running[folder] = process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True,
                env={**os.environ, "OMP_NUM_THREADS": str(args.threads or 1)})
            if received:  # while it was being started
                process.send_signal(received[0])
            status = process.wait()
            if status < 0:
                return status, f"ended by {signal.Signals(-status).name}"
            output.seek(begin)
            return status, (output.read().split("\n")[:-1] or ["it printed nothing"])[-1]
    except OSError as error:
        return 1, str(error)
    finally:
        running.pop(folder, None)
        devices.put(device)


@contextlib.contextmanager
def handed_on(running):
    """Hand the signals that ask to stop on to the processes in running; yields the list of those that came."""
    received = []

    def hand_on(number, _frame):
        received.append(signal.SIGTERM if number == signal.SIGHUP else number)
        for process in list(running.values()):
            process.send_signal(received[-1])

    caught = [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1]
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # as it is under nohup
        caught.append(signal.SIGHUP)
    before = {number: signal.signal(number, hand_on) for number in caught}
    yield received
    for number, handler in before.items():
        signal.signal(number, handler)


def train_all(runs):
    """Train the runs {folder: (command line, args)}; return the folders of those that failed, and the signal that
    stopped the sweep or 0."""
    shares = {folder: progress(folder, args) for folder, (_, args) in runs.items()}
    todo = [folder for folder in runs if shares[folder] < 1]
    if not todo:
        return [], 0
    slots = places(runs[todo[0]][1])
    print(f"{len(runs)} runs, {len(runs) - len(todo)} of them complete already; {len(slots)} at a time", flush=True)
    devices = queue.SimpleQueue()
    for device in slots:
        devices.put(device)
    running, failed = {}, []
    with (handed_on(running) as received, futures.ThreadPoolExecutor(len(slots)) as pool,
          tqdm(total=len(runs), initial=sum(shares.values()), disable=None, dynamic_ncols=True,
               bar_format="{percentage:3.0f}%|{bar}| {n:.1f} of {total} runs [{elapsed}<{remaining}]") as bar):
        pending = {pool.submit(train_one, folder, *runs[folder], devices, running, received): folder
                   for folder in todo}
        while pending:
            for future in futures.wait(pending, timeout=2, return_when=futures.FIRST_COMPLETED).done:
                folder, (status, line) = pending.pop(future), future.result()
                shares[folder] = 1 if status == 0 else progress(folder, runs[folder][1])
                stopped = status is None or any(status in (128 + number, -number) for number in received)
                if not stopped and status:
                    failed.append(folder)
                if status is not None:
                    end = "stopped" if stopped else f"failed: {line}" if status else "complete"
                    tqdm.write(f"{folder}: {end}", file=sys.stdout)
                    sys.stdout.flush()
            shares |= {folder: progress(folder, runs[folder][1]) for folder in list(running)}
            bar.update(sum(shares.values()) - bar.n)
    return failed, received[0] if received else 0


def fetch(runs):
    """Download and decode the data sets, so that the runs, which begin together, find the files."""
    for name, folder, size in {(args.dataset, args.data_dir, args.image_size) for _, args in runs.values()}:
        with contextlib.suppress(ValueError, OSError):  # each run says so itself
            data.load_dataset(name, folder, image_size=size)


def show(folders, draw):
    """Print the table of the runs in folders; draw them in one figure, runs/sweep.png and .svg."""
    histories = [read_history(folder / "logs" / files.HISTORY_NAME) for folder in folders]
    print(report.table(histories, [folder.name for folder in folders]))
    if draw:
        print("wrote", *figure.draw(histories, Path("runs") / "sweep"))


def main(argv=None):
    signals.open_streams()
    argv = sys.argv[1:] if argv is None else argv
    try:
        if {"-h", "--help"} & set(argv):
            print(__doc__.strip())
            return 0
        if argv[:1] == ["--folder"]:
            print(folder_name(train.parse_args(argv[1:])))
            return 0
        runs = combinations(argv)
        fetch(runs)
        failed, stopped_by = train_all(runs)
        if stopped_by:
            print(f"stopped by {signal.Signals(stopped_by).name}; continue with the same command")
            return 128 + stopped_by
        complete = [folder for folder in runs if folder not in failed]
        if complete:
            show(complete, draw=all(args.plot for _, args in runs.values()))
        if failed:
            print(f"{len(failed)} of {len(runs)} runs failed: {', '.join(map(str, failed))}", file=sys.stderr)
        return 1 if failed else 0
    except (ValueError, OSError) as error:
        print(f"sweep.py: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 128 + signal.SIGINT


if __name__ == "__main__":
    sys.exit(main())
