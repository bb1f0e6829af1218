"""How close robust_acc is to AutoAttack, and what it costs: one table for each checkpoint that train.py wrote.

    python bench_attacks.py checkpoints/checkpoint_epoch_*_step_000100000.pt --images=500

AutoAttack (Croce and Hein 2020, arXiv:2003.01690) comes from torchattacks, where that is installed
(`pip install --no-deps torchattacks requests tqdm`); it takes minutes. Accuracies are in percent. The attack behind
robust_acc runs once over the whole grid, the others once for each epsilon; seconds are for all epsilons together.
"""

import argparse
import time

import torch

import attacks
import data
import machine
import partition
import runlog


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoints", nargs="+", metavar="CHECKPOINT")
    parser.add_argument("--images", type=int, default=500, help="attack so many of the test images (default 500)")
    parser.add_argument("--epsilons", type=float, nargs="+", help="default: those of the run")
    parser.add_argument("--autoattack_steps", type=int, nargs="*", default=[10], metavar="N",
                        help="steps of AutoAttack's gradient attacks: 10 is torchattacks' default, 100 the paper's; "
                             "several give several columns, none leaves AutoAttack out (default 10)")
    parser.add_argument("--data_dir", help="default: that of the run")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1, help="default 1")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    machine.set_precision()  # as in training

    autoattack_steps = args.autoattack_steps
    try:
        import torchattacks  # noqa: F401
    except ImportError:
        print("torchattacks is not installed: no AutoAttack column")
        autoattack_steps = []
    for path in args.checkpoints:
        model, x, y, config, step = load(path, args)
        epsilons = args.epsilons or config["epsilons"]
        print(f"\n{path}: {config['model']} on {config['dataset']}, step {step}, {len(x)} test images, "
              f"{torch.device(args.device).type}, {args.threads} thread{'s'[:args.threads != 1]}\n", flush=True)
        print_table(epsilons, measure(model, x, y, epsilons, autoattack_steps))


def load(path, args):
    """Return the network of a checkpoint and the images to attack."""
    checkpoint = runlog.load_checkpoint(path)
    config = checkpoint["config"]
    dataset = data.load_dataset(config["dataset"], args.data_dir or config["data_dir"], config["train_size"],
                                config["seed"], config["image_size"], config["label_noise"])
    model = partition.load_network(checkpoint, dataset).to(args.device)
    x = dataset.x_test[:args.images].to(args.device, getattr(torch, config["dtype"])) / 255
    y = dataset.y_test[:args.images].to(args.device)
    return model, x, y, config, checkpoint["step"]


def measure(model, x, y, epsilons, autoattack_steps):
    """Return {column: (one accuracy for each epsilon, seconds)}."""
    columns = {}

    def add(name, function):
        start = clock(x.device)
        accuracies = function()
        columns[name] = accuracies, clock(x.device) - start

    add("clean", lambda: [accuracy(model, x, y)] * len(epsilons))
    for objective in ("ce", "exact"):
        add(f"PGD-10 {objective}", lambda objective=objective: [
            accuracy(model, attacks.pgd(model, x, y, epsilon, objective=objective), y) for epsilon in epsilons])
    for budget in attacks.BUDGETS:
        add(budget, lambda budget=budget: attacks.robust_accuracy(model, x, y, epsilons, budget=budget))
    for steps in autoattack_steps:
        add(f"AutoAttack-{steps}", lambda steps=steps: [
            accuracy(model, autoattack(model, x, y, epsilon, steps), y) for epsilon in epsilons])
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
    return (model(x).argmax(1) == y).double().mean().item()


def clock(device):
    """Seconds: of this process on a CPU, so that a busy machine counts for little; of the wall clock on a GPU."""
    if device.type == "cpu":
        return time.process_time()
    torch.cuda.synchronize(device)
    return time.perf_counter()


def print_table(epsilons, columns):
    print("| epsilon |" + "".join(f" {name} |" for name in columns))
    print("|---|" + "---|" * len(columns))
    for i, epsilon in enumerate(epsilons):
        print(f"| {epsilon:.6g} |" + "".join(f" {100 * column[i]:.1f} |" for column, _ in columns.values()))
    print("| seconds |" + "".join(f" {seconds:.2f} |" for _, seconds in columns.values()), flush=True)


if __name__ == "__main__":
    main()
