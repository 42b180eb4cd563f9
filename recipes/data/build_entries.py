"""Build parts_of_speech.jsonl and entries.jsonl from the dictionary file of Debian's package dict-devil.

The first holds definitions with the part of speech of the word they define. The second holds whole entries as words
in lower case without punctuation, each word tagged (IOB2) as a piece of the headword, of the part of speech, of a
verse, of that verse's author, or of none (the definition).

    python recipes/data/build_entries.py /usr/share/dictd/devil.dict.dz
"""

import argparse
import gzip
import json
import re
from pathlib import Path
from typing import Any

from build_devils_dictionary import LEFT_OUT, PART, WORD, clean

FOLDER = Path(__file__).parent
PARTS = {"n": "noun", "adj": "adjective", "v": "verb"}
LONGEST = 120  # words of a tagged entry
# Entries that speak of peoples, the sexes or faiths as a group, in the manner of 1911, are left out.
GROUPS = re.compile(
    r"\b(negro\w*|nigger\w*|darky|darkies|jews?|jewish|hebrews?|israelites?|chinam[ae]n|chinese|mongols?|squaws?|indians?|"
    r"red-?sk?ins?|mulatto\w*|savages?|heathens?|mohammed\w*|moslems?|muslims?|mussulm[ae]n|turks?|arabs?|christians?|"
    r"africans?|ethiop\w*|irishm[ae]n|wom[ae]n|females?|ladies|girls?|wife|wives|maidens?|race|races)\b",
    re.IGNORECASE,
)


def split(text: str) -> list[tuple[str, str, str]]:
    """Headword, part of speech and body of each entry."""
    text = text[text.index("ABASEMENT, n.") :]  # after the preface
    matches = (
        re.match(rf"({WORD}), +({PART}\.?[a-z\.]*)\s+(.*)", entry, re.DOTALL)
        for entry in re.split(rf"\n(?={WORD}, +{PART}\b)", text)
    )
    found = [(match[1].strip(), match[2], match[3]) for match in matches if match]
    return [entry for entry in found if entry[0] not in LEFT_OUT and not GROUPS.search(" ".join(entry))]


def tag(word: str, part: str, body: str) -> dict[str, Any]:
    """The words of an entry and their tags."""
    pieces = [(word, "HEADWORD"), (part, "POS")]
    for block in re.split(r"\n\s*\n", body.rstrip()):
        lines = block.split("\n")
        author = lines.pop() if len(lines[-1]) - len(lines[-1].lstrip()) > 20 else None
        verse = bool(lines) and all(line.startswith("    ") for line in lines)
        pieces += [("\n".join(lines), "VERSE" if verse else "")]
        if author is not None:
            pieces.append((author, "AUTHOR"))
    tokens: list[str] = []
    tags: list[str] = []
    last = ""
    for piece, kind in pieces:
        for found in re.findall(r"[a-z0-9']+", piece.lower()):
            tokens.append(found)
            tags.append("O" if not kind else f"{'I' if kind == last else 'B'}-{kind}")
            last = kind
    return {"tokens": tokens, "tags": tags}


def write(name: str, rows: list[dict[str, Any]]) -> None:
    """Write rows as JSONL and say how many."""
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (FOLDER / name).write_text(text, encoding="utf-8")
    print(f"{name}: {len(rows)} rows")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dictionary", help="path of devil.dict.dz")
    with gzip.open(parser.parse_args().dictionary) as file:
        entries = split(file.read().decode("utf-8", "replace"))
    labelled = []
    for _, part, body in entries:
        text = clean(re.split(r"\n\s*\n|\n {4,}", body)[0])
        name = PARTS.get(part.split(".")[0])
        if name and len(text) > 15 and text.endswith((".", "!", "?", '"', ")")):
            labelled.append({"text": text, "label": name})
    write("parts_of_speech.jsonl", labelled)
    tagged = [tag(*entry) for entry in entries]
    write("entries.jsonl", [row for row in tagged if len(row["tokens"]) <= LONGEST])


if __name__ == "__main__":
    main()
