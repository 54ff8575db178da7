"""Make pictures: the ones in docs/images, drawn from the very values that docs/lecture.md computes.

In: docs/lecture.md, whose python blocks are executed.  Out: docs/images/*.png. Needs the extra `demo`.

    python docs/make_pictures.py
"""

import re
from pathlib import Path

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt
import numpy as np
from PIL import Image

from cconv import filters, images
from cconv.model import texture

DOCS = Path(__file__).parent
PICTURES = DOCS / "images"
INK, PAPER = "#222222", "white"
#: Colours that colour-blind readers tell apart (Okabe & Ito 2008): vermilion, green, blue.
LINES = ("#d55e00", "#009e73", "#0072b2")


def execute(markdown: Path) -> dict:
    """The names that a document's python blocks define, run in order."""
    names = {}
    for block in re.findall(r"^```python\n(.*?)^```", markdown.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE):
        exec(compile(block, str(markdown), "exec"), names)
    return names


def save(figure, name: str, colours: int | None = None) -> None:
    path = PICTURES / name
    figure.savefig(path, dpi=100, facecolor=PAPER, metadata={"Software": None})
    plt.close(figure)
    picture = Image.open(path).convert("RGB")
    if colours:
        picture = picture.quantize(colours, dither=Image.Dither.NONE)
    picture.save(path, optimize=True)


def show(axes, picture, title: str, **options) -> None:
    axes.imshow(picture, interpolation="antialiased", **options)
    axes.set_title(title, fontsize=9, color=INK)
    axes.axis("off")


def colour(names: dict) -> None:
    """A photograph, its channels, and the opponent's answer on it and on grey, on one scale."""
    cat, top = names["cat"], float(names["on_colour"].max())
    figure, axes = plt.subplots(2, 3, figsize=(9, 4.5), layout="constrained")
    show(axes[0, 0], cat.transpose(1, 2, 0), "photograph")
    show(axes[0, 1], names["on_colour"], f"green opponent on colour: up to {top:.3f}", cmap="gray", vmin=0, vmax=top)
    strongest = abs(names["on_grey"]).max()
    show(axes[0, 2], names["on_grey"], f"on grey: up to {strongest:.0e}", cmap="gray", vmin=0, vmax=top)
    for ax, channel, name in zip(axes[1], cat, ("red", "green", "blue"), strict=True):
        show(ax, channel, name, cmap="gray", vmin=0, vmax=1)
    save(figure, "colour.png")


def hierarchy(names: dict) -> None:
    """Both levels of the texture model, map by map."""
    levels = (("level1.relu", filters.labels("edges")), ("level2.relu", tuple(texture.combinations())))
    columns = 5
    figure = plt.figure(figsize=(10, 7.3), layout="constrained")
    parts = figure.subfigures(2, 1)
    for part, (level, labels) in zip(parts, levels, strict=True):
        maps = names["levels"][level]
        part.suptitle(f"{level}: {len(maps)} maps of {maps.shape[1]} x {maps.shape[2]}", fontsize=11, color=INK)
        axes = part.subplots(2, columns).ravel()
        cells = list(axes)
        if level == "level1.relu":  # the picture itself, then the maps
            show(cells.pop(0), names["cat"].transpose(1, 2, 0), "photograph")
        for ax in cells:
            ax.axis("off")
        for ax, one, label in zip(cells, maps, labels, strict=False):
            # Each map on a scale of its own; the brightest thousandth is cut off.
            show(ax, one, label, cmap="gray", vmin=0, vmax=float(np.quantile(one, 0.999)))
    save(figure, "hierarchy.png")


def texture_maps(names: dict) -> None:
    """The grid as the library itself draws it: ten maps, each in its own range."""
    grid = images.grid(names["levels"]["level2.relu"], columns=5)
    picture = Image.fromarray(grid).quantize(64, dither=Image.Dither.NONE)
    picture.save(PICTURES / "texture-maps.png", optimize=True)


def initial_values(names: dict) -> None:
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained", sharey=True)
    ways = ("forward: the maps, after each layer", "backward: the gradient, before each layer")
    for ax, way, title in zip(axes, (0, 1), ways, strict=True):
        for (label, curve), line, mark in zip(names["curves"].items(), LINES, "^os", strict=True):
            values = curve[way] if way == 0 else curve[way][::-1]
            ax.semilogy(range(len(values)), values, marker=mark, color=line, label=label, markersize=5)
        ax.set_title(title, fontsize=10, color=INK)
        ax.set_xlabel("layer")
        ax.set_xticks(range(len(values)))
        ax.grid(alpha=0.3)
    axes[0].set_ylabel("root mean square")
    axes[0].legend(fontsize=8)
    save(figure, "initial-values.png", 64)


if __name__ == "__main__":
    PICTURES.mkdir(exist_ok=True)
    values = execute(DOCS / "lecture.md")
    for draw in (colour, hierarchy, texture_maps, initial_values):
        draw(values)
    for path in sorted(PICTURES.glob("*.png")):
        print(f"{path.name:24} {path.stat().st_size / 1024:6.0f} kB")
