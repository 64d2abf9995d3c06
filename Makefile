# make demo        writes a dish's image and GIF to out/     (make demo NAME=土豆炒青椒 MOVE=right)
# make app         serves a local web page to play with the trained networks
# make lab         opens the notebooks in JupyterLab
# make train       trains the demo's network from scratch    (make train LATENT=1: on latents)
#                  (make train MOTION=1: trains the network in weights/ on films)
# make test        runs the style check and all tests, offline, in two processes of one thread each
# make notebooks   executes the notebooks and saves their outputs
# make bench       runs all benchmarks and writes benchmarks/README.md
NAME ?= 番茄炒鸡蛋
MOVE ?= circle
WEIGHTS ?= weights
LATENT ?=
MOTION ?=
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo app lab train test notebooks bench
demo: .venv/ready
	$(BIN)/python -m easy_diffusion.demo $(NAME) --move $(MOVE) --weights $(WEIGHTS)

app: .venv/app
	$(BIN)/python -m easy_diffusion.app --weights $(WEIGHTS)

lab: .venv/ready
	$(BIN)/jupyter lab ipynb

train: .venv/ready
	$(BIN)/python -m easy_diffusion.$(if $(MOTION),train_motion,train_demo) --weights $(WEIGHTS) $(if $(LATENT),--latent)

test: .venv/app
	$(BIN)/ruff check .
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

notebooks: .venv/ready
	$(BIN)/jupyter nbconvert --to notebook --execute --inplace ipynb/*.ipynb
	$(BIN)/python -m easy_diffusion.notebook ipynb/*.ipynb

bench: .venv/ready
	$(BIN)/python -m benchmarks

# Current builds of PyTorch have kernels for GPUs of compute capability 7.5 and above.
GPUS := $(shell nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null)
REQUIREMENTS := $(if $(filter 7.0 7.2,$(GPUS)),requirements-volta.txt,requirements.txt)

# The stamps are written last, so an interrupted installation is repeated. They are older than a
# changed list of requirements, which is then installed.
.venv/ready: requirements.txt requirements-common.txt requirements-volta.txt
	$(PYTHON) -c "import sys; sys.exit('Python 3.10 or newer is needed, this is %d.%d' % sys.version_info[:2] if sys.version_info < (3, 10) else 0)"
ifneq (,$(filter 3.% 5.% 6.%,$(GPUS)))
	@echo "note: this GPU (compute capability $(GPUS)) needs a build for CUDA 12.6, of PyTorch 2.14 at most, from PyTorch's own index: https://download.pytorch.org/whl/cu126"
endif
ifeq ($(REQUIREMENTS),requirements-volta.txt)
	@echo "note: this GPU (compute capability $(GPUS)) is too old for the newest PyTorch: installing $(REQUIREMENTS)"
endif
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r $(REQUIREMENTS)
	touch .venv/ready

.venv/app: .venv/ready requirements-app.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r $(REQUIREMENTS) -r requirements-app.txt
	touch .venv/app
