"""The machines of a how-to page, so that a test can type what stands there: each is a folder, and its commands run in a shell.

A block of the page says in its title where it is typed (`hub`), or which file it is (`hub: /etc/fedpipe/coordinator.toml`).

    /etc, /var/lib, /srv       below the machine's folder; so are the places that our commands take when none is given
    hub.example.org:8883       a free port of this machine
    ssh, scp                   the same in another machine's folder
    systemctl                  a process that is kept alive as systemd would (fedpipe/cluster.py)
    apt-get, chown             nothing: they need root, see tests/deploy

Everything else is what it is: our own commands, sed, openssl, curl, the loop over all servers.
"""

from __future__ import annotations

import asyncio
import getpass
import json
import os
import re
import shutil
import signal
import sys
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, NamedTuple

import tomli_w

from fedpipe.broker import free_port, mosquitto_command
from fedpipe.cluster import Cluster, port_open

ROOT: Final = Path(__file__).parents[2]
NEED_ROOT: Final = ("apt-get", "chown", "fedpipe-setup")
STAND_IN: Final = """\
#!{python} -IS
import json, os, socket, sys
with socket.socket(socket.AF_UNIX) as link:
    link.connect("{socket}")
    link.sendall(json.dumps([os.environ["MACHINE"], os.path.basename(sys.argv[0]), *sys.argv[1:]]).encode() + b"\\n")
    code, out = json.load(link.makefile())
sys.stdout.write(out)
sys.exit(code)
"""
OURS: Final = """\
#!/bin/bash
etc=$PLACE/etc/fedpipe
case "$(basename "$0") $1 $2" in
"fedpipe enrol "*) set -- "$@" --config "$etc/agent.toml" --state-dir "$PLACE/var/lib/fedpipe-agent" ;;
"fedpipe doctor operator") ;;
"fedpipe doctor "*) set -- "$@" --config "$etc/$2.toml" ;;
"fedpipe mosquitto-config "*) set -- "$@" --config "$etc/coordinator.toml" --port {broker_port} ;;
"fedpipe audit "* | "fedpipe-coordinator ca "*) set -- "$@" --config "$etc/coordinator.toml" ;;
"fedpipe-agent check-config "*) set -- "$@" --config "$etc/agent.toml" ;;
"fedpipe-coordinator check-config "*) set -- "$@" --config "$etc/coordinator.toml" ;;
esac
module=$(basename "$0")
exec {python} -m "${{module#fedpipe-}}" "$@"
"""


class Block(NamedTuple):
    """What is typed on a machine, or the content of a file there."""

    section: str
    machine: str
    file: str
    text: str


def blocks(page: Path) -> list[Block]:
    """Every block of a page that has a title, in its order."""
    section, found = "", []
    pattern = r'^## ([^\n]*)$|^```\w+ title="([\w-]+)(?:: (\S+))?"\n(.*?)^```$'
    for heading, machine, file, text in re.findall(pattern, page.read_text("utf-8"), re.MULTILINE | re.DOTALL):
        section = heading or section
        if machine:
            found.append(Block(section, machine, file, text))
    return found


