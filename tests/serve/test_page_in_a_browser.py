"""The page at `/`, in a real browser, against a server whose answers are known.

A headless Chromium is driven by playwright; docs/contributing.md says how to have both.
"""

import asyncio
import contextlib
import json
import shutil
import threading
import time
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest

pytest.importorskip("playwright.sync_api", reason="needs playwright, which `make setup` installs")

import uvicorn
from playwright.sync_api import Browser, Page, expect, sync_playwright
from serving import serving, tiny_engine, tiny_server
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from smollm3_jax.serve.job import parse
from smollm3_jax.serve.page import page as page_and_headers

CHROMIUM = next(filter(None, map(shutil.which, ("chromium-headless-shell", "chromium", "google-chrome"))), None)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: apt-get install chromium-headless-shell"),
]
expect.set_options(timeout=60_000)  # a busy machine's compiler is in some
MARKDOWN = """# Rivers

A **bold** word, an *italic* one, `code`, ~~gone~~ and [a link](https://example.org/a_b(c)).
2 * 3 * 4 is 24, snake_case_word stays, and so does a lone ** here.

1. first
   - below `it`
   - and *more*
2. second

| name | length |
|:-----|------:|
| Elbe | 1094 |
| a \\| b | **2** |

> quoted
> twice

```python
print("<b>no tag</b>")
```

---
"""
HOSTILE = """<script>window.hit = 1</script><img src=x onerror="window.hit = 1">
[click](javascript:window.hit=1) [data](data:text/html,x) [ok](https://example.org) ![picture](https://example.org/p.png)

```html"><img src=x onerror=window.hit=1>
</code></pre><script>window.hit = 1</script>
```
"""


def chunk(finish: str | None = None, **delta: Any) -> dict[str, Any]:
    return {"choices": [{"index": 0, "delta": delta, "finish_reason": finish}]}


def usage(tokens: int) -> dict[str, Any]:
    return {"choices": [], "usage": {"prompt_tokens": 5, "completion_tokens": tokens, "total_tokens": 5 + tokens}}


def call(name: str, arguments: str, number: int = 0) -> dict[str, Any]:
    function = {"name": name, "arguments": arguments}
    return {"index": number, "id": f"call_{number}", "type": "function", "function": function}


# The last message -> the events of its answer, where a number is a pause in seconds; or what a 400 says.
SCRIPT: dict[str, Any] = {
    "busy": "The queue is full.",
    "too long": "The maximum context length is 8 tokens.",
    "think": [
        chunk(role="assistant", content=""),
        *(chunk(reasoning_content=x, reasoning=x) for x in ("One plus", " one…", "\nis two.")),
        0.3,
        chunk(content="It is "),
        chunk(content="**two**."),
        chunk("stop"),
        usage(9),
        "[DONE]",
    ],
    "markdown": [*(chunk(content=MARKDOWN[i : i + 7]) for i in range(0, len(MARKDOWN), 7)), chunk("stop"), "[DONE]"],
    "hostile": [
        chunk(reasoning_content="<img src=x onerror=window.hit=1>"),
        chunk(content=HOSTILE),
        chunk("stop"),
        "[DONE]",
    ],
    "weather": [
        chunk(tool_calls=[call("weather", '{"city": ')]),
        chunk(tool_calls=[{"index": 0, "function": {"arguments": '"Bern"}'}}]),
        chunk(tool_calls=[call("clock", "{}", 1)]),
        chunk("tool_calls"),
        usage(20),
        "[DONE]",
    ],
    "12 degrees": [chunk(content="It is cold."), chunk("stop"), "[DONE]"],
    "noon": [chunk(content="It is cold at noon."), chunk("stop"), "[DONE]"],
    "break": [chunk(content="Half an ans"), {"error": {"message": "The engine has failed.", "type": "server_error"}}],
    "cut": [chunk(content="Half an ans")],
    "no end": [chunk(content="Half an ans"), chunk("error"), "[DONE]"],
    "long": [*(x for i in range(600) for x in (chunk(content=f"word{i} "), 0.05)), chunk("stop"), "[DONE]"],
}


