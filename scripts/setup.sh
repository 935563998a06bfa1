#!/usr/bin/env bash
# Build .venv from the lock files, for `make setup`. Reads PYTHON, CUDA and TORCH_INDEX.
set -euo pipefail
cd "$(dirname "$0")/.."

stop() {
  echo "make setup: $*" >&2
  exit 1
}

python=${PYTHON:-python3}
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
  stop "ftpipe needs Python 3.11 or newer, but $python is not: name one, as in 'make setup PYTHON=python3.12'."

if [ -z "${CUDA:-}" ]; then
  CUDA=0
  if [ -e /dev/nvidia0 ] || nvidia-smi -L >/dev/null 2>&1; then CUDA=1; fi
fi
if [ "$CUDA" = 1 ]; then
  echo "Setting up .venv with CUDA, once: several GB, about 5 minutes on a fast line."
else
  echo "Setting up .venv, once: about 2 minutes."
fi

rm -rf .venv
"$python" -m venv .venv
pip() { .venv/bin/python -m pip --disable-pip-version-check "$@"; }

sources=(-r requirements.lock)
if [ "$CUDA" = 1 ]; then
  sources+=(-r requirements-cuda.lock)
elif [ "$(uname -s)" = Linux ]; then
  # On Linux, plain torch is the CUDA build: insist on the CPU one, and see that there is one.
  torch_cpu=$(sed -n 's/^torch==\([^ ;]*\).*/\1+cpu/p' requirements.lock)
  echo "torch==$torch_cpu" >.venv/torch-cpu.txt
  sources+=(-c .venv/torch-cpu.txt)
  if [ -d "${TORCH_INDEX:-}" ]; then
    index=(--find-links "$TORCH_INDEX")
  else
    index=(${TORCH_INDEX:+--extra-index-url "$TORCH_INDEX"})
  fi
  offered=$(pip index versions torch ${index[@]+"${index[@]}"} 2>&1) || stop "pip finds no torch at all: $offered"
  case $offered in
    *"$torch_cpu"*) sources+=(${index[@]+"${index[@]}"}) ;;
    *) stop "pip is offered no torch $torch_cpu, the build for machines without a GPU:" \
      "set TORCH_INDEX to PyTorch's CPU wheel index (the address that pytorch.org shows under" \
      "'Get started' for Linux, Pip, Python, CPU), or set CUDA=1 for the CUDA build (several GB)." ;;
  esac
fi

# deepspeed and antlr4 come as source only. They are built with the locked setuptools, and before
# torch is there: deepspeed asks for other packages when it can see torch.
awk '/^[^ ]/ { keep = /^setuptools==/ } keep' requirements.lock >.venv/build-tools.txt
pip install --quiet --require-hashes -r .venv/build-tools.txt
# The lock is whole, so nothing is resolved anew (pip takes a pin of a package for none of its extras).
pip install --require-hashes --no-deps --no-build-isolation "${sources[@]}" 2>.venv/pip-errors.txt |
  awk '/Downloading .* [MG]B/ { sub(/.*Downloading /, ""); split($0, part, "-"); size = $(NF - 1) " " $NF
         print "  " part[1], part[2], size; fflush() }
       /^Installing/ { print "  installing"; fflush() }' ||
  stop "$(grep -v '^WARNING' .venv/pip-errors.txt)"
