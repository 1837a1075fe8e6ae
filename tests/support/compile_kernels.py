"""Compile every Triton kernel ahead of time, without a GPU, and print its resources as JSON lines.

test_compiled.py runs this in a separate process, because Triton must not interpret here. ``LAUNCHES`` lists every
kernel of kernels/ in the shapes of real runs; a kernel is a ``@triton.jit`` function whose name ends in ``_kernel``.
Without ``--all``, launches whose arguments have the same types are compiled once, for one dtype and architecture.
"""

from __future__ import annotations

import importlib
import json
import pkgutil
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel

from muse_fast.kernels import fused
from muse_fast.kernels.fused import (
    add_layer_norm,
    augment_views,
    batch_norm,
    dino_loss,
    gelu,
    join_heads,
    linear_dino_loss,
    linear_pairs,
    projection_stats,
    resize_concat,
    sample_nuclei,
    soft_cross_entropy,
)

TENSOR_CORE_INSTRUCTIONS = {80: "mma.sync", 86: "mma.sync", 90: "wgmma.mma_async"}


class Launch(NamedTuple):
    """A kernel and its launch arguments."""

    kernel: Any
    # Triton's name of a type -> the arguments of that type. ``*T`` points to each of ``dtypes``, pointers are aligned
    # to 16 bytes, and ``i32:16`` is an integer divisible by 16.
    types: Mapping[str, str]
    constants: Mapping[str, Any]
    num_warps: int = 4
    num_stages: int = 3
    dtypes: tuple[str, ...] = ("fp32", "bf16")
    archs: tuple[int, ...] = (80, 90)
    tensor_cores: tuple[str, ...] = ()  # the dtypes whose products must run on tensor cores


def linear_dino_loss_launches(tiles: Any, dtype: str, arch: int) -> list[Launch]:
    """The two passes over 65,536 prototypes of width 256."""
    width = {"NUM_PROTOTYPES": 65536, "WIDTH": 256, "LANES": 256}

    def launch(kernel: Any, types: dict[str, str], tile: Any, **flags: bool) -> Launch:
        constants = {**width, **flags, "BLOCK_ROWS": tile.rows, "BLOCK_PROTOTYPES": tile.prototypes}
        return Launch(kernel, types, constants, tile.num_warps, tile.num_stages, (dtype,), (arch,), ("bf16",))

    attend = {
        "*T": "queries keys values",
        "*fp32": "center peaks totals sums",
        "i32": "num_rows",
        "i32:16": "prototypes_of_a_split",
        "fp32": "inverse_temp",
    }
    gradient = {
        "*T": "student_z student_W teacher_z teacher_W teacher_values gradient",
        "*fp32": "student_stats student_coefficients teacher_stats teacher_coefficients center "
        "largest_student largest_teacher",
        "i32": "num_students num_teachers",
        "fp32": "inverse_student_temp inverse_teacher_temp",
    }
    return [
        *(launch(linear_dino_loss.attend_kernel, attend, tiles.attend, TEACHER=teacher) for teacher in (False, True)),
        launch(linear_dino_loss.prototype_gradient_kernel, gradient, tiles.gradient),
    ]


def sample_nuclei_launches() -> list[Launch]:
    """A level of 96 channels on 56 x 56 pixels, contiguous and channels-last."""
    forward = [
        Launch(
            sample_nuclei.sample_kernel,
            {
                "*T": "level rows",
                "*fp32": "xy",
                "*i64": "image_index",
                "i32": "num_points view_size fine_height fine_width height width row_stride",
                "i32:16": f"channels image_stride {apart} rows_stride",
            },
            {adjacent: 1, "BLOCK_CHANNELS": sample_nuclei.BLOCK_CHANNELS, "BLOCK_POINTS": sample_nuclei.BLOCK_POINTS},
        )
        for apart, adjacent in [("channel_stride", "column_stride"), ("column_stride", "channel_stride")]
    ]
    backward = [
        Launch(
            sample_nuclei.gradient_kernel,
            {
                "*T": "rows_gradient gradient",
                "*fp32": "xy",
                "*i64": "points first_point",
                "i32": "view_size fine_height fine_width height width",
                "i32:16": f"channels pixels image_stride {apart} rows_stride",
            },
            {
                adjacent: 1,
                "BLOCK_CHANNELS": sample_nuclei.BLOCK_CHANNELS,
                "BLOCK_PIXELS": sample_nuclei.BLOCK_PIXELS,
                "CHUNK": sample_nuclei.CHUNK,
                "PRECISION": precision,
            },
            dtypes=(dtype,),
            tensor_cores=("bf16",),
        )
        for apart, adjacent in [("channel_stride", "pixel_stride"), ("pixel_stride", "channel_stride")]
        for dtype, precision in [("fp32", "ieee"), ("bf16", "tf32x3")]
    ]
    return forward + backward