class StandIn:
    """A server that answers by SCRIPT; `asked` are the bodies that it got."""

    def __init__(self) -> None:
        self.asked: list[dict[str, Any]] = []
        self.key: str | None = None
        self.cut = threading.Event()
        routes = [
            Route("/", self.page),
            Route("/v1/models", self.models),
            Route("/v1/chat/completions", self.chat, methods=["POST"]),
        ]
        self.server = uvicorn.Server(uvicorn.Config(Starlette(routes=routes), port=0, log_level="error", ws="none"))
        self.thread = threading.Thread(target=self.server.run)

    async def page(self, _: Request) -> Response:
        body, headers = page_and_headers()
        return Response(body, headers=headers)

    def refused(self, request: Request) -> Response | None:
        if self.key in (None, request.headers.get("Authorization", "").removeprefix("Bearer ")):
            return None
        return JSONResponse({"error": {"message": "An API key is wanted.", "type": "auth", "code": None}}, 401)

    async def models(self, request: Request) -> Response:
        return self.refused(request) or JSONResponse({"object": "list", "data": [{"id": "tiny", "object": "model"}]})

    async def chat(self, request: Request) -> Response:
        if refused := self.refused(request):
            return refused
        body = await request.json()
        self.asked.append(body)
        text = body["messages"][-1]["content"]
        events = SCRIPT.get(text, [chunk(content=f"You said: {text}"), chunk("stop"), usage(4), "[DONE]"])
        if isinstance(events, str):
            busy = {"Retry-After": "2"} if text == "busy" else {}
            return JSONResponse({"error": {"message": events}}, 429 if busy else 400, busy)
        return StreamingResponse(self.frames(events), media_type="text/event-stream")

    async def frames(self, events: list[Any]) -> AsyncIterator[bytes]:
        yield b": keepalive\n\n"
        try:
            for event in events:
                if isinstance(event, float):
                    await asyncio.sleep(event)
                else:
                    yield f"data: {event if isinstance(event, str) else json.dumps(event)}\r\n\r\n".encode()
        except asyncio.CancelledError:
            self.cut.set()
            raise

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server.servers[0].sockets[0].getsockname()[1]}/"


@contextlib.contextmanager
def stand_in() -> Iterator[StandIn]:
    server = StandIn()
    server.thread.start()
    while not server.server.started:
        time.sleep(0.01)
    try:
        yield server
    finally:
        server.server.should_exit = True
        server.thread.join()


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    options: dict[str, Any] = {"executable_path": CHROMIUM, "args": ["--no-sandbox"]}
    with sync_playwright() as playwright, contextlib.closing(playwright.chromium.launch(**options)) as it:
        yield it


@pytest.fixture
def server() -> Iterator[StandIn]:
    with stand_in() as it:
        yield it


@pytest.fixture
def page(browser: Browser, server: StandIn) -> Iterator[Page]:
    with opened(browser, server.url) as it:
        yield it


@contextlib.contextmanager
def opened(browser: Browser, address: str) -> Iterator[Page]:
    """The page, which then must not have asked anyone else, nor have thrown anything."""
    context = browser.new_context(color_scheme="light", permissions=["clipboard-read", "clipboard-write"])
    it = context.new_page()
    thrown: list[str] = []
    asked: list[str] = []
    it.on("pageerror", lambda error: thrown.append(str(error)))
    it.on("request", lambda request: asked.append(request.url))
    it.goto(address)
    yield it
    context.close()
    assert not thrown
    assert not [url for url in asked if not url.startswith((address, "data:", "blob:"))]


def say(page: Page, text: str, wait: bool = True) -> None:
    page.locator("#prompt").fill(text)
    page.locator("#prompt").press("Enter")
    if wait:
        expect(page.locator("body.running")).to_have_count(0)


def last(page: Page, what: str = "") -> Any:
    return page.locator(f"article:last-child {what}")


def test_thinking_is_shown_as_it_comes_and_then_folded(page, server):
    say(page, "think", wait=False)
    expect(last(page, "details[open] > div")).to_have_text("One plus one…\nis two.", use_inner_text=True)
    expect(last(page, ".answer strong")).to_have_text("two")
    expect(last(page, "details")).not_to_have_attribute("open", "")
    expect(last(page, "summary")).to_contain_text("Thought for")
    expect(last(page, ".stats")).to_contain_text("9 tokens · ")
    expect(last(page, ".stats")).to_contain_text(" tokens/s · first after ")
    expect(page.locator("#status")).to_have_text("Answered: It is **two**.")
    last(page, "summary").press("Enter")
    expect(last(page, "details > div")).to_be_visible()
    # The next question takes the answer along, and not the thinking.
    say(page, "more")
    assert server.asked[1]["messages"] == [
        {"role": "user", "content": "think"},
        {"role": "assistant", "content": "It is **two**."},
        {"role": "user", "content": "more"},
    ]


