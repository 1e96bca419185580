"""Run a hybrid transformer's blocks over strips of an image's rows, so that few tensors of the whole image exist."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from torch import nn

from ..attention import HybridAttention
from ..attention.strips import Gathered, WholeImage
from .family import Family, family_of, is_hybrid, transformer_blocks
from .surgery import arguments_of, given_layout, with_layout
from .wrapping import unwrapped, with_forward


@contextlib.contextmanager
def in_strips(model: nn.Module, rows: int) -> Iterator[nn.Module]:
    """Within the block, run each transformer block over `rows` rows of image tokens at a time. For inference.

    The result is that of the whole image, up to rounding. Of the whole image only a block's input and output are held;
    everything else (norms, projections, attention, MLP) is of one strip and the rows around it that its windows reach.
    A block runs twice over each strip: once up to its attention, for the far branch's sums and the text's attention.
    The images of a batch, such as the two of guidance, go through the model one after another.

    Blocks with a layer that stayed dense see the whole image at once, as do images of at most `rows` rows and those
    with reference images.

    Raises ValueError for a model that is not hybrid, is compiled or uses one of diffusers' caches, and where a far
    branch's sums over strips do not add up to those over the image: with centred keys, feature maps that the backends
    lack, and the mixers "scan", "multiscale" and "pooled"; where layers have pooled keys; and, when the model runs, with
    gradients on.
    """
    with shown_strips(model, rows):
        yield model


@contextlib.contextmanager
def shown_strips(model: nn.Module, rows: int, most: int | None = None) -> Iterator[None]:
    """`in_strips`. most: for a pass whose result is not wanted, show each block no more strips than that."""
    if rows < 1:
        raise ValueError(f"strips have 1 row of tokens or more, not {rows}")
    model = unwrapped(model)
    if not is_hybrid(model):
        raise ValueError(f"strips are for pretrained models that were made hybrid, not for a {type(model).__name__}")
    if getattr(model, "is_cache_enabled", False):
        raise ValueError("diffusers' caches keep what blocks gave for the whole image: disable_cache() first")
    family, names = family_of(model), {module: name for name, module in model.named_modules()}
    if family.skip_connections:
        raise ValueError(f"the blocks of {family.name} cannot run in strips: they hold convolutions of the whole image")
    forwards: dict[nn.Module, Any] = {}
    with contextlib.ExitStack() as undo:
        for block in transformer_blocks(model):
            attentions = [m for m in block.modules() if m in names and family.converts(names[m])]
            layers = [attn.hybrid for attn in attentions if hasattr(attn, "hybrid")]
            if not layers or len(layers) < len(attentions):
                continue
            _check(block, layers, names)
            forwards[block] = _InStrips(model, family, block, layers, rows, most)
        if not forwards:
            raise ValueError("no block of the model can run in strips: each has a layer that stayed dense")
        forwards |= {model: _OneByOne(model, family), **family.strip_forwards(model, rows)}
        for module, forward in forwards.items():
            undo.enter_context(with_forward(module, forward))
        yield


def _check(block: nn.Module, layers: list[HybridAttention], names: dict[nn.Module, str]) -> None:
    if block._compiled_call_impl is not None:
        raise ValueError(f"{names[block]} is compiled: strips are for models that are not")
    for layer in layers:
        if layer.pooled is not None:
            raise ValueError(f"{names[layer]} has pooled keys: such a model sees the whole image at once")
        if layer.far is not None and not getattr(layer.far, "sums_add_up", False):
            raise ValueError(
                f"{names[layer]}: the sums of its far branch over strips do not add up to those over the image "
                "(centred keys, a feature map without kernels, or a mixer of whole images): such a model sees the whole image at "
                "once"
            )


class _OneByOne:
    """The forward of a model, for one image of the batch at a time."""

    def __init__(self, model: nn.Module, family: Family):
        self.model, self.family, self.forward = model, family, model.forward

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        arguments = arguments_of(self.model, args, kwargs)
        batch = len(self.family.latents_and_times(arguments)[0])
        if batch == 1:
            return self.forward(**arguments)
        return_dict = arguments.pop("return_dict", True)
        found = []
        for i in range(batch):
            own = {
                name: value[i : i + 1] if name in self.family.image_lists else _row(value, i, batch)
                for name, value in arguments.items()
            }
            found.append(self.forward(**own, return_dict=False)[0])
        listed = isinstance(found[0], list)
        sample = [image for images in found for image in images] if listed else torch.cat(found)
        return Transformer2DModelOutput(sample=sample) if return_dict else (sample,)


def _row(value: Any, i: int, batch: int) -> Any:
    """One image's part of an argument: of tensors with a row for each image; other values are for all of them."""
    if isinstance(value, dict):
        return {name: _row(one, i, batch) for name, one in value.items()}
    if isinstance(value, list):
        return [_row(one, i, batch) for one in value]  # a ControlNet's residuals
    return value[i : i + 1] if isinstance(value, torch.Tensor) and value.ndim and len(value) == batch else value


