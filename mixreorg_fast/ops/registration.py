"""One kernel, two ways to call it.

A custom op costs the host about 90 µs per forward and backward, a plain ``autograd.Function`` a third of that. So eager
code calls the function. Only code that traces calls the op: torch.compile, torch.export, fake tensors, dispatch modes.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import typing
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import kernels
from ..kernels.variants import on_device


class Kernel:
    """A kernel, called with the arguments of its declaration.

    The declaration is a function that makes the kernel's outputs empty: PyTorch traces with it, and the launcher fills
    them. Its name, without a leading underscore, is the custom op's. Its parameters are tensors, then numbers of types
    that a custom op takes, or one of :mod:`..kernels.settings`.

    Args:
        launcher: "module.function" of :mod:`..kernels`, imported at the first launch. It takes the declaration's
            arguments and then the outputs.
        gradient: gives the gradient of the first input, or a tuple of those of the first inputs, from the outputs'
            gradients, the inputs from number `first_kept` on, the `kept_outputs`, and the numbers. Without it the
            outputs have no gradient.
        kept_outputs: indices of the outputs that `gradient` takes. The first index is 0; the other outputs are not
            differentiable. If outputs are kept, `gradient` receives None as the gradient of an output that nobody used.
    Attributes:
        op: the custom op, ``torch.ops.mixreorg.<name>``; it takes the fields of settings as arguments of their own.
    """

    def __init__(
        self,
        declaration: Callable[..., Any],
        launcher: str,
        *,
        gradient: Callable[..., Any] | None = None,
        first_kept: int = 0,
        kept_outputs: tuple[int, ...] = (),
    ) -> None:
        functools.update_wrapper(self, declaration)
        name = declaration.__name__.lstrip("_")
        module, _, function = f"{kernels.__name__}.{launcher}".rpartition(".")
        signature = inspect.signature(declaration, eval_str=True)
        *others, last = signature.parameters.values()
        tensors = sum(x.annotation in (Tensor, Tensor | None) for x in (*others, last))
        self._settings = settings = last.annotation if hasattr(last.annotation, "_fields") else None
        if settings is not None:
            fields = typing.get_type_hints(settings).items()
            spread = (inspect.Parameter(name, last.kind, annotation=kind) for name, kind in fields)
            signature = signature.replace(parameters=[*others, *spread])

        def bundled(arguments: tuple) -> tuple:
            """The declaration's arguments from the custom op's."""
            first = len(others)
            return arguments if settings is None else (*arguments[:first], settings(*arguments[first:]))

        def launch(*arguments: Any) -> Any:
            output = declaration(*arguments)
            with on_device(arguments[0]):
                run = getattr(importlib.import_module(module), function)
                run(*arguments, *(output if isinstance(output, tuple) else (output,)))
            return output

        def launch_spread(*arguments: Any) -> Any:
            return launch(*bundled(arguments))

        launch_spread.__signature__ = signature
        self.op = torch.library.custom_op(f"mixreorg::{name}", launch_spread, mutates_args=())
        self.op.register_fake(lambda *arguments: declaration(*bundled(arguments)))
        self._launch = self._differentiable = self._transformable = launch
        if gradient is None:
            return

        def save(ctx: Any, inputs: tuple, output: Any) -> None:
            ctx.numbers = inputs[tensors:]
            outputs = [output[i] for i in kept_outputs]
            if outputs:
                ctx.mark_non_differentiable(*outputs[1:])
                ctx.set_materialize_grads(False)
            ctx.save_for_backward(*inputs[first_kept:tensors], *outputs)

        def forward(ctx: Any, *inputs: Any) -> Any:
            output = launch(*inputs)
            save(ctx, inputs, output)
            return output

        def backward(ctx: Any, *gradients: Tensor | None) -> tuple:
            """`gradient`, followed by None for the inputs that it leaves out."""
            # Saved tensors are read once: under activation checkpointing every access unpacks them.
            found = gradient(*gradients, *ctx.saved_tensors, *ctx.numbers)
            found = found if isinstance(found, tuple) else (found,)
            return (*found, *[None] * (len(ctx.needs_input_grad) - len(found)))

        # torch.func asks for a setup_context. With one, PyTorch inspects a signature at every call, 14 µs of host
        # time, so that calls outside of torch.func do without.
        self._transformable = _autograd(name, launch, backward, setup_context=save)
        self._differentiable = _autograd(name, forward, backward)
        self.op.register_autograd(
            backward, setup_context=lambda ctx, inputs, output: save(ctx, bundled(inputs), output)
        )

    def __call__(self, *arguments: Any) -> Any:
        if traces(arguments[0]):
            return self.op(*arguments if self._settings is None else (*arguments[:-1], *arguments[-1]))
        if torch._C._are_functorch_transforms_active():
            return self._transformable(*arguments)
        return (self._differentiable if torch.is_grad_enabled() else self._launch)(*arguments)


def kernel(launcher: str, **options: Any) -> Callable[[Callable[..., Any]], Kernel]:
    """Decorate a declaration, see :class:`Kernel`."""
    return lambda declaration: Kernel(declaration, launcher, **options)


def _autograd(name: str, forward: Callable[..., Any], backward: Callable[..., Any], **others: Callable) -> Callable:
    methods = {"forward": forward, "backward": backward, **others}
    return type(name, (torch.autograd.Function,), {key: staticmethod(value) for key, value in methods.items()}).apply


def traces(tensor: Tensor) -> bool:
    """Whether a call with `tensor` is traced."""
    return (
        torch.compiler.is_compiling()
        or type(tensor) not in (Tensor, torch.nn.Parameter)
        or torch._C._len_torch_dispatch_stack() > 0
    )
