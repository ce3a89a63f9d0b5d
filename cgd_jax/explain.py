"""Figures of why a run's network finds images alike; how, says `cgd_jax.attribution`.

`cgd_jax explain runs/glyphs a.png b.png`
"""

import os
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh

from cgd_jax import run
from cgd_jax.attribution import why_no_map
from cgd_jax.data import Dataset
from cgd_jax.evaluation import embed
from cgd_jax.network import open_network
from cgd_jax.preprocess import center_crop
from cgd_jax.reports import plots
from cgd_jax.runtime import processes
from cgd_jax.runtime.errors import ConfigError, InputError
from cgd_jax.workdir import read_config

__all__ = ["explain_run"]

PAIRS = 4  # of the right and of the wrong retrievals that are drawn
SAMPLE = 1024  # test images whose mean stands for the average image


def explain_run(
    workdir: str, step: int | None = None, query: str | None = None, match: str | None = None
) -> list[Path]:
    """Draws why a run's network finds images alike.

    Args:
      workdir: folder of the run.
      step: of the checkpoint; None for the chosen one, see `checkpoint.save`.
      query: file of an image, and `match` that of another; None for pairs of the test set, see
        `right_and_wrong`.

    Returns:
      The figures, in `workdir`: explain-QUERY-MATCH.png of the two files (long names are
      cut), or explain-right.png and explain-wrong.png (one that has no pair is left out).

    Raises:
      FileNotFoundError: there is no such file, run or checkpoint.
      UserError: one image without the other, or a file is no image (InputError); there is no map
        for a descriptor, or the data set cannot be used (ConfigError).
    """
    if bool(query) != bool(match):
        raise InputError("query and match go together: the two images to compare.")
    for flag, file in (("query", query), ("match", match)):
        if file and not Path(file).is_file():
            raise FileNotFoundError(f"--{flag}={file}: there is no such file.")
    config = read_config(workdir)
    if reason := why_no_map(config.model.descriptors):
        raise ConfigError(f"model.descriptors={config.model.descriptors!r}: {reason}")
    network = open_network(workdir, step=step, aspect="square")
    given = [Path(file) for file in (query, match) if file]
    pixels = np.stack(network.to_pixels(given)) if given else None

    setup = run.create_run(config, workdir)
    dataset, batch, embed_batch = setup.dataset, config.eval.batch_size, network.embed_batch
    if pixels is not None:
        count = len(dataset.query.labels)
        sample = np.sort(np.random.default_rng(config.seed).permutation(count)[:SAMPLE])
        images = dataset.query.images[sample]
        reference = embed.embed_images(embed_batch, images, batch, setup.batch_sharding).mean(0)
        # Both names in one, which file systems allow 255 bytes.
        stems = [os.fsencode(path.stem)[:100] for path in given]
        name = f"explain-{b'-'.join(stems).decode(errors='ignore')}.png"
        chosen = {name: [(pixels, [path.name for path in given], None)]}
    else:
        embeddings = embed.embed_dataset(embed_batch, dataset, batch, setup.batch_sharding)
        reference = embeddings.query.mean(0)
        right, wrong = right_and_wrong(embeddings, dataset, PAIRS, config.seed, setup.mesh)
        chosen = {
            "explain-right.png": pairs_of(dataset, right, True),
            "explain-wrong.png": pairs_of(dataset, wrong, False),
        }

    title = f"{config.data.name}, CGD {config.model.descriptors}, step {network.step}"
    folder, drawn = processes.report_folder(workdir), []
    for name, pairs in chosen.items():
        rows = []
        for images, names, is_right in pairs:
            found = jax.device_get(network.explain(images[0], images[1], reference))
            rows.append((center_crop(images, network.image_size), names, is_right, found))
        if rows:
            plots.plot_explanations(folder / name, rows, network.model.descriptors, title)
            drawn.append(Path(workdir, name))
    return drawn


def right_and_wrong(
    embeddings: embed.Embeddings, dataset: Dataset, count: int, seed: int, mesh: Mesh | None
) -> tuple[np.ndarray, np.ndarray]:
    """Chooses retrievals to look at: right ones at random, wrong ones of highest similarity.

    The right ones of highest similarity would be near duplicates, which need no explanation.
    Returns two arrays [≤ count, 2] of positions: of a query, and of its first neighbour in the
    gallery (among the queries, if there is none). In neither occurs a class twice, else one odd
    class might be all that is seen.
    """
    similarity, index = (x[:, 0] for x in embed.nearest(embeddings, dataset, 1, mesh=mesh))
    labels = dataset.query.labels
    found = (dataset.gallery or dataset.query).labels[index]

    def one_of_each_class(rows: np.ndarray) -> np.ndarray:
        pairs, seen = [], set()
        for row in rows:
            if len(pairs) < count and not {labels[row], found[row]} & seen:
                pairs.append((row, index[row]))
                seen |= {labels[row], found[row]}
        return np.array(pairs, int).reshape(-1, 2)

    shuffled = np.random.default_rng(seed).permutation(len(index))
    surest = np.argsort(-similarity, kind="stable")
    is_right = dataset.is_match(np.arange(len(index)), index[:, None])[:, 0]
    right, wrong = shuffled[is_right[shuffled]], surest[~is_right[surest]]
    return one_of_each_class(right), one_of_each_class(wrong)


def pairs_of(dataset: Dataset, positions: np.ndarray, right: bool) -> list[tuple]:
    """Returns images [2, S, S, 3], names of their classes, and `right` of pairs of positions."""
    sides = dataset.query, dataset.gallery or dataset.query
    pairs = []
    for pair in positions:
        images = [side.images[i] for side, i in zip(sides, pair, strict=True)]
        names = [side.class_names[side.labels[i]] for side, i in zip(sides, pair, strict=True)]
        pairs.append((np.stack(images), names, right))
    return pairs
