"""How fast the program is, on whatever device there is, against the loop a user would write.

    python bench.py                 # one table
    python bench.py --quick         # the same from fewer repeats, in under a minute
    python bench.py --scaling       # how a step and a log step grow with width, depth, training set and epsilons
    python bench.py --experiment    # the whole MNIST experiment of 100,000 steps, as the command line runs it

Images are random: the time does not depend on what they show. The variants of a row's group take turns in one process,
so that a busy machine slows them alike; times are medians over the turns with the range in brackets, ratios are medians
of the ratios within a turn. All variants of a group use the same number of CPU threads, the fastest one measured.
"""

import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils.data import DataLoader
from torchvision import transforms

import attacks
import cuda_graph
import data
import local_complexity
import machine
import train
from flags import OneLineParser

MNIST = ["--model=mlp", "--dataset=mnist", "--batch_size=200"]
RESNET = ["--model=resnet18", "--dataset=cifar10", "--batch_size=64", "--weight_decay=0"]


def random_images(shape, n_train, n_test=1000):
    """Return a data set of random images, shaped like (C, H, W)."""
    rng = np.random.default_rng(0)

    def images(n):
        return torch.from_numpy(rng.integers(0, 256, (n, *shape), dtype=np.uint8))

    def labels(n):
        return torch.from_numpy(rng.integers(0, 10, n))

    grey = shape[0] == 1
    return data.Dataset("random", images(n_train), labels(n_train), images(n_test), labels(n_test), 10,
                        [0.13] if grey else [0.5] * 3, [0.31] if grey else [0.25] * 3)


class PILImages(torch.utils.data.Dataset):
    """Images behind __getitem__ and transforms, as torchvision's data sets hold them."""

    def __init__(self, dataset):
        self.images = dataset.x_train.permute(0, 2, 3, 1).numpy().squeeze()
        self.labels = dataset.y_train.tolist()
        self.transform = transforms.Compose([transforms.ToTensor(), transforms.Normalize(dataset.mean, dataset.std)])

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, i):
        return self.transform(Image.fromarray(self.images[i])), self.labels[i]


def plain_loop(args, dataset, device):
    """The loop a user would write: DataLoader, transforms, eager AdamW, the loss read at each step for the bar."""
    model = train.build_model(args, dataset, device)
    body = model.layers if args.model == "mlp" else model
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=args.weight_decay)
    loader = DataLoader(PILImages(dataset), args.batch_size, shuffle=True, drop_last=True,
                        pin_memory=device.type == "cuda")

    def steps(n):
        while n > 0:
            for x, y in loader:
                x, y = x.to(device), y.to(device)
                optimizer.zero_grad()
                loss = F.cross_entropy(body(x.flatten(1) if args.model == "mlp" else x), y)
                loss.backward()
                optimizer.step()
                loss.item()
                n -= 1
                if n == 0:
                    break
    return steps


def eager_steps(args, dataset, device):
    """Tensors resident on the device, kernels launched one by one."""
    model = train.build_model(args, dataset, device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=args.weight_decay)
    x_train, y_train = dataset.x_train.to(device), dataset.y_train.to(device)

    def steps(n):
        for _ in range(n):
            rows = torch.randint(len(x_train), (args.batch_size,), device=device)
            optimizer.zero_grad()
            F.cross_entropy(model(x_train[rows].to(torch.float32) / 255), y_train[rows]).backward()
            optimizer.step()
    return steps


def program_steps(args, dataset, device):
    """The steps as train.py makes them."""
    dataset = train.resident(dataset, device)
    model = train.build_model(args, dataset, device)
    advance = train.training_steps(model, train.build_optimizer(args, model, device), dataset, args, print)
    done = 0

    def steps(n):
        nonlocal done
        advance(done, n)
        done += n
    return steps


def repeated(work, device):
    """Return repeat(n) of a limit: on a GPU the work is replayed as a graph, so that its launches do not count."""
    if device.type == "cuda":
        return cuda_graph.repeater(work, print)

    def repeat(n):
        for _ in range(n):
            work()
    return repeat


