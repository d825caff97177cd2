"""The base model that is made here: small variants of it, and the parts that make it."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedpipe import corpus, pretrain
from fedpipe.corpus import Pair
from fedpipe.exercises import spelling
from fedpipe.pretrain import TINY, Recipe, base_model
from fedpipe.threads import Threads

SPARK = msgspec.structs.replace(TINY, n_steps=12, n_pairs=200, n_exercises=50)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[tuple[int, int, float]]]:
    heard: list[tuple[int, int, float]] = []
    path = base_model(lambda *step: heard.append(step), recipe=TINY, cache=tmp_path_factory.mktemp("cache"))
    return path, heard


def test_loads_offline_as_any_other_model(tiny: tuple[Path, list[tuple[int, int, float]]]) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path, _ = tiny
    tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
    model = AutoModelForCausalLM.from_pretrained(path, local_files_only=True)
    assert {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"} <= {
        p.name for p in path.iterdir()
    }
    assert tokenizer.eos_token_id is not None
    assert tokenizer.pad_token_id not in {None, tokenizer.eos_token_id}
    assert (model.config.eos_token_id, model.config.pad_token_id) == (tokenizer.eos_token_id, tokenizer.pad_token_id)
    ids = tokenizer("def read_all(self):", return_tensors="pt")["input_ids"]
    assert model.generate(input_ids=ids, max_new_tokens=5).shape[1] > ids.shape[1]


def test_it_learned(tiny: tuple[Path, list[tuple[int, int, float]]]) -> None:
    _, heard = tiny
    assert [step for step, _, _ in heard] == list(range(1, TINY.n_steps + 1))
    assert heard[-1][2] < heard[0][2] - 0.8


def test_made_once(tiny: tuple[Path, list[tuple[int, int, float]]]) -> None:
    path, _ = tiny
    heard: list[int] = []
    assert base_model(lambda step, _n, _loss: heard.append(step), recipe=TINY, cache=path.parent) == path
    assert heard == []
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_same_recipe_same_model_other_recipe_other_folder(tmp_path: Path) -> None:
    first = base_model(recipe=SPARK, cache=tmp_path / "a")
    again = base_model(recipe=SPARK, cache=tmp_path / "b")
    other = base_model(recipe=msgspec.structs.replace(SPARK, seed=1), cache=tmp_path / "b")
    assert first.name == again.name != other.name
    weights = [(p / "model.safetensors").read_bytes() for p in (first, again, other)]
    assert weights[0] == weights[1] != weights[2]
    assert (first / "tokenizer.json").read_bytes() == (again / "tokenizer.json").read_bytes()


def test_a_killed_build_leaves_nothing_that_looks_whole(tmp_path: Path) -> None:
    code = f"""
import os, signal
from pathlib import Path
from fedpipe import pretrain
from tests_recipe import RECIPE
def heard(step, n, loss):
    if step == n:
        os.kill(os.getpid(), signal.SIGKILL)
pretrain.base_model(heard, recipe=RECIPE, cache=Path({str(tmp_path / "cache")!r}))
"""
    (tmp_path / "tests_recipe.py").write_text(
        f"from fedpipe.pretrain import Recipe\nRECIPE = Recipe(**{msgspec.to_builtins(SPARK)!r})\n"
    )
    env = os.environ | {"PYTHONPATH": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], env=env, check=False, capture_output=True)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()[-2000:]
    assert not list((tmp_path / "cache").glob("base-*"))
    assert base_model(recipe=SPARK, cache=tmp_path / "cache").is_dir()


def test_cache_follows_xdg(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert pretrain.cache_folder() == tmp_path / "fedpipe"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert pretrain.cache_folder() == tmp_path / ".cache" / "fedpipe"


def test_widths_suit_four_bit_kernels() -> None:
    for recipe in (Recipe(), TINY):
        assert recipe.hidden % 64 == recipe.intermediate % 64 == recipe.hidden % recipe.n_heads == 0


def test_a_name_and_its_words_share_their_tokens(tiny: tuple[Path, list[tuple[int, int, float]]]) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny[0], local_files_only=True)
    name = tokenizer("def read_config_file(path):")["input_ids"]
    words = tokenizer(" read config file")["input_ids"]
    joint = tokenizer("_")["input_ids"][0]
    inside = name[1 : len(words) + 3]
    assert [i for i in inside if i != joint] == words


@pytest.fixture(scope="module")
def pairs() -> list[Pair]:
    return corpus.mine(corpus.STDLIB, limit=200)


def test_source_text_survives_the_tokenizer(tiny: tuple[Path, list[tuple[int, int, float]]], pairs: list[Pair]) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny[0], local_files_only=True)
    for pair in pairs:
        assert tokenizer.decode(tokenizer(pair.prompt)["input_ids"]) == pair.prompt


def test_exercises_spell_the_name_in_the_prompt(pairs: list[Pair]) -> None:
    found = spelling(pairs, 300)
    assert found == spelling(pairs, 300) != spelling(pairs, 300, seed=1)
    for prompt, completion in found:
        name = re.findall(r"(?:def|class) (\w+)", prompt)[-1]
        assert name.replace("_", "").lower() == completion.replace(" ", "").rstrip(".").lower()


# ------------------------------------------------------------------------------------------------------------ threads


def run(threads: Threads, n_steps: int, cost_s: dict[int, float]) -> list[int]:
    used = []
    for _ in range(n_steps):
        used.append(threads.n)
        threads.took(cost_s[threads.n])
    return used


def test_idle_processors_are_found_and_used() -> None:
    used = run(Threads(2), 200, {1: 0.07, 2: 0.045})
    assert used[0] == 1
    assert set(used[50:]) == {2} or used[50:].count(2) > 0.9 * len(used[50:])


def test_busy_processors_cost_few_slow_steps() -> None:
    used = run(Threads(2), 2000, {1: 0.07, 2: 7.0})
    assert used.count(2) <= 10


def test_a_setting_that_turns_slow_is_left_at_once() -> None:
    threads = Threads(2)
    run(threads, 100, {1: 0.07, 2: 0.045})
    used = run(threads, 30, {1: 0.07, 2: 7.0})
    assert used.count(2) <= 2


def test_one_processor_is_one_thread() -> None:
    assert set(run(Threads(1), 100, {1: 0.1})) == {1}


@given(st.integers(1, 64), st.lists(st.floats(0.001, 10.0), max_size=300))
def test_whatever_the_clock_says_the_setting_is_one_or_all(n_cpus: int, times: list[float]) -> None:
    threads = Threads(n_cpus)
    for seconds in times:
        assert threads.n in {1, n_cpus}
        threads.took(seconds)
