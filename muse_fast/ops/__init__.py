"""The operations of MUSE that torch lacks or splits, each with a plain PyTorch reference and faster backends."""

from muse_fast.ops.add_layer_norm import add_layer_norm
from muse_fast.ops.augment_views import augment_views
from muse_fast.ops.batch_norm import batch_norm
from muse_fast.ops.dino_loss import dino_loss
from muse_fast.ops.gelu import gelu
from muse_fast.ops.join_heads import join_heads
from muse_fast.ops.linear_dino_loss import linear_dino_loss
from muse_fast.ops.match_nuclei import match_nuclei
from muse_fast.ops.projection_stats import projection_stats
from muse_fast.ops.resize_concat import resize_concat
from muse_fast.ops.sample_nuclei import sample_nuclei

__all__ = [
    "add_layer_norm",
    "augment_views",
    "batch_norm",
    "dino_loss",
    "gelu",
    "join_heads",
    "linear_dino_loss",
    "match_nuclei",
    "projection_stats",
    "resize_concat",
    "sample_nuclei",
]
