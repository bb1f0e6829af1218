"""Figures and the delay in numbers, from the history files that train.py writes.

    python plot.py                                          # logs/training_history.json -> .png and .svg next to it
    python plot.py runs/*/logs/training_history.json        # a sweep in one figure; seeds become mean and range
    python plot.py --summary                                # where each curve rises after interpolation
    python plot.py --table runs/*/logs/training_history.json
    python plot.py --csv > history.csv                      # one row for each log step, for pandas.read_csv
    python plot.py --partition checkpoints/checkpoint_epoch_0.pt checkpoints/checkpoint_epoch_1000.pt
    python plot.py --partition checkpoints/*.pt --out partition.gif     # one frame for each checkpoint
"""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from flags import OneLineParser

# PyTorch and matplotlib take seconds to import: that waits until the command line is known to be right.


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = OneLineParser(prog="plot.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("histories", nargs="*", metavar="HISTORY.json",
                        help="history files of train.py, or the folders of runs (default: logs/training_history.json)")
    parser.add_argument("--out", metavar="PATH", type=Path, help="write PATH.png and PATH.svg (default: next to "
                        "the history; 'sweep' in the folder that several have in common; 'partition' next to the first "
                        "checkpoint)")
    parser.add_argument("--summary", action="store_true", help="print where each curve rises after interpolation")
    parser.add_argument("--table", action="store_true", help="print one line for each run")
    parser.add_argument("--csv", action="store_true", help="print the history as a flat table for pandas.read_csv")
    parser.add_argument("--partition", nargs="+", metavar="CHECKPOINT", help="draw the network's partition of a plane "
                        "through three test images, side by side for these checkpoints of a run; with --out "
                        "FILE.gif one frame for each")
    parser.add_argument("--data_dir", metavar="FOLDER", help="with --partition: where the data set is (default: the "
                        "folder that the run was given, relative to the current folder)")
    args = parser.parse_args(argv)
    suffixes = [".png", ".svg", *[".gif"] * bool(args.partition)]
    if args.out and (args.out.is_dir() or not args.out.parent.is_dir()):
        parser.error(f"--out {args.out}: name a file in a folder that exists")
    if args.out and args.out.suffix[1:2].isalpha() and args.out.suffix not in suffixes:
        parser.error(f"--out {args.out}: the figure can be written as {', '.join(suffixes)}")
    if args.data_dir and not args.partition:
        parser.error("--data_dir is for --partition only")
    if args.partition and (args.table or args.summary or args.csv or args.histories):
        parser.error("--partition draws checkpoints: histories, --table, --summary and --csv go without it")
    if args.csv and (args.table or args.summary or args.out):
        parser.error("--csv prints a table for programs: ask for --table, --summary or --out in another command")
    args.histories = [history_in(path) for path in args.histories or ["logs"]]
    return args


def history_in(path: str) -> str:
    """Return the history of a run's folder or of its folder of logs; any other path as it is."""
    inside = (Path(path, *logs, "training_history.json") for logs in ([], ["logs"]))
    return str(next(filter(Path.is_file, inside), path))


def run(args: argparse.Namespace) -> None:
    if args.partition:
        from analysis import panels, partition

        out = args.out or Path(args.partition[0]).parent / "partition"
        if out.suffix == ".gif":
            partition.gif(args.partition, out, args.data_dir)
            print("wrote", out)
        else:
            print("wrote", *panels.save(partition.figure(args.partition, args.data_dir), out))
        return
    from analysis import report, runs
    from records.history import read_history

    histories = [read_history(path) for path in args.histories]
    names = runs.short_names(args.histories)
    if args.table:
        print(report.table(histories, names))
    if args.csv:
        print(report.csv_table(histories, names), end="")
    if args.summary:
        heads = [f"{path}\n" if len(histories) > 1 else "" for path in args.histories]
        print("\n\n".join(head + report.summary(history) for head, history in zip(heads, histories, strict=True)))
    if args.out or not (args.table or args.summary or args.csv):
        from analysis import figure

        sweep = Path(os.path.commonpath([Path(path).resolve().parent for path in args.histories])) / "sweep"
        path = sweep if len(histories) > 1 else Path(args.histories[0]).with_suffix("")
        print("wrote", *figure.draw(histories, args.out or path))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status: 0, or 2 after one line on what is wrong."""
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # an output without "ε" shows "?"
    args = parse_args(argv)
    try:
        run(args)
        print(end="", flush=True)
        return 0
    except BrokenPipeError:  # the reader, `head` for instance, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # nothing left to fail on at exit
        return 0
    except ImportError as error:
        reason = f"{error}: install what it needs with 'pip install -r requirements.txt'"
    except (ValueError, OSError) as error:
        reason = str(error)
    print(f"plot.py: {reason}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