def resize_concat_launches() -> list[Launch]:
    """Tokens of ViT-S at 224 px brought to stride 4, and the gradient; contiguous and channels-last."""
    blocks = {"BLOCK_PIXELS": resize_concat.BLOCK_PIXELS, "BLOCK_CHANNELS": resize_concat.BLOCK_CHANNELS}
    sizes = "height width fine_height fine_width"
    launches = []
    for adjacent, apart in [("channel", "column"), ("column", "channel")]:

        def strides(prefix: str, apart: str = apart) -> str:
            return " ".join(f"{prefix}{name}_stride" for name in ("image", "row", apart))

        forward = {"*T": "x out", "i32": sizes, "i32:16": f"channels {strides('')} {strides('out_')}"}
        backward = {
            "*T": "fine_gradient gradient",
            "i32": f"{sizes} taps_down taps_across",
            "i32:16": f"channels {strides('fine_')} {strides('')}",
        }
        for kernel, types, prefixes in [
            (resize_concat.interpolate_kernel, forward, ("", "out_")),
            (resize_concat.interpolate_gradient_kernel, backward, ("fine_", "")),
        ]:
            ones = {f"{prefix}{adjacent}_stride": 1 for prefix in prefixes}
            launches.append(Launch(kernel, types, ones | blocks))
    return launches


def projection_stats_launches(dtype: torch.dtype, channels_last: bool) -> list[Launch]:
    """The second level of ViT-B: 384 channels onto 192."""
    weight = torch.empty(192, 384, dtype=dtype, device="meta")
    tile = projection_stats.tile_of(weight)
    tile["channel_stride" if channels_last else "position_stride"] = 1
    block = tile | {"BLOCK_OUTPUTS": projection_stats.BLOCK_OUTPUTS}
    pointers = "mean mean_gradient var_gradient"
    integers = {
        "i32": "num_positions",
        "i64": "image_stride",
        "i32:16": "position_stride" if channels_last else "channel_stride",
    }
    runs = integers | {"i32": "num_positions num_tiles tiles_per_run"}
    stats = runs | {"*T": "x weight", "*fp32": "run_counts run_means run_squares"}
    x_gradient = integers | {"*T": "x weight gradient", "*fp32": pointers, "fp32": "inverse_count"}
    weight_gradient = runs | {"*T": "x weight", "*fp32": f"{pointers} run_gradients", "fp32": "inverse_count"}

    def launch(kernel: Any, types: dict[str, str], constants: dict[str, int], num_stages: int = 3) -> Launch:
        name = {torch.float32: "fp32", torch.bfloat16: "bf16"}[dtype]
        return Launch(kernel, types, constants, 8, num_stages, (name,), tensor_cores=("bf16",))

    return [
        launch(projection_stats.run_stats_kernel, stats, block),
        launch(
            projection_stats.x_gradient_kernel,
            x_gradient,
            tile | {"BLOCK_OUTPUTS": projection_stats.all_outputs(weight)},
            num_stages=2,
        ),
        launch(
            projection_stats.weight_gradient_kernel,
            weight_gradient,
            block | {"BLOCK_COLUMNS": projection_stats.BLOCK_COLUMNS},
        ),
    ]


