"""Scores a submission with the official nuScenes devkit. Run by the interpreter of `.venv-oracles`, never imported.

    .venv-oracles/bin/python tests/oracles/nuscenes_detection_check.py RESULTS LABELS

LABELS is in the submission's layout with num_pts and ego_translation per box; the ego position of a sample is read beside
"results". Boxes are filtered by range and points as the devkit does, but for bicycle racks, which need its tables.
Prints the devkit's metrics summary as one JSON object after the word ANSWER; the seconds are of its accumulation and metrics.
"""

import json
import sys
import time

import numpy as np
from nuscenes.eval.common.config import config_factory
from nuscenes.eval.common.data_classes import EvalBoxes
from nuscenes.eval.detection.algo import accumulate, calc_ap, calc_tp
from nuscenes.eval.detection.constants import TP_METRICS
from nuscenes.eval.detection.data_classes import DetectionBox, DetectionMetrics

WITHOUT = {"traffic_cone": ("attr_err", "vel_err", "orient_err"), "barrier": ("attr_err", "vel_err")}


def load(path: str, egos: dict, ranges: dict) -> EvalBoxes:
    """The boxes that count."""
    with open(path) as file:
        boxes = EvalBoxes.deserialize(json.load(file)["results"], DetectionBox)
    for token in boxes.sample_tokens:
        for box in boxes[token]:
            box.ego_translation = tuple(np.array(box.translation) - egos[token])
        boxes.boxes[token] = [box for box in boxes[token] if box.ego_dist < ranges[box.detection_name] and box.num_pts != 0]
    return boxes


def main() -> None:
    """Prints the answer."""
    config = config_factory("detection_cvpr_2019")
    with open(sys.argv[2]) as file:
        egos = {token: np.array(place) for token, place in json.load(file)["ego_translation"].items()}
    found, truth = (load(path, egos, config.class_range) for path in sys.argv[1:3])
    start = time.perf_counter()
    metrics = DetectionMetrics(config)
    for name in config.class_names:
        data = {th: accumulate(truth, found, name, config.dist_fcn_callable, th) for th in config.dist_ths}
        for th in config.dist_ths:
            metrics.add_label_ap(name, th, calc_ap(data[th], config.min_recall, config.min_precision))
        for error in TP_METRICS:
            undefined = error in WITHOUT.get(name, ())
            value = np.nan if undefined else calc_tp(data[config.dist_th_tp], config.min_recall, error)
            metrics.add_label_tp(name, error, value)
    metrics.add_runtime(time.perf_counter() - start)
    sys.stdout.write("ANSWER " + json.dumps(metrics.serialize()) + "\n")


if __name__ == "__main__":
    main()
