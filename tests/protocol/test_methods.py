"""A method's name means the same on both sides, and never an import path."""

from pathlib import Path

import pytest

from protocol import methods
from protocol.errors import BadConfig

MODULE = """
from protocol.methods import Method

method = Method(name="outside", trainer="outside", kind="lora", aggregator="product")
impostor = Method(name="qlora", trainer="outside", kind="lora", aggregator="product")
"""
ENTRY_POINTS = """
[fedpipe.methods]
outside = outside_package:method
impostor = outside_package:impostor
text = os:sep
missing = no_such_package:method
"""


@pytest.fixture
def outside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An installed distribution that offers methods, as importlib.metadata sees it."""
    folder = tmp_path / "outside_package-1.0.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: outside-package\nVersion: 1.0\n")
    (folder / "entry_points.txt").write_text(ENTRY_POINTS)
    (tmp_path / "outside_package.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)


@pytest.mark.parametrize("name", methods.BUILT_IN)
def test_the_built_in_methods_are_there_by_their_name(name: str) -> None:
    assert methods.load(name).name == name


@pytest.mark.usefixtures("outside")
def test_a_method_of_another_distribution_must_be_allowed_here() -> None:
    assert methods.load("outside", allowed=["outside"]).trainer == "outside"
    with pytest.raises(
        BadConfig, match=r"'outside' is not in fedpipe.methods: it has fedavg, ffalora, flexlora, flora, hetlora, qlora"
    ):
        methods.load("outside")


@pytest.mark.usefixtures("outside")
@pytest.mark.parametrize("name", ["impostor", "text", "missing", "never-installed", "os.path"])
def test_what_is_allowed_must_be_installed_and_be_a_method_of_that_name(name: str) -> None:
    with pytest.raises(BadConfig, match=name):
        methods.load(name, allowed=[name])


def test_built_in_names_cannot_be_taken_over() -> None:
    assert methods.load("qlora", allowed=["qlora"]) is methods.QLORA
