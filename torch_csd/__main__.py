"""`python -m torch_csd` is the command `torch-csd`."""

from torch_csd.cli import app

app(prog_name="torch-csd")
