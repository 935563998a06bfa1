#!/usr/bin/env bash
# Build .venv-quantizer, for `make quantizer`: llmcompressor with the versions that it asks for, and the
# torch of .venv, which is the one for this machine.
set -euo pipefail
cd "$(dirname "$0")/.."

rm -rf .venv-quantizer
.venv/bin/python -m venv .venv-quantizer
packages() { "$1/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))'; }
packages .venv >"$(packages .venv-quantizer)/beside.pth" # what is in its own folder comes first
.venv-quantizer/bin/python -m pip --disable-pip-version-check install --quiet llmcompressor==0.14.0.1 \
  compressed-tensors==0.19.0 2>.venv-quantizer/pip-errors.txt || {
  grep -v '^WARNING' .venv-quantizer/pip-errors.txt >&2
  exit 1
}
