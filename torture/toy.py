"""Runs of the real commands that take seconds: a small ROI set, a small network, and fine-tuning."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path

from muse_fast import finetune, pretrain
from muse_fast.images.synthetic import synthetic_image
from muse_fast.roiset.roiset import RoiSetWriter
from muse_fast.runtime import checkpoint
from muse_fast.runtime.cli import run as run_command
from muse_fast.training.report import read_metrics
from torture.processes import Child, wait_until

STEPS = 12
# A thin network, whose checkpoints are small: the runs are about commands, not about what a network computes.
ARCH = "timm:vit_tiny_patch16_224:depth=4:embed_dim=32:num_heads=2"
SETTINGS = f"""
views: {{global_size: 64, local_size: 32, num_locals: 1}}
model: {{arch: "{ARCH}", drop_path: 0.1}}
head: {{hidden_dim: 32, bottleneck_dim: 16, prototypes: 16, input_norm: true}}
loss: {{centering: sinkhorn}}
optim: {{steps: {STEPS}, batch_size: 2, warmup_steps: 2, freeze_prototypes_steps: 1, ema_start: 0.9}}
train: {{precision: fp32, log_every: 1, checkpoint_every: 2, eval_every: 6, eval_rois: 4}}
"""
FINETUNING = """
data: {sample_size: 64}
detector: {hidden_dim: 16}
optim: {epochs: 30, batch_size: 4}
train: {precision: fp32, device: cpu, log_every: 1, eval_every: 30}
"""
STEMS = ("student", "teacher", "optimizer", "state")


def prepare(folder: Path, nuclei: Sequence[int | None] = (None,) * 5) -> Path:
    """Write ``rois``, ``toy.yaml`` and ``finetuning.yaml``. ``nuclei``: how many each ROI keeps, None for all."""
    with RoiSetWriter(folder / "rois", provenance={}) as writer:
        for seed, count in enumerate(nuclei):
            image, xy, _ = synthetic_image(seed, 160, 0.25)
            writer.add(image, mpp=0.25, xy=xy[:count], slide=f"s{seed}")
    (folder / "toy.yaml").write_text(SETTINGS)
    (folder / "finetuning.yaml").write_text(FINETUNING)
    return folder


def arguments(workplace: Path, out: Path, *overrides: str) -> list[str]:
    """Return the arguments of a toy run of ``pretrain``."""
    fixed = ["--config", str(workplace / "toy.yaml"), "--out", str(out), f"data.roiset={workplace / 'rois'}"]
    return [*fixed, "data.workers=0", "train.device=cpu", *overrides]


def command(argv: Sequence[str]) -> int:
    """Do what ``python -m muse_fast.pretrain`` does; return the exit code."""
    return run_command(pretrain.main, argv)


def finetuning_arguments(workplace: Path, out: Path, *overrides: str) -> list[str]:
    fixed = ["--config", str(workplace / "finetuning.yaml"), "--out", str(out), "--data", "synthetic:7"]
    return [*fixed, "--weights", f"random:{ARCH}", "source.size=96", "data.workers=0", *overrides]


def finetuning_command(argv: Sequence[str]) -> int:
    """Do what ``python -m muse_fast.finetune`` does; return the exit code."""
    return run_command(finetune.main, argv)


def start(workplace: Path, out: Path, *overrides: str) -> Child:
    return Child(command, arguments(workplace, out, *overrides), log=log_of(out))


def finish(workplace: Path, out: Path, *overrides: str) -> int:
    """Start a run and wait for its end; return the exit code."""
    with start(workplace, out, *overrides) as child:
        return child.wait()


def log_of(out: Path) -> Path:
    return out.with_name(f"{out.name}.log")


def last_step(out: Path) -> int:
    rows = read_metrics(out / "metrics.jsonl")
    return rows[-1]["step"] if rows else -1


def wait_for_step(out: Path, step: int, child: Child) -> None:
    """Wait until the row of a step is in ``metrics.jsonl``."""
    wait_until(lambda: last_step(out) >= step or child.poll() is not None, 600, f"step {step} not logged")
    if last_step(out) < step:
        raise AssertionError(f"ended before step {step}: {child.output()[-500:]}")


def losses(out: Path) -> list[tuple[int, str]]:
    """Return step and loss of every row, exact to the bit."""
    rows = read_metrics(out / "metrics.jsonl")
    return [(row["step"], float(row["loss"]).hex()) for row in rows if "loss" in row]


def weights_hash(out: Path, step: int = STEPS) -> str:
    """Hash all tensors of a checkpoint: weights, teacher, moments and centres."""
    digest = hashlib.sha256()
    for stem in STEMS:
        for name, tensor in sorted(checkpoint.read_tensors(checkpoint.folder_of(out, step), stem).items()):
            digest.update(f"{stem}/{name}".encode())
            digest.update(tensor.numpy().tobytes())
    return digest.hexdigest()


def orphans(out: Path) -> list[str]:
    """Return the temporary files and folders left in a run folder."""
    return [os.path.relpath(path, out) for path in out.rglob(".*")]
