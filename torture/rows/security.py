"""S1, S2: files that try to run code or to reach outside their folder."""

from __future__ import annotations

import ast
import io
import json
import os
import pickle
import shutil
import sys
import zipfile
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from muse_fast import evaluate, export, load_backbone, predict, pretrain
from muse_fast.config import load_config
from muse_fast.errors import UserError
from muse_fast.finders.learned import read_finder
from muse_fast.images.geojson import read_geojson_points
from muse_fast.images.image_files import read_image
from muse_fast.images.points_csv import read_points
from muse_fast.roiset import records as roiset_format
from muse_fast.roiset.roiset import RoiSet
from muse_fast.runtime import checkpoint, cli
from muse_fast.runtime.atomic import file_sha256
from muse_fast.sources import open_source
from muse_fast.sources.arrays import map_npy, read_npy_mapping
from torture import toy
from torture.harness import Outcome, Row, Scale, Tally
from torture.rows.checkpoints import filled
from torture.suite import ROOT

# ------------------------------------------------------------------------------------------------------- unsafe calls

_UNPICKLERS = {"load", "loads", "Unpickler", "read_pickle", "load_pickle"}
_PICKLE_MODULES = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "jsonpickle"}
_EVALUATORS = {"eval", "exec"}


def unsafe_calls(folder: Path) -> list[str]:
    """Return the calls in a folder's Python files that could let a data file run code."""
    found = []
    for path in sorted(folder.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and (reason := _why_unsafe(node)):
                found.append(f"{path.name}:{node.lineno}: {reason}")
            if isinstance(node, ast.ImportFrom) and node.module in _PICKLE_MODULES:
                found += [f"{path.name}:{node.lineno}: {a.name}" for a in node.names if a.name in _UNPICKLERS]
    return found


def _why_unsafe(call: ast.Call) -> str | None:
    function, given = call.func, {keyword.arg: keyword.value for keyword in call.keywords}
    owner = function.value.id if isinstance(function, ast.Attribute) and isinstance(function.value, ast.Name) else ""
    name = function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")
    if owner in _PICKLE_MODULES and name in _UNPICKLERS:
        return f"{owner}.{name}"
    if name in _EVALUATORS and isinstance(function, ast.Name):
        return name
    if owner == "torch" and name == "load" and not _is(given.get("weights_only"), True):
        return "torch.load without weights_only=True"
    if owner == "np" and name == "load" and not _is(given.get("allow_pickle"), False):
        return "np.load without allow_pickle=False"
    if owner == "yaml" and name in {"load", "unsafe_load", "full_load"}:
        return f"yaml.{name}"
    if name in {"allow_pickle", "weights_only"} or _is(given.get("allow_pickle"), True):
        return "allow_pickle=True"
    return None


def _is(node: ast.expr | None, value: bool) -> bool:
    return isinstance(node, ast.Constant) and node.value is value


# --------------------------------------------------------------------------------------------------------- S1: payloads


class Payload:
    """Makes a folder when it is unpickled."""

    def __init__(self, trap: Path) -> None:
        self.trap = trap

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        return os.mkdir, (str(self.trap),)


def payloads(trap: Path) -> dict[str, bytes]:
    """Wrap a payload in each format that loaders are known to execute."""
    payload = Payload(trap)
    content = {"teacher": {"module.backbone.cls_token": payload}, "config": payload}
    zipped, legacy, array = io.BytesIO(), io.BytesIO(), io.BytesIO()
    torch.save(content, zipped)
    torch.save(content, legacy, _use_new_zipfile_serialization=False)
    np.save(array, np.array({"inst_map": payload, "type_map": payload}, dtype=object))
    return {
        "pickle": pickle.dumps(content),
        "pickle of protocol 0": pickle.dumps(content, protocol=0),
        "torch.save": zipped.getvalue(),
        "torch.save, legacy": legacy.getvalue(),
        "npy": array.getvalue(),
        "YAML": f"model: !!python/object/apply:os.mkdir ['{trap}']\noptim: {{lr: !!python/name:os.system }}\n".encode(),
        "JSON": json.dumps({"__reduce__": ["os.mkdir", [str(trap)]], "py/reduce": [str(trap)]}).encode(),
    }


def _command(main: Callable[..., int], *argv: str) -> None:
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        cli.run(main, [str(each) for each in argv])


def _fix_manifest(folder: Path, name: str) -> None:
    manifest = folder / checkpoint.MANIFEST
    if name != checkpoint.MANIFEST:
        content = json.loads(manifest.read_text())
        content[name] = {"bytes": (folder / name).stat().st_size, "sha256": file_sha256(folder / name)}
        manifest.write_text(json.dumps(content))


def loaders(folder: Path) -> Iterator[tuple[str, str, Callable[[Path], Any]]]:
    """Yield every way in: its description, the name for the file, and the function that opens it."""
    where = toy.prepare(folder)

    def run_with(name: str) -> Callable[[Path], Any]:
        def opened(file: Path) -> None:
            """Try every function that reads checkpoints, and one of two ways to start a run, as that takes seconds."""
            run = file.parent / "run"
            shutil.rmtree(run, ignore_errors=True)
            state = {"step": 1, "config": asdict(load_config(where / "toy.yaml"))}
            step = checkpoint.save(run, 1, filled(1, 10), state, keep_every=0)
            (step / name).write_bytes(file.read_bytes())
            _fix_manifest(step, name)
            for read in (
                lambda: checkpoint.latest(run),
                lambda: checkpoint.read_state(checkpoint.folder_of(run, 1)),
                lambda: checkpoint.read_tensors(checkpoint.folder_of(run, 1), "teacher"),
                lambda: load_backbone(None, run),
            ):
                try:
                    read()
                except UserError:
                    continue
            start = ["--resume", str(step)] if len(file.read_bytes()) % 2 else [f"model.init={step}"]
            _command(pretrain.main, *toy.PRETRAIN.arguments(where, file.parent / "other"), *start)

        return opened

    def roiset_with(name: str) -> Callable[[Path], Any]:
        def opened(file: Path) -> None:
            rois = file.parent / "rois"
            shutil.rmtree(rois, ignore_errors=True)
            shutil.copytree(where / "rois", rois)
            (rois / name).write_bytes(file.read_bytes())
            RoiSet(rois).verify()

        return opened

    def timm_folder(file: Path) -> None:
        timm = file.parent / "timm"
        timm.mkdir(exist_ok=True)
        for name in ("config.json", "model.safetensors", "decoder.safetensors"):
            (timm / name).write_bytes(file.read_bytes())
        load_backbone(None, timm)

    for suffix in ("pth", "safetensors"):
        yield f"load_backbone .{suffix}", f"weights.{suffix}", lambda file: load_backbone(None, file)
    yield "load_backbone, timm folder", "timm.bin", timm_folder
    for name in ("teacher.safetensors", "state.json", "MANIFEST.json"):
        yield f"a run's {name}: latest, read, resume, init", name, run_with(name)
    for name in ("roiset.json", "index.bin", "nuclei.bin", "shard-00000.bin"):
        yield f"a ROI set's {name}", name, roiset_with(name)
    yield "load_config", "config.yaml", load_config
    yield (
        "pretrain --config",
        "config.yaml",
        lambda file: _command(pretrain.main, "--config", str(file), "--out", str(file.parent / "o")),
    )
    yield "map_npy", "array.npy", map_npy
    yield "read_npy_mapping", "labels.npy", lambda file: read_npy_mapping(file, ("inst_map", "type_map"))
    yield "read_points", "points.csv", lambda file: read_points(file, 100, 100, 2)
    yield "read_image", "image.png", read_image
    yield "read_geojson_points", "cells.geojson", lambda file: read_geojson_points(file, 0.25)
    yield "detector weights", "detector.safetensors", read_finder
    yield (
        "predict --weights",
        "detector.safetensors",
        lambda file: _command(predict.main, "--weights", str(file), "--out", str(file.parent / "o"), str(file)),
    )
    yield (
        "export",
        "weights.pth",
        lambda file: _command(export.main, str(file), str(file.parent / "e.safetensors"), "--format", "safetensors"),
    )
    yield (
        "evaluate knn",
        "weights.pth",
        lambda file: _command(
            evaluate.main, "knn", "--weights", str(file), "--data", "synthetic:2", "--json", str(file.parent / "j")
        ),
    )
    yield "the published evaluation cache", "cache.pt", lambda file: list(open_source(f"muse:{file.parent}", mpp=0.5))


class Watch:
    """Records unpickling, programs and connections, by Python's audit hook, while ``on``."""

    _EVENTS = ("pickle.find_class", "os.system", "os.exec", "os.posix_spawn", "subprocess.Popen", "socket.connect")

    def __init__(self) -> None:
        self.on, self.seen = False, []  # type: ignore[var-annotated]
        sys.addaudithook(self._hook)

    def _hook(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self.on and (event in self._EVENTS or event.startswith("socket.getaddrinfo")):
            self.seen.append(f"{event}{arguments!r:.80}")


def no_code_runs(scale: Scale) -> Outcome:
    """Try each payload through each way in: nothing is unpickled, started or connected to; look for unsafe calls."""
    tally, watch, trap = Tally(), Watch(), scale.folder / "PWNED"
    for number, (what, name, opened) in enumerate(loaders(scale.folder)):
        for kind, content in [*payloads(trap).items()][: scale.of(7, 3)]:
            place = scale.folder / f"{number}-{kind.replace(' ', '_')}"
            place.mkdir()
            (place / name).write_bytes(content)
            watch.seen.clear()
            watch.on, said = True, ""
            try:
                opened(place / name)
            except UserError as error:
                said = str(error)
            except Exception as error:  # not a proper refusal
                said = f"{type(error).__name__}: {error}"
                watch.seen.append(said)
            watch.on = False
            shutil.rmtree(place)
            tally.add(not trap.exists() and not watch.seen, f"{what}, {kind}: {watch.seen[:3]} {said[:120]}")
            if trap.exists():
                trap.rmdir()
    ways = number + 1
    for package in ("muse_fast", "kernels"):
        found = unsafe_calls(ROOT / package)
        tally.add(not found, f"{package}: {found}")
    return tally.outcome(f"{ways} ways in x {scale.of(7, 3)} payloads; no call that unpickles in the package")


# ----------------------------------------------------------------------------------------------------- S2: hostile sets


def hostile_sets(folder: Path) -> dict[str, Callable[[Path], None]]:
    """Return changes to a valid ROI set that update its hashes, as an attacker would."""

    def info(**changes: Any) -> Callable[[Path], None]:
        return lambda rois: _edit_info(rois, lambda content: content.update(changes))

    def record(field: str, value: Any) -> Callable[[Path], None]:
        def change(rois: Path) -> None:
            index = np.fromfile(rois / "index.bin", roiset_format.INDEX)
            index[field][1] = value
            index.tofile(rois / "index.bin")
            _rehash(rois)

        return change

    def link(rois: Path) -> None:
        (rois / "shard-00000.bin").unlink()
        (rois / "shard-00000.bin").symlink_to("/dev/zero")

    def pipe(rois: Path) -> None:
        (rois / "shard-00000.bin").unlink()
        os.mkfifo(rois / "shard-00000.bin")

    def renamed(name: str) -> Callable[[Path], None]:
        return lambda rois: _edit_info(rois, lambda content: content.update(shards={name: 1}))

    return {
        "shard ../../x": renamed("../../x"),
        "shard /etc/passwd": renamed("/etc/passwd"),
        "shard is a link to /dev/zero": link,
        "shard is a pipe": pipe,
        "shards are a list": info(shards=[1, 2]),
        "sizes are strings": info(shards={"shard-00000.bin": "many"}),
        "a negative count": info(num_rois=-1),
        "a count of 2**62": info(num_rois=2**62),
        "a count of 1e400": info(num_nuclei=float("inf")),
        "counts are strings": info(num_rois="5"),
        "slides are a number": info(slides=5),
        "fewer slides than the index names": info(slides=[]),
        "splits are null": info(splits=None),
        "labels are a mapping": info(label_names={"a": 1}),
        "hashes are a list": info(sha256=[]),
        "hashes are missing": info(sha256={}),
        "info nested 100,000 deep": lambda rois: (rois / "roiset.json").write_text("[" * 100_000),
        "slide 9 of 5": record("slide", 9),
        "slide -1": record("slide", -1),
        "split 7 of 1": record("split", 7),
        "shard 4,000,000,000": record("shard", 4_000_000_000),
        "offset 2**63": record("offset", 2**63),
        "offset beyond the end": record("offset", 10**9),
        "length of 4 GB": record("length", 2**32 - 1),
        "nuclei from -5": record("nuclei", (-5, 2)),
        "nuclei to 2**62": record("nuclei", (0, 2**62)),
        "nuclei backwards": record("nuclei", (9, 3)),
        "width 0": record("width", 0),
        "height 4,000,000,000": record("height", 4_000_000_000),
        "mpp nan": record("mpp", np.nan),
        "negative mpp": record("mpp", -1.0),
        "origin 2**62": record("origin", (2**62, -(2**62))),
    }


def _edit_info(rois: Path, edit: Callable[[dict[str, Any]], Any]) -> None:
    content = json.loads((rois / "roiset.json").read_text())
    edit(content)
    (rois / "roiset.json").write_text(json.dumps(content))


def _rehash(rois: Path) -> None:
    _edit_info(rois, lambda content: content["sha256"].update({"index.bin": file_sha256(rois / "index.bin")}))


def hostile_weights(folder: Path) -> dict[str, bytes]:
    """Return hostile safetensors headers, and an archive whose members point outside."""
    header = json.dumps({"t": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}}).encode()
    overlapping = json.dumps({n: {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]} for n in "ab"}).encode()
    escaping = io.BytesIO()
    with zipfile.ZipFile(escaping, "w") as archive:
        archive.writestr("../../../escaped", b"x")
        archive.writestr("archive/data.pkl", pickle.dumps({"teacher": {}}))
        archive.writestr("archive/version", b"3")
    return {
        "header of 2**63 bytes": (2**63).to_bytes(8, "little") + b"{}",
        "missing header of 90 MB": (90 << 20).to_bytes(8, "little") + b"{}",
        "tensor of 4 TB": len(header).to_bytes(8, "little") + header,
        "tensors that overlap": len(overlapping).to_bytes(8, "little") + overlapping + bytes(4),
        "zip that points outside": escaping.getvalue(),
        "empty": b"",
    }


