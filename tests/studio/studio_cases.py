"""The command `studio` as a program of its own, in which a text of the seed ENDLESS is never finished.

Apart from the tests: their checks of shapes wrap functions, and gradio asks functions whether they are generators.
"""

import sys
import time

from tarflowlm.cli.main import main
from tarflowlm.studio import write

ENDLESS = 12345


def run() -> None:
    generate = write._generate

    def endless(checkpoint, order, job):
        if order.seed != ENDLESS:
            return generate(checkpoint, order, job)
        print("begun", flush=True)
        try:
            while True:
                time.sleep(0.01)
                job.advance()
        finally:
            print("ended", flush=True)

    write._generate = endless
    main(["studio", *sys.argv[1:]])


if __name__ == "__main__":
    run()
