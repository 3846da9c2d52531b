"""`python -m llamero.cli`."""

from llamero.cli import main

main()
