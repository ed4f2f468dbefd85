"""The page of the server, driven in headless Chromium against the real application."""

import contextlib
import json
import os
import re
import shutil
import subprocess
import threading
import time
from pathlib import Path

import pytest

uvicorn = pytest.importorskip("uvicorn", reason="needs the serve extra")
import peftrank.serving  # noqa: E402

PAGE = Path(peftrank.serving.__file__).parent / "page"
DOCS = Path(__file__).parents[1] / "docs"
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
ARGUMENTS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run "
    "--disable-background-networking --disable-component-update --disable-sync"
).split()
DESKTOP, PHONE, NARROW = (1280, 900), (390, 844), (360, 740)
LOOKS = [("desktop", DESKTOP, "light"), ("phone", PHONE, "dark")]

# What the person at the keyboard would call the visible text: its colour against the first opaque
# ground beneath it, as WCAG's contrast ratio. Returns the texts that stay under 4.5.
FAINT = """() => {
  const paint = document.createElement("canvas").getContext("2d", {willReadFrequently: true});
  const rgb = (colour) => {
    paint.clearRect(0, 0, 1, 1); paint.fillStyle = colour; paint.fillRect(0, 0, 1, 1);
    return [...paint.getImageData(0, 0, 1, 1).data];
  };
  const light = (colour) => colour.slice(0, 3).map((v) => v / 255)
    .map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4))
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const faint = [];
  const walk = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walk.nextNode()) {
    const element = walk.currentNode.parentElement;
    if (!walk.currentNode.data.trim() || !element.checkVisibility() || element.closest("option"))
      continue;
    const seen = element.closest(".vh, .skip, noscript");
    if (seen) continue;
    let under = element;
    while (under && rgb(getComputedStyle(under).backgroundColor)[3] < 255)
      under = under.parentElement;
    const ground = light(rgb(getComputedStyle(under ?? document.body).backgroundColor));
    const text = light(rgb(getComputedStyle(element).color));
    const ratio = (Math.max(ground, text) + 0.05) / (Math.min(ground, text) + 0.05);
    if (ratio < 4.5) faint.push([walk.currentNode.data, ratio]);
  }
  return faint;
}"""


@pytest.fixture(scope="module")
def chromium():
    sync_api = pytest.importorskip("playwright.sync_api", reason="needs the dev extra: playwright")
    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    if found is None:
        pytest.skip(f"needs a browser: none of {', '.join(BROWSERS)} is on the PATH")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=found, args=ARGUMENTS)
        yield browser
        browser.close()


@contextlib.contextmanager
def served(ranker, *, history=None, **settings):
    """The address of the app, serving in a thread."""
    from peftrank.serving.app import create_app
    from peftrank.serving.settings import ServeSettings

    app = create_app(ranker, ServeSettings(watch_seconds=0, **settings), history=history)
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_config=None, ws="none"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        time.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    yield f"http://127.0.0.1:{port}/"
    server.should_exit = True
    thread.join(10)
    assert not thread.is_alive()


@pytest.fixture(scope="module")
def ranker(workplace):
    """A tiny base with two adapters, as the domains news and video."""
    from peftrank.base import load_base
    from peftrank.ranker import Ranker

    base = load_base(str(workplace / "base"), quantization="none", device="cpu")
    with Ranker(base, store=workplace / "adapters") as made:
        made.load_adapter("news@0001")
        made.load_adapter("news@0002", domain="video")
        yield made


@pytest.fixture(scope="module")
def site(ranker):
    with served(ranker) as address:
        yield address


@pytest.fixture
def visit(chromium):
    """Returns a function that opens the page; it must stay quiet and on this machine."""
    contexts, problems, requests = [], [], []

    def failed_to_load(text):
        # Chromium reports each 4xx and 5xx there, also those the page is there to show.
        return text.startswith("Failed to load resource")

    def open_page(address, *, size=DESKTOP, routes=None, ready="#rankings tbody tr", **options):
        width, height = size
        context = chromium.new_context(viewport={"width": width, "height": height}, **options)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(5000)
        page.on(
            "console",
            lambda m: (
                m.type in ("error", "warning")
                and not failed_to_load(m.text)
                and problems.append(m.text)
            ),
        )
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("request", lambda request: requests.append(request.url))
        for pattern, handler in (routes or {}).items():
            page.route(pattern, handler)
        page.goto(address)
        if ready:
            page.locator(ready).first.wait_for()
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert problems == []
    assert [url for url in requests if not url.startswith("http://127.0.0.1:")] == []


