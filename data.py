"""The data sets as tensors: each split is one uint8 tensor (N, C, H, W) and one int64 tensor of labels (N,).

A compute node often has no internet; fetch and check ahead of time, on a node that has:

    python data.py mnist cifar10 --data_dir data

mnist, cifar10, cifar100 and imagenette are downloaded and checked by torchvision, digits comes with scikit-learn, and
imagefolder is any folder of the layout {train,test or val}/CLASS/IMAGE. Another data set is one more entry in DATASETS.
"""

import argparse
import hashlib
import math
import os
import socket
import sys
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torchvision import datasets
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.datasets.utils import check_integrity
from tqdm import tqdm

DEFAULT_IMAGE_SIZE = 128
IMAGENETTE_COUNTS = {"train": 9469, "val": 3925}
DOWNLOAD_TIMEOUT = 15  # seconds without an answer; a firewall that drops packets would else hold a run for minutes
BLOCK = 64  # images a thread decodes at a time
SUBSET, LABEL_NOISE = range(2)  # what a random generator is for: generators are seeded by (seed, purpose)


@dataclass
class Dataset:
    """x_*: uint8 (N, C, H, W) in 0..255; y_*: int64 (N,); mean, std: one float a channel, in pixel units of [0, 1]."""

    name: str
    x_train: torch.Tensor
    y_train: torch.Tensor
    x_test: torch.Tensor
    y_test: torch.Tensor
    num_classes: int
    mean: list
    std: list


@dataclass
class Source:
    """What is known of a data set beforehand: one entry of DATASETS."""

    read: Callable  # (name, data_dir, image_size) -> x_train, y_train, x_test, y_test, num_classes
    statistics: tuple = ()  # mean and std of the whole training split; empty: they are computed
    train_size: int | None = None  # training images used where nobody says how many (the paper's 1,000); None: all
    archives: str = ""  # what to put by hand, where there is no internet, into data_dir/folder; torchvision takes an
    folder: str = ""  # archive that lies there for its own download, after checking its MD5
    resizable: bool = False  # whether image_size applies
    package: str = ""  # the package that it comes with, if it takes nothing from data_dir


def load_dataset(name, data_dir="data", train_size=None, seed=42, image_size=None, label_noise=0.0):
    """Return a Dataset on the CPU; download it into data_dir where it is missing and can be downloaded.

    name: one of DATASETS. For imagefolder, data_dir is the folder that holds train/ and test/ (or val/); digits needs
    no data_dir. train_size: so many training images, drawn at random by seed, or "all" (default: 1,000 for mnist and
    digits, or all if there are fewer; all for the rest); with one seed a smaller draw is part of a larger one. The test
    set is always whole and the same. image_size: side in pixels, for imagenette (default 128) and imagefolder: the
    shorter side is resized to it, then the centre cut out. Without it, an imagefolder whose images all have one size
    keeps that size; any other gets 128. label_noise: this fraction of the selected training labels is replaced by
    uniformly random ones (by seed; one in num_classes happens to be right). mean and std are those of the whole
    training split.

    Decoded folders are cached as decoded-SIZE.npz inside the folder of images, where that can be written.

    Raises ValueError for an unknown name, an option out of range and damaged files; OSError (FileNotFoundError,
    NotADirectoryError, PermissionError among them) for what is missing, unreadable or cannot be downloaded.
    """
    source = source_of(name)
    if train_size not in (None, "all") and train_size < 1:
        raise ValueError(f"train_size must be at least 1, not {train_size}")
    if seed < 0:
        raise ValueError(f"seed must not be negative, not {seed}")
    if not 0 <= label_noise <= 1:  # false for NaN, too
        raise ValueError(f"label_noise is a fraction between 0 and 1, not {label_noise}")

    dataset = read_dataset(name, data_dir, image_size)
    available = len(dataset.x_train)
    if train_size is None:
        train_size = min(source.train_size or available, available)
    if train_size == "all":
        train_size = available
    if train_size > available:
        raise ValueError(f"train_size {train_size} is more than the {available} training images of {name}")
    if train_size < available:
        chosen = torch.from_numpy(np.random.default_rng((seed, SUBSET)).permutation(available)[:train_size])
        dataset.x_train, dataset.y_train = dataset.x_train[chosen], dataset.y_train[chosen]
    if label_noise > 0:
        rng = np.random.default_rng((seed, LABEL_NOISE))
        replaced = rng.permutation(train_size)[:round(label_noise * train_size)]
        dataset.y_train[replaced] = torch.from_numpy(rng.integers(dataset.num_classes, size=len(replaced)))
    return dataset


