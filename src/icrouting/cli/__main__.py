"""`python -m icrouting.cli`: the command line where no script is, as under `accelerate launch`."""

from icrouting.cli.main import main

main()
