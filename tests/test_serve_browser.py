"""The page in Chromium: Debian's, Chrome, or that of `playwright install chromium`."""

import contextlib
import re
import shutil
import subprocess
import sys
import tarfile
import threading
import time
from pathlib import Path
from urllib.parse import parse_qsl, urlsplit

import numpy as np
import pytest
from PIL import Image, ImageSequence

pytest.importorskip("lancedb", reason="lancedb is not installed")
pytest.importorskip("fastapi", reason="fastapi is not installed")
pytest.importorskip("uvicorn", reason="uvicorn is not installed")
playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")

from cgd_jax import network as networks  # noqa: E402
from cgd_jax.search import Index, Record  # noqa: E402
from cgd_jax.search.filling import update  # noqa: E402
from cgd_jax.serve.app import create_app  # noqa: E402
from cgd_jax.serve.command import listen  # noqa: E402
from cgd_jax.serve.connections import server_of  # noqa: E402
from tests.search_samples import (  # noqa: E402
    folder_of_photographs,
    photograph,
    stand_in,
    write_network,
)

pytestmark = pytest.mark.slow

CHROMIUM = filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome")))
MANY = 20_000  # images of the large index
ADDRESS = "https://elsewhere.example/a.jpg"


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    root = folder_of_photographs(tmp_path_factory.mktemp("browser") / "photos", 60)
    for i in range(3):
        photograph(root / 'shoes/red/it\'s "deep".png', 200)
        photograph(root / f"shoes/red/{i}.png", 100 + i, (16, 24))
    photograph(root / "hats/larger.png", 1, (48, 32))  # shoes/001.png once more
    return root


@contextlib.contextmanager
def served(index, **options):
    """Serves an index in a thread; yields its address."""
    with listen("127.0.0.1", 0) as listener:
        server = server_of(create_app(index, **options))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        while not server.started:
            time.sleep(0.01)
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        server.should_exit = True
        thread.join()


