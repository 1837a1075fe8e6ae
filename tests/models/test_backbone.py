"""The whole backbone: sizes, counts, gradients, modes, and nucleus features against the dense map."""

from __future__ import annotations

import copy
import subprocess
import sys
import warnings
from unittest import mock

import pytest
import torch
import torch.nn.functional as F

from muse_fast.errors import UserError
from muse_fast.images.image_files import read_image
from muse_fast.images.imagenet import IMAGENET_MEAN, IMAGENET_STD, Normaliser, normalise
from muse_fast.models.archs import ARCHS
from muse_fast.models.backbone import build_backbone
from tests.support.filled import open_branches


@pytest.fixture(scope="module")
def models():
    torch.manual_seed(0)
    return {arch: open_branches(build_backbone(arch)) for arch in ("vit_tiny", "resnet50")}


@pytest.fixture
def tiny(models):
    return models["vit_tiny"].eval()


@pytest.mark.parametrize(
    ("arch", "image_size", "millions", "exact"),
    [
        ("vit_tiny", 224, "7.88", None),
        ("vit_small", 224, "31.07", 31_070_784),
        ("vit_base", 224, "123.41", None),
        ("vit_base", 512, "124.05", 124_045_440),
        ("resnet50", 224, "86.44", None),
    ],
)
def test_parameter_counts(arch, image_size, millions, exact):
    with torch.device("meta"):
        count = sum(p.numel() for p in build_backbone(arch, image_size=image_size).parameters())
    assert f"{count / 1e6:.2f}" == millions
    assert exact in (None, count)


