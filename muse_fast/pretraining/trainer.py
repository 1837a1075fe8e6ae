"""The pretraining step on one page, and the state that it updates."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from functools import reduce
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from muse_fast import ops
from muse_fast.batch import PackedNuclei, Pairs, Views
from muse_fast.config import PretrainConfig
from muse_fast.errors import UserError
from muse_fast.models.archs import check_model
from muse_fast.models.attention import why_not
from muse_fast.models.backbone import Backbone
from muse_fast.models.heads import HeadOutput
from muse_fast.pretraining import logits
from muse_fast.pretraining.centering import sinkhorn_center, update_centers
from muse_fast.pretraining.distill import (
    backbone_of,
    build_student_and_teacher,
    encoder_rates,
    update_teacher,
)
from muse_fast.pretraining.drop_path import draw_scales
from muse_fast.pretraining.flops import step_flops
from muse_fast.pretraining.losses import (
    LOSSES,
    LossInputs,
    Temperatures,
    assignment_entropy,
    image_pairs,
    loss_weights,
    weighted_sum,
)
from muse_fast.pretraining.start import Start, read_networks, read_start
from muse_fast.runtime import checkpoint
from muse_fast.runtime.device import deterministic, fix_cublas_workspace, moved
from muse_fast.runtime.distributed import is_main, rank, sum_over_ranks, world_size
from muse_fast.runtime.options import AUTO
from muse_fast.runtime.tensors import refuse_misfits
from muse_fast.training import graphs
from muse_fast.training.guard import Guard
from muse_fast.training.optim import apply_schedule, build_optimizer, clip_gradients, load_moments, moments
from muse_fast.training.parallel import gradient_sync, is_sharded, parallelise, place, shard
from muse_fast.training.precision import DTYPES, autocast, dtype_of_weights
from muse_fast.training.report import Metrics
from muse_fast.training.schedules import Schedule, schedule_at
from muse_fast.training.sharding import full, like, local, norms


class Batch(NamedTuple):
    """A micro-batch on the device."""

    groups: list[Tensor]  # images of one resolution each, globals first
    nuclei: list[PackedNuclei]  # in the images of each group
    pairs: dict[str, Pairs]  # rows that each head compares
    nucleus_pairs: Tensor  # [] int64, number of nucleus pairs, whose rows in `pairs` are padded
    num_rois: int
    num_globals: int
    scales: Tensor | None  # [branches, images], factors of the student's residual branches


class Trainer:
    """Student, teacher, optimiser and centres, and the step that updates them.

    Attributes:
        step: completed steps.
        steps: steps of the whole run.
        config: the settings, without any ``auto`` that the run decides by itself.
        logits: how ``loss.logit_free`` was decided.
        graphs: how ``train.cuda_graph`` was decided.
    """

    unit = "rois"

    def __init__(self, config: PretrainConfig, device: torch.device) -> None:
        check_model(config)
        self.device, self.step, self.steps = device, 0, config.optim.steps
        self._auto = config.loss.logit_free == AUTO
        self.logits = logits.choose(config, device)
        self.config = config = self.logits.written_into(config)
        dtype = DTYPES[config.train.precision]
        if config.train.deterministic and device.type == "cuda":
            fix_cublas_workspace()  # an evaluation may come before the first step
        if reason := why_not(config.model.attention, device, dtype):
            raise UserError(f"model.attention={config.model.attention} cannot run: {reason}; or use sdpa")
        precise, engine = dtype_of_weights(config.train.precision), config.train.parallel
        self.student, self.teacher = (
            place(network, device, precise, engine, compiled=config.train.compile)
            for network in build_student_and_teacher(config)
        )
        for network in (self.student, self.teacher):
            network.train_encoder = config.optim.freeze_encoder == 0
        self.student_forward = self._parallelise()
        if self._sharded:
            shard(self.teacher, config.train.precision)
        self.graphs = graphs.choose(config.train.cuda_graph, device)
        if self.graphs.on:
            self._record()
        # Walking through the modules takes the host longer than the updates of all parameters.
        self._weights = list(self.student.parameters()), list(self.teacher.parameters())
        center = torch.zeros(config.head.prototypes, device=device, dtype=precise)
        self.centers = {name: center.clone() for name in self.student.heads}
        self.loss_weights = loss_weights(config.loss)
        self.guard = Guard([*(f"{name} loss" for name in self.loss_weights), "gradient norm"], device)
        rates = encoder_rates(self.student.backbone.encoder, config.optim)
        self.optimizer = build_optimizer(self.student, self.guard, config.optim.name, rates)

    @property
    def _sharded(self) -> bool:
        return is_sharded(self.config.train.parallel)

    def _parallelise(self) -> nn.Module:
        train, encoder = self.config.train, self.student.backbone.encoder
        frozen = () if self.student.train_encoder else encoder.parameters()
        return parallelise(self.student, train.parallel, train.precision, frozen=frozen)

    def _record(self) -> None:
        """Let the networks be recorded after a step: first the teacher, as it runs first."""
        recorder = graphs.CudaRecorder(self.device)
        for network in (self.teacher, self.student):
            network.graphed = graphs.Graphed(
                network.dense, network, recorder, after=self.config.optim.accumulate, required=self.graphs.required
            )

    def train_step(self, *micro_batches: Views, measure: bool = True) -> Metrics:
        """Run one optimisation step on this rank's share of the batch; returns its measurements if ``measure``.

        The host does not wait for the device. After a value that is not finite, neither this step nor any later one
        changes weights, teacher or centres; `check` raises it.
        """
        with deterministic(self.device, self.config.train.deterministic):
            return self._train_step(micro_batches, measure)

    def _train_step(self, micro_batches: Sequence[Views], measure: bool) -> Metrics:
        config, schedule = self.config, schedule_at(self.step, self.config)
        if schedule.train_encoder != self.student.train_encoder:
            self._set_train_encoder(schedule.train_encoder)
        batches = self._prepare(micro_batches)
        rois = micro_batches[0].num_rois * len(batches) * world_size()
        nucleus_pairs = sum_over_ranks(reduce(torch.add, (batch.nucleus_pairs for batch in batches)))
        counts: dict[str, Tensor | int] = {  # over all micro-batches and ranks; divisors of the losses
            "rois": rois,
            "image_pairs": len(batches[0].pairs["image"].teacher_rows) * len(batches) * world_size(),
            "nucleus_pairs": nucleus_pairs.clamp(min=1),
        }

        # Forward and backward. Gradients add up to those of means over all micro-batches and ranks.
        self.student.train()
        self.teacher.train()
        self.optimizer.zero_grad(set_to_none=True)
        totals = Totals(self.loss_weights, self.centers)
        for number, batch in enumerate(batches, 1):
            last = number == len(batches)
            with gradient_sync(self.student_forward, last):
                losses, teacher, usage = self._forward(batch, schedule, measure and last)
                losses = {name: loss / counts[LOSSES[name].mean_over] for name, loss in losses.items()}
                loss = weighted_sum(losses, self.loss_weights)
                loss.backward(torch.full_like(loss, world_size()))  # the engines divide by the number of ranks
            totals.add(losses, teacher)
        totals.sum_over_ranks()

        # Check for non-finite values before anything changes.
        if not schedule.train_prototypes:
            for head in self.student.heads.values():
                head.prototypes_v.grad = None
        student, averaged = self._weights
        gradients = [p.grad for p in student if p.grad is not None]
        tensor_norms = norms(gradients)
        grad_norm = torch.linalg.vector_norm(tensor_norms)
        samples = [(views.roi_ids, views.epochs) for views in micro_batches]
        self.guard.look(self.step + 1, [*totals.losses.values(), grad_norm], samples)

        # Update the centres from the teacher as it was, then the student, then the teacher from the student.
        prototypes = [teacher[name].prototypes for name in self.centers]
        centers, momentum = list(self.centers.values()), config.loss.center_momentum
        update_centers(centers, totals.z_sums, totals.rows, prototypes, momentum, self.guard.found_inf)
        if config.optim.clip_grad:
            per_tensor = config.optim.clip == "per_tensor"
            clip_gradients(gradients, tensor_norms if per_tensor else grad_norm, config.optim.clip_grad)
        apply_schedule(self.optimizer, schedule)
        self.optimizer.step()
        update_teacher(local(averaged), local(student), schedule.ema_momentum, self.guard.found_inf)
        self.step += 1

        if not measure:
            return {}
        return {
            "loss": weighted_sum(totals.losses, self.loss_weights),
            **{f"loss_{name}": value for name, value in totals.losses.items()},
            "grad_norm": grad_norm,
            "pairs_per_roi": nucleus_pairs / rois,
            **usage,
            "lr": schedule.lr,
            **({"encoder_lr": schedule.encoder_lr} if schedule.encoder_lr != schedule.lr else {}),
            "weight_decay": schedule.weight_decay,
            "teacher_temp": schedule.teacher_temp,
            "ema_momentum": schedule.ema_momentum,
        }

    def _set_train_encoder(self, train: bool) -> None:
        """Let the encoders of student and teacher learn, or freeze them."""
        for network in (self.student, self.teacher):
            network.train_encoder = train
            if network.graphed is not None:
                network.graphed.reset()
        if not self._sharded:
            self.student_forward = self._parallelise()

    def flops(self, micro_batches: Sequence[Views]) -> float:
        """Return the useful FLOPs of a step on this rank's share of the batch."""
        rois = sum(views.num_rois for views in micro_batches)
        rows = sum(len(views.nuclei.index) for views in micro_batches) / rois
        global_rows = sum(views.num_global_nuclei for views in micro_batches) / rois
        return rois * step_flops(self.config, (rows, global_rows), self.student.train_encoder)

    def check(self) -> None:
        """Check that all steps so far were finite; the host waits for the device.

        Raises:
            NonFiniteError: a step was not; names the first.
        """
        self.guard.check()

    def _prepare(self, micro_batches: Sequence[Views]) -> list[Batch]:
        """Move this rank's views to the device, match nuclei, and draw the paths to drop."""
        first = micro_batches[0]
        num_views, num_rois = first.num_globals + first.num_locals, first.num_rois
        scales = None
        if self.config.model.drop_path and self.student.train_encoder:
            rates, share = self.student.backbone.encoder.drop_rates, num_rois * len(micro_batches)
            scales = draw_scales(rates, self.config.seed, self.step, num_views, share * world_size())
            scales = scales[:, :, rank() * share :].split(num_rois, dim=2)
        return [self._prepare_one(v, None if scales is None else scales[i]) for i, v in enumerate(micro_batches)]

    def _prepare_one(self, views: Views, scales: Tensor | None) -> Batch:
        views = views.to(self.device, non_blocking=True)
        groups, nuclei = views.groups()
        num_rois, num_globals = views.num_rois, views.num_globals
        # For each global, a row is a student at most once: this capacity suffices, and the host waits for no count.
        teacher_rows, student_rows, count = ops.match_nuclei(
            views.nuclei.index,
            views.nuclei.offsets,
            num_rois,
            num_globals,
            capacity=num_globals * len(views.nuclei.index),
        )
        return Batch(
            groups=groups,
            nuclei=nuclei,
            pairs={
                "image": image_pairs(num_rois, num_globals, num_globals + views.num_locals, self.device),
                "nucleus": Pairs(teacher_rows, student_rows),
            },
            nucleus_pairs=count,
            num_rois=num_rois,
            num_globals=num_globals,
            scales=None if scales is None else moved(scales.flatten(1), self.device).to(self.centers["image"].dtype),
        )

    def _forward(
        self, batch: Batch, schedule: Schedule, measure: bool
    ) -> tuple[dict[str, Tensor], dict[str, HeadOutput], dict[str, Tensor]]:
        """Return the undivided losses (equations 3, 6 and 7), the teacher's outputs and, if ``measure``, entropies.

        The student's outputs are not returned, so that the backward of the losses frees its prototypes as it goes.
        """
        config = self.config.loss
        temps = Temperatures(config.student_temp, schedule.teacher_temp)
        with autocast(self.config.train.precision, self.device):
            teacher = self._teacher_outputs(batch)
            student = self.student_forward(batch.groups, batch.nuclei, batch.scales)
            centers = self._centers(teacher, temps.teacher)
            inputs = LossInputs(
                batch.num_rois, batch.num_globals, batch.pairs, student, teacher, centers, temps, config
            )
            losses = {name: LOSSES[name].summed(inputs) for name in self.loss_weights}
        return losses, teacher, _assignment_entropies(student.heads, teacher, centers, temps) if measure else {}

    def _teacher_outputs(self, batch: Batch) -> dict[str, HeadOutput]:
        """Run the teacher, which sees only the globals."""
        # Not in inference mode: a loss may save these for its backward, and FSDP keeps the weights that it gathers.
        with torch.no_grad():
            return self.teacher(batch.groups[:1], batch.nuclei[:1], None).heads

    @torch.no_grad()
    def _centers(self, teacher: Mapping[str, HeadOutput], temp: float) -> dict[str, Tensor]:
        if self.config.loss.centering == "ema":
            return self.centers
        return {name: sinkhorn_center(output.logits(), temp) for name, output in teacher.items()}

    def save(self, run: Path) -> Path | None:
        """Write a checkpoint of everything that the next step depends on; all ranks call it, the main rank writes.

        Raises:
            NonFiniteError: a step was not finite, so the state is not saved.
        """
        self.check()
        tensors = {
            "student": self.student.state_dict(),
            "teacher": self.teacher.state_dict(),
            "optimizer": moments(self.student, self.optimizer),
            "state": {f"center/{name}": center for name, center in self.centers.items()},
        }
        whole = {stem: {name: full(t) for name, t in named.items()} for stem, named in tensors.items()}
        if not is_main():
            return None
        state = {"step": self.step, "config": dataclasses.asdict(self.config)}
        return checkpoint.save(run, self.step, whole, state, keep_every=self.config.train.keep_every)

    def load(self, folder: Path) -> None:
        """Continue from the checkpoint ``folder``, which any number of ranks may have written.

        Where the settings say ``auto``, those of the checkpoint count, so that the run goes on bit for bit.

        Raises:
            CheckpointError: a file is damaged.
        """
        state = checkpoint.read_state(folder)
        self.step = state["step"]
        if self._auto:
            self.logits = logits.recorded(state["config"])
            self.config = self.logits.written_into(self.config)
        self._take(read_networks(folder), str(folder))
        load_moments(self.student, self.optimizer, checkpoint.read_tensors(folder, "optimizer"))

    def start_from(self, init: str | Path) -> dict[str, Any]:
        """Begin with the weights that ``model.init`` names, see `muse_fast.pretraining.start.read_start`.

        Returns:
            Names of tensors that were loaded, are new, or were left out: `muse_fast.pretraining.start.Start.report`.

        Raises:
            CheckpointError: a file is damaged.
            UserError: the weights do not fit; nothing has changed.
        """
        start = read_start(str(init), self.config)
        self._take(start, f"model.init={init}")
        return start.report(self.student.state_dict())

    def _take(self, start: Start, origin: str) -> None:
        given = ((self.student, start.student), (self.teacher, start.teacher))
        for network, tensors in given:
            expected = {name: t for name, t in network.state_dict().items() if name.startswith(start.part)}
            refuse_misfits(expected, tensors, origin, self.config.model.arch)
        for network, tensors in given:
            state = network.state_dict()
            network.load_state_dict({name: like(t, state[name]) for name, t in tensors.items()}, strict=False)
        for name, center in start.centers.items():
            self.centers[name].copy_(center)

    def teacher_backbone(self) -> Backbone:
        """Return the teacher's backbone, unsharded on every rank, for evaluation only; all ranks call it."""
        if not self._sharded:
            return self.teacher.backbone
        state = {name: full(t) for name, t in self.teacher.backbone.state_dict().items()}
        backbone = backbone_of(self.config).to(self.device)
        backbone.load_state_dict(state)
        return backbone.requires_grad_(False)


