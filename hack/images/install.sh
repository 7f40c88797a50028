#!/bin/sh
# Installs one lock file into /opt/mizzen, inside an image build: install.sh LOCK
set -eu
here=$(dirname "$0")
lock=$here/$1
export UV_LINK_MODE=copy UV_NO_PROGRESS=1 UV_PYTHON_DOWNLOADS=never UV_SYSTEM_CERTS=1
# The root file system is read-only, so what is not compiled here would be compiled at every start.
export UV_COMPILE_BYTECODE=1 PYC_INVALIDATION_MODE=UNCHECKED_HASH
# The builder's cache where one is mounted; otherwise none may stay in the layer.
if [ -d /var/cache/uv ]; then export UV_CACHE_DIR=/var/cache/uv; else export UV_NO_CACHE=1; fi

# Only for this layer: the images hold no installer.
python3 -m venv /opt/tools
/opt/tools/bin/pip install --quiet --no-cache-dir --disable-pip-version-check \
    --require-hashes -r "$here/uv.lock"
uv=/opt/tools/bin/uv
"$uv" venv --quiet --allow-existing --python "$(command -v python3)" /opt/mizzen
export VIRTUAL_ENV=/opt/mizzen
if [ -n "${TORCH_INDEX:-}" ]; then
    # Another index has other files: the version is kept, the hashes cannot be.
    "$uv" pip install --quiet --index "$TORCH_INDEX" "$(grep -o '^torch==[^ ]*' "$lock")"
else
    "$uv" pip install --quiet --require-hashes --no-deps -r "$lock"
fi
rm -rf /opt/tools

cd /opt/mizzen/lib/python3*/site-packages
# Packages' own tests are a tenth of the size.
find . -type d -name tests -prune -exec rm -rf {} +
# Ray's half for Java.
rm -rf ray/jars
if [ "${SLIM_TORCH:-0}" = 1 ]; then
    # Compilers and engines for a GPU that no library of PyTorch links; loading it proves that.
    rm -rf triton torch/include torch/test nvidia/*/include nvidia/cudnn/lib/libcudnn_*.so.*
    cd nvidia/cu13/lib
    rm -f libcusolverMg.* libnvrtc.alt.* libnvrtc-builtins.alt.* libnvperf_* libnvblas.* \
        libcufftw.* ./*.a
    cd /
    /opt/mizzen/bin/python -W ignore -c 'import torch; torch.linalg.svd(torch.rand(4, 4))'
fi
