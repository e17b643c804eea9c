"""`lowdim reproduce`."""


def test_reproduce_refuses(refused):
    assert "nearest: galore" in refused("reproduce", "galor")
    assert "is not built yet" in refused("reproduce", "pst")