def source_of(name):
    if name not in DATASETS:
        raise ValueError(f"unknown data set '{name}': choose from {', '.join(DATASETS)}")
    return DATASETS[name]


def read_dataset(name, data_dir="data", image_size=None):
    """Return the whole data set, before any subset or label noise. Arguments and errors as in load_dataset."""
    source = source_of(name)
    if image_size is not None and not source.resizable:
        resizable = " and ".join(other for other in DATASETS if DATASETS[other].resizable)
        raise ValueError(f"image_size is for {resizable} only; the images of {name} have a fixed size")
    if image_size is not None and image_size < 1:
        raise ValueError(f"image_size must be at least 1 pixel, not {image_size}")
    data_dir = os.path.expanduser(data_dir)
    if not source.package and os.path.lexists(data_dir):  # a link to nothing is there, too
        check_directory(data_dir)
    x_train, y_train, x_test, y_test, num_classes = source.read(name, data_dir, image_size)
    if x_train.shape[1:] != x_test.shape[1:]:
        raise ValueError(f"the training images of {name} are {shape_text(x_train)}, its test images "
                         f"{shape_text(x_test)}: files of two data sets are mixed in {data_dir}")
    mean, std = source.statistics or channel_statistics(x_train)
    return Dataset(name, x_train, y_train, x_test, y_test, num_classes, list(mean), list(std))


def check_directory(path):
    if not os.path.isdir(path):
        raise NotADirectoryError(f"{path} is not a directory: give the data directory with --data_dir")
    if not os.access(path, os.R_OK | os.X_OK):
        raise PermissionError(f"no permission to read {path}: change its mode or give another --data_dir")


def channel_statistics(x):
    """Mean and standard deviation of each channel of a uint8 tensor (N, C, H, W), in pixel units of [0, 1].

    A channel without any contrast gets 1 in place of 0, so that dividing by std is safe. Goes by the histogram: no
    copy of the images in floating point.
    """
    values = torch.arange(256, dtype=torch.float64)
    means, stds = [], []
    for channel in range(x.shape[1]):
        weights = torch.bincount(x[:, channel].flatten(), minlength=256).double()
        mean = (weights @ values) / weights.sum()
        std = ((weights @ (values - mean) ** 2) / weights.sum()).sqrt()
        means.append(mean.item() / 255)
        stds.append(std.item() / 255 or 1.0)
    return means, stds


def pixels(images, dtype):
    """Return uint8 images as values of dtype in [0, 1].

    A true division, by a tensor on the images' device: a GPU multiplies by the rounded reciprocal of a Python number,
    which differs in 126 of the 256 values.
    """
    return images / torch.full((), 255, dtype=dtype, device=images.device)


def fingerprint(dataset):
    """Return 16 hex digits that differ for data sets of other images, labels, sizes or order."""
    digest = hashlib.sha256()
    for tensor in (dataset.x_train, dataset.y_train, dataset.x_test, dataset.y_test):
        digest.update(f"{tuple(tensor.shape)}".encode())
        digest.update(tensor.cpu().contiguous().numpy())
    return digest.hexdigest()[:16]


