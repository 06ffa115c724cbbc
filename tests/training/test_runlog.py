from __future__ import annotations

import io
import json
import os
from pathlib import Path

import pytest

from picture3d.config import FrozenConfig
from picture3d.errors import ConfigError, TrainingError
from picture3d.training.runlog import Progress, RunFolder, describe_environment, duration


class Inner(FrozenConfig):
    width: int = 8
    name: str = "a"


class Outer(FrozenConfig):
    seed: int = 0
    inner: Inner = Inner()
    ratios: tuple[float, ...] = (0.9, 0.45)


def test_a_folder_keeps_its_config_and_refuses_another_naming_the_keys(tmp_path: Path):
    RunFolder(tmp_path / "run").claim(Outer())
    again = RunFolder(tmp_path / "run")
    again.claim(Outer())
    assert Outer.from_tree(again.config_tree()) == Outer()
    with pytest.raises(ConfigError, match=r"inner\.width \(there 8, here 9\).*ratios") as caught:
        RunFolder(tmp_path / "run").claim(Outer(inner=Inner(width=9), ratios=(0.9,)))
    assert "seed" not in str(caught.value)
    assert Outer.from_tree(again.config_tree()) == Outer()


def test_a_run_from_before_a_key_existed_goes_on_unless_the_key_is_used(tmp_path: Path):
    run = RunFolder(tmp_path / "run")
    run.claim(Outer())
    tree = json.loads(run.config_path.read_text())
    del tree["ratios"]
    run.config_path.write_text(json.dumps(tree))
    RunFolder(tmp_path / "run").claim(Outer())
    with pytest.raises(ConfigError, match="ratios"):
        RunFolder(tmp_path / "run").claim(Outer(ratios=(0.9,)))


def test_lines_after_the_resumed_step_and_torn_lines_are_cut(tmp_path: Path):
    run = RunFolder(tmp_path)
    for step in (1, 2, 3, 4):
        run.append_metrics({"step": step, "losses": {"total": 1 / step}})
    with run.metrics_path.open("a") as file:
        file.write('{"step": 5, "loss')
    assert [record["step"] for record in run.metrics()] == [1, 2, 3, 4]
    run.cut_metrics(after_step=2)
    run.append_metrics({"step": 3})
    assert [json.loads(line)["step"] for line in run.metrics_path.read_text().splitlines()] == [1, 2, 3]
    assert next(run.metrics())["losses"]["total"] == 1.0
    assert [entry.name for entry in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_folder_without_metrics_has_none(tmp_path: Path):
    RunFolder(tmp_path).cut_metrics(after_step=0)
    assert list(RunFolder(tmp_path).metrics()) == []
    assert RunFolder(tmp_path).summary() == {}
    assert not RunFolder(tmp_path).finished


def test_the_summary_grows_and_a_damaged_one_is_told(tmp_path: Path):
    run = RunFolder(tmp_path)
    run.update_summary({"status": "finished", "steps": 3})
    run.update_summary({"miou": 0.5})
    assert run.summary() == {"status": "finished", "steps": 3, "miou": 0.5}
    assert run.finished
    run.summary_path.write_text('{"status": ')
    with pytest.raises(TrainingError, match=r"summary\.json"):
        run.summary()


def test_the_environment_names_versions_and_no_person_host_or_path():
    text = json.dumps(describe_environment("cpu"))
    assert {"torch", "python", "numpy", "threads", "device", "platform"} <= json.loads(text).keys()
    assert os.uname().nodename not in text
    assert str(Path.home()) not in text


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now


def test_plain_lines_come_seldom_and_tell_rate_and_time_left(monkeypatch: pytest.MonkeyPatch):
    clock, out = Clock(), io.StringIO()
    monkeypatch.setattr("picture3d.training.runlog.time", clock)
    with Progress("targets", unit="frames", every_s=5, stream=out) as progress:
        for done in range(20, 61):  # 20 were finished before: they do not count as speed
            progress(done, 60, "int8" if done == 60 else "")
            clock.now += 1
    lines = out.getvalue().splitlines()
    assert lines[0] == "targets: 20/60 frames"
    assert lines[1] == "targets: 25/60 frames, 1 per second, 35 s left"
    assert lines[-1] == "targets: 60/60 frames, 1 per second, 40 s in all, int8"
    assert len(lines) == 9


def test_nothing_to_do_is_one_line_and_the_end_is_told_once():
    out = io.StringIO()
    progress = Progress("x", stream=out)
    progress(0, 0)
    progress(0, 0)
    assert out.getvalue() == "x: 0/0 frames\n"


def test_a_terminal_gets_a_bar():
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    out = Terminal()
    with Progress("training", unit="steps", stream=out) as progress:
        progress(0, 3)
        progress(3, 3, "[not markup]")
    assert "3/3" in out.getvalue()
    assert "[not markup]" in out.getvalue()


@pytest.mark.parametrize(("seconds", "text"), [(0.4, "0 s"), (59.4, "59 s"), (200, "3 min 20 s"), (7500, "2 h 05 min")])
def test_durations_are_for_people(seconds: float, text: str):
    assert duration(seconds) == text
