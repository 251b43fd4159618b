"""What a machine has: versions, processors, dtypes that are really tried, kernels that really run, packages, files."""

from __future__ import annotations

import errno
import importlib.metadata
import os
import platform
import socket
import stat
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from time import perf_counter

import torch
from packaging.requirements import Requirement

from proxyserve import __version__
from proxyserve.api.errors import StartupError
from proxyserve.api.key_ring import Keys
from proxyserve.api.server import check_binding, check_tls
from proxyserve.api.telemetry import check_tracing
from proxyserve.cli.findings import Finding, Status
from proxyserve.cli.line_editor import state_folder
from proxyserve.cli.settings import ServeSettings
from proxyserve.config import ServerConfig
from proxyserve.engine.memory import kv_budget, memory_limit, spelled
from proxyserve_kernels import PickControls, Ref, Row, RowBatch, Term, backend_for

#: Versions that are always told; of others only what is wrong with them.
_TOLD = ("torch", "transformers", "llguidance")
#: What each optional package is for, and the extra that brings it (None: no extra does).
_OPTIONAL = {
    "torchao": ("--quantize", "quantize"),
    "triton": ("kernels on a GPU", "gpu"),
    "flashinfer-python": ("a choice of attention kernels on a GPU", None),
    "opentelemetry-sdk": ("--otlp-endpoint", "otel"),
    "matplotlib": ("charts of eval, calibrate and bench", "eval"),
}
#: Flags of /proc/cpuinfo, from the one that gives most.
_CPU_FLAGS = ("amx_bf16", "amx_int8", "avx512_bf16", "avx512f", "avx2")
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
#: Rows and columns of the matrices that are multiplied, and how far a result may be off, as a part of its size.
_SIZE, _TOLERANCE = 512, 0.02
_SECONDS = 0.15


def versions() -> Iterator[Finding]:
    """Against the minimums that the installed package names."""
    yield Finding("versions", "proxyserve", __version__)
    python, requirements = "", []
    try:
        python = importlib.metadata.metadata("proxyserve")["Requires-Python"] or ""
        requirements = importlib.metadata.requires("proxyserve") or []
    except importlib.metadata.PackageNotFoundError:
        yield Finding("versions", "minimums", "unknown: proxyserve is not installed here", "note")
    yield _version("Python", platform.python_version(), Requirement(f"python{python}"))
    for text in requirements:
        requirement = Requirement(text)
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        try:
            found = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            found = ""
        finding = _version(requirement.name, found, requirement)
        if finding.status != "ok" or requirement.name in _TOLD:
            yield finding


def _version(name: str, found: str, requirement: Requirement) -> Finding:
    wanted = str(requirement.specifier)
    data = {"version": found or None, "wanted": wanted or None}
    if not found:
        advice = f"pip install '{name}{wanted}'"
        return Finding("versions", name, f"missing, wanted {wanted}", "problem", advice, data)
    if not requirement.specifier.contains(found, prereleases=True):
        advice = f"pip install '{name}{wanted}'" if name != "Python" else "make .venv with a newer Python"
        return Finding("versions", name, f"{found}, wanted {wanted}", "problem", advice, data)
    return Finding("versions", name, f"{found} ({wanted})" if wanted else found, data=data)


def packages() -> Iterator[Finding]:
    for name, (purpose, extra) in _OPTIONAL.items():
        try:
            found = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            install = f"proxyserve[{extra}]" if extra else name
            yield Finding(
                "optional packages", name, f"not installed; pip install '{install}' for {purpose}", "note"
            )
        else:
            yield Finding("optional packages", name, f"{found}, for {purpose}", data={"version": found})


def processors() -> Iterator[Finding]:
    """The CPU and the GPUs, and each dtype on each of them."""
    flags = _cpu_flags()
    known = [flag for flag in _CPU_FLAGS if flag in flags]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    data = {
        "cores": cores,
        "threads": torch.get_num_threads(),
        "flags": known,
        "capability": torch.backends.cpu.get_cpu_capability(),
    }
    found = f"{cores} cores for this process, torch takes {data['threads']}; {', '.join(known) or platform.machine()}"
    yield Finding("processors", "CPU", found, data=data)
    threads = os.environ.get("OMP_NUM_THREADS")
    if threads is not None:
        yield Finding(
            "processors",
            "OMP_NUM_THREADS",
            f"{threads}: no more threads than that, whatever --threads says",
            "note",
        )
    yield from _dtypes(torch.device("cpu"))
    if not torch.cuda.is_available():
        built = torch.version.cuda
        why = "torch is built without CUDA" if built is None else f"torch for CUDA {built} finds none"
        yield Finding("processors", "GPU", f"none: {why}", "note")
        return
    for number in range(torch.cuda.device_count()):
        device = torch.device("cuda", number)
        free, total = torch.cuda.mem_get_info(device)
        [left, whole] = spelled([free, total])
        major, minor = torch.cuda.get_device_capability(device)
        name = torch.cuda.get_device_name(device)
        yield Finding(
            "processors",
            f"GPU {number}",
            f"{name}, capability {major}.{minor}, {left} of {whole} free",
            data={"name": name, "capability": [major, minor], "free": free, "total": total},
        )
        yield from _dtypes(device)


