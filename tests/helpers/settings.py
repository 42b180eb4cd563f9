"""Settings as Hydra gives them: lists and dicts that are none."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any


class ListConfig(Sequence):
    def __init__(self, items: Sequence[Any]) -> None:
        self.of = items

    def __getitem__(self, index: Any) -> Any:
        return self.of[index]

    def __len__(self) -> int:
        return len(self.of)


class DictConfig(Mapping):
    def __init__(self, items: dict[str, Any]) -> None:
        self.of = items

    def __getitem__(self, key: Any) -> Any:
        return self.of[key]

    def __len__(self) -> int:
        return len(self.of)

    def __iter__(self) -> Iterator[Any]:
        return iter(self.of)
