"""A job file is refused with the place of the fault in it; one that is taken is taken once."""

import asyncio
from pathlib import Path
from typing import Any

import pytest

from coordinator.config import CoordinatorConfig
from coordinator.core.state import Phase
from coordinator.daemon import Coordinator
from coordinator.submission import Taken, parse_job, read_job, submit, watch_folder
from protocol.errors import BadConfig
from protocol.memory_bus import MemoryBroker

GOOD = """
[job]
name = "j"
[model]
source = "toy"
"""


def with_line(table: str, line: str) -> str:
    """The good job with one more line in one of its tables."""
    return GOOD.replace(f"[{table}]", f"[{table}]\n{line}") if f"[{table}]" in GOOD else f"{GOOD}[{table}]\n{line}\n"


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("[job", ["not valid TOML"]),
        ("[job]\nname = 'j'", ["model"]),
        (with_line("train", "n_step = 5"), ["n_step", "$.train"]),
        (with_line("training", "n_steps = 5"), ["training"]),
        (with_line("train", "n_steps = 0"), ["n_steps", ">= 1"]),
        (with_line("train", "learning_rate = '2e-4'"), ["learning_rate", "float"]),
        (with_line("adapter", "bits = 'int4'"), ["int4", "$.adapter.bits"]),
        (with_line("adapter", "targets = []"), ["$.adapter.targets"]),
        (with_line("adapter", "targets = ['']"), ["$.adapter.targets[0]"]),
        (with_line("round", "n_agents = 2\nmin_agents = 3"), ["n_agents = 2", "min_agents = 3"]),
        (with_line("job", "only = ['a', 'B']"), ["$.job.only[1]"]),
        (with_line("job", "only = ['a']") + "[round]\nmin_agents = 2", ["round.min_agents 2", "job.only"]),
        (with_line("job", "only = ['a']") + "[agents.b]\nrank = 4", ["agents.b", "job.only"]),
        (with_line("agents.b", "ranks = 4"), ["ranks", "$.agents"]),
        (with_line("job", "method = 'telepathy'"), ["telepathy"]),
        (GOOD.replace('"j"', '"a/b"'), ["$.job.name"]),
    ],
)
def test_a_refusal_names_the_place(text: str, named: list[str]) -> None:
    with pytest.raises(BadConfig) as caught:
        parse_job(text, "here.toml")
    assert all(word in str(caught.value) for word in named), caught.value


def test_a_file_is_read_and_its_name_is_in_the_error(tmp_path: Path) -> None:
    path = tmp_path / "my.toml"
    path.write_text(GOOD)
    assert read_job(path).job.name == "j"
    path.write_text(with_line("evaluate", "often = true"))
    with pytest.raises(BadConfig, match=r"my\.toml.*often"):
        read_job(path)
    with pytest.raises(BadConfig, match=r"none\.toml: cannot be read"):
        read_job(tmp_path / "none.toml")


def coordinator_in(folder: Path) -> Coordinator:
    return Coordinator(CoordinatorConfig(state_dir=str(folder)), MemoryBroker().bus("coordinator"))


async def stopped_after(coordinator: Coordinator, work: Any) -> Any:
    """Run the coordinator for as long as `work` takes."""
    stop = asyncio.Event()
    running = asyncio.create_task(coordinator.run(stop))
    try:
        return await work
    finally:
        stop.set()
        await running


async def test_of_two_jobs_with_one_name_submitted_at_once_one_is_taken(tmp_path: Path) -> None:
    coordinator = coordinator_in(tmp_path)
    specs = [parse_job(with_line("train", f"n_steps = {n}"), "x") for n in (5, 6)]
    both = asyncio.gather(*(submit(coordinator, spec) for spec in specs), return_exceptions=True)
    first, second = await stopped_after(coordinator, both)
    assert first is None
    assert isinstance(second, Taken)
    assert coordinator.fleet.state.jobs["j"].spec == specs[0]


async def test_a_submitted_job_is_there_after_a_restart(tmp_path: Path) -> None:
    coordinator = coordinator_in(tmp_path)
    await stopped_after(coordinator, submit(coordinator, parse_job(GOOD, "x")))
    again = coordinator_in(tmp_path)
    assert again.fleet.state.jobs["j"].phase is Phase.WAITING
    with pytest.raises(Taken, match=r"choose another job\.name"):
        await submit(again, parse_job(GOOD, "x"))
    again.store.close()


async def test_job_files_in_the_folder_are_submitted_or_refused_with_the_reason(tmp_path: Path) -> None:
    coordinator, folder = coordinator_in(tmp_path / "state"), tmp_path / "jobs"
    folder.mkdir()
    (folder / "a.toml").write_text(GOOD)
    (folder / "b.toml").write_text(GOOD)
    (folder / "c.toml").write_text(with_line("train", "n_step = 5"))

    async def all_moved() -> None:
        while list(folder.glob("*.toml")):  # noqa: ASYNC110 - a folder has no event
            await asyncio.sleep(0)

    watching = asyncio.create_task(watch_folder(coordinator, folder))
    await stopped_after(coordinator, all_moved())
    watching.cancel()
    assert sorted(path.name for path in folder.iterdir()) == [
        "a.submitted",
        "b.reason",
        "b.refused",
        "c.reason",
        "c.refused",
    ]
    assert "a job 'j' already" in (folder / "b.reason").read_text()
    assert "n_step" in (folder / "c.reason").read_text()
