"""Measures the page's server: queries by file, and eight clients at once.

    python benchmarks/serving.py                        # 100,000 x 512, a minute, 8 clients
    python benchmarks/serving.py --filtered             # by folder, shape, date and size
    python benchmarks/serving.py --count=1000 --seconds=5
    python benchmarks/serving.py --hostile=11 --clients=21 --seconds=600     # a soak

Hostile clients are silent, send a byte now and then, send what is expensive to decode, or leave
before the answer; the others first ask without them, so that both medians stand side by side.

The server is the real one in a process of its own, with a network of the size of the packaged one
(EfficientNet-Lite0 with G, whitened to the dimension) and an index of synthetic vectors. Latency is
what a client waits, from sending an image of 500 x 375 pixels to the last byte of the answer.
"""

import argparse
import contextlib
import http.client
import io
import os
import re
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
FILTERS = ""  # of the queries
COMBINED = "folder=07&orientation=portrait&after=2021-01-01&pixels=2000&others=true"
sys.path.insert(0, str(ROOT))


def make_index(address: str, count: int, dimension: int) -> None:
    """Fills an index of the packaged network with clusters of unit vectors."""
    from cgd_jax.network import open_network
    from cgd_jax.search import Index, Record

    rng = np.random.default_rng(0)
    network = open_network()
    basis = np.linalg.qr(rng.standard_normal((network.dimension, dimension)))[0]
    whitening = np.zeros(network.dimension, np.float32), basis.astype(np.float32)
    index = Index.create(address, network, whitening=whitening)
    centers = rng.standard_normal((1000, dimension), np.float32)
    thumbnails = [draw(i, (192, 144)) for i in range(64)]
    for at in range(0, count, 10_000):
        size = min(10_000, count - at)
        vectors = centers[rng.integers(1000, size=size)]
        vectors += 0.7 * rng.standard_normal((size, dimension), np.float32)
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
        records = [
            Record(
                id=f"{i:020x}",
                path=f"/photos/{i % 40:02}/{i // 1000:03}/{i:06}.jpg",
                label=f"label {i % 40}",
                size=100_000,
                hash=f"{i:032x}",
                width=(4000, 3000)[i % 2],
                height=(3000, 4000)[i % 2],
                modified=(1_600_000_000 + 1000 * i) * 10**9,
                thumbnail=thumbnails[i % 64],
            )
            for i in range(at, at + size)
        ]
        index.write(records, vectors)
    index.store.finish()


def rows(address: str) -> int:
    """Reads an index to its end; returns how many images it has."""
    from cgd_jax.search import Index

    return len(Index.open(address).vectors()[0])


def draw(seed: int, size: tuple[int, int] = (500, 375)) -> bytes:
    """Draws a JPEG with as much detail as a photo has."""
    import cv2

    noise = np.random.default_rng(seed).integers(0, 256, (47, 63, 3), np.uint8)
    image = cv2.resize(noise, size, interpolation=cv2.INTER_CUBIC)
    return cv2.imencode(".jpg", image)[1].tobytes()


def ask(connection: http.client.HTTPConnection, image: bytes) -> tuple[int, float]:
    """Searches by an image; returns the status, and ms."""
    begin = time.perf_counter()
    path = f"/search?k=20{'&' * bool(FILTERS)}{FILTERS}"
    connection.request("POST", path, image, {"Content-Type": "image/jpeg"})
    answer = connection.getresponse()
    answer.read()
    return answer.status, 1e3 * (time.perf_counter() - begin)


@cache
def bomb(number: int) -> bytes:
    """Returns a small file that is expensive: many pixels, or many scans."""
    buffer = io.BytesIO()
    if number % 2:
        Image.new("RGBA", (5000, 5000)).save(buffer, "PNG")
        return buffer.getvalue()
    Image.new("RGB", (3000, 3000)).save(buffer, "JPEG", progressive=True)
    data = buffer.getvalue()
    return data[:-2] + data[data.rindex(b"\xff\xda") : -2] * (10 * number) + data[-2:]


def harass(address: str, number: int, end: float) -> None:
    """Is a bad client until a time: silent, slow, expensive, or gone before the answer."""
    host, port = address.split(":")
    role = ("silent", "slow", "bombs", "aborts")[number % 4]
    while time.monotonic() < end:
        number += 1
        data = bomb(number % 12) if role == "bombs" else draw(number)
        data += f"{number}".encode()
        head = f"POST /search HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(data)}\r\n\r\n"
        try:
            with socket.create_connection((host, int(port)), 10) as connection:
                connection.settimeout(max(end - time.monotonic(), 0.01))
                request = head.encode() + data
                if role == "slow":
                    for at in range(len(request)):
                        connection.sendall(request[at : at + 1])
                        time.sleep(0.2)
                        if time.monotonic() > end:
                            return
                elif role != "silent":
                    connection.sendall(request)
                if role == "aborts":  # at any point of its answer
                    time.sleep(number % 10 / 50)
                    reset = struct.pack("ii", 1, 0)
                    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, reset)
                else:
                    connection.recv(1000)
        except OSError:  # it was put out
            pass


