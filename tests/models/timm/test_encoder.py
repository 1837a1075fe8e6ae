"""Networks of timm as encoders: the same tokens as timm's own, and the whole life of a run with each kind."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from bench.step.timing import synthetic_views
from muse_fast import load_backbone
from muse_fast.config import PretrainConfig, load_config
from muse_fast.errors import UserError
from muse_fast.evaluate import main as evaluate
from muse_fast.export import export
from muse_fast.models.archs import check_model, find_arch
from muse_fast.models.backbone import build_backbone
from muse_fast.models.timm.networks import PixelStatistics, parse_spec, statistics_of
from muse_fast.models.timm.vit import resize_positions
from muse_fast.pretraining.distill import encode
from muse_fast.pretraining.flops import view_flops
from muse_fast.pretraining.trainer import Trainer
from tests.models.test_packed import assert_close, gradients, make_nuclei

CPU = torch.device("cpu")

# Plain ViTs: name, arguments, and the sides of global and local views.
VITS = {
    "patch16": ("vit_tiny_patch16_224:depth=2", 64, 32),
    "dinov2": ("vit_small_patch14_dinov2:depth=1:embed_dim=96", 70, 42),
    "registers-swiglu": ("vit_giant_patch14_reg4_dinov2:depth=1:embed_dim=96:num_heads=4", 56, 42),
    "patch8": ("vit_small_patch8_224:depth=1:embed_dim=48:num_heads=3", 40, 32),
    "patch32": ("vit_small_patch32_224:depth=1:embed_dim=48:num_heads=3", 96, 64),
    "clip-pre-norm": ("vit_base_patch16_clip_224:depth=1:embed_dim=96:num_heads=4", 64, 32),
    "siglip-attention-pool": ("vit_base_patch16_siglip_224:depth=1:embed_dim=96:num_heads=4", 64, 32),
    "no-class-token": (
        "vit_small_patch16_224:depth=2:class_token=False:global_pool=avg:embed_dim=96:num_heads=4",
        64,
        32,
    ),
    "eva02-rope": ("eva02_tiny_patch14_224:depth=2:embed_dim=96:num_heads=4", 56, 42),
    "dinov3-rope": ("vit_small_patch16_dinov3:depth=2:embed_dim=96:num_heads=4", 64, 32),
    "mixed-rope": ("vit_small_patch16_rope_mixed_224:depth=2:embed_dim=96:num_heads=4", 64, 32),
    "query-norm": ("vit_tiny_patch16_224:depth=1:qk_norm=True:init_values=0.5", 64, 32),
}
PYRAMIDS = {
    "resnet10t": ("resnet10t:channels=[8,16,24,32]", 64, 32),
    "resnet18": ("resnet18:channels=[8,16,24,32]", 64, 32),
    "convnext": ("convnext_atto:depths=[1,1,1,1]:dims=[8,16,24,40]", 64, 32),
    "swin": ("swin_tiny_patch4_window7_224:depths=[1,1,2,1]:embed_dim=24", 64, 32),
    "maxvit": ("maxvit_pico_rw_256:img_size=64:depths=[1,1,1,1]", 64, 64),
    "efficientnet": ("efficientnet_lite0", 64, 32),
}


def settings(spec: tuple[str, int, int], *more: str) -> PretrainConfig:
    name, global_size, local_size = spec
    return load_config(
        None,
        [
            f"model.arch=timm:{name}",
            f"views.global_size={global_size}",
            f"views.local_size={local_size}",
            "views.num_locals=1",
            "model.drop_path=0.2",
            "head.hidden_dim=16",
            "head.bottleneck_dim=8",
            "head.prototypes=12",
            "optim.batch_size=2",
            "optim.steps=10",
            "optim.warmup_steps=1",
            "optim.freeze_prototypes_steps=0",
            "train.precision=fp32",
            *more,
        ],
    )


def randomise(network: Any) -> Any:
    """Move every parameter from its initial value; zeros and ones would hide a swap."""
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return network


# ------------------------------------------------------------------------------------------- the same as timm's own


@pytest.mark.parametrize("spec", VITS.values(), ids=VITS.keys())
def test_packed_tokens_equal_timms(spec: tuple[str, int, int]) -> None:
    """Image features, and the tokens of every tapped layer, of views of two sizes in one pass."""
    name, global_size, local_size = spec
    arch = find_arch(f"timm:{name}")
    assert "model.attention" in arch.supports and arch.strides[0] == arch.sides.step
    encoder = randomise(arch.build(image_size=global_size).eval())
    groups = [torch.randn(2, 3, global_size, global_size), torch.randn(3, 3, local_size, local_size)]
    with torch.no_grad():
        cls, packed = encoder(groups)
    network = timm.create_model(parse_spec(f"timm:{name}").name, num_classes=0, img_size=global_size,
                                dynamic_img_size=True, **parse_spec(f"timm:{name}").options).eval()  # fmt: skip
    assert network.state_dict().keys() == encoder.encoder.state_dict().keys()
    network.load_state_dict(encoder.encoder.state_dict())
    statistics = PixelStatistics(**statistics_of(network, parse_spec(f"timm:{name}")))
    features = []
    for number, images in enumerate(groups):
        own = statistics.convert(images)
        with torch.no_grad():
            features.append(network(own))
            last = network.forward_features(own)
            taps = network.forward_intermediates(own, norm=True, output_fmt="NLC", intermediates_only=True)
        assert last.std() > 0.1
        torch.testing.assert_close(packed.split(packed.taps[-1])[number], last, rtol=1e-5, atol=1e-5)
        for tap, layer in zip(packed.taps, encoder.taps, strict=True):
            torch.testing.assert_close(packed.split(tap)[number][:, packed.prefix :], taps[layer], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(cls, torch.cat(features), rtol=1e-5, atol=1e-5)
    assert cls.shape == (5, arch.image_dim)


@pytest.mark.parametrize("spec", PYRAMIDS.values(), ids=PYRAMIDS.keys())
def test_maps_equal_timms(spec: tuple[str, int, int]) -> None:
    name, global_size, local_size = spec
    arch = find_arch(f"timm:{name}")
    assert arch.strides == (4, 8, 16, 32) and arch.supports == ()
    encoder = arch.build().eval()
    spec_ = parse_spec(f"timm:{name}")
    dynamic = {"strict_img_size": False} if "swin" in name else {}
    network = timm.create_model(spec_.name, num_classes=0, **dynamic, **spec_.options).eval()
    network.load_state_dict(encoder.encoder.state_dict())
    groups = [torch.randn(2, 3, side, side) for side in (global_size, local_size)]
    with torch.no_grad():
        cls, maps = encoder(groups)
        for number, images in enumerate(groups):
            own = encoder.statistics.convert(images)
            expected = network.forward_intermediates(own, intermediates_only=True)[-4:]
            for one, other, width in zip(maps[number], expected, arch.widths, strict=True):
                assert torch.equal(one, other) and one.shape[1] == width
            torch.testing.assert_close(cls.chunk(2)[number], network(own))
    assert cls.shape == (4, arch.image_dim)


def test_pixels_are_converted_to_the_networks_statistics() -> None:
    images, own = torch.randn(2, 3, 4, 4), PixelStatistics((0.5, 0.4, 0.3), (0.5, 0.6, 0.7))
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    pixels = images * std + mean
    expected = (pixels - torch.tensor(own.mean).view(3, 1, 1)) / torch.tensor(own.std).view(3, 1, 1)
    torch.testing.assert_close(own.convert(images), expected)


@pytest.mark.parametrize(("old", "new", "prefix"), [(14, 6, 1), (5, 7, 0), (3, 2, 5), (4, 4, 1)])
def test_positions_are_resized_as_timm_does(old: int, new: int, prefix: int) -> None:
    from timm.layers import resample_abs_pos_embed

    table = torch.randn(1, prefix + old**2, 8)
    expected = resample_abs_pos_embed(table, (new, new), (old, old), num_prefix_tokens=prefix)
    torch.testing.assert_close(resize_positions(table, new, prefix), expected, rtol=1e-5, atol=1e-5)


# ------------------------------------------------------------------------------------------------------------- runs

LIVES = {key: (VITS | PYRAMIDS)[key] for key in
         ("patch16", "dinov2", "registers-swiglu", "dinov3-rope", *list(PYRAMIDS)[:5])}  # fmt: skip


@pytest.mark.parametrize("spec", LIVES.values(), ids=LIVES.keys())
def test_a_run_trains_resumes_exports_and_is_evaluated(spec: tuple[str, int, int], tmp_path: Path) -> None:
    config = settings(spec, "model.decoder_dim=16")
    trainer = Trainer(config, CPU)
    before = {name: p.clone() for name, p in trainer.student.named_parameters()}
    views = [synthetic_views(config, seed) for seed in range(2)]
    trainer.train_step(views[0])
    folder = trainer.save(tmp_path / "run")
    assert torch.isfinite(trainer.train_step(views[1])["loss"])
    same = [name for name, p in trainer.student.named_parameters() if torch.equal(before[name], p)]
    assert not same

    resumed = Trainer(config, CPU)
    resumed.load(folder)
    resumed.train_step(views[1])
    for ours, theirs in ((resumed.student, trainer.student), (resumed.teacher, trainer.teacher)):
        expected = theirs.state_dict()
        assert all(torch.equal(value, expected[name]) for name, value in ours.state_dict().items())

    folder = trainer.save(tmp_path / "run")
    export(str(folder), tmp_path / "x.safetensors", "safetensors")
    export(str(folder), tmp_path / "x.pth", "muse-official")
    arch, images = config.model.arch, torch.randn(1, 3, spec[1], spec[1])
    expected = trainer.teacher.backbone.eval()
    state = expected.state_dict()
    with torch.no_grad():
        for source in (folder, tmp_path / "x.safetensors", tmp_path / "x.pth"):
            loaded = load_backbone(None, source)
            assert (loaded.arch, loaded.dense_dim) == (arch, 16)
            assert all(torch.equal(value, state[name]) for name, value in loaded.state_dict().items())
            # Convolutions of the trainer are in another memory order.
            torch.testing.assert_close(loaded.dense_map(images), expected.dense_map(images), rtol=1e-4, atol=1e-4)
    argv = ["knn", "--weights", str(folder), "--data", "synthetic:7", "source.size=64", f"--size={spec[1]}", "k=[1]"]
    assert evaluate([*argv, "standardise=raw"]) == 0


@pytest.mark.parametrize("key", ["patch16", "no-class-token", "convnext", "resnet10t"])
def test_timm_loads_the_export(key: str, tmp_path: Path) -> None:
    config = settings((VITS | PYRAMIDS)[key])
    trainer = Trainer(config, CPU)
    folder = trainer.save(tmp_path / "run")
    export(str(folder), tmp_path / "timm", "timm")
    network = timm.create_model(f"local-dir:{tmp_path / 'timm'}", pretrained=True).eval()
    side = config.views.global_size
    images, backbone = torch.randn(2, 3, side, side), trainer.teacher.backbone.eval()
    statistics = PixelStatistics(network.pretrained_cfg["mean"], network.pretrained_cfg["std"])
    with torch.no_grad():
        torch.testing.assert_close(network(statistics.convert(images)), backbone.cls(images), rtol=1e-5, atol=1e-5)
        loaded = load_backbone(None, tmp_path / "timm")
        assert loaded.arch == config.model.arch
        torch.testing.assert_close(loaded.cls(images), backbone.cls(images))


@pytest.mark.parametrize("key", ["patch16", "mixed-rope", "swin", "resnet10t"])
def test_one_pass_over_two_sizes_equals_two_passes_with_dropped_paths(key: str) -> None:
    """Outputs and gradients; every image has its own dropped branches."""
    name, *sides = (VITS | PYRAMIDS)[key]
    backbone = randomise(build_backbone(f"timm:{name}", drop_path=0.6, image_size=sides[0])).double().train()
    counts = (2, 3)
    images = [torch.randn(n, 3, side, side, dtype=torch.float64) for n, side in zip(counts, sides, strict=True)]
    nuclei = [make_nuclei(n, side) for n, side in zip(counts, sides, strict=True)]
    branches = len(backbone.encoder.drop_rates)
    assert branches >= 3 and max(backbone.encoder.drop_rates) == pytest.approx(0.6)
    scales = 1.5 * (torch.arange(5 * branches).view(branches, 5) % 3 != 0).double()  # different for neighbours
    state = {name: value.clone() for name, value in backbone.state_dict().items()}

    def learn(together: bool, scales: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        backbone.load_state_dict(state)
        backbone.zero_grad(set_to_none=True)
        if together:
            cls, rows = encode(backbone, images, nuclei, scales)
        else:
            shares = scales.split(counts, dim=1)
            parts = [encode(backbone, [x], [n], s) for x, n, s in zip(images, nuclei, shares, strict=True)]
            cls, rows = (torch.cat(each) for each in zip(*parts, strict=True))
        ((cls**2).sum() + (rows**2).sum()).backward()
        return {"cls": cls.detach(), "rows": rows.detach()}, gradients(backbone, [])

    one = learn(True, scales)
    for got, expected in zip(one, learn(False, scales), strict=True):
        assert_close(got, expected, 1e-10)
    others = learn(True, scales[:, [1, 0, 2, 3, 4]])
    assert not torch.allclose(one[0]["cls"], others[0]["cls"], rtol=0.01)


@pytest.mark.parametrize("key", ["convnext", "swin"])
def test_a_pyramid_trains_in_bf16(key: str) -> None:
    """Maps of ConvNeXt are float32 under autocast; those of the decoder are not."""
    trainer = Trainer(settings(PYRAMIDS[key], "train.precision=bf16"), CPU)
    losses = trainer.train_step(synthetic_views(trainer.config))
    trainer.check()
    assert all(torch.isfinite(torch.as_tensor(value)) for value in losses.values())


@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_recomputation_changes_nothing(recompute: str) -> None:
    name, side, _ = VITS["eva02-rope"]
    found = {}
    for how in ("none", recompute):
        torch.manual_seed(1)
        backbone = build_backbone(f"timm:{name}", image_size=side, recompute=how).train()
        (backbone.dense_map(torch.randn(2, 3, side, side)) ** 2).sum().backward()
        found[how] = gradients(backbone, [])
    assert_close(found[recompute], found["none"], 0)


@pytest.mark.parametrize("key", ["patch16", "eva02-rope"])
def test_layers_compile_as_a_whole(key: str) -> None:
    name, *sides = VITS[key]
    encoder = build_backbone(f"timm:{name}", image_size=sides[0]).eval().encoder
    groups = [torch.randn(2, 3, side, side) for side in sides]
    with torch.no_grad():
        expected = encoder(groups)[0]
        for layer in encoder.layers:
            layer.compile(backend="eager", fullgraph=True)
        torch.testing.assert_close(encoder(groups)[0], expected)


# ------------------------------------------------------------------------------------------------------ descriptions


@pytest.mark.parametrize("key", ["patch16", "eva02-rope", "resnet18", "swin"])
@pytest.mark.parametrize("decoder_dim", [0, 24])
def test_flops_are_those_that_run(key: str, decoder_dim: int) -> None:
    name, side, _ = (VITS | PYRAMIDS)[key]
    backbone = build_backbone(f"timm:{name}", image_size=side, decoder_dim=decoder_dim).eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        backbone(torch.randn(1, 3, side, side))
    # The decoder also maps prefix tokens, which are not counted; they weigh more in networks this small.
    assert counter.get_total_flops() == pytest.approx(view_flops(f"timm:{name}", side, decoder_dim), rel=5e-3)


def test_taps_choose_layers_and_stages() -> None:
    vit = build_backbone("timm:vit_tiny_patch16_224:depth=4", image_size=32, taps=[0, 1, 1, 3]).eval()
    images = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        _, packed = vit.encoder([images])
    assert vit.taps == (0, 1, 1, 3) and torch.equal(packed.taps[1], packed.taps[2])
    assert not torch.equal(packed.taps[0], packed.taps[1])
    assert find_arch("timm:vit_tiny_patch16_224:depth=8").build().taps == (1, 3, 5, 7)
    # EfficientNet has two stages at stride 16; by default the later one counts.
    assert find_arch("timm:efficientnet_lite0").widths == (24, 40, 112, 320)
    with pytest.raises(UserError, match=r"^model\.taps=\[0, 1, 2\]: expected four layers .* from 0 to 3"):
        find_arch("timm:vit_tiny_patch16_224:depth=4", taps=(0, 1, 2))
    with pytest.raises(UserError, match=r"^model\.taps=\[0, 1, 2, 3\]: expected stages .* 0: 2, 1: 4, 2: 8"):
        find_arch("timm:resnet18", taps=(0, 1, 2, 3))
    with pytest.raises(UserError, match=r"^model\.taps=\[0, 1, 2, 3\]: expected none, as vit_tiny"):
        find_arch("vit_tiny", taps=(0, 1, 2, 3))


def test_taps_are_recorded(tmp_path: Path) -> None:
    config = settings(("vit_tiny_patch16_224:depth=4:embed_dim=48", 32, 32), "model.taps=[0,1,2,3]")
    folder = Trainer(config, CPU).save(tmp_path / "run")
    for kind, name in (("safetensors", "x.safetensors"), ("muse-official", "x.pth"), ("timm", "x")):
        export(str(folder), tmp_path / name, kind)
        assert load_backbone(None, tmp_path / name).encoder.taps == (0, 1, 2, 3)
    assert load_backbone(None, folder).encoder.taps == (0, 1, 2, 3)


@pytest.mark.parametrize(
    ("arch", "setting", "message"),
    [
        (
            "vit_small_patch14_dinov2:depth=1",
            "views.local_size=96",
            r"a multiple of 14 from 42 to 1022 .* nearest is 98$",
        ),
        ("resnet18", "views.global_size=208", r"a multiple of 32 from 32 to 1024 .* nearest is (192|224)$"),
        (
            "maxvit_pico_rw_256:img_size=64:depths=[1,1,1,1]",
            "views.local_size=96",
            "a multiple of 64 .* nearest is (64|128)$",
        ),
        ("resnet18", "model.recompute=full", "none; timm:resnet18 does not support this setting: only plain ViTs"),
        (
            "swin_tiny_patch4_window7_224:depths=[1,1,1,1]",
            "model.attention=varlen",
            "sdpa; timm:swin.* only plain ViTs",
        ),
        ("convnext_atto", "train.compile=true", "False; timm:convnext_atto does not support this setting"),
    ],
)
def test_what_a_network_cannot_do_is_refused(arch: str, setting: str, message: str) -> None:
    sizes = ["views.global_size=224", "views.local_size=224"]
    if "maxvit" in arch:
        sizes = ["views.global_size=128", "views.local_size=128"]
    check_model(load_config(None, [f"model.arch=timm:{arch}", *sizes]))
    with pytest.raises(UserError, match=rf"(?i)^{setting}: expected {message}"):
        check_model(load_config(None, [f"model.arch=timm:{arch}", *sizes, setting]))


@pytest.mark.parametrize(
    ("arch", "message"),
    [
        ("timm:resnet81", "has no 'resnet81'; did you mean"),
        ("timm:resnet18@x.pth", "no such file"),
        ("timm:levit_128s", "maps at strides 16, 32, 64; the decoder needs 4, 8, 16 and 32, and 4, 8 is missing"),
        ("timm:mixer_s32_224", "does not run on images of several sizes"),
        ("timm:vit_tiny_patch16_224:depth=1:proj_drop_rate=0.1", r"blocks\.0\.attn\.proj_drop drops values at random"),
        ("timm:vit_tiny_patch16_224:wide=3", "timm cannot build this .*wide"),
    ],
)
def test_unsuitable_networks_are_refused(arch: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        find_arch(arch)


def test_a_network_without_drop_path_trains_only_at_rate_0() -> None:
    with pytest.raises(UserError, match=r"^model\.drop_path=0\.1: expected 0, as it has no drop path; timm:vgg11"):
        build_backbone("timm:vgg11", drop_path=0.1)


def test_names_of_decoder_and_dense_width() -> None:
    natural = build_backbone("timm:resnet18")
    assert (natural.dense_dim, natural.image_dim) == (256, 512)
    assert not any("dim_map_layers" in name for name in natural.state_dict())
    same = build_backbone("timm:resnet18", decoder_dim=256)  # already D/4, D/2, D and 2D
    assert same.state_dict().keys() == natural.state_dict().keys()
    narrow = build_backbone("timm:resnet18", decoder_dim=64)
    assert narrow.dense_dim == 64 and narrow.decoder.dim_map_layers[3].weight.shape == (128, 512, 1, 1)
    vit = build_backbone("vit_tiny", decoder_dim=32)
    assert vit.dense_dim == 32 and vit.decoder.dim_map_layers[0].weight.shape == (8, 192, 1, 1)
    assert dataclasses.asdict(load_config(None).model)["decoder_dim"] == 0
    with torch.no_grad():
        assert narrow.eval().dense_map(torch.randn(1, 3, 64, 64)).shape == (1, 64, 16, 16)
