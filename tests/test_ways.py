"""Ways: every config, made tiny, goes through every command, with any two options together."""

import itertools
import json
import shutil

import numpy as np
import pytest

pytest.importorskip("lancedb", reason="lancedb is not installed")
testclient = pytest.importorskip("fastapi.testclient", reason="fastapi or httpx2 is not installed")

import cgd_jax  # noqa: E402
from cgd_jax import config_files  # noqa: E402
from cgd_jax.search import Index  # noqa: E402
from cgd_jax.serve.app import create_app  # noqa: E402
from tests import tiny  # noqa: E402, F401  (the data set and the backbone that it adds)
from tests.search_samples import folder_of_photographs, photograph  # noqa: E402
from tests.test_main import run_here  # noqa: E402

CONFIGS = sorted(path.stem for path in config_files.FOLDER.glob("*.py"))
TINY = (
    "--model.backbone=resnet6 --model.pretrained= --model.width=2 --model.embedding_dim=12 "
    "--data.resize=18 --data.crop_size=12 --data.image_size=16 --train.images_per_class=2 "
    "--train.log_every=1 --train.steps=4 --train.eval_every=4 --train.checkpoint_every=2 "
    "--optimizer.warmup_steps=1 --eval.batch_size=8 --eval.baselines=False --eval.bootstrap=10"
).split()

# What a run may choose of each. `center` to `dtype` are keys of a config's `model`.
OPTIONS = {
    "center": ["none", "mean", "direction"],
    "descriptors": ["SG", "S", "GRM"],
    "combination": ["concat", "sum", "separate", "raw"],
    "learn_p": ["fixed", "scalar", "channel"],
    "dtype": ["float32", "bfloat16"],
    "loss": [
        "--loss.ranking=batch_hard_triplet",
        "--loss.ranking=contrastive --loss.memory=8 --loss.memory_from=1",
        "--loss.ranking=soft_triple --loss.soft_triple.centers=2",
        "--loss.ranking_weight=0 --loss.classification=arcface --loss.sub_centers=2",
    ],
    "chunk": ["--train.gradient_cache_chunk=0", "--train.gradient_cache_chunk=4"],
    "average": ["--optimizer.ema_decay=0", "--optimizer.ema_decay=0.9"],
    "validation": ["--data.validation_fraction=0", "--data.validation_fraction=0.34"],
    "eval": [
        "--eval.flip --eval.query_expansion=2 --eval.save_embeddings",
        "--eval.whitening_dim=4 --eval.database_augmentation=1 --eval.vector=descriptors",
        "--eval.scales=(1.0,0.75) --eval.rerank --eval.projection=pca",
    ],
}
MODEL = ("center", "descriptors", "combination", "learn_p", "dtype")


def possible(row):
    """Whether a config may say this: only GeM has an exponent to learn."""
    return row.get("learn_p", "fixed") == "fixed" or "G" in row.get("descriptors", "G")


def pairs_of(row):
    return {frozenset(pair) for pair in itertools.combinations(row.items(), 2)}


def possible_pairs():
    pairs = set()
    for a, b in itertools.combinations(OPTIONS, 2):
        for x, y in itertools.product(OPTIONS[a], OPTIONS[b]):
            pairs |= pairs_of({a: x, b: y}) if possible({a: x, b: y}) else set()
    return pairs


def matrix():
    """Returns rows in which any two values that are possible together stand together once.

    Greedy: a row begins with a pair that is missing and takes what adds the most of the others.
    """
    rows, missing = [], possible_pairs()
    most_values_first = sorted(OPTIONS, key=lambda name: -len(OPTIONS[name]))
    while missing:
        row = dict(min(missing, key=sorted))
        for name in most_values_first:
            extended = [{**row, name: value} for value in OPTIONS[name] if name not in row]
            fitting = [new for new in extended if possible(new)] or [row]
            row = max(fitting, key=lambda new: len(pairs_of(new) & missing))
        missing -= pairs_of(row)
        rows.append(row)
    return rows


ROWS = matrix()


