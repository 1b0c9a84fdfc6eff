"""The chat page at `/`, and the headers under which a browser runs its script and nothing else."""

import base64
import functools
import hashlib
import re
from pathlib import Path

FILE = Path(__file__).with_name("page.html")


@functools.cache
def page() -> tuple[bytes, dict[str, str]]:
    """The page and the headers to send with it.

    The page's one script and one style sheet are named by their hashes, it reads from its own server alone, and no
    text can become HTML (`require-trusted-types-for`): an answer that got past its escaping would still not run.
    """
    body = FILE.read_bytes()
    policy = {
        "default-src": "'none'",
        "script-src": _hash(body, "script"),
        "style-src": _hash(body, "style"),
        "connect-src": "'self'",
        "img-src": "data:",  # its icon
        "base-uri": "'none'",
        "form-action": "'none'",
        "frame-ancestors": "'none'",
        "require-trusted-types-for": "'script'",
        "trusted-types": "'none'",
    }
    return body, {
        "Content-Type": "text/html; charset=utf-8",
        "Content-Security-Policy": "; ".join(f"{name} {value}" for name, value in policy.items()),
        "Referrer-Policy": "no-referrer",
        "X-Content-Type-Options": "nosniff",
        "Cache-Control": "no-cache",
    }


def _hash(body: bytes, tag: str) -> str:
    (text,) = re.findall(rf"<{tag}>(.*?)</{tag}>".encode(), body, re.DOTALL)
    return f"'sha256-{base64.b64encode(hashlib.sha256(text).digest()).decode()}'"
