"""The page in a real browser: what is written, sent, stopped and shown, whatever a model or a server says."""

import re
from typing import Any

import pytest
from page_browser import Open
from scripted import PAGE, Refuse, Say, Script, inside

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
expect = playwright.expect
expect.set_options(timeout=60_000)

HELLO = [Say((("Hello, ", False), ("wor", True), ("ld", False)), inside=inside())]
SLOW = [Say(((f"word{i} ", i % 2 == 1),), inside=inside(i + 1), wait=0.05) for i in range(200)]


def ask(page: Any, text: str) -> None:
    page.fill("#message", text)
    page.press("#message", "Enter")


def answered(page: Any, turns: int = 1) -> Any:
    """The text of the newest answer, once `turns` are complete."""
    expect(page.locator(".assistant[aria-busy]")).to_have_count(0)
    expect(page.locator(".assistant .foot")).to_have_count(turns)
    return page.locator(".assistant .answer").last


def painted(page: Any, canvas: str) -> list[tuple[int, ...]]:
    """The distinct colors on a canvas."""
    script = """(canvas) => { const {data} = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
                const seen = new Set();
                for (let i = 0; i < data.length; i += 4) seen.add(data.slice(i, i + 4).join());
                return [...seen]; }"""
    return [tuple(map(int, color.split(","))) for color in page.locator(canvas).evaluate(script)]


def test_text_is_shown_as_it_comes(open_page: Open, script: Script) -> None:
    script.answers = [SLOW]
    page = open_page()
    ask(page, "count")
    answer = page.locator(".assistant .answer")
    expect(answer).to_contain_text("word3")
    assert page.locator(".assistant").get_attribute("aria-busy") == "true"
    assert "word199" not in answer.inner_text()
    expect(page.locator("#stop")).to_be_visible()
    expect(page.locator("#send")).to_be_hidden()


def test_what_is_asked_of_the_server(open_page: Open, script: Script) -> None:
    script.answers = [HELLO]
    page = open_page()
    expect(page.locator("#model")).to_have_text("scripted")
    page.click("#settings summary")
    chosen = {"temperature": "0.5", "top_p": "0.9", "top_k": "40", "min_p": "0.05", "max_tokens": "77", "seed": "12"}
    for name, value in chosen.items():
        page.fill(f"#{name}", value)
    page.select_option("#speculation", "false")
    page.fill("#system", "Be brief.")
    page.fill("#key", "sesame")
    script.key = "sesame"
    ask(page, "hello?")
    assert answered(page).inner_text() == "Hello, world"
    path, body = script.requests[0]
    assert path == "/v1/chat/completions"
    assert body == {
        "model": "scripted",
        "stream": True,
        "stream_options": {"include_usage": True},
        "inspect": True,
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 40,
        "min_p": 0.05,
        "max_tokens": 77,
        "seed": 12,
        "speculate": False,
        "messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hello?"}],
    }


def test_an_empty_setting_is_left_to_the_server(open_page: Open, script: Script) -> None:
    script.answers = [HELLO]
    page = open_page()
    expect(page.locator("#max_tokens")).to_have_value("512")
    page.click("#settings summary")
    for name in ("temperature", "top_p", "max_tokens"):
        page.fill(f"#{name}", "")
    ask(page, "hello?")
    answered(page)
    assert set(script.requests[0][1]) == {"model", "stream", "stream_options", "inspect", "messages"}


def test_settings_outlive_a_reload_and_the_key_stays_in_the_tab(open_page: Open, script: Script) -> None:
    script.answers = [HELLO]
    page = open_page()
    page.click("#settings summary")
    page.fill("#top_k", "7")
    page.fill("#key", "sesame")
    page.reload()
    expect(page.locator("#top_k")).to_have_value("7")
    expect(page.locator("#key")).to_have_value("sesame")
    assert "sesame" not in str(page.evaluate("() => Object.values(localStorage)"))


@pytest.mark.parametrize(("name", "value"), [("top_p", "1.5"), ("top_k", "-1"), ("max_tokens", "0"), ("seed", "1e300")])
def test_a_setting_that_cannot_be_is_named_and_nothing_is_sent(
    open_page: Open, script: Script, name: str, value: str
) -> None:
    script.answers = [HELLO]
    page = open_page()
    page.click("#settings summary")
    page.fill(f"#{name}", value)
    ask(page, "hello?")
    expect(page.locator("[role=alert]")).to_contain_text(name)
    assert script.requests == []


