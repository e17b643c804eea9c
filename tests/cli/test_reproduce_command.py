"""`lowdim reproduce`."""

import dataclasses

from lowdim.catalogue import entries, find


def test_reproduce_refuses(refused, monkeypatch):
    assert "nearest: galore" in refused("reproduce", "galor")
    waiting = dataclasses.replace(find("lord"), number=61, slug="waiting", target="")
    monkeypatch.setattr("lowdim.catalogue.lookup.ROWS", (*entries(), waiting))
    assert "is not built yet" in refused("reproduce", "waiting")
