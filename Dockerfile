# The image of `tl`, for one job or for a node of a cluster; docs/containers.md has the lines to build
# and run it. VARIANT=cuda (PyPI's torch, about 7 GB, runs on a CPU too) or VARIANT=cpu (about 3 GB).
ARG BASE=python:3.11-slim

FROM ${BASE} AS requirements
ARG EXTRAS="image"
WORKDIR /src
COPY pyproject.toml constraints.txt deploy/image/requirements.py ./
RUN mkdir /layers \
    && python requirements.py pyproject.toml constraints.txt /layers ${EXTRAS}

# What is big and rarely changes comes first; each of these layers is made again only when its own file
# changes. CUDA's libraries and torch are most of the image.
FROM ${BASE} AS torch
ARG VARIANT=cuda
RUN case "${VARIANT}" in cpu|cuda) ;; \
      *) echo "VARIANT=${VARIANT} is neither cpu nor cuda" >&2; exit 2 ;; esac \
    && python -m venv /opt/tl
COPY --from=requirements /layers/cuda.txt /layers/
RUN --mount=type=secret,id=pip,target=/etc/pip.conf \
    --mount=type=secret,id=ca,target=/run/secrets/ca.crt \
    [ "${VARIANT}" = cpu ] \
    || /opt/tl/bin/pip install --no-cache-dir --progress-bar off --no-deps -r /layers/cuda.txt
# The builds without CUDA have versions of their own (2.14.1+cpu), so no index can give the others.
ARG TORCH_INDEX=""
COPY --from=requirements /layers/torch.txt /layers/
RUN --mount=type=secret,id=pip,target=/etc/pip.conf \
    --mount=type=secret,id=ca,target=/run/secrets/ca.crt \
    if [ "${VARIANT}" = cpu ]; then sed -i 's/$/+cpu/' /layers/torch.txt; fi \
    && { /opt/tl/bin/pip install --no-cache-dir --progress-bar off --no-deps \
           ${TORCH_INDEX:+--extra-index-url "${TORCH_INDEX}"} -r /layers/torch.txt \
         || { echo "No $(tr '\n' ' ' < /layers/torch.txt)for VARIANT=${VARIANT}: name an index that" \
                "has them with --build-arg TORCH_INDEX=URL or in the secret pip" >&2; exit 1; }; }

FROM torch AS packages
COPY --from=requirements /layers/rest.txt /src/constraints.txt /layers/
RUN --mount=type=secret,id=pip,target=/etc/pip.conf \
    --mount=type=secret,id=ca,target=/run/secrets/ca.crt \
    /opt/tl/bin/pip install --no-cache-dir --progress-bar off \
      -c /layers/constraints.txt -r /layers/rest.txt \
    && mkdir -p /data /output /cache \
    && chmod 1777 /output /cache

FROM packages AS wheel
WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY tl tl
COPY conf conf
COPY pipelines pipelines
RUN /opt/tl/bin/pip wheel --no-deps --no-index --no-build-isolation --wheel-dir /dist .

# The list of all packages, as CycloneDX has it; its tool stays out of the image.
FROM packages AS sbom
RUN --mount=type=secret,id=pip,target=/etc/pip.conf \
    --mount=type=secret,id=ca,target=/run/secrets/ca.crt \
    python -m venv /opt/sbom \
    && /opt/sbom/bin/pip install --no-cache-dir --progress-bar off cyclonedx-bom==7.5.0
COPY pyproject.toml /src/
RUN /opt/sbom/bin/cyclonedx-py environment --pyproject /src/pyproject.toml \
      --output-reproducible --of JSON -o /sbom.cdx.json /opt/tl/bin/python

FROM packages
COPY --from=sbom /sbom.cdx.json /opt/tl/sbom.cdx.json
# Copied, not mounted: buildah does not look into a mount when it asks whether this step was made before.
COPY --from=wheel /dist /dist
RUN /opt/tl/bin/pip install --no-deps --no-index --no-cache-dir /dist/*.whl
# Any uid may run the image (--user): one without an entry in /etc/passwd has no name and no home, and
# MLflow asks for both. What is written at run time goes below /output, /cache and /tmp alone, so that
# the rest may be read-only.
ENV PATH=/opt/tl/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    USER=tl \
    HOME=/cache \
    TL_CACHE_DIR=/cache/tl \
    HF_HOME=/cache/huggingface \
    TORCH_HOME=/cache/torch \
    MPLCONFIGDIR=/cache/matplotlib \
    GIT_PYTHON_REFRESH=quiet \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility
VOLUME ["/data", "/output", "/cache"]
WORKDIR /output
USER 1000:1000
# As process 1, Python would not hear a signal before it has a handler for it. dumb-init passes signals
# on to `tl` alone, which stops its own processes, hands its exit code back, and reaps orphans: no --init.
ENTRYPOINT ["dumb-init", "--single-child", "--", "tl"]
CMD ["--help"]
# No HEALTHCHECK: a job answers nobody, and its exit code and its run in MLflow say how it is.
# Last, because a new revision must not make the layers above again.
ARG VERSION=unknown
ARG REVISION=unknown
ARG VARIANT=cuda
LABEL org.opencontainers.image.title="tl" \
      org.opencontainers.image.description="Transfer learning for image classification" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}" \
      tl.variant="${VARIANT}"
