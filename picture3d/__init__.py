"""picture3d: from raw LiDAR logs to a pre-trained encoder, and from the encoder to fine-tuned, scored networks."""

__version__ = "0.1.0"