def matrix_products(args, dataset, device):
    """The MLP's matrix products alone: forward, gradients of the weights, gradients of the hidden layers."""
    sizes = [dataset.x_train[0].numel(), *[args.width] * (args.depth - 1), 10]
    inputs = [torch.randn(args.batch_size, n, device=device) for n in sizes]
    weights = [torch.randn(n, m, device=device) for n, m in zip(sizes, sizes[1:], strict=False)]

    def products():
        for i, w in enumerate(weights):
            inputs[i] @ w
            inputs[i].t() @ inputs[i + 1]
            if i > 0:
                inputs[i + 1] @ w.t()
    return repeated(products, device)


def forward_and_backward(args, dataset, device):
    """A network's forward and backward pass alone, on one batch again and again."""
    model = train.build_model(args, dataset, device)
    x = dataset.x_train[:args.batch_size].to(device) / 255

    def passes():
        model.zero_grad(set_to_none=True)
        model(x).sum().backward()
    return repeated(passes, device)


def arguments(flags, dataset, threads=None):
    args = train.parse_args([*flags, "--n_steps=1"])
    args.train_size, args.threads, args.eval_threads = len(dataset.x_train), threads, threads
    args.epsilons = args.epsilons or (train.GREY_EPSILONS if dataset.x_train.shape[1] == 1 else train.COLOUR_EPSILONS)
    args.lc_radius = args.lc_radius or [0.05]
    args.adv_size = min(args.adv_size, len(dataset.x_test))
    return args


