# The image of Phoenix ML, for every role: the command says which (`phoenix-ml serve`, `phoenix-ml work log`, …).

FROM python:3.11.14-slim-bookworm AS build
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
RUN python -m venv /opt/phoenix
# The dependencies are a layer of their own: a change of the code leaves it as it is.
COPY requirements/serve.txt /build/requirements/
RUN /opt/phoenix/bin/pip install --require-hashes -r /build/requirements/serve.txt
COPY pyproject.toml README.md /build/
COPY src /build/src
RUN /opt/phoenix/bin/pip install --no-deps --no-build-isolation /build

FROM python:3.11.14-slim-bookworm
# A new volume takes over the owner of the folder that it is mounted on.
RUN useradd --uid 10001 --create-home phoenix \
 && install --directory --owner phoenix --group phoenix /data /artifacts
COPY --from=build /opt/phoenix /opt/phoenix
ENV PATH=/opt/phoenix/bin:$PATH PYTHONUNBUFFERED=1 PHOENIX_DATA=/data
USER phoenix
WORKDIR /home/phoenix
CMD ["phoenix-ml", "serve"]
