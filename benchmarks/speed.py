"""How fast the program is on this machine, compared with the loop a user would write.

    python -m benchmarks.speed                # one table
    python -m benchmarks.speed --quick        # the same with fewer repeats
    python -m benchmarks.speed --compile      # with rows for compiled networks

Run it from the repository's root. Images are random: the time does not depend on their content. The variants of a group
take turns, so that a busy machine slows them alike. Times are medians over the turns with the range in brackets; ratios
are medians of the ratios within a turn. All variants of a group use the same number of CPU threads, the fastest one.
"""
# ruff: noqa: E402

import argparse
import dataclasses
import itertools
import statistics
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # for `python benchmarks/speed.py`

import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader
from torchvision import transforms

import attacks
import data
import flags
import local_complexity
import models
import train
from compute import cuda_graph
from compute import device as devices

GREY, COLOUR = (1, 28, 28), (3, 32, 32)
MNIST = ["--model=mlp", "--dataset=mnist", "--batch_size=200"]
CIFAR10 = ["--dataset=cifar10", "--batch_size=64", "--weight_decay=0"]
Work = Callable[[int], object]  # work(n) does n units of what is measured, such as training steps
report = partial(print, file=sys.stderr)


def take_turns(variants: dict[str, Work], device: torch.device, turns: int) -> dict[str, list[float]]:
    """Return {name: [seconds of one unit of work in each turn]}."""
    from torch.utils.benchmark import Timer  # its import may print a warning about CUDA

    n = 10 if device.type == "cuda" else 1  # on a GPU ten steps are one graph
    timers = {name: Timer("work(n)", globals={"work": work, "n": n}, num_threads=torch.get_num_threads())
              for name, work in variants.items()}
    for work in variants.values():
        work(2 * n)  # kernels are loaded, graphs captured
    rounds = [[timer.blocked_autorange(min_run_time=0.3 if turns < 7 else 1.0).median / n for timer in timers.values()]
              for _ in range(turns)]
    return {name: list(times) for name, times in zip(timers, zip(*rounds, strict=True), strict=True)}


def repeated(work: Callable[[], Any]) -> Work:
    return lambda n: [work() for _ in range(n)]


def captured(work: Callable[[], Any], device: torch.device) -> Work:
    """Return work(n); on a GPU it replays a graph, so that the kernel launches do not count."""
    return cuda_graph.repeater(work, report) if device.type == "cuda" else repeated(work)


# ---- the training step ----------------------------------------------------------------------------------------------

def random_images(shape: tuple[int, int, int], n: int = 1000) -> data.Dataset:
    """Return a data set of n training and n test images of shape (C, H, W) in 10 classes."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(256, (2 * n, *shape), generator=generator, dtype=torch.uint8)
    y = torch.randint(10, (2 * n,), generator=generator)
    return data.Dataset("random", x[:n], y[:n], x[n:], y[n:], 10, mean=[0.5] * shape[0], std=[0.25] * shape[0])


def plain_network(config: flags.Config, dataset: data.Dataset, device: torch.device) -> torch.nn.Module:
    """Return the network with PyTorch's own linear layers and memory format."""
    options = dataclasses.asdict(config)
    return models.from_config(options, dataset.x_test.shape[1:], 10, dataset.mean, dataset.std).to(device)


def plain_loop(config: flags.Config, dataset: data.Dataset, device: torch.device) -> Work:
    """The loop a user would write: DataLoader, transforms, AdamW, the loss read at each step for the progress bar."""
    model = plain_network(config, dataset, device)
    model.normalize = torch.nn.Identity()  # the transform does it
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.lr, weight_decay=config.weight_decay)
    transform = transforms.Compose([transforms.ToTensor(), transforms.Normalize(dataset.mean, dataset.std)])
    images = [transforms.functional.to_pil_image(image) for image in dataset.x_train]

    def collate(rows: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.stack([transform(images[i]) for i in rows]), dataset.y_train[rows]

    loader: DataLoader = DataLoader(range(len(images)), config.batch_size, shuffle=True, drop_last=True,  # type: ignore
                                    pin_memory=device.type == "cuda", collate_fn=collate)
    batches = itertools.chain.from_iterable(itertools.repeat(loader))

    def steps(n: int) -> None:
        for x, y in itertools.islice(batches, n):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x.to(device)), y.to(device))
            loss.backward()
            optimizer.step()
            loss.item()
    return steps