@pytest.mark.parametrize(("arch", "image_dim", "dense_dim"), [("vit_tiny", 192, 192), ("resnet50", 2048, 1024)])
@pytest.mark.parametrize("side", [32, 208])
def test_shapes(models, arch, image_dim, dense_dim, side):
    model = models[arch].eval()
    assert (model.image_dim, model.dense_dim) == (image_dim, dense_dim)
    images = torch.randn(1, 3, side, side)
    with torch.no_grad():
        features = model(images)
        assert features.cls.shape == model.cls(images).shape == (1, image_dim)
        assert [level.shape[1] for level in features.levels] == [dense_dim // 4] * 4
        assert model.dense_map(images).shape == (1, dense_dim, side // 4, side // 4)


@pytest.mark.parametrize("side", [224, 512])
def test_larger_views(tiny, side):
    with torch.no_grad():
        assert tiny.dense_map(torch.randn(1, 3, side, side)).shape == (1, 192, side // 4, side // 4)


def test_nucleus_features_sample_the_dense_map(tiny):
    """grid_sample on the unified map with aligned corners, as the published extractor samples it."""
    torch.manual_seed(1)
    images, counts = torch.randn(3, 3, 96, 96), (5, 0, 2)
    xy = torch.rand(7, 2) * 96
    image_index = torch.repeat_interleave(torch.arange(3), torch.tensor(counts))
    with torch.no_grad():
        rows = tiny.nucleus_features(images, xy, image_index)
        dense = tiny.dense_map(images)
    grid = (2 * xy / 96 - 1)[:, None, None]
    expected = F.grid_sample(dense[image_index], grid, mode="bilinear", align_corners=True)[..., 0, 0]
    torch.testing.assert_close(rows, expected, rtol=1e-5, atol=1e-5)


def calls(backbone, images):
    """Each public function of a backbone on images."""
    xy, image_index = torch.tensor([[10.0, 20.0]]), torch.zeros(1, dtype=torch.int64)
    return {
        "cls": lambda: backbone.cls(images),
        "dense_map": lambda: backbone.dense_map(images),
        "nucleus_features": lambda: backbone.nucleus_features(images, xy, image_index),
    }


@pytest.mark.parametrize("name", ["cls", "dense_map", "nucleus_features"])
def test_uint8_images_are_normalised_as_in_training(tiny, name):
    """By the published statistics, written out; the same as floats that were normalised before."""
    pixels = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error")
        expected = calls(tiny, (pixels / 255 - mean) / std)[name]()
        found = calls(tiny, pixels)[name]()
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        assert not torch.allclose(calls(tiny, pixels / 255)[name](), expected, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("name", ["cls", "dense_map", "nucleus_features"])
@pytest.mark.parametrize("scale", [1, 255])
def test_floats_that_look_unnormalised_warn_once(name, scale):
    backbone = build_backbone("vit_tiny").eval()
    with torch.no_grad():
        call = calls(backbone, torch.rand(1, 3, 64, 64) * scale)[name]
        with pytest.warns(UserWarning, match="as if not normalised; pass uint8 RGB"):
            call()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            call()
        with pytest.raises(UserError, match=r"torch\.int64; expected uint8 RGB, or floats normalised"):
            calls(backbone, torch.ones(1, 3, 64, 64, dtype=torch.int64))[name]()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gpu_normalises_in_one_pass_as_a_cpu_in_several(dtype):
    """Its form, here on the CPU: all levels, rounded once from what float64 gives."""

    class OnGpu(torch.Tensor):
        is_cuda = True

    pixels = torch.arange(256, dtype=torch.uint8).repeat(2, 3, 1, 1)
    mean, std = (torch.tensor(v, dtype=torch.float64).view(3, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD))
    exact = (pixels.double() / 255 - mean) / std
    with mock.patch.object(torch, "addcmul", wraps=torch.addcmul) as one_pass:
        found = normalise(pixels.as_subclass(OnGpu), dtype).as_subclass(torch.Tensor)
    assert one_pass.call_count == 1 and found.dtype == dtype
    tolerance = torch.finfo(dtype).eps / 2 * 1.01
    torch.testing.assert_close(found.double(), exact, rtol=tolerance, atol=5e-7)
    torch.testing.assert_close(normalise(pixels, dtype).double(), exact, rtol=tolerance, atol=5e-7)


def test_normalised_images_do_not_warn(shared_data):
    """Glass is the brightest there is, and all of its values are positive."""
    tissue = normalise(torch.from_numpy(read_image(shared_data / "kumar" / "test_1_sample.jpg")).permute(2, 0, 1)[None])
    glass = normalise(torch.full((1, 3, 64, 64), 255, dtype=torch.uint8))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for images in (tissue, glass, torch.zeros(0, 3, 64, 64)):
            assert Normaliser()(images) is images


@pytest.mark.parametrize("bad", [(-0.5, 3.0), (3.0, 96.5), (float("nan"), 3.0)])
def test_points_outside_their_image_are_refused(tiny, bad):
    images, image_index = torch.zeros(2, 3, 96, 96), torch.tensor([0, 1, 1])
    xy = torch.tensor([[0.0, 96.0], [96.0, 0.0], bad])  # borders are inside
    with pytest.raises(UserError, match=r"1 of 3 points lie outside .* of 96 x 96 px \(row 2 at"):
        tiny.nucleus_features(images, xy, image_index)
    with torch.no_grad():
        assert tiny.nucleus_features(images, xy[:2], image_index[:2]).shape == (2, 192)
        padded = tiny.nucleus_features(images, torch.tensor([[1.0, 2.0], [999.0, -1.0]]), torch.tensor([0, -1]))
    assert padded[0].abs().max() > 0 == padded[1].abs().max()


def test_images_without_nuclei(tiny):
    none = torch.zeros(0, 2), torch.zeros(0, dtype=torch.int64)
    assert tiny.nucleus_features(torch.randn(1, 3, 96, 96), *none).shape == (0, 192)


@pytest.mark.parametrize("arch", ["vit_tiny", "resnet50"])
def test_gradient_reaches_every_parameter(models, arch):
    torch.manual_seed(0)
    model = copy.deepcopy(models[arch]).train()
    features = model(torch.randn(2, 3, 96, 96))
    # Random weights, because BatchNorm makes the plain sum of a level constant, with zero gradient.
    loss = (features.cls * torch.randn_like(features.cls)).sum()
    for level in features.levels:
        loss = loss + (level * torch.randn_like(level)).sum()
    loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.any(), name


def test_the_image_feature_does_not_run_the_decoder(tiny):
    tiny.zero_grad()
    tiny.cls(torch.randn(1, 3, 96, 96)).sum().backward()
    reached = {name.split(".")[0] for name, p in tiny.named_parameters() if p.grad is not None}
    assert reached == {"encoder"}
    tiny.zero_grad()


def test_batch_norm_uses_running_statistics_only_in_evaluation(tiny):
    torch.manual_seed(0)
    model = copy.deepcopy(tiny).train()
    batch = torch.randn(4, 3, 96, 96)
    levels = model(batch).levels
    for level in levels:  # the last layer of a level is BatchNorm with gain 1 and bias 0
        torch.testing.assert_close(level.mean((0, 2, 3)), torch.zeros(48), rtol=0, atol=1e-4)
        torch.testing.assert_close(level.var((0, 2, 3), unbiased=False), torch.ones(48), rtol=0, atol=1e-2)
    model.eval()
    before = {name: value.clone() for name, value in model.named_buffers()}
    alone, among = model(batch[:1]).levels[0], model(batch).levels[0][:1]
    torch.testing.assert_close(alone, among, rtol=1e-4, atol=1e-4)
    assert all(torch.equal(before[name], value) for name, value in model.named_buffers())


@pytest.mark.parametrize("arch", ["vit_tiny", "resnet50"])
def test_paths_are_dropped_only_by_scales(arch):
    """A backbone is deterministic even in training; the encoder drops only what the scales say."""
    model = open_branches(build_backbone(arch, drop_path=0.5))
    images, branches = torch.randn(2, 3, 96, 96), len(model.encoder.drop_rates)
    with torch.no_grad():
        for mode in (model.train(), model.eval()):
            assert torch.equal(mode.cls(images), mode.cls(images))
        kept = torch.ones(branches, 2)
        assert torch.equal(model.encoder([images], kept)[0], model.cls(images))
        dropped = model.encoder([images], torch.stack([kept[:, 0], 0 * kept[:, 1]], dim=1))[0]
        torch.testing.assert_close(dropped[0], model.cls(images)[0])
        assert not torch.allclose(dropped[1], model.cls(images)[1], atol=1e-3)
        assert torch.equal(model.encoder([images])[0], model.cls(images))  # scales are not remembered


@pytest.mark.parametrize("arch", ["vit_tiny", "resnet50"])
def test_channels_last_and_bfloat16(models, arch):
    torch.manual_seed(0)
    model = copy.deepcopy(models[arch]).eval()
    images = torch.randn(2, 3, 96, 96)
    with torch.no_grad():
        plain = model(images)
        last = model.to(memory_format=torch.channels_last)(images.to(memory_format=torch.channels_last))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            low = model(images)
    for a, b, c in zip((plain.cls, *plain.levels), (last.cls, *last.levels), (low.cls, *low.levels), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4 * a.abs().max().item())
        assert (a - c).norm() < 0.05 * a.norm()


def test_initial_values(tiny):
    vit = tiny.encoder.encoder
    for weight in (
        vit.pos_embed,
        vit.patch_embed.proj.weight,
        vit.blocks[3].attn.qkv.weight,
        vit.blocks[3].mlp.fc2.weight,
    ):
        assert weight.std().item() == pytest.approx(0.02, rel=0.03)
    conv, norm = tiny.decoder.decoder2.first_block.layer[:2]
    assert conv.weight.std().item() == pytest.approx((2 / (9 * conv.out_channels)) ** 0.5, rel=0.03)
    assert bool((norm.weight == 1).all())
    assert bool((norm.bias == 0).all())


def test_same_seed_same_weights(models):
    first = models["vit_tiny"].state_dict()
    torch.manual_seed(0)
    again = build_backbone("vit_tiny").state_dict()
    assert all(torch.equal(first[name], again[name]) for name in first)


@pytest.mark.parametrize(("arch", "hint"), [("vits_small", "vit_small"), ("resnet-50", "resnet50"), ("zzz", None)])
def test_unknown_arch_suggests_the_closest(arch, hint):
    with pytest.raises(UserError, match=", ".join(ARCHS)) as error:
        build_backbone(arch)
    assert ("did you mean" in str(error.value)) == (hint is not None)
    assert hint is None or repr(hint) in str(error.value)


@pytest.mark.parametrize("arch", ["vit_tiny", "resnet50"])
def test_odd_side_is_refused(models, arch):
    with pytest.raises(UserError, match="100 px"):
        models[arch].cls(torch.zeros(1, 3, 100, 100))


def test_package_import_is_light_and_has_the_public_names():
    code = (
        "import sys, muse_fast; assert not {'torch', 'numpy', 'timm'} & set(sys.modules);"
        "assert callable(muse_fast.load_backbone) and callable(muse_fast.ops.sample_nuclei);"
        "print(muse_fast.__version__)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "0.1.0", done.stderr


def test_package_has_no_other_names():
    import muse_fast

    with pytest.raises(AttributeError, match="no attribute 'load_model'"):
        muse_fast.load_model  # noqa: B018