def add_layer_norm_launches(width: int, dtype: str) -> list[Launch]:
    """A float32 stream with branches and norms of ``dtype``: within a ViT, at its start, and after its last layer."""
    tile, num_warps = add_layer_norm.tile_of(width)
    rows = {"*fp32": "x weight bias stats", "*T": "normed", "i32": "num_rows", "fp32": "eps"}
    added = rows | {"*fp32": "x scale weight bias total stats", "*T": "branch normed"}
    sums = {"*fp32": "total stats weight x_gradient run_gradients", "*T": "normed_gradient"}
    sums |= {"i32": "num_rows rows_per_run"}
    within = sums | {"*fp32": f"{sums['*fp32']} total_gradient scale", "*T": "normed_gradient branch_gradient"}
    alone = {"total_gradient": None, "scale": None, "branch_gradient": None}
    last = sums | {"*T": "normed_gradient branch_gradient"}
    two, three = {"SUMS": 2}, {"SUMS": 3}
    cases = [
        (add_layer_norm.add_norm_kernel, added, {}),
        (add_layer_norm.add_norm_kernel, rows, {"branch": None, "scale": None, "total": None}),
        (add_layer_norm.add_norm_gradient_kernel, within, three),
        (add_layer_norm.add_norm_gradient_kernel, within, two),
        (add_layer_norm.add_norm_gradient_kernel, sums, alone | two),
        (add_layer_norm.add_norm_gradient_kernel, last, {"total_gradient": None, "scale": None} | three),
    ]
    return [Launch(kernel, types, tile | absent, num_warps, dtypes=(dtype,)) for kernel, types, absent in cases]


def batch_norm_launches(layout: torch.memory_format, dtype: str) -> list[Launch]:
    """A map of ViT-S's decoder: with a residual and ReLU, with ReLU, and with neither, nor parameters."""
    walk = batch_norm.walk_over(torch.empty(128, 96, 56, 56, device="meta").to(memory_format=layout))
    sizes, parameters = {"i32": "rows pixels rows_per_run", "i32:16": "channels"}, "moments weight bias"
    passes = {
        batch_norm.normalise_kernel: ("x residual out", parameters, ("residual",)),
        batch_norm.run_gradient_sums_kernel: ("gradient x y masked", f"{parameters} run_sums", ("y", "masked")),
        batch_norm.input_gradient_kernel: ("gradient x x_gradient", f"{parameters} sums", ()),
    }
    launches = [Launch(batch_norm.run_moments_kernel, sizes | {"*T": "x", "*fp32": "run_moments"}, walk.tile)]
    for kernel, (maps, numbers, optional) in passes.items():
        types = sizes | {"*T": maps, "*fp32": numbers, "fp32": "eps"}
        launches.append(Launch(kernel, types, walk.tile | {"RELU": True}))
        for others, relu in [((), True), (("weight", "bias"), False)]:
            absent = dict.fromkeys((*optional, *others))
            kept = {kind: " ".join(n for n in names.split() if n not in absent) for kind, names in types.items()}
            launches.append(Launch(kernel, kept, walk.tile | absent | {"RELU": relu}))
    return [launch._replace(dtypes=(dtype,)) for launch in launches]


def batch_norm_merges() -> list[Launch]:
    blocks = {"BLOCK_RUNS": batch_norm.BLOCK_RUNS, "BLOCK_CHANNELS": batch_norm.MERGED_CHANNELS}
    sizes, running = {"i32": "runs", "i32:16": "channels"}, {"*fp32": "running_mean running_var", "*i64": "num_batches"}
    moments = {"*fp32": "run_moments moments", "fp32": "momentum"} | sizes
    sums = {"*fp32": "run_sums moments sums", "fp32": "eps"} | sizes
    absent = {"running_mean": None, "running_var": None, "num_batches": None}
    tracked = moments | {"*fp32": f"{moments['*fp32']} {running['*fp32']}", "*i64": running["*i64"]}
    return [
        Launch(batch_norm.merge_moments_kernel, tracked, blocks, dtypes=("fp32",)),
        Launch(batch_norm.merge_moments_kernel, moments, blocks | absent, dtypes=("fp32",)),
        Launch(batch_norm.merge_gradient_sums_kernel, sums, blocks, dtypes=("fp32",)),
    ]


