"""The data sets as tensors: each split is a uint8 tensor of images (N, C, H, W) and an int64 tensor of labels (N,).

A compute node often has no internet. Download and check the data beforehand, on a machine that has:

    python data.py mnist cifar10 --data_dir data

imagefolder is any folder with the layout {train,test or val}/CLASS/IMAGE, npz any file with arrays of images and
labels. To add a data set, add an entry to DATASETS.
"""

import hashlib
import operator
import os
import socket
import sys
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock
from PIL import Image, ImageOps
from torchvision import datasets
from torchvision.datasets.folder import IMG_EXTENSIONS, make_dataset
from tqdm import tqdm
from tqdm.contrib.concurrent import thread_map

from flags import IMPLIED, OneLineParser, number

DEFAULT_IMAGE_SIZE = 128
IMAGE_FORMATS = ("JPEG", "PNG", "PPM", "BMP", "TIFF", "WEBP")  # those of IMG_EXTENSIONS; EPS would start Ghostscript
IMAGENETTE_COUNTS = 9469, 3925  # training and test images
DOWNLOAD_TIMEOUT = 15  # seconds without an answer; a firewall that drops packets would hold a run for minutes
LARGEST_MODULUS = 500  # its pairs take 250 MB
SUBSET, LABEL_NOISE, SPLIT = range(3)  # what a random generator is for; it is seeded by (seed, purpose)
NPZ_NAMES = (("x_train", "y_train", "x_test", "y_test"),
             ("train_images", "train_labels", "test_images", "test_labels"))  # the second are MedMNIST's
Tensors = tuple  # x_train, y_train, x_test, y_test and the number of classes, as in Dataset


@dataclass
class Dataset:
    """x_*: uint8 (N, C, H, W); y_*: int64 (N,); mean, std: one float for each channel, in pixel units of [0, 1]."""

    name: str
    x_train: torch.Tensor
    y_train: torch.Tensor
    x_test: torch.Tensor
    y_test: torch.Tensor
    num_classes: int
    mean: list[float]
    std: list[float]


@dataclass(frozen=True)
class Source:
    """How to get a data set: an entry of DATASETS."""

    read: Callable[..., Tensors]  # called with name, data_dir and the options
    statistics: tuple = ()  # mean and std of the whole training split; if empty, they are computed
    options: tuple[str, ...] = ()  # which of image_size, modulus, train_fraction, seed it depends on
    mirror: bool = False  # whether a mirrored image is of the same class, which nobody knows of a user's own


def load_dataset(name: str, data_dir: str | Path = "data", train_size: int | str | None = None, seed: int = 42,
                 image_size: int | None = None, label_noise: float = 0.0, *, modulus: int | None = None,
                 train_fraction: float | None = None) -> Dataset:
    """Return a Dataset on the CPU; download it into data_dir if it is missing and can be downloaded.

    name: a key of DATASETS. data_dir: for imagefolder the folder that holds train/ and test/ (or val/), for npz the
    file. train_size: number of training images, or "all" (default: 1,000 for digits and the sets like MNIST, if they
    have as many; all for the others). For one seed a smaller draw is part of a larger one; the test set is always
    whole. image_size: side in pixels, for imagenette (default 128) and imagefolder: the shorter side is resized to it
    and the centre cut out. By default an imagefolder whose images all have one size keeps it, any other gets 128. An
    imagefolder without colour has one channel. label_noise: fraction of the selected training labels to replace by
    uniformly random ones (one in num_classes is right by chance). modulus, train_fraction: for modular_*, the p of
    (a + b) mod p (default 97) and the fraction of the p * p pairs to train on (default 0.5).

    The decoded images of a folder are cached in it, as decoded-SIZE.npz, if it can be written. The cache trusts
    everyone who can write to that folder.

    Raises ValueError for an unknown name, an option out of range or damaged files, and OSError if data are missing,
    unreadable or cannot be downloaded.
    """
    if not 0 <= label_noise <= 1:  # also refuses NaN
        raise ValueError(f"label_noise is a fraction between 0 and 1, not {label_noise}")
    dataset = read_dataset(name, data_dir, seed, image_size=image_size, modulus=modulus, train_fraction=train_fraction)
    available = len(dataset.x_train)
    implied = IMPLIED["train_size"].get(name, "all")  # 1,000 in the paper
    if train_size is None and implied != "all":
        train_size = min(implied, available)
    count = available if train_size in (None, "all") else int(train_size)
    if not 1 <= count <= available:
        raise ValueError(f"train_size must be from 1 to {available}, the training images of {name}, not {count}")
    if count < available:
        chosen = torch.from_numpy(np.random.default_rng((seed, SUBSET)).permutation(available)[:count])
        dataset.x_train, dataset.y_train = dataset.x_train[chosen], dataset.y_train[chosen]
    if label_noise > 0:
        rng = np.random.default_rng((seed, LABEL_NOISE))
        replaced = rng.permutation(count)[:round(label_noise * count)]
        dataset.y_train[replaced] = torch.from_numpy(rng.integers(dataset.num_classes, size=len(replaced)))
    return dataset


