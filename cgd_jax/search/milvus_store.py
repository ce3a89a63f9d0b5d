"""An index in Milvus, for what outgrows one machine: https://milvus.io.

The address is that of a server, http://HOST:19530, or a file that ends in .db, which milvus-lite
keeps without a server. What Milvus has no type for is written as text: thumbnails in base64.
"""

import atexit
import base64
import contextlib
import json
import logging
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from cgd_jax.runtime import packages
from cgd_jax.runtime.errors import InputError
from cgd_jax.search import digests, stores
from cgd_jax.search.stores import COLUMNS, HIT_COLUMNS, Hit

os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # what goes wrong is raised as well
packages.require("An index in Milvus", "milvus", "pymilvus")
from pymilvus import DataType, MilvusClient, MilvusException  # noqa: E402

# milvus-lite closes connections of clients that ask every ten seconds whether it is still there.
NO_PINGS = {"grpc.keepalive_time_ms": 2**31 - 1}
# Collections: of the images, and of texts about the index. Milvus wants vectors in the latter
# too, of two dimensions at least.
IMAGES, ABOUT = "cgd_images", "cgd_about"
TEXT = 60_000  # bytes of a text in one row; Milvus has 65,535 at most
PIECE = 1000  # rows that are read or written at a time
# Bytes; of other texts 4,096. All together a row may have no more than Milvus allows.
LENGTHS = {"id": 64, "hash": 64, "path": 16384, "source": 16384, "text": 65535, "thumbnail": 65535}


class MilvusStore(stores.Store):
    """See `stores.Store`."""

    errors = (MilvusException, OSError, RuntimeError, ValueError)

    def __init__(self, address: str, about: dict[str, str] | None = None, dimension: int = 0):
        for library in ("pymilvus", "milvus_lite"):
            logging.getLogger(library).setLevel(logging.CRITICAL)  # they log what they raise
        info = json.loads(about["info"]) if about else {"precision": "float32"}
        if info["precision"] != "float32" or info.get("compress"):
            raise InputError(
                f"--index={address}: an index in Milvus holds vectors in float32. Leave "
                f"--precision and --compress out; --whiten= makes them smaller."
            )
        is_local = stores.is_local(address)
        if is_local and about is None and not Path(address).exists():
            raise stores.NoIndexError(address)
        self.address = address
        with self.failures("opened"):
            if is_local:
                Path(address).parent.mkdir(parents=True, exist_ok=True)
                # Its files change from now on, even if nobody writes.
                Path(address, digests.LIST).unlink(missing_ok=True)
            self._client = MilvusClient(address, grpc_options=NO_PINGS if is_local else {})
            if is_local:
                atexit.register(seal, os.path.abspath(address))
            if not self._client.has_collection(IMAGES):
                if about is None:
                    self._client.close()
                    raise stores.NoIndexError(address)
                self._write_about(about)
                # Last: from now on there is an index.
                self._create(IMAGES, COLUMNS, dimension)
            fields = self._client.describe_collection(IMAGES)["fields"]
            if all(field["name"] != "taken" for field in fields):  # of an earlier version
                options = {"nullable": True, "default_value": stores.UNKNOWN}
                self._client.add_collection_field(IMAGES, "taken", DataType.INT64, **options)
            self._client.load_collection(ABOUT)
            self._client.load_collection(IMAGES)

    def about(self, name: str) -> str | None:
        with self.failures("read"):
            options = _options(f'id like "{name}.%"', ["id", "text"])
            rows = self._client.query(ABOUT, limit=10_000, **options)
        return "".join(row["text"] for row in sorted(rows, key=lambda row: row["id"])) or None

    def upsert(self, rows: pa.Table) -> None:
        with self.failures("written"):
            for batch in rows.to_batches(max_chunksize=PIECE):
                some = batch.to_pylist()
                for row in some:
                    row["thumbnail"] = base64.b64encode(row["thumbnail"]).decode()
                self._client.upsert(IMAGES, some)

    def delete(self, ids: Sequence[str]) -> None:
        with self.failures("written"):
            for where in stores.among(ids):
                self._client.delete(IMAGES, filter=translate(where))

    def search(self, vectors: np.ndarray, k: int, where: str | None = None) -> list[list[Hit]]:
        with self.failures("read", where):
            options = _options(translate(where), HIT_COLUMNS)
            found = self._client.search(IMAGES, data=list(vectors), limit=k, **options)
            return [
                [Hit(similarity=hit["distance"], **hit["entity"]) for hit in hits] for hits in found
            ]

    def count(self, where: str | None = None) -> int:
        with self.failures("read", where):
            options = _options(translate(where), ["count(*)"])
            return self._client.query(IMAGES, **options)[0]["count(*)"]

    def read(self, names: Sequence[str], where: str | None = None) -> Iterator[pa.RecordBatch]:
        with self.failures("read", where):
            options = _options(translate(where), names)
            pieces = self._client.query_iterator(IMAGES, batch_size=PIECE, **options)
            try:
                while rows := pieces.next():
                    for row in rows if "thumbnail" in names else ():
                        row["thumbnail"] = base64.b64decode(row["thumbnail"])
                    schema = stores.schema_with_vectors(len(rows[0].get("vector", ())))
                    fields = [schema.field(name) for name in names]
                    yield pa.RecordBatch.from_pylist(rows, pa.schema(fields))
            finally:
                pieces.close()

    def approximate(self) -> bool:
        return True  # a server decides by itself how it searches

    def finish(self) -> None:
        with self.failures("written"):
            self._client.flush(IMAGES)

    def _create(self, collection: str, columns: dict[str, Any], dimension: int) -> None:
        schema = self._client.create_schema(auto_id=False, enable_dynamic_field=False)
        for name, kind in columns.items():
            options = {"is_primary": name == "id", "nullable": kind == (str | None)}
            if kind is not int:
                options["max_length"] = LENGTHS.get(name, 4096)
            schema.add_field(name, DataType.INT64 if kind is int else DataType.VARCHAR, **options)
        schema.add_field("vector", DataType.FLOAT_VECTOR, dim=dimension)
        parameters = self._client.prepare_index_params()
        parameters.add_index("vector", index_type="AUTOINDEX", metric_type="COSINE")
        self._client.create_collection(collection, schema=schema, index_params=parameters)

    def _write_about(self, about: dict[str, str]) -> None:
        if self._client.has_collection(ABOUT):  # of an index that was never finished
            self._client.drop_collection(ABOUT)
        self._create(ABOUT, {"id": str, "text": str}, 2)
        for name, text in about.items():
            for i, at in enumerate(range(0, len(text), TEXT)):
                row = {"id": f"{name}.{i:04}", "text": text[at : at + TEXT], "vector": [1.0, 0.0]}
                self._client.upsert(ABOUT, [row])

    def explain(self, error: Exception) -> tuple[str, bool]:
        text = str(getattr(error, "message", error))
        # So servers and milvus-lite say that a filter is wrong.
        signs = r"pars|expr|unexpected|unknown field|expected|column"
        return text, re.search(signs, text, re.I) is not None