class Totals:
    """Sums of a step over micro-batches and, after `sum_over_ranks`, over ranks.

    Attributes:
        losses: ``[]`` each.
        rows: ``[heads]``, numbers of the teacher's rows.
        z_sums: ``[heads, d]``, sums of the teacher's bottleneck rows.
    """

    def __init__(self, losses: Collection[str], heads: Collection[str]) -> None:
        self._losses, self._heads, self._parts = list(losses), list(heads), list[Tensor]()

    @torch.no_grad()
    def add(self, losses: Mapping[str, Tensor], teacher: Mapping[str, HeadOutput]) -> None:
        """Add a micro-batch."""
        zs = [teacher[name].z for name in self._heads]
        rows = [z.new_full((1,), len(z)) for z in zs]
        self._parts.append(
            torch.cat([torch.stack([losses[name] for name in self._losses]), *rows, *(z.sum(dim=0) for z in zs)])
        )

    def sum_over_ranks(self) -> None:
        sums = sum_over_ranks(reduce(torch.add, self._parts))  # one tensor, for one all-reduce
        losses, self.rows, z_sums = sums.tensor_split((len(self._losses), len(self._losses) + len(self._heads)))
        self.losses = dict(zip(self._losses, losses, strict=True))
        self.z_sums = z_sums.view(len(self._heads), -1)


def _assignment_entropies(
    student: Mapping[str, HeadOutput],
    teacher: Mapping[str, HeadOutput],
    centers: Mapping[str, Tensor],
    temps: Temperatures,
) -> dict[str, Tensor]:
    """Return the entropies of the assignments of this rank's rows; heads without rows are omitted."""
    entropies: dict[str, Tensor] = {}
    for name in student:
        for who, output, center, temp in (
            ("teacher", teacher[name], centers[name], temps.teacher),
            ("student", student[name], None, temps.student),
        ):
            if len(output.z):
                of_mean, of_row = assignment_entropy(output, center, temp)
                entropies |= {f"{who}_{name}_mean_entropy": of_mean, f"{who}_{name}_row_entropy": of_row}
    return entropies