def test_markdown(page):
    say(page, "markdown")
    answer = last(page, ".answer")
    expect(answer.locator("h3")).to_have_text("Rivers")
    for tag, text in {"strong": "bold", "em": "italic", "code": "code", "del": "gone", "a": "a link"}.items():
        expect(answer.locator(f"p {tag}").first).to_have_text(text)
    expect(answer.locator("p a")).to_have_attribute("href", "https://example.org/a_b(c)")
    expect(answer.locator("> p").first).to_contain_text("2 * 3 * 4 is 24, snake_case_word stays, and so does a lone **")
    expect(answer.locator("> ol > li > ul > li")).to_have_text(["below it", "and more"])
    expect(answer.locator("> ol > li")).to_have_count(2)
    expect(answer.locator("th")).to_have_text(["name", "length"])
    expect(answer.locator("td")).to_have_text(["Elbe", "1094", "a | b", "2"])
    expect(answer.locator("td.right")).to_have_count(2)
    expect(answer.locator("blockquote")).to_have_text("quoted\ntwice", use_inner_text=True)
    expect(answer.locator("hr")).to_have_count(1)
    expect(answer.locator(".code span")).to_have_text("python")
    answer.get_by_role("button", name="Copy").click()
    assert page.evaluate("navigator.clipboard.readText()") == 'print("<b>no tag</b>")'
    last(page, ".actions").get_by_role("button", name="Copy").click()
    assert page.evaluate("navigator.clipboard.readText()") == MARKDOWN


def test_nothing_of_an_answer_is_html(page):
    say(page, "hostile")
    answer = last(page, ".answer")
    expect(answer).to_contain_text('<script>window.hit = 1</script><img src=x onerror="window.hit = 1">')
    expect(answer).to_contain_text("[click](javascript:window.hit=1) [data](data:text/html,x)")
    expect(answer.locator("pre")).to_contain_text("</code></pre><script>window.hit = 1</script>")
    assert answer.locator("a").evaluate_all("all => all.map(x => x.href)") == [
        "https://example.org/",
        "https://example.org/p.png",
    ]
    expect(page.locator("article :is(script, img, iframe)")).to_have_count(0)
    page.locator("details").evaluate("x => x.open = true")
    assert page.evaluate("window.hit === undefined")
    # The page's own script could not make HTML of it either, nor could an inline script run.
    blocked = "(() => { try { document.body.innerHTML = '<p>'; } catch (error) { return error.name; } })()"
    assert page.evaluate(blocked) == "TypeError"


@pytest.mark.parametrize(
    "text",
    [
        "a **b " * 4000,
        "_a " * 6000,
        "[" * 20000,
        "[a](" * 5000,
        "".join("`" * (i % 300 + 1) + "a" for i in range(2000)),
        "*" + "a**b**" * 5000,
        ">" * 20000,
        "\n".join("  " * i + "- x" for i in range(300)),
        "|" + "-" * 20000 + "|x\n|" + "-" * 20000 + " x",
        "* " * 10000 + "x",
    ],
    ids=range(10),
)
def test_no_text_takes_long(page, text):
    """Each took less than a third of a second; a rule that backtracks takes minutes."""
    taken = "text => { const start = performance.now(); render(document.createElement('div'), text);"
    assert page.evaluate(taken + " return performance.now() - start; }", text) < 10_000


def test_tool_calls_and_what_they_return(page, server):
    page.get_by_role("button", name="Settings").click()
    tools = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}]
    page.get_by_label("Tools").fill("[{")
    page.get_by_label("Tools").fill(json.dumps(tools))
    page.get_by_role("button", name="Done").click()
    say(page, "weather")
    assert server.asked[0]["tools"] == tools
    expect(page.locator(".call span")).to_have_text(["Calls weather", "Calls clock"])
    expect(page.locator(".call pre").first).to_have_text('{\n  "city": "Bern"\n}', use_inner_text=True)
    page.get_by_label("What weather returns").fill("12 degrees")
    page.keyboard.press("Enter")
    page.get_by_label("What clock returns").fill("noon")
    page.keyboard.press("Enter")
    expect(last(page, ".answer")).to_have_text("It is cold at noon.")
    _, asks, first, second = server.asked[1]["messages"]
    assert [x["function"] for x in asks["tool_calls"]] == [
        {"name": "weather", "arguments": '{"city": "Bern"}'},
        {"name": "clock", "arguments": "{}"},
    ]
    assert first == {"role": "tool", "content": "12 degrees", "tool_call_id": "call_0"}
    assert second["tool_call_id"] == "call_1" and len(server.asked) == 2