def resident(pid: int) -> float:
    """Returns the memory of a process, in MB; of Linux."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def processor_time(pid: int) -> float:
    """Returns the seconds that all threads of a process have computed; of Linux."""
    user, system = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:13]
    return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")


def summary(times: list[float]) -> str:
    median, slow = np.percentile(times, [50, 99])
    return f"{len(times):,} queries, median {median:.0f} ms, 99th percentile {slow:.0f} ms"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=100_000, help="vectors")
    parser.add_argument("--dimension", type=int, default=512)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--hostile", type=int, default=0, help="clients beside them")
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--filtered", action="store_true", help="searches a part of the images")
    given = parser.parse_args()
    global FILTERS
    FILTERS = COMBINED if given.filtered else ""
    with tempfile.TemporaryDirectory() as scratch:
        address = str(Path(scratch, "index"))
        make_index(address, given.count, given.dimension)
        with started(address) as (where, pid):
            measure(where, pid, given.clients, given.hostile, given.seconds)
        print(f"killed (SIGKILL): {rows(address):,} of {given.count:,} images are there")


@contextlib.contextmanager
def started(address: str, images: Path | None = None) -> Iterator[tuple[str, int]]:
    """Serves an index, after images were put into it; yields host and port, and the process."""
    command = [sys.executable, str(ROOT / "main.py"), "--mode=serve", f"--index={address}"]
    command += ["--port=0", *([f"--images={images}"] if images else [])]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        found = None
        while found is None:
            line = server.stdout.readline()
            if not line:
                sys.exit("the server has ended")
            found = re.search(r"http://(127\.0\.0\.1:\d+)/", line)
        yield found[1], server.pid
    finally:
        server.kill()
        server.wait()


def measure(address: str, pid: int, clients: int, hostile: int, seconds: float) -> None:
    images = [draw(i) for i in range(100)]
    connection = http.client.HTTPConnection(address)
    for image in images[:10]:
        ask(connection, image)
    crowd(address, pid, images, 1, 0, min(seconds, 15))
    connection.close()  # as the server has done meanwhile; the next request opens it

    # The server keeps the latest 256 MB of uploads. It is full of them from the beginning, so
    # that what grows in the minute is a leak.
    for i in range(300):
        ask(connection, images[i % 100] + bytes([i % 256]) * 1_000_000)
    usual = None
    if hostile:
        print("the same clients alone:")
        usual = crowd(address, pid, images, clients, 0, max(seconds / 10, 10))
    found = crowd(address, pid, images, clients, hostile, seconds)
    if usual:
        print(f"median beside hostile clients: {found / usual:.2f} times the usual")


def crowd(
    address: str, pid: int, images: list[bytes], clients: int, hostile: int, seconds: float
) -> float:
    """Lets clients ask for some time, hostile ones beside them; returns the median ms."""
    statuses, times = [], []
    begin = time.monotonic()
    end = begin + seconds

    def client(number: int) -> None:
        mine = http.client.HTTPConnection(address)
        i = number
        while time.monotonic() < end:
            # No two uploads are the same: bytes behind a JPEG's end change its hash only.
            data = images[i % len(images)] + f"{number} {i} {begin}".encode()
            status, elapsed = ask(mine, data)
            statuses.append(status)
            times.append(elapsed)
            i += clients

    threads = [threading.Thread(target=client, args=(i,)) for i in range(clients)]
    threads += [threading.Thread(target=harass, args=(address, i, end)) for i in range(hostile)]
    memory, used = [resident(pid)], processor_time(pid)
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        time.sleep(min(seconds / 6, 10))
        memory.append(resident(pid))
    for thread in threads:
        thread.join()
    cost = 1e3 * (processor_time(pid) - used) / len(times)
    failed = sum(status != 200 for status in statuses)
    print(
        f"{clients} clients, {hostile} hostile: {summary(times)}, "
        f"{len(times) / seconds:.1f} queries/s, "
        f"{cost:.0f} ms of the processor each"
    )
    first = memory[min(6, len(memory) - 1)]  # of the first minute, or all of a shorter time
    print(
        f"{failed} failed; memory in MB: {memory[0]:.0f} at first, {first:.0f} after "
        f"{min(seconds, 60):.0f} s, at most {max(memory):.0f}, {memory[-1]:.0f} at the end",
        flush=True,
    )
    return float(np.median(times))


if __name__ == "__main__":
    main()
