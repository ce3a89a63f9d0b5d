"""An index that is brought up to date while it is served."""

import logging
from collections.abc import Callable
from threading import Lock, Thread

from pydantic import BaseModel, Field

from cgd_jax.runtime.errors import UserError
from cgd_jax.search import Index, indexing

__all__ = ["Update", "Updater"]

log = logging.getLogger(__name__)


class Update(BaseModel):
    """How far it is."""

    running: bool = False
    done: int = Field(default=0, description="files that were read")
    files: int = Field(default=0, description="files to read; 0 before they are known")
    said: str = Field(default="", description="what became of the last one")


class Updater:
    """Updates an index from the folders, archives and CSVs that it was made from."""

    def __init__(self, index: Index, whenever_done: Callable[[], None]):
        self._index, self._done = index, whenever_done
        self._lock, self.update = Lock(), Update()

    def begin(self) -> Update:
        """Begins, unless it has begun already."""
        with self._lock:
            if not self.update.running:
                self.update = Update(running=True)
                Thread(target=self._run, name="updater", daemon=True).start()
        return self.update

    def _run(self) -> None:
        index, said = self._index, "The index was made from no folder: there is nothing to update."
        try:
            rows = (batch["source"].to_pylist() for batch in index.store.read(["source"]))
            if sources := sorted({source for batch in rows for source in batch if source}):
                made = indexing.update(index.address, sources, index.network, watch=self._watch)
                said = (
                    f"{made.added:,} images added, {made.changed:,} changed, {made.removed:,} "
                    f"removed, {len(made.skipped):,} files left out."
                )
        except (UserError, OSError) as error:
            said = f"The index was not updated: {error}"
        except Exception:
            log.exception("The index was not updated")
            said = "The index was not updated; the server's output says why."
        self._done()
        self.update = Update(said=said)

    def _watch(self, done: int, files: int) -> None:
        self.update = Update(running=True, done=done, files=files)
