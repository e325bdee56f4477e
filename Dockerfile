# A planner before any OpenAI-compatible model server, on a CPU:
#   docker build -t rsim . && docker run -p 8000:8000 -v $PWD/planner:/planner rsim --planner /planner --upstream http://host:8080/v1
FROM python:3.11-slim
RUN useradd --create-home rsim
WORKDIR /home/rsim
COPY --chown=rsim pyproject.toml LICENSE ./
COPY --chown=rsim docs/pypi.md ./docs/
COPY --chown=rsim src ./src
# The index of PyTorch's CPU builds, which are smaller: docker build --build-arg TORCH_INDEX=...
ARG TORCH_INDEX=
RUN pip install --no-cache-dir ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} torch && pip install --no-cache-dir .
USER rsim
ENV HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
EXPOSE 8000
ENTRYPOINT ["rsim", "serve", "--host", "0.0.0.0", "--port", "8000"]
