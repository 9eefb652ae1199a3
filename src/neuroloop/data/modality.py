"""Computed tomography among magnetic resonance images, told from pixels.

In the usual brain window of CT, bone is brighter than the window reaches: the skull is a thick closed ring of one
saturated white, and the grey brain touches it. In MRI the bright ring, where there is one, is the fat of the scalp: it
shades off, seldom reaches the brightest grey of the image all around, and dark bone lies between it and the brain.
"""

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

RING = 0.58
"""Share of directions with bone from which an image is taken for CT. On the public set every one of the 69 images above
it is CT to the eye (they reach from 0.67 to 1.00) and the highest MRI has 0.49; the threshold stands in the middle of
that gap. It misses about twelve CT images whose skull is thin or blurred: to take an MRI for CT is the worse fault."""

SATURATED = 0.07
"""Least share of the head that is as bright as its brightest parts. The skulls of CT make up 0.09 to 0.24 of the head
there; the bright scalp of an MRI near the vertex reaches 0.06 at most."""

EDGE = 0.5
"""Share of the frame's edge that lies in the "head" from which it is none, but a white background. On the public set
the heads of CT reach 0.16, those of MRI put on white that would be taken for CT begin at 0.81."""

_WHITE, _BRIGHT = 0.96, 0.90  # of the 99.5th percentile: saturated; and bone, with JPEG noise and blurred edges
_THICK, _INSIDE = 3, 5  # steps of a ray: least thickness of bone, and how far inside of it a dark gap would lie
_BRAIN = 0.6  # of the 99.5th percentile: the brain is darker than bone; it reaches 0.49 on CT, 0.8 on bright FLAIR
_GAP = 0.5  # of the brain's median: darker than this just inside the ring is bone or fluid of an MRI
_RAYS, _STEPS = 72, 48  # from the head's centre to its outline; a step is about 1 px of 128
_OUTER = 28  # step from which bone may begin


def bone_ring(images: NDArray[np.uint8]) -> NDArray[np.float32]:
    """How closed a ring of bone is around each head, 0 (none) to 1: (n, s, s) uint8 -> float32 (n,).

    The images are whole frames, squeezed square where they are not; s is about 128. CT at `RING` or above. Images that
    are not nearly white enough anywhere are done with at once, so that a set of MRI takes little time.
    """
    if len(images) == 0:
        return np.zeros(0, np.float32)
    flat = images.reshape(len(images), -1)
    top = np.percentile(flat, 99.5, axis=1)
    white = (flat >= (_WHITE * top)[:, None]).mean(axis=1)
    rings = np.zeros(len(images), np.float32)
    # A head fills two fifths of its frame or more; this only spares the others the outline.
    for index in np.flatnonzero(white >= 0.4 * SATURATED):
        rings[index] = _ring(images[index].astype(np.float32), float(top[index]), float(white[index]))
    return rings


def _ring(image: NDArray[np.float32], top: float, white: float) -> float:
    head = _head(image)
    if head is None or white < SATURATED * head.mean() or _edge(head).mean() > EDGE:
        return 0.0
    rays = _rays(image, head)
    brain = float(np.median(rays[:, 5:30]))
    if brain > _BRAIN * top:
        return 0.0
    bone = rays[:, _OUTER:] >= _BRIGHT * top
    length = np.zeros(_RAYS, np.int64)
    best, end = length.copy(), length.copy()
    for step in range(bone.shape[1]):
        length = np.where(bone[:, step], length + 1, 0)
        end = np.where(length > best, step, end)
        best = np.maximum(best, length)
    first = _OUTER + end - best + 1
    inside = np.take_along_axis(rays, first[:, None] - 1 - np.arange(_INSIDE), axis=1)
    return float(((best >= _THICK) & (inside.min(axis=1) >= _GAP * brain)).mean())


def _head(image: NDArray[np.float32]) -> NDArray[np.bool_] | None:
    dark, bright = np.percentile(image, [2, 98])
    above = ndimage.uniform_filter(image, 3) > dark + 0.1 * (bright - dark)
    labels, count = ndimage.label(ndimage.binary_opening(above, iterations=2))
    if count == 0:
        return None
    sizes = np.bincount(labels.ravel())
    sizes[0] = 0
    return np.asarray(ndimage.binary_fill_holes(labels == sizes.argmax()))


def _edge(head: NDArray[np.bool_]) -> NDArray[np.bool_]:
    return np.concatenate([head[0], head[-1], head[:, 0], head[:, -1]])


def _rays(image: NDArray[np.float32], head: NDArray[np.bool_]) -> NDArray[np.float32]:
    """The greys from the head's centre to its outline: (72, 48)."""
    centre = [axis.mean() for axis in np.nonzero(head)]
    angles = np.arange(_RAYS) * 2 * np.pi / _RAYS
    direction = np.stack([np.sin(angles), np.cos(angles)])[:, :, None]

    def along(distance: NDArray[np.floating]) -> NDArray[np.floating]:
        return np.array(centre)[:, None, None] + direction * distance

    far = np.arange(0, np.hypot(*image.shape) / 2 + 1, 0.5)
    within = ndimage.map_coordinates(head.astype(np.float32), along(far), order=0) > 0.5
    outline = far[within.shape[1] - 1 - within[:, ::-1].argmax(axis=1)]
    rays = ndimage.map_coordinates(image, along(outline[:, None] * np.linspace(0, 1, _STEPS)), order=1)
    return np.asarray(rays, np.float32)
