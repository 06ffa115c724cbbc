"""How long the nuScenes detection metric takes, beside the devkit's own accumulation on the same boxes.

    OMP_NUM_THREADS=1 python benchmarks/nuscenes_metric.py [--samples 500] [--boxes 200] [--labels 30] [--no-devkit]

A synthetic submission and labels are drawn; --samples 6019 is the size of the full validation split. Both are timed from boxes
in memory to the numbers, without reading the files. The devkit runs in `.venv-oracles` on one thread; its range and point
filters are not timed, ours are. Every number is compared; the largest difference is printed.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))

from picture3d.evaluation.nuscenes_detection import CLASSES, ERRORS, score_detections  # noqa: E402
from picture3d.formats.nuscenes_results import read_labels, read_results, write_results  # noqa: E402
from tests.nuscenes_submissions import draw, write_labels  # noqa: E402

ORACLE = REPOSITORY / ".venv-oracles" / "bin" / "python"
REPEATS = 3
FULL_SIZE_MINUTES = 30


def main() -> None:
    """Prints the measurement."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=500)
    parser.add_argument("--boxes", type=int, default=200, help="predictions a sample")
    parser.add_argument("--labels", type=int, default=30, help="labels a sample")
    parser.add_argument("--no-devkit", action="store_true")
    arguments = parser.parse_args()
    print(
        f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}, "
        f"OMP_NUM_THREADS={os.environ.get('OMP_NUM_THREADS', 'unset')}; "
        f"Python {platform.python_version()}, numpy {np.__version__}"
    )
    print(f"{arguments.samples} samples, {arguments.boxes} predictions and {arguments.labels} labels each, scores to 2 digits")
    truth, found = draw(arguments.samples, arguments.labels, arguments.boxes, seed=0)
    with tempfile.TemporaryDirectory() as folder:
        labels, results = Path(folder) / "labels.json", Path(folder) / "results.json"
        write_labels(labels, truth)
        write_results(results, [found])
        del truth, found
        start = time.perf_counter()
        found, _ = read_results(results)
        seconds = time.perf_counter() - start
        print(f"reading the submission: {seconds:.2f} s, {results.stat().st_size / 1e6:.0f} MB")
        truth, _ = read_labels(labels)
        times, scores = [], score_detections(truth, found)
        for _ in range(REPEATS):
            start = time.perf_counter()
            scores = score_detections(truth, found)
            times.append(time.perf_counter() - start)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        print(
            f"picture3d: {min(times):.2f} s (best of {REPEATS}), peak {peak:.0f} MiB; "
            f"NDS {scores.nds:.6f}, mAP {scores.mean_ap:.6f}"
        )
        if arguments.no_devkit or not ORACLE.exists():
            print("devkit: not run" + ("" if ORACLE.exists() else " (no .venv-oracles: run `make oracles`)"))
            return
        script = REPOSITORY / "tests" / "oracles" / "nuscenes_detection_check.py"
        done = subprocess.run(
            [ORACLE, script, results, labels],
            capture_output=True,
            text=True,
            timeout=60 * FULL_SIZE_MINUTES,
            check=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
    theirs, ours = json.loads(done.stdout.rpartition("ANSWER ")[2]), scores.to_json()
    pairs = [(ours[key], theirs[key]) for key in ("mean_ap", "nd_score")]
    for name in CLASSES:
        pairs += [(ours["label_aps"][name][d], theirs["label_aps"][name][d]) for d in ours["label_aps"][name]]
        pairs += [(ours["label_tp_errors"][name][e], theirs["label_tp_errors"][name][e]) for e in ERRORS]
    mine, devkit = np.array(pairs).T
    if (np.isnan(mine) != np.isnan(devkit)).any():
        raise SystemExit("the two disagree on which errors are defined")
    seconds = theirs["eval_time"]
    print(
        f"devkit: {seconds:.2f} s, {seconds / min(times):.1f} times as long; largest difference of {len(pairs)} numbers: ",
        end="",
    )
    print(f"{np.nanmax(np.abs(mine - devkit)):.1e}")


if __name__ == "__main__":
    main()
