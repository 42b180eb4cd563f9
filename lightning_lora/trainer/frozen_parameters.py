"""Optimizers hold what is trained and nothing else: no frozen parameter in their groups, names or state.

One that was made before the adapters, as Lightning's command line makes that of ``--optimizer``, or that chooses by
names such as ``weight``, holds the weights of adapted layers alone: there the adapters take their place.
"""

from collections.abc import Iterable, Iterator
from typing import Any

from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from lightning_lora.fqn import clean_fqn
from lightning_lora.model.record import adapted_layers
from lightning_lora.sharding import is_sharded

_GIVE_TRAINED = (
    "Give it the trained parameters alone in configure_optimizers: [p for p in self.parameters() if p.requires_grad]."
)


def drop_frozen(optimizers: Iterable[Any], model: nn.Module) -> None:
    """Take frozen parameters out of the optimizers' groups, names and state, so that they hold the trained ones alone.

    Adapters that no optimizer has go where the weights of their layers are, before these are taken out. Empty groups
    stay: learning-rate schedulers count them.

    Raises:
        RuntimeError: If no optimizer has any of the model's trainable parameters.
        ValueError: If an optimizer cannot do without the frozen ones.
    """
    # Where configure_optimizers returns None, Lightning has one that holds nothing, and a step may have its own.
    optimizers = [each for each in optimizers if any(map(held_by, nested(each)))]
    _put_in_adapters([each for optimizer in optimizers for each in nested(optimizer)], model)
    for optimizer in optimizers:
        _require_apart(optimizer, model)
        for each in nested(optimizer):  # which may share groups, so all of them before any
            _drop_beside(each)
        dropped = [_drop_from(each) for each in nested(optimizer)]
        if any(dropped) and not is_sharded(model):
            _require_dropped(optimizer)
    optimized = {id(p) for optimizer in optimizers for each in nested(optimizer) for p in held_by(each)}
    trainable = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    forgotten = [name for name, parameter in trainable.items() if id(parameter) not in optimized]
    if optimizers and len(forgotten) == len(trainable):
        raise RuntimeError(
            f"None of the {len(trainable)} trainable parameters is in an optimizer, so nothing would be trained: "
            "configure_optimizers probably uses a list of parameters from before the adapters were injected, or an "
            "optimizer that has made its state of such a list. Make the list in configure_optimizers itself, for "
            "example from self.parameters()."
        )
    if optimizers and forgotten:
        rank_zero_warn(
            f"{len(forgotten)} of {len(trainable)} trainable parameters are in no optimizer and stay as they are, "
            f"among them {forgotten[0]}: check the parameter groups in configure_optimizers."
        )


def nested(optimizer: Any) -> Iterator[Any]:
    """An optimizer, and those that it wraps, as Lightning's own wrapper, Lookahead and mixtures of several do."""
    waiting, seen = [optimizer], set()
    while waiting:
        each = waiting.pop(0)
        if id(each) in seen:
            continue
        seen.add(id(each))
        yield each
        for value in list(getattr(each, "__dict__", {}).values()):
            inner = value if isinstance(value, (list, tuple)) else [value]
            waiting += [found for found in inner if isinstance(found, Optimizer)]


def held_by(optimizer: Any) -> list[Tensor]:
    """The parameters in an optimizer's groups."""
    return [parameter for group in getattr(optimizer, "param_groups", ()) for parameter in group["params"]]


def step_hooks(optimizer: Any, before: Any = None, after: Any = None) -> list[RemovableHandle]:
    """Have functions called before and after each step of an optimizer, in the way of torch's step hooks."""
    for each in nested(optimizer):
        try:
            handles = [] if before is None else [each.register_step_pre_hook(before)]
            return handles + ([] if after is None else [each.register_step_post_hook(after)])
        except AttributeError:  # it has not called the constructor of torch's Optimizer
            continue
    return []


def _put_in_adapters(optimizers: list[Any], model: nn.Module) -> None:
    """Put adapters that no optimizer has behind the weights of their layers, in every group that has these."""
    held = {id(parameter) for optimizer in optimizers for parameter in held_by(optimizer)}
    names = {id(parameter): clean_fqn(name) for name, parameter in model.named_parameters()}
    of_weight: dict[int, list[Tensor]] = {}
    for layer in adapted_layers(model):
        trained = [p for p in layer.lora.parameters() if p.requires_grad and id(p) not in held]
        for weight in layer.adapted_parameters().values():
            of_weight.setdefault(id(weight), []).extend(trained)
    for optimizer in optimizers:
        for parameter in held_by(optimizer) if _keeps_lists(optimizer) else ():
            of_weight.pop(id(parameter), None)  # it has made lists beside its groups, with nothing for adapters
    done: set[int] = set()  # wrappers may share groups with what they wrap
    for optimizer in optimizers:
        if any(id(parameter) in of_weight for parameter in getattr(optimizer, "state", ())):
            continue  # it has made its state already, and none for adapters
        for group in getattr(optimizer, "param_groups", ()):
            if id(group["params"]) not in done:
                _put_into(group, of_weight, names)
                done.add(id(group["params"]))