def _cpu_flags() -> set[str]:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("flags"):
                return set(line.partition(":")[2].split())
    except OSError:
        pass
    return set()


def _dtypes(device: torch.device) -> Iterator[Finding]:
    """Multiply matrices, compare with float64, and take the time."""
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(_SIZE, _SIZE, generator=generator) for _ in range(2))
    exact = left.double() @ right.double()
    for dtype in _DTYPES:
        name = f"{str(dtype).removeprefix('torch.')} on {device}"
        try:
            a, b = left.to(device, dtype), right.to(device, dtype)
            error = ((a @ b).double().cpu() - exact).abs().max() / exact.abs().max()
            seconds = _best(lambda a=a, b=b: a @ b, device)  # type: ignore[misc]
        except RuntimeError as failure:
            yield Finding(
                "processors",
                name,
                f"does not work: {_first_line(failure)}",
                "warning",
                f"choose another --dtype on {device}",
            )
            continue
        speed = 2 * _SIZE**3 / seconds / 1e9
        data = {"gflops": speed, "error": float(error)}
        if not float(error) < _TOLERANCE:
            yield Finding(
                "processors",
                name,
                f"wrong by {float(error):.1%}",
                "problem",
                "this build of torch computes wrongly here; install another one",
                data,
            )
        else:
            yield Finding("processors", name, f"{speed:,.3g} GFLOP/s ({_SIZE} x {_SIZE})", data=data)


def _best(run: Callable[[], object], device: torch.device) -> float:
    """Seconds of the fastest of a few runs, after one that warms up."""
    best, begun = float("inf"), perf_counter()
    run()
    while best == float("inf") or perf_counter() - begun < _SECONDS:
        started = perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, perf_counter() - started)
    return best


def kernels() -> Iterator[Finding]:
    """Fuse and draw with each backend that can run here, and compare with arithmetic by hand."""
    devices = [torch.device("cpu")]
    if torch.cuda.is_available():
        devices.append(torch.device("cuda"))
    for device in devices:
        for backend in ("torch", "triton") if device.type == "cuda" else ("torch",):
            yield _kernel(device, backend)
    if len(devices) == 1:
        yield Finding("kernels", "triton", "not tried: they are for a GPU", "note")


def _kernel(device: torch.device, name: str) -> Finding:
    what = f"{name} on {device}"
    generator = torch.Generator().manual_seed(0)
    base, tuned, untuned = (torch.randn(2, 1000, generator=generator) for _ in range(3))
    rows = [
        Row(Ref(0, 0), width=1000, terms=(Term(Ref(1, 0), Ref(2, 0), weight=0.5),)),
        Row(Ref(0, 1), width=1000),
    ]
    fused = base[0].double() + 0.5 * (tuned[0].double() - untuned[0].double())
    expected = [int(fused.argmax()), int(base[1].argmax())]
    logits = [law.to(device) for law in (base, tuned, untuned)]
    try:
        started = perf_counter()
        backend = backend_for(device, name)  # type: ignore[arg-type]
        controls = replace(PickControls.greedy(2), temperature=torch.zeros(2))
        tokens = [int(token) for token in backend.pick(RowBatch.of(logits, rows), controls).tokens]
        seconds = perf_counter() - started
    except Exception as failure:  # compilers fail in their own ways
        advice = "serve with --kernels torch, and report it" if name == "triton" else "report it"
        status: Status = "warning" if name == "triton" else "problem"
        return Finding("kernels", what, f"does not run: {_first_line(failure)}", status, advice)
    if tokens != expected:
        return Finding(
            "kernels",
            what,
            f"drew {tokens}, expected {expected}",
            "problem",
            "serve with the other --kernels, and report it",
        )
    return Finding("kernels", what, f"a fused step is right; the first took {seconds:.2g} s")


