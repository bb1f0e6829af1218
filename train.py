"""Train a network far past interpolation and watch it grok.

One command trains an MLP, a CNN or a ResNet-18 and records at each log step clean accuracy, accuracy under l-inf PGD
attack and local complexity: the experiment of Humayun, Balestriero and Baraniuk, "Deep Networks Always Grok and Here is
Why" (arXiv:2402.15555).

    python train.py --dataset=digits --n_steps=20000                # embedded data, no download
    python train.py --dataset=mnist --n_epochs=20000                # the paper's MNIST MLP, 100,000 steps
    torchrun --nproc_per_node=2 train.py --model=resnet18 --dataset=cifar10 --batch_size=64 --weight_decay=0
    sbatch run_mnist_mlp.sh --width=1000                            # on a SLURM cluster

Read main() and train(), at the end, first. A run leaves logs/training_history.json, a figure beside it, and
checkpoints/checkpoint_epoch_*.pt. Exit status: 0 the run is complete; 1 it failed on the way (no room on the disk, a
loss that is not finite); 2 the command or its input is wrong; 128 + n it was stopped by signal n and can be resumed.
"""

import argparse
import contextlib
import errno
import math
import os
import signal
import sys
import time

from analysis import report
from runtime import device as devices
from runtime import distributed, signals

if __name__ == "__main__":  # the imports take seconds, and Ctrl-C may come meanwhile
    signal.signal(signal.SIGINT, lambda number, _: (print("train.py: interrupted", file=sys.stderr), os._exit(130)))

import torch

import attacks
import data
import flags
import losses
import measure
import models
import training
from run import Run, RunFailed

GREY_EPSILONS = [0.03, 0.06, 0.10, 0.13, 0.16, 0.20]
COLOUR_EPSILONS = [1 / 255, 2 / 255, 4 / 255, 8 / 255]


# ---- the command line -----------------------------------------------------------------------------------------------

