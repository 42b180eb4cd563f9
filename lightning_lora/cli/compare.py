"""How far two adapters of one base learned the same: section 7 of the paper, Hu et al., arXiv 2106.09685."""

from pathlib import Path

import torch
from torch import Tensor, nn

from lightning_lora.fqn import group_of
from lightning_lora.layers import LoraAdapter
from lightning_lora.layers.spectrum import Factors, decomposed, subspace_similarity
from lightning_lora.model.record import named_injections


def similarities(one: dict[str, Factors], other: dict[str, Factors]) -> dict[str, Tensor]:
    """``phi(i, j)`` of the A of the layers that two adapters have in common, by name."""
    shared = [name for name in one if name in other and one[name][0][0].shape == other[name][0][0].shape]
    return {name: subspace_similarity(one[name][0], other[name][0]) for name in shared}


@torch.no_grad()
def amplification(model: nn.Module) -> dict[str, float]:
    """``||dW||_F / ||U^T W V||_F`` of each adapted weight, U and V being the update's singular vectors (section 7.3).

    It is how many times larger the update is than what the weight has in the same directions.

    Args:
        model: With one adapter of products ``B A``; other kinds are left out.
    """
    found = {}
    for root_name, injection in named_injections(model):
        for name, layer in injection.layers():
            adapter = layer.lora[injection.adapter_name]
            if isinstance(adapter, LoraAdapter) and (factors := adapter.low_rank_factors()) is not None:
                left, values, right = decomposed(factors)
                weight = adapter.rows(layer.base_weight()).double()
                update = abs(adapter.scaling) * torch.linalg.vector_norm(values)
                inside = torch.linalg.matrix_norm(left.mT @ weight @ right.mT)
                found[f"{root_name}.{name}".strip(".")] = float(update / inside)
    return found


def draw(similarities: dict[str, Tensor], path: Path, titles: tuple[str, str]) -> None:
    """Write a picture with a panel for each name of layers, such as ``q_proj``: the mean over them, as in figure 3.

    The ending of the path says the kind of picture; the titles are those of the two adapters.

    Raises:
        ModuleNotFoundError: If matplotlib is not installed.
    """
    try:
        from matplotlib.cm import ScalarMappable
        from matplotlib.colors import Normalize
        from matplotlib.figure import Figure
    except ImportError:
        raise ModuleNotFoundError(
            "A picture needs matplotlib, which is not installed: pip install matplotlib"
        ) from None
    groups: dict[tuple[str, torch.Size], list[Tensor]] = {}
    for name, phi in similarities.items():
        groups.setdefault((group_of(name), phi.shape), []).append(phi)
    columns = min(len(groups), 4)
    rows = -(-len(groups) // columns)
    # Not through pyplot, which would look for a display.
    figure = Figure(figsize=(3.2 * columns, 2.4 * rows + 0.6), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).flatten()
    for panel, ((group, shape), found) in zip(panels, groups.items()):
        mean, extent = torch.stack(found).mean(0).numpy(), (0.5, shape[1] + 0.5, shape[0] + 0.5, 0.5)
        panel.imshow(mean, vmin=0, vmax=1, cmap="magma", aspect="auto", extent=extent)
        panel.set_title(f"{group} ({len(found)})", fontsize=9)
    for panel in panels[len(groups) :]:
        panel.set_axis_off()
    figure.colorbar(ScalarMappable(Normalize(0, 1), "magma"), ax=list(panels), label="phi(i, j)")
    figure.supylabel(f"i: {titles[0]}", fontsize=8)
    figure.supxlabel(f"j: {titles[1]}", fontsize=8)
    figure.savefig(path, dpi=150)
