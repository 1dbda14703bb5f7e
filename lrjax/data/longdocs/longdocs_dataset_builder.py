"""The TFDS dataset `longdocs`: documents of text files as ArrayRecord, without TensorFlow.

    builder = build([Path("corpus.jsonl"), Path("book.txt")], data_dir="tfds")
    source = builder.as_data_source("train")          # {"id": bytes, "text": bytes, "marks": [n, 2]}

It stands in a package folder of its own because TFDS names a dataset after its folder. The dataset's
config is a hash of the files, so changed files make a new dataset beside the old one, and files that were
built before are not built again.
"""

import dataclasses
import hashlib
import os
import pathlib
from collections.abc import Iterator, Sequence

import numpy as np
import tensorflow_datasets as tfds

from lrjax.data.sources import read_documents
from lrjax.errors import UserError


@dataclasses.dataclass(eq=False)
class LongdocsConfig(tfds.core.BuilderConfig):
    """`files`: .txt, .jsonl, .jsonl.gz or .parquet."""

    files: tuple[pathlib.Path, ...] = ()


class Builder(tfds.core.GeneratorBasedBuilder):
    """Documents {id, text, marks}; marks are character spans of known long-range answers."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self) -> tfds.core.DatasetInfo:
        features = {
            "id": tfds.features.Text(),
            "text": tfds.features.Text(),
            "marks": tfds.features.Tensor(shape=(None, 2), dtype=np.int64),
        }
        # Not shuffled: the loader does that, and the documents stay in the order of the files.
        return self.dataset_info_from_configs(
            features=tfds.features.FeaturesDict(features), disable_shuffling=True
        )

    def _split_generators(self, dl_manager) -> dict[str, Iterator]:
        del dl_manager  # nothing is downloaded
        return {"train": self._generate_examples()}

    def _generate_examples(self) -> Iterator[tuple[str, dict]]:
        ids = set()
        for path in self.builder_config.files:
            for document in read_documents(path):
                if document.id in ids:
                    raise UserError(f"{path}: two documents have the id {document.id!r}")
                ids.add(document.id)
                marks = np.asarray(document.marks, np.int64).reshape(-1, 2)
                yield document.id, {"id": document.id, "text": document.text, "marks": marks}
        if not ids:
            raise UserError(f"{', '.join(map(str, self.builder_config.files))}: no documents")


def build(files: Sequence[pathlib.Path], data_dir: str | os.PathLike) -> Builder:
    """The dataset of `files` under `data_dir`, built if it is not there.

    Raises:
        UserError: a file is unreadable, or a document is empty, without text, or of another's id.
    """
    config = LongdocsConfig(name=_content_hash(files), files=tuple(files))
    builder = Builder(config=config, data_dir=data_dir, file_format="array_record")
    builder.download_and_prepare()
    return builder


def _content_hash(files: Sequence[pathlib.Path]) -> str:
    digest = hashlib.blake2b(digest_size=8)
    for path in files:
        with open(path, "rb") as file:
            content = hashlib.file_digest(file, "blake2b").hexdigest()
        digest.update(f"{path.name} {content}\n".encode())  # the name is part of the ids
    return digest.hexdigest()
