"""Five pictures of one thing that no data set has: a mascot, drawn with Pillow in five poses.

A green blob with one large eye, an orange horn and two feet, on white. Size, place, glance and mouth differ.
"""

import torch
from PIL import Image, ImageDraw

from utils import data

BODY = (119, 178, 85)
HORN = (255, 172, 51)
# of each pose: shift to the right and down, size, glance to the right, mouth open
POSES = [
    (0, 0, 1.0, 0, False),
    (3, 1, 0.9, 4, True),
    (-3, 1, 0.9, -4, False),
    (1, 3, 0.8, 2, True),
    (-1, -1, 1.05, -2, True),
]


def draw(right, down, size, glance, laughs, side=64, sharper=4):
    """One pose -> a picture of `side` pixels; drawn larger and reduced, for smooth edges."""
    image = Image.new("RGB", (side * sharper,) * 2, "white")
    pen = ImageDraw.Draw(image)

    def box(left, top, width, height):
        """Corners of a box in pixels of the large picture, of one around the middle in those of the small one."""
        x = 32 + right + size * left
        y = 34 + down + size * top
        corners = (x, y, x + size * width, y + size * height)
        return [sharper * value for value in corners]

    # horn, feet, body
    x0, y0, x1, y1 = box(-6, -32, 12, 18)
    pen.polygon([(x0, y1), ((x0 + x1) / 2, y0), (x1, y1)], fill=HORN)
    pen.ellipse(box(-16, 16, 14, 10), fill=HORN)
    pen.ellipse(box(2, 16, 14, 10), fill=HORN)
    pen.ellipse(box(-22, -20, 44, 42), fill=BODY)
    # the eye
    pen.ellipse(box(-12, -14, 24, 22), fill="white")
    pen.ellipse(box(-5 + glance, -8, 10, 11), fill=(30, 30, 40))
    # the mouth
    if laughs:
        pen.chord(box(-9, 6, 18, 12), 0, 180, fill=(120, 20, 30))
    else:
        pen.arc(box(-8, 4, 16, 10), 20, 160, fill=(40, 80, 30), width=6)
    return image.resize((side, side), Image.Resampling.LANCZOS)


def pictures():
    """All poses: uint8 (5, 3, 64, 64)."""
    return torch.stack([data.square(draw(*pose), 64) for pose in POSES])
