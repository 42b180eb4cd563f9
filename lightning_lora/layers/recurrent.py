"""LoRA on ``nn.LSTM``, ``nn.GRU``, ``nn.RNN`` and their cells, which read all of their matrices themselves."""

from torch import nn

from lightning_lora.layers.parameters import LoraParameters


class LoraRecurrent(LoraParameters):
    """Recurrent layers and cells: the matrices from the input, from the state and, in an LSTM, of its projection."""

    supported = "torch.nn.LSTM, GRU, RNN and their cells"
    group = "recurrent"

    @classmethod
    def adapts(cls, module: nn.Module) -> bool:
        return isinstance(module, (nn.RNNBase, nn.RNNCellBase))

    @classmethod
    def parameters_of(cls, module: nn.Module) -> tuple[str, ...]:
        return tuple(name for name in module._parameters if name.startswith("weight_"))
