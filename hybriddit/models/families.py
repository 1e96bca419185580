"""The families that come with hybriddit, one row each."""

from .bria_fibo import BriaFibo
from .chroma import Chroma
from .family import register
from .flux import Flux
from .flux2 import Flux2, Flux2Klein
from .flux3 import Flux3
from .krea2 import Krea2
from .longcat_image import LongCatImage
from .ovis_image import OvisImage
from .pixart_sigma import PixArtSigma
from .qwen_image import QwenImage
from .sd3 import StableDiffusion3
from .unet import StableDiffusionUNet
from .z_image import ZImage

PIXART_SIGMA = register(PixArtSigma)
STABLE_DIFFUSION_3 = register(StableDiffusion3)
FLUX = register(Flux)
CHROMA = register(Chroma)
QWEN_IMAGE = register(QwenImage)
FLUX_2 = register(Flux2)
FLUX_2_KLEIN = register(Flux2Klein)
STABLE_DIFFUSION_UNET = register(StableDiffusionUNet)
Z_IMAGE = register(ZImage)
OVIS_IMAGE = register(OvisImage)
FLUX_3_KLEIN = register(Flux3)
KREA_2 = register(Krea2)
LONGCAT_IMAGE = register(LongCatImage)
BRIA_FIBO = register(BriaFibo)