def test_the_conversation_goes_along_without_thoughts(open_page: Open, script: Script) -> None:
    thought = Say((("I wonder ", False), ("why", True)), thought=True)
    script.answers = [[thought, *HELLO], HELLO]
    page = open_page()
    ask(page, "one")
    answered(page)
    ask(page, "two")
    answered(page, 2)
    assert script.requests[1][1]["messages"] == [
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "Hello, world"},
        {"role": "user", "content": "two"},
    ]


def test_reasoning_stands_apart(open_page: Open, script: Script) -> None:
    script.answers = [[Say((("I wonder ", False), ("why", True)), thought=True), *HELLO]]
    page = open_page()
    ask(page, "hello?")
    assert answered(page).inner_text() == "Hello, world"
    thought = page.locator(".thought")
    expect(thought.locator(".drafted")).to_have_text("why")
    assert thought.get_attribute("open") is None  # folded, now that there is an answer
    thought.locator("summary").click()
    expect(thought.locator(".prose")).to_have_text("I wonder why")


def test_escape_stops_and_keeps_what_there_is(open_page: Open, script: Script) -> None:
    script.answers = [SLOW, HELLO]
    page = open_page()
    ask(page, "count")
    expect(page.locator(".answer")).to_contain_text("word2")
    page.keyboard.press("Escape")
    text = answered(page).inner_text()
    assert text.startswith("word0 word1 word2") and "word199" not in text
    expect(page.locator(".assistant .foot")).to_contain_text("stopped")
    for _ in range(100):
        if script.hung_up:
            break
        page.wait_for_timeout(20)
    assert script.hung_up == 1  # the server is told by the closed connection
    ask(page, "and now?")
    answered(page, 2)
    assert script.requests[1][1]["messages"][1]["content"].strip() == text.strip()


def test_the_stop_button_stops(open_page: Open, script: Script) -> None:
    script.answers = [SLOW]
    page = open_page()
    ask(page, "count")
    page.click("#stop")
    answered(page)
    expect(page.locator("#message")).to_be_focused()


def test_regenerate_writes_the_last_answer_anew(open_page: Open, script: Script) -> None:
    script.answers = [HELLO, [Say((("Good day", False),))]]
    page = open_page()
    ask(page, "hello?")
    answered(page)
    page.click(".again")
    expect(page.locator(".assistant .answer")).to_have_text("Good day")
    assert script.requests[0] == script.requests[1]
    expect(page.locator(".turn")).to_have_count(2)


def test_the_last_message_can_be_edited(open_page: Open, script: Script) -> None:
    script.answers = [HELLO]
    page = open_page()
    ask(page, "one")
    answered(page)
    ask(page, "two")
    answered(page, 2)
    page.press("#message", "ArrowUp")
    expect(page.locator("#message")).to_have_value("two")
    page.keyboard.press("Escape")  # as it was
    expect(page.locator("#message")).to_have_value("")
    expect(page.locator(".turn")).to_have_count(4)
    page.locator(".edit").last.click()
    ask(page, "three")
    answered(page, 2)
    expect(page.locator(".turn")).to_have_count(4)
    assert [message["content"] for message in script.requests[2][1]["messages"]] == ["one", "Hello, world", "three"]


def test_a_new_conversation_forgets_the_old(open_page: Open, script: Script) -> None:
    script.answers = [SLOW, HELLO]
    page = open_page()
    ask(page, "count")
    expect(page.locator(".answer")).to_contain_text("word1")
    page.click("#new")
    expect(page.locator(".turn")).to_have_count(0)
    expect(page.locator("#start")).to_be_visible()
    ask(page, "hello?")
    answered(page)
    assert script.requests[1][1]["messages"] == [{"role": "user", "content": "hello?"}]


def test_accepted_drafts_are_marked_and_can_be_unmarked(open_page: Open, script: Script) -> None:
    says = [
        Say((("a", False), ("b", True)), inside=inside(1)),
        Say((("c", True), ("d", False), ("e", True)), inside=inside(2, drafted=8, accepted=6)),
    ]
    script.answers = [says]
    page = open_page()
    ask(page, "go")
    assert answered(page).inner_text() == "abcde"
    marked = page.locator(".answer .drafted")
    assert marked.all_inner_texts() == ["bc", "e"]
    expect(page.locator("#acceptance")).to_have_text("75 %")
    expect(page.locator("#drafts")).to_contain_text("6 of 8 drafted tokens")

    def shadow() -> str:
        return str(marked.first.evaluate("(element) => getComputedStyle(element).boxShadow"))

    assert shadow() != "none"
    page.uncheck("#marks")
    assert shadow() == "none"