def read_digits(name, data_dir, image_size):
    from sklearn.datasets import load_digits  # slow to import, and the other data sets do without it

    digits = load_digits()
    x = torch.from_numpy(np.rint(digits.images * (255 / 16)).astype(np.uint8)).unsqueeze(1)
    y = torch.from_numpy(digits.target).long()
    # One split for ever, whatever the seed. NumPy promises that RandomState's numbers never change.
    order = torch.from_numpy(np.random.RandomState(0).permutation(len(x)))
    train, test = order[:1000], order[1000:]
    return x[train], y[train], x[test], y[test], 10


def fetch(name, dataset_class, data_dir, **options):
    """Construct one of torchvision's data sets, downloading it where it is missing; leave no empty folder behind."""
    def folders():
        root = Path(data_dir)
        return {path for path in (root, *root.parents, *root.glob("*/"), *root.glob("*/*/")) if os.path.isdir(path)}

    before, timeout = folders(), socket.getdefaulttimeout()
    socket.setdefaulttimeout(DOWNLOAD_TIMEOUT)
    try:
        return dataset_class(data_dir, download=True, **options)
    except Exception as error:  # urllib's, http's, tarfile's, zlib's, torchvision's RuntimeError, a full disk, ...
        source = DATASETS[name]
        by_hand = f", or put {source.archives} into {os.path.join(data_dir, source.folder)}" if source.archives else ""
        raise OSError(f"cannot download {name} ({last_line(error)}): run `python data.py {name}` on a machine with "
                      f"internet and copy its data directory here{by_hand}; --dataset=digits needs no download"
                      ) from error
    finally:
        socket.setdefaulttimeout(timeout)
        for path in sorted(folders() - before, reverse=True):  # a folder comes after what is in it
            with suppress(OSError):  # not empty: the download stands, or parts of it that the next try can use
                path.rmdir()


def last_line(error):
    lines = str(error).strip().splitlines()
    return lines[-1] if lines else type(error).__name__


def read_mnist(dataset_class, name, data_dir, image_size):
    """Read MNIST, or a data set that torchvision keeps in the same files."""
    splits = []
    for train, prefix in ((True, "train"), (False, "t10k")):
        images, labels = (os.path.join(data_dir, dataset_class.__name__, "raw", f"{prefix}-{kind}-ubyte")
                          for kind in ("images-idx3", "labels-idx1"))
        check_idx(name, images, dimensions=3)
        check_idx(name, labels, dimensions=1)
        split = fetch(name, dataset_class, data_dir, train=train)
        x, y = split.data.unsqueeze(1), split.targets
        if len(x) != len(y):  # either may be the wrong one
            raise ValueError(f"{images} holds {len(x)} images and {labels} {len(y)} labels: {remedy('both', name)}")
        if y.max() > 9:
            raise ValueError(f"{labels} holds the label {y.max()}, not only 0 to 9: {remedy(labels, name)}")
        splits += [x, y]
    return *splits, 10


def check_idx(name, path, dimensions):
    """Raise ValueError unless the file, if there is one, is an idx file of unsigned bytes and as long as it says.

    torchvision checks the MD5 of what it downloads, but takes any file that already lies there. The format: big-endian
    int32 0x0800 + number of dimensions, one int32 for the length of each dimension, then the bytes.
    """
    if not os.path.isfile(path):
        return
    header = np.fromfile(path, ">u4", 1 + dimensions).tolist()
    if len(header) < 1 + dimensions:
        raise ValueError(f"{path} is cut off within its header: {remedy(path, name)}")
    magic = 0x0800 + dimensions
    if header[0] != magic:
        raise ValueError(f"{path} is no idx file of {dimensions}-dimensional bytes (it starts with 0x{header[0]:08x}, "
                         f"not 0x{magic:08x}): {remedy(path, name)}")
    expected, size = 4 * len(header) + math.prod(header[1:]), os.path.getsize(path)
    if size != expected or 0 in header:
        raise ValueError(f"{path} holds {size} bytes where its header promises {expected}: {remedy(path, name)}")


def remedy(path, name):
    return f"delete {path} and run `python data.py {name}` to download it again"


