"""What docstrings have for Sphinx: roles such as ``:class:`LoRA``` become links or plain code, and ``::`` a colon."""

import re
from typing import Any

_ROLE = re.compile(r":(?:class|func|meth|mod|data):<code>~?([\w.]+)</code>")


def on_page_content(html: str, **kwargs: Any) -> str:
    """Link a role to the entry of that name, or of the only one that ends with it, on the same page."""
    anchors = re.findall(r'id="(lightning_lora\.[\w.]+)"', html)

    def link(role: "re.Match[str]") -> str:
        name = role[1]
        code = f"<code>{name.rpartition('.')[2]}</code>"
        found = [anchor for anchor in dict.fromkeys(anchors) if anchor == name or anchor.endswith(f".{name}")]
        return f'<a href="#{found[0]}">{code}</a>' if len(found) == 1 else code

    return _ROLE.sub(link, html).replace("Example::</p>", "Example:</p>")
