"""Text from outside in Markdown."""

import re
from typing import Any

_SPECIAL = re.compile(r"([\\`*_{}\[\]#|~$])")


def plain(value: Any) -> str:
    """Text from outside on one line, where no character of it is markup."""
    line = "".join(c if c.isprintable() else " " for c in str(value)).encode("utf-8", "replace").decode()
    line = line.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return _SPECIAL.sub(r"\\\1", line)
