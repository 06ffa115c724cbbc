"""The folder of one run: its config, metrics, checkpoints, environment, text log and final numbers."""

from __future__ import annotations

import json
import os
import platform
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from picture3d.config import FrozenConfig, read_config_tree
from picture3d.errors import ConfigError, TrainingError
from picture3d.files import append_line, read_bounded, replacing, write_text

_LISTED = 6
_MAX_SUMMARY_BYTES, _MAX_LINE_BYTES = 1 << 24, 1 << 20


class RunFolder:
    """Names and keeps the files of a run. Making one touches nothing on disk; `claim` does.

    ``config.json``        the whole resolved config
    ``metrics.jsonl``      one JSON object per logged step
    ``checkpoints/``       step_*.safetensors
    ``model.safetensors``  the finished weights
    ``summary.json``       final numbers; there from the moment the run is finished
    ``environment.json``   versions, device, threads
    ``log.txt``            what happened when, in words
    """

    writes = True  # False: nothing is written; for the processes of a job that are not its first

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self.config_path = self.path / "config.json"
        self.metrics_path = self.path / "metrics.jsonl"
        self.checkpoints = self.path / "checkpoints"
        self.model_path = self.path / "model.safetensors"
        self.summary_path = self.path / "summary.json"
        self.environment_path = self.path / "environment.json"
        self.log_path = self.path / "log.txt"
        self.claimed = False

    def claim(self, config: FrozenConfig) -> None:
        """Takes the folder for a run of `config`: writes config.json, or checks that the one there says the same.

        Raises:
            ConfigError: if the folder belongs to a run of another config; the keys that differ are named.
        """
        wanted = config.model_dump(mode="json")
        if not self.writes:
            pass
        elif self.config_path.exists():
            found = read_config_tree(self.config_path)
            with suppress(ConfigError):  # keys younger than the run stand at their defaults: what it was made with
                found = type(config).from_tree(found).model_dump(mode="json")
            different = _differences(found, wanted)
            if different:
                more = f", and {len(different) - _LISTED} more" if len(different) > _LISTED else ""
                raise ConfigError(
                    f"{self.path}: this run folder belongs to another config. "
                    f"Different: {', '.join(different[:_LISTED])}{more}. "
                    f"Choose another folder, or start from its own config (--config {self.config_path})."
                )
        else:
            write_text(self.config_path, json.dumps(wanted, indent=2) + "\n")
        self.claimed = True

    def config_tree(self) -> dict[str, Any]:
        """The config of this run as plain JSON values.

        Raises:
            ConfigError: if the folder holds no config.
        """
        return read_config_tree(self.config_path)

    def log(self, text: str) -> None:
        """Adds a line with the time of day to log.txt."""
        if self.writes:
            append_line(self.log_path, f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}")

    # Metrics -------------------------------------------------------------------------------------------------------------

    def append_metrics(self, record: Mapping[str, Any]) -> None:
        """Adds one line to metrics.jsonl. `record` has a key "step"."""
        if self.writes:
            append_line(self.metrics_path, json.dumps(dict(record)))

    def metrics(self) -> Iterator[dict[str, Any]]:
        """The lines of metrics.jsonl, oldest first; a line torn by a crash is left out."""
        if not self.metrics_path.exists():
            return
        with self.metrics_path.open(encoding="utf-8", errors="replace") as file:
            while line := file.readline(_MAX_LINE_BYTES):
                try:
                    record = json.loads(line)
                except (ValueError, RecursionError):
                    continue
                if isinstance(record, dict) and isinstance(record.get("step"), int):
                    yield record

    def cut_metrics(self, after_step: int) -> None:
        """Takes out the lines of steps later than `after_step`: a resumed run writes them again."""
        if self.writes and self.metrics_path.exists():
            with replacing(self.metrics_path) as temporary, temporary.open("w", encoding="utf-8") as file:
                for record in self.metrics():
                    if record["step"] <= after_step:
                        file.write(json.dumps(record) + "\n")

    # Final numbers -------------------------------------------------------------------------------------------------------

    def summary(self) -> dict[str, Any]:
        """Final numbers of the run; empty while there are none.

        Raises:
            TrainingError: if summary.json is damaged.
        """
        if not self.summary_path.exists():
            return {}
        try:
            summary = json.loads(read_bounded(self.summary_path, max_bytes=_MAX_SUMMARY_BYTES))
        except (ValueError, RecursionError) as error:
            raise TrainingError(f"{self.summary_path}: not JSON ({error}). Remove it and run again with --resume.") from None
        return summary if isinstance(summary, dict) else {}

    def update_summary(self, values: Mapping[str, Any]) -> None:
        """Adds values to summary.json, replacing those of the same name."""
        if self.writes:
            write_text(self.summary_path, json.dumps({**self.summary(), **values}, indent=2) + "\n")

    def write_json(self, name: str, values: Mapping[str, Any]) -> None:
        """Writes a JSON file of the run, whole or not at all."""
        if self.writes:
            write_text(self.path / name, json.dumps(dict(values), indent=2) + "\n")

    @property
    def finished(self) -> bool:
        """Whether training came to its last step."""
        return self.summary().get("status") == "finished"

    def write_environment(self, device: str) -> None:
        """Writes environment.json: versions, device, threads and platform. Nothing in it names a user, host or path."""
        if self.writes:
            write_text(self.environment_path, json.dumps(describe_environment(device), indent=2) + "\n")


