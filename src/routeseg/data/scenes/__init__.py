"""A procedural street: images with exact labels that need no download.

Every image is a small 3-D world seen through a pinhole camera and painted from far to near; image and labels
are painted by the same shapes, so every pixel's label is exact. All random numbers are drawn in metres and
fractions, in an order that no pixel count changes, so a scene has the same composition at every size. Colour alone
does not give the class: walls, cars and clothes share paints, road and pavement greys, lawns, hedges and fences
greens, by day, dusk, clouds or night.

stage.py has the classes, the camera, the light and the brushes; things.py paints what stands on the ground,
street.py what surrounds it: sky, ground and houses; scene.py lays out a street and draws the image.
"""

from routeseg.data.scenes.scene import PRESETS, Preset, draw_scene, preset_of
from routeseg.data.scenes.stage import CLASSES, PALETTE

__all__ = ["CLASSES", "PALETTE", "PRESETS", "Preset", "draw_scene", "preset_of"]
