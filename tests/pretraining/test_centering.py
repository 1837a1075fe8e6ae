import pytest
import torch

from muse_fast.pretraining.centering import sinkhorn_center, update_centers
from tests.support.ranks import NoHostWait, Ranks


@pytest.mark.parametrize(("rows", "prototypes"), [(64, 16), (5, 16), (1, 8), (33, 7)])
def test_sinkhorn_center_gives_the_assignment_of_sinkhorn_knopp(rows: int, prototypes: int) -> None:
    """Compare with the published form (SwAV): scale prototypes to equal use, then samples to one, three times."""
    torch.manual_seed(0)
    logits, temp = torch.randn(rows, prototypes, dtype=torch.float64).clamp(-1, 1), 0.05
    q = torch.exp(logits / temp)
    q /= q.sum()
    for _ in range(3):
        q /= q.sum(dim=0, keepdim=True) * prototypes
        q /= q.sum(dim=1, keepdim=True) * rows
    q *= rows
    center = sinkhorn_center(logits, temp).double()
    torch.testing.assert_close(((logits - center) / temp).softmax(dim=1), q, rtol=1e-4, atol=1e-6)


def test_sinkhorn_evens_out_the_use_of_prototypes() -> None:
    torch.manual_seed(0)
    logits = torch.randn(512, 32) * 0.1 + torch.linspace(-0.5, 0.5, 32)  # some prototypes dominate
    use = ((logits - sinkhorn_center(logits, 0.05, iterations=50)) / 0.05).softmax(dim=1).mean(dim=0)
    torch.testing.assert_close(use, torch.full((32,), 1 / 32), rtol=0.01, atol=0)


def test_sinkhorn_does_not_overflow_and_accepts_no_rows() -> None:
    assert torch.isfinite(sinkhorn_center(torch.randn(10, 6) * 1e4, 0.01)).all()
    assert torch.equal(sinkhorn_center(torch.empty(0, 6), 0.05), torch.zeros(6))


@pytest.mark.parametrize("cut", [5, 0, 12])
def test_sinkhorn_of_two_ranks_is_that_of_all_rows(two_ranks: Ranks, cut: int) -> None:
    logits = torch.rand(12, 7, dtype=torch.float64) * 2 - 1
    centers = two_ranks(sinkhorn_center, [(logits[:cut], 0.05), (logits[cut:], 0.05)])
    assert torch.equal(*centers)
    torch.testing.assert_close(centers[0], sinkhorn_center(logits, 0.05), rtol=1e-12, atol=1e-12)


def test_sinkhorn_without_rows_on_any_rank(two_ranks: Ranks) -> None:
    centers = two_ranks(sinkhorn_center, [(torch.empty(0, 6), 0.05)] * 2)
    assert all(torch.equal(center, torch.zeros(6)) for center in centers)


def test_sinkhorn_does_not_make_the_host_wait() -> None:
    with NoHostWait():
        sinkhorn_center(torch.randn(9, 6), 0.05)


def test_ema_centers_follow_the_mean_logits() -> None:
    torch.manual_seed(0)
    zs = [torch.randn(rows, 5, dtype=torch.float64) for rows in (20, 1)]
    ws = [torch.randn(9, 5, dtype=torch.float64) for _ in zs]
    centers = [torch.randn(9) for _ in zs]
    expected = [0.9 * c.double() + 0.1 * (z @ w.T).mean(dim=0) for c, z, w in zip(centers, zs, ws, strict=True)]
    sums, counts = torch.stack([z.sum(dim=0) for z in zs]), torch.tensor([20.0, 1.0])
    update_centers(centers, sums, counts, [w.float() for w in ws], 0.9, torch.tensor(0.0))
    for center, value in zip(centers, expected, strict=True):
        torch.testing.assert_close(center.double(), value, rtol=1e-5, atol=1e-6)


def test_centers_without_rows_or_after_a_bad_step_stay() -> None:
    centers, counts = [torch.ones(4), torch.ones(4)], torch.tensor([0.0, 5.0])
    prototypes = [torch.full((4, 3), torch.nan), torch.ones(4, 3)]
    with NoHostWait():
        update_centers(centers, torch.ones(2, 3), counts, prototypes, 0.9, torch.tensor(0.0))
    assert torch.equal(centers[0], torch.ones(4))
    assert not torch.equal(centers[1], torch.ones(4))
    centers = [torch.ones(4), torch.ones(4)]
    with NoHostWait():
        update_centers(centers, torch.ones(2, 3), torch.full((2,), 5.0), [prototypes[0]] * 2, 0.9, torch.tensor(1.0))
    assert all(torch.equal(center, torch.ones(4)) for center in centers)
