"""The pretraining run: one step on one page, and the loop around it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from muse_fast import ops
from muse_fast.batch import Pairs, Views
from muse_fast.config import PretrainConfig
from muse_fast.ssl.centering import sinkhorn_center, update_center
from muse_fast.ssl.distill import build_student_and_teacher, update_teacher
from muse_fast.ssl.losses import assignment_entropy, distillation_loss, image_pairs
from muse_fast.train import checkpoint
from muse_fast.train.optim import apply_schedule, build_optimizer
from muse_fast.train.schedules import schedule_at

HEADS = ("image", "nucleus")


class NonFiniteError(RuntimeError):
    """A loss or the gradients are nan or infinite. Nothing was updated by the step that raised it."""


class Trainer:
    """Student, teacher, optimiser and centres, and the step that moves them.

    Attributes:
        step: completed steps.
    """

    def __init__(self, config: PretrainConfig, device: torch.device) -> None:
        self.config, self.device, self.step = config, device, 0
        self.student, self.teacher = (n.to(device) for n in build_student_and_teacher(config))
        self.optimizer = build_optimizer(self.student)
        self.centers = {name: torch.zeros(config.head.prototypes, device=device) for name in HEADS}

    def train_step(self, views: Views, *, measure: bool = True) -> dict[str, float]:
        """One optimisation step on a batch of B ROIs; returns its measurements, or nothing unless ``measure``.

        Raises:
            NonFiniteError: before weights, teacher or centres are touched.
        """
        loss_config, schedule = self.config.loss, schedule_at(self.step, self.config)
        num_rois, num_globals = views.num_rois, views.num_globals
        num_views = num_globals + views.num_locals

        # Which rows to compare is settled on the host, where the batch still is: no wait for the device.
        pairs = {
            "image": image_pairs(num_rois, num_globals, num_views),
            "nucleus": Pairs(*ops.match_nuclei(views.nuclei.index, views.nuclei.offsets, num_rois, num_globals)),
        }
        pairs = {name: rows.to(self.device, non_blocking=True) for name, rows in pairs.items()}
        teacher_nuclei = views.nuclei.images(0, num_globals * num_rois).to(self.device, non_blocking=True)
        views = views.to(self.device, non_blocking=True)
        groups = [views.global_images, views.local_images] if views.num_locals else [views.global_images]

        # Forward: the teacher sees the globals, the student everything.
        self.student.train()
        self.teacher.train()
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.train.precision == "bf16"):
            with torch.no_grad():
                teacher = self.teacher([views.global_images], teacher_nuclei)
            student = self.student(groups, views.nuclei)

        # Losses (equations 3, 6, 7): the same centred-softmax cross-entropy over two kinds of pairs.
        student_logits = {"image": student.image_logits, "nucleus": student.nucleus_logits}
        teacher_logits = {"image": teacher.image_logits, "nucleus": teacher.nucleus_logits}
        centers = {name: self._center(name, teacher_logits[name], schedule.teacher_temp) for name in HEADS}
        losses = {
            name: distillation_loss(
                student_logits[name],
                teacher_logits[name],
                centers[name],
                pairs[name],
                loss_config.student_temp,
                schedule.teacher_temp,
            )
            for name in HEADS
        }
        loss = loss_config.lambda_image * losses["image"] + loss_config.lambda_nucleus * losses["nucleus"]

        # Backward, and a last look before anything is changed.
        apply_schedule(self.optimizer, schedule)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        if not schedule.train_prototypes:
            self.student.image_head.prototypes_v.grad = None
            self.student.nucleus_head.prototypes_v.grad = None
        gradients = [p.grad for p in self.student.parameters() if p.grad is not None]
        grad_norm = nn.utils.get_total_norm(gradients)
        self._refuse_non_finite({**{f"{n} loss": v for n, v in losses.items()}, "gradient norm": grad_norm}, views)

        # Update: the centres by the teacher that was asked, the student, the teacher by the student.
        momentum = loss_config.center_momentum
        update_center(self.centers["image"], teacher.image_z, self.teacher.image_head.prototypes(), momentum)
        update_center(self.centers["nucleus"], teacher.nucleus_z, self.teacher.nucleus_head.prototypes(), momentum)
        if self.config.optim.clip_grad:
            nn.utils.clip_grads_with_norm_(self.student.parameters(), self.config.optim.clip_grad, grad_norm)
        self.optimizer.step()
        update_teacher(self.teacher, self.student, schedule.ema_momentum)
        self.step += 1

        if not measure:
            return {}
        return {
            "loss": loss.item(),
            **{f"loss_{name}": value.item() for name, value in losses.items()},
            "grad_norm": grad_norm.item(),
            "pairs_per_roi": pairs["nucleus"].teacher.numel() / num_rois,
            **_entropies("teacher", teacher_logits, centers, schedule.teacher_temp),
            **_entropies("student", student_logits, None, loss_config.student_temp),
            "lr": schedule.lr,
            "weight_decay": schedule.weight_decay,
            "teacher_temp": schedule.teacher_temp,
            "ema_momentum": schedule.ema_momentum,
        }

    def _center(self, name: str, teacher_logits: Tensor, temp: float) -> Tensor:
        if self.config.loss.centering == "sinkhorn":
            return sinkhorn_center(teacher_logits, temp)
        return self.centers[name]

    def _refuse_non_finite(self, terms: Mapping[str, Tensor], views: Views) -> None:
        bad = [name for name, value in terms.items() if not torch.isfinite(value)]
        if bad:
            raise NonFiniteError(
                f"step {self.step + 1}: {' and '.join(bad)} not finite "
                f"({', '.join(f'{name} {value.item():g}' for name, value in terms.items())}) "
                f"on ROIs {views.roi_ids.tolist()}; weights, teacher and centres are as they were"
            )

    def save(self, run: Path) -> Path:
        """Write a checkpoint of everything that the next step depends on."""
        moments = {
            f"{name}/{key}": value
            for name, parameter in self.student.named_parameters()
            if parameter in self.optimizer.state
            for key, value in self.optimizer.state[parameter].items()
        }
        random_state = {"rng/cpu": torch.get_rng_state()}
        if self.device.type == "cuda":
            random_state["rng/cuda"] = torch.cuda.get_rng_state(self.device)
        return checkpoint.save(
            run,
            self.step,
            {
                "student": self.student.state_dict(),
                "teacher": self.teacher.state_dict(),
                "optimizer": moments,
                "state": {**{f"center/{name}": c for name, c in self.centers.items()}, **random_state},
            },
            {"step": self.step, "config": dataclasses.asdict(self.config)},
            keep_every=self.config.train.keep_every,
        )

    def load(self, folder: Path) -> None:
        """Continue from the checkpoint ``folder``, bit for bit.

        Raises:
            CheckpointError: a file is damaged.
        """
        self.step = checkpoint.read_state(folder)["step"]
        self.student.load_state_dict(checkpoint.read_tensors(folder, "student"))
        self.teacher.load_state_dict(checkpoint.read_tensors(folder, "teacher"))
        parameters = dict(self.student.named_parameters())
        self.optimizer.state.clear()
        for key, value in checkpoint.read_tensors(folder, "optimizer").items():
            name, _, moment = key.rpartition("/")
            parameter = parameters[name]
            self.optimizer.state[parameter][moment] = value.to(parameter.device)
        state = checkpoint.read_tensors(folder, "state")
        for name in HEADS:
            self.centers[name].copy_(state[f"center/{name}"])
        torch.set_rng_state(state["rng/cpu"])
        if "rng/cuda" in state and self.device.type == "cuda":
            torch.cuda.set_rng_state(state["rng/cuda"], self.device)


def _entropies(
    who: str, logits: Mapping[str, Tensor], centers: Mapping[str, Tensor] | None, temp: float
) -> dict[str, float]:
    """Entropy of the mean assignment and mean entropy of an assignment, per head, as shares of ln K."""
    out = {}
    for name, values in logits.items():
        center = centers[name] if centers else torch.zeros(values.shape[1], device=values.device)
        of_mean, of_row = assignment_entropy(values.detach(), center, temp)
        if values.shape[0]:
            scale = torch.log(torch.tensor(float(values.shape[1]))).item()
            out[f"{who}_{name}_mean_entropy"] = of_mean.item() / scale
            out[f"{who}_{name}_row_entropy"] = of_row.item() / scale
    return out
