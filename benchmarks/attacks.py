"""How close robust_acc is to AutoAttack, and what it costs: one table for each checkpoint that train.py wrote.

    python bench_attacks.py checkpoints/checkpoint_epoch_*_step_000100000.pt --images=500

AutoAttack (Croce and Hein 2020, arXiv:2003.01690) comes from torchattacks, where that is installed
(`pip install --no-deps torchattacks requests tqdm`); it takes minutes. Accuracies are in percent. The attack behind
robust_acc runs once over the whole grid, the others once for each epsilon; seconds are for all epsilons together: of
this process on a CPU, so that a busy machine counts for little, and of the wall clock on a GPU.
"""

import argparse
import time
from functools import partial

import torch

import attacks
import data
import flags
import models
from benchmarks.speed import print_markdown, synchronize
from runtime import checkpoints
from runtime import device as devices


def main(argv=None):
    parser = flags.OneLineParser(prog="bench_attacks.py", description=__doc__,
                                 formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoints", nargs="+", metavar="CHECKPOINT")
    parser.add_argument("--images", type=flags.number(int, low=1), default=500,
                        help="attack so many of the test images (default 500)")
    parser.add_argument("--epsilons", type=flags.parse_epsilon, nargs="+", metavar="EPS",
                        help="radii in pixel units, such as 0.1 or 8/255 (default: those of the run)")
    parser.add_argument("--autoattack_steps", type=flags.number(int, low=1), nargs="*", default=[10], metavar="N",
                        help="steps of AutoAttack's gradient attacks: 10 is torchattacks' default, 100 the paper's; "
                             "several give several columns, none leaves AutoAttack out (default 10)")
    parser.add_argument("--data_dir", help="default: that of the run")
    parser.add_argument("--device", default="cpu", help="auto, cpu, cuda or cuda:N (default cpu)")
    parser.add_argument("--threads", type=flags.number(int, low=1), default=1, help="default 1")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    devices.set_precision()  # as in training
    try:
        import torchattacks  # noqa: F401
    except ImportError:
        print("torchattacks is not installed: no AutoAttack column")
        args.autoattack_steps = []
    for path in args.checkpoints:
        try:
            checkpoint = checkpoints.load_checkpoint(path)
            model, x, y = load(checkpoint, args)
        except (ValueError, OSError) as error:
            parser.error(str(error) if path in str(error) else f"{path}: {error}")
        config = checkpoint["config"]
        epsilons = args.epsilons or config["epsilons"]
        print(f"\n{path}: {config['model']} on {config['dataset']}, step {checkpoint['step']}, {len(x)} test images, "
              f"{x.device.type}, {args.threads} thread{'s'[:args.threads != 1]}\n", flush=True)
        columns = measure(model, x, y, epsilons, args.autoattack_steps)
        labels = [flags.epsilon_label(flags.history_key(epsilon)) for epsilon in epsilons]
        print_markdown(["epsilon", *columns], zip([*labels, "seconds"], *columns.values(), strict=True))


def load(checkpoint, args):
    """Return the network of a checkpoint and the images to attack."""
    device, config = devices.choose_device(args.device), checkpoint["config"]
    options = ("train_size", "seed", "image_size", "label_noise")
    dataset = data.load_dataset(config["dataset"], args.data_dir or config["data_dir"],
                                **{name: config[name] for name in options if name in config})
    model = models.load_network(checkpoint).to(device)
    x = data.pixels(dataset.x_test[:args.images].to(device), next(model.parameters()).dtype)
    return model, x, dataset.y_test[:args.images].to(device)


def measure(model, x, y, epsilons, autoattack_steps):
    """Return {column: cells}: an accuracy for each epsilon, then the seconds."""
    columns = {}

    def add(name, accuracies):
        seconds = clock(x.device)
        cells = [f"{100 * value:.1f}" for value in accuracies()]
        columns[name] = [*cells, f"{clock(x.device) - seconds:.2f}"]

    def add_each(name, attack):
        add(name, lambda: [accuracy(model, attack(epsilon), y) for epsilon in epsilons])

    add("clean", lambda: [accuracy(model, x, y)] * len(epsilons))
    for objective in ("ce", "exact"):
        add_each(f"PGD-10 {objective}", partial(attacks.pgd, model, x, y, objective=objective))
    for budget in attacks.BUDGETS:
        add(budget, partial(attacks.robust_accuracy, model, x, y, epsilons, budget=budget))
    for steps in autoattack_steps:
        add_each(f"AutoAttack-{steps}", partial(autoattack, model, x, y, steps=steps))
    return columns


def autoattack(model, x, y, epsilon, steps):
    """AutoAttack standard: APGD on cross-entropy, APGD and FAB on each of nine wrong classes, Square."""
    import torchattacks

    attack = torchattacks.AutoAttack(model, eps=epsilon, n_classes=model(x[:1]).shape[1], seed=0)
    for part in attack._autoattack.attacks[:3]:
        part.steps = steps
    return attack(x, y).detach()


@torch.no_grad()
def accuracy(model, x, y):
    return attacks.correct(model(x), y).double().mean().item()


def clock(device):
    synchronize(device)
    return time.process_time() if device.type == "cpu" else time.perf_counter()


if __name__ == "__main__":
    main()
