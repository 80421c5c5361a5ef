"""vlm/serve/page.py: limits, photos, turns and texts that stay texts; by hand and in a browser, before fake workers."""

import base64
import io
import shutil
import time
from urllib.parse import urlparse

import pytest
from bs4 import BeautifulSoup
from PIL import Image

from deploy.load import free_port
from tests.vlm.fake_workers import WORDS, FakeWorker, running, until
from utils.run import UserError
from vlm.serve import page

TEXT = "".join(WORDS)
POISON = "<img src=x onerror='window.hit=1'> ![x](http://203.0.113.1/x.png) [l](javascript:window.hit=2) **b**"


@pytest.fixture
def made():
    """A gateway before a worker: gateway.worker."""
    one = FakeWorker()
    with running([one], key="secret", trust_visitor=True) as found:
        found.worker = one
        yield found


@pytest.fixture
def photo(tmp_path):
    Image.new("RGB", (2000, 500), "orange").save(tmp_path / "photo.png")
    return str(tmp_path / "photo.png")


def config(made, **about):
    return page.Config(gateway=made.address, **about)


def talk(made, text, path=None, turns=(), visitor="a"):
    return list(page.reply(config(made), "secret", text, path, list(turns), visitor))


def test_a_photo_goes_with_the_first_question_about_it(made, photo, tmp_path):
    steps = talk(made, "What is it?", photo)
    line, shown, turns, box = steps[-1]
    assert line == page.note("") and box == "" and turns[0][3:] == ("What is it?", TEXT)
    assert shown.count("<img") == 1 and shown.index(TEXT) < shown.index("What is it?")
    # a word at a time
    said = [step[2][0].answer for step in steps if step[2]]
    assert said == ["".join(WORDS[: i + 1]) for i in range(len(WORDS))] + [TEXT]
    # the same photo again is not sent, another one is
    turns = talk(made, "Why?", photo, turns)[-1][2]
    other = str(tmp_path / "other.png")
    Image.new("L", (9, 9)).save(other)
    talk(made, "And this?", other, turns)
    first, second, third = (body["messages"] for body in made.worker.bodies)
    assert [type(m["content"]) for m in third] == [list, str, str, str, list]
    assert first == second[:1] and second[1]["content"] == TEXT and second[2]["content"] == "Why?"
    # scaled down, its shape kept
    url = first[0]["content"][0]["image_url"]["url"]
    assert len(url) < 100_000 and page.SIDE == 896
    assert third[4]["content"][0]["image_url"]["url"] != url
    assert made.worker.headers[0]["Authorization"] == "Bearer secret"


def test_a_photo_is_scaled_down(photo):
    sizes = []
    for url in page.scaled_urls(photo):
        packed = base64.b64decode(url.partition(",")[2])
        sizes.append(Image.open(io.BytesIO(packed)).size)
    assert sizes == [(896, 224), (160, 40)]


def test_what_is_refused_is_one_line_and_the_text_stays(made, tmp_path):
    turns = [page.Turn("", "", "", "Why?", "so")]
    (tmp_path / "x.png").write_text("no picture")
    for text, path, line in (
        ("  ", None, "Type a question"),
        ("x" * 501, None, "501 characters; 500 are the most"),
        ("What?", str(tmp_path / "x.png"), "not a readable image"),
    ):
        found = talk(made, text, path, turns)[-1]
        assert line in found[0] and found[2] == turns and found[3] == text.strip()
        # the name of the file, not its place on the server
        assert str(tmp_path) not in found[0]
    assert not made.worker.bodies
    made.worker.how = "dies"
    found = talk(made, "What?", None, turns)[-1]
    assert "broke off" in found[0] and found[1:] == (page.bubbles(turns), turns, "What?")
    made.worker.how = 429
    assert until(lambda: "all workers are full" in talk(made, "What?")[-1][0])


def test_the_rate_is_that_of_each_visitor(made):
    made.rate.most = 1
    assert "This answer is about no photo" in talk(made, "What?", visitor="a")[-1][0]
    assert "requests a minute" in talk(made, "What?", visitor="a")[-1][0]
    assert "requests a minute" not in talk(made, "What?", visitor="b")[-1][0]


def test_an_answer_that_is_stopped_keeps_what_was_said(made):
    made.worker.pause = 0.5
    steps = page.reply(config(made), "secret", "What?", None, [], "a")
    turns = [next(steps)[2] for _ in range(4)]
    # before its first word a question is no turn: two questions must not follow each other
    assert turns[0] == [] and turns[-1][0].answer == "".join(WORDS[:3])
    steps.close()
    assert until(lambda: made.workers[0].running == 0) and made.worker.sent < len(WORDS)


def test_all_words_are_texts():
    turn = page.Turn("x", "data:x", 'y"><b>', POISON, f"{POISON}\ud800")
    shown = BeautifulSoup(page.bubbles([turn]), "html.parser")
    tags = [(tag.name, sorted(tag.attrs)) for tag in shown.find_all()]
    assert tags == [
        ("div", ["class", "role"]),
        ("p", ["class"]),
        ("p", ["class"]),
        ("img", ["alt", "src"]),
    ]
    assert [tag.text for tag in shown.find_all("p")] == [f"{POISON}\ufffd", POISON]
    assert "<b>" not in page.note("<b>\ud800") and page.note("x").count("x") == 1


