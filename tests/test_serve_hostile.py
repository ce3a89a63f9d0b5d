"""Clients that are silent, slow, greedy or gone, over real sockets of this machine."""

import asyncio
import contextlib
import io
import logging
import socket
import struct
import sys
import threading
import time
from pathlib import Path

import pytest
from PIL import Image

pytest.importorskip("lancedb", reason="lancedb is not installed")
pytest.importorskip("uvicorn", reason="uvicorn is not installed")
testclient = pytest.importorskip("fastapi.testclient", reason="fastapi or httpx2 is not installed")

from PIL.PngImagePlugin import PngImageFile  # noqa: E402

from cgd_jax.data import decode as decoding  # noqa: E402
from cgd_jax.runtime.threads import CORES, Budget  # noqa: E402
from cgd_jax.search import Index  # noqa: E402
from cgd_jax.serve import connections, service, uploads  # noqa: E402
from cgd_jax.serve.app import create_app  # noqa: E402
from cgd_jax.serve.command import listen  # noqa: E402
from tests.search_samples import folder_of_photographs, stand_in  # noqa: E402
from tests.test_data_decode import encoded, picture  # noqa: E402

ROOT = Path(__file__).parents[1]
HEAD = b"HTTP/1.1\r\nHost: localhost\r\n"
TOKEN = "a token of somebody"


