"""How fast the program is, on whatever device there is, against the loop a user would write.

    python bench.py                     # one table
    python bench.py --quick             # the same from fewer repeats, in about a minute
    python bench.py --compile           # with rows for compiled networks, which take minutes to compile
    python bench.py --scaling           # how a step and a log step grow with width, depth, training set and epsilons
    python bench.py --experiment        # the whole MNIST experiment of 100,000 steps, as the command line runs it
    python bench.py --against=DIR       # this program against the checkout of another commit, in turns

Images are random: the time does not depend on what they show. The variants of a row's group take turns in one process,
so that a busy machine slows them alike; times are medians over the turns with the range in brackets, ratios are medians
of the ratios within a turn. All variants of a group use the same number of CPU threads, the fastest one measured.
"""

import json
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
import data
import local_complexity
import measure
import models
import products
import run
import train
import training
import tuning
from flags import OneLineParser
from runtime import cuda_graph
from runtime import device as devices

MNIST = ["--model=mlp", "--dataset=mnist", "--batch_size=200"]
CNN = ["--model=cnn", "--dataset=cifar10", "--batch_size=64", "--weight_decay=0"]
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


def plain_network(config, dataset, device):
    """The network as PyTorch makes it."""
    return models.from_config(vars(config), dataset.x_test.shape[1:], 10, dataset.mean, dataset.std).to(device)


def plain_loop(config, dataset, device):
    """The loop a user would write: DataLoader, transforms, eager AdamW, the loss read at each step for the bar."""
    model = plain_network(config, dataset, device)
    model.normalize = torch.nn.Identity()  # the transform does it
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.lr, weight_decay=config.weight_decay)
    loader = DataLoader(PILImages(dataset), config.batch_size, shuffle=True, drop_last=True,
                        pin_memory=device.type == "cuda")

    def steps(n):
        while n > 0:
            for x, y in loader:
                x, y = x.to(device), y.to(device)
                optimizer.zero_grad()
                loss = F.cross_entropy(model(x), y)
                loss.backward()
                optimizer.step()
                loss.item()
                n -= 1
                if n == 0:
                    break
    return steps


def eager_steps(config, dataset, device):
    """Tensors resident on the device, kernels launched one by one."""
    model = plain_network(config, dataset, device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.lr, weight_decay=config.weight_decay)
    x_train, y_train = dataset.x_train.to(device), dataset.y_train.to(device)

    def steps(n):
        for _ in range(n):
            rows = torch.randint(len(x_train), (config.batch_size,), device=device)
            optimizer.zero_grad()
            F.cross_entropy(model(x_train[rows].to(torch.float32) / 255), y_train[rows]).backward()
            optimizer.step()
    return steps


def program_steps(config, dataset, device):
    dataset = run.resident(dataset, device)
    model = run.build_model(config, dataset)
    _, network = tuning.tune(config, model, dataset, {}, lambda line: print(line, file=sys.stderr))
    trainer = training.Trainer(model, config, dataset, network=network)
    done = 0

    def steps(n):
        nonlocal done
        trainer.advance(done, n)
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


def faster(*ways):
    """Return the fastest of several functions that do the same."""
    def seconds(way):
        way()
        times = []
        for _ in range(20):
            start = time.perf_counter()
            way()
            times.append(time.perf_counter() - start)
        return min(times)

    return min(ways, key=seconds)


def matrix_products(config, dataset, device):
    """The MLP's matrix products alone: forward, gradients of the weights, gradients of the hidden layers, each by the
    faster one of MKL and oneDNN."""
    sizes = [dataset.x_train[0].numel(), *[config.width] * (config.depth - 1), 10]
    inputs = [torch.randn(config.batch_size, n, device=device) for n in sizes]
    weights = [torch.randn(n, m, device=device) for n, m in zip(sizes, sizes[1:], strict=False)]
    pairs = []
    for i, w in enumerate(weights):
        pairs += [(inputs[i], w), (inputs[i].t(), inputs[i + 1])] + ([(inputs[i + 1], w.t())] if i > 0 else [])
    ways = []
    for a, b in pairs:
        by_mkl = lambda a=a, b=b: a @ b  # noqa: E731
        by_onednn = lambda a=a, b=b: products.product(a, b.t())  # noqa: E731
        ways.append(faster(by_mkl, by_onednn) if device.type == "cpu" and products.available() else by_mkl)

    def all_products():
        for way in ways:
            way()
    return repeated(all_products, device)


def forward_and_backward(config, dataset, device):
    """A network's forward and backward pass alone, as PyTorch makes it, on one batch again and again."""
    model = plain_network(config, dataset, device)
    x = dataset.x_train[:config.batch_size].to(device) / 255

    def passes():
        model.zero_grad(set_to_none=True)
        model(x).sum().backward()
    return repeated(passes, device)


