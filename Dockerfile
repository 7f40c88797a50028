# Both images of Mizzen. `control` (operator, gateway) has no PyTorch; `runtime` (server, trainer) has.
#
#   docker build --target control .         docker build --target runtime .
#
# BASE_IMAGE   Debian-like, with python3 (3.11 or newer) and its venv module.
# TORCH_INDEX  another package index for PyTorch alone, such as one with wheels for the CPU only.
# SLIM_TORCH   1 leaves out what PyTorch never touches on a machine without a GPU.
ARG BASE_IMAGE=python:3.11-slim


# The project alone, as a wheel, in the environment that all images have.
FROM ${BASE_IMAGE} AS project
# For the CPU kernels, which are part of the wheel.
RUN apt-get update -q && \
    apt-get install -q -y --no-install-recommends gcc libc6-dev && \
    rm -rf /var/lib/apt/lists/*
COPY requirements/build.lock /opt/build.lock
RUN python3 -m venv /opt/tools && \
    /opt/tools/bin/pip install --quiet --no-cache-dir --disable-pip-version-check \
        --require-hashes -r /opt/build.lock
COPY pyproject.toml hatch_build.py README.md LICENSE /src/
COPY mizzen /src/mizzen
COPY operator /src/operator
COPY runtime /src/runtime
RUN cd /src && /opt/tools/bin/hatchling build -t wheel -d /wheels && cd / && \
    /opt/tools/bin/uv venv --quiet --python "$(command -v python3)" /opt/mizzen && \
    /opt/tools/bin/uv pip install --quiet --no-cache --no-deps --link-mode copy \
        --python /opt/mizzen/bin/python /wheels/*.whl && \
    # A file that does not parse ends the build here.
    /opt/mizzen/bin/python -m compileall -q --invalidation-mode unchecked-hash /opt/mizzen/lib && \
    # The wheel follows two links; without them it would be an empty shell that still installs.
    /opt/mizzen/bin/python -c "from importlib.util import find_spec as find; \
        assert all(map(find, ('mizzen.cli', 'mizzen.operator.crds', 'mizzen.runtime.gateway')))" && \
    # A wheel is made without its kernels too, where there is no compiler.
    ls /opt/mizzen/lib/python3*/site-packages/mizzen/runtime/kernels/*.so


# What both images share: who runs, and where nothing needs to be written.
FROM ${BASE_IMAGE} AS common
RUN echo "mizzen:x:65532:65532::/tmp:/usr/sbin/nologin" >> /etc/passwd && \
    echo "mizzen:x:65532:" >> /etc/group
ENV PATH=/opt/mizzen/bin:/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin \
    HOME=/tmp \
    LANG=C.UTF-8 \
    PYTHONSAFEPATH=1 \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1
WORKDIR /tmp
ENTRYPOINT ["mizzen"]
COPY hack/images/install.sh requirements/uv.lock /opt/mizzen/build/


# Both images but for the project, so that these layers can be made before it is ready.
FROM common AS control-packages
COPY requirements/control.lock /opt/mizzen/build/
RUN sh /opt/mizzen/build/install.sh control.lock


FROM control-packages AS control
COPY --from=project /opt/mizzen /opt/mizzen
USER 65532:65532


# The largest layer first: it changes with its pin only, and stays on nodes that have it.
FROM common AS runtime-packages
ARG SLIM_TORCH=0
# Triton compiles a small launcher for each kernel, on the machine with the GPU.
RUN if [ "$SLIM_TORCH" != 1 ]; then \
        apt-get update -q && \
        apt-get install -q -y --no-install-recommends gcc libc6-dev && \
        rm -rf /var/lib/apt/lists/*; \
    fi
ARG TORCH_INDEX=
COPY requirements/torch.lock /opt/mizzen/build/
RUN TORCH_INDEX="$TORCH_INDEX" SLIM_TORCH="$SLIM_TORCH" sh /opt/mizzen/build/install.sh torch.lock
COPY requirements/runtime.lock /opt/mizzen/build/
RUN sh /opt/mizzen/build/install.sh runtime.lock


FROM runtime-packages AS runtime
COPY --from=project /opt/mizzen /opt/mizzen
USER 65532:65532
