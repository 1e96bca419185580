"""The hooks by which a transformer sees some rows of its image: what `hybriddit.parallel` does to it, but for talking."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from ..attention import HybridAttention, TokenLayout
from ..attention.rows import RowShard
from .family import family_of, is_hybrid
from .sit import SiTTransformer2DModel
from .surgery import arguments_of, convert_dense_layers, given_layout, with_layout
from .wrapping import check_unwrapped


def check_spreads(transformer: nn.Module) -> None:
    """Raise ValueError, in one line, for a model whose images cannot be spread over processes."""
    check_unwrapped(transformer)
    if not isinstance(transformer, SiTTransformer2DModel):
        family = family_of(transformer)
        if not is_hybrid(transformer):
            raise ValueError(f"the {type(transformer).__name__} is not hybrid: hybridize it first")
        family.check_shared(transformer.config)
        if family.image_exit is None:
            raise ValueError(
                f"{family.name} does not say where its image tokens leave the model: it needs image_exit (see Family)"
            )
    for name, module in transformer.named_modules():
        if not isinstance(module, HybridAttention):
            continue
        if module.pooled is not None:
            raise ValueError(f"{name} has pooled keys: such a model's images are not spread over processes")
        if module.far is not None and not module.far.spreads:
            raise ValueError(
                f"the far branch of {name} sees the whole image at once (a mixer of whole images, or a feature map without "
                "kernels): such a model's images are not spread over processes"
            )


class Spread:
    """What a model's hooks do to let it compute some rows of its image.

    rows_of: for the rows of an image, which of them these are.
    layout: of the call that runs, with these rows; None where it runs the whole image.
    """

    def __init__(self, rows_of: Callable[[int], RowShard]):
        self.rows_of = rows_of
        self.layout: TokenLayout | None = None

    def attach(self, transformer: nn.Module) -> None:
        """Add the hooks to a model that `check_spreads` lets pass, in place; layers that stayed dense heed the rows then."""
        entrance, exit = None, "proj_out"
        if not isinstance(transformer, SiTTransformer2DModel):
            convert_dense_layers(transformer)
            family = family_of(transformer)
            entrance, exit = family.image_entrance, family.image_exit
        transformer.register_forward_pre_hook(self.enter, with_kwargs=True)
        if entrance is not None:
            transformer.get_submodule(entrance).register_forward_hook(self.take)
        transformer.get_submodule(exit).register_forward_hook(self.gather)
        for module in transformer.modules():
            if isinstance(module, HybridAttention):
                module.register_forward_pre_hook(self.check_layer, with_kwargs=True)

    def enter(self, model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict] | None:
        """Forward pre-hook of the model: give it the layout of these rows, and their part of the inputs."""
        inputs = arguments_of(model, args, kwargs)
        sit = isinstance(model, SiTTransformer2DModel)
        if sit:
            grid = model.patch_embed.dynamic_feat_size(inputs["hidden_states"].shape[2:])
            layout, cut, joint = TokenLayout(0, (grid,), text_first=False), (), ()
        else:
            family = family_of(model)
            layout, cut, joint = given_layout(model, inputs), family.image_arguments, family.joint_arguments
        if len(layout.grids) != 1:
            raise ValueError("an image with reference images is not spread over processes: call the model in one")
        height, width = layout.grids[0]
        rows = self.rows_of(height)
        self.layout = layout._replace(grids=((rows.count, width),), rows=rows)
        parts = dict.fromkeys(cut, self.layout.own) | dict.fromkeys(joint, self.layout.own_joint)
        inputs |= {name: changed(inputs[name], part) for name, part in parts.items() if name in inputs}
        if sit:
            return (), {**inputs, "token_layout": self.layout}
        return (), with_layout(model, inputs, self.layout)

    def take(self, module: nn.Module, args: tuple, found: Tensor | tuple) -> Tensor | tuple:
        """Forward hook of the model's entrance: these rows of [B, N, width], or of the first of several tables."""
        if self.layout is None:
            return found
        if isinstance(found, tuple):
            return (self.layout.own(found[0]), *found[1:])
        return self.layout.own(found)

    def check_layer(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        """Forward pre-hook of attention: a layer that took its rows for the whole image would be wrong without a word."""
        layout = args[3] if len(args) > 3 else kwargs["token_layout"]
        if self.layout is not None and layout.rows is not self.layout.rows:
            raise ValueError("an attention processor has dropped its layout's rows: change layouts by their _replace")

    def gather(self, module: nn.Module, args: tuple, tokens: Tensor) -> Tensor:
        """Forward hook of the model's exit: the rows of all processes."""
        if self.layout is None:
            return tokens
        return self.layout.rows.gathered(tokens.unflatten(1, self.layout.grids[0])).flatten(1, 2)


def changed(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """An argument, changed where it is a tensor, or each of a list of tensors."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, list | tuple) and value and all(isinstance(x, Tensor) for x in value):
        return type(value)(change(x) for x in value)
    return value
