"""Draws docs/images/overview.png, the picture of the README, from a finished demo: ``make_overview_picture.py demo``."""

from __future__ import annotations

import sys
from pathlib import Path

from PIL import Image

from picture3d.commands.machine import start
from picture3d.commands.report import class_names, find_runs, scenes
from picture3d.view.figures import overview_picture
from picture3d.view.pictures import png_bytes
from picture3d.view.scene_modes import scene_modes


def main(folder: Path, out: Path) -> None:
    """Looks at the first validation sweep of the demo in `folder` and writes the six panels to `out`."""
    runs = find_runs(folder)
    root = runs[0].config.data.root
    scene = scenes(runs, root, start("cpu", 0))[0]
    picture = overview_picture(scene, scene_modes(scene, class_names(root)))
    out.parent.mkdir(parents=True, exist_ok=True)
    # 255 colours are enough for dots on a dark ground and make the file a third as large.
    out.write_bytes(png_bytes(picture.quantize(255, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE)))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2] if len(sys.argv) > 2 else "docs/images/overview.png"))
