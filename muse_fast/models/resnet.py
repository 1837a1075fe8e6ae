"""ResNet-50 (He et al., 2016) as timm builds it, giving the same two things as the ViT encoder."""

from __future__ import annotations

from torch import Tensor, nn

from muse_fast.models.vit import check_images

WIDTHS = (256, 512, 1024, 2048)


class ResNetEncoder(nn.Module):
    """Four maps at strides 4, 8, 16 and 32, and their last one averaged.

    Args:
        drop_path: stochastic depth of the last residual block; it grows linearly from 0 at the first.
    """

    def __init__(self, drop_path: float = 0.0) -> None:
        super().__init__()
        import timm

        # zero_init_last would start every residual branch at zero, which neither DINO nor MUSE does.
        self.encoder = timm.create_model(
            "resnet50", features_only=True, out_indices=(1, 2, 3, 4), drop_path_rate=drop_path, zero_init_last=False
        )

    def forward(self, images: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """``[I, 3, R, R]`` -> image feature ``[I, 2048]``, maps of 256, 512, 1024, 2048 channels at strides 4..32."""
        check_images(images)
        maps = tuple(self.encoder(images))
        return maps[-1].mean(dim=(2, 3)), maps