def program_steps(config: flags.Config, dataset: data.Dataset, device: torch.device) -> Work:
    """The training steps of train.py."""
    dataset = train.resident(dataset, device)
    trainer = train.Trainer(train.build_model(config, dataset), config, dataset, report)
    done = 0

    def steps(n: int) -> None:
        nonlocal done
        trainer.advance(done, n)
        done += n
    return steps


def matrix_products(config: flags.Config, dataset: data.Dataset, device: torch.device) -> Work:
    """The matrix products of a step of the MLP alone, by MKL: forward, gradients of weights and of hidden layers."""
    sizes = [dataset.x_train[0].numel(), *[config.width] * ((config.depth or 1) - 1), 10]
    pairs = []
    for x, y in itertools.pairwise([torch.randn(config.batch_size, n, device=device) for n in sizes]):
        weight = torch.randn(x.shape[1], y.shape[1], device=device)
        pairs += [(x, weight), (x.t(), y), (y, weight.t())]
    del pairs[2]  # the images need no gradient
    return captured(lambda: [a @ b for a, b in pairs], device)


def forward_and_backward(config: flags.Config, dataset: data.Dataset, device: torch.device) -> Work:
    """The plain network's forward and backward pass alone, always on the same batch."""
    model = plain_network(config, dataset, device)
    x = dataset.x_train[:config.batch_size].to(device) / 255

    def passes() -> None:
        model.zero_grad(set_to_none=True)
        model(x).sum().backward()
    return captured(passes, device)


def step_rows(label: str, argv: list[str], shape: tuple[int, int, int], device: torch.device, turns: int,
              more: dict[str, list[str]]) -> list[list[str]]:
    """Return the rows of the training step: plain loop, this program, and its limit.

    more: {name: further flags} of more rows of this program.
    """
    dataset = random_images(shape)

    def work(kind: Callable, *further: str) -> Work:
        args = flags.parse_args([*argv, "--n_steps=1000000", *further])
        return kind(train.complete(args, dataset, device), dataset, device)

    program = work(program_steps)
    if device.type == "cpu":
        torch.set_num_threads(devices.fastest_thread_count(lambda: program(1)))
    name, limit = (("matrix products", matrix_products) if label.endswith("MLP")
                   else ("forward and backward", forward_and_backward))
    times = take_turns({
        "plain loop": work(plain_loop), "this program": program,
        **{f"this program, {other}": work(program_steps, *further) for other, further in more.items()},
        f"{name} alone": work(limit)}, device, turns)
    report(f"{label}: {torch.get_num_threads()} CPU threads")
    return [[f"{label}: {variant}", range_text(taken), f"{1 / statistics.median(taken):,.0f} steps/s",
             f"{ratio(times['plain loop'], taken):.1f}", f"{ratio(taken, times[f'{name} alone']):.2f} × {name}"]
            for variant, taken in times.items()]


# ---- the log step ---------------------------------------------------------------------------------------------------

