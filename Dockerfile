# The service as an image. In: this checkout.  Out: target `service`, the last and so the default one; `gpu`, the same with
# what a GPU needs; and `demo`, the client that posts a folder.
# No compiler, no pip cache and no root in what runs.

FROM python:3.12-slim AS build
RUN apt-get update \
    && apt-get install --yes --no-install-recommends gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /source
COPY pyproject.toml setup.py MANIFEST.in README.md LICENSE ./
COPY cconv cconv
# The wheel is built from what is copied above; the environment is carried over as it is.
RUN python -m pip wheel --no-cache-dir --no-deps --wheel-dir /wheels . \
    && python -m venv /opt/cconv \
    && /opt/cconv/bin/pip install --no-cache-dir "$(echo /wheels/cconv-*.whl)[service,model]"

FROM build AS build-gpu
RUN /opt/cconv/bin/pip install --no-cache-dir "$(echo /wheels/cconv-*.whl)[gpu]"

FROM python:3.12-slim AS photographs
# Photographs that may be passed on: those that scikit-image ships.
RUN python -m pip install --no-cache-dir --no-deps --target /package "scikit-image>=0.25,<1" \
    && mkdir /photographs \
    && cd /package/skimage/data \
    && cp astronaut.png chelsea.png coffee.png rocket.jpg hubble_deep_field.jpg /photographs

FROM python:3.12-slim AS base
# libgomp1 is OpenMP's runtime.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends libgomp1 \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --uid 10001 --user-group --no-create-home --shell /usr/sbin/nologin cconv
COPY --from=build /opt/cconv /opt/cconv
ENV PATH=/opt/cconv/bin:$PATH \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONFAULTHANDLER=1 \
    PYTHONUNBUFFERED=1
WORKDIR /app

FROM base AS demo
COPY --from=photographs /photographs /photographs
COPY examples/post_folder.py ./
# A named volume takes over this folder's owner.
RUN install --directory --owner=10001 --group=10001 /out
USER 10001:10001
ENTRYPOINT ["python", "post_folder.py"]
CMD ["--url", "http://service:8080", "--images", "/photographs", "--out", "/out"]

FROM base AS serving
COPY service service
# A named volume takes over this folder's owner: the API keys' digests.
RUN install --directory --owner=10001 --group=10001 --mode=700 /keys
# Of malloc: bodies and maps of many sizes go back to the system when they are freed, and leave no holes.
ENV HOST=0.0.0.0 \
    PORT=8080 \
    CCONV_ACCESS_LOG=- \
    MALLOC_ARENA_MAX=2 \
    MALLOC_MMAP_THRESHOLD_=131072 \
    MALLOC_TRIM_THRESHOLD_=4194304
EXPOSE 8080
HEALTHCHECK --interval=10s --timeout=5s --start-period=120s --start-interval=1s --retries=3 \
    CMD ["python", "-c", "import os, urllib.request as u; u.urlopen(f'http://127.0.0.1:{os.environ[\"PORT\"]}/readyz', timeout=4)"]
CMD ["gunicorn", "-c", "service/gunicorn.conf.py", "service:create_app()"]

FROM serving AS gpu
COPY --from=build-gpu /opt/cconv /opt/cconv
# A named volume takes over this folder's owner.
RUN install --directory --owner=10001 --group=10001 /cubins
USER 10001:10001

FROM serving AS service
USER 10001:10001
