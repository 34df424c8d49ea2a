# One image for training and reinforcement learning, on GPUs: what the lock names, vLLM and Transformer Engine with it, and the project.
#
#   docker build -t megatron_ext .                               the CUDA image; slurm/README.md goes on from there
#   docker build -t megatron_ext --build-arg APEX_COMMIT=... .   with apex of that commit, from NVIDIA's source
#   tools/container.sh                                           the CPU image, on a Debian base, without any registry of images
#
# Versions stand in the lock alone, so a change of the project rebuilds only the last layers. The lock is complete: --no-deps.
# A pip.conf (an index of your own) comes as a secret and a folder of wheels as a build context; neither stays in the image:
#   --secret id=pip,src=pip.conf    --build-context wheels=FOLDER

# CUDA as torch was built with, and its compilers: Triton and vLLM compile kernels while they run. Has Python 3.12.
ARG BASE=docker.io/nvidia/cuda:13.0.3-devel-ubuntu24.04

# Stands for the folder of wheels where none is given.
FROM scratch AS wheels
COPY LICENSE /

# hadolint ignore=DL3006
FROM ${BASE}

# Without libibverbs and its drivers NCCL finds no InfiniBand and takes TCP, without a word. "": the base has what is needed.
ARG SYSTEM_PACKAGES="g++ ibverbs-providers libibverbs1 libnuma1 librdmacm1 python3-dev python3-venv"
# The base's tag pins its release of Ubuntu; an exact version would vanish from the archive with the next security update.
# hadolint ignore=DL3008,SC2086
RUN if [ -n "${SYSTEM_PACKAGES}" ]; then \
        apt-get update && apt-get install -y --no-install-recommends ${SYSTEM_PACKAGES} && rm -rf /var/lib/apt/lists/*; \
    fi

# torch and NVIDIA's libraries are most of the bytes and change least: a layer of their own. Modules are compiled here, since
# who runs the image cannot write beside them.
ARG LOCK=tools/locks/cuda13-py312.txt
ARG PIP_CONFIG_FILE=/run/secrets/pip
ARG PIP_NO_INDEX=""
ENV PATH=/opt/venv/bin:${PATH}
COPY ${LOCK} /opt/lock.txt
RUN --mount=type=bind,from=wheels,target=/wheels --mount=type=secret,id=pip \
    python3 -m venv /opt/venv \
    && grep -E '^(torch|triton|cuda-[a-z]+|nvidia-[a-z0-9-]+)==' /opt/lock.txt > /tmp/first.txt \
    && pip install --no-cache-dir --no-deps --find-links /wheels -r /tmp/first.txt \
    && rm /tmp/first.txt
RUN --mount=type=bind,from=wheels,target=/wheels --mount=type=secret,id=pip \
    grep -v '^transformer_engine_torch==' /opt/lock.txt > /tmp/rest.txt \
    && pip install --no-cache-dir --no-deps --find-links /wheels -r /tmp/rest.txt \
    && rm /tmp/rest.txt

# Transformer Engine's layers for torch exist as source: C++ against the headers of the libraries above, no kernels.
ARG MAX_JOBS=8
RUN --mount=type=bind,from=wheels,target=/wheels --mount=type=secret,id=pip \
    if grep '^transformer_engine_torch==' /opt/lock.txt > /tmp/source.txt; then \
        libraries=$(python3 -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/nvidia \
        && CPATH=${libraries}/cudnn/include:${libraries}/nccl/include NVTE_FRAMEWORK=pytorch NVTE_PYTORCH_FORCE_BUILD=TRUE MAX_JOBS=${MAX_JOBS} \
           pip install --no-cache-dir --no-deps --no-build-isolation --find-links /wheels -r /tmp/source.txt; \
    fi \
    && rm /tmp/source.txt

# apex is not on PyPI: what has its name there is something else. Transformer Engine does what apex did, so it is off.
ARG APEX_COMMIT=""
ARG CUDA_ARCHITECTURES="9.0"
RUN if [ -n "${APEX_COMMIT}" ]; then \
        APEX_CPP_EXT=1 APEX_CUDA_EXT=1 TORCH_CUDA_ARCH_LIST=${CUDA_ARCHITECTURES} MAX_JOBS=${MAX_JOBS} \
        pip install --no-cache-dir --no-deps --no-build-isolation "https://github.com/NVIDIA/apex/archive/${APEX_COMMIT}.tar.gz"; \
    fi

# Not root; no number that a base gives to a user of its own, as Ubuntu's 1000.
ARG USER_ID=10001
RUN useradd --create-home --uid "${USER_ID}" trainer

# The checkout, since recipes and batch scripts are found beside the package. Jobs run a snapshot of the code beside their runs.
COPY pyproject.toml README.md LICENSE /opt/megatron_ext/
COPY slurm /opt/megatron_ext/slurm
COPY recipes /opt/megatron_ext/recipes
COPY megatron_ext /opt/megatron_ext/megatron_ext
RUN --mount=type=bind,from=wheels,target=/wheels --mount=type=secret,id=pip \
    pip install --no-cache-dir --no-deps --find-links /wheels --editable /opt/megatron_ext && python3 -m compileall -q /opt/megatron_ext

# By number, which Kubernetes and the like can tell from root.
USER ${USER_ID}
WORKDIR /home/trainer
CMD ["megatron-ext", "--help"]