@pytest.fixture(scope="module")
def url(photos):
    address = str(photos.parent / "index")
    update(address, [photos], stand_in())
    with served(Index.open(address, stand_in())) as url:
        yield url


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """Many images that are numbers and a thumbnail."""
    index = Index.create(tmp_path_factory.mktemp("large") / "index", stand_in())
    thumbnail = photograph(tmp_path_factory.mktemp("one") / "a.jpg", 1).read_bytes()
    vectors = np.random.default_rng(0).normal(size=(MANY, 16)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    records = [
        Record(
            id=f"{i:020x}", path=f"/p/{i // 1000:03}/{i:06}.jpg", modified=-i, thumbnail=thumbnail
        )
        for i in range(MANY)
    ]
    index.write(records, vectors)
    with served(index) as url:
        yield url


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
def opened(browser):
    """Opens pages that must not complain, nor ask anybody else for anything."""
    contexts, wrong = [], []

    def open_page(url, width=1200, height=800, **options):
        viewport = {"width": width, "height": height}
        context = browser.new_context(base_url=url, viewport=viewport, **options)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(15_000)
        page.on("console", lambda said: said.type == "error" and wrong.append(said.text))
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on(
            "request",
            lambda request: (
                request.url.startswith((url, f"blob:{url}")) or wrong.append(request.url)
            ),
        )
        return page

    yield open_page
    for context in contexts:
        context.close()
    expected = "the server responded with a status of 4"  # what a test asks for
    assert not [text for text in wrong if expected not in text]


@pytest.fixture
def page(opened, url):
    return opened(url)


def ids(page):
    return page.locator("#grid [data-id]").evaluate_all(
        "links => links.map(link => link.dataset.id)"
    )


def search(page, **params):
    return page.request.post("/search", params=params).json()


def expected(page, **params):
    """Returns the ids that the API finds, as many as the grid shows."""
    return [hit["id"] for hit in search(page, k=200, **params)["hits"]][: len(ids(page))]


def first(page, id):
    page.locator(f'#grid li:first-child a[data-id="{id}"]').wait_for()


def upload(page, *files, input="#file"):
    page.set_input_files(input, files)
    page.wait_for_url(re.compile("id=[^&]*upload-"))
    page.locator("#status", has_text="searched in").wait_for()
    page.locator("#grid [data-id]").first.wait_for()


def until(page, holds):
    """Waits; the page's events, requests among them, are handled meanwhile."""
    deadline = time.monotonic() + 30
    while not holds():
        assert time.monotonic() < deadline
        page.wait_for_timeout(50)


def carry(page, kind, script):
    """Drops or pastes what a script puts into `carried`, a DataTransfer."""
    page.evaluate(
        """([kind, script, content]) => {
          const carried = new DataTransfer();
          const put = {
            files: (names) => names.forEach((name) => carried.items.add(
              new File([new Uint8Array(content)], name, { type: "image/png" }))),
            address: (text) => {
              for (const kind of ["text/uri-list", "text/plain"]) carried.setData(kind, text);
            },
          };
          put[script[0]](script[1]);
          const type = kind === "drop" ? DragEvent : ClipboardEvent;
          const name = kind === "drop" ? "dataTransfer" : "clipboardData";
          const options = { [name]: carried, bubbles: true, cancelable: true };
          document.body.dispatchEvent(new type(kind, options));
        }""",
        [kind, script, carry.content],
    )


@pytest.fixture(autouse=True)
def content(photos):
    carry.content = list((photos / "hats/002.png").read_bytes())


# The collection.


def test_everything_is_there_before_anything_is_asked(page):
    page.goto("/")
    page.locator("#status", has_text="65 images").wait_for()
    page.locator("#folders a", has_text="shoes").click()
    page.locator("#status", has_text="34 images").wait_for()
    assert page.title() == "shoes · Image search"
    page.locator("#folders a", has_text="red 4").click()
    until(page, lambda: page.locator("#trail").inner_text() == "All › shoes › red")
    assert page.locator("#status").inner_text() == "4 images"
    page.locator("#trail a", has_text="shoes").click()
    page.locator("#status", has_text="34 images").wait_for()
    listed = page.request.get("/collection?folder=shoes&order=folder&k=500").json()["images"]
    page.locator("#order").select_option("folder")
    first(page, listed[0]["id"])
    assert ids(page) == [one["id"] for one in listed][: len(ids(page))]
    page.locator("#grid [data-id]").nth(1).click()
    first(page, listed[1]["id"])
    assert f"id={listed[1]['id']}" in page.url and "folder=shoes" in page.url


def test_any_number_of_images_are_scrolled_and_few_are_in_the_document(opened, large):
    page = opened(large)
    page.goto("/")
    page.locator("#status", has_text=f"{MANY:,} images").wait_for()
    page.evaluate("() => scrollTo(0, document.documentElement.scrollHeight)")
    page.locator(f'#grid a[data-id="{MANY - 1:020x}"]').wait_for()
    page.evaluate("() => scrollTo(0, document.documentElement.scrollHeight / 2)")
    numbers = lambda: sorted(int(id, 16) for id in ids(page))
    until(page, lambda: numbers() and abs(numbers()[0] - MANY / 2) < 500)
    page.wait_for_load_state("networkidle")
    middle = numbers()
    assert len(middle) < 200
    assert middle == list(range(middle[0], middle[0] + len(middle)))
    node = page.locator("#grid li").first
    assert node.get_attribute("aria-setsize") == str(MANY)
    assert int(node.get_attribute("aria-posinset")) == middle[0] + 1
    # Frames while it scrolls: none takes as long as it may to be seen.
    frames = page.evaluate(
        """() => new Promise((done) => {
          const times = [];
          const step = (time) => {
            times.push(time);
            scrollBy(0, 40);
            times.length < 90 ? requestAnimationFrame(step) : done(times);
          };
          requestAnimationFrame(step);
        })"""
    )
    assert np.median(np.diff(frames)) < 34


# The query.


def test_from_upload_to_click_and_back(page, photos):
    page.goto("/")
    upload(page, photos / "hats/002.png")
    query = re.search("id=(upload-[0-9a-f]+)", page.url)[1]
    found = expected(page, id=query)
    assert ids(page) == found
    status = page.locator("#status").inner_text()
    assert re.fullmatch(r"65 images searched in \d+\sms, exact", status)
    page.locator("#grid [data-id]").nth(2).click()
    first(page, found[2])
    page.go_back()
    first(page, found[0])
    assert query in page.url and ids(page) == found
    page.reload()  # as whoever is sent the link sees it
    first(page, found[0])
    page.evaluate("() => scrollTo(0, document.documentElement.scrollHeight)")
    page.locator('#grid li[aria-posinset="65"]').wait_for()


def test_a_part_is_dragged_or_chosen_with_keys(page, photos):
    page.goto("/")
    upload(page, photos / "shoes/001.png")
    whole = ids(page)
    frame = page.locator("#frame")
    frame.scroll_into_view_if_needed()
    box = frame.bounding_box()
    page.mouse.move(box["x"] + 60, box["y"] + 40)
    page.mouse.down()
    page.mouse.move(box["x"] + 160, box["y"] + 110, steps=3)
    page.mouse.up()
    page.wait_for_url("**crop=**")
    asked = dict(parse_qsl(urlsplit(page.url).query))
    until(page, lambda: ids(page) == expected(page, **asked) != whole)
    # The image has 24 x 16 pixels, as its frame.
    x, y, w, h = map(float, asked["crop"].split(","))
    assert (x, y) == pytest.approx((60 / box["width"], 40 / box["height"]), abs=0.01)
    assert (w, h) == pytest.approx((100 / box["width"], 70 / box["height"]), abs=0.01)
    page.locator("#whole").click()
    until(page, lambda: ids(page) == whole)
    assert "crop" not in page.url
    frame.focus()
    for key in ("Enter", "ArrowRight", "Shift+ArrowDown"):
        page.keyboard.press(key)
    with page.expect_response(re.compile("crop=0.29%2C0.25%2C0.5%2C0.54")):
        page.keyboard.press("Enter")
    page.locator("#part").press("Enter")  # the focus goes to what the arrows move
    until(page, lambda: page.evaluate("() => document.activeElement.id") == "frame")


def test_several_examples(page, photos):
    page.goto("/")
    upload(page, photos / "hats/002.png", photos / "shoes/003.png")
    page.wait_for_url("**/?id=upload-*%2Cupload-*")
    both = dict(parse_qsl(urlsplit(page.url).query))["id"]
    assert ids(page) == expected(page, id=both)
    assert page.locator("#examples li").count() == 2
    upload(page, photos / "shoes/005.png", input="#another")
    until(page, lambda: page.locator("#examples li").count() == 3)
    page.locator("#examples a").first.press("Enter")
    page.wait_for_url("**active=0")
    chosen = page.locator("#examples [aria-current]")
    until(page, lambda: chosen.evaluate("link => link === document.activeElement"))
    assert both.split(",")[0] in page.locator("#image").get_attribute("src")
    page.locator("#examples .remove").last.click()
    page.wait_for_url(f"**id={both.replace(',', '%2C')}")
    page.reload()
    page.locator("#grid [data-id]").first.wait_for()
    assert ids(page) == expected(page, id=both)
    another = search(page, id=both)["hits"][4]["id"]
    carry(page, "drop", ["address", f"{page.url.split('?')[0]}?id={another}"])  # a tile
    page.wait_for_url(f"**%2C{another}")
    carry(page, "paste", ["files", [f"{i}.png" for i in range(9)]])
    page.locator("#error", has_text="8 images at most").wait_for()


def test_images_are_dropped_and_pasted_and_addresses_refused(page):
    for kind in ("drop", "paste"):
        page.goto("/")
        carry(page, kind, ["files", ["a.png"]])
        page.locator("#grid .alike").first.wait_for()
        assert page.locator("#grid .alike").first.inner_text() == "1.000"
        carry(page, kind, ["address", ADDRESS])
        page.locator("#error", has_text="Addresses are not fetched").wait_for()
    page.goto("/")
    carry(page, "drop", ["files", ["a.png", "b.png"]])  # of the same content
    page.wait_for_url("**/?id=upload-*")
    page.goto("/")
    carry(page, "paste", ["address", "no address"])
    page.locator("#error", has_text="That is no image").wait_for()


# The file.


def test_an_image_is_looked_at(page, photos):
    page.goto("/?order=folder&folder=shoes/red")
    page.locator("#grid [data-id]").first.focus()
    page.keyboard.press("v")
    page.locator("#viewname", has_text="0.png").wait_for()
    assert "16 × 24" in page.locator("#facts").inner_text()
    page.keyboard.press("ArrowRight")
    page.locator("#viewname", has_text="1.png").wait_for()
    shown = dict(parse_qsl(urlsplit(page.url).query))["view"]
    page.reload()
    page.locator("#viewname", has_text="1.png").wait_for()
    assert page.locator("#next").is_enabled()
    for _ in range(3):
        page.keyboard.press("+")
    zoomed = page.locator("#right .sheet").bounding_box()["width"]
    assert zoomed > 3 * page.locator("#right .pane").bounding_box()["width"]
    page.keyboard.press("Escape")
    page.wait_for_url(lambda url: "view" not in url)
    page.locator("#view").wait_for(state="hidden")
    until(page, lambda: page.evaluate("() => document.activeElement.dataset.id") == shown)
    page.keyboard.press("v")
    page.locator("#viewname", has_text="1.png").wait_for()
    with page.expect_download() as download:
        page.locator("#save").click()
    assert download.value.suggested_filename == "1.png"
    assert Path(download.value.path()).read_bytes() == (photos / "shoes/red/1.png").read_bytes()
    with page.context.expect_page() as other:
        page.locator("#open").click()
    assert urlsplit(other.value.url).path == f"/original/{shown}"
    # Beside the query; from there it becomes the query, or a part of it.
    page.goto(f"/?id={shown}")
    page.locator("#grid li").nth(1).hover()
    page.locator("#grid .look").nth(1).click()
    page.locator("#left").wait_for()
    page.locator("#facts", has_text="similarity 0.").wait_for()
    second = dict(parse_qsl(urlsplit(page.url).query))["view"]
    page.locator("#adding").click()
    page.wait_for_url(f"**id={shown}%2C{second}")
    page.locator("#view").wait_for(state="hidden")


def test_from_outside_files_are_not_offered(opened, photos):
    token = "a token of somebody"
    index = Index.open(str(photos.parent / "index"), stand_in())
    with served(index, token=token) as url:
        page = opened(url, extra_http_headers={"Authorization": f"Bearer {token}"})
        page.goto("/")
        page.locator("#grid .look").first.wait_for(state="attached")
        assert page.locator("#update").is_hidden()
        page.locator("#grid li").first.hover()
        page.locator("#grid .look").first.click()
        page.locator("#facts", has_text="kB").wait_for()
        assert page.locator("#save").is_hidden() and page.locator("#copy").is_hidden()
        assert str(photos) not in page.content()
        page.goto("/?near=0.9")
        page.locator(".group").first.wait_for()
        assert page.locator("[data-export]:visible").count() == 0


# Filters.


def test_filters_combine_and_are_in_the_link(page):
    page.goto("/")
    page.locator("#filter").click()
    page.locator("[name=label]").fill("shoes")
    page.keyboard.press("Enter")
    page.locator("#status", has_text="34 images").wait_for()
    page.locator("[name=orientation]").select_option("portrait")
    page.locator("#status", has_text="3 images").wait_for()
    assert page.locator("#filter").inner_text() == "Filters (2)"
    page.locator("#grid [data-id]").first.click()
    page.locator("#status", has_text="3 images searched").wait_for()
    page.locator("[name=others]").check()
    page.locator("#status", has_text="2 images searched").wait_for()
    assert "others=true" in page.url and "orientation=portrait" in page.url
    page.reload()
    page.locator("#status", has_text="2 images searched").wait_for()
    assert page.locator("[name=label]").input_value() == "shoes"
    page.locator("[name=after]").fill("2999-01-01")
    page.locator("#status", has_text="No image fits these filters.").wait_for()
    page.locator("#status a").click()
    page.locator("#status", has_text="65 images searched").wait_for()
    least = search(page, **dict(parse_qsl(urlsplit(page.url).query)))["hits"][3]["similarity"]
    page.locator("[name=similarity]").fill(f"{least - 0.001:.3f}")
    page.locator("[name=similarity]").press("Enter")
    until(page, lambda: page.locator("#grid li").count() == 4)


# Near-duplicates.


def test_duplicates_are_grouped_and_exported(page, photos, tmp_path):
    page.goto("/")
    page.locator("#near").click()
    page.locator("#status", has_text="group").wait_for()
    page.locator(".tools input").fill("0.99")
    page.locator(".tools input").press("Enter")
    page.wait_for_url("**near=0.99")
    group = page.locator(".group", has_text="larger.png")
    best = group.locator("li").first.filter(has_text="larger.png").filter(has_text="Best copy")
    until(page, lambda: best.is_visible() and page.locator(".busy").count() == 0)
    chosen = page.locator(".group input:checked").count()
    assert page.locator("#chosen").inner_text().startswith(f"{chosen} image")
    saved = {}
    for text in ("Save as CSV", "Save paths", "Save a script"):
        with page.expect_download() as download:
            page.locator("[data-export]", has_text=text).click()
        saved[text] = Path(download.value.path()).read_text("utf-8")
    paths = saved["Save paths"].splitlines()
    assert len(paths) == chosen and str(photos / "shoes/001.png") in paths
    assert saved["Save as CSV"].startswith("group,chosen,best,path,")
    group.locator(".picture").nth(1).click()
    page.locator("#left figcaption", has_text="Best copy: larger.png").wait_for()


def test_the_script_moves_files_of_any_name(opened, tmp_path):
    odd = ["it's.png", '$(touch x) "y" `z`.png', "-n.png", "a\nb.png", "ü \\ %.png"]
    for i, name in enumerate(["original.png", *odd]):
        photograph(tmp_path / f"photos/{i}" / name, 1, (48, 32) if i == 0 else (24, 16))
    index = Index.create(tmp_path / "index", stand_in())
    index.add(sorted((tmp_path / "photos").rglob("*.png")))
    with served(index) as url:
        page = opened(url)
        page.goto("/?near=0.99")
        with page.expect_download() as download:
            page.locator("[data-export=sh]").click()
        script = Path(download.value.path())
        subprocess.run(["sh", str(script), "moved"], cwd=tmp_path, check=True)
    assert sorted(file.name[6:] for file in (tmp_path / "moved").iterdir()) == sorted(odd)
    left = [file.name for file in (tmp_path / "photos").rglob("*.png")]
    assert left == ["original.png"] and not (tmp_path / "x").exists()


# What is said, and what is come back to.


def test_progress_is_shown_while_one_waits(page, photos):
    page.goto("/")
    page.locator("#grid [data-id]").first.wait_for()

    held = []
    page.route("**/search**", lambda route: held.append(route))
    page.set_input_files("#file", photos / "hats/002.png")
    page.locator("#progress").wait_for()
    seen = page.evaluate("() => getComputedStyle(document.getElementById('progress')).animation")
    assert "0.08s" in seen  # after which it is to be seen
    assert page.locator("#image").get_attribute("src").startswith("blob:")
    until(page, lambda: held)
    held[0].continue_()
    page.locator("#grid .alike").first.wait_for()
    assert page.locator("#progress").is_hidden()


def test_back_returns_to_the_same_place(opened, large):
    page = opened(large)
    page.goto("/")
    page.locator("#grid [data-id]").first.wait_for()
    page.evaluate("() => scrollTo(0, 40_000)")
    page.locator("#grid [data-id]").first.wait_for()
    page.wait_for_load_state("networkidle")
    before, asked = ids(page), []
    focused = before[len(before) // 2]
    page.locator(f'#grid a[data-id="{focused}"]').focus()
    top = page.evaluate("() => scrollY")
    page.keyboard.press("Enter")
    first(page, focused)
    assert page.evaluate("() => scrollY") == 0
    assert page.evaluate("() => document.activeElement.dataset.id") == focused  # the first hit
    page.on("request", lambda request: "/collection" in request.url and asked.append(request.url))
    page.go_back()
    until(page, lambda: page.evaluate("() => scrollY") == top)
    until(page, lambda: ids(page) == before)
    assert not asked
    page.reload()
    until(page, lambda: page.evaluate("() => scrollY") == top)


def test_what_was_left_before_it_came_is_asked_for_again(page):
    page.goto("/")
    held = []
    page.route("**/search**", lambda route: held.append(route))
    page.locator("#grid [data-id]").first.click()
    until(page, lambda: held)
    page.go_back()
    page.locator("#status", has_text="65 images").wait_for()
    page.unroute("**/search**")
    page.go_forward()
    page.locator("#status", has_text="searched in").wait_for()
    page.locator("#grid .alike").first.wait_for()


def test_what_is_wrong_is_said(page, tmp_path, photos):
    page.goto("/")
    (tmp_path / "a.jpg").write_bytes(b"<html>")
    page.set_input_files("#file", tmp_path / "a.jpg")
    page.locator("#error", has_text="not an image that can be read").wait_for()
    upload(page, photos / "hats/000.png")
    assert page.locator("#error").is_hidden()
    page.goto("/?id=none")
    page.locator("#error", has_text="This link is stale. The index has no such image.").wait_for()
    page.goto(f"/?id=upload-{'0' * 32}")
    page.locator("#error", has_text="This link is stale. This upload is no longer kept").wait_for()
    page.goto("/?orientation=sideways")
    page.locator("#error", has_text="Input should be").wait_for()


def test_the_index_is_brought_up_to_date_from_the_page(opened, tmp_path):
    photos = folder_of_photographs(tmp_path / "photos", 4)
    address = str(tmp_path / "index")
    update(address, [photos], stand_in())
    with served(Index.open(address, stand_in())) as url:
        page = opened(url)
        page.goto("/")
        page.locator("#size", has_text="4 images").wait_for()
        photograph(photos / "new.png", 50)
        page.locator("#update").click()
        page.locator("#status", has_text="1 images added").wait_for()
        page.locator("#size", has_text="5 images").wait_for()
        until(page, lambda: page.locator("#grid li").count() == 5)


# Fingers, widths, everybody.


def test_fingers_scroll_and_a_part_is_a_mode(opened, url, photos):
    page = opened(url, 390, 844, has_touch=True, is_mobile=True)
    page.goto("/")
    upload(page, photos / "hats/000.png")
    assert page.evaluate("() => document.documentElement.scrollWidth") <= 390
    assert page.locator("#grid li").first.bounding_box()["y"] < 500  # above the fold
    tools = page.context.new_cdp_session(page)

    def swipe(x, y, dx, dy):
        send = lambda kind, *points: tools.send(
            "Input.dispatchTouchEvent", {"type": kind, "touchPoints": list(points)}
        )
        send("touchStart", {"x": x, "y": y})
        for i in range(1, 11):
            send("touchMove", {"x": x + dx * i / 10, "y": y + dy * i / 10})
        send("touchEnd")

    frame = page.locator("#frame").bounding_box()
    swipe(frame["x"] + 50, frame["y"] + 90, 0, -200)
    until(page, lambda: page.evaluate("() => scrollY") > 50)
    assert "crop" not in page.url
    page.evaluate("() => scrollTo(0, 0)")
    page.locator("#part").tap()
    handle = page.locator("#box i").last
    assert handle.bounding_box()["width"] == handle.bounding_box()["height"] == 44
    corner, top = handle.bounding_box(), page.evaluate("() => scrollY")
    swipe(corner["x"] + 22, corner["y"] + 22, -40, -30)
    assert page.evaluate("() => scrollY") == top
    page.wait_for_timeout(500)  # Chromium takes a tap that follows a swipe at once for its end
    page.locator("#done").tap()
    page.wait_for_url("**crop=0.25*")
    page.locator("#part").tap()
    page.locator("#cancel").tap()
    assert page.locator("#part").is_visible() and page.locator("#cancel").is_hidden()


@pytest.mark.parametrize("width", [320, 600, 2200])  # 600: 1,200 at 200 %
def test_at_any_width(opened, url, width):
    page = opened(url, width, 700)
    page.goto("/?view=")
    page.locator("#grid [data-id]").first.wait_for()
    assert page.evaluate("() => document.documentElement.scrollWidth") <= width
    page.locator("#filter").click()
    for control in page.locator("#filters :is(input, select):visible").all():
        box = control.bounding_box()
        assert box["x"] >= 0 and box["x"] + box["width"] <= width - 16
    boxes = [node.bounding_box() for node in page.locator("#grid li").all()[:12]]
    assert len({round(box["width"]) for box in boxes}) == 1
    left = page.locator("#heading").bounding_box()["x"]
    assert min(box["x"] for box in boxes) == pytest.approx(left, abs=1)


def test_arrows_titles_and_names(page, photos):
    page.goto("/?order=folder")
    page.locator("#grid [data-id]").first.wait_for()
    page.keyboard.press("Tab")
    assert page.evaluate("() => document.activeElement.className") == "skip"
    page.keyboard.press("Enter")
    place = lambda: page.evaluate("() => document.activeElement.closest('li')?.ariaPosInSet")
    until(page, lambda: place() == "1")
    for key, at in (("ArrowRight", "2"), ("End", "65"), ("Home", "1"), ("ArrowLeft", "1")):
        page.keyboard.press(key)
        until(page, lambda at=at: place() == at)
    page.keyboard.press("ArrowDown")
    until(page, lambda: int(place()) > 3)
    assert page.locator("#grid a[tabindex='0']").count() == 1
    assert page.locator("h1").count() == 1
    names = page.locator("#grid img").evaluate_all("images => images.map(image => image.alt)")
    assert len(set(names)) == len(names) and "002.png" in names
    titles = {page.title()}
    for where in ("/?folder=hats", "/?near=0.9", f"/?id={ids(page)[0]}"):
        page.goto(where)
        until(page, lambda: page.title() not in titles)
        titles.add(page.title())
    until(page, lambda: page.title().startswith("Like "))


def test_dark_where_the_system_is(page):
    grounds = []
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme)
        page.goto("/")
        grounds.append(page.evaluate("() => getComputedStyle(document.body).backgroundColor"))
    assert grounds == ["rgb(255, 255, 255)", "rgb(22, 24, 27)"]


@pytest.fixture(scope="module")
def axe(tmp_path_factory):
    """The checks of https://github.com/dequelabs/axe-core, for which npm is asked."""
    folder = tmp_path_factory.mktemp("axe")
    try:
        command = ["npm", "pack", "--silent", "axe-core@4"]
        subprocess.run(command, cwd=folder, check=True, capture_output=True, timeout=60)
    except (OSError, subprocess.SubprocessError):
        pytest.skip("axe-core cannot be had from npm")
    with tarfile.open(next(folder.glob("*.tgz"))) as archive:
        return archive.extractfile("package/axe.min.js").read().decode()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("where", ["collection", "results", "duplicates", "view"])
def test_everybody_can_use_it(page, axe, scheme, where, photos):
    page.emulate_media(color_scheme=scheme)
    page.goto("/?near=0.99" if where == "duplicates" else "/")
    if where == "results":
        upload(page, photos / "hats/000.png", photos / "hats/002.png")
    elif where == "view":
        page.locator("#grid li").first.hover()
        page.locator("#grid .look").first.click()
        page.locator("#facts", has_text="kB").wait_for()
    else:
        page.locator(".group" if where == "duplicates" else "#grid [data-id]").first.wait_for()
    if where != "view":
        page.locator("#filter").click()
    found = page.evaluate(axe + "; axe.run().then((found) => found.violations)")
    assert not [(one["id"], one["nodes"][0]["html"]) for one in found]


def test_the_api_is_shown_without_anything_from_elsewhere(page):
    pytest.importorskip("fastapi_offline", reason="fastapi-offline is not installed")
    page.goto("/api.html")
    page.locator(".opblock", has_text="/search").first.click()
    page.locator(".parameters", has_text="the least").first.wait_for()
    shown = page.locator(".opblock").count()
    assert shown == sum(map(len, page.request.get("/openapi.json").json()["paths"].values()))


def test_browsers_without_the_navigation_api_load_the_page_anew(page, photos):
    page.add_init_script("Object.defineProperty(window, 'navigation', { value: undefined })")
    page.goto("/")
    page.locator("#grid [data-id]").first.click()
    page.locator("#status", has_text="searched in").wait_for()
    upload(page, photos / "hats/002.png")
    page.locator("#grid li").nth(1).hover()
    page.locator("#grid .look").nth(1).click()
    page.locator("#facts", has_text="kB").wait_for()
    page.keyboard.press("Escape")
    page.wait_for_url(re.compile("id=upload-[0-9a-f]+$"))


def test_why_alike_is_shown_and_survives_a_reload(opened, tmp_path):
    network = networks.open_network(write_network(tmp_path / "network"))
    index = Index.create(tmp_path / "index", network)
    index.add(sorted(folder_of_photographs(tmp_path / "photos", 4).rglob("*.png")))
    with served(index) as url:
        page = opened(url)
        page.goto("/")
        page.locator("#grid [data-id]").first.click()
        page.locator("#why").click()
        page.locator("#legend").wait_for()
        until(page, lambda: "why=1" in page.locator("#grid .look").first.get_attribute("href"))
        page.set_default_timeout(60_000)
        page.locator("#grid canvas").nth(3).wait_for()
        page.reload()
        page.locator("#grid canvas").nth(3).wait_for()
        assert "why=1" in page.url and page.locator("#heat").is_checked()
        painted = """canvas => canvas.getContext("2d").getImageData(0, 0, canvas.width,
          canvas.height).data.some((value) => value)"""
        until(page, lambda: page.locator("#queryheat").evaluate(painted))
        page.locator("#grid li").nth(1).hover()
        page.locator("#grid .look").nth(1).click()
        until(page, lambda: page.locator("#left canvas").evaluate(painted))
        until(page, lambda: page.locator("#right canvas").evaluate(painted))
        page.locator("#viewwhy").click()
        page.locator("#right canvas").wait_for(state="hidden")
        assert "why" not in page.url
        page.close()  # before the server, which it asks on


def test_the_film_and_the_pictures_of_the_docs_are_made(browser, photos, tmp_path):
    page, query = Path(__file__).parents[1] / "benchmarks/page.py", photos / "hats/002.png"
    command = [page, f"--images={photos}", f"--query={query}", f"--out={tmp_path}"]
    subprocess.run([sys.executable, *command], check=True)
    film, seconds = tmp_path / "serving.webp", 0
    for frame in ImageSequence.Iterator(Image.open(film)):
        frame.load()
        seconds += frame.info["duration"] / 1000
    assert 9 < seconds < 11 and film.stat().st_size < 1e6
    sizes = {
        name: Image.open(tmp_path / name).size for name in ("serving.png", "serving_phone.png")
    }
    assert sizes == {"serving.png": (1400, 900), "serving_phone.png": (390, 844)}
