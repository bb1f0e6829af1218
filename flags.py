"""Every flag of train.py: its type, its default, its help, and what kind of flag it is.

Resuming, grouping, titles and folder names all follow from the kind. This file imports no PyTorch, so that --help, a
typing error and a folder's name take no time.
"""

import argparse
import dataclasses
import difflib
import hashlib
import math
import re
import textwrap
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

# EXPERIMENT: what is trained. LENGTH: for how long; a resumed run may be longer. MEASUREMENT: what a log step records.
# EXECUTION: where and how it is computed; it may differ when a run is resumed, and runs are not compared by it.
EXPERIMENT, LENGTH, MEASUREMENT, EXECUTION = "experiment", "length", "measurement", "execution"
SCHEDULE = frozenset({"log_points", "log_from", "log_interval"})  # of MEASUREMENT: when a run measures, not what
LONGEST_NAME = 150  # characters of a run's folder; file systems take 255
LIKE_MNIST, COLOUR_SETS = ("mnist", "fashion_mnist", "kmnist"), ("cifar10", "cifar100", "imagenette")
MODULAR_SETS = ("modular_addition", "modular_subtraction", "modular_multiplication")
GREY_SETS = (*LIKE_MNIST, "digits", *MODULAR_SETS)
GREY_EPSILONS, COLOUR_EPSILONS = [0.03, 0.06, 0.10, 0.13, 0.16, 0.20], [1 / 255, 2 / 255, 4 / 255, 8 / 255]
GREY_RADIUS, COLOUR_RADIUS = [0.05], [0.005]
# What these flags stand for when they are left out, by model and by data set: folder names leave them out, too.
IMPLIED: dict[str, dict[str, Any]] = {
    "width": {"mlp": 200, "cnn": 32, "resnet18": 16}, "depth": {"mlp": 4},
    "train_size": dict.fromkeys((*LIKE_MNIST, "digits"), 1000) | dict.fromkeys((*COLOUR_SETS, *MODULAR_SETS), "all"),
    "image_size": {"imagenette": 128}, "modulus": dict.fromkeys(MODULAR_SETS, 97),
    "train_fraction": dict.fromkeys(MODULAR_SETS, 0.5),
    "epsilons": dict.fromkeys(GREY_SETS, GREY_EPSILONS) | dict.fromkeys(COLOUR_SETS, COLOUR_EPSILONS),
    "lc_radius": dict.fromkeys(GREY_SETS, GREY_RADIUS) | dict.fromkeys(COLOUR_SETS, COLOUR_RADIUS)}


# ---- presets --------------------------------------------------------------------------------------------------------

# name: (what it shows, how long it takes, its flags)
PRESETS = {
    "first": ("an MLP with large initial weights groks 400 handwritten digits: test accuracy, then robustness, follow "
              "long after training accuracy", "3 minutes on one CPU core",
              "--dataset=digits --train_size=400 --depth=3 --init_scale=6 --loss=mse --lr=0.004 --weight_decay=0.1 "
              "--n_steps=20000 --epsilons 0.03 0.07 0.11 0.15 --adv_size=500 --lc_samples=256"),
    "modular": ("modular addition, the classic: test accuracy goes from 0% to 100% after training accuracy has reached "
                "100%", "1 minute on one CPU core",
                "--dataset=modular_addition --modulus=59 --depth=3 --lr=0.005 --weight_decay=1 --batch_size=512 "
                "--n_steps=3000 --log_points=30 --epsilons 0.1 0.3 --adv_size=200 --lc_samples=128"),
    "rounding": ("accuracy under the usual attack rises late, mostly because float32 rounds; beside it, "
                 "--loss=exact_ce is the same without the rounding", "6 minutes on one CPU core",
                 "--dataset=digits --n_steps=100000"),
    "mnist": ("the paper's MLP on 1,000 MNIST images, 500,000 steps", "41 minutes on one CPU core",
              "--model=mlp --dataset=mnist --train_size=1000 --batch_size=200 --lr=0.001 --weight_decay=0.01 "
              "--n_epochs=100000"),
    "cnn": ("a CNN on a tenth of CIFAR-10, small enough to go far past interpolation on a CPU", "75 minutes on one CPU "
            "core", "--model=cnn --dataset=cifar10 --train_size=5000 --width=16 --batch_size=32 --n_steps=100000 "
            "--weight_decay=0 --log_points=40 --adv_size=500 --lc_samples=128 --epsilons 0.5/255 1/255 2/255 4/255"),
    "resnet18": ("the paper's Figure 1: ResNet-18 without batch norm on CIFAR-10, attacked as its authors attack "
                 "it", "about 3 hours on one CPU core",
                 "--model=resnet18 --dataset=cifar10 --width=16 --batch_size=64 --n_steps=100000 --weight_decay=0 "
                 "--log_from=100 --log_points=17 --adv_size=500 --lc_samples=128 --pgd_start=image "
                 "--pgd_step_size=0.8/255 --epsilons 0.5/255 1/255 2/255 4/255 8/255 10/255"),
}


