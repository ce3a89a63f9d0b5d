"""An index in LanceDB: a folder of columnar files, https://lancedb.github.io/lancedb/."""

import contextlib
import json
import os
import re
from collections.abc import Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from cgd_jax.runtime import packages
from cgd_jax.search import stores
from cgd_jax.search.stores import HIT_COLUMNS, Hit

os.environ.setdefault("LANCEDB_LOG", "error")  # else it warns of what is as it should be
packages.require("An index in a folder", "search", "lancedb")
import lancedb  # noqa: E402
from lancedb.index import BTree, IvfPq, IvfRq, IvfSq  # noqa: E402

IMAGES, ABOUT = "images", "about"  # the tables
# Numbers (rows × dimension) from which comparing with everything takes too long, some 100 ms.
APPROXIMATE_FROM = 20_000_000
INDEX_IDS_FROM = 10_000  # rows
# Every write makes a part of the table. To join them writes all rows anew, so it waits until there
# are more than these, or rows were deleted.
PARTS = 10
# Of the approximate search: clusters looked into, at least, and one for so many rows, half of them
# (a class is spread over more of them the more there are); and candidates a neighbour that are
# compared exactly. Compressed vectors hardly tell a class apart: most of it are candidates.
PROBES, ROWS_A_PROBE, REFINE = 80, 16_384, 3
COMPRESSED_REFINE, CANDIDATES = 10, 1000  # the larger one of both
PIECES = 48  # bytes of a vector in product quantization, at most


def _quantizer(compress: str | None, dimension: int) -> Any:
    """Returns how the approximate search keeps vectors: 8 bits a number, unless compressed."""
    if compress == "pq":
        pieces = max(n for n in range(1, PIECES + 1) if dimension % n == 0)
        return IvfPq(distance_type="cosine", num_sub_vectors=pieces)
    return (IvfRq if compress == "binary" else IvfSq)(distance_type="cosine")


class LanceStore(stores.Store):
    """See `stores.Store`."""

    errors = (RuntimeError, ValueError, OSError)

    def __init__(self, address: str, about: dict[str, str] | None = None, dimension: int = 0):
        if about is None and stores.is_local(address) and not Path(address).is_dir():
            raise stores.NoIndexError(address)
        self.address, self._deleted = address, False
        self._about: dict[str, str] = {}
        self._about_of: tuple[int, int] | None = None  # the state of the table that it was read of
        with self.failures("opened"):
            # Every read sees what was written before it, by whichever process.
            self._database = lancedb.connect(address, read_consistency_interval=timedelta(0))
            if IMAGES not in self._database.list_tables().tables:
                if about is None:
                    raise stores.NoIndexError(address)
                texts = pa.table({"name": list(about), "text": list(about.values())})
                self._database.create_table(ABOUT, texts, mode="overwrite")
                halves = json.loads(about["info"])["precision"] == "float16"
                schema = stores.schema_with_vectors(dimension, pa.float16() if halves else None)
                # Last: from now on there is an index.
                self._database.create_table(IMAGES, schema=schema, exist_ok=True)
            self._table: Any = self._database.open_table(IMAGES)
            self._compress = json.loads(self.about("info") or "{}").get("compress")
            if "taken" not in self._table.schema.names:  # of an earlier version
                self._table.add_columns({"taken": f"CAST({stores.UNKNOWN} AS BIGINT)"})

    def about(self, name: str) -> str | None:
        state = None
        with contextlib.suppress(OSError):  # in object storage it is read every time
            status = Path(self.address, f"{ABOUT}.lance", "_versions").stat()
            state = status.st_ino, status.st_mtime_ns
        if state is None or state != self._about_of:
            with self.failures("read"):
                rows = self._database.open_table(ABOUT).to_arrow().to_pylist()
            self._about, self._about_of = {row["name"]: row["text"] for row in rows}, state
        return self._about.get(name)

    def upsert(self, rows: pa.Table) -> None:
        with self.failures("written"):
            merge = self._table.merge_insert("id").when_matched_update_all()
            merge.when_not_matched_insert_all().execute(
                rows.select(self._table.schema.names).cast(self._table.schema)
            )

    def delete(self, ids: Sequence[str]) -> None:
        self._deleted = True
        with self.failures("written"):
            for where in stores.among(ids):
                self._table.delete(where)

    def search(self, vectors: np.ndarray, k: int, where: str | None = None) -> list[list[Hit]]:
        found: list[list[Hit]] = [[] for _ in vectors]
        refine = max(COMPRESSED_REFINE, CANDIDATES // k) if self._compress else REFINE
        with self.failures("read", where):
            probes = max(PROBES, self._table.count_rows() // ROWS_A_PROBE)
            query = self._table.search(list(vectors), vector_column_name="vector")
            query = query.distance_type("cosine").nprobes(probes).refine_factor(refine)
            query = query.select([*HIT_COLUMNS, "_distance"]).limit(k)
            rows = (query.where(where) if where else query).to_arrow().to_pylist()
        for row in rows:  # of one query, the database does not say of which
            hits = found[row.pop("query_index", 0)]
            hits.append(Hit(similarity=1 - row.pop("_distance"), **row))
        return found

    def count(self, where: str | None = None) -> int:
        with self.failures("read", where):
            return self._table.count_rows(where)

    def read(self, names: Sequence[str], where: str | None = None) -> Iterator[pa.RecordBatch]:
        with self.failures("read", where):
            query = self._table.search().select(list(names))
            yield from (query.where(where) if where else query).to_batches()

    def approximate(self) -> bool:
        with self.failures("read"):
            return any(index.columns == ["vector"] for index in self._table.list_indices())

    def version(self) -> int:
        with self.failures("read"):
            return self._table.version

    def finish(self) -> None:
        with self.failures("written"):
            rows = self._table.count_rows()
            dimension = self._table.schema.field("vector").type.list_size
            wanted: dict[str, Any] = {"id": BTree()} if rows >= INDEX_IDS_FROM else {}
            if rows * dimension >= APPROXIMATE_FROM:
                wanted["vector"] = _quantizer(self._compress, dimension)
            for index in self._table.list_indices():
                wanted.pop(index.columns[0], None)
            for column, config in wanted.items():
                self._table.create_index(column, config=config)
            parts = self._table.stats()["fragment_stats"]["num_fragments"]
            if parts > PARTS or self._deleted:
                self._table.optimize(cleanup_older_than=timedelta(hours=1))
                self._deleted = False

    def explain(self, error: Exception) -> tuple[str, bool]:
        text = re.sub(r"lance error: |LanceError\(\w+\): ", "", str(error).split(", /")[0])
        return text, isinstance(error, ValueError)
