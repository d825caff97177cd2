"""`fedpipe init`: a configuration to begin with, filled in with what this machine says of itself.

What was found stands in the file with a word on where; what only its owner can know is marked "yours".  A file that is written here
has been read by the daemon's own code first: it is valid as it stands, except that the lines marked "yours" may not be true yet.
"""

from __future__ import annotations

import os
import re
import socket
import tomllib
from collections.abc import Iterable
from pathlib import Path
from typing import Final, Literal, get_args

import msgspec

from protocol.errors import BadConfig, OutsideFault
from protocol.files import replacing
from protocol.topics import is_id

What = Literal["agent", "coordinator", "job"]

MODEL_DIRS: Final = ("/srv/models", "/models", "/opt/models", "/data/models", "~/models")
DATA_DIRS: Final = ("/srv/data", "/srv/fedpipe/data", "/data")
BROKER_PORTS: Final = ((8883, "mqtts"), (1883, "mqtt"))
EXAMPLE_BROKER: Final = "mqtts://broker.example.org:8883"
LISTENING_S: Final = 0.5


class Written(msgspec.Struct, frozen=True, kw_only=True):
    """Where the file is, what was found out, and what is left to do."""

    file: str
    found: dict[str, str]
    next_step: str


def begin(what: str, out: Path | None, url: str, token_file: Path | None, *, force: bool) -> Written:
    """Write one file.  Raises BadConfig for a kind that there is not, or a place that is taken or cannot be written."""
    kind = next((one for one in get_args(What) if one == what), None)
    if kind is None:
        raise BadConfig(f"{what!r} is nothing to begin with: say one of {', '.join(get_args(What))}")
    file = out or Path(f"{kind}.toml")
    if file.exists() and not force:
        raise BadConfig(f"{file} is there already: name another --out, or give --force to replace it")
    found: dict[str, str] = {}
    match kind:
        case "agent":
            text, after = _agent(found), f"fedpipe doctor agent --config {file}"
        case "coordinator":
            text, after = _coordinator(found), f"fedpipe doctor coordinator --config {file}"
        case _:
            text, after = _job(found, url, token_file), f"fedpipe submit {file} --watch"
    try:
        with replacing(file) as opened:
            opened.write(text.encode())
    except OSError as error:
        raise BadConfig(f"{file} cannot be written: {error.strerror or error}; name another place with --out") from None
    return Written(file=str(file), found=found, next_step=f'look at the lines marked "yours", then: {after}')


def told(done: Written) -> str:
    """For people."""
    return "\n".join(
        [f"{done.file} is written", *(f"  {k}: {v}" for k, v in done.found.items()), f"Next: {done.next_step}"]
    )


# --------------------------------------------------------------------------------------------------------------- agent


def _agent(found: dict[str, str]) -> str:
    from agent.config import AgentConfig
    from protocol.daemon import to_struct

    identity = _identity(found)
    data, bases = _data(found), _models(found)
    settings = [
        "# An agent's configuration.  Every other key with its default: docs/examples/agent.toml",
        "# Check it:  fedpipe-agent check-config        and this machine:  fedpipe doctor agent",
        "",
        *identity,
        'state_dir = "/var/lib/fedpipe-agent"',
        f'device = "auto"                    # {_device(found)}',
        "",
        "[broker]",
        *_broker(found, [line for line in identity if line.startswith("identity_dir")]),
        "",
        *data,
        "",
        "[base]",
        *bases,
        "",
        "# [limits]                         # what fedpipe may take; the host comes first",
        "# memory_ratio = 0.8",
        '# hours = ["20:00-06:00"]',
    ]
    text = "\n".join(settings) + "\n"
    to_struct(tomllib.loads(text), AgentConfig, "the new agent.toml")
    return text


def _identity(found: dict[str, str]) -> list[str]:
    from agent.identity import TRUST_FILE, TrustFile

    folder = Path("/var/lib/fedpipe-agent/identity")
    try:
        trust = msgspec.json.decode((folder / TRUST_FILE).read_bytes(), type=TrustFile)
    except (OSError, msgspec.MsgspecError):
        name = agent_id(socket.gethostname())
        found["agent"] = f"{name}, from this machine's name; not enrolled yet"
        return [
            f'agent = "{name}"  # yours: unique in the fleet; `fedpipe enrol` makes it official',
            'fleet = "main"  # yours',
        ]
    found["agent"] = f"{trust.agent} of fleet {trust.fleet}, as enrolled"
    return [f'agent = "{trust.agent}"', f'fleet = "{trust.fleet}"', f"identity_dir = {_quoted(folder)}"]


def agent_id(name: str) -> str:
    """A machine's name as an id: its first label, in the letters that an id may have."""
    text = re.sub(r"[^a-z0-9]+", "-", name.partition(".")[0].lower()).strip("-")[:64].strip("-")
    return text if is_id(text) else "edge-a"


def _device(found: dict[str, str]) -> str:
    try:
        from agent.gpus import gpus
    except ImportError:
        return "auto, cpu, cuda or cuda:N"
    devices, driver = gpus([])
    text = ", ".join(f"{one.name} ({one.total_bytes / 2**30:.0f} GiB)" for one in devices)
    found["device"] = f"{text}, driver {driver}" if devices else "no NVIDIA GPU: training runs on the CPU"
    return found["device"]


def _models(found: dict[str, str]) -> list[str]:
    here = _models_here()
    if not here:
        found["models"] = f"none below {', '.join(MODEL_DIRS)}"
        return ['model_dirs = ["/srv/models"]      # yours: folders that hold base models as transformers saves them']
    names = [name for names in here.values() for name in names]
    found["models"] = ", ".join(names)
    places = ", ".join(_quoted(place) for place in here)
    return [f"model_dirs = [{places}]", "# a job's model.source is one of:", *(f"#   {name}" for name in names[:20])]


