import subprocess
import sys

import pytest

import lowdim
from lowdim.errors import MissingExtraError

FAMILY = """
from lowdim.lazy import lazy_names


__getattr__ = lazy_names(__name__, {"Estimator": "estimator", "Cache": "cache", "Broken": "broken"})
"""
ESTIMATOR = """
from sklearn.base import BaseEstimator


class Estimator(BaseEstimator):
    pass
"""


@pytest.fixture
def family(tmp_path, monkeypatch):
    """A family whose estimator is a class over scikit-learn."""
    folder = tmp_path / "toyfamily"
    folder.mkdir()
    (folder / "__init__.py").write_text(FAMILY)
    (folder / "estimator.py").write_text(ESTIMATOR)
    (folder / "cache.py").write_text("from transformers.cache_utils import Cache\n")
    (folder / "broken.py").write_text("import a_package_that_nobody_has\n")
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    for name in [name for name in sys.modules if name.partition(".")[0] == "toyfamily"]:
        del sys.modules[name]


def test_the_family_is_light_and_the_class_is_there_when_it_is_asked_for(family):
    code = (
        f"import sys; sys.path.insert(0, {str(family)!r})\n"
        "import toyfamily\n"
        "assert 'sklearn' not in sys.modules\n"
        "from toyfamily import Estimator\n"
        "assert 'sklearn' in sys.modules\n"
        "assert Estimator.__module__ == 'toyfamily.estimator'\n"
        "assert toyfamily.Estimator is Estimator\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-500:]


@pytest.mark.parametrize(
    ("package", "name", "words"),
    [("sklearn", "Estimator", "scikit-learn.*lowdim.science"), ("transformers", "Cache", "transformers.*lowdim.train")],
)
def test_a_missing_extra_is_named(family, monkeypatch, package, name, words):
    for module in [m for m in sys.modules if m.partition(".")[0] == package]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setattr(sys, "meta_path", [Absent(package), *sys.meta_path])
    import toyfamily  # type: ignore[import-not-found]

    with pytest.raises(MissingExtraError, match=rf"toyfamily\.{name} needs .*{words}"):
        getattr(toyfamily, name)


class Absent:
    """Finds nothing of one package, as if it were not installed."""

    def __init__(self, package):
        self.package = package

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == self.package:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return None


def test_what_is_no_extra_stays_as_it_is(family):
    import toyfamily  # type: ignore[import-not-found]

    with pytest.raises(ModuleNotFoundError, match="a_package_that_nobody_has") as caught:
        toyfamily.Broken  # noqa: B018
    assert not isinstance(caught.value, MissingExtraError)


@pytest.mark.parametrize("package", [lowdim, lowdim.train])
def test_an_unknown_name_is_an_attribute_error(package):
    with pytest.raises(AttributeError, match=f"module '{package.__name__}' has no attribute 'nothing'"):
        package.nothing  # noqa: B018


@pytest.mark.parametrize("name", sorted(lowdim.train._HOMES))
def test_every_name_of_train_is_where_its_table_says(name):
    found = getattr(lowdim.train, name)
    assert name in lowdim.train.__all__
    assert found.__module__ == f"lowdim.train.{lowdim.train._HOMES[name]}"