def presets_text() -> str:
    """Return the presets for a terminal: what each shows, how long it takes, and its flags."""
    lines = []
    for name, (shows, takes, words) in PRESETS.items():
        lines += [f"{name:<10}{line}" if i == 0 else f"{'':<10}{line}" for i, line in enumerate(
            textwrap.wrap(f"{shows}; {takes}", 90) + textwrap.wrap(words, 90, break_on_hyphens=False))]
    return "\n".join(lines)


# ---- values ---------------------------------------------------------------------------------------------------------

class OneLineParser(argparse.ArgumentParser):
    """A parser whose errors are one line, without the usage."""

    def error(self, message: str):
        unknown = re.search(r"unrecognized arguments: --([\w-]+)", message)
        name = "--" + unknown[1].replace("-", "_") if unknown else ""
        close = difflib.get_close_matches(name, re.findall(r"--\w+", self.format_help()), 1)
        message += f": did you mean {close[0]}?" if close else ""
        self.exit(2, f"{self.prog}: error: {message}\n")


def number(kind: type, low: float = -math.inf, above: float = -math.inf, high: float = math.inf) -> Callable:
    """Return an argparse type: a finite int or float with low <= value <= high and above < value."""
    if kind is int:
        high = min(high, 2**63 - 1)  # PyTorch counts in int64

    def parse(text: str):
        try:
            value = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"'{text}' is not a {'whole ' if kind is int else ''}number") from None
        for wrong, why in ((kind is float and not math.isfinite(value), "is not finite"),
                           (value < low, f"is less than {low}"), (value <= above, f"is not above {above}"),
                           (value > high, f"is more than {high}")):
            if wrong:
                raise argparse.ArgumentTypeError(f"{text} {why}")
        return value
    return parse


def parse_epsilon(text: str) -> float:
    """Return the float in [0, 1] that "0.1" or "8/255" stands for; otherwise raise argparse.ArgumentTypeError."""
    numerator, slash, denominator = text.partition("/")
    try:
        value = float(numerator) / (float(denominator) if slash else 1.0)
    except (ValueError, ZeroDivisionError):
        raise argparse.ArgumentTypeError(f"'{text}' is not a number such as 0.1 or 8/255") from None
    if not 0 <= value <= 1:
        levels = f": did you mean {text}/255?" if 1 < value <= 255 and not slash else ""
        raise argparse.ArgumentTypeError(f"{text} is not in [0, 1], the range of a pixel{levels}")
    return value


def parse_epsilons(text: str) -> list[float]:
    """Return the epsilons that a word lists; refuse 0,1, which is more likely a decimal comma than 0 and 1."""
    if re.fullmatch(r"0,\d+", text):
        raise argparse.ArgumentTypeError(f"'{text}' lists two values: write {text.replace(',', '.')} or "
                                         f"{text.replace(',', ' ')}")
    return listed(parse_epsilon)(text)


