"""One image at a time, as the papers describe it: the reference for `dainv.augment`, and what it is timed against."""

import numpy as np
from scipy import ndimage

HEAVIER = dict(rotation=22.5, shift_rows=0.1, shift_cols=0.1, shear=0.15, brightness=0.25)


def affine(height, width, rotation=0.0, shift_rows=0.0, shift_cols=0.0, shear=0.0, zoom_rows=1.0, zoom_cols=1.0):
    """The 3 x 3 map from output to input (row, column), about the point of Keras: one pixel beyond the centre."""
    theta = np.deg2rad(rotation)
    rotate = np.array([[np.cos(theta), -np.sin(theta), 0], [np.sin(theta), np.cos(theta), 0], [0, 0, 1]])
    translate = np.array([[1, 0, shift_rows * height], [0, 1, shift_cols * width], [0, 0, 1]])
    slant = np.array([[1, -np.sin(shear), 0], [0, np.cos(shear), 0], [0, 0, 1]])
    scale = np.diag([zoom_rows, zoom_cols, 1.0])
    to_fixed = np.array([[1, 0, height / 2 + 0.5], [0, 1, width / 2 + 0.5], [0, 0, 1]])
    return to_fixed @ rotate @ translate @ slant @ scale @ np.linalg.inv(to_fixed)


def photometric(image, brightness=0.0, contrast=1.0, noise=0.0, field=0.0):
    """Noise, then brightness, then contrast about the mean of each channel of the brightened image; each clipped."""
    image = np.clip(image + noise * field, 0, 1)
    image = np.clip(image + brightness, 0, 1)
    mean = image.mean((1, 2), keepdims=True)
    return np.clip((image - mean) * contrast + mean, 0, 1)


def transform_one(image, flip=False, flip_vertical=False, order=1, field=0.0, **values):
    """One image (3, height, width) in [0, 1] under one draw, given by the names of `dainv.augment.Draws`."""
    light = {name: values.pop(name) for name in ("brightness", "contrast", "noise") if name in values}
    if values:
        matrix = affine(*image.shape[1:], **values)
        parts = [
            ndimage.affine_transform(channel, matrix[:2, :2], matrix[:2, 2], order=order, mode="nearest")
            for channel in image
        ]
        image = np.stack(parts)
    image = image[:, :, ::-1] if flip else image
    image = image[:, ::-1] if flip_vertical else image
    return photometric(image, field=field, **light)


def truncated_normal(rng, low, high):
    """One number of the Gaussian that is centred in the range, sd a quarter of it, redrawn until it falls inside."""
    while True:
        value = rng.normal((low + high) / 2, (high - low) / 4)
        if low <= value <= high:
            return value


def draw_one(rng):
    """The parameters of one image under the heavier scheme."""
    values = {name: truncated_normal(rng, -half, half) for name, half in HEAVIER.items()}
    for name, (low, high) in dict(zoom_rows=(0.85, 1.15), zoom_cols=(0.85, 1.15), contrast=(0.5, 1.5)).items():
        values[name] = truncated_normal(rng, low, high)
    return values | dict(flip=rng.random() < 0.5)


def scipy_pipeline(images, seed=0):
    """The heavier scheme on images (N, 3, height, width), float32 numpy, one at a time: how the papers were run."""
    rng = np.random.default_rng(seed)
    return np.stack([transform_one(image, **draw_one(rng)) for image in images])


def kornia_pipeline():
    """The heavier scheme as nearly as kornia has it: a module from images (N, 3, height, width) to images."""
    import kornia.augmentation as K

    return K.AugmentationSequential(
        K.RandomHorizontalFlip(p=0.5),
        K.RandomAffine(22.5, translate=(0.1, 0.1), scale=(0.85, 1.15), shear=8.6, padding_mode="border", p=1.0),
        K.RandomBrightness((0.75, 1.25), p=1.0),
        K.RandomContrast((0.5, 1.5), p=1.0),
        data_keys=["input"],
    )
