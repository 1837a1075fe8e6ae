"""Offsets in the fine-tuning step: units of their gradient, what the step reports of them, and that they are learnt."""

import numpy as np
import pytest
import torch
from torch import Tensor

from muse_fast.detection.config import FinetuneConfig
from muse_fast.detection.detector import grid
from muse_fast.detection.finetuner import Finetuner
from muse_fast.detection.run import new_detector
from muse_fast.detection.samples import ANNOTATED, UNLABELLED, LfovBatch
from muse_fast.runtime.options import load_settings
from tests.support.repeated import repeated_graphs

pytestmark = pytest.mark.usefixtures("thin")
SIDE, STRIDE = 64, 8


def tuner(*settings: str) -> Finetuner:
    fixed = [f"data.sample_size={SIDE}", "detector.hidden_dim=16", "train.precision=fp32", "loss.lambda_cons=0"]
    config = load_settings(FinetuneConfig, None, [*fixed, *settings])
    return Finetuner(config, new_detector(config, ("nucleus",), "random:vit_tiny", None, None), torch.device("cpu"), 4)


def batch(offset: tuple[float, float], every: int = 1) -> LfovBatch:
    """One random image, with a nucleus at ``offset`` from each proposal whose number is a multiple of ``every``."""
    xy = grid(SIDE, STRIDE)[::every] + torch.tensor(offset)
    image = torch.randint(0, 256, (1, 3, SIDE, SIDE), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return LfovBatch(
        plain=image,
        images=image,
        places=torch.full((1, SIDE, SIDE), ANNOTATED, dtype=torch.uint8),
        xy=xy,
        label=torch.zeros(len(xy), dtype=torch.int64),
        counts=torch.tensor([len(xy)]),
        image_ids=torch.zeros(1, dtype=torch.int64),
        epochs=torch.zeros(1, dtype=torch.int64),
    )


def test_the_gradient_of_the_offsets_is_in_strides() -> None:
    """The head predicts in strides, the loss is in pixels squared: 2 * lambda * stride * (point - nucleus) / M."""
    one, sample, outputs = tuner("loss.lambda_reg=0.3", "loss.lambda_type=0"), batch((3.0, -1.5), every=9), []

    def keep(_: torch.nn.Module, __: tuple[Tensor, ...], output: Tensor) -> None:
        output.retain_grad()
        outputs.append(output)

    one.detector.reg_head.register_forward_hook(keep)
    values = one.train_step(sample)
    matched = len(sample.xy)
    assert matched == 8  # of 64 proposals, whose predicted points are still the proposals
    expected = torch.zeros(64, 2)
    expected[::9] = 2 * 0.3 * STRIDE * torch.tensor([-3.0, 1.5]) / matched
    torch.testing.assert_close(outputs[0].grad, expected, rtol=1e-5, atol=1e-7)
    assert float(values["loss_reg"]) == pytest.approx(3.0**2 + 1.5**2)
    assert float(values["distance"]) == float(values["distance_of_proposals"]) == pytest.approx(11.25**0.5)


def test_a_constant_offset_is_learnt() -> None:
    offset = (3.0, -2.0)
    one, sample = tuner("optim.lr=5e-3", "optim.min_lr=1e-5", "optim.epochs=60"), batch(offset)
    values = [one.train_step(sample) for _ in range(one.steps)]
    away = np.hypot(*offset)
    assert one.steps == 60
    assert float(values[0]["distance"]) == pytest.approx(away)
    assert float(values[-1]["distance"]) < 0.05 * away
    assert all(float(row["distance_of_proposals"]) == pytest.approx(away) for row in values)


@pytest.mark.parametrize("micro_batches", [1, 2])
def test_steps_that_replay_cuda_graphs_are_bit_identical(micro_batches: int) -> None:
    """Also those of the plain samples, which are seen from the second epoch on."""
    sample = batch((3.0, -1.5), every=9)
    sample.places[:, :, SIDE // 2 :] = UNLABELLED
    sizes = f"optim.batch_size={micro_batches}", f"optim.accumulate={micro_batches}", "optim.epochs=8"

    def run(on: bool) -> tuple[list[Tensor], Finetuner]:
        with repeated_graphs():
            one = tuner("loss.lambda_cons=0.5", "loss.confidence=0.1", *sizes, f"train.cuda_graph={on}".lower())
        found = [value for _ in range(8) for value in one.train_step(*[sample] * micro_batches).values()]
        return [*map(torch.as_tensor, found), *one.detector.state_dict().values()], one

    (expected, _), (got, replaying) = run(False), run(True)
    assert all(torch.equal(a, b) for a, b in zip(expected, got, strict=True))
    assert replaying.detector_forward.is_recorded and replaying.plain_forward.is_recorded