def parse_step_size(text: str) -> float:
    """Return the float in (0, 1] that "0.01" or "0.8/255" stands for; otherwise raise argparse.ArgumentTypeError."""
    value = parse_epsilon(text)
    if value == 0:
        raise argparse.ArgumentTypeError("a step size of 0 does not move the image")
    return value


def listed(parse: Callable) -> Callable:
    """Return an argparse type for one word that holds several values separated by commas."""
    return lambda text: [parse(part) for part in text.split(",")]


def count_or(*words: str) -> Callable:
    """Return an argparse type: one of the words, or a whole number above 0."""
    return lambda text: text if text in words else number(int, low=1)(text)


def parse_folder(text: str) -> str:
    """Return a path with ~ expanded; an empty one (an unset shell variable) raises argparse.ArgumentTypeError."""
    if not text:
        raise argparse.ArgumentTypeError("the path is empty")
    return str(Path(text).expanduser())


def history_key(value: float) -> str:
    """Return the name of an epsilon or a radius in the history: six digits."""
    return f"{value:.6g}"


def epsilon_label(key: str) -> str:
    """Return how an epsilon of the history is shown: "0.03" as it is, "0.0313725" as "8/255", tenths as "0.8/255"."""
    levels = float(key) * 255
    is_long = len(key) > len("0.005")
    return f"{round(levels, 1):g}/255" if is_long and abs(levels - round(levels, 1)) < 1e-3 else key


# ---- the flags ------------------------------------------------------------------------------------------------------

def flag(default: Any, kind: str, help: str, **options: Any) -> Any:
    """Return a field of Config.

    options: argparse's (type, choices, metavar, nargs, const), option="--no_plot", or only=(text, predicate of a
    Config): without it the flag has no effect, and is refused.
    """
    return dataclasses.field(default=default, metadata={"kind": kind, "help": help, **options})


def whole(low: int, metavar: str = "N", **limits: float) -> dict[str, Any]:
    return {"type": number(int, low=low, **limits), "metavar": metavar}


def real(metavar: str = "X", **limits: float) -> dict[str, Any]:
    return {"type": number(float, **limits), "metavar": metavar}


FOLDER = {"type": parse_folder, "metavar": "DIR"}
MLP = "with --model=mlp", lambda config: config.model == "mlp"
MODULAR = "with --dataset=modular_*", lambda config: config.dataset in MODULAR_SETS
SIZED = "with --dataset=imagenette or imagefolder", lambda config: config.dataset in ("imagenette", "imagefolder")
SGD = "with --optimizer=sgd", lambda config: config.optimizer == "sgd"
ADAM = "with --optimizer=adamw or adam", lambda config: config.optimizer != "sgd"
LOG_POINTS = "without --log_interval", lambda config: config.log_interval is None
COMPLEXITY = "without --lc_samples=0", lambda config: config.lc_samples > 0
GROUPS = {"model": "the network", "dataset": "the data", "optimizer": "training", "log_points": "the log steps",
          "log_dir": "files and interruptions", "device": "the machine"}


