"""Resolve pyproject.toml into requirements.lock and requirements-cuda.lock.

Both hold exact versions with hashes for every Python and platform the packages support.
requirements.lock serves every machine; requirements-cuda.lock adds what only a GPU needs.
Versions already locked stay, unless pyproject.toml rules them out; --upgrade moves them all.
"""

import argparse
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LOCK = ROOT / "requirements.lock"
CUDA_LOCK = ROOT / "requirements-cuda.lock"

CUDA_ONLY = re.compile(r"(cuda|nvidia)-|liger-kernel$|triton$")

# sha256 of torch's Linux CPU builds (2.13.0+cpu), which only PyTorch's own CPU wheel index has.
# It states each one in its link to the file; a new torch needs its own rows here.
TORCH_CPU = {
    "2.13.0": {
        "cp311 x86_64": "6746dbcbeb526eb61330b76b41ff1b4eb848951103a892eeb080dfa2b264667b",
        "cp312 x86_64": "4ca4a9394b0c771238a4f73590fdbbc4debad85ed0fa63d026ae1b085da7d6e2",
        "cp313 x86_64": "3fbf9c9d1f3c10c2d59d04aca426dee9ccc6ceb32d255c61e93acc3b4f75fae6",
        "cp314 x86_64": "d20fa53ee744502fa4c69818a720b05ca0d37abd055d4f6e66cae155114bc691",
        "cp311 aarch64": "84453b69508ec79902f899c5ed9495acb9e2bbe9fda5f1d5d6f19e3c3842e1a7",
        "cp312 aarch64": "6f307c2c32d764ffc6ff6893b801fad6d4752f3e67966cb8abf1843427c02604",
        "cp313 aarch64": "0b8f7d0423027ae8b90c7977c627f3379f325363a08224dffad9b4b2d684a83d",
        "cp314 aarch64": "ca021f9eb2f8345c83fa03e3a04587308afb8df71bd472670b3ece00df58621c",
    }
}

Lock = dict[str, tuple[str, list[str]]]  # name -> (pin with its marker, sorted sha256 digests)


def parse(text: str) -> Lock:
    """Read requirement lines, each followed by its indented ``--hash=sha256:`` lines."""
    locked: Lock = {}
    for entry in re.split(r"\n(?=\S)", text):
        pin = entry.split("\\\n")[0].strip()
        if pin and not pin.startswith("#"):
            locked[pin.split("==")[0]] = (pin, sorted(re.findall(r"sha256:([0-9a-f]{64})", entry)))
    return locked


def write(path: Path, purpose: str, locked: Lock) -> None:
    """Write ``locked`` as ``pip install --require-hashes -r`` reads it, unless it is there."""
    entries = [
        " \\\n".join([pin, *(f"    --hash=sha256:{digest}" for digest in digests)])
        for pin, digests in locked.values()
    ]
    text = "\n".join([f"# {purpose} Written by: make lock", *entries, ""])
    if not path.exists() or path.read_text() != text:  # a newer date rebuilds .venv
        path.write_text(text)


def resolve(upgrade: bool) -> Lock:
    """Resolve with uv; the versions now locked are its starting point unless ``upgrade``."""
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "resolved.txt"
        if not upgrade:
            known = [parse(path.read_text()) for path in (LOCK, CUDA_LOCK) if path.exists()]
            out.write_text("".join(f"{pin}\n" for locked in known for pin, _ in locked.values()))
        command = [sys.executable, "-m", "uv", "pip", "compile", "--quiet", "pyproject.toml"]
        for extra in ("dev", "eval", "gguf", "gpu", "quantize", "serve"):
            command += ["--extra", extra]
        command += ["--universal", "--python-version", "3.11", "--fork-strategy", "fewest"]
        command += ["--generate-hashes", "--no-annotate", "--no-header", "--output-file", str(out)]
        subprocess.run(command, cwd=ROOT, check=True)
        return parse(out.read_text())


def main() -> None:
    """Resolve, split off what only a GPU needs, and write both files."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--upgrade", action="store_true", help="take the newest allowed versions")
    resolved = resolve(options.parse_args().upgrade)

    pin, pypi_digests = resolved["torch"]
    version = pin.split("==")[1]
    if version not in TORCH_CPU:
        sys.exit(f"scripts/lock.py: TORCH_CPU has no digests of torch {version}+cpu. Add them.")

    cuda = {name: entry for name, entry in resolved.items() if CUDA_ONLY.match(name)}
    common = {name: entry for name, entry in resolved.items() if name not in cuda}
    common["torch"] = (pin, sorted({*pypi_digests, *TORCH_CPU[version].values()}))
    # Named in both files, torch must match both: beside the CUDA packages, never a CPU build.
    cuda["torch"] = (pin, pypi_digests)
    write(LOCK, "Every machine.", common)
    write(CUDA_LOCK, "Beside requirements.lock on a machine with an NVIDIA GPU.", cuda)


if __name__ == "__main__":
    main()
