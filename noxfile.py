"""The tests under the versions that setup.py allows: `nox`, or one of its sessions by `nox -s oldest`.

Each ends in a row of the table of docs/versions.md. Where uv is installed, all environments share one copy of torch.
"""

import re
import shutil
from collections import Counter
from pathlib import Path
from xml.etree import ElementTree

import nox


nox.options.default_venv_backend = "uv|virtualenv"
nox.options.sessions = ["tests", "oldest", "next"]
# Read, not imported: nox has no transformers.
TESTED = (Path(__file__).parent / "configuration" / "versions_agevlm.py").read_text("utf-8")
FIRST, BEYOND = re.search(r'^TESTED_TRANSFORMERS = \("(.+)", "(.+)"\)$', TESTED, re.MULTILINE).groups()

NAMES = ("torch", "transformers", "huggingface-hub", "timm", "datasets", "accelerate", "peft")
VERSIONS = f"""
import platform
from importlib.metadata import version
print("python", platform.python_version(), *(part for name in {NAMES} for part in (name, version(name))))
"""


@nox.session
@nox.parametrize("transformers", [nox.param(f"=={FIRST}", id="first"), nox.param(f"<{BEYOND}", id="newest")])
def tests(session: nox.Session, transformers: str) -> None:
    """The first and the newest transformers that are allowed, with the newest of all else."""
    session.install("-e", ".[test]", f"transformers{transformers}")
    run_tests(session)


@nox.session(venv_backend="uv")
def oldest(session: nox.Session) -> None:
    """Every dependency at its lower bound; only uv resolves so."""
    session.install("--resolution", "lowest-direct", "-e", ".[test]")
    run_tests(session)


@nox.session(name="next")
def next_release(session: nox.Session) -> None:
    """The newest transformers there is, allowed or not, release candidates too: what the next users will meet."""
    session.install("-e", ".[test]")
    session.install("--upgrade", "--pre", "--no-deps", "transformers")
    run_tests(session)


@nox.session
def transformers_suites(session: nox.Session) -> None:
    """transformers' own tests of our classes: `nox -s transformers_suites -- CHECKOUT VERSION`, a clone with its tests."""
    checkout, version = Path(session.posargs[0]).resolve(), session.posargs[1]
    session.install("-e", ".[test]", "parameterized", "httpx", f"transformers=={version}")
    suites = checkout / "tests" / "models" / "age_vlm"
    shutil.copytree("tests/transformers_suites", suites, dirs_exist_ok=True)
    (suites / "__init__.py").touch()
    # What the tests would download, if it is not there: an image, of whatever.
    if not (checkout / "coco_sample.png").exists():
        shutil.copy("examples/images/scene.png", checkout / "coco_sample.png")
    report = Path(session.create_tmp()) / "tests.xml"
    command = ["python", "-m", "pytest", "-q", str(suites), f"--junitxml={report}", *session.posargs[2:]]
    variables = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(checkout / "utils")}
    session.chdir(checkout)
    session.run(*command, env=variables, success_codes=[0, 1])
    # Each test counts once, whatever its subtests: failed if one of them is, skipped if all are.
    found: dict[tuple[str, str], set[str]] = {}
    for case in ElementTree.parse(report).iter("testcase"):
        tags = {child.tag for child in case}
        outcome = "failed" if tags & {"failure", "error"} else "skipped" if "skipped" in tags else "passed"
        found.setdefault((case.get("classname").rpartition(".")[2], case.get("name")), set()).add(outcome)
    counts: dict[str, Counter] = {}
    for (suite, _), outcomes in found.items():
        counts.setdefault(suite, Counter())[next(o for o in ("failed", "passed", "skipped") if o in outcomes)] += 1
    for suite, count in counts.items():
        session.log(" | ".join([version, suite, *(f"{count[o]} {o}" for o in ("passed", "failed", "skipped"))]))
    if failed := sum(count["failed"] for count in counts.values()):
        session.error(f"{failed} tests failed")


def run_tests(session: nox.Session) -> None:
    versions = session.run("python", "-c", VERSIONS, silent=True).split()
    report = Path(session.create_tmp()) / "tests.xml"
    command = ["python", "-m", "pytest", "-n", "2", "--dist", "loadfile", f"--junitxml={report}", *session.posargs]
    session.run(*command, success_codes=[0, 1])
    counts = next(ElementTree.parse(report).iter("testsuite")).attrib
    failed, skipped = int(counts["failures"]) + int(counts["errors"]), int(counts["skipped"])
    passed = int(counts["tests"]) - failed - skipped
    cells = [session.name, *versions[1::2], passed, failed, skipped, round(float(counts["time"]))]
    session.log(" | ".join(["session", *versions[::2], "passed", "failed", "skipped", "seconds"]))
    session.log(" | ".join(map(str, cells)))
    if failed:
        session.error(f"{failed} tests failed")