@dataclasses.dataclass(frozen=True)
class Config:
    """The flags of a run. The types are those of a complete config (train.complete); None means: not decided yet."""

    preset: str | None = flag(
        None, EXECUTION, "a named line of flags, listed below; flags given beside it override it; its files go to "
        "runs/NAME/; --preset=list only prints the list", choices=[*PRESETS, "list"])

    model: str = flag("mlp", EXPERIMENT, "the network", choices=["mlp", "cnn", "resnet18"])
    depth: int | None = flag(None, EXPERIMENT, "linear layers of the MLP (default 4)", **whole(2), only=MLP)
    width: int = flag(None, EXPERIMENT, "hidden units, or channels of the first stage (default: mlp 200, cnn 32, "
                      "resnet18 16)", **whole(1))
    activation: str = flag("relu", EXPERIMENT, "activation function; with relu and leaky_relu the network is piecewise "
                           "linear", choices=["relu", "gelu", "leaky_relu", "tanh"])
    batch_norm: bool = flag(False, EXPERIMENT, "batch norm before each activation; in the paper it prevents grokking")
    init_scale: float = flag(1.0, EXPERIMENT, "factor on the initial weights; 8 with --loss=mse delays generalisation",
                             **real(above=0))

    dataset: str = flag(
        "mnist", EXPERIMENT, "digits and modular_* need no download; imagefolder reads DATA_DIR/train and "
        "DATA_DIR/test (or val), npz the arrays in the file DATA_DIR",
        choices=[*LIKE_MNIST, *COLOUR_SETS, "digits", *MODULAR_SETS, "imagefolder", "npz"])
    modulus: int | None = flag(None, EXPERIMENT, "the p of modular arithmetic, such as (a + b) mod p (default 97)",
                               **whole(2, "P"), only=MODULAR)
    train_fraction: float | None = flag(None, EXPERIMENT, "fraction of modular arithmetic's p * p pairs to train on "
                                        "(default 0.5)", **real(above=0, high=1), only=MODULAR)
    data_dir: str = flag("data", EXECUTION, "where the data sets are kept", **FOLDER)
    train_size: int = flag(None, EXPERIMENT, "number of training images, drawn at random (default: 1000 for digits and "
                           "the sets like MNIST, otherwise all)", type=count_or("all"), metavar="N|all")
    label_noise: float = flag(0.0, EXPERIMENT, "fraction of the training labels to replace by random ones; 1 is the "
                              "random-label experiment", **real("FRACTION", low=0, high=1))
    image_size: int | None = flag(None, EXPERIMENT, "side of the images in pixels (default: imagenette 128, "
                                  "imagefolder as they are, or 128 if they differ)", **whole(1, "PX"), only=SIZED)

    optimizer: str = flag("adamw", EXPERIMENT, "adam adds the weight decay to the gradient, and does not grok",
                          choices=["adamw", "adam", "sgd"])
    loss: str = flag("ce", EXPERIMENT, "ce: cross-entropy as PyTorch computes it; exact_ce: the same function without "
                     "its rounding; mse: squared error on one-hot targets; stablemax: cross-entropy of a softmax that "
                     "does not saturate", choices=["ce", "exact_ce", "mse", "stablemax"])
    label_smoothing: float = flag(0.0, EXPERIMENT, "share of the target that is spread over all classes, for ce and "
                                  "exact_ce", **real(low=0, high=0.999))
    lr: float = flag(0.001, EXPERIMENT, "learning rate; with a schedule, the highest", **real(above=0))
    lr_schedule: str = flag("constant", EXPERIMENT, "the learning rate after the warm-up: constant, or falling to 0 at "
                            "the last step, linearly (triangle) or along half a cosine",
                            choices=["constant", "triangle", "cosine"])
    warmup_steps: int = flag(0, EXPERIMENT, "steps over which the learning rate rises linearly from 0 to --lr",
                             **whole(0))
    momentum: float = flag(0.0, EXPERIMENT, "momentum of sgd; adamw and adam have their own",
                           **real(low=0, high=0.9999), only=SGD)
    weight_decay: float = flag(0.01, EXPERIMENT, "weight decay; it drives the late phase of an MLP; the paper uses 0 "
                               "for CNN and ResNet", **real(low=0))
    adam_eps: float = flag(1e-8, EXPERIMENT, "epsilon of Adam and AdamW; slows training once gradients are smaller",
                           **real(low=0), only=ADAM)
    orthogonal_gradient: bool = flag(False, EXPERIMENT, "remove from each tensor's gradient the component along its "
                                     "weights")
    augment: bool = flag(False, EXPERIMENT, "shift each training image at random by up to an eighth of its side, and "
                         "mirror half of those of cifar10, cifar100 and imagenette")
    branch_from: str | None = flag(None, EXPERIMENT, "start from this checkpoint of another run: its weights, "
                                   "optimizer state and step, with the flags given here", type=parse_folder,
                                   metavar="CHECKPOINT")
    batch_size: int = flag(200, EXPERIMENT, "images per step, over all processes", **whole(1))
    n_epochs: int = flag(100_000, LENGTH, "length of the run in passes over the training images", **whole(1))
    n_steps: int = flag(None, LENGTH, "length of the run in steps, instead; grokking takes about 100,000", **whole(1))
    dtype: str = flag("float32", EXPERIMENT, "floating-point numbers of training and measuring; float64 shows which "
                      "effects are due to rounding", choices=["float32", "float64"])
    seed: int = flag(42, EXPERIMENT, "seed of everything random: weights, batches, subset, attack starts",
                     **whole(0, high=2**32 - 1))

    log_points: int = flag(60, MEASUREMENT, "number of log steps, evenly spaced in log(step); the first and the last "
                           "step are among them", **whole(3, high=1_000_000), only=LOG_POINTS)
    log_from: int = flag(1, MEASUREMENT, "the first log step after step 0, from which the even spacing begins",
                         **whole(1), only=LOG_POINTS)
    log_interval: int | None = flag(None, MEASUREMENT, "log every N epochs instead", **whole(1))
    epsilons: list[float] = flag(None, MEASUREMENT, "radii of the attacks in pixel units of [0, 1], such as 0.1 or "
                                 "8/255 (default: 0.03 0.06 0.10 0.13 0.16 0.20 for grey images, 1/255 2/255 4/255 "
                                 "8/255 for colour)", type=parse_epsilons, nargs="+", metavar="EPS")
    pgd_steps: int = flag(10, MEASUREMENT, "steps of the attack behind adv_acc; the attack behind robust_acc makes at "
                          "most as many toward one class", **whole(1))
    pgd_step_size: float | None = flag(None, MEASUREMENT, "step size of the attack behind adv_acc in pixel units, such "
                                       "as 0.01 or 0.8/255 (default: 2.5 epsilon / steps)", type=parse_step_size,
                                       metavar="X")
    pgd_start: str = flag("random", MEASUREMENT, "where the attack behind adv_acc starts: at a random point of the "
                          "ball, or at the image, as in the authors' code; from the image it never moves if the "
                          "gradient there is exactly zero", choices=["random", "image"])
    pgd_restarts: int = flag(1, MEASUREMENT, "random starts of the attack behind adv_acc; the worst counts", **whole(1),
                             only=("with --pgd_start=random", lambda config: config.pgd_start == "random"))
    adv_size: int = flag(1000, MEASUREMENT, "number of test images to attack, the same at every log step",
                         type=count_or("all"), metavar="N|all")
    robust_budget: str = flag("default", MEASUREMENT, "effort of the attack behind robust_acc",
                              choices=["low", "default", "high"])
    certify: int = flag(0, MEASUREMENT, "certify this many of the attacked images, to bound robust_acc from below: for "
                        "an mlp with relu or leaky_relu; 0 turns it off", **whole(0))
    lc_samples: int = flag(1024, MEASUREMENT, "local complexity is measured around so many training, test and random "
                           "points each; 0 turns it off", **whole(0))
    lc_directions: int = flag(25, MEASUREMENT, "number of random directions in which it is measured: 2P vertices "
                              "around each point", **whole(1, "P"), only=COMPLEXITY)
    lc_radius: list[float] = flag(None, MEASUREMENT, "distance of the vertices from the point in pixel units, one or "
                                  "several (default: 0.05 for grey images, 0.005 for colour)",
                                  type=listed(number(float, above=0, high=1e6)), nargs="+", metavar="R",
                                  only=COMPLEXITY)

    log_dir: str = flag("logs", EXECUTION, "folder of the history and the figure", **FOLDER)
    save_dir: str = flag("checkpoints", EXECUTION, "folder of the checkpoints", **FOLDER)
    resume: bool = flag(False, EXECUTION, "continue from the newest sound checkpoint in SAVE_DIR, if there is one")
    checkpoint_minutes: float = flag(10.0, EXECUTION, "between log steps, save the state this often", **real(low=0))
    keep_checkpoints: int | str = flag("all", EXECUTION, "how many of the log steps' checkpoints to keep",
                                       type=count_or("all", "last"), metavar="all|last|N")
    on_nan: str = flag("stop", EXECUTION, "what to do when the loss is not finite", choices=["stop", "continue"])
    plot: bool = flag(True, EXECUTION, "draw no figure", option="--no_plot")
    tracker: list[str] | None = flag(None, EXECUTION, "also send each log step to these trackers", nargs="+",
                                     choices=["tensorboard", "wandb"])
    quiet: bool = flag(False, EXECUTION, "print errors only")

    device: str = flag("auto", EXECUTION, "auto is a CUDA GPU if there is one, otherwise the CPU",
                       metavar="auto|cpu|cuda|cuda:N|mps|xpu")
    threads: int | None = flag(None, EXECUTION, "CPU threads (default: as is fastest at the start, OMP_NUM_THREADS at "
                               "most)", **whole(1, high=1024))
    compile: str = flag("off", EXECUTION, "compile the network of the training steps with torch.compile",
                        nargs="?", const="on", choices=["on", "off"])
    cuda_graph: bool = flag(True, EXECUTION, "launch the kernels of a step one by one, not as a CUDA graph: slower, "
                            "for comparison", option="--no_cuda_graph")
    deterministic: bool = flag(False, EXECUTION, "use deterministic GPU kernels only, so that a resumed run repeats "
                               "bit for bit")
    eval_batch_size: int | None = flag(None, EXECUTION, "number of images in the network at once in a log step; bounds "
                                       "its memory (default: by the network's size)", **whole(1))


