"""The one rule for fields that a reader does not use.

A field that is empty says nothing. One that would change what is learned is refused, with its line. Any other, such as
an id, is left out, and the data module says so once. What the setting ``ignore`` names is never looked at.
"""

from collections.abc import Collection
from math import isnan

from lightning_lora.data.record import Record

# Names under which data sets in public use keep what belongs to a question, to an answer, or to its weight.
MEANINGFUL = frozenset(
    (
        *("weight", "weights", "sample_weight", "loss_weight", "loss_mask", "mask", "train", "trainable", "train_on"),
        *("system", "system_prompt", "history", "context", "contexts", "documents", "suffix", "prefix", "prefill"),
        *("instruction", "options", "choices"),
        *("tools", "functions", "tool_calls", "function_call", "chat_template_kwargs"),
        *("reasoning", "reasoning_content", "thinking", "thought", "thoughts", "rationale", "chain_of_thought", "cot"),
        *(
            f"{kind}{end}"
            for kind in ("image", "audio", "video")
            for end in ("", "s", "_url", "_urls", "_path", "_paths")
        ),
        *("input_image", "input_audio", "pixel_values", "text_pair", "pair"),
        *(f"{name}{number}" for name in ("text", "sentence", "question") for number in (1, 2)),
        *("premise", "hypothesis"),
    )
)
_NEUTRAL = {"weight": 1, "weights": 1, "sample_weight": 1, "loss_weight": 1, "train": True, "trainable": True}
_NEUTRAL |= {"label": True}  # KTO's mark of an answer that is wanted


def unused_keys(record: Record, used: Collection[str], meaningful: Collection[str] = ()) -> set[str]:
    """The fields of a row that are left out.

    Args:
        record: The row.
        used: The fields that its reader makes use of.
        meaningful: Further ones that would change what is learned, in rows of this kind.

    Raises:
        ValueError: If one of them would change what is learned.
    """
    unused = {field for field, value in record.fields.items() if field not in used and not is_empty(value)}
    for field in sorted(unused & MEANINGFUL.union(meaningful)):
        if field not in _NEUTRAL or record.fields[field] != _NEUTRAL[field]:
            raise record.error(
                field, "no such field here, for nothing would be learned of it, or its name under the setting 'ignore'"
            )
    return unused


def is_empty(value: object) -> bool:
    """Whether a value says nothing, as where a table has a column that most rows do not fill."""
    if isinstance(value, float):
        return isnan(value)  # as tables write what is missing
    return value is None or (isinstance(value, (str, list, dict)) and not value)
