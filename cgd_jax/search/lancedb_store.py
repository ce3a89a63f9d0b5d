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

from cgd_jax.search import stores
from cgd_jax.search.stores import COLUMNS, Columns, Hit, StoreError

os.environ.setdefault("LANCEDB_LOG", "error")  # else it warns of what is as it should be
try:
    import lancedb
    import pyarrow as pa
    from lancedb.index import BTree, IvfSq
except ImportError as error:
    raise ImportError(
        "An index in a folder needs the package lancedb: pip install 'cgd_jax[search]', or "
        "pip install lancedb."
    ) from error

PICTURES, ABOUT = "pictures", "about"  # the tables
# Numbers (rows × dimension) from which comparing with everything takes too long, some 100 ms.
APPROXIMATE_FROM = 20_000_000
INDEX_IDS_FROM = 10_000  # rows
# Every write makes a part of the table. To join them writes all rows anew, so it waits until there
# are more than these, or rows were deleted.
PARTS = 10
# Of the approximate search: clusters looked into, and candidates a neighbour that are compared
# exactly.
PROBES, REFINE = 80, 3
TYPES = {str: pa.string(), int: pa.int64(), bytes: pa.binary()}


class LanceStore:
    """See `stores.Store`."""

    exact = True

    def __init__(self, address: str, table, about: dict[str, str]):
        self.address, self.about, self._table = address, about, table
        self._deleted = False

    @classmethod
    def open(cls, address: str, about: dict[str, str] | None, dimension: int) -> "LanceStore":
        """Opens an index, or makes one; see `stores.open_store`."""
        if about is None and stores.is_local(address) and not Path(address).is_dir():
            raise stores.no_index(address)
        with _failures(address, "opened"):
            # Every read sees what was written before it, by whichever process.
            database = lancedb.connect(address, read_consistency_interval=timedelta(0))
            if PICTURES not in database.list_tables().tables:
                if about is None:
                    raise stores.no_index(address)
                texts = pa.table({"name": list(about), "text": list(about.values())})
                database.create_table(ABOUT, texts, mode="overwrite")
                fields = [pa.field(name, TYPES[kind]) for name, kind in COLUMNS.items()]
                precision = json.loads(about["info"])["precision"]
                number = pa.float16() if precision == "float16" else pa.float32()
                fields.append(pa.field("vector", pa.list_(number, dimension)))
                # Last: from now on there is an index.
                database.create_table(PICTURES, schema=pa.schema(fields), exist_ok=True)
            texts = database.open_table(ABOUT).to_arrow().to_pydict()
            about = dict(zip(texts["name"], texts["text"], strict=True))
            return cls(address, database.open_table(PICTURES), about)

    def upsert(self, columns: Columns) -> None:
        type_ = self._table.schema.field("vector").type
        numbers = np.ascontiguousarray(columns["vector"], type_.value_type.to_pandas_dtype())
        arrays = {name: pa.array(columns[name], TYPES[kind]) for name, kind in COLUMNS.items()}
        arrays["vector"] = pa.FixedSizeListArray.from_arrays(
            pa.array(numbers.reshape(-1)), type_.list_size
        )
        with _failures(self.address, "written"):
            merge = self._table.merge_insert("id").when_matched_update_all()
            merge.when_not_matched_insert_all().execute(pa.table(arrays))

    def delete(self, ids: Sequence[str]) -> None:
        self._deleted = True
        with _failures(self.address, "written"):
            for at in range(0, len(ids), 1000):
                some = ", ".join(map(stores.quoted, ids[at : at + 1000]))
                self._table.delete(f"id IN ({some})")

    def search(
        self, vectors: np.ndarray, k: int, where: str | None = None, exact: bool = False
    ) -> list[list[Hit]]:
        found: list[list[Hit]] = [[] for _ in vectors]
        with _failures(self.address, "read", where):
            query = self._table.search(list(vectors), vector_column_name="vector")
            query = query.distance_type("cosine").limit(k)
            query = query.select(["id", "label", "path", "_distance"])
            if where:
                query = query.where(where)
            if exact:
                query = query.bypass_vector_index()
            else:
                query = query.nprobes(PROBES).refine_factor(REFINE)
            rows = query.to_arrow().to_pydict()
        at = rows.get("query_index") or [0] * len(rows["id"])
        for row in zip(at, rows["id"], rows["_distance"], rows["label"], rows["path"], strict=True):
            found[row[0]].append(Hit(row[1], 1 - row[2], row[3], row[4]))
        return [sorted(hits, key=lambda hit: (-hit.similarity, hit.id)) for hits in found]

    def count(self, where: str | None = None) -> int:
        with _failures(self.address, "read", where):
            return self._table.count_rows(where)

    def read(self, names: Sequence[str], where: str | None = None) -> Iterator[Columns]:
        with _failures(self.address, "read", where):
            query = self._table.search().select(list(names))
            if where:
                query = query.where(where)
            for batch in query.to_batches():
                columns = {name: batch[name].to_pylist() for name in names if name != "vector"}
                if "vector" in names:
                    numbers = batch["vector"].flatten().to_numpy(zero_copy_only=False)
                    width = batch["vector"].type.list_size
                    columns["vector"] = numbers.reshape(-1, width).astype(np.float32)
                yield columns

    def approximate(self) -> bool:
        with _failures(self.address, "read"):
            return any(index.columns == ["vector"] for index in self._table.list_indices())

    def version(self) -> int | None:
        with _failures(self.address, "read"):
            return self._table.version

    def finish(self) -> None:
        with _failures(self.address, "written"):
            rows = self._table.count_rows()
            dimension = self._table.schema.field("vector").type.list_size
            wanted: dict[str, Any] = {"id": BTree()} if rows >= INDEX_IDS_FROM else {}
            if rows * dimension >= APPROXIMATE_FROM:
                wanted["vector"] = IvfSq(distance_type="cosine")
            for index in self._table.list_indices():
                wanted.pop(index.columns[0], None)
            for column, config in wanted.items():
                self._table.create_index(column, config=config)
            parts = self._table.stats()["fragment_stats"]["num_fragments"]
            if parts > PARTS or self._deleted:
                self._table.optimize(cleanup_older_than=timedelta(hours=1))
                self._deleted = False

    def close(self) -> None:
        pass


@contextlib.contextmanager
def _failures(address: str, done: str, where: str | None = None) -> Iterator[None]:
    """Raises what LanceDB raises as the errors that `stores.Store` promises."""
    try:
        yield
    except (StoreError, stores.NoIndexError):
        raise
    except (RuntimeError, ValueError, OSError) as error:
        text = re.sub(r"lance error: |LanceError\(\w+\): ", "", str(error).split(", /")[0])
        text = " ".join(text.split())
        if where and isinstance(error, ValueError):
            raise ValueError(f"--where={where!r} is not understood: {text}") from error
        remedy = (
            "What was written before is kept; make room, or mend what is named here, and repeat "
            "the command: it goes on from there."
            if done == "written"
            else "If its files are damaged, delete it and index the pictures anew."
        )
        raise StoreError(f"The index {address} could not be {done}: {text}. {remedy}") from error
