"""A data set small enough to train on in seconds."""

import io

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

from cgd_jax.data.builder import example_features


class Blobs(tfds.core.GeneratorBasedBuilder):
    """12 classes of 8 × 8 pictures, each a colour of its own with noise; 6 train, 6 test."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        return tfds.core.DatasetInfo(
            builder=self,
            features=example_features(),
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples(0), "test": self._generate_examples(6)}

    def _generate_examples(self, first):
        rng = np.random.default_rng(first)
        for label in range(first, first + 6):
            color = rng.integers(40, 216, 3)
            for i in range(3 + label % 3):  # 3 to 5 images a class
                image = np.clip(color + rng.normal(0, 25, (8, 8, 3)), 0, 255).astype(np.uint8)
                buffer = io.BytesIO()
                Image.fromarray(image).save(buffer, "PNG")
                key = f"{label}-{i}"
                yield (
                    key,
                    {
                        "image": buffer.getvalue(),
                        "label": label,
                        "class_name": f"colour {label}",
                        "id": key,
                    },
                )