class Machines:
    """All machines of a page.  `tuned` has settings by the name of a file: ports that are free here, and shorter times."""

    def __init__(self, folder: Path, page: Path, tuned: Mapping[str, dict[str, Any]]) -> None:
        self.folder, self.tuned = folder, tuned
        self.cluster = Cluster(folder / "logs")
        self.broker_port, self.desk_port, self.api_port, self.figures_port = (free_port() for _ in range(4))
        self.left = blocks(page)
        self.url = f"https://127.0.0.1:{self.api_port}"
        self._names = {
            "hub.example.org:8883": f"127.0.0.1:{self.broker_port}",
            "hub.example.org:8443": f"127.0.0.1:{self.desk_port}",
            "hub.example.org:8470": f"127.0.0.1:{self.api_port}",
            "127.0.0.1:9464": f"127.0.0.1:{self.figures_port}",
            "--host hub.example.org": "--host 127.0.0.1",
            '"hub.example.org"': '"127.0.0.1"',
        }
        self._tasks: set[asyncio.Task[None]] = set()

    async def open(self) -> None:
        """Make the commands that stand in for others, and answer them."""
        tools = self.folder / "bin"
        tools.mkdir(parents=True)
        self._socket = self.folder / "asked"
        for name in ("ssh", "scp", "systemctl", *NEED_ROOT):
            (tools / name).write_text(STAND_IN.format(python=sys.executable, socket=self._socket))
        for name in ("fedpipe", "fedpipe-agent", "fedpipe-coordinator"):
            (tools / name).write_text(OURS.format(python=sys.executable, broker_port=self.broker_port))
        for tool in tools.iterdir():
            tool.chmod(0o755)
        self._server = await asyncio.start_unix_server(self._asked, self._socket)

    async def close(self) -> None:
        """End every process."""
        for task in self._tasks:
            task.cancel()
        await self.cluster.stop()
        self._server.close()

    def place(self, machine: str, path: str = "") -> Path:
        """A file of a machine; every machine has the folders that Debian has."""
        place = self.folder / machine
        for folder in ("root", "etc/fedpipe", "etc/mosquitto/conf.d", "var/lib", "srv"):
            (place / folder).mkdir(parents=True, exist_ok=True)
        return place / path.lstrip("/") if path.startswith("/") else place / "root" / path

    # ---------------------------------------------------------------------------------------------------------- the page

    def take(self, section: str) -> list[Block]:
        """The blocks of the section that comes next, and no other."""
        assert self.left, f"the page has nothing after {section}"
        found = [block for block in self.left if block.section == self.left[0].section]
        assert found[0].section.partition(". ")[0] == section, f"{found[0].section} comes before {section}"
        self.left = self.left[len(found) :]
        return found

    async def follow(self, section: str) -> str:
        """Do what a section says; what its last block printed."""
        out = ""
        for block in self.take(section):
            out = await self.do(block)
        return out

    async def do(self, block: Block, **words: str) -> str:
        """Type one block, or write its file; `words` are put in place of those that the page leaves open."""
        if block.file:
            place = self.place(block.machine, block.file)
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_text(self._local(block.machine, block.text))
            self._tune(place)
            return ""
        text = block.text
        for word, meant in words.items():
            assert word in text
            text = text.replace(word, meant)
        return await self.type(block.machine, text)

    async def type(self, machine: str, text: str) -> str:
        """Run commands on a machine until one fails, which is an error; what they printed."""
        code, out, errors = await self._run(machine, self._local(machine, text))
        assert code == 0, f"on {machine}:\n{text}\n{out}\n{errors}"
        return out

    def _here(self, text: str) -> str:
        for name, here in self._names.items():
            text = text.replace(name, here)
        return text

    def _local(self, machine: str, text: str) -> str:
        return re.sub(r"(?<![\w./-])/(?=(?:etc|var/lib|srv)/)", f"{self.place(machine, '/')}/", self._here(text))

    def _tune(self, place: Path) -> None:
        """Change what a configuration says, as often as one likes: the ports of this machine, and what the test wants."""
        ports = {"trust": {"port": self.desk_port}, "web": {"port": self.api_port}}
        more = self.tuned.get(place.name, {})
        found = tomllib.loads(place.read_text()) if more else {}
        for settings in (more, ports if place.name == "coordinator.toml" else {}):
            for name, value in settings.items():
                found[name] = found.get(name, {}) | value if isinstance(value, dict) else value
        if found:
            place.write_text(self._here(tomli_w.dumps(found)))

    async def _run(self, machine: str, text: str) -> tuple[int, str, str]:
        home = self.place(machine, ".")
        environment = {
            "PATH": f"{self.folder / 'bin'}:{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
            "NO_PROXY": "127.0.0.1",
            "HOME": str(home),
            "MACHINE": machine,
            "PLACE": str(self.place(machine, "/")),
            "COLUMNS": "200",
            "BASH_ENV": str(home / ".profile"),
        }
        process = await asyncio.create_subprocess_exec(
            *("bash", "-euo", "pipefail", "-c", text),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            env=environment,
            cwd=home,
        )
        out, errors = await process.communicate()
        assert process.returncode is not None
        return process.returncode, out.decode(), errors.decode()

    # ----------------------------------------------------------------------------------------------- what is stood in for

    async def _asked(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        machine, program, *words = json.loads(await reader.readline())
        try:
            answer = await self._answer(machine, program, words)
        except Exception as error:  # noqa: BLE001 - it is told where it was typed
            answer = (1, f"{program}: {error!r}\n")
        writer.write(json.dumps(answer).encode())
        writer.close()

    async def _answer(self, machine: str, program: str, words: list[str]) -> tuple[int, str]:
        told = [word for word in words if not word.startswith("-")]
        match program:
            case "ssh":
                other = _host(told[0])
                own, its = (str(self.place(one, "/")) for one in (machine, other))
                code, out, errors = await self._run(other, " ".join(told[1:]).replace(own, its))
                return code, out + errors
            case "scp":
                *sources, target = (self._there(machine, word) for word in told)
                for source in sources:
                    copy = Path(shutil.copy(source, target))
                    copy.write_bytes(copy.read_bytes().replace(self._root(source), self._root(target)))
            case "systemctl" if told != ["daemon-reload"]:
                await self._systemctl(machine, told[0], told[-1])
        return 0, ""

    def _there(self, machine: str, word: str) -> Path:
        host, colon, path = word.rpartition(":")
        if not colon:
            return self.place(machine, path)
        own = str(self.place(machine, "/"))
        return self.place(_host(host), path.removeprefix(own) if path.startswith(own) else path)

    def _root(self, file: Path) -> bytes:
        """The folder of the machine that has it: as bytes, what / became in its texts."""
        return f"{self.folder / file.relative_to(self.folder).parts[0]}/".encode()

    async def _systemctl(self, machine: str, verb: str, unit: str) -> None:
        name = machine if unit == "fedpipe-agent" else unit
        if verb == "kill":
            process = self.cluster.members[name].process
            assert process is not None
            process.send_signal(signal.SIGKILL)
        elif name in self.cluster.members:
            await self.cluster.down(name)
            await self.cluster.up(name)
        elif unit.endswith(".path"):
            self._tasks.add(asyncio.create_task(self._reload_mosquitto(unit)))
        elif unit == "mosquitto":
            conf, included = self.place(machine, "/etc/mosquitto/mosquitto.conf"), "/etc/mosquitto/conf.d"
            conf.write_text(
                self._local(machine, f"user {getpass.getuser()}\nlog_dest stdout\ninclude_dir {included}\n")
            )
            *command, _ = mosquitto_command(self.broker_port, self.folder / "bin")
            await self.cluster.add(name, [*command, str(conf)])
        else:
            role = unit.removeprefix("fedpipe-")
            config = self.place(machine, f"/etc/fedpipe/{role}.toml")
            self._tune(config)
            command = [sys.executable, "-m", role, "run", "--config", str(config)]
            await self.cluster.add(name, command, {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"})
        if port := {"mosquitto": self.broker_port, "fedpipe-coordinator": self.desk_port}.get(unit):
            await port_open("127.0.0.1", port, 30, unit)

    async def _reload_mosquitto(self, unit: str) -> None:
        """What the unit of this name does, and the service that it starts."""
        text = (ROOT / "deploy" / "mosquitto" / unit).read_text()
        files = [self.place("hub", path) for path in re.findall(r"^PathChanged=(.*)$", text, re.MULTILINE)]
        assert files
        seen = [file.stat().st_mtime_ns for file in files]
        while True:
            await asyncio.sleep(0.1)
            now = [file.stat().st_mtime_ns for file in files]
            process = self.cluster.members["mosquitto"].process
            if now != seen and process is not None and process.returncode is None:
                process.send_signal(signal.SIGHUP)
                seen = now


def _host(word: str) -> str:
    name = word.rpartition("@")[2]
    return "hub" if name == "hub.example.org" else name