def read_cifar(dataset_class, name, data_dir, image_size):
    # torchvision answers a damaged file with a new download: without a network its error would hide what is wrong
    folder, meta = os.path.join(data_dir, dataset_class.base_folder), dataset_class.meta
    for file_name, md5 in [*dataset_class.train_list, *dataset_class.test_list, (meta["filename"], meta["md5"])]:
        path = os.path.join(folder, file_name)
        if os.path.isfile(path) and not check_integrity(path, md5):
            raise ValueError(f"{path} is truncated or damaged (wrong MD5): {remedy(folder, name)}")

    splits = []
    for train in (True, False):
        split = fetch(name, dataset_class, data_dir, train=train)
        splits += [torch.from_numpy(split.data).permute(0, 3, 1, 2).contiguous(), torch.tensor(split.targets)]
    return *splits, len(split.classes)


def read_imagenette(name, data_dir, image_size):
    root = os.path.join(data_dir, "imagenette2-160")
    if not os.path.exists(root):
        fetch(name, datasets.Imagenette, data_dir, size="160px")
    # torchvision takes the folder's being there for the whole data set, even after an interrupted extraction
    counts = {split: sum(1 for _ in Path(root, split).glob("*/*.JPEG")) for split in IMAGENETTE_COUNTS}
    if counts != IMAGENETTE_COUNTS:
        raise ValueError(
            f"{root} holds {counts['train']} training and {counts['val']} test images where Imagenette has "
            f"{IMAGENETTE_COUNTS['train']} and {IMAGENETTE_COUNTS['val']}, as after an interrupted extraction: "
            f"{remedy(root, name)}; to train on a part of it, --dataset=imagefolder --data_dir={root}"
        )
    return read_folder(name, root, image_size or DEFAULT_IMAGE_SIZE)


def read_folder(name, root, image_size):
    """Decode root/train and root/test (or root/val), or take the decoded images from the cache."""
    if not os.path.exists(root):
        raise FileNotFoundError(f"there is no folder {root}: give the folder that holds train/ and test/ as --data_dir")
    splits = scan(root, "train"), scan(root, "test", "val")
    differing = splits[0].keys() ^ splits[1].keys()
    if differing:
        raise ValueError(f"the training and the test images in {root} are of different classes: only one of the two "
                         f"has a folder {', '.join(sorted(differing)[:5])}{' ...' if len(differing) > 5 else ''}")
    paths = [[path for images in split.values() for path in images] for split in splits]
    y_train, y_test = (torch.tensor([label for label, images in enumerate(split.values()) for _ in images])
                       for split in splits)

    cache = os.path.join(root, f"decoded-{image_size or 'auto'}.npz")
    key = cache_key(root, paths[0] + paths[1], image_size)
    images = load_cache(cache, key)
    if images is None:
        images = decode_splits(*paths, image_size)
        save_cache(cache, fingerprint=key, x_train=images[0], x_test=images[1])
    x_train, x_test = map(torch.from_numpy, images)
    return x_train, y_train, x_test, y_test, len(splits[0])


def scan(root, *names):
    """Return {class: paths of its images} for the first of the folders `names` that root has, all sorted.

    The images and their order are those of torchvision's ImageFolder. It would go round and round by a link that leads
    back up, and pass over a folder that it may not read.
    """
    folder = next((path for path in (os.path.join(root, name) for name in names) if os.path.isdir(path)), None)
    if folder is None:
        raise FileNotFoundError(f"{root} has no folder {' or '.join(names)}/: the layout is train/CLASS/IMAGE and "
                                "test/CLASS/IMAGE (or val/)")
    check_directory(folder)
    paths = [os.path.join(folder, name) for name in sorted(os.listdir(folder))]
    folders = (path for path in paths if os.path.isdir(path) or not os.path.exists(path))  # none: a link to nothing
    classes = {path: find_images(path) for path in folders if not leads_back(path)}
    empty = [path for path, images in classes.items() if not images]
    if empty or not classes:
        raise FileNotFoundError(f"no images in {empty[0] if empty else folder}: the layout is {folder}/CLASS/IMAGE, "
                                f"with at least one image ({' '.join(IMG_EXTENSIONS)}) for each class")
    return {os.path.basename(path): images for path, images in classes.items()}


