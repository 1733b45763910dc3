# trunkline in a container: `docker build .`, then `docker run -p 127.0.0.1:8000:8000 IMAGE`.
#
# BASE         an image with Python 3.11 and its venv module, for both stages.
# DEVICE       cpu or cuda. With cuda the build fails unless torch has CUDA in it; the CUDA
#              libraries come with torch's wheels, the driver from the machine.
# TORCH_INDEX  an index to take torch from: the one of CPU wheels that PyTorch's install page
#              names makes an image a tenth of the size. Empty: whatever pip takes torch from.
# BUILD_TOOLS  Debian packages for options that compile at run time (g++); none by default.
ARG BASE=python:3.11-slim-bookworm

# hadolint ignore=DL3006
FROM ${BASE} AS build
ARG DEVICE=cpu
ARG TORCH_INDEX=
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PATH=/opt/trunkline/bin:$PATH
WORKDIR /src
COPY constraints.txt ./
# torch first: the largest layer changes only with its version.
RUN python3 -m venv /opt/trunkline \
 && pip install --constraint constraints.txt ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} torch \
 && DEVICE="$DEVICE" python -c "import os, torch; \
    assert os.environ['DEVICE'] == 'cpu' or torch.version.cuda, 'this torch has no CUDA'"
# For the compiled operators; the runtime needs no compiler.
# hadolint ignore=DL3008
RUN apt-get update && apt-get install -y --no-install-recommends g++ && rm -rf /var/lib/apt/lists/*
COPY pyproject.toml README.md LICENSE ./
COPY model model
COPY adapters adapters
COPY server server
COPY loadtest loadtest
RUN pip install --constraint constraints.txt .

FROM build AS build-loadtest
RUN pip install --constraint constraints.txt '.[loadtest]'

# hadolint ignore=DL3006
FROM ${BASE} AS runtime
ARG BUILD_TOOLS=
# hadolint ignore=DL3008
RUN if [ -n "$BUILD_TOOLS" ]; then \
      apt-get update && apt-get install -y --no-install-recommends $BUILD_TOOLS \
      && rm -rf /var/lib/apt/lists/*; \
    fi \
 && groupadd --gid 10001 trunkline \
 && useradd --uid 10001 --gid 10001 --no-create-home --home-dir /data trunkline \
 && install -d -o 10001 -g 10001 /data
# Python writes no bytecode: the root may be read-only. All state is in /data.
ENV PATH=/opt/trunkline/bin:$PATH PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 HOME=/data

# Locust with the load test: master and workers of compose.yaml.
FROM runtime AS loadtest
COPY --from=build-loadtest /opt/trunkline /opt/trunkline
COPY loadtest /srv/loadtest
USER 10001:10001
WORKDIR /data
VOLUME /data
EXPOSE 8089
ENTRYPOINT ["locust", "-f", "/srv/loadtest/locustfile.py"]
CMD ["--help"]

FROM runtime
COPY --from=build /opt/trunkline /opt/trunkline
# What reaches the container is the network's choice (docker run -p, a Kubernetes service), so it
# starts without keys. Keys made in /data (trunkline keys new) are asked for all the same.
ENV TRUNKLINE_HOST=0.0.0.0 TRUNKLINE_INSECURE=true TRUNKLINE_DATA_DIR=/data
USER 10001:10001
WORKDIR /data
VOLUME /data
EXPOSE 8000
# The process is PID 1 and takes the signals itself: SIGTERM drains.
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=3s --start-period=60s --retries=3 \
  CMD ["python", "-c", "import urllib.request as r; r.urlopen('http://127.0.0.1:8000/ready', timeout=2)"]
ENTRYPOINT ["trunkline"]
CMD ["serve"]