def memory(settings: ServeSettings, device: torch.device) -> Iterator[Finding]:
    """Before any models: what they may take."""
    limit = memory_limit(device, settings.experts.memory)
    kv = kv_budget(device, settings.engine.kv_memory)
    [most, blocks] = spelled([limit, kv])
    found = f"{most} for weights and KV on {device}, of which {blocks} for KV"
    yield Finding("memory", "limits", found, data={"limit": limit, "kv": kv})


def network(server: ServerConfig) -> Iterator[Finding]:
    """Whether the address may and can be listened on."""
    where = f"{server.host}:{server.port}"
    for what, check in (
        ("address", lambda: check_binding(server)),
        ("TLS", lambda: check_tls(server)),
        ("traces", lambda: check_tracing(server.otlp_endpoint)),
    ):
        try:
            check()
        except StartupError as error:
            yield Finding("network", what, "refused", "problem", error.message)
    ports = {"port": server.port} | (
        {} if server.admin_port is None else {"control plane": server.admin_port}
    )
    for what, port in ports.items():
        where = f"{server.host}:{port}"
        try:
            problem = _why_not(server.host, port)
        except OSError as error:
            yield Finding(
                "network", what, f"{where}: {error.strerror}", "problem", "choose another --host or --port"
            )
            continue
        if problem is None:
            yield Finding("network", what, f"{where} is free", data={"host": server.host, "port": port})
        else:
            option = "--port" if what == "port" else "--admin-port"
            advice = f"end what listens there, or choose another {option}"
            yield Finding("network", what, f"{where} {problem}", "warning", advice)


def _why_not(host: str, port: int) -> str | None:
    """Nothing if the port could be taken; it is given back at once. Raises OSError for an address that is not here."""
    family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    with socket.socket(family, kind, protocol) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(address)
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                return "is in use"
            if error.errno == errno.EACCES:
                return "may not be taken by this user"
            raise
    return None


def files(settings: ServeSettings) -> Iterator[Finding]:
    """Who can read keys and state, and whether they can be used."""
    server = settings.server
    keys = {"--api-key-file": server.api_key_file, "--admin-key-file": server.admin_key_file}
    given = {option: file for option, file in keys.items() if file is not None}
    for option, file in given.items():
        yield _private(option, file, "chmod 600")
    if given:
        try:
            ring = Keys.of(server)
        except StartupError as error:
            yield Finding("files", "keys", "cannot be used", "problem", error.message)
        else:
            count = f"{len(ring.ring)} keys, {ring.ring.admins} of administrators"
            yield Finding("files", "keys", count)
            for warning in ring.warnings:
                yield Finding("files", "keys", "a warning", "warning", warning)
    state = settings.experts.state_dir
    if state is not None:
        yield _folder("--state-dir", state)
    for root in settings.experts.roots:
        if os.access(root, os.R_OK | os.X_OK):
            yield Finding("files", "--expert-root", str(root))
        else:
            yield Finding(
                "files",
                "--expert-root",
                f"{root} cannot be read",
                "problem",
                f"let this user read {root}",
            )
    history = state_folder() / "chat_history"
    if history.exists():
        yield _private("chat history", history, "chmod 600")


def _folder(option: str, folder: Path) -> Finding:
    if not folder.exists():
        above = next(parent for parent in folder.absolute().parents if parent.exists())
        if os.access(above, os.W_OK | os.X_OK):
            return Finding("files", option, f"{folder} will be made")
        return Finding("files", option, f"{folder} cannot be made", "problem", f"let this user write {above}")
    if not os.access(folder, os.W_OK | os.X_OK):
        return Finding(
            "files", option, f"{folder} cannot be written", "problem", f"let this user write {folder}"
        )
    return _private(option, folder, "chmod 700")


def _private(what: str, path: Path, repair: str) -> Finding:
    mode = stat.S_IMODE(path.stat().st_mode)
    data = {"path": str(path), "mode": f"{mode:04o}"}
    if mode & 0o077:
        who = "anybody" if mode & 0o007 else "its group"
        return Finding(
            "files", what, f"{path} is open to {who} ({mode:04o})", "warning", f"{repair} {path}", data
        )
    return Finding("files", what, f"{path}, for its owner alone", data=data)


def _first_line(failure: Exception) -> str:
    return (str(failure).strip().splitlines() or [type(failure).__name__])[0][:200]