def answer(status, value, **headers):
    """Returns a handler that answers in the server's place."""
    return lambda route: route.fulfill(status=status, json=value, headers=headers)


def refusal(kind, message):
    return {"error": {"type": kind, "message": message}}


def rank(page):
    page.get_by_role("button", name="Rank").click()
    page.locator("#rankings input").first.wait_for()


def source(page, name):
    page.get_by_role("radio", name=name, exact=True).check(force=True)


def paste(page, history, candidates):
    source(page, "Titles")
    page.get_by_label("History, oldest first").fill("\n".join(history))
    page.get_by_label("Candidates", exact=True).fill("\n".join(candidates))


def rows(page, table):
    """Returns the rows of the left (0) or right (1) ranking as cells by the column's name."""
    found = page.locator("#rankings table").nth(table)
    heads = found.locator("thead th").all_inner_texts()
    made = []
    for row in found.locator("tbody tr").all():
        cells = [text.strip() for text in row.locator("> *").all_inner_texts()]
        made.append({"id": row.get_attribute("data-id"), **dict(zip(heads, cells, strict=True))})
    return made


def bodies(page):
    """Returns the list that the bodies of the rankings asked for from now on will join."""
    sent = []
    page.on("request", lambda r: r.url.endswith("/v1/rank") and sent.append(r.post_data_json))
    return sent


def test_a_sample_slate_is_ranked_before_and_after_the_adapter(visit, site):
    page = visit(site)
    page.get_by_label("Domain").select_option("news")
    page.get_by_label("Slate of the sample").select_option(index=2)
    page.get_by_text("as they were given").wait_for()
    rank(page)
    before, after = rows(page, 0), rows(page, 1)
    assert page.locator("#rankings caption b").all_inner_texts() == ["Before", "After"]
    assert sorted(row["id"] for row in before) == sorted(row["id"] for row in after)
    scores = [float(row["Score"].replace("−", "-")) for row in after]
    assert scores == sorted(scores, reverse=True)
    order = [row["id"] for row in before]
    for place, row in enumerate(after):
        moved = order.index(row["id"]) - place
        words = f"up {moved}" if moved > 0 else f"down {-moved}" if moved else "same"
        assert row["Move"].endswith(words)
    relevant = [i for i, row in enumerate(after) if "relevant" in row["Candidate"]]
    assert len(relevant) == 1
    said = page.locator("#summary").inner_text()
    assert re.search(
        rf"relevant candidate ranks .*, {relevant[0] + 1}(st|nd|rd|th) with the news", said
    )
    page.locator(".slopes path.relevant").wait_for()


def test_pasted_titles_are_ranked(visit, site):
    page = visit(site)
    page.get_by_label("Domain").select_option("news")
    paste(page, ["amber garden", "", "  river "], ["castle meadow", "amber river", "zephyr"])
    sent = bodies(page)
    rank(page)
    assert {row["Candidate"] for row in rows(page, 1)} == {"castle meadow", "amber river", "zephyr"}
    slate = sent[-1]["slate"]
    assert [item["fields"] for item in slate["history"]] == [
        {"title": "amber garden"},
        {"title": "river"},
    ]
    assert "First:" in page.locator("#summary").inner_text()


def test_what_was_ranked_goes_when_the_form_no_longer_says_it(visit, site):
    page = visit(site)
    rank(page)
    page.get_by_label("Slate of the sample").select_option(index=1)
    assert page.locator("#rankings input").count() == 0
    assert page.locator("#summary").inner_text() == "Not ranked yet."


