"""A process that has imported what every run of tests needs, except lowdim, and forks one process for each run.

Reads one JSON object a line: the copy's folders for the path, pytest's arguments, a file for the output and a time limit.
Answers each with pytest's exit code, or with -14 where the time was up.
"""

import json
import os
import signal
import sys


def run(request):
    """Pytest in this process, which is a fork."""
    output = os.open(request["output"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    signal.alarm(request["timeout"])
    sys.path[:0] = request["path"]
    os.environ["PYTHONPATH"] = os.pathsep.join(request["path"])
    return int(pytest.main(request["arguments"]))


if __name__ == "__main__":
    import hypothesis  # noqa: F401
    import numpy  # noqa: F401
    import pytest
    import torch  # noqa: F401

    for line in sys.stdin:
        child = os.fork()
        if not child:
            code = 3
            try:
                code = run(json.loads(line))
            finally:
                sys.stdout.flush()
                os._exit(code)
        _, status = os.waitpid(child, 0)
        sys.stdout.write(f"{os.waitstatus_to_exitcode(status)}\n")
        sys.stdout.flush()
