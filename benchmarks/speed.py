"""How fast the program is on this machine, compared with the loop a user would write.

    python -m benchmarks.speed                # one table
    python -m benchmarks.speed --quick        # the same with fewer repeats
    python -m benchmarks.speed --compile      # with rows for compiled networks
    python -m benchmarks.speed --experiment   # the whole MNIST experiment of 100,000 steps

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
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

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
from runtime import cuda_graph
from runtime import device as devices

MNIST = ["--model=mlp", "--dataset=mnist", "--batch_size=200"]
CNN = ["--model=cnn", "--dataset=cifar10", "--batch_size=64", "--weight_decay=0"]
RESNET = ["--model=resnet18", "--dataset=cifar10", "--batch_size=64", "--weight_decay=0"]
GREY, COLOUR = (1, 28, 28), (3, 32, 32)
Work = Callable[[int], object]  # work(n) does n units of what is measured, such as training steps


@dataclasses.dataclass
class Clock:
    """How long and how often to measure. seconds: of one variant in one turn."""

    device: torch.device
    turns: int
    seconds: float

    def take_turns(self, variants: dict[str, Work]) -> dict[str, list[float]]:
        """Return {name: [seconds of one unit of work in each turn]}."""
        from torch.utils.benchmark import Timer  # its import may print a warning about CUDA

        n = 10 if self.device.type == "cuda" else 1  # on a GPU ten steps are one graph
        threads = torch.get_num_threads()
        timers = {name: Timer("work(n)", globals={"work": work, "n": n}, num_threads=threads)
                  for name, work in variants.items()}
        for work in variants.values():
            work(2 * n)  # kernels are loaded, graphs captured
        times: dict[str, list[float]] = {name: [] for name in variants}
        for _ in range(self.turns):
            for name, timer in timers.items():
                times[name].append(timer.blocked_autorange(min_run_time=self.seconds).median / n)
        return times


# ---- the training step ----------------------------------------------------------------------------------------------

def random_images(shape: tuple[int, int, int], n_train: int, n_test: int = 1000) -> data.Dataset:
    """Return a data set of random images of shape (C, H, W) in 10 classes."""
    generator = torch.Generator().manual_seed(0)

    def split(n: int) -> tuple[torch.Tensor, torch.Tensor]:
        return (torch.randint(256, (n, *shape), generator=generator, dtype=torch.uint8),
                torch.randint(10, (n,), generator=generator))

    (x_train, y_train), (x_test, y_test) = split(n_train), split(n_test)
    return data.Dataset(name="random", x_train=x_train, y_train=y_train, x_test=x_test, y_test=y_test, num_classes=10,
                        mean=[0.5] * shape[0], std=[0.25] * shape[0])


def config_of(argv: Sequence[str], dataset: data.Dataset, device: torch.device) -> flags.Config:
    """Return the complete config of these flags with this data set."""
    return train.complete(flags.parse_args([*argv, "--n_steps=1000000"]), dataset, device)


def plain_network(config: flags.Config, dataset: data.Dataset, device: torch.device) -> torch.nn.Module:
    """Return the network with PyTorch's own linear layers and memory format."""
    config = dataclasses.replace(config, products="mkl")
    return models.from_config(dataclasses.asdict(config), dataset.x_test.shape[1:], 10, dataset.mean,
                              dataset.std).to(device)


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


def eager_steps(config: flags.Config, dataset: data.Dataset, device: torch.device) -> Work:
    """The same with the data set on the device: no DataLoader, the loss is not read."""
    model = plain_network(config, dataset, device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.lr, weight_decay=config.weight_decay)
    x_train, y_train = dataset.x_train.to(device), dataset.y_train.to(device)

    def steps(n: int) -> None:
        for _ in range(n):
            rows = torch.randint(len(x_train), (config.batch_size,), device=device)
            optimizer.zero_grad()
            F.cross_entropy(model(x_train[rows].to(torch.float32) / 255), y_train[rows]).backward()
            optimizer.step()
    return steps


def program_steps(config: flags.Config, dataset: data.Dataset, device: torch.device) -> Work:
    """The training steps of train.py."""
    dataset = train.resident(dataset, device)
    trainer = train.Trainer(train.build_model(config, dataset), config, dataset, report=to_stderr)
    done = 0

    def steps(n: int) -> None:
        nonlocal done
        trainer.advance(done, n)
        done += n
    return steps