class _InStrips:
    """The forward of one block, in strips."""

    def __init__(
        self,
        model: nn.Module,
        family: Family,
        block: nn.Module,
        layers: list[HybridAttention],
        rows: int,
        most: int | None,
    ):
        self.model, self.family, self.block, self.layers, self.rows, self.most = (
            model, family, block, layers, rows, most,
        )  # fmt: skip
        self.forward, self.kwargs = block.forward, family.block_kwargs

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        arguments = arguments_of(self.block, args, kwargs)
        if self.model._dense_mode:
            return self.forward(**arguments)
        layout = given_layout(self.model, arguments, self.kwargs)
        if layout.rows is not None:
            raise ValueError("a model that is spread over processes does not run in strips besides: use one of the two")
        height = layout.grids[0][0]
        if len(layout.grids) > 1 or self.rows >= height:
            return self.forward(**arguments)
        if torch.is_grad_enabled():
            raise ValueError("a model runs in strips without gradients: call it under torch.no_grad()")
        count = -(-height // self.rows)
        strips = [(height * i // count, height * (i + 1) // count) for i in range(count)][: self.most]
        waiting: set[WholeImage] = set()
        images = [WholeImage(waiting) for _ in self.layers]
        try:
            for layer, image in zip(self.layers, images, strict=True):
                layer.whole_image = image
            for rows in strips if layout.text_length or any(layer.far is not None for layer in self.layers) else ():
                waiting.update(images)
                with contextlib.suppress(Gathered):
                    self._run(arguments, layout, rows)
            for image in images:
                image.gathering = False
            return self._attend(arguments, layout, strips)
        finally:
            for layer in self.layers:
                layer.whole_image = None
            with_layout(self.model, arguments, layout, self.kwargs)

    def _attend(self, arguments, layout, strips):
        """The block's result for the whole image, from its results for strips with the rows around them."""
        height, width = layout.grids[0]
        whole = None
        for first, last in strips:
            start, end = self._around(height, first, last)
            result = self._run(arguments, layout, (start, end))
            *others, tokens = result if isinstance(result, tuple) else (result,)
            # of the image, or of the text too, whose tokens are the same in every strip
            text = tokens.shape[1] - (end - start) * width
            if whole is None:
                whole = tokens.new_empty(len(tokens), text + height * width, *tokens.shape[2:])
            words, strip = layout._replace(text_length=text, grids=((end - start, width),)).split(tokens)
            whole_words, image = layout._replace(text_length=text).split(whole)
            whole_words.copy_(words)
            image[:, first * width : last * width] = strip[:, (first - start) * width : (last - start) * width]
        return (*others, whole) if isinstance(result, tuple) else whole

    def _around(self, height: int, first: int, last: int) -> tuple[int, int]:
        """The rows that the layers reach from those from first to before last."""
        convolutions = [layer.value_conv for layer in self.layers if layer.value_conv is not None]
        reach = max((conv.kernel_size[0] // 2 for conv in convolutions), default=0)
        first, last = max(0, first - reach), min(height, last + reach)
        reaches = [layer.near_reach(height) for layer in self.layers if layer.window is not None]
        parts = [(first, last), *(reach(first, last - first) for reach in reaches)]
        return min(start for start, _ in parts), max(end for _, end in parts)

    def _run(self, arguments, layout, rows):
        """The block's result for the rows from rows[0] to before rows[1], as an image of their own."""
        part = self.family.strip(arguments, layout, rows)
        height, width = layout.grids[0]
        own = layout._replace(grids=((rows[1] - rows[0], width),), strip=(rows[0], height))
        return self.forward(**with_layout(self.model, part, own, self.kwargs))
