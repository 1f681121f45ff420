#!/usr/bin/env bash
# Generates the Python code of the protocols again; needs grpcio-tools (extra `dev`).
set -eu
cd "$(dirname "$0")"
for name in lazarus keeper; do
  "${PYTHON:-python3}" -m grpc_tools.protoc -I . --python_out=. --pyi_out=. --grpc_python_out=. "$name.proto"
  sed -i "s/^import ${name}_pb2 as ${name}__pb2/from lazarus.runtime.rpc import ${name}_pb2 as ${name}__pb2/" "${name}_pb2_grpc.py"
done
