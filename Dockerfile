# The image of worker and gateway: `docker build -t keepstream .`. The first stage builds; the second holds Python, both,
# and nothing to build or install with.
#
# A tag moves with each fix of Python and Debian. To have every build begin with the same bytes, name a digest, which
# `docker buildx imagetools inspect python:3.13-slim` prints, and renew it as you renew the lock files:
#
#   docker build --build-arg PYTHON_IMAGE=python:3.13-slim@sha256:… -t keepstream .

ARG PYTHON_IMAGE=python:3.13-slim

FROM ${PYTHON_IMAGE} AS build

ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1 PIP_ROOT_USER_ACTION=ignore
WORKDIR /src

# Before the source, so that a change of code does not install the libraries again.
COPY requirements/build.txt requirements/runtime.txt requirements/
RUN python -m venv --without-pip /opt/keepstream \
 && pip --python /opt/keepstream/bin/python install --no-deps --require-hashes --only-binary=:all: -r requirements/runtime.txt \
 && pip install --no-deps --require-hashes --only-binary=:all: -r requirements/build.txt

# Of the commands that the libraries bring, the image keeps none.
COPY . .
RUN pip wheel --no-deps --no-build-isolation --wheel-dir dist . \
 && pip --python /opt/keepstream/bin/python install --no-deps dist/*.whl \
 && pip --python /opt/keepstream/bin/python check \
 && find /opt/keepstream/bin -type f ! -name keepstream -delete


FROM ${PYTHON_IMAGE}

LABEL org.opencontainers.image.title="Keepstream" \
      org.opencontainers.image.description="A background worker for streaming LLM completions." \
      org.opencontainers.image.version="0.1.0" \
      org.opencontainers.image.licenses="Apache-2.0"

# The base image has no bytecode of the standard library, and neither a user other than root nor a read-only container
# can write any: without this each start would compile it again.
RUN pip uninstall --yes --root-user-action=ignore pip \
 && python -m compileall -q -x '/(ensurepip|idlelib|site-packages|test|tkinter|turtledemo)/' \
      "$(python -c 'import sysconfig; print(sysconfig.get_path("stdlib"))')" \
 && groupadd --gid 10001 keepstream \
 && useradd --uid 10001 --gid 10001 --home-dir /var/lib/keepstream --create-home --shell /usr/sbin/nologin keepstream

COPY --from=build /opt/keepstream /opt/keepstream
ENV PATH=/opt/keepstream/bin:$PATH PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 \
    KEEPSTREAM_ALIVE_DIR=/tmp/keepstream

# By number, so that Kubernetes can see that it is not root.
USER 10001:10001
WORKDIR /var/lib/keepstream

# The gateway's port; a worker listens on none.
EXPOSE 8080

# The worker is process 1 and gets the signal itself: it then lets streams finish and requeues the rest.
STOPSIGNAL SIGTERM
ENTRYPOINT ["keepstream"]
CMD ["worker"]

# Whether this worker hangs, and nothing else: restarting it in an outage of Redis or the database would interrupt its
# streams. Whether it can work, `keepstream doctor` says. A gateway is asked over HTTP instead: /healthz.
HEALTHCHECK --interval=20s --timeout=10s --start-period=60s --retries=3 CMD ["keepstream", "alive"]