def build_parser():
    parser = flags.OneLineParser(prog="train.py", description=__doc__.split("\n\n")[1], allow_abbrev=False,
                                    epilog="More in README.md.")

    group = parser.add_argument_group("the network")
    group.add_argument("--model", default="mlp", choices=list(models.MODELS), help="(default mlp)")
    group.add_argument("--depth", type=flags.number(int, low=2), metavar="N",
                       help="linear layers of the MLP (default 4); deeper ones grok more sharply in the paper")
    group.add_argument("--width", type=flags.number(int, low=1), metavar="N",
                       help="hidden units, or channels of the first stage (default: mlp 200, cnn 32, resnet18 16)")
    group.add_argument("--activation", default="relu", choices=list(models.ACTIVATIONS),
                       help="with relu and leaky_relu the network is a spline and local complexity counts its regions' "
                            "boundaries (default relu)")
    group.add_argument("--batch_norm", action="store_true",
                       help="add batch norm before each activation; in the paper it prevents grokking")
    group.add_argument("--init_scale", type=flags.number(float, above=0), default=1.0, metavar="X",
                       help="factor on the initial weights; 8 with --loss=mse delays generalisation by thousands of "
                            "steps (default 1)")

    group = parser.add_argument_group("the data")
    group.add_argument("--dataset", default="mnist", choices=list(data.DATASETS),
                       help="digits needs no download; imagefolder reads DATA_DIR/train and DATA_DIR/test or val "
                            "(default mnist)")
    group.add_argument("--data_dir", default="data", metavar="DIR", help="where the data sets lie (default data)")
    group.add_argument("--train_size", type=flags.count_or("all"), metavar="N|all",
                       help="training images, drawn at random by seed (default: 1000 for mnist and digits, else all)")
    group.add_argument("--label_noise", type=flags.number(float, low=0, high=1), default=0.0, metavar="FRACTION",
                       help="share of training labels replaced by random ones; 1 is the random-label experiment "
                            "(default 0)")
    group.add_argument("--image_size", type=flags.number(int, low=1), metavar="PX",
                       help="side of the images for imagenette and imagefolder (default: imagenette 128, imagefolder "
                            "as they are, or 128 if they differ)")

    group = parser.add_argument_group("training")
    group.add_argument("--optimizer", default="adamw", choices=list(training.OPTIMIZERS),
                       help="adam couples the weight decay to the gradient and does not grok (default adamw)")
    group.add_argument("--loss", default="ce", choices=list(losses.LOSSES),
                       help="ce: cross-entropy as PyTorch computes it; exact_ce: the same function without its "
                            "rounding; mse: squared error on one-hot targets; stablemax: cross-entropy of a softmax "
                            "that does not saturate (default ce)")
    group.add_argument("--lr", type=flags.number(float, above=0), default=0.001, metavar="X",
                       help="learning rate, constant (default 0.001)")
    group.add_argument("--weight_decay", type=flags.number(float, low=0), default=0.01, metavar="X",
                       help="drives the late phase of an MLP; the paper uses 0 for CNN and ResNet (default 0.01)")
    group.add_argument("--adam_eps", type=flags.number(float, low=0), default=1e-8, metavar="X",
                       help="epsilon of Adam and AdamW; once gradients are smaller it is what slows the run (default "
                            "1e-8)")
    group.add_argument("--orthogonal_gradient", action="store_true",
                       help="take from each tensor's gradient what only scales its weights")
    group.add_argument("--batch_size", type=flags.number(int, low=1), default=200, metavar="N",
                       help="images a step, over all processes (default 200)")
    length = group.add_mutually_exclusive_group()
    length.add_argument("--n_epochs", type=flags.number(int, low=1), default=100_000, metavar="N",
                        help="length of the run in passes over the training images (default 100000)")
    length.add_argument("--n_steps", type=flags.number(int, low=1), metavar="N",
                        help="length of the run in steps, in place of --n_epochs; grokking takes 10^5 and more")
    group.add_argument("--dtype", default="float32", choices=["float32", "float64"],
                       help="precision of everything; float64 shows what is rounding (default float32)")
    group.add_argument("--seed", type=flags.number(int, low=0, high=2**32 - 1), default=42, metavar="N",
                       help="of the weights, the batches, the subset, the attack's starts: of all that is random "
                            "(default 42)")

    group = parser.add_argument_group("the log steps")
    group.add_argument("--log_points", type=flags.number(int, low=3), default=60, metavar="N",
                       help="log steps, spaced evenly in log(step), the first and the last among them (default 60)")
    group.add_argument("--log_from", type=flags.number(int, low=1), default=1, metavar="N",
                       help="first log step after step 0; the log points are spaced evenly in log(step) from there "
                            "(default 1)")
    group.add_argument("--log_interval", type=flags.number(int, low=1), metavar="N",
                       help="log every N epochs, in place of --log_points")
    group.add_argument("--epsilons", type=flags.listed(flags.parse_epsilon), nargs="+", metavar="EPS",
                       help="radii of the attack in pixel units of [0, 1], such as 0.1 or 8/255 (default: 0.03 0.06 "
                            "0.10 0.13 0.16 0.20 for grey images, 1/255 2/255 4/255 8/255 for colour)")
    group.add_argument("--pgd_steps", type=flags.number(int, low=1), default=10, metavar="N",
                       help="iterations of the attack behind adv_acc; the most toward one class behind robust_acc "
                            "(default 10)")
    group.add_argument("--pgd_step_size", type=flags.step_size, metavar="X",
                       help="step of the attack behind adv_acc in pixel units, such as 0.01 or 0.8/255 (default "
                            "2.5 epsilon / steps)")
    group.add_argument("--pgd_start", default="random", choices=["random", "image"],
                       help="where the attack behind adv_acc starts: at a random point of the ball, or at the image "
                            "itself, as in the authors' code; there it never moves if the gradient is exactly zero "
                            "(default random)")
    group.add_argument("--pgd_restarts", type=flags.number(int, low=1), default=1, metavar="N",
                       help="random starts of the attack behind adv_acc; the worst counts (default 1)")
    group.add_argument("--adv_size", type=flags.count_or("all"), default=1000, metavar="N|all",
                       help="test images to attack, the same at every log step (default 1000)")
    group.add_argument("--robust_budget", default=attacks.DEFAULT_BUDGET, choices=list(attacks.BUDGETS),
                       help=f"effort of the attack behind robust_acc (default {attacks.DEFAULT_BUDGET})")
    group.add_argument("--lc_samples", type=flags.number(int, low=0), default=1024, metavar="N",
                       help="train, test and random points at which local complexity is taken; 0 leaves it out "
                            "(default 1024)")
    group.add_argument("--lc_directions", type=flags.number(int, low=1), default=25, metavar="P",
                       help="directions of the cross-polytope around each point; it has 2P vertices (default 25)")
    group.add_argument("--lc_radius", type=flags.listed(flags.number(float, above=0, high=1e6)), nargs="+",
                       metavar="R",
                       help="distance of the vertices in pixel units, one or several (default: 0.05 for grey images, "
                            "0.005 for colour)")
    group.add_argument("--eval_batch_size", type=flags.number(int, low=1), metavar="N",
                       help="network inputs at once in a log step: bounds its memory (default: by the network's size)")

    group = parser.add_argument_group("files and interruptions")
    group.add_argument("--log_dir", default="logs", metavar="DIR", help="of the history and the figure (default logs)")
    group.add_argument("--save_dir", default="checkpoints", metavar="DIR",
                       help="of the checkpoints (default checkpoints)")
    group.add_argument("--resume", action="store_true",
                       help="continue from the newest sound checkpoint in SAVE_DIR; start if there is none")
    group.add_argument("--checkpoint_minutes", type=flags.number(float, low=0), default=10.0, metavar="X",
                       help="save the state this often between log steps, into one file (default 10)")
    group.add_argument("--keep_checkpoints", type=flags.count_or("all", "last"), default="all", metavar="all|last|N",
                       help="how many log steps' checkpoints to keep (default all)")
    group.add_argument("--on_nan", default="stop", choices=["stop", "continue"],
                       help="what to do when the loss is not finite (default stop)")
    group.add_argument("--no_plot", dest="plot", action="store_false", help="draw no figure")
    group.add_argument("--quiet", action="store_true", help="print errors only")

    group = parser.add_argument_group("the machine")
    group.add_argument("--device", default="auto", metavar="auto|cpu|cuda|cuda:N", help="(default auto)")
    group.add_argument("--threads", type=flags.number(int, low=1, high=1024), metavar="N",
                       help="CPU threads (default: measured at the start)")
    group.add_argument("--products", default="auto", choices=["auto", "mkl", "onednn"],
                       help="which of the two libraries in PyTorch multiplies the matrices of linear layers on a CPU; "
                            "auto: the faster one in training, layer by layer, measured at the start (default auto)")
    group.add_argument("--compile", default="auto", choices=["auto", "on", "off"],
                       help="compile the training step's network; auto: on a CPU, if the run is long enough to gain by "
                            "it (default auto)")
    group.add_argument("--no_cuda_graph", dest="cuda_graph", action="store_false",
                       help="launch the kernels of each step one by one: slower, for comparison")
    group.add_argument("--deterministic", action="store_true",
                       help="use only deterministic GPU kernels, so that a resumed run repeats bit for bit")

    return parser


