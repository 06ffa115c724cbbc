"""The name under which the official nuScenes tools know a prepared keyframe."""

from __future__ import annotations

from picture3d.datasets.prepared import FrameKey, PreparedDataset


def sample_token(dataset: PreparedDataset, key: FrameKey) -> str:
    """The sample token of a keyframe of prepared nuScenes; of other datasets the frame's own token.

    A frame's token names one sweep of the LiDAR; a sample is the annotated moment that the sweep was the LiDAR's part of.
    """
    reader = dataset.reader(key.log)
    samples = reader.header.source.get("keyframe_samples")
    if isinstance(samples, list) and key.index in reader.keyframes and len(samples) == len(reader.keyframes):
        return str(samples[reader.keyframes.index(key.index)])
    return dataset.frame(key, ()).token