def test_labels_of_a_pasted_slate_are_shown_and_not_sent(visit, site):
    page = visit(site)
    page.get_by_label("Domain").select_option("news")
    items = [{"item_id": f"i{n}", "fields": {"title": t}} for n, t in enumerate(("one", "two"))]
    record = {
        "slate_id": "mine",
        "user_id": "u",
        "history": [],
        "candidates": items,
        "labels": [0, 2],
    }
    source(page, "JSON")
    page.get_by_label("Slate as JSON").fill(json.dumps(record))
    sent = bodies(page)
    rank(page)
    tagged = [row["id"] for row in rows(page, 1) if "relevant, 2" in row["Candidate"]]
    assert tagged == ["i1"]
    assert all("labels" not in body["slate"] for body in sent)
    assert "no history" in page.locator("#history-hint").inner_text()


@pytest.mark.slow
def test_the_sample_can_be_changed_in_the_text_fields(visit, site):
    page = visit(site)
    given = page.locator("#rankings .title").all_inner_texts()
    source(page, "Titles")
    page.get_by_role("button", name="Start from the sample").click()
    assert page.get_by_label("Candidates", exact=True).input_value().split("\n") == given
    source(page, "JSON")
    assert len(json.loads(page.get_by_label("Slate as JSON").input_value())["candidates"]) == len(
        given
    )


def test_two_adapters_stand_side_by_side(visit, site):
    page = visit(site)
    page.get_by_label("Domain").select_option("news")
    page.get_by_role("radio", name="another adapter").check()
    page.get_by_label("The other adapter").select_option("video")
    rank(page)
    assert page.locator("#rankings caption b").all_inner_texts() == [
        "Adapter news",
        "Adapter video",
    ]
    page.locator("input[name=candidate-1]").first.check()
    page.locator("#history thead .effect").nth(1).wait_for()
    assert page.locator("#history thead th").all_inner_texts()[2:] == [
        "Effect, news",
        "Effect, video",
    ]
    chosen = page.locator("#rankings tr.chosen")
    assert chosen.count() == 2
    assert len({row.get_attribute("data-id") for row in chosen.all()}) == 1


def test_the_effects_of_the_history_are_the_servers(visit, site):
    page = visit(site)
    rank(page)
    with page.expect_response("**/v1/rank") as answered:
        page.locator("input[name=candidate-1]").nth(1).check()
    explanation = answered.value.json()["rankings"][0]["explanation"]
    page.locator("td.effect").first.wait_for()
    effects = explanation["effects"][rows(page, 1)[1]["id"]]
    for effect, cell in zip(effects, page.locator("td.effect").all(), strict=True):
        word = "raises" if effect >= 0 else "lowers"
        assert cell.locator(".vh").inner_text() == f"{word} by {abs(effect):.3f}"
        widths = [cell.locator(part).bounding_box()["width"] for part in (".signed i", ".signed")]
        widest = max(abs(e) for each in explanation["effects"].values() for e in each)
        assert widths[0] == pytest.approx(widths[1] / 2 * abs(effect) / widest, abs=2.5)
    items = page.locator("#history tbody .title").all_inner_texts()
    assert (
        f"raised most by {items[effects.index(max(effects))]}"
        in page.locator("#explained").inner_text()
    )


@pytest.mark.slow
def test_effects_are_asked_for_once_per_ranking(visit, site):
    page = visit(site)
    rank(page)
    sent = bodies(page)
    for place in range(3):
        page.locator("input[name=candidate-1]").nth(place).check()
        page.locator("td.effect").first.wait_for()
    assert [body["explain"] for body in sent] == [True]


def test_markup_in_titles_and_messages_stays_text(visit, site):
    titles = ["<img src=x onerror=alert(1)>", "<script>alert(1)</script>"]
    samples = answer(500, refusal("internal", titles[0]))
    page = visit(site, routes={"**/v1/samples/**": samples}, ready="#sample-hint:not([hidden])")
    page.on("dialog", lambda dialog: pytest.fail("a title ran as a script"))
    assert titles[0] in page.locator("#sample-hint").inner_text()
    items = [{"item_id": text, "fields": {"title": text, text: text}} for text in titles]
    source(page, "JSON")
    page.get_by_label("Slate as JSON").fill(json.dumps({"history": items, "candidates": items}))
    rank(page)
    page.locator("input[name=candidate-1]").first.check()
    page.locator("td.effect").first.wait_for()
    assert sorted(row["Candidate"] for row in rows(page, 1)) == titles
    assert page.locator("main img, main script").count() == 0


