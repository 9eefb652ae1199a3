"""Fetching from kaggle.com fails clearly where it cannot be reached."""

import time

import pytest

from neuroloop.adapters.kaggle import download
from neuroloop.core.errors import InvalidSource


def test_without_a_network_the_error_names_the_dataset_and_a_way_out(monkeypatch: pytest.MonkeyPatch, free_port):
    proxy = f"http://127.0.0.1:{free_port()}"  # nobody listens: every connection is refused
    for name in ("HTTPS_PROXY", "https_proxy", "HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, proxy)
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    start = time.monotonic()
    with pytest.raises(InvalidSource, match=r"kaggle://owner/scans cannot be fetched.*NEUROLOOP_DATA_URL"):
        download("owner/scans")
    assert time.monotonic() - start < 60


@pytest.mark.parametrize("handle", ["", "owner", "owner/", "/dataset", "a/b/c", "../../etc/passwd", "owner/data set"])
def test_a_malformed_name_is_refused_without_asking(handle: str):
    with pytest.raises(InvalidSource, match="kaggle://owner/dataset"):
        download(handle)
