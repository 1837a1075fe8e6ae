"""Student and teacher: groups of resolutions, the EMA, and initial weights from the seed."""

import dataclasses

import torch

from muse_fast.batch import PackedNuclei
from muse_fast.config import load_config
from muse_fast.models.backbone import build_backbone
from muse_fast.pretraining.distill import build_student_and_teacher, encode, update_teacher

SMALL = [
    "model.arch=vit_tiny",
    "views.global_size=64",
    "views.local_size=32",
    "head.hidden_dim=32",
    "head.prototypes=16",
]


def nuclei_for(images: int, size: int) -> PackedNuclei:
    counts = torch.arange(images) % 3
    offsets = torch.tensor([0, *counts.cumsum(0)], dtype=torch.int32)
    total = int(offsets[-1])
    return PackedNuclei(torch.rand(total, 2) * size, torch.zeros(total, dtype=torch.int32), offsets)


def test_the_teacher_starts_as_the_student_without_gradients() -> None:
    student, teacher = build_student_and_teacher(load_config(None, SMALL))
    for (name, a), (other, b) in zip(student.state_dict().items(), teacher.state_dict().items(), strict=True):
        assert name == other and torch.equal(a, b)
    assert not any(p.requires_grad for p in teacher.parameters())


def test_seed_and_arch_determine_the_untrained_backbone() -> None:
    config = load_config(None, [*SMALL, "seed=5"])
    student, _ = build_student_and_teacher(config)
    torch.manual_seed(5)
    untrained = build_backbone("vit_tiny", image_size=64)
    assert all(torch.equal(v, student.backbone.state_dict()[k]) for k, v in untrained.state_dict().items())


def test_ema_follows_the_formula_and_leaves_buffers() -> None:
    student, teacher = build_student_and_teacher(load_config(None, SMALL))
    with torch.no_grad():
        for p in student.parameters():
            p.add_(torch.randn_like(p))
    before = {k: v.double().clone() for k, v in teacher.state_dict().items()}
    weights = list(teacher.parameters()), list(student.parameters())
    update_teacher(*weights, 0.9, torch.tensor(1.0))  # found_inf
    assert all(torch.equal(after, before[name].float()) for name, after in teacher.named_parameters())
    rounded = torch._foreach_lerp(*weights, 0.1)
    update_teacher(*weights, 0.9, torch.tensor(0.0))
    assert all(torch.equal(after, expected) for after, expected in zip(weights[0], rounded, strict=True))
    parameters = dict(teacher.named_parameters())
    for name, after in teacher.state_dict().items():
        expected = before[name]
        if name in parameters:
            expected = 0.9 * expected + 0.1 * student.state_dict()[name].double()
        torch.testing.assert_close(after.double(), expected, rtol=1e-5, atol=1e-7)


def test_batchnorm_statistics_are_per_resolution_group() -> None:
    """Other images in the second group do not change the features of the first; other images in their group do."""
    torch.manual_seed(0)
    backbone = build_backbone("vit_tiny", image_size=64).train()
    big, small, other = torch.randn(4, 3, 64, 64), torch.randn(4, 3, 32, 32), torch.randn(4, 3, 32, 32)
    nuclei = [nuclei_for(4, 64), nuclei_for(4, 32)]
    rows_of_big = len(nuclei[0].index)
    _, rows = encode(backbone, [big, small], nuclei)
    _, again = encode(backbone, [big, other], nuclei)
    assert torch.equal(rows[:rows_of_big], again[:rows_of_big])
    _, mixed = encode(backbone, [torch.cat([big[:2], big[:2]]), small], nuclei)
    first = int(nuclei[0].offsets[2])
    assert not torch.allclose(rows[:first], mixed[:first])


def test_rows_come_from_their_own_image() -> None:
    torch.manual_seed(0)
    backbone = build_backbone("vit_tiny", image_size=64).eval()
    images, nuclei = torch.randn(5, 3, 64, 64), nuclei_for(5, 64)
    cls, rows = encode(backbone, [images], [nuclei])
    assert cls.shape == (5, 192)
    for i in range(5):
        part = nuclei.images(i, i + 1)
        alone = backbone.nucleus_features(images[i : i + 1], part.xy, part.image_index())
        torch.testing.assert_close(
            rows[int(nuclei.offsets[i]) : int(nuclei.offsets[i + 1])], alone, rtol=1e-4, atol=1e-5
        )


def test_packed_nuclei_move_and_slice() -> None:
    nuclei = nuclei_for(6, 64)
    moved = nuclei.to("cpu")
    assert dataclasses.asdict(moved).keys() == dataclasses.asdict(nuclei).keys()
    assert nuclei.image_index().bincount(minlength=6).tolist() == [0, 1, 2, 0, 1, 2]
    assert nuclei.images(2, 2).xy.shape == (0, 2)
    assert nuclei.images(1, 3).offsets.tolist() == [0, 1, 3]
