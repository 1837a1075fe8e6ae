"""Watch for values that are not finite, without making the host wait for the device.

The step passes its losses and gradient norm to the guard before it changes anything. The guard records the first bad
ones on the device, and from then on nothing is updated. The host learns of it at the next log line or checkpoint.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from muse_fast.runtime.distributed import gather_over_ranks

Samples = Sequence[tuple[Tensor, Tensor]]
"""ROI ids and epochs of a step, by micro-batch."""


class NonFiniteError(RuntimeError):
    """A loss or the gradients were NaN or infinite. Weights, teacher and centres are as they were before that step.

    Attributes:
        step: the step, counted from 1.
        roi_ids: ROIs of that step on all ranks.
        epochs: the epoch of each ROI; with the seed and the ROI id it determines every random choice.
    """

    def __init__(self, step: int, terms: dict[str, float], roi_ids: list[int], epochs: list[int]) -> None:
        bad = [name for name, value in terms.items() if not abs(value) < float("inf")]
        super().__init__(
            f"step {step}: {' and '.join(bad)} not finite "
            f"({', '.join(f'{name} {value:g}' for name, value in terms.items())}) "
            f"on ROIs {roi_ids}; weights, teacher and centres have not changed"
        )
        self.step, self.roi_ids, self.epochs = step, roi_ids, epochs


class Guard:
    """Keeps the first values that were not finite.

    Attributes:
        found_inf: 0-dim float32 on the device, 1 from the first bad step on, which makes torch's fused optimisers do
            nothing.
    """

    def __init__(self, names: Sequence[str], device: torch.device) -> None:
        self.names = list(names)
        self.found_inf = torch.zeros((), device=device)
        self._record = torch.zeros(1 + len(self.names), dtype=torch.float64, device=device)  # step, then the terms
        self._seen: dict[int, Samples] = {}  # of the steps since the last check

    def look(self, step: int, terms: Sequence[Tensor], samples: Samples) -> None:
        """Record a step, and set `found_inf` unless it was finite."""
        values = torch.stack(list(terms)).detach()
        row = torch.cat([values.new_full((1,), step, dtype=torch.float64), values])
        self._record = torch.where(self.found_inf > 0, self._record, row)  # the newest, or the first bad one
        largest = torch.linalg.vector_norm(values, torch.inf)  # NaN if a value is
        self.found_inf.masked_fill_((largest < torch.inf).logical_not(), 1)
        # Not those in the memory of a loader's process, each of which would keep a file open until the check.
        self._seen[step] = [(_owned(roi_ids), _owned(epochs)) for roi_ids, epochs in samples]

    def check(self) -> None:
        """Read the device's record, for which the host waits.

        Raises:
            NonFiniteError: a step was not finite; names the first.
        """
        seen, self._seen = self._seen, {}
        if self.found_inf.item() == 0:
            return
        step, *terms = self._record.tolist()
        samples = torch.stack([torch.cat(part) for part in zip(*seen[int(step)], strict=True)])
        roi_ids, epochs = gather_over_ranks(samples.to(self.found_inf.device)).transpose(0, 1).flatten(1).tolist()
        raise NonFiniteError(int(step), dict(zip(self.names, terms, strict=True)), roi_ids, epochs)


def _owned(tensor: Tensor) -> Tensor:
    return tensor.clone() if tensor.is_cpu else tensor
