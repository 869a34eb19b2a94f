# The image of `tl`: one for CPU and GPU, because torch's wheels bring their CUDA libraries along.
# docs/containers.md has the lines to build and run it, mirrors and proxies too.
ARG BASE=python:3.11-slim

FROM ${BASE} AS requirements
COPY pyproject.toml .
RUN python -c "import tomllib; \
project = tomllib.load(open('pyproject.toml', 'rb'))['project']; \
print('\n'.join(project['dependencies']))" > /requirements.txt

# About 6 GB, made again only when a requirement or a version changes, not with the code.
FROM ${BASE} AS packages
WORKDIR /src
COPY constraints.txt .
COPY --from=requirements /requirements.txt .
RUN --mount=type=secret,id=pip,target=/etc/pip.conf \
    --mount=type=secret,id=ca,target=/run/secrets/ca.crt \
    python -m venv /opt/tl \
    && /opt/tl/bin/pip install --no-cache-dir --progress-bar off \
       -c constraints.txt -r requirements.txt

FROM packages AS wheel
COPY pyproject.toml README.md LICENSE ./
COPY tl tl
COPY conf conf
COPY pipelines pipelines
RUN /opt/tl/bin/pip wheel --no-deps --no-index --no-build-isolation --wheel-dir /dist .

FROM ${BASE}
COPY --from=packages /opt/tl /opt/tl
COPY --from=wheel /dist /dist
# Any uid may run the image (--user), so what is written at run time is open to all, as /tmp is.
RUN /opt/tl/bin/pip install --no-deps --no-index --no-cache-dir /dist/*.whl \
    && mkdir -p /data /output /cache \
    && chmod 1777 /output /cache
# USER and HOME: a uid without an entry in /etc/passwd has neither, and MLflow asks for the name.
ENV PATH=/opt/tl/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    USER=tl \
    HOME=/cache \
    TL_CACHE_DIR=/cache/tl \
    HF_HOME=/cache/huggingface \
    TORCH_HOME=/cache/torch \
    MPLCONFIGDIR=/cache/matplotlib \
    GIT_PYTHON_REFRESH=quiet \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility
VOLUME ["/data", "/output"]
WORKDIR /output
USER 1000:1000
ENTRYPOINT ["tl"]
CMD ["--help"]
# Last, because a new revision must not copy the packages again.
ARG VERSION=unknown
ARG REVISION=unknown
LABEL org.opencontainers.image.title="tl" \
      org.opencontainers.image.description="Transfer learning for image classification" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}"
