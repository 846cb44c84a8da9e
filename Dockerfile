# The worker's image: `docker build -t keepstream .`. The first stage builds, the second has neither pip's cache nor compilers.

FROM python:3.13-slim AS build

ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1 PIP_ROOT_USER_ACTION=ignore
WORKDIR /src

# Before the source, so that a change of code does not install the libraries again.
COPY requirements/build.txt requirements/runtime.txt requirements/
RUN python -m venv --without-pip /opt/keepstream \
 && pip --python /opt/keepstream/bin/python install --no-deps --require-hashes --only-binary=:all: -r requirements/runtime.txt \
 && pip install --no-deps --require-hashes --only-binary=:all: -r requirements/build.txt

COPY . .
RUN pip wheel --no-deps --no-build-isolation --wheel-dir dist . \
 && pip --python /opt/keepstream/bin/python install --no-deps dist/*.whl


FROM python:3.13-slim

# The openai SDK trusts the certificates of the operating system, and a slim image may have none.
RUN apt-get update \
 && apt-get install --yes --no-install-recommends ca-certificates \
 && rm -rf /var/lib/apt/lists/* \
 && useradd --system --uid 10001 --user-group --home-dir /var/lib/keepstream --create-home --shell /usr/sbin/nologin keepstream

COPY --from=build /opt/keepstream /opt/keepstream
ENV PATH=/opt/keepstream/bin:$PATH PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1

# By number, so that Kubernetes can see that it is not root.
USER 10001:10001
WORKDIR /var/lib/keepstream

# The worker is process 1 and gets the signal itself: it then lets streams finish and hands the rest back.
STOPSIGNAL SIGTERM
ENTRYPOINT ["keepstream"]
CMD ["worker"]

HEALTHCHECK --interval=30s --timeout=15s --start-period=30s --retries=3 CMD ["keepstream", "doctor", "--quick"]