def repeated(work: Callable[[], object], device: torch.device) -> Work:
    """Return work(n); on a GPU it replays a graph, so that the kernel launches do not count."""
    def repeat(n: int) -> None:
        for _ in range(n):
            work()

    return cuda_graph.repeater(lambda: repeat(1), to_stderr) if device.type == "cuda" else repeat


def matrix_products(config: flags.Config, dataset: data.Dataset, device: torch.device) -> Work:
    """The matrix products of a step of the MLP alone, by MKL: forward, gradients of weights and of hidden layers."""
    sizes = [dataset.x_train[0].numel(), *[config.width] * (config.depth - 1), 10]
    inputs = [torch.randn(config.batch_size, n, device=device) for n in sizes]
    pairs = []
    for i, (n, m) in enumerate(itertools.pairwise(sizes)):
        weight = torch.randn(n, m, device=device)
        pairs += [(inputs[i], weight), (inputs[i].t(), inputs[i + 1])]
        if i > 0:
            pairs.append((inputs[i + 1], weight.t()))
    return repeated(lambda: [a @ b for a, b in pairs], device)


def forward_and_backward(config: flags.Config, dataset: data.Dataset, device: torch.device) -> Work:
    """The plain network's forward and backward pass alone, always on the same batch."""
    model = plain_network(config, dataset, device)
    x = dataset.x_train[:config.batch_size].to(device) / 255

    def passes() -> None:
        model.zero_grad(set_to_none=True)
        model(x).sum().backward()
    return repeated(passes, device)


def set_fastest_threads(config: flags.Config, dataset: data.Dataset, device: torch.device) -> None:
    """Set the number of CPU threads with which a training step is fastest now."""
    if device.type == "cpu":
        steps = program_steps(dataclasses.replace(config, compile=flags.Config().compile), dataset, device)
        torch.set_num_threads(devices.fastest_thread_count(lambda: steps(1)))


def step_rows(label: str, argv: list[str], shape: tuple[int, int, int], clock: Clock,
              more: dict[str, list[str]]) -> list[list[str]]:
    """Return the rows of the training step: plain loop, eager steps, this program, and its limit.

    more: {name: further flags} of more rows of this program.
    """
    dataset, device = random_images(shape, 1000), clock.device
    config = config_of(argv, dataset, device)
    set_fastest_threads(config, dataset, device)
    name, limit = (("matrix products", matrix_products) if config.model == "mlp"
                   else ("forward and backward", forward_and_backward))
    variants = {"plain loop": plain_loop(config, dataset, device), "eager steps": eager_steps(config, dataset, device),
                "this program": program_steps(config, dataset, device)}
    for other, further in more.items():
        variants[f"this program, {other}"] = program_steps(config_of([*argv, *further], dataset, device), dataset,
                                                           device)
    variants[f"{name} alone"] = limit(config, dataset, device)
    times = clock.take_turns(variants)
    to_stderr(f"{label}: {config.batch_size} images a step, {torch.get_num_threads()} CPU threads")
    return [[f"{label}: {variant}", range_text(taken), f"{1 / statistics.median(taken):,.0f} steps/s",
             f"{ratio(times['plain loop'], taken):.1f}", f"{ratio(times['eager steps'], taken):.1f}",
             f"{ratio(taken, times[f'{name} alone']):.2f} × {name}"] for variant, taken in times.items()]


# ---- the log step ---------------------------------------------------------------------------------------------------