def test_spans_that_do_not_match_the_text_mark_nothing(open_page: Open, script: Script) -> None:
    page = open_page()
    result = page.evaluate("() => [cut('', 'abc', [['xyz', true]]), cut('t', 'abc', [['<t', false], ['abc>', true]])]")
    assert result[0] == {"thought": [], "text": [["abc", False]]}
    assert result[1] == {"thought": [["t", False]], "text": [["abc", True]]}


def test_the_heat_map_is_drawn_and_read_out(open_page: Open, script: Script) -> None:
    script.stats["expert_load"] = []
    script.answers = [[Say((("x", False),), inside=inside(1))], [Say((("x", False),), inside=inside(3))]]
    page = open_page()
    expect(page.locator("#heat")).to_be_hidden()
    ask(page, "go")
    answered(page)
    expect(page.locator("#heat-of")).to_have_text("this answer")
    assert len(painted(page, "#heat")) >= 8  # loads from 0 to 10
    box = page.locator("#heat").bounding_box()
    page.hover("#heat", position={"x": box["width"] * 5.5 / 16, "y": box["height"] * 2.5 / 4})
    load = inside(1)["expert_load"][2]
    mean = load[5] / (sum(load) / 16)
    expect(page.locator("#readout")).to_have_text(
        re.compile(f"layer with experts 3, expert 5: {load[5]} tokens?, {mean:.3g}")
    )
    page.mouse.move(5, 5)
    page.focus("#heat")
    page.keyboard.press("ArrowRight")  # onto the first cell
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowDown")
    expect(page.locator("#readout")).to_contain_text(
        f"layer with experts 2, expert 1: {inside(1)['expert_load'][1][1]} tokens"
    )


def test_the_cache_is_shown_against_mha(open_page: Open, script: Script) -> None:
    script.answers = [[Say((("x", False),), inside=inside(latent_bytes=4096, mha_bytes=20480, pages=1))]]
    page = open_page()
    expect(page.locator("#ratio")).to_have_text("10×")  # a token, before there is an answer
    ask(page, "go")
    answered(page)
    # Of the tokens, not of the page that has room for more.
    expect(page.locator("#ratio")).to_have_text("10×")
    expect(page.locator("#latent-bytes")).to_have_text("2 KiB")
    expect(page.locator("#full-bytes")).to_have_text("20 KiB")
    expect(page.locator("#cache-note")).to_contain_text("in 1 page of together 4 KiB, 1 of them shared")

    def share() -> float:
        latent, full = (page.locator(f"#{bar}-bar").bounding_box()["width"] for bar in ("latent", "full"))
        return float(latent / full)

    assert share() == pytest.approx(1 / 10, abs=0.005)
    page.click("#log-scale")
    expect(page.locator("#log-scale")).to_have_attribute("aria-pressed", "true")
    page.wait_for_timeout(100)
    assert share() == pytest.approx(1 / 2, abs=0.01)  # a decade of two


def test_the_pool_is_shown(open_page: Open, script: Script) -> None:
    page = open_page()
    for name, number in (("used", "56"), ("kept", "40"), ("free", "160")):
        expect(page.locator(f"#{name}")).to_have_text(number)
    expect(page.locator("#hits")).to_contain_text("25 % of 1,000 prompt tokens")
    expect(page.locator("#queue")).to_have_text("1 running, 2 waiting")
    assert len(painted(page, "#strip")) > 2
    script.stats["pages_free"] = 100
    expect(page.locator("#used")).to_have_text("156")  # it looks again


def test_fences_become_blocks_and_nothing_else_is_markup(open_page: Open, script: Script) -> None:
    text = "See:\n\n```py\nif x:\n    pass  # `a`\n```\nand `inline`, ```not a fence```\n  ``x\n"
    script.answers = [[Say(tuple((character, i % 3 == 0) for i, character in enumerate(text)))]]
    page = open_page()
    ask(page, "go")
    answered(page)
    assert page.locator(".code span").first.inner_text() == "py"
    assert page.locator(".code code").text_content() == "if x:\n    pass  # `a`\n"
    assert page.locator(".answer > .prose").all_text_contents() == [
        "See:",
        "and `inline`, ```not a fence```\n  ``x\n",
    ]