def _models_here() -> dict[Path, list[str]]:
    """Base models by the folder that they lie below."""
    from fedpipe.doctor.training import below

    folders = [folder for place in MODEL_DIRS if (folder := Path(place).expanduser()).is_dir()]
    found = {folder: [str(model.relative_to(folder)) for model in below(folder)] for folder in folders}
    return {folder: names for folder, names in found.items() if names}


def _data(found: dict[str, str]) -> list[str]:
    from agent.data.files import READERS

    for place in DATA_DIRS:
        folder = Path(place)
        if folder.is_dir() and any(file.suffix.lower() in READERS for file in _first(folder.rglob("*"))):
            found["data"] = place
            return [
                "[data.default]                    # a job names it by its last part",
                f'path = "{place}"  # yours?',
            ]
    found["data"] = f"none in {', '.join(DATA_DIRS)}"
    return [
        "# [data.default]                  # yours: what may be trained on here; a job names it by its last part",
        '# path = "/srv/data/notes.jsonl"  # JSONL, JSON, Parquet, CSV, TSV, text, Arrow, or a folder of them',
    ]


def _first(files: Iterable[Path], most: int = 10_000) -> Iterable[Path]:
    """A folder may hold a million files; the first ones tell enough."""
    return (file for _, file in zip(range(most), files, strict=False))


# --------------------------------------------------------------------------------------------------------- coordinator


def _coordinator(found: dict[str, str]) -> str:
    from coordinator.config import CoordinatorConfig
    from protocol.daemon import to_struct

    name = socket.getfqdn()
    found["name"] = name
    settings = [
        "# A coordinator's configuration.  Every other key with its default: docs/examples/coordinator.toml",
        "# Check it:  fedpipe-coordinator check-config  and this machine:  fedpipe doctor coordinator",
        "",
        'fleet = "main"  # yours: part of every topic',
        'state_dir = "/var/lib/fedpipe-coordinator"  # back this folder up',
        "",
        "[broker]",
        *_broker(found, []),
        "",
        "[web]",
        'host = "127.0.0.1"  # another address needs token_file',
        "port = 8470",
        "",
        "[trust]  # in force once `fedpipe-coordinator ca init` has made the authority",
        f"names = [{_quoted(name)}]  # yours: under which servers reach this machine",
    ]
    text = "\n".join(settings) + "\n"
    to_struct(tomllib.loads(text), CoordinatorConfig, "the new coordinator.toml")
    return text


def _broker(found: dict[str, str], identity: list[str]) -> list[str]:
    """An enrolled server was told a broker, with its certificates; else one on this machine, else nobody knows."""
    tls = []
    if identity:
        folder = Path(identity[0].partition("=")[2].strip().strip('"'))
        tls = [f"ca_file = {_quoted(folder / 'ca.pem')}", f"cert_file = {_quoted(folder / 'agent.pem')}"]
    for port, scheme in BROKER_PORTS:
        if not tls and _listens(port):
            found["broker"] = f"something listens on this machine's port {port}"
            return [f'url = "{scheme}://127.0.0.1:{port}"  # yours?']
    found["broker"] = "nobody knows yet"
    return [f'url = "{EXAMPLE_BROKER}"  # yours', *tls]


def _listens(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), LISTENING_S).close()
    except OSError:
        return False
    return True


# ----------------------------------------------------------------------------------------------------------------- job


def _job(found: dict[str, str], url: str, token_file: Path | None) -> str:
    from coordinator.submission import parse_job

    taken, n_online = _fleet(found, url, token_file)
    source = next((name for names in _models_here().values() for name in names), "")
    if source:
        found["model"] = source
    name = next(name for n in range(1, len(taken) + 2) if (name := f"job-{n}") not in taken)
    settings = [
        "# A job.  What is missing here is for the planner to decide; every key with its default: docs/examples/job.toml",
        "# Check it:  fedpipe-coordinator check-job job.toml        Hand it in:  fedpipe submit job.toml --watch",
        "",
        "[job]",
        f'name = "{name}"  # yours: unique on this coordinator',
        'data = "default"  # the agents\' data set: [data.default] in their configuration',
        "",
        "[model]",
        f"source = {_quoted(source or 'llama-7b')}  # yours: a folder below the agents' model_dirs",
        "",
        "[round]",
        "n_rounds = 10",
        f"min_agents = {max(1, min(2, n_online))}  # below this a round waits",
        "",
        "[evaluate]",
        'metrics = ["perplexity"]  # also token_accuracy, exact_match, rouge_l',
    ]
    text = "\n".join(settings) + "\n"
    parse_job(text, "the new job.toml")
    return text


def _fleet(found: dict[str, str], url: str, token_file: Path | None) -> tuple[set[str], int]:
    """Names that are taken, and how many agents are there, if a coordinator answers."""
    from fedpipe.client import Coordinator

    try:
        with Coordinator(url, token_file) as coordinator:
            fleet = coordinator.fleet()
    except OutsideFault as error:
        found["fleet"] = f"not asked: {error}"
        return set(), 0
    online = [one.id for one in fleet.agents if one.online]
    found["fleet"] = f"{len(online)} agents online, {len(fleet.jobs)} jobs"
    return {job.name for job in fleet.jobs}, len(online)


# ---------------------------------------------------------------------------------------------------------------- TOML


def _quoted(value: object) -> str:
    """A TOML string; also of a path with quotes in it."""
    return msgspec.json.encode(os.fspath(value) if isinstance(value, Path) else value).decode()