def log_step_rows(clock: Clock) -> list[list[str]]:
    """Return the rows of a log step's parts on the MNIST MLP: PGD, robust accuracy, local complexity."""
    dataset, device, epsilons = random_images(GREY, 1000), clock.device, train.GREY_EPSILONS
    model = plain_network(config_of(MNIST, dataset, device), dataset, device)
    x, y = (dataset.x_test.to(device) / 255).float(), dataset.y_test.to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.003)
    for _ in range(200):  # an attack on wrong predictions would be too easy
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    model.requires_grad_(False)
    points = torch.rand(3 * 1024, *GREY, device=device)
    directions = local_complexity.random_directions(25, 784, device=device)
    steps = 0.05 * torch.cat([directions, -directions])
    vertices = (points[:512].flatten(1).unsqueeze(1) + steps).reshape(-1, *GREY)
    part = 2048 if device.type == "cpu" else len(vertices)  # what fits the cache

    @torch.no_grad()
    def forward_passes() -> None:
        for _ in range(len(points) // 512):
            for images in vertices.split(part):
                model(images)

    def gradient(n: int = 1000) -> torch.Tensor:
        x_in = x[:n].detach().requires_grad_()
        return torch.autograd.grad(model(x_in).sum(), x_in)[0]

    class Counted(torch.nn.Module):
        """The network; it notes how many images each call takes."""

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            taken.append(len(images))
            return model(images)

    taken: list[int] = []
    attacks.robust_accuracy(Counted(), x, y, epsilons)
    if device.type == "cpu":
        torch.set_num_threads(devices.fastest_thread_count(gradient))
    times = clock.take_turns({
        "pgd": lambda n: [attacks.pgd(model, x, y, 0.1, steps=10) for _ in range(n)],
        "gradient": repeated(gradient, device),
        "robust": lambda n: [attacks.robust_accuracy(model, x, y, epsilons) for _ in range(n)],
        "its gradients": lambda n: [gradient(images) for _ in range(n) for images in taken],
        "complexity": lambda n: [local_complexity.local_complexity(model, points, 0.05, directions) for _ in range(n)],
        "its passes": repeated(forward_passes, device)})
    pgd, robust, complexity = times["pgd"], times["robust"], times["complexity"]
    return [
        ["PGD-10, 1,000 images", range_text(pgd), f"{10 * len(x) / statistics.median(pgd):,.0f} images × iterations/s",
         "-", "-", f"{ratio(pgd, times['gradient']) / 10:.2f} × forward and backward alone"],
        [f"robust_acc, 1,000 images, {len(epsilons)} ε", range_text(robust),
         f"{len(x) / statistics.median(robust):,.0f} images/s", "-", "-",
         f"{ratio(robust, times['its gradients']):.2f} × its forward and backward passes alone"],
        ["local complexity, 3 × 1,024 points, P = 25", range_text(complexity),
         f"{len(points) / statistics.median(complexity):,.0f} points/s", "-", "-",
         f"{ratio(complexity, times['its passes']):.2f} × the vertices' forward passes alone"]]


def experiment(data_dir: str, device: torch.device) -> None:
    """Print the time of the whole MNIST experiment: 100,000 steps, all test images attacked at 60 log steps."""
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        status = train.main([*MNIST, f"--data_dir={data_dir}", "--n_steps=100000", "--adv_size=all",
                             f"--device={device}", f"--log_dir={folder}", f"--save_dir={folder}"])
    if status:
        sys.exit(status)
    print(f"the whole experiment took {time.perf_counter() - start:.1f} s on {devices.describe(device)['device']}")


# ---- printing -------------------------------------------------------------------------------------------------------

def to_stderr(line: str) -> None:
    print(line, file=sys.stderr)


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


def main(argv: list[str] | None = None) -> None:
    parser = flags.OneLineParser(prog="benchmarks.speed", description=__doc__,
                                 formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default auto)")
    parser.add_argument("--data_dir", default="data", help="where MNIST is, for --experiment (default data)")
    parser.add_argument("--quick", action="store_true", help="3 short turns in place of 7")
    parser.add_argument("--compile", action="store_true", help="add rows for compiled networks")
    parser.add_argument("--experiment", action="store_true", help="the whole MNIST experiment, in place of the table")
    args = parser.parse_args(argv)
    try:
        device = devices.choose_device(args.device)
    except ValueError as error:
        parser.error(str(error))
    devices.set_precision()
    clock = Clock(device, turns=3 if args.quick else 7, seconds=0.3 if args.quick else 1.0)
    description = devices.describe(device)
    to_stderr(f"{description['device']}, torch {description['torch']}, {clock.turns} turns\n")
    if args.experiment:
        experiment(args.data_dir, device)
    else:
        compiled = {"compiled": ["--compile"]} if args.compile else {}
        rows = step_rows("MNIST MLP", MNIST, GREY, clock, {"exact_ce": ["--loss=exact_ce"]})
        rows += step_rows("CNN", CNN, COLOUR, clock, compiled)
        rows += step_rows("ResNet-18", RESNET, COLOUR, clock, compiled)
        print_markdown(["", "time", "rate", "× plain loop", "× eager", "against its limit"],
                       rows + log_step_rows(clock))


if __name__ == "__main__":
    main()