@pytest.mark.parametrize("end", ["```", "```\n", "", "  ", "``"])
def test_a_fence_that_ends_with_the_text_is_complete(open_page: Open, script: Script, end: str) -> None:
    script.answers = [[Say((("```\nx = 1\n" + end, False),))]]
    page = open_page()
    ask(page, "go")
    answered(page)
    closed = end.strip() == "```"
    assert page.locator(".code code").text_content() == "x = 1\n" + ("" if closed else end)


HOSTILE = [
    "<img src=x onerror=\"document.title='owned'\">",
    "<script>document.title='owned'</script>",
    "```<svg onload=document.title='owned'>\n<b>bold</b>\n```\n",
    "[x](javascript:document.title='owned') &lt;i&gt; </div></main><h1>owned</h1>",
]


@pytest.mark.parametrize("text", HOSTILE)
def test_what_a_model_or_a_user_writes_is_text(open_page: Open, script: Script, text: str) -> None:
    script.answers = [[Say(((text, True),), thought=True), Say(((text, False), (text, True)))]]
    page = open_page()
    ask(page, text)
    answered(page)
    assert page.locator(".user .prose").text_content() == text
    page.wait_for_timeout(100)
    assert page.title() == "abyssal"
    turns = page.locator("#turns")
    assert turns.locator("img, script, svg, b, i, h1, a").count() == 0
    if not text.startswith("`"):
        assert turns.locator(".answer").text_content() == text * 2


