"""The page as a file, and its headers; test_page_in_a_browser.py has the rest."""

import base64
import hashlib
from html.parser import HTMLParser

from smollm3_jax.serve.page import page


class Tags(HTMLParser):
    """What a page's tags say that could fetch or run something: attributes, and the text of scripts and styles."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.attributes: list[tuple[str, str, str]] = []
        self.inline: dict[str, list[str]] = {"script": [], "style": []}
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag in self.inline:
            self.inline[tag].append("")

    def handle_data(self, data: str) -> None:
        if self.cdata_elem in self.inline:
            self.inline[self.cdata_elem][-1] += data


def test_the_policy_names_the_one_script_and_style_and_nothing_is_loaded():
    body, headers = page()
    tags = Tags(body.decode())
    for tag, texts in tags.inline.items():
        (text,) = texts
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}'" in headers["Content-Security-Policy"]
    assert "unsafe" not in headers["Content-Security-Policy"]
    assert headers["Content-Security-Policy"].startswith("default-src 'none'; ")
    # What the policy would block: handlers, styles of single elements, and all that comes from elsewhere.
    assert not [x for x in tags.attributes if x[1].startswith("on") or x[1] in ("style", "src", "action")]
    assert [x[2][:5] for x in tags.attributes if x[1] == "href"] == ["data:"]
