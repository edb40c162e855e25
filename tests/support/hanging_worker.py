"""What `test_processes.py` runs in each of two processes, one of which is killed: hanging_worker.py SCRATCH."""

import os
import signal
import sys
import time
from pathlib import Path

from grpo_kit.config import load_config
from grpo_kit.training.launch import joined


def main(scratch: Path) -> None:
    """The second process is killed while the first one waits and no signal reaches it, as in a collective on a GPU."""
    with joined(load_config("tiny", {"model_settings.device": "cpu"}), scratch) as processes:
        if processes.rank:
            os.kill(os.getpid(), signal.SIGKILL)
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        time.sleep(100)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
