"""Mining documented functions: from this machine's own packages, and from a package written for the test."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from fedpipe import corpus
from fedpipe.corpus import Pair
from protocol.errors import BadConfig

SOURCE = '''
raise RuntimeError("reading must not run this")

class Tank(Vessel):
    """A vessel that holds water under pressure.

    More about it.
    """

    def drain(self, valve: Valve, *, slowly: bool = True) -> float:
        """Let :class:`~plant.Water` out through ``valve`` until nothing is left. And more."""
        def inner(x):
            """Not seen because it is inside of a function."""

    def refill(self):
        """See drain for what this is all about."""

    def undocumented(self): ...


async def pump(litres, source=None):
    """pump(litres, source=None)

    Move so many litres
    from one tank into another, i.e. the next one.
    """

def again(x):
    """MOVE so many litres from one tank into another, i.e. the next one."""

def terse():
    """Nope."""

def long(a_rather_long_name: dict[str, int], another_long_name: list[float] = None, *rest: int, key: str = "x") -> set[int]:
    """Return the set of all numbers that occur."""
'''

PAIRS = {
    Pair('class Tank(Vessel):\n    """', "A vessel that holds water under pressure."),
    Pair(
        'class Tank:\n    def drain(self, valve: Valve, *, slowly: bool=True) -> float:\n        """',
        "Let Water out through valve until nothing is left.",
    ),
    Pair(
        'async def pump(litres, source=None):\n    """',
        "Move so many litres from one tank into another, i.e. the next one.",
    ),
    Pair(
        'def long(a_rather_long_name, another_long_name, *rest, key):\n    """',
        "Return the set of all numbers that occur.",
    ),
}


@pytest.fixture
def plant(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    folder = tmp_path / "plant"
    (folder / "tests").mkdir(parents=True)
    (folder / "__init__.py").write_text(SOURCE)
    (folder / "broken.py").write_text('def f(:\n    """This file does not even parse, so it has no pairs."""\n')
    (folder / "tests" / "test_it.py").write_text(
        'def test():\n    """Check that a test folder is left out of this."""\n'
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    return "plant"


def test_signature_to_first_sentence_without_running_anything(plant: str) -> None:
    assert set(corpus.mine(plant)) == PAIRS
    assert plant not in sys.modules


def test_a_limit_is_a_limit_and_progress_is_told(plant: str) -> None:
    heard: list[tuple[int, int]] = []
    assert len(corpus.mine(plant, limit=2, progress=lambda done, of: heard.append((done, of)))) == 2
    assert heard
    assert all(of == 2 for _, of in heard)


@pytest.mark.parametrize("name", ["no_such_package", "json.decoder", "../etc", "", "errno"])
def test_what_is_no_installed_package_is_refused(name: str) -> None:
    with pytest.raises(BadConfig, match="install"):
        corpus.mine(name)


@pytest.fixture(scope="module")
def stdlib() -> list[Pair]:
    return corpus.mine(corpus.STDLIB)


def test_the_standard_library_is_a_corpus(stdlib: list[Pair]) -> None:
    assert len(stdlib) > 4000
    assert len({p.prompt.casefold() for p in stdlib}) == len({p.completion.casefold() for p in stdlib}) == len(stdlib)
    for pair in stdlib:
        assert pair.prompt.endswith('"""')
        assert len(pair.prompt) <= corpus.MAX_PROMPT_CHARS
        assert corpus.MIN_COMPLETION_CHARS <= len(pair.completion) <= corpus.MAX_COMPLETION_CHARS


def test_prompts_are_source_text(stdlib: list[Pair]) -> None:
    for pair in stdlib[:500]:
        compile(f'{pair.prompt}Closed here."""', "prompt", "exec", dont_inherit=True)


def test_same_seed_same_text_even_in_another_process(stdlib: list[Pair], tmp_path: Path) -> None:
    code = "import sys, pathlib; from fedpipe import corpus; corpus.write_jsonl(corpus.mine('stdlib', limit=300), pathlib.Path(sys.argv[1]))"
    for name, hash_seed in (("a", "1"), ("b", "2")):
        subprocess.run([sys.executable, "-c", code, tmp_path / name], check=True, env={"PYTHONHASHSEED": hash_seed})
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert corpus.mine(corpus.STDLIB, limit=300, seed=1) != corpus.mine(corpus.STDLIB, limit=300, seed=0)
    lines = [json.loads(line) for line in (tmp_path / "a").read_text().splitlines()]
    assert [Pair(**line) for line in lines] == stdlib[:300]


def test_packages_are_installed_and_not_ours() -> None:
    found = corpus.packages()
    assert found
    assert not {"agent", "coordinator", "protocol", "fedpipe"} & set(found)
    assert found == corpus.packages()


def test_every_agent_gets_its_own_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpus, "packages", lambda: ["numpy", "networkx"])
    shards = corpus.shards(3, limit=250)
    assert list(shards) == ["numpy", "networkx", "numpy-2"]
    completions = [pair.completion.casefold() for pairs in shards.values() for pair in pairs]
    assert [len(pairs) for pairs in shards.values()] == [250, 250, 250]
    assert len(set(completions)) == len(completions)


def test_no_usable_package_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpus, "packages", list)
    with pytest.raises(BadConfig, match=r"fedpipe\[demo\]"):
        corpus.shards(2)
