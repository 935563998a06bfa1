"""Commands of Slurm that write down what they are asked, for what needs no real one."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

SBATCH = """\
#!/bin/bash
case "$*" in *--test-only*) asked=test ;; *) asked=submit ;; esac
cat >script
name=$(sed -n 's/^#SBATCH --job-name=//p' script)
echo "$asked $name $*" >>{calls}
if [ -e {folder}/refuse-$asked-$name ]; then
  echo 'sbatch: error: Batch job submission failed: Invalid qos specification' >&2
  exit 1
fi
[ "$asked" = test ] || echo $((100 + $(grep -c ^submit {calls})))
"""
SCONTROL = """\
#!/bin/bash
[ -e "{folder}/job-${{@: -1}}" ] || exit 1
cat "{folder}/job-${{@: -1}}"
"""
SCANCEL = """\
#!/bin/bash
echo "cancel $*" >>{calls}
"""


class Commands:
    """Stand-ins for Slurm's commands."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._calls = folder / "calls"
        self._calls.touch()
        for name, text in (("sbatch", SBATCH), ("scontrol", SCONTROL), ("scancel", SCANCEL)):
            file = folder / name
            file.write_text(text.format(folder=folder, calls=self._calls), encoding="utf-8")
            file.chmod(0o755)

    def calls(self) -> list[str]:
        return self._calls.read_text(encoding="utf-8").splitlines()

    def refuse(self, when: str, name: str) -> None:
        (self._folder / f"refuse-{when}-{name}").touch()

    def say(self, job: str, text: str) -> None:
        """Let scontrol say this of a job."""
        (self._folder / f"job-{job}").write_text(text + "\n", encoding="utf-8")


@pytest.fixture
def commands(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Commands:
    folder = tmp_path_factory.mktemp("commands")
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")
    return Commands(folder)


@pytest.fixture
def no_slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave bash on the path, and no command of Slurm."""
    folder = tmp_path / "few"
    folder.mkdir()
    for name in ("bash", "git", "sh"):
        found = next(
            (Path(at) / name for at in ("/bin", "/usr/bin") if (Path(at) / name).exists()), None
        )
        if found is not None:
            os.symlink(found, folder / name)
    monkeypatch.setenv("PATH", str(folder))