def test_the_matrix_is_complete():
    assert set.union(*map(pairs_of, ROWS)) == possible_pairs()
    assert all(map(possible, ROWS)) and len(CONFIGS) <= len(ROWS) < 22


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """Folders that all ways share: of data sets, and of images that are searched."""
    folder = tmp_path_factory.mktemp("ways")
    folder_of_photographs(folder / "images", 4)
    for label, i in itertools.product(range(8), range(4)):  # one's own images to train on
        photograph(folder / f"own/class {label}/{i}.png", seed=4 * label + i)
    (folder / "rates.py").write_text(
        "CONFIG, SEEDS, REFERENCE = 'configs/glyphs.py', (0,), 'low'\n"
        "VARIANTS = {name: {'optimizer.learning_rate': rate}"
        " for name, rate in (('low', 1e-4), ('high', 1e-2))}\n"
    )
    return folder


def command(*words):
    """Runs a command; returns what it printed."""
    status, output, errors = run_here(*map(str, words))
    assert status == 0, (words, errors)
    return output


@pytest.mark.slow
@pytest.mark.parametrize("number", range(len(ROWS)))
def test_way(number, shared, tmp_path):
    row, name = ROWS[number], CONFIGS[number % len(CONFIGS)]
    flags = [f"--config=configs/{name}.py", *TINY, f"--data.dir={shared / 'data'}"]
    flags += [f"--model.{key}={row[key]}" for key in MODEL]
    if "--loss.ranking_weight=0" not in row["loss"]:
        flags += ["--loss.ranking_weight=1"]
    flags += " ".join(v for k, v in row.items() if k not in (*MODEL, "eval")).split()
    if name == "image_folder":
        flags += [f"--data.source={shared / 'own'}", "--train.classes_per_batch=0"]
    else:
        flags += ["--data.name=blobs", "--train.classes_per_batch=4"]
        # What a config says of data and losses that the row says otherwise.
        flags += ["--data.test_name=", "--data.fold=", "--data.cache=disk"]
    if "lite0" in name or name in ("grocery", "image_folder"):
        flags += ["--model.frozen_blocks=1"]
    run, images = tmp_path / "run", sorted((shared / "images").rglob("*.png"))

    assert "samples.png" in command("data", *flags, f"--workdir={run}")
    command("train", *flags, f"--workdir={run}")
    results = json.loads((run / "results.json").read_text())
    for lost in (run / "checkpoints/4", run / "results.json"):  # as if it had been stopped
        shutil.rmtree(lost) if lost.is_dir() else lost.unlink()
    assert "Resumed from the checkpoint of step 2" in command("train", *flags, f"--workdir={run}")
    resumed = json.loads((run / "results.json").read_text())
    assert resumed["metrics"] == results["metrics"] and resumed["step"] == results["step"]

    assert "R@1" in command("eval", run, *row["eval"].split())
    assert "explain-" in command("explain", run)
    command("explain", run, *images[:2])
    assert (run / f"explain-{images[0].stem}-{images[1].stem}.png").exists()
    command("export", run)
    study = command("study", shared / "rates.py", *flags, f"--workdir={tmp_path}", "--dry_run")
    assert study.count(" --config.optimizer.learning_rate=") == 2

    opened, exported = cgd_jax.open(run), cgd_jax.open(run / "export")
    assert opened.weights_hash == exported.weights_hash and opened.step == resumed["step"]
    np.testing.assert_array_equal(opened.embed(images), exported.embed(images))

    command("index", shared / "images", f"--workdir={run}")
    found = json.loads(command("search", images[0], f"--workdir={run}", "--json"))
    assert "000.png" in json.dumps(found)
    client = testclient.TestClient(
        create_app(Index.open(run / "index")), base_url="http://localhost"
    )
    assert client.get("/").status_code == 200 and client.get("/about").json()["explains"]
    answer = client.post("/search", content=images[0].read_bytes()).json()
    query, match = answer["query"], answer["hits"][1]["id"]
    assert answer["hits"][0]["similarity"] == pytest.approx(1, abs=1e-2)
    alike = client.get("/explanation", params={"query": query, "match": match})
    assert alike.status_code == 200 and np.isfinite(alike.json()["match"]).all()