def test_the_servers_message_is_shown_when_a_slate_is_refused(visit, site):
    page = visit(site)
    twice = [{"item_id": "same", "fields": {"title": "one"}}] * 2
    source(page, "JSON")
    page.get_by_label("Slate as JSON").fill(json.dumps({"history": [], "candidates": twice}))
    page.get_by_role("button", name="Rank").click()
    assert "twice" in page.get_by_role("alert").inner_text()
    page.get_by_label("Slate as JSON").fill("{")
    page.get_by_role("button", name="Rank").click()
    assert "not JSON" in page.locator("#summary").inner_text()
    assert page.get_by_role("alert").count() == 0


@pytest.mark.slow
def test_any_json_with_candidates_is_left_to_the_server_to_judge(visit, site):
    page = visit(site)
    source(page, "JSON")
    for record in (
        {"candidates": [None, 3, "a", {}, {"item_id": "b", "fields": "text"}], "labels": "none"},
        {"candidates": [{"item_id": "a", "fields": {"title": ["x"], "n": 3}}], "history": "h"},
        {"candidates": [[]], "history": [None], "history_feedback": 3, "unknown": 1},
    ):
        page.get_by_label("Slate as JSON").fill(json.dumps(record))
        page.get_by_role("button", name="Rank").click()
        page.get_by_role("alert").wait_for()
        assert len(page.get_by_role("alert").inner_text()) > 20


@pytest.mark.slow
def test_an_explanation_of_a_newer_adapter_is_not_taken_for_the_rankings(visit, site):
    page = visit(site)
    rank(page)

    def handle(route):
        value = route.fetch().json()
        value["rankings"][0]["version"] = "9999"
        route.fulfill(json=value)

    page.route("**/v1/rank", handle)
    page.locator("input[name=candidate-1]").first.check()
    page.get_by_text("version 9999 has replaced").wait_for()
    assert page.locator("td.effect").count() == 0


def test_a_base_that_cannot_rank_untrained_leaves_the_adapters_ranking(visit, site):
    message = "An encoder has no vocabulary head."

    def handle(route):
        untrained = route.request.post_data_json.get("adapter") == "none"
        if untrained:
            route.fulfill(status=400, json=refusal("config", message))
        else:
            route.continue_()

    page = visit(site, routes={"**/v1/rank": handle})
    rank(page)
    assert message in page.locator("#rankings .notice").inner_text()
    assert page.locator("#rankings table").count() == 1
    assert "Move" not in page.locator("#rankings thead").inner_text()


def test_a_busy_server_says_when_to_try_again(visit, site):
    busy = answer(429, refusal("overloaded", "the queue is full"), **{"Retry-After": "3"})
    page = visit(site, routes={"**/v1/rank": busy})
    page.get_by_role("button", name="Rank").click()
    assert page.get_by_role("alert").inner_text() == "The queue is full. Try again in 3 s."


def test_the_page_waits_until_the_server_is_ready(visit, site):
    asked = []

    def handle(route):
        asked.append(time.monotonic())
        if len(asked) == 1:
            route.fulfill(status=503, json=refusal("overloaded", "the base is loading"))
        else:
            route.continue_()

    page = visit(site, routes={"**/readyz": handle}, ready="#notice:not([hidden])")
    assert "The base is loading. " in page.locator("#notice").inner_text()
    page.locator("#rankings tbody tr").first.wait_for()
    assert page.locator("#notice").is_hidden()


@pytest.mark.slow
def test_a_server_that_is_gone_is_said_to_be(visit, site):
    page = visit(site)
    page.route("**/v1/rank", lambda route: route.abort())
    page.get_by_role("button", name="Rank").click()
    assert "does not answer" in page.get_by_role("alert").inner_text()