def test_the_page_never_parses_strings_as_markup_or_code() -> None:
    source = PAGE.read_text("utf-8")
    for word in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(", "Function(", "DOMParser"):
        assert word not in source
    assert not re.search(r"<[a-z][^>]*\s(style|on[a-z]+)=", source)  # a policy of hashes alone refuses them
    assert not re.search(r"(src|href)=\"(?!#|data:)|url\(|@import|https?://", source)  # nothing from outside
    assert len(re.findall("<script>", source)) == len(re.findall("<style>", source)) == 1


@pytest.mark.parametrize(
    ("refusal", "said"),
    [
        (Refuse(400, "top_p must be above 0.", None), "The server answered 400. top_p must be above 0."),
        (Refuse(429, "The queue is full.", "7"), "Try again in 7 s."),
        (Refuse(503, "It has died."), "The engine is not running. It has died."),
    ],
)
def test_a_refusal_is_shown_and_can_be_tried_again(open_page: Open, script: Script, refusal: Refuse, said: str) -> None:
    script.answers = [refusal, HELLO]
    page = open_page()
    ask(page, "hello?")
    expect(page.locator("[role=alert]")).to_contain_text(said)
    expect(page.locator("#send")).to_be_visible()
    page.click(".wrong button")
    assert answered(page).inner_text() == "Hello, world"
    expect(page.locator("[role=alert]")).to_have_count(0)
    assert len(script.requests) == 2


def test_a_key_is_asked_for_and_then_sent(open_page: Open, script: Script) -> None:
    script.key, script.answers = "sesame", [HELLO]
    page = open_page()
    dialog = page.locator("#ask")
    expect(dialog).to_be_visible()
    expect(page.locator("#state")).to_have_text("the server asks for an api key")
    page.keyboard.press("Escape")
    expect(dialog).to_be_hidden()
    ask(page, "hello?")
    expect(page.locator("[role=alert]")).to_contain_text("The server asks for an API key.")
    expect(dialog).to_be_visible()
    page.fill("#ask-key", "sesame")
    page.keyboard.press("Enter")
    assert answered(page).inner_text() == "Hello, world"
    expect(page.locator("#state")).to_have_text("ready")
    assert page.evaluate("() => sessionStorage.getItem('abyssal.key')") == "sesame"


def test_an_answer_that_breaks_off_says_so(open_page: Open, script: Script) -> None:
    script.answers, script.breaks_off = [HELLO], True
    page = open_page()
    ask(page, "hello?")
    expect(page.locator("[role=alert]")).to_contain_text("The connection ended before the answer did.")
    assert page.locator(".answer").inner_text() == "Hello, world"


def test_an_error_in_the_middle_is_told(open_page: Open, script: Script) -> None:
    script.answers, script.error = [HELLO], "the engine has ended"
    page = open_page()
    ask(page, "hello?")
    expect(page.locator("[role=alert]")).to_contain_text("The answer broke off: the engine has ended.")
    assert page.locator(".answer").inner_text() == "Hello, world"


def test_a_model_without_a_template_goes_on_with_the_text(open_page: Open, script: Script) -> None:
    script.chat, script.answers = False, [[Say((("(n):\n", True), ("    return", False)))], [Say(((" 1", False),))]]
    page = open_page()
    expect(page.locator("#greeting")).to_have_text("Begin; it goes on.")
    expect(page.locator("#system-field")).to_be_hidden()
    ask(page, "def f")
    assert answered(page).text_content() == "(n):\n    return"
    page.press("#message", "Enter")  # an empty box: further
    answered(page, 2)
    assert [path for path, _ in script.requests] == ["/v1/completions"] * 2
    assert [body["prompt"] for _, body in script.requests] == ["def f", "def f(n):\n    return"]


def test_the_template_can_be_left_out(open_page: Open, script: Script) -> None:
    script.answers = [HELLO]
    page = open_page()
    page.click("#settings summary")
    page.uncheck("#template")
    ask(page, "def f")
    answered(page)
    path, body = script.requests[0]
    assert path == "/v1/completions" and body["prompt"] == "def f" and "messages" not in body


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_theme_is_the_systems_until_it_is_chosen(open_page: Open, script: Script, scheme: str) -> None:
    page = open_page(color_scheme=scheme)

    def brightness() -> float:
        color = page.evaluate("() => getComputedStyle(document.body).backgroundColor")
        return sum(map(float, re.findall(r"[\d.]+", color)[:3])) / (3 * 255)

    expect(page.locator("#used")).to_have_text("56")
    before, strip = brightness(), painted(page, "#strip")
    assert before > 0.9 if scheme == "light" else before < 0.15
    page.click("#theme")
    after = brightness()
    assert after < 0.15 if scheme == "light" else after > 0.9
    page.wait_for_timeout(100)
    assert set(painted(page, "#strip")) != set(strip)
    page.reload()
    assert brightness() == after  # it is remembered


def test_everything_can_be_done_from_the_keyboard(open_page: Open, script: Script) -> None:
    script.answers = [HELLO]
    page = open_page()
    expect(page.locator("#message")).to_be_focused()
    page.keyboard.type("one")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("two")
    page.keyboard.press("Enter")
    answered(page)
    assert script.requests[0][1]["messages"][0]["content"] == "one\ntwo"
    expect(page.locator("#message")).to_be_focused()
    page.evaluate("() => document.activeElement.blur()")
    reached, outlined = set(), True
    for _ in range(40):
        page.keyboard.press("Tab")
        reached.add(
            page.evaluate("() => { const e = document.activeElement; return e.id || e.className || e.tagName; }")
        )
        outlined &= page.evaluate(
            """() => { const e = document.activeElement; // the box around the message shows its focus
               return e === document.body || e.id === "message" || getComputedStyle(e).outlineStyle !== "none"; }"""
        )
    assert {
        "new",
        "theme",
        "log",
        "plain edit",
        "plain again",
        "SUMMARY",
        "message",
        "send",
        "linear",
        "heat",
    } <= reached
    assert outlined


def test_every_control_has_a_name(open_page: Open, script: Script) -> None:
    script.answers = [HELLO]
    page = open_page()
    page.click("#settings summary")
    nameless = page.evaluate(
        """() => [...document.querySelectorAll("button, input, select, textarea")]
           .filter((e) => !(e.textContent.trim() || e.ariaLabel || e.labels?.length)).map((e) => e.id || e.outerHTML)"""
    )
    assert nameless == []


@pytest.mark.parametrize("width", [360, 768, 1280, 2200])
def test_nothing_runs_over_the_edge(open_page: Open, script: Script, width: int) -> None:
    script.answers = [[Say((("a" * 400 + "\n```\n" + "b" * 400 + "\n```\n", True),), inside=inside())]]
    page = open_page(viewport={"width": width, "height": 740})
    page.click("#settings summary")
    ask(page, "x" * 300)
    answered(page)
    for view in ("chat", "inside"):
        if width < 940:
            page.click(f"#show-{view}")
        assert page.evaluate("() => document.documentElement.scrollWidth") <= width
        for place in ("#log", "#inside", "#composer"):
            over = page.locator(place).evaluate("(e) => e.scrollWidth - e.clientWidth")
            assert over <= 0, place
    expect(page.locator("#inside")).to_be_visible()
    assert len(painted(page, "#heat")) > 4


def test_what_is_happening_is_announced(open_page: Open, script: Script) -> None:
    script.answers = [HELLO]
    page = open_page()
    ask(page, "hello?")
    expect(page.locator("[role=status]")).to_contain_text("the answer is complete")