FIELDS = {field.name: field for field in dataclasses.fields(Config)}


def flags_of(*kinds: str) -> frozenset[str]:
    """Return the names of the flags of these kinds."""
    return frozenset(name for name, field in FIELDS.items() if field.metadata["kind"] in kinds)


def add_flags(parser: argparse.ArgumentParser, names: frozenset[str] = frozenset(FIELDS),
              show_defaults: bool = True) -> None:
    """Add these flags to a parser, under their groups' titles. Its result holds only those that are given."""
    group: Any = parser
    length = None
    for name, field in FIELDS.items():
        if name in GROUPS:
            group = parser.add_argument_group(GROUPS[name])
        if name not in names:
            continue
        options = {key: value for key, value in field.metadata.items() if key not in ("kind", "option", "only")}
        if isinstance(field.default, bool):
            options["action"] = "store_false" if field.default else "store_true"
        elif field.default is not None and show_defaults:
            options["help"] += f" (default {field.default})"
        target = group
        if field.metadata["kind"] == LENGTH:
            target = length = length or group.add_mutually_exclusive_group()
        option = field.metadata.get("option", f"--{name}")
        target.add_argument(option, dest=name, default=argparse.SUPPRESS, **options)


def flattened(parser: argparse.ArgumentParser, values: dict) -> dict:
    """Return values with the lists of --epsilons and --lc_radius made flat; a value given twice is an error."""
    for name in {"epsilons", "lc_radius"} & values.keys():
        if values[name] is not None:
            values[name] = [value for word in values[name] for value in word]
            if len({*map(history_key, values[name])}) < len(values[name]):
                parser.error(f"argument --{name}: two values agree in six digits")
    return values


