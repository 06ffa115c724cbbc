from __future__ import annotations

import json
from pathlib import Path

import torch

from picture3d.commands import doctor


def fixed_speed(threads: int) -> dict[str, float]:
    return {
        "matmul_float32_gflops": 10.0,
        "matmul_bf16_gflops": 20.0,
        "kernel_map_ms": 3.0 if threads == 1 else 140.0,
        "sparse_conv_ms": 5.0,
    }


def test_the_speed_test_does_the_work_it_names():
    found = doctor.speed_test(torch.get_num_threads())
    assert set(found) == set(fixed_speed(1))
    assert all(value > 0 for value in found.values())


def test_threads_that_slow_the_machine_down_are_warned_of(monkeypatch, tmp_path):
    monkeypatch.setattr(doctor, "_in_fresh_process", fixed_speed)
    text = doctor.doctor(folder=tmp_path, threads=2, as_json=False)
    assert "kernel map takes 140 ms on 2 threads and 3 ms on one: use --threads 1" in text
    assert "sparse conv takes" not in text
    assert doctor.examine(tmp_path, 1)["warnings"] == []


def test_missing_parts_are_named_with_the_way_to_get_them(monkeypatch, tmp_path):
    monkeypatch.setattr(doctor, "_in_fresh_process", fixed_speed)
    monkeypatch.setattr(doctor, "_version", lambda name: None if name == "tensorboard" else "1.0")
    report = json.loads(doctor.doctor(folder=tmp_path / "not" / "yet" / "there", threads=1, as_json=True))
    assert report["missing"] == {
        "tensorboard": {"for": "replaying metrics into TensorBoard", "get": "pip install 'picture3d[track]'"}
    }
    assert report["free_gb"] > 0
    assert report["devices"][0] == "cpu"
    assert Path(report["disk_of"]).name == "there"


def test_whether_freed_memory_is_kept_is_named_with_the_switch(monkeypatch, tmp_path):
    monkeypatch.setattr(doctor, "_in_fresh_process", fixed_speed)
    for kept, words in ((True, "PICTURE3D_KEEP_FREED_MEMORY=0 returns it to the system"), (False, "goes back to the system")):
        monkeypatch.setattr(doctor, "can_keep_freed_memory", lambda kept=kept: kept)
        assert words in doctor.doctor(folder=tmp_path, threads=1, as_json=False)
