"""Man pages and completions: whatever command there is stands in them, man(1) takes them, and bash completes with them."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer

from fedpipe.__main__ import GROUPS, app

ROOT = Path(__file__).parents[2]
group: Any = typer.main.get_command(app)


@pytest.fixture(scope="module")
def share(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("share")
    subprocess.run([sys.executable, ROOT / "scripts" / "draw_man.py", folder], check=True, cwd=ROOT)
    return folder


def test_every_command_has_its_place(share: Path) -> None:
    page = (share / "man" / "man1" / "fedpipe.1").read_text().replace("\\-", "-")
    for name in group.commands:
        assert f"\n.SS {name}" in page
    for words in ("--take-over", ".SS plan show", ".SS audit verify", "DIR"):
        assert words in page
    assert ".SS check-config" in (share / "man" / "man1" / "fedpipe-agent.1").read_text().replace("\\-", "-")
    assert "--devices" in (share / "man" / "man1" / "fedpipe-coordinator.1").read_text().replace("\\-", "-")


def test_the_help_is_in_order() -> None:
    grouped = [name for names in GROUPS.values() for name in names]
    assert sorted(grouped) == sorted(group.commands)
    assert group.list_commands(None) == grouped


@pytest.mark.skipif(shutil.which("man") is None or shutil.which("groff") is None, reason="needs man and groff")
def test_man_takes_every_page(share: Path) -> None:
    for page in (share / "man" / "man1").iterdir():
        done = subprocess.run(["man", "--warnings", "-l", page], capture_output=True, text=True, check=False)
        assert (done.returncode, done.stderr) == (0, "")
        assert "EXIT STATUS" in done.stdout


def test_bash_completes(share: Path) -> None:
    script = share / "bash-completion" / "completions" / "fedpipe"
    ask = f". {script}; COMP_WORDS=(fedpipe support); COMP_CWORD=1; _fedpipe_completion fedpipe; echo ${{COMPREPLY[@]}}"
    env = {"PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin"}
    done = subprocess.run(["bash", "-c", ask], capture_output=True, text=True, check=True, env=env)
    assert done.stdout.strip() == "support-bundle"
    for other in ("zsh/vendor-completions/_fedpipe", "fish/vendor_completions.d/fedpipe.fish"):
        assert "_FEDPIPE_COMPLETE" in (share / other).read_text()
