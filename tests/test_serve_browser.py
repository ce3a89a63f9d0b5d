"""The page in Chromium: Debian's, Chrome, or that of `playwright install chromium`."""

import re
import shutil
import threading
import time
from pathlib import Path
from urllib.parse import parse_qsl, urlsplit

import pytest

pytest.importorskip("lancedb", reason="lancedb is not installed")
pytest.importorskip("fastapi", reason="fastapi is not installed")
pytest.importorskip("uvicorn", reason="uvicorn is not installed")
playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")

from cgd_jax.search import Index  # noqa: E402
from cgd_jax.serve.app import create_app  # noqa: E402
from cgd_jax.serve.command import listen  # noqa: E402
from cgd_jax.serve.connections import server_of  # noqa: E402
from tests.search_samples import folder_of_photographs, stand_in  # noqa: E402

pytestmark = pytest.mark.slow

CHROMIUM = filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome")))


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    return folder_of_photographs(tmp_path_factory.mktemp("browser") / "photos", 60)


@pytest.fixture(scope="module")
def url(photos):
    index = Index.create(photos.parent / "index", stand_in())
    files = sorted(photos.rglob("*.png"))
    index.add(files, [file.parent.name for file in files])
    with listen("127.0.0.1", 0) as listener:
        server = server_of(create_app(index))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        while not server.started:
            time.sleep(0.01)
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        server.should_exit = True
        thread.join()


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as started:
        path = next(CHROMIUM, started.chromium.executable_path)
        if not Path(path).exists():
            pytest.skip("there is no Chromium; playwright install chromium brings one")
        browser = started.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def page(browser, url):
    """A page that must not complain, nor ask anybody else for anything."""
    page = browser.new_page(base_url=url, viewport={"width": 1200, "height": 800})
    page.set_default_timeout(10_000)
    wrong = []
    page.on("console", lambda message: message.type == "error" and wrong.append(message.text))
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("request", lambda request: request.url.startswith(url) or wrong.append(request.url))
    yield page
    page.close()
    expected = "the server responded with a status of 4"  # what a test asks for
    assert not [text for text in wrong if expected not in text]


def ids(page):
    links = page.locator("#results a")
    return [links.nth(i).get_attribute("data-id") for i in range(links.count())]


def search(page, **params):
    return page.request.post("/search", params=params).json()


def upload(page, file):
    with page.expect_response(re.compile("/search")):
        page.set_input_files("#file", file)
    page.wait_for_url("**/?id=upload-*")
    page.locator("#results li").first.wait_for()


def test_from_upload_to_click_and_back(page, photos):
    page.goto("/")
    upload(page, photos / "hats/000.png")
    query = re.search("id=(upload-[0-9a-f]+)", page.url)[1]
    expected = [hit["id"] for hit in search(page, id=query, k=40)["hits"]]
    assert ids(page)[:40] == expected
    status = page.locator("#status").inner_text()
    assert re.fullmatch(r"60 images searched in \d+\sms, exact", status)
    page.locator("#results a").nth(2).click()
    page.wait_for_url(f"**/?id={expected[2]}")
    page.locator(f'#results li:first-child a[data-id="{expected[2]}"]').wait_for()
    page.go_back()
    page.locator(f'#results li:first-child a[data-id="{expected[0]}"]').wait_for()
    assert query in page.url and ids(page)[:40] == expected
    page.reload()  # as whoever is sent the link sees it
    page.locator("#results li").first.wait_for()
    assert ids(page)[:40] == expected
    page.locator("#more").scroll_into_view_if_needed()
    page.locator("#results li").nth(59).wait_for()
    assert len(set(ids(page))) == 60 and page.locator("#more").is_hidden()


