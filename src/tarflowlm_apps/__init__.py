"""Applications on top of tarflowlm.

The core never imports them: its command line starts them by name.
"""
