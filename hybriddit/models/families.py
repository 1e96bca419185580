"""The families that come with hybriddit, one row each."""

from .chroma import Chroma
from .family import register
from .flux import Flux
from .pixart_sigma import PixArtSigma
from .qwen_image import QwenImage
from .sd3 import StableDiffusion3
from .unet import StableDiffusionUNet

PIXART_SIGMA = register(PixArtSigma)
STABLE_DIFFUSION_3 = register(StableDiffusion3)
FLUX = register(Flux)
CHROMA = register(Chroma)
QWEN_IMAGE = register(QwenImage)
STABLE_DIFFUSION_UNET = register(StableDiffusionUNet)