def describe_environment(device: str) -> dict[str, Any]:
    """Versions, device, threads and platform, for environment files and benchmark rows."""
    import numpy
    import torch

    from picture3d import __version__

    kind = torch.device(device).type
    return {
        "picture3d": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": numpy.__version__,
        "device": device,
        "device_name": torch.cuda.get_device_name(device) if kind == "cuda" else platform.machine(),
        "cuda": torch.version.cuda if kind == "cuda" else None,
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "platform": f"{platform.system()} {platform.release()}",
    }


class Progress:
    """Shows how far a long work has come: a bar on a terminal, otherwise a plain line every few seconds.

    Use it as a context and call it as ``progress(done, total)``; it fits wherever a command takes a progress callback.
    """

    def __init__(self, label: str, *, unit: str = "frames", every_s: float = 5.0, stream: Any = None) -> None:
        self._label, self._unit, self._every_s = label, unit, every_s
        self._stream = stream if stream is not None else sys.stderr
        self._begin: tuple[float, int] | None = None  # time and `done` of the first call: what a resumed run found finished
        self._last_line_s = float("-inf")
        self._last_shown = -1
        self._bar: Any = None
        self._task: Any = None

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def __call__(self, done: int, total: int, note: str = "") -> None:
        """`done` of `total` are finished; `note` is shown behind."""
        if self._begin is None:
            self._begin = (time.monotonic(), done)
        if self._stream.isatty():
            self._show_bar(done, total, note)
        else:
            self._show_line(done, total, note)

    def _show_bar(self, done: int, total: int, note: str) -> None:
        if self._bar is None:
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
            from rich.progress import Progress as Bar

            self._bar = Bar(
                TextColumn("{task.description}"),
                BarColumn(bar_width=30),
                MofNCompleteColumn(),
                TextColumn(self._unit),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(),
                TextColumn("{task.fields[note]}", markup=False),
                console=Console(file=self._stream),
            )
            self._task = self._bar.add_task(self._label, total=total, note=note)
            self._bar.start()
        self._bar.update(self._task, completed=done, total=total, note=note)

    def _show_line(self, done: int, total: int, note: str) -> None:
        now = time.monotonic()
        if done == self._last_shown or (done < total and now - self._last_line_s < self._every_s):
            return
        assert self._begin is not None
        since_s, advanced = now - self._begin[0], done - self._begin[1]
        parts = [f"{self._label}: {done}/{total} {self._unit}"]
        if advanced > 0 and since_s > 0:
            rate = advanced / since_s
            parts.append(f"{rate:.3g} per second")
            parts.append(f"{duration(since_s)} in all" if done >= total else f"{duration((total - done) / rate)} left")
        if note:
            parts.append(note)
        self._stream.write(", ".join(parts) + "\n")
        self._stream.flush()
        self._last_line_s, self._last_shown = now, done


def duration(seconds: float) -> str:
    """A length of time for people: "8 s", "3 min 20 s", "2 h 05 min"."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def _differences(found: Mapping[str, Any], wanted: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Dotted keys whose values differ, with both values."""
    lines: list[str] = []
    for key in [*found, *(k for k in wanted if k not in found)]:
        a, b = found.get(key, "(absent)"), wanted.get(key, "(absent)")
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            lines += _differences(a, b, f"{prefix}{key}.")
        elif a != b:
            lines.append(f"{prefix}{key} (there {json.dumps(a)}, here {json.dumps(b)})")
    return lines
