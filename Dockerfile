# docker build -t epiphany . && docker run --gpus all --shm-size=8g -v "$PWD/runs:/epiphany/runs" epiphany task=doctor
# For a machine without a GPU: docker build --build-arg KIND=cpu -t epiphany .
FROM python:3.12-slim
# A C compiler, which Triton needs at run time.
RUN apt-get update && apt-get install -y --no-install-recommends build-essential git make && rm -rf /var/lib/apt/lists/*
WORKDIR /epiphany
COPY . .
ARG KIND=gpu
RUN EPIPHANY_KIND=$KIND make env
ENV PATH=/epiphany/.venv/bin:$PATH
# Models and data of the hub stay outside if this is a volume, too.
ENV HF_HOME=/epiphany/hub
ENTRYPOINT ["python", "launch.py"]