def synchronize(device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def take_turns(variants, device, repeats, seconds):
    """Return {name: [time of one unit of work in each turn]} of {name: work(n)}; a turn takes about `seconds`."""
    def clock(work, n):
        synchronize(device)
        start = time.perf_counter()
        work(n)
        synchronize(device)
        return (time.perf_counter() - start) / n

    lengths = {}
    for name, work in variants.items():
        clock(work, 1)
        n, took = 2, clock(work, 2)
        while n * took < seconds / 2:
            n = max(n + 1, int(min(10 * n, seconds / took)))
            took = clock(work, n)
        lengths[name] = n
    times = {name: [] for name in variants}
    for _ in range(repeats):
        for name, work in variants.items():
            times[name].append(clock(work, lengths[name]))
    return times


def ratio(numerators, denominators):
    return statistics.median(a / b for a, b in zip(numerators, denominators, strict=True))


def duration(seconds):
    factor, unit = (1, "s") if seconds >= 1 else (1e3, "ms") if seconds >= 1e-3 else (1e6, "µs")
    return f"{seconds * factor:.3g} {unit}"


def spread(times):
    return f"{duration(statistics.median(times))} ({duration(min(times))}–{duration(max(times))})"


def fastest_threads(args, dataset, device):
    if device.type == "cpu":
        steps = program_steps(args, dataset, device)
        torch.set_num_threads(machine.fastest_thread_count(lambda: steps(1)))
    return torch.get_num_threads()


def print_table(head, rows):
    """Print a Markdown table that is aligned as plain text, too."""
    rows = [head, *rows]
    widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
    for number, row in enumerate(rows):
        print("| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |", flush=True)
        if number == 0:
            print("|" + "|".join("-" * (width + 2) for width in widths) + "|")


def step_rows(flags, shape, n_train, label, device, repeats, seconds):
    """Return the rows of the training step: plain loop, eager steps, this program, and their limit."""
    dataset = random_images(shape, n_train)
    args = arguments(flags, dataset)
    threads = fastest_threads(args, dataset, device)
    limit, make_limit = (("matrix products", matrix_products) if args.model == "mlp"
                         else ("forward and backward", forward_and_backward))
    variants = {"plain loop": plain_loop, "eager steps": eager_steps, "this program": program_steps,
                f"{limit} alone": make_limit}
    times = take_turns({name: make(args, dataset, device) for name, make in variants.items()}, device, repeats, seconds)
    rows = []
    for name, taken in times.items():
        rows.append([f"{label}: {name}", spread(taken), f"{1 / statistics.median(taken):,.0f} steps/s",
                     f"{ratio(times['plain loop'], taken):.1f}", f"{ratio(times['eager steps'], taken):.1f}",
                     f"{ratio(taken, times[f'{limit} alone']):.2f} × {limit}"])
    note = f", {threads} threads" if device.type == "cpu" else ""
    print(f"{label}: {args.batch_size} images a step{note}", file=sys.stderr)
    return rows


def instrument_rows(device, repeats, seconds):
    """Return the rows of a log step's parts on the MNIST MLP: PGD, robust accuracy, local complexity."""
    dataset = random_images((1, 28, 28), 1000)
    args = arguments(MNIST, dataset)
    model = train.build_model(args, dataset, device)
    x, y = (dataset.x_test.to(device) / 255).float(), dataset.y_test.to(device)
    points = torch.rand(3 * 1024, 1, 28, 28, device=device)
    directions = local_complexity.random_directions(25, 784, device=device)
    steps = 0.05 * torch.cat([directions, -directions])
    vertices = (points[:512].flatten(1).unsqueeze(1) + steps).reshape(-1, 1, 28, 28)

    part = 2048 if device.type == "cpu" else len(vertices)  # what suits the device's cache

    @torch.no_grad()
    def bare_forward():
        for _ in range(len(points) // 512):
            for images in vertices.split(part):
                model(images)

    def passes_to_the_input():
        x_in = x.detach().requires_grad_()
        torch.autograd.grad(model(x_in).sum(), x_in)

    for p in model.parameters():
        p.requires_grad_(False)
    if device.type == "cpu":
        torch.set_num_threads(machine.fastest_thread_count(passes_to_the_input))
    times = take_turns({
        "pgd": lambda n: [attacks.pgd(model, x, y, 0.1, steps=10) for _ in range(n)],
        "passes": repeated(passes_to_the_input, device),
        "lc": lambda n: [local_complexity.local_complexity(model, points, 0.05, directions) for _ in range(n)],
        "bare": repeated(bare_forward, device),
    }, device, repeats, seconds)
    pgd, lc = times["pgd"], times["lc"]
    return [
        ["PGD-10, 1,000 images", spread(pgd), f"{10 * len(x) / statistics.median(pgd):,.0f} images × iterations/s",
         "-", "-", f"{ratio(pgd, times['passes']) / 10:.2f} × forward and backward alone"],
        ["local complexity, 3 × 1,024 points, P = 25", spread(lc),
         f"{len(points) / statistics.median(lc):,.0f} points/s", "-", "-",
         f"{ratio(lc, times['bare']):.2f} × the vertices' forward passes alone"]]


def process_rows(data_dir, device):
    """Return the rows of a run as a process: its time from the command to the first table row, its peak memory."""
    mnist = (Path(data_dir) / "MNIST" / "raw").is_dir()
    flags = [f"--dataset={'mnist' if mnist else 'digits'}", f"--data_dir={Path(data_dir).resolve()}",
             f"--device={device}", "--n_steps=50", "--log_points=3"]
    program = "import sys, torch, train; train.main(sys.argv[1:]); print('reserved', torch.cuda.max_memory_reserved())"
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        process = subprocess.Popen(
            [sys.executable, "-c", program, *flags, f"--log_dir={folder}", f"--save_dir={folder}"],
            cwd=Path(__file__).parent, stdout=subprocess.PIPE, text=True)
        for line in process.stdout:
            first_word, *words = line.split() or [""]
            if first_word == "0":
                first = time.perf_counter() - start
            elif first_word == "reserved":
                reserved = int(words[0]) / 2**30
        process.wait()
    memory = {"process": resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20}
    if device.type == "cuda":
        memory["device"] = reserved
    name = "MNIST MLP" if mnist else "digits MLP"
    return [[f"{name}: from the command to the end of the first log step", duration(first), *["-"] * 4],
            *[[f"{name}: peak memory of the {whose}", f"{size:.2f} GB", *["-"] * 4] for whose, size in memory.items()]]


def scaling(device, repeats, seconds):
    """Print how the step and the log step of the MNIST MLP grow with what a user can choose."""
    cases = [("defaults", [], 1000)]
    cases += [(f"width {n}", [f"--width={n}"], 1000) for n in (20, 2000)]
    cases += [(f"depth {n}", [f"--depth={n}"], 1000) for n in (2, 6)]
    cases += [("60,000 training images", [], 60_000)]
    cases += [("1 epsilon", ["--epsilons=0.1"], 1000), ("12 epsilons", ["--epsilons=" + ",".join(
        f"{i / 50}" for i in range(1, 13))], 1000)]
    rows = []
    for label, flags, n_train in cases:
        dataset = random_images((1, 28, 28), n_train)
        args = arguments([*MNIST, *flags], dataset)
        fastest_threads(args, dataset, device)
        dataset = train.resident(dataset, device)
        model = train.build_model(args, dataset, device)
        probes = train.draw_probes(args, dataset)
        step = take_turns({"step": program_steps(args, dataset, device),
                           "products": matrix_products(args, dataset, device)}, device, repeats, seconds)
        log_step = []
        if device.type == "cuda":
            train.measure(model, dataset, probes, args)  # the first call of each kernel loads it
        for _ in range(2):  # by itself: one of the widest network takes as long as thousands of steps
            start = time.perf_counter()
            train.measure(model, dataset, probes, args)
            log_step.append(time.perf_counter() - start)
        rows.append([label, spread(step["step"]), f"{ratio(step['step'], step['products']):.2f}", spread(log_step)])
    print_table(["MNIST MLP", "training step", "× its matrix products", "log step (untrained network)"], rows)


def experiment(data_dir, device):
    """Print the time of the whole MNIST experiment of 100,000 steps: all test images attacked at 60 log steps."""
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        subprocess.run([sys.executable, str(Path(__file__).with_name("train.py")), *MNIST, f"--data_dir={data_dir}",
                        "--n_steps=100000", "--adv_size=all", f"--device={device}", f"--log_dir={folder}",
                        f"--save_dir={folder}"], check=True)
    print(f"the whole experiment took {time.perf_counter() - start:.1f} s on {machine.describe(device)['device']}")


def main():
    parser = OneLineParser(prog="bench.py", description=__doc__.split("\n\n")[0])
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default auto)")
    parser.add_argument("--data_dir", default="data", help="where MNIST lies, for the rows that run train.py")
    parser.add_argument("--quick", action="store_true", help="fewer and shorter repeats: under a minute")
    parser.add_argument("--scaling", action="store_true", help="how the cost grows, in place of the table")
    parser.add_argument("--experiment", action="store_true", help="the whole MNIST experiment, in place of the table")
    args = parser.parse_args()
    device = machine.choose_device(args.device)
    machine.set_precision()
    repeats, seconds = (3, 0.3) if args.quick else (7, 1.0)
    description = machine.describe(device)
    print(f"{description['device']}, torch {description['torch']}, {repeats} turns\n", file=sys.stderr)
    if args.scaling:
        scaling(device, repeats, seconds)
    elif args.experiment:
        experiment(args.data_dir, device)
    else:
        rows = step_rows(MNIST, (1, 28, 28), 1000, "MNIST MLP", device, repeats, seconds)
        rows += step_rows(RESNET, (3, 32, 32), 1000, "ResNet-18", device, repeats, seconds)
        rows += instrument_rows(device, repeats, seconds) + process_rows(args.data_dir, device)
        print_table(["", "time", "rate", "× plain loop", "× eager", "against its limit"], rows)


if __name__ == "__main__":
    main()
