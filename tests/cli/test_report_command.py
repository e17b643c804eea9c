"""`lowdim report`."""


def test_report(call, refused, finished, tmp_path):
    assert call("report", finished, "--out", tmp_path / "page.html")[0] == 0
    assert "Training loss" in (tmp_path / "page.html").read_text()
    assert "holds neither comparison.json nor run.json" in refused("report", tmp_path)
    assert "holds neither" in refused("report", tmp_path / "nowhere")
    for content in ("[1, 2]", '{"a": 1}', '"text"'):
        (tmp_path / "run.json").write_text(content)
        assert "is not a record of" in refused("report", tmp_path)
    (tmp_path / "run.json").write_text('{"losses": [')
    assert "run.json is damaged" in refused("report", tmp_path)
    assert not (tmp_path / "report.html").exists()
