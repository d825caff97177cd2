"""What snapshots of a large fleet cost: 20 rounds of one job, whole and in pieces.

    python -m bench.snapshots [--agents 3000] [--matrices 224] [--rounds 20] [--rescored]

The state is made up in the shape that a survey of a 7B model leaves: every agent has named the same matrices, has scores of 64
triplets for each, and is planned for with one of four sets of ranks.  A round changes every agent's factors of time and memory
and the digest of its update; with --rescored each also moves the eight first scores of the half of the matrices it trained.
"""

from __future__ import annotations

import argparse
import random
import tempfile
import time
from pathlib import Path

from coordinator.core.choice import Choice, Prediction
from coordinator.core.fleet import decode_state, encode_state
from coordinator.core.spec import Head, JobSpec, Rounds
from coordinator.core.state import AgentState, FleetState, JobState, Member, RoundPlan, Share
from coordinator.store import Store
from protocol.messages import Base, Calibrated, ExecState, Matrix, Surveyed

WIDTH = 64
N_MOVED = 8


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.snapshots", description=__doc__.splitlines()[0])
    parser.add_argument("--agents", type=int, default=3000)
    parser.add_argument("--matrices", type=int, default=224)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--rescored", action="store_true", help="updates bring scores")
    asked = parser.parse_args()
    state = made_up(asked.agents, asked.matrices)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "journal.sqlite"
        store = Store(path)
        n_bytes, encode_s, save_s, written = [], [], [], []
        for number in range(1, asked.rounds + 1):
            move_on(state, number, rescored=asked.rescored)
            began = time.perf_counter()
            data = encode_state(state)
            encode_s.append(time.perf_counter() - began)
            before, began = path.stat().st_size, time.perf_counter()
            store.save_snapshot(number, data)
            save_s.append(time.perf_counter() - began)
            n_bytes.append(len(data))
            store.shrink()
            written.append(path.stat().st_size - before)
        began = time.perf_counter()
        found = store.load_snapshot()
        read_s = time.perf_counter() - began
        assert found is not None
        assert encode_state(decode_state(found[1])) == data
        store.shrink()
        store.close()
        print(f"{asked.agents} agents, {asked.matrices} matrices, {'' if asked.rescored else 'not '}rescored")
        print(f"  one state         {n_bytes[-1] / 1e6:8.1f} MB, encoded in {median(encode_s):.2f} s")
        print(f"  20 of them whole  {sum(n_bytes) / 1e6:8.1f} MB")
        print(f"  journal.sqlite    {path.stat().st_size / 1e6:8.1f} MB after {asked.rounds} rounds")
        print(
            f"  written           {written[0] / 1e6:8.1f} MB, {written[1] / 1e6:.1f} MB, then {median(written[2:]) / 1e6:.1f} MB a round"
        )
        print(
            f"  saved in          {save_s[0]:8.2f} s, {save_s[1]:.2f} s, then {median(save_s[2:]):.2f} s; read in {read_s:.2f} s"
        )


def median(values: list[float] | list[int]) -> float:
    return sorted(values)[len(values) // 2]


def made_up(n_agents: int, n_matrices: int) -> FleetState:
    """A fleet after its surveys and its first plan."""
    chance = random.Random(1)
    kinds = [f"self_attn.{one}_proj" for one in "qkvo"] + [f"mlp.{one}_proj" for one in ("gate", "up", "down")]
    names = [f"model.layers.{i // 7}.{kinds[i % 7]}" for i in range(n_matrices)]
    matrices = [Matrix(name=name, d_out=4096, d_in=4096) for name in sorted(names)]
    tiers = [{name: chance.choice([4, 8, 16, 32]) for name in names[: n_matrices * (i + 1) // 4]} for i in range(4)]
    job = JobState(
        spec=JobSpec(
            job=Head(name="j", data="text"), model=Base(source="a/b"), round=Rounds(n_rounds=50, min_agents=2)
        ),
        submitted_at=0.0,
        base_sha256="0" * 64,
        matrices=matrices,
    )
    state, choices = FleetState(jobs={"j": job}), {}
    for number in range(n_agents):
        agent = f"edge-{number:05d}"
        state.agents[agent] = AgentState(id=agent, session=f"{number:016x}", online=True, methods=["qlora"])
        job.members[agent] = Member(
            survey=Share(agent=agent, attempt=0, state=ExecState.DONE, serial=4),
            surveyed=Surveyed(base_sha256="0" * 64, matrices=matrices, n_train=1000 + number, n_eval=100),
            calibrated=Calibrated(
                device="cuda:0",
                probe_rank=WIDTH,
                scores=chance.randbytes(4 * WIDTH * n_matrices),
                seconds=chance.random(),
            ),
        )
        predicted = Prediction(
            step_s=chance.random(),
            train_s=1.0,
            down_s=1.0,
            up_s=1.0,
            peak_bytes=number,
            limit_bytes=1,
            up_bytes=1,
            progress=1.0,
        )
        choices[agent] = Choice(
            ranks=tiers[number % 4], bits="nf4", n_steps=10, batch=4, why="as it fits", predicted=predicted
        )
    job.plan = RoundPlan(round=1, reason="the first plan", choices=choices)
    return state


def move_on(state: FleetState, number: int, *, rescored: bool) -> None:
    """What a round changes."""
    chance, job = random.Random(number), state.jobs["j"]
    job.round_number = job.version = number
    for at, (agent, member) in enumerate(job.members.items()):
        member.time_factor, member.memory_factor = 1 + chance.random(), 1 + chance.random()
        job.seen[agent] = {number: chance.randbytes(32).hex()}
        if rescored:
            names = [m.name for m in job.matrices[at % 2 :: 2]]
            member.learned |= {name: chance.randbytes(4 * N_MOVED) for name in names}


if __name__ == "__main__":
    main()
