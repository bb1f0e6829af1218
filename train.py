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

import contextlib
import copy
import dataclasses
import itertools
import signal
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F

import attacks
import cuda_graph
import data
import flags
import local_complexity
import machine
import models
import parallel
import plot
import runlog
from console import Console

GREY_EPSILONS = [0.03, 0.06, 0.10, 0.13, 0.16, 0.20]
COLOUR_EPSILONS = [1 / 255, 2 / 255, 4 / 255, 8 / 255]


# ---- the command line -----------------------------------------------------------------------------------------------

def parse_args(argv=None):
    parser = flags.OneLineParser(prog="train.py", description=__doc__.split("\n\n")[1], allow_abbrev=False,
                           epilog="More in README.md.")

    group = parser.add_argument_group("the network")
    group.add_argument("--model", default="mlp", choices=list(models.DEFAULT_WIDTH), help="(default mlp)")
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
    group.add_argument("--optimizer", default="adamw", choices=["adamw", "adam", "sgd"],
                       help="adam couples the weight decay to the gradient and does not grok (default adamw)")
    group.add_argument("--loss", default="ce", choices=["ce", "mse"],
                       help="cross-entropy, or squared error on one-hot targets (default ce)")
    group.add_argument("--lr", type=flags.number(float, above=0), default=0.001, metavar="X",
                       help="learning rate, constant (default 0.001)")
    group.add_argument("--weight_decay", type=flags.number(float, low=0), default=0.01, metavar="X",
                       help="drives the late phase of an MLP; the paper uses 0 for CNN and ResNet (default 0.01)")
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
    group.add_argument("--log_interval", type=flags.number(int, low=1), metavar="N",
                       help="log every N epochs, in place of --log_points")
    group.add_argument("--epsilons", type=flags.listed(flags.parse_epsilon), nargs="+", metavar="EPS",
                       help="radii of the attack in pixel units of [0, 1], such as 0.1 or 8/255 (default: 0.03 0.06 "
                            "0.10 0.13 0.16 0.20 for grey images, 1/255 2/255 4/255 8/255 for colour)")
    group.add_argument("--pgd_steps", type=flags.number(int, low=1), default=10, metavar="N",
                       help="iterations of the attack behind adv_acc; the most toward one class behind robust_acc "
                            "(default 10)")
    group.add_argument("--pgd_step_size", type=flags.number(float, above=0), metavar="X",
                       help="step of the attack behind adv_acc in pixel units (default 2.5 epsilon / steps)")
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
    group.add_argument("--lc_radius", type=flags.listed(flags.number(float, above=0)), nargs="+", metavar="R",
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

    group = parser.add_argument_group("the machine")
    group.add_argument("--device", default="auto", metavar="auto|cpu|cuda|cuda:N", help="(default auto)")
    group.add_argument("--threads", type=flags.number(int, low=1), metavar="N",
                       help="CPU threads (default: measured at the start)")
    group.add_argument("--no_cuda_graph", dest="cuda_graph", action="store_false",
                       help="launch the kernels of each step one by one: slower, for comparison")
    group.add_argument("--deterministic", action="store_true",
                       help="use only deterministic GPU kernels, so that a resumed run repeats bit for bit")

    parser.set_defaults(eval_threads=None)  # no flag: measured like --threads
    args = parser.parse_args(argv)
    for name in ("epsilons", "lc_radius"):
        if getattr(args, name) is not None:
            setattr(args, name, [value for word in getattr(args, name) for value in word])
            if len({*map(flags.history_key, getattr(args, name))}) < len(getattr(args, name)):
                parser.error(f"argument --{name}: two values agree in six digits")
    return args


# ---- set-up ---------------------------------------------------------------------------------------------------------

def load_data(args, device):
    """Load the data set onto the device, as uint8 images and int64 labels, and complete the flags that depend on it."""
    # One process downloads, the others find the files.
    loaded = parallel.first_then_others(lambda: data.load_dataset(
        args.dataset, args.data_dir, args.train_size, args.seed, args.image_size, args.label_noise))
    n_train, n_test = len(loaded.x_train), len(loaded.x_test)
    if args.batch_size > n_train:
        raise ValueError(f"--batch_size={args.batch_size} is larger than the training set of {n_train} images")
    if args.batch_size % parallel.size():
        raise ValueError(f"--batch_size={args.batch_size} does not divide by the {parallel.size()} processes")
    grey = loaded.x_train.shape[1] == 1
    args.train_size = n_train
    args.adv_size = n_test if args.adv_size == "all" else min(args.adv_size, n_test)
    for flag in ("adv_size", "lc_samples"):
        if 0 < getattr(args, flag) < parallel.size():
            raise ValueError(f"--{flag}={getattr(args, flag)} is less than one for each of {parallel.size()} processes")
    args.epsilons = sorted(args.epsilons or (GREY_EPSILONS if grey else COLOUR_EPSILONS))
    args.lc_radius = args.lc_radius or [0.05 if grey else 0.005]
    features = loaded.x_train[0].numel()
    if args.lc_samples and args.lc_directions > features:
        raise ValueError(f"--lc_directions={args.lc_directions}: images of {features} values have no more directions")
    if args.n_steps is None:
        args.n_steps = args.n_epochs * (n_train // args.batch_size)
    else:
        args.n_epochs = None
    return resident(loaded, device)


def resident(dataset, device):
    """Return dataset with its tensors on device."""
    splits = ("x_train", "y_train", "x_test", "y_test")
    return dataclasses.replace(dataset, **{split: getattr(dataset, split).to(device) for split in splits})


def seed_for(seed, purpose, number=0):
    """Return a seed that depends on these three and nothing else, so that a resumed run needs no generator's state."""
    return int(np.random.SeedSequence([seed, number, *purpose.encode()]).generate_state(1, np.uint64)[0] >> 1)


def build_model(args, dataset, device):
    torch.manual_seed(seed_for(args.seed, "weights"))
    if args.model == "mlp":
        args.depth = args.depth or models.DEFAULT_DEPTH
    args.width = args.width or models.DEFAULT_WIDTH[args.model]
    model = models.build_model(args.model, tuple(dataset.x_train.shape[1:]), dataset.num_classes, depth=args.depth,
                               width=args.width, activation=args.activation, batch_norm=args.batch_norm,
                               init_scale=args.init_scale, mean=dataset.mean, std=dataset.std)
    return model.to(device=device, dtype=getattr(torch, args.dtype))


def build_optimizer(args, model, device):
    kind = {"adamw": torch.optim.AdamW, "adam": torch.optim.Adam, "sgd": torch.optim.SGD}[args.optimizer]
    capturable = {} if args.optimizer == "sgd" else {"capturable": captures_steps(args, device)}
    return kind(model.parameters(), lr=args.lr, weight_decay=args.weight_decay, fused=True, **capturable)


def captures_steps(args, device):
    """Whether the steps are replayed as CUDA graphs; with several processes they are not: these exchange gradients."""
    return device.type == "cuda" and args.cuda_graph and parallel.size() == 1


def log_schedule(n_steps, log_points):
    """Return the log steps: log_points whole numbers from 0 to n_steps, evenly spaced in log(step) after the 0.

    Where even spacing would be closer than one step, neighbours are one step apart and the rest is spaced anew, so
    there are exactly log_points (3 or more) of them unless n_steps is smaller than that.
    """
    steps = [0, 1]
    while steps[-1] < n_steps:
        left = max(log_points - len(steps), 1)
        ratio = (n_steps / steps[-1]) ** (1 / left)
        steps.append(min(max(steps[-1] + 1, round(steps[-1] * ratio)), n_steps))
    return steps


def schedule_for(args):
    if args.log_interval is None:
        return log_schedule(args.n_steps, args.log_points)
    interval = args.log_interval * (args.train_size // args.batch_size)
    return sorted({*range(0, args.n_steps, interval), args.n_steps})


def choose_threads(args, model, dataset):
    """Set args.threads and args.eval_threads: as asked for, as before the resume, or as measured on a copy."""
    if args.threads is None and parallel.size() == 1 and dataset.x_train.device.type == "cpu":
        twin = copy.deepcopy(model)
        advance = training_steps(twin, build_optimizer(args, twin, dataset.x_train.device), dataset, args, print)
        steps = itertools.count()
        args.threads = machine.fastest_thread_count(lambda: advance(next(steps), 1))
        images = (dataset.x_test[:1000].to(getattr(torch, args.dtype)) / 255).requires_grad_()
        args.eval_threads = machine.fastest_thread_count(lambda: torch.autograd.grad(twin(images).sum(), images))
    args.threads = args.threads or torch.get_num_threads()
    args.eval_threads = args.eval_threads or args.threads


# ---- the training step ----------------------------------------------------------------------------------------------

def make_loss(args, num_classes, device):
    """Return loss(logits, labels): cross-entropy, or mean squared error on one-hot targets."""
    if args.loss == "ce":
        return F.cross_entropy
    one_hot = torch.eye(num_classes, device=device, dtype=getattr(torch, args.dtype))
    return lambda logits, labels: F.mse_loss(logits, one_hot.index_select(0, labels))


def batch_order(args, block, epochs, device):
    """Return the rows of `epochs` epochs' batches: a fresh permutation each, its incomplete last batch dropped.

    A function of (seed, block), so the batches after a resume are those of the uninterrupted run. Several epochs are
    drawn at once because for a small training set drawing them one by one takes longer than a step.
    """
    generator = torch.Generator(device).manual_seed(seed_for(args.seed, "batches", block))
    permutations = torch.rand(epochs, args.train_size, generator=generator, device=device).argsort(dim=1)
    return permutations[:, : args.train_size // args.batch_size * args.batch_size].flatten()


def training_steps(model, optimizer, dataset, args, report):
    """Return advance(step, n), which makes the n training steps after `step`.

    advance.finite_steps is a tensor: the number of steps before the first whose loss was not finite.
    """
    device, dtype = dataset.x_train.device, getattr(torch, args.dtype)
    network = parallel.wrap(model, device)
    loss_function = make_loss(args, dataset.num_classes, device)
    epochs = max(1, 65_536 // args.train_size)
    block_steps = epochs * (args.train_size // args.batch_size)
    order = torch.empty(block_steps * args.batch_size, dtype=torch.int64, device=device)
    first_batch = torch.arange(args.batch_size, device=device)[parallel.share(args.batch_size)]
    positions = first_batch.clone()
    finite_steps = torch.zeros((), dtype=torch.int64, device=device)
    all_finite = torch.ones((), dtype=torch.bool, device=device)
    white = torch.tensor(255, dtype=dtype, device=device)  # a tensor, so that one kernel casts and divides

    def training_step():
        rows = order.index_select(0, positions)
        positions.add_(args.batch_size)
        images = dataset.x_train.index_select(0, rows) / white
        optimizer.zero_grad(set_to_none=True)
        loss = loss_function(network(images), dataset.y_train.index_select(0, rows))
        loss.backward()
        optimizer.step()
        finite_steps.add_(all_finite.logical_and_(loss < torch.inf))  # false for NaN, too

    def repeat(n):
        for _ in range(n):
            training_step()

    if captures_steps(args, device):
        repeat = cuda_graph.repeater(training_step, report)
    order_of = None

    def advance(step, n):
        nonlocal order_of
        end = step + n
        while step < end:
            block, offset = divmod(step, block_steps)
            if order_of != block:
                order.copy_(batch_order(args, block, epochs, device))
                torch.add(first_batch, offset * args.batch_size, out=positions)
                order_of = block
            length = min(end - step, block_steps - offset)
            repeat(length)
            step += length

    advance.finite_steps = finite_steps
    return advance


# ---- the log step ---------------------------------------------------------------------------------------------------

def draw_probes(args, dataset):
    """Draw once what every log step looks at: the images to attack, the attack's starts, the points and directions of
    local complexity. They depend on the seed alone, so two log steps, and two processes, see the same."""
    device, dtype = dataset.x_train.device, getattr(torch, args.dtype)

    def generator(purpose):
        return np.random.default_rng(seed_for(args.seed, purpose))

    def draw(images, n, purpose):
        rows = np.sort(generator(purpose).permutation(len(images))[:n])
        return torch.from_numpy(rows).to(device)

    def pixels(images):
        return images.to(dtype) / 255

    rows = draw(dataset.x_test, args.adv_size, "attacked images")[parallel.share(args.adv_size)]
    shape = (args.pgd_restarts, args.adv_size, *dataset.x_test.shape[1:])
    starts = torch.from_numpy(generator("attack starts").random(shape, dtype=np.float32) * 2 - 1)
    probes = SimpleNamespace(
        attacked=pixels(dataset.x_test[rows]), labels=dataset.y_test[rows],
        starts=starts[:, parallel.share(args.adv_size)].to(device=device, dtype=dtype), points={})
    if args.lc_samples:
        for split in ("train", "test"):
            images = getattr(dataset, f"x_{split}")
            probes.points[split] = pixels(images[draw(images, args.lc_samples, f"{split} points")])
        uniform = generator("random points").random((args.lc_samples, *dataset.x_test.shape[1:]), dtype=np.float32)
        probes.points["random"] = torch.from_numpy(uniform).to(device=device, dtype=dtype)
        probes.directions = local_complexity.random_directions(
            args.lc_directions, dataset.x_test[0].numel(), seed_for(args.seed, "directions"), dtype, device)
    return probes


@torch.inference_mode()
def clean_loss_and_accuracy(model, images, labels, loss_function, dtype, batch_size):
    """Return the mean loss and the accuracy of model on uint8 images, in eval mode."""
    model.eval()
    loss = torch.zeros((), dtype=torch.float64, device=images.device)
    correct = torch.zeros((), dtype=torch.int64, device=images.device)
    for start in range(0, len(images), batch_size):
        y = labels[start:start + batch_size]
        logits = model(images[start:start + batch_size].to(dtype) / 255)
        loss += loss_function(logits, y).double() * len(y)
        correct += (logits.argmax(1) == y).sum()
    model.train()
    return loss.item() / len(images), correct.item() / len(images)


def measure(model, dataset, probes, args):
    """Return one row of the history: what a log step records, but for its step and time."""
    batch_size = args.eval_batch_size or default_eval_batch_size(model, dataset.x_train.shape[1:])
    loss_function = make_loss(args, dataset.num_classes, dataset.x_train.device)
    row = {}
    for split, x, y in (("train", dataset.x_train, dataset.y_train), ("test", dataset.x_test, dataset.y_test)):
        loss, accuracy = clean_loss_and_accuracy(model, x, y, loss_function, getattr(torch, args.dtype), batch_size)
        row |= {f"{split}_loss": loss, f"{split}_acc": accuracy}
    row |= accuracy_under_attack(model, probes, args, batch_size)
    row["local_complexity"] = mean_local_complexity(model, probes, args)
    row["weight_norm"] = torch.nn.utils.get_total_norm([p.detach().double() for p in model.parameters()]).item()
    return row


def accuracy_under_attack(model, probes, args, batch_size):
    """Return adv_acc (the paper's: PGD on cross-entropy, last iterate) and robust_acc at each epsilon, and saturated,
    the share of the attacked images on which the softmax rounds to exactly 1."""
    x, y, n = probes.attacked, probes.labels, len(probes.labels)
    parts = [slice(start, start + batch_size) for start in range(0, n, batch_size)]
    correct = torch.zeros(2 * len(args.epsilons) + 1, dtype=torch.int64, device=x.device)
    model.eval()
    for part in parts:
        for i, epsilon in enumerate(args.epsilons):
            x_adv = attacks.pgd(model, x[part], y[part], epsilon, args.pgd_steps, args.pgd_step_size, args.pgd_restarts,
                                objective="ce", starts=probes.starts[:, part])
            with torch.inference_mode():
                correct[i] += (model(x_adv).argmax(1) == y[part]).sum()
        with torch.inference_mode():
            correct[-1] += (model(x[part]).softmax(1).amax(1) == 1).sum()
    model.train()
    robust = attacks.robust_accuracy(model, x, y, args.epsilons, args.pgd_steps, args.robust_budget, batch_size)
    correct[len(args.epsilons):-1] = (torch.tensor(robust) * n).round()

    shares = (parallel.total(correct).double() / args.adv_size).tolist()
    keys = [*map(flags.history_key, args.epsilons)]
    return {"adv_acc": dict(zip(keys, shares, strict=False)),
            "robust_acc": dict(zip(keys, shares[len(keys):], strict=False)), "saturated": shares[-1]}


def mean_local_complexity(model, probes, args):
    """Return {set of points: {radius: [mean count of each layer]}}."""
    means = {}
    for name, points in probes.points.items():
        counts = local_complexity.local_complexity(model, points[parallel.share(len(points))], args.lc_radius,
                                                   probes.directions, args.eval_batch_size)
        mean = (parallel.total(counts.sum(1)).double() / len(points)).tolist()
        means[name] = {flags.history_key(radius): layers for radius, layers in zip(args.lc_radius, mean, strict=True)}
    return means


def default_eval_batch_size(model, in_shape):
    """Return how many inputs of this shape the network can take at once within about 1 GB of activations."""
    elements = []
    hooks = [module.register_forward_hook(lambda _module, _inputs, output: elements.append(output.numel()))
             for module in model.modules()]
    parameter = next(model.parameters())
    model.eval()
    with torch.inference_mode():
        model(torch.zeros(1, *in_shape, dtype=parameter.dtype, device=parameter.device))
    model.train()
    for hook in hooks:
        hook.remove()
    # Twice: a backward pass holds the activations and their gradients.
    most = 2**30 // (2 * sum(elements) * parameter.element_size())
    return max(1, min(most, 1000 if parameter.device.type == "cpu" else 10_000))


def explain_gap(row):
    """Return the line that says why adv_acc is above robust_acc, or None if it is so by 5 points or less."""
    gap, epsilon = max((adv - row["robust_acc"][eps], eps) for eps, adv in row["adv_acc"].items())
    if gap <= 0.05:
        return None
    gap = f"adv_acc exceeds robust_acc by {100 * gap:.0f} points at epsilon {epsilon}"
    if row["saturated"] < 0.05:
        return f"{gap}: the attack behind robust_acc tries harder (several classes, not only the last iterate)"
    return (f"{gap}: on {100 * row['saturated']:.0f}% of the images the softmax rounds to exactly 1, there the "
            "gradient of cross-entropy has vanished and PGD on it overstates robustness; trust robust_acc")


# ---- the run --------------------------------------------------------------------------------------------------------

class RunFailed(Exception):
    """The run cannot go on; the message is the one line to print."""


def train(run):
    """Train to args.n_steps with a log step at each step of the schedule; return the number of the signal that stopped
    the run, or 0 if it is complete."""
    args = run.args
    schedule = schedule_for(args)
    run.console.start(run.step, args.n_steps)
    stopped_by = 0
    while not stopped_by:
        if run.step in schedule and run.step not in run.history["step"]:
            with contextlib.suppress(machine.Interrupted):
                log_step(run)
        stopped_by = parallel.largest(run.stop.signal, run.device)
        if stopped_by or run.step == args.n_steps:
            break
        train_until(run, min(step for step in schedule if step > run.step))
        # The processes' clocks differ, and all of them have to take part in saving.
        if parallel.largest(time.perf_counter() - run.saved_at > 60 * args.checkpoint_minutes, run.device):
            save_rolling(run)
    if stopped_by:
        save_rolling(run)
    run.console.end()
    return stopped_by


def train_until(run, log_step):
    """Make the steps up to the next log step, or about half a second of them."""
    length = min(parallel.largest(run.steps_at_once, run.device), log_step - run.step)
    began = time.perf_counter()
    run.advance(run.step, length)
    run.step += length
    if run.device.type == "cpu":
        check_finite(run)
    else:  # looking at the loss would wait for the device; that is left to the log steps
        stay_close(run)
    pace = 0.5 / max(time.perf_counter() - began, 1e-6)
    # The root: the time taken on a GPU is that of the steps before these, and without it the lengths would swing.
    run.steps_at_once = max(1, int(length * min(pace**0.5, 2.0)))
    run.console.progress(run.step)


def stay_close(run):
    """Let the host run ahead of the GPU by these steps at most: the GPU never idles, and a signal is soon obeyed."""
    enqueued = torch.cuda.Event()
    enqueued.record()
    if run.last_enqueued is not None:
        run.last_enqueued.synchronize()
    run.last_enqueued = enqueued


def log_step(run):
    """Measure, and write the history, a checkpoint and the row of the table."""
    args, history = run.args, run.history
    check_finite(run)
    torch.set_num_threads(args.eval_threads)
    with run.stop.while_measuring():
        row = measure(run.model, run.dataset, run.probes, args)
    torch.set_num_threads(args.threads)
    row = {"epoch": run.epoch, "step": run.step, **row, "seconds": run.seconds}
    warning = explain_gap(row)
    # Each of the two reasons is given once.
    if warning and (row["saturated"] < 0.05) in [w["saturated"] < 0.05 for w in history["warnings"]]:
        warning = None
    if warning:
        history["warnings"].append({"step": run.step, "saturated": row["saturated"], "text": warning})
    runlog.append(history, row)
    parallel.on_first(lambda: write_log_step(run, row, warning))
    run.saved_at = time.perf_counter()


def write_log_step(run, row, warning):
    runlog.write_history(run.history_path, run.history)
    runlog.save_checkpoint(run.args.save_dir, run.state(**row), run.args.keep_checkpoints)
    run.console.row(row, warning)
    # At most a hundredth of the run's time goes into redrawing the figure.
    if run.args.plot and time.perf_counter() - run.drawn_at > max(30, 100 * run.drawing_took):
        draw(run)


def save_rolling(run):
    check_finite(run)
    parallel.on_first(lambda: runlog.save_rolling(run.args.save_dir, run.state()))
    run.saved_at = time.perf_counter()


def check_finite(run):
    """Raise RunFailed if a step's loss was not finite, unless --on_nan=continue."""
    bad = parallel.largest(run.step - run.advance.finite_steps.item(), run.device)
    if bad and run.args.on_nan == "stop":
        step = run.step - bad + 1
        # The loss of step n is that of the weights after n - 1 steps: they are already bad.
        _, path = runlog.newest_checkpoint(run.args.save_dir, run.console.note, before=step - 1)
        good = f"the last good checkpoint is {path}" if path else "there is no good checkpoint"
        raise RunFailed(f"the loss of step {step} is not finite (learning rate {run.args.lr:g}); {good}; lower --lr, "
                        "or go on with --resume --on_nan=continue")


def draw(run):
    began = time.perf_counter()
    plot.draw([run.history], run.history_path.with_suffix(""))
    run.drawn_at = time.perf_counter()
    run.drawing_took = run.drawn_at - began


class Run:
    """What a run is made of and how far it has come."""

    def __init__(self, args):
        """Build the run that args describe. ValueError or OSError, with a line for the user, if that cannot be; the
        files of an earlier run are moved aside, or continued from, only when all else is in order."""
        self.args = args
        self.device = parallel.start(machine.choose_device(args.device))
        args.device = str(self.device)
        machine.set_precision(args.deterministic)
        self.dataset = load_data(args, self.device)
        self.model = build_model(args, self.dataset, self.device)
        self.optimizer = build_optimizer(args, self.model, self.device)
        self.history_path = Path(args.log_dir) / runlog.HISTORY_NAME
        self.step, seconds = 0, 0.0
        in_shape = tuple(self.dataset.x_train.shape[1:])
        layers = local_complexity.layer_units(self.model, in_shape)
        self.history = {
            "version": runlog.HISTORY_VERSION, "step": [], "config": vars(args),
            "environment": {**machine.describe(self.device), "processes": parallel.size()},
            "sizes": {"train": args.train_size, "test": len(self.dataset.x_test), "attacked": args.adv_size,
                      "parameters": sum(p.numel() for p in self.model.parameters()),
                      "num_classes": self.dataset.num_classes, "in_shape": list(in_shape)},
            "layers": {"names": list(layers), "units": list(layers.values())}, "warnings": []}
        self.console = Console(self.history, quiet=parallel.rank() > 0)

        checkpoint = parallel.on_first(self.claim_folders)
        if checkpoint:
            self.restore(checkpoint)
            seconds = checkpoint["seconds"]
        choose_threads(args, self.model, self.dataset)
        self.probes = draw_probes(args, self.dataset)
        self.advance = training_steps(self.model, self.optimizer, self.dataset, args, self.console.note)
        self.advance.finite_steps.fill_(self.step)
        parallel.on_first(lambda: self.begin_files(continued=bool(checkpoint)))
        torch.set_num_threads(args.threads)
        self.began = time.perf_counter() - seconds
        self.saved_at = self.drawn_at = time.perf_counter()
        self.drawing_took, self.steps_at_once, self.last_enqueued = 0.0, 1, None
        # The processes of a distributed run have to drop a measurement together or not at all.
        self.stop = machine.Stop(can_interrupt=parallel.size() == 1)

    @property
    def epoch(self):
        return self.step / (self.args.train_size // self.args.batch_size)

    @property
    def seconds(self):
        return time.perf_counter() - self.began

    def state(self, **metrics):
        """Return what a checkpoint holds."""
        return {"epoch": self.epoch, "step": self.step, "seconds": self.seconds, **metrics,
                "logged": len(self.history["step"]), "config": vars(self.args), "sizes": self.history["sizes"],
                "model_state_dict": self.model.state_dict(), "optimizer_state_dict": self.optimizer.state_dict()}

    def claim_folders(self):
        """Lock the folders; return the checkpoint to continue from, with its history as "history", or None to start."""
        args = self.args
        self.lock = runlog.lock_folders(args.log_dir, args.save_dir)
        if not args.resume:
            return None
        checkpoint, path = runlog.newest_checkpoint(args.save_dir, self.console.note)
        if checkpoint is None:
            self.console.note(f"nothing to resume in {args.save_dir}: starting")
            return None
        history = runlog.read_history(self.history_path)
        for what, config in ((path, checkpoint["config"]), (self.history_path, history["config"])):
            differences = runlog.differences(config, vars(args))
            if differences:
                raise ValueError(f"{what} belongs to another experiment: {'; '.join(differences)}; give this one its "
                                 "own --log_dir and --save_dir")
        if args.n_steps < checkpoint["step"]:
            raise ValueError(f"{path} is at step {checkpoint['step']}, past --n_steps={args.n_steps}")
        if len(history["step"]) < checkpoint["logged"]:
            raise ValueError(f"{self.history_path} is older than {path}: its log points are missing")
        runlog.forget_after(history, checkpoint["logged"])
        self.console.note(f"continuing from {path} at step {checkpoint['step']}")
        return {**checkpoint, "history": history, "path": path}

    def begin_files(self, continued):
        if not continued:
            for folder in runlog.move_aside(self.args.log_dir, self.args.save_dir):
                self.console.note(f"an earlier run's files are now in {folder}")
        runlog.write_history(self.history_path, self.history)

    def restore(self, checkpoint):
        args, before = self.args, checkpoint["config"]
        self.step = checkpoint["step"]
        try:
            self.model.load_state_dict(checkpoint["model_state_dict"])
            # The groups' settings are this run's: a GPU's optimizer needs others than a CPU's.
            self.optimizer.load_state_dict({**self.optimizer.state_dict(),
                                            "state": checkpoint["optimizer_state_dict"]["state"]})
        except (RuntimeError, KeyError, AttributeError):
            raise ValueError(f"{checkpoint['path']}: its state does not fit the network that its config "
                             "describes") from None
        history = checkpoint["history"]
        self.history.update({key: history[key] for key in history if key not in ("config", "environment")})
        # The same number of threads rounds the same way.
        if before["device"] == args.device and history["environment"]["processes"] == parallel.size():
            args.threads = args.threads or before["threads"]
            args.eval_threads = before["eval_threads"]


def main(argv=None):
    args = parse_args(argv)
    try:
        run = Run(args)
    except (ValueError, OSError) as error:
        return fail_together(error, 2)
    except (MemoryError, RuntimeError) as error:
        if not machine.out_of_memory(error):
            raise
        return fail("not enough memory: lower --width, --train_size, --adv_size or --lc_samples", 2)
    except KeyboardInterrupt:
        return fail("interrupted before the first step", 128 + signal.SIGINT)
    try:
        run.console.header()
        stopped_by = train(run)
        parallel.on_first(lambda: finish(run, stopped_by))
    except RunFailed as error:
        return fail_together(error, 1)
    except OSError as error:
        return fail_together(
            f"{error}; the files written before are whole: run again with --resume once this is mended", 1)
    except (MemoryError, RuntimeError) as error:
        if machine.out_of_memory(error):
            return fail("the memory is full: lower --eval_batch_size or --batch_size and run again with --resume", 1)
        if not parallel.lost_another(error):
            raise
        return fail("another process of this run has ended, so this one ends too: run again with --resume", 1)
    parallel.wait()  # none leaves while another is still listening to it
    return 128 + stopped_by if stopped_by else 0


def finish(run, stopped_by):
    if run.args.plot:
        draw(run)
    if stopped_by:
        run.console.note(f"stopped by {signal.Signals(stopped_by).name} at step {run.step}; continue with the same "
                         "command and --resume")
    else:
        print("\n" + plot.summary(run.history))


def fail(error, status):
    """Print error in one line; return status."""
    message = " ".join(str(error).split())
    print(f"train.py: error: {message}", file=sys.stderr)
    return status


def fail_together(error, status):
    """fail() for an error that every process of the run has met: the first prints it."""
    if parallel.rank() == 0:
        fail(error, status)
    parallel.wait()  # torchrun ends all processes when one has ended: not before the line is out
    return status


if __name__ == "__main__":
    parallel.leave(main())