def parse_args(argv=None):
    """Return what the user asks for; nothing changes it afterwards."""
    parser = build_parser()
    args = parser.parse_args(argv)
    for name in ("epsilons", "lc_radius"):
        if getattr(args, name) is not None:
            setattr(args, name, [value for word in getattr(args, name) for value in word])
            if len({*map(flags.history_key, getattr(args, name))}) < len(getattr(args, name)):
                parser.error(f"argument --{name}: two values agree in six digits")
    return args


def defaults():
    return vars(build_parser().parse_args([]))


def asked(args):
    """Return the names of the flags that the user gave another value than the default."""
    return sorted(name for name, default in defaults().items() if getattr(args, name) != default)


def complete(args, dataset, device):
    """Return the config: every flag as it is used with this data set. ValueError for a flag that does not fit it."""
    config = argparse.Namespace(**vars(args))
    n_train, n_test, features = len(dataset.x_train), len(dataset.x_test), dataset.x_test[0].numel()
    grey, size = dataset.x_test.shape[1] == 1, distributed.size()
    config.device = str(device)
    config.train_size = n_train
    config.adv_size = n_test if args.adv_size == "all" else args.adv_size
    config.epsilons = sorted(args.epsilons or (GREY_EPSILONS if grey else COLOUR_EPSILONS))
    config.lc_radius = args.lc_radius or [0.05 if grey else 0.005]
    config.width = args.width or models.MODELS[args.model].width
    config.depth = args.depth or models.MODELS[args.model].depth
    steps_in_epoch = n_train // args.batch_size
    config.n_steps = args.n_steps or args.n_epochs * steps_in_epoch
    config.n_epochs = None if args.n_steps else args.n_epochs

    if args.batch_size > n_train:
        raise ValueError(f"--batch_size={args.batch_size} is larger than the training set of {n_train} images")
    if args.batch_size % size:
        raise ValueError(f"--batch_size={args.batch_size} does not divide by the {size} processes")
    if args.batch_norm and args.batch_size == 1:
        raise ValueError("--batch_norm needs batches of two images or more: raise --batch_size")
    for flag in ("adv_size", "lc_samples"):
        if 0 < getattr(config, flag) < size:
            raise ValueError(f"--{flag}={getattr(config, flag)} is less than one for each of {size} processes")
    if args.pgd_start == "image" and args.pgd_restarts > 1:
        raise ValueError("--pgd_restarts needs random starts: from the image itself every attack is the same")
    if args.lc_samples and args.lc_directions > features:
        raise ValueError(f"--lc_directions={args.lc_directions}: images of {features} values have no more directions")
    images_of = {"lc_samples": args.lc_samples, "pgd_restarts": args.pgd_restarts * measure.attacked(config, dataset)}
    for flag, images in images_of.items():
        if 8 * images * features > devices.total_memory():
            raise ValueError(f"--{flag}={getattr(args, flag)} needs {8e-9 * images * features:,.0f} GB, more than this "
                             "machine's memory: lower it")
    return config


