"""Pairs of a source text and a target text."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from lightning_lora.data.conversation import IGNORED
from lightning_lora.data.encoded import Encoded
from lightning_lora.data.files import Paths
from lightning_lora.data.keys import unused_keys
from lightning_lora.data.record import Record
from lightning_lora.data.texts import TextData


class Seq2SeqData(TextData):
    """Rows with a source and a target, from files of all kinds.

    Targets are tokenized as the checkpoint's own generation writes them, with the target side of tokenizers that have
    two (Marian), and the token of the target's language where the tokenizer has languages (mBART, NLLB, M2M100).

    Args:
        path: See :class:`~lightning_lora.data.from_files.FileData`.
        pretrained: See :class:`~lightning_lora.data.texts.TextData`.
        source_field: Field of the text that is read. Default ``source``.
        target_field: Field of the text that is to be written. Default ``target``.
        max_source_length: Longest source, in tokens; longer ones lose their end. Default 256.
        max_target_length: The same for targets. Default 64.
        source_lang: Language of the sources, as the tokenizer names it, such as ``en_XX``. Default ``None``: the
            model's.
        target_lang: The same for targets.
        options: The other arguments of :class:`~lightning_lora.data.from_files.FileData`.

    Raises:
        ValueError: In ``setup``, if the tokenizer has languages and none is named, and as in the base class.
    """

    def __init__(
        self,
        path: Paths,
        pretrained: str | None = None,
        source_field: str = "source",
        target_field: str = "target",
        max_source_length: int = 256,
        max_target_length: int = 64,
        source_lang: str | None = None,
        target_lang: str | None = None,
        **options: Any,
    ) -> None:
        super().__init__(path, pretrained, **options)
        self.source_field = source_field
        self.target_field = target_field
        self.max_source_length = max_source_length
        self.max_target_length = max_target_length
        self.source_lang = source_lang
        self.target_lang = target_lang

    def prepare(self) -> None:
        """Load the tokenizer, and tell it the languages."""
        super().prepare()
        source = self.source_lang or self.of_model("source_lang")
        target = self.target_lang or self.of_model("target_lang")
        if not hasattr(self.tokenizer, "tgt_lang"):
            return
        if source is None or target is None:
            raise ValueError(
                f"Found source_lang={source!r} and target_lang={target!r} with a tokenizer of several languages, "
                "expected the names of both, such as en_XX and de_DE. Set them in the model's settings."
            )
        self.source_lang, self.target_lang = source, target
        self.tokenizer.src_lang, self.tokenizer.tgt_lang = source, target

    def token_ids(self, row: Any) -> Iterator[list[int]]:
        """Those of the source and of the target."""
        yield from row

    def learned(self, row: list[list[int]]) -> Iterator[list[bool]]:
        """The target is learned."""
        yield from ([on] * len(ids) for on, ids in zip((False, True), row))

    def encode(self, record: Record) -> Encoded:
        """Token ids of the source, and of the target as labels."""
        unused = unused_keys(record, {self.source_field, self.target_field})
        source, cut = self._source(record)
        target, cut_too = self.cut(self.max_target_length, text_target=record.text(self.target_field))
        return Encoded([[source, target]], cut or cut_too, unused)

    def encode_predict(self, record: Record) -> list[int]:
        """Token ids of the source."""
        return self._source(record)[0]

    def collate(self, rows: list[list[list[int]]]) -> dict[str, Tensor]:
        """Pad sources and targets to the longest."""
        longest = max(len(target) for _, target in rows)
        labels = [target + [IGNORED] * (longest - len(target)) for _, target in rows]
        return {**self.collate_predict([source for source, _ in rows]), "labels": torch.tensor(labels)}

    def collate_predict(self, rows: list[list[int]]) -> dict[str, Tensor]:
        """The sources alone."""
        return dict(self.tokenizer.pad({"input_ids": rows}, return_tensors="pt"))

    def _source(self, record: Record) -> tuple[list[int], bool]:
        return self.cut(self.max_source_length, text=record.text(self.source_field))