def test_a_part_is_dragged_or_chosen_with_keys(page, photos):
    page.goto("/")
    upload(page, photos / "shoes/001.png")
    whole = ids(page)
    frame = page.locator("#frame")
    frame.scroll_into_view_if_needed()
    box = frame.bounding_box()
    page.mouse.move(box["x"] + 60, box["y"] + 120)
    page.mouse.down()
    page.mouse.move(box["x"] + 160, box["y"] + 190, steps=3)
    page.mouse.up()
    page.wait_for_url("**crop=**")
    asked = dict(parse_qsl(urlsplit(page.url).query))
    expected = [hit["id"] for hit in search(page, **asked, k=40)["hits"]]
    page.locator(f'#results li:first-child a[data-id="{expected[0]}"]').wait_for()
    assert ids(page)[:40] == expected != whole[:40]
    # The image has 24 x 16 pixels, in a square frame.
    x, y, w, h = map(float, asked["crop"].split(","))
    inner = box["width"] * 16 / 24
    assert x == pytest.approx(60 / box["width"], abs=0.01)
    assert y == pytest.approx((120 - (box["height"] - inner) / 2) / inner, abs=0.01)
    assert (w, h) == pytest.approx((100 / box["width"], 70 / inner), abs=0.01)
    page.locator("#whole").click()
    page.locator(f'#results li:first-child a[data-id="{whole[0]}"]').wait_for()
    assert "crop" not in page.url
    frame.focus()
    for key in ("Enter", "ArrowRight", "Shift+ArrowDown"):
        page.keyboard.press(key)
    with page.expect_response(re.compile("crop=0.29%2C0.25%2C0.5%2C0.54")):
        page.keyboard.press("Enter")


def test_filter_by_label(page, photos):
    page.goto("/")
    upload(page, photos / "hats/000.png")
    page.locator("#label").fill("shoes")
    with page.expect_response(re.compile("label=shoes")):
        page.keyboard.press("Enter")
    page.locator("#status", has_text="30 images searched").wait_for()
    assert set(page.locator(".what").all_inner_texts()) == {"shoes"}
    page.locator("#results a").first.click()  # the filter stays
    page.wait_for_url(re.compile("id=[0-9a-f]{20}&label=shoes"))


def test_a_bad_file_is_said_to_be_one(page, tmp_path, photos):
    page.goto("/")
    (tmp_path / "a.jpg").write_bytes(b"<html>")
    page.set_input_files("#file", tmp_path / "a.jpg")
    page.locator("#error", has_text="not an image that can be read").wait_for()
    upload(page, photos / "hats/000.png")
    assert page.locator("#error").is_hidden()
    page.goto("/?id=none")
    page.locator("#error", has_text="no such image").wait_for()


def test_an_image_is_dropped_and_pasted(page, photos):
    content = list((photos / "hats/002.png").read_bytes())
    for kind, name in (("drop", "dataTransfer"), ("paste", "clipboardData")):
        page.goto("/")
        page.evaluate(
            """([kind, name, content]) => {
              const carried = new DataTransfer();
              const file = new File([new Uint8Array(content)], "a.png", { type: "image/png" });
              carried.items.add(file);
              const event = kind === "drop"
                ? new DragEvent(kind, { [name]: carried, bubbles: true, cancelable: true })
                : new ClipboardEvent(kind, { [name]: carried, bubbles: true, cancelable: true });
              document.body.dispatchEvent(event);
            }""",
            [kind, name, content],
        )
        page.locator("#results li").first.wait_for()
        assert page.locator("#results .alike").first.inner_text() == "1.000"


def test_at_the_width_of_a_telephone(page, photos):
    page.set_viewport_size({"width": 360, "height": 740})
    page.goto("/")
    for _ in range(2):
        wide = page.evaluate("() => document.documentElement.scrollWidth")
        assert wide <= 360
        upload(page, photos / "hats/000.png")
    tiles = [page.locator("#results li").nth(i).bounding_box() for i in range(6)]
    assert len({round(tile["y"]) for tile in tiles}) == 2
    assert len({round(tile["width"]) for tile in tiles}) == 1
    page.keyboard.press("Tab")
    assert page.evaluate("() => document.activeElement.matches(':focus-visible')")


def test_dark_where_the_system_is(page):
    grounds = []
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme)
        page.goto("/")
        grounds.append(page.evaluate("() => getComputedStyle(document.body).backgroundColor"))
    assert grounds == ["rgb(255, 255, 255)", "rgb(22, 24, 27)"]