def load_data(args):
    """Return the data set, on the CPU. One process downloads, the others find the files."""
    return distributed.rank0_first(lambda: data.load_dataset(
        args.dataset, args.data_dir, args.train_size, args.seed, args.image_size, args.label_noise))


# ---- the loop -------------------------------------------------------------------------------------------------------

def log_schedule(n_steps, log_points, log_from=1):
    """Return the log steps: log_points whole numbers from 0 to n_steps, evenly spaced in log(step) from log_from on.

    Where even spacing would be closer than one step, neighbours are one step apart and the rest is spaced anew, so
    there are exactly log_points (3 or more) of them unless n_steps is smaller than that.
    """
    steps = [0, min(log_from, n_steps)]
    while steps[-1] < n_steps:
        left = max(log_points - len(steps), 1)
        ratio = (n_steps / steps[-1]) ** (1 / left)
        steps.append(min(max(steps[-1] + 1, round(steps[-1] * ratio)), n_steps))
    return steps


def schedule_for(config):
    if config.log_interval is None:
        return log_schedule(config.n_steps, config.log_points, config.log_from)
    interval = config.log_interval * (config.train_size // config.batch_size)
    return sorted({*range(0, config.n_steps, interval), config.n_steps})


def train(run):
    """Train to n_steps with a log step at each step of the schedule; return the number of the signal that stopped the
    run, or 0 if it is complete."""
    config = run.config
    schedule = schedule_for(config)
    run.console.start(run.step, config.n_steps, sum(step not in run.history["step"] for step in schedule))
    stopped_by = 0
    while not stopped_by:
        if run.step in schedule and run.step not in run.history["step"]:
            with contextlib.suppress(signals.Interrupted):
                log_step(run)
        stopped_by = distributed.all_reduce_max(run.stop.signal or distributed.orphaned(), run.device)
        if stopped_by or run.step == config.n_steps:
            break
        train_until(run, min(step for step in schedule if step > run.step))
        # The processes' clocks differ, and all of them have to take part in saving.
        if distributed.all_reduce_max(time.perf_counter() - run.saved_at > 60 * config.checkpoint_minutes, run.device):
            run.save_rolling()
    if stopped_by:
        run.save_rolling()
    run.console.end()
    return stopped_by


def train_until(run, log_step):
    """Make the steps up to the next log step, or about half a second of them."""
    length = min(distributed.all_reduce_max(run.steps_at_once, run.device), log_step - run.step)
    began = time.perf_counter()
    run.trainer.advance(run.step, length)
    run.step += length
    if run.device.type == "cpu":
        run.check_finite()
    else:  # looking at the loss would wait for the device; that is left to the log steps
        run.stay_close()
    pace = 0.5 / max(time.perf_counter() - began, 1e-6)
    # The root: the time taken on a GPU is that of the steps before these, and without it the lengths would swing.
    run.steps_at_once = max(1, int(length * min(pace**0.5, 2.0)))
    run.console.progress(run.step)


def log_step(run):
    """Measure, and record: a row of the history and of the table, a checkpoint."""
    config = run.config
    run.check_finite()
    torch.set_num_threads(run.tuned["eval_threads"])
    with run.stop.while_measuring():
        row = measure.measure(run.model, run.dataset, run.probes, config, run.console.measuring)
    torch.set_num_threads(run.tuned["threads"])
    if not math.isfinite(row["train_loss"]):
        run.refuse_nan(f"the training loss at step {run.step}", before=run.step)
    largest_loss = distributed.all_reduce_max(run.trainer.largest_loss.item(), run.device)
    row = {"epoch": run.epoch, "step": run.step, **row,
           "max_batch_loss": largest_loss if run.step > 0 else math.nan, "seconds": run.seconds}
    run.trainer.largest_loss.fill_(-math.inf)
    said = {warning.get("kind") for warning in run.history["warnings"]}
    run.record(row, {kind: text for kind, text in measure.remarks(row, config).items() if kind not in said})


def main(argv=None):
    signals.open_streams()
    args = parse_args(argv)
    try:
        device = distributed.start(devices.choose_device(args.device))
        devices.set_precision(args.deterministic)
        dataset = load_data(args)
        config = complete(args, dataset, device)
        run = Run(config, asked(args), defaults(), dataset, device)
    except (ValueError, OSError, MemoryError, RuntimeError) as error:
        if devices.out_of_memory(error):
            return fail("not enough memory: lower --width, --train_size, --adv_size or --lc_samples", 2)
        if not isinstance(error, (ValueError, OSError)):
            raise
        full_disk = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        return fail_together(error, 1 if full_disk else 2)
    except KeyboardInterrupt:
        return fail("interrupted before the first step", 128 + signal.SIGINT)
    try:
        run.console.header()
        stopped_by = train(run)
        distributed.run_on_rank0(lambda: finish(run, stopped_by))
    except RunFailed as error:
        return fail_together(error, 1)
    except OSError as error:
        return fail_together(
            f"{error}; the files written before are whole: run again with --resume once this is mended", 1)
    except (MemoryError, RuntimeError) as error:
        if devices.out_of_memory(error):
            return fail("the memory is full: lower --eval_batch_size or --batch_size and run again with --resume", 1)
        if not distributed.lost_another(error):
            raise
        return fail("another process of this run has ended, so this one ends too: run again with --resume", 1)
    distributed.barrier()  # none leaves while another is still listening to it
    return 128 + stopped_by if stopped_by else 0


def finish(run, stopped_by):
    if run.config.plot and run.history["step"]:
        run.draw()
    if stopped_by:
        run.console.note(f"stopped by {signal.Signals(stopped_by).name} at step {run.step}; continue with the same "
                         "command and --resume")
    else:
        run.console.note("\n" + report.summary(run.history))


def fail(error, status):
    """Print error in one line; return status."""
    message = " ".join(str(error).split())
    print(f"train.py: error: {message}", file=sys.stderr)
    return status


def fail_together(error, status):
    """fail() for an error that every process of the run has met: the first prints it."""
    if distributed.rank() == 0:
        fail(error, status)
    distributed.barrier()  # torchrun ends all processes when one has ended: not before the line is out
    return status


if __name__ == "__main__":
    distributed.leave(main())