def _put_into(group: dict[str, Any], of_weight: dict[int, list[Tensor]], names: dict[int, str]) -> None:
    added = {id(p): p for weight in group["params"] for p in of_weight.get(id(weight), ())}
    if not added:
        return
    group["params"] += type(group["params"])(added.values())
    if "param_names" in group:
        group["param_names"] += type(group["param_names"])(names[key] for key in added)


def _drop_from(optimizer: Any) -> bool:
    """Whether there was anything to drop."""
    found = False
    for group in getattr(optimizer, "param_groups", ()):
        trained = [parameter.requires_grad for parameter in group["params"]]
        if all(trained):
            continue
        found = True
        for key in ("params", "param_names"):  # torch keeps the names of named parameters beside them
            if key in group:
                kept = [value for value, is_trained in zip(group[key], trained) if is_trained]
                if isinstance(group[key], list):
                    group[key][:] = kept  # LBFGS and wrappers hold on to the list
                else:
                    group[key] = kept
    state = getattr(optimizer, "state", {})
    for parameter in [key for key in state if isinstance(key, Tensor) and not key.requires_grad]:
        found = True
        del state[parameter]
    return found


def _drop_beside(optimizer: Any) -> None:
    """Drop what an optimizer keeps in lists of a tensor for each parameter, as Lookahead does."""
    groups = [group["params"] for group in getattr(optimizer, "param_groups", ())]
    for name, value in list(getattr(optimizer, "__dict__", {}).items()):
        if (kept := _kept_beside(value, groups)) is not value:
            setattr(optimizer, name, kept)
    for group in getattr(optimizer, "param_groups", ()):
        group.update({key: _kept_beside(value, [group["params"]]) for key, value in group.items()})


def _keeps_lists(optimizer: Any) -> bool:
    """Whether an optimizer keeps lists of a tensor for each parameter beside its groups."""
    groups = [group["params"] for group in getattr(optimizer, "param_groups", ())]
    every = [parameter for group in groups for parameter in group]
    values = [value for value in getattr(optimizer, "__dict__", {}).values() if not any(value is g for g in groups)]
    return any(_is_beside(value, every) or _are_beside(value, groups) for value in values)


def _kept_beside(value: Any, groups: list[Any]) -> Any:
    """A list without the entries of frozen parameters, if it has one for each of a group's, by group or of them all."""
    every = [parameter for group in groups for parameter in group]
    if any(value is group for group in groups) or all(parameter.requires_grad for parameter in every):
        return value
    if _is_beside(value, every):
        kept = [entry for entry, parameter in zip(value, every) if parameter.requires_grad]
    elif _are_beside(value, groups):
        kept = [_kept_beside(entry, [group]) for entry, group in zip(value, groups)]
    else:
        return value
    if isinstance(value, list):
        value[:] = kept  # others may hold on to it
        return value
    return tuple(kept)


def _is_beside(value: Any, parameters: list[Tensor]) -> bool:
    """Whether it is a list of a tensor for each parameter, in its shape."""
    return (
        isinstance(value, (list, tuple))
        and len(value) == len(parameters) > 0
        and all(isinstance(e, Tensor) and e.shape == p.shape for e, p in zip(value, parameters))
    )


def _are_beside(value: Any, groups: list[Any]) -> bool:
    """Whether it is a list of such a list for each group."""
    return isinstance(value, (list, tuple)) and len(value) == len(groups) > 0 and all(map(_is_beside, value, groups))


def _require_apart(optimizer: Any, model: nn.Module) -> None:
    """Require that the optimizer has parameters one by one, and no tensor in which frozen and trained ones lie."""
    if is_sharded(model):  # strategies have flat tensors of their own, of which they answer for the frozen ones
        return
    own = {id(parameter) for parameter in model.parameters()}
    foreign = [p for each in nested(optimizer) for p in held_by(each) if id(p) not in own and p.requires_grad]
    if not foreign:
        return
    taken = {_memory(parameter) for parameter in foreign}
    shared = [n for n, p in model.named_parameters() if not p.requires_grad and p.numel() and _memory(p) in taken]
    if shared:
        raise ValueError(
            f"{type(optimizer).__name__} holds a tensor in which the frozen {shared[0]!r} lies too, so that it would "
            f"move the base: it probably makes one flat tensor of all parameters. {_GIVE_TRAINED}"
        )


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _require_dropped(optimizer: Any) -> None:
    """Require that the optimizer now is without frozen parameters, and can be saved so."""
    name, problem = type(optimizer).__name__, ""
    held = [key for each in nested(optimizer) for key in (*held_by(each), *getattr(each, "state", ()))]
    if any(isinstance(key, Tensor) and not key.requires_grad for key in held):
        problem = "it makes its groups or state anew, with them in"
    else:
        try:
            optimizer.state_dict()
        except Exception as error:  # of whatever kind the optimizer raises
            problem = f"its state_dict() then raises {type(error).__name__}: {error}"
    if problem:
        raise ValueError(f"Frozen parameters cannot be taken out of {name}: {problem}. {_GIVE_TRAINED}")