def _options(where: str, names: Sequence[str]) -> dict[str, Any]:
    """Returns what every way of reading takes; "Strong" also sees what was written just now."""
    return {"filter": where, "output_fields": list(names), "consistency_level": "Strong"}


def seal(address: str) -> None:
    """Closes an index in milvus-lite, which nobody here can use any more; takes its digests."""
    from milvus_lite.server_manager import server_manager_instance  # servers do without

    server_manager_instance.release_server(address)
    with contextlib.suppress(OSError):  # it was deleted, or there is no room
        digests.record(address, map)  # at its end, Python starts no more threads


def translate(where: str | None) -> str:
    """Writes an SQL condition as Milvus does: = as ==, <> as !=, lists in brackets.

    It may have column names, comparisons, AND, OR, NOT, IN (...), LIKE, IS NULL, and texts.
    """
    tokens = re.findall(r"'(?:[^']|'')*'|\bIN\s*\(|[<>!=]=|<>|=|.", where or "", re.I | re.S)
    out, lists = [], 0
    for token in tokens:
        if token[0] == "'" and len(token) > 1:
            # Of other controls, servers and milvus-lite have no way of writing in common.
            escapes = {"\\": r"\\", '"': r"\"", "\n": r"\n", "\r": r"\r"}
            text = token[1:-1].replace("''", "'").translate(str.maketrans(escapes))
            token = f'"{text}"'
        elif token[-1] == "(" and len(token) > 1:
            token, lists = "in [", lists + 1
        elif token == ")" and lists:
            token, lists = "]", lists - 1
        else:
            token = {"=": "==", "<>": "!="}.get(token, token)
        out.append(token)
    return "".join(out)
