"""Labels and ids of queries and of a gallery, compared exactly whatever their types."""

import numpy as np
from numpy.typing import ArrayLike

__all__ = ["as_labels", "own_index", "shared_codes"]


def as_labels(name: str, values: ArrayLike) -> np.ndarray:
    """Returns labels or ids as an array whose values are compared exactly.

    They are whole numbers of at most 64 bits, or texts; also Python's objects, as pandas has them.
    The array is of int64, of uint64 if there are numbers beyond, or of texts. Raises ValueError
    for floating-point numbers, which may not be exact, for a mixture, and for anything else.

    >>> as_labels("labels", np.array(["cat", "dog"], object)).dtype.kind
    'U'
    """
    # Of a list, NumPy itself would make texts of numbers beside texts, and floats of large ones.
    array = values if hasattr(values, "dtype") else np.array(values, object)
    array = np.asarray(array)
    remedy = f"make texts of them, {name}.astype(str), or numbers, numpy.unique with return_inverse"
    if array.dtype.kind in "OT":  # Python's objects, and NumPy's texts of any length
        kinds = {int if isinstance(v, int | np.integer | np.bool_) else type(v) for v in array.flat}
        if not array.size or kinds == {int}:
            numbers = [int(value) for value in array.flat]
            least, most = min(numbers, default=0), max(numbers, default=0)
            if least < -(2**63) or most >= (2**64 if least >= 0 else 2**63):
                raise ValueError(f"{name} from {least} to {most} do not fit into 64 bits; {remedy}")
            kind = np.int64 if most < 2**63 else np.uint64
            return np.array(numbers, kind).reshape(array.shape)
        if all(issubclass(kind, str) for kind in kinds):
            return array.astype(str)
        if kinds == {bytes}:
            return array.astype("S")
        found = " and ".join(sorted(kind.__name__ for kind in kinds))
        raise ValueError(f"{name} must be whole numbers or texts, got {found}; {remedy}")
    if array.dtype.kind in "US" or array.dtype == np.uint64:
        return array
    if array.dtype.kind in "iub":
        return array.astype(np.int64)
    raise ValueError(f"{name} must be whole numbers or texts, got {array.dtype}; {remedy}")


def shared_codes(name: str, query: ArrayLike, gallery: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    """Returns integers for both that are equal where the values are equal.

    >>> shared_codes("labels", ["b", "a"], ["a", "c"])
    (array([1, 0]), array([0, 2]))
    """
    query, gallery = as_labels(f"query_{name}", query), as_labels(f"gallery_{name}", gallery)
    if query.dtype.kind != gallery.dtype.kind:
        numbers = {"i", "u"}
        if {query.dtype.kind, gallery.dtype.kind} != numbers:
            raise ValueError(
                f"query_{name} and gallery_{name} must both be integers or both be strings, got "
                f"{query.dtype} and {gallery.dtype}"
            )
        # Together they would become float64; as Python's numbers they stay what they are.
        query, gallery = query.astype(object), gallery.astype(object)
    _, code = np.unique(np.concatenate([query, gallery]), return_inverse=True)
    return code[: len(query)], code[len(query) :]


def own_index(query_ids: ArrayLike, gallery_ids: ArrayLike, queries: int, items: int) -> np.ndarray:
    """Returns where in the gallery each query itself is, [Q] integers; -1 for nowhere.

    `queries` and `items` are how many ids, [Q] and [G] of integers or strings, there must be.
    Raises ValueError for ids that do not fit, or a gallery id that comes twice.

    >>> own_index(["x", "y"], ["z", "x"], 2, 2)
    array([ 1, -1])
    """
    if np.shape(query_ids) != (queries,) or np.shape(gallery_ids) != (items,):
        raise ValueError(
            f"ids must be one per row: query_ids {np.shape(query_ids)} for {queries} queries, "
            f"gallery_ids {np.shape(gallery_ids)} for {items} gallery items"
        )
    query_code, gallery_code = shared_codes("ids", query_ids, gallery_ids)
    where = np.full(max(query_code.max(), gallery_code.max()) + 1, -1)
    where[gallery_code] = np.arange(items)
    twice = np.flatnonzero(where[gallery_code] != np.arange(items))
    if len(twice):
        raise ValueError(
            f"gallery ids must be unique, {np.asarray(gallery_ids)[twice[0]]!r} comes twice"
        )
    return where[query_code]
