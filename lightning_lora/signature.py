"""Constructors that take the fields of a dataclass, without a second list of them."""

import dataclasses
import inspect
from collections.abc import Callable
from typing import Any, Concatenate, ParamSpec, TypeVar

Self = TypeVar("Self")
Given = TypeVar("Given")
P = ParamSpec("P")


def takes(
    fields: Callable[P, Given],
) -> Callable[[Callable[[Self, Given], None]], Callable[Concatenate[Self, P], None]]:
    """Let an ``__init__`` that is given an instance of a dataclass be called with the fields of that dataclass.

    Type checkers and editors, :func:`inspect.signature` and jsonargparse see a parameter for each field, and find the
    words on it in the dataclass's docstring. A dict that the dataclass makes may be ``None`` here.
    """

    def decorate(init: Callable[[Self, Given], None]) -> Callable[Concatenate[Self, P], None]:
        def construct(self: Self, /, *args: P.args, **kwargs: P.kwargs) -> None:
            init(self, fields(*args, **kwargs))

        me = inspect.Parameter("self", inspect.Parameter.POSITIONAL_OR_KEYWORD)
        parameters = [me, *_parameters(fields)]
        for attribute in ("__module__", "__name__", "__qualname__"):
            setattr(construct, attribute, getattr(init, attribute))
        construct.__doc__ = fields.__doc__
        construct.__annotations__ = {p.name: p.annotation for p in parameters[1:]} | {"return": None}
        construct.__signature__ = inspect.Signature(parameters, return_annotation=None)  # type: ignore[attr-defined]
        # Which name an error about the arguments says.
        fields.__init__.__qualname__ = init.__qualname__
        return construct

    return decorate


def _parameters(fields: Any) -> list[inspect.Parameter]:
    made = {f.name for f in dataclasses.fields(fields) if f.default_factory is not dataclasses.MISSING}
    return [
        parameter.replace(default=None, annotation=parameter.annotation | None) if name in made else parameter
        for name, parameter in inspect.signature(fields).parameters.items()
    ]
