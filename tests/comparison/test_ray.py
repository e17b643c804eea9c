"""A comparison on a Ray cluster: a local one of two workers, of which one is killed; and what is wrong with an address."""

import socket
import sys
import threading
import time

import pytest

from comparing import dies, numbers, own, quadrants, run, same
from lowdim.errors import LowdimError, MissingExtraError


def test_ray_is_an_extra(make, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(MissingExtraError, match=r"--ray needs the package 'ray': pip install 'lowdim\[ray\]'"):
        run(make(ray="auto"), tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("somewhere", "--ray must be host:port, ray://host:port, auto or local; got 'somewhere'"),
        ("127.0.0.1:1", "--ray 127.0.0.1:1: no Ray cluster answers there"),
        ("ray://127.0.0.1:1", "--ray ray://127.0.0.1:1: no Ray cluster answers there"),
        ("auto", "--ray auto: no Ray cluster answers there"),
    ],
)
def test_an_address_without_a_cluster(address, message, make, tmp_path):
    pytest.importorskip("ray")
    begun = time.monotonic()
    with pytest.raises(LowdimError, match=message.replace("(", r"\(")):
        run(make(ray=address), tmp_path / "out")
    assert time.monotonic() - begun < 30
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("answer", [None, b"HTTP/1.1 400 Bad Request\r\n\r\n", b""], ids=["silence", "a web server", "the end"])
def test_an_address_of_something_else(answer, make, tmp_path, monkeypatch):
    cluster = pytest.importorskip("lowdim.comparison.cluster")
    pytest.importorskip("ray")
    monkeypatch.setattr(cluster, "_PATIENCE", 1.0)
    with socket.create_server(("127.0.0.1", 0)) as server:

        def listen():
            connection, _ = server.accept()
            connection.recv(100)
            if answer is None:
                connection.recv(100)
            connection.sendall(answer or b"")
            connection.close()

        thread = threading.Thread(target=listen, daemon=True)
        thread.start()
        address = f"127.0.0.1:{server.getsockname()[1]}"
        with pytest.raises(LowdimError, match=f"--ray {address}: no Ray cluster answers there"):
            run(make(ray=address), tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_local_ray_of_two_workers_one_of_them_killed(tmp_path):
    """The worker that makes the first step dies of it; its run is taken up, and everything is as in one process."""
    ray = pytest.importorskip("ray")
    expected = own(tmp_path / "one", quadrants(), rates=2)
    with pytest.warns(UserWarning, match="a worker was lost while it trained .*its process ended.*another one trains it again"):
        found = own(tmp_path / "two", quadrants(dies(tmp_path / "died")), rates=2, ray="local", workers=2)
    assert (tmp_path / "died").exists()
    assert not ray.is_initialized()
    for part in ("methods", "search", "judgement"):
        assert numbers(found.to_dict()[part]) == numbers(expected.to_dict()[part])


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:a worker was lost")
def test_a_run_that_a_cluster_loses_twice(tmp_path):
    pytest.importorskip("ray")
    with pytest.raises(LowdimError, match=r"lost twice while it trained \w+/lr-\S+ \(its process ended"):
        own(tmp_path / "out", quadrants(dies()), ray="local", workers=2)
    assert not [path for path in tmp_path.rglob("*") if path.name in ("run.json", "comparison.json") or path.suffix == ".tmp"]


@pytest.mark.slow
def test_a_local_ray_trains_a_named_model(whole, make, tmp_path):
    pytest.importorskip("ray")
    result, _ = run(make(ray="local", workers=2), tmp_path / "out")
    same(tmp_path / "out", whole[0], result, whole[1])
