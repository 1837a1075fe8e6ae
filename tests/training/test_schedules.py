"""Schedules against closed forms."""

import math

import pytest

from muse_fast.config import load_config
from muse_fast.training.schedules import cosine, linear, schedule_at, warmup_cosine


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


def test_a_run_of_one_step() -> None:
    assert cosine(3.0, 1.0, 0, 1) == 3.0
