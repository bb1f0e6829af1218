"""Local complexity: how many units change sign near a point (Humayun et al., arXiv:2402.15555, Section 3, Figure 4).

The linear regions of a network meet where a pre-activation is zero, so the units that change sign among a few points
around x count the boundaries that pass near x.
"""

import warnings
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack, suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import activation
from torch.overrides import TorchFunctionMode

from models import ACTIVATIONS, Network, evaluating

# Of PyTorch's activation modules, those that do not act on each unit separately.
NOT_ELEMENTWISE = {"GLU", "LogSoftmax", "MultiheadAttention", "Softmax", "Softmax2d", "Softmin"}
TORCH_ACTIVATIONS = tuple(getattr(activation, name) for name in activation.__all__ if name not in NOT_ELEMENTWISE)
FUNCTIONS = {"relu", "relu_", "relu6", "leaky_relu", "gelu", "silu", "elu", "tanh", "sigmoid"}


class Counted(Exception):
    """Ends a forward pass where no layer is left to count."""


class FunctionalActivations(TorchFunctionMode):
    """Records in `called` which activation functions are called outside activation modules. module_input: the last
    input of an activation module, which calls such a function itself."""

    called: set[str] = set()
    module_input: Any = None

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(function, "__name__", "")
        if name in FUNCTIONS and not (args and args[0] is self.module_input):
            self.called = self.called | {name}
        return function(*args, **(kwargs or {}))


def random_directions(n_directions: int, n_features: int, seed: int = 0, dtype: torch.dtype = torch.float32,
                      device: torch.device | str | None = None) -> Tensor:
    """Return (n_directions, n_features): random orthonormal rows, the same on every device for the same seed.

    Raises ValueError if n_directions is below 1 or above n_features.
    """
    if not 1 <= n_directions <= n_features:
        raise ValueError(f"cannot draw {n_directions} orthonormal directions in {n_features} dimensions: "
                         f"choose between 1 and {n_features}")
    generator = torch.Generator().manual_seed(seed)
    gaussian = torch.randn(n_features, n_directions, generator=generator, dtype=torch.float64)
    return torch.linalg.qr(gaussian).Q.T.to(dtype).to(device).contiguous()


