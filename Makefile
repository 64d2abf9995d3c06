# make demo        writes a dish's image and GIF to out/     (make demo NAME=土豆炒青椒 MOVE=right)
# make app         serves a local web page to play with the trained networks
# make train       trains the demo's network from scratch    (make train LATENT=1: on latents)
# make test        runs the style check and all tests, offline, in two processes of one thread each
# make notebooks   executes the notebooks and saves their outputs
# make bench       runs all benchmarks and writes benchmarks/README.md
NAME ?= 番茄炒鸡蛋
MOVE ?= circle
WEIGHTS ?= weights
LATENT ?=
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo app train test notebooks bench
demo: .venv/ready
	$(BIN)/python -m easy_diffusion.demo $(NAME) --move $(MOVE) --weights $(WEIGHTS)

app: .venv/app
	$(BIN)/python -m easy_diffusion.app --weights $(WEIGHTS)

train: .venv/ready
	$(BIN)/python -m easy_diffusion.train_demo --weights $(WEIGHTS) $(if $(LATENT),--latent)

test: .venv/app
	$(BIN)/ruff check .
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

notebooks: .venv/ready
	$(BIN)/jupyter nbconvert --to notebook --execute --inplace ipynb/*.ipynb

bench: .venv/ready
	$(BIN)/python -m benchmarks

# The stamps are written last, so an interrupted installation is repeated. They are older than a
# changed requirements.txt, which is then installed.
.venv/ready: requirements.txt
	$(PYTHON) -c "import sys; sys.exit('Python 3.10 or newer is needed, this is %d.%d' % sys.version_info[:2] if sys.version_info < (3, 10) else 0)"
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch .venv/ready

.venv/app: .venv/ready requirements-app.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt -r requirements-app.txt
	touch .venv/app
