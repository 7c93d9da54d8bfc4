"""The tests under the versions that setup.py allows: `nox`, or one of its sessions by `nox -s oldest`.

Each ends in a row of the table of docs/versions.md. Where uv is installed, all environments share one copy of torch.
"""

from pathlib import Path
from xml.etree import ElementTree

import nox


nox.options.default_venv_backend = "uv|virtualenv"

NAMES = ("torch", "transformers", "huggingface-hub", "timm", "datasets", "accelerate", "peft")
VERSIONS = f"""
import platform
from importlib.metadata import version
print("python", platform.python_version(), *(part for name in {NAMES} for part in (name, version(name))))
"""


@nox.session
@nox.parametrize("transformers", [nox.param("5.16.*", id="first"), nox.param("5.*", id="newest")])
def tests(session: nox.Session, transformers: str) -> None:
    """The first and the newest transformers that are supported, with the newest of all else."""
    session.install("-e", ".[test]", f"transformers=={transformers}")
    run_tests(session)


@nox.session(venv_backend="uv")
def oldest(session: nox.Session) -> None:
    """Every dependency at its lower bound; only uv resolves so."""
    session.install("--resolution", "lowest-direct", "-e", ".[test]")
    run_tests(session)


def run_tests(session: nox.Session) -> None:
    versions = session.run("python", "-c", VERSIONS, silent=True).split()
    report = Path(session.create_tmp()) / "tests.xml"
    # The tests' tiny models gain nothing from a second thread.
    command = ["python", "-m", "pytest", f"--junitxml={report}", *session.posargs]
    session.run(*command, env={"OMP_NUM_THREADS": "1"}, success_codes=[0, 1])
    counts = next(ElementTree.parse(report).iter("testsuite")).attrib
    failed, skipped = int(counts["failures"]) + int(counts["errors"]), int(counts["skipped"])
    passed = int(counts["tests"]) - failed - skipped
    cells = [session.name, *versions[1::2], passed, failed, skipped, round(float(counts["time"]))]
    session.log(" | ".join(["session", *versions[::2], "passed", "failed", "skipped", "seconds"]))
    session.log(" | ".join(map(str, cells)))
    if failed:
        session.error(f"{failed} tests failed")