def nothing_escapes(scale: Scale) -> Outcome:
    """Load hostile ROI sets and weights: each raises a UserError naming the file, and nothing is written outside."""
    import tracemalloc

    tally, place = Tally(), scale.folder / "place"
    place.mkdir()
    valid = toy.prepare(scale.folder)
    before = sorted(scale.folder.parent.glob("escaped*"))
    tracemalloc.start()
    for name, change in hostile_sets(scale.folder).items():
        rois = place / "rois"
        shutil.rmtree(rois, ignore_errors=True)
        shutil.copytree(valid / "rois", rois)
        change(rois)
        tracemalloc.reset_peak()
        try:
            said = "; ".join(RoiSet(rois).verify())
        except UserError as error:
            said = str(error)
        except Exception as error:
            tally.add(False, f"{name}: {type(error).__name__}: {error}")
            continue
        peak = tracemalloc.get_traced_memory()[1]
        harmless = name.startswith("origin")  # a ROI may lie anywhere in its slide
        named = (str(rois) in said) != harmless
        tally.add(named and peak < 64 << 20, f"{name}: {peak >> 20} MiB, said {said[:200]!r}")
    tracemalloc.stop()
    for name, content in hostile_weights(scale.folder).items():
        for suffix in ("safetensors", "pth"):
            file = place / f"weights.{suffix}"
            file.write_bytes(content)
            try:
                load_backbone(None, file)
                said = "nothing"
            except UserError as error:
                said = str(error)
            except Exception as error:
                said = f"{type(error).__name__}: {error}"
            tally.add(said.startswith(str(file)), f"{name}.{suffix}: said {said[:200]!r}")
    escaped = sorted(scale.folder.parent.glob("escaped*")) != before or (scale.folder / "escaped").exists()
    tally.add(not escaped, "something was written outside")
    return tally.outcome("ROI sets with updated hashes, and weights")


ROWS = [
    Row(
        "S1",
        "loading never runs code",
        "every payload through every way in: nothing executed, unpickled or connected; no unsafe call in the package",
        no_code_runs,
    ),
    Row(
        "S2",
        "hostile ROI sets and weights are named and refused",
        "each refused with its path, within 64 MiB; nothing written outside (there are no tar shards)",
        nothing_escapes,
    ),
]
