"""`prepare`, `targets` and `pretrain` in several processes of one job: the same files as one process makes."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest

from picture3d.cli import main
from picture3d.commands.data import targets
from picture3d.commands.prepare import prepare_points
from picture3d.datasets.prepared import PreparedDataset
from picture3d.recipes.catalogue import pretraining_recipe, tiny
from picture3d.training.distributed import Team
from picture3d.training.runlog import RunFolder
from tests import team_work

LOGS, SWEEPS = 5, 2


def made_points(root: Path) -> Path:
    for log in range(LOGS):
        (root / f"log-{log}").mkdir(parents=True)
        for sweep in range(SWEEPS):
            rng = np.random.default_rng([log, sweep])
            xyz = rng.uniform([-20, -20, -1], [20, 20, 2], (400, 3))
            np.save(root / f"log-{log}" / f"{sweep}.npy", np.column_stack([xyz, rng.random(400)]).astype(np.float32))
    return root


def contents(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


def prepare(raw: Path, out: Path) -> str:
    said, _ = prepare_points(
        raw, out, layout="x,y,z,intensity", intensity="0-1", labels=None, label_set=None, poses=None, val=1, name="points"
    )
    return said


def compute_targets(prepared: Path) -> str:
    return targets(prepared, teacher="handcrafted", weights=None, superclasses=4, seed=0, device="cpu", threads=0)


def command(*words: str | Path) -> list[str]:
    return [*map(str, words)]


def run_all(commands: list[list[str]], environments: list[dict[str, str]]) -> None:
    """Starts all at once; every one has to succeed. When one fails the others, which may wait for it, are ended."""
    base = {**os.environ, "OMP_NUM_THREADS": "1"}
    with ExitStack() as stack:
        files = [stack.enter_context(tempfile.TemporaryFile("w+")) for _ in commands]
        processes = [
            subprocess.Popen(words, env={**base, **extra}, stdout=file, stderr=subprocess.STDOUT)
            for words, extra, file in zip(commands, environments, files, strict=True)
        ]
        end = time.monotonic() + 150
        while any(process.poll() is None for process in processes) and time.monotonic() < end:
            if any(process.returncode for process in processes):
                break
            time.sleep(0.05)
        codes = [process.returncode for process in processes]  # None: still at work, or waiting
        for process in processes:
            process.terminate()
            process.wait(timeout=60)
        for file in files:
            file.seek(0)
        said = [file.read() for file in files]
    assert codes == [0] * len(codes), f"{codes}\n" + "\n".join(text[:3000] for text in said)


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1)])
def test_the_parts_of_a_job_add_up_to_the_files_of_one_process_in_any_order(tmp_path, monkeypatch, order):
    raw = made_points(tmp_path / "raw")
    prepare(raw, tmp_path / "one")
    compute_targets(tmp_path / "one")
    monkeypatch.setenv("WORLD_SIZE", "3")
    for step in (lambda: prepare(raw, tmp_path / "parts"), lambda: compute_targets(tmp_path / "parts")):
        for rank in order:
            monkeypatch.setenv("RANK", str(rank))
            said = step()
            if rank != order[-1] and not (tmp_path / "parts" / "targets").exists():
                assert not (tmp_path / "parts" / "dataset.json").exists(), "unfinished until the last part is there"
            assert f"({len(range(rank, LOGS, 3))} made now)" in said
    assert contents(tmp_path / "parts") == contents(tmp_path / "one")


def test_processes_side_by_side_leave_the_files_of_one_and_no_lock(tmp_path):
    raw = made_points(tmp_path / "raw")
    prepare(raw, tmp_path / "one")
    words = command(sys.executable, "-m", "picture3d.cli", "prepare", "points", raw, tmp_path / "two", "--intensity", "0-1")
    run_all([[*words, "--val", "1"]] * 2, [{"RANK": str(rank), "WORLD_SIZE": "2"} for rank in range(2)])
    assert contents(tmp_path / "two") == contents(tmp_path / "one")


@pytest.mark.parametrize("words", [("predict", "{}", "--out", "{}.json"), ("probe", "{}"), ("compare", "{}", "{}")])
def test_what_is_not_shared_out_is_refused_in_several_processes(tmp_path, monkeypatch, capsys, words):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr("sys.argv", ["picture3d", *(word.format(tmp_path / "run") for word in words)])
    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == 2
    assert "this command works in one process, and 2 were started" in capsys.readouterr().err


def test_two_processes_score_as_one_does_and_the_first_alone_speaks_and_writes(tmp_path):
    runs = team_work.made_runs(tmp_path / "runs")
    alone = team_work.evaluate_runs(runs, Team())
    kept = {name: (runs / name / "evaluation_val.json").read_bytes() for name in alone}
    for name in alone:
        (runs / name / "evaluation_val.json").unlink()
    done = team_work.launch("evaluate", tmp_path, runs)
    assert done.returncode == 0, done.stderr[-3000:]
    for name, said in alone.items():
        assert [(tmp_path / f"{name}-{rank}.txt").read_text() for rank in range(2)] == [said, ""]
        assert (runs / name / "evaluation_val.json").read_bytes() == kept[name], "to the last bit"
    assert json.loads(alone["segment"])["num_points"] > 800
    counts = json.loads(alone["town-detection"])["counts"]
    assert counts["samples"] == 6
    assert sum(counts["labels"].values()) > 6
    assert sum(counts["predictions"].values()) > 100
    assert "OBJECT_TYPE_TYPE_VEHICLE_LEVEL_1" in json.loads(alone["waymo-detection"])


@pytest.mark.long
def test_two_nodes_of_two_processes_prepare_store_targets_and_train_as_one_process_does(tmp_path):
    raw = made_points(tmp_path / "raw")
    prepare(raw, tmp_path / "one")
    compute_targets(tmp_path / "one")

    def on_two_nodes(*words: str | Path) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        launch = command(sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "2")
        launch += ["--master-addr", "127.0.0.1", "--master-port", str(port)]
        nodes = [[*launch, "--node-rank", str(node), "-m", "picture3d.cli", *command(*words)] for node in range(2)]
        run_all(nodes, [{}, {}])

    two = tmp_path / "two"
    on_two_nodes("prepare", "points", raw, two, "--intensity", "0-1", "--val", "1")
    on_two_nodes("targets", two, "--teacher", "handcrafted", "--superclasses", "4", "--device", "cpu")
    assert contents(two) == contents(tmp_path / "one")

    config = tiny(pretraining_recipe("town-handcrafted", two))
    config = config.model_copy(update={"mask": config.mask.model_copy(update={"kind": "random"})})
    for name, root, size in (("one", tmp_path / "one", 4), ("two", two, 1)):
        data = config.data.model_copy(update={"root": root})
        training = config.training.model_copy(update={"batch_size": size, "max_steps": 3})
        config.model_copy(update={"data": data, "training": training}).save(tmp_path / f"{name}.json")
    pretrain = ("--device", "cpu")
    run_all(
        [
            command(
                sys.executable,
                "-m",
                "picture3d.cli",
                "pretrain",
                "--out",
                tmp_path / "run-one",
                "--config",
                tmp_path / "one.json",
                *pretrain,
            )
        ],
        [{}],
    )
    on_two_nodes("pretrain", "--out", tmp_path / "run-two", "--config", tmp_path / "two.json", *pretrain)
    one, four = (list(RunFolder(tmp_path / f"run-{name}").metrics()) for name in ("one", "two"))
    assert len(one) == len(four) == 3
    for alone, together in zip(one, four, strict=True):
        assert together["losses"]["total"] == pytest.approx(alone["losses"]["total"], rel=1e-4)


@pytest.mark.long
def test_under_torchrun_a_damaged_log_ends_the_job_with_an_error_after_all_others_are_made_and_a_mended_one_is_added(tmp_path):
    raw = made_points(tmp_path / "raw")
    sweep = raw / "log-1" / "0.npy"
    whole = sweep.read_bytes()
    launch = command(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    launch += command("-m", "picture3d.cli", "prepare", "points", raw, tmp_path / "two", "--intensity", "0-1", "--val", "1")
    for _ in range(2):  # the second time four logs are there, and the process that has none to make comes early to its end
        sweep.write_bytes(whole[:200])
        done = subprocess.run(launch, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=150)
        assert done.returncode == 1
        assert f"log log-1 is set aside: {sweep}" in done.stdout
        assert PreparedDataset(tmp_path / "two").logs() == ("log-0", "log-2", "log-3", "log-4")
    sweep.write_bytes(whole)
    run_all([launch], [{}])
    prepare(raw, tmp_path / "one")
    assert contents(tmp_path / "two") == contents(tmp_path / "one")
