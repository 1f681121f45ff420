#!/usr/bin/env bash
# Make or repair the virtual environment at $1 and install this project with the tested versions.
# A broken or foreign environment is replaced; nothing outside it is touched.
set -euo pipefail
venv=$1

newest_python() {
  local name
  for name in python3 python3.11 python3.12 python3.13 python3.14; do
    if command -v "$name" >/dev/null &&
      "$name" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
      command -v "$name"
      return
    fi
  done
  echo "error: Python >= 3.11 is needed, found: $(python3 --version 2>&1 || echo none)" >&2
  exit 1
}

usable() {
  [ -x "$venv/bin/python" ] &&
    "$venv/bin/python" -c 'import pip, sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null
}

if ! usable; then
  python=$(newest_python)
  echo "making $venv with $("$python" --version)"
  rm -rf "$venv"
  if ! "$python" -m venv "$venv" 2>/dev/null; then
    rm -rf "$venv"
    echo "error: $python has no working venv module; on Debian: apt-get install python3-venv" >&2
    exit 1
  fi
fi
echo "installing the tested versions (about 2 GB with a CPU build of torch, several more with CUDA; minutes)"
"$venv/bin/python" -m pip install --quiet --prefer-binary -c constraints.txt -e '.[dev]'
"$venv/bin/python" -c 'import lazarus, placement, dispatcher, torch, ray'
echo "ready: $("$venv/bin/python" -c 'import torch, ray; print("torch", torch.__version__, "ray", ray.__version__)')"
