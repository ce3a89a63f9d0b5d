"""What the table of results compares with: raw pixels, and the network before training."""

import contextlib
import hashlib
import json
from pathlib import Path

import jax

from cgd_jax.data import cache, fingerprint
from cgd_jax.evaluation.embed import embed_raw_pixels
from cgd_jax.evaluation.evaluate import embed_test, measure
from cgd_jax.run import Run, initial_state
from cgd_jax.runtime import files


def measure_baselines(run: Run) -> dict:
    """Measures raw pixels and the network before training; baselines.json keeps it for the run."""
    path = Path(run.workdir, "baselines.json")
    if path.exists():
        return json.loads(path.read_text(encoding="utf-8"))
    state, vectors = initial_state(run), {"untrained network": "embedding"}
    if run.config.model.pretrained:
        # The FC layers are new: what was pretrained is compared as it comes out of the pooling.
        vectors = {f"pretrained {x}": f"descriptor_{x}" for x in run.config.model.descriptors}
    baselines = {"raw pixels": measure_raw_pixels(run)}
    for name, vector in vectors.items():
        baselines[name] = measure(run, embed_test(run, state, vector=vector))
    files.write_json(run.folder / path.name, baselines)
    return baselines


def measure_raw_pixels(run: Run) -> dict:
    """Measures the pixels of the test images, once a data set: it is kept beside their cache."""
    dataset, wanted = run.dataset, run.config.eval
    of = {name: part for name, part in fingerprint(dataset).items() if name != "train"}
    of |= {"side": dataset.query.images.shape[1], "format": cache.FORMAT}
    of |= {"ks": wanted.ks, "precision": wanted.matmul_precision}
    if dataset.query.truth is not None:
        positives = str([row.tolist() for row in dataset.query.truth.positives])
        of["positives"] = hashlib.sha256(positives.encode()).hexdigest()[:16]

    def digest(measured: dict | None = None) -> str:
        text = json.dumps([of, measured], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    path = None
    # Of several processes, each with a disk of its own, some might find it and some not.
    if dataset.query.cache is not None and jax.process_count() == 1:
        path = dataset.query.cache / f"raw-pixels-{digest()}.json"
        with contextlib.suppress(OSError, ValueError, LookupError, TypeError):
            kept = json.loads(path.read_text(encoding="utf-8"))
            if kept["digest"] == digest(kept["metrics"]):  # else it is damaged
                return kept["metrics"]
    measured = measure(run, embed_raw_pixels(dataset, wanted.batch_size, run.batch_sharding))
    if path is not None:
        with contextlib.suppress(OSError):  # of others, who let it only be read
            files.write_json(path, {"digest": digest(measured), "of": of, "metrics": measured})
    return measured
