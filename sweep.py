"""Train many combinations of flags, as many at a time as the machine has room for.

    python sweep.py --seed=0-3 --depth=2,4,6 --dataset=digits --n_steps=20000

The flags are those of train.py. Each may hold a list (2,4,6), a range (0-3) or both (0-3,7), except paths and those
whose value is itself a list (--epsilons, --lc_radius, --tracker). Each combination is a run in a folder under runs/
that is named after the experiment, like those of a SLURM array of run_mnist_mlp.sh. The same command again continues
what was stopped and skips what is complete. Ctrl-C stops all runs and saves each. output.txt in a run's folder holds
what the run prints.

    python sweep.py --preset=first --seed=0-4                       # runs/first_seed_0 to runs/first_seed_4
    python sweep.py --folder FLAGS                                  # only print the folder of one run

Exit status: 0 all runs are complete; 1 one failed; 2 the command is wrong; 128 + n stopped by signal n.
"""

import contextlib
import dataclasses
import itertools
import re
import signal
import sys
from pathlib import Path

from compute import signals
from flags import FIELDS, Config, folder_name, parse_args, parse_folder, preset_flags

# A comma in the value of these flags does not make two runs.
PASSED_ON = {name for name, field in FIELDS.items()
             if field.metadata.get("nargs") == "+" or field.metadata.get("type") is parse_folder}
Runs = dict[Path, tuple[list[str], Config]]  # folder: (its command line, its flags)


# ---- which runs -----------------------------------------------------------------------------------------------------

def combinations(argv: list[str]) -> Runs:
    """Return the runs that a command line stands for. Raises ValueError if two of them would share a folder, or if the
    command line names the folders itself."""
    runs: Runs = {}
    for words in itertools.product(*alternatives(argv)):
        config = parse_args(list(words))
        own = Config(**preset_flags(config.preset))
        if (config.log_dir, config.save_dir) != (own.log_dir, own.save_dir):
            raise ValueError("each run has its own folder under runs/: leave out --log_dir and --save_dir")
        folder = folder_name(config)
        _, before = runs.setdefault(folder, (list(words), config))
        several = [f"--{name}" for name in FIELDS if getattr(before, name) != getattr(config, name)]
        if several:
            raise ValueError(f"{', '.join(several)}: several values do not make several experiments, and the runs "
                             f"would share the folder {folder}; give one value")
    return runs


def alternatives(argv: list[str]) -> list[list[str]]:
    """Return for each word of a command line the list of words that it stands for."""
    flag, words = "", []
    for word in argv:
        name, equals, value = word.partition("=") if word.startswith("--") else ("", "", word)
        flag = name or flag
        values = [value] if flag[2:] in PASSED_ON else expanded(flag, value)
        words.append([name + equals + one for one in values])
    return words


def expanded(flag: str, value: str) -> list[str]:
    """Return the values that a flag's value lists: "0-2,7" -> ["0", "1", "2", "7"]. ValueError for "3-1"."""
    values: list[str] = []
    for part in value.split(","):
        ends = re.fullmatch(r"(\d+)-(\d+)", part)
        if ends and int(ends[1]) > int(ends[2]):
            raise ValueError(f"{flag}: the range {part} runs backwards")
        values += map(str, range(int(ends[1]), int(ends[2]) + 1)) if ends else [part]
    return values


# ---- running them ---------------------------------------------------------------------------------------------------

def is_complete(folder: Path, config: Config) -> bool:
    """Return whether folder holds the whole of the run that these flags describe."""
    from records import history

    try:
        found = history.read_history(folder / "logs" / history.HISTORY_NAME)
    except (ValueError, OSError):  # train.py is to say so
        return False
    if config.dataset in ("imagefolder", "npz"):  # whose files may have changed
        import data
        from records import checkpoints
        with contextlib.suppress(ValueError, OSError, MemoryError):
            if not checkpoints.is_of_data(found, data.fingerprint(data.from_config(dataclasses.asdict(config)))):
                return False
    used, last, length = found["config"], found["step"][-1:], "n_steps" if config.n_steps else "n_epochs"
    return (last == [used["n_steps"]] and used[length] == getattr(config, length)
            and any(folder.glob(f"checkpoints/checkpoint_epoch_*_step_{last[0]:09d}.pt")))


def train_all(runs: Runs) -> tuple[list[str], int]:
    """Train the runs that are not complete; return the folders of those that failed, and the signal that stopped the
    sweep or 0."""
    todo = {folder: run for folder, run in runs.items() if not is_complete(folder, run[1])}
    if not todo:
        return [], 0
    import data
    from compute import pool

    # The runs, which start together, are to find the files downloaded and decoded.
    sets = {(config.dataset, config.data_dir, config.image_size): config for _, config in todo.values()}
    for config in sets.values():
        with contextlib.suppress(ValueError, OSError, MemoryError):  # each run says so itself
            data.from_config(dataclasses.asdict(config))
    places = pool.places(config.device, config.threads)
    print(f"{len(runs)} runs, {len(runs) - len(todo)} of them complete already; {len(places)} at a time", flush=True)
    train = [sys.executable, str(Path(__file__).with_name("train.py")), "--threads=1"]
    jobs = [pool.Job(str(folder), [*train, *words, "--resume", f"--log_dir={folder}/logs",
                                   f"--save_dir={folder}/checkpoints"], folder / "output.txt")
            for folder, (words, _) in todo.items()]
    return pool.run_jobs(jobs, places, config.threads or 1, len(runs) - len(todo))


def show(folders: list[Path], draw: bool) -> None:
    """Print the table of the runs in folders; draw them in one figure, runs/sweep.png and .svg."""
    from analysis import report
    from records import history

    histories = [history.read_history(folder / "logs" / history.HISTORY_NAME) for folder in folders]
    print(report.table(histories, [folder.name for folder in folders]))
    if draw:
        try:
            from analysis import figure

            print("wrote", *figure.draw(histories, Path("runs") / "sweep"))
        except Exception as error:  # whatever matplotlib raises: the runs are complete
            print(f"the figure cannot be drawn: {' '.join(str(error).split())}")


def main(argv: list[str] | None = None) -> int:
    """Run a command line of sweep.py; return the exit status."""
    signals.replace_unencodable()
    argv = sys.argv[1:] if argv is None else argv
    try:
        if {"-h", "--help"} & set(argv):
            print((__doc__ or "").strip())
            return 0
        if argv[:1] == ["--folder"]:
            print(folder_name(parse_args(argv[1:])))
            return 0
        runs = combinations(argv)
        failed, stopped_by = train_all(runs)
        if stopped_by:
            print(f"stopped by {signal.Signals(stopped_by).name}; continue with the same command")
            return 128 + stopped_by
        complete = [folder for folder in runs if str(folder) not in failed]
        if complete:
            show(complete, draw=all(config.plot for _, config in runs.values()))
        if failed:
            print(f"{len(failed)} of {len(runs)} runs failed: {', '.join(failed)}", file=sys.stderr)
        return 1 if failed else 0
    except (ValueError, OSError) as error:
        print(f"sweep.py: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 128 + signal.SIGINT


if __name__ == "__main__":
    sys.exit(main())
