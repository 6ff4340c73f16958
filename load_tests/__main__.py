"""`python -m load_tests`: Locust on the load tests' file, without its web page; `--help` shows their own options.

With `--num_requests`, or BASE_URL and no host, it sends payments of the contract merchant-form instead: see
`load_tests.forms`.

Locust's own `--help` is printed before it has read the file that adds them.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from load_tests import forms

LOCUSTFILE = Path(__file__).with_name("locustfile.py")


def main() -> None:
    if forms.is_asked_for(sys.argv[1:]):
        sys.exit(forms.main(sys.argv[1:]))
    if {"-h", "--help"} & set(sys.argv):
        from locust.argument_parser import LocustArgumentParser

        from load_tests.locustfile import add_options

        parser = LocustArgumentParser(
            prog="python -m load_tests",
            usage="%(prog)s --host URL [options]",
            description="Offer a scenario's load to a service and judge it; docs/load.md says how.",
            epilog="Beside these, all options of Locust: --processes, --master, --worker and so on (locust --help).",
        )
        parser.add_argument("-H", "--host", env_var="LOCUST_HOST", help="base URL of the service")
        add_options(parser)
        parser.print_help()
        return
    locust = [sys.executable, "-m", "locust", "-f", str(LOCUSTFILE), "--headless", "--only-summary"]
    os.execv(sys.executable, [*locust, *sys.argv[1:]])


if __name__ == "__main__":
    main()
