"""LoRA on parameters that a module reads itself: the experts of a mixture, stacked in one tensor, or any matrix.

Nothing is called here that an adapter could add its path to, so the module reads ``W + scaling * B A`` in place of
``W`` while its forward runs. That makes a tensor of the parameter's size for each forward pass, as in PEFT.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lightning_lora.config import LoraConfig
from lightning_lora.layers.adapted_class import base_class
from lightning_lora.layers.adapter import Adapter, LoraAdapter
from lightning_lora.layers.base import LoraLayer, Target
from lightning_lora.layers.folding import RowFold, added_rows
from lightning_lora.layers.functional import low_rank_product
from lightning_lora.layers.init import fill_


class ParameterAdapter(LoraAdapter):
    """``W + scaling * B A`` with A of shape ``(r, in)`` and B of shape ``(out, r)``.

    For experts stacked in one tensor of shape ``(experts, out, in)``, A and B have that first dimension too, and each
    expert its own update. Where the module says ``is_transposed``, the tensor has shape ``(experts, in, out)``.
    """

    rank_dim = -1
    is_called = False  # not as a part of the model that a strategy may treat apart: its output is a weight

    parameter: str  # its name in the module
    is_transposed: bool  # whether its last dimension counts outputs

    def shapes(self, weight: Tensor) -> tuple[tuple[int, ...], tuple[int, ...]]:
        *experts, out_features, in_features = weight.mT.shape if self.is_transposed else weight.shape
        return (*experts, self.r, in_features), (*experts, out_features, self.r)

    def forward(self, weight: Tensor) -> Tensor:  # type: ignore[override]
        """The parameter with the update, in its own dtype."""
        factors = self.drop_ranks(self.lora_B, self.rank_dim).to(weight.dtype), self.lora_A.to(weight.dtype)
        if self.is_transposed:
            factors = factors[1].mT, factors[0].mT
        add = torch.addmm if weight.dim() == 2 else torch.baddbmm
        return add(weight, *factors, alpha=self.scaling)

    def delta_weight(self) -> Tensor:
        return self._update(slice(None))

    def row_fold(self, dtype: torch.dtype) -> RowFold | None:
        return added_rows(dtype, self._update)

    def _update(self, rows: slice) -> Tensor:
        lora_A = self.lora_A if self.lora_A.dim() == 2 else self.lora_A[rows]
        delta = low_rank_product(lora_A, self.lora_B[rows], self.scaling)
        return delta.mT if self.is_transposed else delta

    def reset_parameters(self) -> None:
        if self.lora_A.dim() == 2:
            super().reset_parameters()
            return
        kind_A, kind_B = self.initial_kinds()
        for expert in range(len(self.lora_A)):  # each with the fan-in of a matrix of its own
            name = f"{self._qualified_name}.{expert}"
            fill_(self.lora_A[expert], kind_A, self._seed, f"{name}.lora_A", self.r)
            fill_(self.lora_B[expert], kind_B, self._seed, f"{name}.lora_B", self.r)

    def peft_tensors(self) -> dict[str, Tensor]:
        """PEFT stacks the experts of A, and has them innermost in B."""
        lora_A: Tensor = self.lora_A
        lora_B: Tensor = self.lora_B
        if lora_A.dim() == 3:
            lora_A, lora_B = lora_A.flatten(0, 1), lora_B.permute(1, 2, 0).flatten(1)
        return {"lora_A.weight": lora_A, "lora_B.weight": lora_B}

    def from_peft(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        lora_A, lora_B = tensors["lora_A.weight"], tensors["lora_B.weight"]
        if self.lora_A.dim() == 3:
            experts = self.lora_A.shape[0]
            lora_A = lora_A.view(experts, self.r, -1)
            lora_B = lora_B.view(-1, self.r, experts).permute(2, 0, 1)
        return {"lora_A": lora_A, "lora_B": lora_B}


class LoraParameters(LoraLayer):
    """Any module of which parameters are adapted. Each of its adapters is a ``ModuleDict`` of one by parameter."""

    adapter_class = ParameterAdapter
    group = ""
    by_parameter: ClassVar[bool] = True  # whether settings name the parameters, and not the module

    @classmethod
    def new_adapter(
        cls, adapter_class: type[Adapter], target: Target, config: LoraConfig, adapter_name: str
    ) -> nn.Module:
        make: Any = adapter_class
        is_transposed = getattr(target.module, "is_transposed", False)
        adapters = {}
        for parameter in target.parameters:
            weight = target.module.get_parameter(parameter)
            adapters[parameter.replace(".", "_")] = make(  # a module's name holds no dot
                weight,
                config,
                f"{target.name}.{parameter}".lstrip(".") if cls.by_parameter else target.name,
                f"{adapter_name}.{parameter}",
                parameter=parameter,
                is_transposed=is_transposed and weight.dim() == 3,
            )
        return nn.ModuleDict(adapters)

    @classmethod
    def refused_setting(cls, config: LoraConfig) -> str | None:
        """A setting that such parameters cannot have, if there is one."""
        if config.needs_matrix:
            return f"init_lora_weights={config.init_lora_weights!r}"
        return next((name for name in ("lora_dropout", "use_dora", "use_vera") if getattr(config, name)), None)

    @classmethod
    def unsupported_reason(cls, target: Target, config: LoraConfig) -> str | None:
        if (setting := cls.refused_setting(config)) is not None:
            return f"{setting} is not for parameters that a module reads itself"
        for name in target.parameters:
            shape = tuple(target.module.get_parameter(name).shape)
            if len(shape) not in (2, 3):
                return f"its {name} has shape {shape}, and only matrices and stacks of matrices can be adapted"
        return None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if self._rows is not None:
            raise ValueError(
                f"adapters_for cannot choose an adapter for each sample in a {base_class(self).__name__}, which reads "
                "its weights as a whole: run the samples of each adapter by themselves, with set_adapter."
            )
        # To what the base computes, nothing is added.
        if self._own_forward is None:
            with nullcontext() if self._merged else self._reading_effective():
                return super(LoraLayer, self).forward(*args, **kwargs)
        with nullcontext() if self._merged or self.is_in_own_forward() else self._reading_effective():
            return self.call_own_forward(*args, **kwargs)[0]

    @contextmanager
    def _reading_effective(self) -> Iterator[None]:
        """Have the module find the adapted parameters under the names of the base's."""
        replaced = []
        # Of the active ones alone, so that compiled code does not depend on the others.
        active: list[Any] = [adapter for name in self._active for adapter in self.parts(name)]
        for name in dict.fromkeys(adapter.parameter for adapter in active):
            owner_name, _, attribute = name.rpartition(".")
            owner = self.get_submodule(owner_name)
            # FSDP shows full parameters as attributes of the object itself.
            holder: dict[str, Any] = vars(owner) if attribute in vars(owner) else owner._parameters
            weight = holder[attribute]
            effective: Tensor = weight
            with torch.autocast(weight.device.type, enabled=False):
                for adapter in active:
                    effective = adapter(effective) if adapter.parameter == name else effective
            # As torch.func.functional_call does, so that what it puts there in turn is what is read.
            holder[attribute] = effective
            replaced.append((holder, attribute, weight, effective))
        try:
            yield
        finally:
            for holder, attribute, weight, effective in replaced:
                if holder.get(attribute) is effective:  # else resharding has put there what belongs there
                    holder[attribute] = weight

    def parts(self, adapter_name: str) -> list[Adapter]:
        return list(self.lora[adapter_name].values())  # type: ignore[operator]

    def peft_targets(self, name: str) -> dict[str, list[str]]:
        return {"target_parameters": [f"{name}.{parameter}".lstrip(".") for parameter in self.adapted_parameters()]}

    def peft_adapters(self, adapter_name: str) -> Mapping[str, Adapter]:
        """PEFT wraps a module once for each of its parameters, the first innermost."""
        adapters: Any = self.lora[adapter_name]
        wrapped, found = self.peft_wrapped(), {}
        for owner, path in wrapped.items():
            own = [adapter for adapter in adapters.values() if _owner(adapter.parameter) == owner]
            outermost = path.removesuffix(".base_layer" * len(own))
            found.update({outermost + ".base_layer" * depth: adapter for depth, adapter in enumerate(reversed(own))})
        return found

    def peft_wrapped(self) -> dict[str, str]:
        owners = [_owner(parameter) for parameter in self.adapted_parameters()]
        own = ".base_layer" * owners.count("")
        inner = {
            owner: f"{own}{owner}" + ".base_layer" * owners.count(owner) for owner in dict.fromkeys(owners) if owner
        }
        return {"": own, **inner} if own else inner

    def beyond_peft(self) -> list[str]:
        return [name for name in self.adapted_parameters() if self.by_parameter and "." in name]

    def adapters_on(self, parameter: str) -> list[Adapter]:
        active: list[Any] = [adapter for name in self._active for adapter in self.parts(name)]
        return [adapter for adapter in active if adapter.parameter == parameter]

    def adapted_parameters(self) -> dict[str, nn.Parameter]:
        names = [adapter.parameter for adapters in self.lora.values() for adapter in adapters.values()]  # type: ignore
        return {name: self.get_parameter(name) for name in names}


def _owner(parameter: str) -> str:
    """What goes after the name of a module for the one of its submodules that has a parameter."""
    path = parameter.rpartition(".")[0]
    return path and f".{path}"
