"""`python -m se_inject` is the command line."""

from se_inject.cli import main

main()