@pytest.mark.parametrize(
    "about, line",
    [
        ({"gateway": "localhost:1"}, "http://host:port/v1"),
        ({"max_tokens": 0}, "at least 1"),
        ({"port": 0}, "1 to 65535"),
    ],
)
def test_bad_flags(about, line, tmp_path):
    with pytest.raises(UserError, match=line):
        page.main(page.Config(out=str(tmp_path / "out"), **about))
    assert not (tmp_path / "out").exists()


# In a browser: the package `chromium` of a Linux distribution, driven by the Python package `playwright`.


@pytest.fixture(scope="module")
def chromium():
    reason = "no playwright: pip install playwright"
    playwright = pytest.importorskip("playwright.sync_api", reason=reason)
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
    program = next((found for name in names if (found := shutil.which(name))), None)
    if program is None:
        pytest.skip("no browser on this machine: install the package chromium")
    with playwright.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def visit(chromium, made):
    """A tab at the page; what it complains about and where it goes must be nothing and nowhere else."""
    port = free_port()
    cfg = config(made, port=port, upload_mb=1)
    blocks = page.page(cfg, "secret")
    page.serve(blocks, cfg)
    tab = chromium.new_page(viewport={"width": 1200, "height": 900})
    tab.set_default_timeout(20000)
    hosts = set()
    tab.errors = []
    tab.on("request", lambda request: hosts.add(urlparse(request.url).hostname))
    tab.on("pageerror", lambda error: tab.errors.append(str(error)))
    tab.goto(f"http://127.0.0.1:{port}")
    tab.locator("#question textarea").wait_for()
    yield tab
    assert tab.errors == [] and hosts <= {"127.0.0.1", None, ""}
    tab.close()
    blocks.close(verbose=False)


def ask(tab, text):
    tab.locator("#question textarea").fill(text)
    tab.click("#ask")


def see(tab, selector, text):
    tab.locator(selector).filter(has_text=text).first.wait_for()


@pytest.mark.long
def test_browser_uploads_a_photo_and_asks_twice(visit, made, photo):
    visit.locator("#photo input[type=file]").set_input_files(photo)
    visit.locator("#photo img").first.wait_for()
    ask(visit, "What is it?")
    see(visit, "#talk", TEXT)
    assert until(lambda: visit.locator("#question textarea").input_value() == "")
    ask(visit, "And why?")
    assert until(lambda: visit.inner_text("#talk").count("A melon on") == 2)
    first, second = (body["messages"] for body in made.worker.bodies)
    assert len(first) == 1 and len(second) == 3 and second[2]["content"] == "And why?"
    assert first[0]["content"][0]["type"] == "image_url" and first == second[:1]
    assert visit.locator("#talk img").count() >= 1
    # a new chat begins without turns
    visit.click("#new")
    assert until(lambda: "melon" not in visit.inner_text("#talk"))
    ask(visit, "Who?")
    see(visit, "#talk", TEXT)
    assert made.worker.bodies[2]["messages"] == [{"role": "user", "content": "Who?"}]


@pytest.mark.long
def test_browser_example_stop_and_poison(visit, made, monkeypatch):
    made.worker.pause = 0.5
    visit.locator(".example").first.click()
    see(visit, "#talk", "A melon")
    visit.click("#stop")
    see(visit, ".note", "Stopped.")
    time.sleep(1)
    assert "table" not in visit.inner_text("#talk") and made.worker.sent < len(WORDS)
    made.worker.pause = 0
    monkeypatch.setattr("tests.vlm.fake_workers.WORDS", [POISON])
    ask(visit, "<b>What?</b>")
    see(visit, "#talk", "<b>What?</b>")
    see(visit, "#talk", "javascript:")
    assert visit.evaluate("window.hit") is None and POISON in visit.inner_text("#talk")
    # the photo of the example, and nothing of the answer
    assert visit.locator("#talk :is(script, iframe, img, a, b)").count() == 1


@pytest.mark.long
def test_browser_refuses_what_is_too_large_or_no_photo(visit, made, tmp_path):
    (tmp_path / "text.png").write_text("no picture")
    visit.locator("#photo input[type=file]").set_input_files(str(tmp_path / "text.png"))
    time.sleep(1)
    ask(visit, "What?")
    see(visit, ".note", "not a readable image")
    assert visit.locator("#question textarea").input_value() == "What?" and not made.worker.bodies
    visit.reload()
    visit.locator("#question textarea").wait_for()
    (tmp_path / "large.png").write_bytes(b"x" * (2 * 2**20))
    visit.locator("#photo input[type=file]").set_input_files(str(tmp_path / "large.png"))
    time.sleep(2)
    ask(visit, "What?")
    see(visit, "#talk", TEXT)
    # without the file
    assert made.worker.bodies[0]["messages"] == [{"role": "user", "content": "What?"}]
