"""Real clusters for every test; see tests/README.md."""

from __future__ import annotations

import os
import signal
import zlib
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, settings

from support import Node, Pair, Proxy, World
from tbl_repl.servers import Server, discover

# Without TBL_REPL_LONG the same few histories are tried every time; with it, many and others.
_COMMON = {"deadline": None, "print_blob": True, "suppress_health_check": list(HealthCheck)}
settings.register_profile("short", max_examples=10, stateful_step_count=25, derandomize=True, **_COMMON)
settings.register_profile("long", max_examples=300, stateful_step_count=60, **_COMMON)
settings.load_profile("long" if os.environ.get("TBL_REPL_LONG") else "short")


def pytest_configure(config: pytest.Config) -> None:
    """SIGTERM ends the run as Ctrl-C does: the servers go with it.

    Ctrl-C is ignored in what a shell starts in the background; programs under test must not inherit that.
    """
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--pg",
        default="",
        help="run on these major versions only, e.g. --pg 18 or --pg 15,18 (default: every server found)",
    )


def _servers(config: pytest.Config) -> list[Server]:
    found = discover()
    wanted = [word for word in config.getoption("--pg").split(",") if word]
    servers = [s for s in found if not wanted or str(s.major) in wanted or str(s) in wanted]
    if not servers:
        raise pytest.UsageError(f"no such PostgreSQL; found: {', '.join(map(str, found)) or 'none'}")
    return servers


def pytest_report_header(config: pytest.Config) -> str:
    return "PostgreSQL: " + ", ".join(f"{s} ({s.bindir})" for s in _servers(config))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "server" in metafunc.fixturenames:
        servers = _servers(metafunc.config)
        metafunc.parametrize("server", servers, ids=str, indirect=True, scope="session")


def _server_of(item: pytest.Item) -> str:
    callspec = getattr(item, "callspec", None)
    return str(callspec.params["server"]) if callspec and "server" in callspec.params else "none"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Each case of what is marked once goes to one server; in parallel, all tests of one server to one process."""
    servers = [str(server) for server in _servers(config)]
    elsewhere = []
    for item in items:
        name = _server_of(item)
        item.add_marker(pytest.mark.xdist_group(name))
        if name in servers and item.get_closest_marker("once"):
            # by its name, so that each version has its share
            case = zlib.crc32(item.nodeid.replace(name, "", 1).encode())
            if servers.index(name) != case % len(servers):
                elsewhere.append(item)
    if elsewhere:
        config.hook.pytest_deselected(items=elsewhere)
        items[:] = [item for item in items if item not in set(elsewhere)]


@pytest.fixture(scope="session")
def server(request: pytest.FixtureRequest) -> Server:
    """The PostgreSQL installation that the test runs on."""
    assert isinstance(request.param, Server)
    return request.param


@pytest.fixture(scope="session")
def world(server: Server) -> Iterator[World]:
    """The clusters of that installation: source, target, third."""
    world = World(server)
    try:
        yield world
    finally:
        world.close()


@pytest.fixture
def encodings() -> tuple[str | None, str | None]:
    """Of source and target of ``pair``; None: that of the cluster.  To be parametrized."""
    return None, None


@pytest.fixture
def pair(
    world: World, request: pytest.FixtureRequest, encodings: tuple[str | None, str | None]
) -> Iterator[Pair]:
    """A source and a target database with a foreign server between them."""
    plain = request.node.get_closest_marker("plain_target") is not None
    pair = Pair(world, plain_target=plain, encodings=encodings)
    try:
        yield pair
    finally:
        pair.close()


@pytest.fixture
def trio(world: World, request: pytest.FixtureRequest) -> Iterator[Pair]:
    """A pair with a third node."""
    plain = request.node.get_closest_marker("plain_target") is not None
    trio = Pair(world, with_third=True, plain_target=plain)
    try:
        yield trio
    finally:
        trio.close()


@pytest.fixture
def node(world: World) -> Iterator[Node]:
    """One database with the extension, for what needs no second server."""
    node = Node(world.cluster("source"))
    try:
        yield node
    finally:
        node.close()
        world.repair()


@pytest.fixture
def proxy(pair: Pair) -> Proxy:
    """A proxy on the line of ``pair``, in mode 'pass'."""
    return pair.proxy()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
    """What the servers logged during a test that failed."""
    report = yield
    if report.failed:  # type: ignore[attr-defined]
        arguments = getattr(item, "funcargs", {})
        for name in ("pair", "trio"):
            if isinstance(arguments.get(name), Pair):
                for node_name, log in arguments[name].logs():
                    report.sections.append((f"log of {node_name}", log[-6000:]))  # type: ignore[attr-defined]
        if isinstance(arguments.get("node"), Node):
            report.sections.append(("log", arguments["node"].log()[-6000:]))  # type: ignore[attr-defined]
    return report