LAUNCHES = [
    *batch_norm_launches(torch.channels_last, "bf16"),
    *batch_norm_launches(torch.channels_last, "fp32"),
    *batch_norm_launches(torch.contiguous_format, "bf16"),
    *batch_norm_merges(),
    *resize_concat_launches(),
    *(launch for width in (192, 384, 768, 4096) for launch in add_layer_norm_launches(width, "bf16")),
    *add_layer_norm_launches(768, "fp32"),
    *(
        Launch(
            gelu.gelu_gradient_kernel,
            {"*T": "gradient hidden hidden_gradient", "*fp32": "run_sums", "i32": "num_rows", "i32:16": "rows_per_run"},
            {"WIDTH": width, "BLOCK_ROWS": gelu.BLOCK_ROWS, "BLOCK_COLUMNS": gelu.BLOCK_COLUMNS},
        )
        for width in (768, 3072)
    ),
    *(
        Launch(
            join_heads.join_heads_kernel,
            {
                "*T": "first second third joined",
                "*fp32": "run_sums",
                "i32": "num_rows tokens",
                "i32:16": "rows_per_run image_stride token_stride head_stride",
            },
            {"WIDTH": width, "HEAD": 64, "BLOCK_ROWS": gelu.BLOCK_ROWS, "BLOCK_COLUMNS": gelu.BLOCK_COLUMNS},
        )
        for width in (192, 384, 768)
    ),
    *sample_nuclei_launches(),
    Launch(
        augment_views.resize_kernel,
        {"*u8": "pixels views", "*i64": "images", "*i32": "boxes", "*fp32": "colours greys", "i32:16": "size"},
        {"TILE": augment_views.TILE, "CHUNK": augment_views.CHUNK},
        dtypes=("u8",),
    ),
    Launch(
        augment_views.colour_kernel,
        {"*u8": "views", "*fp32": "colours greys", "*T": "out", "i32:16": "area", "i32": "num_tiles"},
        {"BLOCK": augment_views.BLOCK, "LANES": 64},
    ),
    Launch(
        augment_views.blur_kernel,
        {"*u8": "views", "*fp32": "colours", "*T": "out", "i32:16": "size"},
        {"TILE": augment_views.TILE, "CHUNK": augment_views.CHUNK},
    ),
    Launch(
        dino_loss.block_sums_kernel,
        {
            "*T": "student teacher",
            "*fp32": "center sums",
            "*i64": "teacher_rows student_rows",
            "i32:16": "student_stride teacher_stride",
            "fp32": "inverse_student_temp inverse_teacher_temp",
        },
        {"NUM_COLUMNS": 65536, "BLOCK": dino_loss.BLOCK},
    ),
    Launch(
        dino_loss.pair_loss_kernel,
        {
            "*fp32": "sums loss student_stats teacher_stats",
            "*i64": "teacher_rows student_rows",
            "fp32": "inverse_student_temp inverse_teacher_temp",
        },
        {"NUM_BLOCKS": 32, "LANES": 32},
        num_warps=1,
        dtypes=("fp32",),
    ),
    Launch(
        dino_loss.student_gradient_kernel,
        {
            "*T": "student teacher gradient",
            "*fp32": "center student_stats teacher_stats loss_gradient",
            "*i64": "teacher_rows pairs first_pair",
            "i32:16": "student_stride teacher_stride",
            "fp32": "inverse_student_temp inverse_teacher_temp",
        },
        {"NUM_COLUMNS": 65536, "BLOCK": dino_loss.BLOCK},
    ),
    Launch(
        soft_cross_entropy.soft_loss_kernel,
        {
            "*T": "student target",
            "*fp32": "stats loss",
            "i32:16": "student_stride target_stride",
            "fp32": "inverse_temp",
        },
        {"NUM_COLUMNS": 65536, "BLOCK": dino_loss.BLOCK},
    ),
    Launch(
        soft_cross_entropy.soft_gradient_kernel,
        {
            "*T": "student target gradient",
            "*fp32": "stats loss_gradient",
            "i32:16": "student_stride target_stride",
            "fp32": "inverse_temp",
        },
        {"NUM_COLUMNS": 65536, "BLOCK": dino_loss.BLOCK},
    ),
    Launch(
        linear_dino_loss.combine_kernel,
        {"*fp32": "peaks totals sums stats mean", "i32": "num_rows num_splits", "fp32": "inverse_temp"},
        {"WIDTH": 256, "LANES": 256, "BLOCK_SPLITS": 8},
        dtypes=("fp32",),
    ),
    Launch(
        linear_pairs.linear_pair_loss_kernel,
        {
            "*T": "student_z",
            "*fp32": "student_stats teacher_mean loss",
            "*i64": "teacher_rows student_rows",
            "fp32": "inverse_temp",
        },
        {"WIDTH": 256, "LANES": 256},
        num_warps=1,
    ),
    Launch(
        linear_pairs.linear_pair_sums_kernel,
        {
            "*T": "student_z z_gradient teacher_values",
            "*fp32": "loss_gradient student_stats student_mean teacher_stats teacher_mean student_coefficients "
            "teacher_coefficients",
            "*i64": "teacher_rows student_rows order first",
            "i32": "gradient_stride num_students num_pairs",
            "fp32": "inverse_temp",
        },
        {"WIDTH": 256, "LANES": 256},
        num_warps=1,
    ),
    *(
        launch
        for arch, tiles in zip((90, 80, 86), linear_dino_loss.TILES_16_BIT.values(), strict=True)
        for launch in linear_dino_loss_launches(tiles, "bf16", arch)
    ),
    *(
        launch
        for arch in (80, 90)
        for launch in linear_dino_loss_launches(linear_dino_loss.TILES_FLOAT32, "fp32", arch)
    ),
    *projection_stats_launches(torch.float32, channels_last=True),
    *projection_stats_launches(torch.bfloat16, channels_last=True),
    *projection_stats_launches(torch.bfloat16, channels_last=False),
    Launch(
        projection_stats.join_runs_kernel,
        {"*fp32": "run_counts run_means run_squares mean var", "i32": "num_runs"},
        {"NUM_OUTPUTS": 192, "BLOCK_RUNS": 64, "BLOCK_OUTPUTS": 16},
        dtypes=("fp32",),
    ),
]


