"""Schedules against closed forms."""

import math

import pytest

from muse_fast.config import load_config
from muse_fast.errors import UserError
from muse_fast.training.schedules import cosine, in_steps, linear, schedule_at, warmup_cosine


def test_cosine_at_its_ends_and_middle() -> None:
    assert cosine(1.0, 0.2, 0, 101) == 1.0
    assert cosine(1.0, 0.2, 50, 101) == pytest.approx(0.6, abs=1e-15)
    assert cosine(1.0, 0.2, 25, 101) == pytest.approx(0.2 + 0.8 * (1 + math.sqrt(0.5)) / 2, abs=1e-15)
    assert cosine(1.0, 0.2, 100, 101) == cosine(1.0, 0.2, 999, 101) == 0.2


def test_linear_and_its_end() -> None:
    assert [linear(0.04, 0.05, s, 10) for s in (0, 5, 10, 99)] == pytest.approx([0.04, 0.045, 0.05, 0.05], abs=1e-15)
    assert linear(0.04, 0.05, 0, 0) == 0.05


def test_warmup_meets_the_cosine() -> None:
    values = [warmup_cosine(1.0, 0.0, s, 110, 10) for s in range(110)]
    assert values[0] == pytest.approx(0.1)
    assert values[9] == values[10] == 1.0
    assert values[109] == 0.0
    assert values[10:] == sorted(values[10:], reverse=True)


def test_the_paper_recipe() -> None:
    """Appendix B: 132,000 steps, warm-up 9,400, lr 1e-3, temperature 0.04 to 0.05; DINO's decay and EMA."""
    config = load_config(None)
    first, warm, last = (schedule_at(s, config) for s in (0, 9_400, 131_999))
    assert first.lr == pytest.approx(1e-3 / 9_400)
    assert warm.lr == 1e-3
    assert last.lr == pytest.approx(1e-6, rel=1e-12)
    assert (first.weight_decay, last.weight_decay) == pytest.approx((0.04, 0.4))
    assert (first.teacher_temp, last.teacher_temp) == (0.04, 0.05)
    assert (first.ema_momentum, last.ema_momentum) == pytest.approx((0.996, 1.0))
    assert not schedule_at(1_888, config).train_prototypes and schedule_at(1_889, config).train_prototypes
    middle = schedule_at(66_000, config).ema_momentum
    assert middle == pytest.approx(1 - 0.004 * (1 + math.cos(math.pi * 66_000 / 131_999)) / 2, rel=1e-14)


@pytest.mark.parametrize(
    ("batch", "accumulate", "peak"), [(256, 1, 1e-3), (64, 1, 2.5e-4), (1024, 4, 4e-3), (1, 1, 1e-3 / 256)]
)
def test_the_learning_rate_is_scaled_by_the_batch(batch: int, accumulate: int, peak: float) -> None:
    """DINO: lr * batch_size_per_gpu * world_size / 256; min_lr stays."""
    settings = ["optim.base_batch=256", f"optim.batch_size={batch}", f"optim.accumulate={accumulate}"]
    config, unscaled = load_config(None, settings), load_config(None, settings[1:])
    assert schedule_at(9_400, config).lr == pytest.approx(peak, rel=1e-14)
    assert schedule_at(0, config).lr == pytest.approx(peak / 9_400, rel=1e-14)
    assert schedule_at(131_999, config).lr == pytest.approx(1e-6, rel=1e-12)
    assert schedule_at(9_400, unscaled).lr == 1e-3


def test_a_scaled_rate_below_the_minimum_is_refused() -> None:
    said = r"optim\.min_lr=1e-06: expected at most lr=0\.0001 \* batch_size / base_batch = 3\.90625e-07"
    with pytest.raises(UserError, match=said):
        load_config(None, ["optim.base_batch=256", "optim.batch_size=1", "optim.lr=1e-4"])
    load_config(None, ["optim.batch_size=1", "optim.lr=1e-4"])


def test_the_warm_up_of_the_teachers_temperature_in_epochs() -> None:
    """30 epochs of the paper's 483,627 ROIs in batches of 256 are 56,675 steps; without epochs, steps count."""
    config = load_config(None, ["loss.teacher_temp_epochs=30"])
    with pytest.raises(ValueError, match="teacher_temp_epochs is set"):
        schedule_at(0, config)
    converted = in_steps(config, 483_627)
    assert (converted.loss.teacher_temp_steps, converted.loss.teacher_temp_epochs) == (56_675, None)
    assert schedule_at(56_674, converted).teacher_temp < schedule_at(56_675, converted).teacher_temp == 0.05
    assert in_steps(converted, 10) == converted
    assert in_steps(load_config(None, ["loss.teacher_temp_epochs=0"]), 10).loss.teacher_temp_steps == 0


def test_a_run_of_one_step() -> None:
    assert cosine(3.0, 1.0, 0, 1) == 3.0
