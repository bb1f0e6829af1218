"""Figures and the delay in numbers, from the history files that train.py writes.

    python plot.py                                          # logs/training_history.json -> .png and .svg beside it
    python plot.py runs/*/logs/training_history.json        # a sweep in one figure; seeds become mean and range
    python plot.py --summary                                # where each curve rises after interpolation
    python plot.py --table runs/*/logs/training_history.json
    python plot.py --partition checkpoints/checkpoint_epoch_0.pt checkpoints/checkpoint_epoch_1000.pt
    python plot.py --partition checkpoints/*.pt --out partition.gif     # one frame a checkpoint
"""

import argparse
import os
import sys
from pathlib import Path

from analysis import figure, panels, report, runs
from flags import OneLineParser
from runtime.history import read_history

# ---- command line ---------------------------------------------------------------------------------------------------

def output_path(text):
    """An argparse type: a file in a folder that is there."""
    path = Path(text)
    if not path.name or path.is_dir():
        raise argparse.ArgumentTypeError(f"'{text}' is a folder: name the file in it")
    if not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"there is no folder '{path.parent}'")
    return path


def parse_args(argv=None):
    parser = OneLineParser(prog="plot.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("histories", nargs="*", metavar="HISTORY.json", default=["logs/training_history.json"],
                        help="history files of train.py (default: logs/training_history.json)")
    parser.add_argument("--out", metavar="PATH", type=output_path, help="write PATH.png and PATH.svg (default: beside "
                        "the history; 'sweep' in the folder that several have in common; 'partition' beside the first "
                        "checkpoint)")
    parser.add_argument("--summary", action="store_true", help="print where each curve rises after interpolation")
    parser.add_argument("--table", action="store_true", help="print one line a run")
    parser.add_argument("--markdown", action="store_true", help="print the table of results/README.md")
    parser.add_argument("--partition", nargs="+", metavar="CHECKPOINT", help="draw the network's partition of a plane "
                        "through three test images, side by side for these checkpoints; with --out FILE.gif or "
                        "FILE.mp4 as a film, one frame a checkpoint")
    args = parser.parse_args(argv)
    suffixes = [".png", ".svg", *[".gif", ".mp4"] * bool(args.partition)]
    if args.out and args.out.suffix[1:2].isalpha() and args.out.suffix not in suffixes:
        parser.error(f"--out {args.out}: the figure can be written as {', '.join(suffixes)}")
    return args


def default_path(histories):
    if len(histories) == 1:
        return Path(histories[0]).with_suffix("")
    return Path(os.path.commonpath([Path(path).resolve().parent for path in histories])) / "sweep"


def draw_partition(checkpoints, out):
    from analysis import partition

    if out is not None and out.suffix in (".gif", ".mp4"):
        return [partition.film(checkpoints, out)]
    return panels.save(partition.figure(checkpoints), out or Path(checkpoints[0]).parent / "partition")


def run(args):
    if args.partition:
        print("wrote", *draw_partition(args.partition, args.out))
        return
    histories = [read_history(path) for path in args.histories]
    if args.table:
        print(report.table(histories, runs.short_names(args.histories)))
    if args.markdown:
        names = [name.removesuffix(".json") for name in runs.short_names(args.histories)]
        print(report.markdown_table(histories, names))
    if args.summary:
        texts = [report.summary(history) for history in histories]
        print("\n\n".join(texts if len(texts) == 1 else
                          [f"{path}\n{text}" for path, text in zip(args.histories, texts, strict=True)]))
    if args.out or not (args.table or args.summary or args.markdown):
        print("wrote", *figure.draw(histories, args.out or default_path(args.histories)))


def main(argv=None):
    nowhere = sys.stdout is None
    if not nowhere and hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # one that knows no "ε"
    try:
        args = parse_args(argv)
        if nowhere and (args.table or args.summary or args.markdown):
            raise OSError("the standard output is closed: there is nowhere to print to")
        run(args)
        sys.stdout.flush()
    except (ValueError, OSError) as error:
        print(f"plot.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
