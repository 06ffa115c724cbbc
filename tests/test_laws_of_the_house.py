"""Reads the source as syntax trees and holds the laws of `docs/architecture.md`: who may import whom, who may print or exit."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "picture3d"
SOURCES = sorted(PACKAGE.rglob("*.py"))

# room -> rooms it may import from (besides itself); the modules `errors`, `files`, `workers` and `config` are open to all.
ALLOWED: dict[str, set[str]] = {
    "structures": set(),
    "formats": {"structures"},
    "synthetic": {"structures", "formats"},
    "datasets": {"structures", "formats", "ops"},
    "ops": {"structures"},
    "models": {"structures", "ops"},
    "teachers": {"structures", "formats", "ops", "models"},
    "pretrain": {"structures", "ops", "models"},
    "tasks": {"structures", "ops", "models", "training", "evaluation"},
    "training": {"structures", "ops"},
    "evaluation": {"structures", "formats", "ops"},
    "view": {"structures", "evaluation"},
    "recipes": {"structures", "datasets", "models", "teachers", "pretrain", "tasks", "training"},
    "commands": {
        "structures", "formats", "synthetic", "datasets", "ops", "models", "teachers", "pretrain", "tasks", "training",
        "evaluation", "view", "recipes",
    },
    "cli": {"commands"},
    "errors": set(),
    "files": set(),
    "workers": set(),
    "config": set(),
}  # fmt: skip
# Geometry is nobody's property: the object sampler and the metrics may use these two and no other operators.
SHARED_GEOMETRY = {"picture3d.ops.box_iou", "picture3d.ops.scatter"}
# Training loads weights by name into any module, so its checkpoint files may be used where encoders are handed over.
# The loop says which processes compute a step; counts, draws and norms below ask that one module.
TRAINING_FROM_OPS = {"picture3d.ops.processes"}
TASKS_FROM_TRAINING = {"picture3d.training.checkpoint", "picture3d.training.weights_import"}

# Batches are tensors, and the geometry of `ops.box_iou` takes tensors.
TORCH_ALL_THE_SAME = {"loading.py", "object_geometry.py", "waymo_detection.py"}


def room_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return parts[0]


def imported_modules(tree: ast.AST) -> list[str]:
    modules: list[str] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            modules += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute here"
            modules.append(node.module or "")
    return modules


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_go_one_way(path: Path):
    room = room_of(path)
    if room == "__init__":
        return
    for module in imported_modules(ast.parse(path.read_text())):
        if not module.startswith("picture3d."):
            assert "triton" not in module or room == "ops", f"{path.name}: only ops may use triton"
            continue
        target = module.split(".")[1]
        if target in {room, "errors", "files", "workers", "config", "__version__"}:
            continue
        assert target in ALLOWED[room], f"{room} may not import {module}"
        if target == "ops" and room in {"datasets", "evaluation"}:
            assert module in SHARED_GEOMETRY, f"{room} may use shared geometry only, not {module}"
        if target == "ops" and room == "training":
            assert module in TRAINING_FROM_OPS, f"training may use what processes share only, not {module}"
        if target == "training" and room == "tasks":
            assert module in TASKS_FROM_TRAINING, f"tasks may use training's checkpoints only, not {module}"


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_only_the_command_line_prints_or_exits_and_nobody_pickles(path: Path):
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and room_of(path) != "cli":
            assert node.func.id not in {"print", "exit", "quit"}, f"line {node.lineno}: {node.func.id}()"
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            owner = node.func.value.id if isinstance(node.func.value, ast.Name) else ""
            name = node.func.attr
            if owner == "torch" and name == "load":
                flags = {k.arg: getattr(k.value, "value", None) for k in node.keywords}
                assert flags.get("weights_only") is True, f"line {node.lineno}: torch.load without weights_only=True"
            if owner in {"np", "numpy"} and name == "load":
                flags = {k.arg: getattr(k.value, "value", None) for k in node.keywords}
                assert flags.get("allow_pickle", False) is False, f"line {node.lineno}: pickled numpy files are never opened"
            assert (owner, name) != ("torch", "save"), f"line {node.lineno}: weights are written as safetensors"
            assert not (owner == "sys" and name == "exit" and room_of(path) != "cli"), f"line {node.lineno}: sys.exit"
    for module in imported_modules(tree):
        assert module.split(".")[0] not in {"pickle", "dill", "joblib", "shelve", "marshal"}, f"{path.name} imports {module}"


# The lock's own file, of which the first bytes are taken; /proc; the page's templates; tables whose sizes were looked at.
READS_WHOLE = {"files.py", "datasets/projection.py", "view/report.py", "formats/parquet.py"}


READS = {"read_text", "read_bytes", "read", "readlines", "readline"}


def test_no_file_of_a_user_is_read_whole_without_a_bound():
    found = []
    for path in SOURCES:
        if str(path.relative_to(PACKAGE)) in READS_WHOLE:
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            called = node.func if isinstance(node, ast.Call) and not node.args else None
            if isinstance(called, ast.Attribute) and called.attr in READS:
                found.append(f"{path.name}:{called.lineno}")
    assert found == []


NETWORK = {"aiohttp", "fsspec", "ftplib", "http", "httpx", "requests", "smtplib", "socketserver", "urllib", "urllib3"}


def test_only_the_reader_of_urls_and_a_job_of_several_processes_can_open_a_connection():
    for path in SOURCES:
        modules = {module.split(".")[0] for module in imported_modules(ast.parse(path.read_text()))}
        network = modules & {
            "aiohttp",
            "fsspec",
            "ftplib",
            "http",
            "httpx",
            "requests",
            "smtplib",
            "socketserver",
            "urllib",
            "urllib3",
        }
        assert not network or path.name == "remote.py", f"{path} imports {network}"
        if "socket" in modules:  # for the machine's name
            calls = {node.attr for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Attribute)}
            assert not calls & {"create_connection", "socketpair", "AF_INET"}, path


def test_datasets_and_formats_need_no_torch_except_for_batching_and_geometry():
    for path in SOURCES:
        room = room_of(path)
        if room in {"formats", "synthetic", "evaluation", "view", "datasets"} and path.name not in TORCH_ALL_THE_SAME:
            modules = {module.split(".")[0] for module in imported_modules(ast.parse(path.read_text()))}
            assert "torch" not in modules, f"{path} imports torch"
