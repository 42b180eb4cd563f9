"""Build devils_dictionary.jsonl from the dictionary file of Debian's package dict-devil.

Usage: python recipes/data/build_devils_dictionary.py /usr/share/dictd/devil.dict.dz
"""

from __future__ import annotations

import argparse
import gzip
import json
import re
from pathlib import Path

TARGET = Path(__file__).with_name("devils_dictionary.jsonl")
LONGEST = 160  # characters of a definition
WORD = r"[A-Z][A-Z'\-\. ]+"
PART = r"(?:n|adj|adv|v\.t|v\.i|v|pp|p\.p|n\.pl|pro|x|interj|conj)"
# Jokes of 1911 about peoples, the sexes or faiths as a group.
LEFT_OUT = {
    "ABORIGINIES",
    "AFRICAN",
    "ALLAH",
    "ARSENIC",
    "BEARD",
    "CLAIRVOYANT",
    "FEMALE",
    "GARTHER",
    "HATCHET",
    "HEBREW",
    "INDISCRETION",
    "ITCH",
    "JOSS-STICKS",
    "LIMB",
    "MINSTREL",
    "MULATTO",
    "PHOTOGRAPH",
    "PICKANINNY",
    "PORTUGUESE",
    "PRUDE",
    "QUEEN",
    "RAZOR",
    "RED-SKIN",
    "RUBBISH",
    "RUIN",
    "RUSSIAN",
    "SCRIPTURES",
    "UGLINESS",
    "WITCH",
    "ZIGZAG",
}


def read_entries(path: str) -> list[tuple[str, str]]:
    """Headwords, in capitals, with the first paragraph of their definitions."""
    with gzip.open(path) as file:
        text = file.read().decode("utf-8", "replace")
    text = text[text.index("ABASEMENT, n.") :]  # after the preface
    entries = []
    for entry in re.split(rf"\n(?={WORD}, +{PART}\b)", text):
        match = re.match(rf"({WORD}), +{PART}\.?[a-z\.]*\s+(.*)", entry, re.DOTALL)
        if match:
            paragraph = re.split(r"\n\s*\n|\n {4,}", match[2])[0]
            entries.append((match[1].strip(), clean(paragraph)))
    return entries


def clean(paragraph: str) -> str:
    """The paragraph on one line, without the dictionary's cross-reference and emphasis marks."""
    line = " ".join(paragraph.split())
    line = re.sub(r"^\[from \{\w+\}\] | \(See [^)]*\)$", "", line)
    line = re.sub(r"(?<=\w)- (?=\w)", "-", line)  # a compound that was broken across lines
    return re.sub(r"\b_|_\b", "", line)


def main() -> None:
    """Write the rows and say how many."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dictionary", help="path of devil.dict.dz")
    entries = read_entries(parser.parse_args().dictionary)
    rows: dict[str, str] = {}
    for word, definition in entries:
        # A line without a full stop is the first of a verse, or introduces one.
        complete = definition.endswith((".", "!", "?", '"', ")"))
        if word not in LEFT_OUT and complete and 15 < len(definition) <= LONGEST:
            title = re.sub(r"[A-Z']+", lambda part: part[0].capitalize(), word)
            rows.setdefault(title, definition)
    with TARGET.open("w", encoding="utf-8", newline="\n") as file:
        for title, definition in rows.items():
            row = {"prompt": f"Define: {title}", "completion": definition}
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    print(f"{TARGET}: {len(rows)} of {len(entries)} entries")


if __name__ == "__main__":
    main()