def test_the_token_of_a_guarded_server_is_asked_for_and_kept_in_the_tab(visit, ranker):
    with served(ranker, token="s3cret") as address:
        page = visit(address, ready="#token-form:not([hidden])")
        assert page.evaluate("document.activeElement.id") == "token"
        page.get_by_label("Token", exact=True).fill("wrong")
        page.keyboard.press("Enter")
        assert "did not take" in page.get_by_role("alert").inner_text()
        page.get_by_label("Token", exact=True).fill("s3cret")
        page.get_by_role("button", name="Use it").click()
        page.locator("#rankings tbody tr").first.wait_for()
        rank(page)
        assert "$PEFTRANK_TOKEN" in page.locator("#command").text_content()
        assert "s3cret" not in page.content()
        page.reload()
        page.locator("#rankings tbody tr").first.wait_for()
        assert page.evaluate("Object.keys(localStorage).length + document.cookie.length") == 0
        page.get_by_role("button", name="Forget the token").click()
        page.locator("#token-form").wait_for()
        assert page.evaluate("sessionStorage.length") == 0
        assert page.locator("#work").is_hidden()


@pytest.mark.slow
def test_a_slate_without_a_history_is_explained_by_the_stored_one(visit, ranker):
    from peftrank.serving.history import Event, open_history
    from peftrank.types import Item

    history = open_history("sqlite://")
    items = [Item(f"seen-{n}", {"title": title}) for n, title in enumerate(("amber", "zephyr"))]
    history.append(
        [Event("u7", "news", item, None, float(t), None) for t, item in enumerate(items)]
    )
    with served(ranker, history=history) as address:
        page = visit(address)
        page.get_by_label("Domain").select_option("news")
        candidates = [{"item_id": c, "fields": {"title": f"{c} river"}} for c in "ab"]
        source(page, "JSON")
        text = json.dumps({"user_id": "u7", "candidates": candidates})
        page.get_by_label("Slate as JSON").fill(text)
        assert "Stored on the server" in page.locator("#history-hint").inner_text()
        rank(page)
        page.locator("input[name=candidate-1]").first.check()
        page.locator("td.effect").first.wait_for()
        assert page.locator("#history .title").all_inner_texts() == ["seen-0", "seen-1"]


@pytest.mark.slow
def test_an_item_too_old_to_be_read_is_said_not_to_be(visit, site):
    page = visit(site)
    page.get_by_label("Domain").select_option("news")
    paste(page, [f"amber {n}" for n in range(25)], ["castle", "zephyr"])
    rank(page)
    page.locator("input[name=candidate-1]").first.check()
    page.locator("td.effect").first.wait_for()
    left_out = page.locator("#history td", has_text="not read").count()
    assert left_out > 0
    assert page.locator("td.effect").count() == 25 - left_out
    assert "not read" in page.locator("#history tbody tr").first.inner_text()


def test_titles_become_the_field_that_the_prompt_reads(visit, site):
    def handle(route):
        value = route.fetch().json()
        for adapter in value["adapters"]:
            adapter["fields"] = ["about"] if adapter["domain"] == "video" else ["title"]
        route.fulfill(json=value)

    page = visit(site, routes={"**/v1/adapters": handle})
    page.get_by_label("Domain").select_option("news")
    paste(page, ["amber"], ["castle", "zephyr"])
    page.get_by_role("radio", name="another adapter").check()
    page.get_by_label("The other adapter").select_option("video")
    sent = bodies(page)
    rank(page)
    fields = {body["domain"]: body["slate"]["candidates"][0]["fields"] for body in sent}
    assert fields["news"] == {"title": "castle"}
    assert fields["video"] == {"title": "castle", "about": "castle"}
    assert "given the title as about" in page.locator("#rankings caption").nth(1).inner_text()


@pytest.mark.slow
def test_a_server_without_adapters_says_how_to_get_one(visit, site):
    none = answer(200, {"base": {"name": "tiny"}, "adapters": []})
    page = visit(site, routes={"**/v1/adapters": none}, ready="#notice:not([hidden])")
    assert "peftrank train" in page.locator("#notice").inner_text()


@pytest.mark.slow
def test_a_domain_without_a_sample_leaves_the_text_fields(visit, site):
    page = visit(
        site,
        routes={"**/v1/samples/**": answer(404, refusal("data", "none"))},
        ready="#sample-hint:not([hidden])",
    )
    assert "no sample" in page.locator("#sample-hint").inner_text()
    paste(page, ["amber"], ["castle", "zephyr"])
    rank(page)
    assert len(rows(page, 1)) == 2


