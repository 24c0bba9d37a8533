"""`python -m quota.lmms ARGS`: lmms-eval's own command with `--model quota`, the embedded tasks, and an exit status
that tells.

`python -m lmms_eval` ends with status 0 when a task is missing or an evaluation fails; under this door it is 1, also
for every process of torchrun.
"""

from __future__ import annotations

import sys
from typing import Any

from quota.core.errors import QuotaError
from quota.lmms import TASKS
from quota.lmms.run import check_installed, reason


def main(args: list[str]) -> None:
    """args: those of `python -m lmms_eval`; --model and --include_path have defaults here."""
    try:
        check_installed()
    except QuotaError as error:
        sys.exit(f"error: {error}")
    from lmms_eval import __main__ as command

    defaults = {"--model": "quota", "--include_path": str(TASKS)}
    extra = [
        part
        for name, value in defaults.items()
        if not any(a.split("=")[0] == name for a in args)
        for part in (name, value)
    ]
    inner = command.cli_evaluate_single

    def checked(given: Any) -> Any:
        try:
            return inner(given)
        except Exception as error:
            print(f"error: {reason(error)}", file=sys.stderr, flush=True)
            raise SystemExit(1) from error

    command.cli_evaluate_single = checked
    sys.argv = ["lmms-eval", *args, *extra]
    command.cli_evaluate()


if __name__ == "__main__":
    main(sys.argv[1:])