def kernels_in_the_folder() -> set[str]:
    """Return ``module.name`` of every kernel."""
    modules = [
        importlib.import_module(f"{fused.__name__}.{info.name}") for info in pkgutil.iter_modules(fused.__path__)
    ]
    functions = [
        value for module in modules for value in vars(module).values() if isinstance(value, triton.JITFunction)
    ]
    return {name_of(function) for function in functions if function.__name__.endswith("_kernel")}


def name_of(kernel: Any) -> str:
    return f"{kernel.__module__.rpartition('.')[2]}.{kernel.__name__}"


def compile_launch(launch: Launch, dtype: str, arch: int) -> CompiledKernel:
    types = {name: kind.replace("*T", f"*{dtype}") for kind, names in launch.types.items() for name in names.split()}
    types |= dict.fromkeys(launch.constants, "constexpr")
    arguments = launch.kernel.arg_names
    assert set(types) == set(arguments), f"{name_of(launch.kernel)}: {sorted(set(types) ^ set(arguments))}"
    signature = {name: types[name].removesuffix(":16") for name in arguments}
    divisible = [place for place, name in enumerate(arguments) if types[name].startswith("*") or ":16" in types[name]]
    source = ASTSource(
        launch.kernel, signature, dict(launch.constants), {(place,): [["tt.divisibility", 16]] for place in divisible}
    )
    options = {"num_warps": launch.num_warps, "num_stages": launch.num_stages}
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)


def resources(cubin: bytes) -> dict[str, int]:
    """Return the registers per thread, and the bytes of stack, which holds spilled registers."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        report = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return {
        key: int(re.findall(rf"{word}:(\d+)", report)[0])
        for key, word in {"registers": "REG", "stack": "STACK"}.items()
    }


def one_of_each_form() -> list[Launch]:
    """Return the first launch of each kernel, types of its arguments, and architectures with tiles of their own."""
    forms = {(name_of(one.kernel), str(sorted(one.types.items())), one.archs): one for one in reversed(LAUNCHES)}
    return [launch._replace(dtypes=launch.dtypes[-1:], archs=launch.archs[-1:]) for launch in forms.values()]


def main() -> None:
    missing = kernels_in_the_folder() ^ {name_of(launch.kernel) for launch in LAUNCHES}
    assert not missing, f"LAUNCHES and kernels/ differ in {sorted(missing)}"
    for launch in LAUNCHES if "--all" in sys.argv else one_of_each_form():
        for arch in launch.archs:
            for dtype in launch.dtypes:
                compiled = compile_launch(launch, dtype, arch)
                row = {
                    "kernel": name_of(launch.kernel),
                    "arch": arch,
                    "dtype": dtype,
                    **resources(compiled.asm["cubin"]),
                    "shared_bytes": compiled.metadata.shared,
                    "wants_tensor_cores": dtype in launch.tensor_cores,
                    "has_tensor_cores": TENSOR_CORE_INSTRUCTIONS[arch] in compiled.asm["ptx"],
                }
                print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
