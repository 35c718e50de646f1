# The base can be replaced, by a mirror or a hardened image: --build-arg BASE=...
ARG BASE=python:3.13-slim-bookworm
FROM ${BASE} AS build
WORKDIR /src
COPY pyproject.toml requirements.lock README.md LICENSE ./
COPY trioserver trioserver
COPY supervisor supervisor
RUN python -m venv /opt/trioserver \
    && /opt/trioserver/bin/pip install --no-cache-dir -c requirements.lock .

FROM ${BASE}
RUN useradd --system --uid 10001 --home-dir /var/lib/trioserver --create-home trioserver
COPY --from=build /opt/trioserver /opt/trioserver
ENV PATH=/opt/trioserver/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    DATA_DIR=/var/lib/trioserver \
    ADMIN_HOST=0.0.0.0
USER 10001
EXPOSE 8081 9081
# Exec form: signals must reach the supervisor, not a shell.
ENTRYPOINT ["trioserver"]
CMD ["supervise"]
HEALTHCHECK --interval=10s --timeout=5s --start-period=15s CMD ["trioserver", "status"]
