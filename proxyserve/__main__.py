"""`python -m proxyserve` is the `proxyserve` command."""

from proxyserve.cli.main import main

if __name__ == "__main__":
    main()