def configured(flags, dataset, device):
    """Return the config of these flags with this data set."""
    return train.complete(train.parse_args([*flags, "--n_steps=1"]), dataset, device)


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


def time_text(seconds):
    factor, unit = (1, "s") if seconds >= 1 else (1e3, "ms") if seconds >= 1e-3 else (1e6, "µs")
    return f"{seconds * factor:.3g} {unit}"


def range_text(times):
    return f"{time_text(statistics.median(times))} ({time_text(min(times))}–{time_text(max(times))})"


def fastest_threads(config, dataset, device):
    """Set, and write into config, the number of threads with which a step is fastest now."""
    if device.type == "cpu":
        steps = program_steps(config, dataset, device)
        config.threads = devices.fastest_thread_count(lambda: steps(1))
        torch.set_num_threads(config.threads)
    return torch.get_num_threads()


def print_markdown(head, rows):
    """Print a Markdown table that is aligned as plain text, too."""
    rows = [head, *rows]
    widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
    for number, row in enumerate(rows):
        print("| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |", flush=True)
        if number == 0:
            print("|" + "|".join("-" * (width + 2) for width in widths) + "|")


def step_rows(label, flags, shape, device, repeats, seconds, more=()):
    """Return the rows of the training step: plain loop, eager steps, this program, and their limit.

    more: (name, flags) of further rows of this program.
    """
    dataset = random_images(shape, 1000)
    config = configured(flags, dataset, device)
    threads = fastest_threads(config, dataset, device)
    name, limit = (("matrix products", matrix_products) if config.model == "mlp"
                   else ("forward and backward", forward_and_backward))
    variants = {"plain loop": plain_loop(config, dataset, device), "eager steps": eager_steps(config, dataset, device),
                "this program": program_steps(config, dataset, device)}
    for other, further in more:
        config = configured([*flags, *further, f"--threads={threads}"], dataset, device)
        variants[f"this program, {other}"] = program_steps(config, dataset, device)
    variants[f"{name} alone"] = limit(config, dataset, device)
    times = take_turns(variants, device, repeats, seconds)
    rows = []
    for variant, taken in times.items():
        rows.append([f"{label}: {variant}", range_text(taken), f"{1 / statistics.median(taken):,.0f} steps/s",
                     f"{ratio(times['plain loop'], taken):.1f}", f"{ratio(times['eager steps'], taken):.1f}",
                     f"{ratio(taken, times[f'{name} alone']):.2f} × {name}"])
    note = f", {threads} threads" if device.type == "cpu" else ""
    print(f"{label}: {config.batch_size} images a step{note}", file=sys.stderr)
    return rows


def instrument_rows(device, repeats, seconds):
    """Return the rows of a log step's parts on the MNIST MLP: PGD, robust accuracy, local complexity."""
    dataset = random_images((1, 28, 28), 1000)
    config = configured(MNIST, dataset, device)
    model = run.build_model(config, run.resident(dataset, device))
    x, y = (dataset.x_test.to(device) / 255).float(), dataset.y_test.to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.003)
    for _ in range(200):  # a network that is right on the images it is attacked on
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
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

    def passes_to_the_input(n=1000):
        x_in = x[:n].detach().requires_grad_()
        torch.autograd.grad(model(x_in).sum(), x_in)

    class Counted(torch.nn.Module):
        """The network, noting how many images each call takes."""

        def forward(self, images):
            taken.append(len(images))
            return model(images)

    taken = []
    attacks.ranks(Counted(), x, y, config.epsilons)

    def passes_of_robust_accuracy():
        for n in taken:
            passes_to_the_input(n)

    for p in model.parameters():
        p.requires_grad_(False)
    if device.type == "cpu":
        torch.set_num_threads(devices.fastest_thread_count(passes_to_the_input))
    times = take_turns({
        "pgd": lambda n: [attacks.pgd(model, x, y, 0.1, steps=10) for _ in range(n)],
        "passes": repeated(passes_to_the_input, device),
        "robust": lambda n: [attacks.ranks(model, x, y, config.epsilons) for _ in range(n)],
        "passes of robust": lambda n: [passes_of_robust_accuracy() for _ in range(n)],
        "lc": lambda n: [local_complexity.local_complexity(model, points, 0.05, directions) for _ in range(n)],
        "bare": repeated(bare_forward, device),
    }, device, repeats, seconds)
    pgd, robust, lc = times["pgd"], times["robust"], times["lc"]
    return [
        ["PGD-10, 1,000 images", range_text(pgd), f"{10 * len(x) / statistics.median(pgd):,.0f} images × iterations/s",
         "-", "-", f"{ratio(pgd, times['passes']) / 10:.2f} × forward and backward alone"],
        [f"robust_acc, 1,000 images, {len(config.epsilons)} ε", range_text(robust),
         f"{len(x) / statistics.median(robust):,.0f} images/s", "-", "-",
         f"{ratio(robust, times['passes of robust']):.2f} × its forward and backward passes alone"],
        ["local complexity, 3 × 1,024 points, P = 25", range_text(lc),
         f"{len(points) / statistics.median(lc):,.0f} points/s", "-", "-",
         f"{ratio(lc, times['bare']):.2f} × the vertices' forward passes alone"]]


