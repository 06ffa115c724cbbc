from __future__ import annotations

import subprocess
import sys

import pytest
from typer.main import get_group
from typer.testing import CliRunner

from picture3d import __version__
from picture3d.cli import app, main

HEAVY = ("torch", "numpy", "pydantic", "PIL", "safetensors", "picture3d.config", "picture3d.structures")
COMMANDS = [
    ["synth"], ["prepare"], ["prepare", "nuscenes"], ["prepare", "points"], ["targets"], ["pretrain"], ["finetune"],
    ["finetune", "segmentation"], ["finetune", "detection"], ["finetune", "occupancy"],
    ["evaluate"], ["probe"], ["compare"], ["report"], ["recipes"],
    ["tensorboard"], ["demo"],
    ["check"], ["data"], ["data", "info"], ["data", "objects"], ["data", "projection"], ["data", "intensity"], ["doctor"],
    ["prepare", "semantickitti"], ["prepare", "waymo"],
    ["prepare", "argoverse2"], ["prepare", "once"], ["prepare", "occupancy"],
    ["weights"], ["weights", "show"], ["weights", "import"], ["weights", "export"],
    ["predict"], ["score"], ["score", "nuscenes-detection"], ["score", "waymo-detection"], ["score", "occupancy"],
    ["experiment"], ["experiment", "label-efficiency"],
]  # fmt: skip


def call(monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    monkeypatch.setattr(sys, "argv", ["picture3d", *words])
    with pytest.raises(SystemExit) as caught:
        main()
    return caught.value.code if isinstance(caught.value.code, int) else 0


def test_help_imports_nothing_heavy():
    code = (
        "import sys\nsys.argv = ['picture3d', '--help']\nfrom picture3d.cli import main\n"
        "try:\n    main()\nexcept SystemExit:\n    pass\n"
        f"print('loaded:', [name for name in {HEAVY!r} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "pretrain" in done.stdout
    assert done.stdout.strip().endswith("loaded: []")


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_every_command_explains_itself(command):
    result = CliRunner().invoke(app, [*command, "--help"])
    assert result.exit_code == 0
    assert "Usage" in result.output


def test_every_command_is_in_the_list_above():
    found = set()
    for name, command in get_group(app).commands.items():
        found.add((name,))
        found |= {(name, below) for below in getattr(command, "commands", {})}
    assert found == {tuple(c) for c in COMMANDS}


def test_version(monkeypatch, capsys):
    assert call(monkeypatch, "--version") == 0
    assert capsys.readouterr().out == f"picture3d {__version__}\n"


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("recipes town-pictures", "Did you mean 'town-picture'?"),
        ("recipes nuscenes-segmentaton", "Did you mean 'nuscenes-segmentation'?"),
        ("pretrain --out {0}/run --data {0} --recipe waymo", "Did you mean 'waymo-picture"),
        ("pretrain --out {0}/run --data {0} --set training.batchsize=3", "Did you mean 'training.batch_size'?"),
        ("pretrain --out {0}/run --data {0} --set training.batch_size=three", "training.batch_size: "),
        ("pretrain --out {0}/run --data {0} --set grid.voxel_size=[0.7,0.4,0.5]", "not a whole number. Set range_max x = "),
        ("pretrain --out {0}/run --data {0} --set targets.mode=none", "set it to 0"),
        ("pretrain --out {0}/run", "--data FOLDER"),
        ("pretrain --out {0}/run --config {0}/none.json", "no such config file"),
        ("pretrain --out {0}/run --data {0} --device quantum", "--device quantum"),
        (
            "pretrain --out {0}/run --data {0} --set targets.mode=online --set targets.teacher=towm",
            "town, handcrafted, minkunet and encoder",
        ),
        ("finetune segmentation --out {0}/run --data {0} --label-share 0", "data.label_share: "),
        ("finetune segmentation --out {0}/run --data {0}", "no dataset.json"),
        ("targets {0}", "no dataset.json"),
        ("evaluate {0}", "no such config file"),
        ("probe {0}/none", "no such config file"),
        ("report {0}", "holds no run folder"),
        ("prepare nuscenes {0} {0}/out", "{0}"),
        ("prepare points {0} {0}/out", "{0}"),
    ],
)
def test_an_error_of_ours_is_one_line_and_status_2(monkeypatch, capsys, tmp_path, words, expected):
    assert call(monkeypatch, *words.format(tmp_path).split()) == 2
    found = capsys.readouterr()
    assert found.out == ""
    assert found.err.startswith("error: ")
    assert found.err.count("\n") == 1
    assert len(found.err) < 600
    assert expected.format(tmp_path) in found.err
    assert not (tmp_path / "run").exists(), "a refused command leaves no run folder"


def test_ctrl_c_says_how_to_go_on_and_exits_with_130(monkeypatch, capsys):
    def interrupted(name: str | None) -> str:
        raise KeyboardInterrupt

    monkeypatch.setattr("picture3d.commands.train.describe_recipes", interrupted)
    assert call(monkeypatch, "recipes") == 130
    assert "goes on from what is finished" in capsys.readouterr().err


def test_recipes_are_listed_and_printed(monkeypatch, capsys):
    assert call(monkeypatch, "recipes") == 0
    assert "waymo-picture-20" in capsys.readouterr().out
    assert call(monkeypatch, "recipes", "town-segmentation") == 0
    assert '"kind": "segmentation"' in capsys.readouterr().out


def test_an_error_of_the_system_is_one_line_too(monkeypatch, capsys):
    def fail(*_: object) -> str:
        raise PermissionError(13, "Permission denied", "/data/sweep.bin")

    monkeypatch.setattr("picture3d.commands.train.describe_recipes", fail)
    assert call(monkeypatch, "recipes") == 2
    said = capsys.readouterr().err
    assert said.startswith("error: /data/sweep.bin: Permission denied. Check the path")
    assert said.count("\n") == 1