def layer_units(model: nn.Module, in_shape: Sequence[int]) -> dict[str, int]:
    """Return {name: units} in forward order: the layers of local complexity, which are the model's activation modules
    (PyTorch's, and those of models.ACTIVATIONS) that act on each unit separately.

    in_shape: (C, H, W). Warns if the model calls activations as functions, too: these are not counted. Raises
    ValueError if the model has no such module, uses one twice in a forward pass or is scripted, and if the rows at a
    module are not the images put in.
    """
    if any(isinstance(module, torch.jit.ScriptModule) for module in model.modules()):
        raise ValueError("local complexity cannot see the layers of a scripted model: pass the module it was made from")
    kinds = (*TORCH_ACTIVATIONS, *ACTIVATIONS.values())
    names = {module: name for name, module in model.named_modules() if isinstance(module, kinds)}
    units: dict[str, int] = {}
    functions = FunctionalActivations()

    def note(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        name = names[module]
        if name in units:
            raise ValueError(f"module '{name}' is used twice in a forward pass: give each use its own module")
        check_rows(name, args[0], 1)
        units[name] = args[0][0].numel()
        functions.module_input = args[0]

    with evaluating(model), torch.no_grad(), pre_hooks(names, note), functions:
        weights = (tensor for tensor in (*model.parameters(), *model.buffers()) if tensor.is_floating_point())
        model(next(weights, torch.zeros(())).new_zeros(1, *in_shape))
    if not units:
        raise ValueError("the model has no activation module, such as nn.ReLU: there is no layer to count")
    if functions.called:
        warnings.warn(f"the model calls {', '.join(sorted(functions.called))} as a function: local complexity counts "
                      "the units of activation modules only", stacklevel=2)
    return units


def local_complexity(model: nn.Module, x: Tensor, radius: float | Sequence[float], directions: Tensor,
                     batch_size: int | None = None) -> Tensor:
    """Count for each point and layer the units whose pre-activation changes sign among the 2P points x ± radius * v.

    A unit counts unless torch.sign of its pre-activation is the same at all 2P points (zero is a sign of its own).
    Where a pre-activation is not a number, the point's count of that layer is -1. The model is in eval mode, and
    autocast is off. The affine first part of a models.Network is computed at x and at the directions only, not at every
    vertex: that saves two thirds of an MLP's work on MNIST.

    x: (N, C, H, W), any range, in the model's dtype and on its device. radius: in the units of x, or a sequence of R
    of them. directions: (P, C*H*W), orthonormal rows. batch_size: the most network inputs held at once; it does not
    change the counts, and fewer are held where that is faster.
    Returns int64 (N, layers), or (R, N, layers) for a sequence of radii. layer_units gives the layers' names and sizes.

    Raises ValueError if a radius is not a positive number, the directions do not fit x or are not orthonormal, or
    layer_units does.
    """
    radii = torch.as_tensor(radius, dtype=torch.float64)
    with evaluating(model), torch.no_grad(), torch.autocast(x.device.type, enabled=False):
        check(x, radii, directions, batch_size)
        units = layer_units(model, x.shape[1:])
        layers = {model.get_submodule(name): name for name in units}
        if len(x) == 0:
            return torch.zeros(*radii.shape, 0, len(layers), dtype=torch.int64, device=x.device)
        # A GPU is fastest with large batches, 256 MB of the widest layer. A CPU is slow beyond its cache: 4 MB, and
        # for small layers, which are read again and again, no more than a matrix product needs to be fast.
        fastest = min(2**20 // max(units.values()), 1024) if x.is_cpu else 2**26 // max(units.values())
        batch_size = max(1, fastest if batch_size is None else min(batch_size, fastest))

        encode, decode = (model.encode, model.decode) if isinstance(model, Network) else (nn.Identity(), model)
        axes = directions.to(x).view(-1, *x.shape[1:])
        offsets = torch.cat([encode(part) for part in axes.split(batch_size)]) - encode(torch.zeros_like(axes[:1]))
        offsets = torch.cat([offsets, -offsets])
        counts = [torch.stack([sign_changes(decode, layers, centers, offsets, r, batch_size)
                               for r in radii.view(-1).tolist()])
                  for images in x.split(batch_size)
                  for centers in encode(images).split(max(1, batch_size // len(offsets)))]
    return torch.cat(counts, dim=1).view(*radii.shape, len(x), len(layers))


def sign_changes(decode: Callable[[Tensor], Any], layers: dict[nn.Module, str], centers: Tensor, offsets: Tensor,
                 radius: float, batch_size: int) -> Tensor:
    """Return int64 (N, layers): the units that change sign among the vertices centers[n] + radius * offsets[k]."""
    extremes: dict[nn.Module, tuple[Tensor, Tensor]] = {}  # the lowest and the highest pre-activations
    last, rows = list(layers)[-1], 0

    def watch(layer: nn.Module, args: tuple[Tensor, ...]) -> None:
        check_rows(layers[layer], args[0], rows)
        # A reduction is fast over what lies in memory as its shape says; a convolution may put the channels last.
        z = args[0] if args[0].is_contiguous() else args[0].movedim(1, -1)
        z = z.unflatten(0, (-1, len(centers)))
        low, high = z.amin(0), z.amax(0)
        if layer in extremes:
            low, high = torch.minimum(extremes[layer][0], low), torch.maximum(extremes[layer][1], high)
        extremes[layer] = low, high
        if layer is last:
            raise Counted

    with pre_hooks(layers, watch):
        for part in offsets.split(max(1, batch_size // len(centers))):
            rows = len(part) * len(centers)
            with suppress(Counted):
                decode(torch.add(centers, part.unsqueeze(1), alpha=radius).flatten(0, 1))
    # sign is monotone: the same at every vertex if it is the same at the lowest and the highest pre-activation
    return torch.stack([(low.sign() != high.sign()).flatten(1).sum(1).masked_fill(low.isnan().flatten(1).any(1), -1)
                        for low, high in extremes.values()], dim=1)


def check_rows(name: str, z: Tensor, rows: int) -> None:
    if len(z) != rows:
        raise ValueError(f"module '{name}' receives {len(z)} rows for {rows} images: local complexity needs "
                         "one row for each image, with no dimension folded into the batch")


def check(x: Tensor, radii: Tensor, directions: Tensor, batch_size: int | None) -> None:
    if radii.dim() > 1 or radii.numel() == 0 or not ((radii > 0) & radii.isfinite()).all():
        raise ValueError(f"radius must be a positive number or a sequence of them, not {radii.tolist()}")
    if not x.is_floating_point():
        raise ValueError(f"x must be floating point images as the model takes them, not {x.dtype}")
    features = x.shape[1:].numel()
    if directions.dim() != 2 or len(directions) == 0 or directions.shape[1] != features:
        raise ValueError(f"directions must have shape (P, {features}) for images of shape {tuple(x.shape[1:])}, "
                         f"not {tuple(directions.shape)}")
    identity = torch.eye(len(directions), dtype=directions.dtype, device=directions.device)
    if not torch.allclose(directions @ directions.T, identity, atol=1e-3):
        raise ValueError("the rows of directions must be orthonormal: random_directions draws such rows")
    if batch_size is not None and batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, not {batch_size}")


def pre_hooks(modules: Iterable[nn.Module], hook: Callable[..., None]) -> ExitStack:
    """Return a context in which hook(module, args) runs before the forward pass of each of the modules."""
    hooks = ExitStack()
    for module in modules:
        hooks.enter_context(module.register_forward_pre_hook(hook))
    return hooks
