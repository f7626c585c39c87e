"""`python -m tarflowlm`; with torchrun, `torchrun --nproc-per-node 2 -m tarflowlm train ...`."""

from tarflowlm.cli.main import main

if __name__ == "__main__":
    main()