def parse_args(argv: list[str] | None = None) -> Config:
    """Return the flags of a command line, by default this process's, and of the preset that it names. A flag that is
    wrong, or given without an effect, ends the process with one line; --preset=list prints the presets and ends it."""
    parser = OneLineParser(
        prog="train.py", allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Train a network far past interpolation and record at each log step clean accuracy, accuracy\n"
                    "under l-infinity PGD attack and local complexity.",
        epilog=f"presets:\n{presets_text()}\n\nMore in README.md.")
    add_flags(parser)
    given = flattened(parser, vars(parser.parse_args(argv)))
    if given.get("preset") == "list":
        print(presets_text())
        parser.exit()
    preset = preset_flags(given.get("preset"))
    if given.keys() & flags_of(LENGTH):
        preset = {name: value for name, value in preset.items() if name not in flags_of(LENGTH)}
    config = Config(**preset | given)
    if config.lr_schedule != "constant" and not (preset | given).keys() & flags_of(LENGTH):
        parser.error(f"--lr_schedule={config.lr_schedule} spans the whole run: give its length, --n_steps or "
                     "--n_epochs")
    without_effect: dict[str, Any] = {}
    for name, field in FIELDS.items():
        text, holds = field.metadata.get("only", ("", lambda config: True))
        if not holds(config):
            if given.get(name):
                parser.error(f"--{name} has an effect only {text}")
            without_effect[name] = field.default
    return dataclasses.replace(config, **without_effect)