def log_step_rows(device: torch.device, turns: int) -> list[list[str]]:
    """Return the rows of a log step's parts on the MNIST MLP: PGD, robust accuracy, local complexity."""
    dataset, epsilons = random_images(GREY), flags.GREY_EPSILONS
    dataset = train.resident(dataclasses.replace(dataset, x_train=dataset.x_test, y_train=dataset.y_test), device)
    x, y = data.pixels(dataset.x_test, torch.float32), dataset.y_test
    config = train.complete(flags.parse_args([*MNIST, "--n_steps=200", "--lr=0.003"]), dataset, device)
    model = train.build_model(config, dataset)
    train.Trainer(model, config, dataset).advance(0, 200)  # an attack on wrong predictions would be too easy
    model.requires_grad_(False)
    points = torch.rand(3 * 1024, *GREY, device=device)
    directions = local_complexity.random_directions(25, 784, device=device)
    steps = 0.05 * torch.cat([directions, -directions])
    vertices = (points[:512].flatten(1).unsqueeze(1) + steps).reshape(-1, *GREY)
    part = 2048 if device.type == "cpu" else len(vertices)  # what fits the cache

    @torch.no_grad()
    def forward_passes() -> None:
        for images in [*vertices.split(part)] * (len(points) // 512):
            model(images)

    def gradient(n: int = 1000) -> torch.Tensor:
        x_in = x[:n].detach().requires_grad_()
        return torch.autograd.grad(model(x_in).sum(), x_in)[0]

    taken: list[int] = []  # how many images each pass of the attack takes
    hook = model.register_forward_pre_hook(lambda _, args: taken.append(len(args[0])))
    attacks.robust_accuracy(model, x, y, epsilons)
    hook.remove()
    if device.type == "cpu":
        torch.set_num_threads(devices.fastest_thread_count(gradient))

    parts: list[tuple[str, int, str, Work, Work, str]] = [
        ("PGD-10, 1,000 images", 10 * len(x), "images × iterations/s",
         repeated(lambda: attacks.pgd(model, x, y, 0.1)),
         captured(lambda: [gradient() for _ in range(10)], device), "forward and backward alone"),
        (f"robust_acc, 1,000 images, {len(epsilons)} ε", len(x), "images/s",
         repeated(lambda: attacks.robust_accuracy(model, x, y, epsilons)),
         repeated(lambda: [gradient(images) for images in taken]), "its forward and backward passes alone"),
        ("local complexity, 3 × 1,024 points, P = 25", len(points), "points/s",
         repeated(lambda: local_complexity.local_complexity(model, points, 0.05, directions)),
         captured(forward_passes, device), "the vertices' forward passes alone")]
    rows = []
    for label, amount, unit, work, limit, limit_name in parts:
        times, limits = take_turns({"work": work, "limit": limit}, device, turns).values()
        rows.append([label, range_text(times), f"{amount / statistics.median(times):,.0f} {unit}", "-",
                     f"{ratio(times, limits):.2f} × {limit_name}"])
    return rows


# ---- printing -------------------------------------------------------------------------------------------------------

def ratio(numerators: list[float], denominators: list[float]) -> float:
    """Return the median of the ratios within a turn."""
    return statistics.median(a / b for a, b in zip(numerators, denominators, strict=True))


def range_text(times: list[float]) -> str:
    """Return the median of times (seconds) and their range, such as "3.21 ms (2.76 ms–4.82 ms)"."""
    def text(seconds: float) -> str:
        factor, unit = (1, "s") if seconds >= 1 else (1e3, "ms") if seconds >= 1e-3 else (1e6, "µs")
        return f"{seconds * factor:.3g} {unit}"

    return f"{text(statistics.median(times))} ({text(min(times))}–{text(max(times))})"


def print_markdown(head: list[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a Markdown table that is aligned as plain text, too."""
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    for row in [head, ["-" * width for width in widths], *rows]:
        print("| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |")


def main() -> None:
    parser = flags.OneLineParser(prog="benchmarks.speed", description=__doc__,
                                 formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default auto)")
    parser.add_argument("--quick", action="store_true", help="3 short turns in place of 7")
    parser.add_argument("--compile", action="store_true", help="add rows for compiled networks")
    args = parser.parse_args()
    try:
        device = devices.choose_device(args.device)
    except ValueError as error:
        parser.error(str(error))
    devices.set_precision()
    turns = 3 if args.quick else 7
    description = devices.describe(device)
    report(f"{description['device']}, torch {description['torch']}, {turns} turns\n")
    compiled = {"compiled": ["--compile"]} if args.compile else {}
    print_markdown(["", "time", "rate", "× plain loop", "against its limit"], [
        *step_rows("MNIST MLP", MNIST, GREY, device, turns, {"exact_ce": ["--loss=exact_ce"]}),
        *step_rows("CNN", ["--model=cnn", *CIFAR10], COLOUR, device, turns, compiled),
        *step_rows("ResNet-18", ["--model=resnet18", *CIFAR10], COLOUR, device, turns, compiled),
        *log_step_rows(device, turns)])


if __name__ == "__main__":
    main()
