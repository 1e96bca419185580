"""The Triton kernels of window attention, compiled for the chips they are meant for: none of these is needed.

Run with -rP to see what each kernel takes.
"""

import math

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")
kernels = pytest.importorskip("hybriddit.attention.window.kernels", reason="triton is not installed")
if kernels.INTERPRETED:
    pytest.skip("Triton's interpreter is on: nothing is compiled", allow_module_level=True)

from attention.compiled import POINTER, SHARED, compile_kernel, do_not_fit, load_sizes, target  # noqa: E402

from hybriddit.attention.linear import FEATURE_MAPS  # noqa: E402
from hybriddit.attention.window.triton import JOINED_MAX_CHANNELS, JOINED_MAX_WIDTH  # noqa: E402

# each chip's instruction for matrix products
PRODUCT = {80: "mma.sync", 86: "mma.sync", 89: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma"}
PRODUCT |= {103: "tcgen05.mma", 120: "mma.sync", "gfx942": "v_mfma"}
FLOAT32 = ("lse", "delta", "grad_lse", "shares", "state", "mean", "gate")
INPUTS = ("query", "key", "value", "text_key", "text_value", "out", "grad_out", "grad_query", "grad_key", "grad_value")
INPUTS += ("far_query", "projection")
NO_TEXT, WHOLE_TEXT = {"TEXT": None, "HAS_TEXT_MASK": False}, {"TEXT": "free", "HAS_TEXT_MASK": False}
MASKED_TEXT = {"TEXT": "text", "HAS_TEXT_MASK": True}
KERNELS = {
    "forward": ("forward", NO_TEXT),
    "forward, whole text": ("forward", WHOLE_TEXT),
    "forward, masked text": ("forward", MASKED_TEXT),
    "joined": ("joined", NO_TEXT),
    "joined, whole text": ("joined", WHOLE_TEXT),
    "joined, masked text": ("joined", MASKED_TEXT),
    "joined, elu": ("joined", MASKED_TEXT),
    "joined, most channels": ("joined", MASKED_TEXT),
    "query_gradient": ("query_gradient", NO_TEXT),
    "query_gradient, whole text": ("query_gradient", WHOLE_TEXT),
    "query_gradient, masked text": ("query_gradient", MASKED_TEXT),
    "key_gradient": ("key_gradient", {}),
    "text_gradient": ("text_gradient", {"HAS_TEXT_MASK": False}),
    "text_gradient, masked text": ("text_gradient", {"HAS_TEXT_MASK": True}),
}
# of each kernel, the one that does most
LARGEST = ["forward, masked text", "query_gradient, masked text", "key_gradient", "text_gradient, masked text"]
LARGEST += ["joined, masked text"]
# What models run in, on chips with instructions or memory of their own (89 is as 86, 103 as 100); kernels without text or
# with whole blocks of it, and the rest, on two of them: compiling all takes too long.
CHIPS = [chip for chip in SHARED if chip not in (89, 103)]
CASES = [(name, torch.bfloat16, width, chip) for width in (64, 72, 128) for chip in CHIPS for name in LARGEST]
CASES += [
    (name, torch.bfloat16, width, chip)
    for width in (64, 72, 128)
    for chip in (86, 90)
    for name in KERNELS
    if name not in LARGEST
]
CASES += [
    (name, dtype, width, chip)
    for dtype, width in (
        *((torch.bfloat16, width) for width in (16, 40, 192, 256)),
        (torch.float16, 128),
        *((torch.float32, width) for width in (128, 256)),
    )
    for chip in (86, 90)
    for name in LARGEST
    if width <= JOINED_MAX_WIDTH or "joined" not in name
]
# one chip of each instruction; the others together take minutes
QUICK = [(name, torch.bfloat16, width, chip) for width, chip in ((128, 90), (72, 86)) for name in LARGEST]
QUICK += [("text_gradient, masked text", torch.bfloat16, 128, chip) for chip in (100, "gfx942")]


def compiled(name, dtype, width, chip, unit=8):
    kernel, options = KERNELS[name]
    launch = kernels.launch_options(kernel, dtype, width, target(chip))
    walked = launch["BLOCK_N" if kernel in ("forward", "joined", "query_gradient") else "BLOCK_M"]
    constants = {"WIDTH": width, "UNIT": unit, "COLUMNS": min(16, walked), **options}
    if kernel == "joined":
        feature_map = "elu" if name.endswith("elu") else "hedgehog" if name.endswith("channels") else "polynomial"
        channels = FEATURE_MAPS[feature_map].channels(width)
        channels = None if feature_map == "elu" else min(channels, JOINED_MAX_CHANNELS)
        constants |= kernels.far_options(dtype, width, target(chip), feature_map, channels) | {"JOINT": True}
    types = dict.fromkeys(INPUTS, POINTER[dtype]) | dict.fromkeys(FLOAT32, "*fp32")
    types |= {"text_mask": "*u8", "scale": "fp32", "count": "fp32", "eps": "fp32"}
    return compile_kernel(getattr(kernels, f"_{kernel}_kernel"), chip, types, constants, launch)


@pytest.mark.parametrize(
    "name, dtype, width, chip",
    [pytest.param(*case, marks=() if case in QUICK else pytest.mark.slow) for case in CASES],
    ids=lambda x: str(x).removeprefix("torch."),
)
def test_fits_and_multiplies_on_tensor_cores(name, dtype, width, chip, tmp_path):
    kernel = compiled(name, dtype, width, chip)
    # float32 is for tests and small models: that it runs is enough
    allowed = math.inf if dtype == torch.float32 else 0
    failures = do_not_fit([(name, kernel, allowed)], chip, tmp_path)
    assert not failures, failures
    assembly = kernel.asm["ptx" if isinstance(chip, int) else "amdgcn"]
    products = {x for x in PRODUCT.values() if x in assembly}
    small_blocks = dtype == torch.float32 or width > 128
    assert products == {PRODUCT[chip]} or (small_blocks and products == {"mma.sync"})


@pytest.mark.parametrize("width", [72, 128])
@pytest.mark.parametrize(
    "name",
    [pytest.param(x, marks=() if x == "text_gradient, masked text" else pytest.mark.slow) for x in LARGEST],
)
def test_loads_are_wide(name, width):
    """16 bytes a thread, thanks to strides in units of 8: without these they are single elements."""
    others = {1}  # the text's mask
    if not name.startswith("forward"):
        others |= {4}  # the log-sum-exp and delta, or the gate and means
    if name.startswith("joined"):
        others |= {2}  # the projection's rows are not of 8 channels
    if width == 72:
        others |= {4, 8}  # 8 channels beside 64: there are more threads than pieces of 16 bytes
    wide, narrow = (load_sizes(compiled(name, torch.bfloat16, width, 80, unit)) for unit in (8, 1))
    assert 16 in wide and wide <= others | {16}
    assert 2 in narrow
