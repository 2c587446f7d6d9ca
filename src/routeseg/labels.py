"""Classes, their colours, and the value of pixels without a label."""

from __future__ import annotations

from dataclasses import dataclass

IGNORE = 255
Colour = tuple[int, int, int]  # RGB, 0..255


@dataclass(frozen=True)
class Classes:
    """Names and RGB colours of the classes; `palette` may be None."""

    names: tuple[str, ...]
    palette: tuple[Colour, ...] | None = None

    def __len__(self) -> int:
        return len(self.names)


def default_palette(num_classes: int) -> tuple[Colour, ...]:
    """Colours far from each other: hues by the golden ratio, in three brightnesses."""
    colours = []
    for k in range(num_classes):
        hue = (k * 0.618034) % 1.0 * 6.0
        value = (230, 170, 110)[k % 3]
        red, green, blue = (
            int(value * min(max(abs((hue + shift) % 6.0 - 3.0) - 1.0, 0.0), 1.0) * 0.8 + value * 0.2)
            for shift in (0.0, 4.0, 2.0)
        )
        colours.append((red, green, blue))
    return tuple(colours)