@pytest.fixture(scope="module")
def index(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hostile")
    index = Index.create(folder / "index", stand_in())
    index.add(sorted(folder_of_photographs(folder / "photos", 4).rglob("*.png")))
    return index


@contextlib.contextmanager
def serving(application):
    """Yields the port of a server, and its connections."""
    with listen("127.0.0.1", 0) as listener:
        server = connections.server_of(application)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        while not server.started:
            time.sleep(0.01)
        try:
            yield listener.getsockname()[1], server.server_state.connections
        finally:
            server.should_exit = server.force_exit = True
            thread.join()


@pytest.fixture
def opened():
    """Opens sockets, which are closed at the end."""
    with contextlib.ExitStack() as stack:

        def open_socket(port, sent=b"", source="127.0.0.1"):
            client = socket.create_connection(("127.0.0.1", port), 10, (source, 0))
            stack.enter_context(client)
            client.sendall(sent)
            return client

        yield open_socket


def status_of(client):
    """Reads the beginning of an answer; 0 if there is none."""
    try:
        head = client.recv(65536)
    except ConnectionError:
        return 0
    return int(head.split()[1]) if head else 0


def post(data, length=None):
    length = len(data) if length is None else length
    return b"POST /search " + HEAD + f"Content-Length: {length}\r\n\r\n".encode() + data


def wait_until(condition, seconds=10):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def is_closed(client):
    client.setblocking(False)
    try:
        while client.recv(65536):
            pass
    except BlockingIOError:
        return False
    except ConnectionError:
        pass
    return True


@pytest.mark.parametrize(
    "sent",
    [b"", b"GET / " + HEAD, post(b"x", 1000), post(b"x", 1000).replace(b"/search", b"/about")],
    ids=["silence", "half a head", "a byte of a body", "a body that nobody wants"],
)
@pytest.mark.parametrize("token", [None, TOKEN])
def test_any_number_of_silent_clients_keep_nobody_out(index, opened, sent, token):
    with serving(create_app(index, token=token)) as (port, known):
        crowd = [opened(port, sent) for _ in range(270)]
        bearer = f"Authorization: Bearer {token}\r\n\r\n".encode()
        honest = opened(port, b"GET /about " + HEAD + bearer)
        assert status_of(honest) == 200
        request = post(picture()).replace(HEAD, HEAD + bearer[:-2])
        assert status_of(opened(port, request)) == 200
        assert len(known) <= connections.MOST_OF_ADDRESS
        del crowd


@pytest.mark.parametrize("before", [b"", b"GET /about " + HEAD + b"\r\n", post(b"", 10**9)])
@pytest.mark.parametrize("piece", [b"", b"G"])
def test_the_head_of_a_request_must_come_in_time(index, opened, monkeypatch, before, piece):
    """Of the first, of one after another, and after one whose body was refused."""
    monkeypatch.setattr(connections, "SLOWEST", 0.2)
    with serving(create_app(index)) as (port, _):
        client = opened(port, before)
        begin = time.monotonic()
        while not is_closed(client):
            assert time.monotonic() < begin + 3
            with contextlib.suppress(ConnectionError):
                client.send(piece)
            time.sleep(0.02)


def test_a_body_must_come_in_time_and_is_answered(index, opened, monkeypatch):
    monkeypatch.setattr(uploads, "PATIENCE", 0.2)
    with serving(create_app(index)) as (port, _):
        assert status_of(opened(port, post(b"x", 1000))) == 408


@pytest.mark.skipif(sys.platform != "linux", reason="127.0.0.2 is of this machine on Linux")
def test_one_address_takes_no_place_of_another(index, opened, monkeypatch):
    monkeypatch.setattr(connections, "MOST_OF_ADDRESS", 4)
    with serving(create_app(index)) as (port, known):
        other = opened(port, source="127.0.0.2")
        mine = [opened(port) for _ in range(10)]
        wait_until(lambda: [is_closed(client) for client in mine] == [True] * 6 + [False] * 4)
        assert len(known) == 5
        other.sendall(b"GET /about " + HEAD + b"\r\n")
        assert status_of(other) == 200


def test_many_addresses_take_no_more_than_all_places(index, opened, monkeypatch):
    monkeypatch.setattr(connections, "MOST", 4)
    with serving(create_app(index)) as (port, known):
        crowd = [opened(port) for _ in range(10)]
        wait_until(lambda: [is_closed(client) for client in crowd] == [True] * 6 + [False] * 4)
        assert len(known) == 4


def test_a_request_that_is_answered_is_not_cut_off(index, opened, monkeypatch):
    """A place is taken from those that wait for their clients, whoever came first."""
    monkeypatch.setattr(connections, "MOST", 2)
    go_on, embed = threading.Event(), index.embed_pixels
    monkeypatch.setattr(index, "embed_pixels", lambda pixels: go_on.wait(10) and embed(pixels))
    with serving(create_app(index)) as (port, known):
        busy = [opened(port, post(picture(i))) for i in range(2)]
        wait_until(lambda: len(known) == 2 and not any(one.waiting() for one in set(known)))
        assert status_of(opened(port, b"GET /about " + HEAD + b"\r\n")) == 0
        go_on.set()
        assert [status_of(client) for client in busy] == [200, 200]


@pytest.mark.parametrize("how", ["does not read", "leaves", "resets"])
def test_work_ends_with_its_client(opened, monkeypatch, how):
    monkeypatch.setattr(connections, "SLOWEST", 0.2)
    begun, ended = threading.Event(), threading.Event()

    async def application(scope, receive, send):
        try:
            await send({"type": "http.response.start", "status": 200, "headers": []})
            while True:
                await send({"type": "http.response.body", "body": bytes(65536), "more_body": True})
                begun.set()
                await asyncio.sleep(0)  # else nothing else runs once the client has gone
        finally:
            ended.set()

    with serving(application) as (port, _):
        client = opened(port, b"GET / " + HEAD + b"\r\n")
        assert begun.wait(10)
        if how == "resets":
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        if how != "does not read":
            client.close()
        assert ended.wait(10)


def test_what_waits_for_a_client_that_has_left_is_never_begun(index, opened, monkeypatch):
    go_on, decoded = threading.Event(), []

    def slow(self, *args):
        decoded.append(args)
        assert go_on.wait(10)
        return pixels(self, *args)

    pixels = service.Service.pixels
    monkeypatch.setattr(service.Service, "pixels", slow)
    with serving(create_app(index)) as (port, known):
        crowd = [opened(port, post(picture(i))) for i in range(CORES + 5)]
        wait_until(lambda: len(decoded) == CORES)
        wait_until(lambda: not any(one.waiting() for one in set(known)))
        for client in crowd:
            client.close()
        wait_until(lambda: not known)
        go_on.set()
        time.sleep(0.2)
    assert len(decoded) == CORES


def test_what_takes_long_to_decode_keeps_nobody_waiting(index, opened, monkeypatch):
    """Large ones and those of many scans, one at a time; others go by, and find room."""
    monkeypatch.setattr(service, "QUICK", 10_000)
    monkeypatch.setattr(service, "CAPACITY", 2)
    go_on, waiting, peak = threading.Event(), [], [0]

    def slow(data, size, box):
        if decoding.effort(data) > 10_000:
            waiting.append(data)
            peak[0] = max(peak[0], len(waiting))
            assert go_on.wait(10)
            waiting.remove(data)
        return cut(data, size, box)

    cut = service.cut
    monkeypatch.setattr(service, "cut", slow)
    jpeg = progressive(12)
    width, height = Image.open(io.BytesIO(jpeg)).size
    assert decoding.effort(jpeg) == width * height * 12 // 8
    expensive = [picture(i, 200, 100, "PNG") for i in range(CORES + 2)]
    with serving(create_app(index)) as (port, _):
        crowd = [opened(port, post(expensive[0]))]
        wait_until(lambda: waiting)
        for data in expensive[1:]:
            crowd.append(opened(port, post(data)))
            time.sleep(0.1)
        assert [status_of(opened(port, post(picture(i)))) for i in range(5)] == [200] * 5
        assert status_of(opened(port, post(picture(9, 300, 200, "JPEG")))) == 200
        go_on.set()
        assert [status_of(client) for client in crowd] == [200] * len(crowd)
    assert peak[0] == 1


def test_who_reads_slowly_gets_the_whole_answer(opened, monkeypatch):
    monkeypatch.setattr(connections, "SLOWEST", 0.3)
    size, got = 8_000_000, 0

    async def application(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": bytes(size)})

    with serving(application) as (port, _):
        client = opened(port, b"GET / " + HEAD + b"\r\n")
        while got < size:
            time.sleep(0.01)
            piece = client.recv(100_000)
            assert piece, got
            got += len(piece)


@pytest.mark.parametrize("reset", [False, True])
def test_uploads_that_break_off_print_nothing(index, opened, caplog, capfd, reset):
    with serving(create_app(index)) as (port, known), caplog.at_level(logging.DEBUG, "uvicorn"):
        for sent in (post(b"", 1000), post(b"x" * 500, 1000), post(picture()), b"\0\n\n", b"GET"):
            client = opened(port, sent)
            if reset:
                client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            client.close()
        wait_until(lambda: not known)
    errors = [record for record in caplog.records if record.levelno >= logging.ERROR]
    assert not errors and "Traceback" not in capfd.readouterr().err


def test_bodies_share_some_memory(index, opened, monkeypatch):
    monkeypatch.setattr(uploads, "ARRIVING_BYTES", 100_000)
    application = create_app(index)
    arriving = application.state.service.uploads._arriving
    with serving(application) as (port, _):
        held = opened(port, post(bytes(40_000), 50_000))
        wait_until(lambda: arriving.total() == 40_000)
        assert status_of(opened(port, post(bytes(20_000)))) == 503  # half is for one address
        assert status_of(opened(port, post(picture()))) == 200
        if sys.platform == "linux":
            other = opened(port, post(bytes(45_000), 50_000), "127.0.0.2")
            wait_until(lambda: arriving.total() == 85_000)
            assert status_of(opened(port, post(bytes(16_000)), "127.0.0.3")) == 503
            other.close()
        held.close()
        wait_until(lambda: not application.state.service.uploads._arriving)
        assert status_of(opened(port, post(picture()))) == 200


def progressive(scans, side=64):
    """Returns a JPEG whose last scan is there again and again."""
    data = encoded(Image.new("RGB", (side, side), (120, 130, 90)), "JPEG", progressive=True)
    last = data.rindex(b"\xff\xda")
    usual = data.count(b"\xff\xda")
    return data[:last] + data[last:-2] * (scans - usual + 1) + data[-2:]


def upload(index, data):
    client = testclient.TestClient(create_app(index), base_url="http://localhost")
    return client.post("/search", content=data)


def test_a_jpeg_of_too_many_scans_is_refused(index, monkeypatch):
    for scans, status in ((10, 200), (100, 200), (101, 413), (5000, 413)):
        answer = upload(index, progressive(scans))
        assert answer.status_code == status, scans
        assert status == 200 or f"{scans} scans" in answer.text
    # The larger the image, the fewer; but one scan is always allowed.
    monkeypatch.setattr(decoding, "SCANNED_PIXELS", 64 * 64 * 12)
    assert upload(index, progressive(12)).status_code == 200
    assert upload(index, progressive(13)).status_code == 413
    monkeypatch.setattr(decoding, "SCANNED_PIXELS", 10)
    assert upload(index, picture()).status_code == 200


def test_an_upload_is_decoded_once(index, monkeypatch):
    """And its header is read without decoding it."""
    loads = []
    prepare = PngImageFile.load_prepare
    monkeypatch.setattr(PngImageFile, "load_prepare", lambda self: loads.append(1) or prepare(self))
    data = picture(1, 60, 40, "PNG")
    assert upload(index, data).status_code == 200
    assert len(loads) == 1


def test_images_that_are_decoded_at_a_time_share_some_memory():
    budget, lock, held, peak, order = Budget(100), threading.Lock(), [0], [0], []

    def work(size):
        with budget.holding(size):
            with lock:
                order.append(size)
                held[0] += size
                peak[0] = max(peak[0], held[0])
            time.sleep(0.01)
            with lock:
                held[0] -= size

    threads = [threading.Thread(target=work, args=(size,)) for size in [60, 100] + [40] * 10]
    for thread in threads:
        thread.start()
        time.sleep(0.001)
    for thread in threads:
        thread.join(10)
    assert peak[0] == 100 and budget.free == 100 and len(order) == 12
    assert order.index(100) <= 2  # small ones did not overtake it
