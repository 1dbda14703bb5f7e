"""A TFDS builder of long documents: text files in, ArrayRecord out. See `longdocs_dataset_builder`."""

from lrjax.data.longdocs.longdocs_dataset_builder import Builder, build

__all__ = ["Builder", "build"]
