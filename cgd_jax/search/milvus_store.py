"""An index in Milvus, for what outgrows one machine: https://milvus.io.

The address is that of a server, http://HOST:19530, or a file that ends in .db, which milvus-lite
keeps without a server. What Milvus has no type for is written as text: thumbnails in base64.
"""

import base64
import contextlib
import json
import logging
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from cgd_jax.search import stores
from cgd_jax.search.stores import COLUMNS, Columns, Hit, StoreError

os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # what goes wrong is raised as well
try:
    from pymilvus import DataType, MilvusClient, MilvusException
except ImportError as error:
    raise ImportError(
        "An index in Milvus needs the package pymilvus, and milvus-lite for a file that ends in "
        ".db: pip install 'cgd_jax[milvus]', or pip install pymilvus milvus-lite."
    ) from error

# milvus-lite closes connections of clients that ask every ten seconds whether it is still there.
NO_PINGS = {"grpc.keepalive_time_ms": 2**31 - 1}
# Collections: of the pictures, and of texts about the index. Milvus wants vectors in the latter
# too, of two dimensions at least.
PICTURES, ABOUT = "cgd_pictures", "cgd_about"
TEXT = 60_000  # bytes of a text in one row; Milvus has 65,535 at most
PIECE = 1000  # rows that are read or written at a time
LENGTHS = {"id": 64, "hash": 64, "label": 4096, "path": 16384, "source": 16384, "thumbnail": 65535}


class MilvusStore:
    """See `stores.Store`."""

    exact = False  # Milvus decides by itself how it searches

    def __init__(self, address: str, client: MilvusClient, about: dict[str, str]):
        self.address, self.about, self._client = address, about, client

    @classmethod
    def open(cls, address: str, about: dict[str, str] | None, dimension: int) -> "MilvusStore":
        """Opens an index, or makes one; see `stores.open_store`."""
        for library in ("pymilvus", "milvus_lite"):
            logging.getLogger(library).setLevel(logging.CRITICAL)  # they log what they raise
        if about is not None and json.loads(about["info"])["precision"] != "float32":
            raise ValueError(
                f"--index={address}: an index in Milvus holds vectors in float32. Leave "
                f"--precision out; --whiten= makes them smaller."
            )
        if stores.is_local(address):
            if about is None and not Path(address).exists():
                raise stores.no_index(address)
            Path(address).parent.mkdir(parents=True, exist_ok=True)
        with _failures(address, "opened"):
            options = NO_PINGS if stores.is_local(address) else {}
            client = MilvusClient(address, grpc_options=options)
            if not client.has_collection(PICTURES):
                if about is None:
                    client.close()
                    raise stores.no_index(address)
                _write_about(client, about)
                # Last: from now on there is an index.
                _create_pictures(client, dimension)
            client.load_collection(ABOUT)
            client.load_collection(PICTURES)
            return cls(address, client, _read_about(client))

    def upsert(self, columns: Columns) -> None:
        rows = [{name: columns[name][i] for name in COLUMNS} for i in range(len(columns["id"]))]
        for row, vector in zip(rows, columns["vector"], strict=True):
            row["thumbnail"] = base64.b64encode(row["thumbnail"]).decode()
            row["vector"] = np.asarray(vector, np.float32)
        with _failures(self.address, "written"):
            for at in range(0, len(rows), PIECE):
                self._client.upsert(PICTURES, rows[at : at + PIECE])

    def delete(self, ids: Sequence[str]) -> None:
        with _failures(self.address, "written"):
            for at in range(0, len(ids), PIECE):
                some = ", ".join(map(stores.quoted, ids[at : at + PIECE]))
                self._client.delete(PICTURES, filter=translate(f"id IN ({some})"))

    def search(
        self, vectors: np.ndarray, k: int, where: str | None = None, exact: bool = False
    ) -> list[list[Hit]]:
        with _failures(self.address, "read", where):
            found = self._client.search(
                PICTURES,
                data=list(vectors),
                limit=k,
                filter=translate(where),
                output_fields=["id", "label", "path"],
                consistency_level="Strong",
            )
        return [
            [
                Hit(
                    hit["entity"]["id"],
                    hit["distance"],
                    hit["entity"]["label"],
                    hit["entity"]["path"],
                )
                for hit in hits
            ]
            for hits in found
        ]

    def count(self, where: str | None = None) -> int:
        with _failures(self.address, "read", where):
            rows = self._client.query(
                PICTURES,
                filter=translate(where),
                output_fields=["count(*)"],
                consistency_level="Strong",
            )
            return rows[0]["count(*)"]

    def read(self, names: Sequence[str], where: str | None = None) -> Iterator[Columns]:
        with _failures(self.address, "read", where):
            pieces = self._client.query_iterator(
                PICTURES,
                batch_size=PIECE,
                filter=translate(where),
                output_fields=list(names),
                consistency_level="Strong",
            )
            try:
                while rows := pieces.next():
                    columns: Columns = {name: [row[name] for row in rows] for name in names}
                    if "thumbnail" in names:
                        columns["thumbnail"] = list(map(base64.b64decode, columns["thumbnail"]))
                    if "vector" in names:
                        columns["vector"] = np.asarray(columns["vector"], np.float32)
                    yield columns
            finally:
                pieces.close()

    def approximate(self) -> bool:
        return True  # a server builds such an index when it sees fit

    def version(self) -> int | None:
        return None

    def finish(self) -> None:
        with _failures(self.address, "written"):
            self._client.flush(PICTURES)

    def close(self) -> None:
        self._client.close()


