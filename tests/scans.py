"""Images that look like ultrasound to a search for duplicates: bright above, with structure of their own."""

import numpy as np
from PIL import Image, ImageDraw
from scipy import ndimage

SIZE = 128


def scan(number):
    """Layers, texture and depth as of a scan, uint8 `(SIZE, SIZE)`; the number makes the patient."""
    rng = np.random.default_rng(number)
    layers = ndimage.gaussian_filter(rng.standard_normal((SIZE, SIZE)), (3, 12))
    texture = ndimage.gaussian_filter(rng.standard_normal((SIZE, SIZE)), 2)
    depth = np.linspace(150, 40, SIZE)[:, None]
    return (depth * (1 + 0.3 * layers / layers.std() + 0.2 * texture / texture.std())).clip(0, 255).astype(np.uint8)


def annotated(image):
    picture = Image.fromarray(image)
    draw = ImageDraw.Draw(picture)
    draw.line((40, 50, 80, 70), fill=255)
    draw.text((5, 110), "RT UOQ", fill=255)
    return np.asarray(picture)
