"""The commands of search: index, search, serve."""

import re
from typing import Any

from absl import flags

from cgd_jax.data import shapes
from cgd_jax.flags import Command, Flag

COMMANDS = {
    "index": Command(
        "embeds your own images into an index, or brings it up to date",
        "IMAGES",
        "index model images vector precision whiten whitening compress aspect image_size scales "
        "scales_p prune on",
        "images",
        "search",
    ),
    "search": Command(
        "finds the images of an index that are most like another one",
        "A.jpg",
        "index model query k where exact crop duplicates similarity json picture",
        "query",
        "search",
    ),
    "pairs": Command(
        "writes which images of a database are most like each query, for hloc and kapture",
        "QUERIES DATABASE --k=50",
        "model queries database k out features vector aspect image_size scales scales_p",
        "queries database",
        "search",
    ),
    "serve": Command(
        "shows an index in the browser; of a folder that has none yet, it makes one first",
        "IMAGES",
        "index model images host port show_paths",
        "images",
        "serve",
    ),
}
FLAGS = {
    "query": Flag(
        "An image; for search also a folder, and several times. Without it explain takes pairs of "
        "the test set.",
        "FILE",
    ),
    "index": Flag(
        "A folder, s3://..., a file that ends in .db, or the address of a Milvus server; else the "
        "folder index of the run, or runs/index.",
        "ADDRESS",
    ),
    "images": Flag(
        "A folder, also in a bucket, s3://..., an archive or a CSV; may be given several times.",
        "FOLDER",
    ),
    "model": Flag(
        "An exported network: a file, a folder, or a Hugging Face repository, owner/name or "
        "owner/name@revision; else that of --workdir, else the index's, else EfficientNet-Lite0 "
        "with G.",
        "FILE",
    ),
    "vector": Flag("Which vector, as config.eval.vector; else what was trained.", "NAME"),
    "precision": Flag(
        "Of the vectors: float32 or float16; else float32.", "NAME", options=("float32", "float16")
    ),
    "whiten": Flag("Dimensions of whitened vectors; else all as they are.", "NUMBER", options=(1,)),
    "whitening": Flag(
        "What --whiten learns from: all images (pca), or pairs of those with one label; else pca.",
        "NAME",
        options=("pca", "pairs"),
    ),
    "compress": Flag(
        "What searches of a large index keep in memory: at most 48 bytes a vector (pq), or a bit a "
        "number (binary), of which the best are compared exactly; else a byte a number.",
        "NAME",
        options=("pq", "binary"),
    ),
    "prune": Flag(
        "Also removes images whose folders are gone, empty or cannot be read: a disk may be away."
    ),
    "on": Flag("A cluster of Ray that reads and embeds: ray, or ray://HOST:10001.", "ray"),
    "aspect": Flag(
        "What images are resized to: a square, or about a dozen shapes of as many pixels (keep), "
        "of which each takes the nearest; else as the network was trained.",
        "NAME",
        options=shapes.ASPECTS,
    ),
    "image_size": Flag(
        "Pixels, the side of that square; else as trained.", "NUMBER", options=(1, 2048)
    ),
    "scales": Flag(
        "Factors of the sides, such as 0.7071,1,1.4142, of which the vectors are added; else 1.",
        "NUMBER,NUMBER",
    ),
    "scales_p": Flag(
        "The exponent of their generalized mean, as GeM's; else 1, their sum.", "EXPONENT"
    ),
    "queries": Flag("A folder of images.", "FOLDER"),
    "database": Flag("Another, in which those most like them are found.", "FOLDER"),
    "out": Flag("The text file of pairs; else pairs.txt.", "FILE", "pairs.txt"),
    "features": Flag(
        "Where to write the vectors too: FILE.h5 as hloc has it, else a folder of kapture.", "FILE"
    ),
    "k": Flag("How many images; else 20.", "NUMBER", 20, (1,)),
    "where": Flag("Which images, as SQL: label = 'shoes' AND width > 500.", "SQL"),
    "exact": Flag("Compares with every image."),
    "crop": Flag("The part of the query to search by, in pixels.", "X,Y,WIDTH,HEIGHT"),
    "duplicates": Flag("Lists groups of images that are nearly the same."),
    "similarity": Flag("With --duplicates: the cosine from which they are; else 0.94.", "COSINE"),
    "json": Flag("Prints JSON, and nothing else."),
    "picture": Flag(
        "The PNG that shows what was found; else search.png, or duplicates.png.", "FILE"
    ),
    "host": Flag(
        "The address of this machine to listen at, such as 0.0.0.0 for all, where a token is "
        "needed; else 127.0.0.1.",
        "ADDRESS",
        "127.0.0.1",
    ),
    "port": Flag("Where to listen; else 8000.", "NUMBER", 8000, (0, 65535)),
    "show_paths": Flag("Tells where images lie."),
}
# Those that the functions of a command take as they are.
OF_INDEX = "vector precision whiten whitening compress prune on"
OF_SEARCH = "k where exact crop similarity json picture"


