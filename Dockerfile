# metalearn serve in a container. UNTESTED: it has not been built yet.
#
#   docker build -t metalearn .
#   docker run -p 127.0.0.1:8000:8000 -v metalearn-state:/state -e METALEARN_TOKEN metalearn
#
# The token has at least 16 characters. Behind a reverse proxy, which should add TLS, name the host:
# docker run … metalearn serve host=0.0.0.0 state=/state hosts=lab.example.org
FROM python:3.11-slim
WORKDIR /app
COPY pyproject.toml README.md LICENSE ./
COPY metalearn metalearn
COPY conf conf
RUN pip install --no-cache-dir '.[pretrained,serve]' \
    && useradd --create-home metalearn && install -d -o metalearn /state
USER metalearn
VOLUME /state
EXPOSE 8000
HEALTHCHECK --start-period=60s CMD ["python", "-c", \
    "import urllib.request as r; r.urlopen('http://127.0.0.1:8000/health', timeout=5)"]
ENTRYPOINT ["metalearn"]
CMD ["serve", "host=0.0.0.0", "state=/state"]
