"""The script for `msrun`: the same as `rollforward train`, with the same options.

msrun --worker_num=2 --local_worker_num=2 --join=True --log_dir=LOGS examples/grpo/main.py --config FILE ...
"""

import sys

from rollforward.cli.main import run_process

if __name__ == "__main__":
    run_process(["train", *sys.argv[1:]])
