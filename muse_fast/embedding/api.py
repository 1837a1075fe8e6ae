"""`embed_slide`: the vectors of one slide's nuclei, in memory."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from muse_fast.embedding import files
from muse_fast.embedding.encoders import Weights, open_weights
from muse_fast.embedding.nuclei import Given
from muse_fast.embedding.parts import Parts
from muse_fast.embedding.run import EmbedConfig, describe_page, job_of, open_page
from muse_fast.errors import UserError
from muse_fast.models.backbone import Backbone
from muse_fast.models.timm.backbone import TimmBackbone
from muse_fast.predicting.pages import find_pages
from muse_fast.runtime.device import pick_device
from muse_fast.runtime.options import load_settings

if TYPE_CHECKING:
    from anndata import AnnData


def embed_slide(
    path: str | Path,
    model: str | Path | Backbone | TimmBackbone,
    nuclei: str | Path | NDArray[Any] | None = None,
    **settings: Any,
) -> AnnData:
    """One vector per nucleus of a slide or image, as ``python -m muse_fast.embed`` writes them.

    Args:
        path: of the slide.
        model: weights, as for ``--weights``, or a network that is loaded.
        nuclei: positions ``[n, 2]`` in level-0 pixels, or as for ``nuclei=``.
        settings: of ``python -m muse_fast.embed``, such as ``mpp=0.5``, ``window=512`` or ``device="cuda"``.

    Returns:
        An AnnData with the contents that docs/embed.md describes.

    Raises:
        UserError: something cannot be used; the message says what.
    """
    given = None if nuclei is None or isinstance(nuclei, str | Path) else np.asarray(nuclei, np.float64)
    named = {} if nuclei is None or given is not None else {"nuclei": str(nuclei)}
    config = load_settings(EmbedConfig, None, {**settings, **named})
    files.need_libraries()
    side = config.size if config.protocol == "crop" else config.window
    if isinstance(model, str | Path):
        weights = open_weights(str(model), None, None, side)
    else:
        made_for = model.side if isinstance(model, TimmBackbone) else model.image_size
        weights = Weights(model.arch, "", None, side or made_for, model)
    job = job_of(weights, config, pick_device(config.device, "device"), None if given is None else Given(given))
    (file, *others), _ = find_pages([Path(path)], config.mpp)
    if others:
        raise UserError(f"{path} contains {len(others) + 1} slides and images; expected the path of one")
    with TemporaryDirectory() as folder:
        parts = Parts(Path(folder) / "parts", {})
        with open_page(job, file, parts, _silent) as page:
            page.run(parts, batch=job.batch, readers=job.readers, progress=_silent)
            return files.in_memory(describe_page(job, file, page, parts), config.dtype)


def _silent(done: int, total: int | None, unit: str) -> None:
    """Show no progress."""
