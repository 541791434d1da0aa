"""Which page does `/` show, and what may it load? Nothing but what stands in it, and the service's own routes."""

import base64
import hashlib
import re
from importlib.resources import files

_FILE = "page.html"
_PART = re.compile(r"@([a-z]+\.(?:css|js))@")  # a file in static/ that belongs here


def page() -> tuple[bytes, str]:
    """The page and its Content-Security-Policy, which names the scripts and styles in it by their hashes."""
    folder = files("llmtrain.serve")
    template = (folder / _FILE).read_text(encoding="utf-8")
    text = _PART.sub(lambda part: (folder / "static" / part[1]).read_text(encoding="utf-8"), template)
    policy = (
        f"default-src 'none'; script-src {_hashes(text, 'script')}; style-src {_hashes(text, 'style')}; "
        "img-src 'self' data: blob:; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    return text.encode(), policy


def _hashes(text: str, element: str) -> str:
    blocks = re.findall(rf"<{element}\b[^>]*>(.*?)</{element}>", text, re.DOTALL | re.IGNORECASE)
    digests = (base64.b64encode(hashlib.sha256(block.encode()).digest()).decode() for block in blocks)
    return " ".join(f"'sha256-{digest}'" for digest in digests) or "'none'"