def find_images(folder):
    """Return the paths of all images below folder, and of links to nothing. OSError: a folder cannot be read."""
    def fail(error):
        raise error

    found = []
    for parent, folders, files in os.walk(folder, followlinks=True, onerror=fail):
        folders[:] = [name for name in folders if not leads_back(os.path.join(parent, name))]
        paths = (os.path.join(parent, name) for name in files)
        found += [path for path in paths if path.lower().endswith(IMG_EXTENSIONS) or not os.path.exists(path)]
    return sorted(found, key=os.path.split)


def leads_back(path):
    """Whether path is a link to a folder that holds, however deep, one of those on the way to the link itself."""
    if not os.path.islink(path):
        return False
    target = os.path.realpath(path)
    return any(Path(os.path.realpath(parent)).is_relative_to(target) for parent in Path(path).parents)


def cache_key(root, paths, image_size):
    """A key that changes with the size wanted and with any file's name, size or time of change."""
    digest, start = hashlib.sha256(f"1 {image_size}".encode()), os.path.join(root, "")  # root may end in a slash
    for path in paths:
        if not os.path.isfile(path):
            raise unreadable(path, "not a file, or a link to nothing")
        status = os.stat(path)
        digest.update(os.fsencode(f"\n/{path[len(start):]} {status.st_size} {status.st_mtime_ns}"))
    return digest.hexdigest()


def unreadable(path, reason):
    return ValueError(f"cannot read the image {path} ({reason}): replace or remove it")


def load_cache(path, key):
    """Return (x_train, x_test), or None if the cache is missing, made for something else, or damaged."""
    # Whatever is wrong with a cache, the images are still there. Damage shows: a zip file carries checksums.
    with suppress(Exception), np.load(path, allow_pickle=False) as cache:
        if str(cache["fingerprint"]) == key:
            return cache["x_train"], cache["x_test"]
    return None


def save_cache(path, **arrays):
    """Write the cache under another name, then rename it; a folder that cannot be written stays without."""
    temporary = f"{path}.{uuid.uuid4().hex}.tmp"
    try:
        with suppress(OSError):
            with open(temporary, "xb") as file:
                np.savez(file, **arrays)
            os.replace(temporary, path)
    finally:
        with suppress(OSError):
            os.unlink(temporary)


class SizesDiffer(Exception):
    """The images of a folder are not all of one size."""


def decode_splits(train_paths, test_paths, image_size):
    if image_size is None:
        height, width = read_image(train_paths[0]).shape[1:]
        with suppress(SizesDiffer):
            return [decode(paths, width, height, resize=False) for paths in (train_paths, test_paths)]
        image_size = DEFAULT_IMAGE_SIZE
    return [decode(paths, image_size, image_size, resize=True) for paths in (train_paths, test_paths)]


def decode(paths, width, height, resize):
    """Return uint8 (N, 3, height, width); an image of another size is resized or, without resize, SizesDiffer."""
    shape = (len(paths), 3, height, width)
    try:
        images = np.empty(shape, np.uint8)
    except (MemoryError, ValueError) as error:
        raise ValueError(f"{len(paths)} images of {width}x{height} pixels take {math.prod(shape) // 10**9:,} GB, "
                         "more than there is memory: choose a smaller image_size") from error

    def decode_block(start):
        block = paths[start:start + BLOCK]
        for i, path in enumerate(block, start):
            image = read_image(path, (width, height) if resize else None)
            if image.shape != images.shape[1:]:
                raise SizesDiffer
            images[i] = image
        return len(block)

    # Threads, not processes: Pillow decodes outside the interpreter lock, and a process forked beside CUDA is a risk.
    progress = tqdm(total=len(paths), desc="decoding", unit="image", delay=1, leave=False,
                    disable=None if sys.stderr else True)  # None: where standard error is no terminal
    with progress, ThreadPoolExecutor() as pool:
        for count in pool.map(decode_block, range(0, len(paths), BLOCK)):
            progress.update(count)
    return images