def from_config(config: Mapping[str, Any], data_dir: str | None = None) -> Dataset:
    """Return the data set that a run's config describes, from its own data_dir or another. Errors: load_dataset's."""
    return load_dataset(config["dataset"], data_dir or config["data_dir"], config["train_size"], config["seed"],
                        config["image_size"], config["label_noise"], modulus=config.get("modulus"),
                        train_fraction=config.get("train_fraction"))


def draw_shifts(seed: int, n: int, image_shape: Sequence[int], mirror: bool) -> torch.Tensor:
    """Return (n, 3): for each of n images its shift down and right in pixels, and whether it is mirrored, as half of
    them are if mirror is true."""
    generator = torch.Generator().manual_seed(seed)
    _channels, height, width = image_shape
    columns = [torch.randint(-(size // 8), size // 8 + 1, (n,), generator=generator) for size in (height, width)]
    mirrored = torch.randint(2, (n,), generator=generator) if mirror else torch.zeros(n, dtype=torch.int64)
    return torch.stack([*columns, mirrored], dim=1)


def augmented(images: torch.Tensor, shifts: torch.Tensor) -> torch.Tensor:
    """Return uint8 images (N, C, H, W) shifted and mirrored by `shifts` (N, 3); what moves in is black."""
    height, width = images.shape[2:]
    down, right, mirrored = shifts.unbind(1)
    rows = torch.arange(height, device=images.device) - down[:, None]
    columns = torch.arange(width, device=images.device) - right[:, None]
    inside = ((rows >= 0) & (rows < height))[:, :, None] & ((columns >= 0) & (columns < width))[:, None, :]
    columns = torch.where(mirrored[:, None] > 0, width - 1 - columns, columns).clamp(0, width - 1)
    n = torch.arange(len(images), device=images.device)[:, None, None]
    moved = images[n, :, rows.clamp(0, height - 1)[:, :, None], columns[:, None, :]]  # (N, H, W, C)
    return moved.movedim(3, 1) * inside[:, None]


def read_dataset(name: str, data_dir: str | Path, seed: int, **options: Any) -> Dataset:
    """Return the whole data set, without a subset or label noise. options: all that a Source may depend on."""
    if name not in DATASETS:
        raise ValueError(f"unknown data set '{name}': choose from {', '.join(DATASETS)}")
    source = DATASETS[name]
    given = {option: value for option, value in options.items() if value is not None}
    for option in given.keys() - set(source.options):
        raise ValueError(f"{option} is not for {name}")
    if "seed" in source.options:
        given["seed"] = seed
    path = os.path.expanduser(data_dir)
    x_train, y_train, x_test, y_test, num_classes = source.read(name, path, **given)
    labels = torch.cat([y_train, y_test])
    fitting = x_train.shape[1:] == x_test.shape[1:] and len(x_train) == len(y_train) and len(x_test) == len(y_test)
    if not fitting or labels.min() < 0 or labels.max() >= num_classes or not 2 <= num_classes <= len(labels):
        raise ValueError(f"{name} in {path} holds {tuple(x_train.shape)} for training with {len(y_train)} labels, "
                         f"{tuple(x_test.shape)} for test with {len(y_test)} labels, and labels from {labels.min()} to "
                         f"{labels.max()}: all images need the same shape and one label each, and there have to be at "
                         "least two classes, numbered from 0")
    mean, std = source.statistics or channel_statistics(x_train)
    return Dataset(name, x_train, y_train, x_test, y_test, num_classes, list(mean), list(std))


def channel_statistics(x: torch.Tensor) -> tuple[list[float], list[float]]:
    """Return mean and standard deviation of each channel of a uint8 tensor (N, C, H, W), in pixel units of [0, 1].

    A channel without contrast gets the deviation 1, since images are divided by it. The histogram saves a
    floating-point copy of the images.
    """
    values = torch.arange(256, dtype=torch.float64)
    means, stds = [], []
    for channel in x.unbind(1):
        weights = torch.bincount(channel.flatten(), minlength=256).double()
        mean = (weights @ values) / weights.sum()
        std = ((weights @ (values - mean) ** 2) / weights.sum()).sqrt()
        means.append(mean.item() / 255)
        stds.append(std.item() / 255 or 1.0)
    return means, stds


def pixels(images: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return uint8 images as values of dtype in [0, 1].

    This divides by a tensor on the images' device because a GPU multiplies by the rounded reciprocal of a Python
    number, which differs for 126 of the 256 values.
    """
    return images / torch.full((), 255, dtype=dtype, device=images.device)


def fingerprint(dataset: Dataset) -> str:
    """Return 16 hex digits that depend on the images, the labels, their shapes and their order."""
    digest = hashlib.sha256()
    for tensor in (dataset.x_train, dataset.y_train, dataset.x_test, dataset.y_test):
        digest.update(f"{tuple(tensor.shape)}".encode())
        digest.update(tensor.cpu().contiguous().numpy().data)
    return digest.hexdigest()[:16]


# ---- data sets that need no files -----------------------------------------------------------------------------------

def read_digits(name: str, data_dir: str) -> Tensors:
    from sklearn.datasets import load_digits  # slow to import, and only needed here

    digits = load_digits()
    x = torch.from_numpy(np.rint(digits.images * (255 / 16)).astype(np.uint8)).unsqueeze(1)
    y = torch.from_numpy(digits.target).long()
    # The split must not depend on the seed, nor ever change: NumPy promises to keep the numbers of RandomState.
    order = torch.from_numpy(np.random.RandomState(0).permutation(len(x)))
    train, test = order[:1000], order[1000:]
    return x[train], y[train], x[test], y[test], 10


def read_modular(operation: Callable, name: str, data_dir: str, seed: int, modulus: int = 97,
                 train_fraction: float = 0.5) -> Tensors:
    """Return all pairs (a, b) as one-hot rows, uint8 (1, 2, p), with the labels operation(a, b) mod p.

    This is the task of Power et al. 2022, arXiv:2201.02177.
    """
    if not 2 <= modulus <= LARGEST_MODULUS:
        raise ValueError(f"modulus must be from 2 to {LARGEST_MODULUS}, not {modulus}")
    pairs = modulus**2
    train = round(train_fraction * pairs)
    if not 0 < train < pairs:
        raise ValueError(f"train_fraction {train_fraction} leaves no pair to train or to test on, of {pairs} pairs")
    order = torch.from_numpy(np.random.default_rng((seed, SPLIT)).permutation(pairs))
    a, b = order // modulus, order % modulus
    x = (255 * torch.eye(modulus, dtype=torch.uint8))[torch.stack([a, b], 1)].unsqueeze(1)
    y = operation(a, b) % modulus
    return x[:train], y[:train], x[train:], y[train:], modulus


# ---- data sets that torchvision downloads ---------------------------------------------------------------------------

def fetch(name: str, dataset_class: Callable, data_dir: str, **options: Any) -> Any:
    """Return one of torchvision's data sets, downloaded if it is missing. OSError: that is not possible."""
    timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(DOWNLOAD_TIMEOUT)
    try:
        return dataset_class(data_dir, download=True, **options)
    except Exception as error:  # from urllib, http, tarfile, zlib, torchvision (RuntimeError), a full disk, ...
        raise OSError(f"cannot read or download {name} ({last_line(error)}): delete what {data_dir} holds of it, run "
                      f"`python data.py {name}` on a machine with internet and copy its data directory here; "
                      "--dataset=digits needs no download") from error
    finally:
        socket.setdefaulttimeout(timeout)


def last_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[-1] if lines else type(error).__name__


@contextmanager
def alone(data_dir: str) -> Iterator[None]:
    """Wait until no other process downloads into data_dir, such as another task of a SLURM array. Where a folder cannot
    be written or has no locks, do not wait."""
    with ExitStack() as held:
        with suppress(OSError, NotImplementedError):
            os.makedirs(data_dir, exist_ok=True)
            held.enter_context(FileLock(os.path.join(data_dir, ".download.lock")))
        yield


def read_torchvision(dataset_class: Callable, name: str, data_dir: str) -> Tensors:
    """Read MNIST, CIFAR or a data set that torchvision keeps in the same way."""
    tensors: list[torch.Tensor] = []
    for train in (True, False):
        with alone(data_dir):
            split = fetch(name, dataset_class, data_dir, train=train)
        images = torch.as_tensor(split.data)
        images = images.unsqueeze(1) if images.ndim == 3 else images.permute(0, 3, 1, 2).contiguous()
        tensors += [images, torch.as_tensor(split.targets)]
    return *tensors, len(split.classes)


def read_imagenette(name: str, data_dir: str, image_size: int = DEFAULT_IMAGE_SIZE) -> Tensors:
    root = os.path.join(data_dir, "imagenette2-160")
    with alone(data_dir):
        if not os.path.exists(root):
            fetch(name, datasets.Imagenette, data_dir, size="160px")
    counts = tuple(sum(map(len, scan(root, split).values())) for split in ("train", "val"))
    if counts != IMAGENETTE_COUNTS:
        raise ValueError(f"{root} holds {counts} training and test images, not {IMAGENETTE_COUNTS}, as after an "
                         f"interrupted extraction: delete it and run `python data.py {name}`")
    return read_folder(name, root, image_size)


# ---- arrays in a file -----------------------------------------------------------------------------------------------

def read_npz(name: str, path: str) -> Tensors:
    try:
        with np.load(path) as file:
            names = NPZ_NAMES[1] if "train_images" in file else NPZ_NAMES[0]
            arrays = [file[key] for key in names]
    except Exception as error:  # from the file system, zipfile, zlib, NumPy (a pickled array), ...
        raise OSError(f"cannot read {path} ({last_line(error)}): give with --data_dir a file that np.savez wrote, "
                      f"with {' or '.join(map(', '.join, NPZ_NAMES))}") from error
    tensors: list[torch.Tensor] = []
    for images, labels in (arrays[:2], arrays[2:]):
        if (images.dtype != np.uint8 or images.ndim not in (3, 4) or (images.ndim == 4 and images.shape[3] > 4)
                or labels.dtype.kind not in "iu" or not 0 < labels.size == len(images)):
            raise ValueError(f"{path} holds images of {images.dtype}, {images.shape}, with labels of {labels.dtype}, "
                             f"{labels.shape}: give images as uint8, (N, H, W) or (N, H, W, C) with 1 to 4 channels, "
                             "and labels as whole numbers from 0, (N,) or (N, 1)")
        images = np.ascontiguousarray(images[:, None] if images.ndim == 3 else images.transpose(0, 3, 1, 2))
        tensors += [torch.from_numpy(images), torch.from_numpy(labels.astype(np.int64).reshape(-1))]
    return *tensors, int(max(tensors[1].max(), tensors[3].max())) + 1


# ---- folders of images ----------------------------------------------------------------------------------------------

def read_folder(name: str, root: str, image_size: int | None = None) -> Tensors:
    """Decode root/train and root/test (or root/val), or take the decoded images from the cache."""
    splits = train, test = scan(root, "train"), scan(root, "test", "val")
    if train.keys() != test.keys():
        raise ValueError(f"the training and the test images in {root} have different classes: only one of the two has "
                         f"a folder {', '.join(sorted(train.keys() ^ test.keys()))}")
    paths = [[path for images in split.values() for path in images] for split in splits]
    y_train, y_test = (torch.tensor([label for label, images in enumerate(split.values()) for _ in images])
                       for split in splits)
    cache, key = os.path.join(root, f"decoded-{image_size or 'auto'}.npz"), cache_key(root, sum(paths, []), image_size)
    images = load_cache(cache, key)
    if images is None:
        sizes = {(image_size, image_size)} if image_size else {size_of(path) for path in sum(paths, [])}
        size = sizes.pop() if len(sizes) == 1 else (DEFAULT_IMAGE_SIZE, DEFAULT_IMAGE_SIZE)
        images = [decode(split, size) for split in paths]
        if all(np.array_equal(image[:1].repeat(3, 0), image) for split in images for image in split):
            images = [np.ascontiguousarray(split[:, :1]) for split in images]  # no colour
        save_cache(cache, fingerprint=key, x_train=images[0], x_test=images[1])
    x_train, x_test = map(torch.from_numpy, images)
    return x_train, y_train, x_test, y_test, len(train)


def scan(root: str, *names: str) -> dict[str, list[str]]:
    """Return {class: paths of its images} for the first of the folders `names` in root that has classes.

    The images and their order are those of torchvision's ImageFolder, except that hidden ones are left out, and what
    is in @eaDir and the like.
    """
    for folder in (os.path.join(root, name) for name in names):
        entries = os.scandir(folder) if os.path.isdir(folder) else ()
        kinds = sorted(entry.name for entry in entries if entry.is_dir() and entry.name[0] not in ".@")
        classes: dict[str, list[str]] = {name: [] for name in kinds}
        if classes:
            for path, label in make_dataset(folder, {name: i for i, name in enumerate(kinds)}, IMG_EXTENSIONS,
                                            allow_empty=True):
                if not any(part[0] in ".@" for part in Path(path).relative_to(folder).parts):
                    classes[kinds[label]].append(path)
            break
    empty = [name for name, images in classes.items() if not images]
    if empty or not classes:
        raise FileNotFoundError(f"no images in {os.path.join(folder, *empty[:1])}: the layout is train/CLASS/IMAGE and "
                                f"test/CLASS/IMAGE (or val/), with at least one image ({' '.join(IMG_EXTENSIONS)}) for "
                                "each class; give the folder that holds them with --data_dir")
    return classes


def cache_key(root: str, paths: list[str], image_size: int | None) -> str:
    """Return a key that depends on the size wanted and on the name and content of each file.

    Size and date would not do: archives and `cp -p` replace files by others of the same date.
    """
    digest = hashlib.sha256(f"3 {image_size}".encode())
    for path in paths:
        digest.update(os.fsencode(os.path.relpath(path, root)) + b"\0")
        digest.update(hashlib.sha256(Path(path).read_bytes()).digest())
    return digest.hexdigest()


def load_cache(path: str, key: str) -> list[np.ndarray] | None:
    """Return [x_train, x_test], or None if the cache is missing, damaged, or made for something else."""
    # Whatever is wrong with a cache, the images are still there. Damage shows: a zip file carries checksums.
    with suppress(Exception), np.load(path) as cache:
        if str(cache["fingerprint"]) == key:
            return [cache["x_train"], cache["x_test"]]
    return None


def save_cache(path: str, **arrays: Any) -> None:
    """Write the cache under another name, then rename it. A folder that cannot be written gets no cache."""
    temporary = Path(f"{path}.{uuid.uuid4().hex}.tmp")
    with suppress(OSError):
        try:
            with open(temporary, "xb") as file:
                np.savez(file, **arrays)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


@contextmanager
def opened(path: str) -> Iterator[Image.Image]:
    """Open an image. Turn whatever goes wrong with it into a ValueError that names it."""
    try:
        with Image.open(path, formats=IMAGE_FORMATS) as image:
            yield image
    except Exception as error:  # Pillow raises OSError, SyntaxError, struct.error and more for a damaged file
        raise ValueError(f"cannot read the image {path} ({last_line(error)}): replace or remove it") from error


def size_of(path: str) -> tuple[int, int]:
    with opened(path) as image:
        return image.size


def read_image(path: str, size: tuple[int, int]) -> np.ndarray:
    """Return the image as RGB, on white where it is transparent, uint8 (3, H, W): resized to cover size (width,
    height), then its centre."""
    with opened(path) as image:
        if image.mode[0] in "IF":  # Pillow would clip values above 255 to white
            raise ValueError("more than 8 bits per channel")
        if image.has_transparency_data:
            drawn = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", drawn.size, "white"), drawn)
        return np.asarray(ImageOps.fit(image.convert("RGB"), size, Image.Resampling.BILINEAR)).transpose(2, 0, 1)


def decode(paths: list[str], size: tuple[int, int]) -> np.ndarray:
    """Return uint8 (N, 3, height, width); size: (width, height)."""
    images = np.empty((len(paths), 3, size[1], size[0]), np.uint8)

    def work(i: int) -> None:
        images[i] = read_image(paths[i], size)

    # Threads, not processes: Pillow decodes without the interpreter lock, and forking is unsafe after CUDA.
    thread_map(work, range(len(paths)), tqdm_class=tqdm, desc="decoding", unit="image", delay=1, leave=False,
               disable=None if sys.stderr else True)  # None: unless it is a terminal
    return images


# ---- the registry ---------------------------------------------------------------------------------------------------

MODULAR: dict[str, Any] = dict(statistics=([0.0], [1.0]), options=("seed", "modulus", "train_fraction"))
DATASETS = {
    "mnist": Source(partial(read_torchvision, datasets.MNIST), ([0.1307], [0.3081])),
    "fashion_mnist": Source(partial(read_torchvision, datasets.FashionMNIST)),
    "kmnist": Source(partial(read_torchvision, datasets.KMNIST)),
    "cifar10": Source(partial(read_torchvision, datasets.CIFAR10), mirror=True,
                      statistics=([0.4914, 0.4822, 0.4465], [0.2470, 0.2435, 0.2616])),
    "cifar100": Source(partial(read_torchvision, datasets.CIFAR100), mirror=True,
                       statistics=([0.5071, 0.4865, 0.4409], [0.2673, 0.2564, 0.2762])),
    "imagenette": Source(read_imagenette, options=("image_size",), mirror=True,
                         statistics=([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])),
    "digits": Source(read_digits),
    "modular_addition": Source(partial(read_modular, operator.add), **MODULAR),
    "modular_subtraction": Source(partial(read_modular, operator.sub), **MODULAR),
    "modular_multiplication": Source(partial(read_modular, operator.mul), **MODULAR),
    "imagefolder": Source(read_folder, options=("image_size",)),
    "npz": Source(read_npz),
}


def main() -> None:
    parser = OneLineParser(prog="data.py", description="Download and check data sets without training.")
    parser.add_argument("names", nargs="+", choices=DATASETS, metavar="NAME",
                        help=f"one or more of {', '.join(DATASETS)}")
    parser.add_argument("--data_dir", default="data", help="where data sets are kept; for imagefolder, the folder that "
                        "holds train/ and test/ or val/; for npz, the file (default: data)")
    parser.add_argument("--image_size", type=number(int, low=1), help="decode and cache images at this size in pixels; "
                        "for imagenette and imagefolder (default: 128, or the images' own size if all have the same)")
    args = parser.parse_args()
    try:
        for name in args.names:
            dataset = load_dataset(name, args.data_dir, "all", image_size=args.image_size)
            print(f"{name}: {len(dataset.x_train):,} training and {len(dataset.x_test):,} test images, "
                  f"{'x'.join(map(str, dataset.x_train.shape[1:]))}, {dataset.num_classes} classes", flush=True)
    except (OSError, ValueError, MemoryError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