@pytest.mark.parametrize(
    ("text", "answer", "error"),
    [
        ("break", "Half an ans", "The engine has failed."),
        ("cut", "Half an ans", "The connection ended before the answer did."),
        ("no end", "Half an ans", "The server could not go on with this answer."),
        ("too long", "", "The maximum context length is 8 tokens."),
        ("busy", "", "The queue is full. Try again after 2 s."),
    ],
)
def test_errors_stand_below_what_had_come(page, monkeypatch, text, answer, error):
    say(page, text)
    expect(last(page, ".answer")).to_have_text(answer)
    expect(last(page, ".error")).to_have_text(error)
    expect(page.locator("#status")).to_have_text(error)
    monkeypatch.setitem(SCRIPT, text, [chunk(content="Now whole."), chunk("stop"), "[DONE]"])
    last(page).get_by_role("button", name="Regenerate").click()
    expect(last(page, ".answer")).to_have_text("Now whole.")
    expect(page.locator(".error:visible")).to_have_count(0)


def test_a_key_is_asked_for_and_forgotten_with_the_tab(page, server):
    server.key = "secret"
    page.reload()
    expect(page.get_by_role("alert")).to_have_text("An API key is wanted.")
    expect(page.get_by_label("API key")).to_be_focused()
    page.get_by_label("API key").fill("secret")
    page.keyboard.press("Enter")
    expect(page.locator("#name")).to_have_text("tiny")
    expect(page.get_by_role("alert")).to_be_hidden()
    say(page, "hello")
    expect(last(page, ".answer")).to_have_text("You said: hello")
    assert "secret" not in page.evaluate("JSON.stringify(localStorage)")


def test_escape_stops_and_regenerate_begins_again(page, server):
    say(page, "long", wait=False)
    expect(last(page, ".answer")).to_contain_text("word3 ")
    expect(page.get_by_role("button", name="Stop")).to_be_visible()
    page.keyboard.press("Escape")
    expect(last(page, ".stats")).to_contain_text("stopped")
    assert server.cut.wait(5)
    expect(page.get_by_role("button", name="Send")).to_be_visible()
    last(page).get_by_role("button", name="Regenerate").click()
    expect(last(page, ".answer")).to_contain_text("word1 ")
    page.get_by_role("button", name="Stop").click()
    expect(last(page, ".stats")).to_contain_text("stopped")
    assert [x["messages"] for x in server.asked] == [[{"role": "user", "content": "long"}]] * 2


def test_an_edited_message_drops_what_came_after(page, server):
    say(page, "first")
    say(page, "second")
    page.locator("article.user").first.hover()
    page.get_by_role("button", name="Edit").first.click()
    page.keyboard.press("Escape")
    expect(page.locator("article")).to_have_count(4)
    page.locator("article.user").first.hover()
    page.get_by_role("button", name="Edit").first.click()
    expect(page.get_by_label("Edit the message")).to_have_value("first")
    page.get_by_label("Edit the message").fill("other")
    page.keyboard.press("Enter")
    expect(page.locator("article")).to_have_count(2)
    expect(last(page, ".answer")).to_have_text("You said: other")
    assert server.asked[-1]["messages"] == [{"role": "user", "content": "other"}]
    expect(page.locator("#title")).to_have_text("other")


def test_settings_are_sent_and_kept(page, server):
    say(page, "plain")
    plain = {"model": "tiny", "stream": True, "stream_options": {"include_usage": True}}
    plain["chat_template_kwargs"] = {"enable_thinking": True}
    assert server.asked[0] == plain | {"messages": [{"role": "user", "content": "plain"}]}
    page.get_by_role("button", name="Settings").click()
    values = {"Temperature": "0.5", "Top p": "0.9", "Max tokens": "64", "Seed": "7"}
    for label, value in values.items():
        page.get_by_label(label).fill(value)
    page.get_by_label("System prompt").fill("Be brief.")
    page.keyboard.press("Escape")
    page.get_by_role("button", name="Thinking").click()
    page.reload()
    say(page, "set")
    asked = server.asked[1]
    chosen = {name: asked[name] for name in ("temperature", "top_p", "max_tokens", "seed")}
    assert chosen == {"temperature": 0.5, "top_p": 0.9, "max_tokens": 64, "seed": 7}
    assert asked["chat_template_kwargs"] == {"enable_thinking": False}
    assert asked["messages"][0] == {"role": "system", "content": "Be brief."}