def read_image(path, size=None):
    """Return the RGB image as uint8 (3, H, W), fitted to size = (width, height) if given. ValueError names the file."""
    try:
        with Image.open(path) as image:
            if image.mode[0] in "IF":  # Pillow would clip all that is above 255 to white
                raise ValueError("more than 8 bits a channel")
            image = image.convert("RGB")
        if size is not None:
            image = ImageOps.fit(image, size, Image.Resampling.BILINEAR)
        return np.asarray(image).transpose(2, 0, 1)
    except Exception as error:  # Pillow raises OSError, SyntaxError, struct.error and more for a damaged file
        reason = "not an image" if isinstance(error, UnidentifiedImageError) else last_line(error)
        raise unreadable(path, reason) from error


def shape_text(x):
    return "x".join(map(str, x.shape[1:]))


DATASETS = {
    "mnist": Source(
        partial(read_mnist, datasets.MNIST), ([0.1307], [0.3081]), train_size=1000, folder="MNIST/raw",
        archives="train-images-idx3-ubyte.gz, train-labels-idx1-ubyte.gz, t10k-images-idx3-ubyte.gz and "
                 "t10k-labels-idx1-ubyte.gz from https://ossci-datasets.s3.amazonaws.com/mnist/"),
    "cifar10": Source(
        partial(read_cifar, datasets.CIFAR10), ([0.4914, 0.4822, 0.4465], [0.2470, 0.2435, 0.2616]),
        archives="cifar-10-python.tar.gz from https://www.cs.toronto.edu/~kriz/"),
    "cifar100": Source(
        partial(read_cifar, datasets.CIFAR100), ([0.5071, 0.4865, 0.4409], [0.2673, 0.2564, 0.2762]),
        archives="cifar-100-python.tar.gz from https://www.cs.toronto.edu/~kriz/"),
    "imagenette": Source(
        read_imagenette, ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]), resizable=True,
        archives="imagenette2-160.tgz from https://s3.amazonaws.com/fast-ai-imageclas/"),
    "digits": Source(read_digits, train_size=1000, package="scikit-learn"),
    "imagefolder": Source(read_folder, resizable=True),
}


def main():
    def fail(message, status=2):
        print(f"data.py: error: {message}", file=sys.stderr)
        sys.exit(status)

    parser = argparse.ArgumentParser(description="Fetch and check data sets without training.")
    parser.error = fail
    parser.add_argument("names", nargs="+", metavar="NAME", help=f"one or more of {', '.join(DATASETS)}")
    parser.add_argument("--data_dir", default="data", help="where data sets are kept; for imagefolder, the folder "
                        "that holds train/ and test/ or val/ (default: data)")
    parser.add_argument("--image_size", type=int, help="decode and cache images at this size in pixels; folders "
                        "of images only (default: 128, or the images' own size if they all have the same)")
    args = parser.parse_args()
    folder = os.path.abspath(os.path.expanduser(args.data_dir))
    with suppress(AttributeError):  # no standard output, or not a text stream of Python's
        sys.stdout.reconfigure(errors="backslashreplace")  # a path may hold what it cannot show
    try:
        for name, source in [(name, source_of(name)) for name in args.names]:
            dataset = read_dataset(name, args.data_dir, args.image_size)
            where = f"part of {source.package}" if source.package else folder
            print(f"{name}: {len(dataset.x_train):,} training and {len(dataset.x_test):,} test images, "
                  f"{shape_text(dataset.x_train)}, {dataset.num_classes} classes ({where})", flush=True)
    except (OSError, ValueError) as error:
        fail(error)
    except KeyboardInterrupt:
        fail("interrupted", status=130)


if __name__ == "__main__":
    main()
