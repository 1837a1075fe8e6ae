"""Encoder, decoder and heads of MUSE, and loading of their weights."""

from muse_fast.models.archs import ARCHS
from muse_fast.models.backbone import Backbone, Features, build_backbone
from muse_fast.models.heads import DINOHead
from muse_fast.models.weights import load_backbone

__all__ = ["ARCHS", "Backbone", "DINOHead", "Features", "build_backbone", "load_backbone"]
