"""ImageNet's mean and standard deviation, by which images are normalised for every encoder."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from muse_fast.errors import UserError
from muse_fast.runtime.kept import kept

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
WHITE = max((1 - mean) / std for mean, std in zip(IMAGENET_MEAN, IMAGENET_STD, strict=True))  # the largest value, 2.64


@kept
def _statistics(device: torch.device) -> tuple[Tensor, ...]:
    """Mean, standard deviation, and the gain and offset that normalise levels of 0 to 255, each ``[3, 1, 1]``."""
    mean, std = (torch.tensor(values, device=device).view(3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
    return mean, std, 1 / (255 * std), -mean / std


def normalise(views: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """uint8 ``[..., 3, R, R]`` -> ``dtype``, normalised in float32 with ImageNet's mean and standard deviation."""
    mean, std, gain, offset = _statistics(views.device)
    if views.is_cuda:  # in one pass
        return torch.addcmul(offset, views, gain, out=torch.empty_like(views, dtype=dtype))
    return ((views.float() / 255 - mean) / std).to(dtype)


def denormalise(views: Tensor) -> Tensor:
    """The inverse of :func:`normalise`, to uint8."""
    mean, std, *_ = _statistics(views.device)
    return ((views.float() * std + mean) * 255).round().clamp(0, 255).to(torch.uint8)


def normalised(images: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Images ``[..., 3, R, R]`` as a network takes them: uint8 are normalised, to ``dtype``; floats are so already.

    Raises:
        UserError: images of another dtype.
    """
    if images.dtype != torch.uint8 and not images.is_floating_point():
        raise UserError(f"images are {images.dtype}; expected uint8 RGB, or floats normalised by ImageNet's statistics")
    return normalise(images, dtype) if images.dtype == torch.uint8 else images


class Normaliser:
    """`normalised` for the callers of one network, with a warning if their floats look unnormalised.

    Only the first images are looked at, as that makes the host wait for the device.
    """

    def __init__(self) -> None:
        self._looked = False

    def __call__(self, images: Tensor) -> Tensor:
        if images.is_floating_point() and images.numel() and not self._looked:
            self._looked = True
            low, high = (float(value) for value in images.detach().aminmax())
            # A normalised image with all values in 0..1 would be nearly one grey; beyond white there are none.
            if low >= 0 and (high <= 1 or WHITE + 0.01 < high <= 255):
                warnings.warn(
                    f"the values of these images lie within {low:g}..{high:g}, as if not normalised; pass uint8 RGB, "
                    "or floats / 255 from which ImageNet's mean was subtracted, divided by its standard deviation",
                    stacklevel=3,
                )
        return normalised(images)
