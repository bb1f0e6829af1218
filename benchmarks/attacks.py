"""How close robust_acc comes to AutoAttack, and what it costs: one table for each checkpoint.

    python -m benchmarks.attacks checkpoints/checkpoint_epoch_*_step_000100000.pt --images=500

Run it from the repository's root. AutoAttack (Croce and Hein 2020, arXiv:2003.01690) comes from torchattacks
(pip install --no-deps torchattacks requests tqdm) and takes minutes. Accuracies are in percent. The attack behind
robust_acc and the proof run once for all epsilons, the other attacks once for each. The seconds are for all epsilons
together: process time on a CPU, so that a busy machine counts for little, and wall-clock time on a GPU.
"""

import argparse
import time
from collections.abc import Callable, Sequence
from functools import partial

import torch

import attacks
import certify
import data
import flags
import models
from benchmarks.speed import print_markdown
from compute import device as devices
from records import checkpoints


def main(argv: list[str] | None = None) -> None:
    whole = flags.number(int, low=1)
    parser = flags.OneLineParser(prog="benchmarks.attacks", description=__doc__,
                                 formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoints", nargs="+", metavar="CHECKPOINT")
    parser.add_argument("--images", type=whole, default=500, help="attack the first N test images (default 500)")
    parser.add_argument("--epsilons", type=flags.parse_epsilon, nargs="+", metavar="EPS",
                        help="radii in pixel units, such as 0.1 or 8/255 (default: those of the run)")
    parser.add_argument("--autoattack_steps", type=whole, nargs="*", default=[10], metavar="N",
                        help="steps of AutoAttack's gradient attacks, a column for each; none leaves AutoAttack out "
                             "(default: 10, which is torchattacks' own; the paper has 100)")
    parser.add_argument("--data_dir", help="default: that of the run")
    parser.add_argument("--device", default="cpu", help="auto, cpu, cuda or cuda:N (default cpu)")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)  # process time counts every thread
    devices.set_precision()
    try:
        import torchattacks  # noqa: F401
    except ImportError:
        print("torchattacks is not installed: the table has no AutoAttack column")
        args.autoattack_steps = []
    for path in args.checkpoints:
        try:
            checkpoint = checkpoints.load_checkpoint(path)
            config, device = checkpoint["config"], devices.choose_device(args.device)
            dataset, model = data.from_config(config, args.data_dir), models.load_network(checkpoint, path).to(device)
        except (ValueError, OSError) as error:
            parser.error(str(error) if path in str(error) else f"{path}: {error}")
        x = data.pixels(dataset.x_test[:args.images].to(device), next(model.parameters()).dtype)
        print(f"\n{path}: {config['model']} on {config['dataset']}, step {checkpoint['step']}, {len(x)} test images, "
              f"{device.type}\n", flush=True)
        epsilons = args.epsilons or config["epsilons"]
        columns = measure(model, x, dataset.y_test[:args.images].to(device), epsilons, args.autoattack_steps)
        labels = [flags.epsilon_label(flags.history_key(epsilon)) for epsilon in epsilons]
        print_markdown(["epsilon", *columns], [*zip([*labels, "seconds"], *columns.values(), strict=True)])


def measure(model: torch.nn.Module, x: torch.Tensor, y: torch.Tensor, epsilons: Sequence[float],
            autoattack_steps: Sequence[int]) -> dict[str, list[str]]:
    """Return {column: cells}: an accuracy for each epsilon, then the seconds."""
    def accuracy(images: torch.Tensor) -> float:
        with torch.no_grad():
            return attacks.correct(model(images), y).double().mean().item()

    def each(attack: Callable[[float], torch.Tensor]) -> Callable[[], list[float]]:
        return lambda: [accuracy(attack(epsilon)) for epsilon in epsilons]

    work: dict[str, Callable[[], list[float]]] = {"clean": each(lambda _: x)}
    for objective in ("ce", "exact"):
        work[f"PGD-10 {objective}"] = each(partial(attacks.pgd, model, x, y, objective=objective))
    for budget in attacks.BUDGETS:
        work[budget] = partial(attacks.robust_accuracy, model, x, y, epsilons, budget=budget)
    if isinstance(model, models.MLP):
        work["certified"] = partial(certify.certified_accuracy, model, x, y, epsilons)
    for steps in autoattack_steps:
        work[f"AutoAttack-{steps}"] = each(partial(autoattack, model, x, y, steps=steps))
    columns = {}
    for name, accuracies in work.items():
        start = seconds(x.device)
        cells = [f"{100 * value:.1f}" for value in accuracies()]
        columns[name] = [*cells, f"{seconds(x.device) - start:.2f}"]
    return columns


def autoattack(model: torch.nn.Module, x: torch.Tensor, y: torch.Tensor, epsilon: float, *, steps: int) -> torch.Tensor:
    """AutoAttack standard: APGD on cross-entropy, APGD and FAB on each of nine wrong classes, Square."""
    import torchattacks

    attack = torchattacks.AutoAttack(model, eps=epsilon, n_classes=model(x[:1]).shape[1], seed=0)
    for part in attack._autoattack.attacks[:3]:
        part.steps = steps
    return attack(x, y).detach()


def seconds(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.process_time() if device.type == "cpu" else time.perf_counter()


if __name__ == "__main__":
    main()