def test_every_stop_of_the_tab_key_is_seen_and_the_keyboard_alone_ranks_and_explains(visit, site):
    page = visit(site)
    here = """() => {
      const e = document.activeElement;
      const drawn = e.closest(".segments label") ?? e;
      const style = getComputedStyle(drawn);
      return {name: e.id || e.name || e.textContent.trim(),
              seen: style.outlineStyle !== "none" && parseFloat(style.outlineWidth) >= 2};
    }"""

    def walk(key, count):
        stops = []
        for _ in range(count):
            page.keyboard.press(key)
            stops.append(page.evaluate(here))
        assert all(stop["seen"] for stop in stops), stops
        return [stop["name"] for stop in stops]

    forward = [
        "Skip to the result",
        "API",
        "Metrics",
        "domain",
        "source",
        "sample",
        "against",
        "rank",
    ]
    assert walk("Tab", 8) == forward
    page.keyboard.press("Enter")
    page.locator("input[name=candidate-1]").first.wait_for()
    assert page.evaluate(here)["name"] == "rank"
    assert walk("Tab", 3)[1:] == ["candidate-0", "candidate-1"]
    page.keyboard.press("Space")
    page.locator("td.effect").first.wait_for()
    page.keyboard.press("ArrowDown")
    assert page.evaluate(here)["name"] == "candidate-1"
    assert page.locator("input[name=candidate-1]").nth(1).is_checked()
    page.keyboard.press("Tab")  # leaves the page: nothing holds the focus
    assert page.evaluate("document.activeElement === document.body")
    page.keyboard.press("Shift+Tab")
    assert walk("Shift+Tab", 3)[-1] == "rank"


@pytest.mark.slow
def test_ctrl_enter_ranks_from_a_text_field(visit, site):
    page = visit(site)
    paste(page, ["amber"], ["castle", "zephyr"])
    page.keyboard.press("Control+Enter")
    page.locator("#rankings input").first.wait_for()
    page.keyboard.press("Tab")
    assert len(rows(page, 1)) == 2


def test_every_control_and_table_has_a_name_for_screen_readers(visit, site):
    page = visit(site)
    tools = page.context.new_cdp_session(page)
    named = "button combobox textbox radio link table region navigation form".split()

    def check():
        nodes = tools.send("Accessibility.getFullAXTree")["nodes"]
        found = [n for n in nodes if not n["ignored"] and n.get("role", {}).get("value") in named]
        unnamed = [n for n in found if not n.get("name", {}).get("value")]
        assert found
        assert unnamed == []
        return {n["role"]["value"] for n in found}, nodes

    for kind in ("Titles", "JSON", "Sample"):
        source(page, kind)
        check()
    page.locator("#curl summary").click()
    rank(page)
    page.locator("input[name=candidate-1]").first.check()
    page.locator("td.effect").first.wait_for()
    roles, nodes = check()
    assert {"combobox", "radio", "table", "navigation", "form", "region"} <= roles
    every = {n["role"]["value"] for n in nodes if not n["ignored"]}
    assert {"banner", "main", "columnheader", "rowheader", "status"} <= every


def test_nothing_is_wider_than_the_window(visit, site):
    page = visit(site)
    width = "document.documentElement.scrollWidth"

    def check():
        for size in (DESKTOP, (768, 1024), PHONE, NARROW):
            page.set_viewport_size(dict(zip(("width", "height"), size, strict=True)))
            assert page.evaluate(width) <= size[0]

    for kind in ("JSON", "Sample", "Titles"):
        source(page, kind)
        check()
    paste(page, ["w" * 200, "amber"], ["long " * 60, "m" * 300, "castle"])
    page.locator("#curl summary").click()
    rank(page)
    page.locator("input[name=candidate-1]").first.check()
    page.locator("td.effect").first.wait_for()
    check()
    page.get_by_role("radio", name="another adapter").check()
    rank(page)
    page.locator("input[name=candidate-1]").first.check()
    page.locator("#history thead .effect").nth(1).wait_for()
    check()