def test_conversations_are_kept_and_exported(page):
    say(page, "think")
    page.get_by_role("button", name="New chat").click()
    say(page, "hello *you*\nthere")
    page.reload()
    expect(page.locator("#list .open")).to_have_text(["hello *you*", "think"])
    expect(last(page, ".answer")).to_have_text("You said: hello you\nthere", use_inner_text=True)
    page.locator("#list .open", has_text="think").click()
    with page.expect_download() as download:
        page.get_by_role("button", name="JSON").click()
    exported = json.loads(download.value.path().read_text())
    assert [x["content"] for x in exported["messages"]] == ["think", "It is **two**."]
    assert exported["messages"][1]["reasoning"] == "One plus one…\nis two."
    with page.expect_download() as download:
        page.get_by_role("button", name="Markdown").click()
    assert download.value.suggested_filename == "think.md"
    assert download.value.path().read_text() == (
        "# think\n\n## You\n\nthink\n\n## Answer\n\n> One plus one…\n> is two.\n\nIt is **two**.\n"
    )
    page.on("dialog", lambda dialog: dialog.accept())
    page.get_by_role("button", name="Delete think").click()
    page.reload()
    expect(page.locator("#list .open")).to_have_text(["hello *you*"])


def test_another_conversation_can_be_read_while_an_answer_comes(page):
    say(page, "hello")
    page.get_by_role("button", name="New chat").click()
    say(page, "think", wait=False)
    page.locator("#list .open", has_text="hello").click()
    expect(page.locator("body.running")).to_have_count(0)
    expect(last(page, ".answer")).to_have_text("You said: hello")
    page.locator("#list .open", has_text="think").click()
    expect(last(page, ".answer")).to_have_text("It is two.")


def test_a_narrow_screen_by_keyboard(page):
    page.set_viewport_size({"width": 390, "height": 700})
    say(page, "markdown")
    say(page, "x" * 500)
    page.keyboard.type("one")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("two")
    expect(page.locator("#prompt")).to_have_value("one\ntwo")
    assert page.evaluate("document.documentElement.scrollWidth") == 390
    assert page.locator("article").evaluate_all("all => all.every(x => x.getBoundingClientRect().right <= 390)")
    expect(page.locator("#new")).to_be_hidden()
    page.get_by_role("button", name="Conversations").press("Enter")
    expect(page.locator("#new")).to_be_focused()
    page.keyboard.press("Escape")
    expect(page.locator("#new")).to_be_hidden()
    expect(page.get_by_role("button", name="Conversations")).to_be_focused()


def test_dark_and_light(page):
    ground = "getComputedStyle(document.body).backgroundColor"
    light = page.evaluate(ground)
    page.emulate_media(color_scheme="dark")
    dark = page.evaluate(ground)
    assert light != dark
    toggle = page.get_by_role("button", name="Switch between dark and light")
    toggle.click()
    assert page.evaluate(ground) == light
    page.reload()
    assert page.evaluate(ground) == light
    toggle.click()
    assert page.evaluate(ground) == dark


def test_against_the_server_itself(browser):
    tiny = serving(tiny_engine, parse, server=tiny_server(), keys=["secret"])
    with tiny as running, opened(browser, f"http://127.0.0.1:{running.port}/") as page:
        page.get_by_label("API key").fill("secret")
        for label, value in {"Max tokens": "12", "Seed": "7", "Temperature": "1"}.items():
            page.get_by_label(label).fill(value)
        page.keyboard.press("Enter")
        expect(page.locator("#name")).to_have_text("tiny")
        say(page, "w5 w6 w7")
        expect(last(page, ".stats")).to_contain_text("12 tokens · ")
        expect(last(page, ".stats")).to_contain_text("cut off at the limit of tokens")
        asked = {"messages": [{"role": "user", "content": "w5 w6 w7"}], "max_tokens": 12, "seed": 7, "temperature": 1.0}
        asked["chat_template_kwargs"] = {"enable_thinking": True}
        status, body, _ = running.ask("POST", "/v1/chat/completions", asked, Authorization="Bearer secret")
        said = page.evaluate("chat.messages[1]")
        assert status == 200 and said["content"] == body["choices"][0]["message"]["content"]
        assert said["usage"] == body["usage"]
        # Stopped, it leaves nothing on the server; what the server refuses is shown.
        page.get_by_role("button", name="Settings").click()
        page.get_by_label("Max tokens").fill("400")
        page.keyboard.press("Enter")
        say(page, "w8", wait=False)
        expect(last(page, ".answer")).to_contain_text("w")
        page.keyboard.press("Escape")
        expect(last(page, ".stats")).to_contain_text("stopped")
        running.until(running.is_at_rest)
        page.get_by_role("button", name="New chat").click()
        say(page, "w5 " * 600)
        expect(last(page, ".error")).to_contain_text("maximum context length")