def preset_flags(name: str | None) -> dict[str, Any]:
    """Return the flags that a preset stands for, with folders of its own; of None, none."""
    if name is None:
        return {}
    parser = OneLineParser()
    add_flags(parser)
    folders = {"log_dir": f"runs/{name}/logs", "save_dir": f"runs/{name}/checkpoints"}
    return folders | flattened(parser, vars(parser.parse_args(PRESETS[name][2].split())))


def asked(config: Config) -> list[str]:
    """Return the names of the flags that have another value than the default."""
    return sorted(name for name, field in FIELDS.items() if getattr(config, name) != field.default)


def implied(name: str, config: Mapping[str, Any]) -> Any:
    """Return what a flag that is left out stands for with this config's model or data set; None if that depends on
    more."""
    values = IMPLIED.get(name, {})
    return values.get(config["model"], values.get(config["dataset"]))


# ---- names of folders -----------------------------------------------------------------------------------------------

def folder_name(config: Config) -> Path:
    """Return the folder under runs/ of the experiment that these flags (as parsed) describe.

    It is named by its preset, by the flags that say what is trained and measured and are not at their default or as in
    the preset, and by the seed. So the flags' order does not change it, nor do, say, --n_steps or --threads.
    """
    config = dataclasses.replace(config, epsilons=config.epsilons and sorted(config.epsilons))
    left_out = {name: implied(name, vars(config)) if value is None else value
                for name, value in vars(Config(**preset_flags(config.preset))).items()}
    words = []
    for name in flags_of(EXPERIMENT, MEASUREMENT) - {"seed"}:
        value = getattr(config, name)
        if value not in (None, left_out[name]):
            words.append(name if value is True else f"{name}_{flag_text(value)}")
    if config.dataset in ("imagefolder", "npz"):  # here the path is the data
        path = Path(config.data_dir).resolve()
        words.append(f"data_dir_{path.name}_{hashlib.sha256(str(path).encode()).hexdigest()[:6]}")
    name = re.sub(r"[^\w.,+-]", "_", "_".join([config.preset or "", *sorted(words)]).strip("_"))
    if len(name.encode()) > LONGEST_NAME:
        name = f"{name[:LONGEST_NAME // 2]}_{hashlib.sha256(name.encode()).hexdigest()[:8]}"
    return Path("runs") / "_".join([*filter(None, [name]), f"seed_{config.seed}"])


def flag_text(value: Any) -> str:
    """Return a flag's value as one writes it on a command line."""
    if isinstance(value, list):
        return ",".join(map(flag_text, value))
    return f"{value:g}" if isinstance(value, float) and float(f"{value:g}") == value else str(value)
