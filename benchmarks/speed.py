"""How fast the training step is on this machine, compared with the loop a user would write.

    python -m benchmarks.speed                # one table
    python -m benchmarks.speed --quick        # the same with 3 turns in place of 7
    python -m benchmarks.speed --compile      # with rows for compiled networks

Run it from the repository's root. Images are random: the time does not depend on their content. The variants of a
network take turns, so that a busy machine slows them alike. Times are medians over the turns, with their range; ratios
are medians of the ratios within a turn. All variants use the same number of CPU threads, the fastest one.
"""

import argparse
import dataclasses
import itertools
import statistics
import sys
from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader
from torchvision import transforms

import data
import flags
import models
import train
from compute import cuda_graph
from compute import device as devices

CIFAR10 = ["--dataset=cifar10", "--batch_size=64", "--weight_decay=0"]
Steps = Callable[[int], object]  # steps(n) makes n training steps
report = partial(print, file=sys.stderr)


def random_images(channels: int, side: int, n: int = 1000) -> data.Dataset:
    """Return a data set of n square images in 10 classes, each of them a training and a test image."""
    x, y = torch.randint(256, (n, channels, side, side), dtype=torch.uint8), torch.randint(10, (n,))
    return data.Dataset("random", x, y, x, y, 10, mean=[0.5] * channels, std=[0.25] * channels)


def plain_network(config: flags.Config, dataset: data.Dataset, device: torch.device) -> torch.nn.Module:
    """Return the network in PyTorch's own memory format."""
    in_shape = dataset.x_train.shape[1:]
    return models.from_config(dataclasses.asdict(config), in_shape, 10, dataset.mean, dataset.std).to(device)


def plain_loop(config: flags.Config, dataset: data.Dataset, device: torch.device) -> Steps:
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


def program(config: flags.Config, dataset: data.Dataset, device: torch.device) -> Steps:
    """The training steps of train.py."""
    dataset = train.resident(dataset, device)
    trainer = train.Trainer(train.build_model(config, dataset), config, dataset, report)
    done = 0

    def steps(n: int) -> None:
        nonlocal done
        trainer.advance(done, n)
        done += n
    return steps


def forward_and_backward(config: flags.Config, dataset: data.Dataset, device: torch.device) -> Steps:
    """The plain network's passes alone, always on the same batch. On a GPU, kernel launches do not count."""
    model = plain_network(config, dataset, device)
    x = data.pixels(dataset.x_train[:config.batch_size].to(device), torch.float32)

    def steps(n: int = 1) -> None:
        for _ in range(n):
            model.zero_grad(set_to_none=True)
            model(x).sum().backward()
    return cuda_graph.repeater(steps, report) if device.type == "cuda" else steps


def rows(label: str, argv: list[str], dataset: data.Dataset, device: torch.device, turns: int,
         more: dict[str, list[str]]) -> list[list[str]]:
    """Return a network's rows of the table. more: {name: flags} of further rows of this program."""
    from torch.utils.benchmark import Timer  # its import may print a warning about CUDA

    def prepare(kind: Callable, *further: str) -> Steps:
        args = flags.parse_args([*argv, "--n_steps=1000000", *further])
        return kind(train.complete(args, dataset, device), dataset, device)

    variants = {"plain loop": prepare(plain_loop), "this program": prepare(program),
                **{f"this program, {name}": prepare(program, *further) for name, further in more.items()},
                "forward and backward alone": prepare(forward_and_backward)}
    if device.type == "cpu":
        torch.set_num_threads(devices.fastest_thread_count(lambda: variants["this program"](1)))
    report(f"{label}: {torch.get_num_threads()} CPU threads")
    n = 10 if device.type == "cuda" else 1  # on a GPU ten steps are one graph
    timers = [Timer("steps(n)", globals={"steps": steps, "n": n}, num_threads=torch.get_num_threads())
              for steps in variants.values()]
    for steps in variants.values():
        steps(2 * n)  # kernels are loaded, graphs captured
    taken = [[1000 * timer.blocked_autorange(min_run_time=0.5).median / n for timer in timers] for _ in range(turns)]
    table = []
    for name, times in zip(variants, zip(*taken, strict=True), strict=True):
        median = statistics.median(times)
        ratio = statistics.median(turn[0] / time for turn, time in zip(taken, times, strict=True))
        table.append([f"{label}: {name}", f"{median:.3g} ms ({min(times):.3g}–{max(times):.3g})",
                      f"{1000 / median:,.0f} steps/s", f"{ratio:.1f}"])
    return table


def print_markdown(head: list[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a Markdown table that is aligned as plain text, too."""
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    for row in [head, ["-" * width for width in widths], *rows]:
        print("| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |")


def main() -> None:
    parser = flags.OneLineParser(prog="benchmarks.speed", description=__doc__,
                                 formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default auto)")
    parser.add_argument("--quick", action="store_true", help="3 turns in place of 7")
    parser.add_argument("--compile", action="store_true", help="add rows for compiled networks")
    args = parser.parse_args()
    try:
        device = devices.choose_device(args.device)
    except ValueError as error:
        parser.error(str(error))
    devices.set_precision()
    turns = 3 if args.quick else 7
    report(f"{devices.describe(device)['device']}, torch {torch.__version__}, {turns} turns\n")
    compiled = {"compiled": ["--compile"]} if args.compile else {}
    grey, colour = random_images(1, 28), random_images(3, 32)
    print_markdown(["", "time", "rate", "× plain loop"], [
        *rows("MNIST MLP", ["--model=mlp", "--dataset=mnist", "--batch_size=200"], grey, device, turns,
              {"exact_ce": ["--loss=exact_ce"]}),
        *rows("CNN", ["--model=cnn", *CIFAR10], colour, device, turns, compiled),
        *rows("ResNet-18", ["--model=resnet18", *CIFAR10], colour, device, turns, compiled)])


if __name__ == "__main__":
    main()
