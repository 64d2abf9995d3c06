# make demo        writes a dish's image and GIF to out/     (make demo NAME=土豆炒青椒 MOVE=right)
# make test        runs the style check and all tests, offline, in two processes of one thread each
# make notebooks   executes the notebooks and saves their outputs
# make bench       runs all benchmarks and writes benchmarks/README.md
NAME ?= 番茄炒鸡蛋
MOVE ?= circle
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test notebooks bench
demo: .venv/ready
	$(BIN)/python -m easy_diffusion.demo $(NAME) --move $(MOVE)

test: .venv/ready
	$(BIN)/ruff check .
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

notebooks: .venv/ready
	$(BIN)/jupyter nbconvert --to notebook --execute --inplace ipynb/*.ipynb

bench: .venv/ready
	$(BIN)/python -m benchmarks

# The stamp is written last, so an interrupted installation is repeated. It is older than a changed
# requirements.txt, which is then installed.
.venv/ready: requirements.txt
	$(PYTHON) -c "import sys; sys.exit('Python 3.10 or newer is needed, this is %d.%d' % sys.version_info[:2] if sys.version_info < (3, 10) else 0)"
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch .venv/ready
