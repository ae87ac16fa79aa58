"""Fixtures that all tests share: the data beside the project, converted stores, and seeds.

Stores are converted once a session, per source, dtype and page size. Data that is not in the
project lies in the folder `shared` beside it (or in $EDGEMEM_SHARED); a test that needs it is
skipped, loudly, where it is absent. $EDGEMEM_SEED shifts every seed, and a failure says how to
replay it.
"""

import os
import signal
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest

TESTS = Path(__file__).resolve().parent
ROOT = TESTS.parent
sys.path.insert(0, str(TESTS))  # so that tests in any folder say `import tiny`
sys.path.append(str(ROOT))  # and `import bench`, after an installed edgemem

SEED = int(os.environ.get("EDGEMEM_SEED", "0"))


# Whoever starts the tests in the background has them ignore Ctrl-C, which some of them send.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_report_header(config):
    folder = _shared_folder()
    state = folder if folder.is_dir() else f"ABSENT ({folder}): tests that need it are skipped"
    return [f"edgemem shared data: {state}", f"edgemem seed: {SEED} (EDGEMEM_SEED)"]


_measured: list[str] = []


@pytest.fixture(scope="session")
def measured():
    """measured(line): the line is printed after the tests, whether they passed or not."""
    return _measured.append


def pytest_sessionfinish(session):
    """What a worker has measured goes to the process that prints."""
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["measured"] = _measured


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node):
    _measured.extend(getattr(node, "workeroutput", {}).get("measured", ()))


def pytest_terminal_summary(terminalreporter):
    """Print what was measured, and name every skip: what was not tested is part of the result."""
    if _measured:
        terminalreporter.section("measured")
        for line in _measured:
            terminalreporter.write_line(line)
    skipped = terminalreporter.stats.get("skipped", [])
    if skipped:
        terminalreporter.section("NOT TESTED", yellow=True)
        for report in skipped:
            reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr
            terminalreporter.write_line(f"{report.nodeid}: {reason}")


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item):
    report = (yield).get_result()
    if report.failed:
        command = f'EDGEMEM_SEED={SEED} python -m pytest "{item.nodeid}"'
        report.sections.append(("replay", command))


def _shared_folder() -> Path:
    return Path(os.environ.get("EDGEMEM_SHARED", ROOT.parent / "shared"))


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of models and texts beside the project."""
    folder = _shared_folder()
    if not folder.is_dir():
        pytest.skip(f"no shared data: {folder} is not a folder (set EDGEMEM_SHARED)")
    return folder


@pytest.fixture(scope="session")
def wikitext(shared) -> str:
    """WikiText-2's validation text."""
    return (shared / "text" / "wikitext-2-valid.txt").read_text(encoding="utf-8")


@pytest.fixture(scope="session")
def convert_store(tmp_path_factory):
    """convert_store(folder, dtype="keep", page_size=4096) → its store's path; converted once."""
    from edgemem import converters

    folder = tmp_path_factory.mktemp("stores")
    done: dict[tuple, Path] = {}

    def convert(source: Path, dtype: str = "keep", page_size: int = 4096) -> Path:
        key = (Path(source).resolve(), dtype, page_size)
        if key not in done:
            target = folder / f"{len(done)}-{Path(source).name}-{dtype}.edgemem"
            converters.convert(Path(source), target, dtype=dtype, page_size=page_size)
            done[key] = target
        return done[key]

    return convert


@pytest.fixture(scope="session")
def stories_store(shared, convert_store) -> Path:
    """stories260k, kept at f32."""
    return convert_store(shared / "models" / "stories260k")


@pytest.fixture(scope="session")
def tiny_moe_store(shared, convert_store) -> Path:
    """The trained Qwen3-MoE of 22 M parameters, kept at bf16."""
    return convert_store(shared / "models" / "tiny-moe")


@pytest.fixture(scope="session")
def tiny_relu_store(shared, convert_store) -> Path:
    """The trained ReLU Llama of 10 M parameters, kept at bf16."""
    return convert_store(shared / "models" / "tiny-relu")


@pytest.fixture(scope="session")
def seed_base() -> int:
    """What $EDGEMEM_SEED adds to the seeds that tests name."""
    return SEED


@pytest.fixture
def rng(request) -> np.random.Generator:
    """A generator seeded by the test's own name and $EDGEMEM_SEED."""
    return np.random.default_rng([SEED, zlib.crc32(request.node.nodeid.encode())])
