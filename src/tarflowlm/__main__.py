"""`python -m tarflowlm`; with torchrun, `torchrun --nproc-per-node 2 -m tarflowlm train ...`."""

from tarflowlm.cli.signals import exit_on_interrupt

with exit_on_interrupt():
    from tarflowlm.cli.main import main

if __name__ == "__main__":
    main()
