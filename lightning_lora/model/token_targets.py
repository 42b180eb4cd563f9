"""Which rows of which embeddings ``trainable_token_indices`` means, and what shares them."""

import difflib
from collections.abc import Collection

from lightning.pytorch.utilities import rank_zero_warn
from torch import nn

from lightning_lora.config import LoraConfig
from lightning_lora.fqn import is_submodule
from lightning_lora.layers import LoraLayer, LoraTokens, Target, unsupported_reason
from lightning_lora.model.record import parameters_by_name
from lightning_lora.model.targets import TargetError, matches, modules_by_name, pretrained_models


def find_token_targets(
    model: nn.Module, config: LoraConfig, others: Collection[str], saved: Collection[str]
) -> dict[str, Target]:
    """The embeddings with rows to train, each followed by the modules that are tied to it, by name.

    Args:
        model: The model.
        config: The settings.
        others: Names of the modules that get adapters of another kind.
        saved: Names of the modules that are trained in full.

    Raises:
        TargetError: If an embedding is not there, cannot be adapted, has no such row, or is adapted otherwise too.
    """
    names = modules_by_name(model)
    inputs = [module for found in pretrained_models(model).values() for module in _input_embedding(found)]
    targets: dict[str, Target] = {}
    for name, tokens in _chosen(names, inputs, config).items():
        if name in targets:  # tied to one before
            if targets[name].tokens != tokens:
                raise TargetError(
                    f"trainable_token_indices gives {name!r} other indices than what it is tied to: give both the "
                    "same, or name one of them. Nothing was changed."
                )
            continue
        tied = _tied_to(name, names, model)
        # PEFT ties the rest to the input embedding, and stores the rows under its name.
        tied.sort(key=lambda name: (names[name] not in inputs, not isinstance(names[name], nn.Embedding)))
        for each in tied:
            leader = None if each == tied[0] else tied[0]
            target = Target(each, names[each], None, LoraTokens, tokens=tokens, tied_to=leader)
            _require_fit(each, target, config, others, saved)
            targets[each] = target
        if len(tied) == 1 and getattr(names[name], "padding_idx", None) in tokens:
            rank_zero_warn(
                f"trainable_token_indices holds the padding_idx of {name!r}, whose row gets no gradient in an "
                "embedding and stays as it is: take it out, or set padding_idx to None."
            )
    return targets


def _chosen(names: dict[str, nn.Module], inputs: list[nn.Module], config: LoraConfig) -> dict[str, tuple[int, ...]]:
    """The indices by the full names of the modules that the config means."""
    chosen = config.trainable_token_indices
    if chosen is None:
        return {}
    embeddings = {name: module for name, module in names.items() if isinstance(module, nn.Embedding)}
    if isinstance(chosen, list):
        found = [name for name, module in names.items() if module in inputs] or list(embeddings)
        if len(found) != 1:
            raise TargetError(
                f"trainable_token_indices is a list, which is for the one input embedding, but the model has "
                f"{len(found)}{_listing(found)}: pass a dict with the name of the embedding. Nothing was changed."
            )
        return {found[0]: tuple(chosen)}
    result: dict[str, tuple[int, ...]] = {}
    for pattern, tokens in chosen.items():
        matching = [name for name in names if matches(name, [pattern])]
        if not matching:
            near = difflib.get_close_matches(pattern, [name.rpartition(".")[2] for name in embeddings], n=3)
            raise TargetError(
                f"trainable_token_indices names {pattern!r}, but the model has no such module; its embeddings are"
                f"{_listing(near or list(embeddings)) or ' none'}. Correct the name. Nothing was changed."
            )
        result.update(dict.fromkeys(matching, tuple(tokens)))
    return result


def _tied_to(name: str, names: dict[str, nn.Module], model: nn.Module) -> list[str]:
    """The names of all modules with this module's very weight, itself included."""
    weight = names[name]._parameters.get("weight")
    if weight is None:
        return [name]
    holders = {full_name.rpartition(".")[::2] for full_name, p in parameters_by_name(model).items() if p is weight}
    elsewhere = sorted(f"{owner}.{attribute}" for owner, attribute in holders if attribute != "weight")
    if elsewhere:
        raise TargetError(
            f"The weight of {name!r} is tied to {', '.join(map(repr, elsewhere))}, whose rows cannot be trained by "
            "trainable_token_indices with it: untie it, or name another. Nothing was changed."
        )
    owners = {owner for owner, _ in holders}
    return [each for each in names if each in owners]


def _require_fit(
    name: str, target: Target, config: LoraConfig, others: Collection[str], saved: Collection[str]
) -> None:
    problem = None
    if name in others:
        problem = "the targets match it too: take it out of one of them, for example with exclude_modules"
    elif any(is_submodule(name, module) for module in saved):
        problem = "modules_to_save trains it as a whole: take it out of one of them"
    elif not isinstance(target.module, LoraLayer):
        problem = unsupported_reason(target, config)
        rows = len(target.module.weight) if problem is None else 0  # type: ignore[arg-type]
        if problem is None and max(target.tokens) >= rows:
            problem = f"index {max(target.tokens)} is none of its {rows} rows: resize the embedding first"
    if problem:
        kind = f"{type(target.module).__module__}.{type(target.module).__qualname__}"
        tied = f" (tied to {target.tied_to!r})" if target.tied_to is not None else ""
        raise TargetError(
            f"trainable_token_indices means {name!r}{tied}, which is a {kind} and cannot be adapted so: {problem}. "
            "Nothing was changed."
        )


def _input_embedding(hf_model: nn.Module) -> list[nn.Module]:
    try:
        found = hf_model.get_input_embeddings()  # type: ignore[operator]
    except NotImplementedError:  # transformers' answer for models that have none
        return []
    return [found] if isinstance(found, nn.Module) else []


def _listing(names: Collection[str]) -> str:
    return f" ({', '.join(map(repr, names))})" if names else ""
