"""How near images are to those they should be: PSNR and SSIM of pairs."""

from __future__ import annotations

import numpy as np


def nearness(image: np.ndarray, reference: np.ndarray) -> tuple[float, float]:
    """(PSNR in dB, SSIM in [-1, 1]) of an image to its reference, uint8 [H, W, 3] both, 7 x 7 pixels or more.

    Identical images, whose PSNR is infinite, count as 100 dB. Raises ModuleNotFoundError without scikit-image.
    """
    try:
        from skimage.metrics import peak_signal_noise_ratio, structural_similarity
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("PSNR and SSIM need scikit-image: pip install scikit-image") from error
    psnr = 100.0 if np.array_equal(image, reference) else peak_signal_noise_ratio(reference, image)
    return float(psnr), float(structural_similarity(reference, image, channel_axis=2))