def test_text_has_contrast_in_both_schemes(visit, site):
    page = visit(site)

    def check():
        for scheme, ground in (("light", "rgb(251, 251, 249)"), ("dark", "rgb(19, 22, 26)")):
            page.emulate_media(color_scheme=scheme)
            assert page.evaluate("getComputedStyle(document.body).backgroundColor") == ground
            assert page.evaluate(FAINT) == []

    page.get_by_role("radio", name="another adapter").check()
    rank(page)
    page.locator("input[name=candidate-1]").first.check()
    page.locator("#history thead .effect").nth(1).wait_for()
    check()
    page.route("**/v1/rank", answer(400, refusal("config", "this cannot be ranked")))
    page.get_by_role("button", name="Rank").click()
    page.get_by_role("alert").wait_for()
    check()
    page.route("**/v1/rank", answer(401, refusal("auth", "a token is needed")))
    page.get_by_role("button", name="Rank").click()
    page.locator("#token-form").wait_for()
    check()


@pytest.mark.slow
def test_nothing_moves_for_those_who_asked_for_less_motion(visit, site):
    page = visit(site, reduced_motion="reduce")
    rank(page)
    moving = """() => [...document.querySelectorAll("*")].filter((e) => {
      const style = getComputedStyle(e);
      return style.transitionDuration !== "0s" || style.animationName !== "none";
    }).length"""
    assert page.evaluate(moving) == 0


@pytest.mark.slow
@pytest.mark.skipif(
    not (shutil.which("curl") and shutil.which("bash")), reason="needs curl and bash"
)
def test_the_curl_command_asks_what_the_page_asked(visit, site):
    page = visit(site)
    paste(page, ["it's amber"], ["castle \"'$(touch x)'`ls`", "zephyr \\ river"])
    page.locator("#curl summary").click()
    command = page.locator("#command").inner_text()
    rank(page)
    ran = subprocess.run(["bash", "-c", f"{command} --silent"], capture_output=True, check=True)
    [ranking] = json.loads(ran.stdout)["rankings"]
    assert ranking["item_ids"] == [row["id"] for row in rows(page, 1)]


def test_the_server_forbids_the_page_foreign_and_inline_code(visit, site):
    page = visit(site)
    answered = page.request.get(site)
    assert "default-src 'self'" in answered.headers["content-security-policy"]
    for file in PAGE.iterdir():
        if file.name != "index.html":
            assert page.request.get(f"{site}page/{file.name}").ok
    page.get_by_role("link", name="API").click()
    page.get_by_role("heading", name="API", exact=True).wait_for()


def test_the_page_has_no_inline_code_and_names_no_other_host():
    html = (PAGE / "index.html").read_text(encoding="utf-8")
    assert re.findall(r"<style|\sstyle=|\son\w+=|<script(?![^>]*\ssrc=)", html) == []
    for file in PAGE.iterdir():
        text = file.read_text(encoding="utf-8").replace("http://www.w3.org/2000/svg", "")
        assert not re.search(r"https?://|@import|url\(", text), file.name
    script = (PAGE / "page.js").read_text(encoding="utf-8")
    assert not re.search(
        r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|localStorage", script
    )


@pytest.mark.slow
@pytest.mark.skipif(
    not os.environ.get("PEFTRANK_SCREENSHOTS"),
    reason="writes docs/serving-*.png; asked for with PEFTRANK_SCREENSHOTS=1",
)
@pytest.mark.parametrize(("name", "size", "scheme"), LOOKS)
def test_screenshots_of_the_shipped_adapters(visit, smollm2_nf4, name, size, scheme):
    """The page as it opens, ranked, with its first candidate chosen."""
    from peftrank.ranker import Ranker

    with Ranker(smollm2_nf4, store=DOCS.parent / "adapters") as ranker:
        for domain in ("ecommerce", "news", "social", "video"):
            ranker.load_adapter(domain)
        with served(ranker) as address:
            page = visit(address, size=size, color_scheme=scheme)
            page.set_default_timeout(60_000)
            rank(page)
            first = page.locator("input[name=candidate-1]").first
            first.check()
            page.locator("td.effect").first.wait_for()
            if size == DESKTOP:
                page.evaluate("scrollTo(0, 0)")
            else:
                page.evaluate("document.querySelectorAll('#rankings table')[1].scrollIntoView()")
            page.mouse.move(0, 0)
            page.wait_for_timeout(500)  # the bars have grown
            page.screenshot(path=DOCS / f"serving-{name}.png")