def mnist_or_digits(data_dir):
    """Return the flags of MNIST if it lies in data_dir, else those of digits, which needs no files."""
    dataset = "mnist" if (Path(data_dir) / "MNIST" / "raw").is_dir() else "digits"
    return [f"--dataset={dataset}", f"--data_dir={Path(data_dir).resolve()}"]


def process_rows(data_dir, device):
    """Return the rows of a run as a process: its time from the command to the first table row, its peak memory."""
    flags = [*mnist_or_digits(data_dir), f"--device={device}", "--n_steps=50", "--log_points=3"]
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
    name = "MNIST MLP" if "--dataset=mnist" in flags else "digits MLP"
    return [[f"{name}: from the command to the end of the first log step", time_text(first), *["-"] * 4],
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
        config = configured([*MNIST, f"--train_size={n_train}", *flags], dataset, device)
        fastest_threads(config, dataset, device)
        dataset = run.resident(dataset, device)
        model = run.build_model(config, dataset)
        probes = measure.draw_probes(config, dataset)
        step = take_turns({"step": program_steps(config, dataset, device),
                           "products": matrix_products(config, dataset, device)}, device, repeats, seconds)
        log_step = []
        if device.type == "cuda":
            measure.measure(model, dataset, probes, config)  # the first call of each kernel loads it
        for _ in range(2):  # by itself: one of the widest network takes as long as thousands of steps
            start = time.perf_counter()
            measure.measure(model, dataset, probes, config)
            log_step.append(time.perf_counter() - start)
        rows.append([label, range_text(step["step"]), f"{ratio(step['step'], step['products']):.2f}",
                     range_text(log_step)])
    print_markdown(["MNIST MLP", "training step", "× its matrix products", "log step (untrained network)"], rows)


def experiment(data_dir, device):
    """Print the time of the whole MNIST experiment of 100,000 steps: all test images attacked at 60 log steps."""
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        subprocess.run([sys.executable, str(Path(__file__).with_name("train.py")), *MNIST, f"--data_dir={data_dir}",
                        "--n_steps=100000", "--adv_size=all", f"--device={device}", f"--log_dir={folder}",
                        f"--save_dir={folder}"], check=True)
    print(f"the whole experiment took {time.perf_counter() - start:.1f} s on {devices.describe(device)['device']}")


WORK = """
import json, sys, time, torch
torch.set_num_threads(int(sys.argv[1]))
torch.set_flush_denormal(True)
import attacks, local_complexity, models
torch.manual_seed(0)
model = models.build_model("mlp", (1, 28, 28), 10)
x, y = torch.rand(1000, 1, 28, 28), torch.randint(10, (1000,))
optimizer = torch.optim.AdamW(model.parameters(), lr=0.003)
for _ in range(200):
    optimizer.zero_grad()
    torch.nn.functional.cross_entropy(model(x), y).backward()
    optimizer.step()
directions = local_complexity.random_directions(25, 784)
work = {
    "PGD-10, 1,000 images": lambda: attacks.pgd(model, x, y, 0.1),
    "robust_acc, 1,000 images, 6 ε": lambda: attacks.robust_accuracy(model, x, y, [.03, .06, .1, .13, .16, .2]),
    "local complexity, 512 points": lambda: local_complexity.local_complexity(model, x[:512], 0.05, directions)}
times = {}
for name, function in work.items():
    function()
    start = time.perf_counter()
    function()
    times[name] = time.perf_counter() - start
print(json.dumps(times))
"""


def against(other, data_dir, repeats):
    """Print how this checkout compares with another one: both in turns, on one and on all threads."""
    checkouts, cores = {"other": Path(other), "here": Path(__file__).parent}, torch.get_num_threads()
    with tempfile.TemporaryDirectory() as folder:
        write_images(Path(folder))
        images = ["--dataset=imagefolder", f"--data_dir={folder}", "--batch_size=64"]
        steps = {"step of the MLP": [2000, "--model=mlp", *mnist_or_digits(data_dir), "--train_size=1000"],
                 "step of the CNN, batch 64": [40, "--model=cnn", *images],
                 "step of ResNet-18, batch 64": [40, "--model=resnet18", *images]}
        rows = [row for threads in sorted({1, cores}) for row in compared(checkouts, threads, steps, repeats)]
    print_markdown(["", "threads", "other", "here", "times as fast"], rows)


def compared(checkouts, threads, steps, repeats):
    """Return the rows of one number of threads: the two checkouts' times, in turns, and the turns' ratios."""
    times = {}
    for _ in range(repeats):
        for name, checkout in checkouts.items():
            for work, seconds in times_in(checkout, threads, steps).items():
                times.setdefault(work, {}).setdefault(name, []).append(seconds)
    rows = []
    for work, taken in times.items():
        ratios = [a / b for a, b in zip(taken["other"], taken["here"], strict=True)]
        rows.append([work, str(threads), range_text(taken["other"]), range_text(taken["here"]),
                     f"{statistics.median(ratios):.2f} ({min(ratios):.2f}–{max(ratios):.2f})"])
    return rows


def write_images(folder):
    """Write random colour images of CIFAR-10's size: enough to train on, few to measure on at a log step."""
    rng = np.random.default_rng(0)
    for split, images in (("train", 64), ("test", 2)):
        for label in range(10):
            (folder / split / str(label)).mkdir(parents=True)
            for i, pixels in enumerate(rng.integers(0, 256, (images, 32, 32, 3), dtype=np.uint8)):
                Image.fromarray(pixels).save(folder / split / str(label) / f"{i}.png")


def times_in(checkout, threads, steps):
    """Return {work: seconds} in one checkout: WORK, and training steps as its command line makes them."""
    command = [sys.executable, "-c", WORK, str(threads)]
    times = json.loads(subprocess.run(command, cwd=checkout, check=True, capture_output=True, text=True).stdout)
    for name, (n, *flags) in steps.items():
        with tempfile.TemporaryDirectory() as logs:
            subprocess.run([sys.executable, "train.py", *flags, f"--threads={threads}", "--device=cpu", "--no_plot",
                            f"--n_steps={n}", "--log_points=3", "--adv_size=1", "--lc_samples=0", "--epsilons=0.1",
                            f"--log_dir={logs}", f"--save_dir={logs}"], cwd=checkout, check=True, capture_output=True)
            history = json.loads((Path(logs) / "training_history.json").read_text())
        # The log steps are 0, 1 and n; that of step 1 is taken off the time of the last.
        first, second, last = history["seconds"]
        times[name] = (last - second - (second - first)) / (n - 2)
    return times


def main():
    parser = OneLineParser(prog="bench.py", description=__doc__.split("\n\n")[0])
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default auto)")
    parser.add_argument("--data_dir", default="data", help="where MNIST lies, for the rows that run train.py")
    parser.add_argument("--quick", action="store_true", help="fewer and shorter repeats: about a minute")
    parser.add_argument("--compile", action="store_true", help="rows for compiled networks, too")
    parser.add_argument("--scaling", action="store_true", help="how the cost grows, in place of the table")
    parser.add_argument("--experiment", action="store_true", help="the whole MNIST experiment, in place of the table")
    parser.add_argument("--against", metavar="DIR", help="this program against another checkout, in place of the table")
    args = parser.parse_args()
    try:
        device = devices.choose_device(args.device)
    except ValueError as error:
        parser.error(str(error))
    if args.against and not (Path(args.against) / "train.py").is_file():
        parser.error(f"--against={args.against}: there is no train.py")
    devices.set_precision()
    repeats, seconds = (3, 0.3) if args.quick else (7, 1.0)
    description = devices.describe(device)
    print(f"{description['device']}, torch {description['torch']}, {repeats} turns\n", file=sys.stderr)
    if args.scaling:
        scaling(device, repeats, seconds)
    elif args.experiment:
        experiment(args.data_dir, device)
    elif args.against:
        against(args.against, args.data_dir, repeats)
    else:
        timing = device, repeats, seconds
        compiled = [("compiled", ["--compile=on"])] if args.compile else []
        rows = step_rows("MNIST MLP", MNIST, (1, 28, 28), *timing, [("exact_ce", ["--loss=exact_ce"])])
        rows += step_rows("CNN", CNN, (3, 32, 32), *timing, compiled)
        rows += step_rows("ResNet-18", RESNET, (3, 32, 32), *timing, compiled)
        rows += instrument_rows(*timing) + process_rows(args.data_dir, device)
        print_markdown(["", "time", "rate", "× plain loop", "× eager", "against its limit"], rows)


if __name__ == "__main__":
    main()