def check(name: str, given: flags.FlagValues) -> None:
    """Refuses flags that are missing or do not go together."""
    if given.workdir and given.model:
        raise flags.Error("--workdir and --model both name a network; give one of them.")
    if name == "index" and not given.images:
        raise flags.Error("say what to index: --images=IMAGES, a folder, an archive or a CSV.")
    if name == "index" and given.whitening and not given.whiten:
        raise flags.Error("--whitening goes with --whiten, which says to how many dimensions.")
    if name == "index" and given.on and not re.fullmatch(r"ray(://\S+)?", given.on):
        raise flags.Error(
            f"--on={given.on}: it is ray, this machine's cluster, or ray://HOST:10001."
        )
    if name == "index" and given.on and (given.distributed or given.coordinator):
        raise flags.Error("--on and --distributed both divide the work; give one of them.")
    if name == "pairs" and not (given.queries and given.database):
        raise flags.Error("give two folders of images: those to find pairs for, and a database.")
    if name != "search":
        return
    if bool(given.query) == given.duplicates:
        raise flags.Error("say what to search by, --query=a.jpg, or look for --duplicates.")
    if given.duplicates and (given.crop or given["k"].present):
        raise flags.Error("--crop and --k do not go with --duplicates.")
    if given["similarity"].present and not given.duplicates:
        raise flags.Error("--similarity goes with --duplicates.")


def run(name: str, given: flags.FlagValues) -> None:
    """Does what a command says."""
    from cgd_jax.search import commands

    model, share, seen = given.model or given.workdir, (0, 1), _seen(given)
    if seen or name == "pairs":
        from cgd_jax.network import open_network

        model = open_network(model, given.vector, **seen)
    if name == "pairs":
        from cgd_jax.search.pairs import write_pairs

        write_pairs(given.queries, given.database, model, given.k, given.out, given.features)
        return
    address = given.index or f"{given.workdir or 'runs'}/index"
    if name == "search":
        commands.search_index(address, given.query, model, **_values(given, OF_SEARCH))
        return
    if given.distributed or given.coordinator:
        import jax

        share = jax.process_index(), jax.process_count()
    if given.images:
        commands.fill_index(address, given.images, model, share, **_values(given, OF_INDEX))
    if name == "serve":
        from cgd_jax.serve.command import serve

        serve(address, model, **_values(given, "host port show_paths"))


def _values(given: flags.FlagValues, names: str) -> dict[str, Any]:
    return {name: given[name].value for name in names.split() if name in given}


def _seen(given: flags.FlagValues) -> dict[str, Any]:
    """Returns how a network is to see images, as `network.open_network` takes it."""
    seen = _values(given, "aspect image_size scales scales_p")
    try:
        seen["scales"] = [float(scale) for scale in seen.get("scales") or ()]
    except ValueError:
        raise flags.Error(f"--scales={','.join(given.scales)}: give numbers, 0.7,1,1.4.") from None
    return {name: value for name, value in seen.items() if value}
