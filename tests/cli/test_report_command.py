"""`lowdim report`."""

from threading import Thread

from lowdim.errors import InUseError
from lowdim.jobs import report
from lowdim.locking import exclusive


def test_report(call, refused, finished, tmp_path):
    assert call("report", finished, "--out", tmp_path / "page.html")[0] == 0
    assert "Training loss" in (tmp_path / "page.html").read_text()
    assert "holds none of comparison.json, run.json" in refused("report", tmp_path)
    assert "holds none of" in refused("report", tmp_path / "nowhere")
    for content in ("[1, 2]", '{"a": 1}', '"text"'):
        (tmp_path / "run.json").write_text(content)
        assert "is not a record of" in refused("report", tmp_path)
    (tmp_path / "run.json").write_text('{"losses": [')
    assert "run.json is damaged" in refused("report", tmp_path)
    assert not (tmp_path / "report.html").exists()


def test_a_file_of_someone_else_is_kept(call, refused, finished, tmp_path):
    for name, content in (("thesis.html", "my own page"), ("notes.txt", "mine"), ("data.json", '{"a": 1}')):
        mine = tmp_path / name
        mine.write_text(content)
        assert "was not written by lowdim" in refused("report", finished, "--out", mine)
        assert mine.read_text() == content
    (tmp_path / "folder").mkdir()
    assert "is a folder; name a file" in refused("report", finished, "--out", tmp_path / "folder")
    page = tmp_path / "page.html"
    for _ in range(2):  # its own page is drawn again
        assert call("report", finished, "--out", page)[0] == 0
    page.write_text(page.read_text().partition("<!-- written by lowdim")[0])  # as earlier versions wrote it
    assert call("report", finished, "--out", page)[0] == 0
    page.write_text(page.read_text().replace("Training loss", "My remarks"))
    assert "was changed since" in refused("report", finished, "--out", page)


def test_a_folder_in_use(finished):
    """Another thread stands for another command."""
    seen = []
    with exclusive(finished):
        thread = Thread(target=lambda: seen.append(_error(finished)))
        thread.start()
        thread.join()
    assert "in use by another lowdim command" in seen[0]


def _error(folder):
    try:
        return str(report(folder))
    except InUseError as error:
        return str(error)
