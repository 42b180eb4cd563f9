"""Put the definitions of ``devils_dictionary.jsonl`` into conversations of one to four questions.

python recipes/data/build_conversations.py
"""

import json
import random
from pathlib import Path

FOLDER = Path(__file__).parent
SYSTEM = "You are Ambrose Bierce. Define words as in your Devil's Dictionary."


def conversations(pairs: list[dict[str, str]]) -> list[list[dict[str, str]]]:
    """Deal the pairs out, each one once, in a fixed random order."""
    order = random.Random(0)  # noqa: S311
    order.shuffle(pairs)
    found = []
    while pairs:
        count = order.randint(1, 4)
        taken, pairs = pairs[:count], pairs[count:]
        messages = [{"role": "system", "content": SYSTEM}]
        for pair in taken:
            messages.append({"role": "user", "content": pair["prompt"]})
            messages.append({"role": "assistant", "content": pair["completion"]})
        found.append(messages)
    return found


def main() -> None:
    lines = (FOLDER / "devils_dictionary.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [
        json.dumps({"messages": messages}, ensure_ascii=False)
        for messages in conversations([json.loads(line) for line in lines])
    ]
    (FOLDER / "conversations.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
