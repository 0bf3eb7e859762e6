# docker build -t smolrouter .
# docker run -p 1234:1234 -v smolrouter:/data -e DEFAULT_UPSTREAM=http://192.168.1.100:8000 smolrouter
FROM python:3.13-slim

# For a routing file in YAML; the router itself needs nothing.
RUN pip install --no-cache-dir --root-user-action=ignore pyyaml==6.0.3

COPY smolrouter.py /app/
RUN chmod 0755 /app \
 && chmod 0644 /app/smolrouter.py \
 && useradd --uid 10001 --user-group --no-create-home --home-dir /data \
            --shell /usr/sbin/nologin smolrouter \
 && install --directory --owner=smolrouter --group=smolrouter --mode=0700 /data

# The default names of the routing file (optional), the log and the bodies are
# relative, so all of them live in /data. Nothing is written elsewhere:
# `docker run --read-only` works.
USER 10001:10001
WORKDIR /data
VOLUME /data
ENV LISTEN_HOST=0.0.0.0
EXPOSE 1234

HEALTHCHECK --interval=30s --timeout=5s --start-period=5s --retries=3 \
    CMD ["python", "/app/smolrouter.py", "health"]
ENTRYPOINT ["python", "/app/smolrouter.py"]