def translate(where: str | None) -> str:
    """Writes an SQL condition as Milvus does: = as ==, <> as !=, lists in brackets.

    Args:
      where: column names, comparisons, AND, OR, NOT, IN (...), LIKE, IS NULL; texts in single
        quotation marks.
    """
    tokens = re.findall(r"'(?:[^']|'')*'|\bIN\s*\(|[<>!=]=|<>|=|.", where or "", re.I | re.S)
    out, lists = [], 0
    for token in tokens:
        if token[0] == "'" and len(token) > 1:
            token = json.dumps(token[1:-1].replace("''", "'"), ensure_ascii=False)
        elif token[-1] == "(" and len(token) > 1:
            token, lists = "in [", lists + 1
        elif token == ")" and lists:
            token, lists = "]", lists - 1
        else:
            token = {"=": "==", "<>": "!="}.get(token, token)
        out.append(token)
    return "".join(out)


def _create_pictures(client: MilvusClient, dimension: int) -> None:
    schema = client.create_schema(auto_id=False, enable_dynamic_field=False)
    for name, kind in COLUMNS.items():
        if kind is int:
            schema.add_field(name, DataType.INT64)
        else:
            schema.add_field(
                name,
                DataType.VARCHAR,
                max_length=LENGTHS[name],
                is_primary=name == "id",
                nullable=name == "label",
            )
    schema.add_field("vector", DataType.FLOAT_VECTOR, dim=dimension)
    parameters = client.prepare_index_params()
    parameters.add_index("vector", index_type="AUTOINDEX", metric_type="COSINE")
    client.create_collection(PICTURES, schema=schema, index_params=parameters)


def _write_about(client: MilvusClient, about: dict[str, str]) -> None:
    if client.has_collection(ABOUT):  # of an index that was never finished
        client.drop_collection(ABOUT)
    schema = client.create_schema(auto_id=False, enable_dynamic_field=False)
    schema.add_field("id", DataType.VARCHAR, max_length=64, is_primary=True)
    schema.add_field("text", DataType.VARCHAR, max_length=65535)
    schema.add_field("vector", DataType.FLOAT_VECTOR, dim=2)
    parameters = client.prepare_index_params()
    parameters.add_index("vector", index_type="AUTOINDEX", metric_type="COSINE")
    client.create_collection(ABOUT, schema=schema, index_params=parameters)
    for name, text in about.items():
        for i, at in enumerate(range(0, len(text), TEXT)):
            row = {"id": f"{name}.{i:04}", "text": text[at : at + TEXT], "vector": [1.0, 0.0]}
            client.upsert(ABOUT, [row])


def _read_about(client: MilvusClient) -> dict[str, str]:
    rows = client.query(
        ABOUT,
        filter="id != ''",
        output_fields=["id", "text"],
        limit=10_000,
        consistency_level="Strong",
    )
    about: dict[str, str] = {}
    for row in sorted(rows, key=lambda row: row["id"]):
        name = row["id"].partition(".")[0]
        about[name] = about.get(name, "") + row["text"]
    return about


@contextlib.contextmanager
def _failures(address: str, done: str, where: str | None = None) -> Iterator[None]:
    """Raises what Milvus raises as the errors that `stores.Store` promises."""
    try:
        yield
    except (StoreError, stores.NoIndexError):
        raise
    except (MilvusException, OSError, RuntimeError, ValueError) as error:
        text = " ".join(str(getattr(error, "message", error)).split())
        # So servers and milvus-lite say that a filter is wrong.
        if where and re.search(r"pars|expr|unexpected|unknown field|expected|column", text, re.I):
            raise ValueError(f"--where={where!r} is not understood: {text}") from error
        raise StoreError(
            f"The index {address} could not be {done}: {text}. What was written before is kept; "
            f"mend what is named here (is the server running? does another process use the file?) "
            f"and repeat the command."
        ) from error
